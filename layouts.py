"""The labelled hand data sets that the field publishes, as they unpack from their downloads, to plain arrays.

  freihand      FreiHAND v2 (Zimmermann et al., ICCV 2019)
  ho3d          HO-3D v2 and v3 (Hampali et al., CVPR 2020)
  dexycb        DexYCB (Chao et al., CVPR 2021)
  assemblyhands AssemblyHands, the headset's cameras (Ohkawa et al., CVPR 2023)
  interhand     InterHand2.6M v1.0 (Moon et al., ECCV 2020)

Each takes (root, split, ...), of which `hands` makes meshes of MANO's numbers (prepare_data.py's class Hands; None: no meshes), and
returns (columns, meta, folder of the images, what was left out and why). Columns are those of an index (data.py): metres, the
camera's frame with x right, y down, z forward, pixel-centre 2-D points, pixel-edge boxes, FreiHAND's order of the joints, `side` 1 for
left hands, which stay as the image shows them, and NaN where a label is not known. meta: `box`, what it is drawn around; `frames`, how
many the official list has, in which `number` is a hand's place. Each ValueError names the file and, in a list, the entry. Files from
outside never run code. Imports nothing of ours.
"""

import contextlib
import json
import os
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

OPENGL = np.array([1.0, -1.0, -1.0])                               # HO-3D's frame has y up and hands at z < 0
FROM_MANO = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]   # 16 joints of MANO, then five tips
FROM_TIPS = [20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16]   # InterHand, AssemblyHands: tip first, wrist last
SPLITS = {"freihand": ("training", "evaluation", "train", "val"), "ho3d": ("train", "evaluation"), "dexycb": ("train", "val", "test"),
          "assemblyhands": ("train", "val", "test"), "interhand": ("train", "val", "test")}


def opened(root, name, split):
    """The folder; FileNotFoundError or ValueError where there is none or the set has no such split."""
    if split not in SPLITS[name]:
        raise ValueError(f"--split {split}: {name} has {', '.join(SPLITS[name])}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return Path(root)


# ------------------------------------------------------------------------------------------------------------- FreiHAND
def freihand(root, split, skip_missing=False):
    """training, evaluation, or train and val: the training set in two parts that share no pose. All hands right."""
    root = opened(root, "freihand", split)
    part = "evaluation" if split == "evaluation" else "training"
    labels = {name: read_labels(find(root, f"{part}_{name}.json"), shape)
              for name, shape in (("K", (3, 3)), ("xyz", (21, 3)), ("verts", (778, 3)), ("mano", (61,)), ("scale", ()))}
    count = len(labels["K"])
    for name, value in labels.items():
        if len(value) != count:
            raise ValueError(f"{find(root, f'{part}_{name}.json')}: {len(value)} entries, but {part}_K.json has {count}")
    apart = np.linalg.norm(labels["xyz"].mean(1) - labels["verts"].mean(1), axis=1)
    if apart.max() > 0.2:
        raise ValueError(f"{find(root, f'{part}_xyz.json')}: entry {int(np.argmax(apart))} lies {apart.max():.2f} m from its mesh in "
                         f"{part}_verts.json: both must be in metres")
    folder = find(root, f"{part}/rgb").parent.parent
    names = {entry.name for entry in tqdm(os.scandir(folder / part / "rgb"), desc="images", leave=False)}
    last = max((int(name[:-4]) for name in names if name[:-4].isdigit()), default=-1)
    versions = min(max(1, -(-(last + 1) // count)), 4)             # image i + count * k shows label i (T8)
    image = [f"{i:08d}.jpg" for i in range(count * versions)]
    present = np.array([name in names for name in image])
    if not present.any():
        raise FileNotFoundError(f"{folder / part / 'rgb'}: none of the images is there")
    if not present.all() and not skip_missing:
        raise ValueError(f"{folder / part / 'rgb' / image[int(np.argmin(present))]}: missing, as are {(~present).sum() - 1} others; "
                         "complete the download, or leave them out with --skip-missing")
    if split != "evaluation" and versions < 4:
        print(f"{folder / part / 'rgb'}: {versions} of the 4 pictures of each hand found")
    size = image_size(folder / part / "rgb" / image[int(np.argmax(present))])
    check_intrinsics(labels["K"], size, find(root, f"{part}_K.json"))
    label = np.tile(np.arange(count), versions)
    kept = present & freihand_part(label, split)
    if not kept.any():
        raise ValueError(f"--split {split}: no hands are left in it ({count} labels; val is every 20th)")
    columns = {"K": labels["K"], "joints": labels["xyz"], "joints2d": project(labels["xyz"], labels["K"]), "vertices": labels["verts"],
               "pose": labels["mano"][:, :48], "betas": labels["mano"][:, 48:58], "scale": labels["scale"]}
    columns = {name: value[np.unique(label[kept])] for name, value in columns.items()}
    label = np.unique(label[kept], return_inverse=True)[1]
    columns |= {"image": np.array([f"{part}/rgb/{name}" for name, keep in zip(image, kept, strict=True) if keep], dtype="S"),
                "label": label, "box": tight_boxes(columns["joints2d"])[label], "size": np.tile(np.int32(size), (len(label), 1))}
    if (folder / part / "mask").is_dir():                          # one for a label, not for each of its images
        masks = set(os.listdir(folder / part / "mask"))
        own = [f"{name:08d}.jpg" for name in np.tile(np.arange(count), versions)[kept]]
        columns["mask"] = np.array([f"{part}/mask/{name}" if name in masks else "" for name in own], dtype="S")
    meta = {"name": f"freihand-{split}", "joints": "freihand", "pose_mean": True, "protocol": "freihand",
            "box": "drawn around the labelled joints"}
    return columns, meta, folder, {"image missing": [str(folder / part / "rgb" / name) for name in np.array(image)[~present]]}


def freihand_part(label, split):
    """Rows of --split train or val: val is every 20th block of 100 poses, because neighbours in the list may show the same
    moment from two cameras (ours; FreiHAND has no official validation set)."""
    held_out = label // 100 % 20 == 19 if label.max() >= 1900 else label % 20 == 19
    return {"train": ~held_out, "val": held_out}.get(split, np.ones(len(label), bool))


def find(root, name):
    """The file or folder `name` of FreiHAND, in ROOT or in the folder that the evaluation labels unpack to."""
    places = [root, root / "FreiHAND_pub_v2", root / "FreiHAND_pub_v2_eval", root.parent / f"{root.name}_eval",
              root.parent / "FreiHAND_pub_v2_eval"]
    for place in places:
        if (place / name).exists():
            return place / name
    raise FileNotFoundError(f"{root / name}: not there (nor in FreiHAND_pub_v2_eval beside it): ROOT must be FreiHAND v2 as unpacked")


# --------------------------------------------------------------------------------------------------------------- HO-3D
def ho3d(root, split, hands=None, workers=0):
    """train or evaluation, as train.txt and evaluation.txt list the frames; v2 has .png, v3 .jpg images. All hands right.

    Labels are in OpenGL's frame, joints in MANO's order with tips; the 16 are kinematic (the layer's own). The evaluation frames hold the
    root joint alone; evaluation_xyz.json and evaluation_verts.json beside them, published in 2024, give the rest."""
    root = opened(root, "ho3d", split)
    listed = root / f"{split}.txt"
    frames = read_text(listed).split()
    wrong = next((k for k, name in enumerate(frames) if not re.fullmatch(r"[\w-]+/\d+", name)), None)
    if wrong is not None or not frames:
        raise ValueError(f"{listed}: line {(wrong or 0) + 1} is not SEQUENCE/FRAME")
    sequence, number = frames[0].split("/")
    ending = "png" if (root / split / sequence / "rgb" / f"{number}.png").exists() else "jpg"
    rows = in_parallel(partial(ho3d_frame, root / split, split), frames, workers, "frames")
    kept = np.array([row is not None for row in rows])
    if not kept.any():
        raise ValueError(f"{listed}: no frame has labels")
    dropped = {"frame without labels": [name for name, keep in zip(frames, kept, strict=True) if not keep]}
    columns = {name: np.stack([row[name] for row in rows if row is not None]) for name in next(row for row in rows if row is not None)}
    root_joint = columns.pop("root", None)
    version = "v2" if ending == "png" else "v3"
    meta = {"name": f"ho3d-{version}-{split}", "joints": "ho3d", "pose_mean": False, "protocol": "ho3d",
            "frames": len(frames), "box": "drawn around the labelled joints" if split == "train" else "the data set's own"}
    if split == "evaluation" and (root / "evaluation_xyz.json").exists():
        for name, file, shape in (("joints", "evaluation_xyz.json", (21, 3)), ("vertices", "evaluation_verts.json", (778, 3))):
            value = read_labels(root / file, shape)
            if len(value) != len(frames):
                raise ValueError(f"{root / file}: {len(value)} entries, but {listed.name} has {len(frames)}")
            columns[name] = value[kept] * OPENGL
        apart = np.abs(columns["joints"][:, 0] - root_joint).max(1)
        if apart.max() > 1e-3:                                     # T14: the two files must be in one order
            raise ValueError(f"{root / 'evaluation_xyz.json'}: entry {int(np.flatnonzero(kept)[np.argmax(apart)])} is not the hand of "
                             f"{frames[int(np.flatnonzero(kept)[np.argmax(apart)])]}: its wrist lies {apart.max():.3f} m away")
        columns["joints"] = columns["joints"][:, FROM_MANO]
        meta |= settle(columns["joints"], columns["vertices"], None if hands is None else hands.arrays[0]["J_regressor"])
    if "joints" in columns:
        columns["joints2d"] = project(columns["joints"], columns["K"])
    if split == "train":
        columns["box"] = tight_boxes(columns["joints2d"])
        if hands is not None:
            columns["vertices"] = hands.vertices(*(columns[name] for name in ("pose", "betas", "trans"))) * OPENGL
        columns["pose"] = turned(columns["pose"], Rotation.from_rotvec([np.pi, 0, 0]))       # diag(1,-1,-1)
        del columns["trans"]
    names = [name for name, keep in zip(frames, kept, strict=True) if keep]
    images = [f"{split}/{name.replace('/', '/rgb/')}.{ending}" for name in names]
    size = check_images(root, images)
    check_intrinsics(columns["K"], size, listed)
    masks = {path.relative_to(root).as_posix() for path in root.glob(f"{split}/*/seg/*.png")}
    if masks:                                                      # v3: the training sequences'
        own = [f"{split}/{name.replace('/', '/seg/')}.png" for name in names]
        columns["mask"] = np.array([name if name in masks else "" for name in own], dtype="S")
    columns |= {"image": np.array(images, dtype="S"), "size": np.tile(np.int32(size), (len(images), 1)), "number": np.flatnonzero(kept),
                "video": np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]}
    return columns, meta, root, dropped


def settle(joints, vertices, regressor=None):
    """Which definition the joints (N,21,3) of meshes (N,778,3) follow, as an index' meta: {"joints": "kinematic" or "regressed" and five
    vertices, "found": the evidence}. A tip is the vertex nearest in most hands; the other joints are the regressor's (16,778) where they
    lie on it, else the layer's own, and without one taken for the layer's own, as in training."""
    tips, far = [], []
    for joint in (4, 8, 12, 16, 20):
        nearest = [int(np.argmin(((mesh - hand[joint]) ** 2).sum(1))) for mesh, hand in zip(vertices, joints, strict=True)]
        tips.append(int(np.bincount(nearest).argmax()))
        far.append(np.linalg.norm(vertices[:, tips[-1]] - joints[:, joint], axis=1).mean())
    how, found = "kinematic", "the other 16 taken for the layer's own; --mano tells whether they are"
    if regressor is not None:
        order = [0, *(4 * finger + k for finger in (1, 2, 4, 3, 0) for k in (1, 2, 3))]      # of FreiHAND's joints, MANO's 16
        apart = np.linalg.norm(np.einsum("jv,nvi->nji", regressor, vertices) - joints[:, order], axis=2).mean()
        how = "regressed" if apart < 1e-4 else "kinematic"
        found = f"the other 16 are {1000 * apart:.3f} mm from the mesh's regressed ones: {how}"
    near = ", ".join(f"{tip} ({1000 * away:.3f} mm)" for tip, away in zip(tips, far, strict=True))
    return {"joints": " ".join([how, *map(str, tips)]), "found": f"tips are vertices {near}; {found}"}


def ho3d_frame(folder, split, name):
    """Labels of one frame in our frame and units, or None where it has none."""
    path = folder / name.replace("/", "/meta/")
    path = path.with_name(path.name + ".pkl")
    content = read_pickle(path)
    if content.get("camMat") is None or content.get("handJoints3D") is None:
        return None
    row = {"K": numbers(content, "camMat", (3, 3), path)}
    if split == "evaluation":
        row["root"] = numbers(content, "handJoints3D", (3,), path) * OPENGL
        return row | {"box": numbers(content, "handBoundingBox", (4,), path) + 0.5}
    if content.get("handPose") is None:
        return None
    return row | {"joints": (numbers(content, "handJoints3D", (21, 3), path) * OPENGL)[FROM_MANO],
                  "pose": numbers(content, "handPose", (48,), path), "betas": numbers(content, "handBeta", (10,), path),
                  "trans": numbers(content, "handTrans", (3,), path)}


# -------------------------------------------------------------------------------------------------------------- DexYCB
SERIALS = 8


def dexycb(root, split, setup="s0", hands=None, workers=0):
    """train, val or test of the setups s0 to s3 (unseen nothing, subjects, views, objects). `number` counts the frames of the split, those
    without a hand included, as the official result files do: subject, sequence, camera, frame.

    Joints are the layer's own with manopth's tips. The poses are PCA coefficients about the mean, so pose and mesh need `hands`; labels of
    left hands were made with MANO's left model as shipped, whose shapes are not the right model's: their betas are left out."""
    root = opened(root, "dexycb", split)
    subjects = sorted(path for path in root.iterdir() if re.fullmatch(r"\d{8}-subject-\d+", path.name))
    if not subjects:
        raise FileNotFoundError(f"{root}: no folders DATE-subject-NN: ROOT must be DexYCB as unpacked")
    jobs = []
    for subject in subjects:
        s, sequences = int(subject.name[-2:]) - 1, sorted(path for path in subject.iterdir() if path.is_dir())
        if len(sequences) != 100:
            print(f"warning: {subject} has {len(sequences)} sequences, not 100: which part one belongs to is counted by its place")
        for q, sequence in enumerate(sequences):
            cameras = [c for c in range(SERIALS) if dexycb_part(setup, s, c, q) == split]
            if cameras:
                jobs.append((sequence, cameras))
    if not jobs:
        raise ValueError(f"--setup {setup} --split {split}: none of its sequences is below {root}")
    parts = in_parallel(partial(dexycb_sequence, root), jobs, workers, "sequences")
    starts = np.cumsum([0] + [part["frames"] for part in parts])
    for video, part in enumerate(parts):
        part["number"] += starts[video]
        part["video"] = np.full(len(part["number"]), video)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in ("frames", "empty")}
    if not len(columns["number"]):
        raise ValueError(f"--split {split}: no frame shows a hand")
    left, coefficients = columns["side"] == 1, columns.pop("coefficients")
    if hands is not None:
        columns["pose"] = np.concatenate([coefficients[:, :3], hands.angles(coefficients[:, 3:48], left)], 1)
        columns["vertices"] = hands.vertices(columns["pose"], columns["betas"], coefficients[:, 48:], left)
        columns["betas"] = np.where(left[:, None], np.nan, columns["betas"])
    else:
        del columns["betas"]
    columns["joints2d"] = project(columns["joints"], columns["K"])
    columns["box"] = tight_boxes(columns["joints2d"])
    check_intrinsics(columns["K"], (640, 480), root / "calibration" / "intrinsics")
    columns["size"] = np.tile(np.int32([640, 480]), (len(left), 1))
    check_images(root, [os.fsdecode(name) for name in columns["image"]])
    columns["mask"] = np.array([re.sub(rb"color_(\d+)\.jpg$", rb"labels_\1.npz", name) for name in columns["image"]])
    meta = {"name": f"dexycb-{setup}-{split}", "joints": "manopth", "pose_mean": False, "protocol": "dexycb", "partial": True,
            "frames": int(starts[-1]), "box": "drawn around the labelled joints"}
    return columns, meta, root, {"frame without a hand": [name for part in parts for name in part["empty"]]}


def dexycb_part(setup, subject, camera, sequence):
    """train, val or test, to which a camera of a sequence belongs; subjects by their number less 1, the others in sorted order
    (NVlabs/dex-ycb-toolkit dex_ycb.py)."""
    if setup == "s0":
        return "train" if sequence % 5 != 4 else "val" if subject < 2 else "test"
    if setup == "s1":
        return "val" if subject == 6 else "test" if subject in (7, 8) else "train"
    if setup == "s2":
        return {6: "val", 7: "test"}.get(camera, "train")
    return "val" if sequence // 5 in (3, 19) else "test" if sequence // 5 in (7, 11, 15) else "train"


def dexycb_sequence(root, job):
    """Columns of the frames with a hand of some cameras of a sequence, the number of all `frames`, and those that are `empty`."""
    sequence, cameras = job
    meta = read_yaml(sequence / "meta.yml")
    try:
        serials, count, side, calibration = sorted(meta["serials"]), int(meta["num_frames"]), meta["mano_sides"][0], meta["mano_calib"][0]
        known = side in ("right", "left") and len(serials) == SERIALS
    except (KeyError, IndexError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{sequence / 'meta.yml'}: needs {SERIALS} serials, num_frames, mano_sides right or left, mano_calib")
    path = root / "calibration" / f"mano_{calibration}" / "mano.yml"
    betas, rows, empty = numbers(read_yaml(path), "betas", (10,), path), [], []
    for turn, camera in enumerate(cameras):
        serial = serials[camera]
        path = root / "calibration" / "intrinsics" / f"{serial}_640x480.yml"
        lens = read_yaml(path).get("color")
        fx, fy, x, y = (float(numbers(lens, name, (), path)) for name in ("fx", "fy", "ppx", "ppy"))
        for frame in range(count):
            path = sequence / serial / f"labels_{frame:06d}.npz"
            content = read_npz(path, ("joint_3d", "pose_m"))
            joints, pose = numbers(content, "joint_3d", (1, 21, 3), path)[0], numbers(content, "pose_m", (1, 51), path)[0]
            image = (sequence / serial / f"color_{frame:06d}.jpg").relative_to(root).as_posix()
            if (joints == -1).all():                               # T15: no hand
                empty.append(image)
                continue
            rows.append({"image": os.fsencode(image), "joints": joints, "coefficients": pose, "number": turn * count + frame,
                         "K": [[fx, 0, x], [0, fy, y], [0, 0, 1]], "betas": betas, "side": side == "left"})
    shapes = {"image": (), "joints": (21, 3), "coefficients": (51,), "number": (), "K": (3, 3), "betas": (10,), "side": ()}
    columns = {name: np.array([row[name] for row in rows]) if rows else np.zeros((0, *shape), "S1" if name == "image" else int if
               name in ("number", "side") else float) for name, shape in shapes.items()}
    return columns | {"frames": count * len(cameras), "empty": empty}


# ------------------------------------------------------------------------------------- AssemblyHands and InterHand2.6M
def assemblyhands(root, split):
    """train, val or test of the headset's cameras: a row for each hand with a box. Joints are annotated, not MANO's: NaN where nothing is
    known; `visible` holds the annotation's own flags, by which the official metric counts joints (the wrist is subtracted whatever its
    flag, T24). The test's poses may be missing: its hands then have boxes alone. meta holds `sequences`, all frames of the file."""
    root = opened(root, "assemblyhands", split)
    folder = root / "annotations" / split
    path, lens_path = (one_file(folder, f"assemblyhands_{split}_{name}*.json") for name in ("ego_data", "ego_calib"))
    content, calibration, poses, pose_path = read_json(path), read_json(lens_path), {"annotations": {}}, None
    pose_pattern = f"assemblyhands_{split}_joint_3d*.json"
    if split != "test" or without_templates(folder, pose_pattern):
        pose_path = one_file(folder, pose_pattern)
        poses = read_json(pose_path)
    images, annotations = entries(content, path)
    rows, sequences = [], {}
    for entry, hand in enumerate(tqdm(annotations, desc="hands", leave=False)):
        with named(path, entry):
            image = images[hand["image_id"]]
            sequence, frame = image["seq_name"], f"{int(image['frame_idx']):06d}"
            camera = image["camera"].removesuffix("_mono10bit") + "_mono10bit"
            sequences.setdefault(sequence, set()).add(frame)
            with named(lens_path, f"{sequence} {frame}"):
                K = numbers(calibration["calibration"][sequence]["intrinsics"], camera, (3, 3), lens_path)
                outside = numbers(calibration["calibration"][sequence]["extrinsics"][frame], camera, (3, 4), lens_path)
            with named(pose_path, f"{sequence} {frame}"):
                pose = poses["annotations"].get(sequence, {}).get(frame)
                world = np.zeros((42, 3)) if pose is None else numbers(pose, "world_coord", (42, 3), pose_path)
                known = np.zeros(42, bool) if pose is None else numbers(pose, "joint_valid", (42,), pose_path) > 0
            seen = numbers(hand, "joint_valid", (42,), path) > 0 if "joint_valid" in hand else known
            known = (known | seen | np.isin(np.arange(42), (20, 41))) & world.any(1)          # zeros stand for nothing
            points = np.where(known[:, None], (world @ outside[:, :3].T + outside[:, 3]) / 1000, np.nan)      # T20: R X + t
            for side, name in enumerate(("right", "left")):
                if hand["bbox"].get(name) is not None:
                    own = 21 * side + np.array(FROM_TIPS)
                    rows.append({"image": os.fsencode(image["file_name"]), "size": sizes(image), "K": K, "joints": points[own],
                                 "visible": seen[own], "extrinsics": np.c_[outside[:, :3], outside[:, 3] / 1000],
                                 "box": numbers(hand["bbox"], name, (4,), path) + 0.5, "side": side, "video": sequence})
    meta = {"name": f"assemblyhands-{split}", "joints": "assemblyhands", "protocol": "assemblyhands", "box": "the data set's own",
            "sequences": {name: sorted(frames) for name, frames in sorted(sequences.items())}}
    return annotated(rows, root / "images", path, {}, meta)


def interhand(root, split, hands=None):
    """train, val or test: a row for each hand that is there. Joints are annotated, NaN where a joint or its hand's wrist is invalid. With
    `hands` the meshes of MANO_NeuralAnnot, where there are any, whose left hands were made with the corrected left model."""
    root = opened(root, "interhand", split)
    folder = root / "annotations" / split
    path, lens_path, pose_path, fit_path = (folder / f"InterHand2.6M_{split}_{name}.json" for name in
                                            ("data", "camera", "joint_3d", "MANO_NeuralAnnot"))
    content, cameras, poses = map(read_json, (path, lens_path, pose_path))
    fitted = read_json(fit_path) if hands is not None and fit_path.exists() else {}
    images, annotations = entries(content, path)
    rows, empty = [], []
    for entry, hand in enumerate(tqdm(annotations, desc="hands", leave=False)):
        with named(path, entry):
            image = images[hand["image_id"]]
            capture, camera, frame = str(image["capture"]), str(image["camera"]), str(image["frame_idx"])
            valid = numbers(hand, "joint_valid", (42, 1), path)[:, 0] > 0
            x, y, width, height = numbers(hand, "bbox", (4,), path)
            if hand["hand_type"] not in ("right", "left", "interacting"):
                raise ValueError(f"{path}: hand_type {hand['hand_type']!r}")
            with named(lens_path, f"capture {capture}"):
                lens = cameras[capture]
                turn, place = numbers(lens["camrot"], camera, (3, 3), lens_path), numbers(lens["campos"], camera, (3,), lens_path)
                focal, centre = numbers(lens["focal"], camera, (2,), lens_path), numbers(lens["princpt"], camera, (2,), lens_path)
            with named(pose_path, f"capture {capture} frame {frame}"):
                world = numbers(poses[capture][frame], "world_coord", (42, 3), pose_path)
            points = (world - place) @ turn.T / 1000                                         # T20: R (X - c)
            for side, name in enumerate(("right", "left")):
                if hand["hand_type"] not in (name, "interacting"):
                    continue
                own = valid[21 * side:21 * side + 21]
                if not own[20]:                                    # T24
                    empty.append(f"{image['file_name']} {name}")
                    continue
                row = {"image": os.fsencode(f"{split}/{image['file_name']}"), "size": sizes(image), "side": side,
                       "K": [[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1]], "turn": turn, "place": place / 1000,
                       "joints": np.where(own[:, None], points[21 * side:21 * side + 21], np.nan)[FROM_TIPS],
                       "box": np.array([x, y, x + width, y + height]) + 0.5, "own_box": hand["hand_type"] != "interacting",
                       "video": f"{capture}/{image['seq_name']}"}
                if fitted:
                    with named(fit_path, f"capture {capture} frame {frame}"):
                        fit = ((fitted.get(capture) or {}).get(frame) or {}).get(name)
                        row |= {key: np.full(size, np.nan) if fit is None else numbers(fit, word, (size,), fit_path)
                                for key, word, size in (("pose", "pose", 48), ("betas", "shape", 10), ("trans", "trans", 3))}
                rows.append(row)
    outside = {name: np.array([row.pop(name) for row in rows]) for name in ("turn", "place", "pose", "betas", "trans")
               if rows and name in rows[0]}
    columns, *rest = annotated(rows, root / "images", path, {"hand without a valid wrist": empty},
                               {"name": f"interhand-{split}", "joints": "interhand", "protocol": "assemblyhands",
                                "box": "the data set's own, of interacting hands drawn around the labelled joints"})
    if fitted:
        columns |= interhand_meshes(hands, columns["side"] == 1, **outside)
    return columns, *rest


def interhand_meshes(hands, left, turn, place, pose, betas, trans):
    """vertices, pose and betas as the camera [turn | place] sees fits (N,...) in the world, NaN where there is none; 1,024 at a time."""
    vertices, there = np.full((len(left), 778, 3), np.nan, np.float32), np.isfinite(pose).all(1)
    pose[:, 3:] += hands.mean(left)
    for rows in np.array_split(np.flatnonzero(there), max(1, there.sum() // 1024)):
        meshes = hands.vertices(pose[rows], betas[rows], trans[rows], left[rows], repair=True)
        vertices[rows] = np.einsum("nij,nvj->nvi", turn[rows], meshes - place[rows, None])
    pose[there] = turned(pose[there], Rotation.from_matrix(turn[there]))
    return {"pose": pose, "betas": betas, "vertices": vertices}


def entries(content, path):
    """({id: image}, annotations) of a COCO-like file."""
    with named(path, "top"):
        return {image["id"]: image for image in content["images"]}, list(content["annotations"])


@contextlib.contextmanager
def named(path, entry):
    """Whatever is wrong inside becomes a ValueError with the file and the entry; one that names its file keeps it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        place = f"annotation {entry}" if isinstance(entry, int) else entry
        if ".json: " in str(error):
            raise ValueError(f"{error}" if "(entry " in str(error) else f"{error} (entry {place})") from None
        raise ValueError(f"{path}: not as published ({type(error).__name__}: {error}) (entry {place})") from None


def sizes(image):
    """(width, height) of an image's entry."""
    return int(image["width"]), int(image["height"])


def annotated(rows, folder, path, dropped, meta):
    """Columns of rows with image, size, K, joints, box, side and video; `own_box` False: around the joints, if they span one."""
    if not rows:
        raise ValueError(f"{path}: no annotated hand")
    names = {"image", "size", "K", "joints", "side", "visible", "extrinsics", "box"} & set(rows[0])
    columns = {name: np.array([row[name] for row in rows]) for name in sorted(names)}
    columns["joints2d"] = project(columns["joints"], columns["K"])
    known = np.isfinite(columns["joints2d"]).all(2)
    columns["visible"] = known & columns.get("visible", True)
    around = tight_boxes(columns["joints2d"])
    drawn = np.array([not row.get("own_box", True) for row in rows]) & (around[:, 2:] - around[:, :2] >= 1).all(1)
    columns["box"] = np.where(drawn[:, None], around, columns["box"])
    columns["video"] = np.unique([row["video"] for row in rows], return_inverse=True)[1]
    check_images(folder, [os.fsdecode(name) for name in columns["image"]])
    return columns, meta | {"pose_mean": False, "partial": True}, folder, dropped


# --------------------------------------------------------------------------------------------------------------- shared
def project(points, K):
    """(N,P,3) metres -> (N,P,2) pixel-centre coordinates; NaN behind the camera."""
    image = points @ K.transpose(0, 2, 1)
    return np.where(image[..., 2:] > 0, image[..., :2] / np.where(image[..., 2:] > 0, image[..., 2:], 1), np.nan)


def tight_boxes(joints2d):
    """(N,4) boxes in pixel-edge coordinates around (N,21,2) joints, of which some may be NaN; without any of size 0."""
    known = np.isfinite(joints2d).all(2, keepdims=True)
    low, high = (np.where(known, joints2d, far) for far in (np.inf, -np.inf))
    return np.where(known.any(1), np.concatenate([low.min(1), high.max(1)], axis=1) + 0.5, 0)


def turned(pose, by):
    """Poses (N,48) whose global rotation is followed by `by`, a Rotation."""
    return np.concatenate([(by * Rotation.from_rotvec(pose[:, :3])).as_rotvec(), pose[:, 3:]], 1)


def image_size(path):
    """(width, height) without decoding."""
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:                                     # Pillow raises a dozen types on damaged files
        raise ValueError(f"{path}: not a readable image ({error})") from None


def check_images(folder, names):
    """Size of the first; FileNotFoundError names the first of `names` below `folder` that is not there. One look at each folder."""
    there = {}
    for name in names:
        parent, own = os.path.split(name)
        if parent not in there:
            there[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        if own not in there[parent]:
            raise FileNotFoundError(f"{folder / name}: missing; unpack the whole download")
    return image_size(folder / names[0])


def check_intrinsics(K, size, path):
    """ValueError that names the entry where K is no pinhole camera for an image of this (width, height)."""
    focal, centre = K[:, [0, 1], [0, 1]], K[:, :2, 2]
    wrong = (focal < 0.1 * np.array(size)) | (focal > 50 * np.array(size)) | (centre < -np.array(size)) | (centre > 2 * np.array(size))
    wrong = wrong.any(1) | (np.abs(K[:, 2] - [0, 0, 1]).max(1) > 1e-6)
    if wrong.any():
        raise ValueError(f"{path}: entry {int(np.argmax(wrong))} is no camera for an image of {size[0]} x {size[1]} pixels")


def numbers(mapping, name, shape, path):
    """mapping[name] as float64 of the shape; ValueError that names the file where it is missing, of another size or not finite."""
    try:
        value = np.asarray(mapping[name], np.float64)
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{path}: {name} is missing or not numbers of shape {shape}") from None
    if value.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {name} has shape {value.shape}, needs {shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: {name} is not finite")
    return value.reshape(shape)


def in_parallel(function, items, workers, name):
    """[function(item)] by `workers` processes (0: one a core), in order, with a bar."""
    workers = min(workers or os.cpu_count(), max(1, len(items) // 64))
    if workers == 1:
        return [function(item) for item in tqdm(items, desc=name, leave=False)]
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(function, items, chunksize=16), total=len(items), desc=name, leave=False))


def without_templates(folder, pattern):
    """The files that a challenge does not give to be filled in."""
    return sorted(file for file in folder.glob(pattern) if "template" not in file.name)


def one_file(folder, pattern):
    files = without_templates(folder, pattern)
    if len(files) != 1:
        raise FileNotFoundError(f"{folder / pattern}: {len(files)} such files instead of one; ROOT must hold annotations/ and images/ "
                                "as unpacked")
    return files[0]


# ---------------------------------------------------------------------------------------------------------------- files
def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text") from None


def read_json(path):
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None


def read_npz(path, names):
    """{name: array} of a .npz; arrays that would need pickle are refused."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in names}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:                                     # zipfile and numpy raise a dozen types
        raise ValueError(f"{path}: not a .npz with {', '.join(names)} ({type(error).__name__}: {error})") from None


def read_yaml(path):
    """The part of YAML that DexYCB's files use: mappings nested by indentation, and lists of scalars, which stay text."""
    def scalar(text):
        return text.strip().strip("\"'")
    stack, pending = [(0, {})], None
    for number, line in enumerate(read_text(path).splitlines()):
        text = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not text.strip() or text.startswith(("---", "%")):
            continue
        indent, text = len(text) - len(text.lstrip()), text.strip()
        pair = re.fullmatch(r"([^\[{]+?):(?:\s+(.*))?", text)
        if text.startswith("- ") and pending:
            mapping, key = pending
            mapping[key] = [*(mapping[key] or []), scalar(text[2:])]
        elif pair:
            if indent > stack[-1][0] and pending:
                stack.append((indent, {}))
                pending[0][pending[1]] = stack[-1][1]
            while indent < stack[-1][0]:
                stack.pop()
            key, value = scalar(pair[1]), pair[2]
            flow = re.fullmatch(r"\[(.*)\]", value or "")
            stack[-1][1][key] = list(map(scalar, flow[1].split(","))) if flow else value and scalar(value)
            pending = stack[-1][1], key
        else:
            raise ValueError(f"{path}: line {number + 1} is not the YAML that DexYCB's files are")
    return stack[0][1]


class _Array:
    """Stands for a numpy array while a pickle is read: nothing is allocated that the file does not hold."""
    value = None

    def __setstate__(self, state):
        _, shape, kind, fortran, raw = state
        if isinstance(kind, _Type) and re.fullmatch("[biuf][1248]", kind.code):
            raw = raw.encode("latin1") if isinstance(raw, str) else raw
            self.value = np.frombuffer(raw, kind.code).reshape(shape, order="F" if fortran else "C")


class _Type:
    def __init__(self, code="", *_):
        self.code = code

    def __setstate__(self, state):
        if state[1] == ">":
            self.code = f">{self.code}"


class _Unpickler(pickle._Unpickler):
    """pickle's own Python version, which allocates nothing ahead; of the names in a file it knows numpy's arrays and numbers."""

    def find_class(self, module, name):
        known = {"_reconstruct": lambda *_: _Array(), "ndarray": _Array, "dtype": _Type,
                 "scalar": lambda kind, raw: np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, kind.code)[0],
                 "encode": lambda text, _: text.encode("latin1")}
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs") or name not in known:
            raise ValueError(f"it names {module}.{name}, which no file of this data set does; nothing of it was run")
        return known[name]


def read_pickle(path):
    """A pickled dictionary of arrays, numbers and text; arrays of other kinds become None. Runs nothing that the file names."""
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:                                     # a damaged pickle raises anything
        raise ValueError(f"{path}: broken pickle ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no dictionary")
    return {name: value.value if isinstance(value, _Array) else value for name, value in content.items()}


def read_labels(path, shape):
    """A JSON list of equal nested lists -> (N, *shape) float64, read entry by entry: training_verts.json takes gigabytes as
    Python floats. ValueError names the file and the entry that is broken, of another shape or not finite."""
    entries = []
    for value in tqdm(stream_json(path), desc=path.name, leave=False):
        try:
            entry = np.asarray(value, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"{path}: entry {len(entries)} is not a list of numbers of shape {shape}") from None
        if entry.size != int(np.prod(shape)) or entry.shape[-len(shape):] != shape and shape:
            raise ValueError(f"{path}: entry {len(entries)} has shape {entry.shape}, needs {shape}")
        if not np.isfinite(entry).all():
            raise ValueError(f"{path}: entry {len(entries)} is not finite")
        entries.append(entry.reshape(shape))
    if not entries:
        raise ValueError(f"{path}: no entries")
    return np.stack(entries)


def stream_json(path, chunk=1 << 24):
    """The elements of a top-level JSON list, one at a time; ValueError names the file and the broken entry."""
    decoder, between, count = json.JSONDecoder(), re.compile(r"[\s,]*"), 0
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise ValueError(f"{path}: not a JSON list")
        at = 1
        while True:
            at = between.match(text, at).end()
            if text.startswith("]", at):
                return
            try:
                value, end = decoder.raw_decode(text, at)
                whole = end < len(text)                            # otherwise a number may go on in the next chunk
            except RecursionError:
                raise ValueError(f"{path}: broken JSON at entry {count}: nested too deeply") from None
            except json.JSONDecodeError as error:
                whole = False
                if error.pos < len(text) - 100:                    # not merely cut by the end of the chunk
                    raise ValueError(f"{path}: broken JSON at entry {count}") from None
            if whole:
                yield value
                count, at = count + 1, end
                continue
            more = file.read(chunk)
            if not more:
                raise ValueError(f"{path}: broken JSON at entry {count}: is the file whole?")
            text, at = text[at:] + more, 0
