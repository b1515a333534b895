"""MANO: hand parameters to a mesh of 778 vertices and 21 named joints; rotations; cameras; the official file's reader.

Metres; camera frame x right, y down, z forward; image coordinates in [-1, 1], +-1 at the image's edges. B = batch,
J = 21 joints in FreiHAND's order, V = 778 vertices. "MANO eq." is Romero, Tzionas and Black, Embodied Hands, SIGGRAPH
Asia 2017. MANO's files are licensed (mano.is.tue.mpg.de) and never part of a checkpoint; `synthetic_mano` is free.
"""
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

# ---------------------------------------------------------------------------------------------- names and orders

FINGERS = ("thumb", "index", "middle", "ring", "little")
JOINT_NAMES = ("wrist", *(f"{finger}{k}" for finger in FINGERS for k in ("1", "2", "3", "_tip")))      # FreiHAND order
# FreiHAND[i] = MANO[MANO_TO_FREIHAND[i]]; MANO = the file's 16 joints (wrist, index, middle, little, ring, thumb, three
# each), then the tips thumb to little, as HO-3D stores them.
MANO_TO_FREIHAND = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
FREIHAND_TO_MANO = tuple(MANO_TO_FREIHAND.index(i) for i in range(21))
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)           # of the file's joints: five chains of three
# Tip vertices thumb to little, by who uses them. Wrong ones cost 0.5 to 1.9 mm of PA-MPJPE on FreiHAND.
TIPS = {
    "freihand": (744, 320, 443, 555, 672),        # FreiHAND's labels, PeCLR, SiMHand
    "smplx": (744, 320, 443, 554, 671),           # smplx, HaMeR, WiLoR
    "manopth": (745, 317, 444, 556, 673),         # manopth, manotorch, DexYCB: right hands
    "manopth445": (745, 317, 445, 556, 673),      # the same projects' left hands; InterHand2.6M's regressor
    "ho3d": (744, 333, 444, 555, 672),            # HO-3D
    "handoccnet": (728, 353, 442, 576, 694),      # HandOccNet
}


REGRESSED = {"freihand": "freihand", "interhand": "manopth445", "assemblyhands": "freihand"}    # of data sets: regressed from the mesh


def _tips(name):
    if name not in TIPS:
        raise ValueError(f"tips={name!r}: unknown fingertip set, use one of {', '.join(TIPS)}")
    return list(TIPS[name])


def joints_from_vertices(vertices, arrays, tips="freihand"):
    """Joints regressed from a posed mesh: vertices (B, 778, 3) -> joints (B, 21, 3), FreiHAND order, same unit, frame.

    With "freihand" tips this is FreiHAND's own definition of its labels (lmb-freiburg/freihand utils/mano_utils.py).
    The layer's kinematic joints differ from it by millimetres once fingers bend, and cannot be had from a mesh.
    arrays: of `read_mano` or `synthetic_mano`; both sides share the regressor. ValueError on an unknown `tips`.
    """
    ids = _tips(tips)
    regressor = torch.as_tensor(arrays["J_regressor"], dtype=vertices.dtype, device=vertices.device)      # (16, V)
    with torch.autocast("cuda" if vertices.is_cuda else "cpu", enabled=False):
        return torch.cat([regressor @ vertices, vertices[:, ids]], dim=1)[:, list(MANO_TO_FREIHAND)]


def labelled_joints(vertices, joints, arrays, definition, left=None):
    """Joints (B, 21, 3) as a data set's labels define them, from a predicted mesh (B, 778, 3) and the layer's own joints (B, 21, 3).

    definition: a set of TIPS means the layer's 16 with these tips (HO-3D "ho3d", DexYCB "manopth"); "kinematic" or "regressed" and five
    vertices says both at once (what prepare_data.py finds in HO-3D's evaluation labels); "freihand" is `joints_from_vertices`, as are
    "interhand" with that regressor's tips and "assemblyhands", whose annotations are no mesh's. left: (B,) bool, hands that were left
    ones: DexYCB's have another tip. ValueError on other names.
    """
    how, *tips = definition.split()
    if how in REGRESSED:
        how, tips = "regressed", TIPS[REGRESSED[how]]
    elif how in TIPS:
        how, tips = "kinematic", TIPS[how]
    if how not in ("regressed", "kinematic") or len(tips) != 5:
        raise ValueError(f"joints {definition!r}: unknown definition, use {', '.join({**REGRESSED, **TIPS})}")
    joints = joints_from_vertices(vertices, arrays, "freihand") if how == "regressed" else joints.clone()
    joints[:, [4, 8, 12, 16, 20]] = vertices[:, [int(tip) for tip in tips]]
    if definition == "manopth" and left is not None:
        joints[:, 12] = torch.where(left[:, None], vertices[:, TIPS["manopth445"][2]], joints[:, 12])
    return joints


# ---------------------------------------------------------------------------------------------- rotations


def _float32(x):
    """Half precision becomes float32 (mixed-precision networks feed us), float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotmat_from_axis_angle(axis_angle):
    """Rodrigues: axis_angle (..., 3), rad -> rotation matrices (..., 3, 3); exact gradient at zero.

    R = cos(a) I + sin(a)/a [v]x + (1 - cos(a))/a^2 v v^T, without matmul, so autocast does not round it.
    """
    v = _float32(axis_angle)
    square = (v * v).sum(-1)[..., None, None]
    small = square < 1e-8                                    # there the series is exact, and sqrt has no gradient at 0
    angle = torch.where(small, 1.0, square).sqrt()
    sine = torch.where(small, 1 - square / 6, torch.sin(angle) / angle)
    cosine = torch.where(small, 0.5 - square / 24, 2 * (torch.sin(angle / 2) / angle) ** 2)    # (1 - cos(a)) / a^2
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    return (1 - cosine * square) * eye + sine * cross + cosine * v[..., :, None] * v[..., None, :]


def axis_angle_from_rotmat(rotmats):
    """Inverse of Rodrigues: (..., 3, 3) -> (..., 3), angle in [0, pi] rad; accurate at 0 and pi (either axis there)."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = _float32(rotmats).flatten(-2).unbind(-1)
    rows = torch.stack([                                     # 4 q_i q for i = w, x, y, z; q = (w, x, y, z)
        1 + xx + yy + zz, zy - yz, xz - zx, yx - xy,
        zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx,
        xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy,
        yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz], dim=-1).unflatten(-1, (4, 4))
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    q = F.normalize(torch.take_along_dim(rows, best, dim=-2)[..., 0, :], dim=-1)      # the longest row: no cancellation
    q = torch.where(q[..., :1] < 0, -q, q)
    w, xyz = q[..., :1], q[..., 1:]
    square = (xyz * xyz).sum(-1, keepdim=True)
    small = square < 1e-12
    sine = torch.where(small, 1.0, square).sqrt()            # of half the angle
    return xyz * torch.where(small, 2.0, 2 * torch.atan2(sine, w) / sine)


def rotmat_from_6d(x):
    """Zhou et al., CVPR 2019: (..., 6) = a1, a2 contiguous -> (..., 3, 3) whose COLUMNS are b1, b2, b1 x b2.

    The layout of HaMeR; PyMAF interleaves a1 and a2, which is not interchangeable.
    """
    a1, a2 = _float32(x).split(3, dim=-1)
    b1 = F.normalize(a1, dim=-1)
    b2 = F.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2)], dim=-1)


# ---------------------------------------------------------------------------------------------- cameras


def weak_perspective(points, camera):
    """points (B, N, 3) m, camera (B, 3) = scale, tx, ty of the crop -> (B, N, 2) in [-1, 1]: scale * (xy + t)."""
    return camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])


def crop_to_full_camera(camera, box_center, box_side, K):
    """The translation (B, 3), m, to add to root-relative points so that K projects them where the crop's camera did.

    camera (B, 3): weak perspective of the crop, in [-1, 1] of its edges, for points relative to the root (wrist).
    box_center (B, 2), box_side (B,): the square crop in PIXEL-EDGE coordinates of the full image (0 to width).
    K (B, 3, 3), or (3, 3) for all: intrinsics without skew that project to PIXEL-CENTRE coordinates (edge minus 0.5).

    The root lands exactly on its weak-perspective pixel, and the scale at the root's depth is the crop's. Where
    fx != fy one depth cannot match both: their geometric mean does, which keeps the area. Points off the root's depth
    differ by true perspective. Ours; PyMAF and HaMeR assume one focal length and a centred principal point.
    """
    scale, tx, ty = camera.unbind(-1)
    pixels = 0.5 * box_side * scale                                       # per metre at the root's depth
    fx, fy, cx, cy = K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2]
    u = box_center[..., 0] + pixels * tx - 0.5                            # the root's pixel
    v = box_center[..., 1] + pixels * ty - 0.5
    depth = (fx * fy).sqrt() / pixels
    return torch.stack([(u - cx) * depth / fx, (v - cy) * depth / fy, depth], dim=-1)


# ---------------------------------------------------------------------------------------------- the layer


def mirror_arrays(arrays):
    """The other hand's arrays: x negated, rotations conjugated by diag(-1, 1, 1), faces wound the other way.

    Betas keep their meaning, and axis-angles (a, b, c) of one hand are (a, -b, -c) of the other.
    """
    flip = np.array([-1.0, 1.0, 1.0])
    axis_angle = np.tile(-flip, 15)                                       # an axis is a pseudo-vector: (1, -1, -1)
    rotmat = np.tile(np.outer(flip, flip).ravel(), 15)                    # row-major entries of S R S, S = diag(flip)
    return dict(arrays, v_template=arrays["v_template"] * flip, J=arrays["J"] * flip,
                shapedirs=arrays["shapedirs"] * flip[:, None], posedirs=arrays["posedirs"] * flip[:, None] * rotmat,
                hands_mean=arrays["hands_mean"] * axis_angle, hands_components=arrays["hands_components"] * axis_angle,
                f=arrays["f"][:, ::-1].copy())


def _side_of(arrays):
    """MANO's files lay the fingers along x from the wrist: to -x in the right one, to +x in the left. None: neither."""
    x = (arrays["J_regressor"] @ arrays["v_template"])[:13, 0]            # wrist and four fingers; the thumb aside
    steps = x[1:] - x[list(PARENTS[1:13])]
    return "right" if (steps < 0).all() else "left" if (steps > 0).all() else None


def _repair_left(arrays):
    """The official left file carries the right hand's `shapedirs`: negate their x, unless that has been done already.

    Larger hands are both longer and broader, so over the ten shape directions growth along x and growth across it go
    together; in the file as shipped (vchoutas/smplx issue 48) the template is mirrored, they are not, and growth along
    x runs backwards. Arrays in which neither is seen (random ones in tests) count as shipped.
    """
    centred = arrays["v_template"] - arrays["v_template"].mean(0)                              # (V, 3)
    growth = np.einsum("vck,vc->ck", arrays["shapedirs"], centred / np.linalg.norm(centred, axis=0))      # (3, 10)
    if (growth[0] * (growth[1] + growth[2])).sum() > 0.01 * (arrays["shapedirs"] ** 2).sum():
        return arrays
    return dict(arrays, shapedirs=arrays["shapedirs"] * np.array([-1.0, 1.0, 1.0])[:, None])


def _tree(transforms):
    """(B, 16, 3, 4) -> views of it: root (B, 1, 3, 4), then three levels (B, 5, 3, 4), each the parents of the next."""
    return transforms[:, :1], *transforms[:, 1:].unflatten(1, (5, 3)).unbind(2)


def _blended(weights, moves, *tensors):
    """Yields the blended matrices sum_i w_i A_i of part of the batch (B, 3, 4, V) and the same part of `tensors`.

    A part is 64 hands on a CPU, which its cache holds, and everything elsewhere. All parts use one piece of memory.
    """
    size = 64 if moves.device.type == "cpu" else max(1, len(moves))
    buffer = moves.new_empty(min(size, len(moves)), 3, 4, len(weights))
    for move, *part in zip(*(x.split(size) for x in (moves, *tensors)), strict=True):
        matrices = buffer[:len(move)]
        torch.mm(move.flatten(0, 1), weights.T, out=matrices.flatten(0, 2))
        yield matrices, *part


class _Skinning(torch.autograd.Function):
    """rotmats (B, 16, 3, 3), betas (B, 10), a Mano -> vertices, joints; its backward is written by hand.

    Autograd would hold the blended matrices (12 numbers a vertex) several times over, and spend more time dispatching
    the small products of the chain than computing them. Names d_x: gradient of x. Differentiable once.
    """

    @staticmethod
    def forward(ctx, rotmats, betas, hand):
        # Template (its factor is 1), shape and pose in one product (MANO eq. 2 to 5), without the global rotation.
        features = torch.cat([betas.new_ones(len(betas), 1), betas, rotmats[:, 1:].flatten(1) - hand.identity], dim=1)
        points = torch.mm(features, hand.blend).unflatten(1, (3, 778))                         # (B, 3, V)

        # Rest joints and bones J_i - J_parent, linear in betas (eq. 10 with J_regressor multiplied in).
        joints, bones = torch.addmm(hand.rest, betas, hand.rest_dirs).unflatten(1, (2, 16, 3, 1)).unbind(1)

        # G_i = G_parent(i) [R_i | J_i - J_parent(i)], from G_0 = [R_0 | J_0]; five fingers at a time.
        local = torch.cat([rotmats, bones], dim=-1)                                            # (B, 16, 3, 4)
        chain = local.clone()
        for parent, child in pairwise(_tree(chain)):
            child.copy_(parent[..., :3] @ child)
            child[..., 3] += parent[..., 3]

        # A_i = G_i after taking J_i to the origin (eq. 3); v = sum_i w_i A_i v_posed.
        moves = torch.cat([chain[..., :3], chain[..., 3:] - chain[..., :3] @ joints], dim=-1)
        moves = moves.flatten(2).transpose(1, 2).contiguous()                                  # (B, 12, 16)
        vertices = points.new_empty(len(points), 778, 3)
        for t, p, out in _blended(hand.weights, moves, points, vertices):
            posed = torch.addcmul(t[:, :, 3], t[:, :, 0], p[:, None, 0])
            posed.addcmul_(t[:, :, 1], p[:, None, 1]).addcmul_(t[:, :, 2], p[:, None, 2])      # (B, 3, V)
            out.copy_(posed.transpose(1, 2))
        ctx.hand = hand
        ctx.save_for_backward(points, joints, local, chain, moves)
        return vertices, torch.cat([chain[..., 3], vertices.index_select(1, hand.tips)], 1).index_select(1, hand.order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_vertices, d_joints):
        hand, (points, joints, local, chain, moves) = ctx.hand, ctx.saved_tensors
        d_place, d_tips = d_joints.index_select(1, hand.inverse).split([16, 5], dim=1)
        d_points, d_moves = torch.empty_like(points), torch.empty_like(moves)
        for t, p, d_v, d_tip, d_p, d_a in _blended(hand.weights, moves, points, d_vertices, d_tips, d_points, d_moves):
            d = torch.empty_like(p).copy_(d_v.transpose(1, 2)).index_add_(2, hand.tips, d_tip.transpose(1, 2))
            torch.mul(t[:, 0, :3], d[:, 0, None], out=d_p)
            d_p.addcmul_(t[:, 1, :3], d[:, 1, None]).addcmul_(t[:, 2, :3], d[:, 2, None])
            torch.mul(d[:, :, None], p[:, None], out=t[:, :, :3])         # t is free now: it takes its own gradient
            t[:, :, 3] = d
            torch.mm(t.flatten(0, 2), hand.weights, out=d_a.flatten(0, 1))
        d_features = torch.mm(d_points.flatten(1), hand.blend[1:].T)                           # (B, 10 + 135)

        d_chain = d_moves.transpose(1, 2).unflatten(2, (3, 4)).contiguous()                    # (B, 16, 3, 4)
        d_joint = chain[..., :3].mT @ -d_chain[..., 3:]
        d_chain[..., :3] -= d_chain[..., 3:] * joints.mT
        d_chain[..., 3] += d_place
        family = list(zip(_tree(chain), _tree(local), _tree(d_chain), strict=True))
        for (parent, _, d_parent), (_, step, d_child) in reversed(list(pairwise(family))):
            up = torch.cat([d_child @ step.mT, d_child[..., 3:]], dim=-1)
            d_parent += up.sum(1, keepdim=True) if parent.shape[1] == 1 else up
            d_child.copy_(parent[..., :3].mT @ d_child)                   # from here on the gradient of `local`
        d_rotmats, d_bone = d_chain.split([3, 1], dim=-1)
        d_rotmats[:, 1:] += d_features[:, 10:].unflatten(1, (15, 3, 3))
        d_rest = torch.cat([d_joint.flatten(1), d_bone.flatten(1)], dim=1)
        return d_rotmats, torch.addmm(d_features[:, :10], d_rest, hand.rest_dirs.T), None


class Mano(nn.Module):
    """The MANO layer: forward(rotmats (B, 16, 3, 3), betas (B, 10)) -> vertices (B, 778, 3), joints (B, 21, 3), metres.

    arrays: of `read_mano` or `synthetic_mano`. rotmats: the global one about the wrist J0(betas), then 15 relative ones
    in the file's order (index, middle, little, ring, thumb), with `hands_mean` already in them: the layer adds none.
    joints: 16 of the kinematic chain and five tip vertices named by `tips`, FreiHAND order; not centred on any of them.

    side="left" takes the official left file, whose `shapedirs` it repairs (repaired ones stay as they are), or a right
    hand's arrays, which it mirrors, so the licence-free hand has both sides. repair=False keeps a left file's own
    `shapedirs`: DexYCB's labels were made with them. On a left hand "manopth" means that project's left list.

    Attributes: faces (1538, 3) int64, template (778, 3), hands_mean (15, 3) axis-angle, side; none enters a state_dict.
    Computes in float32 (float64 after `.double()`), also under autocast; differentiable once. ValueError: a left
    hand's arrays for side="right", an unknown side or fingertip set, inputs of another shape.
    """

    def __init__(self, arrays, side="right", tips="freihand", repair=True):
        super().__init__()
        layout = _side_of(arrays)
        if side not in ("right", "left"):
            raise ValueError(f"side={side!r}: use 'right' or 'left'")
        if side == "right" and layout == "left":
            raise ValueError("these arrays are a left hand's: pass side='left', or read MANO_RIGHT.pkl")
        if side == "left":
            arrays = mirror_arrays(arrays) if layout == "right" else _repair_left(arrays) if repair else arrays
            tips = "manopth445" if tips == "manopth" else tips
        self.side = side

        template, shapedirs, regressor = arrays["v_template"], arrays["shapedirs"], arrays["J_regressor"]
        blend = np.concatenate([template[..., None], shapedirs, arrays["posedirs"]], axis=2)   # (V, 3, 1 + 10 + 135)
        joints = np.einsum("jv,vck->jck", regressor, blend[..., :11])                          # (16, 3, 1 + 10)
        bones = joints - joints[[0, *PARENTS[1:]]]
        bones[0] = joints[0]
        rest = np.stack([joints, bones]).reshape(96, 11)
        floats = {"template": template, "blend": blend.transpose(2, 1, 0).reshape(146, -1), "rest": rest[:, 0],
                  "rest_dirs": rest[:, 1:].T, "weights": arrays["weights"], "identity": np.tile(np.eye(3).ravel(), 15),
                  "hands_mean": np.reshape(arrays["hands_mean"], (15, 3))}
        for name, value in floats.items():
            self.register_buffer(name, torch.tensor(np.ascontiguousarray(value), dtype=torch.float32), persistent=False)
        integers = {"faces": arrays["f"], "tips": _tips(tips), "order": MANO_TO_FREIHAND, "inverse": FREIHAND_TO_MANO}
        for name, value in integers.items():
            self.register_buffer(name, torch.tensor(np.array(value), dtype=torch.int64), persistent=False)

    def forward(self, rotmats, betas):
        if rotmats.shape[1:] != (16, 3, 3) or betas.shape[1:] != (10,) or len(rotmats) != len(betas):
            raise ValueError(f"rotmats {tuple(rotmats.shape)}, betas {tuple(betas.shape)}: need (B, 16, 3, 3), (B, 10)")
        with torch.autocast("cuda" if rotmats.is_cuda else "cpu", enabled=False):
            return _Skinning.apply(rotmats.to(self.template.dtype), betas.to(self.template.dtype), self)


# ---------------------------------------------------------------------------------------------- the official file

_SITE = "MANO is licensed; see mano.is.tue.mpg.de (MANO_RIGHT.pkl and MANO_LEFT.pkl of mano_v1_2.zip)"
_MD5 = ("fd5a9d35f914987cf1cc04ffe338caa1", "11aeaca8631aa20db964d4eba491e885")                # right, left, v1.2
_SHAPES = {"v_template": (778, 3), "shapedirs": (778, 3, 10), "posedirs": (778, 3, 135), "J_regressor": (16, 778),
           "weights": (778, 16), "f": (1538, 3), "kintree_table": (2, 16), "hands_components": (45, 45),
           "hands_mean": (45,), "hands_coeffs": (None, 45), "J": (16, 3)}


class _Shell:
    """What every class named in a pickle becomes: it keeps its state and does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


# All seven names of the official files: no numpy, scipy, chumpy or builtin object is ever called by a file.
_SHELLS = {name: type(name.split()[1], (_Shell,), {}) for name in (
    "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "scipy.sparse.csc csc_matrix",
    "chumpy.reordering Select", "chumpy.ch Ch", "__builtin__ set")}


class _Unpickler(pickle._Unpickler):
    """pickle's own Python version: its memo is a dict, where the C version allocates what a hostile index asks for."""

    def find_class(self, module, name):
        if f"{module} {name}" not in _SHELLS:
            raise ValueError(f"it names {module}.{name}, which no MANO file does; nothing of it was run")
        return _SHELLS[f"{module} {name}"]


def _value(item):
    """A shell, or what an .npz held -> the ndarray it stands for."""
    kind = type(item).__name__
    if isinstance(item, np.ndarray):
        return item
    if kind == "_reconstruct":
        _, shape, dtype, fortran, raw = item.state
        code, order = dtype.args[0], dtype.state[1]
        if not re.fullmatch("[fiu][1248]", code):
            raise ValueError(f"an array of type {code!r}")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, np.dtype(code).newbyteorder(order)).reshape(shape, order="F" if fortran else "C")
    if kind == "csc_matrix":                                 # column c: rows indices[indptr[c]:indptr[c + 1]]
        data, rows, starts = (_value(item.state[key]) for key in ("data", "indices", "indptr"))
        dense = np.zeros((16, len(starts) - 1))
        np.add.at(dense, (rows, np.repeat(np.arange(len(starts) - 1), np.diff(starts))), data)
        return dense
    if kind == "Ch":
        return _value(item.state["x"])
    if kind == "Select":                                     # mattloper/chumpy chumpy/reordering.py
        flat = _value(item.state["a"]).ravel()[_value(item.state["idxs"])]
        return flat.reshape(item.state.get("preferred_shape", -1))
    raise ValueError(f"a {kind} where an array belongs")


def _checked(name, array):
    """float64 or int64 array of the right shape with usable numbers; ValueError otherwise."""
    shape, whole = _SHAPES[name], name in ("f", "kintree_table")
    if array.dtype.kind not in ("iu" if whole else "fiu"):
        raise ValueError(f"{name} has type {array.dtype}")
    if array.ndim != len(shape) or any(want not in (None, size) for want, size in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, needs {shape}")
    array = np.array(array, np.int64 if whole else np.float64, order="C")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if name == "f" and (array.min() < 0 or array.max() >= 778):
        raise ValueError(f"f names a vertex {array.max()} of 778")
    if name == "kintree_table":
        array[0, 0] = -1 if array[0, 0] == 2**32 - 1 else array[0, 0]     # the root's parent, stored as uint32
        if not np.array_equal(array[0], PARENTS):
            raise ValueError(f"kintree_table[0] is {array[0].tolist()}, needs {list(PARENTS)}")
    return array


def read_mano(path):
    """The official MANO_RIGHT.pkl or MANO_LEFT.pkl (v1.2), or an .npz with the same keys -> dict of arrays.

    v_template (778, 3) m, shapedirs (778, 3, 10), posedirs (778, 3, 135), J_regressor (16, 778), weights (778, 16),
    hands_components (45, 45), hands_mean (45,), hands_coeffs (n, 45), J (16, 3): float64; f (1538, 3), kintree_table
    (2, 16) with the root's parent -1: int64. Needs neither chumpy nor scipy and runs nothing that the file asks for;
    `np.savez(path, **arrays)` then makes a plain file. A pickle with another checksum than the official ones is read,
    with a line on standard error. ValueError: not such a file, and why. OSError: it cannot be opened.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 2**26:
            raise ValueError(f"{path}: larger than any MANO file (4 MB). {_SITE}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file. {_SITE}") from None
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}. {_SITE}") from None
    zipped = data[:2] == b"PK"
    try:
        stream = io.BytesIO(data)
        raw = np.load(stream, allow_pickle=False) if zipped else _Unpickler(stream, encoding="latin1").load()
        if not zipped and not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}, not a dictionary of arrays")
        missing = [name for name in _SHAPES if name not in raw]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        arrays = {name: _checked(name, _value(raw[name])) for name in _SHAPES}
    except Exception as error:                               # a damaged pickle can fail in any way
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a MANO file: {reason}. {_SITE}") from error
    if not zipped and hashlib.md5(data, usedforsecurity=False).hexdigest() not in _MD5:
        print(f"note: {path} reads well but is not the official v1.2 file (its md5 is another)", file=sys.stderr)
    return arrays


def hand_fingerprint(arrays):
    """Short text that tells hand models apart: stored with a checkpoint in place of the model, which may not be."""
    rounded = [np.round(arrays[name] * 1e6).astype(np.int64).tobytes() for name in ("v_template", "shapedirs")]
    return hashlib.md5(b"".join(rounded), usedforsecurity=False).hexdigest()[:12]
