"""The numbers that hand papers and leaderboards report: numpy and scipy only, arrays in, floats out.

Arrays are batches in metres, in one camera frame, joints in FreiHAND order (0 wrist, 9 middle knuckle),
whatever the order in a data set's own files. Errors of single hands stay in metres. `evaluate_hands` returns
millimetres, and its keys say so. Everything is float64: float32 distances at arm's length are wrong by tenths
of a millimetre.

The arithmetic is that of the official scripts: lmb-freiburg/freihand `eval.py`, shreyashampali/ho3d
`eval.py`, NVlabs/dex-ycb-toolkit `hpe_eval.py`, facebookresearch/assemblyhands-toolkit and InterHand2.6M
`dataset.py`. 3,960 hands take a few seconds.

Example::

    import numpy as np
    from metrics import evaluate_hands, official_scores

    rng = np.random.default_rng(0)
    true_joints = rng.normal(0, 0.03, (4, 21, 3)) + [0, 0, 0.6]        # four hands, 0.6 m from the camera
    true_vertices = rng.normal(0, 0.03, (4, 778, 3)) + [0, 0, 0.6]
    joints = 1.1 * true_joints + [0.01, 0, 0]                          # too large and displaced
    vertices = 1.1 * true_vertices + [0.01, 0, 0]
    table = evaluate_hands(joints, vertices, true_joints, true_vertices, "freihand")
    assert table["pa_mpjpe_mm"] < 1e-3 < 10 < table["mpjpe_mm"]        # only the similarity fit forgives both
    scores = official_scores(table, "freihand")                        # centimetres, the leaderboard's keys
    assert np.isclose(scores["xyz_mean3d"], table["mpjpe_mm"] / 10)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.spatial.distance import cdist

# Where a protocol puts the hand before `mpjpe_mm` is measured: as submitted, or minus its own wrist.
PROTOCOLS = {"freihand": "abs", "ho3d": "abs", "dexycb": "root", "assemblyhands": "root", "interhand": "root"}
WITH_GAPS = ("assemblyhands", "interhand")  # protocols that leave out joints without a label
FEWEST_JOINTS = 10  # AssemblyHands' script leaves out a hand with fewer valid joints
# The keys of `summarise`, for each way to lay the prediction over the truth: mean distance and area under
# the curve. "placed" is the protocol's own way.
MEASURES = {"pa": ("pa_{}_mm", "auc_{}"),
            "placed": ("{}_mm", "auc_{}_unaligned"),
            "abs": ("abs_{}_mm", "auc_{}_abs"),
            "root": ("root_{}_mm", "auc_{}_root"),
            "sc_tr": ("sc_tr_{}_mm", "auc_{}_sc_tr"),  # of joints only
            "pa_noreflect": ("pa_{}_noreflect_mm", "auc_{}_noreflect")}
WRIST = 0
MIDDLE_KNUCKLE = 9
F_THRESHOLDS = (0.005, 0.015)  # metres
ZERO = 1e-7  # metres: nearer than this to every label, a prediction is perfect
CHUNK = 64  # hands that a thread aligns at a time: their meshes stay in its cache
ROWS = 64  # of a product: BLAS would start threads of its own for larger ones
ROUNDING = 1e-6  # of float32 products, relative to the squared lengths that go into them


# -------------------------------------------------------------------------------------------------- alignment
def procrustes(pred: np.ndarray, gt: np.ndarray, reflect: bool = False) -> np.ndarray:
    """Moves, turns and scales `pred` onto `gt` with the least squared error.

    pred, gt: (B,N,3) or (N,3). Returns the aligned prediction in the same shape, float64. reflect=True is the
    leaderboards' fit (FreiHAND, HO-3D, DexYCB), which may also mirror the hand: a left hand predicted for a
    right one then scores 0. reflect=False allows rotations only, as HaMeR's evaluation does. ValueError for
    other shapes, and for NaN or infinity with the index of the first such sample.
    """
    pred = np.asarray(pred, np.float64)
    gt = np.asarray(gt, np.float64)
    if pred.shape != gt.shape or pred.ndim not in (2, 3) or pred.shape[-1] != 3:
        raise ValueError(f"procrustes needs one shape (B, N, 3) or (N, 3) for both, "
                         f"got {pred.shape} and {gt.shape}")
    pred_batch = pred.reshape(-1, *pred.shape[-2:])
    gt_batch = gt.reshape(-1, *gt.shape[-2:])
    _refuse_nonfinite(pred_batch, "pred")
    _refuse_nonfinite(gt_batch, "gt")
    aligned, _ = _fit(pred_batch, gt_batch, reflect)
    return aligned.reshape(pred.shape)


def _fit(pred, gt, reflect, valid=None):
    """Similarity fit of finite (B,N,3) -> aligned (B,N,3), mirrored (B,). valid (B,N): points that count."""
    keep = np.ones(pred.shape[:2] + (1,)) if valid is None else valid[..., None].astype(np.float64)
    number = np.maximum(keep.sum(1, keepdims=True), 1)
    pred_centre = (pred * keep).sum(1, keepdims=True) / number  # (B, 1, 3)
    gt_centre = (gt * keep).sum(1, keepdims=True) / number
    pred = (pred - pred_centre) * keep
    gt = (gt - gt_centre) * keep
    pred_size = _size(pred)
    gt_size = _size(gt)
    pred = pred / pred_size
    gt = gt / gt_size
    u, s, vt = np.linalg.svd(gt.transpose(0, 2, 1) @ pred)  # (B, 3, 3), (B, 3), (B, 3, 3)
    mirrored = np.linalg.det(u @ vt) < 0
    if not reflect:
        sign = np.where(mirrored, -1.0, 1.0)
        u = np.concatenate([u[..., :2], u[..., 2:] * sign[:, None, None]], -1)
        s = np.concatenate([s[:, :2], s[:, 2:] * sign[:, None]], -1)
    rotation = u @ vt
    aligned = pred @ rotation.transpose(0, 2, 1) * s.sum(1)[:, None, None] * gt_size + gt_centre
    # For flat or constant points the sign is arbitrary and changes nothing: these do not count as mirrored.
    return aligned, mirrored & (np.abs(s[:, 2]) > 1e-9 * s[:, 0])


def _size(points):
    """Root of the summed squares of centred points (B,N,3) -> (B,1,1). The guard 1e-8 is FreiHAND's: a
    constant prediction collapses to the centroid instead of to NaN."""
    return np.sqrt((points * points).sum((1, 2), keepdims=True)) + 1e-8


def _scale_translation(pred, gt):
    """The alignment of HO-3D and SiMHand: wrist onto wrist, and the bone from wrist to middle knuckle as long
    as the true one."""
    pred_length = _distance(pred[:, MIDDLE_KNUCKLE], pred[:, WRIST])  # (B,)
    gt_length = _distance(gt[:, MIDDLE_KNUCKLE], gt[:, WRIST])
    scaled = pred / np.where(pred_length > 0, pred_length, 1)[:, None, None] * gt_length[:, None, None]
    return scaled - scaled[:, :1] + gt[:, :1]


def _distance(a, b):
    """Distances (...) of points (...,3)."""
    difference = a - b
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


# ------------------------------------------------------------------------------------------ scores of points
def f_score(pred: np.ndarray, gt: np.ndarray, thresholds=F_THRESHOLDS) -> np.ndarray:
    """F-score of two point sets: the harmonic mean of the two shares of points that are nearer than a
    threshold to the other set (strictly; FreiHAND `eval.py`).

    pred (B,N,3), gt (B,M,3) in metres, or single sets (N,3), (M,3); T thresholds in metres. Returns (B,T), or
    (T,) for single sets; 0 where both shares are 0.
    """
    pred = np.asarray(pred, np.float64)
    gt = np.asarray(gt, np.float64)
    if pred.ndim == 2:
        return f_score(pred[None], gt[None], thresholds)[0]
    thresholds = np.asarray(thresholds, np.float64)
    to_gt, to_pred, margin = _nearest_squares(pred, gt)
    precision = _near_shares(pred, gt, to_gt, margin, thresholds)  # (B, T)
    recall = _near_shares(gt, pred, to_pred, margin, thresholds)
    total = precision + recall
    return 2 * precision * recall / np.where(total > 0, total, 1)


def _nearest_squares(a, b):
    """Squared distances, float32, of points a (B,N,3) to the nearest of b (B,M,3), and of b to the nearest of
    a: (B,N) and (B,M); a bound of their rounding (B,1)."""
    middle = b.mean(1, keepdims=True)  # rounding grows with the distance to the origin
    full = -(-a.shape[1] // ROWS) * ROWS  # the last point fills up the last block
    left = _homogeneous(a[:, np.minimum(np.arange(full), a.shape[1] - 1)] - middle)
    right = _homogeneous(b - middle)
    margin = ROUNDING * (left[..., 4].max(1) + right[..., 4].max(1))[:, None]
    left = left[..., [0, 1, 2, 4, 3]] * np.float32([-2, -2, -2, 1, 1])  # [-2 x, |x|^2, 1]
    to_b = np.empty(left.shape[:2], np.float32)
    to_a = np.empty(right.shape[:2], np.float32)
    square = np.empty((full // ROWS, ROWS, b.shape[1]), np.float32)
    for k in range(len(a)):
        np.matmul(left[k].reshape(-1, ROWS, 5), right[k].T, out=square)
        square.min(2, out=to_b[k].reshape(-1, ROWS))
        square.reshape(full, -1).min(0, out=to_a[k])
    return to_b[:, :a.shape[1]], to_a, margin


def _homogeneous(points):
    """Points x (B,N,3) -> [x, 1, |x|^2] (B,N,5) float32."""
    square = np.einsum("bnc,bnc->bn", points, points)[..., None]
    return np.concatenate([points, np.ones_like(square), square], 2, dtype=np.float32)


def _near_shares(points, others, square, margin, thresholds):
    """Shares (B,T) of points (B,N,3) that are nearer than each threshold to others (B,M,3).

    square (B,N): of the distance to the nearest. Within margin (B,1) of a threshold it is measured again."""
    limits = (thresholds**2)[:, None, None]
    near = square < limits  # (T, B, N)
    is_unsure = (np.abs(square - limits) <= margin).any(0)
    for k in np.flatnonzero(is_unsure.any(1)):
        distance = cdist(points[k, is_unsure[k]], others[k]).min(1)
        near[:, k, is_unsure[k]] = distance < thresholds[:, None]
    return near.mean(2).T


def pck_curve(errors: np.ndarray, low=0.0, high=0.05, steps=100) -> tuple[np.ndarray, np.ndarray]:
    """Share of samples with error <= t, for each point, then its mean over the points.

    errors (B,N) metres, NaN = no label. Returns thresholds (steps,) in metres and shares (steps,).
    """
    errors = np.asarray(errors, np.float64)
    missing = np.isnan(errors)
    thresholds = np.linspace(low, high, steps)
    shares = [_mean_over_points(np.where(missing, np.nan, errors <= t)) for t in thresholds]
    return thresholds, np.array(shares)


def pck_auc(errors: np.ndarray, low=0.0, high=0.05, steps=100) -> float:
    """Area under `pck_curve` (trapezoids) over its width; 1 is perfect. errors (B,N) metres, NaN = no
    label."""
    return _mean_over_points(_area_terms(np.asarray(errors, np.float64), low, high, steps))


def _area_terms(errors, low=0.0, high=0.05, steps=100):
    """What each single error adds to the area: the weight of the thresholds that are not below it. Same
    shape."""
    weight = np.ones(steps)
    weight[[0, -1]] = 0.5  # trapezoids on an even grid
    not_below = np.append(np.cumsum(weight[::-1])[::-1], 0) / weight.sum()  # (steps + 1,)
    place = np.searchsorted(np.linspace(low, high, steps), errors, side="left")
    return np.where(np.isnan(errors), np.nan, not_below[place])


def _mean_over_points(values, side=None):
    """(B,N), NaN where missing: the mean of each point over samples, then over the points that have any.

    side (B,): a point of a left hand and the same of a right hand are two points."""
    groups = [values] if side is None else [values[side == one] for one in np.unique(side)]
    means = []
    for group in groups:
        known = ~np.isnan(group)
        number = known.sum(0)
        total = np.where(known, group, 0).sum(0)
        means.append(total[number > 0] / number[number > 0])
    means = np.concatenate(means)
    return float(means.mean()) if means.size else float("nan")


# ------------------------------------------------------------------------------------------- errors of hands
def per_sample_errors(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol: str, valid=None,
                      side=None) -> dict[str, np.ndarray]:
    """Errors of every hand, for distributions and for the best and worst: arguments as in `evaluate_hands`.

    Returns arrays over the n scored hands, distances in metres:

      row (n,)                     index into the input; `side` (n,) where given
      KIND_joints (n,21)           NaN where a label is missing; KIND: abs, root, sc_tr, pa, pa_noreflect
      reflected_joints (n,)        bool

    and with meshes

      KIND_vertices (n,)           means over the mesh; KIND: abs, root, pa, pa_noreflect
      KIND_vertices_auc (n,)
      reflected_vertices (n,)      bool
      f, f_unaligned (n,2)         at 5 and 15 mm
    """
    points, valid, row = _checked(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid)

    def errors_of(start):
        rows = row[start:start + CHUNK]
        chunk = [None if x is None else np.asarray(x[rows], np.float64) for x in points]
        pred_joints, pred_vertices, gt_joints, gt_vertices = chunk
        part = _joint_errors(pred_joints, gt_joints, valid[rows], protocol)
        if gt_vertices is not None:
            part |= _vertex_errors(pred_vertices, gt_vertices, pred_joints[:, :1], gt_joints[:, :1], protocol)
        return part

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, 16)) as pool:  # numpy releases the interpreter's lock
        parts = list(pool.map(errors_of, range(0, len(row), CHUNK)))
    errors = {"row": row}
    for key in parts[0]:
        errors[key] = np.concatenate([part[key] for part in parts])
    if side is not None:
        errors["side"] = np.asarray(side)[row]
    return errors


def _checked(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid):
    """Refuses what cannot be scored, before anything is aligned -> the four arrays, valid (B,21), rows to
    score."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    pred_joints = np.asarray(pred_joints)
    gt_joints = np.asarray(gt_joints)
    _refuse_shapes(pred_joints, gt_joints, (len(gt_joints), 21, 3), "joints")
    if pred_vertices is None or gt_vertices is None:
        pred_vertices = gt_vertices = None
    else:
        pred_vertices = np.asarray(pred_vertices)
        gt_vertices = np.asarray(gt_vertices)
        vertices = gt_vertices.shape[1] if gt_vertices.ndim == 3 else 778
        _refuse_shapes(pred_vertices, gt_vertices, (len(gt_joints), vertices, 3), "vertices")
    if not len(gt_joints):
        raise ValueError("there is no hand to score: the data set is empty")

    known = np.isfinite(gt_joints).all(-1)  # (B, 21)
    row = np.arange(len(gt_joints))
    if protocol == "dexycb":  # frames without a hand hold -1 everywhere and are left out, as its script does
        row = row[known.any(1) & ~(gt_joints == -1).all((1, 2))]
        if not len(row):
            raise ValueError("there is no annotated hand to score: every label is -1 or missing")
    if protocol not in WITH_GAPS:
        _refuse_nonfinite(gt_joints, "true joints", row,
                          f"; only the protocols {' and '.join(WITH_GAPS)} leave out missing joints")
    if gt_vertices is not None:
        _refuse_nonfinite(gt_vertices, "true vertices", row)
        _refuse_nonfinite(gt_joints[:, :1], "true wrists", row)
    if valid is not None:
        if np.shape(valid) != known.shape:
            raise ValueError(f"valid has shape {np.shape(valid)} but {known.shape} is needed")
        known = known & np.asarray(valid, bool)
    if protocol == "assemblyhands":
        row = row[known.sum(1) >= FEWEST_JOINTS]
        if not len(row):
            raise ValueError(f"there is no hand to score: each has fewer than {FEWEST_JOINTS} valid joints")
    return (pred_joints, pred_vertices, gt_joints, gt_vertices), known, row


def _refuse_shapes(pred, gt, expected, name):
    """ValueError where either array has another shape, or where the prediction is not finite."""
    for kind, array in (("predicted", pred), ("true", gt)):
        if array.shape != expected:
            raise ValueError(f"{kind} {name} have shape {array.shape} but {expected} is needed: "
                             "one row for each hand of the data set, in its order")
    _refuse_nonfinite(pred, f"predicted {name}")


def _refuse_nonfinite(points, name, rows=None, mend=""):
    """ValueError that names the first sample (of `rows`) with NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(points).all(tuple(range(1, points.ndim))))
    bad = bad if rows is None else np.intersect1d(bad, rows)
    if len(bad):
        raise ValueError(f"{name} of sample {bad[0]} hold NaN or infinity ({len(bad)} such sample(s)){mend}")


def _joint_errors(pred, gt, valid, protocol):
    """The entries of `per_sample_errors` for joints (B,21,3)."""
    aligned, _ = _aligned_errors(pred, gt, "joints", protocol, valid)
    errors = {"abs_joints": _distance(pred, gt),
              "root_joints": _distance(pred - pred[:, :1], gt - gt[:, :1]),
              "sc_tr_joints": _distance(_scale_translation(pred, gt), gt),
              **aligned}
    for key, error in errors.items():
        if key != "reflected_joints":
            errors[key] = np.where(valid, error, np.nan)
    return errors


def _vertex_errors(pred, gt, pred_wrist, gt_wrist, protocol):
    """The entries of `per_sample_errors` for meshes (B,V,3); wrists (B,1,3)."""
    errors, aligned = _aligned_errors(pred, gt, "vertices", protocol)
    pred_rooted = pred - pred_wrist
    gt_rooted = gt - gt_wrist
    errors["abs_vertices"] = _distance(pred, gt)
    errors["root_vertices"] = _distance(pred_rooted, gt_rooted)
    means = {"reflected_vertices": errors.pop("reflected_vertices")}
    for key, error in errors.items():
        # No vertex is ever missing: the mean over the mesh may come first, which needs less memory.
        means[key] = error.mean(1)
        means[key + "_auc"] = _area_terms(error).mean(1)
    means["f"] = f_score(aligned, gt)
    rooted = PROTOCOLS[protocol] == "root"
    means["f_unaligned"] = f_score(pred_rooted, gt_rooted) if rooted else f_score(pred, gt)
    return means


def _aligned_errors(pred, gt, name, protocol, valid=None):
    """Errors after the leaderboards' fit, the same without reflections, which were reflected; the aligned
    points."""
    # DexYCB's script aligns millimetres, and the guard in `_size` has a unit.
    unit = 1000.0 if protocol == "dexycb" else 1.0
    if valid is not None:
        gt = np.where(valid[..., None], gt, 0)
    aligned, mirrored = _fit(pred * unit, gt * unit, True, valid)
    aligned /= unit
    error = _distance(aligned, gt)
    strict = error.copy()
    rows = np.flatnonzero(mirrored)
    row_valid = None if valid is None else valid[rows]
    turned, _ = _fit(pred[rows] * unit, gt[rows] * unit, False, row_valid)
    strict[rows] = _distance(turned / unit, gt[rows])
    if valid is not None:
        few = valid.sum(1) < 3  # fewer than three points fix no rotation
        error[few] = np.nan
        strict[few] = np.nan
        mirrored[few] = False
    return {f"pa_{name}": error, f"pa_noreflect_{name}": strict, f"reflected_{name}": mirrored}, aligned


# ----------------------------------------------------------------------------------------------------- tables
def evaluate_hands(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol: str, valid=None,
                   side=None) -> dict[str, float]:
    """Scores predicted hands exactly as the data set's official script does.

    pred_joints, gt_joints (B,21,3), pred_vertices, gt_vertices (B,778,3) or None, metres, FreiHAND's joint
    order. protocol: "freihand", "ho3d" (absolute), "dexycb", "assemblyhands", "interhand" (minus the wrist).

    DexYCB leaves out hands whose label is -1 everywhere. AssemblyHands and InterHand2.6M leave out joints
    whose label is NaN or whose `valid` (B,21) is False; given `side` (B,), they take the mean of each joint
    of the left and of the right hand. AssemblyHands also leaves out hands with fewer than ten valid joints.
    A hand whose wrist is NaN has no root-relative error: give the wrist's coordinates and valid=False where
    only its validity is in doubt.

    Returns a flat dict. Joints and mesh are aligned by two separate fits.

      pa_mpjpe_mm, pa_mpvpe_mm         after the leaderboards' similarity fit, which may reflect
      pa_*_noreflect_mm, reflected_*   the same without reflections; how many samples were reflected
      mpjpe_mm, mpvpe_mm               the protocol's own placement
      abs_*, root_*, sc_tr_*           as submitted; minus the wrist; wrist and bone to the middle knuckle
                                       aligned (HO-3D and SiMHand)
      f_5, f_15, auc_joints, auc_vertices     aligned, which is what papers quote; *_unaligned in the
                                       protocol's placement
      count                            scored hands

    ValueError: wrong shapes; NaN or infinity (with the sample's index); unknown protocol.
    """
    errors = per_sample_errors(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid, side)
    return summarise(errors, protocol)


def summarise(errors: dict[str, np.ndarray], protocol: str) -> dict[str, float]:
    """`per_sample_errors` -> the flat dict of `evaluate_hands`. Keys for which no label exists are left
    out."""
    side = errors.get("side")
    table = {"count": len(errors["row"])}
    for short, name in (("mpjpe", "joints"), ("mpvpe", "vertices")):
        if f"pa_{name}" not in errors:
            continue
        for kind, (distance_key, area_key) in MEASURES.items():
            kind = PROTOCOLS[protocol] if kind == "placed" else kind
            values = errors.get(f"{kind}_{name}")
            if values is None:
                continue
            areas = _area_terms(values) if name == "joints" else errors[f"{kind}_{name}_auc"]
            table[distance_key.format(short)] = 1000 * _mean_over_points(_as_points(values), side)
            # The guard in `_size` leaves 4e-9 m of a perfect prediction. It would miss the threshold 0, and
            # the area would be 0.995.
            known = values[~np.isnan(values)]
            perfect = known.size and np.all(known < ZERO)
            area = 1.0 if perfect else _mean_over_points(_as_points(areas), side)
            table[area_key.format(name)] = area
        table[f"reflected_{name}"] = int(errors[f"reflected_{name}"].sum())
    # SiMHand's own area: 20 to 50 mm in 15 steps, after its alignment. Not comparable with auc_joints.
    simhand = _area_terms(errors["sc_tr_joints"], 0.02, 0.05, 15)
    table["auc_joints_sc_tr_20_50"] = _mean_over_points(simhand, side)
    if "f" in errors:
        table["f_5"], table["f_15"] = errors["f"].mean(0).tolist()
        table["f_5_unaligned"], table["f_15_unaligned"] = errors["f_unaligned"].mean(0).tolist()
    return {key: value for key, value in table.items() if not np.isnan(value)}


def _as_points(values):
    """(n,N) of joints as it is; (n,) of meshes as one point each (n,1)."""
    return values.reshape(len(values), -1)


def official_scores(table: dict[str, float], protocol: str) -> dict[str, float]:
    """The official script's own keys and units, from the dict of `evaluate_hands`.

    Centimetres for FreiHAND and HO-3D (scores.txt), millimetres for DexYCB's three rows, AssemblyHands and
    InterHand2.6M. Without meshes only the joints' keys."""
    if protocol in WITH_GAPS:
        return {key: table[key] for key in ("mpjpe_mm",) if key in table}  # none where no wrist is labelled
    scores = {}
    if protocol == "dexycb":
        for row, distance, area in (("absolute", "abs_mpjpe_mm", "auc_joints_abs"),
                                    ("root-relative", "root_mpjpe_mm", "auc_joints_root"),
                                    ("procrustes", "pa_mpjpe_mm", "auc_joints")):
            scores[f"{row} MPJPE (mm)"] = table[distance]
            scores[f"{row} AUC"] = table[area]
        return scores
    aligned = "procrustes_al" if protocol == "ho3d" else "al"
    rows = [("xyz", "abs_mpjpe_mm", "auc_joints_abs"), (f"xyz_{aligned}", "pa_mpjpe_mm", "auc_joints")]
    if protocol == "ho3d":
        rows.append(("xyz_scale_trans_al", "sc_tr_mpjpe_mm", "auc_joints_sc_tr"))
    if "pa_mpvpe_mm" in table:
        rows.append(("mesh", "abs_mpvpe_mm", "auc_vertices_abs"))
        rows.append(("mesh_al", "pa_mpvpe_mm", "auc_vertices"))
    for name, distance, area in rows:
        scores[f"{name}_mean3d"] = table[distance] / 10
        scores[f"{name}_auc3d"] = table[area]
    if "f_5" in table:
        scores["f_score_5"] = table["f_5_unaligned"]
        scores["f_al_score_5"] = table["f_5"]
        scores["f_score_15"] = table["f_15_unaligned"]
        scores["f_al_score_15"] = table["f_15"]
    return scores
