"""A hand through a video: where it is looked for next, when it is lost, its side, its smoothing.

Boxes (4,) are x0, y0, x1, y1 in pixel-EDGE coordinates. Times are seconds. Tracks do not look ahead: what
they say of a frame depends on the frames up to it. The smoothing does, so that it does not lag.

Example::

    import numpy as np
    from tracking import jitter, smooth

    frames = np.arange(90)
    noise = 0.01 * np.random.default_rng(0).standard_normal((90, 1, 2))
    smoothed = smooth(noise, times=frames / 30, seconds=0.05)
    track = np.zeros(90)
    assert jitter(smoothed, track, frames) < 0.2 * jitter(noise, track, frames)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

SMALLEST = 8  # pixels of a hand's longer side
DOUBT = 0.13  # of a box's longer side: estimates of one network that differ by more are those of no hand
PATIENCE = 10  # frames in a row that a hand is followed in doubt,
MISSES = 30  # and while a detector sees none: it may be worse than the network
LEAD = 3  # votes
DRIFT = 1.7  # times the size at which a hand was last found, from which it is looked at again
SAME = 0.3  # share of two boxes (intersection over union) from which they are of one hand
TWICE = 0.7  # ... from which two tracks follow one hand


# ------------------------------------------------------------------------------------------------------ boxes
def box_around(points: np.ndarray) -> np.ndarray:
    """The tight box (4,) of points (N,2)."""
    return np.concatenate([points.min(0), points.max(0)])


def longer_side(box) -> float:
    return float(max(box[2] - box[0], box[3] - box[1]))


def common_area(a, b) -> float:
    """The area that two boxes share."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(max(width, 0) * max(height, 0))


def box_area(box) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def overlap(a, b) -> float:
    """Intersection over union, 0 to 1, of the squares around two boxes: those of hands seen edge-on are thin,
    and hardly meet."""
    a, b = (np.tile((box[:2] + box[2:]) / 2, 2) + np.array([-1, -1, 1, 1]) * longer_side(box) / 2
            for box in (a, b))
    common = common_area(a, b)
    return common / max(box_area(a) + box_area(b) - common, 1e-9)


def is_gone(box, before, crop, size) -> bool:
    """True where a hand's new box cannot be followed. before: its last box, or None; crop (4,): what the
    network saw; size: (width, height) of the picture.

    Ours. Most of it lies outside the picture, or it is no larger than a few pixels. Within one frame it
    became half or twice as large, or a quarter of it lies where the network saw nothing: no hand does so."""
    if not np.isfinite(box).all() or longer_side(box) < SMALLEST:
        return True
    in_picture = common_area(box, np.array([0, 0, *size], float)) / box_area(box)
    in_crop = common_area(box, np.asarray(crop, float)) / box_area(box)
    growth = 1.0 if before is None else longer_side(box) / longer_side(before)
    return in_picture < 0.5 or in_crop < 0.75 or not 0.5 < growth < 2


# -------------------------------------------------------------------------------------------------- smoothing
def smooth(values: np.ndarray, times: np.ndarray, seconds: float) -> np.ndarray:
    """Values (N,...) at rising times (N,) -> means of those around each, with the weights of a Gaussian whose
    deviation is `seconds`.

    Ours: values count in pairs, one before and one after, as they lie on the line between them. So steady
    motion stays as it is. Near the ends the window is narrower; the first and the last value stay."""
    flat = values.reshape(len(values), -1).astype(float)
    total = flat.copy()
    weights = np.ones((len(values), 1))
    for reach in range(1, (len(values) + 1) // 2):
        before, here, after = times[:-2 * reach], times[reach:-reach], times[2 * reach:]
        weight = np.exp(-0.5 * ((after - before) / 2 / seconds) ** 2)[:, None]
        if weight.max() < 1e-3:
            break
        share = ((here - before) / (after - before))[:, None]
        between = flat[:-2 * reach] + share * (flat[2 * reach:] - flat[:-2 * reach])
        total[reach:-reach] += 2 * weight * between
        weights[reach:-reach] += 2 * weight
    return (total / weights).reshape(values.shape)


def smooth_rotations(rotmats: np.ndarray, times: np.ndarray, seconds: float) -> np.ndarray:
    """The same of rotations (N,J,3,3), by the means of their quaternions."""
    quats = Rotation.from_matrix(rotmats.reshape(-1, 3, 3)).as_quat().reshape(*rotmats.shape[:2], 4)
    turned_over = (quats[1:] * quats[:-1]).sum(2) < 0  # q and -q are one rotation
    quats[1:] *= np.cumprod(np.where(turned_over, -1, 1), axis=0)[..., None]
    quats = smooth(quats, times, seconds)
    return Rotation.from_quat(quats.reshape(-1, 4)).as_matrix().reshape(rotmats.shape)


def jitter(points: np.ndarray, tracks: np.ndarray, frames: np.ndarray) -> float:
    """Mean acceleration of the points (M,J,D) of hands, in their unit a frame squared: |p(t+1) - 2 p(t) +
    p(t-1)| where a track has three frames in a row; NaN where none has. tracks, frames (M,): numbers."""
    order = np.lexsort((frames, tracks))
    points, tracks, frames = points[order], tracks[order], frames[order]
    follows = (tracks[2:] == tracks[:-2]) & (frames[2:] - frames[:-2] == 2)
    acceleration = points[2:] - 2 * points[1:-1] + points[:-2]
    return float(np.linalg.norm(acceleration[follows], axis=-1).mean()) if follows.any() else float("nan")


# ----------------------------------------------------------------------------------------------------- tracks
class Track:
    """One hand. box: where it is; None while it is lost. points: what a detector said beside a box in this
    frame, or None. part: a number that changes where the hand was lost, or found elsewhere.

    Ours: the side is that of most votes; it changes where the other side leads by LEAD, because detectors
    take one for the other for frames on end."""

    def __init__(self, number: int):
        self.number = number
        self.part = 0
        self.votes = Counter()
        self.side = None
        self.box = None
        self.points = None
        self.doubted = 0  # frames in a row in which the network's estimates differ
        self.missed = 0  # looks in a row in which a detector saw no hand here

    def is_doubtful(self):
        return self.box is None or self.doubted > 0 or self.missed > 0

    def find(self, box, side, points=None):
        """Takes what a detector sees: where the hand is, and a vote for its side."""
        if self.box is None or overlap(self.box, box) <= SAME:
            self.part += 1
        self._look_at(np.asarray(box, float))
        self.longest = None  # that of the mesh that will be seen
        self.points = points
        self.missed = 0
        self.votes[side] += 1
        if self.side is None or self.votes[side] >= self.votes[self.side] + LEAD:
            self.side = side
            self.part += 1

    def _look_at(self, box):
        self.box = box
        self.is_new = True  # the box is not that of a mesh
        self.doubted = 0

    def miss(self):
        """A detector looked and saw no hand here."""
        self.missed += 1
        if self.missed > MISSES:
            self.box = None

    def follow(self, box, crop, size, doubt):
        """Takes the box of a new estimate; False where the hand is lost, or has to be looked at again.

        doubt: how far the network's last two estimates differ, as a share of the box's longer side. A crop
        that follows its own mesh can shrink or grow from frame to frame, until it shows something else. So a
        hand of another size than where it was found is looked at again at that size, and then believed."""
        if is_gone(box, None if self.is_new else self.box, crop, size):
            self.box = None
            return False
        side = longer_side(box)
        if self.longest and not 1 / DRIFT < side / self.longest < DRIFT:
            if not self.is_new:
                centre = (box[:2] + box[2:]) / 2
                self._look_at(np.concatenate([centre - self.longest / 2, centre + self.longest / 2]))
                return False
            self.longest = side
        self.longest = self.longest or side
        self.box = box
        self.is_new = False
        self.doubted = self.doubted + 1 if doubt > DOUBT else 0
        if self.doubted > PATIENCE:
            self.box = None
        return self.box is not None


class Tracks:
    """All hands of a video.

    asks_often: `find` is asked in every frame, because boxes of detectors and people are better than those of
    the last mesh. False: it is asked while no hand is followed."""

    def __init__(self, asks_often: bool):
        self.asks_often = asks_often
        self.all = []

    def step(self, size: tuple[int, int], see: Callable, ask: Callable) -> list:
        """The hands of the next frame: [(track, what `see` said of it)].

        size: width and height of the frame. see([track, ...]) looks where tracks are, and returns for each
        (box, crop, doubt, anything): see Track.follow. ask() is a detector, see find. It is asked
        before, or else after, where the last hand was lost; what it finds is looked at then."""
        picture = np.array([0, 0, *size], float)
        for track in self.all:
            track.points = None
        for track in self.live():
            if not common_area(track.box, picture):  # frames of a folder may differ in size
                track.box = None
        is_asked = self.asks_often or not self.live()
        if is_asked:
            self.find(ask())
        seen = self._follow(self.live(), size, see)
        if not is_asked and not self.live():
            self.find(ask())
        done = [track for track, _ in seen]
        seen += self._follow([track for track in self.live() if track not in done], size, see)
        self._drop_twins()
        return [(track, said) for track, said in seen if track.box is not None]

    def _follow(self, tracks, size, see):
        if not tracks:
            return []
        return [(track, said) for track, (box, crop, doubt, said) in zip(tracks, see(tracks), strict=True)
                if track.follow(box, crop, size, doubt)]

    def live(self):
        return [track for track in self.all if track.box is not None]

    def find(self, hands: list | None):
        """Takes what a detector sees in a frame: [(box, side)], sides "right" or "left", or [(box, side,
        points)]. None: it did not look.

        A box goes to the track that it overlaps most; else to one of its side that is lost or in doubt, the
        latest first; else it begins a track."""
        if hands is None:
            return
        free = list(self.all)
        strangers = []
        for box, *said in hands:
            box = np.asarray(box, float)
            live = [track for track in free if track.box is not None and overlap(track.box, box) > SAME]
            if live:
                best = max(live, key=lambda track, box=box: overlap(track.box, box))
                free.remove(best)
                best.find(box, *said)
            else:
                strangers.append((box, *said))
        for track in free:
            if track.box is not None:
                track.miss()
        for box, *said in strangers:
            lost = [track for track in free if track.side == said[0] and track.is_doubtful()]
            if lost:
                free.remove(lost[-1])
            else:
                self.all.append(Track(len(self.all)))
            (lost or self.all)[-1].find(box, *said)

    def _drop_twins(self):
        """Two tracks that came to follow one hand: the younger is lost."""
        live = self.live()
        for number, track in enumerate(live):
            if any(overlap(track.box, older.box) > TWICE for older in live[:number] if older.box is not None):
                track.box = None
