"""Draws a data set that nobody has to license: posed hands in cluttered scenes, with every label, without OpenGL.

Writes an index (`--layout index`: index.json, columns, images/, samples.png) or FreiHAND's own files (`--layout freihand`:
right hands only, four background versions of each training hand, so that prepare_data.py can be tried without the data).
All of it is ours: poses are drawn around the rows of `hands_coeffs`, grouped in videos that share identity, light, camera
and background while pose and view move smoothly between key poses. Everything is a function of (seed, video, frame), so
that the same seed gives the same bytes whatever the number of workers. About 30 ms an image of 128 pixels on one core.
"""

import argparse
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import uniform_filter
from scipy.spatial.transform import Rotation, Slerp
from tqdm import tqdm

from data import write_index
from draw import draw_joints, grid, rasterise, save_image, vertex_normals
from mano import Mano, joints_from_vertices, load_hand, rotmat_from_axis_angle
from runtime import run

MIDDLE, TIPS = 9, (744, 320, 443, 555, 672)  # root of FreiHAND's labels; vertices at the tips, thumb to little
FINGER_JOINTS = ((13, 14, 15), (1, 2, 3), (4, 5, 6), (10, 11, 12), (7, 8, 9))  # MANO's joints, thumb to little
SKIN = np.array([(250, 222, 202), (236, 194, 162), (212, 160, 122), (168, 114, 78), (118, 76, 52), (78, 50, 40)]) / 255
ARM = np.array([0.012, 0.03, 0.06, 0.11, 0.18, 0.30])  # metres from the wrist opening where the forearm has a ring
FAR = 1.0  # metres: "no crease here"


def unit(x):
    return x / np.maximum(np.sqrt(np.einsum("...k,...k->...", x, x)), 1e-12)[..., None]


def half_size(image):
    """Means of 2 x 2 pixels."""
    image = image[0::2] + image[1::2]
    return (image[:, 0::2] + image[:, 1::2]) * np.float32(0.25)


def pick(rng, *options):
    return options[int(rng.integers(len(options)))]


# ------------------------------------------------------------------------------------------------------------- anatomy
def wrist_loop(faces):
    """The vertices around the opening at the wrist, in the order in which the faces run along it."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    inner = set(map(tuple, edges[:, ::-1].tolist()))
    following = dict(edge for edge in map(tuple, edges.tolist()) if edge not in inner)
    loops = []
    while following:
        loop = [next(iter(following))]
        while loop[-1] in following:
            loop.append(following.pop(loop[-1]))
        loops.append(loop[:-1])
    return np.array(max(loops, key=len))


def tube_faces(first, count, rings):
    """Faces between `rings` successive rings of `count` vertices; `first` (count,) are the vertices of ring 0, the next
    rings are numbered on from first's `start` as stored in rings[1:]."""
    faces = []
    for near, far in zip([first, *rings[:-1]], rings, strict=True):
        a, b, c, d = near, np.roll(near, -1), far, np.roll(far, -1)
        faces += [np.stack([b, a, c], 1), np.stack([b, c, d], 1)]
    assert all(len(ring) == count for ring in rings)
    return np.concatenate(faces)


class Anatomy:
    """What skin needs to know of the hand at rest: where creases, nails, palm and wrist are. Works for any file with
    MANO's topology and skinning weights. `coordinates` (V + arm, 9): rest position, share of the back, signed distance
    along the finger to its three joints, place on the nail (along, across; the nail is the unit disc)."""

    def __init__(self, arrays):
        rest, self.faces = arrays["v_template"], arrays["f"].astype(np.int64)
        joints, normals = arrays["J_regressor"] @ rest, vertex_normals(rest, self.faces)
        self.wrist, self.palm = joints[0], (joints[0] + 2 * joints[4]) / 3
        back = unit(np.cross(joints[7] - joints[0], joints[1] - joints[0]))  # from palm to back, right hand
        self.back, self.across = back, unit(joints[1] - joints[7])
        owner = arrays["weights"].argmax(1)
        dorsal, creases, nail = normals @ back, np.full((len(rest), 3), FAR), np.full((len(rest), 2), 9.0)
        # Where each finger's last joint bends: the nail lies opposite to where the tip goes.
        bends = arrays["hands_mean"] + arrays["hands_coeffs"] @ arrays["hands_components"]
        for finger, tip in zip(FINGER_JOINTS, TIPS, strict=True):
            axis = unit(rest[tip] - joints[finger[2]])
            up = -np.cross(bends.reshape(-1, 15, 3)[:, finger[2] - 1].mean(0), axis)
            up = unit(unit(up) + 0.2 * back) if np.linalg.norm(up) > 0.05 else back
            up = unit(up - axis * (up @ axis))
            mine = np.isin(owner, finger)
            dorsal[mine] = normals[mine] @ up
            for k, joint in enumerate(finger):
                end = joints[finger[k + 1]] if k < 2 else rest[tip]
                creases[mine, k] = (rest[mine] - joints[joint]) @ unit(end - joints[joint])
            last = owner == finger[2]
            nail[last, 0] = ((rest[last] - rest[tip]) @ axis + 0.0065) / 0.0062
            nail[last, 1] = (rest[last] - rest[tip]) @ np.cross(axis, up) / 0.0056
        self.loop = wrist_loop(self.faces)
        ring = rest[self.loop]
        self.axis = unit(ring.mean(0) - joints[4])  # out of the wrist, along the forearm
        rows = np.concatenate([rest, dorsal[:, None], creases, nail], 1)
        arm = np.concatenate([rows[self.loop] + np.r_[self.axis * t, np.zeros(6)] for t in ARM])
        arm[:, 4:7], arm[:, 7:] = FAR, 9.0
        self.coordinates = np.concatenate([rows, arm]).astype(np.float32)
        n = len(self.loop)
        rings = [len(rest) + k * n + np.arange(n) for k in range(len(ARM))]
        self.skin_faces = np.concatenate([self.faces, tube_faces(self.loop, n, rings)])
        self.sleeve_faces = tube_faces(np.arange(n), n, [(k + 1) * n + np.arange(n) for k in range(4)])


# --------------------------------------------------------------------------------------------------- poses and cameras
def between_keys(keys, count):
    """(count, ...) values that pass smoothly through keys (M, ...), M >= 2, starting at the first."""
    at = np.linspace(0, len(keys) - 1, count) if count > 1 else np.zeros(1)
    i = np.minimum(at.astype(int), len(keys) - 2)
    share = (at - i).reshape(-1, *[1] * (keys.ndim - 1))
    share = share * share * (3 - 2 * share)
    return keys[i] * (1 - share) + keys[i + 1] * share


def draw_labels(rng, layer, arrays, count, size):
    """Labels of one video of right hands, float64: pose (n,48), betas (n,10), vertices (n,V,3), joints (n,21,3),
    joints2d (n,21,2), K (n,3,3), scale (n,), all in the camera's frame; a new key pose about every fifth frame."""
    m = max(2, count // 5 + 1)
    coeffs = arrays["hands_coeffs"][rng.integers(len(arrays["hands_coeffs"]), size=m)]
    spread = np.sqrt(np.sum(arrays["hands_components"] ** 2, 1)) > 1e-9
    coeffs = coeffs + 0.2 * rng.standard_normal(coeffs.shape) * spread  # near a known pose, so that poses recur
    fingers = between_keys(coeffs @ arrays["hands_components"], count)  # (n,45) offsets to hands_mean
    turn = Rotation.from_quat(rng.standard_normal(4))  # a uniform rotation
    turns = [turn]
    for _ in range(m - 1):
        turns.append(Rotation.from_rotvec(unit(rng.standard_normal(3)) * np.deg2rad(abs(rng.normal(0, 45)))) * turns[-1])
    ticks = between_keys(np.arange(m, dtype=float), count)
    pose = np.concatenate([Slerp(np.arange(m), Rotation.concatenate(turns))(ticks).as_rotvec(), fingers], 1)  # (n,48)
    betas = np.repeat(np.clip(rng.normal(0, 0.9, (1, 10)), -2.2, 2.2), count, 0)
    angles = torch.from_numpy(pose + np.r_[np.zeros(3), arrays["hands_mean"]]).reshape(-1, 16, 3)
    with torch.no_grad():
        vertices, _ = layer(rotmat_from_axis_angle(angles), torch.from_numpy(betas))
        joints = joints_from_vertices(vertices, arrays).numpy()  # (n,21,3)
    vertices = vertices.numpy()

    depth, fill = rng.uniform(0.4, 1.0), rng.uniform(0.58, 0.76)
    focal = fill * depth / 0.165 * size
    centre = (size - 1) / 2 + rng.normal(0, 0.02, 2) * size
    low, high = joints[..., :2].min(1), joints[..., :2].max(1)
    extent = (high - low).max(1)  # (n,) metres
    fills = fill * between_keys(rng.uniform(0.86, 1.14, m), count)
    # The square root lets a fist look smaller than an open hand, as it does in a video.
    z = np.clip(focal * np.sqrt(extent * 0.165) / (fills * size), 0.32, 1.3)
    margin = np.maximum(0.5 - 0.5 * extent * focal / (z * size), 0.03)  # of the image, left free around the hand
    target = (size - 1) / 2 + between_keys(rng.uniform(-0.75, 0.75, (m, 2)), count) * margin[:, None] * size
    place = np.concatenate([(target - centre) * (z / focal)[:, None] - (low + high) / 2,
                            (z - joints[..., 2].mean(1))[:, None]], 1)  # (n,3)
    vertices, joints = vertices + place[:, None], joints + place[:, None]
    K = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    return {"pose": pose, "betas": betas, "vertices": vertices, "joints": joints, "K": np.repeat(K[None], count, 0),
            "joints2d": joints[..., :2] / joints[..., 2:] * focal + centre,
            "scale": np.linalg.norm(joints[:, MIDDLE] - joints[:, MIDDLE + 1], axis=1)}


# -------------------------------------------------------------------------------------------------------------- scenes
def draw_person(rng, count):
    """What a video shares besides the camera: skin, sleeve, objects."""
    tone = rng.uniform(0, len(SKIN) - 1.001)
    k = int(tone)
    skin = SKIN[k] + (tone - k) * (SKIN[k + 1] - SKIN[k]) + rng.normal(0, 0.02, 3)
    held = rng.random() < 0.3
    return {"skin": np.clip(skin, 0.05, 0.98), "dark": tone / (len(SKIN) - 1), "redness": rng.uniform(0.3, 1.2),
            "waves": rng.normal(0, 1, (6, 3)) * np.array([[90], [200], [380], [650], [1000], [1500]]),
            "phases": rng.uniform(0, 6.3, 6), "nail": rng.uniform(-0.05, 0.12, 3) if rng.random() < 0.8
            else rng.uniform(-0.6, 0.5, 3), "gloss": rng.uniform(0.02, 0.12),
            "sleeve": rng.uniform(0.01, 0.11) if rng.random() < 0.6 else None, "cloth": rng.uniform(0.05, 0.9, 3),
            "loose": rng.uniform(1.12, 1.4), "bend": rng.normal(0, 0.35, 3),
            "held": draw_object(rng) if held else None, "off": rng.normal(0, 0.008, 3),
            "occluder": draw_object(rng) if rng.random() < 0.2 else None, "covers": int(rng.integers(21)),
            "drift": between_keys(rng.normal(0, 0.025, (max(2, count // 5 + 1), 2)), count)}


def draw_object(rng):
    """A superellipsoid: ball, cylinder or box with rounded edges; vertices (N,3) m about 0, faces, colours (N,3)."""
    flat, round_ = pick(rng, (1.0, 1.0), (0.15, 1.0), (0.2, 0.2))
    u, v = np.meshgrid(np.linspace(-np.pi / 2, np.pi / 2, 13), np.linspace(-np.pi, np.pi, 24, endpoint=False),
                       indexing="ij")

    def power(x, e):
        return np.sign(x) * np.abs(x) ** e

    points = np.stack([power(np.cos(u), flat) * power(np.cos(v), round_),
                       power(np.cos(u), flat) * power(np.sin(v), round_), power(np.sin(u), flat)], -1).reshape(-1, 3)
    a = (np.arange(12)[:, None] * 24 + np.arange(24)).ravel()
    b = (np.arange(12)[:, None] * 24 + (np.arange(24) + 1) % 24).ravel()
    faces = np.concatenate([np.stack([a, b, a + 24], 1), np.stack([b, b + 24, a + 24], 1)])
    radii = rng.uniform(0.014, 0.032) * np.array([1, rng.uniform(0.7, 1.3), rng.uniform(0.9, 2.8)])
    colors = np.repeat(rng.uniform(0.03, 0.95, (1, 3)), len(points), 0)
    if rng.random() < 0.4:
        band = np.sin(points @ rng.normal(0, 5, 3)) > 0.3
        colors[band] = rng.uniform(0.03, 0.95, 3)
    return points * radii, faces, colors


def draw_light(rng):
    """Key light from somewhere above the camera, sky and bounce as ambient light, all coloured; linear RGB."""
    warm = rng.normal(0, 0.12)
    tint = np.array([1 + warm, 1 + rng.normal(0, 0.03), 1 - warm])
    share = rng.uniform(0.4, 0.78)  # of the key light
    level = rng.uniform(0.6, 1.0)
    return {"to": unit(np.array([rng.normal(0, 0.6), rng.normal(-0.7, 0.4), -abs(rng.normal(0.7, 0.35)) - 0.15])),
            "key": 1.35 * level * share * tint, "sky": 1.1 * level * (1 - share) * (2 - tint) * rng.uniform(0.9, 1.1, 3),
            "bounce": 0.75 * level * (1 - share) * rng.uniform(0.75, 1.15, 3)}


def draw_background(rng, size):
    """(H,H,3) float sRGB, H = 1.25 size: gradient, low noise, stripes and shapes, more or less blurred."""
    side = int(1.25 * size)
    y, x = np.mgrid[0:side, 0:side] / side
    angle, palette = rng.uniform(0, 6.3), np.clip(rng.uniform(0, 1, (6, 3)) * rng.uniform(0.4, 1.1), 0, 1)
    palette[:, :] = palette.mean(1, keepdims=True) + (palette - palette.mean(1, keepdims=True)) * rng.uniform(0.2, 1)
    if rng.random() < 0.4:
        palette[5] = SKIN[rng.integers(len(SKIN))]  # so that the colour of skin alone tells nothing
    ramp = ((np.cos(angle) * x + np.sin(angle) * y) - rng.uniform(-0.3, 0.6))[..., None].clip(0, 1)
    image = palette[0] * (1 - ramp) + palette[1] * ramp
    for cells, strength in ((rng.integers(2, 7), 0.25), (rng.integers(12, 40), 0.08)):
        noise = (rng.normal(0.5, 0.25, (cells, cells, 3)) * 255).clip(0, 255).astype(np.uint8)
        noise = np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)) / 255 - 0.5
        image = image + 2 * strength * rng.random() * (noise if rng.random() < 0.5 else noise.mean(2, keepdims=True))
    if rng.random() < 0.35:
        wave = np.sin((np.cos(angle) * y - np.sin(angle) * x) * rng.uniform(15, 90))
        wave = np.tanh(wave * rng.uniform(1, 8))[..., None]
        image = image + rng.uniform(0.02, 0.14) * wave * (palette[2] - palette[3])
    picture = Image.fromarray((image * 255).clip(0, 255).astype(np.uint8)).resize((2 * side, 2 * side))
    pen = ImageDraw.Draw(picture, "RGBA")
    for _ in range(int(rng.integers(0, 22)) if rng.random() < 0.8 else 0):
        at, extent = rng.uniform(0, 2 * side, 2), rng.uniform(0.03, 0.35, 2) * 2 * side
        fill = (*(255 * palette[rng.integers(2, 6)]).astype(int).tolist(), int(rng.integers(120, 256)))
        kind = int(rng.integers(4))
        if kind == 0:
            pen.ellipse([*(at - extent / 2), *(at + extent / 2)], fill=fill)
        elif kind == 1:
            pen.rectangle([*(at - extent / 2), *(at + extent / 2)], fill=fill)
        elif kind == 2:
            pen.polygon([tuple(at + p) for p in rng.normal(0, 0.6, (int(rng.integers(3, 6)), 2)) * extent], fill=fill)
        else:
            pen.line([tuple(at), tuple(at + rng.normal(0, 1, 2) * side)], fill=fill, width=int(rng.integers(2, 2 + side // 10)))
    picture = picture.reduce(2).filter(ImageFilter.GaussianBlur(pick(rng, 0, 0.6, 1.5, 3.0) * size / 128))
    return np.asarray(picture) / 255.0


def forearm(anatomy, person, vertices, turn):
    """Rings of the bare forearm (A,3) and of the sleeve (4 rings; or None), continuing the opening of the wrist.

    The forearm leaves along the hand's own axis and then turns away from the camera where it would hide the hand."""
    ring = vertices[anatomy.loop]
    centre, start = ring.mean(0), turn @ anatomy.axis
    aim = unit(start + turn @ (person["bend"] * (1 - anatomy.axis**2)))
    aim = unit(np.array([aim[0], aim[1], max(aim[2], -0.1)]) + [0, 1e-3, 0])
    fine = np.linspace(0, 0.4, 81)
    heading = unit(start + np.clip(fine / 0.05, 0, 1)[:, None] * (aim - start))
    path = centre + np.concatenate([np.zeros((1, 3)), np.cumsum(heading[1:] + heading[:-1], 0) * fine[1] / 2])

    def rings(distances, scale):
        out = []
        for t, s in zip(distances, scale, strict=True):
            k = int(np.argmin(np.abs(fine - t)))
            turning = np.cross(start, heading[k])
            angle = np.arctan2(np.linalg.norm(turning), start @ heading[k])
            offsets = (ring - centre) @ Rotation.from_rotvec(unit(turning) * angle).as_matrix().T
            offsets = offsets - np.outer(offsets @ heading[k], heading[k]) * min(1, t / 0.03)
            out.append(path[k] + offsets * s)
        return np.concatenate(out)

    arm = rings(ARM, 1 + 1.6 * np.minimum(ARM, 0.2))
    if person["sleeve"] is None:
        return arm, None
    begin = person["sleeve"] + np.array([0.0, 0.0, 0.005, 0.06, 0.28])
    return arm, rings(begin, np.array([1.02, 1.0, 1.03, 1.05, 1.2]) * (1 + 1.6 * begin.clip(0, 0.2)) * person["loose"])


# ------------------------------------------------------------------------------------------------------------- drawing
def skin_albedo(person, at):
    """Linear RGB (P,3) and gloss (P,) of skin at the interpolated rows of Anatomy.coordinates (P,9)."""
    rest, back, creases, nail = at[:, :3], at[:, 3], np.abs(at[:, 4:7]), at[:, 7:]
    f4 = np.float32
    skin = person["skin"] ** 2.2
    palm = np.minimum(skin * (1.12 + 0.9 * person["dark"]) + np.array([0.03, 0.0, 0.0]), 0.9)
    share = 1 / (1 + np.exp(5 * (back + f4(0.15))))[:, None]
    color = skin.astype(f4) + (palm - skin).astype(f4) * share
    noise = np.sin(rest @ person["waves"].T.astype(f4) + person["phases"].astype(f4)) @ np.array([0.04, 0.035, 0.03, 0.025, 0.02, 0.02], f4)
    near = np.minimum(np.minimum(creases[:, 0], creases[:, 1]), creases[:, 2])
    lines = np.exp(-((near / f4(0.0011)) ** 2)) * np.where(back < 0.1, f4(0.38), f4(0))
    folds = np.exp(-((near / f4(0.004)) ** 2)) * np.clip(back, 0, 1) * (f4(0.16) + f4(0.14) * np.cos(near * f4(2856)))
    color *= ((1 + noise) * (1 - np.minimum(lines + folds, f4(0.6))))[:, None]
    red = np.exp(-(((at[:, 6] - f4(0.02)) / f4(0.008)) ** 2)) * f4(person["redness"] * 0.25 * (1 - 0.6 * person["dark"]))
    color *= 1 + red[:, None] * np.array([0.12, -0.3, -0.2], f4)  # fingertips are redder
    radius = nail[:, 0] ** 2 * np.where(nail[:, 0] > 0, f4(0.7), f4(1)) + nail[:, 1] ** 2
    on = (radius < 1) & (back > 0.25)
    polish = np.clip(person["skin"] * 0.75 + np.array([0.24, 0.16, 0.15]) + person["nail"], 0.04, 0.97) ** 2.2
    color[on] = polish * np.where(nail[on, :1] > 0.75, 1.25, 1.0)
    color[(radius >= 1) & (radius < 1.45) & (back > 0.2)] *= f4(0.78)
    return color, person["gloss"] * (1 + 5 * on)


def in_shadow(points, faces, at, to):
    """(P,) share of the key light that reaches points `at` (P,3): a depth map seen from the light, four taps."""
    basis = np.stack([unit(np.cross(to, [0.3, 0.9, 0.1])), np.zeros(3), -to])
    basis[1] = np.cross(basis[2], basis[0])
    map_size, seen = 128, points @ basis.T
    low, high = at @ basis[0], at @ basis[1]
    corner = np.array([low.min(), high.min()])
    scale = (map_size - 4) / max(np.ptp(low), np.ptp(high), 1e-6)
    seen[:, :2] = (seen[:, :2] - corner) * scale + 2
    depth = rasterise(seen, faces, (map_size, map_size))[2]
    u, v = (low - corner[0]) * scale + 2, (high - corner[1]) * scale + 2
    mine, lit = at @ basis[2] - 0.004, 0.0
    for du, dv in ((-1, -1), (0, -1), (-1, 0), (0, 0)):
        column, row = (u + du * 1.2 + 0.6).astype(int), (v + dv * 1.2 + 0.6).astype(int)
        lit = lit + (depth[row.clip(0, map_size - 1), column.clip(0, map_size - 1)] > mine)
    return lit / 4


def draw_hand(anatomy, person, light, background, labels, frame, size):
    """One picture (size,size,3) float sRGB without the camera's faults, the hand's mask (size,size) 0..1, and which of
    the 21 joints are hidden (by an object, or by the hand itself)."""
    vertices, K = labels["vertices"][frame], labels["K"][frame]
    turn = Rotation.from_rotvec(labels["pose"][frame, :3]).as_matrix()
    arm, sleeve = forearm(anatomy, person, vertices, turn)
    parts = [(np.concatenate([vertices, arm]), anatomy.skin_faces, None)]
    if sleeve is not None:
        parts.append((sleeve, anatomy.sleeve_faces, np.repeat(person["cloth"][None], len(sleeve), 0)))
    if person["held"] is not None:
        shape, faces, colors = person["held"]
        axes = np.stack([np.cross(anatomy.across, anatomy.back), anatomy.back, anatomy.across])
        away = anatomy.palm + person["off"] - anatomy.back * (0.014 + np.abs(shape[:, 1]).max())
        origin = vertices.mean(0) - turn @ anatomy.coordinates[:len(vertices), :3].mean(0)
        parts.append((((shape @ axes) + away) @ turn.T + origin, faces, colors))
    if person["occluder"] is not None:
        shape, faces, colors = person["occluder"]
        joint = labels["joints"][frame, person["covers"]]
        parts.append((shape * 0.7 + joint * 0.72 + np.append(person["drift"][frame], 0), faces, colors))

    starts = np.cumsum([0] + [len(p) for p, _, _ in parts])
    points = np.concatenate([p for p, _, _ in parts])
    faces = np.concatenate([f + s for (_, f, _), s in zip(parts, starts, strict=False)])
    normals = np.concatenate([vertex_normals(p, f) for p, f, _ in parts])
    faces = faces[(points[:, 2] > 0.06)[faces].all(1)]  # a sleeve may reach behind the camera
    pixels = points @ K.T
    pixels = np.concatenate([(pixels[:, :2] / np.maximum(pixels[:, 2:], 1e-3) + 0.5) * 2, points[:, 2:]], 1)
    face, bary, depth = rasterise(pixels, faces, (2 * size, 2 * size))
    hit = face >= 0
    corner, weight = faces[face[hit]], bary[hit]  # (P,3) each

    def at_pixels(values):
        return np.einsum("pk,pkc->pc", weight, values.astype(np.float32)[corner])

    normal, at = unit(at_pixels(normals)), at_pixels(points)
    albedo, gloss = np.empty_like(at), np.full(len(at), 0.03, np.float32)
    skin = corner[:, 0] < starts[1]
    coordinates = np.concatenate([anatomy.coordinates, np.zeros((len(points) - starts[1], 9), np.float32)])
    albedo[skin], gloss[skin] = skin_albedo(person, np.einsum("pk,pkc->pc", weight[skin], coordinates[corner[skin]]))
    if len(parts) > 1:
        colors = np.concatenate([np.zeros((starts[1], 3))] + [c for _, _, c in parts[1:]])
        albedo[~skin] = np.einsum("pk,pkc->pc", weight[~skin], colors.astype(np.float32)[corner[~skin]]) ** 2.2

    # Light: a wrapped Lambert term whose edge is reddish on skin, ambient light darkened in hollows, a highlight.
    wrap = np.where(skin[:, None], np.array([0.3, 0.16, 0.12]), 0.05)
    lit = in_shadow(points, faces, at, light["to"])[:, None]
    diffuse = np.clip((normal @ light["to"])[:, None] + wrap, 0, None) / (1 + wrap) * lit
    filled = np.where(hit, depth, depth[hit].max() + 0.03)
    hollow = sum(np.clip(filled - uniform_filter(filled, 2 * round(r * size / 128) + 1), 0, 0.02) for r in (3, 9))
    open_ = np.exp(-45 * hollow[hit])[:, None]
    sky = 0.5 - 0.5 * normal[:, 1:2]
    color = albedo * (diffuse * light["key"] + open_ * (light["sky"] * sky + light["bounce"] * (1 - sky)))
    half = unit(light["to"] - unit(at))
    shine = gloss * np.clip((normal * half).sum(1), 0, 1) ** 22 * lit[:, 0]
    color = color * (0.45 + 0.55 * open_) + 2.0 * shine[:, None] * light["key"]
    color = np.where(color < 0.5, color, 1 - 0.5 * np.exp(1 - 2 * color)) ** (1 / 2.2)  # highlights roll off

    layer = np.zeros((2 * size, 2 * size, 4), np.float32)
    layer[hit, :3], layer[hit, 3] = color, 1
    layer = half_size(layer)
    mask = np.zeros((2 * size, 2 * size), np.float32)
    mask[hit] = corner[:, 0] < len(vertices)
    mask = half_size(mask)
    u, v = np.clip(2 * labels["joints2d"][frame] + 1, 0, 2 * size - 1).astype(int).T
    hidden = labels["joints"][frame, :, 2] > depth[v, u] + 0.016
    return layer, mask, hidden


def compose(rng, layer, background, light, size):
    """The drawn layer over its background, which it may shade: (size,size,3) float sRGB."""
    slack = len(background) - size
    row, column = (rng.uniform(0.35, 0.65, 2) * slack).astype(int)
    back = background[row:row + size, column:column + size]
    if light.get("surface"):
        dx, dy = light["to"][:2] * size * 0.1
        shadow = Image.fromarray((layer[..., 3] * 255).astype(np.uint8))
        shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy))
        shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(size / 24)))
        back = back * (1 - shadow[..., None] * (0.5 / 255))
    return back * (1 - layer[..., 3:]) + layer[..., :3]


def photograph(rng, camera, image, motion):
    """What a camera adds: exposure, blur along `motion` (2,) pixels, defocus, noise; (H,W,3) uint8."""
    image = image * camera["gain"]
    if rng.random() < 0.15:
        dx, dy = unit(motion + rng.normal(0, 0.5, 2)) * rng.uniform(0.005, 0.025) * len(image)
        pad = int(np.ceil(max(abs(dx), abs(dy))))
        wide, n = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge"), len(image)
        starts = np.round(np.outer(np.linspace(-1, 1, 7), [dy, dx])).astype(int) + pad
        image = np.mean([wide[r:r + n, c:c + n] for r, c in starts], 0)
    picture = Image.fromarray((image * 255).clip(0, 255).astype(np.uint8))
    if camera["defocus"] > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(camera["defocus"] * len(image) / 128))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(camera["noise"])
    return (np.asarray(picture, np.float32) + noise).clip(0, 255).astype(np.uint8)


def draw_camera(rng):
    return {"gain": rng.uniform(0.82, 1.12) * (1 + rng.normal(0, 0.03, 3)), "noise": pick(rng, 0.8, 2.0, 4.0, 7.0),
            "defocus": pick(rng, 0.0, 0.0, 0.4, 0.8), "quality": int(rng.integers(55, 96))}


def detect(rng, joints2d, hidden, size):
    """keypoints (21,2) and score (21,) as a detector gives them: noise that grows with the hand, more where a joint is
    hidden, now and then neighbouring fingers exchanged, joints missing, or the whole hand missed (score 0)."""
    extent = np.ptp(joints2d, axis=0).max()
    spread = np.where(hidden, 0.045, 0.016) * rng.uniform(0.6, 1.6)
    noise = rng.standard_normal((21, 2)) * spread[:, None]
    keypoints = joints2d + noise * extent
    score = np.clip(np.where(hidden, 0.62, 0.93) - 3 * np.linalg.norm(noise, axis=1) + rng.normal(0, 0.04, 21), 0.05, 1)
    chance = rng.random(3)
    if chance[0] < 0.05:
        a = 5 + 4 * int(rng.integers(3))
        keypoints[a:a + 8] = np.roll(keypoints[a:a + 8], 4, 0)
    if chance[1] < 0.04:
        a, b = rng.choice(21, 2, replace=False)
        keypoints[[a, b]] = keypoints[[b, a]]
    missing = (rng.random(21) < np.where(hidden, 0.06, 0.01)) | (chance[2] < 0.03)
    missing |= ((keypoints < 0) | (keypoints > size - 1)).any(1)
    keypoints[missing], score[missing] = 0, 0
    return keypoints, score


# -------------------------------------------------------------------------------------------------------------- videos
def mirror(labels, size):
    """Labels of a right hand -> those of the left hand in the mirrored image."""
    flip = np.array([-1.0, 1, 1])
    out = dict(labels, joints=labels["joints"] * flip, vertices=labels["vertices"] * flip, K=labels["K"].copy(),
               pose=labels["pose"] * np.tile([1.0, -1, -1], 16))
    out["K"][:, 0, 2] = size - 1 - labels["K"][:, 0, 2]
    for name in ("joints2d", "keypoints"):
        out[name] = labels[name] * [-1, 1] + [size - 1, 0]
    out["keypoints"][labels["keypoints_score"] == 0] = 0
    return out


SETUP = {}  # what every worker process needs, filled once by start_worker


def start_worker(arrays):
    torch.set_num_threads(1)
    SETUP.update(arrays=arrays, layer=Mano(arrays).double(), anatomy=Anatomy(arrays))


def draw_video(task):
    """Draws one video and writes its pictures; returns its labels as a dict of (n, ...) arrays.

    task: seed, part (0 training, 1 evaluation), video, count frames, first (number of the first image), size, folder,
    layout, step (distance between the versions of one picture; None = one version)."""
    anatomy, size, count = SETUP["anatomy"], task["size"], task["count"]
    key = [task["seed"], task["part"], task["video"]]
    rng = np.random.default_rng(key)
    freihand = task["layout"] == "freihand"
    labels = draw_labels(rng, SETUP["layer"], SETUP["arrays"], count, size)
    person = draw_person(rng, count)
    left = bool(rng.random() < 0.3) and not freihand
    versions = range(4 if task["step"] else 1)
    scenes = []
    for version in versions:
        light = draw_light(rng) | {"surface": rng.random() < 0.4}
        scenes.append((light, draw_camera(rng), draw_background(rng, size)))
    labels["keypoints"], labels["keypoints_score"] = np.zeros((count, 21, 2)), np.zeros((count, 21))
    for frame in range(count):
        for version, (light, camera, background) in zip(versions, scenes, strict=True):
            rng = np.random.default_rng([*key, frame, version])
            if freihand and task["step"]:  # of FreiHAND's four versions the first is recorded before a green screen
                background = (np.array([0.16, 0.62, 0.25]) + 0 * background if version == 0 else draw_background(rng, size))
            layer, mask, hidden = draw_hand(anatomy, person, light, background, labels, frame, size)
            centre = labels["joints2d"][:, MIDDLE]
            motion = centre[min(frame + 1, count - 1)] - centre[max(frame - 1, 0)]
            image = photograph(rng, camera, compose(rng, layer, background, light, size), motion)
            image = image[:, ::-1] if left else image
            number = task["first"] + frame + version * (task["step"] or 0)
            name = f"{number:08d}.jpg"
            Image.fromarray(np.ascontiguousarray(image)).save(Path(task["folder"], name), quality=camera["quality"])
            if version == 0:
                labels["keypoints"][frame], labels["keypoints_score"][frame] = detect(rng, labels["joints2d"][frame], hidden, size)
                if freihand and task["step"]:
                    Image.fromarray((mask > 0.5).astype(np.uint8) * 255).save(Path(task["folder"], "../mask", name), quality=95)
    labels["visible"] = ((labels["joints2d"] >= -0.5) & (labels["joints2d"] <= size - 0.5)).all(2)
    labels = mirror(labels, size) if left else labels
    labels["side"], labels["video"] = np.full(count, left), np.full(count, task["video"])
    if not freihand:  # float32 is what the index stores, and halves what the workers send back
        labels = {name: value.astype(np.float32) for name, value in labels.items()}
    return labels


def split(count, videos):
    """Frames of each video: as equal as can be."""
    return [count // videos + (k < count % videos) for k in range(videos)]


def draw_videos(tasks, arrays, workers):
    """All videos in order -> dict of label columns; shows progress in pictures."""
    results, total = [], sum(task["count"] * (4 if task["step"] else 1) for task in tasks)
    with tqdm(total=total, unit="image", desc="drawing", smoothing=0.05) as bar:
        def note(result, task):
            results.append(result)
            bar.update(task["count"] * (4 if task["step"] else 1))
        if workers == 1:
            start_worker(arrays)
            for task in tasks:
                note(draw_video(task), task)
        else:  # spawn: forking a process that holds torch's threads can hang
            os.environ["OMP_NUM_THREADS"] = "1"
            with multiprocessing.get_context("spawn").Pool(workers, start_worker, (arrays,)) as pool:
                for task, result in zip(tasks, pool.imap(draw_video, tasks), strict=True):
                    note(result, task)
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


# -------------------------------------------------------------------------------------------------------------- layouts
def make_tasks(args, part, count, videos, folder, versions):
    folder.mkdir(parents=True)
    counts = split(count, videos)
    firsts = np.cumsum([0] + counts)
    return [{"seed": args.seed, "part": part, "video": v, "count": counts[v], "first": int(firsts[v]), "size": args.size,
             "folder": str(folder), "layout": args.layout, "step": count if versions > 1 else None} for v in range(videos)]


def write_index_layout(args, arrays, out):
    labels = draw_videos(make_tasks(args, 0, args.hands, args.videos, out / "images", 1), arrays, args.workers)
    low, high = labels["joints2d"].min(1) + 0.5, labels["joints2d"].max(1) + 0.5  # pixel edges
    columns = dict(labels, image=np.array([f"images/{k:08d}.jpg".encode() for k in range(args.hands)]),
                   box=np.concatenate([low, np.maximum(high, low + 1)], 1),
                   size=np.full((args.hands, 2), args.size))
    # pose_mean: the 45 numbers are offsets to hands_mean; joints: regressed from the posed mesh, as FreiHAND's are.
    meta = {"name": "synthetic", "joints": "freihand", "pose_mean": True, "hand": args.mano and "mano" or "synthetic"}
    write_index(out, columns, meta)
    names = [out / "images" / f"{k:08d}.jpg" for k in range(args.hands)]
    return names, labels["joints2d"], labels["side"]


def write_freihand_layout(args, arrays, out):
    """FreiHAND's files as its authors ship them, both roots merged: 90 % of the hands for training, 10 % evaluation."""
    names, joints2d = [], []
    evaluation = max(1, args.hands // 10)
    for part, (split_name, count) in enumerate((("training", args.hands - evaluation), ("evaluation", evaluation))):
        if part == 0:
            (out / "training" / "mask").mkdir(parents=True)
        videos = max(1, min(count, round(args.videos * count / args.hands)))
        tasks = make_tasks(args, part, count, videos, out / split_name / "rgb", 1 if part else 4)
        labels = draw_videos(tasks, arrays, args.workers)
        focal, root = labels["K"][:, 0, 0], labels["joints"][:, MIDDLE]
        s = focal / root[:, 2]  # root = ((u - cx) / s, (v - cy) / s, f / s) is FreiHAND's place of joint 9
        uv = root[:, :2] * s[:, None] + labels["K"][:, :2, 2]
        mano = np.concatenate([labels["pose"], labels["betas"], uv, s[:, None]], 1)[:, None]  # (n,1,61)
        for name, value in (("K", labels["K"]), ("mano", mano), ("scale", labels["scale"]), ("verts", labels["vertices"]),
                            ("xyz", labels["joints"])):
            (out / f"{split_name}_{name}.json").write_text(json.dumps(value.tolist()))
        names += [out / split_name / "rgb" / f"{k:08d}.jpg" for k in range(count * (1 if part else 4))]
        joints2d.append(np.tile(labels["joints2d"], (1 if part else 4, 1, 1)))
    return names, np.concatenate(joints2d), np.zeros(len(names))


def write_samples(path, names, joints2d, side, size, cell=192):
    """A picture of 24 hands from all over the set, each with its labelled skeleton."""
    rows = np.unique(np.linspace(0, len(names) - 1, 24).round().astype(int))
    pictures = []
    for row in rows:
        with Image.open(names[row]) as image:
            large = np.asarray(image.resize((cell, cell), Image.Resampling.BICUBIC))
        pictures.append(draw_joints(large, (joints2d[row] + 0.5) * (cell / size) - 0.5))
    save_image(path, grid(pictures, 6, [f"{row} {'left' if side[row] else 'right'}" for row in rows]))


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", required=True, type=Path, help="folder to make; refused if it already holds files")
    cli.add_argument("--hands", type=int, default=2000,
                     help="labelled hands; one picture each, in freihand's training set four; 2000 take a minute")
    cli.add_argument("--videos", type=int, help="videos to group them in, default one for 20 hands")
    cli.add_argument("--size", type=int, help="side of the pictures in pixels, 32 to 1024; default 128, freihand 224")
    cli.add_argument("--seed", type=int, default=0, help="same seed, same bytes, for any number of workers")
    cli.add_argument("--layout", choices=["index", "freihand"], default="index",
                     help="our index, or FreiHAND's own files (right hands, 90 %% training and 10 %% evaluation)")
    cli.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that draw")
    cli.add_argument("--mano", type=Path, help="MANO_RIGHT.pkl or .npz; default: the licence-free synthetic hand")
    args = cli.parse_args(argv)
    least = 1 if args.layout == "index" else 2
    args.size = args.size if args.size is not None else (128 if args.layout == "index" else 224)
    if args.hands < least:
        raise ValueError(f"--hands {args.hands}: at least {least} for --layout {args.layout}")
    args.videos = args.videos if args.videos is not None else max(1, args.hands // 20)
    for flag, value, low, high in (("videos", args.videos, 1, args.hands), ("size", args.size, 32, 1024),
                                   ("seed", args.seed, 0, 2**63), ("workers", args.workers, 1, 512)):
        if not low <= value <= high:
            raise ValueError(f"--{flag} {value}: must be between {low} and {high}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out}: already holds files; choose another folder or delete it first")
    arrays = load_hand(args.mano)
    begin = time.time()
    write = write_index_layout if args.layout == "index" else write_freihand_layout
    names, joints2d, side = write(args, arrays, args.out)
    seconds = time.time() - begin
    write_samples(args.out / "samples.png", names, joints2d, side, args.size)
    print(f"{args.out}: {args.hands} hands, {len(names)} images of {args.size} px, {args.videos} videos, "
          f"{100 * np.mean(side):.0f} % left, {len(names) / seconds:.1f} images/s; look at {args.out / 'samples.png'}")


if __name__ == "__main__":
    run(main)
