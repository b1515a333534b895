"""A hand through a video: where it is looked for next, when it is lost, its side, its shape, its smoothing.

Boxes (4,) are x0, y0, x1, y1 in pixel-EDGE coordinates. Times are seconds. Nothing looks ahead: what is said
of a frame depends on the frames up to it, so that a camera can be followed as it films.

Example::

    import numpy as np
    from tracking import OneEuro, jitter

    times = np.arange(90) / 30
    noise = 0.01 * np.random.default_rng(0).standard_normal((90, 1))
    smooth = OneEuro(cutoff=1.0, gain=1.0)
    values = np.array([smooth(value, time) for value, time in zip(noise, times)])
    track, frames = np.zeros(90), np.arange(90)
    assert jitter(values[:, None], track, frames) < 0.5 * jitter(noise[:, None], track, frames)

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
ROTATION_GAIN, PLACE_GAIN, SIZE_GAIN = 0.3, 3.0, 3.0  # hertz for a radian, a hand, a factor e a second
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
class OneEuro:
    """The 1-Euro filter (Casiez, Roussel, Vogel 2012, algorithm 1) of vectors (..., D) at any times.

    A low-pass filter of the first order. Its cutoff is cutoff + gain |speed|, in hertz: slow motion is
    smoothed, fast motion is followed. The speed itself is smoothed at `speed_cutoff`. Ours: one speed for a
    vector, its length, so that nothing depends on the axes."""

    def __init__(self, cutoff: float, gain: float, speed_cutoff: float = 1.0):
        self.cutoff = cutoff
        self.gain = gain
        self.speed_cutoff = speed_cutoff
        self.time = None

    def __call__(self, value: np.ndarray, time: float, unit: float = 1.0) -> np.ndarray:
        """The smoothed value at a time later than all before. unit: of the values, in which speeds count."""
        if self.time is None:
            self.time, self.value, self.speed = time, value, 0.0
            return value
        step = time - self.time
        self.time = time
        way = self.way(self.value, value)
        speed = way / (step * unit)
        self.speed = self.speed + _alpha(self.speed_cutoff, step) * (speed - self.speed)
        length = np.linalg.norm(self.speed, axis=-1, keepdims=True)
        self.value = self.moved(self.value, _alpha(self.cutoff + self.gain * length, step) * way)
        return self.value

    def way(self, start, end):
        return end - start

    def moved(self, start, way):
        return start + way


class OneEuroRotations(OneEuro):
    """The same of rotations (J,3,3): the way from one to another is an axis times an angle (J,3), speeds are
    radians a second. Ours."""

    def way(self, start, end):
        return Rotation.from_matrix(end @ start.transpose(0, 2, 1)).as_rotvec()

    def moved(self, start, way):
        return Rotation.from_rotvec(way).as_matrix() @ start


def _alpha(cutoff, step):
    """The share of the new value."""
    return 1 / (1 + 1 / (2 * np.pi * cutoff * step))


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
    frame, or None. smooth: see Tracks.

    Ours: the side is that of most votes; it changes where the other side leads by LEAD, because detectors
    take one for the other for frames on end. The shape is the mean of all estimates."""

    def __init__(self, number: int, smooth: float):
        self.number = number
        self.smooth = smooth
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
            self._restart()
        self._look_at(np.asarray(box, float))
        self.longest = None  # that of the mesh that will be seen
        self.points = points
        self.missed = 0
        self.votes[side] += 1
        if self.side is None or self.votes[side] >= self.votes[self.side] + LEAD:
            self.side = side
            self.shapes, self.shape = 0, np.zeros(10)  # that of its mirror image is another
            self._restart()

    def _look_at(self, box):
        self.box = box
        self.is_new = True  # the box is not that of a mesh
        self.doubted = 0

    def _restart(self):
        """Nothing is smoothed across a loss."""
        cutoff = 1 / self.smooth if self.smooth else np.inf
        self.rotations = OneEuroRotations(cutoff, ROTATION_GAIN)
        self.place = OneEuro(cutoff, PLACE_GAIN)
        self.size = OneEuro(cutoff, SIZE_GAIN)

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

    def held_shape(self, betas):
        """The mean of all betas (10,) so far."""
        self.shapes += 1
        self.shape = self.shape + (betas - self.shape) / self.shapes
        return self.shape

    def smoothed(self, rotmats, camera, crop, time):
        """rotmats (16,3,3) and camera (3,) of a crop (4,), smoothed in the picture."""
        if not self.smooth:
            return rotmats, camera
        x0, y0, x1, y1 = crop
        half = (x1 - x0) / 2
        middle = np.array([x0 + x1, y0 + y1]) / 2
        wrist = middle + half * camera[0] * camera[1:]  # pixels
        # Speeds count in hands, so that the same motion is as fast near the camera as far away.
        wrist = self.place(wrist, time, longer_side(self.box))
        scale = np.exp(self.size(np.log([half * camera[0]]), time))[0]  # pixels a metre
        camera = np.array([scale / half, *((wrist - middle) / scale)])
        return self.rotations(rotmats, time), camera


class Tracks:
    """All hands of a video. smooth: 1 / smooth hertz is the cutoff of the smoothing at rest; 0: none.

    asks_often: `find` is asked in every frame, because boxes of detectors and people are better than those of
    the last mesh. False: it is asked while no hand is followed."""

    def __init__(self, smooth: float, asks_often: bool):
        self.smooth = smooth
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
                self.all.append(Track(len(self.all), self.smooth))
            (lost or self.all)[-1].find(box, *said)

    def _drop_twins(self):
        """Two tracks that came to follow one hand: the younger is lost."""
        live = self.live()
        for number, track in enumerate(live):
            if any(overlap(track.box, older.box) > TWICE for older in live[:number] if older.box is not None):
                track.box = None
