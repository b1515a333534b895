"""evaluate.py: files in, files out; left hands, crops and cameras undone; nothing half-written."""
import json
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import metrics
import results
from data import CONTEXT, HandIndex, write_index
from mano import (FREIHAND_TO_MANO, MANO_TO_FREIHAND, TIPS, Mano, hand_fingerprint, joints_from_vertices,
                  labelled_joints, rotmat_from_axis_angle)
from results import read_predictions, write_predictions
from runtime import Runtime
from synthetic_hand import synthetic_mano

N, SIZE, FOCAL = 10, 96, 150.0


def posed_hands(seed=0):
    """vertices (N,778,3), kinematic joints (N,21,3) of right hands relative to the wrist; which are left."""
    rng = np.random.default_rng(seed)
    hand = Mano(synthetic_mano())
    pose = torch.tensor(rng.normal(0, 0.25, (N, 16, 3)), dtype=torch.float32)
    pose[:, 1:] += hand.hands_mean
    betas = torch.tensor(rng.normal(0, 0.5, (N, 10)), dtype=torch.float32)
    vertices, joints = hand(rotmat_from_axis_angle(pose), betas)
    return (vertices - joints[:, :1]).numpy(), (joints - joints[:, :1]).numpy(), np.arange(N) % 3 == 1


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder with ten hands, three of them left, photographs of noise and every label."""
    folder = tmp_path_factory.mktemp("hands")
    rng = np.random.default_rng(1)
    vertices, _, left = posed_hands()
    vertices = vertices * np.where(left[:, None, None], [-1, 1, 1], 1)
    vertices += rng.uniform([-0.03, -0.03, 0.55], [0.03, 0.03, 0.7], (N, 1, 3))
    joints = joints_from_vertices(torch.tensor(vertices, dtype=torch.float32), synthetic_mano()).numpy()
    K = np.tile([[FOCAL, 0, 47.5], [0, FOCAL, 47.5], [0, 0, 1]], (N, 1, 1))
    projected = joints @ K[0].T
    joints2d = projected[..., :2] / projected[..., 2:]
    for i in range(N):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    columns = {"image": np.array([f"{i}.png" for i in range(N)], "S"), "side": left, "K": K,
               "vertices": vertices, "joints": joints, "joints2d": joints2d,
               "box": np.concatenate([joints2d.min(1), joints2d.max(1) + 1], 1)}
    meta = {"name": "ten <hands>", "joints": "freihand", "protocol": "freihand"}
    write_index(folder / "index", columns, meta, root=str(folder))
    return folder / "index"


@pytest.fixture
def labels(index):
    columns = HandIndex(index).columns
    return np.array(columns["joints"], np.float64), np.array(columns["vertices"], np.float64)


def copy_index(index, folder, **columns):
    """The index with some columns replaced, in `folder`."""
    hands = HandIndex(index)
    columns = {name: np.array(values) for name, values in hands.columns.items()} | columns
    write_index(folder, columns, hands.meta | {"partial": True}, root=str(hands.root))
    return folder


def noisy(labels, seed=0):
    rng = np.random.default_rng(seed)
    return [(points + rng.normal(0, 0.004, points.shape)).round(7) for points in labels]


def score(index, points, tmp_path, *more):
    """Writes a prediction file, scores it, returns metrics.json and the folder of the results."""
    file = tmp_path / "made_elsewhere.json"
    file.write_text(json.dumps([[] if p is None else p.tolist() for p in points]))
    evaluate.main(["--data", str(index), "--predictions", str(file), "--out", str(tmp_path / "out"), *more])
    return json.loads((tmp_path / "out" / "metrics.json").read_text()), tmp_path / "out"


def test_scoring_a_prediction_file(index, labels, tmp_path, capsys):
    pred = noisy(labels)
    table, out = score(index, pred, tmp_path)
    expected = metrics.evaluate_hands(*pred, *labels, "freihand")
    assert {key: table[key] for key in expected} == expected and table["count"] == N
    assert table["mean_hand_pa_mpjpe_mm"] > 5 and table["mean_hand_pa_mpvpe_mm"] > 5
    assert all(isinstance(value, int | float) for value in table.values())
    assert f"xyz_mean3d: {table['mpjpe_mm'] / 10:f}\n" in (out / "scores.txt").read_text()
    printed = capsys.readouterr().out
    assert f"pa_mpvpe_mm {table['pa_mpvpe_mm']:.2f}" in printed
    assert "mean hand" in printed and "FreiHAND order" in printed
    names = sorted(file.name for file in out.iterdir())
    assert names == ["metrics.json", "pred.json", "pred.zip", "report.html", "scores.txt"]
    with zipfile.ZipFile(out / "pred.zip") as archive:
        assert archive.namelist() == ["pred.json"]
        assert archive.read("pred.json") == (out / "pred.json").read_bytes()
    content = json.loads((out / "pred.json").read_text())
    assert np.array_equal(content[0], pred[0]) and np.array_equal(content[1], pred[1])


def test_the_report_is_one_page_that_needs_nothing_else(index, labels, tmp_path):
    _, out = score(index, noisy(labels), tmp_path)
    page = (out / "report.html").read_text()
    assert "{{" not in page and "ten &lt;hands&gt;" in page and "ten <hands>" not in page
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|https?://', page)
    assert page.count("data:image/png;base64,") == 6 * 5  # six hands: photograph; mesh and joints of both
    numbers = json.loads(re.search(r"const scene = (\{.*\}), view =", page).group(1))
    assert len(numbers["cases"]) == 6 and len(numbers["cases"][0]["pred"]) == 3 * 778
    assert sum(numbers["histogram"]["counts"]) == N
    errors = [float(case["name"].split(", ")[1].split()[0]) for case in numbers["cases"]]
    assert errors == sorted(errors)


def test_the_report_draws_hands_where_the_camera_saw_them(index, labels, monkeypatch):
    """Truth: on the labelled pixels. A prediction 20 mm to the side: as far beside it as K says; without K it
    is fitted to the truth first."""
    drawn = []
    monkeypatch.setattr(evaluate, "draw_joints", lambda image, points: drawn.append(points) or image)
    joints, vertices = labels
    pred = (joints + [0.02, 0, 0], vertices)
    truth = {"gt_joints": joints, "gt_vertices": vertices}
    hands = HandIndex(index)
    x0, y0, x1, y1 = hands.columns["box"][2]
    side = 1.6 * max(x1 - x0, y1 - y0)
    corner = np.array([x0 + x1 - side, y0 + y1 - side]) / 2
    expected = (hands.columns["joints2d"][2] + 0.5 - corner) * 256 / side - 0.5
    _, _, note = evaluate.show_case(hands, synthetic_mano()["f"], pred, truth, 2, "joints")
    np.testing.assert_allclose(drawn[1], expected, atol=1e-2)
    beside = FOCAL * 0.02 / joints[2, :, 2] * 256 / side
    np.testing.assert_allclose(drawn[0] - drawn[1], np.c_[beside, 0 * beside], atol=1e-6)
    assert "placed in the camera" in note
    del hands.columns["K"]
    _, _, note = evaluate.show_case(hands, synthetic_mano()["f"], pred, truth, 2, "joints")
    np.testing.assert_allclose(drawn[3], expected, atol=12)  # weak perspective, in a crop of 256 pixels
    np.testing.assert_allclose(drawn[2], drawn[3], atol=1e-4)
    assert "after the similarity fit" in note


def test_other_units_and_frames_are_noticed_and_nothing_is_overwritten(index, labels, tmp_path, capsys):
    joints, vertices = noisy(labels)
    score(index, [1000 * joints, None], tmp_path)
    assert "1e+03 times as large" in capsys.readouterr().out
    score(index, [joints * [1, -1, -1], None], tmp_path)
    assert "behind the camera" in capsys.readouterr().out
    table, out = score(index, [joints, vertices], tmp_path)
    assert "warning" not in capsys.readouterr().out
    evaluate.main(["--data", str(index), "--predictions", str(out / "pred.zip"), "--out",
                   str(tmp_path / "again")])
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == table
    with pytest.raises(ValueError, match="would be overwritten"):
        evaluate.main(["--data", str(index), "--predictions", str(out / "pred.json"), "--out", str(out)])


def test_joints_in_another_order_than_their_meshes_are_noticed(index, labels, tmp_path, capsys):
    """A similarity fit of joints alone cannot tell. Other units do not hide it, and a bad network does not
    cause it."""
    joints, vertices = noisy(labels)
    score(index, [1000 * joints[:, list(FREIHAND_TO_MANO)], 1000 * vertices], tmp_path)
    printed = capsys.readouterr().out
    assert "another order" in printed and "number 1 lies where the labels have number 5" in printed
    swapped = [3, 2, 1, 0, *range(4, N)]  # each hand predicted as another one
    score(index, [joints[swapped] + 0.1, vertices[swapped] + 0.1], tmp_path)
    assert "another order" not in capsys.readouterr().out


def test_definitions(index, labels, tmp_path, monkeypatch, capsys):
    """Perfect meshes, scored with the joints of every definition; from a file without the kinematic ones."""
    vertices, joints, _ = (torch.as_tensor(points) for points in posed_hands())
    true = joints_from_vertices(vertices, synthetic_mano()).double().numpy()
    expected = {}
    for source in ("regressed", "kinematic"):
        for name, tips in TIPS.items():
            definition = " ".join(map(str, [source, *tips]))
            found = labelled_joints(vertices, joints, synthetic_mano(), definition).double().numpy()
            fitted = metrics.procrustes(found, true, reflect=True)
            expected[f"{source}, {name}"] = 1000 * np.linalg.norm(fitted - true, axis=2).mean()
    state = {"hand": hand_fingerprint(synthetic_mano()), "box_scale": 1.4}
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, kind: state)
    monkeypatch.setattr(evaluate, "load_mesh", lambda state, hand: TrueHands(index, 1.4 / CONTEXT))
    out = tmp_path / "a"
    evaluate.main(["--data", str(index), "--checkpoint", "last.pt", "--definitions", "--out", str(out),
                   "--device", "cpu", "--workers", "0"])
    table = json.loads((out / "definitions.json").read_text())
    own = table.pop("as predicted")
    scores = json.loads((out / "metrics.json").read_text())
    assert own == {key: scores[key] for key in own} and len(own) == 5
    assert {name: row["pa_mpjpe_mm"] for name, row in table.items()} == pytest.approx(expected, abs=1e-3)
    assert table["kinematic, smplx"]["root_mpjpe_mm"] > 0.3 > table["regressed, freihand"]["root_mpjpe_mm"]
    page = (out / "report.html").read_text()
    assert "kinematic, handoccnet" in page and "kinematic, handoccnet" in capsys.readouterr().out

    again, folder = score(index, labels, tmp_path, "--definitions")
    regressed = json.loads((folder / "definitions.json").read_text())
    assert list(regressed) == ["as predicted", *(f"regressed, {name}" for name in TIPS)]
    placed = {"abs_mpjpe_mm"}  # by a view's camera in the first
    for key in regressed["regressed, ho3d"].keys() - placed:
        assert regressed["regressed, ho3d"][key] == pytest.approx(table["regressed, ho3d"][key], abs=1e-2)
    with pytest.raises(ValueError, match="no meshes"):
        score(index, [labels[0], None], tmp_path, "--definitions")
    with pytest.raises(ValueError, match="--mano"):  # meshes with other numbers
        score(index, [labels[0], labels[1][:, ::-1]], tmp_path, "--definitions")


def test_images_of_one_pose_share_their_labels(index, labels, tmp_path):
    rows = np.array([3, 3, 0, 7])
    columns = {name: np.array(HandIndex(index).columns[name])[rows] for name in ("image", "side", "box")}
    copy_index(index, tmp_path / "shared", label=rows, **columns)
    table, _ = score(tmp_path / "shared", [points[rows] for points in labels], tmp_path)
    assert table["count"] == 4 and table["mpjpe_mm"] < 1e-6 and table["mpvpe_mm"] < 1e-6


def test_a_hand_without_a_mesh_leaves_the_joints(index, labels, tmp_path, capsys):
    vertices = labels[1].copy()
    vertices[4] = np.nan
    table, _ = score(copy_index(index, tmp_path / "partial", vertices=vertices), noisy(labels), tmp_path)
    assert table["count"] == N and "pa_mpjpe_mm" in table and "pa_mpvpe_mm" not in table
    assert "joints alone: 1 of them have no mesh" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_ends_the_prediction(index, tmp_path):
    """A blank image would be scored as a bad prediction."""
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    images = np.array(HandIndex(index).columns["image"])
    images[5] = b"x.png"
    boxes = np.array(HandIndex(index).columns["box"])
    boxes[7] += 1000
    for message, columns in ((r"x\.png", {"image": images}), (r"7\.png: its box lies", {"box": boxes})):
        net = TrueHands(index, 1.4 / CONTEXT)
        hands = HandIndex(copy_index(index, tmp_path / message[:4], **columns))
        with pytest.raises((ValueError, OSError), match=message):
            evaluate.predict_index(net, hands, synthetic_mano(), "freihand", 1.4, 1, 4, runtime)


def test_joints_alone(index, labels, tmp_path):
    table, out = score(index, [noisy(labels)[0], None], tmp_path)
    assert "pa_mpjpe_mm" in table
    assert not [key for key in table for word in ("mpvpe", "vertices", "f_5") if word in key]
    assert json.loads((out / "pred.json").read_text())[1] == [] and (out / "report.html").stat().st_size > 1e5


def test_ho3d_files_have_its_order_and_frame(index, labels, tmp_path):
    pred, hands = noisy(labels), HandIndex(index)
    write_predictions(tmp_path, *pred, "ho3d", hands)
    joints, vertices = (np.array(points) for points in json.loads((tmp_path / "pred.json").read_text()))
    assert (joints[..., 2] < 0).all() and (vertices[..., 2] < 0).all()
    # middle knuckle: 4 there, 9 here
    np.testing.assert_array_equal(joints[:, 4] * [1, -1, -1], pred[0][:, 9])
    np.testing.assert_array_equal(joints * [1, -1, -1], pred[0][:, list(FREIHAND_TO_MANO)])
    for read, written in zip(read_predictions(tmp_path / "pred.json", hands, "ho3d"), pred, strict=True):
        np.testing.assert_array_equal(read, written)
    # the official list has more than the index
    hands.meta["frames"], hands.columns["number"] = N + 3, np.arange(N) + 2
    write_predictions(tmp_path, *pred, "ho3d", hands)
    longer = np.array(json.loads((tmp_path / "pred.json").read_text())[0])
    assert len(longer) == N + 3 and not longer[[0, 1, N + 2]].any() and longer[2:N + 2].any((1, 2)).all()
    for read, written in zip(read_predictions(tmp_path / "pred.json", hands, "ho3d"), pred, strict=True):
        np.testing.assert_array_equal(read, written)


def test_the_tables_of_joints_are_mano_pys():
    assert tuple(results.MANO_TO_FREIHAND) == MANO_TO_FREIHAND
    assert tuple(results.FREIHAND_TO_MANO) == FREIHAND_TO_MANO


def closest_camera(points, in_view):
    """The camera (3,) that brings points (21,3) closest to in_view (21,2)."""
    axes = np.zeros((len(points), 2, 3))
    axes[..., 0] = points[:, :2]
    axes[:, [0, 1], [1, 2]] = 1
    scale, *shift = np.linalg.lstsq(axes.reshape(-1, 3), in_view.ravel(), rcond=None)[0]
    return [scale, shift[0] / scale, shift[1] / scale]


class TrueHands(torch.nn.Module):
    """Stands for a trained network: the true right hand of every view, in order, and the camera that shows it
    best."""

    def __init__(self, index, zoom):
        super().__init__()
        self.encoder = type("Encoder", (), {"config": {"image_size": 32}})()
        columns = HandIndex(index).columns
        vertices, joints, left = posed_hands()
        wrist = columns["vertices"][:, 0] - vertices[:, 0] * np.where(left[:, None], [-1, 1, 1], 1)  # camera
        x0, y0, x1, y1 = columns["box"].T
        side = CONTEXT * np.maximum(x1 - x0, y1 - y0) * zoom
        centre = np.stack([x0 + x1, y0 + y1], 1) / 2
        placed = joints * np.where(left[:, None, None], [-1, 1, 1], 1) + wrist[:, None]
        pixels = placed[..., :2] / placed[..., 2:] * FOCAL + 48  # (N, 21, 2) pixel edges
        in_view = (pixels - centre[:, None]) * 2 / side[:, None, None]  # the edges at -1 and 1
        in_view[left, :, 0] *= -1
        camera = np.array([closest_camera(*hand) for hand in zip(joints, in_view, strict=True)])
        self.answers = {"vertices": vertices, "joints": joints, "camera": camera}
        self.next = 0

    def forward(self, images):
        rows = slice(self.next, self.next + len(images))
        self.next += len(images)
        return [{key: torch.tensor(value[rows], dtype=torch.float32) for key, value in self.answers.items()}]


def test_predicting_undoes_crops_mirrors_and_cameras(index, tmp_path, monkeypatch):
    state = {"hand": hand_fingerprint(synthetic_mano()), "box_scale": 1.4}
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, kind: state)
    monkeypatch.setattr(evaluate, "load_mesh", lambda state, hand: TrueHands(index, 1.4 / CONTEXT))
    flags = ["--data", str(index), "--device", "cpu", "--workers", "0", "--batch-size", "4", "--out"]
    evaluate.main([*flags, str(tmp_path / "a"), "--checkpoint", "last.pt"])
    table = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert table["pa_mpjpe_mm"] < 1e-3 and table["pa_mpvpe_mm"] < 1e-3 and table["reflected_joints"] == 0
    assert table["root_mpjpe_mm"] < 1e-2 and table["mpjpe_mm"] < 2  # a view's camera knows no perspective
    assert table["wrist_cm"] < 0.1 and table["wrist_true_size_cm"] < 0.1 and 50 < table["wrist_depth_cm"] < 80
    evaluate.main([*flags, str(tmp_path / "b"), "--predictions", str(tmp_path / "a" / "pred.json")])
    # what is written is what was scored
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert again == {name: value for name, value in table.items() if not name.startswith(("wrist", "image_"))}
    assert table["image_median_percent"] < 3 and table["image_within_10"] > 0.95
    # a split whose labels are withheld
    columns = {name: np.array(HandIndex(index).columns[name]) for name in ("image", "side", "K", "box")}
    write_index(tmp_path / "bare", columns, {"name": "bare"}, root=HandIndex(index).root)
    evaluate.main([*flags[:1], str(tmp_path / "bare"), *flags[2:], str(tmp_path / "d"), "--checkpoint",
                   "last.pt"])
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == ["pred.json", "pred.zip"]
    assert (tmp_path / "d/pred.json").read_text() == (tmp_path / "a/pred.json").read_text()
    # photographs of which a detector or a person knows some points
    columns["keypoints"] = np.array(HandIndex(index).columns["joints2d"])
    columns["keypoints"][:, 5:] = 0
    columns["keypoints_score"] = np.tile((np.arange(21) < 5).astype(np.float32), (N, 1))
    write_index(tmp_path / "points", columns, {"name": "points"}, root=HandIndex(index).root)
    evaluate.main([*flags[:1], str(tmp_path / "points"), *flags[2:], str(tmp_path / "e"), "--checkpoint",
                   "last.pt"])
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert found["count"] == N and found["image_median_percent"] < 3 and found["image_within_10"] > 0.95
    with pytest.raises(ValueError, match="last.pt was trained with another hand model"):
        state["hand"] = "other"
        evaluate.main([*flags, str(tmp_path / "c"), "--checkpoint", "last.pt"])


def test_left_hands_have_the_tip_that_dexycb_gives_them(index):
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    net = TrueHands(index, 1.4 / CONTEXT)
    joints, vertices, *_ = evaluate.predict_index(net, HandIndex(index), synthetic_mano(), "manopth", 1.4, 1,
                                                  4, runtime)
    for row in range(N):
        tips = TIPS["manopth445" if HandIndex(index).side(row) else "manopth"]
        np.testing.assert_array_equal(joints[row, [4, 8, 12, 16, 20]], vertices[row, list(tips)])


def test_wrists_stand_before_the_camera_of_their_label():
    """Four images of three labels, each with its own K: flat hands that face the camera, where a view's
    camera is exact, are seen where the view showed them."""
    K = np.array([[[f, 0, 40 + f / 9], [0, f, 30], [0, 0, 1]] for f in (150.0, 240.0, 310.0)])
    index = SimpleNamespace(columns={"K": K}, pose_ids=lambda: np.array([2, 0, 1, 0]))
    joints = torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, (2, 21, 3))) * torch.tensor([1, 1, 0])
    camera = torch.tensor([[5.0, 0.02, -0.03], [7.0, -0.04, 0.01]], dtype=torch.float64)
    crop = torch.tensor([[60.0, 50.0, 100.0], [80.0, 20.0, 130.0]], dtype=torch.float64)
    pixels = evaluate.seen_in_photograph(joints, camera, crop, 0.7)
    wrist = evaluate.wrist_in_camera(index, np.array([2, 0]), joints, pixels).numpy()
    for i, label in enumerate((1, 2)):
        projected = (joints[i].numpy() + wrist[i]) @ K[label].T
        seen = (camera[i, 0] * (joints[i, :, :2] + camera[i, 1:])).numpy()
        expected = crop[i, :2].numpy() + 0.7 * crop[i, 2].item() / 2 * seen
        np.testing.assert_allclose(pixels[i].numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(projected[:, :2] / projected[:, 2:] + 0.5, expected, atol=1e-9)


def test_errors_in_the_image_are_shares_of_the_box():
    """Two hands of boxes 40 and 20 pixels long: points 1, 2, 8 off and two that nobody knows."""
    points = np.zeros((2, 21, 2))
    points[:] = np.nan
    points[0, :2] = [[10, 10], [20, 10]]
    points[1, :2] = [[5, 5], [7, 7]]
    pixels = np.nan_to_num(points) + 0.5
    pixels[0, :2] += [[1, 0], [0, 2]]
    pixels[1, 0] += [8, 0]
    score = np.ones((2, 21))
    score[1, 1] = 0
    box = np.array([[0, 0, 40, 30], [0, 0, 20, 10]])
    columns = {"keypoints": points, "keypoints_score": score, "box": box}
    index = SimpleNamespace(columns=columns, meta={}, pose_ids=lambda: np.arange(2))
    found = evaluate.image_errors(index, pixels)
    assert found == {"image_median_percent": pytest.approx(5), "image_within_10": pytest.approx(2 / 3),
                     "image_points": 3}
    columns["joints2d"] = np.full((2, 21, 2), np.nan)  # nothing known: the detector's are taken
    assert evaluate.image_errors(index, pixels) == found
    index.meta["unseen"] = [1]
    assert evaluate.image_errors(index, pixels)["image_points"] == 2
    assert evaluate.image_errors(SimpleNamespace(columns={}), pixels) == {}


def test_wrist_errors():
    """A hand predicted at half its size and half as far is placed rightly once its size is known."""
    truth = np.random.default_rng(0).normal(0, 0.05, (5, 21, 3)) + [0.03, 0, 0.4]
    scores = evaluate.wrist_errors(truth / 2, truth)
    assert scores["wrist_cm"] == pytest.approx(scores["wrist_depth_cm"] / 2)
    assert scores["wrist_true_size_cm"] == pytest.approx(0)


@pytest.mark.parametrize("content, message", [
    ("nonsense", "broken JSON"),
    ("{}", r"needs \[joints, vertices\]"),
    ("[[1], [2]]", "1 entries of joints, but"),
    ("nan", "sample 3 "),
    ("short", "joints of hand 3 are not 21 points"),
    ("text", "vertices of hand 9 are not 778 points"),
    (None, "no such file")])
def test_a_broken_file_costs_one_line_and_leaves_nothing(index, labels, tmp_path, content, message):
    points = [p.tolist() for p in labels]
    if content == "nan":
        points[0][3][0][0] = float("nan")
    elif content == "short":
        points[0][3] = points[0][3][:20]
    elif content == "text":
        points[1][9][0][0] = "far"
    file = tmp_path / "pred.json"
    if content is not None:
        file.write_text(json.dumps(points) if content in ("nan", "short", "text") else content)
    with pytest.raises((ValueError, OSError), match=message) as error:
        evaluate.main(["--data", str(index), "--predictions", str(file), "--out", str(tmp_path / "out")])
    assert str(file) in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir() if entry != file] == []


def test_other_mistakes(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    out = ["--out", str(tmp_path / "out")]
    data = ["--data", str(index), *out]
    for message, flags in (("is a file", ["--predictions", "p.json", "--out", str(tmp_path / "file")]),
                           ("--data is missing", ["--predictions", "p.json", *out]),
                           ("NAME=", ["--compare", "a", *out]),
                           ("must be odd", ["--checkpoint", "last.pt", "--tta", "2", *data]),
                           ("--tta does nothing here", ["--predictions", "p.json", "--tta", "3", *data]),
                           ("--protocol does nothing here", ["--compare", "a=b", "--protocol", "ho3d", *out]),
                           ("--mano does nothing here", ["--compare", "a=b", "--mano", "m.pkl", *out]),
                           ("--definitions does nothing", ["--compare", "a=b", "--definitions", *out])):
        with pytest.raises(ValueError, match=message):
            evaluate.main(flags)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="disk"):  # dies while writing

        def fail(*_):
            raise RuntimeError("disk")
        patch.setattr(evaluate, "report", fail)
        columns = HandIndex(index).columns
        score(index, [np.array(columns["joints"]), np.array(columns["vertices"])], tmp_path)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_comparing_runs(tmp_path, capsys):
    def write(name, **values):
        mean_hand = {"mean_hand_pa_mpjpe_mm": 18.0, "mean_hand_pa_mpvpe_mm": 15.0}
        (tmp_path / name).write_text(json.dumps({"count": 5} | mean_hand | values))
        return str(tmp_path / name)
    a = write("a", pa_mpjpe_mm=8.0, pa_mpvpe_mm=7.0, f_5=0.5)
    b = write("b", pa_mpjpe_mm=10.0, pa_mpvpe_mm=8.0, f_5=0.7)
    c = write("c", pa_mpjpe_mm=6.0, pa_mpvpe_mm=5.0)
    evaluate.main(["--compare", f"scratch={a}", f"scratch={b}", f"pretrained={c}", "--out",
                   str(tmp_path / "out")])
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table) == ["mean_hand", "scratch", "pretrained"]
    assert table["mean_hand"] == {"pa_mpjpe_mm": 18, "pa_mpvpe_mm": 15}
    assert table["scratch"]["pa_mpjpe_mm"] == 9
    assert table["scratch"]["pa_mpjpe_mm_std"] == pytest.approx(2 ** 0.5)
    assert table["scratch"]["f_5"] == pytest.approx(0.6) and table["pretrained"]["pa_mpvpe_mm"] == 5
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == list(table) and "9.00 ± 1.41" in printed[2]
    other = write("d", pa_mpjpe_mm=6.0, pa_mpvpe_mm=5.0, count=6)
    with pytest.raises(ValueError, match="d: scored on other hands"):
        evaluate.main(["--compare", f"a={a}", f"d={other}", "--out", str(tmp_path / "out2")])


def test_augmented_views_are_turned_back():
    """A network that points from the middle of its view at a bright spot points at the same spot of the
    canvas, however the view is turned."""
    canvas = torch.zeros(2, 3, 72, 72, dtype=torch.uint8)
    canvas[0, :, 20:24, 40:44] = 255
    canvas[1, :, 50:54, 30:34] = 255

    def net(views):
        light = views[:, 0] - views[:, 0].amin((1, 2), keepdim=True)
        line = (torch.arange(64) * 2 + 1) / 64 - 1
        x = (light.sum(1) * line).sum(1)
        y = (light.sum(2) * line).sum(1)
        spot = torch.stack([x, y, 0 * x], 1) / light.sum((1, 2))[:, None]  # (B, 3)
        joints = spot[:, None] * torch.arange(21.0)[:, None]
        return [{"joints": joints, "vertices": joints.repeat(1, 38, 1)[:, :778] + 0.1, "camera": spot}]

    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    one, five = (evaluate.predict_views(net, canvas, 0.9, 64, runtime, tta) for tta in (1, 5))
    assert one["joints"][0, 20, 0] > 1
    assert (one["joints"] - five["joints"]).abs().max() < 0.05
    assert (one["vertices"] - five["vertices"]).abs().max() < 0.05
    assert (five["joints"][:, 0] - one["joints"][:, 0]).abs().max() < 1e-6
    assert torch.equal(one["camera"], five["camera"])
