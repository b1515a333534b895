"""What an encoder knows of hands before any fine-tuning: probes of its frozen features, in a minute or two.

    probe.py ENCODER --data INDEX [--train INDEX] --out DIR     poses, where hands have joints or keypoints
    probe.py ENCODER --data FOLDER --out DIR                    classes, the sub-folders of FOLDER

Features are the class token, the mean of the patches (of a ResNet the pooled map twice) and both together, of
an upright view of each hand. For comparison: the same network untrained, the view's raw pixels (16 x 16), and
its edges (HOG in 8 x 8 cells), which no network learned.

Poses: ridge regression and the nearest neighbour (probing.probe_pose), fitted on the hands of --train, else
on half of the videos of --data. Where there are no joints, but joints2d or a detector's keypoints, 2-D points
take their place (probing.probe_points). Classes: leave-one-out k-NN accuracy, also for an index without any,
whose images lie in several folders.

Prints a table and writes DIR/metrics.json. A run that fails writes nothing.
"""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (CONTEXT, HandDataset, HandIndex, canvas_size, counts_text, has_points, image_size,
                  index_fingerprint, list_images, make_loader, pose_labels, refuse_unread, whole_box,
                  write_index)
from mano import mean_hand, read_mano
from masking import whole_hog
from metrics import procrustes
from model import build_encoder, load_encoder
from probing import (LEAST_HANDS, PROBE_HANDS, PROBE_WINDOW, align_2d, encode, hand_groups, leave_one_out,
                     mean_distance_mm, mean_shape, probe_points, probe_pose, split_groups, spread_rows)
from runtime import add_device_flags, add_weights_flags, check_ranges, parser, run, setup
from saving import check_writable, read_json, staged_folder, text_table
from synthetic_hand import synthetic_mano
from views import centre_theta, normalise, warp

NEIGHBOURS = 10
RAW = {  # views (B,3,S,S) in [0,1] -> features that nobody learned
    "pixels": lambda views: F.interpolate(views, 16, mode="area").flatten(1),  # (B, 768)
    "hog": lambda views: whole_hog(normalise(views)).flatten(1)}  # (B, 512)


# ------------------------------------------------------------------------------------------------------- data
def _open_data(path, folder):
    """The index at `path`, or one of the class folders at `path`, which is written to `folder`."""
    if (Path(path) / "index.json").is_file():
        return HandIndex(path)
    return _index_class_folders(path, folder)


def _index_class_folders(path, folder):
    """An index of the images in the sub-folders of `path`, written to `folder`. Each image is one hand."""
    left_out = Counter()
    images = list_images(path, left_out=left_out) if Path(path).is_dir() else []
    if len({image.parent for image in images}) < 2:
        raise ValueError(f"--data {path}: neither an index nor a folder of class sub-folders with images")
    columns = {"image": np.array([os.fsencode(image.relative_to(path)) for image in images]),
               "box": [whole_box(image_size(image), PROBE_WINDOW) for image in images]}
    if counts_text(left_out):
        print(f"{path}: not taken: {counts_text(left_out)}")
    index_path = Path(folder) / "index"
    write_index(index_path, columns, {"name": Path(path).name}, root=Path(path).resolve())
    return HandIndex(index_path)


def _open_train(path, index, labels):
    """The index of --train; ValueError where a probe that is fitted on it cannot be tested on `index`."""
    train = HandIndex(path)
    if not set(labels) <= set(train.columns):
        raise ValueError(f"--train {path}: no labels {' and '.join(f'`{name}`' for name in labels)}")
    definitions = {hands.meta.get("joints", "freihand") for hands in (train, index)}
    first = [hands.image_path(0).resolve() for hands in (train, index)]
    # The same hands in another folder, such as a packed index.
    fingerprints = [index_fingerprint([hands.columns], labels[-1]) for hands in (train, index)]
    if first[0] == first[1] or fingerprints[0] == fingerprints[1] or len(definitions) > 1:
        raise ValueError(f"--train {path}: the hands of --data themselves, or joints of another definition")
    return train


# --------------------------------------------------------------------------------------------------- features
def make_networks(path, size):
    """The encoder in a file, and the same network with random weights."""
    encoder = load_encoder(path, size)
    torch.manual_seed(0)
    return {"probe": encoder, "untrained": build_encoder(encoder.arch, **encoder.config).eval()}


def read_features(networks, index, rows, labels, args, runtime):
    """Features and labels (probing.encode) of some rows of the index, and how many images could not be read.

    Without labels no image may be missing: ValueError names the first that cannot be read."""
    size = networks["probe"].config["image_size"]
    dataset = HandDataset([index], canvas_size(size), CONTEXT, labels, rows, substitute=False)
    loader = make_loader(dataset, batch_size=args.batch_size, workers=runtime.workers)
    unread = []

    def readable_batches():
        for batch in tqdm(loader, desc="features"):
            readable = batch["failed"] < 0
            unread.extend(batch["failed"][~readable].tolist())
            if unread and (not labels or len(unread) == len(rows)):
                refuse_unread(index, unread[0])
            if readable.any():
                yield {name: value[readable] for name, value in batch.items()}

    def make_views(batch):
        theta = centre_theta(len(batch["canvas"]), PROBE_WINDOW / CONTEXT).to(runtime.device)
        return warp(batch["canvas"].to(runtime.device), theta, size)

    def encoder_of(network):
        network = network.to(runtime.device)

        def encoder(views):
            with runtime.autocast():
                return network.features(normalise(views))

        return encoder

    encoders = {name: encoder_of(network) for name, network in networks.items()}
    features, found = encode(encoders, readable_batches(), make_views, labels, RAW)
    return features, found, len(unread)


# ----------------------------------------------------------------------------------------------------- probes
def probe_poses(networks, index, labels, args, runtime):
    """probe_pose, or without joints probe_points, of every feature, and facts: how many hands, and what the
    mean hand scores."""
    if args.train:
        train = _open_train(args.train, index, labels)
        train_rows = np.arange(len(train))
        test_rows = np.arange(len(index))
    else:
        train = index
        train_rows, test_rows = split_groups(hand_groups(index.pose_ids(), index.columns.get("video")))
    train_rows, test_rows = (spread_rows(rows[has_points(hands, *labels)[rows]], PROBE_HANDS)
                             for hands, rows in ((train, train_rows), (index, test_rows)))
    _refuse_few(train_rows, test_rows)
    train_x, known, train_unread = read_features(networks, train, train_rows, labels, args, runtime)
    test_x, test_known, test_unread = read_features(networks, index, test_rows, labels, args, runtime)
    fit, test = ([found[name] for name in labels] for found in (known, test_known))
    _refuse_few(fit[0], test[0])  # some images could not be read

    facts = {"count": len(test[0]), "train_count": len(fit[0]), "unread": train_unread + test_unread}
    if "joints" in labels:
        arrays = read_mano(args.mano) if args.mano else synthetic_mano()
        mean_joints = mean_hand(arrays, index.meta.get("joints", "freihand"))[0][0]  # (21, 3)
        table = {key: probe_pose(train_x[key], *fit, test_x[key], *test, mean_joints, align=procrustes)
                 for key in test_x}
        guess = procrustes(np.broadcast_to(mean_joints, test[0].shape), test[0])
        facts["mean_hand_pa_mpjpe_mm"] = mean_distance_mm(guess, test[0])
    else:
        table = {key: probe_points(train_x[key], *fit, test_x[key], *test) for key in test_x}
        guess = align_2d(np.broadcast_to(mean_shape(fit[0], align_2d), test[0].shape), test[0])
        facts["mean_hand_pa_2d_percent"] = 100 * float(np.linalg.norm(guess - test[0], axis=-1).mean())
    return table, facts


def _refuse_few(fitted, tested):
    """ValueError where there are too few hands to fit on or to test on."""
    if min(len(fitted), len(tested)) < LEAST_HANDS:
        raise ValueError(f"{len(fitted)} hands to fit the probe on and {len(tested)} to test it on: "
                         f"at least {LEAST_HANDS} are needed")


def probe_classes(networks, index, args, runtime):
    """Leave-one-out k-NN accuracy of every feature, and facts; a class is the folder of an image."""
    classes = np.array([str(index.image_path(row).parent) for row in range(len(index))])
    names = np.unique(classes)
    if len(names) < 2:
        raise ValueError(f"{index.path}: no joints, and all images in one folder: nothing to probe")
    features, _, _ = read_features(networks, index, np.arange(len(index)), (), args, runtime)
    table = {key: {"knn_accuracy": leave_one_out(x, classes, NEIGHBOURS)} for key, x in features.items()}
    return table, {"count": len(index), "classes": len(names), "neighbours": min(NEIGHBOURS, len(index) - 1)}


# ---------------------------------------------------------------------------------------------------- results
def _flatten(table, facts):
    """The content of metrics.json: NETWORK_FEATURE_KEY for each number, facts, and the encoder's both
    features once more as KEY."""
    flat = {}
    for (name, feature), values in table.items():
        for key, value in values.items():
            flat[f"{name}_{feature}_{key}"] = value
    return flat | facts | table["probe", "both"]


def _show(table, facts):
    """Prints the numbers of every feature, and the facts."""
    keys = list(table["probe", "both"])
    rows = []
    for (name, feature), values in table.items():
        texts = [f"{values[key]:.{2 if key.endswith(('mm', 'percent')) else 3}f}" for key in keys]
        rows.append((f"{name}, {feature}", texts))
    print(text_table(keys, rows))
    texts = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in facts.values()]
    print(", ".join(f"{key} {text}" for key, text in zip(facts, texts, strict=True)))


def flags():
    cli = parser(__doc__)
    cli.add_argument("encoder", metavar="ENCODER",
                     help="an encoder.pt, or weights as --init of finetune_mesh.py takes them")
    cli.add_argument("--data", required=True, metavar="INDEX",
                     help="index to test on, or a folder of class sub-folders of images")
    cli.add_argument("--train", metavar="INDEX",
                     help=f"index of labelled hands to fit on, {PROBE_HANDS:,} at most (default: half of the "
                          "videos of --data)")
    cli.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for metrics.json")
    cli.add_argument("--image-size", type=int,
                     help="side of the views in pixels (default: the encoder's own)")
    cli.add_argument("--batch-size", type=int, default=32, help="hands at a time (default 32)")
    cli.add_argument("--mano", metavar="FILE",
                     help="MANO file; poses are aligned to its mean hand (default: the synthetic hand)")
    add_weights_flags(cli, "ENCODER")
    add_device_flags(cli)
    return cli


def _is_own(path):
    """True for a metrics.json of this command."""
    try:
        table = read_json(path)
    except (ValueError, OSError):
        return False
    return isinstance(table, dict) and any(key.startswith("probe_both_") for key in table)


def main(argv=None):
    args = flags().parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    metrics = args.out / "metrics.json"
    if metrics.exists() and not _is_own(metrics):
        raise ValueError(f"--out {args.out}: metrics.json is there already and was not written by probe.py: "
                         "choose another folder")
    check_ranges(args, {"image_size": (16, 4096), "batch_size": (1, 65536)})
    check_writable(args.out)
    runtime = setup(args, alone=True)
    networks = make_networks(args.encoder, args.image_size)
    with tempfile.TemporaryDirectory() as folder:
        index = _open_data(args.data, folder)
        if args.train or {"joints", "joints2d", "keypoints"} & set(index.columns):
            table, facts = probe_poses(networks, index, pose_labels(index), args, runtime)
        else:
            table, facts = probe_classes(networks, index, args, runtime)
    with staged_folder(args.out) as folder:
        (folder / "metrics.json").write_text(json.dumps(_flatten(table, facts), indent=1))
    _show(table, facts)
    print(f"wrote {args.out / 'metrics.json'}")


if __name__ == "__main__":
    run(main)
