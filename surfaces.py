"""What a drawn picture of a hand shows: skin with creases and nails, a forearm, a sleeve, objects.

Shapes and colours only: `photo.py` lights and photographs them. Lengths are metres. Directions are those of
the camera's frame (x right, y down, z forward) or, where it says "at rest", of the hand model's file. The
recipe is ours.

Example::

    import numpy as np
    from PIL import Image
    from surfaces import random_skin, skin_color

    along, across = np.mgrid[-0.01:0.01:200j, -0.005:0.005:100j]  # 20 x 10 mm around a joint
    coordinates = np.ones((9, 200, 100), np.float32)  # 1: the back of a finger, far from creases and nail
    coordinates[0] = along  # place at rest
    coordinates[1] = across
    coordinates[4] = along  # distance from the finger's first joint
    albedo, gloss = skin_color(random_skin(np.random.default_rng(0)), coordinates.reshape(9, -1))
    picture = 255 * albedo.T.reshape(200, 100, 3) ** (1 / 2.2)
    Image.fromarray(picture.astype(np.uint8)).save("skin.png")

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

from dataclasses import dataclass

import numpy as np

# Colours of skin, light to dark, sRGB 0..1.
SKIN_TONES = np.array([(250, 222, 202), (236, 194, 162), (212, 160, 122),
                       (168, 114, 78), (118, 76, 52), (78, 50, 40)]) / 255
MOTTLING_WAVES = np.array([90, 200, 380, 650, 1000, 1500])  # rad/m
# Joints of the hand model's file: of each finger, thumb to little, and at the base of three of them.
FINGER_JOINTS = ((13, 14, 15), (1, 2, 3), (4, 5, 6), (10, 11, 12), (7, 8, 9))
INDEX_BASE, MIDDLE_BASE, LITTLE_BASE = 1, 4, 7
NO_CREASE = 1.0  # metres: far away
NO_NAIL = 9.0  # in radii of a nail: far away
ARM_RINGS = np.array([0.012, 0.03, 0.06, 0.11, 0.18, 0.30])  # metres from the wrist along the forearm
SLEEVE_RINGS = np.array([0, 0, 0.005, 0.06, 0.28])  # metres from the sleeve's edge
SLEEVE_WIDTHS = np.array([1.02, 1, 1.03, 1.05, 1.2])
ARM_STEP = 0.005  # metres between points of the forearm's path
f4 = np.float32  # pixels are coloured in float32


def _unit(x):
    # einsum in place of @, here and below: BLAS may add in another order when it has other threads, and the
    # same seed shall give the same bytes.
    return x / np.maximum(np.sqrt(np.einsum("...k,...k->...", x, x)), 1e-12)[..., None]


# ----------------------------------------------------------------------------------------------- hand at rest
class HandSurface:
    """Where a hand has its creases, nails, palm and wrist, from the arrays of any hand with MANO's topology.

    arrays: as `mano.read_mano` returns them; normals (V, 3): of the template's vertices; tips: numbers of the
    five vertices at the fingertips, thumb to little.

    coordinates (V + A, 9): what `skin_color` needs, for the hand's V vertices and then the A of the forearm:
        place at rest (3); how much it faces the hand's back, -1..1; distance along the finger from its three
        joints (3); place on the nail, which is the unit disc (2).
    faces: of hand and forearm; sleeve_faces: of the rings that `forearm` returns for a sleeve.
    back, across, wrist_axis: unit vectors at rest, from palm to back, from little to index finger, out of the
        wrist along the forearm. palm: its middle at rest. wrist: numbers of the vertices around the opening.
    """

    def __init__(self, arrays, normals, tips):
        rest = arrays["v_template"]
        joints = arrays["J_regressor"] @ rest
        faces = arrays["f"].astype(np.int64)
        from_wrist = joints - joints[0]
        self.back = _unit(np.cross(from_wrist[LITTLE_BASE], from_wrist[INDEX_BASE]))
        self.across = _unit(joints[INDEX_BASE] - joints[LITTLE_BASE])
        self.palm = (joints[0] + 2 * joints[MIDDLE_BASE]) / 3
        self.wrist = _wrist_opening(faces)
        self.wrist_axis = _unit(rest[self.wrist].mean(0) - joints[MIDDLE_BASE])

        bends = arrays["hands_mean"] + arrays["hands_coeffs"] @ arrays["hands_components"]
        bends = bends.reshape(-1, 15, 3).mean(0)  # mean axis-angle of joints 1 to 15
        owner = arrays["weights"].argmax(1)  # (V,) the joint that moves each vertex most
        dorsal, creases, nail = self._fingers(owner, rest, normals, joints, tips, bends)
        hand = np.concatenate([rest, dorsal[:, None], creases, nail], 1)
        rings = [hand[self.wrist] + np.r_[self.wrist_axis * t, np.zeros(6)] for t in ARM_RINGS]
        arm = np.concatenate(rings)
        arm[:, 4:7] = NO_CREASE
        arm[:, 7:] = NO_NAIL
        self.coordinates = np.concatenate([hand, arm]).astype(f4)

        ring = len(self.wrist)
        self.faces = np.concatenate([faces, tube(self.wrist, len(rest), len(ARM_RINGS))])
        self.sleeve_faces = tube(np.arange(ring), ring, len(SLEEVE_RINGS) - 1)

    def _fingers(self, owner, rest, normals, joints, tips, bends):
        """dorsal (V,), creases (V, 3) and nail (V, 2)."""
        dorsal = normals @ self.back
        creases = np.full((len(rest), 3), NO_CREASE)
        nail = np.full((len(rest), 2), NO_NAIL)
        for finger, tip in zip(FINGER_JOINTS, tips, strict=True):
            last = finger[2]
            axis = _unit(rest[tip] - joints[last])
            up = _unit(np.cross(axis, bends[last - 1])) + 0.2 * self.back  # a nail lies opposite to the bend
            up = _unit(up)
            up = _unit(up - axis * (up @ axis))
            skin = np.isin(owner, finger)
            dorsal[skin] = normals[skin] @ up
            ends = [joints[finger[1]], joints[finger[2]], rest[tip]]
            for k, end in enumerate(ends):
                start = joints[finger[k]]
                creases[skin, k] = (rest[skin] - start) @ _unit(end - start)
            top = owner == last
            from_tip = rest[top] - rest[tip]
            nail[top, 0] = (from_tip @ axis + 0.0065) / 0.0062
            nail[top, 1] = from_tip @ np.cross(axis, up) / 0.0056
        return dorsal, creases, nail


def _wrist_opening(faces):
    """The vertices around the opening of the wrist, in the direction in which its faces run."""
    edges = np.stack([faces, np.roll(faces, -1, axis=1)], -1).reshape(-1, 2).tolist()
    reversed_edges = {(b, a) for a, b in edges}
    following = {a: b for a, b in edges if (a, b) not in reversed_edges}  # edges that only one face has
    opening = [min(following, default=0)]
    while following.get(opening[-1]) != opening[0]:
        opening.append(following.get(opening[-1]))
        if opening[-1] is None or len(opening) > len(following):
            raise ValueError("the faces of the hand model do not leave one opening: is --mano damaged?")
    return np.array(opening)


def tube(first, start, rings):
    """Faces (F, 3) of a tube: the ring of vertices `first` (n,), then `rings` more, numbered from `start`."""
    numbers = start + np.arange(rings * len(first)).reshape(rings, -1)
    faces = []
    near = first
    for far in numbers:
        next_near = np.roll(near, -1)
        next_far = np.roll(far, -1)
        faces.append(np.stack([next_near, near, far], 1))
        faces.append(np.stack([next_near, far, next_far], 1))
        near = far
    return np.concatenate(faces)


# ------------------------------------------------------------------------------------------------------- skin
@dataclass
class Skin:
    """The skin of one person. Colours are sRGB 0..1."""

    color: np.ndarray  # (3,)
    darkness: float  # 0..1, place among SKIN_TONES
    gloss: float
    redness: float  # of the fingertips
    nail: np.ndarray  # (3,)
    waves: np.ndarray  # (3, 6) rad/m, and
    phases: np.ndarray  # (6,) rad: the mottling
    lines: float = 0.0  # depth of the palm's three lines, 0..1
    blush: float = 0.0  # redness of palm and knuckles, in large spots


def random_skin(rng: np.random.Generator) -> Skin:
    tone = rng.uniform(0, len(SKIN_TONES) - 1.001)
    k = int(tone)
    mix = tone % 1
    color = SKIN_TONES[k] * (1 - mix) + SKIN_TONES[k + 1] * mix
    color = np.clip(color + rng.normal(0, 0.02, 3), 0.05, 0.98)
    plain = rng.random() < 0.8
    varnish = rng.uniform(-0.05, 0.12, 3) if plain else rng.uniform(-0.6, 0.5, 3)
    gloss = rng.uniform(0.02, 0.12)
    redness = rng.uniform(0.08, 0.3)
    nail = np.clip(color * 0.75 + [0.24, 0.16, 0.15] + varnish, 0.04, 0.97)
    waves = rng.normal(0, 1, (3, 6)) * MOTTLING_WAVES
    phases = rng.uniform(0, 6.3, 6)
    return Skin(color, tone / (len(SKIN_TONES) - 1), gloss, redness, nail, waves, phases)


def everyday_skin(rng: np.random.Generator) -> Skin:
    """As random_skin, with lines in the palm, red knuckles, colours nearer to people's and rarely varnish."""
    skin = random_skin(rng)
    pinkness = skin.color.mean() * rng.normal(0.05, 0.04)
    skin.color = _duller(skin.color, rng.uniform(0.75, 1.05)) + pinkness * np.array([0.5, -0.5, 0.2])
    skin.color = skin.color.clip(0.05, 0.88)  # lighter skin has no shades left in bright light
    skin.color[1:] = np.minimum(skin.color[1:], skin.color[0] * np.array([0.9, 0.88]))  # never grey
    if rng.random() < 0.85:
        skin.nail = np.clip(skin.color * 0.8 + [0.16, 0.1, 0.1] + rng.uniform(-0.04, 0.06), 0.04, 0.97)
    skin.lines = rng.uniform(0.08, 0.35)
    skin.blush = rng.uniform(0.0, 0.25)
    return skin


def skin_color(skin: Skin, coordinates: np.ndarray):
    """Colour of skin at P places.

    coordinates (9, P) float32: interpolated rows of `HandSurface.coordinates`. Returns albedo (3, P) float32,
    linear RGB, and gloss (P,).
    """
    place = coordinates[:3]
    back = coordinates[3]
    first, second, third = np.abs(coordinates[4:7])  # distance from the finger's joints
    from_last_joint, along_nail, across_nail = coordinates[6:]

    linear = skin.color**2.2
    palm = np.minimum(linear * (1.12 + 0.9 * skin.darkness) + [0.03, 0, 0], 0.9)
    palmness = 1 / (1 + np.exp(f4(5) * (back + f4(0.15))))

    shade = np.ones_like(back)
    strengths = np.linspace(0.05, 0.01, 6, dtype=f4)
    for wave, phase, strength in zip(skin.waves.T.astype(f4), skin.phases.astype(f4), strengths, strict=True):
        mottling = place[0] * wave[0]
        mottling += place[1] * wave[1]
        mottling += place[2] * wave[2] + phase
        shade += np.sin(mottling) * strength
    crease = np.minimum(np.minimum(first, second), third)
    lines = _bump(crease, 0.0011) * np.where(back < 0.1, f4(0.38), f4(0))  # inside of the joints
    ripples = f4(0.16) + f4(0.14) * np.cos(crease * f4(2856))
    folds = _bump(crease, 0.004) * np.clip(back, f4(0), f4(1)) * ripples  # on the knuckles
    shade *= 1 - np.minimum(lines + folds, f4(0.6))

    stretch = np.where(along_nail > 0, f4(0.7), f4(1))  # longer towards the tip
    radius = along_nail**2 * stretch + across_nail**2
    nail = np.flatnonzero((radius < 1) & (back > 0.25))
    brightness = np.where(along_nail[nail] > 0.75, f4(1.25), f4(1))  # its free edge is white
    rim = np.flatnonzero((radius >= 1) & (radius < 1.45) & (back > 0.2))
    shade[rim] *= f4(0.78)
    redness = f4(skin.redness * (1 - 0.6 * skin.darkness))
    fingertip = _bump(from_last_joint - f4(0.02), 0.008) * redness
    if skin.lines:
        shade *= 1 - f4(skin.lines) * palmness * _palm_lines(place, first < NO_CREASE / 2)
    if skin.blush:
        spots = np.sin(place[0] * f4(120) + f4(skin.phases[0]))
        spots *= np.sin(place[2] * f4(150) + f4(skin.phases[1]))
        red = palmness * (f4(0.5) + f4(0.5) * spots) + (1 - palmness) * _bump(crease, 0.008)
        fingertip += red * f4(skin.blush * (1 - 0.6 * skin.darkness))

    color = np.empty((3, len(back)), f4)
    for c, tint in enumerate((0.12, -0.3, -0.2)):
        color[c] = palmness * f4(palm[c] - linear[c])
        color[c] += f4(linear[c])
        color[c] *= shade
        color[c] *= 1 + fingertip * f4(tint)
        color[c, nail] = f4(skin.nail[c] ** 2.2) * brightness
    gloss = np.full(len(back), skin.gloss, f4)
    gloss[nail] *= 6
    return color, gloss


def _palm_lines(place, on_finger):
    """(P,) 0..1: the three lines of a palm at rest, as curves over the width of MANO's frame."""
    x, _, z = place
    heart = x - (f4(0.0145) - f4(0.45) * z - f4(6) * z * z)
    head = x - (f4(0.030) - f4(0.37) * z + f4(3) * z * z)
    life = np.sqrt((x - f4(0.065)) ** 2 + (z - f4(0.038)) ** 2) - f4(0.044)
    depth = _bump(heart, 0.0011) * (z < f4(0.012))
    depth += _bump(head, 0.0011) * (z > f4(-0.026))
    depth += _bump(life, 0.0012) * (z < f4(0.03))
    return np.minimum(depth, f4(1)) * ~on_finger


def _bump(x, width):
    return np.exp(-((x / f4(width)) ** 2))


# ---------------------------------------------------------------------------------------------------- forearm
@dataclass
class Arm:
    """Forearm and sleeve of one person."""

    bend: np.ndarray  # (3,) how the wrist is bent, at rest
    sleeve: float | None  # metres from the wrist's opening to the sleeve's edge; None: a bare arm
    looseness: float  # width of the sleeve over that of the arm
    cloth: np.ndarray  # (3,) sRGB 0..1


def random_arm(rng: np.random.Generator) -> Arm:
    bend = rng.normal(0, 0.35, 3)
    sleeve = rng.uniform(0.01, 0.11) if rng.random() < 0.6 else None
    looseness = rng.uniform(1.12, 1.4)
    cloth = rng.uniform(0.05, 0.9, 3)
    return Arm(bend, sleeve, looseness, cloth)


def everyday_arm(rng: np.random.Generator) -> Arm:
    """As random_arm, with cloth that people wear, mostly dark and grey."""
    arm = random_arm(rng)
    arm.cloth = _duller(arm.cloth, rng.uniform(0, 0.6)) * rng.uniform(0.1, 1.0)
    return arm


def forearm(surface: HandSurface, arm: Arm, vertices: np.ndarray, rotmat: np.ndarray):
    """Rings of the bare forearm and of the sleeve, which continue the opening of the wrist.

    vertices (V, 3): the posed hand in the camera's frame; rotmat (3, 3): its global rotation. Returns (A, 3),
    and (S, 3) or None without a sleeve.

    The forearm leaves along the hand's own axis. Then it turns, so that it neither comes at the camera nor
    hides the hand.
    """
    ring = vertices[surface.wrist]
    centre = ring.mean(0)
    start = rotmat @ surface.wrist_axis
    aim = _unit(start + rotmat @ (arm.bend * (1 - surface.wrist_axis**2)))
    towards_camera = max(-start[2], 0)  # 1 where the arm would come straight at the camera
    aim[:2] += 1.2 * towards_camera * _unit(centre[:2] - vertices[:, :2].mean(0))
    aim[2] = max(aim[2], 0.35 * towards_camera - 0.1)

    turned = np.clip(np.arange(81) * ARM_STEP / 0.05, 0, 1)[:, None]  # the turn is over after 5 cm
    heading = _unit(start + turned * (_unit(aim) - start))  # (81, 3)
    path = centre + np.cumsum(heading, 0) * ARM_STEP - heading[0] * ARM_STEP

    distances = ARM_RINGS
    widths = np.ones(len(ARM_RINGS))
    if arm.sleeve is not None:
        distances = np.concatenate([distances, arm.sleeve + SLEEVE_RINGS])
        widths = np.concatenate([widths, SLEEVE_WIDTHS * arm.looseness])
    step = np.round(distances / ARM_STEP).astype(int)
    offsets = _turned(ring - centre, start, heading[step])  # (K, n, 3) of K rings
    flatness = np.minimum(1, distances / 0.03)[:, None]  # the opening is uneven; after 3 cm a ring is flat
    along = np.einsum("knc,kc->kn", offsets, heading[step])
    offsets -= (along * flatness)[..., None] * heading[step][:, None]
    widths = widths * (1 + 1.6 * np.minimum(distances, 0.2))
    rings = path[step][:, None] + offsets * widths[:, None, None]
    bare = rings[:len(ARM_RINGS)].reshape(-1, 3)
    if arm.sleeve is None:
        return bare, None
    return bare, rings[len(ARM_RINGS):].reshape(-1, 3)


def _turned(vectors, before, after):
    """vectors (n, 3), turned as the unit vector `before` (3,) turns to each of `after` (K, 3): (K, n, 3)."""
    x, y, z = before
    crossed = after @ np.array([[0, z, -y], [-z, 0, x], [y, -x, 0]])  # (K, 3) before x after, the axis
    x, y, z = crossed.T
    zero = np.zeros(len(after))
    turn = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3)
    cosine = after @ before
    matrix = np.eye(3) + turn + turn @ turn / np.maximum(1 + cosine, 1e-9)[:, None, None]  # Rodrigues
    return np.einsum("kij,nj->kni", matrix, vectors)


# ---------------------------------------------------------------------------------------------------- objects
def random_object(rng: np.random.Generator):
    """A ball, a cylinder or a box with rounded edges (a superellipsoid), one to five centimetres across.

    Returns vertices (N, 3) about 0, faces (F, 3), colours (N, 3) sRGB 0..1.
    """
    powers = ((1.0, 1.0), (0.15, 1.0), (0.2, 0.2))
    flat, rounded = powers[int(rng.integers(len(powers)))]
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 13)
    longitude = np.arange(24) * np.pi / 12
    u, v = np.meshgrid(latitude, longitude, indexing="ij")
    radius = _signed_power(np.cos(u), flat)
    x = radius * _signed_power(np.cos(v), rounded)
    y = radius * _signed_power(np.sin(v), rounded)
    z = _signed_power(np.sin(u), flat)
    points = np.stack([x, y, z], -1).reshape(-1, 3)

    colors = np.repeat(rng.uniform(0.03, 0.95, (1, 3)), len(points), 0)
    if rng.random() < 0.4:
        color = rng.uniform(0.03, 0.95, 3)
        stripes = np.sin(points @ rng.normal(0, 5, 3)) > 0.3
        colors[stripes] = color
    size = rng.uniform(0.013, 0.026)
    radii = size * np.array([1, rng.uniform(0.7, 1.3), rng.uniform(0.9, 2.4)])
    faces = tube(np.arange(24), 24, 12)[:, ::-1]  # the rings run clockwise seen from where they begin
    return points * radii, faces, colors


def everyday_object(rng: np.random.Generator):
    """As random_object, in the duller colours of household things."""
    vertices, faces, colors = random_object(rng)
    return vertices, faces, _duller(colors, rng.uniform(0, 0.7)) * rng.uniform(0.4, 1.05)


def _duller(colors, part):
    """Colours (..., 3) of which this part of the saturation is left."""
    grey = colors.mean(-1, keepdims=True)
    return grey + part * (colors - grey)


def _signed_power(x, power):
    return np.sign(x) * np.abs(x) ** power
