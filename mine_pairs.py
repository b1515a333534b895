"""Similar hands from other videos (SiMHand, arXiv 2502.15251): the nearest neighbours of every hand in pose.

Reads the detector's `keypoints` and `keypoints_score` of indices (data.py), or with --labelled their
`joints2d`. Each hand becomes 42 numbers without place and size, and 14 numbers by PCA. Its neighbours are the
nearest by Euclidean distance among the hands of OTHER videos; the search is exact. Writes pairs.npz, and
beside it pairs.png (random hands with their neighbours) and pairs_distances.png.

  idx         (N,K) int32    rows of the neighbours, nearest first, in the indices one after the other;
                             -1: there is none
  dist        (N,K) float32  their distances; inf: there is none
  mean (42,), components (14,42), explained (14,)     the PCA
  fingerprint                of indices and keypoints: pretrain_contrastive.py refuses the pairs of others
  format                     number of this format
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import PAIRS_FORMAT, HandDataset, HandIndex, index_fingerprint, mirror
from draw import curve, draw_joints, grid, histogram, save_image
from metrics import procrustes
from runtime import check_ranges, cores, finish, parser, run, setup
from saving import check_writable, save_arrays, staged_folder

LEAF = 32  # points of a leaf
CELL = 16  # leaves of a cell
TOGETHER = {"cpu": 1}  # leaves that search together; elsewhere a cell's, since starting a product costs more
NEAR_CELLS = 8  # cells that are searched before the others
FIRST_LEAVES = 32  # leaves of the first product; each next one has four times as many
MOST_LEAVES = 512  # leaves of a product: its result stays in the cache
SMALLEST = 1e-3  # a hand whose points lie closer than this has no shape
ROUNDING = 1e-5  # of float32 products, relative to the squared lengths that go into them
TWIN = 1e-6  # distance of two hands below which they are one picture
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
         progress=False, device="cpu", least_distance=0.0):
    """The nearest hands of other videos: a dict of arrays.

    idx (N,K) int32; dist (N,K) float32, the Euclidean distance of (normalise_pose(x) - mean) @ components.T;
    mean (42,), components (C,42), explained (C,). keypoints (N,21,2): right hands, any unit; a row with NaN
    has no neighbours and is nobody's neighbour.

    source_ids (N,): neighbours come from the same source. share (i, n): answers only for the i-th n-th of the
    hands, which is how several processes divide the work; idx and dist of the others stay -1 and inf.
    workers: threads, 0 for this process's cores. device: of the products; the answer is the same.
    least_distance: nearer hands are passed over, because they may be the same picture in another video."""
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
        found, distance[rows] = nearest_others(x[rows], videos[rows], neighbours, share, workers, progress,
                                               device, least_distance)
        idx[rows] = np.where(found >= 0, rows[found], -1)
    return {"idx": idx, "dist": distance, "mean": mean, "components": axes, "explained": explained}


def nearest_others(points, groups, neighbours, share=(0, 1), workers=0, progress=False, device="cpu",
                   least_distance=0.0):
    """For each of points (N,C) the nearest K = `neighbours` points of another group (N,); exact.

    Returns indices (N,K), -1 where there is none, and distances (N,K) float32, inf there; nearest first,
    equal distances by index. share, workers, progress, device, least_distance: as in mine.

    The points are cut into leaves of points that lie close; consecutive leaves make a cell. Points that lie
    close search together: matrix products with the leaves around, nearest first, until the next leaf is
    farther than every point's worst neighbour. The boxes of the cells tell which leaves can be near at all.
    Products are float32 with a margin for their rounding. Whatever passes is measured again in float64 (ours;
    a k-d tree would first return a video's own frames, which are thousands)."""
    search = _Search(points, groups, neighbours, torch.device(device), least_distance)
    cells = len(search.cell_low)
    todo = range(cells * share[0] // share[1], cells * (share[0] + 1) // share[1])
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(workers or cores(), **one_thread) as pool:
        done = pool.map(search.fill_cell, todo)
        list(tqdm(done, total=len(todo), unit="cell", disable=not progress, desc="neighbours"))
    idx = np.empty_like(search.found)
    distance = np.empty((len(points), neighbours), np.float32)
    idx[search.order] = search.found
    distance[search.order] = np.sqrt(search.square)
    return idx, distance


def _sort_into_leaves(points):
    """Order (N,) of the points in which each LEAF consecutive ones, from the first on, lie close together.

    Parts are cut across their widest axis. The left side gets a power of two of leaves, so that 2, 4, 8 ...
    consecutive leaves lie close as well."""
    order = np.arange(len(points))
    points = points.copy()  # sorted along, so that each part lies in one piece
    todo = [(0, len(points))]
    while todo:
        start, stop = todo.pop()
        leaves = -(-(stop - start) // LEAF)
        if leaves < 2:
            continue
        part = points[start:stop]
        axis = (part.max(0) - part.min(0)).argmax()
        half = LEAF << ((leaves - 1).bit_length() - 1)
        rows = np.argpartition(part[:, axis], half)
        points[start:stop] = part[rows]
        order[start:stop] = order[start:stop][rows]
        todo += [(start, start + half), (start + half, stop)]
    return order


def _boxes(low, high, size):
    """Corners of the boxes around each `size` consecutive boxes with corners low, high (N,C)."""
    starts = np.arange(0, len(low), size)
    return np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)


def _gaps(low, high, lows, highs):
    """Squared distances (M,) of a box with corners (C,) to others with corners (M,C)."""
    gap = np.maximum(np.maximum(lows - high, low - highs), 0)  # (M, C), by axis
    return np.einsum("mc,mc->m", gap, gap)


def _consecutive(firsts, count, stop):
    """firsts (F,) -> the numbers first * count ... first * count + count - 1 of each, those below `stop`."""
    numbers = (firsts[:, None] * count + np.arange(count)).ravel()
    return numbers[numbers < stop]


def _passing(square, limit):
    """Where square (Q,R) is at most limit (Q,1): numbers (P,) into the flattened square."""
    if square.device.type == "cpu":  # numpy is several times as fast as torch
        return np.flatnonzero(square.numpy() <= limit.numpy())
    return (square <= limit).flatten().nonzero()[:, 0].cpu().numpy()


class _Search:
    """What the threads share: points sorted by leaves, boxes of leaves and of cells, and the answers. Each
    thread fills the answers of its own cells."""

    def __init__(self, points, groups, neighbours, device, least_distance):
        self.least = least_distance**2
        self.order = _sort_into_leaves(points)
        self.points = points[self.order]  # (N, C)
        self.groups = groups[self.order]  # (N,)
        self.low, self.high = _boxes(self.points, self.points, LEAF)  # (M, C) each
        self.cell_low, self.cell_high = _boxes(self.low, self.high, CELL)
        self.together = TOGETHER.get(device.type, CELL)

        # |q - o|^2 = [-2 q, |q|^2, 1] . [o, 1, |o|^2], around the middle of all points: less rounding
        size, axes = points.shape
        wide = torch.zeros(len(self.low) * LEAF, axes + 2)
        wide[:size, :axes] = torch.from_numpy(self.points - points.mean(0))
        length = torch.linalg.vector_norm(wide[:, :axes], dim=1) ** 2
        wide[:, axes] = 1
        wide[:, axes + 1] = length
        wide[size:, axes + 1] = torch.inf  # the last leaf may lack points
        self.leaves = wide.view(len(self.low), -1).to(device)  # (M, LEAF * (C + 2)), the right factors
        self.margin = 2 * ROUNDING * length.max().item()

        _, group, members = np.unique(self.groups, return_inverse=True, return_counts=True)
        self.wanted = np.minimum(neighbours, len(points) - members[group])  # (N,) as many as there can be
        self.found = np.full((len(points), neighbours), -1, np.int64)
        self.square = np.full((len(points), neighbours), np.inf)  # squared distances

    def fill_cell(self, cell):
        """Fills `found` and `square` for the points of one cell."""
        gaps = _gaps(self.cell_low[cell], self.cell_high[cell], self.cell_low, self.cell_high)
        cells = np.argsort(gaps, kind="stable")
        end = min((cell + 1) * CELL, len(self.low))
        for leaf in range(cell * CELL, end, self.together):
            self._fill_leaves(leaf, min(leaf + self.together, end), cells, gaps[cells])

    def _fill_leaves(self, leaf, end, cells, cell_gaps):
        """The same for the Q points of the leaves from `leaf` to before `end`. cells: all, nearest first."""
        queries = np.arange(leaf * LEAF, min(end * LEAF, len(self.points)))  # (Q,)
        low = self.low[leaf:end].min(0)
        high = self.high[leaf:end].max(0)
        own = self.leaves.view(-1, low.size + 2)[queries[0]:queries[-1] + 1]
        coordinates, one, length = own.split([low.size, 1, 1], dim=1)
        left = torch.cat([-2 * coordinates, length, one], dim=1)  # (Q, C + 2)
        nearest = _Nearest(self.wanted[queries], self.found.shape[1])
        # A few cells first: afterwards the worst neighbours tell which others are in reach.
        for some in (slice(0, NEAR_CELLS), slice(NEAR_CELLS, None)):
            in_reach = cells[some][cell_gaps[some] <= nearest.worst.max()]
            leaves = _consecutive(in_reach, CELL, len(self.low))
            gaps = _gaps(low, high, self.low[leaves], self.high[leaves])
            by_gap = np.flatnonzero(gaps <= nearest.worst.max())
            by_gap = by_gap[np.argsort(gaps[by_gap], kind="stable")]
            at_once = FIRST_LEAVES
            while len(by_gap):
                self._compare(queries, left, leaves[by_gap[:at_once]], nearest)
                by_gap = by_gap[at_once:]
                by_gap = by_gap[gaps[by_gap] <= nearest.worst.max()]
                at_once = min(MOST_LEAVES, 4 * at_once)
        self.found[queries[nearest.query], nearest.rank] = self.order[nearest.other]
        self.square[queries[nearest.query], nearest.rank] = nearest.square

    def _compare(self, queries, left, leaves, nearest):
        """Measures queries (Q,), factors `left`, against the R points of some leaves; adds to `nearest` what
        may be an answer."""
        chosen = torch.from_numpy(leaves).to(left.device)
        right = self.leaves.index_select(0, chosen).view(-1, left.shape[1])  # (R, C + 2)
        square = left @ right.T  # (Q, R)

        limit = nearest.worst + self.margin  # (Q,)
        if (limit == np.inf).any():
            limit = np.minimum(limit, self._rank_limit(square, queries, leaves) + 2 * self.margin)
        limit = torch.from_numpy(limit[:, None]).float().to(square.device)
        q, r = np.divmod(_passing(square, limit), len(right))  # (P,) each, into queries and points of leaves
        other = leaves[r // LEAF] * LEAF + r % LEAF
        exists = other < len(self.points)
        q = q[exists]
        other = other[exists]
        in_other_group = self.groups[queries[q]] != self.groups[other]
        q = q[in_other_group]
        other = other[in_other_group]
        if len(q):
            exact = ((self.points[queries[q]] - self.points[other]) ** 2).sum(1)
            kept = exact >= self.least
            nearest.add(q[kept], other[kept], exact[kept], self.order)

    def _rank_limit(self, square, queries, leaves):
        """(Q,) the K-th smallest of each row of square (Q,R) among points of other groups; inf where there
        are fewer."""
        rows = np.minimum(_consecutive(leaves, LEAF, np.inf), len(self.points) - 1)  # (R,)
        same = self.groups[queries][:, None] == self.groups[rows]
        square = square.masked_fill(torch.from_numpy(same).to(square.device), torch.inf)
        if self.least:
            square = square.masked_fill(square < self.least + self.margin, torch.inf)
        rank = min(self.found.shape[1], len(rows))
        return square.kthvalue(rank, dim=1).values.cpu().double().numpy()


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


def _report(indices, points, found, reasons, column, args, pictures):
    """Prints what was mined and draws the two pictures: of pairs, of distances."""
    idx = found["idx"]
    is_used = np.isfinite(points).all((1, 2))
    is_paired = idx[:, 0] >= 0
    rng = np.random.default_rng(args.seed)
    some, random = rng.choice(np.flatnonzero(is_used), (2, 20000))  # random pairs of rows
    x = normalise_pose(points[some]) @ found["components"].T
    y = normalise_pose(points[random]) @ found["components"].T
    distances = {"the nearest": found["dist"][:, 0], f"neighbour {args.neighbours}": found["dist"][:, -1],
                 "random pairs": np.linalg.norm(x - y, axis=1)}
    distances = {name: values[np.isfinite(values)] for name, values in distances.items()}
    bins = np.linspace(0, np.quantile(distances["random pairs"], 0.99), 60)
    series = {name: histogram(values, bins) for name, values in distances.items()}
    picture = curve(series, title="share of the pairs", x_label="distance")
    save_image(pictures[0], _draw_pairs(indices, column, found, args.seed))
    save_image(pictures[1], picture)

    for reason in reasons[0]:
        hands = sum(of_index[reason] for of_index in reasons)
        if hands:
            print(f"left out: {hands} hands {reason}")
    twins = int((found["dist"][:, 0] < TWIN).sum())
    if twins:
        print(f"warning: {twins} hands have a neighbour with the very same points. Is a picture in two "
              "videos? --least-distance .01 passes such neighbours over")
    alone = int((is_used & ~is_paired).sum())
    if alone:
        print(f"{alone} hands have no neighbour: all comparable hands are of their own video")
    busiest = np.bincount(idx[is_paired, 0]).max(initial=0)
    medians = {name: np.median(values) for name, values in distances.items() if len(values)}
    text = ", ".join(f"{median:.3f} of {name}" for name, median in medians.items())
    print(f"{args.out}: {int(is_paired.sum())} of {len(points)} hands paired; {args.components} components "
          f"hold {found['explained'].sum():.1%} of the variance; median distance {text}; the most "
          f"frequent neighbour serves {busiest} hands; look at {args.out.with_suffix('.png')}")
    joints = true_joints(indices)
    if joints is not None:
        first = some[idx[some, 0] >= 0]
        last = some[idx[some, -1] >= 0]
        errors = {"the nearest": pose_error(joints, first, idx[first, 0]),
                  f"neighbour {args.neighbours}": pose_error(joints, last, idx[last, -1]),
                  "random pairs": pose_error(joints, some, random)}
        text = ", ".join(f"{error:.2f} of {name}" for name, error in errors.items() if np.isfinite(error))
        print(f"labelled pose, median PA-MPJPE in mm: {text}")


# ------------------------------------------------------------------------------------------------------- main
def _flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX",
                     help="indices of hands with keypoints and videos")
    cli.add_argument("--out", required=True, type=Path,
                     help="file to write, pairs.npz; pairs.png and pairs_distances.png are written beside it")
    cli.add_argument("--neighbours", type=int, default=10,
                     help="neighbours of each hand (default 10; training uses the first)")
    cli.add_argument("--least-distance", type=float, default=0.0,
                     help="neighbours that are nearer are passed over (default 0; .01 where pictures come "
                          "twice, in two videos)")
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
    cli.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"],
                     help="device of the products; the pairs are the same. auto: cuda where there is one")
    cli.add_argument("--seed", type=int, default=0, help="seed of the pictures alone: the mining is exact")
    return cli


def main(argv=None):
    args = _flags().parse_args(argv)
    check_ranges(args, {"neighbours": (1, 1000), "components": (1, 42), "least_score": (0, 1),
                        "least_distance": (0, 1e3), "workers": (0, 1024), "seed": (0, 2**31)})
    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: must end in .npz")
    names = [args.out.name, f"{args.out.stem}.png", f"{args.out.stem}_distances.png"]
    for path in map(args.out.with_name, names):
        if path.exists():
            raise ValueError(f"--out: {path} exists: choose another name or folder, or delete it first")
    check_writable(args.out.parent)
    runtime = setup(argparse.Namespace(device=args.device, precision="fp32"))
    column = "joints2d" if args.labelled else "keypoints"
    indices = [HandIndex(path) for path in args.data]
    poses = [read_poses(index, column, args.least_score) for index in indices]
    points = np.concatenate([pose for pose, _ in poses])  # (N, 21, 2)
    source = np.repeat(np.arange(len(indices)), [len(index) for index in indices])  # (N,)
    videos = np.concatenate([np.unique(read_videos(index), return_inverse=True)[1] for index in indices])
    # the same number in two indices is not the same video
    videos = videos.astype(np.int64) * len(indices) + source
    found = mine(points, videos, args.neighbours, args.components, None if args.mix else source,
                 (runtime.rank, runtime.world), args.workers, runtime.is_main, runtime.device,
                 args.least_distance)
    if runtime.world > 1:  # what a process has not answered is -1 and inf
        for name, one_of_all in (("idx", dist.ReduceOp.MAX), ("dist", dist.ReduceOp.MIN)):
            answers = torch.from_numpy(found[name]).to(runtime.device)
            dist.all_reduce(answers, one_of_all)
            found[name] = answers.cpu().numpy()
    if (found["idx"] < 0).all():
        raise ValueError("--data: all comparable hands are of one video: nothing to pair")
    if runtime.is_main:
        fingerprint = index_fingerprint([index.columns for index in indices], column)
        with staged_folder(args.out.parent) as folder:
            file, *pictures = (folder / name for name in names)
            _report(indices, points, found, [reasons for _, reasons in poses], column, args, pictures)
            save_arrays(file, **found, fingerprint=fingerprint, format=PAIRS_FORMAT)
    finish()


if __name__ == "__main__":
    run(main)
