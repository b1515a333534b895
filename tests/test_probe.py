"""probing.py against loops and laws that are known, and the command: the view, the split, what is refused."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import call
from PIL import Image
from scipy.spatial.transform import Rotation

import pretrain_contrastive
import pretrain_mim
import probe
import probing
from data import HandIndex, write_index
from metrics import procrustes
from model import build_encoder, load_encoder
from runtime import Runtime
from views import MEAN, STD


# -------------------------------------------------------------------------------------- ridge and neighbours
def test_ridge_is_the_penalised_least_squares_fit():
    """For one strength, against the normal equations solved as an augmented least-squares problem; and it
    finds a linear law."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (60, 5))
    test_x = rng.normal(2, 3, (9, 5))
    y = x @ rng.normal(size=(5, 2)) + rng.normal(size=(60, 2))
    z, test_z = ((v - x.mean(0)) / x.std(0) for v in (x, test_x))
    augmented = np.concatenate([z, np.sqrt(0.1 * 60) * np.eye(5)])
    weights = np.linalg.lstsq(augmented, np.concatenate([y - y.mean(0), np.zeros((5, 2))]), rcond=None)[0]
    pred = probing.ridge(x, y, test_x, strengths=np.array([0.1]))
    np.testing.assert_allclose(pred, test_z @ weights + y.mean(0), atol=1e-7)
    law = np.arange(10).reshape(5, 2)
    np.testing.assert_allclose(probing.ridge(x, x @ law - 3, test_x), test_x @ law - 3, atol=1e-2)


def test_ridge_chooses_a_strength_for_each_column_on_the_last_fifth():
    """One column is a law, the other is noise: the first takes the weak penalty, the second the strong one.
    On rows that are fitted the weak one would win for both. Each column is then what ridge with its strength
    alone predicts, from all rows."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 30))
    test_x = rng.normal(size=(7, 30))
    y = np.stack([x @ rng.normal(size=30), rng.normal(size=50)], axis=1)
    strengths = np.array([1e-5, 10.0])
    pred = probing.ridge(x, y, test_x, strengths)
    weak, strong = (probing.ridge(x, y, test_x, strengths[k:k + 1]) for k in (0, 1))
    np.testing.assert_allclose(pred[:, 0], weak[:, 0], atol=1e-12)
    np.testing.assert_allclose(pred[:, 1], strong[:, 1], atol=1e-12)
    assert np.abs(weak - strong).max() > 0.1


def test_ridge_judges_a_strength_on_the_last_fifth_alone():
    """A law holds in the first 40 of 50 rows and in the last row; nothing in between. The last fifth asks for
    the strong penalty. The last row alone, and the last half, would ask for the weak one."""
    x = np.tile([[1.0], [-1.0]], (25, 1))
    y = x.copy()
    y[40:49] = 0
    strengths = np.array([1e-5, 10.0])
    strong = probing.ridge(x, y, x[:1], strengths[1:])
    assert probing.ridge(x, y, x[:1], strengths) == strong != probing.ridge(x, y, x[:1], strengths[:1])


def test_r2_is_one_for_the_truth_and_zero_for_its_mean():
    true = np.random.default_rng(4).normal(size=(40, 3)) * [1, 10, 100]
    assert probing.r2(true, true) == 1
    assert probing.r2(np.broadcast_to(true.mean(0), true.shape), true) == pytest.approx(0, abs=1e-12)
    half = true.copy()
    half[:, 2] = true[:, 2].mean()  # each column counts the same, whatever its size
    assert probing.r2(half, true) == pytest.approx(2 / 3)


def test_neighbours_and_votes_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, 30)
    x = rng.normal(size=(30, 4)) + 1.5 * np.eye(4)[classes]
    z = (x - x.mean(0)) / x.std(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    rows, cosines = probing.nearest(x, x, 10, skip_self=True)
    right = 0
    for i in range(30):
        cosine = np.array([z[i] @ z[j] if j != i else -9 for j in range(30)])
        near = np.argsort(-cosine)[:10]
        assert rows[i].tolist() == near.tolist()
        np.testing.assert_allclose(cosines[i], cosine[near], atol=1e-9)
        votes = [sum(np.exp(cosine[j] / 0.07) for j in near if classes[j] == c) for c in range(3)]
        right += np.argmax(votes) == classes[i]
    assert probing.leave_one_out(x, classes) == right / 30


# ------------------------------------------------------------------------------------------------------- pose
def test_flexion_is_the_angle_between_bones():
    straight = np.zeros((1, 21, 3))
    for finger in range(5):
        straight[0, 4 * finger + 1:4 * finger + 5, 0] = [1, 2, 3, 4]
    assert np.abs(probing.flexion(straight)).max() < 1e-6
    bent = straight.copy()
    bent[0, 7:9] = [[2, 1, 0], [2, 2, 0]]  # the index finger turns by 90 degrees after its second joint
    angles = np.degrees(probing.flexion(bent)[0]).reshape(5, 3)
    np.testing.assert_allclose(angles[1], [0, 90, 0], atol=1e-4)
    assert np.abs(np.delete(angles, 1, 0)).max() < 1e-4


def test_orientation_points_from_the_wrist_to_the_middle_knuckle():
    points = np.random.default_rng(6).normal(size=(2, 21, 2))
    points[:, 9] = points[:, 0] + [[0, -3], [4, 3]]
    np.testing.assert_allclose(probing.orientation(points), [[0, -1], [0.8, 0.6]], atol=1e-12)


def test_a_pose_that_only_turns_needs_no_feature():
    """One hand, turned, moved and scaled: the aligned targets are all equal, so features of noise suffice."""
    rng = np.random.default_rng(7)
    base = rng.normal(0, 0.03, (21, 3))
    turns = Rotation.random(80, random_state=7).as_matrix()
    joints = rng.uniform(0.5, 2, (80, 1, 1)) * base @ turns + rng.normal(size=(80, 1, 3))
    x = rng.normal(size=(80, 5))
    table = probing.probe_pose(x[:60], joints[:60], joints[:60, :, :2],
                               x[60:], joints[60:], joints[60:, :, :2], base, procrustes)
    assert table["ridge_pa_mpjpe_mm"] < 1e-3 and table["nearest_pa_mpjpe_mm"] < 1e-3
    assert table["ridge_mpjpe_mm"] > 20


def test_a_feature_that_is_the_pose_probes_as_the_pose():
    rng = np.random.default_rng(2)
    base = rng.normal(0, 0.03, (21, 3))
    codes = rng.normal(size=(400, 6))
    directions = rng.normal(0, 0.001, (6, 21, 3))
    joints = base + np.einsum("nk,kij->nij", codes, directions)

    def probed(x):
        return probing.probe_pose(x[:300], joints[:300], joints[:300, :, :2],
                                  x[300:], joints[300:], joints[300:, :, :2], base, procrustes)

    pose = probed(codes)
    noise = probed(rng.normal(size=(400, 6)))
    assert pose["ridge_pa_mpjpe_mm"] < 0.15 * noise["ridge_pa_mpjpe_mm"]
    assert pose["nearest_pa_mpjpe_mm"] < noise["nearest_pa_mpjpe_mm"]
    assert pose["ridge_mpjpe_mm"] < 0.05 * noise["ridge_mpjpe_mm"]
    assert pose["orientation_r2"] > 0.95 and abs(noise["orientation_r2"]) < 0.1
    assert pose["flexion_r2"] > 0.8


def test_align_2d_is_the_best_similarity_and_never_mirrors():
    rng = np.random.default_rng(8)
    points = rng.normal(size=(6, 21, 2))
    angle = rng.uniform(-np.pi, np.pi, 6)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(6, 2, 2)
    moved = rng.uniform(0.3, 3, (6, 1, 1)) * points @ turn + rng.normal(size=(6, 1, 2))
    np.testing.assert_allclose(probing.align_2d(points, moved), moved, atol=1e-12)
    other = rng.normal(size=(6, 21, 2))
    aligned = probing.align_2d(points, other)

    def error(found):
        return ((found - other) ** 2).sum((1, 2))

    for _ in range(20):  # no similarity nearby is better
        turned, larger = 0.02 * rng.normal(size=2)
        small = np.array([[1 + larger, turned], [-turned, 1 + larger]])
        assert (error(aligned @ small + 0.02 * rng.normal(size=2)) > error(aligned)).all()
    assert np.linalg.norm(probing.align_2d(points * [-1, 1], points) - points, axis=2).mean() > 0.3


def test_points_of_a_detector_are_probed_after_a_similarity():
    """A feature that is the points' shape leaves no error, whatever place, size and turn; noise leaves the
    error of the mean shape."""
    rng = np.random.default_rng(9)
    codes = rng.normal(size=(400, 3))
    shapes = rng.normal(0, 0.3, (21, 2)) + np.einsum("nk,kij->nij", codes, rng.normal(0, 0.02, (3, 21, 2)))
    angle = rng.uniform(-np.pi, np.pi, 400)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(400, 2, 2)
    points = rng.uniform(0.5, 1.5, (400, 1, 1)) * shapes @ turn + rng.normal(size=(400, 1, 2))

    def probed(x):
        return probing.probe_points(x[:300], points[:300], x[300:], points[300:])

    shape, noise, turns = (probed(x) for x in (codes, rng.normal(size=(400, 3)),
                                               np.stack([np.cos(angle), np.sin(angle)], 1)))
    mean = np.broadcast_to(probing.mean_shape(points[:300], probing.align_2d), (100, 21, 2))
    guess = np.linalg.norm(probing.align_2d(mean, points[300:]) - points[300:], axis=2).mean()
    assert noise["ridge_pa_2d_percent"] == pytest.approx(100 * guess, rel=0.05)
    assert shape["ridge_pa_2d_percent"] < 0.2 * noise["ridge_pa_2d_percent"]
    assert shape["nearest_pa_2d_percent"] < 0.5 * noise["nearest_pa_2d_percent"]
    assert shape["ridge_pck_5"] > 0.99 > noise["ridge_pck_5"]
    assert turns["orientation_r2"] > 0.9 and shape["orientation_r2"] < 0.1


# -------------------------------------------------------------------------------------------------- the split
@pytest.mark.parametrize("seed", range(5))
def test_no_pose_and_no_video_stands_in_both_halves(seed):
    """Also through a third hand: its pose ties it to one video, its number to another."""
    rng = np.random.default_rng(seed)
    poses = rng.integers(0, 60, 80)
    videos = np.where(rng.random(80) < 0.3, -1, rng.integers(0, 40, 80))
    train, test = probing.split_groups(probing.hand_groups(poses, videos), seed)
    assert sorted([*train, *test]) == list(range(80)) and len(train) and len(test)
    assert not set(poses[train]) & set(poses[test])
    assert not set(videos[train]) & set(videos[test]) - {-1}


def test_groups_are_no_larger_than_what_connects_them():
    """Hands of unknown videos do not belong together; without videos the poses alone decide."""
    groups = probing.hand_groups(np.array([0, 1, 1, 2, 3, 4]), np.array([7, 7, -1, -1, -1, 5]))
    assert groups[0] == groups[1] == groups[2] and len(set(groups)) == 4
    assert len(set(probing.hand_groups(np.array([0, 1, 1, 2])))) == 3
    train, test = probing.split_groups(np.arange(101))
    assert (len(train), len(test)) == (51, 50)


def test_at_most_so_many_rows_evenly_spaced():
    rows = np.arange(100, 200)
    assert np.array_equal(probing.spread_rows(rows, 100), rows)
    some = probing.spread_rows(rows, 12)
    assert len(some) == 12 and some[0] == 100 and some[-1] == 199
    assert set(np.diff(some)) == {9}


# ---------------------------------------------------------------------------------------------- the features
def test_features_are_those_of_the_encoder_in_the_order_of_the_rows():
    """Three batches of other sizes against each view encoded alone."""
    torch.manual_seed(0)
    net = build_encoder("vit_micro", 32).eval()
    views = torch.rand(7, 3, 32, 32)
    batches = [{"canvas": views[rows], "row": rows} for rows in torch.arange(7).split([3, 1, 3])]
    features, labels = probing.encode({"net": net.features}, batches, lambda batch: batch["canvas"], ("row",),
                                      {"pixels": probe.RAW["pixels"]})
    assert list(features) == [("net", "class"), ("net", "mean"), ("net", "both"), ("pixels", "raw")]
    assert labels["row"].tolist() == list(range(7))
    for i in range(7):
        summary, feature_map = net.features(views[i:i + 1])
        mean = feature_map[0].flatten(1).mean(1)
        expected = {"class": summary[0], "mean": mean, "both": torch.cat([summary[0], mean])}
        for feature, value in expected.items():
            np.testing.assert_allclose(features["net", feature][i], value.detach().numpy(), atol=1e-5)
        blocks = views[i].unflatten(2, (16, 2)).unflatten(1, (16, 2)).mean((2, 4))  # (3, 16, 16)
        np.testing.assert_allclose(features["pixels", "raw"][i], blocks.flatten().numpy(), atol=1e-6)
    assert all(value.dtype == np.float64 for value in features.values())


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(5)
    net = build_encoder("vit_micro", 32)
    torch.save({"kind": "encoder", "step": 0, "arch": net.arch, "config": net.config,
                "state_dict": net.state_dict()}, tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt"


def test_the_untrained_network_is_the_same_architecture_with_other_weights(encoder):
    networks = probe.make_networks(encoder, 48)
    trained, untrained = networks["probe"], networks["untrained"]
    assert trained.arch == untrained.arch and trained.config == untrained.config
    assert trained.config["image_size"] == 48
    assert not trained.training and not untrained.training
    weights = trained.state_dict()
    shapes = {name: value.shape for name, value in weights.items()}
    assert shapes == {name: value.shape for name, value in untrained.state_dict().items()}
    name = "blocks.0.attn.qkv.weight"
    assert not torch.allclose(weights[name], untrained.state_dict()[name])
    again = probe.make_networks(encoder, 48)["untrained"].state_dict()
    assert all(torch.equal(value, again[key]) for key, value in untrained.state_dict().items())


def views_of(encoder, index, monkeypatch, out):
    """The views (N,3,S,S) that the command shows to the encoders, in order."""
    shown = []
    encode = probing.encode

    def spy(encoders, batches, make_views, labels, raw):
        def spied(batch):
            shown.append(make_views(batch))
            return shown[-1]

        return encode(encoders, batches, spied, labels, raw)

    monkeypatch.setattr(probe, "encode", spy)
    call("probe.py", encoder, "--data", index, "--out", out, "--workers", 0)
    return torch.cat(shown)


def test_the_view_is_upright_and_1_3_times_the_box(encoder, tmp_path, monkeypatch):
    """Images whose red is x and whose green is y, both over their size: a view shows where it was cut."""
    size = 256
    box = np.array([90, 110, 170, 150])  # centre (130, 130), longer side 80
    ramp = np.arange(size, dtype=np.uint8)
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0] = ramp
    image[..., 1] = ramp[:, None]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "image.png")
    write_index(tmp_path / "index", {"image": np.array([b"a/image.png", b"b/image.png"]), "box": [box, box]},
                {"name": "ramps"}, root=str(tmp_path))
    views = views_of(encoder, tmp_path / "index", monkeypatch, tmp_path / "out")
    assert views.shape == (2, 3, 32, 32)
    side = 1.3 * 80
    x = 130 - side / 2 + (torch.arange(32) + 0.5) * side / 32  # pixel edges of the photograph
    expected = ((x - 0.5) / 255).expand(32, 32)
    for view in views:
        torch.testing.assert_close(view[0], expected, atol=1 / 255, rtol=0)
        torch.testing.assert_close(view[1], expected.T, atol=1 / 255, rtol=0)


def test_encoders_are_shown_normalised_views(tmp_path):
    """White images, and a network that returns what it is shown."""

    class Echo(torch.nn.Module):
        config = {"image_size": 32}

        def features(self, images):
            return images.mean((2, 3)), images

    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    write_index(tmp_path / "index", {"image": np.array([b"white.png"] * 3), "box": [[16, 16, 48, 48]] * 3},
                {"name": "white"}, root=str(tmp_path))
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    args = SimpleNamespace(batch_size=2)
    features, labels, unread = probe.read_features({"probe": Echo()}, HandIndex(tmp_path / "index"),
                                                   np.arange(3), (), args, runtime)
    white = (1 - np.ravel(MEAN)) / np.ravel(STD)
    np.testing.assert_allclose(features["probe", "class"], np.tile(white, (3, 1)), atol=1e-5)
    assert (features["pixels", "raw"] == 1).all() and features["pixels", "raw"].shape == (3, 3 * 16 * 16)
    assert (features["hog", "raw"] < 1e-5).all() and features["hog", "raw"].shape == (3, 8 * 8 * 8)
    assert labels == {} and unread == 0


# ------------------------------------------------------------------------------------------------ the command
def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_poses_fitted_on_half_of_the_videos(hands, encoder, tmp_path):
    done = call("probe.py", encoder, "--data", hands / "train", "--out", tmp_path / "out")
    table = read(tmp_path / "out")
    assert table["count"] + table["train_count"] == 24 and table["unread"] == 0
    assert table["ridge_pa_mpjpe_mm"] == table["probe_both_ridge_pa_mpjpe_mm"]
    for feature in ("probe_class", "probe_mean", "probe_both", "untrained_class", "untrained_mean",
                    "untrained_both", "pixels_raw", "hog_raw"):
        assert np.isfinite(table[f"{feature}_orientation_r2"])
        assert feature.replace("_", ", ") in done.stdout
    assert 5 < table["mean_hand_pa_mpjpe_mm"] < 50
    assert table["probe_class_ridge_mpjpe_mm"] != table["untrained_class_ridge_mpjpe_mm"]


def test_the_command_splits_by_video(hands, encoder, tmp_path, monkeypatch):
    halves = []
    read_features = probe.read_features

    def spy(networks, index, rows, *rest):
        halves.append(rows)
        return read_features(networks, index, rows, *rest)

    monkeypatch.setattr(probe, "read_features", spy)
    call("probe.py", encoder, "--data", hands / "train", "--out", tmp_path / "out")
    videos = HandIndex(hands / "train").columns["video"]
    fitted, tested = (set(videos[rows].tolist()) for rows in halves)
    assert fitted and tested and not fitted & tested


def test_without_joints_the_points_are_probed(hands, encoder, tmp_path):
    train = HandIndex(hands / "train")
    for points, others in (("joints2d", {"joints"}), ("keypoints", {"joints", "joints2d"})):
        columns = {name: np.array(values) for name, values in train.columns.items() if name not in others}
        write_index(tmp_path / points, columns, {"name": "copy"}, root=str(train.root.resolve()))
    call("probe.py", encoder, "--data", tmp_path / "joints2d", "--out", tmp_path / "out")
    table = read(tmp_path / "out")
    assert table["count"] + table["train_count"] == 24
    assert 0 < table["ridge_pa_2d_percent"] < 50 and table["mean_hand_pa_2d_percent"] > 0
    assert not any(name.endswith("mm") for name in table)
    # of the detector's points too few are there
    refused = call("probe.py", encoder, "--data", tmp_path / "keypoints", "--out", tmp_path / "no",
                   check=False)
    assert refused.returncode == 2 and "at least 10 are needed" in refused.stderr


def test_the_live_probe_is_that_of_the_command(hands, encoder, tmp_path):
    """On the same hands and views: the same neighbours and directions, and a ridge to poses that are aligned
    to another mean hand. Both pre-training stages open it in the same way."""
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    live = pretrain_mim.open_probe(hands / "train", 32, runtime)(load_encoder(encoder).train())
    call("probe.py", encoder, "--data", hands / "train", "--out", tmp_path / "out")
    table = read(tmp_path / "out")
    assert live["probe_neighbour_mm"] == pytest.approx(table["nearest_pa_mpjpe_mm"], rel=1e-5)
    assert live["probe_orientation_r2"] == pytest.approx(table["orientation_r2"], rel=1e-4)
    assert live["probe_ridge_mm"] == pytest.approx(table["ridge_pa_mpjpe_mm"], rel=0.05)

    class Normed(torch.nn.BatchNorm2d):
        def features(self, images):
            found = self(images)
            return found.mean((2, 3)), found

    net = Normed(3).train()
    pretrain_mim.open_probe(hands / "train", 32, runtime)(net)
    assert net.training and net.num_batches_tracked == 0  # its statistics are not those of the probe
    assert inspect.getsource(pretrain_mim.open_probe) == inspect.getsource(pretrain_contrastive.open_probe)


def test_train_names_the_hands_to_fit_on(hands, encoder, tmp_path):
    pool = tmp_path / "pool"
    call("make_synthetic.py", "--out", pool, "--hands", 12, "--videos", 6, "--size", 96, "--seed", 2)
    HandIndex(pool).image_path(3).write_bytes(b"broken")
    call("probe.py", encoder, "--data", hands / "train", "--train", pool, "--out", tmp_path / "out")
    table = read(tmp_path / "out")
    assert (table["count"], table["train_count"], table["unread"]) == (24, 11, 1)


def test_classes_are_folders(encoder, tmp_path):
    for k in range(12):
        folder = tmp_path / "classes" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 250 * (k % 2) + k % 3, np.uint8)).save(folder / f"{k}.png")
    call("probe.py", encoder, "--data", tmp_path / "classes", "--out", tmp_path / "out")
    table = read(tmp_path / "out")
    assert table["pixels_raw_knn_accuracy"] == 1 and 0 <= table["knn_accuracy"] <= 1
    assert (table["count"], table["classes"], table["neighbours"]) == (12, 2, 10)
    (tmp_path / "classes" / "a" / "0.png").write_bytes(b"broken")
    refused = call("probe.py", encoder, "--data", tmp_path / "classes", "--out", tmp_path / "no", check=False)
    assert refused.returncode == 2 and "0.png" in refused.stderr and not (tmp_path / "no").exists()


def without(index, names, folder):
    """A copy of an index without some columns, and with the first ten hands only."""
    columns = {name: np.array(values)[:10] for name, values in index.columns.items() if name not in names}
    write_index(folder, columns, {"name": "copy"}, root=str(index.root.resolve()))
    return folder


@pytest.mark.parametrize("words, data, flags", [
    ("at least 10 are needed", "val", ["--train", "train"]),
    ("the hands of --data themselves", "train", ["--train", "train"]),
    ("no labels `joints` and `joints2d`", "train", ["--train", "unlabelled"]),
    ("no joints with joints2d, and no keypoints", "unlabelled", ["--train", "train"]),
    ("no joints with joints2d, and no keypoints", "half", []),
    ("all images in one folder", "unlabelled", []),
    ("neither an index nor a folder", "nowhere", []),
    ("--image-size 8: must lie in 16 .. 4096", "train", ["--image-size", 8]),
    ("--batch-size 0: must lie in", "train", ["--batch-size", 0]),
])
def test_what_cannot_be_probed_is_refused_in_one_line(hands, encoder, tmp_path, words, data, flags):
    labels = {"joints", "joints2d", "keypoints", "keypoints_score"}
    places = {"train": hands / "train", "val": hands / "val", "nowhere": tmp_path / "nowhere"}
    if "unlabelled" in (data, *flags):
        places["unlabelled"] = without(HandIndex(hands / "train"), labels, tmp_path / "unlabelled")
    if data == "half":
        places["half"] = without(HandIndex(hands / "train"), labels - {"joints"}, tmp_path / "half")
    flags = [places.get(flag, flag) for flag in flags]
    out = tmp_path / "out"
    refused = call("probe.py", encoder, "--data", places[data], "--out", out, *flags, check=False)
    assert refused.returncode == 2 and words in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: ") and not out.exists()
    assert not list(tmp_path.glob(".out.*"))


def test_a_file_in_place_of_the_folder_stays(hands, encoder, tmp_path):
    refused = call("probe.py", encoder, "--data", hands / "train", "--out", encoder, check=False)
    assert refused.returncode == 2 and "is a file: name a folder" in refused.stderr
    assert encoder.is_file()
