"""The numbers that hand papers and leaderboards report: numpy and scipy only, arrays in, floats out.

Arrays are batches in metres, in one camera frame, joints in FreiHAND order (0 wrist, 9 middle knuckle), whatever order
a data set's own files have. Errors of single hands stay in metres; `evaluate_hands` returns millimetres and says so in
its keys. Everything is float64, because float32 distances at arm's length are off by tenths of a millimetre.

The arithmetic is that of the official scripts: lmb-freiburg/freihand `eval.py`, shreyashampali/ho3d `eval.py`,
NVlabs/dex-ycb-toolkit `hpe_eval.py`, facebookresearch/assemblyhands-toolkit `dataset.py`. 3,960 hands take about 10 s.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.spatial import cKDTree

# Where a protocol puts the hand before `mpjpe_mm` is measured: as submitted, or minus its own wrist.
PROTOCOLS = {"freihand": "abs", "ho3d": "abs", "dexycb": "root", "assemblyhands": "root"}
WRIST, MIDDLE_KNUCKLE = 0, 9
F_THRESHOLDS = (0.005, 0.015)  # metres
ZERO = 1e-7  # metres: nearer than this to every label, a prediction is perfect
CHUNK = 512  # hands aligned at a time: keeps the intermediate meshes within a few tens of megabytes


def procrustes(pred, gt, reflect=False):
    """Move, turn and scale `pred` onto `gt` with the least squared error.

    pred, gt: (B, N, 3) or (N, 3). Returns the aligned prediction in the same shape, float64.
    reflect=True is the leaderboards' fit (FreiHAND, HO-3D, DexYCB), which may also mirror the hand: a left hand
    predicted for a right one then scores 0. reflect=False allows rotations only (as HaMeR's evaluation does).
    ValueError on other shapes, and on NaN or infinity with the index of the first such sample.
    """
    pred, gt = np.asarray(pred, np.float64), np.asarray(gt, np.float64)
    if pred.shape != gt.shape or pred.ndim not in (2, 3) or pred.shape[-1] != 3:
        raise ValueError(f"procrustes needs one shape (B, N, 3) or (N, 3) for both, got {pred.shape} and {gt.shape}")
    batch = pred.reshape(-1, *pred.shape[-2:]), gt.reshape(-1, *gt.shape[-2:])
    for name, points in zip(("pred", "gt"), batch, strict=True):
        _refuse_nonfinite(points, name)
    return _fit(*batch, reflect)[0].reshape(pred.shape)


def _fit(pred, gt, reflect, valid=None):
    """Similarity fit of finite (B, N, 3) -> aligned (B, N, 3), reflected (B,). valid (B, N): points that count."""
    keep = np.ones(pred.shape[:2] + (1,)) if valid is None else valid[..., None].astype(np.float64)
    number = np.maximum(keep.sum(1, keepdims=True), 1)
    centre_pred, centre_gt = (pred * keep).sum(1, keepdims=True) / number, (gt * keep).sum(1, keepdims=True) / number
    pred, gt = (pred - centre_pred) * keep, (gt - centre_gt) * keep
    # The guard 1e-8 is FreiHAND's; it makes a constant prediction collapse to the centroid instead of to NaN.
    size_pred, size_gt = (np.sqrt((x * x).sum((1, 2), keepdims=True)) + 1e-8 for x in (pred, gt))
    pred, gt = pred / size_pred, gt / size_gt
    u, s, vt = np.linalg.svd(gt.transpose(0, 2, 1) @ pred)  # (B, 3, 3), (B, 3), (B, 3, 3)
    mirrored = np.linalg.det(u @ vt) < 0
    if not reflect:
        sign = np.where(mirrored, -1.0, 1.0)
        u = np.concatenate([u[..., :2], u[..., 2:] * sign[:, None, None]], -1)
        s = np.concatenate([s[:, :2], s[:, 2:] * sign[:, None]], -1)
    rotation = u @ vt
    aligned = pred @ rotation.transpose(0, 2, 1) * s.sum(1)[:, None, None] * size_gt + centre_gt
    # Of flat or constant points the sign is arbitrary and changes nothing: those are not counted as reflections.
    return aligned, mirrored & (np.abs(s[:, 2]) > 1e-9 * s[:, 0])


def f_score(pred, gt, thresholds=F_THRESHOLDS):
    """F-score of two point sets: harmonic mean of the two shares of points nearer than t to the other set (strict <).

    pred (B, N, 3), gt (B, M, 3) in metres, or single sets (N, 3), (M, 3); thresholds in metres.
    Returns (B, len(thresholds)), or (len(thresholds),) for single sets; 0 where both shares are 0. FreiHAND `eval.py`.
    """
    pred, gt = np.asarray(pred, np.float64), np.asarray(gt, np.float64)
    if pred.ndim == 2:
        return f_score(pred[None], gt[None], thresholds)[0]
    limits = np.asarray(thresholds, np.float64)
    reach = float(limits.max()) * 1.001  # the search stops here; the comparison below is exact

    def score(pair):
        trees = [cKDTree(points, balanced_tree=False, compact_nodes=False) for points in pair]
        near = [trees[1 - i].query(pair[i], distance_upper_bound=reach)[0] for i in (0, 1)]  # inf beyond reach
        a, b = ((distance[:, None] < limits).mean(0) for distance in near)
        return 2 * a * b / np.where(a + b > 0, a + b, 1)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # the trees release the interpreter's lock
        return np.array(list(pool.map(score, zip(pred, gt, strict=True)))).reshape(len(pred), len(limits))


def pck_curve(errors, low=0.0, high=0.05, steps=100):
    """Share of points with error <= t, per point over samples, then over points.

    errors (B, N) metres, NaN = no label. Returns thresholds (steps,) in metres and shares (steps,).
    """
    errors = np.asarray(errors, np.float64)
    thresholds = np.linspace(low, high, steps)
    share = [_mean_over_points(np.where(np.isnan(errors), np.nan, errors <= t)) for t in thresholds]
    return thresholds, np.array(share)


def pck_auc(errors, low=0.0, high=0.05, steps=100):
    """Area under `pck_curve` (trapezoids) over its width, 1 is perfect. errors (B, N) metres, NaN = no label."""
    return _mean_over_points(_auc_share(np.asarray(errors, np.float64), low, high, steps))


def _auc_share(errors, low=0.0, high=0.05, steps=100):
    """What each single error adds to the area: the weight of the thresholds that are not below it. Same shape."""
    weight = np.ones(steps)
    weight[[0, -1]] = 0.5  # trapezoids on an even grid
    tail = np.append(np.cumsum(weight[::-1])[::-1], 0) / weight.sum()
    nearest = np.searchsorted(np.linspace(low, high, steps), errors, side="left")
    return np.where(np.isnan(errors), np.nan, tail[nearest])


def _mean_over_points(values, side=None):
    """(B, N) with NaN = missing: mean of each point over samples (of one side), then over the points that have any."""
    means = []
    for one in [slice(None)] if side is None else [side == s for s in np.unique(side)]:
        known = ~np.isnan(values[one])
        number = known.sum(0)
        means.append(np.where(known, values[one], 0).sum(0)[number > 0] / number[number > 0])
    means = np.concatenate(means)
    return float(means.mean()) if means.size else float("nan")


def per_sample_errors(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid=None, side=None):
    """Errors of every hand, for distributions and for the best and worst: arguments as in `evaluate_hands`.

    Returns arrays over the n scored hands, distances in metres:
      `row` (n,) index into the input, `side` (n,) where given;
      `{abs,root,sc_tr,pa,pa_noreflect}_joints` (n, 21), NaN where a label is missing; `reflected_joints` (n,) bool;
      with meshes `{abs,root,pa,pa_noreflect}_vertices` (n,) means over the mesh, the same names + `_auc` (n,),
      `reflected_vertices` (n,) bool, `f` and `f_unaligned` (n, 2) at 5 and 15 mm.
    """
    points, valid, row = _checked(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid)
    parts = []
    for start in range(0, len(row), CHUNK):
        rows = row[start:start + CHUNK]
        chunk = [None if x is None else np.asarray(x[rows], np.float64) for x in points]
        parts.append(_chunk_errors(*chunk, valid[rows], protocol))
    errors = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {"row": row, **errors, **({} if side is None else {"side": np.asarray(side)[row]})}


def _checked(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid):
    """Refuse what cannot be scored, before anything is aligned -> the four arrays, valid (B, 21), rows to score."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    pred_joints, gt_joints = np.asarray(pred_joints), np.asarray(gt_joints)
    if pred_vertices is None or gt_vertices is None:
        pred_vertices = gt_vertices = None
    else:
        pred_vertices, gt_vertices = np.asarray(pred_vertices), np.asarray(gt_vertices)
    for name, pred, gt in (("joints", pred_joints, gt_joints), ("vertices", pred_vertices, gt_vertices)):
        if pred is None:
            continue
        expected = (len(gt_joints), 21 if name == "joints" else gt.shape[1] if gt.ndim == 3 else 778, 3)
        for kind, array in (("predicted", pred), ("true", gt)):
            if array.shape != expected:
                raise ValueError(f"{kind} {name} have shape {array.shape} but {expected} is needed: "
                                 "one row for each hand of the data set, in its order")
        _refuse_nonfinite(pred, f"predicted {name}")
    if not len(gt_joints):
        raise ValueError("there is no hand to score: the data set is empty")
    known = np.isfinite(gt_joints).all(-1)  # (B, 21)
    row = np.arange(len(gt_joints))
    if protocol == "dexycb":  # frames without a hand hold -1 everywhere and are left out, as its script does
        row = row[known.any(1) & ~(gt_joints == -1).all((1, 2))]
        if not len(row):
            raise ValueError("there is no annotated hand to score: every label is -1 or missing")
    if protocol != "assemblyhands":
        _refuse_nonfinite(gt_joints, "true joints", row, "; only the protocol assemblyhands leaves out missing joints")
    if gt_vertices is not None:
        _refuse_nonfinite(gt_vertices, "true vertices", row)
        _refuse_nonfinite(gt_joints[:, :1], "true wrists", row)
    if valid is not None:
        if np.shape(valid) != known.shape:
            raise ValueError(f"valid has shape {np.shape(valid)} but {known.shape} is needed")
        known = known & np.asarray(valid, bool)
    return (pred_joints, pred_vertices, gt_joints, gt_vertices), known, row


def _refuse_nonfinite(points, name, rows=None, mend=""):
    """ValueError that names the first sample (of `rows`) holding NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(points).all(tuple(range(1, points.ndim))))
    bad = bad if rows is None else np.intersect1d(bad, rows)
    if len(bad):
        raise ValueError(f"{name} of sample {bad[0]} hold NaN or infinity ({len(bad)} such sample(s)){mend}")


def _distance(a, b):
    return np.sqrt(((a - b) ** 2).sum(-1))  # (B, N)


def _scale_translation(pred, gt):
    """Wrist onto wrist, bone wrist to middle knuckle as long as the true one: HO-3D's and SiMHand's alignment."""
    length_pred, length_gt = (np.sqrt(((x[:, MIDDLE_KNUCKLE] - x[:, WRIST]) ** 2).sum(-1)) for x in (pred, gt))
    scaled = pred / np.where(length_pred > 0, length_pred, 1)[:, None, None] * length_gt[:, None, None]
    return scaled - scaled[:, :1] + gt[:, :1]


def _chunk_errors(pred_joints, pred_vertices, gt_joints, gt_vertices, valid, protocol):
    missing = ~valid
    wrist_pred, wrist_gt = pred_joints[:, :1], gt_joints[:, :1]
    out = {"abs_joints": _distance(pred_joints, gt_joints),
           "root_joints": _distance(pred_joints - wrist_pred, gt_joints - wrist_gt),
           "sc_tr_joints": _distance(_scale_translation(pred_joints, gt_joints), gt_joints)}
    out |= _aligned_errors(pred_joints, gt_joints, "joints", protocol, valid)[0]
    for key in ("abs_joints", "root_joints", "sc_tr_joints", "pa_joints", "pa_noreflect_joints"):
        out[key] = np.where(missing, np.nan, out[key])
    if gt_vertices is None:
        return out
    errors, aligned = _aligned_errors(pred_vertices, gt_vertices, "vertices", protocol)
    rooted = pred_vertices - wrist_pred, gt_vertices - wrist_gt
    errors |= {"abs_vertices": _distance(pred_vertices, gt_vertices), "root_vertices": _distance(*rooted)}
    for key, error in errors.items():
        if error.ndim == 1:  # reflected_vertices
            out[key] = error
        else:  # no vertex is ever missing, so means over the mesh first give the same result and need less memory
            out[key], out[key + "_auc"] = error.mean(1), _auc_share(error).mean(1)
    out["f"] = f_score(aligned, gt_vertices)
    out["f_unaligned"] = f_score(*(rooted if PROTOCOLS[protocol] == "root" else (pred_vertices, gt_vertices)))
    return out


def _aligned_errors(pred, gt, name, protocol, valid=None):
    """Errors after the leaderboards' fit, the same without reflections, which were reflected; the aligned points."""
    unit = 1000.0 if protocol == "dexycb" else 1.0  # its script aligns millimetres, and the guard in `_fit` has a unit
    few = None
    if valid is not None:
        gt, few = np.where(valid[..., None], gt, 0), valid.sum(1) < 3  # fewer than three points fix no rotation
    aligned, mirrored = _fit(pred * unit, gt * unit, True, valid)
    aligned /= unit
    error = _distance(aligned, gt)
    strict = error.copy()
    rows = np.flatnonzero(mirrored)
    again = _fit(pred[rows] * unit, gt[rows] * unit, False, None if valid is None else valid[rows])[0] / unit
    strict[rows] = _distance(again, gt[rows])
    if few is not None:
        error[few], strict[few], mirrored[few] = np.nan, np.nan, False
    return {f"pa_{name}": error, f"pa_noreflect_{name}": strict, f"reflected_{name}": mirrored}, aligned


def summarise(errors, protocol):
    """`per_sample_errors` -> the flat dict of `evaluate_hands`. Keys for which no label exists are left out."""
    side, placed = errors.get("side"), PROTOCOLS[protocol]
    table = {"count": len(errors["row"])}
    for short, name in (("mpjpe", "joints"), ("mpvpe", "vertices")):
        if f"pa_{name}" not in errors:
            continue
        kinds = ["pa", placed, "abs", "root", "sc_tr", "pa_noreflect"]
        mm = [f"pa_{short}_mm", f"{short}_mm", f"abs_{short}_mm", f"root_{short}_mm", f"sc_tr_{short}_mm",
              f"pa_{short}_noreflect_mm"]
        auc = ["", "_unaligned", "_abs", "_root", "_sc_tr", "_noreflect"]
        for kind, key, suffix in zip(kinds, mm, auc, strict=True):
            values = errors.get(f"{kind}_{name}")
            if values is None:  # the scale-translation alignment is defined for joints only
                continue
            area = _auc_share(values) if name == "joints" else errors[f"{kind}_{name}_auc"]
            table[key] = 1000 * _mean_over_points(values.reshape(len(values), -1), side)
            # The guard in `_fit` leaves 4e-9 m of a perfect prediction, which would miss the threshold 0: 0.995.
            perfect = np.all(values[~np.isnan(values)] < ZERO)
            table[f"auc_{name}{suffix}"] = 1.0 if perfect else _mean_over_points(area.reshape(len(values), -1), side)
        table[f"reflected_{name}"] = int(errors[f"reflected_{name}"].sum())
    # SiMHand's own area under the curve: 20 to 50 mm in 15 steps after its alignment. Not comparable with auc_joints.
    table["auc_joints_sc_tr_20_50"] = _mean_over_points(_auc_share(errors["sc_tr_joints"], 0.02, 0.05, 15), side)
    if "f" in errors:
        table |= dict(zip(("f_5", "f_15"), errors["f"].mean(0).tolist(), strict=True))
        table |= dict(zip(("f_5_unaligned", "f_15_unaligned"), errors["f_unaligned"].mean(0).tolist(), strict=True))
    return {key: value for key, value in table.items() if not np.isnan(value)}


def evaluate_hands(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid=None, side=None):
    """Score predicted hands exactly as the data set's official script does.

    pred_joints, gt_joints (B, 21, 3), pred_vertices, gt_vertices (B, 778, 3) or None, metres, FreiHAND joint order.
    protocol: "freihand", "ho3d" (absolute), "dexycb", "assemblyhands" (minus the wrist). DexYCB leaves out hands whose
    label is -1 everywhere; AssemblyHands leaves out joints whose label is NaN or `valid` (B, 21) False, and, given
    `side` (B,), takes its means per joint of the left and of the right hand. A hand whose wrist is NaN has no
    root-relative error; give the wrist's coordinates and valid=False where only its validity is in doubt.

    Returns a flat dict. Joints and mesh are aligned by two separate fits.
      pa_mpjpe_mm, pa_mpvpe_mm         after the leaderboards' similarity fit, which may reflect (`procrustes`)
      pa_*_noreflect_mm, reflected_*   the same without reflections; how many samples were reflected
      mpjpe_mm, mpvpe_mm               the protocol's own placement; abs_*, root_* and sc_tr_* name theirs (sc_tr: wrist
                                       and bone to the middle knuckle, HO-3D and SiMHand)
      f_5, f_15, auc_joints, auc_vertices     aligned (what papers quote); *_unaligned in the protocol's placement
      count                            scored hands
    ValueError: wrong shapes; NaN or infinity (with the sample's index); unknown protocol.
    """
    errors = per_sample_errors(pred_joints, pred_vertices, gt_joints, gt_vertices, protocol, valid, side)
    return summarise(errors, protocol)


def official_scores(metrics, protocol):
    """The official script's own keys and units, from the dict of `evaluate_hands`: centimetres for FreiHAND and HO-3D
    (scores.txt), millimetres for DexYCB's three rows and for AssemblyHands. Without meshes only the joints' keys."""
    if protocol == "assemblyhands":
        return {"mpjpe_mm": metrics["mpjpe_mm"]}
    if protocol == "dexycb":
        rows = {"absolute": ("abs_mpjpe_mm", "auc_joints_abs"), "root-relative": ("root_mpjpe_mm", "auc_joints_root"),
                "procrustes": ("pa_mpjpe_mm", "auc_joints")}
        return {f"{row} {label}": metrics[key] for row, keys in rows.items()
                for label, key in zip(("MPJPE (mm)", "AUC"), keys, strict=True)}
    aligned = "procrustes_al" if protocol == "ho3d" else "al"
    rows = [("xyz", "abs_mpjpe_mm", "auc_joints_abs"), (f"xyz_{aligned}", "pa_mpjpe_mm", "auc_joints")]
    if protocol == "ho3d":
        rows.append(("xyz_scale_trans_al", "sc_tr_mpjpe_mm", "auc_joints_sc_tr"))
    if "pa_mpvpe_mm" in metrics:
        rows += [("mesh", "abs_mpvpe_mm", "auc_vertices_abs"), ("mesh_al", "pa_mpvpe_mm", "auc_vertices")]
    scores = {}
    for name, distance, area in rows:
        scores |= {f"{name}_mean3d": metrics[distance] / 10, f"{name}_auc3d": metrics[area]}
    if "f_5" in metrics:
        scores |= {"f_score_5": metrics["f_5_unaligned"], "f_al_score_5": metrics["f_5"],
                   "f_score_15": metrics["f_15_unaligned"], "f_al_score_15": metrics["f_15"]}
    return scores


# ---------------------------------------------------------------------------------------------------------------- probe
STRENGTHS = 10.0 ** np.arange(-5, 2)
FLEXIONS = [(0 if j == 0 else 4 * f + j, 4 * f + j + 1, 4 * f + j + 2) for f in range(5) for j in range(3)]   # bones that meet


def flexion(joints):
    """(B,21,3) -> (B,15) radians: how far each finger bends at its three joints, base to tip, thumb first; 0 is straight."""
    a, b, c = (joints[:, list(points)] for points in zip(*FLEXIONS, strict=True))
    first, second = b - a, c - b
    cosine = (first * second).sum(-1) / np.maximum(np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1), 1e-12)
    return np.arccos(cosine.clip(-1, 1))


def ridge(x, y, test_x, strengths=STRENGTHS):
    """Ridge regression of y (n,M) on features x (n,D), standardised; predicts for test_x (m,D) -> (m,M).

    Each column of y takes the strength (times n) that does best on the last fifth of the rows when the first four fifths are
    fitted; all rows are then fitted again. Rows of one video should be neighbours, so that few of them part."""
    mean, deviation = x.mean(0), x.std(0) + 1e-9
    x, test_x, centre = (x - mean) / deviation, (test_x - mean) / deviation, y.mean(0)
    cut = max(1, len(x) * 4 // 5)

    def fit(rows):
        values, vectors = np.linalg.eigh(x[rows].T @ x[rows])
        right = vectors.T @ (x[rows].T @ (y[rows] - centre))
        return lambda strength: vectors @ (right / (np.maximum(values, 0) + strength * len(x[rows]))[:, None])
    part = fit(slice(cut))
    wrong = np.stack([((x[cut:] @ part(strength) + centre - y[cut:]) ** 2).sum(0) for strength in strengths])
    best, whole = wrong.argmin(0), fit(slice(None))                # (M,): each column has its own
    pred = np.empty((len(test_x), y.shape[1]))
    for k in np.unique(best):
        pred[:, best == k] = test_x @ whole(strengths[k])[:, best == k]
    return pred + centre


def r2(pred, true):
    """Share of the variance explained, mean over the columns of (N,M)."""
    rest, whole = ((pred - true) ** 2).sum(0), ((true - true.mean(0)) ** 2).sum(0)
    return float((1 - rest / np.maximum(whole, 1e-12)).mean())


def nearest(x, test_x, count=1, skip_self=False):
    """The `count` rows of x (n,D) most like each row of test_x (m,D) by cosine of the standardised features: indices (m,count)
    and cosines, best first. skip_self: test_x is x, and no row is its own neighbour."""
    mean, deviation = x.mean(0), x.std(0) + 1e-9
    x, test_x = ((v - mean) / deviation for v in (x, test_x))
    x, test_x = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (x, test_x))
    rows, cosines = [], []
    for start in range(0, len(test_x), 1024):
        similar = test_x[start:start + 1024] @ x.T
        if skip_self:
            similar[np.arange(len(similar)), start + np.arange(len(similar))] = -np.inf
        best = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similar, best, 1), axis=1)
        rows.append(np.take_along_axis(best, order, 1))
        cosines.append(np.take_along_axis(similar, rows[-1], 1))
    return np.concatenate(rows), np.concatenate(cosines)


def leave_one_out(x, classes, count=10):
    """Share of the rows of x (N,D) whose class (N,) is that of most of its `count` nearest others, each vote weighted by
    exp(cosine / 0.07) (the k-NN of Wu et al. and DINO, here of standardised features)."""
    count = min(count, len(x) - 1)
    rows, cosines = nearest(x, x, count, skip_self=True)
    names, numbers = np.unique(classes, return_inverse=True)
    votes = np.zeros((len(x), len(names)))
    np.add.at(votes, (np.arange(len(x))[:, None], numbers[rows]), np.exp(cosines / 0.07))
    return float((votes.argmax(1) == numbers).mean())


def probe_pose(x, joints, joints2d, test_x, test_joints, test_joints2d, mean_joints):
    """What a frozen feature tells about the pose: fitted on x (n,D), joints (n,21,3) m and joints2d (n,21,2), tested on the others.

    mean_joints (21,3) is the hand that poses are aligned to. Keys: ridge_pa_mpjpe_mm (ridge to the joints aligned to the mean
    hand), ridge_mpjpe_mm (to the joints minus their wrist), nearest_pa_mpjpe_mm (the pose of the nearest hand), orientation_r2
    (direction from wrist to middle knuckle in the image), flexion_r2 (15 angles)."""
    def direction(points):
        arrow = points[:, MIDDLE_KNUCKLE] - points[:, WRIST]
        return arrow / np.maximum(np.linalg.norm(arrow, axis=1, keepdims=True), 1e-9)
    rooted, test_rooted = (v - v[:, :1] for v in (joints, test_joints))
    aligned = procrustes(joints, np.broadcast_to(mean_joints, joints.shape))
    targets = {"pa": aligned.reshape(len(x), -1), "rooted": rooted.reshape(len(x), -1), "orientation": direction(joints2d),
               "flexion": flexion(joints)}
    answer = ridge(x, np.concatenate(list(targets.values()), 1), test_x)
    pa, root, orientation, bend = np.split(answer, np.cumsum([v.shape[1] for v in targets.values()])[:-1], axis=1)
    twin = joints[nearest(x, test_x)[0][:, 0]]

    def error(pred):
        return float(1000 * _distance(procrustes(pred.reshape(-1, 21, 3), test_joints), test_joints).mean())
    return {"ridge_pa_mpjpe_mm": error(pa), "nearest_pa_mpjpe_mm": error(twin),
            "ridge_mpjpe_mm": float(1000 * _distance(root.reshape(-1, 21, 3), test_rooted).mean()),
            "orientation_r2": r2(orientation, direction(test_joints2d)), "flexion_r2": r2(bend, flexion(test_joints))}
