"""Probing: what frozen features know, without fine-tuning. Features and labels in, numbers out.

    encode           batches -> features of the class token, of the patches' mean, of both; raw ones
    probe_pose       ridge regression and the nearest neighbour from a feature to the pose of the hand
    probe_points     the same where a hand has only 2-D points, such as a detector's
    leave_one_out    k-NN accuracy, where images have classes and no poses
    LiveProbe        probe_pose or probe_points of an encoder that is being trained, in seconds
    hand_groups, split_groups, spread_rows       which hands to fit on and which to test on

Features are (N,D) float64 numpy, joints in metres and in FreiHAND's order (0 wrist, 9 middle knuckle).

Example::

    import numpy as np
    from probing import leave_one_out, r2, ridge, split_groups

    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(20), 10)                              # 200 hands, ten of each video
    features = rng.normal(size=(200, 8))
    angle = features[:, :1] - 2 * features[:, 1:2]                     # (200, 1)
    train, test = split_groups(videos)
    assert not set(videos[train]) & set(videos[test])
    assert r2(ridge(features[train], angle[train], features[test]), angle[test]) > 0.99
    assert leave_one_out(features, features[:, 0] > 0) > 0.6           # chance: 0.5

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

PROBE_WINDOW = 1.3  # side of a probe's view over the longer side of the box; the view is upright
PROBE_HANDS = 10_000  # at most so many hands are fitted, and tested
LIVE_HANDS = (2_000, 1_000)  # of a LiveProbe, fitted and tested: a ridge on 384 features needs many
LEAST_HANDS = 10  # at least so many hands are fitted, and tested
LIVE_CHARTS = {"probe": ("probe_ridge_mm", "probe_neighbour_mm", "probe_ridge_percent",
                         "probe_neighbour_percent"),
               "probe_orientation": ("probe_orientation_r2",)}
STRENGTHS = 10.0 ** np.arange(-5, 2)  # of the ridge
TEMPERATURE = 0.07  # of a neighbour's vote (Wu et al. 2018, facebookresearch/dino eval_knn.py)
WRIST = 0
MIDDLE_KNUCKLE = 9
FINGERS = np.array([[WRIST, k, k + 1, k + 2, k + 3] for k in (1, 5, 9, 13, 17)])  # wrist to tip, thumb first


# --------------------------------------------------------------------------------------------------- features
@torch.no_grad()
def encode(encoders: dict[str, Callable], batches: Iterable[dict], make_views: Callable,
           labels: tuple[str, ...] = (), raw: dict[str, Callable] | None = None) -> tuple[dict, dict]:
    """Frozen encoders over batches -> features and labels, in the order of the batches' rows.

    encoders: name -> callable, views (B,3,S,S) in [0,1] -> summary (B,D), map (B,D,h,w); networks in eval
    mode. batches: dicts of tensors. make_views: batch -> views. labels: names of entries of the batches. raw:
    name -> callable, views -> (B,D), features that no network learned.

    Returns ({(name, feature): (N,D)}, {label: (N,...)}), float64. The features of an encoder are "class" (its
    summary), "mean" (of the map) and "both" (N,2D); the one of a raw callable is "raw".
    """
    features = {}
    found = {name: [] for name in labels}
    for batch in batches:
        views = make_views(batch)
        for name, encoder in encoders.items():
            for feature, value in pool_features(*encoder(views)).items():
                features.setdefault((name, feature), []).append(_to_numpy(value))
        for name, describe in (raw or {}).items():
            features.setdefault((name, "raw"), []).append(_to_numpy(describe(views)))
        for name in labels:
            found[name].append(_to_numpy(batch[name]))
    features = {key: np.concatenate(parts) for key, parts in features.items()}
    return features, {name: np.concatenate(parts) for name, parts in found.items()}


def _to_numpy(tensor):
    return tensor.cpu().double().numpy()  # in this order: mps has no float64


def pool_features(summary: torch.Tensor, feature_map: torch.Tensor) -> dict[str, torch.Tensor]:
    """Summary (B,D) and map (B,D,h,w) of an encoder -> "class" (B,D), "mean" (B,D), "both" (B,2D), fp32."""
    summary = summary.float()
    mean = feature_map.mean((2, 3)).float()
    return {"class": summary, "mean": mean, "both": torch.cat([summary, mean], dim=1)}


# ----------------------------------------------------------------------------------------- which hands to use
def hand_groups(poses, videos=None):
    """(N,) the number of each hand's group. Two hands are in one group if they have the same pose or video,
    also by way of other hands. poses (N,) numbers from 0; videos (N,), -1 where the video is unknown."""
    if videos is None:
        videos = np.full(len(poses), -1)
    nodes = np.where(videos < 0, poses, poses.max() + 1 + videos)
    size = max(poses.max(), nodes.max()) + 1
    links = coo_matrix((np.ones(len(poses)), (poses, nodes)), shape=(size, size))
    _, component = connected_components(links, directed=False)
    return component[poses]


def split_groups(groups, seed=0):
    """Rows to fit on and rows to test on: each half of the groups (N,), drawn at random."""
    chosen = np.random.default_rng(seed).permutation(np.unique(groups))[::2]
    fitted = np.isin(groups, chosen)
    return np.flatnonzero(fitted), np.flatnonzero(~fitted)


def spread_rows(rows, most=PROBE_HANDS):
    """At most so many of the rows, evenly spaced and in their order."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), most))
    return rows[places.astype(int)]


# ------------------------------------------------------------------------------------------------- regression
def ridge(x, y, test_x, strengths=STRENGTHS):
    """Ridge regression of y (n,M) on features x (n,D), standardised; predicts (m,M) for test_x (m,D).

    The first four fifths of the rows are fitted with each strength (times their number). Each column of y
    takes the strength that does best on the last fifth, and all rows are fitted with it. Rows of one video
    should be neighbours, so that the cut parts at most one video (ours)."""
    mean = x.mean(0)
    deviation = x.std(0) + 1e-9
    x = (x - mean) / deviation
    test_x = (test_x - mean) / deviation
    centre = y.mean(0)

    cut = max(1, len(x) * 4 // 5)
    weights = _ridge_solver(x[:cut], y[:cut] - centre)
    errors = []
    for strength in strengths:
        error = x[cut:] @ weights(strength) + centre - y[cut:]
        errors.append((error ** 2).sum(0))
    best = np.stack(errors).argmin(0)  # (M,)

    weights = _ridge_solver(x, y - centre)
    pred = np.empty((len(test_x), y.shape[1]))
    for k in np.unique(best):
        columns = best == k
        pred[:, columns] = test_x @ weights(strengths[k])[:, columns]
    return pred + centre


def _ridge_solver(x, y):
    """The function strength -> weights (D,M) of the penalised fit; one decomposition serves all strengths."""
    values, vectors = np.linalg.eigh(x.T @ x)
    values = np.maximum(values, 0)
    projected = vectors.T @ (x.T @ y)

    def weights(strength):
        return vectors @ (projected / (values + strength * len(x))[:, None])

    return weights


def r2(pred, true) -> float:
    """Share of the variance that is explained, the mean over the columns of (N,M)."""
    residual = ((pred - true) ** 2).sum(0)
    total = ((true - true.mean(0)) ** 2).sum(0)
    return float((1 - residual / np.maximum(total, 1e-12)).mean())


# ------------------------------------------------------------------------------------------------- neighbours
def nearest(x, test_x, neighbours=1, skip_self=False):
    """The rows of x (n,D) that are most like each row of test_x (m,D): indices (m,K) and cosines (m,K), best
    first.

    Cosines are those of standardised features. skip_self: test_x is x, and no row is its own neighbour."""
    mean = x.mean(0)
    deviation = x.std(0) + 1e-9
    x = _unit_rows((x - mean) / deviation)
    test_x = _unit_rows((test_x - mean) / deviation)
    rows = []
    cosines = []
    for start in range(0, len(test_x), 1024):
        similar = test_x[start:start + 1024] @ x.T  # (1024, n)
        if skip_self:
            chunk = np.arange(len(similar))
            similar[chunk, start + chunk] = -np.inf
        best = np.argpartition(-similar, neighbours - 1, axis=1)[:, :neighbours]
        order = np.argsort(-np.take_along_axis(similar, best, 1), axis=1)
        rows.append(np.take_along_axis(best, order, 1))
        cosines.append(np.take_along_axis(similar, rows[-1], 1))
    return np.concatenate(rows), np.concatenate(cosines)


def _unit_rows(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def leave_one_out(x, classes, neighbours=10) -> float:
    """Share of the rows of x (N,D) whose class (N,) wins the vote of their nearest other rows.

    A vote weighs exp(cosine / 0.07): the k-NN of Wu et al. and DINO, here of standardised features."""
    neighbours = min(neighbours, len(x) - 1)
    rows, cosines = nearest(x, x, neighbours, skip_self=True)
    names, numbers = np.unique(classes, return_inverse=True)
    votes = np.zeros((len(x), len(names)))
    np.add.at(votes, (np.arange(len(x))[:, None], numbers[rows]), np.exp(cosines / TEMPERATURE))
    return float((votes.argmax(1) == numbers).mean())


# ------------------------------------------------------------------------------------------------------- pose
def flexion(joints):
    """Joints (B,21,3) -> (B,15) radians: how far each finger bends at its three joints, 0 is straight; thumb
    first, base to tip."""
    a = joints[:, FINGERS[:, 0:3].ravel()]  # (B, 15, 3)
    b = joints[:, FINGERS[:, 1:4].ravel()]
    c = joints[:, FINGERS[:, 2:5].ravel()]
    first = b - a  # bone a-b meets bone b-c at b
    second = c - b
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = (first * second).sum(-1) / np.maximum(lengths, 1e-12)
    return np.arccos(cosine.clip(-1, 1))


def orientation(points):
    """Points (B,21,2) in the image -> (B,2): the direction from the wrist to the middle knuckle."""
    arrow = points[:, MIDDLE_KNUCKLE] - points[:, WRIST]
    return arrow / np.maximum(np.linalg.norm(arrow, axis=1, keepdims=True), 1e-9)


def probe_pose(x, joints, joints2d, test_x, test_joints, test_joints2d, mean_joints,
               align: Callable) -> dict[str, float]:
    """What a frozen feature knows of the pose: fitted on some hands, tested on others (ours).

    x (n,D), joints (n,21,3) metres, joints2d (n,21,2); mean_joints (21,3): the hand that poses are aligned
    to. align: callable (pred, gt), both (N,21,3) -> pred laid upon gt without reflection, as
    metrics.procrustes.

      ridge_pa_mpjpe_mm      ridge to the joints aligned to the mean hand
      nearest_pa_mpjpe_mm    the pose of the nearest hand
      ridge_mpjpe_mm         ridge to the joints minus their wrist
      orientation_r2         ridge to the direction from wrist to middle knuckle in the image
      flexion_r2             ridge to 15 angles of the fingers
    """
    aligned = align(joints, np.broadcast_to(mean_joints, joints.shape))
    rooted = joints - joints[:, :1]
    test_rooted = test_joints - test_joints[:, :1]
    targets = [aligned.reshape(len(x), 63), rooted.reshape(len(x), 63), orientation(joints2d),
               flexion(joints)]
    answer = ridge(x, np.concatenate(targets, axis=1), test_x)
    pred_aligned, pred_rooted, pred_orientation, pred_flexion = np.split(answer, [63, 126, 128], axis=1)
    neighbour = nearest(x, test_x)[0][:, 0]
    pred_aligned = align(pred_aligned.reshape(-1, 21, 3), test_joints)
    return {"ridge_pa_mpjpe_mm": mean_distance_mm(pred_aligned, test_joints),
            "nearest_pa_mpjpe_mm": mean_distance_mm(align(joints[neighbour], test_joints), test_joints),
            "ridge_mpjpe_mm": mean_distance_mm(pred_rooted.reshape(-1, 21, 3), test_rooted),
            "orientation_r2": r2(pred_orientation, orientation(test_joints2d)),
            "flexion_r2": r2(pred_flexion, flexion(test_joints))}


def mean_distance_mm(pred, true) -> float:
    """Mean distance of points (N,21,3) in metres, as millimetres."""
    return float(1000 * np.sqrt(((pred - true) ** 2).sum(-1)).mean())


def align_2d(pred, gt):
    """Points (N,21,2) moved, turned and scaled onto gt with the least squared error, never mirrored."""
    a, b = (points[..., 0] + 1j * points[..., 1] for points in (pred, gt))  # (N, 21): a turn is a product
    a = a - a.mean(1, keepdims=True)
    turn = (a.conj() * b).sum(1) / np.maximum((np.abs(a) ** 2).sum(1), 1e-12)  # and scale
    aligned = turn[:, None] * a + b.mean(1, keepdims=True)
    return np.stack([aligned.real, aligned.imag], -1)


def mean_shape(points, align):
    """The mean (21,C) of points (N,21,C), all aligned to the first."""
    return align(points, np.broadcast_to(points[0], points.shape)).mean(0)


def probe_points(x, points, test_x, test_points) -> dict[str, float]:
    """As probe_pose, where only 2-D points are known, such as a detector's, which are no truth (ours).

    points (n,21,2), in units of the box's longer side. Distances are shares of it, after a similarity.

      ridge_pa_2d_percent     ridge to the points aligned to their mean shape
      nearest_pa_2d_percent   the points of the nearest hand
      ridge_pck_5             share of the ridge's points that lie within 5 percent
      orientation_r2          ridge to the direction from wrist to middle knuckle
    """
    aligned = align_2d(points, np.broadcast_to(mean_shape(points, align_2d), points.shape))
    answer = ridge(x, np.concatenate([aligned.reshape(len(x), 42), orientation(points)], axis=1), test_x)
    pred = align_2d(answer[:, :42].reshape(-1, 21, 2), test_points)
    neighbour = align_2d(points[nearest(x, test_x)[0][:, 0]], test_points)
    distance, of_neighbour = (np.linalg.norm(found - test_points, axis=-1) for found in (pred, neighbour))
    return {"ridge_pa_2d_percent": 100 * float(distance.mean()),
            "nearest_pa_2d_percent": 100 * float(of_neighbour.mean()),
            "ridge_pck_5": float((distance < 0.05).mean()),
            "orientation_r2": r2(answer[:, 42:], orientation(test_points))}


# ------------------------------------------------------------------------------------------ during a training
class LiveProbe:
    """What an encoder knows while it is trained, on hands that are decoded once and kept.

    hands: a dataset like data.HandDataset of one index, with the labels joints and joints2d, or 2-D points
    alone. is_usable (N,): hands whose points are known. see: canvases -> views as the encoder sees them.
    align: as probe_pose's. runtime: its device, autocast(), and is_main, the process that decodes (in as many
    threads) and calls.

    LIVE_HANDS at most are fitted and tested; no pose or video is in both. They are always the same, so that
    runs can be compared. ValueError where there are too few.

    score: name of the number that says which encoder is the best; lower is better.
    """

    def __init__(self, hands, is_usable, see, align, runtime, threads=1):
        self.hands = hands
        self.see = see
        self.align = align
        self.runtime = runtime
        self.score = "probe_ridge_mm" if "joints" in hands.labels else "probe_ridge_percent"
        index = hands.indices[0]
        groups = hand_groups(index.pose_ids(), index.columns.get("video"))
        halves = [spread_rows(half[is_usable[half]], most)
                  for half, most in zip(split_groups(groups), LIVE_HANDS, strict=True)]
        if min(map(len, halves)) < LEAST_HANDS:
            raise ValueError(f"--probe {index.path}: {len(halves[0])} hands to fit on and {len(halves[1])} "
                             f"of other videos to test on: at least {LEAST_HANDS} are needed")
        if runtime.is_main:
            self._decode(np.concatenate(halves), np.repeat([True, False], list(map(len, halves))), threads)

    def _decode(self, rows, is_fitted, threads):
        """Keeps canvases and labels of the rows (M,) whose images can be read."""
        chunks = [rows[first:first + 64].tolist() for first in range(0, len(rows), 64)]
        whole = {}  # name -> values of all rows, filled chunk by chunk: large canvases are there only once
        with ThreadPoolExecutor(threads) as pool:
            for chunk, batch in enumerate(pool.map(self.hands.batch, chunks)):
                for name in ("failed", "canvas", *self.hands.labels):
                    value = batch[name]
                    whole.setdefault(name, value.new_empty(len(rows), *value.shape[1:]))
                    whole[name][64 * chunk:][:len(value)] = value
        is_read = whole.pop("failed") < 0
        if not is_read.all():
            whole = {name: value[is_read] for name, value in whole.items()}
        self.canvases = whole.pop("canvas").split(64)
        self.labels = {name: _to_numpy(value) for name, value in whole.items()}
        self.is_fitted = is_fitted[is_read.numpy()]
        if min(self.is_fitted.sum(), (~self.is_fitted).sum()) < LEAST_HANDS:
            raise ValueError(f"--probe {self.hands.indices[0].path}: {int((~is_read).sum())} of "
                             f"{len(is_read)} images could not be read")

    @torch.no_grad()
    def __call__(self, encoder):
        """The numbers of an encoder, for the log: ridge, nearest neighbour, orientation. Its mode stays."""
        is_training = encoder.training
        encoder.eval()
        features = []
        for canvas in self.canvases:
            views = self.see(canvas.to(self.runtime.device))
            with self.runtime.autocast():
                summary, feature_map = encoder.features(views)
            features.append(_to_numpy(pool_features(summary, feature_map)["both"]))
        encoder.train(is_training)
        known = [np.concatenate(features), *self.labels.values()]
        fit = [values[self.is_fitted] for values in known]
        test = [values[~self.is_fitted] for values in known]
        if "joints" in self.labels:
            found = probe_pose(*fit, *test, mean_shape(fit[1], self.align), self.align)
            ridge_error, neighbour_error = found["ridge_pa_mpjpe_mm"], found["nearest_pa_mpjpe_mm"]
        else:
            found = probe_points(*fit, *test)
            ridge_error, neighbour_error = found["ridge_pa_2d_percent"], found["nearest_pa_2d_percent"]
        return {self.score: ridge_error, self.score.replace("ridge", "neighbour"): neighbour_error,
                "probe_orientation_r2": found["orientation_r2"]}
