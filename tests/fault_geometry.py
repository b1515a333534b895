"""Properties of views, rotations, hands and metrics on random inputs: the section `geometry` of faults.py.

A case draws some hundred inputs, over many orders of magnitude, and asks all properties of one kind."""

import functools

import numpy as np
import torch
from scipy.spatial.transform import Rotation

import metrics
from mano import (Mano, axis_angle_from_rotmat, crop_to_full_camera, joints_from_vertices, mirror_arrays,
                  rotmat_from_6d, rotmat_from_axis_angle, weak_perspective)
from synthetic_hand import synthetic_mano
from views import (apply_strong_color, apply_theta, compose_theta, invert_theta, normalise, random_theta,
                   rows_to_blur, strong_color, theta_rotation, to_rgb, warp)


def near(a, b, tolerance=1e-5):
    """The largest difference, where it is beyond the tolerance or not a number."""
    off = np.abs(np.asarray(a) - np.asarray(b)).max()
    assert off <= tolerance, f"off by {off}"


def views(rng, generator):
    """Theta is a group; 3-D labels turn with the picture; colours stay finite and undo."""
    zoom = np.sort(rng.uniform(0.05, 3, 2)).tolist()
    outer, inner = (random_theta(200, generator, np.pi, zoom, float(rng.uniform(0, 1))).double()
                    for _ in range(2))
    points = torch.from_numpy(rng.normal(0, 10.0 ** rng.integers(-3, 3), (200, 21, 2)))
    size = float(points.abs().max()) + 1
    both = compose_theta(outer, inner)
    near(apply_theta(both, points), apply_theta(outer, apply_theta(inner, points)), 1e-5 * size)
    near(apply_theta(invert_theta(outer), apply_theta(outer, points)), points, 1e-5 * size)
    near(theta_rotation(both), theta_rotation(inner) @ theta_rotation(outer))
    near(torch.linalg.det(theta_rotation(outer)), 1)
    pixels = torch.rand(4, 3, 24, 24, generator=generator)
    same = torch.eye(2, 3).expand(4, 2, 3)
    near(warp(pixels, same, 24), pixels)
    near(to_rgb(normalise(pixels)), (pixels * 255).round().clamp(0, 255).permute(0, 2, 3, 1), 1)
    draws = [draw(4, generator) for draw in strong_color(float(rng.uniform(0, 2)), 24)]
    coloured = apply_strong_color(pixels, *draws, rows_to_blur(draws[-1]))
    near(coloured, coloured.clamp(0, 1))


def rotations(rng, generator):
    """Axis-angle, matrices and 6-D numbers are the same rotations, near 0 and near half a turn too."""
    axis = rng.normal(size=(500, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    middle = rng.choice([10.0 ** rng.integers(-12, 1), np.pi, 0.0])
    angle = rng.normal(middle, 10.0 ** rng.integers(-9, 1), 500)
    vectors = axis * angle[:, None]
    matrices = rotmat_from_axis_angle(torch.from_numpy(vectors))
    near(matrices, Rotation.from_rotvec(vectors).as_matrix(), 1e-6)
    near(matrices @ matrices.transpose(1, 2), np.eye(3), 1e-6)
    again = axis_angle_from_rotmat(matrices)
    assert again.norm(dim=1).max() <= np.pi + 1e-6
    near(rotmat_from_axis_angle(again), matrices, 1e-5)
    columns = matrices[:, :, :2].transpose(1, 2).flatten(1)
    near(rotmat_from_6d(columns), matrices, 1e-6)
    scale = torch.from_numpy(10 ** rng.uniform(-2, 4, (500, 2)))
    slanted = columns.unflatten(1, (2, 3)) * scale[..., None]  # lengths do not matter, nor what lies along a1
    slanted[:, 1] += slanted[:, 0] * torch.from_numpy(rng.normal(size=(500, 1)))
    near(rotmat_from_6d(slanted.flatten(1)), matrices, 1e-4)
    wild = torch.from_numpy(rng.normal(0, 10.0 ** rng.integers(-20, 20), (500, 6))).float()
    wild[:3] = 0
    assert rotmat_from_6d(wild).isfinite().all()


@functools.cache
def _hands():
    arrays = synthetic_mano()
    return arrays, Mano(arrays).double(), Mano(mirror_arrays(arrays), "left", repair=False).double()


def hands(rng, generator):
    """A turned wrist turns the hand; a mirrored pose is the mirrored left hand; cameras fit their crops."""
    arrays, right, left = _hands()
    pose = torch.from_numpy(rng.normal(0, rng.uniform(0, 2), (20, 16, 3)))
    betas = torch.from_numpy(rng.normal(0, 2, (20, 10)))
    rotmats = rotmat_from_axis_angle(pose)
    vertices, joints = right(rotmats, betas)
    turn = rotmat_from_axis_angle(torch.from_numpy(rng.normal(size=(20, 3))))
    turned, turned_joints = right(torch.cat([turn[:, None] @ rotmats[:, :1], rotmats[:, 1:]], 1), betas)
    wrist = joints[:, :1]
    near(turned - wrist, (vertices - wrist) @ turn.transpose(1, 2))
    near(turned_joints - wrist, (joints - wrist) @ turn.transpose(1, 2))
    flip = torch.tensor([-1.0, 1, 1])
    mirrored, _ = left(rotmat_from_axis_angle(pose * torch.tensor([1.0, -1, -1])), betas)
    near(mirrored, vertices * flip)
    near(joints_from_vertices(vertices + 1, arrays), joints_from_vertices(vertices, arrays) + 1)
    camera = torch.from_numpy(rng.uniform([2, -0.2, -0.2], [20, 0.2, 0.2], (20, 3)))
    centre, side = torch.from_numpy(rng.uniform(0, 900, (20, 2))), torch.from_numpy(rng.uniform(20, 900, 20))
    K = torch.tensor([[800.0, 0, 320], [0, 700, 240], [0, 0, 1]]).double()
    root = crop_to_full_camera(camera, centre, side, K)
    seen = weak_perspective(torch.zeros(20, 1, 3).double(), camera)[:, 0] * side[:, None] / 2 + centre - 0.5
    projected = root @ K.T
    near(projected[:, :2] / projected[:, 2:], seen, 1e-4)


def scores(rng, generator):
    """What a similarity changes is not scored after alignment; no motion of both changes a distance."""
    truth = rng.normal(0, 0.03, (6, 21, 3)) + [0, 0, 0.6]
    mesh = rng.normal(0, 0.03, (6, 90, 3)) + [0, 0, 0.6]
    noise = 10.0 ** rng.integers(-7, 0)
    pred, pred_mesh = truth + rng.normal(0, noise, truth.shape), mesh + rng.normal(0, noise, mesh.shape)
    turn, shift = Rotation.random(random_state=int(rng.integers(2 ** 31))).as_matrix(), rng.normal(size=3)
    factor = 10 ** rng.uniform(-2, 2)
    protocol = list(metrics.PROTOCOLS)[rng.integers(4)]
    first = metrics.per_sample_errors(pred, pred_mesh, truth, mesh, protocol)
    moved = [points @ turn.T + shift for points in (pred, pred_mesh, truth, mesh)]
    both = metrics.per_sample_errors(*moved, protocol)
    alone = metrics.per_sample_errors(factor * moved[0], factor * moved[1], truth, mesh, protocol)
    for name in ("joints", "vertices"):
        for kind in ("abs", "root", "pa", "pa_noreflect"):
            near(first[f"{kind}_{name}"], both[f"{kind}_{name}"], 1e-7)
        for kind in ("pa", "pa_noreflect"):
            near(first[f"{kind}_{name}"], alone[f"{kind}_{name}"], 1e-6)
    squares = [np.square(x - truth).sum((1, 2)) for x in (metrics.procrustes(pred, truth, True),
                                                          metrics.procrustes(pred, truth), pred)]
    assert (squares[0] <= squares[1] + 1e-12).all() and (squares[1] <= squares[2] + 1e-12).all()
    assert (first["f"] >= 0).all() and (first["f"] <= 1).all()
    near(metrics.f_score(pred_mesh, mesh), metrics.f_score(mesh, pred_mesh), 1e-12)
    errors = np.abs(rng.normal(0, 0.03, (50, 21)))
    assert 0 <= metrics.pck_auc(errors * 1.1) <= metrics.pck_auc(errors) <= 1
    flat = np.broadcast_to(truth[:, :1], truth.shape)  # all points in one place
    assert np.isfinite(metrics.procrustes(flat, truth)).all()
    assert np.isfinite(metrics.procrustes(truth, flat)).all()


KINDS = [views, rotations, hands, scores]


def case(number, rng, folder, work):
    """One kind of property. Returns an empty text; what is wrong is raised."""
    KINDS[number % len(KINDS)](rng, torch.Generator().manual_seed(int(rng.integers(2 ** 31))))
    return ""
