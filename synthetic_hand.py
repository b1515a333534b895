"""The licence-free stand-in hand and its pose prior, in the form of MANO's file."""

import numpy as np

PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)           # of the file's joints: five chains of three
TIPS = {
    "freihand": (744, 320, 443, 555, 672),        # FreiHAND's labels, PeCLR, SiMHand
    "smplx": (744, 320, 443, 554, 671),           # smplx, HaMeR, WiLoR
    "manopth": (745, 317, 444, 556, 673),         # manopth, manotorch, DexYCB: right hands
    "manopth445": (745, 317, 445, 556, 673),      # the same projects' left hands; InterHand2.6M's regressor
    "ho3d": (744, 333, 444, 555, 672),            # HO-3D
    "handoccnet": (728, 353, 442, 576, 694),      # HandOccNet
}


# ---------------------------------------------------------------------------------------------- the synthetic hand

# All of it is ours, in millimetres and MANO's frame: fingers towards -x, back of the hand +y, thumb side +z.
# A finger: first joint (x, y, z); degrees its rest direction is turned to the thumb's side; lengths of its three bones;
# radii at its three joints and its tip; rings of ten vertices.
_FORM = {
    "index": ((7.5, 3.5, 25.5), 8, (32.5, 22.5, 23.0), (9.8, 8.9, 8.0, 6.7), 9),
    "middle": ((1.2, 6.2, 4.4), 0, (31.7, 24.5, 24.5), (9.9, 9.1, 8.2, 6.8), 10),
    "ring": ((7.5, 4.5, -15.5), -8, (29.5, 23.5, 23.5), (9.4, 8.5, 7.7, 6.4), 9),
    "little": ((20.0, 0.0, -32.0), -17, (24.0, 16.5, 20.0), (8.6, 7.5, 6.8, 5.7), 8)}
_THUMB = ((72, -4, 27), ((-28, -9, 24), (-21.5, -4, 20), (-21, -2, 15)), (11.0, 10.2, 9.2, 7.6), 9)    # bones: vectors
_WRIST = np.array([95.7, 6.4, 6.2])
_PALM = (16, 18, 20, 22, 24, 24, 24, 24, 24, 24, 25, 26, 28)              # vertices of the palm's rings, wrist to webs
_HOLE = 4                                                                 # the thumb leaves between rings 4 and 7
_ORDER = ("index", "middle", "little", "ring", "thumb")                   # MANO's


def _unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _smoothstep(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _axes(name, bones):
    """Flexion axis and dorsal direction of bones (..., 3); positive rotation about the former bends to the palm."""
    up = (0.55, 0.62, 0.55) if name == "thumb" else (0.0, 1.0, 0.0)      # the thumb's nail looks up and outwards
    side = _unit(np.cross(up, bones))
    return side, np.cross(bones, side)


def _skeleton(rng, spread):
    """name -> (three joints and the tip (4, 3), radii (4,)); index, middle, ring, little, thumb."""
    chains = {}
    for name, (base, turn, lengths, radii, _) in _FORM.items():
        turn, droop = np.deg2rad(turn), np.deg2rad([2.0, 5.0, 9.0])      # degrees
        bones = np.stack([-np.cos(turn) * np.cos(droop), -np.sin(droop), np.sin(turn) * np.cos(droop)], 1)
        chains[name] = bones * np.reshape(lengths, (3, 1)), base, radii
    chains["thumb"] = np.array(_THUMB[1]), _THUMB[0], _THUMB[2]
    for name, (bones, base, radii) in chains.items():
        bones = bones * (1 + spread * rng.standard_normal((3, 1)))
        chains[name] = np.cumsum([base, *bones], axis=0), np.array(radii) * (1 + spread * rng.standard_normal())
    return chains


def _flesh(chains):
    """Round cones (start (C, 3), end (C, 3), radii (C,), (C,), owner (C,)): owner 0 is the palm, 1 to 5 the fingers."""
    cones = []
    for owner, (name, (chain, r)) in enumerate(chains.items(), 1):
        last = _unit(chain[3] - chain[2])
        points = [*chain[:3], chain[3] - r[3] * last - 0.6 * _axes(name, last)[1]]      # pad below, nail above
        cones += [(points[i], points[i + 1], r[i], r[i + 1], owner) for i in range(3)]
        if name != "thumb":
            knuckle, bone = chain[0], chain[1] - chain[0]
            cones += [([86, 1, 6 + 0.42 * (knuckle[2] - 6)], knuckle + [2, -3.5, 0], 11.5, 9, 0),         # metacarpal
                      (knuckle + [1, -7, 0], knuckle + 0.38 * bone + [0, -3, 0], 6, 5, 0)]                # pad below it
    index, middle, ring, little, thumb = (chain for chain, _ in chains.values())
    webs = [finger[0] + 0.2 * (finger[1] - finger[0]) + [0, -2, 0] for finger in (index, middle, ring, little)]
    cones += [(a, b, 4.5, 4.5, 0) for a, b in zip(webs[:-1], webs[1:], strict=True)]
    bay = (thumb[1] + index[0]) / 2 + [9.5, -0.5, -4.5]                   # between thumb and index
    cones += [(_WRIST + [45, -4, z], _WRIST + [0, -4, 0.9 * z], 16, 13, 0) for z in (8, -10)]             # forearm
    cones += [(thumb[0] + [4, -4, -4], thumb[1] + [4, -3, -6], 11.5, 9, 0),                               # thumb's ball
              ([80, -7, -12], [38, -8, -29], 10.5, 8.5, 0),                                               # and opposite
              (thumb[0] + [-8, 0, -6], bay, 9, 6.5, 0),
              (thumb[1] + [1, 0, -2], bay, 6.5, 6, 0),
              (index[0] + [8, -3, 3], bay, 6.5, 6, 0)]
    return tuple(np.array(column, dtype=float) for column in zip(*cones, strict=True))


def _project(points, sees, flesh):
    """One Newton step of points (N, 3) towards the surface around the cones they see (N, C), melted into each other."""
    start, end, r0, r1, owner = flesh
    axis, out = end - start, points[:, None] - start
    t = np.clip((out * axis).sum(-1) / (axis ** 2).sum(-1), 0, 1)
    out = out - t[..., None] * axis
    distance = np.linalg.norm(out, axis=-1)
    gap = distance - r0 - (r1 - r0) * t
    parts = []
    for mine, melt in ((owner == 0, 4.0), (owner > 0, 1.2)):             # mm: the palm is one lump, fingers are jointed
        near = sees[:, mine] * np.exp(-gap[:, mine] / melt) + 1e-300
        pull = (near / near.sum(1, keepdims=True) / distance[:, mine])[..., None] * out[:, mine]
        parts.append((-melt * np.log(near.sum(1)), pull.sum(1)))
    (palm, n_palm), (finger, n_finger) = parts
    share = 1 / (1 + np.exp(np.clip((palm - finger) / 3, -60, 60)))[:, None]
    normal = share * n_palm + (1 - share) * n_finger
    gap = -3 * np.logaddexp(-palm / 3, -finger / 3)
    return points - (gap / ((normal ** 2).sum(-1) + 0.05))[:, None] * normal


def _strip(a, b):
    """Triangles between two closed rings of any sizes that start at the same angle and run the same way."""
    faces, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        if j == len(b) or (i < len(a) and (2 * i + 1) * len(b) <= (2 * j + 1) * len(a)):
            faces.append((a[i], a[(i + 1) % len(a)], b[j % len(b)]))
            i += 1
        else:
            faces.append((a[i % len(a)], b[(j + 1) % len(b)], b[j]))
            j += 1
    return faces


def _circle(centre, u, v, n, phase=0.0):
    angle = (phase + 2 * np.pi * np.arange(n) / n)[:, None]
    return centre + np.cos(angle) * u + np.sin(angle) * v


def _cage(chains):
    """Rough vertices (778, 3), faces (1538, 3), owner (778,) as in `_flesh` (-1: finger webs), pinned ids, tips (5, 6).

    The palm is a stack of rings; four tubes share its last one and the webs between them, the thumb's leaves a hole.
    """
    points, owners, faces, pinned, tips = [], [], [], [], []

    def add(ring, owner):
        points.extend(ring)
        owners.extend([owner] * len(ring))
        return list(range(len(points) - len(ring), len(points)))

    def at(name, s):                                                      # centre and radii of a ring at arc length s
        chain, radii = chains[name]
        arc = np.append(0, np.cumsum(np.linalg.norm(np.diff(chain, axis=0), axis=1)))
        i = min(np.searchsorted(arc[1:], s), 2)
        along = _unit(chain[i + 1] - chain[i])
        side = _unit(np.array([1.0, 0, 0]) - along[0] * along) if name == "thumb" else _axes(name, along)[0]
        return chain[i] + (s - arc[i]) * along, *(np.interp(s, arc, radii) * np.array([side, np.cross(along, side)]))

    def tube(base, name, owner, start, n, phase=0.0):
        chain, radii = chains[name]
        length = np.linalg.norm(np.diff(chain, axis=0), axis=1).sum()
        for s in np.linspace(start, length - 0.7 * radii[3], n + 1)[1:]:
            ring = add(_circle(*at(name, s), 10, phase), owner)
            faces.extend(_strip(base, ring))
            base = ring
        centre, u, v = at(name, length - 0.25 * radii[3])
        cap, top = add(_circle(centre, 0.6 * u, 0.6 * v, 5, phase), owner), add([chain[3]], owner)
        faces.extend(_strip(base, cap) + [(cap[i], cap[(i + 1) % 5], top[0]) for i in range(5)])
        pinned.extend(base + cap + top)
        tips.append(top + cap)

    # The border of palm and fingers, 28 vertices: per finger 0 thumb side, 1-4 back, 5 little side, 6-9 palm.
    roots = [_circle(*at(name, 9.0), 10) for name in _FORM]
    for left, right in zip(roots[:-1], roots[1:], strict=True):
        left[4] = right[1] = (left[4] + right[1]) / 2
        left[6] = right[9] = (left[6] + right[9]) / 2
    border = np.array([roots[0][0], *(p for r in roots for p in r[1:4]), roots[3][4], roots[3][5],
                       *(p for r in roots[::-1] for p in r[6:9]), roots[0][9], roots[0][0]])
    opening = _circle(_WRIST + [18.3, -4, -1], np.array([0, 0, 26.0]), np.array([0, 17.0, 0]), 112)
    opening = np.append(opening, opening[:1], axis=0)
    rings = []
    for n, mix in zip(_PALM, np.linspace(0, 1, len(_PALM)), strict=True):
        a, b = (np.stack([np.interp(np.arange(n) / n, np.linspace(0, 1, len(loop)), column) for column in loop.T], 1)
                for loop in (opening, border))
        rings.append(add((1 - mix) * a + mix * b, 0))
    for a, b in zip(rings[:-1], rings[1:], strict=True):
        faces.extend(_strip(a, b))
    hole, edge = rings[_HOLE:_HOLE + 4], rings[-1]
    window = {ring[i] for ring in hole for i in (-2, -1, 0, 1)}
    faces = [face for face in faces if not window.issuperset(face)]
    pinned.extend(rings[0])

    webs = add([(a[5] + b[0]) / 2 for a, b in zip(roots[:-1], roots[1:], strict=True)], -1)
    for i, name in enumerate(_FORM):
        first, last = [edge[0], *webs][i], [*webs, edge[14]][i]
        palm = [edge[(15 + 3 * (3 - i) + k) % 28] for k in range(4)]
        tube([first, *edge[1 + 3 * i:5 + 3 * i], last, *palm], name, i + 1, 9.0, _FORM[name][-1])
    rim = [*(hole[0][i] for i in (-2, -1, 0)), *(ring[1] for ring in hole), *(hole[3][i] for i in (0, -1, -2)),
           hole[2][-2], hole[1][-2]]
    tube(rim, "thumb", 5, 0.62 * np.linalg.norm(_THUMB[1][0]), _THUMB[-1], -np.pi / 4)

    keep = np.setdiff1d(np.arange(len(points)), [ring[i] for ring in hole[1:3] for i in (-1, 0)])
    new = np.full(len(points), -1)
    new[keep] = np.arange(len(keep))
    return np.array(points)[keep], new[np.array(faces)], np.array(owners)[keep], new[pinned], new[tips]


def _skin(chains, joints, points, owner, average):
    """Skinning weights (778, 16): a step at every joint of a finger; the palm is shared out sideways; then smoothed."""
    weights = np.zeros((len(points), 16))
    bearing = np.arctan2(points[:, 2] - 6, 130 - points[:, 0])           # from the forearm, fingers lie side by side
    middles = np.array([chains[name][0][1] for name in _FORM])
    lanes = bearing[:, None] - np.arctan2(middles[:, 2] - 6, 130 - middles[:, 0])
    lanes = np.exp(-(lanes / 0.07) ** 2)
    lanes /= lanes.sum(1, keepdims=True) + 1e-12
    for i, (name, (chain, radii)) in enumerate(chains.items()):
        bones = np.diff(chain, axis=0)
        if name == "thumb":
            t = np.clip((points - chain[0]) @ bones[0] / (bones[0] @ bones[0]), 0, 1)
            near = 1 - _smoothstep((np.linalg.norm(points - chain[0] - t[:, None] * bones[0], axis=1) - 8) / 32)
        else:
            near = lanes[:, i]
        share, steps = np.where(owner == i + 1, 1, np.where(owner < 1, near, 0)), []
        for j in range(3):
            normal = _unit(_unit(bones[max(j - 1, 0)]) + _unit(bones[j]))
            half, shift = ((24 if name == "thumb" else 14), 3) if j == 0 else (0.8 * radii[j], 0)
            steps.append(_smoothstep(((points - chain[j]) @ normal - shift) / (2 * half) + 0.5))
        first = 1 + 3 * _ORDER.index(name)
        weights[:, first:first + 3] = (share * np.cumprod(steps, axis=0) * (1 - np.array([*steps[1:], 0 * share]))).T
    for _ in range(5):
        weights = (weights + average @ weights) / 2
    weights /= np.maximum(weights.sum(1, keepdims=True), 1)
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    return weights


def _regressor(points, joints):
    """(16, 778): Gaussian weights of the 40 nearest vertices, tilted so that their mean is the joint exactly."""
    rows = np.zeros((len(joints), len(points)))
    for row, joint in zip(rows, joints, strict=True):
        away = np.linalg.norm(points - joint, axis=1)
        near = np.argsort(away)[:40]
        bell = np.exp(-(away[near] / away[near].mean()) ** 2)
        x = np.c_[np.ones(40), points[near] - joint]
        row[near] = bell * (x @ np.linalg.solve(x.T @ (bell[:, None] * x), [1, 0, 0, 0]))
    return rows


def _shape_directions(points, weights, joints, bones):
    """(778, 3, 10): bones lengthen and thicken from their joint and carry what follows; the palm stretches."""
    length, girth, palm = np.zeros((10, 16)), np.zeros((10, 16)), np.zeros((10, 3))            # change per unit of beta
    length[0, 1:] = girth[0, 1:] = palm[0] = 0.05                                              # 0 size
    length[1, 1:13], palm[1] = 0.06, (-0.02, 0, -0.01)                                         # 1 long fingers
    girth[2, 1:], palm[2] = 0.06, (0, 0.05, 0.02)                                              # 2 stout
    palm[3] = -0.01, 0.01, 0.05                                                                # 3 broad palm
    palm[4] = 0.05, 0, 0                                                                       # 4 long palm
    length[5, 13:], girth[5, 13:] = 0.06, 0.02                                                 # 5 long thumb
    length[6, 1:4], length[6, 10:13] = 0.05, -0.05                                             # 6 index against ring
    length[7, 7:10] = 0.07                                                                     # 7 long little finger
    length[8, 3:13:3], length[8, 1:13:3] = 0.06, -0.03                                         # 8 long end bones
    girth[9, 3::3], girth[9, 1:13:3], girth[9, 14] = 0.05, -0.03, -0.03                        # 9 blunt tips
    carried = np.zeros((16, 3, 10))
    directions = weights[:, 0, None, None] * (points - joints[0])[..., None] * palm.T
    for j in range(1, 16):
        parent = PARENTS[j]
        offset = (joints[j] - joints[parent])[:, None]
        carried[j] = offset * palm.T if parent == 0 else carried[parent] + offset * length[:, parent]
        away = points - joints[j]
        along = (away @ bones[j - 1])[:, None] * bones[j - 1]
        moved = along[..., None] * length[:, j] + (away - along)[..., None] * girth[:, j]
        directions += weights[:, j, None, None] * (carried[j] + moved)
    return directions


def _pose_directions(points, weights, joints, side, dorsal):
    """(778, 3, 135): a bent joint keeps its knuckle, which blended rotations flatten, and tucks its inside in."""
    directions = np.zeros((len(points), 3, 135))
    for j in range(1, 16):
        last = j + 2 - (j - 1) % 3
        beyond = weights[:, j:last + 1].sum(1)
        away = points - joints[j]
        away = away - np.outer(away @ side[j - 1], side[j - 1])
        away = away * np.minimum(1, 14 / np.linalg.norm(away, axis=1, keepdims=True))
        outer = 1.3 * _smoothstep(away @ dorsal[j - 1] / 10 + 0.5) - 0.3
        lost = 0.5 * (4 * beyond * (1 - beyond) * outer)[:, None] * away
        bend = (np.outer(side[j - 1], side[j - 1]) - np.eye(3)) / 2      # its product with R - I is 1 - cos(angle)
        directions[:, :, 9 * (j - 1):9 * j] = lost[..., None] * bend.ravel()
    return directions


# Degrees: spread; flexion of first and middle joint of index, middle, ring and little; thumb: flexion, palmar abduction
# and turn at its root, then flexion of its other two joints.
_POSTURES = {
    "open":    (6, -5, 0, -5, 0, -5, 0, -5, 0, -5, 0, 0, -5, -5),
    "relaxed": (0, 15, 22, 18, 26, 20, 28, 22, 28, 14, 6, -5, 8, 12),
    "fist":    (-3, 78, 95, 80, 95, 80, 95, 78, 92, 38, 26, -42, 30, 20),
    "point":   (0, 5, 6, 76, 92, 78, 94, 76, 90, 38, 16, -36, 29, 16),
    "pinch":   (2, 46, 40, 34, 32, 26, 28, 20, 26, 39, 14, -24, 0, -5),
    "victory": (9, 2, 4, 2, 4, 78, 92, 76, 90, 42, 7, -23, 48, 0),
    "thumb":   (-3, 78, 92, 80, 95, 80, 95, 78, 92, -10, -8, 0, -5, -10),
    "grasp":   (3, 32, 40, 34, 42, 36, 42, 36, 42, 22, 22, -10, 10, 15),
    "hook":    (0, 5, 75, 6, 78, 6, 78, 8, 75, 10, 2, 0, 5, 15),
    "flat":    (-3, 62, 6, 64, 6, 64, 6, 62, 8, 28, 18, -10, 0, 5),
    "three":   (7, 2, 4, 2, 4, 4, 6, 76, 88, 42, -20, -4, 50, 4),
    "call":    (4, 74, 92, 76, 94, 74, 92, 0, 4, -10, -5, 0, -5, -8)}


def _poses(rng, side, dorsal, bones, n=1554):
    """(n, 45) axis-angle: mixtures of two postures, every joint with some freedom, within the limits of a hand."""
    table = np.array(list(_POSTURES.values()), dtype=float)
    a, b = rng.integers(len(table), size=(2, n))
    mix = rng.beta(0.7, 0.7, (n, 1))
    mix = (1 - mix) * table[a] + mix * table[b] + rng.normal(0, 1, (n, 14)) * [4, *[7, 8] * 4, 6, 6, 6, 7, 9]
    degrees = np.zeros((n, 15, 3))                                        # flexion, sideways, turn
    for finger, splay in enumerate((1.0, 0.1, -0.7, -1.4)):
        j = 3 * _ORDER.index(list(_FORM)[finger])
        degrees[:, j, 0] = np.clip(mix[:, 1 + 2 * finger], -20, 90)
        spread = np.clip(splay * mix[:, 0] + rng.normal(0, 2, n), -15, 15)
        degrees[:, j, 1] = spread * np.cos(np.deg2rad(degrees[:, j, 0]))  # bent fingers do not spread
        degrees[:, j + 1, 0] = np.clip(mix[:, 2 + 2 * finger], 0, 95)
        degrees[:, j + 2, 0] = np.clip(0.66 * mix[:, 2 + 2 * finger] + rng.normal(0, 4, n), 0, 70)
    degrees[:, 12] = np.clip(mix[:, 9:12], (-20, -25, -45), (45, 30, 30))
    degrees[:, 13:, 0] = np.clip(mix[:, 12:], (-10, -15), (55, 75))
    degrees += rng.normal(0, 1.5, degrees.shape)                          # no joint is a perfect hinge
    return np.einsum("njk,kjc->njc", np.deg2rad(degrees), np.stack([side, dorsal, bones])).reshape(n, 45)


def synthetic_mano(seed=0):
    """A right hand of our own with the structure of MANO's file -> the dict of arrays that `read_mano` returns.

    For demos, tests and synthetic data: nobody's licence covers it, and no number of MANO's is in it. Metres, MANO's
    frame. A coarse cage is drawn onto a blend of round cones (bones, pads, webs) by Newton steps and smoothed on it.
    Weights, regressor, ten shape directions (beta 1 = 1 standard deviation), pose correctives and 1554 poses within
    human limits, with their mean and principal components, are computed from the same skeleton. Natural poses:
    hands_mean + hands_coeffs[i] @ hands_components. seed: other proportions and draws, same topology. 0.15 s.
    """
    rng = np.random.default_rng([seed, 778])
    chains = _skeleton(rng, 0.04 if seed else 0.0)
    points, faces, owner, pinned, tips = _cage(chains)
    flesh = _flesh(chains)

    # Numbered as built, except that every convention's fingertip ids lie on their fingertip, FreiHAND's at the top.
    order = {}
    for tip, ids in zip((tips[4], *tips[:4]), zip(*TIPS.values(), strict=True), strict=True):
        order.update(zip(dict.fromkeys(ids), tip, strict=False))          # the top, then the ring around it
    rest = iter(np.setdiff1d(np.arange(778), list(order.values())))
    order = np.array([order[i] if i in order else next(rest) for i in range(778)])
    new = np.argsort(order)
    points, owner, faces, pinned = points[order], owner[order], new[faces], new[pinned]

    average = np.zeros((778, 778))                                        # of the neighbours
    average[faces, faces[:, [1, 2, 0]]] = average[faces[:, [1, 2, 0]], faces] = 1
    average /= average.sum(1, keepdims=True)
    cones = flesh[-1]
    sees = (cones == 0) | (cones == owner[:, None])
    sees[:, np.unique(cones, return_index=True)[1][1:]] |= owner[:, None] == 0           # the palm sees first bones
    wrist = points[:, 0] > points[:, 0].max() - 1e-6
    for _ in range(40):
        target = (points + average @ points) / 2
        target[pinned] = points[pinned]
        target = _project(target, sees, flesh)
        target[wrist, 0] = points[wrist, 0]                               # the opening stays plane
        points = target

    joints = np.concatenate([[_WRIST], *(chains[name][0][:3] for name in _ORDER)])
    bones = [_unit(np.diff(chains[name][0], axis=0)) for name in _ORDER]
    side, dorsal = (np.concatenate(x) for x in zip(*map(_axes, _ORDER, bones), strict=True))
    bones = np.concatenate(bones)                                         # (15, 3), as side and dorsal
    weights = _skin(chains, joints, points, owner, average)
    regressor = _regressor(points, joints)
    poses = _poses(rng, side, dorsal, bones)
    mean = poses.mean(0)
    _, sizes, components = np.linalg.svd(poses - mean, full_matrices=False)
    sizes = sizes / np.sqrt(len(poses))                                   # standard deviations
    return {"v_template": points / 1000, "f": faces, "weights": weights, "J_regressor": regressor,
            "J": regressor @ points / 1000, "kintree_table": np.array([PARENTS, range(16)], dtype=np.int64),
            "shapedirs": _shape_directions(points, weights, joints, bones) / 1000,
            "posedirs": _pose_directions(points, weights, joints, side, dorsal) / 1000,
            "hands_components": sizes[:, None] * components, "hands_mean": mean,
            "hands_coeffs": (poses - mean) @ components.T / sizes}
