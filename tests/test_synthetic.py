"""Drawn data: the same bytes for any number of workers, labels that agree with each other and with the
pictures, FreiHAND's files as its authors ship them; and how one picture is drawn."""

import filecmp
import json

import numpy as np
import pytest
import torch
from PIL import Image

import draw
import make_synthetic
import photo
import rooms
import surfaces
from data import HandIndex
from mano import TIPS, Mano, joints_from_vertices, mirror_arrays, rotmat_from_axis_angle
from synthetic_hand import synthetic_mano

# Of the fixture `freihand`: of the pictures' mean colours the mean and the deviation; the mean joint.
PLAIN_MEAN = (105.009, 106.806, 79.252)
PLAIN_DEVIATION = (38.235, 29.477, 23.392)
PLAIN_JOINT = (0.01004631, -0.00985113, 0.38854949)
INDEX_FLAGS = ["--hands", "14", "--videos", "7", "--seed", "3", "--size", "64"]


@pytest.fixture(scope="module")
def arrays():
    return synthetic_mano()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "index"
    make_synthetic.main(["--out", str(out), *INDEX_FLAGS, "--workers", "1"])
    return HandIndex(out)


@pytest.fixture(scope="module")
def freihand(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "freihand"
    flags = ["--look", "plain", "--layout", "freihand", "--hands", "5", "--videos", "3", "--size", "96",
             "--workers", "1"]
    make_synthetic.main(["--out", str(out), *flags])
    return out


def all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_same_bytes_for_two_workers(index, tmp_path):
    make_synthetic.main(["--out", str(tmp_path / "again"), *INDEX_FLAGS, "--workers", "2"])
    names = all_files(index.path)
    assert names == all_files(tmp_path / "again") and len(names) > 14
    assert filecmp.cmpfiles(index.path, tmp_path / "again", names, shallow=False)[0] == names


def test_another_seed_draws_others(index, tmp_path):
    flags = [*INDEX_FLAGS, "--workers", "1"]
    flags[flags.index("--seed") + 1] = "2"
    make_synthetic.main(["--out", str(tmp_path / "b"), *flags])
    for name in ("betas", "pose", "keypoints"):
        other = np.load(tmp_path / "b" / f"{name}.npy")
        stored = np.asarray(index.columns[name])
        assert other.shape == stored.shape and (other != stored).any(tuple(range(1, stored.ndim))).all()


def test_labels_agree(index, arrays):
    columns = {name: np.array(value) for name, value in index.columns.items() if name != "image"}
    numbers = [value for name, value in columns.items() if value.ndim > 1 and name != "size"]
    assert all(value.dtype == np.float32 for value in numbers)
    pixels = columns["joints"].astype(float) @ columns["K"].astype(float).transpose(0, 2, 1)
    assert np.abs(pixels[..., :2] / pixels[..., 2:] - columns["joints2d"]).max() < 0.01
    regressed = joints_from_vertices(torch.from_numpy(columns["vertices"]), arrays).numpy()
    np.testing.assert_allclose(regressed, columns["joints"], atol=1e-6)
    bone = np.linalg.norm(columns["joints"][:, 9] - columns["joints"][:, 10], axis=1)
    np.testing.assert_allclose(columns["scale"], bone, atol=1e-6)
    np.testing.assert_allclose(columns["box"][:, :2], columns["joints2d"].min(1) + 0.5, atol=1e-4)
    np.testing.assert_allclose(columns["box"][:, 2:], columns["joints2d"].max(1) + 0.5, atol=1e-4)
    inside = (columns["joints2d"] >= -0.5) & (columns["joints2d"] <= 63.5)
    np.testing.assert_array_equal(columns["visible"], inside.all(2))
    assert set(np.unique(columns["side"])) == {0, 1}
    for side in (0, 1):
        rows = columns["side"] == side
        error = np.linalg.norm(columns["keypoints"] - columns["joints2d"], axis=2)[rows]
        detected = columns["keypoints_score"][rows] > 0
        assert np.median(error[detected]) < 2  # pixels
        assert (columns["keypoints"][rows][~detected] == 0).all()
    assert index.meta["joints"] == "freihand" and index.meta["pose_mean"] is True


def test_pose_rebuilds_the_mesh_of_both_sides(index, arrays):
    columns = {name: np.asarray(index.columns[name]) for name in ("pose", "betas", "vertices", "side")}
    for side, number in (("right", 0), ("left", 1)):
        rows = columns["side"] == number
        hand = Mano(arrays, side=side).double()
        pose = torch.from_numpy(columns["pose"][rows].astype(float)).reshape(-1, 16, 3)
        pose = torch.cat([pose[:, :1], pose[:, 1:] + hand.hands_mean], 1)
        betas = torch.from_numpy(columns["betas"][rows].astype(float))
        vertices = hand(rotmat_from_axis_angle(pose), betas)[0].numpy()
        stored = columns["vertices"][rows]
        error = (vertices - vertices.mean(1, keepdims=True)) - (stored - stored.mean(1, keepdims=True))
        assert np.abs(error).max() < 2e-6


def test_left_hands_are_mirrored(tmp_path, arrays):
    flags = ["--hands", "40", "--videos", "40", "--size", "32", "--workers", "1"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    index = HandIndex(tmp_path / "a")
    joints = np.asarray(index.columns["joints"]).astype(float)
    across = np.cross(joints[:, 5] - joints[:, 0], joints[:, 17] - joints[:, 0])
    flexed = joints[:, [8, 12, 16, 20]].mean(1) - joints[:, [5, 9, 13, 17]].mean(1)
    right_handed = (across * flexed).sum(1) > 0
    side = np.asarray(index.columns["side"])
    assert 0.1 < side.mean() < 0.5
    assert (right_handed == (side == 0)).mean() > 0.85  # a stretched hand may give either sign


def test_videos_share_identity_and_move_smoothly(tmp_path):
    flags = ["--hands", "40", "--videos", "2", "--size", "32", "--workers", "1"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    columns = HandIndex(tmp_path / "a").columns
    video, betas, joints = (np.asarray(columns[name]) for name in ("video", "betas", "joints"))
    assert (video == np.repeat([0, 1], 20)).all()
    assert (betas[:20] == betas[0]).all() and (betas[20:] == betas[20]).all()
    assert (betas[0] != betas[20]).any()
    move = np.linalg.norm(np.diff(joints, axis=0), axis=2).mean(1)
    assert np.median(move) < 0.03 and move[:19].max() < 0.12
    assert np.ptp(joints[:20] - joints[:20, :1], axis=0).max() > 0.02  # and they do move
    error = np.asarray(columns["keypoints"]) - np.asarray(columns["joints2d"])
    error[np.asarray(columns["keypoints_score"]) == 0] = 0
    error = error.reshape(40, -1)
    assert np.abs(np.corrcoef(error[:20])[0, 1:]).max() < 0.9  # every frame has noise of its own


def test_pictures_of_both_sides_show_the_labelled_mesh(tmp_path, monkeypatch, arrays):
    """In place of the photograph: white where something is drawn."""

    def coverage(rng, camera, light, background, layer, motion):
        return np.repeat(np.uint8(255 * layer[3])[..., None], 3, axis=2)

    monkeypatch.setattr(photo, "photograph", coverage)
    flags = ["--hands", "12", "--videos", "12", "--size", "64", "--seed", "1", "--workers", "1"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    index = HandIndex(tmp_path / "a")
    side = np.asarray(index.columns["side"])
    assert set(side) == {0, 1}
    for row in range(12):
        picture = np.asarray(Image.open(tmp_path / "a" / "images" / f"{row:08d}.jpg"))[..., 0]
        faces = arrays["f"] if side[row] == 0 else arrays["f"][:, ::-1]
        hand = outline(index.columns["vertices"][row], index.columns["K"][row], faces, picture.shape)
        assert hand.sum() > 200 and (picture[hand] > 127).mean() > 0.97


def outline(vertices, K, faces, shape):
    """Pixels (H, W) that a mesh covers, whose faces are seen from outside."""
    pixels = vertices.astype(float) @ K.T
    points = np.concatenate([pixels[:, :2] / pixels[:, 2:] + 0.5, pixels[:, 2:]], 1)
    return draw.rasterise(points, faces, shape, cull=True)[0] >= 0


def test_keypoints_look_detected():
    rng = np.random.default_rng(0)
    joints2d, hidden = rng.uniform(20, 100, (21, 2)), np.arange(21) % 3 == 0
    drawn = [make_synthetic.detect(np.random.default_rng(k), joints2d, hidden, 128) for k in range(300)]
    keypoints, score = (np.array(part) for part in zip(*drawn, strict=True))
    found = score > 0
    assert 0.9 < found.mean() < 1 and (~found).all(1).any() and score.max() <= 1
    error = np.linalg.norm(keypoints - joints2d, axis=2)
    visible, covered = error[:, ~hidden][found[:, ~hidden]], error[:, hidden][found[:, hidden]]
    assert 0.5 < np.median(visible) < np.median(covered) < 12
    assert np.percentile(error[found], 99) > 20  # exchanged joints


def test_freihand_layout(freihand, arrays):
    names = set(all_files(freihand))
    expected = {f"training/rgb/{k:08d}.jpg" for k in range(16)}
    expected |= {f"training/mask/{k:08d}.jpg" for k in range(4)}
    expected |= {"evaluation/rgb/00000000.jpg", "samples.png"}
    expected |= {f"{part}_{name}.json" for part in ("training", "evaluation")
                 for name in ("K", "mano", "scale", "verts", "xyz")}
    assert names == expected
    hand = Mano(arrays).double()
    for part, count in (("training", 4), ("evaluation", 1)):
        K, mano, scale, verts, xyz = (np.array(json.loads((freihand / f"{part}_{name}.json").read_text()))
                                      for name in ("K", "mano", "scale", "verts", "xyz"))
        assert (K.shape, mano.shape, scale.shape) == ((count, 3, 3), (count, 1, 61), (count,))
        assert (verts.shape, xyz.shape) == ((count, 778, 3), (count, 21, 3))
        pose, betas, uv, s = np.split(mano[:, 0], [48, 58, 60], 1)
        angles = torch.from_numpy(pose + np.r_[np.zeros(3), arrays["hands_mean"]]).reshape(-1, 16, 3)
        rebuilt = hand(rotmat_from_axis_angle(angles), torch.from_numpy(betas))[0]
        joints = joints_from_vertices(rebuilt, arrays).numpy()
        focal = (K[:, 0, 0] + K[:, 1, 1]) / 2
        root = np.concatenate([(uv - K[:, :2, 2]) / s, focal[:, None] / s], 1)
        np.testing.assert_allclose(rebuilt.numpy() + (root - joints[:, 9])[:, None], verts, atol=1e-6)
        regressed = joints_from_vertices(torch.from_numpy(verts), arrays).numpy()
        np.testing.assert_allclose(regressed, xyz, atol=1e-9)
        np.testing.assert_allclose(scale, np.linalg.norm(xyz[:, 9] - xyz[:, 10], axis=1), atol=1e-9)


def test_pictures_show_the_labelled_hand(freihand, arrays):
    K = np.array(json.loads((freihand / "training_K.json").read_text()))
    verts = np.array(json.loads((freihand / "training_verts.json").read_text()))
    for k in range(4):
        mask = np.asarray(Image.open(freihand / f"training/mask/{k:08d}.jpg")) > 127
        hand = outline(verts[k], K[k], arrays["f"], mask.shape)
        assert (mask & ~hand).sum() < 0.06 * mask.sum() and mask.sum() > 0.4 * hand.sum()
        green = np.asarray(Image.open(freihand / f"training/rgb/{k:08d}.jpg")).astype(int)
        other = np.asarray(Image.open(freihand / f"training/rgb/{k + 4:08d}.jpg"))
        assert np.ptp(green[mask].mean(0)[[0, 1]]) < 100 and not np.array_equal(green, other)
        screen = green[..., 1] - green[..., 0] > 40
        assert (screen & mask).sum() < 0.05 * mask.sum() and screen.mean() > 0.15


def test_the_plain_look_stays_what_it_was(freihand):
    """Measured before there was another look. Mean colours, because other processors round other bits."""
    colors = [np.asarray(Image.open(path)).mean((0, 1)) for path in sorted(freihand.glob("*/rgb/*.jpg"))]
    assert len(colors) == 17
    np.testing.assert_allclose(np.mean(colors, 0), PLAIN_MEAN, atol=0.05)
    np.testing.assert_allclose(np.std(colors, 0), PLAIN_DEVIATION, atol=0.05)
    joints = np.array(json.loads((freihand / "training_xyz.json").read_text()))
    np.testing.assert_allclose(joints.mean((0, 1)), PLAIN_JOINT, atol=1e-6)


def test_looks_differ(tmp_path, index):
    make_synthetic.main(["--out", str(tmp_path / "a"), *INDEX_FLAGS, "--workers", "1", "--look", "plain"])
    for row in range(14):
        new, old = (np.asarray(Image.open(path / f"images/{row:08d}.jpg"), float)
                    for path in (index.path, tmp_path / "a"))
        assert np.abs(new - old).mean() > 5


def test_backgrounds_are_cut_from_the_photographs(tmp_path):
    """A folder of one red photograph: its colour lies behind most hands, and behind none without it."""
    (tmp_path / "walls").mkdir()
    flags = ["--hands", "12", "--videos", "12", "--size", "32", "--workers", "1", "--seed", "4"]
    with pytest.raises(ValueError, match="--backgrounds .*walls: no images"):
        make_synthetic.main(["--out", str(tmp_path / "a"), *flags, "--backgrounds", str(tmp_path / "walls")])
    (tmp_path / "walls" / "torn.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="torn.png"):
        make_synthetic.main(["--out", str(tmp_path / "a"), *flags, "--backgrounds", str(tmp_path / "walls")])
    assert not (tmp_path / "a").exists()
    (tmp_path / "walls" / "torn.png").unlink()
    Image.new("RGB", (90, 70), (230, 0, 0)).save(tmp_path / "walls" / "red.png")
    reds = []
    for name, more in (("with", ["--backgrounds", str(tmp_path / "walls")]), ("without", [])):
        make_synthetic.main(["--out", str(tmp_path / name), *flags, *more])
        corners = [np.asarray(Image.open(path).convert("RGB").crop((0, 0, 4, 4)), float).mean((0, 1))
                   for path in sorted((tmp_path / name / "images").glob("*.jpg"))]
        reds.append(sum(r > 100 and g + b < 0.4 * r for r, g, b in corners))
    assert reds[0] >= 6 > 2 >= reds[1]


def test_a_cut_is_part_of_the_photograph():
    ramp = np.linspace(0, 255, 300).astype(np.uint8)
    photograph = Image.fromarray(np.repeat(np.tile(ramp, (200, 1))[..., None], 3, 2))
    for seed in range(8):
        cut = rooms.cut_of(np.random.default_rng(seed), photograph, 40)
        assert cut.shape == (3, 40, 40) and cut.min() >= 0 and cut.max() <= 1
        assert np.ptp(cut, axis=1).max() < 0.02  # upright
        assert 0.3 < np.ptp(cut[0, 0]) < 0.7  # 100 to 200 of 300 columns


@pytest.mark.parametrize("flags, message", [
    (["--hands", "0"], "--hands 0"), (["--hands", "1", "--layout", "freihand"], "--hands 1: .* 2 "),
    (["--size", "8"], "--size 8"), (["--hands", "3", "--videos", "4"], "--videos 4"),
    (["--seed", "-1"], "--seed -1"), (["--workers", "0"], "--workers 0"), (["--tilt", "nan"], "--tilt nan"),
    (["--mano", "nowhere.pkl"], "nowhere.pkl"), (["--backgrounds", "nowhere"], "--backgrounds nowhere")])
def test_mistakes_cost_one_line(tmp_path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    assert not (tmp_path / "a").exists()


def test_draws_another_hand_but_no_left_file(tmp_path, arrays):
    other = synthetic_mano(seed=3)
    np.savez(tmp_path / "right.npz", **other)
    np.savez(tmp_path / "left.npz", **mirror_arrays(other))
    flags = ["--hands", "2", "--size", "32", "--workers", "1", "--mano"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags, str(tmp_path / "right.npz")])
    index = HandIndex(tmp_path / "a")
    regressed = joints_from_vertices(torch.from_numpy(np.array(index.columns["vertices"])), other).numpy()
    np.testing.assert_allclose(regressed, index.columns["joints"], atol=1e-6)
    with pytest.raises(ValueError, match="MANO_RIGHT"):
        make_synthetic.main(["--out", str(tmp_path / "b"), *flags, str(tmp_path / "left.npz")])


def test_a_set_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(make_synthetic, "write_samples", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_synthetic.main(["--out", str(tmp_path / "new"), "--hands", "1", "--size", "32"])
    assert not list(tmp_path.iterdir())


def test_never_writes_into_a_used_folder(index):
    with pytest.raises(ValueError, match="files already"):
        make_synthetic.main(["--out", str(index.path), "--hands", "2"])


# ------------------------------------------------------------------------------------------------ one picture
@pytest.fixture(scope="module")
def surface(arrays):
    normals = draw.vertex_normals(arrays["v_template"], arrays["f"])
    return surfaces.HandSurface(arrays, normals, TIPS["freihand"])


def test_the_surface_knows_its_parts(surface, arrays):
    rest, dorsal = surface.coordinates[:778, :3], surface.coordinates[:778, 3]
    np.testing.assert_allclose(rest, arrays["v_template"], atol=1e-6)
    assert surface.back[1] > 0.9 and surface.across[2] > 0.9 and surface.wrist_axis[0] > 0.9  # MANO's frame
    palm = (arrays["weights"].argmax(1) == 0) & (np.abs(dorsal) > 0.5)
    middle = rest[palm, 1].mean()
    assert ((rest[palm, 1] > middle) == (dorsal[palm] > 0)).mean() > 0.9  # the back of the hand is +y
    nail = np.linalg.norm(surface.coordinates[:778, 7:], axis=1) < 1
    for finger, tip in zip(surfaces.FINGER_JOINTS, TIPS["freihand"], strict=True):
        skin = np.isin(arrays["weights"].argmax(1), finger)
        distance = np.linalg.norm(rest[skin, None] - arrays["J"][list(finger)], axis=2)
        creases = np.abs(surface.coordinates[:778][skin, 4:7])
        assert (creases <= distance + 1e-6).all()  # a crease lies in a plane through its joint
        assert creases[:, 1:].min(0).max() < 0.003
        assert (np.linalg.norm(rest[nail] - rest[tip], axis=1) < 0.015).any()
    edges = {tuple(edge) for face in surface.faces for edge in zip(face, np.roll(face, -1), strict=True)}
    opening = [edge for edge in edges if edge[::-1] not in edges]
    assert len(edges) == 3 * len(surface.faces)  # no edge twice in one direction: all faces turn the same way
    assert len(opening) == 16 and min(map(min, opening)) >= len(surface.coordinates) - 16  # open at the elbow


def test_the_forearm_turns_with_the_picture(surface, arrays):
    arm = surfaces.random_arm(np.random.default_rng(0))
    arm.sleeve = 0.03
    rotmat = rotmat_from_axis_angle(torch.tensor([[0.4, -1.0, 1.2]], dtype=torch.float64))[0].numpy()
    vertices = arrays["v_template"] @ rotmat.T + [0.1, 0.0, 0.6]
    rings, sleeve = surfaces.forearm(surface, arm, vertices, rotmat)
    assert np.linalg.norm(rings[:16] - vertices[surface.wrist], axis=1).max() < 0.02
    turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])  # about the camera's axis
    turned = surfaces.forearm(surface, arm, vertices @ turn.T, turn @ rotmat)
    np.testing.assert_allclose(turned[0], rings @ turn.T, atol=1e-9)
    np.testing.assert_allclose(turned[1], sleeve @ turn.T, atol=1e-9)
    arm.sleeve = None
    assert surfaces.forearm(surface, arm, vertices, rotmat)[1] is None


def test_an_object_is_a_closed_lump():
    for seed in range(5):
        vertices, faces, colors = surfaces.random_object(np.random.default_rng(seed))
        a, b, c = vertices[faces].transpose(1, 0, 2)
        volume = (np.cross(a, b) * c).sum() / 6  # positive, so faces look outwards
        assert 0.4 < volume / np.ptp(vertices, axis=0).prod() <= 1  # a ball fills 0.52 of its box
        assert 0.02 < np.ptp(vertices, axis=0).min() < np.ptp(vertices, axis=0).max() < 0.15
        assert colors.shape == vertices.shape and colors.min() > 0 and colors.max() < 1


def test_meshes_of_a_scene_look_outwards(surface, arrays):
    """Objects are lit where they face the light only if their faces run counter-clockwise."""
    rng = np.random.default_rng(0)
    person = make_synthetic.random_person(rng, 1, make_synthetic.LOOKS["plain"])
    person.held = surfaces.random_object(rng)
    person.occluder = surfaces.random_object(rng)
    make_synthetic.start_worker(arrays)
    labels = make_synthetic.random_labels(rng, make_synthetic.TOOLS["hand"], arrays, 1, 64, 35.0, 0.25)
    meshes = make_synthetic.build_scene(surface, person, labels, 0)
    for mesh in meshes[-2:]:
        a, b, c = (mesh.vertices - mesh.vertices.mean(0))[mesh.faces].transpose(1, 0, 2)
        assert (np.cross(a, b) * c).sum() > 0 and mesh.closed


SUN = photo.Light(direction=np.array([0.0, 0.0, -1.0]), key=np.ones(3), sky=np.full(3, 0.3),
                  bounce=np.full(3, 0.1), casts_shadow=False)  # from the camera


def square(centre, side, color=(0.3, 0.3, 0.3)):
    """A square that faces the camera."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0.0]]) * side / 2 + centre
    faces = np.array([[0, 3, 2], [0, 2, 1]])
    normals = np.tile([0.0, 0.0, -1.0], (4, 1))
    return photo.Mesh(corners, faces, normals, np.tile(color, (4, 1)), photo.matt, wrap=(0, 0, 0))


CAMERA_MATRIX = np.array([[64.0, 0, 31.5], [0, 64, 31.5], [0, 0, 1]])


def test_meshes_are_projected_and_numbered():
    meshes = [square([0, 0, 1.0], 0.5), square([0.125, 0, 0.8], 0.1, color=(0.9, 0.1, 0.1))]
    seen = photo.see(meshes, CAMERA_MATRIX, 64, draw.rasterise)
    layer, depth, vertex = photo.illuminate(seen, SUN, draw.rasterise), seen.depth, seen.vertex
    assert layer.shape == (4, 64, 64) and depth.shape == vertex.shape == (128, 128)
    rows, columns = np.nonzero(layer[3] == 1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 16, 47)  # 0.5 m at 64 px/m
    near = vertex >= 4
    rows, columns = np.nonzero(near)
    np.testing.assert_allclose([rows.mean(), columns.mean()], [63.5, 63.5 + 2 * 10], atol=0.6)
    np.testing.assert_allclose(depth[near], 0.8, atol=1e-6)
    np.testing.assert_allclose(depth[(vertex >= 0) & ~near], 1.0, atol=1e-6)
    assert np.isinf(depth[vertex < 0]).all()
    red = layer[:, 32, 42]
    assert red[0] > 2 * red[1]


def test_nothing_in_front_of_the_camera_is_nothing():
    seen = photo.see([square([0, 0, -1.0], 0.5)], CAMERA_MATRIX, 64, draw.rasterise)
    assert not photo.illuminate(seen, SUN, draw.rasterise).any() and (seen.vertex == -1).all()


def test_shadows_fall_away_from_the_light():
    wall, small = square([0, 0, 1.0], 0.9), square([0, 0, 0.8], 0.1)
    x = 0.6
    dark = np.zeros(3)  # nothing but the key light
    light = photo.Light(np.array([x, 0, -np.sqrt(1 - x * x)]), SUN.key, dark, dark, False)
    seen = photo.see([wall, small], CAMERA_MATRIX, 64, draw.rasterise)
    shaded = photo.illuminate(seen, light, draw.rasterise)
    lit_wall = shaded[0, 10, 32]
    shadow = (shaded[0] < 0.5 * lit_wall) & (shaded[3] == 1)
    rows, columns = np.nonzero(shadow)
    assert lit_wall > 0.3 and 20 < len(rows) < 60  # 6.4 x 6.4 pixels
    # The light comes from the right: the shadow lies 0.2 m / 0.8 * 0.6 = 0.15 m, 9.6 pixels, to the left.
    np.testing.assert_allclose([rows.mean(), columns.mean()], [31.5, 31.5 - 9.6], atol=1)


def test_a_perfect_camera_shows_what_is_there():
    camera = photo.Camera(gain=np.ones(3), noise=0.0, defocus=0.0, quality=90)
    background = np.full((3, 80, 80), 0.25, np.float32)
    layer = np.zeros((4, 64, 64), np.float32)
    layer[:, 10:20, 30:50] = np.reshape([1.0, 0.5, 0.0, 1.0], (4, 1, 1))
    layer[:, 20] = np.reshape([0.25, 0.25, 0.25, 0.5], (4, 1))  # premultiplied: half covered by grey 0.5
    seed = next(k for k in range(9) if np.random.default_rng(k).random(3)[2] > 0.15)  # without motion blur
    picture = photo.photograph(np.random.default_rng(seed), camera, SUN, background, layer, np.zeros(2))
    expected = np.full((64, 64, 3), 63)
    expected[10:20, 30:50] = 255, 127, 0
    expected[20] = 95
    np.testing.assert_array_equal(picture, expected)


def test_a_background_may_show_the_tones():
    tones = np.array([[1.0, 0.0, 1.0]])
    without = [photo.random_background(np.random.default_rng(k), 32) for k in range(20)]
    given = [photo.random_background(np.random.default_rng(k), 32, tones) for k in range(20)]
    assert all(b.shape == (3, 40, 40) and b.min() >= 0 and b.max() <= 1 for b in without + given)
    pink = [np.abs(b - tones[0][:, None, None]).max(0).min() < 0.1 for b in given]
    assert any(pink) and not all(pink)
