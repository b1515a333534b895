"""Photographs -> meshes: per hand NAME.obj, NAME.npz and NAME.png (the mesh laid over the photograph).

Without --boxes every photograph is taken as one crop that a hand fills; with them, any number of hands in photographs of any
size: a CSV with the header image,x0,y0,x1,y1[,side], tight boxes in pixels, `image` as on the command line or its bare name.
Left hands are mirrored for the network and mirrored back. There is no detector here: any will do.

NAME.npz holds vertices (778,3) and joints (21,3), metres, relative to the wrist, in the photograph's camera frame (x right,
y down, z forward); rotmats (16,3,3) and betas (10,) of the RIGHT hand model (a left hand's are those of its mirror image);
camera (3,) = scale, tx, ty of the crop: x_n = scale (x + tx) in [-1,1] of the square `crop` (x0, y0, x1, y1, pixels); side;
translation (3,), the wrist's place in metres if the photograph had the focal length `focal` (pixels): without the true one
the depth is not knowable from a picture.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import crop_canvas, list_images, read_boxes, read_image, square, whole_box
from draw import overlay, save_image
from mano import Mano, crop_to_full_camera, hand_fingerprint, joints_from_vertices, read_mano, weak_perspective
from model import load_mesh
from runtime import add_device_flags, load_checkpoint, parser, run, setup
from synthetic_hand import synthetic_mano
from views import centre_theta, normalise, warp

CONTEXT = 2.0                                                      # canvas over box, as in training


def find_hands(images, boxes_path, side):
    """[(path, box, side, name)] of every hand asked for; names are unique. ValueError names what does not fit."""
    boxes = read_boxes(boxes_path) if boxes_path else None
    hands, taken, without = [], set(), []
    for path in images:
        found = [(None, side)] if boxes is None else boxes.get(str(path), boxes.get(path.name, []))
        without += [] if found else [path]
        for box, its_side in found:
            name, number = path.stem, 1
            while name in taken:
                number += 1
                name = f"{path.stem}_{number}"
            taken.add(name)
            hands.append((path, box, its_side, name))
    if not hands:
        raise ValueError(f"--boxes {boxes_path}: no line for any of the {len(images)} photographs (the first is {images[0]})")
    if without:
        print(f"without a line in {boxes_path} and left out: {len(without)} photographs (the first is {without[0]})")
    return hands


@torch.no_grad()
def estimate(net, canvases, box_scale, arrays, runtime):
    """Canvases (B,3,S,S) u8 of right hands -> the last estimate, numpy, with joints of FreiHAND's definition."""
    theta = centre_theta(len(canvases), box_scale / CONTEXT).to(runtime.device)
    views = normalise(warp(canvases.to(runtime.device), theta, net.encoder.config["image_size"]))
    with runtime.autocast():
        output = net(views)[-1]
    output["joints"] = joints_from_vertices(output["vertices"], arrays)
    return {name: value.float().cpu().numpy() for name, value in output.items()}


def place(result, image, crop, side, focal):
    """The estimate of one right-handed view as the photograph shows it; a left hand is mirrored back."""
    centre_x, centre_y, length = crop
    camera = result["camera"].copy()
    vertices, joints = result["vertices"].copy(), result["joints"].copy()
    if side == "left":
        vertices[:, 0] *= -1
        joints[:, 0] *= -1
        camera[1] *= -1
    height, width = image.shape[:2]
    K = np.array([[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]])
    translation = crop_to_full_camera(torch.tensor(camera)[None], torch.tensor([[centre_x, centre_y]]), torch.tensor([length]),
                                      torch.tensor(K)[None])[0].numpy()
    half = length / 2
    return {"vertices": vertices, "joints": joints, "rotmats": result["rotmats"], "betas": result["betas"], "camera": camera,
            "crop": np.float32([centre_x - half, centre_y - half, centre_x + half, centre_y + half]), "side": np.array(side),
            "translation": np.float32(translation), "focal": np.float32(focal)}


def draw(image, hand, faces):
    """The mesh over the photograph, by the crop's weak perspective."""
    x0, y0, x1, _ = hand["crop"]
    seen = weak_perspective(torch.tensor(hand["vertices"])[None], torch.tensor(hand["camera"])[None])[0].numpy()
    points = np.concatenate([(seen + 1) / 2 * (x1 - x0) + [x0, y0], hand["vertices"][:, 2:]], axis=1)
    return overlay(image, points, faces if hand["side"] == "right" else faces[:, ::-1])


def write_obj(path, vertices, faces):
    """Wavefront OBJ in metres; y and z point up and towards the viewer there, so both change sign."""
    lines = [f"v {x:.6f} {-y:.6f} {-z:.6f}" for x, y, z in vertices]
    path.write_text("\n".join(lines + [f"f {a} {b} {c}" for a, b, c in faces + 1]) + "\n")


def main(argv=None):
    cli = parser(__doc__)
    cli.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="photographs; a folder stands for the images in it")
    cli.add_argument("--checkpoint", required=True, help="RUN/last.pt of finetune_mesh.py")
    cli.add_argument("--out", type=Path, required=True, help="folder for the results")
    cli.add_argument("--boxes", type=Path, help="CSV image,x0,y0,x1,y1[,side]; default: each photograph is one hand's crop")
    cli.add_argument("--side", default="right", choices=["right", "left"], help="side of the hands where --boxes does not say")
    cli.add_argument("--mano", help="the MANO file that the checkpoint was trained with; default: the synthetic hand")
    cli.add_argument("--focal", type=float, help="focal length in pixels, for `translation`; default: the image's longer side")
    cli.add_argument("--batch-size", type=int, default=32)
    add_device_flags(cli, workers=False)
    args = cli.parse_args(argv)
    if args.batch_size < 1 or not (args.focal is None or args.focal > 0):
        raise ValueError("--batch-size and --focal must be positive")
    runtime = setup(args)
    state = load_checkpoint(args.checkpoint, "mesh")
    arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    if state["hand"] != hand_fingerprint(arrays):
        raise ValueError(f"{args.checkpoint} was trained with another hand model than {args.mano or 'the synthetic hand'}: "
                         "pass its file with --mano")
    hand_model = Mano(arrays)
    net = load_mesh(state, hand_model).to(runtime.device)
    faces = hand_model.faces.cpu().numpy()
    images = [inner for path in args.images for inner in (list_images(path) if path.is_dir() else [path])]
    if not images:
        raise ValueError(f"{args.images[0]}: no image in this folder")
    hands, broken, made = find_hands(images, args.boxes, args.side), [], not args.out.exists()
    args.out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(hands), unit="hand")
    for start in range(0, len(hands), args.batch_size):
        batch = []
        for path, box, side, name in hands[start:start + args.batch_size]:
            try:
                image, _ = read_image(path)
                if box is None:                                    # the view is the whole photograph
                    box = whole_box(image.size, state["box_scale"])
                canvas, _ = crop_canvas(image, *square(box, CONTEXT), net.encoder.config["image_size"] * 8 // 7)
            except (ValueError, OSError) as error:
                broken.append(str(error) if str(path) in str(error) else f"{path}: {error}")
                continue
            canvas = canvas[:, ::-1] if side == "left" else canvas
            batch.append((np.asarray(image), square(box, state["box_scale"]), side, name, canvas.transpose(2, 0, 1)))
        if batch:
            results = estimate(net, torch.from_numpy(np.stack([b[-1] for b in batch])), state["box_scale"], arrays, runtime)
        for k, (image, crop, side, name, _) in enumerate(batch):
            hand = place({key: value[k] for key, value in results.items()}, image, crop, side, args.focal or max(image.shape))
            with tempfile.TemporaryDirectory(dir=args.out, prefix=".part") as part:      # a hand's three files appear together
                part = Path(part)
                write_obj(part / f"{name}.obj", hand["vertices"], faces if side == "right" else faces[:, ::-1])
                np.savez(part / f"{name}.npz", **hand)
                save_image(part / f"{name}.png", draw(image, hand, faces))
                for file in part.iterdir():
                    os.replace(file, args.out / file.name)
        bar.update(len(hands[start:start + args.batch_size]))
    bar.close()
    if made and len(broken) == len(hands):
        args.out.rmdir()
    if broken:
        print(*(f"error: {line}" for line in broken[:-1]), sep="\n", end="\n" if len(broken) > 1 else "", file=sys.stderr)
        raise ValueError(f"{broken[-1]} ({len(broken)} of {len(hands)} hands not predicted)")
    print(f"{args.out}: {len(hands)} hands, each as .obj, .npz and .png")


if __name__ == "__main__":
    run(main)
