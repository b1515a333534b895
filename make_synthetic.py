"""Draws a data set that nobody has to license: posed hands in cluttered scenes, with every label, without OpenGL.

--layout index writes an index with its images, boxes.csv and samples.png; --layout freihand writes FreiHAND's own files (right
hands, four backgrounds for each training hand, 10 % evaluation), so that its reader can be tried without the data.
Poses are drawn around the rows of `hands_coeffs`, in videos that share identity, light, camera and background while
pose and view move smoothly from key pose to key pose. Everything is a function of (seed, video, frame): the same seed
gives the same bytes for any number of workers. 16 ms an image of 128 pixels on one core. The whole recipe is ours.
"""

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

from data import mirror, write_index
from draw import draw_joints, grid, rasterise, save_image, vertex_normals
from mano import TIPS, Mano, joints_from_vertices, read_mano, rotmat_from_axis_angle
from runtime import parser, run
from synthetic_hand import synthetic_mano

MIDDLE = 9  # joint whose place FreiHAND's labels hold
FINGER_JOINTS = ((13, 14, 15), (1, 2, 3), (4, 5, 6), (10, 11, 12), (7, 8, 9))  # the file's joints, thumb to little
SKIN = np.array([(250, 222, 202), (236, 194, 162), (212, 160, 122), (168, 114, 78), (118, 76, 52), (78, 50, 40)]) / 255
ARM = np.array([0.012, 0.03, 0.06, 0.11, 0.18, 0.30])  # metres from the wrist opening to each ring of the forearm
WAVES = np.array([90, 200, 380, 650, 1000, 1500])  # rad/m, of the mottling of skin
FREE_COMPONENTS = 8  # of the pose prior: the others move a quarter as much, so that similar poses recur across videos
FAR = 1.0  # metres: no crease near
MOST_VERSIONS = 4  # pictures of one training hand in FreiHAND
f4 = np.float32


# einsum in place of @ on long arrays: BLAS may add in another order when it has other threads, and bytes must agree.
def unit(x):
    return x / np.maximum(np.sqrt(np.einsum("...k,...k->...", x, x)), 1e-12)[..., None]


def pick(rng, *options):
    return options[int(rng.integers(len(options)))]


def half_size(image):
    """Means of 2 x 2 pixels."""
    image = image[0::2] + image[1::2]
    return (image[:, 0::2] + image[:, 1::2]) * f4(0.25)


def blur(picture, radius):
    return picture.filter(ImageFilter.GaussianBlur(radius)) if radius > 0 else picture


# -------------------------------------------------------------------------------------------------------------- anatomy
def wrist_loop(faces):
    """The vertices around the opening of the wrist, in the direction in which its faces run."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()
    inner = {(b, a) for a, b in edges}
    after = {a: b for a, b in edges if (a, b) not in inner}
    loop = [min(after)]
    while after[loop[-1]] != loop[0]:
        loop.append(after[loop[-1]])
    return np.array(loop)


def tube(first, start, rings):
    """Faces of a tube from the ring `first` (n,) on, whose further rings are numbered from `start`."""
    numbers = [first, *(start + np.arange(rings * len(first)).reshape(rings, -1))]
    faces = []
    for near, far in zip(numbers, numbers[1:], strict=False):
        b, d = np.roll(near, -1), np.roll(far, -1)
        faces += [np.stack([b, near, far], 1), np.stack([b, far, d], 1)]
    return np.concatenate(faces)


class Anatomy:
    """Where a hand at rest has its creases, nails, palm and wrist, from any arrays with MANO's topology.

    coordinates (V + arm, 9) of the vertices, then of the forearm's rings: place at rest (3), how much it faces the
    hand's back (-1..1), distance along the finger from its three joints, place on the nail (which is the unit disc).
    """

    def __init__(self, arrays):
        rest, self.faces = arrays["v_template"], arrays["f"].astype(np.int64)
        joints, normals = arrays["J_regressor"] @ rest, vertex_normals(rest, self.faces)
        self.back = unit(np.cross(joints[7] - joints[0], joints[1] - joints[0]))  # unit vector from palm to back
        self.across, self.palm = unit(joints[1] - joints[7]), (joints[0] + 2 * joints[4]) / 3
        owner, n = arrays["weights"].argmax(1), len(rest)
        dorsal, creases, nail = normals @ self.back, np.full((n, 3), FAR), np.full((n, 2), 9.0)
        bends = (arrays["hands_mean"] + arrays["hands_coeffs"] @ arrays["hands_components"]).reshape(-1, 15, 3).mean(0)
        for finger, tip in zip(FINGER_JOINTS, TIPS["freihand"], strict=True):
            axis = unit(rest[tip] - joints[finger[2]])
            up = unit(unit(np.cross(axis, bends[finger[2] - 1])) + 0.2 * self.back)  # a nail lies opposite to the bend
            up = unit(up - axis * (up @ axis))
            mine, last = np.isin(owner, finger), owner == finger[2]
            dorsal[mine] = normals[mine] @ up
            for k, end in enumerate([joints[finger[1]], joints[finger[2]], rest[tip]]):
                creases[mine, k] = (rest[mine] - joints[finger[k]]) @ unit(end - joints[finger[k]])
            nail[last, 0] = ((rest[last] - rest[tip]) @ axis + 0.0065) / 0.0062
            nail[last, 1] = (rest[last] - rest[tip]) @ np.cross(axis, up) / 0.0056
        rows = np.concatenate([rest, dorsal[:, None], creases, nail], 1)
        self.loop = wrist_loop(self.faces)
        ring = len(self.loop)
        self.axis = unit(rest[self.loop].mean(0) - joints[4])  # out of the wrist, along the forearm
        arm = np.concatenate([rows[self.loop] + np.r_[self.axis * t, np.zeros(6)] for t in ARM])
        arm[:, 4:] = FAR, FAR, FAR, 9.0, 9.0
        self.coordinates = np.concatenate([rows, arm]).astype(f4)
        self.skin_faces = np.concatenate([self.faces, tube(self.loop, n, len(ARM))])
        self.sleeve_faces = tube(np.arange(ring), ring, 4)


# --------------------------------------------------------------------------------------------------- poses and cameras
def between_keys(keys, count):
    """(count, ...) values that pass smoothly through keys (M, ...), M >= 2, from the first on."""
    at = np.linspace(0, len(keys) - 1, count) if count > 1 else np.zeros(1)
    i = np.minimum(at.astype(int), len(keys) - 2)
    share = (at - i).reshape(-1, *[1] * (keys.ndim - 1))
    share = share * share * (3 - 2 * share)
    return keys[i] * (1 - share) + keys[i + 1] * share


def first_view(rng, tilt, anywhere):
    """Global rotation of a hand as people hold it before a camera: the back or the palm towards it and the fingers up,
    turned about any axis by N(0, tilt) degrees; a share `anywhere` of the hands is seen from any direction."""
    if rng.random() < anywhere:
        return Rotation.from_quat(rng.standard_normal(4))
    back = pick(rng, -1.0, 1.0)  # at rest the fingers point to -x and the back of the hand to +y
    held = Rotation.from_matrix(np.array([[0, 0, back], [1, 0, 0], [0, back, 0]]))
    return Rotation.from_rotvec(unit(rng.standard_normal(3)) * np.deg2rad(rng.normal(0, tilt))) * held


def draw_labels(rng, hand, arrays, count, size, tilt, anywhere):
    """Labels of one video of right hands, float64: pose (n,48), betas (n,10), vertices (n,V,3) and joints (n,21,3) in
    the camera's frame, joints2d (n,21,2), K (n,3,3), scale (n,). About every fifth frame is a new key pose."""
    m = max(2, count // 5 + 1)
    coeffs = arrays["hands_coeffs"][rng.integers(len(arrays["hands_coeffs"]), size=m)]
    coeffs = coeffs + 0.2 * rng.standard_normal(coeffs.shape)  # near a known pose, so that poses recur
    coeffs[:, FREE_COMPONENTS:] *= 0.25
    turns = [first_view(rng, tilt, anywhere)]
    for angle in np.deg2rad(rng.normal(0, 0.8 * tilt, m - 1)):
        turns.append(Rotation.from_rotvec(unit(rng.standard_normal(3)) * angle) * turns[0])
    turning = Slerp(np.arange(m), Rotation.concatenate(turns))(between_keys(np.arange(m, dtype=float), count))
    pose = np.concatenate([turning.as_rotvec(), between_keys(coeffs @ arrays["hands_components"], count)], 1)  # (n,48)
    betas = np.repeat(np.clip(rng.normal(0, 0.9, (1, 10)), -2.2, 2.2), count, 0)
    angles = torch.from_numpy(pose + np.r_[np.zeros(3), arrays["hands_mean"]]).reshape(-1, 16, 3)
    with torch.no_grad():
        vertices = hand(rotmat_from_axis_angle(angles), torch.from_numpy(betas))[0]
        joints = joints_from_vertices(vertices, arrays).numpy()  # (n,21,3)

    depth, fill = rng.uniform(0.4, 1.0), rng.uniform(0.58, 0.76)
    focal, centre = fill * depth / 0.165 * size, (size - 1) / 2 + rng.normal(0, 0.02, 2) * size
    low, high = joints[..., :2].min(1), joints[..., :2].max(1)
    extent = (high - low).max(1)  # (n,) metres
    fills = fill * between_keys(rng.uniform(0.86, 1.14, m), count)
    z = np.clip(focal * np.sqrt(extent * 0.165) / (fills * size), 0.32, 1.3)  # the root: a fist is somewhat smaller
    margin = np.maximum(0.5 - 0.5 * extent * focal / (z * size), 0.03)  # share of the image left free around the hand
    target = (size - 1) / 2 + between_keys(rng.uniform(-0.75, 0.75, (m, 2)), count) * margin[:, None] * size
    place = (target - centre) * (z / focal)[:, None] - (low + high) / 2
    place = np.concatenate([place, (z - joints[..., 2].mean(1))[:, None]], 1)[:, None]  # (n,1,3)
    joints = joints + place
    K = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    return {"pose": pose, "betas": betas, "vertices": vertices.numpy() + place, "joints": joints,
            "joints2d": joints[..., :2] / joints[..., 2:] * focal + centre, "K": np.repeat(K[None], count, 0),
            "scale": np.linalg.norm(joints[:, MIDDLE] - joints[:, MIDDLE + 1], axis=1)}


def detect(rng, joints2d, hidden, size):
    """keypoints (21,2) and score (21,) as a detector gives them: noise that grows with the hand, more where a joint is
    hidden, now and then neighbouring fingers exchanged, joints missing, or the whole hand missed (score 0)."""
    noise = rng.standard_normal((21, 2)) * np.where(hidden, 0.045, 0.016)[:, None] * rng.uniform(0.6, 1.6)
    keypoints = joints2d + noise * np.ptp(joints2d, axis=0).max()
    score = np.where(hidden, 0.62, 0.93) - 3 * np.linalg.norm(noise, axis=1) + rng.normal(0, 0.04, 21)
    if rng.random() < 0.05:
        first = 5 + 4 * int(rng.integers(3))
        keypoints[first:first + 8] = np.roll(keypoints[first:first + 8], 4, 0)
    if rng.random() < 0.04:
        pair = rng.choice(21, 2, replace=False)
        keypoints[pair] = keypoints[pair[::-1]]
    missing = (rng.random(21) < np.where(hidden, 0.06, 0.01)) | (rng.random() < 0.03)
    missing |= ((keypoints < 0) | (keypoints > size - 1)).any(1)
    keypoints[missing] = 0
    return keypoints, np.where(missing, 0, score.clip(0.05, 1))


# --------------------------------------------------------------------------------------------------------------- scenes
def draw_person(rng, count):
    """What a video shows besides the hand's shape: skin, sleeve, a held object, something in front of the hand."""
    tone = rng.uniform(0, len(SKIN) - 1.001)
    k, share = int(tone), tone % 1
    skin = np.clip(SKIN[k] * (1 - share) + SKIN[k + 1] * share + rng.normal(0, 0.02, 3), 0.05, 0.98)
    varnish = rng.uniform(-0.05, 0.12, 3) if rng.random() < 0.8 else rng.uniform(-0.6, 0.5, 3)
    return {"skin": skin, "dark": tone / (len(SKIN) - 1), "gloss": rng.uniform(0.02, 0.12),
            "red": rng.uniform(0.08, 0.3), "nail": np.clip(skin * 0.75 + [0.24, 0.16, 0.15] + varnish, 0.04, 0.97),
            "waves": rng.normal(0, 1, (3, 6)) * WAVES, "phases": rng.uniform(0, 6.3, 6), "bend": rng.normal(0, 0.35, 3),
            "sleeve": rng.uniform(0.01, 0.11) if rng.random() < 0.6 else None, "loose": rng.uniform(1.12, 1.4),
            "cloth": rng.uniform(0.05, 0.9, 3),
            "held": draw_object(rng) if rng.random() < 0.3 else None, "grip": rng.normal(0, 0.008, 3),
            "occluder": draw_object(rng) if rng.random() < 0.2 else None, "covers": int(rng.integers(21)),
            "drift": np.pad(between_keys(rng.normal(0, 0.025, (max(2, count // 5 + 1), 2)), count), ((0, 0), (0, 1)))}


def draw_object(rng):
    """A ball, cylinder or box with rounded edges (a superellipsoid): vertices (N,3) m about 0, faces, colours (N,3)."""
    flat, rounded = pick(rng, (1.0, 1.0), (0.15, 1.0), (0.2, 0.2))
    u, v = np.meshgrid(np.linspace(-np.pi / 2, np.pi / 2, 13), np.arange(24) * np.pi / 12, indexing="ij")
    circles = ((np.cos(u), np.sin(u), flat), (np.cos(v), np.sin(v), rounded))
    (cu, su), (cv, sv) = ([np.sign(t) * np.abs(t) ** power for t in pair] for *pair, power in circles)
    points = np.stack([cu * cv, cu * sv, su], -1).reshape(-1, 3)
    colors = np.repeat(rng.uniform(0.03, 0.95, (1, 3)), len(points), 0)
    if rng.random() < 0.4:
        colors[np.sin(points @ rng.normal(0, 5, 3)) > 0.3] = rng.uniform(0.03, 0.95, 3)
    radii = rng.uniform(0.013, 0.026) * np.array([1, rng.uniform(0.7, 1.3), rng.uniform(0.9, 2.4)])
    return points * radii, tube(np.arange(24), 24, 12), colors


def draw_light(rng):
    """Linear RGB of a key light somewhere above the camera, of the sky and of what the ground throws back."""
    level, share, warm = rng.uniform(0.6, 1.0), rng.uniform(0.4, 0.78), rng.normal(0, 0.12)
    tint = np.array([1 + warm, 1 + rng.normal(0, 0.03), 1 - warm])
    return {"to": unit(np.array([rng.normal(0, 0.6), rng.normal(-0.7, 0.4), -abs(rng.normal(0.7, 0.35)) - 0.15])),
            "key": 1.35 * level * share * tint, "surface": rng.random() < 0.4,  # shadow on the background?
            "sky": 1.1 * level * (1 - share) * (2 - tint) * rng.uniform(0.9, 1.1, 3),
            "bounce": 0.75 * level * (1 - share) * rng.uniform(0.75, 1.15, 3)}


def draw_camera(rng):
    return {"gain": rng.uniform(0.82, 1.12) * (1 + rng.normal(0, 0.03, 3)), "noise": pick(rng, 0.8, 2.0, 4.0, 7.0),
            "defocus": pick(rng, 0.0, 0.0, 0.4, 0.8), "quality": int(rng.integers(55, 96))}


def draw_background(rng, size):
    """(H,H,3) float sRGB, H = 1.25 size: a gradient, noise, stripes and shapes, more or less blurred."""
    side, angle = int(1.25 * size), rng.uniform(0, 6.3)
    y, x = np.mgrid[0:side, 0:side] / side
    palette = rng.uniform(0, 1, (6, 3)) * rng.uniform(0.4, 1.1)
    grey = palette.mean(1, keepdims=True)
    palette = np.clip(grey + (palette - grey) * rng.uniform(0.2, 1), 0, 1)
    if rng.random() < 0.4:
        palette[5] = SKIN[rng.integers(len(SKIN))]  # so that the colour of skin alone tells nothing
    ramp = (np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-0.3, 0.6))[..., None].clip(0, 1)
    image = palette[0] * (1 - ramp) + palette[1] * ramp
    for cells, strength in ((rng.integers(2, 7), 0.5), (rng.integers(12, 40), 0.16)):
        noise = Image.fromarray((rng.normal(0.5, 0.25, (cells, cells, 3)) * 255).clip(0, 255).astype(np.uint8))
        noise = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 255 - 0.5
        image = image + strength * rng.random() * pick(rng, noise, noise.mean(2, keepdims=True))
    if rng.random() < 0.35:
        wave = np.sin((np.cos(angle) * y - np.sin(angle) * x) * rng.uniform(15, 90))[..., None]
        image = image + rng.uniform(0.02, 0.14) * np.tanh(wave * rng.uniform(1, 8)) * (palette[2] - palette[3])
    picture = Image.fromarray((image * 255).clip(0, 255).astype(np.uint8)).resize((2 * side, 2 * side))
    pen = ImageDraw.Draw(picture, "RGBA")
    for _ in range(int(rng.integers(22)) if rng.random() < 0.8 else 0):
        at, extent = rng.uniform(0, 2 * side, 2), rng.uniform(0.03, 0.35, 2) * side
        corners = rng.normal(0, 1.2, (int(rng.integers(3, 6)), 2)) * extent
        fill = (*(255 * palette[rng.integers(2, 6)]).astype(int).tolist(), int(rng.integers(120, 256)))
        kind = int(rng.integers(4))
        if kind < 2:
            (pen.ellipse, pen.rectangle)[kind]([*(at - extent), *(at + extent)], fill=fill)
        elif kind == 2:
            pen.polygon([tuple(at + corner) for corner in corners], fill=fill)
        else:
            pen.line([tuple(at), tuple(at + 4 * corners[0])], fill=fill, width=int(rng.integers(2, 2 + side // 10)))
    return np.asarray(blur(picture.reduce(2), pick(rng, 0, 0.6, 1.5, 3.0) * size / 128)) / 255.0


def forearm(anatomy, person, vertices, turn):
    """Rings of the bare forearm and of the sleeve (None without one), continuing the opening of the wrist.

    The forearm leaves along the hand's own axis, then turns so that it neither comes at the camera nor hides the hand.
    """
    ring = vertices[anatomy.loop]
    centre, start = ring.mean(0), turn @ anatomy.axis
    aim = unit(start + turn @ (person["bend"] * (1 - anatomy.axis**2)))
    towards = max(-start[2], 0)  # 1 where the arm would come straight at the camera
    aim[:2] += 1.2 * towards * unit(centre[:2] - vertices[:, :2].mean(0))
    aim[2] = max(aim[2], 0.35 * towards - 0.1)
    step = 0.005
    heading = unit(start + np.clip(np.arange(81) * step / 0.05, 0, 1)[:, None] * (unit(aim) - start))
    path = centre + np.cumsum(heading, 0) * step - heading[0] * step

    def rings(distances, scales):
        out = []
        for t, scale in zip(distances, scales, strict=True):
            k = round(t / step)
            across = np.cross(start, heading[k])
            angle = np.arctan2(np.linalg.norm(across), start @ heading[k])
            offsets = (ring - centre) @ Rotation.from_rotvec(unit(across) * angle).as_matrix().T
            offsets -= np.outer(offsets @ heading[k], heading[k]) * min(1, t / 0.03)
            out.append(path[k] + offsets * scale * (1 + 1.6 * min(t, 0.2)))
        return np.concatenate(out)

    arm, sleeve = rings(ARM, np.ones(len(ARM))), person["sleeve"]
    if sleeve is not None:
        widths = np.array([1.02, 1, 1.03, 1.05, 1.2]) * person["loose"]
        sleeve = rings(sleeve + np.array([0, 0, 0.005, 0.06, 0.28]), widths)
    return arm, sleeve


# -------------------------------------------------------------------------------------------------------------- drawing
def skin_albedo(person, at):
    """Linear RGB (P,3) and gloss (P,) of skin at interpolated rows (P,9) of Anatomy.coordinates."""
    back, creases, nail = at[:, 3], np.abs(at[:, 4:7]), at[:, 7:]
    skin = person["skin"] ** 2.2
    palm = np.minimum(skin * (1.12 + 0.9 * person["dark"]) + [0.03, 0, 0], 0.9)
    color = skin.astype(f4) + (palm - skin).astype(f4) / (1 + np.exp(5 * (back + f4(0.15))))[:, None]
    mottling = np.einsum("pk,kc->pc", at[:, :3], person["waves"].astype(f4)) + person["phases"].astype(f4)
    mottling = np.einsum("pc,c->p", np.sin(mottling), np.linspace(0.05, 0.01, 6, dtype=f4))
    near = np.minimum(np.minimum(creases[:, 0], creases[:, 1]), creases[:, 2])
    lines = np.exp(-((near / f4(0.0011)) ** 2)) * np.where(back < 0.1, f4(0.38), f4(0))  # inside of the joints
    folds = np.exp(-((near / f4(0.004)) ** 2)) * np.clip(back, 0, 1) * (f4(0.16) + f4(0.14) * np.cos(near * f4(2856)))
    color *= ((1 + mottling) * (1 - np.minimum(lines + folds, f4(0.6))))[:, None]
    red = np.exp(-(((at[:, 6] - f4(0.02)) / f4(0.008)) ** 2)) * f4(person["red"] * (1 - 0.6 * person["dark"]))
    color *= 1 + red[:, None] * np.array([0.12, -0.3, -0.2], f4)  # fingertips
    radius = nail[:, 0] ** 2 * np.where(nail[:, 0] > 0, f4(0.7), f4(1)) + nail[:, 1] ** 2
    on = (radius < 1) & (back > 0.25)
    color[on] = person["nail"] ** 2.2 * np.where(nail[on, :1] > 0.75, 1.25, 1.0)
    color[(radius >= 1) & (radius < 1.45) & (back > 0.2)] *= f4(0.78)
    return color, person["gloss"] * (1 + 5 * on)


def key_light(points, faces, at, to, cells=128):
    """(P,) share of the key light that reaches places `at` (P,3): a depth map seen from the light, four taps."""
    right = unit(np.cross(to, [0.3, 0.9, 0.1]))
    seen, (u, v, far) = (np.einsum("pk,ck->cp", p, np.stack([right, np.cross(right, to), -to])) for p in (points, at))
    scale = (cells - 4) / max(np.ptp(u), np.ptp(v), 1e-6)
    corner = np.array([u.min(), v.min()])[:, None] - 2 / scale
    seen[:2] = (seen[:2] - corner) * scale
    u, v = (np.stack([u, v]) - corner) * scale
    depth = rasterise(seen.T, faces, (cells, cells), cull=True)[2]
    taps = [depth[(v + dv).astype(int), (u + du).astype(int)] for dv in (-0.6, 0.6) for du in (-0.6, 0.6)]
    return sum(tap > far - 0.004 for tap in taps) / 4


def build_scene(anatomy, person, labels, frame):
    """Meshes of one picture as (vertices, faces, colours): hand and forearm first (colours None), then what there is of
    sleeve, held object and occluder."""
    vertices, turn = labels["vertices"][frame], Rotation.from_rotvec(labels["pose"][frame, :3]).as_matrix()
    arm, sleeve = forearm(anatomy, person, vertices, turn)
    parts = [(np.concatenate([vertices, arm]), anatomy.skin_faces, None)]
    if sleeve is not None:
        parts.append((sleeve, anatomy.sleeve_faces, np.repeat(person["cloth"][None], len(sleeve), 0)))
    if person["held"] is not None:
        shape, faces, colors = person["held"]
        rest = shape @ np.stack([np.cross(anatomy.across, anatomy.back), anatomy.back, anatomy.across])
        rest += anatomy.palm + person["grip"] - anatomy.back * (0.014 + np.abs(shape[:, 1]).max())
        rest -= anatomy.coordinates[:len(vertices), :3].mean(0)
        parts.append((rest @ turn.T + vertices.mean(0), faces, colors))
    if person["occluder"] is not None:
        shape, faces, colors = person["occluder"]
        place = 0.72 * labels["joints"][frame, person["covers"]] + person["drift"][frame]  # nearer, on the same ray
        parts.append((0.7 * shape + place, faces, colors))
    return parts


def draw_hand(anatomy, person, light, labels, frame, size):
    """One picture without its background: layer (size,size,4) float sRGB times coverage, and coverage; mask (size,size)
    0..1 of the visible hand; hidden (21,): joints behind an object or behind another part of the hand."""
    parts = build_scene(anatomy, person, labels, frame)
    starts = np.cumsum([0] + [len(p) for p, _, _ in parts])
    points = np.concatenate([p for p, _, _ in parts])
    faces = np.concatenate([f + start for (_, f, _), start in zip(parts, starts, strict=False)])
    normals = np.concatenate([vertex_normals(p, f) for p, f, _ in parts])
    faces = faces[(points[:, 2] > 0.06)[faces].all(1)]  # a sleeve may reach behind the camera
    pixels = points @ labels["K"][frame].T
    pixels = np.concatenate([(pixels[:, :2] / np.maximum(pixels[:, 2:], 1e-3) + 0.5) * 2, points[:, 2:]], 1)
    face, bary, depth = rasterise(pixels, faces, (2 * size, 2 * size))  # twice as fine: antialiased when averaged
    hit = face >= 0
    corner, weight = faces[face[hit]], bary[hit]  # (P,3) each
    skin = corner[:, 0] < starts[1]

    def at_pixels(values, which=slice(None), offset=0):
        return np.einsum("pk,pkc->pc", weight[which], values.astype(f4)[corner[which] - offset])

    normal, at = unit(at_pixels(normals)), at_pixels(points)
    albedo, gloss = np.empty_like(at), np.full(len(at), 0.03, f4)
    albedo[skin], gloss[skin] = skin_albedo(person, at_pixels(anatomy.coordinates, skin))
    if len(parts) > 1:
        albedo[~skin] = at_pixels(np.concatenate([c for _, _, c in parts[1:]]) ** 2.2, ~skin, starts[1])

    # A wrapped Lambert term with a reddish edge on skin, ambient light darkened in hollows, a highlight.
    lit = key_light(points, faces, at, light["to"])[:, None]
    wrap = np.where(skin[:, None], np.array([0.3, 0.16, 0.12], f4), f4(0.05))
    diffuse = np.maximum(np.einsum("pc,c->p", normal, light["to"].astype(f4))[:, None] + wrap, 0) / (1 + wrap) * lit
    filled = np.where(hit, depth, depth[hit].max() + 0.03)
    hollow = sum(np.clip(filled - uniform_filter(filled, 2 * round(r * size / 128) + 1), 0, 0.02) for r in (3, 9))
    clear, up = np.exp(-45 * hollow[hit])[:, None], 0.5 - 0.5 * normal[:, 1:2]
    color = albedo * (diffuse * light["key"] + clear * (light["sky"] * up + light["bounce"] * (1 - up)))
    shine = np.einsum("pc,pc->p", normal, unit(light["to"] - unit(at))).clip(0, 1) ** 22 * gloss
    color = color * (0.45 + 0.55 * clear) + 2 * shine[:, None] * lit * light["key"]
    color = np.where(color < 0.5, color, 1 - 0.5 * np.exp(1 - 2 * color)) ** (1 / 2.2)  # highlights roll off

    layer, mask = np.zeros((2 * size, 2 * size, 4), f4), np.zeros((2 * size, 2 * size), f4)
    layer[hit, :3], layer[hit, 3], mask[hit] = color, 1, corner[:, 0] < labels["vertices"].shape[1]
    u, v = np.clip(2 * labels["joints2d"][frame] + 1, 0, 2 * size - 1).astype(int).T
    return half_size(layer), half_size(mask), labels["joints"][frame, :, 2] > depth[v, u] + 0.016


def photograph(rng, camera, light, background, layer, motion):
    """The layer over its background, with the camera's faults: exposure, blur along `motion` (2,), defocus, noise."""
    size = len(layer)
    row, column = (rng.uniform(0.35, 0.65, 2) * (len(background) - size)).astype(int)
    image = background[row:row + size, column:column + size]
    if light["surface"]:
        dx, dy = light["to"][:2] * size * 0.1
        shadow = Image.fromarray((layer[..., 3] * 255).astype(np.uint8))
        shadow = blur(shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy)), size / 24)
        image = image * (1 - np.asarray(shadow)[..., None] * (0.5 / 255))
    image = (image * (1 - layer[..., 3:]) + layer[..., :3]) * camera["gain"]
    if rng.random() < 0.15:
        reach = unit(motion + rng.normal(0, 0.5, 2))[::-1] * rng.uniform(0.005, 0.025) * size
        pad = int(np.abs(reach).max()) + 1
        wide = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        shifts = np.round(np.outer(np.linspace(-1, 1, 7), reach)).astype(int) + pad
        image = np.mean([wide[r:r + size, c:c + size] for r, c in shifts], 0)
    picture = blur(Image.fromarray((image * 255).clip(0, 255).astype(np.uint8)), camera["defocus"] * size / 128)
    noise = rng.standard_normal(image.shape, dtype=f4) * f4(camera["noise"])
    return (np.asarray(picture, f4) + noise).clip(0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- videos
TOOLS = {}  # what a process needs to draw; filled once by start_worker


def start_worker(arrays):
    torch.set_num_threads(1)
    TOOLS.update(arrays=arrays, hand=Mano(arrays).double(), anatomy=Anatomy(arrays))


def draw_video(task):
    """Draws one video, writes its pictures and returns its labels, name -> (n, ...).

    task: seed, part (0 or 1: FreiHAND's training or evaluation), video, count (frames), first (number of its first
    picture), total (of the part: picture k + total * version shows hand k), versions, size, folder, layout,
    tilt and anywhere (see first_view)."""
    anatomy, size, count = TOOLS["anatomy"], task["size"], task["count"]
    key, freihand = [task["seed"], task["part"], task["video"]], task["layout"] == "freihand"
    rng = np.random.default_rng(key)
    labels = draw_labels(rng, TOOLS["hand"], TOOLS["arrays"], count, size, task["tilt"], task["anywhere"])
    person, left = draw_person(rng, count), bool(rng.random() < 0.3) and not freihand
    scenes = [(draw_light(rng), draw_camera(rng), draw_background(rng, size)) for _ in range(task["versions"])]
    labels["keypoints"], labels["keypoints_score"] = np.zeros((count, 21, 2)), np.zeros((count, 21))
    for frame in range(count):
        around = labels["joints2d"][[max(frame - 1, 0), min(frame + 1, count - 1)], MIDDLE]
        for version, (light, camera, background) in enumerate(scenes):
            rng = np.random.default_rng([*key, frame, version])
            if task["versions"] > 1:  # FreiHAND's first has a green screen, the others any background
                background = draw_background(rng, size) if version else np.full_like(background, [0.16, 0.62, 0.25])
            layer, mask, hidden = draw_hand(anatomy, person, light, labels, frame, size)
            image = photograph(rng, camera, light, background, layer, around[1] - around[0])
            path = Path(task["folder"], f"{task['first'] + frame + version * task['total']:08d}.jpg")
            image = Image.fromarray(np.ascontiguousarray(image[:, ::-1] if left else image))
            image.save(path, quality=camera["quality"])
            if version == 0:
                detected = detect(rng, labels["joints2d"][frame], hidden, size)
                labels["keypoints"][frame], labels["keypoints_score"][frame] = detected
                if freihand and task["part"] == 0:
                    mask = Image.fromarray((mask > 0.5).astype(np.uint8) * 255)
                    mask.save(path.parent.parent / "mask" / path.name, quality=95)
    labels["visible"] = ((labels["joints2d"] >= -0.5) & (labels["joints2d"] <= size - 0.5)).all(2)
    if left:
        labels |= {name: mirror(name, labels[name]) for name in ("joints", "vertices", "pose")}
        labels["K"][:, 0, 2] = size - 1 - labels["K"][:, 0, 2]
        for name in ("joints2d", "keypoints"):
            labels[name][..., 0] = size - 1 - labels[name][..., 0]
        labels["keypoints"][labels["keypoints_score"] == 0] = 0
    labels |= {"side": np.full(count, left), "video": np.full(count, task["video"])}
    if freihand:
        return labels  # its files hold all digits
    return {name: value.astype(f4) for name, value in labels.items()}


def draw_videos(args, arrays, part, hands, videos, folder, versions):
    """All pictures of one part -> their labels, name -> (hands, ...), in the order of the pictures."""
    folder.mkdir(parents=True)
    counts = [hands // videos + (video < hands % videos) for video in range(videos)]
    tasks = [{"seed": args.seed, "part": part, "video": video, "count": counts[video], "first": sum(counts[:video]),
              "total": hands, "versions": versions, "size": args.size, "folder": str(folder), "layout": args.layout,
              "tilt": args.tilt, "anywhere": args.anywhere}
             for video in range(videos)]
    results, workers = [], min(args.workers, videos)
    with tqdm(total=hands * versions, unit="image", desc=f"drawing {folder}", smoothing=0.05) as bar:
        pool, threads = None, torch.get_num_threads()
        if workers > 1:  # spawned: forking a process that holds torch's threads can hang
            pool = multiprocessing.get_context("spawn").Pool(workers, start_worker, (arrays,))
        else:
            start_worker(arrays)
        try:
            for labels in (pool.imap if pool else map)(draw_video, tasks):
                results.append(labels)
                bar.update(len(labels["side"]) * versions)
        finally:
            torch.set_num_threads(threads)
            if pool:
                pool.terminate()
                pool.join()
    return {name: np.concatenate([labels[name] for labels in results]) for name in results[0]}


# -------------------------------------------------------------------------------------------------------------- layouts
def write_index_layout(args, arrays):
    """The index -> paths of the pictures, joints2d and side of each."""
    labels = draw_videos(args, arrays, 0, args.hands, args.videos, args.out / "images", 1)
    names = [f"images/{k:08d}.jpg" for k in range(args.hands)]
    low, high = labels["joints2d"].min(1) + 0.5, labels["joints2d"].max(1) + 0.5  # pixel edges
    columns = labels | {"image": np.array(names, "S"), "box": np.concatenate([low, np.maximum(high, low + 1)], 1),
                        "size": np.full((args.hands, 2), args.size)}
    # The 45 articulation numbers are offsets to hands_mean; joints are regressed from the posed mesh, like FreiHAND's.
    meta = {"name": "synthetic", "joints": "freihand", "pose_mean": True, "hand": "mano" if args.mano else "synthetic"}
    rows = [f"{Path(name).name},{','.join(f'{edge:.2f}' for edge in box)},{('right', 'left')[int(side)]}\n"
            for name, box, side in zip(names, columns["box"], labels["side"], strict=True)]
    (args.out / "boxes.csv").write_text("image,x0,y0,x1,y1,side\n" + "".join(rows))  # as predict.py takes them
    write_index(args.out, columns, meta)
    return [args.out / name for name in names], labels["joints2d"], labels["side"]


def write_freihand_layout(args, arrays):
    """FreiHAND's files as its authors ship them, both roots in one -> as write_index_layout."""
    names, joints2d, evaluation = [], [], max(1, args.hands // 10)
    (args.out / "training" / "mask").mkdir(parents=True)
    for part, (name, hands, versions) in enumerate((("training", args.hands - evaluation, MOST_VERSIONS),
                                                    ("evaluation", evaluation, 1))):
        videos = max(1, min(hands, round(args.videos * hands / args.hands)))
        labels = draw_videos(args, arrays, part, hands, videos, args.out / name / "rgb", versions)
        # Joint 9 lies at ((u - cx) / s, (v - cy) / s, f / s): the last three of the 61 numbers are u, v and s.
        root, K = labels["joints"][:, MIDDLE], labels["K"]
        s = K[:, :1, 0] / root[:, 2:]
        mano = np.concatenate([labels["pose"], labels["betas"], root[:, :2] * s + K[:, :2, 2], s], 1)[:, None]
        for label, value in (("K", K), ("mano", mano), ("scale", labels["scale"]), ("verts", labels["vertices"]),
                             ("xyz", labels["joints"])):
            (args.out / f"{name}_{label}.json").write_text(json.dumps(value.tolist()))
        names += [args.out / name / "rgb" / f"{k:08d}.jpg" for k in range(hands * versions)]
        joints2d += [labels["joints2d"]] * versions
    return names, np.concatenate(joints2d), np.zeros(len(names))


def write_samples(path, names, joints2d, side, size, cell=192):
    """24 pictures from all over the set with their labelled skeletons: look at them."""
    rows, pictures = np.unique(np.linspace(0, len(names) - 1, 24).round().astype(int)), []
    for row in rows:
        with Image.open(names[row]) as image:
            large = np.asarray(image.resize((cell, cell), Image.Resampling.BICUBIC))
        pictures.append(draw_joints(large, (joints2d[row] + 0.5) * (cell / size) - 0.5))
    save_image(path, grid(pictures, 6, [f"{row} {'left' if side[row] else 'right'}" for row in rows]))


def main(argv=None):
    cli = parser(__doc__)
    cli.add_argument("--out", required=True, type=Path, help="folder to make; refused where there are files already")
    cli.add_argument("--hands", type=int, default=2000, help="labelled hands; freihand's training hands get 4 pictures")
    cli.add_argument("--videos", type=int, help="videos that they are taken from; default one for 20 hands")
    cli.add_argument("--size", type=int, help="side of a picture in pixels, 32 to 1024; default 128, freihand 224")
    cli.add_argument("--tilt", type=float, default=35.0,
                     help="degrees, spread of the view around a hand held up before the camera (default 35; 10 is easy)")
    cli.add_argument("--anywhere", type=float, default=0.25, help="share of videos seen from any direction (default .25)")
    cli.add_argument("--seed", type=int, default=0, help="same seed, same bytes, whatever --workers is")
    cli.add_argument("--layout", choices=["index", "freihand"], default="index",
                     help="our index, or FreiHAND's own files")
    cli.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that draw")
    cli.add_argument("--mano", type=Path, help="MANO_RIGHT.pkl or .npz; default: the synthetic hand, free of licences")
    args = cli.parse_args(argv)
    args.videos = max(1, args.hands // 20) if args.videos is None else args.videos
    args.size = {"index": 128, "freihand": 224}[args.layout] if args.size is None else args.size
    for flag, least, most in (("hands", {"index": 1, "freihand": 2}[args.layout], 10**8), ("videos", 1, args.hands),
                              ("size", 32, 1024), ("seed", 0, 2**63), ("workers", 1, 512), ("tilt", 0, 180), ("anywhere", 0, 1)):
        if not least <= getattr(args, flag) <= most:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be from {least} to {most}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out}: there are files already; choose another folder or delete it first")
    arrays, begin = read_mano(args.mano) if args.mano else synthetic_mano(), time.time()
    if np.diff(arrays["J"][[0, 4], 0]) > 0:  # MANO's right hand points to -x
        raise ValueError(f"--mano {args.mano}: a left hand; give MANO_RIGHT.pkl, its mirror images are the left hands")
    names, joints2d, side = {"index": write_index_layout, "freihand": write_freihand_layout}[args.layout](args, arrays)
    speed = len(names) / (time.time() - begin)
    write_samples(args.out / "samples.png", names, joints2d, side, args.size)
    print(f"{args.out}: {args.hands} hands, {len(names)} images of {args.size} px, "
          f"{100 * np.mean(side):.0f} % left, {speed:.1f} images/s; look at {args.out / 'samples.png'}")


if __name__ == "__main__":
    run(main)
