"""What lies behind a thing that is photographed: walls, rooms, desks, plants, people, all drawn from random
numbers; or a cut of somebody's photograph.

Colours are sRGB 0..1, pictures float32 with their channels first. The recipe is ours: what stood behind the
hands on some hundred photographs, as plain as it can be drawn.

Example::

    import numpy as np
    from PIL import Image
    from rooms import random_room

    skin = np.array([[0.8, 0.6, 0.5]])
    room = random_room(np.random.default_rng(0), 160, skin)  # (3, 160, 160)
    Image.fromarray((255 * room.transpose(1, 2, 0)).astype(np.uint8)).save("room.png")

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WALLS = np.array([(236, 234, 230), (218, 212, 202), (200, 204, 208), (228, 216, 190), (182, 186, 184),
                  (208, 182, 176), (180, 196, 206), (124, 124, 128), (64, 64, 70), (152, 134, 114)]) / 255
THINGS = np.array([(28, 28, 32), (58, 60, 68), (240, 240, 238), (150, 102, 62), (192, 142, 86), (96, 60, 38),
                   (122, 124, 128), (40, 60, 110), (150, 44, 44), (54, 92, 62), (204, 164, 64)]) / 255
CLOTHS = np.array([(22, 22, 26), (22, 22, 26), (44, 46, 54), (40, 54, 92), (120, 120, 124), (230, 228, 224),
                   (130, 40, 44), (60, 84, 64), (96, 130, 170)]) / 255
WOODS = np.array([(150, 102, 62), (192, 142, 86), (96, 60, 38), (206, 180, 140), (225, 222, 216)]) / 255
LEAVES = np.array([(60, 110, 40), (96, 146, 58), (40, 80, 36), (130, 150, 70), (120, 100, 70)]) / 255
HAIR = np.array([(20, 16, 16), (52, 36, 26), (110, 78, 46), (180, 150, 102), (150, 150, 150)]) / 255
f4 = np.float32


class _Canvas:
    """A square picture to draw on. Places run from 0 to 1, x to the right and y down."""

    def __init__(self, rng, side):
        self.rng = rng
        self.side = side
        self.picture = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.picture)

    def color(self, colors, spread=0.04):
        """One of the colours (K, 3), varied in brightness and in hue."""
        color = colors[self.rng.integers(len(colors))]
        color = color * np.exp(self.rng.normal(0, 2 * spread)) + self.rng.normal(0, spread, 3)
        return color.clip(0, 1)

    def box(self, left, top, right, bottom, color):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def polygon(self, corners, color):
        self.pen.polygon([(x * self.side, y * self.side) for x, y in corners], fill=_rgb(color))

    def ellipse(self, x, y, across, up, color):
        corners = np.array([x - across, y - up, x + across, y + up]) * self.side
        self.pen.ellipse(corners.tolist(), fill=_rgb(color))

    def line(self, ends, color, width):
        ends = [(x * self.side, y * self.side) for x, y in ends]
        self.pen.line(ends, fill=_rgb(color), width=max(1, round(width * self.side)))


def _rgb(color):
    return tuple(int(c) for c in np.clip(255 * np.asarray(color), 0, 255))


def random_room(rng: np.random.Generator, side: int, tones: np.ndarray) -> np.ndarray:
    """(3, side, side) sRGB: a wall, a room, a desk, plants or a person before one of them.

    tones (M, 3): colours of people's skin.
    """
    canvas = _Canvas(rng, 2 * side)  # averaged afterwards, which smooths the edges
    kind = ("wall", "room", "desk", "plants", "person")[rng.choice(5, p=(0.24, 0.26, 0.13, 0.13, 0.24))]
    canvas.box(0, 0, 1, 1, canvas.color(WALLS))
    tilt = rng.normal(0, 7)
    grain = rng.uniform(0, 0.03)
    if kind == "room" or (kind != "wall" and rng.random() < 0.5):
        _furniture(canvas)
    elif rng.random() < 0.5:
        _edges(canvas)
    if kind == "desk":
        _desk(canvas)
        tilt = rng.uniform(-180, 180)
    elif kind == "plants":
        grain = _plants(canvas)
    elif kind == "person":
        _person(canvas, tones[rng.integers(len(tones))])
    return _seen_from_the_side(canvas, side, tilt, grain)


def _seen_from_the_side(canvas, side, tilt, grain):
    """A part of the canvas, turned by `tilt` degrees, in uneven light, with grain, more or less blurred."""
    rng = canvas.rng
    angle = np.deg2rad(tilt)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * rng.uniform(0.25, 0.42)
    corners = corners * np.exp(rng.normal(0, 0.08, (4, 2)))
    corners = np.einsum("kj,ij->ki", corners, turn)
    corners *= min(1, 0.5 / np.abs(corners).max())
    corners += 0.5 + rng.uniform(-1, 1, 2) * (0.5 - np.abs(corners).max())
    quad = (corners * 2 * side).ravel().tolist()
    size = (side, side)
    picture = canvas.picture.transform(size, Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)
    radius = (0, 0.4, 1.0, 2.2)[rng.integers(4)] * side / 160
    if radius:
        picture = picture.filter(ImageFilter.GaussianBlur(radius))

    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, side, dtype=f4)])
    slope = rng.normal(0, 0.12, 2)
    glow = np.exp(f4(slope[0]) * x + f4(slope[1]) * y)
    noise = Image.fromarray(rng.integers(0, 256, (side // 2, side // 2), dtype=np.uint8))
    noise = np.asarray(noise.resize((side, side), Image.Resampling.BILINEAR), f4) / f4(127.5) - 1
    image = np.asarray(picture, f4).transpose(2, 0, 1) * f4(1 / 255)
    return np.ascontiguousarray((image * glow * (1 + f4(2 * grain) * noise)).clip(0, 1))


# ----------------------------------------------------------------------------------------------------- things
def _edges(canvas):
    """A corner of the room, a door frame or a skirting board: lines over the whole wall."""
    rng = canvas.rng
    for _ in range(rng.integers(1, 4)):
        place = rng.random()
        color = canvas.color(WALLS)
        if rng.random() < 0.6:
            canvas.box(place, 0, place + rng.choice([0.02, 0.05, 1.0]), 1, color)
        else:
            canvas.box(0, place, 1, place + rng.choice([0.02, 1.0]), color)


def _furniture(canvas):
    rng = canvas.rng
    if rng.random() < 0.6:
        top = rng.uniform(0.55, 0.85)
        floor = canvas.color(np.concatenate([WOODS, WALLS]))
        canvas.box(0, top, 1, 1, floor)
        if rng.random() < 0.5:
            for x in np.arange(-1, 2, rng.uniform(0.06, 0.2)):  # planks
                canvas.line([(x, 1), (0.5 + 0.4 * (x - 0.5), top)], 0.75 * floor, 0.003)
    makers = (_window, _window, _shelf, _screen, _radiator, _door, _door, _chairs, _frame)
    for _ in range(rng.integers(2, 7)):
        left, top = rng.uniform(-0.2, 0.85, 2)
        width, height = rng.uniform(0.12, 0.55, 2)
        makers[rng.integers(len(makers))](canvas, left, top, left + width, top + height)


def _window(canvas, left, top, right, bottom):
    rng = canvas.rng
    canvas.box(left - 0.015, top - 0.015, right + 0.015, bottom + 0.015, canvas.color(WALLS))
    pane = canvas.color(np.array([(1, 1, 1), (0.95, 0.98, 1), (0.7, 0.82, 0.95), (0.1, 0.12, 0.18)]))
    canvas.box(left, top, right, bottom, pane)
    bar = canvas.color(WALLS)
    if rng.random() < 0.4:  # blinds
        for y in np.arange(top, bottom, 0.02):
            canvas.line([(left, y), (right, y)], 0.85 * pane, 0.006)
    for x in np.linspace(left, right, rng.integers(2, 5)):
        canvas.line([(x, top), (x, bottom)], bar, 0.014)
    for y in np.linspace(top, bottom, rng.integers(2, 5)):
        canvas.line([(left, y), (right, y)], bar, 0.014)


def _shelf(canvas, left, top, right, bottom):
    rng = canvas.rng
    canvas.box(left, top, right, bottom, 0.6 * canvas.color(WOODS))
    board = canvas.color(WOODS)
    for y in np.linspace(top, bottom, rng.integers(2, 5))[1:]:
        x = left
        while x < right:  # books
            width = rng.uniform(0.008, 0.035)
            if rng.random() < 0.85:
                height = rng.uniform(0.05, 0.11)
                canvas.box(x, y - height, min(x + width, right), y, canvas.color(THINGS, 0.08))
            x += width
        canvas.box(left, y, right, y + 0.015, board)


def _screen(canvas, left, top, right, bottom):
    rng = canvas.rng
    canvas.box(left, top, right, bottom, 0.15 * np.ones(3))
    lit = canvas.color(np.array([(0.04, 0.04, 0.05), (0.75, 0.85, 0.95), (0.1, 0.2, 0.4)]))
    canvas.box(left + 0.015, top + 0.015, right - 0.015, bottom - 0.015, lit)
    for y in np.arange(top + 0.04, bottom - 0.03, 0.025):  # lines of text
        end = left + 0.03 + rng.random() * (right - left - 0.06)
        canvas.line([(left + 0.03, y), (end, y)], 0.6 * lit, 0.006)


def _radiator(canvas, left, top, right, bottom):
    color = canvas.color(WALLS[:3])
    canvas.box(left, top, right, bottom, 0.55 * color)
    for x in np.arange(left, right, 0.045):
        canvas.box(x, top, x + 0.028, bottom, color)


def _door(canvas, left, top, right, bottom):
    """A door, a cupboard, a curtain: from its top to the floor."""
    color = canvas.color(np.concatenate([WOODS, WALLS, THINGS]))
    canvas.box(left - 0.02, top - 0.02, right + 0.02, 1, canvas.color(WALLS))
    canvas.box(left, top, right, 1, color)
    if canvas.rng.random() < 0.4:  # folds
        for x in np.arange(left, right, 0.03):
            canvas.line([(x, top), (x, 1)], color * canvas.rng.uniform(0.7, 1.1), 0.012)


def _chairs(canvas, left, top, right, bottom):
    """Rows of small dark things on legs."""
    color = canvas.color(THINGS[:2])
    for y in np.arange(top, bottom, 0.1):
        for x in np.arange(left, right, 0.11) + 0.05 * canvas.rng.random():
            canvas.box(x, y, x + 0.07, y + 0.05, color)
            canvas.line([(x, y), (x, y + 0.09)], color, 0.008)
            canvas.line([(x + 0.07, y), (x + 0.07, y + 0.09)], color, 0.008)


def _frame(canvas, left, top, right, bottom):
    """A picture or a board on the wall."""
    canvas.box(left, top, right, bottom, canvas.color(THINGS))
    canvas.box(left + 0.015, top + 0.015, right - 0.015, bottom - 0.015, canvas.color(WALLS))
    for _ in range(canvas.rng.integers(4)):
        x, y = canvas.rng.uniform((left, top), (right, bottom))
        canvas.ellipse(x, y, 0.04, 0.05, canvas.color(THINGS))


def _desk(canvas):
    rng = canvas.rng
    wood = canvas.color(WOODS)
    canvas.box(0, 0, 1, 1, wood)
    for y in np.cumsum(rng.exponential(0.03, 60)):  # its grain
        shade = rng.uniform(0.85, 1.08)
        canvas.line([(0, y), (0.5, y + rng.normal(0, 0.01)), (1, y)], wood * shade, rng.uniform(0.003, 0.02))
    for _ in range(rng.integers(5)):
        left, top = rng.uniform(0, 0.8, 2)
        kind = rng.integers(4)
        if kind == 0:  # paper
            slant = rng.normal(0, 0.1)
            corners = [(left, top), (left + 0.3, top + slant), (left + 0.3 - slant, top + slant + 0.4),
                       (left - slant, top + 0.4)]
            canvas.polygon(corners, canvas.color(WALLS[:3]))
        elif kind == 1:  # a keyboard
            key = canvas.color(THINGS[:3])
            canvas.box(left, top, left + 0.5, top + 0.19, 0.7 * key)
            for y in np.arange(top + 0.01, top + 0.17, 0.035):
                for x in np.arange(left + 0.01, left + 0.47, 0.035):
                    canvas.box(x, y, x + 0.028, y + 0.028, key)
        elif kind == 2:  # a cup
            color = canvas.color(THINGS)
            canvas.ellipse(left, top, 0.08, 0.08, color)
            canvas.ellipse(left, top, 0.065, 0.065, 0.6 * color)
        else:  # a pen, a cable
            ends = [(left, top), tuple(rng.random(2)), tuple(rng.random(2))][:rng.integers(2, 4)]
            canvas.line(ends, canvas.color(THINGS), rng.uniform(0.005, 0.02))


def _plants(canvas):
    """Grass, a path and bushes. Returns how strong their grain is."""
    rng = canvas.rng
    top = rng.uniform(-0.6, 0.5)
    canvas.box(0, top, 1, 1, canvas.color(LEAVES[:4]))
    if rng.random() < 0.4:
        x = rng.random(4)
        canvas.polygon([(x[0], top), (x[1], top), (x[2], 1), (x[3], 1)], canvas.color(WALLS[-3:]))
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(0, 1, 2)
        spread = rng.uniform(0.06, 0.25)
        leaf = canvas.color(LEAVES)
        size = rng.uniform(0.008, 0.03)
        for dx, dy, shade in zip(*rng.normal(0, spread, (2, 80)), rng.uniform(0.5, 1.5, 80), strict=True):
            canvas.ellipse(x + dx, y + dy, size, size * rng.uniform(0.4, 1), leaf * shade)
    return rng.uniform(0.06, 0.16)


def _person(canvas, skin):
    """Somebody's chest, neck and face, out of the middle."""
    rng = canvas.rng
    x = rng.uniform(0.1, 0.9)
    head = rng.uniform(0.1, 0.17)  # its half width
    y = rng.uniform(0.05, 0.5)  # the middle of the face
    shoulder = y + 2 * head
    wide = 2.3 * head
    cloth = canvas.color(CLOTHS, 0.03)
    canvas.box(x - 0.5 * head, y, x + 0.5 * head, shoulder + 0.3 * head, 0.8 * skin)
    canvas.polygon([(x - 0.5 * head, shoulder - 0.2 * head), (x + 0.5 * head, shoulder - 0.2 * head),
                    (x + wide, shoulder + 0.5 * head), (x + 1.3 * wide, 1), (x - 1.3 * wide, 1),
                    (x - wide, shoulder + 0.5 * head)], cloth)
    pattern = rng.random()
    if pattern < 0.25:  # checks
        other = canvas.color(CLOTHS)
        for step in np.arange(-1, 1, 0.25) * wide:
            canvas.line([(x + step, shoulder + 0.5 * head), (x + step, 1)], other, 0.012)
        for below in np.arange(shoulder + 0.5 * head, 1, 0.25 * wide):
            canvas.line([(x - wide, below), (x + wide, below)], other, 0.012)
    elif pattern < 0.4:  # a print
        for step in np.arange(-0.5, 0.5, 0.2) * wide:
            canvas.box(x + step, shoulder + head, x + step + 0.1 * wide, shoulder + 1.4 * head,
                       canvas.color(THINGS))
    for side in (-1, 1):  # folds
        fold = [(x + side * wide * rng.uniform(0.2, 1), shoulder + head), (x + side * wide * rng.random(), 1)]
        canvas.line(fold, cloth * rng.uniform(0.6, 1.5), 0.01)
    hair = canvas.color(HAIR, 0.02)
    canvas.ellipse(x, y - 0.25 * head, 1.12 * head, 1.3 * head, hair)
    canvas.ellipse(x, y + 0.1 * head, head, 1.25 * head, skin)
    for side in (-0.4, 0.4):
        canvas.ellipse(x + side * head, y - 0.1 * head, 0.16 * head, 0.09 * head, 0.3 * skin)
        brow = y - 0.35 * head
        ends = [(x + (side - 0.2) * head, brow), (x + (side + 0.2) * head, brow)]
        canvas.line(ends, hair, 0.1 * head)
    canvas.line([(x, y), (x, y + 0.35 * head)], 0.85 * skin, 0.12 * head)
    mouth = y + 0.7 * head
    canvas.line([(x - 0.3 * head, mouth), (x + 0.3 * head, mouth)], skin * [0.8, 0.5, 0.5], 0.14 * head)
    if rng.random() < 0.3:  # a beard
        canvas.ellipse(x, y + 1.1 * head, 0.6 * head, 0.3 * head, hair)


# ------------------------------------------------------------------------------------------------ photographs
def cut_of(rng: np.random.Generator, photograph: Image.Image, side: int) -> np.ndarray:
    """(3, side, side): a square cut at random out of an RGB photograph, at least half as wide as it, mirrored
    half of the times."""
    shorter = min(photograph.size)
    width = shorter * rng.uniform(0.5, 1)
    left = (photograph.width - width) * rng.random()
    top = (photograph.height - width) * rng.random()
    box = (left, top, left + width, top + width)
    cut = photograph.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=2)
    image = np.asarray(cut, f4).transpose(2, 0, 1) * f4(1 / 255)
    return np.ascontiguousarray(image[:, :, ::-1] if rng.random() < 0.5 else image)
