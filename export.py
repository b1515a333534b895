"""A trained network -> one file, by the suffix: ONNX or torch.export's .pt2, which run without this project,
or a .pt to give away.

    in    image (B,3,S,S)       crops of RIGHT hands, RGB in [0,1]: squares around the middle of a hand's box,
                                `box_scale` times as wide as its longer side. Mirror left hands
    out   vertices (B,778,3)    metres, relative to the wrist, camera frame x right, y down, z forward
          joints (B,21,3)       the same, as FreiHAND defines them
          rotmats (B,16,3,3)    of the hand model: global, then 15 relative ones
          betas (B,10)          its shape
          camera (B,3)          scale, tx, ty: x_n = scale (x + tx) in [-1,1] of the crop

B is free. ImageNet's mean and deviation are inside, and so is the hand model: with --mano, MANO's licence
holds for the file. Its metadata say image_size, box_scale, sides and the faces of the mesh,
as JSON; in a .pt2 they are one extra file, hand.json.

Before anything is written, network and file run on 64 random pictures, at once and some one by one. They are
noise, from two pixels wide to as many as the crop has. The largest distance of a vertex or joint, in space or
through the camera, is printed, with the time that a hand takes alone. A file that is off by more than 0.05 mm
is refused.

A .pt holds what predict.py needs and no more: the averaged weights, matrices in half precision, and the
arguments that rebuild the network. weights/hand.pt is one.
"""

import importlib.util
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mano import Mano, hand_fingerprint, joints_from_vertices, read_mano, weak_perspective
from model import load_mesh
from runtime import parser, run
from saving import load_checkpoint, save_checkpoint, staged_folder
from synthetic_hand import synthetic_mano
from views import MEAN, STD

WEIGHTS = Path(__file__).resolve().parent / "weights" / "hand.pt"
OUTPUTS = ("vertices", "joints", "rotmats", "betas", "camera")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_OFF = 0.05  # mm, from the network to the file
HANDS = 64  # that both are run on
ALONE = 16  # of these, one by one


class PlainHand(nn.Module):
    """The function of mano.Mano in operations that a graph can hold; a test holds the two equal.

    Mano's own are made for training: a loop over parts of the batch, and a backward pass by hand.
    forward(rotmats (B,16,3,3), betas (B,10)) -> vertices (B,778,3), joints (B,21,3).
    """

    def __init__(self, hand):
        super().__init__()
        self.hand = hand
        self.template = hand.template
        self.pose_spread = hand.pose_spread
        self.joint_jacobian = hand.joint_jacobian
        self.turn = hand.turn

    def forward(self, rotmats, betas):
        hand = self.hand
        pose = rotmats[:, 1:].flatten(1) - hand.identity  # (B, 135)
        features = torch.cat([torch.ones_like(betas[:, :1]), betas, pose], dim=1)  # (B, 146)
        points = (features @ hand.blend).unflatten(1, (3, 778)).transpose(1, 2)  # (B, V, 3)
        rest = torch.addmm(hand.rest, betas, hand.rest_dirs)  # (B, 96)
        joints, bones = rest.unflatten(1, (2, 16, 3, 1)).unbind(1)

        local = torch.cat([rotmats, bones], dim=-1)  # (B, 16, 3, 4)
        levels = [local[:, :1]]  # wrist (B, 1, 3, 4); then the joints of the five fingers (B, 5, 3, 4)
        for child in local[:, 1:].unflatten(1, (5, 3)).unbind(2):
            parent = levels[-1]
            turned = parent[..., :3] @ child
            levels.append(torch.cat([turned[..., :3], turned[..., 3:] + parent[..., 3:]], dim=-1))
        fingers = torch.stack(levels[1:], dim=2).flatten(1, 2)  # (B, 15, 3, 4)
        chain = torch.cat([levels[0], fingers], dim=1)

        turns, origins = chain[..., :3], chain[..., 3:]
        moves = torch.cat([turns, origins - turns @ joints], dim=-1)  # (B, 16, 3, 4)
        blended = (hand.weights @ moves.flatten(2)).unflatten(2, (3, 4))  # (B, V, 3, 4)
        vertices = (blended[..., :3] * points[:, :, None]).sum(-1) + blended[..., 3]
        in_file_order = torch.cat([origins[..., 0], vertices.index_select(1, hand.tips)], dim=1)
        return vertices, in_file_order.index_select(1, hand.to_freihand)


class CropToHand(nn.Module):
    """What is exported: image (B,3,S,S), RGB in [0,1] -> a dict of OUTPUTS. net: a HandMesh."""

    def __init__(self, net, arrays):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(STD).view(3, 1, 1))
        regressor = joints_from_vertices(torch.eye(778)[None], arrays)[0]  # (21, 778), because it is linear
        self.register_buffer("regressor", regressor)

    def forward(self, image):
        estimate = self.net((image - self.mean) / self.deviation)[-1]
        estimate["joints"] = self.regressor @ estimate["vertices"]
        return {name: estimate[name] for name in OUTPUTS}


# ------------------------------------------------------------------------------------------ files and running
def trace(module, size):
    """The graph of a CropToHand with a PlainHand, for any number of crops of `size` pixels."""
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, size, size)  # of one, the graph would be for one alone
    return torch.export.export(module, (example,), dynamic_shapes={"image": {0: batch}})


def write_pt2(program, path, facts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a ResNet, whose weights lie in another order
        torch.export.save(program, path, extra_files={"hand.json": json.dumps(facts)})


def read_pt2(path):
    """A function image (B,3,S,S) -> dict of OUTPUTS, tensors, from a file."""
    return torch.export.load(path).module()


def write_onnx(program, path, facts):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        model = torch.onnx.export(program, dynamo=True, input_names=["image"], output_names=list(OUTPUTS),
                                  verbose=False)
    model.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    model.save(path, external_data=False)


def read_onnx(path):
    """As read_pt2."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the network that it is compared with
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def infer(image):
        found = session.run(list(OUTPUTS), {"image": image.numpy()})
        return dict(zip(OUTPUTS, map(torch.from_numpy, found), strict=True))

    return infer


FILES = {".onnx": (write_onnx, read_onnx), ".pt2": (write_pt2, read_pt2)}
KEPT = ("encoder", "head", "hand", "box_scale")  # of a checkpoint, in a .pt


def write_weights(state, path):
    """The averaged weights of a checkpoint, matrices in half precision, and what rebuilds the network.

    What has one axis, such as a BatchNorm's statistics, is small and stays as it is."""
    weights = {name: value.half() if value.is_floating_point() and value.ndim > 1 else value
               for name, value in state["ema"].items()}
    save_checkpoint(path, "mesh", **{name: state[name] for name in KEPT}, ema=weights)


def random_pictures(count, size):
    """(count,3,size,size) in [0,1]: noise of 2, 8, 32 and `size` pixels across, enlarged."""
    noise = torch.Generator().manual_seed(0)
    coarse = [torch.rand(count // 4, 3, width, width, generator=noise) for width in (2, 8, 32, size)]
    return torch.cat([F.interpolate(each, (size, size), mode="bilinear") for each in coarse])


@torch.no_grad()
def compare(network, file, pictures):
    """The largest difference in mm of two functions of pictures, and the milliseconds each takes for one."""
    off = difference(network(pictures), file(pictures))
    seconds = [], []
    for picture in pictures[::len(pictures) // ALONE].split(1):
        found = []
        for function, times in zip((network, file), seconds, strict=True):
            start = time.perf_counter()
            found.append(function(picture))
            times.append(time.perf_counter() - start)
        off = max(off, difference(*found))
    return off, *(1000 * statistics.median(times) for times in seconds)


def difference(a, b):
    """The largest distance in mm of points of two dicts of OUTPUTS, in space or through their cameras."""
    off = []
    for name in ("vertices", "joints"):
        off.append((a[name] - b[name]).norm(dim=2))  # (B, N)
        in_image = weak_perspective(a[name], a["camera"]) - weak_perspective(b[name], b["camera"])
        off.append(in_image.norm(dim=2) / a["camera"][:, :1])
    return float(1000 * torch.cat(off, dim=1).max())


# ------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("--checkpoint", default=WEIGHTS,
                     help="RUN/last.pt of finetune_mesh.py (default: weights/hand.pt beside this file)")
    cli.add_argument("--out", type=Path, required=True, metavar="FILE",
                     help="hand.onnx, hand.pt2 or hand.pt")
    cli.add_argument("--mano", metavar="FILE",
                     help="MANO file that the checkpoint was trained with (default: the synthetic hand)")
    return cli


def check_out(out):
    """ValueError where the file cannot be made here, or is there already."""
    if out.suffix not in (*FILES, ".pt"):
        raise ValueError(f"--out {out}: the name must end in {', '.join(FILES)} or .pt")
    if out.exists():
        raise ValueError(f"--out {out} is there already: choose another name, or delete it first")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if out.suffix == ".onnx" and missing:
        raise ValueError(f"--out {out} needs {', '.join(missing)}: pip install -r requirements-export.txt (a "
                         ".pt2 needs nothing)")


def main(argv=None):
    args = flags().parse_args(argv)
    check_out(args.out)
    state = load_checkpoint(args.checkpoint, "mesh")
    arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    if state.get("hand") != hand_fingerprint(arrays):
        raise ValueError(f"{args.checkpoint} was trained with another hand model than "
                         f"{args.mano or 'the synthetic hand'}: pass its file with --mano")
    hand = Mano(arrays)
    network = CropToHand(load_mesh(state, hand), arrays).eval()
    size = network.net.encoder.config["image_size"]
    if args.out.suffix == ".pt":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_weights(state, args.out)
        halved = CropToHand(load_mesh(load_checkpoint(args.out, "mesh"), hand), arrays).eval()
        off, before, _ = compare(network, halved, random_pictures(HANDS, size))
        print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; half precision moves a point by at most "
              f"{off:.2g} mm on {HANDS} random pictures; {before:.1f} ms a hand")
        return
    program = trace(CropToHand(load_mesh(state, PlainHand(hand)), arrays).eval(), size)
    facts = {"image_size": size, "box_scale": state["box_scale"], "sides": "right; mirror left hands",
             "faces": hand.faces.tolist()}
    write, read = FILES[args.out.suffix]
    with staged_folder(args.out.parent) as folder:
        path = folder / args.out.name
        write(program, path, facts)
        off, before, after = compare(network, read(path), random_pictures(HANDS, size))
        if not off <= MOST_OFF:  # so also NaN
            raise ValueError(f"--out {args.out}: the file would differ from the network by {off:.2g} mm, so "
                             "it was not written; try another version of torch")
        megabytes = path.stat().st_size / 1e6
    print(f"{args.out}: {megabytes:.1f} MB, crops of {size} pixels; at most {off:.2g} mm from the network on "
          f"{HANDS} random pictures; {after:.1f} ms a hand, the network {before:.1f} ms")


if __name__ == "__main__":
    run(main)
