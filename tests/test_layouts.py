"""Public data sets in the layouts of their downloads, written from synthetic hands and read back to the
millimetre; damaged copies."""
import json
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import call, log
from PIL import Image
from scipy.spatial.transform import Rotation

import evaluate
import layouts
import metrics
from data import HandDataset, HandIndex, make_sampler
from evaluate import read_labels
from finetune_mesh import defined_joints, mesh_losses
from mano import (
    FREIHAND_TO_MANO,
    MANO_TO_FREIHAND,
    Mano,
    hand_fingerprint,
    labelled_joints,
    mean_hand,
    mirror_arrays,
    rotmat_from_axis_angle,
)
from prepare_data import ManoModels, drop_uncroppable
from results import read_predictions, write_predictions
from synthetic_hand import synthetic_mano
from test_metrics import each, loop_align, loop_f, loop_measures, loop_points, loop_sc_tr

ARRAYS = synthetic_mano()
FLIP = np.array([1.0, -1.0, -1.0])
K = np.array([[614.0, 0, 318.0], [0, 610.0, 243.0], [0, 0, 1]])  # fx is not fy, the middle is not the centre
TIP_FIRST = np.argsort(layouts.FROM_TIPS)  # FreiHAND's order to InterHand's
SIDES = ("right", "left")


def posed(count, seed, side="right", tips="freihand"):
    """Labels of random hands about half a metre before an OpenCV camera, in float64.

    pose is absolute; coefficients are those of its 45 numbers about the mean pose. """
    rng = np.random.default_rng(seed)
    hand = ARRAYS if side == "right" else mirror_arrays(ARRAYS)
    coefficients = 0.6 * rng.standard_normal((count, 45))
    fingers = hand["hands_mean"].ravel() + coefficients @ hand["hands_components"]
    mirror = np.tile([1.0, 1, 1] if side == "right" else [1.0, -1, -1], 15)
    right = ARRAYS["hands_mean"].ravel() + coefficients @ ARRAYS["hands_components"]
    assert np.allclose(fingers * mirror, right)
    pose = np.concatenate([Rotation.random(count, random_state=seed).as_rotvec(), fingers], 1)
    betas = 0.5 * rng.standard_normal((count, 10))
    trans = rng.uniform([-0.1, -0.1, 0.5], [0.1, 0.1, 0.8], (count, 3))
    rotmats = rotmat_from_axis_angle(torch.from_numpy(pose.reshape(-1, 16, 3)))
    vertices, joints = Mano(ARRAYS, side, tips).double()(rotmats, torch.from_numpy(betas))
    return {"pose": pose, "coefficients": coefficients, "betas": betas, "trans": trans,
            "vertices": vertices.numpy() + trans[:, None], "joints": joints.numpy() + trans[:, None]}


def project(points, camera=K):
    return (points @ camera.T)[..., :2] / points[..., 2:]


def box_around(joints, camera=K):
    points = project(joints, camera)
    return np.r_[points.min(0), points.max(0)].tolist()


def image(path, size=(640, 480)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        Image.new("RGB", size, (90, 120, 150)).save(path)


def mask(there, size=(480, 640)):
    """As DexYCB's: an object left of the middle, the hand right of it."""
    seg = np.full(size, 7, np.uint8)
    seg[:, size[1] // 2:] = 255 * there
    return seg


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


# --------------------------------------------------------------------------------------- layouts of the sets
def write_freihand(root, count=40):
    """`count` poses, each in four images."""
    hands = posed(count, 1)
    labels = {"K": np.tile(K, (count, 1, 1)), "xyz": hands["joints"], "verts": hands["vertices"],
              "mano": np.c_[hands["pose"], hands["betas"], np.zeros((count, 3))], "scale": np.ones(count)}
    for name, value in labels.items():
        write(root / f"training_{name}.json", value.tolist())
    for number in range(4 * count):
        image(root / "training" / "rgb" / f"{number:08d}.jpg")
    return hands


def write_ho3d(root, ending="png"):
    """Two sequences of three frames to train on, one of two to evaluate; the hands in OpenGL's frame."""
    truth = {}
    for split, names in (("train", ["ABF10/0000", "ABF10/0001", "ABF10/0003", "SM2/0000", "SM2/0007"]),
                         ("evaluation", ["AP10/0000", "AP10/0005"])):
        hands = posed(len(names), len(names), tips="ho3d")
        wrist = hands["joints"][:, 0]
        trans_gl = wrist * FLIP - (wrist - hands["trans"])  # hands are at z < 0; the wrist is J0 + trans
        turn = Rotation.from_rotvec([np.pi, 0, 0])
        turned = (turn * Rotation.from_rotvec(hands["pose"][:, :3])).as_rotvec()
        pose_gl = np.concatenate([turned, hands["pose"][:, 3:]], 1)
        for k, name in enumerate(names):
            sequence, frame = name.split("/")
            image(root / split / sequence / "rgb" / f"{frame}.{ending}")
            joints = (hands["joints"][k] * FLIP)[list(FREIHAND_TO_MANO)]
            content = {"camMat": K, "objName": "021_bleach", "handPose": pose_gl[k], "handTrans": trans_gl[k],
                       "handBeta": hands["betas"][k], "handJoints3D": joints,
                       "objTrans": np.zeros(3, np.float32), "objLabel": np.int64(3)}
            if split == "evaluation":
                content = {"camMat": K, "handJoints3D": joints[0],
                           "handBoundingBox": box_around(hands["joints"][k])}
            path = root / split / sequence / "meta" / f"{frame}.pkl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(content, protocol=2))
        write(root / f"{split}.txt", "".join(f"{name}\n" for name in names))
        truth[split] = hands
    (root / "train/SM2/seg").mkdir()
    Image.new("RGB", (640, 480), (0, 0, 255)).save(root / "train/SM2/seg/0007.png")
    joints = (truth["evaluation"]["joints"] * FLIP)[:, list(FREIHAND_TO_MANO)]
    write(root / "evaluation_xyz.json", joints.tolist())
    write(root / "evaluation_verts.json", (truth["evaluation"]["vertices"] * FLIP).tolist())
    return truth


def write_dexycb(root, sequences=5, frames=2):
    """Ten subjects; a frame of each tenth sequence shows no hand.

    truth: (subject, sequence, camera, frame) -> (side, row)."""
    hands = {side: posed(40, 3 + k, side, "manopth") for k, side in enumerate(SIDES)}
    truth = {}
    serials = [f"8362120601{k:02d}" for k in range(8)]
    in_reverse = "".join(f"- '{serial}'\n" for serial in serials[::-1])
    for s in range(10):
        subject = root / f"2020070{s}-subject-{s + 1:02d}"
        side = SIDES[s % 2]
        betas = "".join(f"- {beta!r}\n" for beta in hands[side]["betas"][s].tolist())
        write(root / "calibration" / f"mano_{s}" / "mano.yml", f"betas:\n{betas}")
        for q in range(sequences):
            sequence = subject / f"2020070{s}_1{q:05d}"
            write(sequence / "meta.yml",
                  f"# capture\nextrinsics: '2020'\nmano_calib:\n- '{s}'\nmano_sides: [{side}]\n"
                  f"num_frames: {frames}\nserials:\n{in_reverse}ycb_ids:\n- 1\n- 5\n")
            for c, serial in enumerate(serials):
                for frame in range(frames):
                    row = (7 * s + 3 * q + c + frame) % 40
                    there = (s + q + frame) % 10 != 0
                    pose = np.r_[hands[side]["pose"][row, :3], hands[side]["coefficients"][row],
                                 hands[side]["trans"][row]][None]
                    joints = hands[side]["joints"][row][None]
                    path = sequence / serial / f"labels_{frame:06d}.npz"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.savez(path, pose_m=np.float32(pose if there else 0 * pose), seg=mask(there),
                             joint_3d=np.float32(joints if there else 0 * joints - 1))
                    image(sequence / serial / f"color_{frame:06d}.jpg")
                    truth[s, q, c, frame] = (side, row) if there else None
    lens = "color:\n  fx: 614.0\n  fy: 610.0\n  ppx: 318.0\n  ppy: 243.0\ndepth:\n  fx: 1.0\n  fy: 1.0\n"
    for serial in serials:
        write(root / "calibration" / "intrinsics" / f"{serial}_640x480.yml", lens)
    return hands, truth


def write_assemblyhands(root, split="val"):
    """Three frames of a headset's camera that moves.

    Both hands, of whose left one this camera does not see the thumb's tip; a right one with a doubtful wrist
    and an unknown tip; a left one alone. """
    hands = {side: posed(3, 20 + k, side)["joints"] for k, side in enumerate(SIDES)}
    data = {"images": [], "annotations": []}
    lens, headset, poses = {}, {}, {}
    for frame in range(3):
        turn = Rotation.random(random_state=frame).as_matrix()
        place = np.array([300.0, -200.0, 100.0 * frame])
        both = 1000 * np.concatenate([hands[side][frame][TIP_FIRST] for side in SIDES])
        valid = np.ones(42)
        seen = valid.copy()
        if frame == 0:
            seen[21] = 0
        if frame == 1:
            seen[[20, 4]] = valid[4] = 0
        boxes = {side: box_around(hands[side][frame]) for side in hands}
        if frame == 2:
            boxes["right"] = None
            valid[:21] = seen[:21] = 0
        name = f"ego_images_rectified/{split}/seq/HMC_1_mono10bit/{frame:06d}.jpg"
        image(root / "images" / name)
        data["images"].append({"id": 10 + frame, "seq_name": "seq", "camera": "HMC_1", "frame_idx": frame,
                               "file_name": name, "width": 640, "height": 480})
        data["annotations"].append({"image_id": 10 + frame, "bbox": boxes, "joint_valid": seen.tolist()})
        lens["HMC_1_mono10bit"] = K.tolist()
        headset[f"{frame:06d}"] = {"HMC_1_mono10bit": np.c_[turn, place].tolist()}
        world = (both - place) @ turn  # R X + t = both
        world[valid == 0] = 0
        poses[f"{frame:06d}"] = {"world_coord": world.tolist(), "joint_valid": valid.tolist()}
    calibration = {"calibration": {"seq": {"intrinsics": lens, "extrinsics": headset}}}
    for name, content in (("ego_data", data), ("ego_calib", calibration),
                          ("joint_3d", {"annotations": {"seq": poses}})):
        write(root / "annotations" / split / f"assemblyhands_{split}_{name}_v1-1.json", content)
    return hands


def write_interhand(root, split="val"):
    """Three frames of two sizes.

    Both hands, a left one with an invalid tip, a right one whose wrist is invalid and so has no joints. """
    hands = {side: posed(3, 30 + k, side) for k, side in enumerate(SIDES)}
    turn = Rotation.random(random_state=9).as_matrix()
    place = np.array([500.0, 100.0, -700.0])
    data = {"images": [], "annotations": []}
    cameras = {"0": {"campos": {"400": place.tolist()}, "camrot": {"400": turn.tolist()},
                     "focal": {"400": [614.0, 610.0]}, "princpt": {"400": [170.0, 243.0]}}}
    poses, fits = {"0": {}}, {"0": {}}
    for frame, kind in enumerate(("interacting", "left", "right")):
        both = 1000 * np.concatenate([hands[side]["joints"][frame][TIP_FIRST] for side in SIDES])
        valid = np.ones((42, 1), int)
        valid[:21] = kind in ("right", "interacting")
        valid[21:] = kind in ("left", "interacting")
        valid[{0: [], 1: [25], 2: [20]}[frame]] = 0
        world = both @ turn + place  # R (X - c) = both
        world[valid[:, 0] == 0] = 1.0  # placeholders
        size = ((334, 512), (512, 334))[frame % 2]
        name = f"Capture0/ROM/cam400/image{frame}.jpg"
        image(root / "images" / split / name, size)
        data["images"].append({"id": frame, "file_name": name, "width": size[0], "height": size[1],
                               "capture": 0, "subject": 1, "seq_name": "ROM", "camera": "400",
                               "frame_idx": frame})
        data["annotations"].append({"id": frame, "image_id": frame, "bbox": [100.0, 90.0, 150.0, 160.0],
                                    "joint_valid": valid.tolist(), "hand_type": kind, "hand_type_valid": 1})
        poses["0"][str(frame)] = {"world_coord": world.tolist(), "joint_valid": (valid > 0).tolist(),
                                  "hand_type": kind}
        fits["0"][str(frame)] = {side: fit_in_world(hands[side], frame, side, turn, place)
                                 if valid[20 if side == "right" else 41, 0] else None for side in SIDES}
    for name, content in (("data", data), ("camera", cameras), ("joint_3d", poses),
                          ("MANO_NeuralAnnot", fits)):
        write(root / "annotations" / split / f"InterHand2.6M_{split}_{name}.json", content)
    return hands


def fit_in_world(hands, row, side, turn, place):
    """MANO's numbers of a hand before the camera R (X - c), as InterHand's fits have them: in the world."""
    arrays = ARRAYS if side == "right" else mirror_arrays(ARRAYS)
    pose, betas, trans = (hands[name][row] for name in ("pose", "betas", "trans"))
    rotation = Rotation.from_matrix(turn.T) * Rotation.from_rotvec(pose[:3])
    flat = torch.eye(3).double().expand(1, 16, 3, 3)
    wrist = Mano(ARRAYS, side).double()(flat, torch.from_numpy(betas[None]))[1][0, 0].numpy()
    trans = (wrist + trans) @ turn + place / 1000 - wrist  # the wrist of the world's mesh
    return {"pose": np.r_[rotation.as_rotvec(), pose[3:] - arrays["hands_mean"].ravel()].tolist(),
            "shape": betas.tolist(), "trans": trans.tolist()}


def close(found, wanted, off=1e-6):
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found, float) - wanted).max() < off


def close_where_known(found, wanted, unknown, off=1e-6):
    """unknown (N,21): what must be NaN."""
    assert np.array_equal(np.isnan(found).any(2), unknown)
    close(np.where(unknown[..., None], 0, found), np.where(unknown[..., None], 0, wanted), off)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Each set once, with what was written, and the hand that its labels belong to."""
    root = tmp_path_factory.mktemp("sets")
    writers = {"ho3d": write_ho3d, "dexycb": write_dexycb, "assemblyhands": write_assemblyhands,
               "interhand": write_interhand}
    made = {name: write_set(root / name) for name, write_set in writers.items()}
    np.savez(root / "hand.npz", **ARRAYS)
    return root, made


# ------------------------------------------------------------------------------------------------- read back
def test_freihand_train_and_val_share_no_pose(tmp_path):
    """The four images of a pose are in one part, every pose is in one, and rows keep their own labels."""
    hands = write_freihand(tmp_path)
    poses = {}
    for split in ("train", "val", "training"):
        columns, *_ = layouts.freihand(tmp_path, split)
        label = columns["label"]
        assert np.bincount(label).tolist() == [4] * len(columns["pose"])
        numbers = np.array([int(name[-12:-4]) for name in columns["image"]])  # image i shows the pose i % 40
        close(columns["joints"][label], hands["joints"][numbers % 40], 1e-9)
        close(columns["vertices"][label], hands["vertices"][numbers % 40], 1e-9)
        close(columns["pose"][label], hands["pose"][numbers % 40], 1e-9)
        poses[split] = set((numbers % 40).tolist())
    assert poses["val"] == {19, 39}
    assert not poses["train"] & poses["val"] and poses["train"] | poses["val"] == poses["training"]


def test_freihands_evaluation_has_its_whole_list(tmp_path):
    """One image is not there, one joint lies behind the camera: the submission has all hands of the set."""
    write_freihand(tmp_path, 5)
    for name in ("K", "xyz", "verts", "mano", "scale"):
        (tmp_path / f"training_{name}.json").rename(tmp_path / f"evaluation_{name}.json")
    edit(lambda joints: joints[3][8].__setitem__(2, -0.01))(tmp_path / "evaluation_xyz.json")
    for number in (0, 2, 3, 4):
        image(tmp_path / "evaluation/rgb" / f"{number:08d}.jpg")
    call("prepare_data.py", "freihand", tmp_path, "--split", "evaluation", "--out", tmp_path / "x",
         "--skip-missing")
    index = HandIndex(tmp_path / "x")
    assert index.columns["number"].tolist() == [0, 2, 3, 4] and index.meta["unseen"] == []
    write_predictions(tmp_path, index.columns["joints"], None, "freihand", index)
    assert np.any(json.loads((tmp_path / "pred.json").read_text())[0], (1, 2)).tolist() == [1, 0, 1, 1, 1]
    close(read_predictions(tmp_path / "pred.json", index, "freihand")[0], index.columns["joints"])


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_ho3d(tmp_path, ending):
    root = tmp_path / "ho3d"
    truth = write_ho3d(root, ending)
    np.savez(tmp_path / "hand.npz", **ARRAYS)
    for split, count in (("train", 5), ("evaluation", 2)):
        call("prepare_data.py", "ho3d", root, "--split", split, "--out", tmp_path / split,
             "--mano", tmp_path / "hand.npz")
        index = HandIndex(tmp_path / split)
        wanted = truth[split]
        definition = {"train": "ho3d", "evaluation": "kinematic 744 333 444 555 672"}[split]
        version = "v2" if ending == "png" else "v3"
        assert len(index) == count and index.meta["name"] == f"ho3d-{version}-{split}"
        assert index.meta["protocol"] == "ho3d" and index.meta["joints"] == definition
        assert index.meta["pose_mean"] is False
        close(index.columns["joints"], wanted["joints"])
        close(index.columns["vertices"], wanted["vertices"])
        close(index.columns["joints2d"], project(wanted["joints"]), 0.01)
        boxes = np.array([box_around(joints) for joints in wanted["joints"]]) + 0.5
        close(index.columns["box"], boxes, 0.01)
        if split == "train":
            dataset = HandDataset([index], 64, 2.0, ("mask",))
            assert [index.mask_path(row) is not None for row in range(5)] == [False] * 4 + [True]
            assert [bool(dataset[row]["has_mask"]) for row in range(5)] == [False] * 4 + [True]
            turns = [Rotation.from_rotvec(np.reshape(pose, (-1, 3))).as_matrix()
                     for pose in (index.columns["pose"], wanted["pose"])]
            close(*turns, 1e-5)
            assert index.columns["video"].tolist() == [0, 0, 0, 1, 1]
    swapped = json.loads((root / "evaluation_xyz.json").read_text())[::-1]
    write(root / "evaluation_xyz.json", swapped)  # not in the order of the list of frames
    done = call("prepare_data.py", "ho3d", root, "--split", "evaluation", "--out", tmp_path / "again",
                check=False)
    assert done.returncode == 2 and "evaluation_xyz.json: entry" in done.stderr
    assert not (tmp_path / "again/index.json").exists()


@pytest.mark.parametrize("setup, split", [("s0", "train"), ("s0", "val"), ("s0", "test"), ("s1", "val"),
                                          ("s2", "test")])
def test_dexycb(roots, tmp_path, setup, split):
    root = roots[0]
    hands, truth = roots[1]["dexycb"]
    call("prepare_data.py", "dexycb", root / "dexycb", "--setup", setup, "--split", split,
         "--out", tmp_path / "x", "--mano", root / "hand.npz")
    index = HandIndex(tmp_path / "x")
    order = [key for key in sorted(truth)  # subject, sequence, camera, frame
             if layouts.dexycb_part(setup, key[0], key[2], key[1]) == split]
    there = [number for number, key in enumerate(order) if truth[key]]
    assert index.columns["number"].tolist() == there and index.meta["frames"] == len(order)
    rows = [truth[order[number]] for number in there]
    assert index.columns["side"].tolist() == [side == "left" for side, _ in rows]
    joints, pose = (np.array([hands[side][name][row] for side, row in rows]) for name in ("joints", "pose"))
    close(index.columns["joints"], joints)
    close(index.columns["joints2d"], project(joints), 0.01)
    close(index.columns["pose"], pose, 1e-5)
    write_predictions(tmp_path, joints, None, "dexycb", index)  # the toolkit's text, in mm
    lines = [line.split(",") for line in (tmp_path / "pred.txt").read_text().splitlines()]
    assert [int(line[0]) for line in lines] == there and {len(line) for line in lines} == {64}
    close(np.array(lines, float)[:, 1:].reshape(-1, 21, 3) / 1000, joints)
    close(read_predictions(tmp_path / "pred.txt", index, "dexycb")[0], joints)
    (tmp_path / "short.txt").write_text((tmp_path / "pred.txt").read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=f"short.txt: image {there[0]} is missing"):
        read_predictions(tmp_path / "short.txt", index, "dexycb")
    left = index.columns["side"] == 1
    assert np.isnan(index.columns["betas"][left]).all() and np.isfinite(index.columns["betas"][~left]).all()
    dataset = HandDataset([index], 64, 2.0, ("betas", "joints", "pose", "mask"), substitute=False)
    for row in {int(np.argmax(left)), int(np.argmin(left))}:
        item = dataset[row]
        edge = 32 + 64 * (320 - item["crop"][0]) / item["crop"][2]  # right of the image's middle is the hand
        hand = item["mask"][0, 32] > 0  # in the mirrored canvas of a left hand, left of it
        wide = 64 - np.clip(round(edge), 0, 64)
        assert item["has_mask"] and item["mirrored"] == left[row] and abs(int(hand.sum()) - wide) <= 1
        assert hand.sum() in (0, 64) or bool(hand[0]) == left[row]
        assert item["has_joints"] == 1 and item["has_betas"] == (not left[row])
        assert item["betas"].any() == (not left[row])


class OneHand(torch.nn.Module):
    """Stands for a trained network: one bent hand for every view, in the middle of it."""

    def __init__(self, hand):
        super().__init__()
        self.encoder = SimpleNamespace(config={"image_size": 32})
        bent = rotmat_from_axis_angle(0.2 * torch.ones(1, 16, 3))
        vertices, joints = hand(bent, torch.zeros(1, 10))
        self.answer = {"vertices": vertices - joints[:, :1], "joints": joints - joints[:, :1],
                       "camera": torch.tensor([[5.0, 0, 0]])}

    def forward(self, images):
        return [{name: value.repeat(len(images), *[1] * (value.dim() - 1))
                 for name, value in self.answer.items()}]


def evaluated(index, folder, monkeypatch):
    """metrics.json and scores.txt of OneHand, whose files of results are in `folder`."""
    state = {"hand": hand_fingerprint(ARRAYS), "box_scale": 1.4}
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, kind: state)
    monkeypatch.setattr(evaluate, "load_mesh", lambda state, hand: OneHand(hand))
    evaluate.main(["--data", str(index), "--checkpoint", "last.pt", "--out", str(folder), "--device", "cpu",
                   "--workers", "0"])
    lines = (folder / "scores.txt").read_text().splitlines()
    scores = {line.rsplit(": ", 1)[0]: float(line.rsplit(": ", 1)[1]) for line in lines}
    return json.loads((folder / "metrics.json").read_text()), scores


def is_mean_hand(joints, definition, left=False):
    off = (joints - joints[0]) * [-1 if left else 1, 1, 1] - mean_hand(ARRAYS, definition)[0][0]
    off = off - off[0]
    if left:
        off[12] = 0  # DexYCB gives left hands another tip
    return np.abs(off).max() < 1e-5


def test_every_frame_that_ho3d_lists_is_predicted_and_scored(tmp_path, monkeypatch):
    """The official arithmetic on our files, of which one frame has no label of its own, one a box outside of
    its image though its joints are inside, and one a hand that is not in it."""
    root = tmp_path / "ho3d"
    write_ho3d(root)
    labels = {name: np.array(json.loads((root / f"evaluation_{name}.json").read_text()))
              for name in ("xyz", "verts")}
    for copy, shift in (("0009", 0.01), ("0012", 3.0)):  # metres to the right
        labels = {name: np.concatenate([value, value[:1] + [shift, 0, 0]]) for name, value in labels.items()}
        shutil.copy(root / "evaluation/AP10/rgb/0000.png", root / f"evaluation/AP10/rgb/{copy}.png")
        content = pickle.loads((root / "evaluation/AP10/meta/0000.pkl").read_bytes())
        content["handJoints3D"] = labels["xyz"][-1, 0]
        content["handBoundingBox"] = [900.0, 10, 1000, 90]
        (root / f"evaluation/AP10/meta/{copy}.pkl").write_bytes(pickle.dumps(content, protocol=2))
        with open(root / "evaluation.txt", "a") as file:
            file.write(f"AP10/{copy}\n")
    nothing = {"camMat": None, "handJoints3D": None, "handBoundingBox": None}
    change_pickle(**nothing)(root / "evaluation/AP10/meta/0005.pkl")
    for name, value in labels.items():
        write(root / f"evaluation_{name}.json", value.tolist())
    done = call("prepare_data.py", "ho3d", root, "--split", "evaluation", "--out", tmp_path / "x")
    assert "its box had to be cut: 2:" in done.stdout and "it is not in its image: 1:" in done.stdout
    index = HandIndex(tmp_path / "x")
    assert len(index) == 4 and (index.meta["reboxed"], index.meta["unseen"]) == ([1, 2], [3])
    close(index.columns["box"][2], np.array(box_around(labels["xyz"][2] * FLIP)) + 0.5, 0.01)

    table, scores = evaluated(tmp_path / "x", tmp_path / "out", monkeypatch)
    assert (table["count"], table["count_reboxed"], table["count_unseen"]) == (4, 2, 1)
    pred = [np.array(points) for points in json.loads((tmp_path / "out/pred.json").read_text())]
    assert len(pred[0]) == len(pred[1]) == 4 and (pred[0][..., 2] < 0).all()
    in_order = (pred[0] * FLIP)[:, layouts.FROM_MANO]
    assert [is_mean_hand(joints, index.meta["joints"]) for joints in in_order] == [False] * 3 + [True]
    for name, true, found in (("xyz", labels["xyz"], pred[0]), ("mesh", labels["verts"], pred[1])):
        aligned = each(loop_align, true, found)
        kinds = {"": found, "_procrustes_al" if name == "xyz" else "_al": aligned}
        if name == "xyz":
            orders = [points[:, layouts.FROM_MANO] for points in (true, found)]
            kinds["_scale_trans_al"] = each(loop_sc_tr, *orders)[:, FREIHAND_TO_MANO]
        for kind, points in kinds.items():
            mean, area = loop_measures(loop_points(true, points))
            assert scores[f"{name}{kind}_mean3d"] == pytest.approx(100 * mean, abs=1.5e-6)
            assert scores[f"{name}{kind}_auc3d"] == pytest.approx(area, abs=1.5e-6)
    for t in (5, 15):
        off = [loop_f(g, p, t / 1000) for g, p in zip(labels["verts"], aligned, strict=True)]
        assert scores[f"f_al_score_{t}"] == pytest.approx(np.mean(off), abs=1.5e-6)


def test_every_hand_that_dexycb_labels_is_predicted_and_scored(roots, tmp_path, monkeypatch):
    """The toolkit's arithmetic on pred.txt, where one hand is beside its image and one behind the camera."""
    root = tmp_path / "dexycb"
    shutil.copytree(roots[0] / "dexycb", root)
    setup = ("dexycb", root, "--setup", "s0", "--split", "val")
    path = next((root / "20200701-subject-02/20200701_100004").glob("*00/labels_000000.npz"))
    change_npz(joint_3d=np.float32(np.load(path)["joint_3d"] + [2.0, 0, 0]))(path)
    path = path.with_name("labels_000001.npz")
    change_npz(joint_3d=np.float32(np.load(path)["joint_3d"] + [0, 0, -3.0]))(path)
    done = call("prepare_data.py", *setup, "--out", tmp_path / "x")
    assert "it is not in its image: 2:" in done.stdout
    table, scores = evaluated(tmp_path / "x", tmp_path / "out", monkeypatch)
    lines = [line.split(",") for line in (tmp_path / "out/pred.txt").read_text().splitlines()]
    results = {int(line[0]): np.array(line[1:], np.float64).reshape(21, 3) for line in lines}
    files = sorted(path for path in root.glob("*/*/*/labels_*.npz")  # subject, sequence, camera, frame
                   if path.parts[-4][-2:] in ("01", "02") and path.parts[-3].endswith("4"))
    true, pred = [], []
    for number, path in enumerate(files):
        joints = np.load(path)["joint_3d"].reshape(21, 3)
        if not np.all(joints == -1):
            true.append((joints * np.float32(1000)).astype(np.float64))
            pred.append(results[number])
    true, pred = np.array(true), np.array(pred)
    assert table["count"] == len(true) == len(results) and table["count_unseen"] == 2
    rows = {"absolute": loop_points(true, pred),
            "root-relative": loop_points(true - true[:, :1], pred - pred[:, :1]),
            "procrustes": loop_points(true, each(loop_align, true, pred))}
    for name, errors in rows.items():
        mean, area = loop_measures(errors, 0, 50)
        assert scores[f"{name} MPJPE (mm)"] == pytest.approx(mean, abs=1.5e-6)
        assert scores[f"{name} AUC"] == pytest.approx(area, abs=1.5e-6)
    index = HandIndex(tmp_path / "x")
    for row, joints in enumerate(pred / 1000):
        unseen = row in index.meta["unseen"]
        assert is_mean_hand(joints, "manopth", index.side(row)) == unseen


def test_dexycb_meshes_and_shares(roots):
    """Meshes follow from the numbers on both sides; a setup's parts have the published sizes."""
    hands = ManoModels([roots[0] / "hand.npz"])
    for side in SIDES:
        one = roots[1]["dexycb"][0][side]
        left = np.full(40, side == "left")
        close(hands.fingers_from_coefficients(one["coefficients"], left), one["pose"][:, 3:], 1e-12)
        close(hands.vertices(one["pose"], one["betas"], one["trans"], left), one["vertices"])
    shares = {}
    for setup in ("s0", "s1", "s2", "s3"):
        parts = [layouts.dexycb_part(setup, s, c, q) for s in range(10) for c in range(8) for q in range(100)]
        shares[setup] = [parts.count(split) / len(parts) for split in ("train", "val", "test")]
    assert shares == {"s0": [0.8, 0.04, 0.16], "s1": [0.7, 0.1, 0.2], "s2": [0.75, 0.125, 0.125],
                      "s3": [0.75, 0.1, 0.15]}


def test_assemblyhands(roots, tmp_path):
    root = roots[0] / "assemblyhands"
    hands = roots[1]["assemblyhands"]
    call("prepare_data.py", "assemblyhands", root, "--split", "val", "--out", tmp_path / "x")
    index = HandIndex(tmp_path / "x")
    columns = index.columns
    assert columns["side"].tolist() == [0, 1, 0, 1, 1] and index.meta["protocol"] == "assemblyhands"
    wanted = np.array([hands[SIDES[side]][frame] for side, frame in ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2))])
    unknown = np.zeros((5, 21), bool)
    unknown[2, 8] = True  # the index finger's tip
    close_where_known(columns["joints"], wanted, unknown)
    close_where_known(columns["joints2d"], project(wanted), unknown, 0.01)
    assert np.argwhere(columns["visible"] == 0).tolist() == [[1, 4], [2, 0], [2, 8]]  # the annotation's flags
    close(columns["box"], np.array([box_around(joints) for joints in wanted]) + 0.5, 0.01)

    write_predictions(tmp_path, wanted, None, "assemblyhands", index)  # the challenge's file, and back
    world = json.loads((tmp_path / "pred_world.json").read_text())["annotations"]["seq"]
    close(read_predictions(tmp_path / "pred_world.json", index, "assemblyhands")[0], wanted)
    poses = json.loads((root / "annotations/val/assemblyhands_val_joint_3d_v1-1.json").read_text())
    poses = poses["annotations"]["seq"]
    close(np.array(world["000000"]["world_coord"]), np.array(poses["000000"]["world_coord"]), 1e-3)
    last = world["000002"]["world_coord"]
    assert not np.any(last[:21]) and np.all(last[21:])
    assert world.keys() == {"000000", "000001", "000002"}

    labels, _ = read_labels(index, "assemblyhands")  # the wrist is subtracted whatever its flag
    pred = np.nan_to_num(columns["joints"]) + np.random.default_rng(0).normal(0, 0.01, wanted.shape)
    off = np.linalg.norm(pred - pred[:, :1] - wanted + wanted[:, :1], axis=2)
    off = np.where(columns["visible"] > 0, off, np.nan)
    means = np.concatenate([np.nanmean(off[columns["side"] == side], 0) for side in (0, 1)])
    scores = metrics.evaluate_hands(pred, None, protocol="assemblyhands", **labels | {"gt_vertices": None})
    assert scores["mpjpe_mm"] == pytest.approx(1000 * means.mean(), abs=1e-3)
    item = HandDataset([index], 64, 2.0, ("joints", "joints2d", "visible"), substitute=False)[2]
    assert item["known_joints"].sum() == 19 and np.isfinite(item["joints"]).all()
    assert item["has_joints"] == 0 and item["has_joints2d"] == 1


def test_interhand(roots, tmp_path):
    root = roots[0]
    hands = roots[1]["interhand"]
    done = call("prepare_data.py", "interhand", root / "interhand", "--split", "val", "--out", tmp_path / "x",
                "--mano", root / "hand.npz")
    columns = HandIndex(tmp_path / "x").columns
    assert columns["side"].tolist() == [0, 1, 1]
    assert "image2.jpg right" in done.stdout  # without its wrist a hand is left out
    wanted = {name: np.array([hands[side][name][frame] for side, frame in (("right", 0), ("left", 0),
                                                                           ("left", 1))])
              for name in ("joints", "vertices", "pose")}
    unknown = np.zeros((3, 21), bool)
    unknown[2, 8] = True  # the index finger's tip
    close_where_known(columns["joints"], wanted["joints"], unknown)
    close(columns["vertices"], wanted["vertices"], 2e-6)
    turns = [Rotation.from_rotvec(np.reshape(pose, (-1, 3))).as_matrix()
             for pose in (columns["pose"], wanted["pose"])]
    close(*turns, 1e-5)
    assert columns["size"].tolist() == [[334, 512], [334, 512], [512, 334]]
    camera = np.array([[614.0, 0, 170.0], [0, 610.0, 243.0], [0, 0, 1]])
    close(columns["box"][0], np.array(box_around(wanted["joints"][0], camera)) + 0.5, 0.01)
    close(columns["box"][2], np.array([100, 90, 250, 250]) + 0.5)  # of one hand, the data set's own


def test_each_set_has_the_left_model_that_made_its_labels(roots, tmp_path):
    """MANO_LEFT.pkl as shipped has the right hand's shapes: kept for DexYCB, corrected for InterHand2.6M."""
    shipped = mirror_arrays(ARRAYS) | {"shapedirs": ARRAYS["shapedirs"]}
    np.savez(tmp_path / "left.npz", **shipped)
    models = ManoModels([roots[0] / "hand.npz", tmp_path / "left.npz"])
    columns, *_ = layouts.interhand(roots[0] / "interhand", "val", models)
    close(columns["vertices"][1:], roots[1]["interhand"]["left"]["vertices"][:2], 2e-6)

    hands, truth = roots[1]["dexycb"]
    columns, *_ = layouts.dexycb(roots[0] / "dexycb", "val", "s0", models, workers=1)
    keys = [key for key in sorted(truth) if layouts.dexycb_part("s0", key[0], key[2], key[1]) == "val"]
    subjects = [key[0] for key in keys if truth[key] and truth[key][0] == "left"]
    rows = [truth[key][1] for key in keys if truth[key] and truth[key][0] == "left"]
    hand = {name: hands["left"][name][rows] for name in ("pose", "trans")}
    betas = torch.from_numpy(hands["left"]["betas"][subjects])
    rotmats = rotmat_from_axis_angle(torch.from_numpy(hand["pose"].reshape(-1, 16, 3)))
    found = columns["vertices"][columns["side"] == 1] - hand["trans"][:, None]
    close(found, Mano(shipped, "left", repair=False).double()(rotmats, betas)[0].numpy(), 1e-5)
    corrected = Mano(shipped, "left").double()(rotmats, betas)[0].numpy()
    assert np.abs(found - corrected).max() > 1e-3


def test_hand_models_of_the_wrong_side_and_missing_fits_are_refused(roots, tmp_path):
    right, left = roots[0] / "hand.npz", tmp_path / "left.npz"
    np.savez(left, **mirror_arrays(ARRAYS))
    for paths, name in (([right, right], "hand.npz: a right"), ([left, right], "left.npz: a left"),
                        ([left], "left.npz: a left")):
        with pytest.raises(ValueError, match=f"--mano .*{name} hand's"):
            ManoModels(paths)
    shutil.copytree(roots[0] / "interhand/annotations", tmp_path / "interhand/annotations")
    (tmp_path / "interhand/images").symlink_to(roots[0] / "interhand/images")
    for file in (tmp_path / "interhand/annotations/val").glob("*NeuralAnnot*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="NeuralAnnot.json: no such file"):
        layouts.interhand(tmp_path / "interhand", "val", ManoModels([right]))


@pytest.mark.parametrize("definition", ["kinematic 744 320 443 554 671", "regressed 744 320 443 554 671",
                                        "ho3d", "freihand"])
def test_definition_of_joints_is_found(definition):
    """The definition that joints were made by is found from their mesh, and makes them again."""
    hands = posed(6, 3)
    rotmats = rotmat_from_axis_angle(torch.from_numpy(hands["pose"].reshape(-1, 16, 3)))
    vertices, joints = Mano(ARRAYS).double()(rotmats, torch.from_numpy(hands["betas"]))
    labels = labelled_joints(vertices, joints, ARRAYS, definition).numpy()
    found = layouts.find_joint_definition(labels, vertices.numpy(), ARRAYS["J_regressor"])
    names = {"ho3d": "kinematic 744 333 444 555 672", "freihand": "regressed 744 320 443 555 672"}
    assert found["joints"] == names.get(definition, definition)
    close(labelled_joints(vertices, joints, ARRAYS, found["joints"]), labels, 1e-9)
    assert "(0.000 mm)" in found["found"]
    without = layouts.find_joint_definition(labels, vertices.numpy())
    assert "--mano" in without["found"] and without["joints"].startswith("kinematic")


def test_readers_take_text_and_know_their_splits(roots, tmp_path):
    columns, meta, *_ = layouts.assemblyhands(str(roots[0] / "assemblyhands"), "val")
    assert len(columns["box"]) == 5 and meta["sequences"] == {"seq": ["000000", "000001", "000002"]}
    withheld = tmp_path / "assemblyhands"  # as the test: a template in place of the poses
    shutil.copytree(roots[0] / "assemblyhands", withheld)
    (withheld / "annotations/val").rename(withheld / "annotations/test")
    for file in (withheld / "annotations/test").iterdir():
        name = file.name.replace("_val_", "_test_")
        file.rename(file.with_name(name.replace("joint_3d_v1-1", "joint_3d_v1-1_pred_template")))
    bare, *_ = layouts.assemblyhands(withheld, "test")
    assert len(bare["box"]) == 5 and np.isnan(bare["joints"]).all() and not bare["visible"].any()
    for kind in layouts.SPLITS:
        with pytest.raises(ValueError, match="--split elsewhere"):
            getattr(layouts, kind)(str(roots[0]), "elsewhere")


def test_hands_that_no_picture_shows_are_left_out():
    joints2d = np.zeros((3, 21, 2))
    joints2d[2, 8] = np.nan  # behind the camera
    columns = {"image": np.array([b"a", b"b", b"c", b"d", b"e", b"f"]), "size": np.tile([100, 100], (6, 1)),
               "label": np.array([0, 0, 1, 1, 0, 2]), "joints2d": joints2d,
               "box": np.array([[10, 10, 60, 60], [110, 10, 160, 60], [10, 10, 10.5, 60],
                                [-500, -500, 900, 900], [-20, 20, 50, 90], [10, 10, 60, 60]], float)}
    kept, _, _, dropped = drop_uncroppable(columns, {}, "x", {"before": ["f"]})
    assert kept["image"].tolist() == [b"a", b"e"] and kept["label"].tolist() == [0, 0]
    assert len(kept["joints2d"]) == 3
    assert dropped == {"before": ["f"], "box thinner than a pixel": ["c"],
                       "hand outside its image": ["b", "d"], "joints behind the camera": ["f"]}


def test_orders_are_permutations():
    for order, inverse in ((layouts.FROM_MANO, FREIHAND_TO_MANO), (layouts.FROM_TIPS, TIP_FIRST)):
        assert np.array_equal(np.arange(21)[order][list(inverse)], np.arange(21))
    assert list(MANO_TO_FREIHAND) == layouts.FROM_MANO


def test_yaml_as_dexycb_has_it(tmp_path):
    write(tmp_path / "a.yml",
          "a: 1\nb:\n- 'x'\n- y  # note\nc:\n  d: 2.5\n  e:\n  - 3\nf: [left, \"right\"]\ng:\n")
    wanted = {"a": "1", "b": ["x", "y"], "c": {"d": "2.5", "e": ["3"]}, "f": ["left", "right"], "g": None}
    assert layouts.read_yaml(tmp_path / "a.yml") == wanted


# ---------------------------------------------------------------------------------------------------- damage
def edit(change):
    """A damage: change(content) of a JSON file."""

    def damage(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def cut(end):
    return lambda path: path.write_bytes(path.read_bytes()[:end])


def remove(path):
    path.unlink()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def change_pickle(**entries):
    def damage(path):
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | entries, protocol=2))

    return damage


def change_npz(**entries):
    def damage(path):
        with np.load(path) as file:
            content = dict(file) | entries
        np.savez(path, **content)

    return damage


def both_sides(path):
    path.write_text(path.read_text().replace("right", "both"))


HO3D = "train/ABF10/meta/0001.pkl"
SEQUENCE = "20200700-subject-01/20200700_100001"
DEXYCB = f"{SEQUENCE}/836212060102/labels_000001.npz"
LENS = "calibration/intrinsics/836212060102_640x480.yml"
ASSEMBLY = "annotations/val/assemblyhands_val_"
EGO, EGO_POSE, EGO_LENS = (f"{ASSEMBLY}{name}_v1-1.json" for name in ("ego_data", "joint_3d", "ego_calib"))
INTER, INTER_POSE, INTER_LENS = (f"annotations/val/InterHand2.6M_val_{name}.json"
                                 for name in ("data", "joint_3d", "camera"))
NAN = [float("nan")] * 3
DAMAGE = {
    "ho3d frame missing": (HO3D, remove),
    "ho3d image missing": ("train/SM2/rgb/0007.png", remove),
    "ho3d truncated": (HO3D, cut(-40)),
    "ho3d hostile": (HO3D, change_pickle(handPose=Hostile())),
    "ho3d shape": (HO3D, change_pickle(handPose=np.zeros(45))),
    "ho3d nan": (HO3D, change_pickle(handJoints3D=np.full((21, 3), np.nan))),
    "ho3d list": ("train.txt", lambda path: path.write_text("ABF10/0000\n../../etc\n")),
    "dexycb missing": (DEXYCB, remove),
    "dexycb truncated": (DEXYCB, cut(99)),
    "dexycb pickle": (DEXYCB, change_npz(pose_m=np.array([{}], object))),
    "dexycb shape": (DEXYCB, change_npz(joint_3d=np.zeros((1, 20, 3)))),
    "dexycb nan": (DEXYCB, change_npz(joint_3d=np.full((1, 21, 3), np.nan))),
    "dexycb side": (f"{SEQUENCE}/meta.yml", both_sides),
    "dexycb lens": (LENS, lambda path: path.write_text("color:\n  fx: many\n")),
    "assemblyhands missing": (EGO_LENS, remove),
    "assemblyhands truncated": (EGO_POSE, cut(-30)),
    "assemblyhands shape": (EGO_POSE, edit(
        lambda c: c["annotations"]["seq"]["000001"].update(world_coord=[[0, 0, 0]]))),
    "assemblyhands nan": (EGO_POSE, edit(
        lambda c: c["annotations"]["seq"]["000001"]["world_coord"].__setitem__(3, NAN))),
    "assemblyhands images": (EGO, edit(lambda c: c.pop("images"))),
    "assemblyhands width": (EGO, edit(lambda c: c["images"][1].update(width=None))),
    "assemblyhands frame": (EGO, edit(lambda c: c["images"][1].update(frame_idx="a"))),
    "assemblyhands lens": (EGO_LENS, edit(
        lambda c: c["calibration"]["seq"]["extrinsics"].pop("000001"))),
    "interhand nan": (INTER_POSE, edit(lambda c: c["0"]["1"]["world_coord"].__setitem__(3, NAN))),
    "interhand shape": (INTER, edit(lambda c: c["annotations"][1]["joint_valid"].pop())),
    "interhand missing": (INTER_LENS, remove),
    "interhand truncated": (INTER, cut(-30)),
    "interhand side": (INTER, edit(lambda c: c["annotations"][1].update(hand_type="both"))),
    "interhand entry": (INTER, edit(lambda c: c["annotations"][1].pop("joint_valid"))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_leaves_nothing(roots, tmp_path, name, monkeypatch):
    kind, what = name.split(" ", 1)
    file, damage = DAMAGE[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(roots[0] / kind, tmp_path / kind)
    damage(tmp_path / kind / file)
    split = "train" if kind in ("ho3d", "dexycb") else "val"
    workers = ("--workers", 1) if kind in ("ho3d", "dexycb") else ()
    done = call("prepare_data.py", kind, tmp_path / kind, "--split", split, "--out", tmp_path / "out",
                *workers, check=False)
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    errors = [line for line in lines if line.strip(" \x1b[A").startswith("error")]
    assert done.returncode == 2 and len(errors) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "hostile").exists()
    assert file.rsplit("/", 1)[-1].removesuffix("_v1-1.json") in errors[0]
    if file.endswith(".json") and what not in ("missing", "truncated", "images"):
        places = ("annotation 1", "seq 000001", "capture 0 frame 1")
        assert any(f"(entry {place})" in errors[0] for place in places), errors[0]


# --------------------------------------------------------------------------------------- labels of one's own
@pytest.fixture
def photographs(tmp_path):
    """ROOT with seven pictures, joints2d (6,21,2) and joints (6,21,3) of six, of which some are unknown, and
    a function that writes these as a CSV."""
    joints = posed(6, 3)["joints"]
    points = project(joints)
    for k in range(7):  # the last one has no labels
        image(tmp_path / "mine" / f"{k}.png")
    points[1, [4, 8]] = np.nan  # two tips are hidden
    joints[1, 3] = np.nan
    points[2] = np.nan  # known in space alone
    joints[3] = np.nan  # known in the picture alone
    points[5] = joints[5] = np.nan  # nothing is known

    def write_joints(path, flat=True, deep=True):
        head = [f"{axis}{k}" for k in range(21) for axis in "xy"] * flat
        head += [f"{axis}{k}" for k in range(21) for axis in "XYZ"] * deep
        lines = [",".join(["image", "Side", *head])]
        for k in range(6):
            numbers = [*points[k].flat] * flat + [*joints[k].flat] * deep
            cells = ["" if np.isnan(number) else f"{number:.6f}" for number in numbers]
            lines.append(",".join([f"{k}.png", ("", "left")[k == 1], *cells]))
        path.write_text("\n".join(lines) + "\n")
        return path

    return tmp_path / "mine", points, joints, write_joints


def test_own_joints_come_back_with_their_gaps(photographs, tmp_path):
    root, points, joints, write_joints = photographs
    path = write_joints(tmp_path / "joints.csv")
    command = ("prepare_data.py", "folder", root, "--joints", path, "--definition", "ho3d")
    done = call(*command, "--out", tmp_path / "index")
    assert "5 hands (1 left), 5 labels" in done.stdout and "no joints: 2: 5.png; 6.png" in done.stdout
    index = HandIndex(tmp_path / "index")
    assert index.meta["joints"] == "ho3d" and index.meta["partial"]
    for name, truth in (("joints2d", points), ("joints", joints)):
        assert np.allclose(index.columns[name], truth[:5], atol=1e-4, equal_nan=True)
    boxes = np.array(index.columns["box"])
    seen = np.delete(points[1], [4, 8], axis=0) + 0.5
    assert np.allclose(boxes[1], [*seen.min(0), *seen.max(0)], atol=1e-3)
    assert np.ptp(boxes[2].reshape(2, 2), axis=0) == pytest.approx(640 / 1.3)  # the whole picture
    hand = HandDataset([index], 64, 2.0, ("joints2d", "joints"))[1]
    assert hand["mirrored"] == 1
    assert np.flatnonzero(hand["known_joints2d"] == 0).tolist() == [4, 8]
    assert np.flatnonzero(hand["known_joints"] == 0).tolist() == [3]
    assert np.allclose(hand["joints"][0], joints[1, 0] * [-1, 1, 1], atol=1e-5)
    lines = [f"{k}.png,{10 + k},20,300,400,{('right', 'left')[k == 1]}" for k in range(6)]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("\n".join(["image,x0,y0,x1,y1,side", *lines]))
    call(*command, "--boxes", boxes, "--out", tmp_path / "boxed")
    found = HandIndex(tmp_path / "boxed").columns["box"]
    assert np.array_equal(found, [[10 + k, 20, 300, 400] for k in range(5)])
    boxes.write_text("\n".join(["image,x0,y0,x1,y1,side", *lines, lines[2]]))
    done = call(*command, "--boxes", boxes, "--out", tmp_path / "two", check=False)
    assert done.returncode == 2 and "line 4: 2.png has 1 lines there and 2" in done.stderr


@pytest.mark.commands
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_own_joints_train_and_are_scored(photographs, tmp_path):
    """In the picture, in space, or both: each loss that has labels, and no other."""
    root, _, _, write_joints = photographs
    labelled = {"flat": {"joints2d"}, "deep": {"joints"}, "both": {"joints2d", "joints", "camera"}}
    for kind, learnt in labelled.items():
        path = write_joints(tmp_path / f"{kind}.csv", kind != "deep", kind != "flat")
        index = tmp_path / kind
        call("prepare_data.py", "folder", root, "--joints", path, "--out", index)
        call("finetune_mesh.py", "--data", index, "--val", index, "--out", tmp_path / f"run_{kind}", "--arch",
             "vit_micro", "--image-size", 32, "--head-width", 32, "--batch-size", 8, "--steps", 1,
             "--workers", 0)
        row = next(row for row in log(tmp_path / f"run_{kind}") if "loss" in row)
        losses = ("rotations", "articulation", "betas", "camera", "joints2d", "joints", "vertices")
        assert {name for name in losses if row[name] > 0} == learnt
        assert np.isfinite(row["loss"])
    done = call("evaluate.py", "--data", index, "--checkpoint", tmp_path / "run_both/last.pt", "--out",
                tmp_path / "score")
    assert "joints mm" in done.stdout

    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    for line in lines:  # no wrist in space: nothing can be placed by it
        for name in ("X0", "Y0", "Z0"):
            line[header.index(name)] = ""
    path.write_text("\n".join(",".join(line) for line in (header, *lines)))
    call("prepare_data.py", "folder", root, "--joints", path, "--out", tmp_path / "wristless")
    call("evaluate.py", "--data", tmp_path / "wristless", "--checkpoint", tmp_path / "run_both/last.pt",
         "--out", tmp_path / "unplaced")
    scores = json.loads((tmp_path / "unplaced/metrics.json").read_text())
    assert scores["pa_mpjpe_mm"] > 0 and "mpjpe_mm" not in scores and "auc_joints_unaligned" not in scores


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace(",Z20", ",depth", 1), "the first line"),
    (lambda text: text.replace("0.png,,", "0.png,both,", 1), "line 2: needs an image, side"),
    (lambda text: text.replace("1.png,left,", "1.png,left,far,", 1), "line 3"),
    (lambda text: re.sub(r"(?m)^0.png,,[^,]*", "0.png,,far", text), "line 2: could not convert"),
    (lambda text: re.sub(r"(?m)(^0.png.*,)[^,]*$", r"\g<1>700", text), "line 2: X, Y, Z are no hand in met"),
    (lambda text: text.replace(".png", ".jpg"), "no image below"),
])
def test_own_joints_that_are_wrong_are_named(photographs, tmp_path, change, message):
    root, _, _, write_joints = photographs
    path = write_joints(tmp_path / "joints.csv")
    path.write_text(change(path.read_text()))
    done = call("prepare_data.py", "folder", root, "--joints", path, "--out", tmp_path / "index", check=False)
    assert done.returncode == 2 and "joints.csv" in done.stderr and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "index").exists()


def test_own_joints_lie_in_the_cameras_frame(photographs, tmp_path):
    root, _, joints, write_joints = photographs
    joints[..., 1:] *= -1  # y up, as OpenGL has it
    path = write_joints(tmp_path / "joints.csv")
    with pytest.raises(ValueError, match="run against x, y"):
        layouts.own_joints(path)


# -------------------------------------------------------------------------------------------------- training
@pytest.mark.commands
def test_a_mixture_of_sets_trains(roots, tmp_path):
    """Meshes, joints alone of which some are unknown, and poses without betas in one batch; each with its
    definition of joints."""
    root = roots[0]
    hand = ("--mano", root / "hand.npz")
    for kind, split, more in (("ho3d", "train", hand), ("dexycb", "val", hand), ("assemblyhands", "val", ())):
        call("prepare_data.py", kind, root / kind, "--split", split, "--out", tmp_path / kind, *more)
    indices = [tmp_path / kind for kind in ("ho3d", "dexycb", "assemblyhands")]
    command = ["finetune_mesh.py", "--data", *indices, "--val", tmp_path / "ho3d", *hand, "--arch",
               "vit_micro", "--image-size", 64, "--head-width", 32, "--batch-size", 12, "--steps", 2,
               "--log-every", 1, "--workers", 0]
    call(*command, "--out", tmp_path / "run", "--mix", 2, 1, 1)
    rows = [row for row in log(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
        assert all(row[name] > 0 for name in ("rotations", "articulation", "betas", "joints", "vertices"))
    done = call(*command, "--out", tmp_path / "two", "--mix", 1, 1, check=False)
    assert done.returncode == 2 and "--mix 1.0 1.0" in done.stderr and not (tmp_path / "two/last.pt").exists()


def test_mixture_is_in_proportion():
    rows = np.r_[0:10, 20:50, 50:52]
    starts = np.array([0, 20, 50, 60])  # of three indices, which have 10, 30 and 2 of these rows
    drawn = np.concatenate(list(make_sampler(rows, starts, [1, 0, 3], 64, 0, 0, 40)))
    assert abs((drawn < 10).mean() - 0.25) < 0.03
    assert set(drawn[drawn >= 10]) == {40, 41}  # none of the second index
    halves = [list(make_sampler(rows, starts, [1, 0, 3], 64, 0, 7, 9, rank, 2)) for rank in (0, 1)]
    joined = [a + b for a, b in zip(*halves, strict=True)]
    assert joined == list(make_sampler(rows, starts, [1, 0, 3], 64, 0, 7, 9))
    for mix in ([1, 1], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match="--mix"):
            make_sampler(rows, starts, mix, 64, 0, 0, 1)


def test_unknown_joints_cost_nothing_and_the_rest_is_averaged():
    """Losses of a batch in which joints are unknown: whatever stands there, the mean of what is known."""
    g = torch.Generator().manual_seed(0)
    rotmats = rotmat_from_axis_angle(0.3 * torch.randn(4, 16, 3, generator=g))
    betas = torch.randn(4, 10, generator=g)
    vertices, joints = Mano(ARRAYS)(rotmats, betas)
    camera = torch.tensor([[5.0, 0, 0]]).expand(4, 3)
    output = {"vertices": vertices, "joints": joints, "rotmats": rotmats, "betas": betas, "camera": camera}
    true = joints + 0.01 * torch.randn(4, 21, 3, generator=g)
    known = (torch.rand(4, 21, generator=g) < 0.7).float()
    known[:, 0] = 1
    known[3, 0] = 0  # the last hand's wrist is unknown
    target = {"joints": true, "joints2d": true[..., :2], "vertices": vertices, "rotmats": rotmats,
              "betas": betas, "upright": vertices, "visible": torch.ones(4, 21), "known_joints": known,
              "known_joints2d": torch.ones(4, 21), "mirrored": torch.zeros(4),
              "source": torch.tensor([0, 1, 1, 0]), "has_joints": known[:, 0]}
    target |= {f"has_{name}": torch.ones(4) for name in ("pose", "betas", "vertices", "joints2d")}
    wild = target | {"joints": torch.where(known[..., None] > 0, true, 1e3)}
    losses = []
    for batch in (target, wild):
        sources = {"freihand": torch.tensor([True, False]), "ho3d": torch.tensor([False, True])}
        by_source = defined_joints(output, batch, ARRAYS, sources)
        named = mesh_losses([output], [by_source], batch)
        losses.append({name: float(value) for name, value in named.items()})
    assert losses[0] == pytest.approx(losses[1])
    as_labelled = torch.where((target["source"] == 0)[:, None, None],
                              labelled_joints(vertices, joints, ARRAYS, "freihand"),
                              labelled_joints(vertices, joints, ARRAYS, "ho3d"))
    off = (as_labelled - as_labelled[:, :1] - true + true[:, :1]).abs().mean(2)  # (4, 21)
    errors = [off[hand, joint] for hand in range(3) for joint in range(21) if known[hand, joint]]
    assert losses[0]["joints"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
