"""Public data sets in the layouts of their downloads, written from synthetic hands and read back to the millimetre; damaged copies."""
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from fixtures import call, log
from PIL import Image
from scipy.spatial.transform import Rotation

import layouts
import metrics
from data import HandDataset, HandIndex, make_sampler
from evaluate import read_labels, read_predictions, write_predictions
from finetune_mesh import mesh_losses
from mano import FREIHAND_TO_MANO, MANO_TO_FREIHAND, Mano, labelled_joints, mirror_arrays, rotmat_from_axis_angle
from prepare_data import Hands, usable
from synthetic_hand import synthetic_mano

ARRAYS = synthetic_mano()
FLIP = np.array([1.0, -1.0, -1.0])
K = np.array([[614.0, 0, 318.0], [0, 610.0, 243.0], [0, 0, 1]])          # fx is not fy, and the middle is not the centre
TIP_FIRST = np.argsort(layouts.FROM_TIPS)                                # FreiHAND's order to InterHand's


def posed(count, seed, side="right", tips="freihand"):
    """Labels of random hands about half a metre before an OpenCV camera: pose (absolute), betas, trans, vertices, joints; float64."""
    rng = np.random.default_rng(seed)
    mirror = np.tile([1.0, 1, 1] if side == "right" else [1.0, -1, -1], 15)
    coefficients = 0.6 * rng.standard_normal((count, 45))
    hand = ARRAYS if side == "right" else mirror_arrays(ARRAYS)
    fingers = hand["hands_mean"].ravel() + coefficients @ hand["hands_components"]
    assert np.allclose(fingers * mirror, ARRAYS["hands_mean"].ravel() + coefficients @ ARRAYS["hands_components"])
    pose = np.concatenate([Rotation.random(count, random_state=seed).as_rotvec(), fingers], 1)
    betas, trans = 0.5 * rng.standard_normal((count, 10)), rng.uniform([-0.1, -0.1, 0.5], [0.1, 0.1, 0.8], (count, 3))
    layer = Mano(ARRAYS, side, tips).double()
    vertices, joints = layer(rotmat_from_axis_angle(torch.from_numpy(pose.reshape(-1, 16, 3))), torch.from_numpy(betas))
    return {"pose": pose, "coefficients": coefficients, "betas": betas, "trans": trans, "vertices": vertices.numpy() + trans[:, None],
            "joints": joints.numpy() + trans[:, None]}


def project(points, camera=K):
    return (points @ camera.T)[..., :2] / points[..., 2:]


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


# ------------------------------------------------------------------------------------------------- layouts of the sets
def write_ho3d(root, ending="png"):
    """Two sequences of three frames to train on, one of two to evaluate. What is posed is in OpenGL's frame."""
    truth = {}
    for split, names in (("train", ["ABF10/0000", "ABF10/0001", "ABF10/0003", "SM2/0000", "SM2/0007"]),
                         ("evaluation", ["AP10/0000", "AP10/0005"])):
        hands = posed(len(names), len(names), tips="ho3d")
        turn = Rotation.from_rotvec([np.pi, 0, 0])                        # before the GL camera, hands are at z < 0
        hands["trans_gl"] = hands["joints"][:, 0] * FLIP - (hands["joints"][:, 0] - hands["trans"])     # the wrist is J0 + trans
        hands["pose_gl"] = np.concatenate([(turn * Rotation.from_rotvec(hands["pose"][:, :3])).as_rotvec(), hands["pose"][:, 3:]], 1)
        for k, name in enumerate(names):
            sequence, frame = name.split("/")
            image(root / split / sequence / "rgb" / f"{frame}.{ending}")
            joints = (hands["joints"][k] * FLIP)[list(FREIHAND_TO_MANO)]
            content = {"camMat": K, "objName": "021_bleach", "handPose": hands["pose_gl"][k], "handTrans": hands["trans_gl"][k],
                       "handBeta": hands["betas"][k], "handJoints3D": joints, "objTrans": np.zeros(3, np.float32), "objLabel": np.int64(3)}
            if split == "evaluation":
                box = project(hands["joints"][k])
                content = {"camMat": K, "handJoints3D": joints[0], "handBoundingBox": np.r_[box.min(0), box.max(0)].tolist()}
            path = root / split / sequence / "meta" / f"{frame}.pkl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(content, protocol=2))
        write(root / f"{split}.txt", "".join(f"{name}\n" for name in names))
        truth[split] = hands
    (root / "train/SM2/seg").mkdir()
    Image.new("RGB", (640, 480), (0, 0, 255)).save(root / "train/SM2/seg/0007.png")
    hands = truth["evaluation"]
    write(root / "evaluation_xyz.json", [(j * FLIP)[list(FREIHAND_TO_MANO)].tolist() for j in hands["joints"]])
    write(root / "evaluation_verts.json", [(v * FLIP).tolist() for v in hands["vertices"]])
    return truth


def write_dexycb(root, sequences=5, frames=2):
    """Ten subjects; a frame of each tenth sequence shows no hand. truth: (subject, sequence, camera, frame) -> (side, row)."""
    hands, truth = {side: posed(40, 3 + k, side, "manopth") for k, side in enumerate(("right", "left"))}, {}
    serials = [f"8362120601{k:02d}" for k in range(8)]
    for s in range(10):
        subject = root / f"2020070{s}-subject-{s + 1:02d}"
        side = ("right", "left")[s % 2]
        betas = hands[side]["betas"][s].tolist()
        write(root / "calibration" / f"mano_{s}" / "mano.yml", "betas:\n" + "".join(f"- {beta!r}\n" for beta in betas))
        for q in range(sequences):
            sequence = subject / f"2020070{s}_1{q:05d}"
            write(sequence / "meta.yml", f"# capture\nextrinsics: '2020'\nmano_calib:\n- '{s}'\nmano_sides: [{side}]\nnum_frames: {frames}"
                  "\nserials:\n" + "".join(f"- '{serial}'\n" for serial in serials[::-1]) + "ycb_ids:\n- 1\n- 5\n")
            for c, serial in enumerate(serials):
                for frame in range(frames):
                    row = (7 * s + 3 * q + c + frame) % 40
                    pose = np.r_[hands[side]["pose"][row, :3], hands[side]["coefficients"][row], hands[side]["trans"][row]][None]
                    joints, there = hands[side]["joints"][row][None], (s + q + frame) % 10 != 0
                    path = sequence / serial / f"labels_{frame:06d}.npz"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.savez(path, pose_m=np.float32(pose if there else 0 * pose), seg=mask(there),
                             joint_3d=np.float32(joints if there else 0 * joints - 1))
                    image(sequence / serial / f"color_{frame:06d}.jpg")
                    truth[s, q, c, frame] = (side, row) if there else None
    for serial in serials:
        write(root / "calibration" / "intrinsics" / f"{serial}_640x480.yml",
              "color:\n  fx: 614.0\n  fy: 610.0\n  ppx: 318.0\n  ppy: 243.0\ndepth:\n  fx: 1.0\n  fy: 1.0\n")
    return hands, truth


def write_assemblyhands(root, split="val"):
    """Three frames of a headset's camera that moves: both hands, of whose left one this camera does not see the thumb's tip; a right one
    with a doubtful wrist and an unknown tip; a left one alone."""
    hands = {side: posed(3, 20 + k, side)["joints"] for k, side in enumerate(("right", "left"))}
    data, lens, headset, poses = {"images": [], "annotations": []}, {}, {}, {}
    for frame in range(3):
        turn = Rotation.random(random_state=frame).as_matrix()
        place = np.array([300.0, -200.0, 100.0 * frame])
        both = 1000 * np.concatenate([hands[side][frame][TIP_FIRST] for side in ("right", "left")])
        valid = np.ones(42)
        seen = valid.copy()
        if frame == 0:
            seen[21] = 0
        if frame == 1:
            seen[[20, 4]] = valid[4] = 0
        boxes = {side: np.r_[project(hands[side][frame]).min(0), project(hands[side][frame]).max(0)].tolist() for side in hands}
        if frame == 2:
            boxes["right"], valid[:21], seen[:21] = None, 0, 0
        name = f"ego_images_rectified/{split}/seq/HMC_1_mono10bit/{frame:06d}.jpg"
        image(root / "images" / name)
        data["images"].append({"id": 10 + frame, "seq_name": "seq", "camera": "HMC_1", "frame_idx": frame, "file_name": name,
                               "width": 640, "height": 480})
        data["annotations"].append({"image_id": 10 + frame, "bbox": boxes, "joint_valid": seen.tolist()})
        lens["HMC_1_mono10bit"], headset[f"{frame:06d}"] = K.tolist(), {"HMC_1_mono10bit": np.c_[turn, place].tolist()}
        world = (both - place) @ turn                                    # R X + t = both
        world[valid == 0] = 0
        poses[f"{frame:06d}"] = {"world_coord": world.tolist(), "joint_valid": valid.tolist()}
    calibration = {"calibration": {"seq": {"intrinsics": lens, "extrinsics": headset}}}
    for name, content in (("ego_data", data), ("ego_calib", calibration), ("joint_3d", {"annotations": {"seq": poses}})):
        write(root / "annotations" / split / f"assemblyhands_{split}_{name}_v1-1.json", content)
    return hands


def write_interhand(root, split="val"):
    """Three frames of two sizes: both hands, a left one with an invalid tip, a right one whose wrist is invalid and so has no joints."""
    hands = {side: posed(3, 30 + k, side) for k, side in enumerate(("right", "left"))}
    data, cameras, poses, meshes = {"images": [], "annotations": []}, {"0": {}}, {"0": {}}, {"0": {}}
    for frame, kind in enumerate(("interacting", "left", "right")):
        turn, place = Rotation.random(random_state=9).as_matrix(), np.array([500.0, 100.0, -700.0])
        both = 1000 * np.concatenate([hands[side]["joints"][frame][TIP_FIRST] for side in ("right", "left")])
        valid = np.ones((42, 1), int)
        valid[:21] = kind in ("right", "interacting")
        valid[21:] = kind in ("left", "interacting")
        valid[[25] if frame == 1 else [20] if frame == 2 else []] = 0
        world = both @ turn + place                                      # R (X - c) = both
        world[valid[:, 0] == 0] = 1.0                                    # placeholders
        size = ((334, 512), (512, 334))[frame % 2]
        name = f"Capture0/ROM/cam400/image{frame}.jpg"
        image(root / "images" / split / name, size)
        data["images"].append({"id": frame, "file_name": name, "width": size[0], "height": size[1], "capture": 0, "subject": 1,
                               "seq_name": "ROM", "camera": "400", "frame_idx": frame})
        data["annotations"].append({"id": frame, "image_id": frame, "bbox": [100.0, 90.0, 150.0, 160.0], "joint_valid": valid.tolist(),
                                    "hand_type": kind, "hand_type_valid": 1})
        cameras["0"] = {"campos": {"400": place.tolist()}, "camrot": {"400": turn.tolist()}, "focal": {"400": [614.0, 610.0]},
                        "princpt": {"400": [170.0, 243.0]}}
        poses["0"][str(frame)] = {"world_coord": world.tolist(), "joint_valid": (valid > 0).tolist(), "hand_type": kind}
        fits = {}
        for side in ("right", "left"):
            one = {key: hands[side][key][frame] for key in ("pose", "betas", "trans", "vertices")}
            mean = (ARRAYS if side == "right" else mirror_arrays(ARRAYS))["hands_mean"].ravel()
            pose = np.r_[(Rotation.from_matrix(turn.T) * Rotation.from_rotvec(one["pose"][:3])).as_rotvec(), one["pose"][3:] - mean]
            layer = Mano(ARRAYS, side).double()
            wrist = layer(torch.eye(3).double().expand(1, 16, 3, 3), torch.from_numpy(one["betas"][None]))[1][0, 0].numpy()
            trans = (wrist + one["trans"]) @ turn + place / 1000 - wrist  # the wrist of the world's mesh
            there = valid[20 if side == "right" else 41, 0]
            fits[side] = {"pose": pose.tolist(), "shape": one["betas"].tolist(), "trans": trans.tolist()} if there else None
        meshes["0"][str(frame)] = fits
    for name, content in (("data", data), ("camera", cameras), ("joint_3d", poses), ("MANO_NeuralAnnot", meshes)):
        write(root / "annotations" / split / f"InterHand2.6M_{split}_{name}.json", content)
    return hands


def close(found, wanted, off=1e-6):
    assert found.shape == wanted.shape and np.abs(np.asarray(found, float) - wanted).max() < off


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Each set once, with what was written, and the hand that its labels belong to."""
    root = tmp_path_factory.mktemp("sets")
    writers = {"ho3d": write_ho3d, "dexycb": write_dexycb, "assemblyhands": write_assemblyhands, "interhand": write_interhand}
    made = {name: write_set(root / name) for name, write_set in writers.items()}
    np.savez(root / "hand.npz", **ARRAYS)
    return root, made


# ------------------------------------------------------------------------------------------------------------ read back
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_ho3d(tmp_path, ending):
    truth = write_ho3d(tmp_path / "ho3d", ending)
    np.savez(tmp_path / "hand.npz", **ARRAYS)
    for split, count in (("train", 5), ("evaluation", 2)):
        call("prepare_data.py", "ho3d", tmp_path / "ho3d", "--split", split, "--out", tmp_path / split, "--mano", tmp_path / "hand.npz")
        index, wanted = HandIndex(tmp_path / split), truth[split]
        assert len(index) == count and index.meta["protocol"] == "ho3d"
        assert index.meta["joints"] == {"train": "ho3d", "evaluation": "kinematic 744 333 444 555 672"}[split]
        assert index.meta["name"] == f"ho3d-{'v2' if ending == 'png' else 'v3'}-{split}" and index.meta["pose_mean"] is False
        close(index.columns["joints"], wanted["joints"])
        close(index.columns["vertices"], wanted["vertices"])
        close(index.columns["joints2d"], project(wanted["joints"]), 0.01)
        if split == "train":
            assert [index.mask_path(row) is not None for row in range(5)] == [False] * 4 + [True] == (
                [bool(HandDataset([index], 64, 2.0, ("mask",))[row]["has_mask"]) for row in range(5)])
            turns = [Rotation.from_rotvec(np.reshape(pose, (-1, 3))).as_matrix() for pose in (index.columns["pose"], wanted["pose"])]
            close(*turns, 1e-5)
            assert index.columns["video"].tolist() == [0, 0, 0, 1, 1]
    swapped = json.loads((tmp_path / "ho3d/evaluation_xyz.json").read_text())[::-1]
    write(tmp_path / "ho3d/evaluation_xyz.json", swapped)                # T14
    done = call("prepare_data.py", "ho3d", tmp_path / "ho3d", "--split", "evaluation", "--out", tmp_path / "again", check=False)
    assert done.returncode == 2 and "evaluation_xyz.json: entry" in done.stderr and not (tmp_path / "again/index.json").exists()


@pytest.mark.parametrize("setup, split", [("s0", "train"), ("s0", "val"), ("s0", "test"), ("s1", "val"), ("s2", "test")])
def test_dexycb(roots, tmp_path, setup, split):
    root, (hands, truth) = roots[0], roots[1]["dexycb"]
    call("prepare_data.py", "dexycb", root / "dexycb", "--setup", setup, "--split", split, "--out", tmp_path / "x",
         "--mano", root / "hand.npz")
    index = HandIndex(tmp_path / "x")
    order = [key for key in sorted(truth) if layouts.dexycb_part(setup, key[0], key[2], key[1]) == split]      # T19
    there = [number for number, key in enumerate(order) if truth[key]]
    assert index.columns["number"].tolist() == there and len(there) <= len(order) == index.meta["frames"]
    rows = [truth[order[number]] for number in there]
    assert index.columns["side"].tolist() == [side == "left" for side, _ in rows]
    joints, pose = (np.array([hands[side][name][row] for side, row in rows]) for name in ("joints", "pose"))
    close(index.columns["joints"], joints)
    close(index.columns["joints2d"], project(joints), 0.01)
    close(index.columns["pose"], pose, 1e-5)
    write_predictions(tmp_path, (joints, None), "dexycb", index)         # T16: the toolkit's text, in mm
    lines = [line.split(",") for line in (tmp_path / "pred.txt").read_text().splitlines()]
    assert [int(line[0]) for line in lines] == there and {len(line) for line in lines} == {64}
    close(np.array(lines, float)[:, 1:].reshape(-1, 21, 3) / 1000, joints)
    close(read_predictions(tmp_path / "pred.txt", index, "dexycb")[0], joints)
    (tmp_path / "short.txt").write_text((tmp_path / "pred.txt").read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=f"short.txt: image {there[0]} is missing"):
        read_predictions(tmp_path / "short.txt", index, "dexycb")
    left = index.columns["side"] == 1
    assert np.isnan(index.columns["betas"][left]).all() and np.isfinite(index.columns["betas"][~left]).all()
    item = HandDataset([index], 64, 2.0, ("betas", "joints", "pose", "mask"), substitute=False)[int(np.argmax(left))]
    middle = np.clip(round(32 + 64 * (320 - item["crop"][0]) / item["crop"][2] * (-1 if item["mirrored"] else 1)), 0, 64)
    inside = item["mask"][0, 32] > 0                                     # right of the image's middle, mirrored left of it
    assert item["has_mask"] and abs(int(inside.sum()) - (middle if item["mirrored"] else 64 - middle)) <= 1
    assert item["has_betas"] == (not left.any()) and item["has_joints"] == 1 and item["betas"].any() == (not left.any())


def test_dexycb_meshes_and_shares(roots):
    """Meshes follow from the numbers on both sides; a setup's parts share out 10 x 8 x 100 sequences by the published counts."""
    hands = Hands([roots[0] / "hand.npz"])
    for side in ("right", "left"):
        one, left = roots[1]["dexycb"][0][side], np.full(40, side == "left")
        close(hands.angles(one["coefficients"], left), one["pose"][:, 3:], 1e-12)
        close(hands.vertices(one["pose"], one["betas"], one["trans"], left), one["vertices"])
    shares = {setup: [sum(layouts.dexycb_part(setup, s, c, q) == split for s in range(10) for c in range(8) for q in range(100)) / 8000
                      for split in ("train", "val", "test")] for setup in ("s0", "s1", "s2", "s3")}
    assert shares == {"s0": [0.8, 0.04, 0.16], "s1": [0.7, 0.1, 0.2], "s2": [0.75, 0.125, 0.125], "s3": [0.75, 0.1, 0.15]}


def test_assemblyhands(roots, tmp_path):
    root, hands = roots[0], roots[1]["assemblyhands"]
    call("prepare_data.py", "assemblyhands", root / "assemblyhands", "--split", "val", "--out", tmp_path / "x")
    index = HandIndex(tmp_path / "x")
    assert index.columns["side"].tolist() == [0, 1, 0, 1, 1] and index.meta["protocol"] == "assemblyhands"
    wanted = np.array([hands[("right", "left")[side]][frame] for side, frame in ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2))])
    unknown = np.isnan(index.columns["joints"]).any(2)
    assert np.argwhere(unknown).tolist() == [[2, 8]]                     # the index finger's tip
    assert np.argwhere(index.columns["visible"] == 0).tolist() == [[1, 4], [2, 0], [2, 8]]       # the annotation's own flags
    close(np.where(unknown[..., None], 0, index.columns["joints"]), np.where(unknown[..., None], 0, wanted))
    close(np.where(unknown[..., None], 0, index.columns["joints2d"]), np.where(unknown[..., None], 0, project(wanted)), 0.01)
    write_predictions(tmp_path, (wanted, None), "assemblyhands", index)  # the challenge's file, and back
    world = json.loads((tmp_path / "pred_world.json").read_text())["annotations"]["seq"]
    close(read_predictions(tmp_path / "pred_world.json", index, "assemblyhands")[0], wanted)
    poses = json.loads((root / "assemblyhands/annotations/val/assemblyhands_val_joint_3d_v1-1.json").read_text())["annotations"]["seq"]
    close(np.array(world["000000"]["world_coord"]), np.array(poses["000000"]["world_coord"]), 1e-3)
    assert not np.any(world["000002"]["world_coord"][:21]) and np.all(world["000002"]["world_coord"][21:])
    assert world.keys() == {"000000", "000001", "000002"}
    labels, _ = read_labels(index, "assemblyhands")                      # T24: the wrist is subtracted whatever its flag
    pred = np.nan_to_num(index.columns["joints"]) + np.random.default_rng(0).normal(0, 0.01, wanted.shape)
    both = np.stack([pred - pred[:, :1], wanted - wanted[:, :1]])
    off = np.where(index.columns["visible"] > 0, np.linalg.norm(both[0] - both[1], axis=2), np.nan)
    means = np.concatenate([np.nanmean(off[index.columns["side"] == side], 0) for side in (0, 1)])
    scores = metrics.evaluate_hands(pred, None, protocol="assemblyhands", **labels | {"gt_vertices": None})
    assert scores["mpjpe_mm"] == pytest.approx(1000 * means.mean(), abs=1e-3)
    item = HandDataset([index], 64, 2.0, ("joints", "joints2d", "visible"), substitute=False)[2]
    assert item["known_joints"].sum() == 19 and item["has_joints"] == 0 and item["has_joints2d"] == 1 and np.isfinite(item["joints"]).all()


def test_interhand(roots, tmp_path):
    root, hands = roots[0], roots[1]["interhand"]
    done = call("prepare_data.py", "interhand", root / "interhand", "--split", "val", "--out", tmp_path / "x",
                "--mano", root / "hand.npz")
    index = HandIndex(tmp_path / "x")
    assert index.columns["side"].tolist() == [0, 1, 1] and "image2.jpg right" in done.stdout                   # T24: no wrist, no hand
    wanted = {name: np.array([hands[side][name][frame] for side, frame in (("right", 0), ("left", 0), ("left", 1))])
              for name in ("joints", "vertices")}
    unknown = np.isnan(index.columns["joints"]).any(2)
    assert np.argwhere(unknown).tolist() == [[2, 8]]                                  # the index finger's tip
    close(np.where(unknown[..., None], 0, index.columns["joints"]), np.where(unknown[..., None], 0, wanted["joints"]))
    close(index.columns["vertices"], wanted["vertices"], 2e-6)
    assert index.columns["size"].tolist() == [[334, 512], [334, 512], [512, 334]]


@pytest.mark.parametrize("definition", ["kinematic 744 320 443 554 671", "regressed 744 320 443 554 671", "ho3d", "freihand"])
def test_definition_of_joints_is_found(definition):
    """Joints made by a definition are told from their mesh, and made again by what was found."""
    hands, layer = posed(6, 3), Mano(ARRAYS).double()
    vertices, joints = layer(rotmat_from_axis_angle(torch.from_numpy(hands["pose"].reshape(-1, 16, 3))), torch.from_numpy(hands["betas"]))
    labels = labelled_joints(vertices, joints, ARRAYS, definition).numpy()
    found = layouts.settle(labels, vertices.numpy(), ARRAYS["J_regressor"])
    names = {"ho3d": "kinematic 744 333 444 555 672", "freihand": "regressed 744 320 443 555 672"}
    assert found["joints"] == names.get(definition, definition)
    close(labelled_joints(vertices, joints, ARRAYS, found["joints"]), labels, 1e-9)
    assert "(0.000 mm)" in found["found"] and "--mano" in layouts.settle(labels, vertices.numpy())["found"]


def test_readers_take_text_and_know_their_splits(roots, tmp_path):
    columns, meta, *_ = layouts.assemblyhands(str(roots[0] / "assemblyhands"), "val")
    assert len(columns["box"]) == 5 and meta["sequences"] == {"seq": ["000000", "000001", "000002"]}
    withheld = tmp_path / "assemblyhands"                                # as the test: a template in place of the poses
    shutil.copytree(roots[0] / "assemblyhands", withheld)
    (withheld / "annotations/val").rename(withheld / "annotations/test")
    for file in (withheld / "annotations/test").iterdir():
        file.rename(file.with_name(file.name.replace("_val_", "_test_").replace("joint_3d_v1-1", "joint_3d_v1-1_pred_template")))
    bare, *_ = layouts.assemblyhands(withheld, "test")
    assert len(bare["box"]) == 5 and np.isnan(bare["joints"]).all() and not bare["visible"].any()
    for kind in layouts.SPLITS:
        with pytest.raises(ValueError, match="--split elsewhere"):
            getattr(layouts, kind)(str(roots[0]), "elsewhere")


def test_hands_that_no_picture_shows_are_left_out():
    boxes = np.array([[10, 10, 60, 60], [110, 10, 160, 60], [10, 10, 10.5, 60], [-500, -500, 900, 900], [-20, 20, 50, 90]], float)
    columns = {"image": np.array([b"a", b"b", b"c", b"d", b"e"]), "box": boxes, "size": np.tile([100, 100], (5, 1)),
               "label": np.array([0, 0, 1, 1, 0]), "joints2d": np.zeros((2, 21, 2))}
    kept, _, _, dropped = usable(columns, {}, "x", {"before": ["f"]})
    assert kept["image"].tolist() == [b"a", b"e"] and kept["label"].tolist() == [0, 0] and len(kept["joints2d"]) == 2
    assert dropped == {"before": ["f"], "box thinner than a pixel": ["c"], "hand outside its image": ["b", "d"],
                       "joints behind the camera": []}


def test_orders_are_permutations():
    for order, inverse in ((layouts.FROM_MANO, FREIHAND_TO_MANO), (layouts.FROM_TIPS, TIP_FIRST)):
        assert np.array_equal(np.arange(21)[order][list(inverse)], np.arange(21))
    assert list(MANO_TO_FREIHAND) == layouts.FROM_MANO


def test_yaml_as_dexycb_has_it(tmp_path):
    write(tmp_path / "a.yml", "a: 1\nb:\n- 'x'\n- y  # note\nc:\n  d: 2.5\n  e:\n  - 3\nf: [left, \"right\"]\ng:\n")
    wanted = {"a": "1", "b": ["x", "y"], "c": {"d": "2.5", "e": ["3"]}, "f": ["left", "right"], "g": None}
    assert layouts.read_yaml(tmp_path / "a.yml") == wanted


# -------------------------------------------------------------------------------------------------------------- damage
def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def change_pickle(path, **entries):
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | entries, protocol=2))


def change_npz(path, **entries):
    with np.load(path) as file:
        content = {name: file[name] for name in file} | entries
    np.savez(path, **content)


HO3D, DEXYCB = "train/ABF10/meta/0001.pkl", "20200700-subject-01/20200700_100001/836212060102/labels_000001.npz"
ASSEMBLY, INTER = "annotations/val/assemblyhands_val_", "annotations/val/InterHand2.6M_val_"
DAMAGE = {
    "ho3d frame missing": ("ho3d", HO3D, lambda p: p.unlink()),
    "ho3d image missing": ("ho3d", "train/SM2/rgb/0007.png", lambda p: p.unlink()),
    "ho3d truncated": ("ho3d", HO3D, lambda p: p.write_bytes(p.read_bytes()[:-40])),
    "ho3d hostile": ("ho3d", HO3D, lambda p: change_pickle(p, handPose=Hostile())),
    "ho3d shape": ("ho3d", HO3D, lambda p: change_pickle(p, handPose=np.zeros(45))),
    "ho3d nan": ("ho3d", HO3D, lambda p: change_pickle(p, handJoints3D=np.full((21, 3), np.nan))),
    "ho3d list": ("ho3d", "train.txt", lambda p: p.write_text("ABF10/0000\n../../etc\n")),
    "dexycb missing": ("dexycb", DEXYCB, lambda p: p.unlink()),
    "dexycb truncated": ("dexycb", DEXYCB, lambda p: p.write_bytes(p.read_bytes()[:99])),
    "dexycb pickle": ("dexycb", DEXYCB, lambda p: change_npz(p, pose_m=np.array([{}], object))),
    "dexycb shape": ("dexycb", DEXYCB, lambda p: change_npz(p, joint_3d=np.zeros((1, 20, 3)))),
    "dexycb nan": ("dexycb", DEXYCB, lambda p: change_npz(p, joint_3d=np.full((1, 21, 3), np.nan))),
    "dexycb side": ("dexycb", "20200700-subject-01/20200700_100001/meta.yml",
                    lambda p: p.write_text(p.read_text().replace("right", "both"))),
    "dexycb lens": ("dexycb", "calibration/intrinsics/836212060102_640x480.yml", lambda p: p.write_text("color:\n  fx: many\n")),
    "assembly missing": ("assemblyhands", ASSEMBLY + "ego_calib_v1-1.json", lambda p: p.unlink()),
    "assembly truncated": ("assemblyhands", ASSEMBLY + "joint_3d_v1-1.json", lambda p: p.write_text(p.read_text()[:-30])),
    "assembly shape": ("assemblyhands", ASSEMBLY + "joint_3d_v1-1.json",
                       lambda p: edit(p, lambda c: c["annotations"]["seq"]["000001"].update(world_coord=[[0, 0, 0]]))),
    "assembly nan": ("assemblyhands", ASSEMBLY + "joint_3d_v1-1.json",
                     lambda p: edit(p, lambda c: c["annotations"]["seq"]["000001"]["world_coord"].__setitem__(3, [float("nan")] * 3))),
    "assembly images": ("assemblyhands", ASSEMBLY + "ego_data_v1-1.json", lambda p: edit(p, lambda c: c.pop("images"))),
    "assembly width": ("assemblyhands", ASSEMBLY + "ego_data_v1-1.json", lambda p: edit(p, lambda c: c["images"][1].update(width=None))),
    "assembly frame": ("assemblyhands", ASSEMBLY + "ego_data_v1-1.json", lambda p: edit(p, lambda c: c["images"][1].update(frame_idx="a"))),
    "assembly lens": ("assemblyhands", ASSEMBLY + "ego_calib_v1-1.json",
                      lambda p: edit(p, lambda c: c["calibration"]["seq"]["extrinsics"].pop("000001"))),
    "interhand nan": ("interhand", INTER + "joint_3d.json",
                      lambda p: edit(p, lambda c: c["0"]["1"]["world_coord"].__setitem__(3, [float("nan")] * 3))),
    "interhand shape": ("interhand", INTER + "data.json", lambda p: edit(p, lambda c: c["annotations"][1]["joint_valid"].pop())),
    "interhand missing": ("interhand", INTER + "camera.json", lambda p: p.unlink()),
    "interhand truncated": ("interhand", INTER + "data.json", lambda p: p.write_text(p.read_text()[:-30])),
    "interhand side": ("interhand", INTER + "data.json", lambda p: edit(p, lambda c: c["annotations"][1].update(hand_type="both"))),
    "interhand entry": ("interhand", INTER + "data.json", lambda p: edit(p, lambda c: c["annotations"][1].pop("joint_valid"))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_leaves_nothing(roots, tmp_path, name, monkeypatch, capsys):
    import prepare_data
    from runtime import run
    kind, where, damage = DAMAGE[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(roots[0] / kind, tmp_path / kind)
    damage(tmp_path / kind / where)
    split = "train" if kind in ("ho3d", "dexycb") else "val"
    with pytest.raises(SystemExit) as stopped:
        run(lambda: prepare_data.main([kind, str(tmp_path / kind), "--split", split, "--out", str(tmp_path / "out"),
                                       *(("--workers", "1") if kind in ("ho3d", "dexycb") else ())]))
    said = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip(" \x1b[A").startswith("error")]
    assert stopped.value.code == 2 and len(said) == 1 and not (tmp_path / "out").exists() and not (tmp_path / "hostile").exists()
    assert where.rsplit("/", 1)[-1].removesuffix("_v1-1.json") in said[0]
    if where.endswith(".json") and name.split()[1] not in ("missing", "truncated", "images"):
        assert any(f"(entry {place})" in said[0] for place in ("annotation 1", "seq 000001", "capture 0 frame 1")), said[0]


# ------------------------------------------------------------------------------------------------------------- training
def test_a_mixture_of_sets_trains(roots, tmp_path):
    """Meshes, joints alone of which some are unknown, and poses without betas in one batch; each with its definition of joints."""
    root, hand = roots[0], ("--mano", roots[0] / "hand.npz")
    for kind, split, more in (("ho3d", "train", hand), ("dexycb", "val", hand), ("assemblyhands", "val", ())):
        call("prepare_data.py", kind, root / kind, "--split", split, "--out", tmp_path / kind, *more)
    command = ["finetune_mesh.py", "--data", *(tmp_path / kind for kind in ("ho3d", "dexycb", "assemblyhands")), "--val", tmp_path / "ho3d",
               *hand, "--out", tmp_path / "run", "--arch", "vit_micro", "--image-size", 64, "--head-width", 32, "--batch-size", 12,
               "--steps", 2, "--log-every", 1, "--workers", 0]
    call(*command, "--mix", 2, 1, 1)
    rows = log(tmp_path / "run")
    assert all(np.isfinite(row["loss"]) and row["vertices"] > 0 for row in rows if "loss" in row)
    done = call(*command[:-8], "--steps", 2, "--workers", 0, "--batch-size", 12, "--mix", 1, 1, check=False)
    assert done.returncode == 2


def test_mixture_is_in_proportion():
    rows, starts = np.r_[0:10, 20:50, 50:52], np.array([0, 20, 50, 60])  # of three indices, 10, 30 and 2 rows
    drawn = np.concatenate(list(make_sampler(rows, starts, [1, 0, 3], 64, 0, 0, 40)))
    assert abs((drawn < 10).mean() - 0.25) < 0.03 and not ((drawn >= 10) & (drawn < 40)).any() and set(drawn[drawn >= 40]) == {40, 41}
    halves = [list(make_sampler(rows, starts, [1, 0, 3], 64, 0, 7, 9, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == list(make_sampler(rows, starts, [1, 0, 3], 64, 0, 7, 9))
    for mix in ([1, 1], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match="--mix"):
            make_sampler(rows, starts, mix, 64, 0, 0, 1)


def test_unknown_joints_cost_nothing_and_the_rest_is_averaged():
    """Losses of a batch in which joints are unknown: whatever stands in their place, the mean of what is known."""
    g = torch.Generator().manual_seed(0)
    hand = Mano(ARRAYS)
    rotmats, betas = rotmat_from_axis_angle(0.3 * torch.randn(4, 16, 3, generator=g)), torch.randn(4, 10, generator=g)
    vertices, joints = hand(rotmats, betas)
    camera = torch.tensor([[5.0, 0, 0]]).expand(4, 3)
    output = {"vertices": vertices, "joints": joints, "rotmats": rotmats, "betas": betas, "camera": camera}
    true = joints + 0.01 * torch.randn(4, 21, 3, generator=g)
    known = (torch.rand(4, 21, generator=g) < 0.7).float()
    known[:, 0], known[3, 0] = 1, 0                                      # the last hand's wrist is unknown
    target = {"joints": true, "joints2d": true[..., :2], "vertices": vertices, "rotmats": rotmats, "betas": betas, "upright": vertices,
              "visible": torch.ones(4, 21), "known_joints": known, "known_joints2d": torch.ones(4, 21), "mirrored": torch.zeros(4),
              "source": torch.tensor([0, 1, 1, 0]), "has_joints": known[:, 0]}
    target |= {f"has_{name}": torch.ones(4) for name in ("pose", "betas", "vertices", "joints2d")}
    wild = target | {"joints": torch.where(known[..., None] > 0, true, 1e3)}
    first, second = (mesh_losses([output], batch, ARRAYS, ["freihand", "ho3d"]) for batch in (target, wild))
    assert {name: float(value) for name, value in first.items()} == pytest.approx({name: float(value) for name, value in second.items()})
    own = torch.where((target["source"] == 0)[:, None, None], labelled_joints(vertices, joints, ARRAYS, "freihand"),
                      labelled_joints(vertices, joints, ARRAYS, "ho3d"))
    errors = [(own[b, k] - own[b, 0] - true[b, k] + true[b, 0]).abs().mean() for b in range(3) for k in range(21) if known[b, k]]
    assert float(first["joints"]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
