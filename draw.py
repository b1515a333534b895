"""How every stage shows its work: a rasteriser without OpenGL, mesh overlays, skeletons, grids, curves.

numpy and Pillow only. Images are (H, W, 3) uint8, RGB. All of it is ours.

Example::

    import numpy as np
    from draw import curve, grid, overlay, save_image

    points = np.array([[10, 50, 1.0], [54, 52, 1.2], [30, 8, 0.9]])    # x, y in pixels, depth
    faces = np.array([[0, 1, 2]])
    photograph = np.full((64, 64, 3), 200, np.uint8)
    triangle = overlay(photograph, points, faces)
    steps = np.arange(100)
    chart = curve({"loss": (steps, np.exp(-steps / 30))}, title="loss", x_label="step")
    save_image("example.png", grid([triangle, chart], columns=2, labels=["triangle", "curve"]))

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import colorsys
import itertools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Bones of the 21 joints in FreiHAND order (0 wrist, then thumb, index, middle, ring, little, base to tip):
# first joint, second joint, finger. One colour a finger.
BONES = [(joint - 1 if joint % 4 != 1 else 0, joint, (joint - 1) // 4) for joint in range(1, 21)]
FINGER_COLORS = ((235, 64, 52), (240, 175, 32), (76, 190, 76), (56, 150, 240), (176, 90, 220))
CURVE_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75),
                (227, 119, 194), (110, 110, 110))
BLACK = (0, 0, 0)
INK = (30, 30, 30)  # text of charts
FRAME = (90, 90, 90)
GRID = (228, 228, 228)
WHITE = (255, 255, 255)
CHUNK = 1 << 20  # pixels handled at once: about 60 MB of temporaries


# ----------------------------------------------------------------------------------------------------- meshes
def rasterise(points: np.ndarray, faces: np.ndarray, size: tuple[int, int], cull=False, weights: bool = True):
    """Z-buffer of a triangle mesh, without a loop over faces (ours).

    points: (N, 3); x, y in pixel-EDGE coordinates, z = depth, smaller is nearer. The image spans 0..W, 0..H,
        and pixel (r, c) is sampled at its centre (c + 0.5, r + 0.5). What lies behind the camera must be
        removed before.
    faces: (F, 3) indices. Degenerate faces and faces with a non-finite corner are left out. At equal depth
        the lower face wins.
    size: (H, W).
    cull: leave out faces seen from behind; True, or (F,) bool: of these faces. They run counter-clockwise
        seen from outside, in a frame of x right, y down, z forward, as MANO's right hand's do. Twice as fast
        on a closed mesh.
    weights: False where `bary` is not needed: it is None then.

    Returns
        face (H, W) int32, -1 where nothing is;
        bary (H, W, 3) float32, the weights of the face's corners in the image plane. They are affine, not
            perspective-correct: depth varies little within a face;
        depth (H, W) float32, inf where nothing is.
    """
    height, width = size
    faces = np.asarray(faces).reshape(-1, 3)
    points = np.asarray(points, np.float64)
    # (3, F) each: corners first, which numpy reduces faster. `take` is several times as fast as [].
    x, y, z = points.T.take(faces.T, axis=1)
    kept = _faces_to_draw(x, y, z, size, cull)
    x, y, z = (values.take(kept, axis=1) for values in (x, y, z))

    # Every face is cut into rows of pixel centres, every row into the columns between the face's edges.
    a, b, c = _corner_weights(x, y)
    owner, row = _rows_of_faces(y, height)  # (R,) each
    first, length = _columns_of_rows(a, b, c, owner, row + 0.5, width)
    # Along a row, depth is z_slope * column + z_start.
    z_slope = (a * z).sum(0)  # (F,)
    z_down = (b * z).sum(0)
    z_corner = (c * z).sum(0) + 0.5 * (z_slope + z_down)
    z_start = z_down.take(owner) * row + z_corner.take(owner)  # (R,)
    face, depth = _fill(owner, row, first, length, z_slope.take(owner), z_start, size)

    hit = np.flatnonzero(face >= 0)
    owner = face.take(hit)
    bary = None
    if weights:
        row = hit // width
        column = hit - row * width + 0.5
        row = row + 0.5
        bary = np.zeros((height * width, 3), np.float32)
        for k in range(3):
            bary[hit, k] = a[k].take(owner) * column + b[k].take(owner) * row + c[k].take(owner)
        bary = bary.reshape(height, width, 3)
    face[hit] = kept.take(owner)
    return face.reshape(height, width), bary, depth.reshape(height, width)


def _twice_area(x, y):
    """(F,) signed, from corners (3, F)."""
    x1, x2 = x[1:] - x[0]
    y1, y2 = y[1:] - y[0]
    return x1 * y2 - x2 * y1


def _faces_to_draw(x, y, z, size, cull):
    """Numbers (F',) of the faces that are finite, not degenerate, not culled and not beside the image."""
    height, width = size
    with np.errstate(invalid="ignore", over="ignore"):
        area = _twice_area(x, y)
        drawn = (area < -1e-12) | ((area > 1e-12) & np.logical_not(cull))
        drawn &= np.isfinite(area + z.sum(0))
        drawn &= (x.min(0) < width) & (x.max(0) > 0)
        drawn &= (y.min(0) < height) & (y.max(0) > 0)
    return np.flatnonzero(drawn)


def _corner_weights(x, y):
    """a, b, c (3, F): the weight of a corner at (x, y) is a x + b y + c, 1 there and 0 at the other two."""
    area = _twice_area(x, y)
    x1, y1 = x[[1, 2, 0]], y[[1, 2, 0]]
    x2, y2 = x[[2, 0, 1]], y[[2, 0, 1]]
    a = (y1 - y2) / area
    b = (x2 - x1) / area
    c = (x1 * y2 - x2 * y1) / area
    return a, b, c


def _rows_of_faces(y, height):
    """owner (R,) and row (R,): every row of pixel centres that a face covers, face after face."""
    low = np.clip(y.min(0), 0, height) - 0.5
    high = np.clip(y.max(0), 0, height) - 0.5
    top = np.ceil(low).astype(np.int64)
    bottom = np.floor(high).astype(np.int64) + 1
    rows = np.maximum(np.minimum(bottom, height) - top, 0)  # (F,)
    owner = np.repeat(np.arange(len(rows)), rows)
    before = np.cumsum(rows) - rows  # rows of the faces before this one
    row = np.arange(len(owner)) + (top - before).take(owner)
    return owner, row


def _columns_of_rows(a, b, c, owner, y, width):
    """The part of each row where all three weights are positive: first (R,) column, length (R,) in pixels.

    a, b, c (3, F): of _corner_weights; y (R,): height of the rows' pixel centres.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # a level edge bounds no row of its face
        lean = -b / a  # an edge, where a weight is 0, lies at column lean * y + start
        start = -c / a - 0.5

    def edges(bounds, none):
        """(3, R): columns of the edges that bound a row on this side."""
        leans = np.where(bounds, lean, 0)
        starts = np.where(bounds, start, none)
        return leans.take(owner, axis=1) * y + starts.take(owner, axis=1)

    first = edges(a > 0, -np.inf).max(0)
    last = edges(a < 0, np.inf).min(0)
    # Pixels within 1e-9 of an edge belong to both of its faces, so that rounding leaves no holes.
    first = np.ceil(np.clip(first, 0, width) - 1e-9).astype(np.int64)
    last = np.floor(np.clip(last, -1, width - 1) + 1e-9).astype(np.int64)
    return first, np.maximum(last - first + 1, 0)


def _fill(owner, row, first, length, z_slope, z_start, size):
    """Pixels of all rows into face (H * W,) and depth (H * W,), about CHUNK pixels at a time."""
    height, width = size
    face = np.full(height * width, -1, np.int32)
    depth = np.full(height * width, np.inf, np.float32)
    row_start = row * width
    z_start = z_start - z_slope * row_start  # so that depth is z_slope * pixel + z_start
    ends = np.cumsum(length)  # pixels up to the end of each row
    start = 0
    while start < len(owner):
        done = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, done + CHUNK, side="right"))
        stop = max(stop, start + 1)
        part = slice(start, stop)
        n = length[part]
        before = ends[part] - n - done
        pixel = np.repeat(row_start[part] + first[part] - before, n)  # (M,) every pixel of these rows
        pixel += np.arange(len(pixel))
        near = np.repeat(z_slope[part], n)
        near *= pixel
        near += np.repeat(z_start[part], n)
        near = near.astype(np.float32)
        nearest_before = depth.take(pixel)
        np.minimum.at(depth, pixel, near)
        # Reversed, because the last write to a pixel stays and the lowest face shall win.
        wins = np.flatnonzero((near == depth.take(pixel)) & (near < nearest_before))[::-1]
        face[pixel.take(wins)] = np.repeat(owner[part], n).take(wins)
        start = stop
    return face, depth


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals (N, 3) of vertices (N, 3): the mean of the faces' normals, weighted by area.

    They point outward where faces run counter-clockwise seen from outside, as MANO's do.
    """
    x, y, z = vertices.T.take(faces.T, axis=1)  # (3, F) each: corners
    x1, x2 = x[1:] - x[0]
    y1, y2 = y[1:] - y[0]
    z1, z2 = z[1:] - z[0]
    normals = (y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2)  # of length twice the area
    total = np.zeros((len(vertices), 3))
    for k in range(3):
        total[:, k] = np.bincount(faces.ravel(), np.repeat(normals[k], 3), len(vertices))
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-20)


def overlay(image: np.ndarray, points: np.ndarray, faces: np.ndarray, color=(120, 170, 240), alpha=0.85):
    """The mesh, shaded, blended over a photograph. Edges are antialiased.

    image (H, W, 3) uint8; points and faces as in `rasterise`, with z in any unit; color RGB 0..255; alpha 1
    hides the photograph. Returns a new (H, W, 3) uint8. It draws in the mesh's rectangle alone, in strips of
    CHUNK pixels, so that a large photograph takes little more memory than its copy.
    """
    drawn = np.array(image)
    points = np.asarray(points, np.float64)
    faces = np.asarray(faces)
    used = points[np.unique(faces)]
    used = used[np.isfinite(used).all(1)]
    if not len(used):
        return drawn
    height, width = drawn.shape[:2]
    x0, y0 = np.clip(np.floor(used[:, :2].min(0)), 0, (width, height)).astype(int)
    x1, y1 = np.clip(np.ceil(used[:, :2].max(0)), 0, (width, height)).astype(int)

    # Depth may be in metres or in pixels. Edges of a hand's mesh run in all directions, so equal spread along
    # z and across gives a scale good enough for shading.
    edges = points[faces] - points[np.roll(faces, 1, axis=1)]  # (F, 3, 3)
    spread = np.sqrt((edges**2).mean((0, 1)))  # (3,)
    across = np.hypot(spread[0], spread[1]) / np.sqrt(2)
    z_scale = across / max(spread[2], 1e-12)
    normals = vertex_normals(points * [1, 1, z_scale], faces)
    rows = max(1, CHUNK // 4 // max(1, x1 - x0))
    for top in range(y0, y1, rows):
        strip = drawn[top:min(top + rows, y1), x0:x1]
        strip[:] = _blend_mesh(strip, points - [x0, top, 0], faces, normals, color, alpha)
    return drawn


def _blend_mesh(image, points, faces, normals, color, alpha):
    """The shaded mesh blended over an image (H, W, 3). normals (N, 3): of the vertices."""
    height, width = image.shape[:2]
    twice = (2 * height, 2 * width)  # drawn at twice the size and averaged
    face, bary, _ = rasterise(points * [2, 2, 1], faces, twice)
    hit = face >= 0
    if not hit.any():
        return image
    normal = np.einsum("nk,nkc->nc", bary[hit], normals[faces[face[hit]]])  # (P, 3) of the pixels hit
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    light = np.array([-0.35, -0.55, -0.76])  # towards the light: the viewer's upper left
    facing = np.where(normal[:, 2] > 0, -1, 1)  # left hands and open meshes show faces from either side
    shade = 0.35 + 0.65 * np.maximum(normal @ light * facing, 0)

    layer = np.zeros((*twice, 4))
    layer[hit, :3] = np.minimum(shade[:, None] * np.asarray(color) * 1.1, 255)
    layer[hit, 3] = 1.0
    layer = layer.reshape(height, 2, width, 2, 4).mean((1, 3))  # colours weighted by coverage, and coverage
    blended = image * (1 - alpha * layer[..., 3:]) + alpha * layer[..., :3]
    return np.clip(blended + 0.5, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------ joints and points
def draw_joints(image: np.ndarray, joints: np.ndarray, visible=None, thickness=None) -> np.ndarray:
    """The skeleton of one hand in per-finger colours, antialiased. Returns a new image.

    image (H, W, 3) uint8; joints (21, 2) in pixel-CENTRE coordinates, FreiHAND order, not-a-number = not
    drawn; visible (21,) 0..1: bones with an end below 0.5 are drawn faint; thickness of bones in pixels
    (default: the image's shorter side / 110).
    """
    factor = 4  # drawn large and averaged
    photo = Image.fromarray(np.asarray(image))
    if thickness is None:
        thickness = max(1.0, min(photo.size) / 110)
    visible = np.ones(len(joints)) if visible is None else np.asarray(visible)
    joints = np.asarray(joints, np.float64) + 0.5
    box = _box_around(joints, 2 * thickness + 1, photo.size)
    if box is None:
        return np.array(photo)
    places = (joints - box[:2]) * factor
    # The layer is premultiplied ("RGBa"), so that averaging does not bleed transparent black into colours.
    layer = Image.new("RGBa", ((box[2] - box[0]) * factor, (box[3] - box[1]) * factor))
    pen = ImageDraw.Draw(layer)
    width = max(1, round(thickness * factor))
    for start, end, finger in BONES:
        if np.isfinite(places[[start, end]]).all():
            ends = [*places[start], *places[end]]
            opacity = _opacity(min(visible[start], visible[end]))
            pen.line(ends, fill=_premultiplied(FINGER_COLORS[finger], opacity), width=width)
    radius = thickness * factor * 0.95
    for joint, place in enumerate(places):
        if np.isfinite(place).all():
            color = FINGER_COLORS[(joint - 1) // 4] if joint else WHITE
            pen.ellipse(_circle(place, radius), fill=_premultiplied(color, _opacity(visible[joint])))
    small = layer.reduce(factor).convert("RGBA")
    part = Image.alpha_composite(photo.crop(box).convert("RGBA"), small)
    photo.paste(part.convert("RGB"), box[:2])
    return np.asarray(photo)


def _box_around(points, margin, size):
    """Left, top, right and bottom edge of what pictures of points (K, 2) reach in an image of size (W, H).

    None where they reach nothing. Points that are not a number do not count.
    """
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return None
    low = np.floor((points.min(0) - margin).clip(0, size)).astype(int)
    high = np.ceil((points.max(0) + margin).clip(0, size)).astype(int)
    return (*low.tolist(), *high.tolist()) if (low < high).all() else None


def _premultiplied(color, opacity):
    return (*((part * opacity + 127) // 255 for part in color), opacity)


def _opacity(visible):
    return 255 if visible >= 0.5 else 110


def _circle(place, radius):
    """Bounding box of a circle, as Pillow takes it."""
    return [*(place - radius), *(place + radius)]


def draw_points(image: np.ndarray, points: np.ndarray, rings=(), radius=None) -> np.ndarray:
    """Unconnected points as dots and others as rings; number k has the same colour in both.

    image (H, W, 3) uint8; points (K, 2) and rings (K', 2) in pixel-CENTRE coordinates; radius in pixels
    (default: the image's shorter side / 60). Returns a new image.
    """
    factor = 4  # drawn large and averaged
    small = Image.fromarray(np.asarray(image))
    if radius is None:
        radius = max(1.2, min(small.size) / 60)
    large = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    line = max(1, factor // 2)
    for k, place in enumerate((np.asarray(points, np.float64) + 0.5) * factor):
        pen.ellipse(_circle(place, radius * factor), fill=_point_color(k), outline=BLACK, width=line)
    for k, place in enumerate((np.asarray(rings, np.float64) + 0.5) * factor):
        pen.ellipse(_circle(place, radius * factor), outline=_point_color(k), width=line)
    return np.asarray(large.reduce(factor))


def _point_color(k):
    """Neighbouring numbers differ much: the hue goes on by the golden ratio."""
    rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.85, 1.0)
    return tuple(int(255 * value) for value in rgb)


def draw_hog(cells: np.ndarray, size: int, strongest: float = 3.0) -> np.ndarray:
    """Histograms of oriented gradients (HOG) as strokes along the edges, white on black.

    cells (D, C, C): strength of the edges whose gradient points k x 180 / D degrees from x towards y, in
    C x C cells; `strongest` is drawn white. Returns (size, size, 3) uint8.
    """
    factor = 3  # drawn large and averaged
    cell = size * factor / cells.shape[1]
    page = Image.new("L", (size * factor, size * factor))
    pen = ImageDraw.Draw(page)
    shade = np.clip(np.asarray(cells, np.float64) / strongest, 0, 1)
    shade = (255 * shade).astype(int)
    weakest_first = np.argsort(shade.ravel(), kind="stable")
    weakest_first = weakest_first[shade.ravel()[weakest_first] > 0]
    k, y, x = np.unravel_index(weakest_first, shade.shape)
    angle = np.pi * k / len(cells) + np.pi / 2  # an edge lies across its gradient
    middle = np.stack([x + 0.5, y + 0.5], 1) * cell
    half = 0.45 * cell * np.stack([np.cos(angle), np.sin(angle)], 1)
    ends = np.concatenate([middle - half, middle + half], 1)
    for line, fill in zip(ends.tolist(), shade[k, y, x].tolist(), strict=True):
        pen.line(line, fill=fill, width=factor)
    return np.asarray(page.reduce(factor).convert("RGB"))


# ------------------------------------------------------------------------------------------------------ pages
def grid(images, columns: int, labels=None, cell: int | None = None, gap: int = 4) -> np.ndarray:
    """Several pictures in one, row by row, on white.

    images: list of (H, W, 3) uint8, any sizes; columns: how many in a row; labels: one short text for each,
    written underneath; cell: side in pixels to which the longer side of every picture is brought (default:
    none is resized). Returns (H', W', 3) uint8. ValueError: no image.
    """
    if not len(images):
        raise ValueError("grid: there is no image to show")
    pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    if cell:
        pictures = [_fit(picture, cell) for picture in pictures]
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    text = 0 if labels is None else 14
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    step_x = width + gap
    step_y = height + text + gap
    page = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), WHITE)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default()
    for k, picture in enumerate(pictures):
        x = gap + k % columns * step_x
        y = gap + k // columns * step_y
        page.paste(picture, (x, y))
        if labels is not None:
            pen.text((x + 1, y + height + 1), str(labels[k]), fill=BLACK, font=font)
    return np.asarray(page)


def _fit(picture, side):
    """The picture with its longer side brought to `side`."""
    scale = side / max(picture.size)
    size = tuple(max(1, round(edge * scale)) for edge in picture.size)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def curve(series: dict, size: tuple[int, int] = (480, 320), title="", x_label="", y_label="",
          bands: dict | None = None) -> np.ndarray:
    """Line chart.

    series: dict name -> (x, y), two sequences of equal length, not-a-number where a line breaks; size (W, H)
    in pixels. bands: dict name of a line -> (x, low, high), a strip around it in its colour. Returns
    (H, W, 3) uint8.
    """
    width, height = size
    factor = 3  # lines are drawn large and averaged; text is written afterwards at its own size
    font = ImageFont.load_default()
    left, top, bottom = 62, 26, height - 38
    right = int(width - 40 - max(map(font.getlength, series), default=0))  # beside it, the names of the lines
    lines = {name: np.array(line, np.float64).T for name, line in series.items()}  # (K, 2) each
    colors = dict(zip(lines, itertools.cycle(CURVE_COLORS), strict=False))
    strips = {name: np.array([[*x, *x[::-1]], [*low, *high[::-1]]], np.float64).T  # (2K, 2), around the strip
              for name, (x, low, high) in (bands or {}).items()}
    low, high = _limits([*lines.values(), *strips.values()])
    x_ticks = _ticks(low[0], high[0])
    y_ticks = _ticks(low[1], high[1])

    def to_x(value):
        return left + (value - low[0]) / (high[0] - low[0]) * (right - left)

    def to_y(value):
        return bottom - (value - low[1]) / (high[1] - low[1]) * (bottom - top)

    page = Image.new("RGB", (width * factor, height * factor), WHITE)
    pen = ImageDraw.Draw(page)
    x0, y0, x1, y1 = (edge * factor for edge in (left, top, right, bottom))
    for x in to_x(x_ticks) * factor:
        pen.line([x, y0, x, y1], fill=GRID, width=factor)
    for y in to_y(y_ticks) * factor:
        pen.line([x0, y, x1, y], fill=GRID, width=factor)
    pen.rectangle([x0, y0, x1, y1], outline=FRAME, width=factor)
    for name, strip in strips.items():
        places = np.stack([to_x(strip[:, 0]), to_y(strip[:, 1])], 1) * factor
        shade = Image.new("L", page.size)
        ImageDraw.Draw(shade).polygon(places.ravel().tolist(), fill=50)
        page.paste(colors[name], mask=shade)
    for name, line in lines.items():
        places = np.stack([to_x(line[:, 0]), to_y(line[:, 1])], 1) * factor
        _draw_line(pen, places, colors[name], width=5)
    page = page.reduce(factor)

    pen = ImageDraw.Draw(page)

    def write(x, y, text, align=0.0):
        """align: 0 begins at x, 0.5 is centred on it, 1 ends there."""
        x = x - align * pen.textlength(text, font=font)
        pen.text((x, y), text, fill=INK, font=font)

    for tick in x_ticks:
        write(to_x(tick), bottom + 4, f"{tick:.6g}", 0.5)
    for tick in y_ticks:
        write(left - 5, to_y(tick) - 6, f"{tick:.6g}", 1.0)
    write((left + right) / 2, 6, title, 0.5)
    write((left + right) / 2, bottom + 19, x_label, 0.5)
    write(4, 6, y_label)
    for k, name in enumerate(lines):
        y = top + 6 + 14 * k
        pen.line([right + 8, y, right + 24, y], fill=colors[name], width=3)
        write(right + 29, y - 6, name)
    return np.asarray(page)


def _limits(lines):
    """low (2,) and high (2,), the x and y that a chart spans; y with a margin of 5 %."""
    points = np.concatenate([*lines, np.zeros((0, 2))])
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        points = np.array([[0.0, 0.0], [1.0, 1.0]])
    low, high = points.min(0), points.max(0)
    size = np.where(high == 0, 1.0, np.abs(high))
    span = np.where(high > low, high - low, size)  # of a constant, its size
    margin = span * [0, 0.05]
    return low - margin, np.maximum(high + margin, low + span * [1, 0])


def _ticks(low, high):
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= 0.998 * rough)
    first = np.ceil(low / step - 1e-9)
    last = np.floor(high / step + 1e-9)
    return np.arange(first, last + 1) * step + 0.0  # + 0.0: no "-0"


def _draw_line(pen, points, color, width):
    """A line through points (K, 2) that breaks at not-a-number; a point between two breaks is a dot."""
    breaks = np.flatnonzero(~np.isfinite(points).all(1))
    for piece in np.split(points, breaks):
        piece = piece[np.isfinite(piece).all(1)]
        if len(piece) == 1:
            pen.ellipse(_circle(piece[0], 1.25 * width), fill=color)
        elif len(piece):
            pen.line(_thinned(piece).ravel().tolist(), fill=color, width=width, joint="curve")


def _thinned(points, step=3):
    """Points (K, 2) of a line without those that cannot be seen.

    Of neighbours within a column of `step` pixels, the first, lowest, highest and last remain.
    """
    column = points[:, 0] // step
    run = np.cumsum(np.diff(column, prepend=column[0]) != 0)  # (K,) number of each point's run of neighbours
    by_height = np.lexsort((points[:, 1], run))
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    lasts = np.append(starts[1:], len(run)) - 1
    return points[np.unique([starts, lasts, by_height[starts], by_height[lasts]])]


def histogram(values: np.ndarray, bins: np.ndarray):
    """A line for `curve`: middles of the bins, and the part of the values (N,) in each.

    bins: edges (K + 1,). Returns two arrays (K,).
    """
    middles = (bins[1:] + bins[:-1]) / 2
    numbers = np.histogram(values, bins)[0]
    return middles, numbers / max(1, len(values))


# ------------------------------------------------------------------------------------------------------ files
def save_image(path: Path | str, array: np.ndarray):
    """Writes (H, W, 3) uint8 to path; the ending decides the format. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # PNG's default level takes three times as long, and its files are hardly smaller
        Image.fromarray(np.ascontiguousarray(array)).save(path, compress_level=1)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from None


def save_curves(folder: Path | str, curves: dict[str, list], pictures: dict[str, tuple]):
    """One chart folder/NAME.png over the steps for each NAME of `pictures`, a dict NAME -> names of curves.

    curves: name -> [(step, value)]. A curve without points is left out, and so is a chart without curves.
    """
    for title, names in pictures.items():
        series = {name: np.array(curves[name], np.float64).T for name in names if curves.get(name)}
        if series:
            save_image(Path(folder) / f"{title}.png", curve(series, title=title, x_label="step"))
