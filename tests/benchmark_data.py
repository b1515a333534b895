"""Sections of benchmark.py on files, indices and mining, up to two million hands."""

import functools
import hashlib
import json
import time

import numpy as np
from PIL import Image

from benchmark import SCRATCH, TABLE, Growth, alone, command, comparator, draw_hands, log_rates, small


# ------------------------------------------------------------------------------------------------------- data
def prepare():
    """prepare_data.py freihand on labels of the full size and four times as many links to one image."""
    labels = small(32_560, 8)
    rng = np.random.default_rng(0)
    folder = SCRATCH / "freihand"
    for name in ("rgb", "mask"):
        (folder / "training" / name).mkdir(parents=True)
    Image.new("RGB", (224, 224)).save(SCRATCH / "one.jpg")
    for k in range(4 * labels):
        (folder / "training" / "rgb" / f"{k:08d}.jpg").symlink_to(SCRATCH / "one.jpg")
    vertices = rng.normal(0, 0.03, (50, 778, 3)) + [0, 0, 0.7]
    entries = {"K": [[[480.0, 0, 112], [0, 480, 112], [0, 0, 1]]] * 50, "xyz": vertices[:, :21].tolist(),
               "verts": vertices.tolist(), "mano": rng.normal(0, 1, (50, 1, 61)).tolist(),
               "scale": [0.03] * 50}
    for name, values in entries.items():
        texts = list(map(json.dumps, values))
        text = ", ".join(texts[k % 50] for k in range(labels))
        (folder / f"training_{name}.json").write_text(f"[{text}]")
    done = alone(command, "prepare_data.py", "freihand", folder, "--out", SCRATCH / "freihand_index")
    TABLE.add(f"prepare_data.py freihand, {4 * labels:,} images", done["seconds"], memory=[done["mb"]])


def pack():
    """A packed index against one of single files."""
    from data import HandDataset, HandIndex, canvas_size, make_loader

    files = draw_hands(1000, 224)[0]
    alone(command, "prepare_data.py", "pack", files, "--out", SCRATCH / "packed")
    opened = [functools.partial(HandIndex, path) for path in (SCRATCH / "packed", files)]
    TABLE.race("packed index, opening", *opened, "single files")
    rows = np.random.default_rng(0).permutation(small(1000, 16))[:256]
    read = []
    for each in opened:
        dataset = HandDataset([each()], canvas_size(64), rows=rows)
        read.append(functools.partial(list, make_loader(dataset, batch_size=64)))
    TABLE.race(f"packed index, {len(rows)} random canvases of {canvas_size(64)} px", *read, "single files",
               7, 1, note="from the memory of the system")


def epoch():
    """Two epochs of HandMIM from files and from a cache of canvases, by the real command."""
    from model import load_encoder

    found = {}
    for cache in ("none", "file", "memory"):
        out = SCRATCH / f"epoch_{cache}"
        found[cache] = alone(
            command, "pretrain_mim.py", "--data", draw_hands(1000, 224)[0], "--out", out, "--cache", cache,
            "--arch", "vit_micro", "--image-size", small(64, 32), "--prototypes", small(512, 32),
            "--batch-size", small(64, 8), "--epochs", 2, "--log-every", small(4, 1), "--device", "cpu")
        state = load_encoder(out / "encoder.pt").state_dict()
        bits = b"".join(state[name].numpy().tobytes() for name in sorted(state))
        rates = np.quantile(log_rates(out)[1:], [0.25, 0.5, 0.75])
        found[cache] |= {"rates": rates, "bits": hashlib.sha256(bits).digest()}
    files = found["none"]
    for cache in ("file", "memory"):
        done = found[cache]
        same = "the same" if done["bits"] == files["bits"] else "NOT THE SAME"
        TABLE.add(f"HandMIM, vit_micro at 64 px, two epochs, --cache {cache}", done["rates"], files["rates"],
                  "from files", "hands/s", (done["mb"], files["mb"]),
                  f"{done['seconds']:.1f} s against {files['seconds']:.1f} s in all; the bits are {same}")


def synthetic():
    """Images that make_synthetic.py draws in a second, as it says."""
    for size in small((128, 224), (64,)):
        rates = [draw_hands(400, size, seed)[1] for seed in range(small(3, 1))]
        TABLE.add(f"make_synthetic.py, {size} px", np.quantile(rates, [0.25, 0.5, 0.75]), unit="images/s")


def saving():
    """The pictures of samples/: ours against Pillow's defaults."""
    from draw import save_image

    with Image.open(draw_hands(64, 224)[0] / "samples.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    paths = SCRATCH / "ours.png", SCRATCH / "theirs.png"
    save_image(paths[0], sheet)
    Image.fromarray(sheet).save(paths[1])
    sizes = [path.stat().st_size / 1e3 for path in paths]
    TABLE.race(f"saving a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels",
               lambda: save_image(paths[0], sheet), lambda: Image.fromarray(sheet).save(paths[1]),
               "Pillow's defaults", note=f"{sizes[0]:,.0f} and {sizes[1]:,.0f} kB")


# ------------------------------------------------------------------------------------------ millions of hands
def big_index(count, labelled=False):
    """Folder of an index of many hands that all have one image; labelled: with the labels of a few poses."""
    from data import write_index

    path = SCRATCH / f"big_{count}_{labelled}"
    if path.exists():
        return path
    Image.effect_noise((64, 64), 60).convert("RGB").save(SCRATCH / "hand.jpg")
    columns = {"image": np.full(count, b"hand.jpg"), "video": np.arange(count) // 100,
               "box": np.tile(np.float32([16, 16, 48, 48]), (count, 1))}
    if labelled:
        for name in ("joints2d", "visible", "joints", "vertices", "pose", "betas"):
            columns[name] = np.load(draw_hands(64, 224)[0] / f"{name}.npy")
        columns["label"] = np.arange(count) % len(columns["pose"])
    else:
        rng = np.random.default_rng(0)
        columns["keypoints"] = rng.uniform(16, 48, (count, 21, 2)).astype(np.float32)
    write_index(path, columns, {"name": "big"}, root="..")
    return path


def index():
    """Opening an index: columns are mapped, not read."""
    from data import HandIndex

    sizes = small((2_000, 2_000_000), (200, 400))
    growth = Growth("hands", sizes)
    for count in sizes:
        path = big_index(count)
        TABLE.race(f"opening an index of {count:,} hands", functools.partial(HandIndex, path), growth=growth)


def start():
    """Each stage with two million hands, from its start to the end of one small step, against few hands."""
    counts = small((2_000_000, 2_000), (400, 200))
    common = ["--arch", "vit_micro", "--image-size", 32, "--batch-size", 8, "--steps", 1, "--workers", 0,
              "--device", "cpu"]
    flags = {"pretrain_mim.py": ["--prototypes", 64], "pretrain_contrastive.py": ["--pairs"],
             "finetune_mesh.py": ["--head-width", 32, "--val", big_index(counts[1], True)]}
    for script, its_own in flags.items():
        found = []
        for count in counts:
            data = big_index(count, script == "finetune_mesh.py")
            out = SCRATCH / f"start_{script}_{count}"
            more = [random_pairs(data)] if its_own == ["--pairs"] else []
            found.append(alone(command, script, "--data", data, "--out", out, *common, *its_own, *more))
        big, few = found
        TABLE.add(f"{script}, start and one step, {counts[0]:,} hands", big["seconds"], few["seconds"],
                  f"{counts[1]:,} hands", memory=(big["mb"], few["mb"]))


def random_pairs(path):
    """File of pairs for an index, as mine_pairs.py writes it."""
    from data import PAIRS_FORMAT, HandIndex, index_fingerprint

    columns = HandIndex(path).columns
    count = len(columns["box"])
    idx = np.random.default_rng(0).integers(0, count, (count, 10), dtype=np.int32)
    np.savez(path / "pairs.npz", idx=idx, dist=np.ones(idx.shape, np.float32), format=PAIRS_FORMAT,
             fingerprint=index_fingerprint([columns], "keypoints"))
    return path / "pairs.npz"


def sampling(batch=8192, world=64):
    """The order of two million hands in 64 processes: their rows make up the global batch."""
    from data import make_sampler

    count = small(2_000_000, 10_000)
    steps = 3
    rows = np.arange(count)

    def order(rank, world):
        return list(make_sampler(rows, [0, count], None, batch, 0, 0, steps, rank, world))

    parts = [order(rank, world) for rank in range(world)]
    whole = order(0, 1)
    assert all(sum((part[step] for part in parts), []) == whole[step] for step in range(steps))
    TABLE.race(f"rows of {steps} steps of {batch:,} of {count:,} hands, one of {world} processes",
               lambda: order(1, world), lambda: order(0, 1), "the whole batch", 5, 1,
               note="the processes' rows are the global batch")


def detected_poses(count, videos, seed=0):
    """(count,21,2) keypoints and (count,) videos: hands whose pose and view change smoothly from key pose to
    key pose, as make_synthetic.py draws them, seen from anywhere by a camera and a detector with its
    noise."""
    from scipy.spatial.transform import Rotation

    from mano import MANO_TO_FREIHAND
    from synthetic_hand import synthetic_mano

    hand, rng, frames, made = synthetic_mano(), np.random.default_rng(seed), count // videos, []
    rest, parent = hand["J"], hand["kintree_table"][0].astype(int)
    tips, last = hand["v_template"][[744, 320, 443, 555, 672]], [15, 3, 6, 12, 9]
    at = np.arange(frames) / 5
    key, share = at.astype(int), (at % 1)[None, :, None]
    share = share * share * (3 - 2 * share)
    for first in range(0, videos, 500):
        many, keys = min(500, videos - first), frames // 5 + 2
        pose = hand["hands_coeffs"][rng.integers(len(hand["hands_coeffs"]), size=(many, keys))]
        pose = pose + 0.2 * rng.standard_normal(pose.shape)
        pose[..., 8:] *= 0.25
        turn = 0.3 * rng.standard_normal((many, keys, 3))
        pose, turn = (x[:, key] * (1 - share) + x[:, key + 1] * share for x in (pose, turn))
        view = np.repeat(rng.standard_normal((many, 4)), frames, 0)
        angles = (pose @ hand["hands_components"] + hand["hands_mean"]).reshape(-1, 3)
        local = Rotation.from_rotvec(angles).as_matrix().reshape(-1, 15, 3, 3)
        world = np.empty((len(local), 16, 3, 3))
        world[:, 0] = (Rotation.from_rotvec(turn.reshape(-1, 3)) * Rotation.from_quat(view)).as_matrix()
        joints = np.zeros((len(local), 21, 3))
        for k in range(1, 16):
            world[:, k] = world[:, parent[k]] @ local[:, k - 1]
            joints[:, k] = joints[:, parent[k]] + world[:, parent[k]] @ (rest[k] - rest[parent[k]])
        for k, bone in enumerate(last):
            joints[:, 16 + k] = joints[:, bone] + world[:, bone] @ (tips[k] - rest[bone])
        image = joints[:, MANO_TO_FREIHAND, :2] / (joints[:, MANO_TO_FREIHAND, 2:] + 0.5)
        extent = np.ptp(image, axis=1).max(1)[:, None, None]
        noise = 0.016 * extent * rng.uniform(0.6, 1.6, (len(image), 1, 1)) * rng.standard_normal(image.shape)
        made.append((image + noise).astype(np.float32))
    return np.concatenate(made), np.repeat(np.arange(videos), frames)


def mining():
    """mine_pairs.mine on detected poses, 100 frames a video, 10 neighbours of other videos; against searches
    that must fetch 110 to skip a hand's own video."""
    sizes = small((125_000, 500_000, 2_000_000), (400,))
    growth = Growth("hands", sizes)
    for count in sizes:
        found = alone(mine_once, count)
        TABLE.add(f"mining, {count:,} hands", found["seconds"], memory=[found["mb"]],
                  note=f"median distance {found['nearest']:.3f}, of random pairs {found['random']:.3f} "
                       + growth.note(found["seconds"]))
        for rival in ("scipy.spatial", "faiss") if count == sizes[0] else ():
            other = alone(mine_with, count, rival) if comparator(rival) else {}
            note = "theirs: {queries:,} queries tell the time of all; distances differ by {apart:.0e}"
            TABLE.add(f"mining, {count:,} hands", found["seconds"], other.get("seconds"), rival,
                      memory=[each["mb"] for each in (found, other) if each],
                      note=other and note.format_map(other) or "")


def mine_once(count):
    from mine_pairs import mine, normalise_pose

    keypoints, videos = detected_poses(count, count // 100)
    start = time.perf_counter()
    found = mine(keypoints, videos, 10)
    seconds = time.perf_counter() - start
    some = np.random.default_rng(0).integers(len(keypoints), size=(2, 10000))
    x, y = ((normalise_pose(keypoints[rows]) - found["mean"]) @ found["components"].T for rows in some)
    np.savez(SCRATCH / f"mined_{count}.npz", **found)
    return {"seconds": seconds, "nearest": float(np.median(found["dist"][:, 0])),
            "random": float(np.median(np.linalg.norm(x - y, axis=1)))}


def mine_with(count, rival):
    """The same neighbours by scipy's k-d tree or faiss' exact index. Each query is a search of its own: some
    tell the time of all."""
    from mine_pairs import normalise_pose

    keypoints, videos = detected_poses(count, count // 100)
    mined = np.load(SCRATCH / f"mined_{count}.npz")
    x = (normalise_pose(keypoints) - mined["mean"]) @ mined["components"].T  # (N, 14)
    some = np.random.default_rng(0).permutation(len(x))[:small(2000, 100)]
    module = comparator(rival)
    start = time.perf_counter()
    if rival == "faiss":
        x = x.astype(np.float32)
        tree = module.IndexFlatL2(x.shape[1])
        tree.add(x)
    else:
        tree = module.cKDTree(x)
    built = time.perf_counter()
    if rival == "faiss":
        square, near = tree.search(x[some], 110)
        distance = np.sqrt(square)
    else:
        distance, near = tree.query(x[some], 110, workers=-1)
    is_own = videos[near] == videos[some][:, None]
    distance = np.take_along_axis(distance, np.argsort(is_own, axis=1, kind="stable")[:, :10], 1)
    searched = time.perf_counter()
    return {"seconds": built - start + (searched - built) * len(x) / len(some), "queries": len(some),
            "apart": float(np.abs(distance - mined["dist"][some]).max())}
