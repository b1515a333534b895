"""predict.py on people's photographs and videos: crops and sides, focal lengths and places in the room,
detectors, tracks and their smoothing, names and what may be overwritten."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import call
from PIL import Image
from scipy.spatial.transform import Rotation

import camera
import predict
import tracking
import video
from data import HandIndex, image_size, list_images
from make_synthetic import random_labels
from mano import Mano, rotmat_from_axis_angle
from synthetic_hand import synthetic_mano

FLIP = np.float32([-1, 1, 1])


def picture(path, size=(300, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path, **options)
    return path


def refused(words, *command):
    done = call(*command, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr


# ------------------------------------------------------------------------------------------ crops, both sides
def volume(path):
    """Of the mesh in an .obj file; negative where its faces show their backs."""
    lines = [line.split() for line in path.read_text().splitlines()]
    points = np.array([line[1:] for line in lines if line[0] == "v"], float)
    faces = np.array([line[1:] for line in lines if line[0] == "f"], int) - 1
    a, b, c = points[faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_photographs_with_and_without_boxes_and_of_both_sides(hands, checkpoint, tmp_path):
    index = HandIndex(hands / "val")
    photo = tmp_path / "photo.png"
    with Image.open(index.image_path(0)) as image:
        image.resize((300, 200)).save(photo)
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirror.png")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1,side\nphoto.png,50,40,150,160,right\n"
                                        "photo.png,80,40,180,160,right\nmirror.png,150,40,250,160,left\n")
    command = ["predict.py", "--checkpoint", checkpoint, "--out"]
    call(*command, tmp_path / "whole", photo)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["photo.npz", "photo.obj", "photo.png"]
    hand = np.load(tmp_path / "whole/photo.npz")
    assert hand["vertices"].shape == (778, 3) and hand["rotmats"].shape == (16, 3, 3)
    assert hand["side"] == "right"
    assert image_size(tmp_path / "whole/photo.png") == (300, 200)
    call(*command, tmp_path / "boxes", photo, tmp_path / "mirror.png", "--boxes", tmp_path / "boxes.csv")
    right, left = (np.load(tmp_path / f"boxes/{name}.npz") for name in ("photo", "mirror"))
    assert (tmp_path / "boxes/photo_2.obj").exists() and left["side"] == "left"
    first, second, together = ((pixels(tmp_path / f"boxes/{name}.png") != pixels(photo)).any(2)
                               for name in ("photo", "photo_2", "photo_all"))
    assert (together == first | second).all()
    assert not (tmp_path / "boxes/mirror_all.png").exists()
    assert len(list_images(tmp_path / "boxes")) == 0
    for name in ("vertices", "joints", "camera", "translation"):
        flip = [1, -1, 1] if name == "camera" else FLIP
        np.testing.assert_allclose(left[name], right[name] * flip, rtol=2e-4, atol=2e-5)
    volumes = [volume(tmp_path / f"boxes/{name}.obj") for name in ("photo", "mirror")]
    assert volumes[0] > 0 and volumes[1] == pytest.approx(volumes[0], rel=1e-2)
    covered, mirrored = ((pixels(tmp_path / f"boxes/{name}.png") != pixels(tmp_path / f"{name}.png")).any(2)
                         for name in ("photo", "mirror"))  # by the mesh
    assert covered.mean() > 0.01 and (covered != mirrored[:, ::-1]).mean() < 0.03 * covered.mean()


def test_a_left_hand_lies_in_the_photograph_where_its_mirror_image_lies():
    """One estimate, as a right hand and as a left hand of the mirrored photograph: every pixel is mirrored.

    By the crop's camera and by the full one."""
    hand = Mano(synthetic_mano())
    vertices, joints = hand(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))
    estimate = {"vertices": vertices[0].numpy(), "joints": joints[0].numpy(), "rotmats": np.zeros((16, 3, 3)),
                "betas": np.zeros(10), "camera": np.float32([8, 0.03, -0.01])}
    width, height, focal = 300, 200, 400.0
    K = camera.pinhole(focal, (width, height))
    placed = []
    for side, x in (("right", 110), ("left", width - 110)):
        crop = np.array([x - 60, 30, x + 60, 150])
        placed.append(predict.place_hand(predict._as_seen(estimate, side), crop, side, K, "focal"))
    right, left = placed

    def by_crop(placed):
        x0, y0, x1, _ = placed["crop"]
        scale, tx, ty = placed["camera"]
        return (scale * (placed["vertices"][:, :2] + [tx, ty]) + 1) / 2 * (x1 - x0) + [x0, y0]

    def by_full_camera(placed):
        x, y, z = (placed["vertices"] + placed["translation"]).T
        return np.stack([focal * x / z + width / 2, focal * y / z + height / 2], 1)  # pixel edges

    for project in (by_crop, by_full_camera):
        a, b = project(right), project(left)
        np.testing.assert_allclose(b, [width, 0] + a * [-1, 1], atol=1e-2)
    np.testing.assert_allclose(by_full_camera(right), by_crop(right), atol=8)  # perspective bends it a little


# ------------------------------------------------------------------------------------------ without any flags
def test_released_weights_are_the_default(checkpoint, hands, tmp_path, monkeypatch):
    """Half precision and no state of a run, found beside the script from any folder. Missing, they are named.
    """
    photo = HandIndex(hands / "val").image_path(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "WEIGHTS", tmp_path / "weights/hand.pt")
    refused("weights/hand.pt is missing: give --checkpoint", "predict.py", photo)
    state = torch.load(checkpoint, weights_only=True)
    kept = {name: state[name] for name in ("kind", "format", "hand", "encoder", "head", "box_scale")}
    halves = {name: value.half() for name, value in state["ema"].items()}
    predict.WEIGHTS.parent.mkdir()
    torch.save(kept | {"ema": halves}, predict.WEIGHTS)
    call("predict.py", photo)
    call("predict.py", photo, "--checkpoint", checkpoint, "--out", "full")
    half, full = (np.load(f"{name}/{photo.stem}.npz") for name in ("predictions", "full"))
    off = np.abs(half["joints"] - full["joints"]).max()
    assert 0 < off < 5e-4  # metres


# ---------------------------------------------------------------------------------------- where in the room
@functools.cache
def seen_hands(count=60):
    """Drawn hands with known cameras: the true labels, and for each the Look and the estimate of a network
    without error: the true mesh about the wrist, and the weak perspective that fits its joints best."""
    arrays = synthetic_mano()
    hand = Mano(arrays).double()
    rng = np.random.default_rng(0)
    hands = []
    for _ in range(count):
        labels = random_labels(rng, hand, arrays, 1, 320, 35.0, 0.25)
        labels = {name: value[0] for name, value in labels.items()}
        joints = labels["joints"] - labels["joints"][0]
        x, y = labels["joints2d"].T
        crop = np.array([x.min() - 20, y.min() - 20, x.min() - 20, y.min() - 20])
        crop[2:] += 40 + max(np.ptp(x), np.ptp(y))
        half = (crop[2] - crop[0]) / 2
        in_view = (labels["joints2d"] + 0.5 - (crop[:2] + crop[2:]) / 2) / half  # (21,2) in [-1,1]
        centred = joints[:, :2] - joints[:, :2].mean(0)
        scale = (centred * in_view).sum() / (centred ** 2).sum()
        shift = in_view.mean(0) / scale - joints[:, :2].mean(0)
        estimate = {"joints": joints, "vertices": labels["vertices"] - labels["joints"][0],
                    "rotmats": np.zeros((16, 3, 3)), "betas": labels["betas"],
                    "camera": np.array([scale, *shift])}
        hands.append((labels, SimpleNamespace(side="right", crop=crop), estimate))
    return hands


def wrist_errors(focal_of, factor=1.0, grown=1.0):
    """(N,) metres between the true wrists and those of place_hand. grown: of the network's hands."""
    errors = []
    for labels, look, estimate in seen_hands():
        K = focal_of(labels["K"])
        estimate = estimate | {name: estimate[name] * grown for name in ("joints", "vertices")}
        estimate["camera"] = estimate["camera"] * [1 / grown, grown, grown]
        hand = predict.place_hand(estimate, look.crop, look.side, K, "K", factor)
        errors.append(np.linalg.norm(hand["translation"] - labels["joints"][0]))
    return np.array(errors)


def test_a_perfect_mesh_stands_where_it_stood():
    """With the true camera to a millimetre. A focal length that is a tenth too long puts it a tenth too far,
    a network's hand that is a tenth too large as well, and a true length brings it back."""
    true = np.median(wrist_errors(lambda K: K))
    long = np.median(wrist_errors(lambda K: K * [[1.1, 1, 1], [1, 1.1, 1], [1, 1, 1]]))
    large = np.median(wrist_errors(lambda K: K, grown=1.1))
    held = np.median(wrist_errors(lambda K: K, grown=1.1, factor=1 / 1.1))
    guess = np.median(wrist_errors(lambda K: camera.pinhole(320, (320, 320))))
    print(f"wrist, median error in mm: K {1e3 * true:.2f}; focal + 10 % {1e3 * long:.1f}; hand + 10 % "
          f"{1e3 * large:.1f}, its length given {1e3 * held:.2f}; guess {1e3 * guess:.0f}")
    assert true < 1e-3 and held < 1e-3
    assert 0.04 < long < 0.09 and 0.04 < large < 0.09


def test_points_come_back_through_any_camera():
    rng = np.random.default_rng(0)
    points = 0.1 * rng.standard_normal((21, 3))
    K = np.array([[600, 0, 100], [0, 480, 300], [0, 0, 1.0]])
    seen = (points + [0.2, -0.1, 0.7]) @ K.T
    pixels = seen[:, :2] / seen[:, 2:] + 0.5
    np.testing.assert_allclose(camera.place_points(points, pixels, K), [0.2, -0.1, 0.7], atol=1e-12)
    scale, shift = camera.fit_weak_perspective(points, 900 * points[:, :2] + [30, -7])
    np.testing.assert_allclose([scale, *shift], [900, 30, -7], atol=1e-9)


def test_the_focal_length_in_a_photographs_tags(tmp_path, checkpoint):
    """26 mm on a phone: by the diagonals, whatever the orientation and size of the file. --focal and --K go
    before, and the .npz says which it was."""
    exif = Image.Exif()
    exif.get_ifd(camera.EXIF)[camera.FOCAL_35] = 26
    exif[0x0112] = 6  # turned
    photo = picture(tmp_path / "photo.jpg", size=(400, 300), exif=exif)
    wanted = 26 / math.hypot(36, 24) * 500
    assert camera.focal_in_exif(photo) == pytest.approx(wanted)
    assert camera.focal_in_exif(picture(tmp_path / "bare.png")) is None
    (tmp_path / "text.jpg").write_text("no image")
    assert camera.focal_in_exif(tmp_path / "text.jpg") is None
    flags = {"exif": (), "focal": ("--focal", 450), "K": ("--K", 450, 440, 150, 210)}
    for source, given in flags.items():
        call("predict.py", photo, "--checkpoint", checkpoint, "--out", tmp_path / source, *given)
        hand = np.load(tmp_path / source / "photo.npz")
        assert hand["focal_source"] == source
        focal = wanted if source == "exif" else math.sqrt(450 * (440 if source == "K" else 450))
        assert hand["focal"] == pytest.approx(focal)
        assert hand["K"][0, 2] == (150 if source == "K" else 149.5)
    refused("--K 450 440 350 210 looks beside", "predict.py", photo, "--checkpoint", checkpoint, "--out",
            tmp_path / "beside", "--K", 450, 440, 350, 210)
    assert not (tmp_path / "beside").exists()


def test_a_hand_has_the_length_that_was_given(tmp_path, checkpoint):
    """Mesh and depth grow together, and the picture stays."""
    photo = picture(tmp_path / "photo.png")
    command = ["predict.py", photo, "--checkpoint", checkpoint, "--focal", 400, "--out"]
    call(*command, tmp_path / "free")
    call(*command, tmp_path / "held", "--hand-length", 190)
    free, held = (np.load(tmp_path / name / "photo.npz") for name in ("free", "held"))
    factor = float(held["hand_scale"])
    hand = Mano(synthetic_mano())
    flat = hand(torch.eye(3).expand(1, 16, 3, 3), torch.from_numpy(free["betas"])[None])[1][0]
    assert factor * float((flat[12] - flat[0]).norm()) == pytest.approx(0.19, rel=1e-5)
    for name in ("vertices", "joints", "translation"):
        np.testing.assert_allclose(held[name], free[name] * factor, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(camera.crop_to_picture(each["joints"], each["camera"], each["crop"])
                            for each in (free, held)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


# ------------------------------------------------------------------------------------------------- detectors
def fake_detector(hands_of):
    """In place of MediaPipe: hands_of(image) -> [(box, side)]."""
    def detect(image):
        return [{"side": side, "score": np.ones(21), "keypoints": np.array(
                    [box[:2], box[2:], *[np.mean([box[:2], box[2:]], 0)] * 19]) - 0.5}
                for box, side in hands_of(image)]

    return lambda: detect


def test_a_detector_finds_hands_and_sides(tmp_path, checkpoint, monkeypatch):
    """Two hands in one photograph, whose pictures have names of their own; none in another, which is said."""
    found = {300: [((20, 40, 120, 160), "left"), ((150, 30, 260, 140), "right")], 100: [], 90: []}
    monkeypatch.setattr(predict, "mediapipe_detector", fake_detector(lambda image: found[image.width]))
    picture(tmp_path / "in/two.jpg")
    picture(tmp_path / "in/two_all.jpg")
    picture(tmp_path / "in/none.jpg", size=(100, 80))
    command = ["predict.py", tmp_path / "in", "--checkpoint", checkpoint, "--detector", "mediapipe"]
    done = call(*command, "--out", tmp_path / "in/out")
    assert "without a hand, left out: 1" in done.stdout and "4 hands" in done.stdout
    files = {path.name for path in (tmp_path / "in/out").iterdir()}
    names = ["two", "two_2", "two_all_2", "two_all_3"]
    assert files == {f"{name}.{end}" for name in names for end in ("obj", "npz", "png")} | {
        "two_all.png", "two_all_2_all.png"}
    boxed = np.load(tmp_path / "in/out/two.npz")
    assert boxed["side"] == "left"
    np.testing.assert_allclose((boxed["crop"][:2] + boxed["crop"][2:]) / 2, [70, 100], atol=1e-4)
    assert len(list_images(tmp_path / "in")) == 3  # overlays of all hands are no photographs either
    refused("--detector: no hand for any of the 1", *["predict.py", tmp_path / "in/none.jpg", *command[2:]],
            "--out", tmp_path / "none")
    refused("leave one out", *command, "--boxes", tmp_path / "boxes.csv")


def test_the_mesh_settles_on_a_detectors_points(tmp_path, hands, checkpoint, monkeypatch):
    """Of left and right hands, with a network that knows nothing: the mesh lies nearer to the points than the
    same network's mesh in the same boxes."""
    index = HandIndex(hands / "train")
    points = index.columns["joints2d"][index.pose_ids()] + 0.5
    sides = np.array(["right", "left"])[index.columns["side"]]
    seen = {}
    for row in range(len(index)):
        seen[np.asarray(Image.open(index.image_path(row)).convert("RGB")).tobytes()] = row
    paths = [index.image_path(row) for row in range(len(index))]

    def detect(image):
        row = seen[np.asarray(image).tobytes()]
        return [{"side": sides[row], "score": np.ones(21), "keypoints": points[row] - 0.5}]

    monkeypatch.setattr(predict, "mediapipe_detector", lambda: detect)
    call("predict.py", *paths, "--checkpoint", checkpoint, "--detector", "mediapipe", "--out", tmp_path / "a")
    lines = [f"{path},{','.join(map(str, tracking.box_around(points[row])))},{sides[row]}"
             for row, path in enumerate(paths)]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x0,y0,x1,y1,side", *lines]))
    call("predict.py", *paths, "--checkpoint", checkpoint, "--boxes", tmp_path / "boxes.csv", "--refine", 0,
         "--out", tmp_path / "b")
    ratios = {"right": [], "left": []}
    for row, path in enumerate(paths):
        settled, alone = (dict(np.load(tmp_path / out / f"{path.stem}.npz")) for out in "ab")
        np.testing.assert_allclose(settled["crop"], alone["crop"], atol=1e-3)
        seen_at = [camera.crop_to_picture(hand["joints"], hand["camera"], hand["crop"])
                   for hand in (settled, alone)]
        off = [np.linalg.norm(places - points[row], axis=1).mean() for places in seen_at]
        ratios[sides[row]].append(off[0] / off[1])
    assert np.median(ratios["right"] + ratios["left"]) < 0.5  # some are turned too far from the mean hand
    assert min(ratios["right"]) < 0.15 and min(ratios["left"]) < 0.15


def test_a_hand_beside_its_photograph_spoils_no_other(tmp_path, checkpoint):
    photo = picture(tmp_path / "photo.png")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nphoto.png,400,400,500,500\n"
                                        "photo.png,20,40,120,160\nphoto.png,150,30,260,140\n")
    refused("400 400 500 500 lies outside of it, or is far larger (1 of 3 failed)", "predict.py",
            photo, "--checkpoint", checkpoint, "--boxes", tmp_path / "boxes.csv", "--out", tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"photo_{k}.{end}" for k in (2, 3) for end in ("obj", "npz", "png")} | {"photo_all.png"}


# -------------------------------------------------------------------------------------------------- smoothing
def test_smoothing_takes_the_mean_of_a_window_in_time():
    """At any rate the noise that is left is that of a Gaussian's weights. Steady motion stays as it is, to
    its ends."""
    for rate in (10, 30, 100):
        times = np.arange(400) / rate
        weights = np.exp(-0.5 * (np.arange(-60, 61) / rate / 0.07) ** 2)
        wanted = np.sqrt((weights ** 2).sum()) / weights.sum()
        noise = np.random.default_rng(0).standard_normal((400, 50, 2))
        assert tracking.smooth(noise, times, 0.07)[60:-60].std() == pytest.approx(wanted, rel=0.02)
        kept = np.random.default_rng(1).random(400) < 0.8  # some frames could not be read
        line = np.stack([3 * times, 1 - times], 1)[kept]
        np.testing.assert_allclose(tracking.smooth(line, times[kept], 0.07), line, atol=1e-12)
    np.testing.assert_allclose(tracking.smooth(noise[:2], times[:2], 0.07), noise[:2])


def test_rotations_are_smoothed_as_their_angles():
    """About one axis, also beyond half a turn, where quaternions change their sign."""
    times = np.arange(60) / 30
    angles = 3 + np.sin(5 * times) + 0.05 * np.random.default_rng(0).standard_normal(60)
    axis = np.array([0, 0.6, 0.8])
    turns = Rotation.from_rotvec(angles[:, None] * axis).as_matrix()
    turns = np.stack([turns, turns.transpose(0, 2, 1)], axis=1)  # (60, 2, 3, 3), the second backwards
    found = tracking.smooth_rotations(turns, times, 0.05)
    wanted = Rotation.from_rotvec(tracking.smooth(angles, times, 0.05)[:, None] * axis).as_matrix()
    np.testing.assert_allclose(found, np.stack([wanted, wanted.transpose(0, 2, 1)], axis=1), atol=2e-3)


def seen_rows(places, scales, rotmats):
    """The table of follow_hands for hands whose wrists lie at places (M,2) in pixels, with scales (M,) in
    pixels a metre, in crops that shake."""
    rng = np.random.default_rng(0)
    half = rng.uniform(60, 90, (len(places), 1))
    middle = places + rng.uniform(-20, 20, (len(places), 2))
    camera = np.concatenate([scales[:, None] / half, (places - middle) / scales[:, None]], axis=1)
    return {"crop": np.concatenate([middle - half, middle + half], axis=1), "camera": camera,
            "rotmats": rotmats, "time": np.arange(len(places)) / 30, "track": np.zeros(len(places), int),
            "part": np.zeros(len(places), int), "side": np.full(len(places), "right")}


def wrists(seen):
    """Places (M,2) in pixels and scales (M,) in pixels a metre."""
    half = (seen["crop"][:, 2] - seen["crop"][:, 0]) / 2
    scale = half * seen["camera"][:, 0]
    return seen["crop"][:, :2] + half[:, None] + scale[:, None] * seen["camera"][:, 1:], scale


def test_nothing_is_smoothed_from_one_hand_or_part_to_another():
    """Rows of two hands in turns; the second is lost and found in another place. Each is at rest."""
    which = np.tile([0, 1], 20) + np.repeat([0, 0, 0, 1], 10) * np.tile([0, 1], 20)  # (40,): 0, 1 or 2
    turns = Rotation.from_rotvec([[0, 0, 0], [1, 0, 0], [0, 2, 0]]).as_matrix()[which][:, None]
    places, scales = np.array([[50.0, 60], [200, 90], [90, 150]])[which], np.array([900.0, 700, 500])[which]
    seen = seen_rows(places, scales, np.tile(turns, (1, 16, 1, 1)))
    seen |= {"time": np.repeat(np.arange(20) / 30, 2), "track": which > 0, "part": which == 2}
    found = predict.steady(seen, 0.1)
    np.testing.assert_allclose(found["rotmats"], seen["rotmats"], atol=1e-6)
    np.testing.assert_allclose(wrists(found)[0], places, rtol=1e-5)
    np.testing.assert_allclose(wrists(found)[1], scales, rtol=1e-5)


def test_place_size_and_turn_of_a_shaking_hand_are_smoothed_in_the_picture():
    """Whatever the crops do."""
    rng = np.random.default_rng(0)
    turns = Rotation.from_rotvec(0.1 * rng.standard_normal((200, 3))).as_matrix()[:, None]
    rough = seen_rows(200 + rng.standard_normal((200, 2)), 800 * np.exp(0.01 * rng.standard_normal(200)),
                      np.tile(turns, (1, 16, 1, 1)))
    still = predict.steady(rough, 0.07)
    for before, after in zip((*wrists(rough), rough["rotmats"]), (*wrists(still), still["rotmats"]),
                             strict=True):
        assert after.std(0).max() < 0.5 * before.std(0).max()


def test_a_hand_has_one_shape_for_each_of_its_sides(checkpoint):
    """The mean of its estimates; it fills the same pixels at the same place."""
    network = predict.Network(checkpoint, None, predict.setup(
        predict.flags().parse_args(["photo.png", "--device", "cpu"]), alone=True))
    rng = np.random.default_rng(0)
    turns = np.tile(np.eye(3), (8, 16, 1, 1))
    rough = seen_rows(rng.uniform(100, 200, (8, 2)), rng.uniform(500, 900, 8), turns)
    betas = rng.standard_normal((8, 10))
    rough |= {"betas": betas, "length": np.array([network.length(each) for each in betas]),
              "track": np.array([0, 0, 1, 1, 1, 1, 1, 0]), "side": np.array(["left"] * 4 + ["right"] * 4)}
    held = predict.hold_shape(rough, network)
    for rows in ([0, 1], [7], [2, 3], [4, 5, 6]):
        np.testing.assert_allclose(held["betas"][rows], betas[rows].mean(0)[None].repeat(len(rows), 0))
    np.testing.assert_allclose(wrists(held)[0], wrists(rough)[0])
    np.testing.assert_allclose(wrists(held)[1] * held["length"], wrists(rough)[1] * rough["length"])
    assert held["length"][0] == network.length(betas[:2].mean(0))


def test_jitter_is_the_second_difference_within_a_track():
    frames = np.arange(10)
    points = (0.5 * 3 * frames**2)[:, None, None] * np.array([0, 0, 1.0])  # acceleration 3
    assert tracking.jitter(points, 0 * frames, frames) == pytest.approx(3)
    order = np.random.default_rng(0).permutation(20)
    both = np.concatenate([points, 1000 + points])  # two tracks, rows in any order
    tracks, twice = np.repeat([0, 1], 10), np.tile(frames, 2)
    assert tracking.jitter(both[order], tracks[order], twice[order]) == pytest.approx(3)
    assert np.isnan(tracking.jitter(points[::2], 0 * frames[::2], frames[::2]))  # no three in a row


# ----------------------------------------------------------------------------------------------------- tracks
SIZE = (640, 480)


def square_at(x, y, side=100):
    return np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], float)


def follow(truth, asked=lambda frame, asks: None, frames=40, asks_often=True, doubt=lambda frame: 0.0):
    """Follows a hand whose box in a frame is truth(frame), by a network without error that sees what lies in
    its crop of 1.4 times the box. Returns {frame: [(track, box)]}, the frames that were asked for, and the
    parts of the tracks in each frame."""
    tracks = tracking.Tracks(asks_often)
    found, asks, parts = {}, [], []
    for frame in range(frames):
        def see(some, frame=frame):
            said = []
            for track in some:
                middle, side = (track.box[:2] + track.box[2:]) / 2, tracking.longer_side(track.box)
                crop = square_at(*middle, 1.4 * side)
                box = truth(frame)
                if box is None or tracking.common_area(box, crop) < 0.3 * tracking.box_area(box):
                    box = square_at(*(middle + side), side)  # it sees something else, to the side
                said.append((box, crop, doubt(frame), box))
            return said

        def ask(frame=frame):
            asks.append(frame)
            return asked(frame, asks)

        found[frame] = tracks.step(SIZE, see, ask)
        parts.append([track.part for track, _ in found[frame]])
    return found, asks, parts


def moving(frame):
    return square_at(100 + 8 * frame, 200 + 3 * frame, 100 + frame)


def test_a_hand_is_followed_by_its_last_mesh():
    """From one box; the boxes are the mesh's own where a detector sees none. Without a detector the first box
    is asked for once."""
    found, asks, _ = follow(moving, lambda frame, asks: [(moving(0), "right")] if frame == 0 else None)
    assert all(len(seen) == 1 for seen in found.values())
    np.testing.assert_allclose([seen[0][1] for seen in found.values()], [moving(frame) for frame in found])
    found, asks, _ = follow(moving, lambda frame, asks: None if frame % 3 else [(moving(frame) + 1, "right")])
    assert asks == [*range(40)] and {track.number for seen in found.values() for track, _ in seen} == {0}
    _, asks, _ = follow(moving, lambda frame, asks: [(moving(0), "right")], asks_often=False)
    assert asks == [0]


def test_a_hand_that_is_lost_is_found_again_as_the_same():
    """It leaves the picture for ten frames, jumps, and is doubted; the detector knows it where it is."""
    def truth(frame):
        return None if 10 <= frame < 20 else square_at(500, 300) if frame >= 30 else moving(frame)

    def asked(frame, asks):
        return [] if truth(frame) is None else [(truth(frame), "left")]

    found, _, parts = follow(truth, asked)
    assert [frame for frame, seen in found.items() if not seen] == list(range(10, 20))
    assert [part for [part] in parts[:10]] == 10 * parts[0]  # one stretch, ...
    assert parts[9] < parts[20] == parts[29] < parts[30] == parts[39]  # ... another, and one after the jump
    assert {track.number for seen in found.values() for track, _ in seen} == {0}
    np.testing.assert_allclose(found[30][0][1], truth(30))  # in the same frame

    def detected(frame, asks):
        return [(moving(frame), "left")]

    doubted, *_ = follow(moving, detected, doubt=lambda frame: 0.5 if 15 <= frame else 0.0)
    assert all(doubted.values())  # the detector sees it
    alone, *_ = follow(moving, lambda frame, asks: [(moving(0), "left")] if frame == 0 else None,
                      doubt=lambda frame: 0.5 if 15 <= frame else 0.0)
    assert [frame for frame, seen in alone.items() if not seen] == list(range(15 + tracking.PATIENCE, 40))


def test_a_smaller_frame_is_no_mistake():
    tracks = tracking.Tracks(False)
    boxes = {(640, 480): square_at(500, 300), (200, 150): square_at(80, 70)}
    for size, box in boxes.items():
        def see(some, box=box):
            assert all((track.box == box).all() for track in some)
            return [(box, square_at(*((box[:2] + box[2:]) / 2), 140), 0.0, box)]

        assert len(tracks.step(size, see, lambda box=box: [(box, "right")])) == 1


def test_a_crop_that_shrinks_by_itself_is_looked_at_again_at_its_old_size():
    """By a network that calls each hand a tenth smaller than it is. A hand that does become smaller is
    followed."""
    tracks = tracking.Tracks(False)
    sides = []
    for frame in range(60):
        def see(some):
            said = []
            for track in some:
                middle, side = (track.box[:2] + track.box[2:]) / 2, tracking.longer_side(track.box)
                said.append((square_at(*middle, 0.9 * side), square_at(*middle, 1.4 * side), 0.0, 0.9 * side))
            return said

        (_, side), = tracks.step(SIZE, see, lambda: [(square_at(300, 200), "right")])
        sides.append(side)
    assert min(sides) >= 90 / tracking.DRIFT and max(sides[30:]) == pytest.approx(81)

    def smaller(frame):
        return square_at(300, 200, 200 * 0.94**frame)

    found, *_ = follow(smaller, lambda *_: [(smaller(0), "left")], asks_often=False)
    np.testing.assert_allclose([seen[0][1] for seen in found.values()], [smaller(frame) for frame in found])


def test_the_side_is_that_of_most_votes_and_two_hands_keep_apart():
    """Two hands that pass each other; a detector that calls one of them wrongly now and then."""
    tracks = tracking.Tracks(True)
    for frame in range(21):
        hands = [square_at(100 + 20 * frame, 150), square_at(500 - 20 * frame, 320)]
        sides = ["right", "left"] if frame not in (1, 4, 10) else ["left", "left"]

        def see(some, hands=hands):
            best = [hands[np.argmax([tracking.overlap(box, track.box) for box in hands])] for track in some]
            return [(box, square_at(*((box[:2] + box[2:]) / 2), 140), 0.0, box) for box in best]

        detected = list(zip(hands, sides, strict=True))
        seen = tracks.step(SIZE, see, lambda detected=detected: detected)
        assert [(track.number, track.side) for track, _ in seen] == [(0, "right"), (1, "left")]
        np.testing.assert_allclose([box for _, box in seen], hands)


def test_two_tracks_never_stay_on_one_hand():
    tracks = tracking.Tracks(True)
    hands = [square_at(200, 200), square_at(400, 200)]

    def see(some):
        return [(hands[0] + track.number, square_at(250, 200, 500), 0.0, None) for track in some]

    seen = tracks.step(SIZE, see, lambda: [(hands[0], "right"), (square_at(260, 200), "left")])
    assert [track.number for track, _ in seen] == [0]


# ----------------------------------------------------------------------------------------------------- videos
@pytest.fixture
def clip(tmp_path):
    """A folder of twelve frames."""
    for frame in range(12):
        picture(tmp_path / f"clips/wave/{frame:03d}.png", size=(240, 160))
    return tmp_path / "clips/wave"


@pytest.fixture
def shaky(monkeypatch):
    """A network that sees a hand exactly in the box of its crop, in a pose and a shape that shake."""
    def estimate(self, looks):
        rng = np.random.default_rng(sum(int(look.canvas.sum()) for look in looks))
        turns = torch.from_numpy(0.1 * rng.standard_normal((len(looks), 16, 3))).float()
        betas = torch.from_numpy(rng.standard_normal((len(looks), 10))).float()
        rotmats = rotmat_from_axis_angle(turns)
        vertices, joints = self.hand(rotmats, betas)
        vertices, joints = (each - joints[:, :1] for each in (vertices, joints))
        estimates = []
        for i, look in enumerate(looks):
            low, high = joints[i].amin(0)[:2], joints[i].amax(0)[:2]
            view = torch.cat([2 / self.box_scale / (high - low).max()[None], -(low + high) / 2])
            hand = {"rotmats": rotmats[i], "betas": betas[i], "vertices": vertices[i], "joints": joints[i],
                    "camera": view, "doubt": torch.zeros(())}
            estimates.append(predict._as_seen({name: each.numpy() for name, each in hand.items()}, look.side))
        return estimates

    monkeypatch.setattr(predict.Network, "_estimate", estimate)


def test_a_folder_of_frames_gives_one_file_of_rows(clip, checkpoint, shaky, tmp_path, monkeypatch):
    """By a detector that sees two hands, of which one comes later. Again over its own results, with a frame
    that cannot be read; never over others'."""
    looks = []

    def hands_of(image):
        looks.append(image)
        late = [((150, 20, 220, 90), "left")] if len(looks) > 3 else []
        return [((30, 40, 100, 110), "right"), *late]

    monkeypatch.setattr(predict, "mediapipe_detector", fake_detector(hands_of))
    drawn = []

    def draw_hands(image, factor, hands, faces):
        drawn.append(np.array([hand["crop"] for hand in hands]))
        return image

    monkeypatch.setattr(predict, "draw_hands", draw_hands)
    command = ["predict.py", clip, "--video", "--checkpoint", checkpoint, "--fps", 10,
               "--out", tmp_path / "out", "--detector", "mediapipe"]
    done = call(*command)
    assert "2 hands in 12 of 12 frames" in done.stdout and "before smoothing" in done.stdout
    rows = np.load(tmp_path / "out/wave.npz")
    assert set(rows.files) == predict.ROW_KEYS
    first = rows["track"] == 0
    frames = list(range(12))
    assert rows["frame"][first].tolist() == frames and rows["frame"][~first].tolist() == frames[3:]
    assert set(rows["side"][first]) == {"right"} and set(rows["side"][~first]) == {"left"}
    assert rows["time"][first].tolist() == pytest.approx(np.arange(12) / 10)
    assert rows["vertices"].shape[1:] == (778, 3) and rows["K"].shape[1:] == (3, 3)
    assert rows["sure"].all()
    assert not np.ptp(rows["betas"][first], axis=0).any()  # the shape is held, ...
    assert np.abs(rows["betas"][first][0] - rows["betas"][~first][0]).max() > 0.1  # ... each hand's its own
    np.testing.assert_equal(np.concatenate(drawn), rows["crop"])  # each frame with its own hands
    frames = sorted(path.name for path in (tmp_path / "out/wave").iterdir())
    assert frames == [f"{frame:03d}.jpg" for frame in range(12)] + [video.OVERLAYS]
    assert list_images(tmp_path / "out") == [] and video.list_videos(tmp_path) == [clip]

    (clip / "005.png").write_bytes(b"no picture")
    drawn.clear()
    assert "could not be read: 1 (the first is 005.png)" in call(*command).stdout
    assert len(list((tmp_path / "out/wave").iterdir())) == 12
    rows = np.load(tmp_path / "out/wave.npz")
    read = [frame for frame in range(12) if frame != 5]
    assert [len(crops) for crops in drawn] == [np.sum(rows["frame"] == frame) for frame in read]
    np.testing.assert_equal(np.concatenate(drawn), rows["crop"])
    (tmp_path / "out/wave" / video.OVERLAYS).unlink()  # now it may be anybody's folder
    refused("wave is there already", *command)
    assert len(list((tmp_path / "out/wave").iterdir())) == 11


def test_smoothing_halves_jitter_where_a_hand_rests(clip, checkpoint, shaky, tmp_path):
    """--smooth 0 is off. Crops follow what the network saw, so that smoothing does not change them."""
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1,side\nwave/000.png,30,40,100,110,left\n")
    command = ["predict.py", clip, "--video", "--checkpoint", checkpoint, "--no-overlays", "--boxes",
               tmp_path / "boxes.csv"]
    call(*command, "--smooth", 0, "--out", tmp_path / "rough")
    call(*command, "--out", tmp_path / "smooth")
    rough, smooth = (np.load(tmp_path / name / "wave.npz") for name in ("rough", "smooth"))
    assert not (tmp_path / "rough/wave").exists()
    assert rough["frame"].tolist() == list(range(12)) and set(rough["side"]) == {"left"}
    np.testing.assert_allclose(rough["crop"], smooth["crop"])
    seen = camera.crop_to_picture(*(rough[name][0] for name in ("joints", "camera", "crop")))
    box = tracking.box_around(seen)
    np.testing.assert_allclose((box[:2] + box[2:]) / 2, [65, 75], atol=3)  # also of left hands
    shaking = [tracking.jitter(each["joints"], each["track"], each["frame"]) for each in (rough, smooth)]
    assert shaking[1] < 0.5 * shaking[0]


def test_a_folder_of_frames_may_be_called_dot_dot(clip, checkpoint, shaky, monkeypatch):
    """Its results have its name, and lie in --out; nothing else is touched."""
    (clip / "inside").mkdir()
    (clip / "inside/mine.txt").write_text("mine")
    for here, typed in ((clip, "."), (clip / "inside", "..")):
        monkeypatch.chdir(here)
        call("predict.py", typed, "--video", "--checkpoint", checkpoint)
        assert {path.name for path in (here / "predictions").iterdir()} == {"wave", "wave.npz"}
    assert (clip / "inside/mine.txt").exists() and len(list(clip.glob("*.png"))) == 12


def test_a_folder_of_overlays_that_holds_more_is_not_replaced(clip, checkpoint, shaky, tmp_path):
    command = ["predict.py", clip, "--video", "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    call(*command)
    for name in ("notes.txt", "still.jpg", "shorter.mp4"):
        (tmp_path / "out/wave" / name).write_text("mine")
        refused("wave is there already", *command)
        (tmp_path / "out/wave" / name).unlink()  # it is still there
    call(*command)


def test_what_lies_in_the_way_is_said_before_the_detector_runs(clip, checkpoint, tmp_path, monkeypatch):
    def refuse_to_run(image):
        raise AssertionError("the detector ran")

    monkeypatch.setattr(predict, "mediapipe_detector", lambda: refuse_to_run)
    photo = picture(tmp_path / "photo.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/photo.obj").write_text("mine")
    refused("photo.obj is there already", "predict.py", photo, clip, "--video", "--checkpoint", checkpoint,
            "--detector", "mediapipe", "--out", tmp_path / "out")


def test_boxes_name_the_frames_of_several_clips(clip, checkpoint, shaky, tmp_path):
    """By the path as typed or below the folder given; a box beside its frame spoils no other."""
    (tmp_path / "clips/a").mkdir()
    clip.rename(tmp_path / "clips/a/wave")
    picture(tmp_path / "clips/b/wave/000.png", size=(240, 160))
    boxes = ["image,x0,y0,x1,y1,side", "a/wave/000.png,30,40,100,110,left",
             f"{tmp_path}/clips/a/wave/000.png,120,40,190,110,right",
             f"{tmp_path}/clips/a/wave/003.png,700,10,800,90,right", "a/wave/777.png,30,40,100,110,left",
             "b/wave/000.png,50,60,90,110,right"]
    (tmp_path / "boxes.csv").write_text("\n".join(boxes))
    command = ["predict.py", tmp_path / "clips", "--video", "--checkpoint", checkpoint, "--no-overlays",
               "--boxes", tmp_path / "boxes.csv", "--out", tmp_path / "out"]
    done = call(*command).stdout
    assert "beside the picture, or far larger: 1 (the first is 003.png)" in done
    assert "that it has not: 1 (the first is 777.png)" in done
    first, second = (np.load(tmp_path / "out" / name) for name in ("wave.npz", "wave_2.npz"))
    assert first["frame"].tolist() == [frame for frame in range(12) for _ in range(2)]
    assert first["side"].tolist() == ["left", "right"] * 12
    assert second["frame"].tolist() == [0] and set(second["side"]) == {"right"}

    (tmp_path / "boxes.csv").write_text("\n".join(boxes[:-1]))
    refused("no line for a frame of", *command)
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nwave/000.png,30,40,100,110\n")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nphoto.png,30,40,100,110\n"
                                        "a/wave/000.png,30,40,100,110\nc/wave/000.png,30,40,100,110\n")
    done = call("predict.py", picture(tmp_path / "photo.png"), *command[1:], check=False)
    assert "names without" not in done.stdout and "no line for a frame of" in done.stderr  # b has none
    done = call(*command, check=False)
    assert "names without a video: 2 (the first is photo.png)" in done.stdout
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nwave/000.png,30,40,100,110\n")
    refused("wave may be", "predict.py", tmp_path / "clips/a/wave", tmp_path / "clips/b/wave", *command[2:])


def test_a_video_without_a_hand_is_named(clip, checkpoint, tmp_path):
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nother/000.png,1,1,50,50\n")
    command = ["predict.py", clip, "--video", "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    refused("no line for a frame of", *command, "--boxes", tmp_path / "boxes.csv")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nwave/777.png,1,1,50,50\n")
    refused("wave: no hand found in any frame", *command, "--boxes", tmp_path / "boxes.csv")
    assert not (tmp_path / "out").exists()
