"""A right hand that no licence restricts, in the form of MANO's file, and the poses that a hand can take.

It stands in for MANO in demos, tests and synthetic data sets. All of it is ours; it contains no number of
MANO's. How it is made: five chains of bones, round cones around them as flesh, a coarse mesh pulled onto the
cones. The same chains give skinning weights, joint regressor, shape directions, pose correctives and poses.

All lengths inside this file are millimetres; the returned arrays are in metres. The frame is MANO's: fingers
towards -x, back of the hand +y, thumb's side +z. V = 778 vertices.

Example::

    from synthetic_hand import synthetic_mano

    hand = synthetic_mano()                                          # as mano.read_mano("MANO_RIGHT.pkl")
    coefficients = hand["hands_coeffs"][0]                           # one of 1554 natural poses
    pose = hand["hands_mean"] + coefficients @ hand["hands_components"]      # (45,) axis-angle, rad
    large = hand["v_template"] + 2 * hand["shapedirs"][:, :, 0]      # (778, 3) m, the first beta is 2
    with open("hand.obj", "w") as file:                              # any 3-D viewer opens it
        file.writelines(f"v {x} {y} {z}\\n" for x, y, z in large)
        file.writelines(f"f {a} {b} {c}\\n" for a, b, c in hand["f"] + 1)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

from typing import NamedTuple

import numpy as np

# The same as in mano.py, so that this file works alone: the joints of MANO's file, and fingertip vertices.
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
TIPS = {
    "freihand": (744, 320, 443, 555, 672),
    "smplx": (744, 320, 443, 554, 671),
    "manopth": (745, 317, 444, 556, 673),
    "manopth445": (745, 317, 445, 556, 673),
    "ho3d": (744, 333, 444, 555, 672),
    "handoccnet": (728, 353, 442, 576, 694),
}
_FILE_ORDER = ("index", "middle", "little", "ring", "thumb")  # of the fingers, three joints each


def _unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _smoothstep(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


# ------------------------------------------------------------------------------------------ bones


class _Finger(NamedTuple):
    """How a finger is built."""

    base: tuple  # its first joint
    turn: float  # degrees from -x towards the thumb's side
    lengths: tuple  # of the three bones
    radii: tuple  # at the three joints and at the tip
    rings: int  # of ten vertices


class _Chain(NamedTuple):
    """A finger's skeleton."""

    points: np.ndarray  # (4, 3): three joints and the tip
    radii: np.ndarray  # (4,)


_FINGERS = {
    "index": _Finger((7.5, 3.5, 25.5), 8, (32.5, 22.5, 23.0), (9.8, 8.9, 8.0, 6.7), 9),
    "middle": _Finger((1.2, 6.2, 4.4), 0, (31.7, 24.5, 24.5), (9.9, 9.1, 8.2, 6.8), 10),
    "ring": _Finger((7.5, 4.5, -15.5), -8, (29.5, 23.5, 23.5), (9.4, 8.5, 7.7, 6.4), 9),
    "little": _Finger((20.0, 0.0, -32.0), -17, (24.0, 16.5, 20.0), (8.6, 7.5, 6.8, 5.7), 8),
}
_DROOP = np.deg2rad([2.0, 5.0, 9.0])  # of a finger's three bones at rest, towards the palm
_THUMB_BASE = (72, -4, 27)
_THUMB_BONES = ((-28, -9, 24), (-21.5, -4, 20), (-21, -2, 15))
_THUMB_RADII = (11.0, 10.2, 9.2, 7.6)
_THUMB_RINGS = 9
_WRIST = np.array([95.7, 6.4, 6.2])


def _skeleton(rng, spread):
    """name -> _Chain; index, middle, ring, little, thumb. spread: standard deviation of the proportions."""
    chains = {}
    for name, finger in _FINGERS.items():
        turn = np.deg2rad(finger.turn)
        x = -np.cos(turn) * np.cos(_DROOP)
        y = -np.sin(_DROOP)
        z = np.sin(turn) * np.cos(_DROOP)
        bones = np.stack([x, y, z], axis=1) * np.reshape(finger.lengths, (3, 1))
        chains[name] = _varied_chain(finger.base, bones, finger.radii, rng, spread)
    chains["thumb"] = _varied_chain(_THUMB_BASE, np.array(_THUMB_BONES), _THUMB_RADII, rng, spread)
    return chains


def _varied_chain(base, bones, radii, rng, spread):
    bones = bones * (1 + spread * rng.standard_normal((3, 1)))
    radii = np.array(radii) * (1 + spread * rng.standard_normal())
    return _Chain(np.cumsum([base, *bones], axis=0), radii)


def _bend_axes(name, directions):
    """Flexion axis and dorsal direction of bones (..., 3). Positive flexion bends towards the palm."""
    up = (0.55, 0.62, 0.55) if name == "thumb" else (0.0, 1.0, 0.0)  # the thumb's nail looks up and outwards
    flexion = _unit(np.cross(up, directions))
    return flexion, np.cross(directions, flexion)


class _Frames(NamedTuple):
    """Unit vectors (15, 3) at the 15 finger joints, in the file's order."""

    flexion: np.ndarray  # axis of bending
    dorsal: np.ndarray  # towards the back of the finger
    bone: np.ndarray  # towards the next joint


def _joint_frames(chains):
    fingers = []
    for name in _FILE_ORDER:
        bone = _unit(np.diff(chains[name].points, axis=0))  # (3, 3)
        flexion, dorsal = _bend_axes(name, bone)
        fingers.append((flexion, dorsal, bone))
    return _Frames(*np.concatenate(fingers, axis=1))


# ------------------------------------------------------------------------------------------ flesh

_PALM, _WEB = 0, -1  # owners of vertices and cones; 1 to 5 are the fingers in the order of `_skeleton`


class _Cones(NamedTuple):
    """C round cones: segments with a radius at either end."""

    start: np.ndarray  # (C, 3)
    end: np.ndarray  # (C, 3)
    start_radius: np.ndarray  # (C,)
    end_radius: np.ndarray  # (C,)
    owner: np.ndarray  # (C,)


def _flesh(chains):
    """The _Cones around the chains: bones, pads, palm and webs."""
    rows = []

    def add(owner, start, end, start_radius, end_radius):
        rows.append((start, end, start_radius, end_radius, owner))

    for owner, (name, (points, radii)) in enumerate(chains.items(), 1):
        first, second, third, tip = points
        end_direction = _unit(tip - third)
        dorsal = _bend_axes(name, end_direction)[1]
        pad = tip - radii[3] * end_direction - 0.6 * dorsal  # below the nail
        add(owner, first, second, radii[0], radii[1])
        add(owner, second, third, radii[1], radii[2])
        add(owner, third, pad, radii[2], radii[3])
        if name != "thumb":
            metacarpal = [86, 1, 6 + 0.42 * (first[2] - 6)]
            add(_PALM, metacarpal, first + [2, -3.5, 0], 11.5, 9)
            pad_end = first + 0.38 * (second - first) + [0, -3, 0]
            add(_PALM, first + [1, -7, 0], pad_end, 6, 5)  # the pad below the knuckle

    index, middle, ring, little, thumb = (chain.points for chain in chains.values())
    four = (index, middle, ring, little)
    webs = [finger[0] + 0.2 * (finger[1] - finger[0]) + [0, -2, 0] for finger in four]
    for web, next_web in zip(webs[:-1], webs[1:], strict=True):
        add(_PALM, web, next_web, 4.5, 4.5)
    for z in (8, -10):  # forearm
        add(_PALM, _WRIST + [45, -4, z], _WRIST + [0, -4, 0.9 * z], 16, 13)
    add(_PALM, thumb[0] + [4, -4, -4], thumb[1] + [4, -3, -6], 11.5, 9)  # ball of the thumb
    add(_PALM, [80, -7, -12], [38, -8, -29], 10.5, 8.5)  # ball of the little finger
    bay = (thumb[1] + index[0]) / 2 + [9.5, -0.5, -4.5]  # between thumb and index finger
    add(_PALM, thumb[0] + [-8, 0, -6], bay, 9, 6.5)
    add(_PALM, thumb[1] + [1, 0, -2], bay, 6.5, 6)
    add(_PALM, index[0] + [8, -3, 3], bay, 6.5, 6)
    return _Cones(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def _newton_step(points, visible, cones):
    """One Newton step of points (N, 3) towards the skin, the smooth union of their visible cones (N, C)."""
    axis = cones.end - cones.start
    offset = points[:, None] - cones.start  # (N, C, 3)
    t = np.clip((offset * axis).sum(-1) / (axis**2).sum(-1), 0, 1)  # (N, C): nearest place on the axis
    offset = offset - t[..., None] * axis
    distance = np.linalg.norm(offset, axis=-1)
    gap = distance - cones.start_radius - (cones.end_radius - cones.start_radius) * t  # (N, C), signed

    def smooth_union(chosen, width):
        near = visible[:, chosen] * np.exp(-gap[:, chosen] / width) + 1e-300
        pull = near / near.sum(1, keepdims=True) / distance[:, chosen]
        normal = (pull[..., None] * offset[:, chosen]).sum(1)
        return -width * np.log(near.sum(1)), normal  # (N,), (N, 3)

    palm_gap, palm_normal = smooth_union(cones.owner == _PALM, 4.0)  # the palm is one lump
    finger_gap, finger_normal = smooth_union(cones.owner > _PALM, 1.2)  # fingers keep their joints
    palm_part = 1 / (1 + np.exp(np.clip((palm_gap - finger_gap) / 3, -60, 60)))[:, None]
    normal = palm_part * palm_normal + (1 - palm_part) * finger_normal
    skin_gap = -3 * np.logaddexp(-palm_gap / 3, -finger_gap / 3)
    return points - (skin_gap / ((normal**2).sum(-1) + 0.05))[:, None] * normal


# ------------------------------------------------------------------------------------------ mesh

_PALM_RINGS = (16, 18, 20, 22, 24, 24, 24, 24, 24, 24, 25, 26, 28)  # their vertices, from wrist to webs
_THUMB_HOLE = slice(4, 8)  # palm rings around the hole that the thumb grows from


def _circle(centre, u, v, n, phase=0.0):
    angle = (phase + 2 * np.pi * np.arange(n) / n)[:, None]
    return centre + np.cos(angle) * u + np.sin(angle) * v


def _triangles(ring, next_ring):
    """Faces between two closed rings of any sizes, which start at the same angle and run the same way."""
    faces = []
    i = 0
    j = 0
    while i < len(ring) or j < len(next_ring):
        ring_is_behind = (2 * i + 1) * len(next_ring) <= (2 * j + 1) * len(ring)
        if j == len(next_ring) or (i < len(ring) and ring_is_behind):
            faces.append((ring[i], ring[(i + 1) % len(ring)], next_ring[j % len(next_ring)]))
            i += 1
        else:
            faces.append((ring[i % len(ring)], next_ring[(j + 1) % len(next_ring)], next_ring[j]))
            j += 1
    return faces


def _cross_section(name, chain, s):
    """Centre and two radius vectors, (3,) each, of the ring at arc length s of a finger."""
    lengths = np.linalg.norm(np.diff(chain.points, axis=0), axis=1)
    arc = np.append(0, np.cumsum(lengths))  # (4,)
    bone = min(np.searchsorted(arc[1:], s), 2)
    along = _unit(chain.points[bone + 1] - chain.points[bone])
    side = _bend_axes(name, along)[0]
    if name == "thumb":
        side = _unit(np.array([1.0, 0, 0]) - along[0] * along)
    radius = np.interp(s, arc, chain.radii)
    return chain.points[bone] + (s - arc[bone]) * along, radius * side, radius * np.cross(along, side)


class _Cage:
    """The coarse mesh, while it grows ring by ring. Rings are lists of vertex ids."""

    def __init__(self):
        self.points = []
        self.owners = []
        self.faces = []
        self.pinned = []  # vertices that smoothing must not move along the skin
        self.tips = []  # per finger: the top vertex and the five around it

    def add_ring(self, points, owner):
        first = len(self.points)
        self.points.extend(points)
        self.owners.extend([owner] * len(points))
        return list(range(first, len(self.points)))

    def add_tube(self, base, name, chain, owner, start, rings, phase=0.0):
        """Grows a finger from the ring `base`, from arc length `start` to a closed tip."""
        length = np.linalg.norm(np.diff(chain.points, axis=0), axis=1).sum()
        for s in np.linspace(start, length - 0.7 * chain.radii[3], rings + 1)[1:]:
            centre, u, v = _cross_section(name, chain, s)
            ring = self.add_ring(_circle(centre, u, v, 10, phase), owner)
            self.faces.extend(_triangles(base, ring))
            base = ring
        centre, u, v = _cross_section(name, chain, length - 0.25 * chain.radii[3])
        cap = self.add_ring(_circle(centre, 0.6 * u, 0.6 * v, 5, phase), owner)
        top = self.add_ring([chain.points[3]], owner)
        self.faces.extend(_triangles(base, cap))
        self.faces.extend((cap[i], cap[(i + 1) % 5], top[0]) for i in range(5))
        self.pinned.extend(base + cap + top)
        self.tips.append(top + cap)


def _finger_roots(chains):
    """Circles (10, 3) where palm and fingers meet: 0 thumb's side, 1-4 back, 5 far side, 6-9 palm."""
    roots = [_circle(*_cross_section(name, chains[name], 9.0), 10) for name in _FINGERS]
    for root, next_root in zip(roots[:-1], roots[1:], strict=True):
        for far, near in ((4, 1), (6, 9)):  # neighbours share two vertices
            root[far] = next_root[near] = (root[far] + next_root[near]) / 2
    return roots


def _resampled(loop, n):
    """n points, evenly spread by index, of a closed loop whose last point is its first."""
    at = np.arange(n) / n
    places = np.linspace(0, 1, len(loop))
    return np.stack([np.interp(at, places, column) for column in loop.T], axis=1)


def _add_palm(cage, roots):
    """Rings from the wrist's opening to the border of the fingers, with a hole for the thumb."""
    backs = [point for root in roots for point in root[1:4]]
    palms = [point for root in roots[::-1] for point in root[6:9]]
    start = roots[0][0]
    border = np.array([start, *backs, roots[3][4], roots[3][5], *palms, roots[0][9], start])
    opening = _circle(_WRIST + [18.3, -4, -1], np.array([0, 0, 26.0]), np.array([0, 17.0, 0]), 112)
    opening = np.append(opening, opening[:1], axis=0)

    rings = []
    for n, mix in zip(_PALM_RINGS, np.linspace(0, 1, len(_PALM_RINGS)), strict=True):
        points = (1 - mix) * _resampled(opening, n) + mix * _resampled(border, n)
        rings.append(cage.add_ring(points, _PALM))
    for ring, next_ring in zip(rings[:-1], rings[1:], strict=True):
        cage.faces.extend(_triangles(ring, next_ring))
    hole = {ring[i] for ring in rings[_THUMB_HOLE] for i in (-2, -1, 0, 1)}
    cage.faces = [face for face in cage.faces if not hole.issuperset(face)]
    cage.pinned.extend(rings[0])
    return rings


def _add_fingers(cage, chains, roots, edge):
    """Four tubes. The base of each is part of the palm's last ring `edge`, and the webs beside it."""
    webs = [(root[5] + next_root[0]) / 2 for root, next_root in zip(roots[:-1], roots[1:], strict=True)]
    between = [edge[0], *cage.add_ring(webs, _WEB), edge[14]]
    for i, (name, finger) in enumerate(_FINGERS.items()):
        back = edge[1 + 3 * i : 5 + 3 * i]
        palm = [edge[(15 + 3 * (3 - i) + k) % 28] for k in range(4)]
        base = [between[i], *back, between[i + 1], *palm]
        cage.add_tube(base, name, chains[name], i + 1, 9.0, finger.rings)


def _add_thumb(cage, chains, hole):
    upper = [hole[0][i] for i in (-2, -1, 0)]
    right = [ring[1] for ring in hole]
    lower = [hole[3][i] for i in (0, -1, -2)]
    left = [hole[2][-2], hole[1][-2]]
    start = 0.62 * np.linalg.norm(_THUMB_BONES[0])
    rim = [*upper, *right, *lower, *left]
    cage.add_tube(rim, "thumb", chains["thumb"], 5, start, _THUMB_RINGS, phase=-np.pi / 4)


def _build_cage(chains):
    """Points (V, 3), faces (1538, 3), owner (V,), pinned vertices, tips (5, 6) as in `_Cage`."""
    cage = _Cage()
    roots = _finger_roots(chains)
    rings = _add_palm(cage, roots)
    hole = rings[_THUMB_HOLE]
    _add_fingers(cage, chains, roots, rings[-1])
    _add_thumb(cage, chains, hole)

    in_hole = [ring[i] for ring in hole[1:3] for i in (-1, 0)]  # no face has them
    keep = np.setdiff1d(np.arange(len(cage.points)), in_hole)
    new_id = np.full(len(cage.points), -1)
    new_id[keep] = np.arange(len(keep))
    points = np.array(cage.points)[keep]
    owner = np.array(cage.owners)[keep]
    return points, new_id[np.array(cage.faces)], owner, new_id[cage.pinned], new_id[cage.tips]


def _numbering(tips):
    """(V,): which vertex of the cage gets each number.

    All of TIPS must lie on their fingertip, FreiHAND's at the top. The other vertices keep their order.
    """
    vertex_of = {}
    for finger, tip in enumerate([tips[4], *tips[:4]]):  # thumb first, as in TIPS
        numbers = dict.fromkeys(ids[finger] for ids in TIPS.values())  # no number twice, FreiHAND's first
        vertex_of.update(zip(numbers, tip, strict=False))
    others = iter(np.setdiff1d(np.arange(778), list(vertex_of.values())))
    return np.array([vertex_of[i] if i in vertex_of else next(others) for i in range(778)])


def _neighbour_average(faces):
    """(V, V): times points, the mean of each vertex's neighbours."""
    average = np.zeros((778, 778))
    after = faces[:, [1, 2, 0]]
    average[faces, after] = 1
    average[after, faces] = 1
    return average / average.sum(1, keepdims=True)


def _pull_to_skin(points, owner, pinned, average, cones):
    """Forty rounds of smoothing and a Newton step: the coarse mesh becomes the skin (V, 3)."""
    visible = (cones.owner == _PALM) | (cones.owner == owner[:, None])  # (V, C)
    first_bones = np.unique(cones.owner, return_index=True)[1][1:]
    visible[:, first_bones] |= owner[:, None] == _PALM
    rim = points[:, 0] > points[:, 0].max() - 1e-6
    for _ in range(40):
        target = (points + average @ points) / 2
        target[pinned] = points[pinned]
        target = _newton_step(target, visible, cones)
        target[rim, 0] = points[rim, 0]  # the wrist's opening stays plane
        points = target
    return points


# ------------------------------------------------------------------------------------------ skin and shape


def _palm_parts(chains, points):
    """(V, 4): how much of each palm vertex goes with index, middle, ring, little finger; side by side."""
    elbow = np.array([130, 6])  # x, z: seen from there, the fingers are beside each other
    bearing = np.arctan2(points[:, 2] - elbow[1], elbow[0] - points[:, 0])
    second = np.array([chains[name].points[1] for name in _FINGERS])
    away = bearing[:, None] - np.arctan2(second[:, 2] - elbow[1], elbow[0] - second[:, 0])
    parts = np.exp(-((away / 0.07) ** 2))
    return parts / (parts.sum(1, keepdims=True) + 1e-12)


def _thumb_part(first, bone, points):
    """(V,): how much of each palm vertex goes with the thumb: less, the farther it is from the first bone."""
    t = np.clip((points - first) @ bone / (bone @ bone), 0, 1)
    distance = np.linalg.norm(points - first - t[:, None] * bone, axis=1)
    return 1 - _smoothstep((distance - 8) / 32)


def _skinning_weights(chains, points, owner, average):
    """(V, 16): a step at each joint of a finger; the palm follows the nearest fingers; then smoothed."""
    weights = np.zeros((778, 16))
    palm_parts = _palm_parts(chains, points)
    for i, (name, chain) in enumerate(chains.items()):
        bones = np.diff(chain.points, axis=0)
        is_thumb = name == "thumb"
        palm_part = _thumb_part(chain.points[0], bones[0], points) if is_thumb else palm_parts[:, i]
        part = np.where(owner == i + 1, 1, np.where(owner < 1, palm_part, 0))
        beyond = []  # per joint (V,): 0 before it, 1 after it
        for j in range(3):
            normal = _unit(_unit(bones[max(j - 1, 0)]) + _unit(bones[j]))
            along = (points - chain.points[j]) @ normal
            half_width = 0.8 * chain.radii[j]
            if j == 0:  # a wide step, for the skin of the palm
                along = along - 3
                half_width = 24 if is_thumb else 14
            beyond.append(_smoothstep(along / (2 * half_width) + 0.5))
        not_beyond_next = 1 - np.array([*beyond[1:], 0 * part])
        first = 1 + 3 * _FILE_ORDER.index(name)
        weights[:, first : first + 3] = (part * np.cumprod(beyond, axis=0) * not_beyond_next).T
    for _ in range(5):
        weights = (weights + average @ weights) / 2
    weights /= np.maximum(weights.sum(1, keepdims=True), 1)
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    return weights


def _joint_regressor(points, joints):
    """(16, V): Gaussian weights of the 40 nearest vertices, tilted until their mean is exactly the joint."""
    regressor = np.zeros((16, 778))
    for row, joint in zip(regressor, joints, strict=True):
        distance = np.linalg.norm(points - joint, axis=1)
        nearest = np.argsort(distance)[:40]
        bell = np.exp(-((distance[nearest] / distance[nearest].mean()) ** 2))
        plane = np.c_[np.ones(40), points[nearest] - joint]
        tilt = np.linalg.solve(plane.T @ (bell[:, None] * plane), [1, 0, 0, 0])
        row[nearest] = bell * (plane @ tilt)
    return regressor


def _shape_table():
    """Change per unit of beta: bones in length and girth (10, 16), the palm in x, y, z (10, 3)."""
    length = np.zeros((10, 16))
    girth = np.zeros((10, 16))
    palm = np.zeros((10, 3))
    # 0: size
    length[0, 1:] = 0.05
    girth[0, 1:] = 0.05
    palm[0] = 0.05
    # 1: long fingers
    length[1, 1:13] = 0.06
    palm[1] = -0.02, 0, -0.01
    # 2: stout
    girth[2, 1:] = 0.06
    palm[2] = 0, 0.05, 0.02
    # 3: broad palm
    palm[3] = -0.01, 0.01, 0.05
    # 4: long palm
    palm[4] = 0.05, 0, 0
    # 5: long thumb
    length[5, 13:] = 0.06
    girth[5, 13:] = 0.02
    # 6: index against ring finger
    length[6, 1:4] = 0.05
    length[6, 10:13] = -0.05
    # 7: long little finger
    length[7, 7:10] = 0.07
    # 8: long end bones
    length[8, 3:13:3] = 0.06
    length[8, 1:13:3] = -0.03
    # 9: blunt tips
    girth[9, 3::3] = 0.05
    girth[9, 1:13:3] = -0.03
    girth[9, 14] = -0.03
    return length, girth, palm


def _shape_directions(points, weights, joints, bone):
    """(V, 3, 10): bones grow from their joint and carry what follows; the palm stretches about the wrist."""
    length, girth, palm = _shape_table()
    carried = np.zeros((16, 3, 10))  # how far each joint moves
    directions = weights[:, 0, None, None] * (points - joints[0])[..., None] * palm.T
    for j in range(1, 16):
        parent = PARENTS[j]
        offset = (joints[j] - joints[parent])[:, None]
        if parent == 0:
            carried[j] = offset * palm.T
        else:
            carried[j] = carried[parent] + offset * length[:, parent]
        away = points - joints[j]
        along = (away @ bone[j - 1])[:, None] * bone[j - 1]
        grown = along[..., None] * length[:, j] + (away - along)[..., None] * girth[:, j]
        directions += weights[:, j, None, None] * (carried[j] + grown)
    return directions


def _pose_directions(points, weights, joints, frames):
    """(V, 3, 135): a bent joint keeps its knuckle, which skinning flattens, and tucks in its inner side."""
    directions = np.zeros((778, 3, 135))
    for j in range(1, 16):
        flexion = frames.flexion[j - 1]
        last = j + 2 - (j - 1) % 3  # the finger's last joint
        beyond = weights[:, j : last + 1].sum(1)
        away = points - joints[j]
        away = away - np.outer(away @ flexion, flexion)
        away = away * np.minimum(1, 14 / np.linalg.norm(away, axis=1, keepdims=True))
        outer = 1.3 * _smoothstep(away @ frames.dorsal[j - 1] / 10 + 0.5) - 0.3
        lost = 0.5 * (4 * beyond * (1 - beyond) * outer)[:, None] * away  # (V, 3)
        bend = (np.outer(flexion, flexion) - np.eye(3)) / 2  # its product with R - I is 1 - cos(angle)
        directions[:, :, 9 * (j - 1) : 9 * j] = lost[..., None] * bend.ravel()
    return directions


# ------------------------------------------------------------------------------------------ poses

# Degrees: spread of the fingers; flexion of first and middle joint of index, middle, ring and little finger;
# flexion, palmar abduction and turn at the thumb's root; flexion of the thumb's other two joints.
_POSTURES = {
    "open": (6, -5, 0, -5, 0, -5, 0, -5, 0, -5, 0, 0, -5, -5),
    "relaxed": (0, 15, 22, 18, 26, 20, 28, 22, 28, 14, 6, -5, 8, 12),
    "fist": (-3, 78, 95, 80, 95, 80, 95, 78, 92, 38, 26, -42, 30, 20),
    "point": (0, 5, 6, 76, 92, 78, 94, 76, 90, 38, 16, -36, 29, 16),
    "pinch": (2, 46, 40, 34, 32, 26, 28, 20, 26, 39, 14, -24, 0, -5),
    "victory": (9, 2, 4, 2, 4, 78, 92, 76, 90, 42, 7, -23, 48, 0),
    "thumb": (-3, 78, 92, 80, 95, 80, 95, 78, 92, -10, -8, 0, -5, -10),
    "grasp": (3, 32, 40, 34, 42, 36, 42, 36, 42, 22, 22, -10, 10, 15),
    "hook": (0, 5, 75, 6, 78, 6, 78, 8, 75, 10, 2, 0, 5, 15),
    "flat": (-3, 62, 6, 64, 6, 64, 6, 62, 8, 28, 18, -10, 0, 5),
    "three": (7, 2, 4, 2, 4, 4, 6, 76, 88, 42, -20, -4, 50, 4),
    "call": (4, 74, 92, 76, 94, 74, 92, 0, 4, -10, -5, 0, -5, -8),
}
_POSTURE_NOISE = [4, 7, 8, 7, 8, 7, 8, 7, 8, 6, 6, 6, 7, 9]  # degrees, one standard deviation
_SPLAY = {"index": 1.0, "middle": 0.1, "ring": -0.7, "little": -1.4}  # sideways degrees per degree of spread


def _poses(rng, frames, n=1554):
    """(n, 45) axis-angle, rad: mixtures of two postures, with noise, within the limits of a hand's joints."""
    postures = np.array(list(_POSTURES.values()), dtype=float)  # (12, 14)
    first, second = rng.integers(len(postures), size=(2, n))
    mix = rng.beta(0.7, 0.7, (n, 1))
    mixed = (1 - mix) * postures[first] + mix * postures[second]
    mixed = mixed + rng.normal(0, 1, (n, 14)) * _POSTURE_NOISE  # (n, 14)
    return _articulated(rng, frames, mixed)


def _articulated(rng, frames, postures):
    """(n, 45) axis-angle, rad, of postures (n, 14), with the limits and the noise of a hand's joints."""
    n = len(postures)
    spread, fingers, thumb = np.split(postures, [1, 9], axis=1)

    degrees = np.zeros((n, 15, 3))  # flexion, sideways, turn
    for i, (name, splay) in enumerate(_SPLAY.items()):
        j = 3 * _FILE_ORDER.index(name)
        root = np.clip(fingers[:, 2 * i], -20, 90)
        sideways = np.clip(splay * spread[:, 0] + rng.normal(0, 2, n), -15, 15)
        bend = fingers[:, 2 * i + 1]
        degrees[:, j, 0] = root
        degrees[:, j, 1] = sideways * np.cos(np.deg2rad(root))  # bent fingers do not spread
        degrees[:, j + 1, 0] = np.clip(bend, 0, 95)
        degrees[:, j + 2, 0] = np.clip(0.66 * bend + rng.normal(0, 4, n), 0, 70)  # the end joint follows
    degrees[:, 12] = np.clip(thumb[:, :3], (-20, -25, -45), (45, 30, 30))
    degrees[:, 13:, 0] = np.clip(thumb[:, 3:], (-10, -15), (55, 75))
    degrees += rng.normal(0, 1.5, degrees.shape)  # no joint is a perfect hinge
    axes = np.stack([frames.flexion, frames.dorsal, frames.bone])  # (3, 15, 3)
    return np.einsum("njk,kjc->njc", np.deg2rad(degrees), axes).reshape(n, 45)


# Degrees: the thumb of a gesture, and what it needs: the finger (0 to 3) whose tip it touches.
_THUMBS = (
    ((-10, -8, 0, -5, -10), None),  # away
    ((8, 0, -5, 5, 8), None),  # beside the index finger
    ((38, 26, -42, 30, 20), None),  # over bent fingers
    ((42, 7, -23, 48, 0), None),
    ((37, 0, -44, 26, 7), None),  # across the palm
    ((35, 11, -19, 14, 10), 0),
    ((42, 12, -19, 16, 10), 1),
    ((45, 11, -13, 29, 20), 2),
    ((45, -12, 4, 55, 3), 3),
)
_TOUCHING = ((45, 40), (48, 44), (50, 46), (52, 44))  # flexion of a finger that touches the thumb


def gestures(seed: int = 0, n: int = 2000) -> np.ndarray:
    """(n, 45) axis-angle, rad: hands that count, spell and point, for the hand synthetic_mano(0).

    Each finger is straight or bent on its own, the thumb takes one of nine places. The pose prior mixes whole
    postures and rarely has such hands. An entry is the whole pose, not an offset to hands_mean. Ours.
    """
    rng = np.random.default_rng([seed, 45])
    frames = _joint_frames(_skeleton(rng, spread=0.0))
    straight = rng.random((n, 4, 1)) < 0.5
    # One in five curls all its straight fingers alike, as for a C; one in five each joint on its own.
    manner = rng.random((n, 1, 1))
    curl = np.where(manner < 0.2, rng.uniform(0, 0.6, (n, 1, 1)), rng.uniform(0, 0.8, (n, 4, 2)))
    curl = np.where(manner < 0.4, curl, 0.02)
    bent = np.where(rng.random((n, 1, 1)) < 0.75, 1, rng.uniform(0.5, 1, (n, 1, 1)))  # now and then loosely
    fingers = np.where(straight, curl, bent) * (79, 94)  # (n, 4, 2)
    kind = rng.integers(len(_THUMBS), size=n)
    places = np.array([place for place, _ in _THUMBS], dtype=float)
    away = np.where(rng.random((n, 1)) < 0.4, rng.random((n, 1)), 0)  # an opened pinch
    thumb = (1 - away) * places[kind] + away * places[0]
    touched = np.array([-1 if finger is None else finger for _, finger in _THUMBS])[kind]
    for finger, flexion in enumerate(_TOUCHING):
        fingers[touched == finger, finger] = flexion
    spread = rng.normal(2, 5, (n, 1))
    postures = np.concatenate([spread, fingers.reshape(n, 8), thumb], axis=1)
    postures = postures + 0.6 * rng.normal(0, 1, (n, 14)) * _POSTURE_NOISE
    return _articulated(rng, frames, postures)


def _pose_prior(rng, frames):
    """Mean (45,) of the poses, principal components (45, 45) of one deviation, coefficients (n, 45)."""
    poses = _poses(rng, frames)
    mean = poses.mean(0)
    _, singular, components = np.linalg.svd(poses - mean, full_matrices=False)
    deviations = singular / np.sqrt(len(poses))
    coefficients = (poses - mean) @ components.T / deviations
    return mean, deviations[:, None] * components, coefficients


# ------------------------------------------------------------------------------------------ the hand


def synthetic_mano(seed: int = 0) -> dict[str, np.ndarray]:
    """A right hand, as the dict of arrays that `mano.read_mano` returns: same keys, shapes and units. 0.15 s.

    seed: other seeds give other proportions and poses, and the same faces. The unit of a beta is one standard
    deviation. Natural poses (45,): hands_mean + hands_coeffs[i] @ hands_components.
    """
    rng = np.random.default_rng([seed, 778])
    chains = _skeleton(rng, spread=0.04 if seed else 0.0)
    points, faces, owner, pinned, tips = _build_cage(chains)
    order = _numbering(tips)
    new_id = np.argsort(order)
    owner = owner[order]
    faces = new_id[faces]
    average = _neighbour_average(faces)
    points = _pull_to_skin(points[order], owner, new_id[pinned], average, _flesh(chains))  # (V, 3)

    frames = _joint_frames(chains)
    joints = np.concatenate([[_WRIST], *(chains[name].points[:3] for name in _FILE_ORDER)])  # (16, 3)
    weights = _skinning_weights(chains, points, owner, average)
    regressor = _joint_regressor(points, joints)
    mean, components, coefficients = _pose_prior(rng, frames)
    return {
        "v_template": points / 1000,
        "f": faces,
        "weights": weights,
        "J_regressor": regressor,
        "J": regressor @ points / 1000,
        "kintree_table": np.array([PARENTS, range(16)], dtype=np.int64),
        "shapedirs": _shape_directions(points, weights, joints, frames.bone) / 1000,
        "posedirs": _pose_directions(points, weights, joints, frames) / 1000,
        "hands_components": components,
        "hands_mean": mean,
        "hands_coeffs": coefficients,
    }
