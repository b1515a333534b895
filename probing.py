"""Probing: what frozen features know, without fine-tuning. Features and labels in, numbers out.

    encode           batches -> features of the class token, of the patches' mean, of both, and raw pixels
    probe_pose       ridge regression and the nearest neighbour from a feature to the pose of the hand
    leave_one_out    k-NN accuracy, where images have classes and no poses
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

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

PROBE_WINDOW = 1.3  # side of a probe's view over the longer side of the box; the view is upright
PROBE_HANDS = 10_000  # at most so many hands are fitted, and tested
STRENGTHS = 10.0 ** np.arange(-5, 2)  # of the ridge
TEMPERATURE = 0.07  # of a neighbour's vote (Wu et al. 2018, facebookresearch/dino eval_knn.py)
WRIST = 0
MIDDLE_KNUCKLE = 9
FINGERS = np.array([[WRIST, k, k + 1, k + 2, k + 3] for k in (1, 5, 9, 13, 17)])  # wrist to tip, thumb first


# --------------------------------------------------------------------------------------------------- features
@torch.no_grad()
def encode(encoders: dict[str, Callable], batches: Iterable[dict], make_views: Callable,
           labels: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Frozen encoders over batches -> features and labels, in the order of the batches' rows.

    encoders: name -> callable, views (B,3,S,S) in [0,1] -> summary (B,D), map (B,D,h,w); networks in eval
    mode. batches: dicts of tensors. make_views: batch -> views. labels: names of entries of the batches.

    Returns ({(name, feature): (N,D)}, {label: (N,...)}), float64. The features of an encoder are "class" (its
    summary), "mean" (of the map) and "both" (N,2D). ("pixels", "raw") is the view at 16 x 16 pixels.
    """
    features = {}
    found = {name: [] for name in labels}
    for batch in batches:
        views = make_views(batch)
        for name, encoder in encoders.items():
            for feature, value in pool_features(*encoder(views)).items():
                features.setdefault((name, feature), []).append(_to_numpy(value))
        pixels = F.interpolate(views, 16, mode="area").flatten(1)  # (B, 768)
        features.setdefault(("pixels", "raw"), []).append(_to_numpy(pixels))
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
