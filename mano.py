"""MANO, the hand model: pose and shape to 778 vertices and 21 named joints; its file; rotations; cameras.

Units are metres. The camera frame has x right, y down, z forward. Image coordinates are in [-1, 1], with +-1
at the edges of the image. B = batch, J = 21 joints in FreiHAND's order, V = 778 vertices. "MANO eq." is an
equation of Romero, Tzionas and Black, "Embodied Hands", SIGGRAPH Asia 2017.

MANO's files are licensed: download MANO_RIGHT.pkl from mano.is.tue.mpg.de and read it with `read_mano`. The
layer never puts it into a checkpoint. The example takes random numbers instead, so it runs without the file.

Example::

    import numpy as np, torch
    from mano import ARRAY_SHAPES, Mano, rotmat_from_axis_angle, weak_perspective

    rng = np.random.default_rng(0)                                  # with MANO: read_mano("MANO_RIGHT.pkl")
    arrays = {name: rng.random(shape) for name, shape in ARRAY_SHAPES.items()}
    hand = Mano(arrays)
    pose = torch.zeros(2, 16, 3)                                    # axis-angle: wrist, then 15 joints
    pose[:, 1:] += hand.hands_mean                                  # if the pose is relative to the mean pose
    vertices, joints = hand(rotmat_from_axis_angle(pose), torch.zeros(2, 10))     # (2, 778, 3), (2, 21, 3)
    camera = torch.tensor([[8.0, 0.1, 0.0]]).repeat(2, 1)           # scale, tx, ty of the crop
    points = weak_perspective(joints - joints[:, :1], camera)       # (2, 21, 2) in [-1, 1]
    assert torch.allclose(points[:, 0], torch.tensor([0.8, 0.0]))   # the wrist: scale * (0 + tx), scale * ty

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import functools
import hashlib
import io
import pickle
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Arrays = dict[str, np.ndarray]  # what `read_mano` returns and `Mano` takes: see ARRAY_SHAPES

# ------------------------------------------------------------------------------------------ names and orders

FINGERS = ("thumb", "index", "middle", "ring", "little")
JOINT_NAMES = ("wrist", *(f"{finger}{part}" for finger in FINGERS for part in ("1", "2", "3", "_tip")))

# FreiHAND[i] = MANO[MANO_TO_FREIHAND[i]]. MANO's order, as in HO-3D's labels: the file's 16 joints (wrist;
# three each of index, middle, little, ring, thumb), then five tips from thumb to little finger.
MANO_TO_FREIHAND = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
FREIHAND_TO_MANO = tuple(MANO_TO_FREIHAND.index(i) for i in range(21))
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)  # of the file's 16 joints

# Tip vertices, thumb to little finger. Wrong ones cost PA-MPJPE: docs/evaluation.md has the numbers.
TIPS = {
    "freihand": (744, 320, 443, 555, 672),  # FreiHAND's labels, PeCLR, SiMHand
    "smplx": (744, 320, 443, 554, 671),  # smplx, HaMeR, WiLoR
    "manopth": (745, 317, 444, 556, 673),  # manopth, manotorch, DexYCB: right hands
    "manopth445": (745, 317, 445, 556, 673),  # the same projects' left hands; InterHand2.6M's regressor
    "ho3d": (744, 333, 444, 555, 672),  # HO-3D
    "handoccnet": (728, 353, 442, 576, 694),  # HandOccNet
}
_MIDDLE_TIP = 12  # in FreiHAND's order

# How labels are defined: which 16 joints, and which tip vertices.
_LABEL_DEFINITIONS = {name: ("kinematic", tips) for name, tips in TIPS.items()} | {
    "freihand": ("regressed", TIPS["freihand"]),
    "interhand": ("regressed", TIPS["manopth445"]),
    "assemblyhands": ("regressed", TIPS["freihand"]),  # annotated without a mesh; this definition is ours
}


def _tip_vertices(name):
    if name not in TIPS:
        raise ValueError(f"tips={name!r}: unknown fingertip set, use one of {', '.join(TIPS)}")
    return list(TIPS[name])


def _no_autocast(x):
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


class _Itself:
    """A key that is equal to itself alone. Numpy's arrays cannot be keys."""

    def __init__(self, array):
        self.array = array

    def __eq__(self, other):
        return isinstance(other, _Itself) and self.array is other.array

    def __hash__(self):
        return id(self.array)


@functools.lru_cache(maxsize=64)
def _constant(values, dtype, device):
    """Numbers (a tuple, or an array as _Itself) as a tensor, which is made once for each type and device.

    A copy to a GPU in every step would make the host wait for the GPU.
    """
    values = values.array if isinstance(values, _Itself) else values
    with torch.inference_mode(False):  # a later step may need gradients through it
        return torch.tensor(values, dtype=dtype, device=device)


def _take(points, numbers):
    """Points (B, N, 3) -> those with these numbers (B, M, 3); numbers: a tuple."""
    return points.index_select(1, _constant(tuple(numbers), torch.int64, points.device))


def _regressed(vertices, arrays):
    """The 16 joints without tips, (B, 16, 3), in MANO's order, from a posed mesh (B, 778, 3)."""
    regressor = _constant(_Itself(arrays["J_regressor"]), vertices.dtype, vertices.device)
    with _no_autocast(vertices):
        return regressor @ vertices


def joints_from_vertices(vertices: torch.Tensor, arrays: Arrays, tips: str = "freihand") -> torch.Tensor:
    """Joints regressed from a posed mesh (B, 778, 3) -> (B, 21, 3), FreiHAND's order, same unit and frame.

    FreiHAND makes its labels so, with "freihand" tips (lmb-freiburg/freihand utils/mano_utils.py). The joints
    of `Mano` differ by millimetres once fingers bend; they are kinematic, and a mesh does not contain them.
    arrays: from `read_mano`, not changed in place afterwards: the regressor is copied to the device once.
    Left and right hands have the same regressor. ValueError: unknown `tips`.
    """
    tip_vertices = _tip_vertices(tips)
    joints = torch.cat([_regressed(vertices, arrays), _take(vertices, tip_vertices)], dim=1)  # MANO's order
    return _take(joints, MANO_TO_FREIHAND)


def labelled_joints(vertices: torch.Tensor, joints: torch.Tensor, arrays: Arrays, definition: str,
                    left: torch.Tensor | None = None) -> torch.Tensor:
    """Joints (B, 21, 3) as a data set defines its labels, from vertices (B, 778, 3) and joints of `Mano`.

    definition: "freihand", "interhand", "assemblyhands" take the 16 joints from the mesh, as
    `joints_from_vertices` does. The other names of TIPS (HO-3D: "ho3d", DexYCB: "manopth") keep the kinematic
    ones. Any five tip vertices: "kinematic 744 320 443 555 672", "regressed 744 320 443 555 672".
    left: (B,) bool, True where the hand was a left one; DexYCB gives those another middle tip.
    ValueError: unknown definition.
    """
    source, _, tips = definition.partition(" ")
    tips = tips.split()
    if definition in _LABEL_DEFINITIONS:
        source, tips = _LABEL_DEFINITIONS[definition]
    if source not in ("regressed", "kinematic") or len(tips) != 5:
        raise ValueError(f"joints {definition!r}: unknown definition, use {', '.join(_LABEL_DEFINITIONS)}")

    chain = _take(joints, FREIHAND_TO_MANO[:16])
    joints = _regressed(vertices, arrays) if source == "regressed" else chain
    tips = [int(tip) for tip in tips]
    joints = _take(torch.cat([joints, _take(vertices, tips)], dim=1), MANO_TO_FREIHAND)
    if definition == "manopth" and left is not None:
        left_tip = vertices[:, TIPS["manopth445"][2]]  # (B, 3)
        joints[:, _MIDDLE_TIP] = torch.where(left[:, None], left_tip, joints[:, _MIDDLE_TIP])
    return joints


# ------------------------------------------------------------------------------------------ rotations


def _at_least_float32(x):
    """Half precision becomes float32 (networks in mixed precision produce it); float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotmat_from_axis_angle(axis_angle: torch.Tensor) -> torch.Tensor:
    """Rodrigues' formula: axis_angle (..., 3), rad -> rotation matrices (..., 3, 3); exact gradient at zero.

    R = cos(a) I + sin(a)/a [v]x + (1 - cos(a))/a^2 v v^T. No matrix product, so autocast does not round it.
    """
    v = _at_least_float32(axis_angle)
    square = (v * v).sum(-1)[..., None, None]  # a^2
    small = square < 1e-8  # there the series is exact; sqrt has no gradient at 0
    angle = torch.where(small, 1.0, square).sqrt()
    sine = torch.where(small, 1 - square / 6, torch.sin(angle) / angle)  # sin(a) / a
    half_sine = torch.sin(angle / 2) / angle
    cosine = torch.where(small, 0.5 - square / 24, 2 * half_sine**2)  # (1 - cos(a)) / a^2

    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))  # [v]x
    outer = cosine * v[..., :, None] * v[..., None, :]
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    return (1 - cosine * square) * eye + sine * cross + outer


def axis_angle_from_rotmat(rotmats: torch.Tensor) -> torch.Tensor:
    """Inverse of Rodrigues' formula: (..., 3, 3) -> (..., 3), angle in [0, pi] rad. Accurate at 0 and at pi.

    At pi both axes are right, and either may come back.
    """
    xx, xy, xz, yx, yy, yz, zx, zy, zz = _at_least_float32(rotmats).flatten(-2).unbind(-1)
    # With q = (w, x, y, z) the unit quaternion, row i of this matrix is 4 q_i q.
    entries = [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy]
    entries += [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx]
    entries += [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy]
    entries += [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz]
    rows = torch.stack(entries, dim=-1).unflatten(-1, (4, 4))
    longest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]  # no cancellation in this row
    q = F.normalize(torch.take_along_dim(rows, longest, dim=-2)[..., 0, :], dim=-1)
    q = torch.where(q[..., :1] < 0, -q, q)

    w, xyz = q.split([1, 3], dim=-1)
    square = (xyz * xyz).sum(-1, keepdim=True)
    small = square < 1e-12
    half_sine = torch.where(small, 1.0, square).sqrt()  # sine of half the angle
    return xyz * torch.where(small, 2.0, 2 * torch.atan2(half_sine, w) / half_sine)


def rotmat_from_6d(x: torch.Tensor) -> torch.Tensor:
    """Zhou et al., CVPR 2019: (..., 6) = a1 then a2 -> (..., 3, 3) with the COLUMNS b1, b2, b1 x b2.

    HaMeR's layout. PyMAF interleaves a1 and a2, which gives other rotations.
    """
    a1, a2 = _at_least_float32(x).split(3, dim=-1)
    b1 = F.normalize(a1, dim=-1)
    b2 = F.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2)], dim=-1)


def nearest_rotation(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (..., 3, 3) -> the rotations nearest to them in the Frobenius norm."""
    u, _, v = torch.linalg.svd(matrices)
    sign = torch.det(u @ v).sign()
    flip = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)
    return (u * flip[..., None, :]) @ v


# ------------------------------------------------------------------------------------------ cameras


def weak_perspective(points: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
    """points (B, N, 3) m, camera (B, 3) = scale, tx, ty of the crop -> (B, N, 2) = scale * (xy + t)."""
    scale = camera[:, None, :1]
    return scale * (points[..., :2] + camera[:, None, 1:])


def crop_to_full_camera(camera: torch.Tensor, box_center: torch.Tensor, box_side: torch.Tensor,
                        K: torch.Tensor) -> torch.Tensor:
    """Translation (B, 3), m, of root-relative points, so that K projects them where the crop's camera did.

    camera (B, 3): weak perspective of the crop, for points relative to the root (the wrist).
    box_center (B, 2), box_side (B,): the square crop, in PIXEL-EDGE coordinates of the image (0 to width).
    K (B, 3, 3), or (3, 3) for all: intrinsics without skew, to PIXEL-CENTRE coordinates (edge minus 0.5).

    The root lands exactly on its weak-perspective pixel, and the scale at the root's depth is the crop's. If
    fx != fy, no depth matches both; the depth of their geometric mean keeps the area. Points at other depths
    differ by true perspective, which camera.place_points takes into account. Ours: PyMAF and HaMeR assume one
    focal length and a centred principal point.
    """
    scale, tx, ty = camera.unbind(-1)
    fx, fy = K[..., 0, 0], K[..., 1, 1]
    cx, cy = K[..., 0, 2], K[..., 1, 2]
    pixels_per_metre = 0.5 * box_side * scale  # at the root's depth
    u = box_center[..., 0] + pixels_per_metre * tx - 0.5  # the root's pixel
    v = box_center[..., 1] + pixels_per_metre * ty - 0.5
    depth = (fx * fy).sqrt() / pixels_per_metre
    return torch.stack([(u - cx) * depth / fx, (v - cy) * depth / fy, depth], dim=-1)


# ------------------------------------------------------------------------------------------ left and right

_FLIP = np.array([-1.0, 1.0, 1.0])  # S = diag(-1, 1, 1) mirrors in x


def mirror_arrays(arrays: Arrays) -> Arrays:
    """The other hand's arrays: x negated, rotations conjugated by S = diag(-1, 1, 1), faces turned round.

    Betas keep their meaning. Axis-angle (a, b, c) of one hand is (a, -b, -c) of the other.
    """
    axis_angle = np.tile(-_FLIP, 15)  # an axis is a pseudo-vector: (1, -1, -1)
    rotmat = np.tile(np.outer(_FLIP, _FLIP).ravel(), 15)  # factors of the entries of S R S, row by row
    return arrays | {
        "v_template": arrays["v_template"] * _FLIP,
        "J": arrays["J"] * _FLIP,
        "shapedirs": arrays["shapedirs"] * _FLIP[:, None],
        "posedirs": arrays["posedirs"] * _FLIP[:, None] * rotmat,
        "hands_mean": arrays["hands_mean"] * axis_angle,
        "hands_components": arrays["hands_components"] * axis_angle,
        "f": arrays["f"][:, ::-1].copy(),
    }


def side_of(arrays: Arrays) -> str | None:
    """MANO's right hand has its fingers towards -x, the left one towards +x. None: neither is clear."""
    x = (arrays["J_regressor"] @ arrays["v_template"])[:13, 0]  # wrist and four fingers, without the thumb
    steps = x[1:] - x[list(PARENTS[1:13])]
    if (steps < 0).all():
        return "right"
    if (steps > 0).all():
        return "left"
    return None


def _repair_left(arrays):
    """MANO_LEFT.pkl has the right hand's `shapedirs` (vchoutas/smplx issue 48): negate x, if not yet done.

    Larger hands are both longer and broader: over the ten shape directions, growth along x and across x go
    together. In the file as shipped, only the template is mirrored, so growth along x runs backwards. Arrays
    that show neither (random ones) count as shipped.
    """
    centred = arrays["v_template"] - arrays["v_template"].mean(0)  # (V, 3)
    outwards = centred / np.linalg.norm(centred, axis=0)
    growth = np.einsum("vck,vc->ck", arrays["shapedirs"], outwards)  # (3, 10)
    agreement = (growth[0] * (growth[1] + growth[2])).sum()
    if agreement > 0.01 * (arrays["shapedirs"] ** 2).sum():
        return arrays
    return arrays | {"shapedirs": arrays["shapedirs"] * _FLIP[:, None]}


# ------------------------------------------------------------------------------------------ the layer


def _levels(transforms):
    """(B, 16, 3, 4) -> views: wrist (B, 1, 3, 4); first, second, third joints of the fingers (B, 5, 3, 4)."""
    fingers = transforms[:, 1:].unflatten(1, (5, 3))
    return transforms[:, :1], *fingers.unbind(2)


def _blended_parts(weights, moves, kept, *tensors):
    """For each part of the batch: the blended matrices sum_i w_i A_i (B, 3, 4, V) and that part of `tensors`.

    A part is 64 hands on a CPU, whose cache holds them, and the whole batch elsewhere. One buffer serves all.
    kept: the matrices of the whole batch, where they are known already.
    """
    if kept is not None:
        yield kept, *tensors
        return
    size = 64 if moves.device.type == "cpu" else max(1, len(moves))
    buffer = moves.new_empty(min(size, len(moves)), 3, 4, len(weights))
    splits = [x.split(size) for x in (moves, *tensors)]
    for move, *part in zip(*splits, strict=True):
        blended = buffer[: len(move)]
        torch.mm(move.flatten(0, 1), weights.T, out=blended.flatten(0, 2))
        yield blended, *part


class _Skinning(torch.autograd.Function):
    """rotmats (B, 16, 3, 3), betas (B, 10), a Mano -> vertices, joints; with a backward written by hand.

    Autograd would keep the blended matrices (12 numbers a vertex) several times, and would need more time to
    start the chain's small products than to compute them. d_x is the gradient of x. Differentiable once.
    """

    @staticmethod
    def forward(ctx, rotmats, betas, hand):
        # Template (factor 1), shape and pose in one product, before any rotation: MANO eq. 2 to 5.
        one = betas.new_ones(len(betas), 1)
        pose = rotmats[:, 1:].flatten(1) - hand.identity  # (B, 135)
        features = torch.cat([one, betas, pose], dim=1)  # (B, 146)
        points = torch.mm(features, hand.blend).unflatten(1, (3, 778))  # (B, 3, V)

        # Rest joints J_i and bones J_i - J_parent(i), linear in betas: eq. 10 with J_regressor multiplied in.
        rest = torch.addmm(hand.rest, betas, hand.rest_dirs)  # (B, 96)
        joints, bones = rest.unflatten(1, (2, 16, 3, 1)).unbind(1)

        # G_i = G_parent(i) [R_i | J_i - J_parent(i)], from G_0 = [R_0 | J_0]; five fingers at a time.
        local = torch.cat([rotmats, bones], dim=-1)  # (B, 16, 3, 4)
        chain = local.clone()
        for parent, child in pairwise(_levels(chain)):
            child.copy_(parent[..., :3] @ child)
            child[..., 3] += parent[..., 3]

        # A_i moves J_i to the origin, then applies G_i: eq. 3.
        turns = chain[..., :3]
        moves = torch.cat([turns, chain[..., 3:] - turns @ joints], dim=-1)
        moves = moves.flatten(2).transpose(1, 2).contiguous()  # (B, 12, 16)

        # vertex = sum_i w_i A_i point: eq. 2.
        vertices = points.new_empty(len(points), 778, 3)
        for blended, point, vertex in _blended_parts(hand.weights, moves, None, points, vertices):
            posed = torch.addcmul(blended[:, :, 3], blended[:, :, 0], point[:, None, 0])  # (B, 3, V)
            posed.addcmul_(blended[:, :, 1], point[:, None, 1])
            posed.addcmul_(blended[:, :, 2], point[:, None, 2])
            vertex.copy_(posed.transpose(1, 2))

        ctx.hand = hand
        kept = blended if len(blended) == len(vertices) else None  # of many parts, each is computed again
        ctx.save_for_backward(points, joints, local, chain, moves, kept)
        in_file_order = torch.cat([chain[..., 3], vertices.index_select(1, hand.tips)], dim=1)  # (B, 21, 3)
        return vertices, in_file_order.index_select(1, hand.to_freihand)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_vertices, d_joints):
        hand = ctx.hand
        points, joints, local, chain, moves, kept = ctx.saved_tensors
        d_origins, d_tips = d_joints.index_select(1, hand.to_mano).split([16, 5], dim=1)

        # Skinning: vertices -> points before rotation, and the moves A_i.
        d_points = torch.empty_like(points)
        d_moves = torch.empty_like(moves)
        parts = _blended_parts(hand.weights, moves, kept, points, d_vertices, d_tips, d_points, d_moves)
        for blended, point, d_vertex, d_tip, d_point, d_move in parts:
            d_posed = torch.empty_like(point).copy_(d_vertex.transpose(1, 2))  # (B, 3, V)
            d_posed.index_add_(2, hand.tips, d_tip.transpose(1, 2))
            torch.mul(blended[:, 0, :3], d_posed[:, 0, None], out=d_point)
            d_point.addcmul_(blended[:, 1, :3], d_posed[:, 1, None])
            d_point.addcmul_(blended[:, 2, :3], d_posed[:, 2, None])
            # Matrices that nobody needs any more give their memory to their gradient.
            d_blended = blended if kept is None else torch.empty_like(blended)
            torch.mul(d_posed[:, :, None], point[:, None], out=d_blended[:, :, :3])
            d_blended[:, :, 3] = d_posed
            torch.mm(d_blended.flatten(0, 2), hand.weights, out=d_move.flatten(0, 1))
        d_features = torch.mm(d_points.flatten(1), hand.blend[1:].T)  # (B, 10 + 135)
        d_betas, d_pose = d_features.split([10, 135], dim=1)

        # Moves A_i -> chain G_i and rest joints.
        d_chain = d_moves.transpose(1, 2).unflatten(2, (3, 4)).contiguous()  # (B, 16, 3, 4)
        d_rest_joints = chain[..., :3].mT @ -d_chain[..., 3:]
        d_chain[..., :3] -= d_chain[..., 3:] * joints.mT
        d_chain[..., 3] += d_origins

        # From the tips to the root: a parent collects from its children, which become gradients of `local`.
        levels = list(zip(_levels(chain), _levels(local), _levels(d_chain), strict=True))
        for upper, lower in reversed(list(pairwise(levels))):
            parent, _, d_parent = upper
            _, step, d_child = lower
            d_up = torch.cat([d_child @ step.mT, d_child[..., 3:]], dim=-1)
            is_wrist = parent.shape[1] == 1  # the parent of all five fingers
            d_parent += d_up.sum(1, keepdim=True) if is_wrist else d_up
            d_child.copy_(parent[..., :3].mT @ d_child)
        d_rotmats, d_bones = d_chain.split([3, 1], dim=-1)
        d_rotmats[:, 1:] += d_pose.unflatten(1, (15, 3, 3))
        d_rest = torch.cat([d_rest_joints.flatten(1), d_bones.flatten(1)], dim=1)  # (B, 96)
        return d_rotmats, torch.addmm(d_betas, d_rest, hand.rest_dirs.T), None


class Mano(nn.Module):
    """MANO: forward(rotmats (B, 16, 3, 3), betas (B, 10)) -> vertices (B, 778, 3), joints (B, 21, 3), metres.

    arrays: from `read_mano`. rotmats: the global one about the wrist J0(betas), then 15 relative ones in the
    file's order (index, middle, little, ring, thumb). The layer adds no `hands_mean`: add it to the pose.
    joints: 16 of the kinematic chain and five tip vertices chosen by `tips`; FreiHAND's order, not centred.

    side="left" takes the official left file and repairs its `shapedirs`, unless they are repaired already. It
    also takes a right hand's arrays and mirrors them. repair=False keeps a left file's own `shapedirs`, which
    DexYCB's labels were made with. On a left hand, tips="manopth" is that project's list for left hands.

    Attributes: faces (1538, 3) int64, template (778, 3), hands_mean (15, 3) axis-angle, side; pose_spread L
    (45, 45), whose L L^T is the covariance of the file's natural poses, axis-angle. No state_dict contains
    them. Computes in float32 (float64 after `.double()`), also under autocast. Differentiable once.
    ValueError: a left hand's arrays with side="right", an unknown side or fingertip set, wrong input shapes.
    """

    def __init__(self, arrays: Arrays, side: str = "right", tips: str = "freihand", repair: bool = True):
        super().__init__()
        if side not in ("right", "left"):
            raise ValueError(f"side={side!r}: use 'right' or 'left'")
        arrays_side = side_of(arrays)
        if side == "right" and arrays_side == "left":
            raise ValueError("these arrays are a left hand's: pass side='left', or read MANO_RIGHT.pkl")
        if side == "left":
            if arrays_side == "right":
                arrays = mirror_arrays(arrays)
            elif repair:
                arrays = _repair_left(arrays)
            if tips == "manopth":
                tips = "manopth445"
        self.side = side

        template = arrays["v_template"]
        blend = np.concatenate([template[..., None], arrays["shapedirs"], arrays["posedirs"]], axis=2)
        joints = np.einsum("jv,vck->jck", arrays["J_regressor"], blend[..., :11])  # (16, 3, 1 + 10)
        bones = joints - joints[[0, *PARENTS[1:]]]
        bones[0] = joints[0]
        rest = np.stack([joints, bones]).reshape(96, 11)  # columns: template, ten shape directions
        self._add_buffer("template", template)
        self._add_buffer("blend", blend.transpose(2, 1, 0).reshape(146, -1))  # (1 + 10 + 135, 3 V)
        self._add_buffer("rest", rest[:, 0])
        self._add_buffer("rest_dirs", rest[:, 1:].T)
        self._add_buffer("weights", arrays["weights"])
        self._add_buffer("identity", np.tile(np.eye(3).ravel(), 15))
        self._add_buffer("hands_mean", np.reshape(arrays["hands_mean"], (15, 3)))
        self._add_buffer("faces", arrays["f"], torch.int64)
        self._add_buffer("tips", _tip_vertices(tips), torch.int64)
        self._add_buffer("to_freihand", MANO_TO_FREIHAND, torch.int64)
        self._add_buffer("to_mano", FREIHAND_TO_MANO, torch.int64)
        self._add_buffer("moves", _moved_joints())
        poses = arrays["hands_coeffs"] @ arrays["hands_components"]
        self._add_buffer("pose_spread", np.linalg.cholesky(np.cov(poses.T) + 0.02 ** 2 * np.eye(45)))

    def _add_buffer(self, name, values, dtype=torch.float32):
        """Not persistent: no state_dict, and so no checkpoint, contains the licensed arrays."""
        self.register_buffer(name, torch.tensor(np.ascontiguousarray(values), dtype=dtype), persistent=False)

    def forward(self, rotmats: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if rotmats.shape[1:] != (16, 3, 3) or betas.shape[1:] != (10,) or len(rotmats) != len(betas):
            raise ValueError(_shape_message(rotmats, betas))
        with _no_autocast(rotmats):
            return _Skinning.apply(rotmats.to(self.template.dtype), betas.to(self.template.dtype), self)

    def turn(self, rotmats: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotations (B, 16, 3, 3), each turned in its own frame by an axis-angle of turns (B, 16, 3)."""
        return rotmats @ rotmat_from_axis_angle(turns)

    def joint_jacobian(self, rotmats: torch.Tensor, joints: torch.Tensor) -> torch.Tensor:
        """How the joints (B, 21, 3) of `forward` move with the turns of `turn`: (B, 21, 3, 16, 3), metres a
        radian, of which the last two say joint and axis. As of rigid bones: pose blend shapes, which move the
        tips a little, are left out (ours)."""
        fingers = rotmats[:, 1:].unflatten(1, (5, 3))
        frames = [rotmats[:, None, 0].expand(-1, 5, -1, -1)]
        for part in range(3):  # PARENTS: five chains of three
            frames.append(frames[-1] @ fingers[:, :, part])  # (B, 5, 3, 3) to the camera
        frames = torch.cat([rotmats[:, :1], torch.stack(frames[1:], 2).flatten(1, 2)], dim=1)  # (B, 16, 3, 3)
        levers = joints[:, None] - joints[:, self.to_mano[:16], None]  # (B, 16, 21, 3)
        axes = frames.transpose(2, 3)[:, :, :, None]  # (B, 16, 3, 1, 3): a turn about the k-th axis, ...
        moved = torch.linalg.cross(axes, levers[:, :, None])  # ..., and where it takes a joint
        return (moved * self.moves[:, None, :, None]).permute(0, 3, 4, 1, 2)


def _moved_joints():
    """(16, 21) 1 where a rotation moves a joint: joints of the file, by FreiHAND's order."""
    parents = (*PARENTS, 15, 3, 6, 12, 9)  # and of the tips, thumb to little finger
    moves = np.zeros((16, 21))
    for joint, number in enumerate(MANO_TO_FREIHAND):
        while (number := parents[number]) >= 0:
            moves[number, joint] = 1
    return moves


def _shape_message(rotmats, betas):
    given = f"rotmats {tuple(rotmats.shape)}, betas {tuple(betas.shape)}: need (B, 16, 3, 3), (B, 10)"
    if rotmats.shape[1:] in ((48,), (16, 3)):
        return (f"{given}. Convert axis-angle: rotmat_from_axis_angle(pose.reshape(-1, 16, 3)). If it is "
                "relative to MANO's mean pose, add hands_mean (15, 3) to the finger joints first")
    if rotmats.shape[1:] in ((96,), (16, 6)):
        return f"{given}. Convert 6-D rotations: rotmat_from_6d(pose.reshape(-1, 16, 6))"
    return given


# ------------------------------------------------------------------------------------------ the official file

# hands_coeffs may have any number of rows.
ARRAY_SHAPES = {
    "v_template": (778, 3), "shapedirs": (778, 3, 10), "posedirs": (778, 3, 135), "J_regressor": (16, 778),
    "weights": (778, 16), "f": (1538, 3), "kintree_table": (2, 16), "hands_components": (45, 45),
    "hands_mean": (45,), "hands_coeffs": (1554, 45), "J": (16, 3)}
_INTEGER_ARRAYS = ("f", "kintree_table")
_DOWNLOAD = "MANO is licensed; see mano.is.tue.mpg.de (MANO_RIGHT.pkl and MANO_LEFT.pkl of mano_v1_2.zip)"
_OFFICIAL_MD5 = ("fd5a9d35f914987cf1cc04ffe338caa1", "11aeaca8631aa20db964d4eba491e885")  # right, left; v1.2


class _Inert:
    """Replaces every class that a pickle names: it keeps what it is given and does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


# What the official files name, and what a dictionary names that Python 3 saved again: with any numpy and
# scipy, with or without chumpy, in any protocol. A file can call no object of numpy, scipy, chumpy or Python.
_ALLOWED_NAMES = (
    "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct",
    "numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer", "numpy ndarray", "numpy dtype",
    "scipy.sparse.csc csc_matrix", "scipy.sparse._csc csc_matrix",
    "chumpy.reordering Select", "chumpy.ch Ch",
    "__builtin__ set", "builtins set", "__builtin__ object", "builtins object")
_INERT_CLASSES = {name: type(name.split()[1], (_Inert,), {}) for name in _ALLOWED_NAMES}


def _encode(text, encoding):
    """In place of _codecs.encode, which protocols 0 to 2 call to hold bytes."""
    return str.encode(text, "latin1")


def _inert_object(kind, base, state):
    """In place of copyreg._reconstructor, with which protocols 0 and 1 make objects."""
    if kind not in _INERT_CLASSES.values():
        raise ValueError("an object of no class")
    return kind()


_STAND_INS = _INERT_CLASSES | {
    "_codecs encode": _encode,
    "copy_reg _reconstructor": _inert_object, "copyreg _reconstructor": _inert_object}


class _Unpickler(pickle._Unpickler):
    """pickle's Python version: its memo is a dict. The C version allocates what a hostile file asks for."""

    def find_class(self, module, name):
        if f"{module} {name}" not in _STAND_INS:
            raise ValueError(f"it names {module}.{name}, which no MANO file does; nothing in it was run")
        return _STAND_INS[f"{module} {name}"]


def _numbers(raw, dtype, shape, order):
    """The ndarray of some bytes, as the inert dtype describes them."""
    code = dtype.args[0]
    if not re.fullmatch("[fiu][1248]", code):
        raise ValueError(f"an array of type {code!r}")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, np.dtype(code).newbyteorder(dtype.state[1])).reshape(shape, order=order)


def _array_from(item):
    """The ndarray that an inert object stands for. An ndarray (from an .npz) stays as it is."""
    if isinstance(item, np.ndarray):
        return item
    kind = type(item).__name__
    if kind == "_reconstruct":
        _, shape, dtype, fortran, raw = item.state
        return _numbers(raw, dtype, shape, "F" if fortran else "C")
    if kind == "_frombuffer":  # protocol 5
        return _numbers(*item.args)
    if kind == "csc_matrix":
        data = _array_from(item.state["data"])
        rows = _array_from(item.state["indices"])
        starts = _array_from(item.state["indptr"])  # column c is data[starts[c]:starts[c + 1]]
        columns = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        dense = np.zeros((16, len(starts) - 1))
        np.add.at(dense, (rows, columns), data)
        return dense
    if kind == "Ch":
        return _array_from(item.state["x"])
    if kind == "Select":  # mattloper/chumpy chumpy/reordering.py
        flat = _array_from(item.state["a"]).ravel()
        chosen = flat[_array_from(item.state["idxs"])]
        return chosen.reshape(item.state.get("preferred_shape", -1))
    raise ValueError(f"a {kind} where an array belongs")


def _checked(name, array):
    """The array as float64 or int64. ValueError: wrong type or shape, numbers that cannot be used."""
    is_integer = name in _INTEGER_ARRAYS
    if array.dtype.kind not in ("iu" if is_integer else "fiu"):
        raise ValueError(f"{name} has type {array.dtype}")
    shape = ARRAY_SHAPES[name]
    if name == "hands_coeffs":
        shape = (*array.shape[:1], 45)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, needs {ARRAY_SHAPES[name]}")

    array = np.array(array, np.int64 if is_integer else np.float64, order="C")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if name == "f" and (array.min() < 0 or array.max() >= 778):
        raise ValueError(f"f names vertices {array.min()} to {array.max()}, needs 0 to 777")
    if name == "kintree_table":
        if array[0, 0] == 2**32 - 1:  # -1, stored as uint32
            array[0, 0] = -1
        if not np.array_equal(array[0], PARENTS):
            raise ValueError(f"kintree_table[0] is {array[0].tolist()}, needs {list(PARENTS)}")
    return array


def _read_bytes(path):
    try:
        if path.stat().st_size > 2**26:
            raise ValueError(f"{path}: larger than any MANO file (4 MB). {_DOWNLOAD}")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file. {_DOWNLOAD}") from None
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}. {_DOWNLOAD}") from None


def read_mano(path: Path | str) -> Arrays:
    """The official MANO_RIGHT.pkl or MANO_LEFT.pkl (v1.2), or a file with the same keys -> dict of arrays.

    Such a file is an .npz, or a pickle that Python 3 saved again, with chumpy's objects or without.
    Keys and shapes: ARRAY_SHAPES. Metres and radians in float64; the faces `f` and `kintree_table` in int64,
    where the root's parent is -1. Needs neither chumpy nor scipy. It runs nothing that the file asks for.
    `np.savez(path, **arrays)` then makes a plain file. A pickle whose checksum is not official (v1.2)
    is read, with a note on standard error.
    ValueError: not such a file, and why. OSError: it cannot be opened.
    """
    path = Path(path)
    data = _read_bytes(path)
    is_npz = data[:2] == b"PK"
    try:
        if is_npz:
            content = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of arrays")
        missing = [name for name in ARRAY_SHAPES if name not in content]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        arrays = {name: _checked(name, _array_from(content[name])) for name in ARRAY_SHAPES}
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a MANO file: {reason}. {_DOWNLOAD}") from error
    if not is_npz and hashlib.md5(data, usedforsecurity=False).hexdigest() not in _OFFICIAL_MD5:
        print(f"note: {path} reads well, but is not the official v1.2 file: its md5 differs", file=sys.stderr)
    return arrays


def hand_fingerprint(arrays: Arrays) -> str:
    """Twelve characters that differ between hand models: a checkpoint keeps them, not the licensed arrays."""
    digest = hashlib.md5(usedforsecurity=False)
    for name in ("v_template", "shapedirs"):
        micrometres = np.round(arrays[name] * 1e6).astype(np.int64)
        digest.update(micrometres.tobytes())
    return digest.hexdigest()[:12]


def mean_hand(arrays: Arrays, definition: str = "freihand") -> tuple[np.ndarray, np.ndarray]:
    """Joints (1, 21, 3), as `definition` has them, and vertices (1, 778, 3) of the mean pose with zero betas.

    Its error is what a network that sees nothing would have.
    """
    hand = Mano(arrays)
    rotmats = torch.cat([torch.eye(3)[None], rotmat_from_axis_angle(hand.hands_mean)])[None]  # (1, 16, 3, 3)
    vertices, joints = hand(rotmats, torch.zeros(1, 10))
    return labelled_joints(vertices, joints, arrays, definition).numpy(), vertices.numpy()
