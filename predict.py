"""Photographs -> meshes: per hand NAME.obj, NAME.npz and NAME.png (the mesh laid over the photograph).

Without --boxes every photograph is one crop, which a hand fills. With --boxes there may be any number of
hands in photographs of any size. The file is a CSV with the header image,x0,y0,x1,y1[,side]: tight boxes in
pixels, `image` as on the command line or relative to the folder given there (for a photograph its bare name).
Any detector will do. Left hands are mirrored for the network and mirrored back.

A file in --out that this command did not write is never overwritten. Its own results and indices below a
folder are no photographs.

NAME.npz holds, in metres, in the photograph's camera frame (x right, y down, z forward):

    vertices (778,3), joints (21,3)     relative to the wrist
    translation (3,)                    the wrist's place if `focal` (pixels) is the true focal length; a
                                        picture alone does not show the depth
    rotmats (16,3,3), betas (10,)       of the RIGHT hand model; a left hand's are those of its mirror image
    camera (3,)                         scale, tx, ty: x_n = scale (x + tx) in [-1,1] of the square `crop`
    crop (4,)                           x0, y0, x1, y1 in pixels
    side                                "right" or "left"
"""

import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data import (
    CONTEXT, OVERLAY, canvas_size, counts_text, cut_canvas, image_size, is_overlay, list_images, match_boxes,
    read_boxes, read_image, square, whole_box,
)
from draw import overlay
from mano import (
    Mano, crop_to_full_camera, hand_fingerprint, joints_from_vertices, read_mano, weak_perspective,
)
from model import load_mesh
from runtime import add_device_flags, parser, run, setup
from saving import load_checkpoint, staged_folder
from synthetic_hand import synthetic_mano
from views import upright_views


OBJ_MARK = "# hand by predict.py"  # first line of its .obj
MOST_DRAWN = 25e6  # pixels of an overlay: a larger photograph is shown at a half, a third, ... of its size
KEYS = {"vertices", "joints", "rotmats", "betas", "camera", "crop", "side", "translation", "focal"}  # .npz


# ------------------------------------------------------------------------------------------ what is asked for
def find_images(paths, out):
    """[(photograph, folder it is named in)] of the photographs and folders on the command line, each once.

    What lies in `out`, indices and results below a folder are left out; what was not taken is printed."""
    images = []
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such photograph or folder")
        left_out = Counter()
        below = list_images(path, skip=out, left_out=left_out) if path.is_dir() else [path]
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and not below:
            raise ValueError(f"{path}: no image in this folder ({counts_text(left_out) or 'it is empty'})")
        if counts_text(left_out):
            print(f"{path}: not taken: {counts_text(left_out)}")
        images += [(image, folder) for image in below]
    return list({os.path.abspath(image): (image, folder) for image, folder in images}.values())


def find_hands(images, boxes_path, side):
    """[(path, box, side, name)] of every hand asked for; box None without a file of boxes. Names are unique.

    images: of find_images. side: where the file does not say it. Photographs without a box are left out,
    which is printed, as are names in the file without a photograph. ValueError where none has a box.
    """
    asked = [[(None, side)]] * len(images)
    without_image = []
    if boxes_path:
        asked, without_image = match_boxes(read_boxes(boxes_path), images, boxes_path)
    hands = []
    names = set()
    for (path, _), found in zip(images, asked, strict=True):
        for box, box_side in found:
            name = path.stem
            number = 1
            while name.casefold() in names:  # some file systems take A.png for a.png
                number += 1
                name = f"{path.stem}_{number}"
            names.add(name.casefold())
            hands.append((path, box, box_side or side, name))
    if not hands:
        first = next(iter(without_image), "missing")
        raise ValueError(f"--boxes {boxes_path}: no line for any of the {len(images)} photographs (the first "
                         f"is {images[0][0]}; the first in the file is {first})")
    without_box = [path for (path, _), found in zip(images, asked, strict=True) if not found]
    if without_box:
        print(f"{boxes_path}: photographs without a line, left out: {len(without_box)} (the first is "
              f"{without_box[0]})")
    if without_image:
        print(f"{boxes_path}: names without a photograph: {len(without_image)} (the first is "
              f"{without_image[0]})")
    return hands


def refuse_others_files(hands, folder):
    """ValueError where a result would replace a file that this command did not write, or an input."""
    inputs = {os.path.realpath(path) for path, *_ in hands}
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    for *_, name in hands:
        for file in (folder / f"{name}{suffix}" for suffix in (".obj", ".npz", ".png")):
            if file.name in there and (os.path.realpath(file) in inputs or not is_result(file)):
                raise ValueError(f"--out {folder}: {file.name} is there already and was not written by this "
                                 "version of predict.py: choose another folder")


def is_result(path):
    """True for a file that this command wrote."""
    try:
        if path.suffix == ".obj":
            with open(path, errors="replace") as file:
                return file.read(len(OBJ_MARK)) == OBJ_MARK
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return set(file.files) == KEYS
        return is_overlay(path)
    except Exception:  # zipfile and numpy raise a dozen types for what is no .npz
        return False


# ---------------------------------------------------------------------------------------- prediction, drawing
def read_hand(path, box, side, box_scale, size):
    """(width, height) of a photograph, its crop (centre x, y, side; pixels) and canvas (3,S,S) u8, mirrored
    for a left hand. box None: the crop is the whole photograph. size: of the views, in pixels."""
    photograph_size = image_size(path)
    if box is None:
        box = whole_box(photograph_size, box_scale)
    x0, y0, x1, y1 = (float(place) for place in box)
    if x0 >= photograph_size[0] or y0 >= photograph_size[1] or x1 <= 0 or y1 <= 0:
        raise ValueError(f"{path}: the box {x0:g} {y0:g} {x1:g} {y1:g} lies outside of it")
    canvas, _ = cut_canvas(path, box, CONTEXT, canvas_size(size))
    if side == "left":
        canvas = canvas[:, ::-1]
    return photograph_size, square(box, box_scale), canvas.transpose(2, 0, 1)


class Photographs:
    """Reads photographs (H,W,3) u8 for drawing, and how many times smaller they are than their files. Keeps
    the last: hands of one photograph follow each other, and a large one takes hundreds of megabytes."""

    path = image = None

    def read(self, path):
        if path != self.path:
            self.path = self.image = None  # freed before the next is decoded
            image, _ = read_image(path)
            self.factor = math.ceil(math.sqrt(image.width * image.height / MOST_DRAWN))
            self.image = np.asarray(image.reduce(self.factor))
            self.path = path
        return self.image, self.factor


@torch.no_grad()
def estimate_hands(net, canvases, box_scale, arrays, runtime):
    """Canvases (B,3,S,S) u8 of right hands -> the last estimate, numpy; joints as FreiHAND defines them."""
    size = net.encoder.config["image_size"]
    views = upright_views(canvases.to(runtime.device), box_scale / CONTEXT, size)
    with runtime.autocast():
        estimate = net(views)[-1]
    estimate["joints"] = joints_from_vertices(estimate["vertices"], arrays)
    return {name: value.float().cpu().numpy() for name, value in estimate.items()}


def place_hand(estimate, image_size, crop, side, focal):
    """The estimate of one right-handed view as NAME.npz holds it; a left hand is mirrored back.

    image_size: (width, height) of the photograph; crop: centre x, y and side in pixels, as focal.
    """
    vertices = estimate["vertices"].copy()
    joints = estimate["joints"].copy()
    camera = estimate["camera"].copy()
    if side == "left":
        vertices[:, 0] *= -1
        joints[:, 0] *= -1
        camera[1] *= -1
    width, height = image_size
    centre_x, centre_y, length = crop
    K = torch.tensor([[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]],
                     dtype=torch.float64)
    translation = crop_to_full_camera(torch.tensor(camera)[None], torch.tensor([[centre_x, centre_y]]),
                                      torch.tensor([length]), K[None])[0]
    half = length / 2
    corners = [centre_x - half, centre_y - half, centre_x + half, centre_y + half]
    return {"vertices": vertices, "joints": joints, "rotmats": estimate["rotmats"],
            "betas": estimate["betas"], "camera": camera, "crop": np.float32(corners), "side": np.array(side),
            "translation": np.float32(translation), "focal": np.float32(focal)}


def _faces_of(faces, side):
    """The hand model's faces (F,3) as seen from outside: those of a mirrored hand run the other way."""
    return faces if side == "right" else faces[:, ::-1]


def draw_hand(image, factor, hand, faces):
    """The mesh over the photograph, which is `factor` times smaller than its file, by the crop's weak
    perspective."""
    x0, y0, x1, _ = hand["crop"]
    points = weak_perspective(torch.tensor(hand["vertices"])[None], torch.tensor(hand["camera"])[None])[0]
    points = (points.numpy() + 1) / 2 * (x1 - x0) + [x0, y0]  # pixels of the file
    points /= factor
    return overlay(image, np.concatenate([points, hand["vertices"][:, 2:]], axis=1), faces)


def write_hand(folder, name, hand, photograph, faces):
    """NAME.obj, NAME.npz and NAME.png in `folder`; the three appear together."""
    faces = _faces_of(faces, hand["side"])
    with staged_folder(folder) as part:
        write_obj(part / f"{name}.obj", hand["vertices"], faces)
        np.savez(part / f"{name}.npz", **hand)
        mark = PngInfo()
        mark.add_text("Software", OVERLAY)
        drawn = Image.fromarray(draw_hand(*photograph, hand, faces))
        drawn.save(part / f"{name}.png", pnginfo=mark, compress_level=1)


def write_obj(path, vertices, faces):
    """Wavefront OBJ in metres; y and z point up and towards the viewer there, so both change sign."""
    points = [f"v {x:.6f} {-y:.6f} {-z:.6f}" for x, y, z in vertices]
    triangles = [f"f {a} {b} {c}" for a, b, c in faces + 1]
    path.write_text("\n".join([OBJ_MARK, *points, *triangles]) + "\n")


def flags():
    cli = parser(__doc__)
    cli.add_argument("images", nargs="+", type=Path, metavar="IMAGE",
                     help="photographs, or folders of them")
    cli.add_argument("--checkpoint", required=True, help="RUN/last.pt of finetune_mesh.py")
    cli.add_argument("--out", type=Path, required=True, help="folder for the results")
    cli.add_argument("--boxes", type=Path,
                     help="CSV image,x0,y0,x1,y1[,side] (default: each photograph is one hand's crop)")
    cli.add_argument("--side", default="right", choices=["right", "left"],
                     help="side of the hands where --boxes does not say (default right)")
    cli.add_argument("--mano", metavar="FILE",
                     help="MANO file that the checkpoint was trained with (default: the synthetic hand)")
    cli.add_argument("--focal", type=float,
                     help="focal length in pixels, for `translation` (default: the image's longer side)")
    cli.add_argument("--batch-size", type=int, default=32, help="hands at a time (default 32)")
    add_device_flags(cli, workers=False)
    return cli


def load_network(path, mano, device):
    """The network in a checkpoint, the side of its views over the box, and the arrays of its hand model."""
    state = load_checkpoint(path, "mesh")
    arrays = read_mano(mano) if mano else synthetic_mano()
    if state.get("hand") != hand_fingerprint(arrays):
        raise ValueError(f"{path} was trained with another hand model than {mano or 'the synthetic hand'}: "
                         "pass its file with --mano")
    return load_mesh(state, Mano(arrays)).to(device), state["box_scale"], arrays


def _named(error, path):
    """What an error says, with the name of the photograph."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def main(argv=None):
    args = flags().parse_args(argv)
    if args.batch_size < 1 or not (args.focal is None or args.focal > 0):
        raise ValueError("--batch-size and --focal must be positive")
    runtime = setup(args, alone=True)
    net, box_scale, arrays = load_network(args.checkpoint, args.mano, runtime.device)
    faces = net.head.hand.faces.cpu().numpy()
    hands = find_hands(find_images(args.images, args.out), args.boxes, args.side)
    refuse_others_files(hands, args.out)
    is_new = not args.out.exists()
    args.out.mkdir(parents=True, exist_ok=True)

    failures = []
    photographs = Photographs()
    bar = tqdm(total=len(hands), unit="hand")
    for start in range(0, len(hands), args.batch_size):
        some_hands = hands[start:start + args.batch_size]
        batch = []
        for hand in some_hands:
            path, box, side, _ = hand
            try:
                batch.append((hand, *read_hand(path, box, side, box_scale, net.encoder.config["image_size"])))
            except (ValueError, OSError) as error:
                failures.append(_named(error, path))
        if batch:
            canvases = torch.from_numpy(np.stack([canvas for *_, canvas in batch]))
            estimates = estimate_hands(net, canvases, box_scale, arrays, runtime)
        for i, ((path, _, side, name), photograph_size, crop, _) in enumerate(batch):
            estimate = {key: value[i] for key, value in estimates.items()}
            hand = place_hand(estimate, photograph_size, crop, side, args.focal or max(photograph_size))
            try:
                photograph = photographs.read(path)
            except (ValueError, OSError) as error:
                failures.append(_named(error, path))
                continue
            write_hand(args.out, name, hand, photograph, faces)
        bar.update(len(some_hands))
    bar.close()
    if is_new and len(failures) == len(hands):
        args.out.rmdir()
    for failure in failures[:-1]:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise ValueError(f"{failures[-1]} ({len(failures)} of {len(hands)} hands not predicted)")
    print(f"{args.out}: {len(hands)} hands, each as .obj, .npz and .png")


if __name__ == "__main__":
    run(main)
