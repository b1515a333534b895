"""The synthetic hand stands in for MANO everywhere: it has MANO's structure, and moves like a right hand."""
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import mano
import synthetic_hand
from mano import ARRAY_SHAPES, TIPS, Mano, hand_fingerprint, read_mano, rotmat_from_axis_angle
from synthetic_hand import synthetic_mano

FIRST_JOINTS = {"index": 1, "middle": 4, "little": 7, "ring": 10}  # of three each
END_JOINTS = {"thumb": 15, "index": 3, "middle": 6, "ring": 12, "little": 9}


@pytest.fixture(scope="module")
def hand():
    return synthetic_mano()


@pytest.fixture(scope="module", params=["prior", "gestures"])
def poses(hand, request):
    """(n, 45)"""
    if request.param == "gestures":
        return synthetic_hand.gestures()
    return hand["hands_mean"] + hand["hands_coeffs"] @ hand["hands_components"]


def posed(hand, poses):
    """Vertices (n, 778, 3) and joints (n, 21, 3)."""
    rotmats = rotmat_from_axis_angle(torch.tensor(np.pad(poses, ((0, 0), (3, 0)))).reshape(-1, 16, 3))
    vertices, joints = Mano(hand).double()(rotmats, torch.zeros(len(poses), 10))
    return vertices.numpy(), joints.numpy()


def directed_edges(faces):
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def normals(points, faces):
    """Of faces, twice their area long: (..., 1538, 3)."""
    a, b, c = (points[..., faces[:, corner], :] for corner in range(3))
    return np.cross(b - a, c - a)


def edge_lengths(points, faces):
    edges = directed_edges(faces)
    return np.linalg.norm(points[..., edges[:, 0], :] - points[..., edges[:, 1], :], axis=-1)


def test_its_copies_of_the_joint_tables_equal_those_of_mano():
    assert synthetic_hand.PARENTS == mano.PARENTS
    assert synthetic_hand.TIPS == mano.TIPS


def test_it_is_read_like_a_file_of_mano(hand, tmp_path):
    """Same keys, types and shapes: `read_mano` checks them and changes nothing."""
    np.savez(tmp_path / "hand.npz", **hand)
    arrays = read_mano(tmp_path / "hand.npz")
    assert set(hand) == set(ARRAY_SHAPES)
    for name, shape in ARRAY_SHAPES.items():
        assert hand[name].shape == shape
        assert np.array_equal(arrays[name], hand[name]) and arrays[name].dtype == hand[name].dtype


@pytest.mark.parametrize("seed, fingerprint", [(0, "0fa510b8f285"), (1, "b560b7e31cd7")])
def test_it_is_still_the_hand_of_older_checkpoints(seed, fingerprint):
    """They refuse another template or other shape directions. To a micrometre."""
    assert hand_fingerprint(synthetic_mano(seed)) == fingerprint


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_surface_is_one_sheet_with_one_opening(seed):
    hand = synthetic_mano(seed)
    points, faces = hand["v_template"], hand["f"]
    edges = directed_edges(faces)
    assert len(np.unique(edges, axis=0)) == len(edges)  # each direction of an edge occurs once at most
    undirected, count = np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)
    assert len(points) - len(undirected) + len(faces) == 1 and (count == 1).sum() == 16
    rim = points[np.unique(undirected[count == 1])]
    assert np.ptp(rim[:, 0]) < 1e-6 and rim[0, 0] == points[:, 0].max()  # the wrist, cut straight
    a, b, c = points[faces].transpose(1, 0, 2) - rim.mean(0)
    assert 1.5e-4 < (a * np.cross(b, c)).sum() / 6 < 3.5e-4  # m^3; positive, so faces look outwards
    area = np.linalg.norm(normals(points, faces), axis=1) / 2
    squares = (edge_lengths(points, faces) ** 2).reshape(3, -1).sum(0)
    assert (4 * 3**0.5 * area / squares).min() > 0.4  # 1 is equilateral
    assert np.array_equal(faces, synthetic_mano()["f"])  # other hands have the same faces


def test_numbers_are_mano_like(hand):
    weights, regressor, components = hand["weights"], hand["J_regressor"], hand["hands_components"]
    assert weights.min() >= 0 and np.allclose(weights.sum(1), 1) and regressor.min() >= 0
    np.testing.assert_allclose(regressor.sum(1), 1)
    np.testing.assert_allclose(regressor @ hand["v_template"], hand["J"], atol=1e-12)
    assert (regressor > 0).sum() <= 16 * 40
    gram = components @ components.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    norms = np.sqrt(np.diag(gram))
    assert (np.diff(norms) <= 1e-12).all() and 1 < norms[0] < 1.6 and 0.01 < norms[-1] < 0.06
    np.testing.assert_allclose(hand["hands_coeffs"].std(0), 1)
    J = hand["J"]
    np.testing.assert_allclose(J[0], (0.0957, 0.0064, 0.0062), atol=1e-6)
    assert abs(np.linalg.norm(J[4] - J[0]) - 0.0947) < 1e-3
    assert abs(np.linalg.norm(J[5] - J[4]) - 0.0317) < 1e-4
    again = synthetic_mano()
    assert all(np.array_equal(hand[name], again[name]) for name in hand)
    assert 1e-3 < np.abs(synthetic_mano(1)["v_template"] - hand["v_template"]).max() < 0.02


def test_tip_vertices_of_every_convention_lie_on_their_fingertip(hand):
    """FreiHAND's lie at its end."""
    points, J = hand["v_template"], hand["J"]
    for finger, joint in enumerate(END_JOINTS.values()):
        end = points[TIPS["freihand"][finger]]
        end_bone = points[hand["weights"][:, joint] > 0.9]
        axis = (end - J[joint]) / np.linalg.norm(end - J[joint])
        assert ((end_bone - end) @ axis).max() < 1e-9  # nothing reaches farther
        for ids in TIPS.values():
            assert np.linalg.norm(points[ids[finger]] - end) < 0.008
            assert hand["weights"][ids[finger], joint] > 0.9


def test_it_is_a_right_hand(hand, poses):
    """Seen from its back, fingers up, the thumb is at the left. Poses move the tips to the palm's side."""
    J = hand["J"]
    up = J[[1, 4, 7, 10]].mean(0) - J[0]
    _, open_joints = posed(hand, np.zeros((1, 45)))
    _, joints = posed(hand, poses)
    palm = (joints[:, [8, 12, 16, 20]] - open_joints[:, [8, 12, 16, 20]]).mean((0, 1))
    assert np.cross(-palm, up) @ (J[14] - J[0]) > 0
    across = np.cross(joints[:, 5] - joints[:, 0], joints[:, 17] - joints[:, 0])
    curl = joints[:, [8, 12, 16, 20]].mean(1) - joints[:, [5, 9, 13, 17]].mean(1)
    assert ((across * curl).sum(1) > 0).mean() > 0.9  # how flags of left and right hands can be checked


def test_poses_stay_within_the_limits_of_a_hand(poses):
    """Second and third joints bend about one axis only. Rows of `degrees` are joints 1 to 15."""
    degrees = np.rad2deg(poses).reshape(-1, 15, 3)
    for first in FIRST_JOINTS.values():
        for row in (first, first + 1):
            axis = np.linalg.svd(degrees[:, row], full_matrices=False)[2][0]
            axis = axis * np.sign(axis[2])  # +z bends a finger that points to -x
            flexion = degrees[:, row] @ axis
            rest = degrees[:, row] - np.outer(flexion, axis)
            assert np.sqrt((rest**2).sum(1).mean()) < 3
            assert flexion.min() > -8 and flexion.max() < 102
        root = degrees[:, first - 1]
        assert root[:, 2].min() > -28 and root[:, 2].max() < 98
        assert np.abs(root[:, 1]).max() < 45  # sideways; a turned finger's flexion contributes
    assert degrees[:, 0].std(0)[2] > 20  # they use this freedom

    frames = synthetic_hand._joint_frames(synthetic_hand._skeleton(np.random.default_rng(0), spread=0.0))
    axes = np.stack([frames.flexion, frames.dorsal, frames.bone])[:, 12:]
    thumb = np.einsum("njc,kjc->njk", degrees[:, 12:], axes)  # flexion, sideways, turn of three joints
    root = thumb[:, 0]
    noise = 7  # degrees; the limits hold before it is added
    assert (root > np.array([-20, -25, -45]) - noise).all() and (root < np.array([45, 30, 30]) + noise).all()
    bend = thumb[:, 1:, 0]
    assert (bend > np.array([-10, -15]) - noise).all() and (bend < np.array([55, 75]) + noise).all()
    assert (root.std(0) > 7).all() and (bend.std(0) > 7).all()


def test_posed_skin_neither_tears_nor_turns_inside_out(hand, poses):
    faces, rest = hand["f"], hand["v_template"]
    chosen = poses[np.random.default_rng(0).choice(len(poses), 200, replace=False)]
    vertices, _ = posed(hand, chosen)
    turns = Rotation.from_rotvec(chosen.reshape(-1, 3)).as_matrix().reshape(-1, 15, 3, 3)
    world = np.tile(np.eye(3), (200, 16, 1, 1))
    for j in range(1, 16):
        world[:, j] = world[:, hand["kintree_table"][0, j]] @ turns[:, j - 1]
    of_faces = np.einsum("fj,njkl->nfkl", hand["weights"][faces].mean(1), world)
    expected = np.einsum("nfkl,fl->nfk", of_faces, normals(rest, faces))
    flipped = ((expected * normals(vertices, faces)).sum(-1) < 0).sum(1)
    assert flipped.mean() < 2 and flipped.max() < 30  # of 1538: the folds of web and thumb
    stretch = edge_lengths(vertices, faces) / edge_lengths(rest, faces)
    assert stretch.max() < 4.5 and np.quantile(stretch, 0.999) < 2


def test_gestures_count_in_all_ways_and_some_thumbs_touch_a_finger(hand):
    chosen = synthetic_hand.gestures(n=300)
    vertices, joints = posed(hand, chosen)
    tips = vertices[:, TIPS["freihand"]]  # (300, 5, 3), thumb to little
    reach = np.linalg.norm(tips[:, 1:] - joints[:, :1], axis=2)  # from the wrist: long where straight
    straight = reach > 0.85 * reach.max(0)
    assert len(np.unique(straight, axis=0)) == 16
    apart = np.linalg.norm(tips[:, 1:] - tips[:, :1], axis=2)
    assert ((apart < 0.015).sum(0) >= 8).all()
    assert np.array_equal(chosen, synthetic_hand.gestures(n=300))
    assert not np.array_equal(chosen, synthetic_hand.gestures(seed=1, n=300))


@pytest.mark.parametrize("beta", [-3.0, 3.0])
def test_shapes_stay_whole_and_bones_inside(hand, beta):
    """No face turns over, and every joint stays inside the skin, which fills most of its solid angle."""
    faces, rest = hand["f"], hand["v_template"]
    for k in range(10):
        points = rest + beta * hand["shapedirs"][:, :, k]
        assert ((normals(points, faces) * normals(rest, faces)).sum(1) > 0).all()
        corners = points[faces].transpose(1, 0, 2)[:, :, None]  # (3, 1538, 1, 3)
        a, b, c = corners - hand["J_regressor"] @ points  # from each joint: (1538, 16, 3)
        la, lb, lc = (np.linalg.norm(x, axis=2) for x in (a, b, c))
        flat = la * lb * lc + (a * b).sum(2) * lc + (b * c).sum(2) * la + (c * a).sum(2) * lb
        solid_angle = 2 * np.arctan2((a * np.cross(b, c)).sum(2), flat).sum(0)
        assert (solid_angle / (4 * np.pi) > 0.6).all()  # 1 inside a closed mesh, 0 outside; the wrist is open
