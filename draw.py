"""What every stage uses to show its work: a software rasteriser without OpenGL, mesh overlays, skeletons, picture
grids and curves. numpy and Pillow only. Images are (H, W, 3) uint8 RGB."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Bones of the 21 joints in FreiHAND order (0 wrist, then thumb, index, middle, ring, little, base to tip), one colour
# a finger.
FINGER_COLORS = ((235, 64, 52), (240, 175, 32), (76, 190, 76), (56, 150, 240), (176, 90, 220))
BONES = [(0 if k == 0 else 4 * finger + k, 4 * finger + k + 1, finger) for finger in range(5) for k in range(4)]
CURVE_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75))
CHUNK = 1 << 20  # pixels handled at once: about 60 MB of temporaries


def rasterise(points, faces, size, cull=False):
    """Z-buffer of a triangle mesh, without a loop over faces (ours).

    points: (N, 3); x, y in pixel-EDGE coordinates (the image spans 0..W, 0..H; pixel (r, c) is sampled at its centre
        (c + 0.5, r + 0.5)), z = depth, smaller is nearer. What is behind the camera is the caller's to remove.
    faces: (F, 3) indices. Degenerate faces and those with a non-finite corner are left out; at equal depth the lower
        face wins.
    size: (H, W).
    cull: leave out faces seen from behind, i.e. those that run clockwise seen from outside in a frame of x right,
        y down, z forward (MANO's right hand). Twice as fast on a closed mesh.

    Returns face (H, W) int32, -1 where nothing is; bary (H, W, 3) float32, the weights of the face's corners in the
    image plane (affine, not perspective-correct: depth varies little within a face); depth (H, W) float32, inf where
    nothing is.
    """
    height, width = size
    faces = np.asarray(faces).reshape(-1, 3)
    x, y, z = np.asarray(points, np.float64).T[:, faces.T]  # (3, F) each: corners first, which numpy reduces faster
    with np.errstate(invalid="ignore", over="ignore"):
        area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])  # (F,) twice the signed area
        keep = np.isfinite(area + z.sum(0)) & ((area < -1e-12) if cull else (np.abs(area) > 1e-12))
        keep &= (x.min(0) < width) & (x.max(0) > 0) & (y.min(0) < height) & (y.max(0) > 0)
    kept = np.flatnonzero(keep)
    x, y, z, area = x[:, kept], y[:, kept], z[:, kept], area[kept]

    # Weight k of the image point (x, y) is the plane a x + b y + c through 1 at corner k and 0 at the other two.
    nxt, last = [1, 2, 0], [2, 0, 1]
    a = (y[nxt] - y[last]) / area  # (3, F)
    b = (x[last] - x[nxt]) / area
    c = (x[nxt] * y[last] - x[last] * y[nxt]) / area

    # Every face cut into rows of pixel centres, every row into the columns between the face's edges. Pixels within
    # 1e-9 of an edge belong to both of its faces, so that rounding leaves no holes.
    top = np.ceil(np.clip(y.min(0), 0, height) - 0.5).astype(np.int64)
    bottom = np.minimum(np.floor(np.clip(y.max(0), 0, height) - 0.5).astype(np.int64) + 1, height)
    rows = np.maximum(bottom - top, 0)
    owner = np.repeat(np.arange(len(kept)), rows)  # (R,) face of each row
    row = np.arange(len(owner)) + np.repeat(top - np.cumsum(rows) + rows, rows)
    slope, offset = a[:, owner], b[:, owner] * (row + 0.5) + c[:, owner]  # (3, R)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = -offset / slope - 0.5  # column where the weight passes 0; not-a-number along a horizontal edge
    outside = np.where((slope < 0) | (offset >= -1e-12), -np.inf, np.inf)
    first = np.where(slope > 0, zero, outside).max(0)
    final = np.where(slope < 0, zero, np.inf).min(0)
    first = np.ceil(np.clip(first, 0, width) - 1e-9).astype(np.int64)
    final = np.floor(np.clip(final, -1, width - 1) + 1e-9).astype(np.int64)
    count = np.maximum(final - first + 1, 0)  # (R,) pixels of each row
    z = z[:, owner]
    z_slope = (slope * z).sum(0)  # (R,) depth along the row is z_slope * column + z_start
    z_start = (offset * z).sum(0) + 0.5 * z_slope

    face = np.full(height * width, -1, np.int32)
    depth = np.full(height * width, np.inf, np.float32)
    ends, start = np.cumsum(count), 0
    while start < len(owner):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
        part, n = slice(start, stop), count[start:stop]
        column = np.arange(n.sum()) + np.repeat(first[part] - (ends[part] - n - done), n)  # (M,) all pixels of all rows
        pixel = column + np.repeat(row[part] * width, n)
        near = (np.repeat(z_slope[part], n) * column + np.repeat(z_start[part], n)).astype(np.float32)
        before = depth[pixel]
        np.minimum.at(depth, pixel, near)
        # Reversed, because the last write to a pixel stays and the lowest face shall win.
        wins = np.flatnonzero((near == depth[pixel]) & (near < before))[::-1]
        face[pixel[wins]] = np.repeat(owner[part], n)[wins]
        start = stop

    hit = np.flatnonzero(face >= 0)
    owner, row, column = face[hit], hit // width + 0.5, hit % width + 0.5
    bary = np.zeros((height * width, 3), np.float32)
    for k in range(3):
        bary[hit, k] = a[k, owner] * column + b[k, owner] * row + c[k, owner]
    face[hit] = kept[owner]
    return face.reshape(height, width), bary.reshape(height, width, 3), depth.reshape(height, width)


def vertex_normals(vertices, faces):
    """Unit normals (N, 3) of vertices (N, 3): the mean of the faces' normals, weighted by their area. They point
    outward where faces run counter-clockwise seen from outside, as MANO's do."""
    corners = vertices[faces]  # (F, 3, 3)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # (F, 3)
    total = np.stack([np.bincount(faces.ravel(), np.repeat(normal[:, k], 3), len(vertices)) for k in range(3)], 1)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-20)


def overlay(image, points, faces, color=(120, 170, 240), alpha=0.85):
    """The mesh, shaded, blended over a photograph; edges are antialiased by drawing at twice the size.

    image (H, W, 3) uint8; points and faces as in rasterise (z in any unit: it is brought to the scale of x and y for
    shading only); color RGB 0..255; alpha 1 hides the photograph. Returns a new (H, W, 3) uint8.
    """
    image, points, faces = np.asarray(image), np.asarray(points, np.float64), np.asarray(faces)
    height, width = image.shape[:2]
    face, bary, _ = rasterise(points * [2, 2, 1], faces, (2 * height, 2 * width))
    hit = face >= 0
    if not hit.any():
        return image.copy()
    # Depth may be in metres or in pixels. Edges of a hand's mesh run in all directions, so equal spread along z and
    # across gives a scale good enough for shading.
    edges = points[faces] - points[np.roll(faces, 1, axis=1)]  # (F, 3, 3)
    spread = np.sqrt((edges**2).mean((0, 1)))  # (3,)
    scaled = points * [1, 1, np.hypot(spread[0], spread[1]) / np.sqrt(2) / max(spread[2], 1e-12)]
    normals = vertex_normals(scaled, faces)
    shade = np.einsum("nk,nkc->nc", bary[hit], normals[faces[face[hit]]])
    shade /= np.maximum(np.linalg.norm(shade, axis=1, keepdims=True), 1e-9)
    light = np.array([-0.35, -0.55, -0.76])  # towards the light: the viewer's upper left
    # abs: left hands and open meshes show faces from either side.
    lambert = 0.35 + 0.65 * np.maximum(shade @ light * np.where(shade[:, 2] > 0, -1, 1), 0)
    layer = np.zeros((2 * height, 2 * width, 4))
    layer[hit, :3], layer[hit, 3] = np.minimum(lambert[:, None] * np.asarray(color) * 1.1, 255), 1.0
    layer = layer.reshape(height, 2, width, 2, 4).mean((1, 3))  # colours weighted by coverage, and coverage
    blended = image * (1 - alpha * layer[..., 3:]) + alpha * layer[..., :3]
    return np.clip(blended + 0.5, 0, 255).astype(np.uint8)


def draw_joints(image, joints, visible=None, thickness=None):
    """The skeleton of one hand in per-finger colours, antialiased.

    image (H, W, 3) uint8; joints (21, 2) in pixel-CENTRE coordinates, FreiHAND order, not-a-number = not drawn;
    visible (21,) 0..1: bones with an end below 0.5 are drawn faint; thickness of bones in pixels. Returns a new image.
    """
    image, factor = np.asarray(image), 4
    height, width = image.shape[:2]
    thick = max(1.0, min(height, width) / 110) if thickness is None else thickness
    visible = np.ones(len(joints)) if visible is None else np.asarray(visible)
    at = (np.asarray(joints, np.float64) + 0.5) * factor
    layer = Image.new("RGBA", (width * factor, height * factor), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    for start, end, finger in BONES:
        if np.isfinite(at[[start, end]]).all():
            strong = min(visible[start], visible[end]) >= 0.5
            ends = [tuple(at[start]), tuple(at[end])]
            pen.line(ends, fill=(*FINGER_COLORS[finger], 255 if strong else 110), width=max(1, round(thick * factor)))
    for joint, point in enumerate(at):
        if np.isfinite(point).all():
            radius = thick * factor * 0.95
            box = [*(point - radius), *(point + radius)]
            color = (255, 255, 255) if joint == 0 else FINGER_COLORS[(joint - 1) // 4]
            pen.ellipse(box, fill=(*color, 255 if visible[joint] >= 0.5 else 110))
    photo = Image.fromarray(image).convert("RGBA")
    # Averaging must not bleed the transparent black of the layer into the colours: Pillow's RGBa is premultiplied.
    small = layer.convert("RGBa").reduce(factor).convert("RGBA")
    return np.asarray(Image.alpha_composite(photo, small).convert("RGB"))


def draw_points(image, points, rings=(), radius=None):
    """Unconnected points (K,2) in pixel-CENTRE coordinates as dots, others as rings, number k always in the same colour. Returns a
    new image."""
    image, factor = np.asarray(image), 4
    small = Image.fromarray(image)
    large = small.resize((small.width * factor, small.height * factor), Image.Resampling.BICUBIC)
    pen, r = ImageDraw.Draw(large), factor * (max(1.2, min(small.size) / 60) if radius is None else radius)
    for places, solid in ((points, True), (rings, False)):
        for k, point in enumerate((np.asarray(places, np.float64) + 0.5) * factor):
            color = tuple(int(255 * v) for v in colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.85, 1.0))
            pen.ellipse([*(point - r), *(point + r)], fill=color if solid else None, outline=(0, 0, 0) if solid else color,
                        width=max(1, factor // 2))
    return np.asarray(large.resize(small.size, Image.Resampling.BOX))


def draw_edges(cells, size, strongest=3.0):
    """Histograms of edge directions as strokes along the edges, white on black.

    cells (D, C, C): strength of the edges whose gradient points k x 180 / D degrees from x towards y, in C x C cells; `strongest`
    is drawn white. Returns (size, size, 3) uint8."""
    directions, count = len(cells), cells.shape[1]
    page = Image.new("L", (3 * size, 3 * size))
    pen, cell = ImageDraw.Draw(page), 3 * size / count
    shade = (255 * np.clip(np.asarray(cells, np.float64) / strongest, 0, 1)).astype(int)
    for k, y, x in sorted(np.ndindex(shade.shape), key=lambda at: shade[at]):              # the strongest last, on top
        angle = np.pi * k / directions + np.pi / 2                                           # an edge lies across its gradient
        middle, half = np.array([x + 0.5, y + 0.5]) * cell, 0.45 * cell * np.array([np.cos(angle), np.sin(angle)])
        pen.line([*(middle - half), *(middle + half)], fill=int(shade[k, y, x]), width=3)
    return np.asarray(page.reduce(3).convert("RGB"))


def grid(images, columns, labels=None, cell=None, gap=4):
    """Several pictures in one, row by row, on white.

    images: list of (H, W, 3) uint8, any sizes; columns: how many a row; labels: one short text for each, written
    underneath; cell: side in pixels to which the longer side of every picture is brought (default: the largest there
    is, nothing resized). Returns (H', W', 3) uint8.
    """
    if not len(images):
        raise ValueError("grid: there is no image to show")
    pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    if cell:
        sizes = [(max(1, round(p.width * cell / max(p.size))), max(1, round(p.height * cell / max(p.size))))
                 for p in pictures]
        pictures = [p if p.size == s else p.resize(s, Image.Resampling.BICUBIC)
                    for p, s in zip(pictures, sizes, strict=True)]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    text = 14 if labels is not None else 0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), (255, 255, 255))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()
    for k, picture in enumerate(pictures):
        x, y = gap + k % columns * (width + gap), gap + k // columns * (height + text + gap)
        page.paste(picture, (x, y))
        if labels is not None:
            pen.text((x + 1, y + height + 1), str(labels[k]), fill=(0, 0, 0), font=font)
    return np.asarray(page)


def _ticks(low, high):
    """About five round numbers from low to high."""
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5.01)
    return np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step + 0.0  # + 0.0: no "-0"


def curve(series, size=(480, 320), title="", x_label="", y_label=""):
    """Line chart. series: dict name -> (x, y), two sequences of equal length, not-a-number where a line breaks;
    size (W, H) in pixels. Returns (H, W, 3) uint8."""
    width, height = size
    lines = {name: (np.asarray(x, np.float64), np.asarray(y, np.float64)) for name, (x, y) in series.items()}
    limits = []
    for axis in range(2):
        values = np.concatenate([line[axis] for line in lines.values()] or [np.zeros(0)])
        values = values[np.isfinite(values)]
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        margin = (high - low or abs(high) or 1.0) * (0.05 if axis else 0.0)
        limits.append((low - margin, high + margin if high > low or axis else high + 1.0))
    left, right, top, bottom = 62, width - 14, 26, height - 38

    def place(x, y):
        (x0, x1), (y0, y1) = limits
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return np.stack([left + across * (right - left), bottom - up * (bottom - top)], -1)

    factor = 3  # lines are drawn large and averaged; text is written afterwards at its own size
    page = Image.new("RGB", (width * factor, height * factor), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    x_ticks, y_ticks = _ticks(*limits[0]), _ticks(*limits[1])
    for tick in x_ticks:
        x = place(tick, limits[1][0])[0] * factor
        pen.line([(x, top * factor), (x, bottom * factor)], fill=(228, 228, 228), width=factor)
    for tick in y_ticks:
        y = place(limits[0][0], tick)[1] * factor
        pen.line([(left * factor, y), (right * factor, y)], fill=(228, 228, 228), width=factor)
    pen.rectangle([left * factor, top * factor, right * factor, bottom * factor], outline=(90, 90, 90), width=factor)
    for k, (x, y) in enumerate(lines.values()):
        at, color = place(x, y) * factor, CURVE_COLORS[k % len(CURVE_COLORS)]
        good = np.isfinite(at).all(1)
        for piece in np.split(np.arange(len(at)), np.flatnonzero(~good)):
            piece = piece[good[piece]]
            if len(piece) == 1:
                pen.ellipse([*(at[piece[0]] - 2 * factor), *(at[piece[0]] + 2 * factor)], fill=color)
            elif len(piece):
                pen.line([tuple(p) for p in at[piece]], fill=color, width=round(1.6 * factor), joint="curve")
    page = page.reduce(factor)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()

    def write(x, y, text, align=0.0, fill=(30, 30, 30)):
        pen.text((x - align * pen.textlength(text, font=font), y), text, fill=fill, font=font)

    for tick in x_ticks:
        write(place(tick, limits[1][0])[0], bottom + 4, f"{tick:.6g}", 0.5)
    for tick in y_ticks:
        write(left - 5, place(limits[0][0], tick)[1] - 6, f"{tick:.6g}", 1.0)
    write((left + right) / 2, 6, title, 0.5)
    write((left + right) / 2, bottom + 19, x_label, 0.5)
    write(4, 6, y_label)
    widest = max((pen.textlength(name, font=font) for name in lines), default=0)
    for k, name in enumerate(lines):
        x, y, color = right - widest - 30, top + 6 + 14 * k, CURVE_COLORS[k % len(CURVE_COLORS)]
        pen.line([(x, y + 6), (x + 18, y + 6)], fill=color, width=3)
        write(x + 23, y, name)
    return np.asarray(page)


def histogram(values, bins):
    """A line for `curve`: share of the values (N,) between the edges `bins` (B+1,), at the middles of the bins."""
    return (bins[1:] + bins[:-1]) / 2, np.histogram(values, bins)[0] / max(1, len(values))


def save_image(path, array):
    """Writes (H, W, 3) uint8 to path; the ending decides the format. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path)
