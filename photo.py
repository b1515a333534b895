"""One photograph of coloured meshes: light with shadows, a cluttered background, a camera with faults.

Nothing here knows about hands. Colours of lights and surfaces are linear RGB, those of pictures sRGB 0..1.
Pictures and lists of pixels are float32 and have their channels first, which numpy handles several times
faster. The rasteriser is an argument: `draw.rasterise`, or any other that returns the same. The recipe is
ours.

Example::

    import numpy as np
    from PIL import Image
    from photo import photograph, random_background, random_camera, random_light

    rng = np.random.default_rng(0)
    camera = random_camera(rng)
    light = random_light(rng)
    background = random_background(rng, 128)
    layer = np.zeros((4, 128, 128), np.float32)  # RGB and coverage, as `illuminate` returns them
    layer[:, 40:90, 40:90] = np.reshape([0.9, 0.5, 0.2, 1], (4, 1, 1))  # here a square
    picture = photograph(rng, camera, light, background, layer, motion=np.array([1.0, 0.0]))
    Image.fromarray(picture).save("photo.png", quality=camera.quality)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import uniform_filter
from scipy.sparse import csr_array

NEAREST = 0.06  # metres: nothing nearer to the camera is drawn
f4 = np.float32  # pixels are shaded in float32


# einsum in place of @ on long arrays, here and below: BLAS may add in another order when it has other
# threads, and the same seed shall give the same bytes.
def unit(x: np.ndarray) -> np.ndarray:
    """Vectors (..., K) of length 1."""
    return x / np.maximum(np.sqrt(np.einsum("...k,...k->...", x, x)), 1e-12)[..., None]


def pick(rng: np.random.Generator, *options):
    """One of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def half_size(image: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels: (..., 2H, 2W) -> (..., H, W)."""
    image = image[..., 0::2, :] + image[..., 1::2, :]
    return (image[..., 0::2] + image[..., 1::2]) * f4(0.25)


def _blur(picture, radius):
    return picture.filter(ImageFilter.GaussianBlur(radius)) if radius > 0 else picture


def _enlarge(picture, side):
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _reduce(picture, side):
    return picture.resize((side, side), Image.Resampling.BOX)


def _planes(image, change, value):
    """change(picture, value) of each channel of (C, H, W) uint8: (C, H', W') float32."""
    return np.stack([np.asarray(change(Image.fromarray(plane), value), f4) for plane in image])


def _to_uint8(image):
    return (image * 255).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- light, camera, background
@dataclass
class Light:
    """A key light, the sky above and the light that the ground throws back; linear RGB (3,) each."""

    direction: np.ndarray  # (3,) unit, towards the key light, in the camera's frame
    key: np.ndarray
    sky: np.ndarray
    bounce: np.ndarray
    casts_shadow: bool  # on the background
    wall: float = 0.1  # how far the background lies behind, in sides of the picture
    backdrop: float = 1.0  # how bright the background is: above 1 behind a hand against the light


@dataclass
class Camera:
    gain: np.ndarray  # (3,) exposure and white balance
    noise: float  # standard deviation, in levels of 0..255
    defocus: float  # pixels of an image of 128
    quality: int  # of the JPEG file
    contrast: float = 0.0  # 0..1, how much darker the dark half becomes and brighter the bright one
    vignette: float = 0.0  # part of the light that the corners lack
    coarseness: float = 1.0  # the picture was taken at this many times fewer pixels
    sharpening: int = 0  # percent, which leaves bright seams along dark edges
    grey: bool = False


def random_light(rng: np.random.Generator) -> Light:
    """The key light is somewhere above the camera; what it lacks in strength the surroundings have."""
    level = rng.uniform(0.6, 1.0)
    key_part = rng.uniform(0.4, 0.78)
    warmth = rng.normal(0, 0.12)
    tint = np.array([1 + warmth, 1 + rng.normal(0, 0.03), 1 - warmth])
    x = rng.normal(0, 0.6)
    y = rng.normal(-0.7, 0.4)
    z = -abs(rng.normal(0.7, 0.35)) - 0.15
    casts_shadow = rng.random() < 0.4
    key = 1.35 * level * key_part * tint
    sky = 1.1 * level * (1 - key_part) * (2 - tint) * rng.uniform(0.9, 1.1, 3)
    bounce = 0.75 * level * (1 - key_part) * rng.uniform(0.75, 1.15, 3)
    return Light(unit(np.array([x, y, z])), key, sky, bounce, casts_shadow)


def random_camera(rng: np.random.Generator) -> Camera:
    gain = rng.uniform(0.82, 1.12) * (1 + rng.normal(0, 0.03, 3))
    noise = pick(rng, 0.8, 2.0, 4.0, 7.0)
    defocus = pick(rng, 0.0, 0.0, 0.4, 0.8)
    quality = int(rng.integers(55, 96))
    return Camera(gain, noise, defocus, quality)


def everyday_light(rng: np.random.Generator) -> Light:
    """Light as people photograph in.

    It is soft, or the sun's, or a window's beside the thing, or a lamp's at the camera, or comes from behind.
    """
    kind = rng.choice(5, p=(0.4, 0.22, 0.13, 0.15, 0.1))
    level = np.exp(rng.normal(0.05, 0.18))
    warmth = rng.normal(0.02, 0.07)
    tint = np.array([1 + warmth, 1, 1 - warmth])
    x, y, z = rng.normal(0, 1, 3)
    casts_shadow = rng.random() < 0.35
    wall = rng.uniform(0.03, 0.2)
    backdrop = np.exp(rng.normal(-0.1, 0.15))
    if kind == 0:  # lamps and walls all around
        direction, key_part = (0.6 * x, -0.8 + 0.4 * y, -0.7 + 0.4 * z), rng.uniform(0.25, 0.6)
    elif kind == 1:  # a window
        direction, key_part = (np.copysign(1, x), -0.2 + 0.4 * y, -0.2 + 0.35 * z), rng.uniform(0.5, 0.85)
    elif kind == 2:  # a lamp at the camera: a shadow with a sharp edge, close by
        direction, key_part = (0.25 * x, -0.1 + 0.25 * y, -1), rng.uniform(0.55, 0.85)
        casts_shadow = rng.random() < 0.7
        wall = rng.uniform(0.02, 0.08)
    elif kind == 3:  # against the light
        direction, key_part = (0.6 * x, -0.7 + 0.3 * y, 0.6 + 0.4 * abs(z)), rng.uniform(0.2, 0.6)
        level *= rng.uniform(0.3, 0.8)
        backdrop *= rng.uniform(1, 1.3)
        casts_shadow = False
    else:  # the sun
        direction, key_part = (0.8 * x, -0.9 + 0.3 * y, -0.4 + 0.5 * z), rng.uniform(0.7, 0.9)
        level *= 1.25
    key = 1.5 * level * key_part * tint
    sky = 1.25 * level * (1 - key_part) * (2 - tint)
    bounce = level * (1 - key_part) * rng.uniform(0.6, 1.1) * rng.uniform(0.9, 1.1, 3)
    return Light(unit(np.array(direction, float)), key, sky, bounce, casts_shadow, wall, backdrop)


def everyday_camera(rng: np.random.Generator) -> Camera:
    """A telephone or a webcam: its white balance errs, its picture may be coarse, dark, blurred or grey."""
    warmth = rng.normal(0, 0.05)
    gain = np.exp(rng.normal(0, 0.1)) * np.array([1 + warmth, 1 + rng.normal(0, 0.02), 1 - warmth])
    noise = pick(rng, 0.5, 1.0, 2.0, 5.0)
    defocus = pick(rng, 0.0, 0.0, 0.3, 0.6, 1.0)
    quality = int(rng.integers(40, 96))
    contrast = rng.uniform(-0.1, 0.6)
    vignette = pick(rng, 0.0, 0.0, 0.15, 0.4)
    coarseness = pick(rng, 1.0, 1.0, 1.0, rng.uniform(1.3, 2.6))
    sharpening = pick(rng, 0, 0, 70, 150)
    grey = rng.random() < 0.05
    return Camera(gain, noise, defocus, quality, contrast, vignette, coarseness, sharpening, grey)


def random_background(rng: np.random.Generator, size: int, tones=()) -> np.ndarray:
    """(3, H, H) sRGB, H = 1.25 size: a gradient, noise, stripes and shapes, more or less blurred.

    tones (M, 3): colours of the thing to be photographed. Some backgrounds show one of them, so that its
    colour alone does not give it away.
    """
    side = int(1.25 * size)
    angle = rng.uniform(0, 6.3)
    x = np.arange(side, dtype=f4) / f4(side)
    y = x[:, None]
    palette = rng.uniform(0, 1, (6, 3)) * rng.uniform(0.4, 1.1)
    grey = palette.mean(1, keepdims=True)
    palette = np.clip(grey + (palette - grey) * rng.uniform(0.2, 1), 0, 1)
    if rng.random() < 0.4 and len(tones):
        palette[5] = tones[rng.integers(len(tones))]
    colors = palette.astype(f4)[..., None, None]  # (6, 3, 1, 1)

    cos, sin = f4(np.cos(angle)), f4(np.sin(angle))
    ramp = (cos * x + sin * y - f4(rng.uniform(-0.3, 0.6))).clip(0, 1)
    image = colors[0] + (colors[1] - colors[0]) * ramp
    coarse = rng.integers(2, 7)
    fine = rng.integers(12, 40)
    for cells, strength in ((coarse, 0.5), (fine, 0.16)):
        noise = rng.normal(0.5, 0.25, (cells, cells, 3))
        strength = strength * rng.random()
        if pick(rng, False, True):  # the same in all channels
            noise = noise.mean(2, keepdims=True)
        noise = _planes(_to_uint8(noise).transpose(2, 0, 1), _enlarge, side)
        image += (noise - f4(127.5)) * f4(strength / 255)
    if rng.random() < 0.35:
        across = cos * y - sin * x
        wave = np.sin(across * f4(rng.uniform(15, 90)))
        stripes = f4(rng.uniform(0.02, 0.14)) * np.tanh(wave * f4(rng.uniform(1, 8)))
        image += stripes * (colors[2] - colors[3])

    picture = Image.fromarray(np.ascontiguousarray(_to_uint8(image).transpose(1, 2, 0)))
    shapes = int(rng.integers(22)) if rng.random() < 0.8 else 0
    if shapes:
        picture = picture.resize((2 * side, 2 * side), Image.Resampling.NEAREST)
        for _ in range(shapes):
            _draw_shape(rng, picture, palette)
        picture = picture.reduce(2)  # shapes are drawn large and averaged
    radius = pick(rng, 0, 0.6, 1.5, 3.0) * size / 128
    image = np.asarray(_blur(picture, radius)).transpose(2, 0, 1)
    return np.ascontiguousarray(image) * f4(1 / 255)


def _draw_shape(rng, picture, palette):
    """An ellipse, a rectangle, a polygon or a line somewhere on the picture, half transparent."""
    pen = ImageDraw.Draw(picture, "RGBA")
    side = picture.width // 2
    place = rng.uniform(0, 2 * side, 2)
    extent = rng.uniform(0.03, 0.35, 2) * side
    corners = rng.normal(0, 1.2, (int(rng.integers(3, 6)), 2)) * extent
    color = (255 * palette[rng.integers(2, 6)]).astype(int).tolist()
    fill = (*color, int(rng.integers(120, 256)))
    kind = pick(rng, "ellipse", "rectangle", "polygon", "line")
    if kind == "ellipse":
        pen.ellipse([*(place - extent), *(place + extent)], fill=fill)
    elif kind == "rectangle":
        pen.rectangle([*(place - extent), *(place + extent)], fill=fill)
    elif kind == "polygon":
        pen.polygon([tuple(place + corner) for corner in corners], fill=fill)
    else:
        width = int(rng.integers(2, 2 + side // 10))
        pen.line([*place, *(place + 4 * corners[0])], fill=fill, width=width)


# ---------------------------------------------------------------------------------------------------- shading
@dataclass
class Mesh:
    """A surface in the camera's frame, in metres, that runs counter-clockwise seen from outside."""

    vertices: np.ndarray  # (N, 3)
    faces: np.ndarray  # (F, 3)
    normals: np.ndarray  # (N, 3) unit, outwards
    coordinates: np.ndarray  # (N, C) what `texture` needs, interpolated at every pixel
    texture: Callable  # coordinates (C, P) float32 -> albedo (3, P), gloss (P,)
    wrap: tuple  # RGB: how far light reaches round the edge; more red for skin
    closed: bool = True  # its inside is never seen


def matt(colors: np.ndarray):
    """Texture of a surface that is painted: its coordinates are linear RGB."""
    return colors, f4(0.03)


@dataclass
class Seen:
    """What of some meshes a camera sees: the P pixels of an image of twice the size, mesh after mesh."""

    meshes: list[Mesh]
    points: np.ndarray  # (N, 3) of all meshes
    faces: np.ndarray  # (F, 3)
    K: np.ndarray  # (3, 3) intrinsics, of pixel centres
    size: int  # of the image in pixels
    depth: np.ndarray  # (2 size, 2 size) metres, inf where nothing is
    vertex: np.ndarray  # (2 size, 2 size): number of the first corner of the face shown, or -1
    hit: np.ndarray  # (P,) numbers of the pixels
    ends: np.ndarray  # (M,) where the pixels of each mesh end
    normal: np.ndarray  # (3, P) of any length
    place: np.ndarray  # (3, P) metres
    albedo: np.ndarray  # (3, P) linear RGB
    gloss: np.ndarray  # (P,)


def see(meshes: list[Mesh], K: np.ndarray, size: int, rasterise: Callable) -> Seen:
    """The meshes before a camera, without light.

    K (3, 3): intrinsics, of pixel centres; size: side of the image in pixels; rasterise(points, faces, size,
    cull, weights): as `draw.rasterise`.
    """
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    points = np.concatenate([mesh.vertices for mesh in meshes])
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)])
    closed = np.repeat([mesh.closed for mesh in meshes], [len(mesh.faces) for mesh in meshes])
    if points[:, 2].min() <= NEAREST:
        drawn = (points[:, 2] > NEAREST)[faces].all(1)
        faces = faces[drawn]
        closed = closed[drawn]
    faces = faces.astype(np.int32)

    fine = 2 * size  # averaged afterwards, which smooths the edges
    homogeneous = points @ K.T
    pixels = homogeneous[:, :2] / np.maximum(homogeneous[:, 2:], 1e-3)
    edges = (pixels + 0.5) * 2  # pixel edges of the fine image
    face, bary, depth = rasterise(np.concatenate([edges, points[:, 2:]], 1), faces, (fine, fine), cull=closed)
    face = face.ravel()
    hit = np.flatnonzero(face >= 0)
    first = faces[:, 0].take(face.take(hit))  # (P,) first corners
    vertex = np.full(fine * fine, -1, np.int32)
    vertex[hit] = first
    owner = (np.searchsorted(starts, first, side="right") - 1).astype(np.uint8)  # (P,) mesh of each pixel
    ends = np.cumsum(np.bincount(owner, minlength=len(meshes)))
    hit = hit.take(np.argsort(owner, kind="stable"))

    columns = max(mesh.coordinates.shape[1] for mesh in meshes)
    values = np.zeros((len(points), 6 + columns), f4)  # what is interpolated
    values[:, :3] = np.concatenate([mesh.normals for mesh in meshes])
    values[:, 3:6] = points
    for mesh, start in zip(meshes, starts, strict=False):
        values[start:start + len(mesh.vertices), 6:6 + mesh.coordinates.shape[1]] = mesh.coordinates
    values = _interpolate(values, faces.take(face.take(hit), axis=0), bary.reshape(-1, 3).take(hit, axis=0))
    albedo = np.empty((3, len(hit)), f4)
    gloss = np.empty(len(hit), f4)
    for mesh, mine in zip(meshes, _slices(ends), strict=True):
        coordinates = values[6:6 + mesh.coordinates.shape[1], mine]
        albedo[:, mine], gloss[mine] = mesh.texture(coordinates)
    return Seen(meshes, points, faces, K, size, depth, vertex.reshape(fine, fine), hit, ends, values[:3],
                values[3:6], albedo, gloss)


def _slices(ends):
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _interpolate(values, corner, weight):
    """Values (N, C) of vertices at pixels with corners (P, 3) and weights (P, 3): (C, P)."""
    count = len(corner)
    ends = np.arange(0, 3 * count + 1, 3, dtype=np.int32)
    table = csr_array((weight.ravel(), corner.ravel(), ends), shape=(count, len(values)))
    return np.ascontiguousarray((table @ values).T)


def illuminate(seen: Seen, light: Light, rasterise: Callable) -> np.ndarray:
    """(4, size, size) float32: sRGB times coverage, and coverage, of lit meshes without a background."""
    lit = _key_light(seen, light, rasterise)
    openness = _openness(seen)
    facing, up, shine = _angles(seen, light)
    layer = np.zeros((4, 4 * seen.size**2), f4)
    for mesh, mine in zip(seen.meshes, _slices(seen.ends), strict=True):
        color = _shade(light, seen.albedo[:, mine], seen.gloss[mine], mesh.wrap, facing[mine], up[mine],
                       shine[mine], lit[mine], openness[mine])
        for channel, values in zip(layer, color, strict=False):
            channel[seen.hit[mine]] = values
    layer[3, seen.hit] = 1
    return half_size(layer.reshape(4, 2 * seen.size, 2 * seen.size))


def _key_light(seen, light, rasterise, cells=128):
    """Part (P,) of the key light that reaches each pixel: a depth map seen from the light, four taps."""
    if not len(seen.hit):
        return np.zeros(0, f4)
    away = -light.direction
    right = unit(_cross(light.direction, [0.3, 0.9, 0.1]))
    down = _cross(right, light.direction)
    u, v, far = (_dot(axis.astype(f4), seen.place) for axis in (right, down, away))  # (P,) each
    scale = (cells - 4) / max(np.ptp(u), np.ptp(v), 1e-6)
    left = u.min() - 2 / scale
    top = v.min() - 2 / scale
    x, y, z = (_dot(axis, seen.points.T) for axis in (right, down, away))  # (N,) each
    points = np.stack([(x - left) * scale, (y - top) * scale, z], 1)
    depth = rasterise(points, seen.faces, (cells, cells), cull=True, weights=False)[2].ravel()
    u = (u - f4(left)) * f4(scale)
    v = (v - f4(top)) * f4(scale)
    columns = [(u + f4(shift)).astype(np.intp) for shift in (-0.6, 0.6)]
    rows = [(v + f4(shift)).astype(np.intp) * cells for shift in (-0.6, 0.6)]
    near = far - f4(0.004)
    lit = np.zeros(len(u), np.uint8)  # taps out of four
    for row in rows:
        for column in columns:
            lit += depth.take(row + column) > near
    return lit * f4(0.25)


def _cross(a, b):
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def _dot(vector, vectors):
    """vector (3,) times vectors (3, P): (P,)."""
    return vector[0] * vectors[0] + vector[1] * vectors[1] + vector[2] * vectors[2]


def _openness(seen):
    """(P,) 1 in the open, towards 0 in hollows: how far a pixel lies behind the mean depth around it."""
    place = seen.depth.ravel().take(seen.hit)
    if not len(place):
        return place
    filled = half_size(np.minimum(seen.depth, place.max() + f4(0.03)))  # where nothing is, depth is inf
    row, column = _row_and_column(seen)
    coarse = (row >> 1) * seen.size + (column >> 1)  # (P,)
    hollow = f4(0)
    for radius in (1.3, 4.3):  # pixels of an image of 128
        around = uniform_filter(filled, 2 * max(1, round(radius * seen.size / 128)) + 1)
        hollow = hollow + np.clip(place - around.ravel().take(coarse), f4(0), f4(0.02))
    return np.exp(f4(-45) * hollow)


def _row_and_column(seen):
    """Of the pixels of the image of twice the size, (P,) each."""
    row = seen.hit // (2 * seen.size)
    return row, seen.hit - row * (2 * seen.size)


def _angles(seen, light):
    """(P,) each: cosine towards the key light, part 0..1 of the sky, shine 0..1."""
    row, column = _row_and_column(seen)
    K = seen.K.astype(f4)
    x = ((column.astype(f4) - f4(0.5)) * f4(0.5) - K[0, 2]) / K[0, 0]  # the ray to a pixel is (x, y, 1)
    y = ((row.astype(f4) - f4(0.5)) * f4(0.5) - K[1, 2]) / K[1, 1]
    nearness = 1 / np.sqrt(x * x + y * y + f4(1))
    a, b, c = seen.normal
    inverse = 1 / np.sqrt(np.maximum(a * a + b * b + c * c, f4(1e-24)))
    direction = light.direction.astype(f4)
    facing = _dot(direction, seen.normal) * inverse
    away = (a * x + b * y + c) * inverse * nearness
    along = (x * direction[0] + y * direction[1] + direction[2]) * nearness
    # Cosine between the normal and the direction halfway between light and viewer.
    shine = (facing - away) / np.sqrt(np.maximum(f4(2) - f4(2) * along, f4(1e-6)))
    shine = np.clip(shine, f4(0), f4(1))
    shine *= shine
    fourth = shine * shine
    eighth = fourth * fourth
    return facing, f4(0.5) - f4(0.5) * b * inverse, eighth * eighth * fourth * shine  # to the power of 22


def _shade(light, albedo, gloss, wrap, facing, up, shine, lit, openness):
    """sRGB, a list of (P,): a wrapped Lambert term, ambient light darkened in hollows, a highlight.

    albedo (3, P); the others (P,), of _angles, _key_light and _openness.
    """
    shine = shine * gloss
    shine *= lit
    shine *= f4(2)
    hollow = f4(0.45) + f4(0.55) * openness
    channels = []
    for c in range(3):
        edge = f4(wrap[c])
        color = np.maximum(facing + edge, f4(0))  # the key light
        color *= lit
        color *= f4(light.key[c] / (1 + wrap[c]))
        ambient = up * f4(light.sky[c] - light.bounce[c])
        ambient += f4(light.bounce[c])
        ambient *= openness
        color += ambient
        color *= albedo[c]
        color *= hollow
        color += shine * f4(light.key[c])
        channels.append(_tone(color))
    return channels


TONE_STEPS = 2048  # between black and white


def _tone_curve(x):
    """Linear light to sRGB, with highlights that roll off."""
    rolled_off = np.where(x < 0.5, x, 1 - 0.5 * np.exp(1 - 2 * x))
    return rolled_off ** (1 / 2.2)


# Over the square root of the light, so that the dark end is fine enough.
TONES = _tone_curve((np.arange(3 * TONE_STEPS) / TONE_STEPS) ** 2).astype(f4)


def _tone(color):
    """_tone_curve of colours >= 0, from a table: powers are slow on many processors."""
    step = np.sqrt(color)
    step *= f4(TONE_STEPS)
    return TONES.take(step.astype(np.intp), mode="clip")


# ----------------------------------------------------------------------------------------------------- camera
def photograph(rng: np.random.Generator, camera: Camera, light: Light, background: np.ndarray,
               layer: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """The layer over its background, as a camera with faults sees it: exposure, blur, noise.

    background: of `random_background`; layer (4, size, size): of `illuminate`; motion (2,): x, y along which
    a picture is blurred now and then. Returns (size, size, 3) uint8.
    """
    size = layer.shape[1]
    row, column = (rng.uniform(0.35, 0.65, 2) * (background.shape[1] - size)).astype(int)
    image = background[:, row:row + size, column:column + size]
    uncovered = 1 - layer[3]
    if light.casts_shadow:
        uncovered = uncovered * (1 - _shadow(layer[3], light) * f4(0.5 / 255))
    image = image * (uncovered * f4(light.backdrop)) + layer[:3]
    image *= (255 * camera.gain).astype(f4)[:, None, None]
    if camera.vignette > 0:
        across = np.linspace(-1, 1, size, dtype=f4) ** 2
        image *= 1 - f4(camera.vignette / 2) * (across + across[:, None])
    if rng.random() < 0.15:
        direction = unit(motion + rng.normal(0, 0.5, 2))
        image = _motion_blur(image, direction[::-1] * rng.uniform(0.005, 0.025) * size)
    if camera.defocus > 0:
        image = _planes(image.clip(0, 255).astype(np.uint8), _blur, camera.defocus * size / 128)
    if camera.coarseness > 1:
        coarse = _planes(image.clip(0, 255).astype(np.uint8), _reduce, round(size / camera.coarseness))
        image = _planes(coarse.astype(np.uint8), _enlarge, size)
    if camera.sharpening:
        sharper = ImageFilter.UnsharpMask(1.2 * size / 128, camera.sharpening, 0)
        image = _planes(image.clip(0, 255).astype(np.uint8), Image.Image.filter, sharper)
    image = image + rng.standard_normal(image.shape, dtype=f4) * f4(camera.noise)
    np.clip(image, 0, 255, out=image)
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = image.transpose(1, 2, 0)
    if camera.grey:
        picture[:] = picture.mean(2, keepdims=True)
    if camera.contrast:
        x = np.linspace(0, 1, 256)
        curve = x + camera.contrast * (x * x * (3 - 2 * x) - x)
        picture = np.round(255 * curve).astype(np.uint8)[picture]
    return picture


def _shadow(coverage, light):
    """(size, size) uint8: the layer's shadow on a wall behind it, soft."""
    size = len(coverage)
    dx, dy = light.direction[:2] * size * light.wall
    shadow = Image.fromarray((coverage * f4(255)).astype(np.uint8))
    shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy))
    return np.asarray(_blur(shadow, size / 24 * (light.wall / 0.1)))


def _motion_blur(image, reach):
    """Mean of seven copies of (3, H, H), shifted by -reach to reach (rows, columns)."""
    size = image.shape[1]
    pad = int(np.abs(reach).max()) + 1
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    shifts = np.round(np.outer(np.linspace(-1, 1, 7), reach)).astype(int)
    copies = [padded[:, row:row + size, column:column + size] for row, column in shifts + pad]
    return sum(copies) * f4(1 / 7)
