"""Real hands before other backgrounds: each hand of an index of photographs is cut out and pasted.

A few hundred photographs of one garden teach a network that garden. Pasted before rooms that are drawn, or
before --backgrounds, the same hands teach hands. (Ours. FreiHAND, arXiv 1909.04349, does so with hands that
were photographed before a green screen.)

What is the hand is told by its mesh, of labels or of fit_hands.py, and by colours: those well inside of the
mesh against those far from it. A forearm is found by its colours alone. Looked at, most cuts are clean. Skin
before a background of the same colour is cut along the mesh.

Writes --out, an index with --times pictures of each hand and the labels of --data, and samples.png in it.
Which background a picture gets depends on --seed, the row of the hand and the picture's number alone.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from camera import fit_weak_perspective
from data import CONTEXT, HandIndex, cut_canvas, find_backgrounds, read_image, square, write_index
from draw import grid, rasterise, save_image
from rooms import cut_of, random_room
from runtime import check_ranges, parser, run
from saving import refuse_files, staged_folder
from surfaces import SKIN_TONES
from synthetic_hand import synthetic_mano

# Distances from the mesh, in hands (the longer side of the joints' box); negative inside.
SURELY_HAND = -0.02
SURELY_NOT = 0.08
DOUBT = 0.03  # from the mesh's edge at which the odds of a pixel are e to 1
MESH = ("vertices", "joints", "joints2d")
PER_HAND = ("side", "video")


# ---------------------------------------------------------------------------------------------------- cutting
def mesh_in_canvas(index, row, size):
    """The mesh (778,3) of a hand, pixels of its canvas (size,size) and depth, and its joints (21,2) there.

    By the weak perspective between the labels in space and in the image."""
    label = index.label(row)
    joints, joints2d, vertices = (np.asarray(index.columns[name][label], np.float64)
                                  for name in ("joints", "joints2d", "vertices"))
    centre_x, centre_y, side = square(index.columns["box"][row], CONTEXT)
    seen = (joints2d + 0.5 - [centre_x, centre_y]) / side * size + size / 2  # (21, 2)
    scale, shift = fit_weak_perspective(joints, seen)
    return np.concatenate([scale * vertices[:, :2] + shift, vertices[:, 2:]], axis=1), seen


def cut_out(canvas: np.ndarray, mesh: np.ndarray, joints: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """How much of each pixel (H,W), 0 to 1, is the hand or its arm. canvas (H,W,3) u8; mesh (778,3) and
    joints (21,2) in its pixels."""
    size = len(canvas)
    inside = rasterise(mesh, faces, (size, size), weights=False)[0] >= 0
    span = np.ptp(joints, axis=0).max()
    away = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    away = away / span  # (H, W) hands
    arm = where_an_arm_may_be(joints, span, size) & (away > 0)
    hand = away < SURELY_HAND
    if hand.sum() < 30:  # pixels
        hand = inside
    never = (away > SURELY_NOT) & ~arm
    colors = color_cells(canvas)
    of_background = color_chances(colors, never)
    of_hand = color_chances(colors, hand)
    by_place = np.where(arm, -0.5, -away / DOUBT)
    for _ in range(2):  # the hand has colours that its middle lacks
        by_color = np.log(of_hand[colors] + 1e-4) - np.log(of_background[colors] + 1e-4)
        cut = (ndimage.gaussian_filter(by_color, 0.7) + by_place > 0) & ~never | hand
        parts, _ = ndimage.label(cut)
        cut = np.isin(parts, np.unique(parts[hand]))
        cut |= ndimage.binary_fill_holes(cut) & (away < 0.02)
        of_hand = color_chances(colors, cut & (away < 0.03))
    cut = ndimage.binary_opening(cut) | hand
    return np.clip(1.6 * ndimage.gaussian_filter(cut.astype(np.float32), 0.8) - 0.5, 0, 1)


def where_an_arm_may_be(joints, span, size):
    """(size,size) True behind the wrist, seen from the knuckles."""
    wrist = joints[0]
    along = wrist - joints[[5, 9, 13, 17]].mean(0)
    along = along / max(np.linalg.norm(along), 1e-9)
    y, x = np.mgrid[:size, :size] + 0.5
    behind = (x - wrist[0]) * along[0] + (y - wrist[1]) * along[1]
    beside = np.abs((y - wrist[1]) * along[0] - (x - wrist[0]) * along[1])
    return (behind > 0) & (beside < 0.25 * span + 0.35 * behind)


def color_cells(canvas):
    """(H,W) the cell of each colour, of 16 x 16 x 16; brightness, which shadows change, counts half."""
    canvas = canvas.astype(np.float32)
    grey = canvas.mean(2)
    tints = 1.5 * (canvas[..., :2] - grey[..., None])  # (H, W, 2), about 0
    cells = (grey / 256 * 8, *np.moveaxis((tints + 128) / 256 * 16, 2, 0))
    grey, red, green = (np.clip(cell, 0, 15.99).astype(int) for cell in cells)
    return (grey * 16 + red) * 16 + green


def color_chances(colors, chosen):
    """(4096,) the share of each cell among the chosen pixels, smoothed."""
    counts = np.bincount(colors[chosen], minlength=16 ** 3).reshape(16, 16, 16)
    return (ndimage.gaussian_filter(counts.astype(float), 0.8) / max(counts.sum(), 1)).ravel()


# ---------------------------------------------------------------------------------------------------- pasting
def random_background(rng, size, photographs):
    """(size,size,3), 0 to 255: a drawn room, or a cut of one of the photographs; some darker."""
    if photographs:
        path = photographs[rng.integers(len(photographs))]
        picture = cut_of(rng, read_image(path, smallest=2 * size)[0], size)
    else:
        picture = random_room(rng, size, SKIN_TONES)
    return 255 * picture.transpose(1, 2, 0) * rng.uniform(0.5, 1.1)


def paste(rng, canvas, alpha, background):
    """The hand of a canvas, brighter or darker, before a background (H,W,3) -> (H,W,3) u8."""
    light = np.exp(rng.normal(0, 0.3))
    alpha = alpha[..., None]
    return (alpha * light * canvas + (1 - alpha) * background).clip(0, 255).astype(np.uint8)


def rows_with_a_mesh(index):
    """Rows of the hands whose labels have no gap in the mesh or in the joints."""
    whole = [np.isfinite(index.columns[name]).all((1, 2)) for name in MESH]
    return np.flatnonzero(np.all(whole, axis=0)[index.pose_ids()])


def canvas_labels(index, rows, times, size):
    """The columns of the new index without its images: the labels of the hands `rows` in the pixels of their
    canvases, once, for `times` pictures."""
    labels = index.pose_ids()[rows]
    boxes = np.array(index.columns["box"])[rows]
    centre_x, centre_y, side = square(boxes, CONTEXT)
    corner = np.stack([centre_x, centre_y], axis=1) - side[:, None] / 2  # (R, 2)
    zoom = size / side
    columns = {}
    for name in ("pose", "betas", "joints", "vertices", "joints2d", "keypoints", "keypoints3d",
                 "keypoints_score", "visible"):
        if name in index.columns:
            columns[name] = np.array(index.columns[name][labels])
    for name in ("joints2d", "keypoints"):
        if name in columns:  # pixel-centre coordinates
            places = (columns[name] + 0.5 - corner[:, None]) * zoom[:, None, None] - 0.5
            columns[name] = places.astype(np.float32)
    boxes = (boxes - np.tile(corner, 2)) * zoom[:, None]
    of_hands = {name: np.array(index.columns[name])[rows] for name in PER_HAND if name in index.columns}
    of_hands |= {"box": boxes.astype(np.float32), "size": np.full((len(rows), 2), size, np.int32),
                 "label": np.arange(len(rows), dtype=np.int32)}
    return columns | {name: np.repeat(value, times, axis=0) for name, value in of_hands.items()}


# ------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", required=True, metavar="INDEX",
                     help="photographs with meshes, as of fit_hands.py")
    cli.add_argument("--out", required=True, type=Path, help="index to write")
    cli.add_argument("--times", type=int, default=6, help="pictures of each hand (default 6)")
    cli.add_argument("--size", type=int, default=160, help="side of a picture in pixels (default 160)")
    cli.add_argument("--backgrounds", type=Path,
                     help="folder of photographs without hands (default: rooms are drawn)")
    cli.add_argument("--seed", type=int, default=0, help="seed of the backgrounds (default 0)")
    return cli


def main(argv=None):
    args = flags().parse_args(argv)
    check_ranges(args, {"times": (1, 1000), "size": (64, 1024), "seed": (0, 2**63)})
    index = HandIndex(args.data)
    missing = [name for name in MESH if name not in index.columns]
    if missing:
        raise ValueError(f"--data {args.data}: no {missing[0]} in this index; fit_hands.py makes them")
    refuse_files(args.out)
    photographs = find_backgrounds(args.backgrounds) if args.backgrounds else []
    faces = synthetic_mano()["f"]  # MANO's are the same
    names, tiles = [], []
    kept, unread = [], []
    rows = rows_with_a_mesh(index)
    if not len(rows):
        raise ValueError(f"--data {args.data}: no hand of this index has a whole mesh")
    shown = set(rows[np.linspace(0, len(rows) - 1, 24).astype(int)].tolist())
    with staged_folder(args.out) as folder:
        for row in tqdm(rows.tolist(), unit="hand"):
            try:
                canvas, _ = cut_canvas(index.open_image(row), index.columns["box"][row], CONTEXT, args.size)
            except (ValueError, OSError) as error:
                unread.append(error)
                continue
            kept.append(row)
            alpha = cut_out(canvas, *mesh_in_canvas(index, row, args.size), faces)
            below = Path("images") / f"{row // 1000:04d}"
            (folder / below).mkdir(parents=True, exist_ok=True)
            for number in range(args.times):
                rng = np.random.default_rng([args.seed, row, number])
                background = random_background(rng, args.size, photographs)
                picture = paste(rng, canvas, alpha, background)
                names.append(str(below / f"{row:07d}_{number}.jpg"))
                Image.fromarray(picture).save(folder / names[-1], quality=92)
            if row in shown:
                tiles += [canvas, picture]
        if not kept:
            raise ValueError(f"--data {args.data}: no image can be read ({unread[0]})")
        columns = canvas_labels(index, np.array(kept), args.times, args.size) | {"image": np.array(names)}
        meta = {name: value for name, value in index.meta.items()
                if name in ("name", "joints", "pose_mean", "fitted", "partial", "video_names")}
        write_index(folder, columns, meta, ".")
        if tiles:
            marks = ["before", "after"] * (len(tiles) // 2)
            save_image(folder / "samples.png", grid(tiles, 12, marks, cell=128))
    print(f"{args.out}: {len(names)} pictures of {len(kept)} of {len(index)} hands; look at "
          f"{args.out / 'samples.png'}")
    if unread:
        print(f"{args.data}: hands left out, whose image cannot be cut: {len(unread)}; the first: "
              f"{unread[0]}")


if __name__ == "__main__":
    run(main)
