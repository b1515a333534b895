"""The hand model: against smplx's skinning, scipy's rotations, and files written in the official format."""
import codecs
import copyreg
import os
import pickle
import pickletools
import re
import types
from functools import partial

import numpy as np
import pytest
import torch
from fixtures import OfficialPickler, random_mano, write_official_pickle
from scipy.sparse import csc_matrix
from scipy.spatial.transform import Rotation
from smplx.lbs import lbs
from sync_counter import DeviceTraffic

import mano
from mano import (
    ARRAY_SHAPES,
    FREIHAND_TO_MANO,
    JOINT_NAMES,
    MANO_TO_FREIHAND,
    PARENTS,
    TIPS,
    Mano,
    axis_angle_from_rotmat,
    crop_to_full_camera,
    hand_fingerprint,
    joints_from_vertices,
    labelled_joints,
    mirror_arrays,
    read_mano,
    rotmat_from_6d,
    rotmat_from_axis_angle,
    weak_perspective,
)
from synthetic_hand import synthetic_mano

FLIP = torch.tensor([-1.0, 1.0, 1.0])
TIP_JOINTS = [4, 8, 12, 16, 20]
OFFICIAL_NAMES = {
    "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "scipy.sparse.csc csc_matrix",
    "chumpy.reordering Select", "chumpy.ch Ch", "__builtin__ set"}


@pytest.fixture(scope="module", params=["random", "synthetic"])
def arrays(request):
    return random_mano() if request.param == "random" else synthetic_mano()


def random_input(batch, dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)
    rotmats = Rotation.from_rotvec(rng.normal(size=(batch * 16, 3))).as_matrix().reshape(batch, 16, 3, 3)
    return torch.tensor(rotmats, dtype=dtype), torch.tensor(rng.normal(size=(batch, 10)), dtype=dtype)


def smplx_hand(arrays, rotmats, betas):
    """vertices and the 16 kinematic joints in MANO's order, by an independent implementation."""
    a = {key: torch.tensor(value).to(betas) for key, value in arrays.items() if key != "f"}
    posedirs = a["posedirs"].reshape(-1, 135).T
    return lbs(betas, rotmats, a["v_template"], a["shapedirs"], posedirs, a["J_regressor"],
               torch.tensor(PARENTS), a["weights"], pose2rot=False)


def kinematic(joints):
    return joints[:, list(FREIHAND_TO_MANO)][:, :16]


# ---------------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("side", ["right", "left"])
def test_layer_agrees_with_smplx_on_a_thousand_hands(arrays, side):
    rotmats, betas = random_input(1000)
    vertices, joints = Mano(arrays, side)(rotmats, betas)
    assert vertices.shape == (1000, 778, 3) and joints.shape == (1000, 21, 3) and vertices.is_contiguous()
    of_side = arrays if side == "right" else mirror_arrays(arrays)
    for dtype in (torch.float32, torch.float64):
        expected = smplx_hand(of_side, rotmats.to(dtype), betas.to(dtype))
        assert (vertices - expected[0]).abs().max() < 1e-6
        assert (kinematic(joints) - expected[1]).abs().max() < 1e-6
    assert torch.equal(joints[:, TIP_JOINTS], vertices[:, list(TIPS["freihand"])])


@pytest.mark.parametrize("batch", [1, 3, 200])      # 200: several chunks, the last one short
def test_gradients_agree_with_smplx(arrays, batch):
    rng = np.random.default_rng(1)
    weight = torch.tensor(rng.normal(size=(batch, 778 + 21, 3)), dtype=torch.float32)
    gradients = []
    for ours in (True, False):
        rotmats, betas = (x.requires_grad_() for x in random_input(batch))
        vertices, joints = (Mano(arrays) if ours else lambda r, b: smplx_hand(arrays, r, b))(rotmats, betas)
        if not ours:
            joints = torch.cat([joints, vertices[:, list(TIPS["freihand"])]], 1)[:, list(MANO_TO_FREIHAND)]
        (torch.cat([vertices, joints], dim=1) * weight).sum().backward()
        gradients.append((rotmats.grad, betas.grad))
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradients_of_any_layout_and_twice_through_one_graph():
    """Gradients may arrive as views (expanded, or as planes of x, y, z): read right, and not changed."""
    inputs = [x.requires_grad_() for x in random_input(2)]
    outputs = Mano(random_mano())(*inputs)
    planes = torch.randn(2, 3, 778, generator=torch.Generator().manual_seed(0))
    views = planes.mT, torch.ones(1, 1, 1).expand(2, 21, 3)
    copies = planes.mT.contiguous(), torch.ones(2, 21, 3)
    results = []
    for given in (views, copies):
        before = given[0].clone()
        results.append(torch.autograd.grad(outputs, inputs, given, retain_graph=True))
        assert torch.equal(given[0], before)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))


def test_gradient_by_finite_differences():
    hand = Mano(random_mano()).double()
    inputs = [x.requires_grad_() for x in random_input(2, torch.float64)]
    assert torch.autograd.gradcheck(hand, inputs, fast_mode=True)


def test_empty_batch_and_half_precision_input():
    hand = Mano(random_mano())
    rotmats, betas = random_input(4)
    assert hand(rotmats[:0], betas[:0])[0].shape == (0, 778, 3)
    vertices, joints = hand(rotmats, betas)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, joints_again = hand(rotmats, betas)
        regressed = joints_from_vertices(again, random_mano())
    assert torch.equal(again, vertices) and torch.equal(joints_again, joints)
    assert torch.equal(regressed, joints_from_vertices(vertices, random_mano()))
    assert hand(rotmats.bfloat16(), betas.bfloat16())[0].dtype == torch.float32


def test_rest_pose_and_wrist(arrays):
    """Zero pose and zero shape give the template. The global rotation turns about the wrist of this shape."""
    hand = Mano(arrays)
    rotmats, betas = torch.eye(3).repeat(2, 16, 1, 1), random_input(2)[1]
    assert (hand(rotmats, 0 * betas)[0] - hand.template).abs().max() < 1e-7
    joints = hand(rotmats, betas)[1]
    rotmats[:, 0] = random_input(2)[0][:, 0]
    turned = hand(rotmats, betas)[1]
    assert (turned[:, 0] - joints[:, 0]).abs().max() < 1e-7
    assert (turned[:, 4] - joints[:, 4]).norm(dim=-1).min() > 0.01
    expected = (rotmats[:, 0] @ (joints - joints[:, :1]).mT).mT + joints[:, :1]
    assert (turned - expected).abs().max() < 1e-6


def test_nothing_licensed_enters_a_checkpoint():
    hand = Mano(random_mano())
    assert not hand.state_dict() and not list(hand.parameters())
    assert hand.faces.dtype == torch.int64 and hand.hands_mean.shape == (15, 3)


def test_wrong_input_is_refused():
    hand = Mano(random_mano())
    wrong = [((2, 16, 3, 3), (2, 45)), ((2, 16, 3, 3), (1, 10)), ((2, 15, 3, 3), (2, 10)), ((2, 7), (2, 10))]
    for rotmats, betas in wrong:
        with pytest.raises(ValueError, match=r"need \(B, 16, 3, 3\), \(B, 10\)$"):
            hand(torch.zeros(rotmats), torch.zeros(betas))
    with pytest.raises(ValueError, match="fingertip set"):
        Mano(random_mano(), tips="nimble")
    with pytest.raises(ValueError, match="'right' or 'left'"):
        Mano(random_mano(), side="both")
    with pytest.raises(ValueError, match="left hand's"):
        Mano(mirror_arrays(random_mano()), side="right")


@pytest.mark.parametrize("shape, mend", [
    ((2, 48), "rotmat_from_axis_angle(pose.reshape(-1, 16, 3))"),
    ((2, 16, 3), "rotmat_from_axis_angle(pose.reshape(-1, 16, 3))"),
    ((2, 96), "rotmat_from_6d(pose.reshape(-1, 16, 6))"),
    ((2, 16, 6), "rotmat_from_6d(pose.reshape(-1, 16, 6))")])
def test_message_about_a_shape_names_the_call_that_mends_it(shape, mend):
    """And that call, copied from the message, does mend it."""
    hand = Mano(random_mano())
    pose = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    betas = torch.zeros(2, 10)
    with pytest.raises(ValueError) as refused:
        hand(pose, betas)
    message = str(refused.value)
    assert mend in message and str(tuple(shape)) in message and "\n" not in message
    assert ("hands_mean" in message) == ("axis_angle" in mend)
    rotmats = eval(mend, vars(mano), {"pose": pose})
    assert hand(rotmats, betas)[0].shape == (2, 778, 3)


# ---------------------------------------------------------------------------------------------- joints


def test_orders():
    """The permutations are inverse to each other, and bring the names of MANO's order into FreiHAND's."""
    rows = np.arange(21)
    assert (rows[list(MANO_TO_FREIHAND)][list(FREIHAND_TO_MANO)] == rows).all()
    expected = (0, 5, 6, 7, 9, 10, 11, 17, 18, 19, 13, 14, 15, 1, 2, 3, 4, 8, 12, 16, 20)
    assert expected == FREIHAND_TO_MANO
    fingers = ("index", "middle", "little", "ring", "thumb")
    chain = ["wrist", *(f"{finger}{k}" for finger in fingers for k in (1, 2, 3))]
    tips = [f"{finger}_tip" for finger in ("thumb", "index", "middle", "ring", "little")]
    assert [(chain + tips)[i] for i in MANO_TO_FREIHAND] == list(JOINT_NAMES)


@pytest.mark.parametrize("name, ids", [
    ("freihand", [744, 320, 443, 555, 672]), ("smplx", [744, 320, 443, 554, 671]),
    ("manopth", [745, 317, 444, 556, 673]), ("manopth445", [745, 317, 445, 556, 673]),
    ("ho3d", [744, 333, 444, 555, 672]), ("handoccnet", [728, 353, 442, 576, 694])])
def test_fingertip_sets(name, ids):
    """The layer and `joints_from_vertices` use the named vertices. Left hands of manopth have another one."""
    vertices, joints = Mano(random_mano(), tips=name)(*random_input(2))
    assert torch.equal(joints[:, TIP_JOINTS], vertices[:, ids])
    regressed = joints_from_vertices(vertices, random_mano(), name)
    assert torch.equal(regressed[:, TIP_JOINTS], vertices[:, ids])
    vertices, joints = Mano(random_mano(), side="left", tips=name)(*random_input(2))
    assert torch.equal(joints[:, 12], vertices[:, 445 if name == "manopth" else ids[2]])


def test_joints_move_as_the_jacobian_says():
    """Against differences, of a hand whose tips are rigid."""
    rng = np.random.default_rng(0)
    arrays = synthetic_mano()
    rigid = np.eye(16)[arrays["weights"].argmax(1)]
    hand = Mano(arrays | {"posedirs": np.zeros((778, 3, 135)), "weights": rigid}).double()
    rotmats = rotmat_from_axis_angle(torch.from_numpy(rng.normal(0, 0.4, (2, 16, 3))))
    betas = torch.from_numpy(rng.normal(size=(2, 10)))
    _, joints = hand(rotmats, betas)
    found = hand.joint_jacobian(rotmats, joints)
    assert found.shape == (2, 21, 3, 16, 3)
    for joint in range(16):
        for axis in range(3):
            turns = torch.zeros(2, 16, 3, dtype=torch.float64)
            turns[:, joint, axis] = 1e-6
            ends = [hand(hand.turn(rotmats, sign * turns), betas)[1] for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / 2e-6
            torch.testing.assert_close(found[..., joint, axis], expected, atol=1e-7, rtol=1e-5)


def test_regressed_joints_are_not_kinematic_ones(arrays):
    """They are equal at rest, and millimetres apart once fingers bend."""
    hand = Mano(arrays)
    rest, betas = torch.eye(3).repeat(20, 16, 1, 1), torch.zeros(20, 10)
    bent = rest.clone()
    angles = torch.randn(20, 15, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    bent[:, 1:] = rotmat_from_axis_angle(angles)
    apart = []
    for rotmats in (rest, bent):
        vertices, joints = hand(rotmats, betas)
        regressed = joints_from_vertices(vertices, arrays)
        by_hand = np.einsum("jv,bvc->bjc", arrays["J_regressor"], vertices.double().numpy())
        assert np.abs(kinematic(regressed).numpy() - by_hand).max() < 1e-6
        apart.append((joints - regressed).norm(dim=-1).mean())
    assert apart[0] < 1e-7 and apart[1] > 1e-3


@pytest.mark.parametrize("definition, regressed, tips", [
    ("freihand", True, TIPS["freihand"]), ("interhand", True, TIPS["manopth445"]),
    ("assemblyhands", True, TIPS["freihand"]), ("smplx", False, TIPS["smplx"]), ("ho3d", False, TIPS["ho3d"]),
    ("manopth", False, TIPS["manopth"]), ("kinematic 1 2 3 4 5", False, (1, 2, 3, 4, 5)),
    ("regressed 1 2 3 4 5", True, (1, 2, 3, 4, 5))])
def test_labels_follow_their_data_sets_definition(definition, regressed, tips):
    """Which 16 joints and which tips, for right hands, and for left ones that were mirrored to right."""
    arrays = random_mano()
    vertices, joints = Mano(arrays)(*random_input(2))
    before = joints.clone()
    expected = joints_from_vertices(vertices, arrays) if regressed else joints.clone()
    expected[:, TIP_JOINTS] = vertices[:, list(tips)]
    assert torch.equal(labelled_joints(vertices, joints, arrays, definition), expected)
    left = torch.tensor([False, True])
    if definition == "manopth":
        expected[1, 12] = vertices[1, 445]
    assert torch.equal(labelled_joints(vertices, joints, arrays, definition, left), expected)
    assert torch.equal(joints, before)


@pytest.mark.parametrize("definition", ["", "mine", "kinematic", "kinematic 1 2 3 4", "freihand 1 2 3 4 5"])
def test_unknown_definition_of_labels_is_refused(definition):
    vertices, joints = Mano(random_mano())(*random_input(1))
    with pytest.raises(ValueError, match="unknown definition, use .*freihand.*interhand"):
        labelled_joints(vertices, joints, random_mano(), definition)


# ---------------------------------------------------------------------------------------------- devices


def step_on_the_device(arrays, hand):
    """Rotations, the layer, labels of every kind, a camera and the backward pass, as a training step has."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = ((4, 16, 3), (4, 16, 6), (4, 10), (4, 3))
    axis_angle, columns, betas, camera = (torch.randn(size, generator=generator) for size in sizes)
    inputs = [x.to("meta", non_blocking=True).requires_grad_() for x in (axis_angle, columns, betas, camera)]
    axis_angle, columns, betas, camera = inputs
    vertices, joints = hand(rotmat_from_axis_angle(axis_angle) @ rotmat_from_6d(columns), betas)
    left = camera[:, 0] > 0
    loss = joints_from_vertices(vertices, arrays, "ho3d").sum()
    for definition in ("freihand", "ho3d", "manopth", "regressed 1 2 3 4 5"):
        labels = labelled_joints(vertices, joints, arrays, definition, left)
        loss = loss + weak_perspective(labels, camera).sum()
    loss.backward()
    assert all(x.grad is not None for x in inputs)


def test_a_step_on_a_device_waits_for_no_copy():
    """The constants are copied once. A copy in every step would stop the host until the device has nothing
    to do."""
    arrays = random_mano()
    hand = Mano(arrays).to("meta")
    with torch.inference_mode():  # what is kept from here must serve a backward pass too
        joints_from_vertices(torch.zeros(1, 778, 3, device="meta"), arrays)
    step_on_the_device(arrays, hand)
    with DeviceTraffic() as traffic:
        step_on_the_device(arrays, hand)
    assert not traffic.blocking, traffic.blocking
    assert len(traffic.queued) == 4  # the inputs


def test_constants_of_two_hands_and_two_types_are_not_confused():
    one, other = random_mano(0), random_mano(1)
    vertices = Mano(one)(*random_input(2))[0]
    for arrays in (one, other, one):
        for dtype in (torch.float32, torch.float64):
            expected = torch.tensor(arrays["J_regressor"], dtype=dtype) @ vertices.to(dtype)
            assert torch.equal(kinematic(joints_from_vertices(vertices.to(dtype), arrays)), expected)


@pytest.mark.parametrize("call, kind", [
    (lambda x: x.cpu(), "to_host"), (lambda x: float(x.sum()), "to_host"), (lambda x: x.tolist(), "to_host"),
    (lambda x: x[:, [0, 1]], "to_device"), (lambda x: x[:, torch.tensor([1])], "to_device"),
    (lambda x: torch.as_tensor(np.ones(2), device=x.device), "to_device"),
    (lambda x: x.new_tensor([1.0]), "to_device"), (lambda x: x.copy_(torch.ones(3)), "to_device"),
    (lambda x: torch.ones(3).to(x.device, non_blocking=True), "queued"),
    (lambda x: torch.linalg.inv(x), "waits"), (lambda x: x.nonzero(), "waits"), (lambda x: x[x > 0], "waits"),
    (lambda x: torch.unique(x), "waits"), (lambda x: x[:, 1:] * 2 + x.new_zeros(1), None)])
def test_the_counter_counts_each_kind_once(call, kind):
    x = torch.zeros(3, 3, device="meta")
    with DeviceTraffic() as traffic:
        try:
            call(x)
        except (NotImplementedError, RuntimeError):
            assert kind == "waits"
    found = {name: getattr(traffic, name) for name in ("to_host", "to_device", "queued", "waits")}
    assert {name: len(calls) for name, calls in found.items() if calls} == ({kind: 1} if kind else {})


# ---------------------------------------------------------------------------------------------- left hands


def official_left(arrays):
    """As shipped: everything mirrored but `shapedirs`, which is the right hand's."""
    return dict(mirror_arrays(arrays), shapedirs=arrays["shapedirs"])


def test_left_hand_is_the_mirror_of_the_right_one(arrays):
    """It may come from the right file, from the left file as shipped, or from a repaired left file."""
    rotmats, betas = random_input(50)
    conjugate = FLIP[:, None] * rotmats * FLIP                 # axis-angle (a, b, c) -> (a, -b, -c)
    mirrored_angles = axis_angle_from_rotmat(rotmats) * -FLIP
    assert torch.allclose(axis_angle_from_rotmat(conjugate), mirrored_angles, atol=1e-5)
    right, joints = Mano(arrays)(rotmats, betas)
    for given in (arrays, official_left(arrays), mirror_arrays(arrays)):
        hand = Mano(given, side="left")
        left, left_joints = hand(conjugate, betas)
        assert (left * FLIP - right).abs().max() < 1e-6
        assert (left_joints * FLIP - joints).abs().max() < 1e-6
        assert torch.equal(hand.hands_mean * torch.tensor([1.0, -1.0, -1.0]), Mano(arrays).hands_mean)
    shipped = Mano(official_left(arrays), side="left", repair=False)(conjugate, betas)[0]
    assert (shipped * FLIP - right).abs().max() > 1e-4         # DexYCB's labels are of this model


def test_mirrored_pose_components_give_the_mirrored_pose(arrays):
    """The same coefficients pose both hands alike, from the arrays' own mean and components."""
    left = mirror_arrays(arrays)
    meshes = []
    for of_side, side in ((arrays, "right"), (left, "left")):
        pose = of_side["hands_mean"] + of_side["hands_coeffs"][:5] @ of_side["hands_components"]
        angles = torch.tensor(pose, dtype=torch.float32).reshape(5, 15, 3)
        rotmats = rotmat_from_axis_angle(torch.cat([torch.zeros(5, 1, 3), angles], dim=1))
        meshes.append(Mano(of_side, side)(rotmats, torch.zeros(5, 10))[0])
    assert (meshes[0] * FLIP - meshes[1]).abs().max() < 1e-6


def test_left_repair_of_every_hand():
    """On many random hands, the rule finds which file is repaired. Without evidence, it counts as shipped."""
    for seed in range(20):
        right = random_mano(seed)
        mirrored = mirror_arrays(right)
        assert mano._repair_left(mirrored) is mirrored
        assert np.array_equal(mano._repair_left(official_left(right))["shapedirs"], mirrored["shapedirs"])
        noise = dict(right, shapedirs=np.random.default_rng(seed).normal(size=(778, 3, 10)))
        assert np.array_equal(mano._repair_left(noise)["shapedirs"][:, 0], -noise["shapedirs"][:, 0])


def test_mirroring_twice_changes_nothing(arrays):
    again = mirror_arrays(mirror_arrays(arrays))
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
    faces = Mano(arrays, side="left").faces
    assert torch.equal(faces.flip(1), Mano(arrays).faces)


# ---------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize("permuted", [False, True])
def test_reads_the_official_format(tmp_path, permuted, capsys):
    """Bit for bit, also when chumpy's selection is not a slice."""
    path = tmp_path / "MANO_RIGHT.pkl"
    write_official_pickle(path, random_mano(), permuted)
    names = {arg for opcode, arg, _ in pickletools.genops(path.read_bytes()) if opcode.name == "GLOBAL"}
    assert names == OFFICIAL_NAMES
    arrays = read_mano(path)
    assert set(arrays) == set(random_mano())
    for key, expected in random_mano().items():
        assert np.array_equal(arrays[key], expected), key
        assert arrays[key].dtype == (np.int64 if key in ("f", "kintree_table") else np.float64)
        assert arrays[key].flags.c_contiguous and arrays[key].flags.writeable
    assert arrays["kintree_table"][0, 0] == -1
    assert "not the official" in capsys.readouterr().err


class Ch:
    """Stands in for chumpy's classes, with the names that a pickle of them holds."""

    def __init__(self, **state):
        vars(self).update(state)


class Select(Ch):
    pass


class ResavedPickler(pickle._Pickler):
    """Names everything as Python 3 does with numpy 1 or 2 and the scipy of that time."""

    def __init__(self, file, protocol, numpy):
        super().__init__(file, protocol)
        self.names = {Ch: ("chumpy.ch", "Ch"), Select: ("chumpy.reordering", "Select"),
                      csc_matrix: (f"scipy.sparse.{'csc' if numpy == 1 else '_csc'}", "csc_matrix")}
        self.core = "numpy.core" if numpy == 1 else "numpy._core"

    def save_global(self, item, name=None):
        module = re.sub(r"^numpy\._?core", self.core, item.__module__ or "numpy")
        module, name = self.names.get(item, (module, item.__qualname__))
        if self.proto < 3:
            module = {"builtins": "__builtin__", "copyreg": "copy_reg"}.get(module, module)
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(f"c{module}\n{name}\n".encode())
        self.memoize(item)

    dispatch = {**pickle._Pickler.dispatch, type: save_global, types.FunctionType: save_global,
                types.BuiltinFunctionType: save_global}


@pytest.mark.parametrize("chumpy", [False, True])
@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_python_3_saved_again(tmp_path, protocol, numpy, chumpy):
    expected = random_mano()
    kintree = np.asfortranarray(expected["kintree_table"] % 2**32)
    content = dict(expected, kintree_table=kintree, J_regressor=csc_matrix(expected["J_regressor"]))
    if chumpy:
        x = np.concatenate([expected["shapedirs"], np.ones((778, 3, 10))], axis=2)
        idxs = np.arange(x.size).reshape(x.shape)[..., :10].ravel()
        content["shapedirs"] = Select(a=Ch(x=x, _dirty_vars={"x"}), idxs=idxs, preferred_shape=(778, 3, 10))
    with open(tmp_path / "again.pkl", "wb") as file:
        ResavedPickler(file, protocol, numpy).dump(content)
    arrays = read_mano(tmp_path / "again.pkl")
    assert all(np.array_equal(arrays[name], value) for name, value in expected.items())


def test_reads_npz(tmp_path, capsys):
    np.savez(tmp_path / "right.npz", **random_mano())
    arrays = read_mano(tmp_path / "right.npz")
    assert all(np.array_equal(arrays[key], value) for key, value in random_mano().items())
    unsigned = random_mano()["kintree_table"] % 2**32
    np.savez(tmp_path / "unsigned.npz", **dict(random_mano(), kintree_table=unsigned))
    assert read_mano(str(tmp_path / "unsigned.npz"))["kintree_table"][0, 0] == -1
    assert not capsys.readouterr().err
    assert set(arrays) == set(ARRAY_SHAPES)


def test_fingerprint_knows_a_hand_again():
    """Old checkpoints hold these twelve characters, so they must not change. Other hands have others."""
    arrays = random_mano()
    assert hand_fingerprint(arrays) == "19426c16f2e9"
    others = [random_mano(1), mirror_arrays(arrays), official_left(arrays),
              dict(arrays, shapedirs=arrays["shapedirs"] * 1.1)]
    assert len({hand_fingerprint(hand) for hand in (arrays, *others)}) == 5


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("pickler", [OfficialPickler, pickle.Pickler, partial(pickle.Pickler, protocol=0)])
@pytest.mark.parametrize("function, argument, name", [
    (os.system, "touch {}", "system"), (eval, "open({!r}, 'w')", "eval"), (np.loadtxt, "{}", "loadtxt"),
    (getattr, "{}", "getattr")])
def test_hostile_pickles_are_refused_by_name_and_not_run(tmp_path, pickler, function, argument, name):
    path, trace = tmp_path / "MANO_RIGHT.pkl", tmp_path / "trace"
    with open(path, "wb") as file:
        pickler(file).dump(dict(random_mano(), v_template=Calls(function, argument.format(str(trace)))))
    with pytest.raises(ValueError, match=name) as refused:
        read_mano(path)
    assert str(path) in str(refused.value) and not trace.exists()


def test_a_harmless_eighth_global_is_refused(tmp_path):
    path = tmp_path / "MANO_RIGHT.pkl"
    path.write_bytes(b"ccollections\nOrderedDict\n(tR.")
    with pytest.raises(ValueError, match="collections.OrderedDict"):
        read_mano(path)


@pytest.mark.parametrize("item", [
    Calls(copyreg._reconstructor, Calls(set), object, None), Calls(codecs.encode, 7, "latin1"),
    Calls(np.ndarray, (10**15,)), Calls(np.dtype, "O"), Calls(set, [1, 2]), np.array(["text"]),
    np.array([{}, None], dtype=object), np.full((778, 3), np.nan), np.zeros((778, 4)), np.zeros(3, complex),
    np.array(0.0), 7, None])
def test_odd_contents_are_refused(tmp_path, item):
    path = tmp_path / "MANO_RIGHT.pkl"
    with open(path, "wb") as file:
        OfficialPickler(file).dump(dict(random_mano(), v_template=item))
    with pytest.raises(ValueError, match="not a MANO file") as refused:
        read_mano(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content, reason", [
    (b"a text file\n", ""), (b"", ""), (b"PK\x03\x04 no zip", ""), (b"}.", "lacks v_template"),
    (b"K\x05.", "not a dictionary"),
    (b"\x80\x02}r\xff\xff\xff\x7f.", "lacks v_template"),  # a memo index for which C's pickle takes 32 GB
    (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x00.", "")])
def test_damaged_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "MANO_RIGHT.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"MANO_RIGHT.pkl: not a MANO file.*{reason}.*mano.is.tue.mpg.de"):
        read_mano(path)


def test_truncated_missing_and_incomplete_files(tmp_path):
    whole, cut = tmp_path / "whole.pkl", tmp_path / "cut.pkl"
    write_official_pickle(whole, random_mano())
    cut.write_bytes(whole.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cut.pkl: not a MANO file"):
        read_mano(cut)
    with pytest.raises(FileNotFoundError, match="MANO is licensed; see mano.is.tue.mpg.de"):
        read_mano(tmp_path / "absent.pkl")
    with pytest.raises(OSError, match=str(tmp_path)):
        read_mano(tmp_path)
    with open(tmp_path / "big.pkl", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="larger than any MANO file"):
        read_mano(tmp_path / "big.pkl")
    for name, value, reason in [
            ("f", random_mano()["f"] + 700, "f names vertices"),
            ("f", random_mano()["f"] - 1, "f names vertices -1"),
            ("weights", np.zeros((16, 778)), "weights has shape"),
            ("hands_coeffs", np.zeros((20, 44)), "hands_coeffs has shape"),
            ("kintree_table", np.zeros((2, 16), int), "kintree_table"),
            ("J", np.full((16, 3), np.inf), "J holds")]:
        np.savez(tmp_path / "odd.npz", **{**random_mano(), name: value})
        with pytest.raises(ValueError, match=reason):
            read_mano(tmp_path / "odd.npz")


# ---------------------------------------------------------------------------------------------- rotations


def axis_angles():
    """Angles from 0 to pi, close to both ends, about random and coordinate axes."""
    rng = np.random.default_rng(0)
    axes = np.concatenate([rng.normal(size=(200, 3)), np.eye(3), -np.eye(3)])
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = [0, 1e-30, 1e-12, 1e-8, 1e-6, 1e-4, 2e-4, 1e-3, 0.1, 1, 2, 3, 3.14]
    angles += [np.pi - 1e-4, np.pi - 1e-7, np.pi]
    return (axes[:, None] * np.array(angles)[:, None]).astype(np.float64)                      # (206, 16, 3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rotations_against_scipy(dtype, tolerance):
    v = torch.tensor(axis_angles(), dtype=dtype)
    expected = Rotation.from_rotvec(v.double().numpy().reshape(-1, 3)).as_matrix().reshape(*v.shape, 3)
    rotmats = rotmat_from_axis_angle(v)
    assert rotmats.dtype == dtype and np.abs(rotmats.numpy() - expected).max() < tolerance
    back = axis_angle_from_rotmat(rotmats)
    assert back.shape == v.shape and back.dtype == dtype
    near_pi = v.norm(dim=-1, keepdim=True) > 3.1416 - 1e-3     # both signs are right there
    apart = torch.where(near_pi, torch.minimum((back - v).abs(), (back + v).abs()), (back - v).abs())
    assert apart.max() < 10 * tolerance
    again = rotmat_from_axis_angle(back)
    assert (again - rotmats).abs().max() < 4 * tolerance
    small = v[:, 3:6]                                          # relative accuracy at 1e-8 and around
    assert ((back[:, 3:6] - small).norm(dim=-1) / small.norm(dim=-1)).max() < 10 * tolerance


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-7, 1e-4, 1.0, 3.0])
def test_rotation_gradients_are_finite_and_right(scale):
    directions = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    v = scale * torch.nn.functional.normalize(directions, dim=-1)
    got = torch.autograd.functional.jacobian(rotmat_from_axis_angle, v).sum(3)                 # (5, 3, 3, 3)
    step = 1e-5
    wide = v.double()[:, None] + step * torch.eye(3, dtype=torch.float64)
    thin = v.double()[:, None] - step * torch.eye(3, dtype=torch.float64)
    expected = (rotmat_from_axis_angle(wide) - rotmat_from_axis_angle(thin)).permute(0, 2, 3, 1) / (2 * step)
    assert (got - expected).abs().max() < 1e-5
    there_and_back = lambda x: axis_angle_from_rotmat(rotmat_from_axis_angle(x))      # noqa: E731
    round_trip = torch.autograd.functional.jacobian(there_and_back, v)
    assert (round_trip.sum(2) - torch.eye(3)).abs().max() < 1e-4


def test_6d_layout():
    """a1 comes before a2, and both are columns of the result; PyMAF interleaves them, which must not fit."""
    rotmats = random_input(3)[0]
    six = torch.cat([rotmats[..., 0], rotmats[..., 1]], dim=-1)                                # (3, 16, 6)
    assert torch.allclose(rotmat_from_6d(six), rotmats, atol=1e-6)
    assert not torch.allclose(rotmat_from_6d(rotmats[..., :2].flatten(-2)), rotmats, atol=1e-2)
    loose = rotmat_from_6d(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(loose @ loose.mT, torch.eye(3).expand(100, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(loose), torch.ones(100), atol=1e-5)


# ---------------------------------------------------------------------------------------------- cameras


def project(points, K):
    image = points.double() @ K.double().mT
    return image[..., :2] / image[..., 2:]                     # pixel-centre coordinates


@pytest.mark.parametrize("fy", [1400.0, 1250.0])
def test_crop_camera_reprojects_in_the_full_image(fy):
    """The root agrees to 0.01 pixels, and the hand's size agrees, with a principal point off the centre."""
    rng = np.random.default_rng(0)
    camera = np.stack([rng.uniform(4, 12, 200), *rng.uniform(-0.05, 0.05, (2, 200))], axis=1)
    center, side = rng.uniform(0, 1920, (200, 2)), rng.uniform(60, 500, 200)
    camera, center, side = (torch.tensor(x, dtype=torch.float32) for x in (camera, center, side))
    K = torch.tensor([[1400, 0, 931.5], [0, fy, 577.25], [0, 0, 1]]).repeat(200, 1, 1)
    translation = crop_to_full_camera(camera, center, side, K)
    assert (translation[:, 2] > 0).all()
    assert torch.equal(crop_to_full_camera(camera, center, side, K[0]), translation)

    points = torch.tensor([[0.0, 0, 0], [0.05, 0, 0], [0, 0.05, 0]]).repeat(200, 1, 1)  # at the root's depth
    in_crop = weak_perspective(points, camera)
    edges = center[:, None] + 0.5 * side[:, None, None] * in_crop  # pixel-edge coordinates
    pixels = project(points + translation[:, None], K)
    assert (pixels[:, 0] + 0.5 - edges[:, 0]).abs().max() < 0.01
    if fy == 1400.0:
        assert (pixels + 0.5 - edges).abs().max() < 0.01
    area, crop_area = ((x[:, 1] - x[:, 0])[:, 0] * (x[:, 2] - x[:, 0])[:, 1] for x in (pixels, edges))
    assert (area / crop_area - 1).abs().max() < 1e-4
