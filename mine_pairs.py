"""Similar hands from other videos (SiMHand, arXiv 2502.15251): the nearest neighbours of every hand in pose.

Reads the detector's `keypoints` and `keypoints_score` of indices (data.py), or with --labelled their
`joints2d`. Each hand becomes 42 numbers without place and size, and 14 numbers by PCA. Its neighbours are the
nearest by Euclidean distance among the hands of OTHER videos; the search is exact. Writes pairs.npz, and
beside it pairs.png (random hands with their neighbours) and distances.png.

  idx         (N,K) int32    rows of the neighbours, nearest first, in the indices one after the other;
                             -1: there is none
  dist        (N,K) float32  their distances; inf: there is none
  mean (42,), components (14,42), explained (14,)     the PCA
  fingerprint                of indices and keypoints: pretrain_contrastive.py refuses the pairs of others
  format                     number of this format
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import PAIRS_FORMAT, HandDataset, HandIndex, index_fingerprint, mirror
from draw import curve, draw_joints, grid, histogram, save_image
from metrics import procrustes
from runtime import check_ranges, finish, parser, run, setup
from saving import save_arrays

CELL = 256  # points of a cell at most; measured, 128 to 512 are as fast
SMALLEST = 1e-3  # a hand whose points lie closer than this has no shape
ROUNDING = 1e-5  # of float32 products, relative to the squared lengths that go into them
BLANK = 255  # grey of the tile of a neighbour that does not exist


# ------------------------------------------------------------------------------------------------------- pose
def normalise_pose(keypoints):
    """(N,21,2) points of right hands, any unit -> (N,42): minus the wrist, over their size.

    The size is the root mean square distance of the other 20 to the wrist. Rows with points that are not
    finite or that coincide become NaN. In-plane rotation stays (ours; the paper's choice is unknown)."""
    points = np.asarray(keypoints, np.float64)
    points = points - points[:, :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt((points[:, 1:] ** 2).sum(2).mean(1))  # (N,)
        points = np.where((size >= SMALLEST)[:, None, None], points / size[:, None, None], np.nan)
    is_finite = np.isfinite(points).all((1, 2))
    return np.where(is_finite[:, None], points.reshape(len(points), 42), np.nan)


def principal(keypoints, components):
    """PCA without whitening of normalise_pose(keypoints): mean (42,), components (C,42) and explained (C,),
    their shares of the variance.

    The largest entry of each component is positive, so that the same data give the same axes."""
    hands = 0
    total = 0
    square = 0
    for part in _parts(keypoints):
        x = normalise_pose(part)
        x = x[np.isfinite(x).all(1)]
        hands = hands + len(x)
        total = total + x.sum(0)
        square = square + x.T @ x
    if hands < 2:
        raise ValueError(f"keypoints: only {hands} of {len(keypoints)} hands have 21 finite points: nothing "
                         "to mine")
    mean = total / hands
    values, vectors = np.linalg.eigh(square / hands - np.outer(mean, mean))  # ascending
    values = np.maximum(values, 0)
    axes = vectors.T[::-1][:components]
    largest = axes[np.arange(components), np.abs(axes).argmax(1)]  # (C,)
    axes = axes * np.sign(largest)[:, None]
    return mean, axes, values[::-1][:components] / max(values.sum(), 1e-30)


def _parts(array, rows=1 << 16):
    """The array in pieces whose float64 copies fit in memory."""
    return (array[start:start + rows] for start in range(0, len(array), rows))


# ----------------------------------------------------------------------------------------------------- search
def mine(keypoints, video_ids, neighbours=10, components=14, source_ids=None, share=(0, 1), workers=0,
         progress=False):
    """The nearest hands of other videos: a dict of arrays.

    idx (N,K) int32; dist (N,K) float32, the Euclidean distance of (normalise_pose(x) - mean) @ components.T;
    mean (42,), components (C,42), explained (C,). keypoints (N,21,2): right hands, any unit; a row with NaN
    has no neighbours and is nobody's neighbour.

    source_ids (N,): neighbours come from the same source. share (i, n): answers only for the i-th n-th of the
    hands, which is how several processes divide the work; idx and dist of the others stay -1 and inf.
    workers: threads, 0 for this process's cores."""
    keypoints = np.asarray(keypoints)
    videos = np.asarray(video_ids)
    sources = np.zeros(len(keypoints), int) if source_ids is None else np.asarray(source_ids)
    mean, axes, explained = principal(keypoints, components)
    x = np.concatenate([(normalise_pose(part) - mean) @ axes.T for part in _parts(keypoints)])  # (N, C)
    is_usable = np.isfinite(x).all(1)
    idx = np.full((len(x), neighbours), -1, np.int32)
    distance = np.full((len(x), neighbours), np.inf, np.float32)
    for source in np.unique(sources[is_usable]):
        rows = np.flatnonzero(is_usable & (sources == source))
        found, distance[rows] = nearest_others(x[rows], videos[rows], neighbours, share, workers, progress)
        idx[rows] = np.where(found >= 0, rows[found], -1)
    return {"idx": idx, "dist": distance, "mean": mean, "components": axes, "explained": explained}


def nearest_others(points, groups, neighbours, share=(0, 1), workers=0, progress=False):
    """For each of points (N,C) the nearest K = `neighbours` points of another group (N,); exact.

    Returns indices (N,K), -1 where there is none, and distances (N,K) float32, inf there; nearest first,
    equal distances by index. share, workers, progress: as in mine.

    The points are cut into cells of points that lie close. All points of a cell search together: matrix
    products with the cells around, nearest cell first, until the next cell is farther than every point's
    worst neighbour. Products are float32 with a margin for their rounding. Whatever passes is measured again
    in float64 (ours; a k-d tree would first return a video's own frames, which are thousands)."""
    search = _Search(points, groups, neighbours)
    cells = len(search.starts) - 1
    todo = range(cells * share[0] // share[1], cells * (share[0] + 1) // share[1])
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(workers or _cores(), **one_thread) as pool:
        done = pool.map(search.fill_cell, todo)
        list(tqdm(done, total=len(todo), unit="cell", disable=not progress, desc="neighbours"))
    idx = np.empty_like(search.found)
    distance = np.empty((len(points), neighbours), np.float32)
    idx[search.order] = search.found
    distance[search.order] = np.sqrt(search.square)
    return idx, distance


def _cores():
    """Cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _cut_into_cells(points):
    """Order (N,) of the points, and starts (M+1,) of their cells in it. Cells are halved across their widest
    axis until they have at most CELL points."""
    order = np.arange(len(points))
    starts = []
    todo = [(0, len(points))]
    while todo:
        start, stop = todo.pop()
        if stop - start <= CELL:
            starts.append(start)
            continue
        rows = order[start:stop]
        axis = np.ptp(points[rows], axis=0).argmax()
        half = (stop - start) // 2
        order[start:stop] = rows[np.argpartition(points[rows, axis], half)]
        todo += [(start, start + half), (start + half, stop)]
    return order, np.array(sorted(starts) + [len(points)])


class _Search:
    """What the threads share: points sorted by cells, boxes of the cells, and the answers. Each thread fills
    the answers of its own cells."""

    def __init__(self, points, groups, neighbours):
        self.order, self.starts = _cut_into_cells(points)
        self.points = points[self.order]  # (N, C)
        self.groups = groups[self.order]  # (N,)
        self.low = np.minimum.reduceat(self.points, self.starts[:-1])  # (M, C), corners of the cells' boxes
        self.high = np.maximum.reduceat(self.points, self.starts[:-1])
        _, group, members = np.unique(self.groups, return_inverse=True, return_counts=True)
        self.wanted = np.minimum(neighbours, len(points) - members[group])  # (N,) as many as there can be
        self.found = np.full((len(points), neighbours), -1, np.int64)
        self.square = np.full((len(points), neighbours), np.inf)  # squared distances

    def fill_cell(self, cell):
        """Fills `found` and `square` for the Q points of one cell."""
        queries = np.arange(self.starts[cell], self.starts[cell + 1])  # (Q,)
        cells, gaps = self._cells_by_gap(cell)
        rough = _RoughDistance(self.points[queries])
        nearest = _Nearest(self.wanted[queries], self.found.shape[1])
        done = 0
        at_once = 4
        while done < len(cells) and gaps[done] <= nearest.worst.max():
            some = slice(done, done + at_once)
            chosen = cells[some][gaps[some] <= nearest.worst.max()]
            done += at_once
            at_once = min(32, 2 * at_once)
            others = np.concatenate([np.arange(self.starts[c], self.starts[c + 1]) for c in chosen])  # (R,)
            square, margin = rough(self.points[others])  # (Q, R)
            limit = nearest.worst  # (Q,)
            if (limit == np.inf).any():
                limit = np.minimum(limit, self._rank_limit(square, queries, others) + 2 * margin)
            passes = square <= torch.from_numpy(limit + margin).float()[:, None]
            q, r = passes.nonzero().numpy().T  # (P,) each, into queries and others
            other = others[r]
            in_other_group = self.groups[queries[q]] != self.groups[other]
            q = q[in_other_group]
            other = other[in_other_group]
            exact = ((self.points[queries[q]] - self.points[other]) ** 2).sum(1)
            nearest.add(q, other, exact, self.order)
        self.found[queries[nearest.query], nearest.rank] = self.order[nearest.other]
        self.square[queries[nearest.query], nearest.rank] = nearest.square

    def _cells_by_gap(self, cell):
        """All cells (M,), and the squared distances (M,) of their boxes to this cell's, nearest first."""
        gap = np.maximum(self.low - self.high[cell], self.low[cell] - self.high)  # (M, C), by axis
        square = (np.maximum(gap, 0) ** 2).sum(1)
        cells = np.argsort(square, kind="stable")
        return cells, square[cells]

    def _rank_limit(self, square, queries, others):
        """(Q,) the K-th smallest of each row of square (Q,R) among points of other groups; inf where there
        are fewer. Sets those of the own group to inf."""
        same = torch.from_numpy(self.groups[queries][:, None] == self.groups[others])
        square[same] = torch.inf
        rank = min(self.found.shape[1], len(others))
        return square.kthvalue(rank, dim=1).values.double().numpy()


class _RoughDistance:
    """Squared distances from fixed points (Q,C) to others, by one float32 matrix product.

    |q - o|^2 = [-2 q, |q|^2, 1] . [o, 1, |o|^2], around the middle of the points: less rounding."""

    def __init__(self, points):
        self.middle = points.mean(0)
        centred = self._centred(points)
        self.length = (centred**2).sum(1, keepdim=True)
        self.left = torch.cat([-2 * centred, self.length, torch.ones_like(self.length)], 1)  # (Q, C + 2)

    def __call__(self, others):
        """others (R,C) -> squared distances (Q,R) and a bound of their rounding."""
        centred = self._centred(others)
        length = (centred**2).sum(1, keepdim=True)
        right = torch.cat([centred, torch.ones_like(length), length], 1)  # (R, C + 2)
        return self.left @ right.T, ROUNDING * (self.length.max() + length.max()).item()

    def _centred(self, points):
        return torch.from_numpy((points - self.middle).astype(np.float32))


class _Nearest:
    """The nearest points found so far for Q points: query, other, square (squared distance), rank, all (P,),
    sorted by query and distance.

    worst (Q,): squared distance of a query's last answer; inf while it wants more; -inf where it wants none.
    """

    def __init__(self, wanted, neighbours):
        self.wanted = wanted  # (Q,)
        self.neighbours = neighbours
        self.worst = np.where(wanted > 0, np.inf, -np.inf)
        self.query = np.empty(0, int)
        self.other = np.empty(0, int)
        self.square = np.empty(0)
        self.rank = np.empty(0, int)

    def add(self, query, other, square, order):
        """Merges candidates (P,); order: number of each point, which decides between equal distances."""
        query = np.concatenate([self.query, query])
        other = np.concatenate([self.other, other])
        square = np.concatenate([self.square, square])
        by_distance = np.lexsort([order[other], square, query])
        query = query[by_distance]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        kept = rank < self.neighbours
        self.query = query[kept]
        self.other = other[by_distance][kept]
        self.square = square[by_distance][kept]
        self.rank = rank[kept]
        is_last = self.rank == self.wanted[self.query] - 1
        self.worst[self.query[is_last]] = self.square[is_last]


# ---------------------------------------------------------------------------------------------------- indices
def read_poses(index, column, least_score):
    """Keypoints (N,21,2) of an index as right hands, NaN where a hand cannot be used, and {reason: hands}.

    column: "joints2d", or "keypoints" with the detector's scores: then a hand needs all 21 points and a mean
    score of `least_score`."""
    if column not in index.columns:
        mend = ("leave out --labelled" if column == "joints2d" else
                "detect them with prepare_data.py video, or use its labels with --labelled")
        raise ValueError(f"{index.path} has no column {column}: {mend}")
    rows = index.pose_ids()
    points = np.asarray(index.columns[column])[rows]
    if "side" in index.columns:
        is_left = np.asarray(index.columns["side"]) == 1
        points[is_left] = mirror(column, points[is_left])
    has_scores = column == "keypoints" and "keypoints_score" in index.columns
    score = np.asarray(index.columns["keypoints_score"])[rows] if has_scores else np.ones((len(index), 21))
    videos = np.asarray(index.columns["video"]) if "video" in index.columns else np.zeros(len(index), int)

    lacks_some = (score <= 0).any(1)
    is_unsure = (score.mean(1) < least_score) & ~lacks_some
    has_no_shape = np.concatenate([np.isnan(normalise_pose(part)[:, 0]) for part in _parts(points)])
    is_unknown = videos < 0
    points[lacks_some | is_unsure | has_no_shape | is_unknown] = np.nan
    reasons = {"with missing keypoints": lacks_some, f"with a mean score below {least_score}": is_unsure,
               "whose keypoints coincide": has_no_shape & ~lacks_some & ~is_unsure,
               "of unknown videos": is_unknown}
    return points, {reason: int(hands.sum()) for reason, hands in reasons.items()}


def read_videos(index):
    """(N,) the video of every hand; ValueError where there are not two."""
    if "video" not in index.columns or len(np.unique(index.columns["video"])) < 2:
        raise ValueError(f"{index.path}: all hands are of one video or of unknown ones: neighbours must come "
                         "from other videos")
    return np.asarray(index.columns["video"])


def true_joints(indices):
    """Labelled joints (N,21,3) of the hands as right ones, NaN where there are none; None without any. With
    them, what is mined can be checked."""
    if not any("joints" in index.columns for index in indices):
        return None
    found = []
    for index in indices:
        joints = np.full((len(index), 21, 3), np.nan)
        if "joints" in index.columns:
            joints[:] = np.asarray(index.columns["joints"])[index.pose_ids()]
        if "side" in index.columns:
            is_left = np.asarray(index.columns["side"]) == 1
            joints[is_left] = mirror("joints", joints[is_left])
        found.append(joints)
    return np.concatenate(found)


# ----------------------------------------------------------------------------------------------------- report
def pose_error(joints, rows, others):
    """Median PA-MPJPE in mm between the labelled hands of two lists of rows."""
    a = joints[rows]
    b = joints[others]
    is_known = np.isfinite(a).all((1, 2)) & np.isfinite(b).all((1, 2))
    if not is_known.any():
        return np.nan
    errors = [np.linalg.norm(procrustes(y, x) - x, axis=2).mean(1)
              for x, y in zip(_parts(a[is_known]), _parts(b[is_known]), strict=True)]
    return 1e3 * np.median(np.concatenate(errors))


def _draw_pairs(indices, column, found, seed, hands=8, neighbours=5, size=144):
    """Random hands, each in a row with its nearest neighbours, all as right hands, with the points that were
    compared, videos and distances."""
    dataset = HandDataset(indices, size, 1.5, (column,), substitute=False)
    paired = np.flatnonzero(found["idx"][:, 0] >= 0)
    tiles = []
    names = []
    for row in np.random.default_rng(seed).permutation(paired)[:hands]:
        for k, other in enumerate([row, *found["idx"][row, :neighbours]]):
            if other < 0:
                tiles.append(np.full((size, size, 3), BLANK, np.uint8))
                names.append("none")
                continue
            item = dataset[other]
            index, local = dataset.locate(other)
            canvas = item["canvas"].permute(1, 2, 0).numpy()
            tiles.append(draw_joints(canvas, (item[column] + 1) * size / 2 - 0.5))
            video = f"video {index.columns['video'][local]}"
            names.append(f"{video}, {found['dist'][row, k - 1]:.2f}" if k else f"{other}, {video}")
    return grid(tiles, neighbours + 1, names)


def _report(indices, points, found, reasons, column, args):
    """Prints what was mined and draws the pictures."""
    idx = found["idx"]
    is_used = np.isfinite(points).all((1, 2))
    is_paired = idx[:, 0] >= 0
    rng = np.random.default_rng(args.seed)
    some, random = rng.choice(np.flatnonzero(is_used), (2, 20000))  # random pairs of rows
    x = normalise_pose(points[some]) @ found["components"].T
    y = normalise_pose(points[random]) @ found["components"].T
    distances = {"nearest": found["dist"][:, 0], f"neighbour {args.neighbours}": found["dist"][:, -1],
                 "random": np.linalg.norm(x - y, axis=1)}
    distances = {name: values[np.isfinite(values)] for name, values in distances.items()}
    bins = np.linspace(0, np.quantile(distances["random"], 0.99), 60)
    series = {name: histogram(values, bins) for name, values in distances.items()}
    picture = curve(series, title="share of the pairs", x_label="distance")
    save_image(args.out.with_name("distances.png"), picture)
    save_image(args.out.with_name("pairs.png"), _draw_pairs(indices, column, found, args.seed))

    for reason in reasons[0]:
        hands = sum(of_index[reason] for of_index in reasons)
        if hands:
            print(f"left out: {hands} hands {reason}")
    alone = int((is_used & ~is_paired).sum())
    if alone:
        print(f"{alone} hands have no neighbour: all comparable hands are of their own video")
    busiest = np.bincount(idx[is_paired, 0]).max(initial=0)
    near, far, chance = (np.median(values) if len(values) else np.nan for values in distances.values())
    print(f"{args.out}: {int(is_paired.sum())} of {len(points)} hands paired; {args.components} components "
          f"hold {found['explained'].sum():.1%} of the variance; median distance {near:.3f} of the nearest, "
          f"{far:.3f} of neighbour {args.neighbours}, {chance:.3f} of random pairs; the most frequent "
          f"neighbour serves {busiest} hands; look at {args.out.with_name('pairs.png')}")
    joints = true_joints(indices)
    if joints is not None:
        first = some[idx[some, 0] >= 0]
        last = some[idx[some, -1] >= 0]
        print(f"labelled pose, median PA-MPJPE in mm: {pose_error(joints, first, idx[first, 0]):.2f} of the "
              f"nearest, {pose_error(joints, last, idx[last, -1]):.2f} of neighbour {args.neighbours}, "
              f"{pose_error(joints, some, random):.2f} of random pairs")


# ------------------------------------------------------------------------------------------------------- main
def _flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX",
                     help="indices of hands with keypoints and videos")
    cli.add_argument("--out", required=True, type=Path,
                     help="file to write, pairs.npz; pairs.png and distances.png are written beside it")
    cli.add_argument("--neighbours", type=int, default=10,
                     help="neighbours of each hand (default 10; training uses the first)")
    cli.add_argument("--components", type=int, default=14,
                     help="components of the PCA, 1 to 42 (default 14, as in the public code)")
    cli.add_argument("--least-score", type=float, default=0.5,
                     help="mean score of the keypoints below which a hand is left out, as is a hand that "
                          "lacks a keypoint (default .5, ours)")
    cli.add_argument("--labelled", action="store_true",
                     help="compare the labels joints2d instead of a detector's keypoints")
    cli.add_argument("--mix", action="store_true",
                     help="take neighbours from any index (default: from the hand's own, as published)")
    cli.add_argument("--workers", type=int, default=0, help="threads (default 0: this process's cores)")
    cli.add_argument("--seed", type=int, default=0, help="seed of the pictures alone: the mining is exact")
    return cli


def main(argv=None):
    args = _flags().parse_args(argv)
    check_ranges(args, {"neighbours": (1, 1000), "components": (1, 42), "least_score": (0, 1),
                        "workers": (0, 1024), "seed": (0, 2**31)})
    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: must end in .npz")
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists: choose another name or delete it first")
    runtime = setup(argparse.Namespace(device="cpu", precision="fp32"))
    column = "joints2d" if args.labelled else "keypoints"
    indices = [HandIndex(path) for path in args.data]
    poses = [read_poses(index, column, args.least_score) for index in indices]
    points = np.concatenate([pose for pose, _ in poses])  # (N, 21, 2)
    source = np.repeat(np.arange(len(indices)), [len(index) for index in indices])  # (N,)
    videos = np.concatenate([np.unique(read_videos(index), return_inverse=True)[1] for index in indices])
    # the same number in two indices is not the same video
    videos = videos.astype(np.int64) * len(indices) + source
    found = mine(points, videos, args.neighbours, args.components, None if args.mix else source,
                 (runtime.rank, runtime.world), args.workers, progress=runtime.is_main)
    if runtime.world > 1:  # what a process has not answered is -1 and inf
        dist.all_reduce(torch.from_numpy(found["idx"]), dist.ReduceOp.MAX)
        dist.all_reduce(torch.from_numpy(found["dist"]), dist.ReduceOp.MIN)
    if (found["idx"] < 0).all():
        raise ValueError("--data: all comparable hands are of one video: nothing to pair")
    if runtime.is_main:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        fingerprint = index_fingerprint([index.columns for index in indices], column)
        save_arrays(args.out, **found, fingerprint=fingerprint, format=PAIRS_FORMAT)
        _report(indices, points, found, [reasons for _, reasons in poses], column, args)
    finish()


if __name__ == "__main__":
    run(main)
