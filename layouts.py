"""The hand data sets that the field publishes, as they unpack from their downloads, to plain arrays.

  freihand      FreiHAND v2 (Zimmermann et al., ICCV 2019)
  ho3d          HO-3D v2 and v3 (Hampali et al., CVPR 2020)
  dexycb        DexYCB (Chao et al., CVPR 2021)
  assemblyhands AssemblyHands, the headset's cameras (Ohkawa et al., CVPR 2023)
  interhand     InterHand2.6M v1.0 (Moon et al., ECCV 2020)
  hand100m      Hand100M, the annotations of SiMHand (Lin et al., ICLR 2025)
  own_joints    a CSV of joints that somebody labelled on photographs of theirs

Each of the first five takes (root, split, ...) and returns four things: columns, meta, the folder of the
images, and {reason: names} of what was left out. Columns are arrays with a row a hand, or a row a label where
there is a column `label`:

  frames of reference   metres in the camera's frame: x right, y down, z forward
  pixels                points count from the centre of the first pixel, boxes from its outer edge
  joints                FreiHAND's order
  side                  1 for a left hand, which stays as the image shows it
  NaN                   a label that is not known

meta says how the joints are defined, what the box was drawn around (`box`), and how many frames the official
list has (`frames`), in which the column `number` is a hand's place.

Some labels are MANO's numbers, not meshes. Their readers take `mano`, an object that makes the meshes
(prepare_data.py's ManoModels has what is needed); without it there are no meshes.

Errors are ValueError or FileNotFoundError. They name the file and, in a list, the entry. No code in a file is
ever run. One file holds all the layouts, so that a data set is read with one copied file.

Example::

    import json
    from pathlib import Path
    import numpy as np
    from PIL import Image
    from layouts import freihand

    joints = np.random.default_rng(0).normal([0, 0, 0.6], 0.03, (1, 21, 3))
    labels = {"K": [[[400, 0, 112], [0, 400, 112], [0, 0, 1]]], "xyz": joints.tolist(), "scale": [0.03],
              "verts": np.resize(joints, (1, 778, 3)).tolist(), "mano": np.zeros((1, 61)).tolist()}
    Path("mine/training/rgb").mkdir(parents=True)
    Image.new("RGB", (224, 224)).save("mine/training/rgb/00000000.jpg")
    for name, value in labels.items():
        Path(f"mine/training_{name}.json").write_text(json.dumps(value))
    columns, meta, folder, left_out = freihand("mine", "training")
    assert columns["joints2d"].shape == (1, 21, 2)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import contextlib
import csv
import json
import os
import pickle
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

OPENGL = np.array([1.0, -1.0, -1.0])  # HO-3D's camera looks along -z, with y up
# FreiHAND's joint k is joint ORDER[k] of the source: of MANO's 16 and five tips, of InterHand's tip first
FROM_MANO = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
FROM_TIPS = [20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16]
SPLITS = {"freihand": ("training", "evaluation", "train", "val"), "ho3d": ("train", "evaluation"),
          "dexycb": ("train", "val", "test"), "assemblyhands": ("train", "val", "test"),
          "interhand": ("train", "val", "test")}
SCORED = ("evaluation", "val", "test")  # splits that official scripts score to the last hand
SIDES = ("right", "left")


def _check_root(root, data_set, split):
    """The folder as a Path; FileNotFoundError where there is none, ValueError for an unknown split."""
    if split not in SPLITS[data_set]:
        raise ValueError(f"--split {split}: {data_set} has {', '.join(SPLITS[data_set])}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return Path(root)


# -------------------------------------------------------------------------------------------------- FreiHAND
def freihand(root: Path | str, split: str, skip_missing: bool = False):
    """training; evaluation; or train and val, two parts of the training set that share no pose.

    All hands are right. skip_missing: leaves out labels whose image is missing, instead of refusing.
    """
    root = _check_root(root, "freihand", split)
    part = "evaluation" if split == "evaluation" else "training"
    labels = _freihand_labels(root, part)
    count = len(labels["K"])
    folder = _freihand_path(root, f"{part}/rgb").parent.parent
    names, present = _freihand_images(folder / part / "rgb", count, skip_missing)
    versions = len(names) // count
    if split != "evaluation" and versions < 4:
        print(f"{folder / part / 'rgb'}: {versions} of the 4 pictures of each hand found")
    size = _image_size(folder / part / "rgb" / names[np.argmax(present)])
    _check_cameras(labels["K"], size, _freihand_path(root, f"{part}_K.json"))
    official_label = np.tile(np.arange(count), versions)
    kept = present & _freihand_part(official_label, split)
    if not kept.any():
        raise ValueError(f"--split {split}: no hands are left in it ({count} labels; val is every 20th)")

    used, label = np.unique(official_label[kept], return_inverse=True)
    K = labels["K"][used]
    mano = labels["mano"][used]
    joints = labels["xyz"][used]
    columns = {"K": K, "joints": joints, "joints2d": _project(joints, K), "vertices": labels["verts"][used],
               "pose": mano[:, :48], "betas": mano[:, 48:58], "scale": labels["scale"][used]}
    columns["label"] = label
    columns["image"] = np.array([f"{part}/rgb/{name}" for name in names[kept]], dtype="S")
    columns["box"] = tight_boxes(columns["joints2d"])[label]
    columns["size"] = np.tile(np.int32(size), (len(label), 1))
    if (folder / part / "mask").is_dir():  # one mask a label, not one an image
        masks = set(os.listdir(folder / part / "mask"))
        wanted = [f"{number:08d}.jpg" for number in official_label[kept]]
        columns["mask"] = np.array([f"{part}/mask/{name}" if name in masks else "" for name in wanted],
                                   dtype="S")
    meta = {"name": f"freihand-{split}", "joints": "freihand", "pose_mean": True, "protocol": "freihand",
            "box": "drawn around the labelled joints"}
    if split == "evaluation":
        columns["number"] = np.flatnonzero(kept)
        meta["frames"] = count
    missing = [str(folder / part / "rgb" / name) for name in names[~present]]
    return columns, meta, folder, {"image missing": missing}


def _freihand_path(root, name):
    """A file or folder of FreiHAND, in ROOT or in the folder that the evaluation labels unpack to."""
    places = [root, root / "FreiHAND_pub_v2", root / "FreiHAND_pub_v2_eval",
              root.parent / f"{root.name}_eval", root.parent / "FreiHAND_pub_v2_eval"]
    for place in places:
        if (place / name).exists():
            return place / name
    raise FileNotFoundError(f"{root / name}: not there (nor in FreiHAND_pub_v2_eval beside it): ROOT must be "
                            "FreiHAND v2 as unpacked")


def _freihand_labels(root, part):
    """{K, xyz, verts, mano, scale: array}; ValueError where the five files do not fit together."""
    shapes = {"K": (3, 3), "xyz": (21, 3), "verts": (778, 3), "mano": (61,), "scale": ()}
    labels = {}
    for name, shape in shapes.items():
        path = _freihand_path(root, f"{part}_{name}.json")
        labels[name] = _read_label_list(path, shape)
        if len(labels[name]) != len(labels["K"]):
            raise ValueError(f"{path}: {len(labels[name])} entries, but {part}_K.json has {len(labels['K'])}")
    apart = np.linalg.norm(labels["xyz"].mean(1) - labels["verts"].mean(1), axis=1)
    if apart.max() > 0.2:
        raise ValueError(f"{_freihand_path(root, f'{part}_xyz.json')}: entry {int(np.argmax(apart))} lies "
                         f"{apart.max():.2f} m from its mesh in {part}_verts.json: both must be in metres")
    return labels


def _freihand_images(folder, count, skip_missing):
    """The names of the images, up to four of each label, and which of them are present."""
    there = {entry.name for entry in tqdm(os.scandir(folder), desc="images", leave=False)}
    last = max((int(name[:-4]) for name in there if name[:-4].isdigit()), default=-1)
    versions = min(max(1, -(-(last + 1) // count)), 4)
    names = np.array([f"{i:08d}.jpg" for i in range(count * versions)])  # i shows the label i % count
    present = np.array([name in there for name in names])
    if not present.any():
        raise FileNotFoundError(f"{folder}: none of the images is there")
    if not present.all() and not skip_missing:
        raise ValueError(f"{folder / names[np.argmin(present)]}: missing, as are {(~present).sum() - 1} "
                         "others; complete the download, or leave them out with --skip-missing")
    return names, present


def _freihand_part(label, split):
    """Rows of a split: val is every 20th block of 100 poses, train the others.

    Blocks, because neighbours in the list may show one moment from two cameras. This is ours: FreiHAND has no
    official validation set.
    """
    in_val = label // 100 % 20 == 19 if label.max() >= 1900 else label % 20 == 19
    rows = {"train": ~in_val, "val": in_val}
    return rows.get(split, np.ones(len(label), bool))


# ----------------------------------------------------------------------------------------------------- HO-3D
def ho3d(root: Path | str, split: str, mano=None, workers: int = 0):
    """train or evaluation, as train.txt and evaluation.txt list the frames. All hands are right.

    Version 2 has .png images, version 3 .jpg. Labels are in OpenGL's frame, with MANO's order of the joints
    and tips after the 16, which are the layer's own. The evaluation frames hold the root joint alone; the
    files evaluation_xyz.json and evaluation_verts.json, published in 2024, give the rest. They label every
    frame of the list, so each has a row; the box is 0 where a frame has none.
    """
    root = _check_root(root, "ho3d", split)
    frame_list = root / f"{split}.txt"
    frames = _ho3d_frames(frame_list)
    found = _in_parallel(partial(_ho3d_labels, root / split, split), frames, workers, "frames")
    labelled = np.array([row is not None for row in found])
    if not labelled.any():
        raise ValueError(f"{frame_list}: no frame has labels")
    names = [frames[i] for i in np.flatnonzero(labelled)]
    left_out = {"frame without labels": [frames[i] for i in np.flatnonzero(~labelled)]}
    columns = _stack([row for row in found if row is not None])
    known = np.isfinite(columns["K"]).all((1, 2))
    if not known.any():
        raise ValueError(f"{frame_list}: no frame has a camera")
    columns["K"][~known] = columns["K"][known][0]  # the set's cameras are of one make
    sequence, number = frames[0].split("/")
    suffix = "png" if (root / split / sequence / "rgb" / f"{number}.png").exists() else "jpg"
    version = "v2" if suffix == "png" else "v3"
    around = "drawn around the labelled joints" if split == "train" else "the data set's own"
    meta = {"name": f"ho3d-{version}-{split}", "joints": "ho3d", "pose_mean": False, "protocol": "ho3d",
            "frames": len(frames), "box": around}

    wrist = columns.pop("wrist", None)
    if split == "evaluation" and (root / "evaluation_xyz.json").exists():
        columns |= _ho3d_evaluation_labels(root, frames, labelled, wrist)
        regressor = None if mano is None else mano.arrays[0]["J_regressor"]
        meta |= find_joint_definition(columns["joints"], columns["vertices"], regressor)
    if "joints" in columns:
        columns["joints2d"] = _project(columns["joints"], columns["K"])
    if split == "train":
        columns["box"] = tight_boxes(columns["joints2d"])
        translation = columns.pop("trans")
        if mano is not None:
            columns["vertices"] = mano.vertices(columns["pose"], columns["betas"], translation) * OPENGL
        half_turn = Rotation.from_rotvec([np.pi, 0, 0])  # from OpenGL's frame to ours, diag(1,-1,-1)
        columns["pose"] = _rotate_pose(columns["pose"], half_turn)

    images = [f"{split}/{name.replace('/', '/rgb/')}.{suffix}" for name in names]
    size = _check_images(root, images)
    _check_cameras(columns["K"], size, frame_list)
    columns["image"] = np.array(images, dtype="S")
    columns["size"] = np.tile(np.int32(size), (len(images), 1))
    columns["number"] = np.flatnonzero(labelled)
    columns["video"] = _numbered([name.split("/")[0] for name in names])
    masks = _ho3d_masks(root, split, names)
    if any(masks):  # the training sequences of version 3 have some
        columns["mask"] = np.array(masks, dtype="S")
    return columns, meta, root, left_out


def _ho3d_frames(path):
    """The lines SEQUENCE/FRAME of a list; ValueError names the first that is something else."""
    frames = _read_text(path).split()
    for line, name in enumerate(frames or [""], 1):
        if not re.fullmatch(r"[\w-]+/\d+", name):
            raise ValueError(f"{path}: line {line} is not SEQUENCE/FRAME")
    return frames


def _ho3d_labels(folder, split, frame):
    """Labels of one frame in our camera frame, pose and translation in OpenGL's.

    Where the file has None instead: None to train on, NaN in a frame to evaluate (its box: 0)."""
    path = folder / f"{frame.replace('/', '/meta/')}.pkl"
    content = _read_pickle(path)
    if split == "evaluation":
        K, wrist, box = [np.full(shape, np.nan) if content.get(name) is None else
                         _numbers(content, name, shape, path)
                         for name, shape in (("camMat", (3, 3)), ("handJoints3D", (3,)),
                                             ("handBoundingBox", (4,)))]
        return {"K": K, "wrist": wrist * OPENGL, "box": np.nan_to_num(box + 0.5)}
    if any(content.get(name) is None for name in ("camMat", "handJoints3D", "handPose")):
        return None
    row = {"K": _numbers(content, "camMat", (3, 3), path)}
    row["joints"] = (_numbers(content, "handJoints3D", (21, 3), path) * OPENGL)[FROM_MANO]
    row["pose"] = _numbers(content, "handPose", (48,), path)
    row["betas"] = _numbers(content, "handBeta", (10,), path)
    row["trans"] = _numbers(content, "handTrans", (3,), path)
    return row


def _ho3d_masks(root, split, frames):
    """The name of each frame's mask below root, or "" where there is none."""
    there = {}  # of each sequence
    masks = []
    for frame in frames:
        sequence, number = frame.split("/")
        if sequence not in there:
            folder = root / split / sequence / "seg"
            there[sequence] = set(os.listdir(folder)) if folder.is_dir() else set()
        masks.append(f"{split}/{sequence}/seg/{number}.png" if f"{number}.png" in there[sequence] else "")
    return masks


def _ho3d_evaluation_labels(root, frames, labelled, wrist):
    """joints and vertices of the two files of 2024; ValueError where a wrist (N,3) is not their joint 0.

    An unknown wrist is NaN."""
    columns = {}
    for name, file, shape in (("joints", "evaluation_xyz.json", (21, 3)),
                              ("vertices", "evaluation_verts.json", (778, 3))):
        values = _read_label_list(root / file, shape)
        if len(values) != len(frames):
            raise ValueError(f"{root / file}: {len(values)} entries, but evaluation.txt has {len(frames)}")
        columns[name] = values[labelled] * OPENGL
    apart = np.nan_to_num(np.abs(columns["joints"][:, 0] - wrist).max(1))
    if apart.max() > 1e-3:  # the list and the files must have one order
        entry = int(np.flatnonzero(labelled)[np.argmax(apart)])
        raise ValueError(f"{root / 'evaluation_xyz.json'}: entry {entry} is not the hand of "
                         f"{frames[entry]}: its wrist lies {apart.max():.3f} m away")
    columns["joints"] = columns["joints"][:, FROM_MANO]
    return columns


def find_joint_definition(joints: np.ndarray, vertices: np.ndarray,
                          regressor: np.ndarray | None = None) -> dict:
    """Which definition the joints (N,21,3) of meshes (N,778,3) follow, as entries of an index's meta.

    joints: "kinematic" or "regressed", then the five vertices that are the tips. found: the evidence. A tip
    is the vertex that is nearest in most hands. The other joints are regressed where they lie on what the
    regressor (16,778) gives, else the layer's own; without a regressor they are taken for the layer's own, as
    in the training set.
    """
    tips = []
    evidence = []
    for joint in (4, 8, 12, 16, 20):
        nearest = [np.argmin(((mesh - hand[joint]) ** 2).sum(1))
                   for mesh, hand in zip(vertices, joints, strict=True)]
        tip = int(np.bincount(nearest).argmax())
        apart = np.linalg.norm(vertices[:, tip] - joints[:, joint], axis=1).mean()
        tips.append(tip)
        evidence.append(f"{tip} ({1000 * apart:.3f} mm)")
    if regressor is None:
        definition = "kinematic"
        others = "the other 16 are taken for the layer's own; --mano checks that"
    else:
        regressed = np.einsum("jv,nvi->nji", regressor, vertices)  # (N,16,3), MANO's order
        not_tips = [k for k in range(21) if FROM_MANO[k] < 16]
        of_mano = [FROM_MANO[k] for k in not_tips]
        apart = np.linalg.norm(regressed[:, of_mano] - joints[:, not_tips], axis=2).mean()
        definition = "regressed" if apart < 1e-4 else "kinematic"
        others = f"the other 16 are {1000 * apart:.3f} mm from the mesh's regressed ones: {definition}"
    return {"joints": " ".join([definition, *map(str, tips)]),
            "found": f"tips are vertices {', '.join(evidence)}; {others}"}


# ---------------------------------------------------------------------------------------------------- DexYCB
CAMERAS = 8


def dexycb(root: Path | str, split: str, setup: str = "s0", mano=None, workers: int = 0):
    """train, val or test of a setup: s0 nothing unseen in the test, s1 subjects, s2 views, s3 objects.

    `number` counts all frames of the split, as the official result files do: by subject, sequence, camera and
    frame. Joints are the layer's own with manopth's tips. Poses are PCA coefficients about the mean pose, so
    pose and mesh need `mano`. Labels of left hands were made with MANO's left model as shipped, whose shapes
    are not those of the right one: their betas are left out.
    """
    root = _check_root(root, "dexycb", split)
    jobs = _dexycb_jobs(root, split, setup)
    rows = []
    without_hand = []
    frames = 0
    sequences = _in_parallel(partial(_dexycb_sequence, root), jobs, workers, "sequences")
    for video, (found, names, frame_count) in enumerate(sequences):
        for row in found:
            row["number"] += frames
            row["video"] = video
        rows += found
        without_hand += names
        frames += frame_count
    if not rows:
        raise ValueError(f"--split {split}: no frame shows a hand")
    columns = _stack(rows)
    left = columns["side"]
    global_rotation, coefficients, translation = np.split(columns.pop("pose_m"), [3, 48], axis=1)
    betas = columns.pop("betas")
    if mano is not None:
        fingers = mano.fingers_from_coefficients(coefficients, left)
        columns["pose"] = np.concatenate([global_rotation, fingers], axis=1)
        columns["vertices"] = mano.vertices(columns["pose"], betas, translation, left)
        columns["betas"] = np.where(left[:, None], np.nan, betas)
    columns["joints2d"] = _project(columns["joints"], columns["K"])
    columns["box"] = tight_boxes(columns["joints2d"])
    columns["size"] = np.tile(np.int32([640, 480]), (len(left), 1))
    _check_cameras(columns["K"], (640, 480), root / "calibration" / "intrinsics")
    _check_images(root, [os.fsdecode(name) for name in columns["image"]])
    columns["mask"] = np.array([re.sub(rb"color_(\d+)\.jpg$", rb"labels_\1.npz", name)
                                for name in columns["image"]])
    meta = {"name": f"dexycb-{setup}-{split}", "joints": "manopth", "pose_mean": False, "protocol": "dexycb",
            "partial": True, "frames": frames, "box": "drawn around the labelled joints"}
    return columns, meta, root, {"frame without a hand": without_hand}


def _dexycb_jobs(root, split, setup):
    """[(folder of a sequence, its cameras in the split)] in the official order."""
    subjects = sorted(path for path in root.iterdir() if re.fullmatch(r"\d{8}-subject-\d+", path.name))
    if not subjects:
        raise FileNotFoundError(f"{root}: no folders DATE-subject-NN: ROOT must be DexYCB as unpacked")
    jobs = []
    for folder in subjects:
        subject = int(folder.name[-2:]) - 1
        sequences = sorted(path for path in folder.iterdir() if path.is_dir())
        if len(sequences) != 100:
            print(f"warning: {folder} has {len(sequences)} sequences, not 100: the part that a sequence "
                  "belongs to follows from its place among them")
        for number, sequence in enumerate(sequences):
            cameras = [camera for camera in range(CAMERAS)
                       if dexycb_part(setup, subject, camera, number) == split]
            if cameras:
                jobs.append((sequence, cameras))
    if not jobs:
        raise ValueError(f"--setup {setup} --split {split}: none of its sequences is below {root}")
    return jobs


def dexycb_part(setup: str, subject: int, camera: int, sequence: int) -> str:
    """train, val or test, to which a camera of a sequence belongs (NVlabs/dex-ycb-toolkit, dex_ycb.py).

    subject: its number less 1. camera, sequence: the place in sorted order.
    """
    if setup == "s0":  # every fifth sequence
        if sequence % 5 != 4:
            return "train"
        return "val" if subject < 2 else "test"
    if setup == "s1":
        return {6: "val", 7: "test", 8: "test"}.get(subject, "train")
    if setup == "s2":
        return {6: "val", 7: "test"}.get(camera, "train")
    grasped = sequence // 5  # s3: an object is grasped in five sequences, one after the other
    return {3: "val", 19: "val", 7: "test", 11: "test", 15: "test"}.get(grasped, "train")


def _dexycb_sequence(root, job):
    """A sequence as seen by some cameras: rows of the frames with a hand, names of the others, all frames."""
    sequence, cameras = job
    serials, frame_count, side, calibration = _dexycb_meta(sequence / "meta.yml")
    path = root / "calibration" / f"mano_{calibration}" / "mano.yml"
    betas = _numbers(read_yaml(path), "betas", (10,), path)
    rows = []
    without_hand = []
    number = -1
    for camera in cameras:
        serial = serials[camera]
        K = _dexycb_camera(root / "calibration" / "intrinsics" / f"{serial}_640x480.yml")
        for frame in range(frame_count):
            number += 1
            path = sequence / serial / f"labels_{frame:06d}.npz"
            content = _read_npz(path, ("joint_3d", "pose_m"))
            joints = _numbers(content, "joint_3d", (1, 21, 3), path)[0]
            pose_m = _numbers(content, "pose_m", (1, 51), path)[0]
            image = (sequence / serial / f"color_{frame:06d}.jpg").relative_to(root).as_posix()
            if (joints == -1).all():
                without_hand.append(image)
                continue
            rows.append({"image": os.fsencode(image), "joints": joints, "pose_m": pose_m, "number": number,
                         "K": K, "betas": betas, "side": side == "left"})
    return rows, without_hand, frame_count * len(cameras)


def _dexycb_meta(path):
    """The cameras' serials, the number of frames, the side of the hand and the name of its calibration."""
    meta = read_yaml(path)
    try:
        serials = sorted(meta["serials"])
        frame_count = int(meta["num_frames"])
        side = meta["mano_sides"][0]
        calibration = meta["mano_calib"][0]
        as_published = side in SIDES and len(serials) == CAMERAS
    except (KeyError, IndexError, TypeError, ValueError):
        as_published = False
    if not as_published:
        raise ValueError(f"{path}: needs {CAMERAS} serials, num_frames, mano_sides right or left, mano_calib")
    return serials, frame_count, side, calibration


def _dexycb_camera(path):
    """K (3,3) of a colour camera."""
    lens = read_yaml(path).get("color")
    fx, fy, x, y = (float(_numbers(lens, name, (), path)) for name in ("fx", "fy", "ppx", "ppy"))
    return np.array([[fx, 0, x], [0, fy, y], [0, 0, 1]])


# --------------------------------------------------------------------------------------------- AssemblyHands
def assemblyhands(root: Path | str, split: str):
    """train, val or test of the headset's cameras, a row for each hand that has a box.

    Joints are annotated, not MANO's, and NaN where nothing is known. `visible` holds the annotation's own
    flags, by which the official metric counts joints; the wrist is subtracted there whatever its flag. The
    poses of the test may be missing: its hands then have boxes alone. meta's `sequences` are all frames of
    the file.
    """
    root = _check_root(root, "assemblyhands", split)
    folder = root / "annotations" / split
    data_path = _one_file(folder, f"assemblyhands_{split}_ego_data*.json")
    camera_path = _one_file(folder, f"assemblyhands_{split}_ego_calib*.json")
    pose_path = None
    poses = {"annotations": {}}
    pose_pattern = f"assemblyhands_{split}_joint_3d*.json"
    if split != "test" or _without_templates(folder, pose_pattern):
        pose_path = _one_file(folder, pose_pattern)
        poses = _read_json(pose_path)
    calibration = _read_json(camera_path)
    images, annotations = _read_annotations(data_path)
    rows = []
    sequences = {}
    for number, annotation in enumerate(tqdm(annotations, desc="hands", leave=False)):
        with _errors_name(data_path, f"annotation {number}"):
            image = images[annotation["image_id"]]
            sequence = image["seq_name"]
            frame = f"{int(image['frame_idx']):06d}"
            camera = image["camera"].removesuffix("_mono10bit") + "_mono10bit"
            sequences.setdefault(sequence, set()).add(frame)
            with _errors_name(camera_path, f"{sequence} {frame}"):
                cameras = calibration["calibration"][sequence]
                K = _numbers(cameras["intrinsics"], camera, (3, 3), camera_path)
                extrinsics = _numbers(cameras["extrinsics"][frame], camera, (3, 4), camera_path)
            with _errors_name(pose_path, f"{sequence} {frame}"):
                pose = poses["annotations"].get(sequence, {}).get(frame)
                world, known = _assemblyhands_pose(pose, pose_path)
            visible = known
            if "joint_valid" in annotation:
                visible = _numbers(annotation, "joint_valid", (42,), data_path) > 0
            is_wrist = np.isin(np.arange(42), (20, 41))
            known = (known | visible | is_wrist) & world.any(1)  # zeros stand for an unknown joint
            joints = (world @ extrinsics[:, :3].T + extrinsics[:, 3]) / 1000  # (42,3), R X + t
            joints = np.where(known[:, None], joints, np.nan)
            extrinsics = np.c_[extrinsics[:, :3], extrinsics[:, 3] / 1000]
            for side, name in enumerate(SIDES):
                if annotation["bbox"].get(name) is None:
                    continue
                order = 21 * side + np.array(FROM_TIPS)
                box = _numbers(annotation["bbox"], name, (4,), data_path) + 0.5
                rows.append({"image": os.fsencode(image["file_name"]), "size": _declared_size(image), "K": K,
                             "joints": joints[order], "visible": visible[order], "extrinsics": extrinsics,
                             "box": box, "side": side, "video": sequence})
    columns = _annotated_columns(rows, root / "images", data_path)
    meta = {"name": f"assemblyhands-{split}", "joints": "assemblyhands", "protocol": "assemblyhands",
            "box": "the data set's own", "pose_mean": False, "partial": True,
            "sequences": {name: sorted(frames) for name, frames in sorted(sequences.items())}}
    return columns, meta, root / "images", {}


def _assemblyhands_pose(pose, path):
    """Both hands' joints (42,3) in the world, mm, and which are valid; zeros and none without a pose."""
    if pose is None:
        return np.zeros((42, 3)), np.zeros(42, bool)
    world = _numbers(pose, "world_coord", (42, 3), path)
    return world, _numbers(pose, "joint_valid", (42,), path) > 0


# --------------------------------------------------------------------------------------------- InterHand2.6M
def interhand(root: Path | str, split: str, mano=None):
    """train, val or test, a row for each hand whose wrist is valid.

    Joints are annotated, NaN where they are invalid. With `mano` there are the meshes of MANO_NeuralAnnot;
    FileNotFoundError without its file. Its left hands were made with the corrected left model.
    """
    root = _check_root(root, "interhand", split)
    folder = root / "annotations" / split
    data_path, camera_path, pose_path, fit_path = [folder / f"InterHand2.6M_{split}_{name}.json" for name in
                                                   ("data", "camera", "joint_3d", "MANO_NeuralAnnot")]
    images, annotations = _read_annotations(data_path)
    cameras = _read_json(camera_path)
    poses = _read_json(pose_path)
    if mano is not None and not fit_path.exists():
        raise FileNotFoundError(f"{fit_path}: no such file. It is a download of its own; without --mano the "
                                "index has joints alone")
    fits = _read_json(fit_path) if mano is not None else {}
    rows = []
    without_wrist = []
    for number, annotation in enumerate(tqdm(annotations, desc="hands", leave=False)):
        with _errors_name(data_path, f"annotation {number}"):
            image = images[annotation["image_id"]]
            capture = str(image["capture"])
            frame = str(image["frame_idx"])
            kind = annotation["hand_type"]
            if kind not in (*SIDES, "interacting"):
                raise ValueError(f"{data_path}: hand_type {kind!r}")
            valid = _numbers(annotation, "joint_valid", (42, 1), data_path)[:, 0] > 0
            x, y, width, height = _numbers(annotation, "bbox", (4,), data_path)
            with _errors_name(camera_path, f"capture {capture}"):
                camera = _interhand_camera(cameras[capture], str(image["camera"]), camera_path)
            with _errors_name(pose_path, f"capture {capture} frame {frame}"):
                world = _numbers(poses[capture][frame], "world_coord", (42, 3), pose_path)
            joints = (world - camera["position"]) @ camera["rotation"].T / 1000  # (42,3), R (X - c)
            joints = np.where(valid[:, None], joints, np.nan)
            for side, name in enumerate(SIDES):
                if kind not in (name, "interacting"):
                    continue
                order = 21 * side + np.array(FROM_TIPS)
                if not valid[order[0]]:  # an invalid wrist makes the whole hand invalid
                    without_wrist.append(f"{image['file_name']} {name}")
                    continue
                row = {"image": os.fsencode(f"{split}/{image['file_name']}"), "size": _declared_size(image),
                       "side": side, "joints": joints[order], "video": f"{capture}/{image['seq_name']}",
                       "box": np.array([x, y, x + width, y + height]) + 0.5,
                       "box_of_hand": kind != "interacting", **camera}
                if fits:
                    with _errors_name(fit_path, f"capture {capture} frame {frame}"):
                        fit = ((fits.get(capture) or {}).get(frame) or {}).get(name)
                        row["fit"] = _interhand_fit(fit, fit_path)
                rows.append(row)
    columns = _annotated_columns(rows, root / "images", data_path)
    if fits:
        columns |= _interhand_meshes(mano, rows)
    meta = {"name": f"interhand-{split}", "joints": "interhand", "protocol": "interhand",
            "box": "the data set's own, of interacting hands drawn around the labelled joints",
            "pose_mean": False, "partial": True}
    return columns, meta, root / "images", {"hand without a valid wrist": without_wrist}


def _interhand_camera(capture, camera, path):
    """K (3,3), rotation (3,3) from the world, and position (3,) in the world, mm, of a camera."""
    focal = _numbers(capture["focal"], camera, (2,), path)
    centre = _numbers(capture["princpt"], camera, (2,), path)
    return {"K": np.array([[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1]]),
            "rotation": _numbers(capture["camrot"], camera, (3, 3), path),
            "position": _numbers(capture["campos"], camera, (3,), path)}


def _interhand_fit(fit, path):
    """MANO's numbers of a hand in the world: 48 of pose, 10 of shape, 3 of translation; NaN without a fit."""
    if fit is None:
        return np.full(61, np.nan)
    parts = [_numbers(fit, name, (size,), path) for name, size in (("pose", 48), ("shape", 10), ("trans", 3))]
    return np.concatenate(parts)


def _interhand_meshes(mano, rows):
    """vertices, pose and betas in the cameras' frames; NaN where there is no fit. 1,024 at a time."""
    rotation = np.array([row["rotation"] for row in rows])
    position = np.array([row["position"] for row in rows]) / 1000
    left = np.array([row["side"] for row in rows]) == 1
    pose, betas, translation = np.split(np.array([row["fit"] for row in rows]), [48, 58], axis=1)
    pose[:, 3:] += mano.mean_fingers(left)
    fitted = np.isfinite(pose).all(1)
    vertices = np.full((len(rows), 778, 3), np.nan, np.float32)
    for some in np.array_split(np.flatnonzero(fitted), max(1, fitted.sum() // 1024)):
        meshes = mano.vertices(pose[some], betas[some], translation[some], left[some], repair=True)
        vertices[some] = np.einsum("nij,nvj->nvi", rotation[some], meshes - position[some, None])
    pose[fitted] = _rotate_pose(pose[fitted], Rotation.from_matrix(rotation[fitted]))
    return {"pose": pose, "betas": betas, "vertices": vertices}


# ------------------------------------------------------------ what AssemblyHands and InterHand2.6M have alike
def _read_annotations(path):
    """{id: image} and the annotations of a COCO-like file."""
    content = _read_json(path)
    with _errors_name(path, "top"):
        return {image["id"]: image for image in content["images"]}, list(content["annotations"])


@contextlib.contextmanager
def _errors_name(path, entry):
    """Turns what goes wrong inside into a ValueError with the file and the entry.

    An error that already names a .json file keeps it.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        text = str(error)
        if ".json: " not in text:
            text = f"{path}: not as published ({type(error).__name__}: {error})"
        if "(entry " not in text:
            text = f"{text} (entry {entry})"
        raise ValueError(text) from None


def _declared_size(image):
    """(width, height) by the image's entry."""
    return int(image["width"]), int(image["height"])


def _annotated_columns(rows, folder, path):
    """Columns of rows with image, size, K, joints, box, side and video, of which some joints are unknown.

    Where a row's box_of_hand is False, its box is drawn around the joints, unless fewer than two are known.
    """
    if not rows:
        raise ValueError(f"{path}: no annotated hand")
    names = {"image", "size", "K", "joints", "side", "visible", "extrinsics", "box"} & set(rows[0])
    columns = {name: np.array([row[name] for row in rows]) for name in names}
    columns["joints2d"] = _project(columns["joints"], columns["K"])
    known = np.isfinite(columns["joints2d"]).all(2)
    columns["visible"] = known & columns.get("visible", True)
    around = tight_boxes(columns["joints2d"])
    drawn = np.array([not row.get("box_of_hand", True) for row in rows])
    drawn &= (around[:, 2:] - around[:, :2] >= 1).all(1)
    columns["box"] = np.where(drawn[:, None], around, columns["box"])
    columns["video"] = _numbered([row["video"] for row in rows])
    _check_images(folder, [os.fsdecode(name) for name in columns["image"]])
    return columns


# -------------------------------------------------------------------------------------------------- Hand100M
def hand100m(root: Path | str, source: str = "Ego4D", scale: str = "50k"):
    """The annotations ROOT/annotations/SOURCE/Hand100M_*_SCALE_*.json of SiMHand's authors, without images.

    Returns the file's path, the hands and the positives. hands: {folder of frames: {frame: [hand, ...]}}, a
    frame by the authors' name for it; a hand is a dict of side, box (4,) in pixels, points (21,2) relative to
    the square that hand100m_in_frame undoes, and hand_id. positives: {hand_id: (hand_id of the most similar
    hand, distance)}. ValueError names the file and the annotation.
    """
    folder = Path(root) / "annotations" / source
    files = sorted(folder.glob(f"Hand100M_*_{scale}_*.json"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}: {len(files)} files Hand100M_*_{scale}_*.json instead of one; "
                                "check ROOT, --source and --scale")
    content = _read_json(files[0])
    hands = {}
    positives = {}
    place = "images"
    try:
        frames = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            place = f"annotation {number}"
            frame = frames[annotation["image_id"]]
            hand = _hand100m_hand(annotation)
            hands.setdefault(os.path.dirname(frame), {}).setdefault(frame, []).append(hand)
            if annotation.get("positive_sample"):
                other = int(annotation["positive_sample"][0])
                positives[hand["hand_id"]] = other, float(annotation["distance"][0])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError,
            RecursionError) as error:
        raise ValueError(f"{files[0]}: {place} is not as published ({type(error).__name__}: {error})"
                         ) from None
    return files[0], hands, positives


def _hand100m_hand(annotation):
    side = annotation["left_right"].lower()
    hand_id = int(annotation["hand_id"])
    box = np.array(json.loads(annotation["boxes"]), float)
    points = np.array(annotation["keypoint_25d"], np.float32).reshape(21, 3)[:, :2].copy()
    box_is_whole = box.shape == (4,) and (np.abs(box) < 1e6).all() and (box[2:] > box[:2]).all()
    if not box_is_whole or not (np.abs(points) < 100).all():
        raise ValueError("boxes or keypoint_25d is out of range")
    if side not in SIDES or not 0 <= hand_id < 2**62:
        raise ValueError("left_right or hand_id is unknown")
    return {"side": side, "box": box, "points": points, "hand_id": hand_id}


def hand100m_in_frame(hand: dict, size: tuple[int, int]) -> np.ndarray:
    """The points (21,2) of a hand in pixels of its frame of this (width, height), pixel-centre coordinates.

    The annotation holds them in [0,1] of a square of 1.3 times the box, clipped to the frame.
    """
    x0, y0, x1, y1 = hand["box"].astype(int)
    half = 1.3 * max(x1 - x0, y1 - y0) / 2
    middle = np.array([x0 + x1, y0 + y1]) / 2
    low = np.maximum(middle - half, 0)
    high = np.minimum(middle + half, size)
    return low + hand["points"] * (high - low) - 0.5


def find_hand100m_frame(root: Path | str, name: str) -> Path:
    """The file below ROOT that the authors call `name`, with or without their leading folders."""
    parts = Path(name).parts
    for start in range(len(parts)):
        below = Path(*parts[start:])
        path = Path(root) / below
        if ".." not in parts and not below.is_absolute() and path.is_file():
            return path
    raise FileNotFoundError(f"{Path(root) / name}: no such frame")


# ---------------------------------------------------------------------------------------- labels of one's own
IN_PICTURE = [f"{axis}{k}" for k in range(21) for axis in "xy"]
IN_SPACE = [f"{axis}{k}" for k in range(21) for axis in "XYZ"]


def own_joints(path: Path | str) -> dict[str, list[tuple]]:
    """The hands of a CSV, as {image as written: [(side, points (21,2), points in space (21,3), line), ...]}.

    The header: image, then if wanted side, x0,y0,...,x20,y20 (pixels) and X0,Y0,Z0,...,X20,Y20,Z20 (metres).
    side: "right", "left" or None where it is not said. An empty cell is not known, and NaN here, as are the
    other coordinates of its point. A line on stderr names columns that are not known. ValueError names the
    file and the line of what is no number, no side, no hand in metres, or in another frame than the camera's.
    """
    hands = {}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(line.replace("\0", " ") for line in file)
            reader.fieldnames = _own_header(reader.fieldnames or (), path)
            for row in reader:
                hand = _own_hand(row, f"{path}, line {reader.line_num}")
                hands.setdefault(row["image"], []).append((*hand, reader.line_num))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of joints") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return hands


def _own_header(names, path):
    """The names of the columns without blanks; `image` and `side` without case, but x0 and X0 are two."""
    header = [name.strip().lower() if len(name.strip()) > 3 else name.strip() for name in names]
    needed = {"image"}
    for cells in (IN_PICTURE, IN_SPACE):
        if set(cells) & set(header):
            needed |= set(cells)
    if len(needed) == 1 or not needed <= set(header) or len(set(header)) < len(header):
        raise ValueError(f"{path}: the first line must be image,side, then x0,y0,...,x20,y20 and/or X0,Y0,Z0,"
                         "...,X20,Y20,Z20, with commas and each once")
    unknown = sorted(set(header) - needed - {"side"})
    if unknown:
        print(f"warning: {path}: not read: column {', '.join(unknown)}", file=sys.stderr)
    return header


def _own_hand(row, place):
    """side, points (21,2) and points in space (21,3) of a line; ValueError that begins with `place`."""
    side = (row.get("side") or "").strip().lower() or None
    if side not in ("right", "left", None) or not row["image"] or None in row:
        raise ValueError(f"{place}: needs an image, side right, left or nothing, and no more cells than the "
                         "first line")
    points = _own_points(row, IN_PICTURE, place)
    points3d = _own_points(row, IN_SPACE, place)
    is_known = np.isfinite(points3d).all(1)
    if is_known.any() and np.ptp(points3d[is_known], axis=0).max() > 0.5:
        raise ValueError(f"{place}: X, Y, Z are no hand in metres: it is more than 0.5 across")
    is_known &= np.isfinite(points).all(1)
    flat, deep = (each[is_known] for each in (points, points3d[:, :2]))
    if len(flat) > 4 and ((flat - flat.mean(0)) * (deep - deep.mean(0))).sum() < 0:  # mirrored, or y up
        raise ValueError(f"{place}: X, Y, Z run against x, y: they are the camera's, right, down and away")
    return side, points, points3d


def _own_points(row, cells, place):
    """The 21 points of a line, (21,2) or (21,3); NaN where a cell is empty or its column is missing."""
    try:
        numbers = [float((row.get(cell) or "").strip() or "nan") for cell in cells]
    except ValueError as error:
        raise ValueError(f"{place}: {error}; a cell is a number, or empty where it is not known") from None
    points = np.reshape(numbers, (21, -1))
    if (np.abs(points) > 1e6).any():
        raise ValueError(f"{place}: {np.nanmax(np.abs(points)):g} is no coordinate")
    return np.where(np.isnan(points).any(1, keepdims=True), np.nan, points)


# ---------------------------------------------------------------------------------------- geometry and checks
def _project(points, K):
    """(N,P,3) metres -> (N,P,2) pixel-centre coordinates; NaN behind the camera."""
    image = points @ K.transpose(0, 2, 1)
    in_front = image[..., 2:] > 0
    depth = np.where(in_front, image[..., 2:], 1)
    return np.where(in_front, image[..., :2] / depth, np.nan)


def tight_boxes(joints2d):
    """(N,4) boxes in pixel-edge coordinates around (N,21,2) joints, of which some may be NaN; 0 if all."""
    known = np.isfinite(joints2d).all(2, keepdims=True)
    low = np.where(known, joints2d, np.inf).min(1)
    high = np.where(known, joints2d, -np.inf).max(1)
    return np.where(known.any(1), np.concatenate([low, high], axis=1) + 0.5, 0)


def _rotate_pose(pose, rotation):
    """Poses (N,48) whose global rotation is followed by `rotation`."""
    turned = rotation * Rotation.from_rotvec(pose[:, :3])
    return np.concatenate([turned.as_rotvec(), pose[:, 3:]], axis=1)


def _stack(rows):
    """Dicts with the same names -> a dict of arrays with a row each."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _numbered(names):
    """(N,) the place of each name among the sorted different ones."""
    return np.unique(names, return_inverse=True)[1]


def _image_size(path):
    """(width, height) without decoding."""
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:  # Pillow raises a dozen types for a damaged file
        raise ValueError(f"{path}: not a readable image ({error})") from None


def _check_images(folder, names):
    """The size of the first; FileNotFoundError names the first of `names` below `folder` that is missing."""
    listings = {}
    for name in names:
        parent, file = os.path.split(name)
        if parent not in listings:  # one look at each folder, not at each file
            listings[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        if file not in listings[parent]:
            raise FileNotFoundError(f"{folder / name}: missing; unpack the whole download")
    return _image_size(folder / names[0])


def _check_cameras(K, size, path):
    """ValueError that names the entry where K is no pinhole camera for an image of this (width, height)."""
    size = np.array(size)
    focal = K[:, [0, 1], [0, 1]]
    centre = K[:, :2, 2]
    wrong = (focal < 0.1 * size) | (focal > 50 * size) | (centre < -size) | (centre > 2 * size)
    wrong = wrong.any(1) | (np.abs(K[:, 2] - [0, 0, 1]).max(1) > 1e-6)
    if wrong.any():
        raise ValueError(f"{path}: entry {int(np.argmax(wrong))} is no camera for an image of {size[0]} x "
                         f"{size[1]} pixels")


def _numbers(mapping, name, shape, path):
    """mapping[name] as float64 of this shape.

    ValueError names the file where the entry is missing, of another size or not finite.
    """
    try:
        value = np.asarray(mapping[name], np.float64)
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{path}: {name} is missing or not numbers of shape {shape}") from None
    if value.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {name} has shape {value.shape}, needs {shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: {name} is not finite")
    return value.reshape(shape)


def _in_parallel(function, items, workers, description):
    """[function(item)] by `workers` processes (0: one a core), in order, with a bar."""
    # A container or a queue may lend fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, max(1, len(items) // 64))
    if workers == 1:
        return [function(item) for item in tqdm(items, desc=description, leave=False)]
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(function, items, chunksize=16)
        return list(tqdm(results, total=len(items), desc=description, leave=False))


# ----------------------------------------------------------------------------------------------------- files
def _without_templates(folder, pattern):
    """The files of a pattern, except those that a challenge gives to be filled in."""
    return sorted(file for file in folder.glob(pattern) if "template" not in file.name)


def _one_file(folder, pattern):
    files = _without_templates(folder, pattern)
    if len(files) != 1:
        raise FileNotFoundError(f"{folder / pattern}: {len(files)} such files instead of one; ROOT must hold "
                                "annotations/ and images/ as unpacked")
    return files[0]


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text") from None


def _read_json(path):
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None


def _read_label_list(path, shape):
    """A JSON list of equal nested lists -> (N, *shape) float64.

    It is read entry by entry: training_verts.json takes gigabytes as Python floats. ValueError names the file
    and the entry that is broken, of another shape or not finite.
    """
    values = []
    for entry in tqdm(_stream_json(path), desc=path.name, leave=False):
        place = f"{path}: entry {len(values)}"
        try:
            value = np.asarray(entry, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"{place} is not a list of numbers of shape {shape}") from None
        right_size = value.size == int(np.prod(shape))
        if not right_size or (shape and value.shape[-len(shape):] != shape):
            raise ValueError(f"{place} has shape {value.shape}, needs {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{place} is not finite")
        values.append(value.reshape(shape))
    if not values:
        raise ValueError(f"{path}: no entries")
    return np.stack(values)


def _stream_json(path, chunk=1 << 24):
    """The elements of a top-level JSON list, one at a time; ValueError names the file and the entry."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    entry = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise ValueError(f"{path}: not a JSON list")
        position = 1
        while True:
            position = between.match(text, position).end()
            if text.startswith("]", position):
                return
            try:
                value, end = decoder.raw_decode(text, position)
                whole = end < len(text)  # else a number may go on in the next chunk
            except RecursionError:
                raise ValueError(f"{path}: broken JSON at entry {entry}: nested too deeply") from None
            except json.JSONDecodeError as error:
                whole = False
                if error.pos < len(text) - 100:  # not merely cut by the end of the chunk
                    raise ValueError(f"{path}: broken JSON at entry {entry}") from None
            if whole:
                yield value
                entry += 1
                position = end
                continue
            more = file.read(chunk)
            if not more:
                raise ValueError(f"{path}: broken JSON at entry {entry}: is the file whole?")
            text = text[position:] + more
            position = 0


def _read_npz(path, names):
    """{name: array} of a .npz; arrays that would need pickle are refused."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in names}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # zipfile and numpy raise a dozen types
        raise ValueError(f"{path}: not a .npz with {', '.join(names)} ({type(error).__name__}: {error})"
                         ) from None


def read_yaml(path: Path) -> dict:
    """The part of YAML that DexYCB's files use, all scalars as text.

    Mappings nest by indentation; a list holds scalars, one a line or in brackets.
    """
    top = {}
    open_mappings = [(0, top)]  # (indentation, mapping), the innermost last
    mapping, key = top, None  # where the last key stands
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        text = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not text.strip() or text.startswith(("---", "%")):
            continue
        indentation = len(text) - len(text.lstrip())
        text = text.strip()
        pair = re.fullmatch(r"([^\[{]+?):(?:\s+(.*))?", text)
        if text.startswith("- ") and key is not None:
            mapping[key] = [*(mapping[key] or []), _yaml_scalar(text[2:])]
        elif pair:
            if indentation > open_mappings[-1][0] and key is not None:
                mapping[key] = {}
                open_mappings.append((indentation, mapping[key]))
            while indentation < open_mappings[-1][0]:
                open_mappings.pop()
            mapping = open_mappings[-1][1]
            key = _yaml_scalar(pair[1])
            mapping[key] = _yaml_value(pair[2])
        else:
            raise ValueError(f"{path}: line {number} is not the YAML that DexYCB's files are")
    return top


def _yaml_scalar(text):
    return text.strip().strip("\"'")


def _yaml_value(text):
    """None for nothing, a list for [a, b], else the scalar."""
    if not text:
        return text
    in_brackets = re.fullmatch(r"\[(.*)\]", text)
    if in_brackets:
        return [_yaml_scalar(part) for part in in_brackets[1].split(",")]
    return _yaml_scalar(text)


def _read_pickle(path):
    """A pickled dict of arrays, numbers and text, without running anything that the file names.

    Arrays of objects become None.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path}: broken pickle ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no dictionary")
    return {name: value.value if isinstance(value, _PickledArray) else value
            for name, value in content.items()}


class _Unpickler(pickle._Unpickler):
    """Knows numpy's arrays and numbers and nothing else that a pickle may name.

    It is pickle's own Python version, because that one allocates nothing ahead of what the file holds.
    """

    def find_class(self, module, name):
        known = {"_reconstruct": lambda *_: _PickledArray(), "ndarray": _PickledArray, "dtype": _PickledType,
                 "scalar": lambda kind, raw: np.frombuffer(_as_bytes(raw), kind.code)[0],
                 "encode": lambda text, _: _as_bytes(text)}
        modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs")
        if module not in modules or name not in known:
            raise ValueError(f"it names {module}.{name}, which no file of this data set does; nothing in it "
                             "was run")
        return known[name]


class _PickledArray:
    """Stands for a numpy array while a pickle is read."""

    value = None

    def __setstate__(self, state):
        _, shape, kind, fortran, raw = state
        if isinstance(kind, _PickledType) and re.fullmatch("[<>]?[biuf][1248]", kind.code):
            values = np.frombuffer(_as_bytes(raw), kind.code)
            self.value = values.reshape(shape, order="F" if fortran else "C")


class _PickledType:
    """Stands for a numpy dtype while a pickle is read: `code`, such as "f8" or ">f8"."""

    def __init__(self, code="", *_):
        self.code = code

    def __setstate__(self, state):
        if state[1] == ">":
            self.code = f">{self.code}"


def _as_bytes(raw):
    return raw.encode("latin1") if isinstance(raw, str) else raw
