"""The synthetic hand stands in for MANO everywhere: it must have MANO's structure, and move like a right hand."""
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mano import TIPS, Mano, rotmat_from_axis_angle
from synthetic_hand import synthetic_mano

FINGERS = {"index": 1, "middle": 4, "little": 7, "ring": 10}              # first of three joints


@pytest.fixture(scope="module")
def hand():
    return synthetic_mano()


@pytest.fixture(scope="module")
def poses(hand):
    return hand["hands_mean"] + hand["hands_coeffs"] @ hand["hands_components"]                # (n, 45)


def posed(hand, poses):
    """Vertices (n, 778, 3) and joints (n, 21, 3)."""
    rotmats = rotmat_from_axis_angle(torch.tensor(np.pad(poses, ((0, 0), (3, 0)))).reshape(-1, 16, 3))
    vertices, joints = Mano(hand).double()(rotmats, torch.zeros(len(poses), 10))
    return vertices.numpy(), joints.numpy()


def directed_edges(faces):
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_surface_is_one_sheet_with_one_opening(seed):
    hand = synthetic_mano(seed)
    points, faces = hand["v_template"], hand["f"]
    edges = directed_edges(faces)
    assert len(np.unique(edges, axis=0)) == len(edges)                    # every edge once in each direction at most
    undirected, count = np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)
    assert len(points) - len(undirected) + len(faces) == 1 and (count == 1).sum() == 16
    rim = points[np.unique(undirected[count == 1])]
    assert np.ptp(rim[:, 0]) < 1e-6 and rim[0, 0] == points[:, 0].max()   # the wrist, cut straight
    a, b, c = points[faces].transpose(1, 0, 2) - rim.mean(0)
    assert 1.5e-4 < (a * np.cross(b, c)).sum() / 6 < 3.5e-4               # m^3, positive: faces look outwards
    lengths = np.linalg.norm(points[faces] - points[faces[:, [1, 2, 0]]], axis=2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    assert (4 * 3 ** 0.5 * area / (lengths ** 2).sum(1)).min() > 0.4      # 1 is equilateral
    assert np.array_equal(faces, synthetic_mano()["f"])                   # identity changes, topology does not


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
    assert abs(np.linalg.norm(J[4] - J[0]) - 0.0947) < 1e-3 and abs(np.linalg.norm(J[5] - J[4]) - 0.0317) < 1e-4
    again = synthetic_mano()
    assert all(np.array_equal(hand[name], again[name]) for name in hand)
    assert 1e-3 < np.abs(synthetic_mano(1)["v_template"] - hand["v_template"]).max() < 0.02


def test_tips(hand):
    points, J = hand["v_template"], hand["J"]
    for finger, joint in enumerate((15, 3, 6, 12, 9)):                    # thumb to little
        end = points[TIPS["freihand"][finger]]
        own = points[hand["weights"][:, joint] > 0.9]
        axis = (end - J[joint]) / np.linalg.norm(end - J[joint])
        assert ((own - end) @ axis).max() < 1e-9                          # nothing reaches farther
        for ids in TIPS.values():
            assert np.linalg.norm(points[ids[finger]] - end) < 0.008
            assert hand["weights"][ids[finger], joint] > 0.9


def test_it_is_a_right_hand(hand, poses):
    """Seen from its back, fingers up, the thumb is at the left; curling moves the tips to the palm's side."""
    J = hand["J"]
    up = J[[1, 4, 7, 10]].mean(0) - J[0]
    _, open_joints = posed(hand, np.zeros((1, 45)))
    _, joints = posed(hand, poses)
    palm = (joints[:, [8, 12, 16, 20]] - open_joints[:, [8, 12, 16, 20]]).mean((0, 1))
    assert np.cross(-palm, up) @ (J[14] - J[0]) > 0
    across = np.cross(joints[:, 5] - joints[:, 0], joints[:, 17] - joints[:, 0])
    curl = joints[:, [8, 12, 16, 20]].mean(1) - joints[:, [5, 9, 13, 17]].mean(1)
    assert ((across * curl).sum(1) > 0).mean() > 0.9                      # the test of a data set's side flags


def test_pose_prior_keeps_to_the_limits_of_a_hand(poses):
    degrees = np.rad2deg(poses).reshape(-1, 15, 3)
    for first in FINGERS.values():
        for joint in (first, first + 1):                                  # middle and end joints, rows of `poses`
            axis = np.linalg.svd(degrees[:, joint], full_matrices=False)[2][0]
            axis = axis * np.sign(axis[2])                                # +z bends a finger that points to -x
            flexion = degrees[:, joint] @ axis
            assert np.sqrt(((degrees[:, joint] - np.outer(flexion, axis)) ** 2).sum(1).mean()) < 3
            assert flexion.min() > -8 and flexion.max() < 102
        assert degrees[:, first - 1, 2].min() > -28 and degrees[:, first - 1, 2].max() < 98
        assert np.abs(degrees[:, first - 1, 1]).max() < 45                # sideways, with the share of a turned axis
    assert degrees[:, 0].std(0)[2] > 20                                   # and uses them


def test_posed_skin_neither_tears_nor_turns_inside_out(hand, poses):
    faces, rest = hand["f"], hand["v_template"]
    chosen = poses[np.random.default_rng(0).choice(len(poses), 200, replace=False)]
    vertices, _ = posed(hand, chosen)
    turns = Rotation.from_rotvec(chosen.reshape(-1, 3)).as_matrix().reshape(-1, 15, 3, 3)
    globals_ = np.tile(np.eye(3), (200, 16, 1, 1))
    for j in range(1, 16):
        globals_[:, j] = globals_[:, hand["kintree_table"][0, j]] @ turns[:, j - 1]
    blend = np.einsum("fj,njkl->nfkl", hand["weights"][faces].mean(1), globals_)
    normal = lambda v: np.cross(v[..., 1, :] - v[..., 0, :], v[..., 2, :] - v[..., 0, :])      # noqa: E731
    expected = np.einsum("nfkl,fl->nfk", blend, normal(rest[faces]))
    flipped = ((expected * normal(vertices[:, faces])).sum(-1) < 0).sum(1)
    assert flipped.mean() < 2 and flipped.max() < 30                      # of 1538; folds of web and thumb
    edges = directed_edges(faces)
    length = lambda v: np.linalg.norm(v[..., edges[:, 0], :] - v[..., edges[:, 1], :], axis=-1)      # noqa: E731
    stretch = length(vertices) / length(rest)
    assert stretch.max() < 4.5 and np.quantile(stretch, 0.999) < 2


@pytest.mark.parametrize("beta", [-3.0, 3.0])
def test_shapes_stay_whole_and_bones_inside(hand, beta):
    faces = hand["f"]
    for k in range(10):
        points = hand["v_template"] + beta * hand["shapedirs"][:, :, k]
        a, b, c = points[faces].transpose(1, 0, 2)
        before = hand["v_template"][faces].transpose(1, 0, 2)
        assert ((np.cross(b - a, c - a) * np.cross(before[1] - before[0], before[2] - before[0])).sum(1) > 0).all()
        a, b, c = ((x[:, None] - hand["J_regressor"] @ points) for x in (a, b, c))             # (1538, 16, 3)
        la, lb, lc = (np.linalg.norm(x, axis=2) for x in (a, b, c))
        flat = la * lb * lc + (a * b).sum(2) * lc + (b * c).sum(2) * la + (c * a).sum(2) * lb
        solid = np.arctan2((a * np.cross(b, c)).sum(2), flat).sum(0) / (2 * np.pi)       # 1 inside, but for the opening
        assert (solid > 0.6).all()
