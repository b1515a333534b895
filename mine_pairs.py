"""Similar hands from other videos (SiMHand, arXiv 2502.15251): for every hand of the indices, its nearest neighbours in pose.

Reads the detector's `keypoints` and `keypoints_score` of indices (data.py), or with --labelled their `joints2d`. Each hand
becomes 42 numbers without place and size, these 14 by PCA, and its neighbours are the exact nearest by Euclidean distance among the
hands of OTHER videos. Writes pairs.npz and beside it pairs.png (random hands with their neighbours) and distances.png.

  idx         (N,K) int32    rows of the neighbours, nearest first, in the indices one after the other; -1: there is none
  dist        (N,K) float32  their distances; inf: there is none
  mean (42,), components (14,42), explained (14,)     the PCA
  fingerprint                of indices and keypoints: pretrain_contrastive.py refuses the pairs of others
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import HandDataset, HandIndex, index_fingerprint
from draw import curve, draw_joints, grid, histogram, save_image
from metrics import procrustes
from runtime import check_ranges, finish, parser, run, save_arrays, setup

LEAF = 256                                                         # points of a cell; measured, 128 to 512 are as fast
SMALLEST = 1e-3                                                    # a hand whose points lie closer than this has no shape


def normalise_pose(keypoints):
    """(N,21,2) points of right hands, any unit -> (N,42): minus the wrist, over the root mean square distance of the other 20 to it.
    Rows with points that are not finite or that coincide become NaN. In-plane rotation stays (method: ours; the paper's is unknown)."""
    points = np.asarray(keypoints, np.float64)
    points = points - points[:, :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((points[:, 1:] ** 2).sum(2).mean(1))       # (N,)
        points = np.where((scale >= SMALLEST)[:, None, None], points / scale[:, None, None], np.nan)
    return np.where(np.isfinite(points).all((1, 2))[:, None], points.reshape(len(points), 42), np.nan)


def principal(keypoints, components):
    """PCA without whitening of normalise_pose(keypoints): mean (42,), components (C,42), explained (C,) share of the variance. The
    largest entry of each component is positive, so that the same data give the same axes."""
    count, total, square = 0, 0, 0
    for x in map(normalise_pose, parts(keypoints)):
        x = x[np.isfinite(x).all(1)]
        count, total, square = count + len(x), total + x.sum(0), square + x.T @ x
    if count < 2:
        raise ValueError(f"keypoints: {count} of {len(keypoints)} hands have 21 finite points: nothing to mine")
    mean = total / count
    values, vectors = np.linalg.eigh(square / count - np.outer(mean, mean))
    axes = vectors.T[::-1][:components]
    axes = axes * np.sign(axes[np.arange(components), np.abs(axes).argmax(1)])[:, None]
    values = np.maximum(values, 0)
    return mean, axes, values[::-1][:components] / max(values.sum(), 1e-30)


def parts(array, rows=1 << 16):
    """The array in pieces, whose float64 copies fit in memory."""
    return (array[start:start + rows] for start in range(0, len(array), rows))


def mine(keypoints, video_ids, neighbours=10, components=14, source_ids=None, share=(0, 1), workers=0, progress=False):
    """The nearest hands of other videos: dict of idx (N,K) int32, dist (N,K) float32 = Euclidean distance of (normalise_pose(x) - mean)
    @ components.T, mean, components, explained. keypoints (N,21,2): right hands, any unit; a row with NaN has no neighbours and is none.

    source_ids (N,): neighbours are of the same source. share (i, n): answers only for the i-th n-th of the hands (idx and dist of
    the others stay -1 and inf), which is how several processes share the work. workers: threads, 0 this process's cores."""
    keypoints, videos = np.asarray(keypoints), np.asarray(video_ids)
    sources = np.zeros(len(keypoints), int) if source_ids is None else np.asarray(source_ids)
    mean, axes, explained = principal(keypoints, components)
    x = np.concatenate([(normalise_pose(part) - mean) @ axes.T for part in parts(keypoints)])                # (N, C)
    good = np.isfinite(x).all(1)
    idx, dist = np.full((len(x), neighbours), -1, np.int32), np.full((len(x), neighbours), np.inf, np.float32)
    for source in np.unique(sources[good]):
        rows = np.flatnonzero(good & (sources == source))
        found, distance = nearest_others(x[rows], videos[rows], neighbours, share, workers, progress)
        idx[rows], dist[rows] = np.where(found >= 0, rows[found], -1), distance
    return {"idx": idx, "dist": dist, "mean": mean, "components": axes, "explained": explained}


def nearest_others(points, groups, count, share=(0, 1), workers=0, progress=False):
    """Exact: for each of points (N,C) the `count` nearest of another group (N,): indices (N,count), -1 where there is none, and
    distances (N,count), inf there; nearest first, equal distances by index. share, workers, progress: as mine's.

    The points are cut into cells of neighbours. All points of a cell search together: matrix products with the cells around, nearest
    first, until the next cell is farther than every point's worst neighbour. Products are float32 with a margin for their rounding;
    whatever passes is measured again in float64 (ours; a k-d tree would have to return a video's own frames, thousands, first)."""
    search = Search(points, groups, count)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    todo = range(len(search.low) * share[0] // share[1], len(search.low) * (share[0] + 1) // share[1])
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(tqdm(pool.map(search.cell, todo), total=len(todo), unit="cell", disable=not progress, desc="neighbours"))
    idx, dist = np.empty_like(search.found), np.empty((len(points), count), np.float32)
    idx[search.order], dist[search.order] = search.found, np.sqrt(search.distance)
    return idx, dist


def cells(points):
    """Order (N,) of the points and starts (M+1,) of their cells in it: halved across the widest axis until LEAF points are left."""
    order, starts, todo = np.arange(len(points)), [], [(0, len(points))]
    while todo:
        a, b = todo.pop()
        if b - a <= LEAF:
            starts.append(a)
            continue
        part, middle = points[order[a:b]], (b - a) // 2
        axis = np.ptp(part, axis=0).argmax()
        order[a:b] = order[a:b][np.argpartition(part[:, axis], middle)]
        todo += [(a, a + middle), (a + middle, b)]
    return order, np.array(sorted(starts) + [len(points)])


class Search:
    """What the threads share: the points sorted by cells, the cells' boxes, and the answers, of which each fills its own cells'."""

    def __init__(self, points, groups, count):
        self.order, self.starts = cells(points)
        self.points, self.groups = points[self.order], groups[self.order]
        self.low, self.high = (f.reduceat(self.points, self.starts[:-1]) for f in (np.minimum, np.maximum))  # (M, C)
        which, sizes = np.unique(self.groups, return_inverse=True, return_counts=True)[1:]
        self.others = len(points) - sizes[which]                   # of another group than a point's
        self.found, self.distance = np.full((len(points), count), -1, np.int64), np.full((len(points), count), np.inf)

    def cell(self, cell):
        """Fills found and distance (squared) for the points of one cell."""
        a, b, count = self.starts[cell], self.starts[cell + 1], self.found.shape[1]
        gap = np.maximum(np.maximum(self.low - self.high[cell], self.low[cell] - self.high), 0)
        reach = (gap ** 2).sum(1)                                  # (M,) squared distance of the cells
        nearby = np.argsort(reach, kind="stable")
        centre = self.points[a:b].mean(0)                          # products around the cell's own centre: less rounding
        queries = torch.from_numpy((self.points[a:b] - centre).astype(np.float32))
        size = (queries ** 2).sum(1, keepdim=True)
        left = torch.cat([-2 * queries, size, torch.ones_like(size)], 1)                     # (Q, C + 2)
        row, near, apart = np.empty(0, int), np.empty(0, int), np.empty(0)                   # answers so far: of whom, who, squared
        need = np.minimum(count, self.others[a:b])                 # how many answers a point can have
        bound, at, step = np.where(need > 0, np.inf, -np.inf), 0, 4
        while at < len(nearby) and reach[nearby[at]] <= bound.max():
            chosen = nearby[at:at + step]
            chosen = chosen[reach[chosen] <= bound.max()]
            spans = [np.arange(self.starts[c], self.starts[c + 1]) for c in chosen]
            at, step, others = at + step, min(32, 2 * step), np.concatenate(spans)
            right = torch.from_numpy((self.points[others] - centre).astype(np.float32))
            far = (right ** 2).sum(1, keepdim=True)
            square = left @ torch.cat([right, torch.ones_like(far), far], 1).T               # (Q, R)
            margin = 1e-5 * (size.max() + far.max()).item()
            if (bound == np.inf).any():
                same = torch.from_numpy(self.groups[a:b, None] == self.groups[others])
                square[same] = torch.inf
                k = min(count, len(others))
                limit = square.kthvalue(k, dim=1).values.double().numpy()
                limit = np.minimum(limit + 2 * margin, bound)
            else:
                limit = bound
            r, c = (square <= torch.from_numpy(limit + margin).float()[:, None]).nonzero().numpy().T
            keep = self.groups[a + r] != self.groups[others[c]]
            r, c = r[keep], others[c[keep]]
            exact = ((self.points[a + r] - self.points[c]) ** 2).sum(1)
            row, near, apart = np.concatenate([row, r]), np.concatenate([near, c]), np.concatenate([apart, exact])
            sort = np.lexsort([self.order[near], apart, row])
            row, near, apart = row[sort], near[sort], apart[sort]
            rank = np.arange(len(row)) - np.searchsorted(row, row)
            keep = rank < count
            row, near, apart, rank = row[keep], near[keep], apart[keep], rank[keep]
            last = rank == need[row] - 1
            bound[row[last]] = apart[last]
        self.found[a + row, rank] = self.order[near]
        self.distance[a + row, rank] = apart


# ------------------------------------------------------------------------------------------------------------- indices
def read_poses(index, labelled, least):
    """Keypoints (N,21,2) of an index as right hands, NaN where a hand cannot be used, and {reason: how many}.

    labelled: take `joints2d`, else the detector's keypoints with its scores: a hand needs all 21, and a mean score of `least`."""
    name = "joints2d" if labelled else "keypoints"
    if name not in index.columns:
        raise ValueError(f"{index.path} has no column {name}: " + ("leave out --labelled" if labelled else
                         "detect them with prepare_data.py video, or use its labels with --labelled"))
    rows, none = index.pose_ids(), np.zeros(len(index), bool)
    points, missing, unsure = np.asarray(index.columns[name])[rows], none, none
    if not labelled and "keypoints_score" in index.columns:
        score = np.asarray(index.columns["keypoints_score"])[rows]
        missing, unsure = (score <= 0).any(1), score.mean(1) < least
    if "side" in index.columns:
        points[np.asarray(index.columns["side"]) == 1, :, 0] *= -1
    unknown = np.asarray(index.columns["video"]) < 0 if "video" in index.columns else none
    flat = np.concatenate([np.isnan(normalise_pose(part)[:, 0]) for part in parts(points)])
    points[missing | unsure | flat | unknown] = np.nan
    return points, {"with missing keypoints": int(missing.sum()), f"with a mean score below {least}": int((unsure & ~missing).sum()),
                    "whose keypoints coincide": int((flat & ~missing & ~unsure).sum()), "of unknown videos": int(unknown.sum())}


def video_ids(index):
    if "video" not in index.columns or len(np.unique(index.columns["video"])) < 2:
        raise ValueError(f"{index.path}: all hands are of one video or of unknown ones: neighbours must come from other videos")
    return np.asarray(index.columns["video"])


def draw_pairs(indices, points, found, seed, hands=8, neighbours=5, side=144):
    """Random hands, each in a row with its nearest neighbours, all as right hands, with the `points` that were compared, videos and
    distances."""
    dataset = HandDataset(indices, side, 1.5, (points,), substitute=False)
    tiles, names = [], []
    for row in np.random.default_rng(seed).permutation(np.flatnonzero(found["idx"][:, 0] >= 0))[:hands]:
        for k, other in enumerate([row, *found["idx"][row, :neighbours]]):
            if other < 0:
                tiles.append(np.full((side, side, 3), 255, np.uint8))
                names.append("none")
                continue
            item, (index, local) = dataset[other], dataset.locate(other)
            tiles.append(draw_joints(item["canvas"].permute(1, 2, 0).numpy(), (item[points] + 1) * side / 2 - 0.5))
            video = f"video {index.columns['video'][local]}"
            names.append(f"{video}, {found['dist'][row, k - 1]:.2f}" if k else f"{other}, {video}")
    return grid(tiles, neighbours + 1, names)


def main(argv=None):
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX", help="hands with keypoints and videos")
    cli.add_argument("--out", required=True, type=Path, help="pairs.npz; pairs.png and distances.png are written beside it")
    cli.add_argument("--neighbours", type=int, default=10, help="how many for each hand (default 10; training uses the first)")
    cli.add_argument("--components", type=int, default=14, help="of the PCA, 1 to 42 (default 14, as in the public code)")
    cli.add_argument("--least-score", type=float, default=0.5,
                     help="hands whose keypoints have a lower mean score are left out (default .5, ours), as are those that lack any")
    cli.add_argument("--labelled", action="store_true", help="compare the labels joints2d instead of a detector's keypoints")
    cli.add_argument("--mix", action="store_true", help="neighbours from any index; default from the hand's own, as in the paper's code")
    cli.add_argument("--workers", type=int, default=0, help="threads; 0 takes this process's cores")
    cli.add_argument("--seed", type=int, default=0, help="of the pictures alone: mining is exact")
    args = cli.parse_args(argv)
    check_ranges(args, {"neighbours": (1, 1000), "components": (1, 42), "least_score": (0, 1), "workers": (0, 1024), "seed": (0, 2**31)})
    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: must end in .npz")
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists: choose another name or delete it first")
    runtime = setup(argparse.Namespace(device="cpu", precision="fp32"))
    indices = [HandIndex(path) for path in args.data]
    poses = [read_poses(index, args.labelled, args.least_score) for index in indices]
    points, sizes = np.concatenate([pose for pose, _ in poses]), [len(index) for index in indices]
    source = np.repeat(np.arange(len(indices)), sizes)
    videos = np.concatenate([np.unique(video_ids(index), return_inverse=True)[1] for index in indices])
    videos = videos.astype(np.int64) * len(indices) + source      # the same number in two indices is not the same video
    found = mine(points, videos, args.neighbours, args.components, None if args.mix else source, (runtime.rank, runtime.world),
                 args.workers, progress=runtime.is_main)
    if runtime.world > 1:                                          # what a process has not answered is -1 and inf
        for name, how in (("idx", dist.ReduceOp.MAX), ("dist", dist.ReduceOp.MIN)):
            dist.all_reduce(torch.from_numpy(found[name]), how)
    if (found["idx"] < 0).all():
        raise ValueError("--data: all comparable hands are of one video: nothing to pair")
    if runtime.is_main:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        name = "joints2d" if args.labelled else "keypoints"
        save_arrays(args.out, **found, fingerprint=index_fingerprint([index.columns for index in indices], name))
        report(indices, points, found, [reasons for _, reasons in poses], args)
    finish()


def true_joints(indices):
    """Labelled joints (N,21,3) of right hands, NaN where there are none; None without any: what is mined can then be checked."""
    if not any("joints" in index.columns for index in indices):
        return None
    found = []
    for index in indices:
        joints = np.full((len(index), 21, 3), np.nan)
        if "joints" in index.columns:
            joints[:] = np.asarray(index.columns["joints"])[index.pose_ids()]
        if "side" in index.columns:
            joints[np.asarray(index.columns["side"]) == 1, :, 0] *= -1
        found.append(joints)
    return np.concatenate(found)


def pose_error(joints, rows, others):
    """Median PA-MPJPE in mm between the labelled hands of two lists of rows."""
    a, b = joints[rows], joints[others]
    known = np.isfinite(a).all((1, 2)) & np.isfinite(b).all((1, 2))
    errors = [np.linalg.norm(procrustes(b, a) - a, axis=2).mean(1) for a, b in zip(parts(a[known]), parts(b[known]), strict=True)]
    return 1e3 * np.median(np.concatenate([*errors, []])) if known.any() else np.nan


def report(indices, points, found, reasons, args):
    """Prints what was mined and draws the pictures."""
    used, paired = np.isfinite(points).all((1, 2)), found["idx"][:, 0] >= 0
    some = np.random.default_rng(args.seed).choice(np.flatnonzero(used), (2, 20000))
    x, y = (normalise_pose(points[rows]) @ found["components"].T for rows in some)
    chance = np.linalg.norm(x - y, axis=1)
    first, last = (found["dist"][:, k][np.isfinite(found["dist"][:, k])] for k in (0, -1))
    bins = np.linspace(0, np.quantile(chance, 0.99), 60)
    series = {"nearest": histogram(first, bins), f"neighbour {args.neighbours}": histogram(last, bins), "random": histogram(chance, bins)}
    save_image(args.out.with_name("distances.png"), curve(series, title="share of the pairs", x_label="distance"))
    compared = "joints2d" if args.labelled else "keypoints"
    save_image(args.out.with_name("pairs.png"), draw_pairs(indices, compared, found, args.seed))
    for name in reasons[0]:
        if count := sum(each[name] for each in reasons):
            print(f"left out: {count} hands {name}")
    if alone := int((used & ~paired).sum()):
        print(f"{alone} hands have no neighbour: all comparable hands are of their own video")
    hub = np.bincount(found["idx"][paired, 0]).max(initial=0)
    near, far = (np.median(values) if len(values) else np.nan for values in (first, last))
    print(f"{args.out}: {int(paired.sum())} of {len(points)} hands paired; {args.components} components hold "
          f"{found['explained'].sum():.1%} of the variance; median distance {near:.3f} of the nearest, {far:.3f} of neighbour "
          f"{args.neighbours}, {np.median(chance):.3f} of random pairs; the most frequent neighbour serves {hub} hands; "
          f"look at {args.out.with_name('pairs.png')}")
    joints, rows = true_joints(indices), some[0][found["idx"][some[0], 0] >= 0]
    if joints is not None:
        last = rows[found["idx"][rows, -1] >= 0]
        print(f"labelled pose, median PA-MPJPE in mm: {pose_error(joints, rows, found['idx'][rows, 0]):.2f} of the nearest, "
              f"{pose_error(joints, last, found['idx'][last, -1]):.2f} of neighbour {args.neighbours}, "
              f"{pose_error(joints, *some):.2f} of random pairs")


if __name__ == "__main__":
    run(main)
