"""One photograph of coloured meshes: light with shadows, a cluttered background, a camera with faults.

Nothing here knows about hands. Colours of lights and surfaces are linear RGB, those of pictures sRGB 0..1.
The rasteriser is an argument of `render`: `draw.rasterise`, or any other that returns the same. The recipe is
ours.

Example::

    import numpy as np
    from PIL import Image
    from photo import photograph, random_background, random_camera, random_light

    rng = np.random.default_rng(0)
    camera = random_camera(rng)
    light = random_light(rng)
    background = random_background(rng, 128)
    layer = np.zeros((128, 128, 4), np.float32)  # RGB and coverage, as `render` returns them
    layer[40:90, 40:90] = 0.9, 0.5, 0.2, 1  # here a square
    picture = photograph(rng, camera, light, background, layer, motion=np.array([1.0, 0.0]))
    Image.fromarray(picture).save("photo.png", quality=camera.quality)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import uniform_filter

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
    """Means of 2 x 2 pixels: (2H, 2W, ...) -> (H, W, ...)."""
    image = image[0::2] + image[1::2]
    return (image[:, 0::2] + image[:, 1::2]) * f4(0.25)


def _blur(picture, radius):
    return picture.filter(ImageFilter.GaussianBlur(radius)) if radius > 0 else picture


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


@dataclass
class Camera:
    gain: np.ndarray  # (3,) exposure and white balance
    noise: float  # standard deviation, in levels of 0..255
    defocus: float  # pixels of an image of 128
    quality: int  # of the JPEG file


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


def random_background(rng: np.random.Generator, size: int, tones=()) -> np.ndarray:
    """(H, H, 3) sRGB, H = 1.25 size: a gradient, noise, stripes and shapes, more or less blurred.

    tones (M, 3): colours of the thing to be photographed. Some backgrounds show one of them, so that its
    colour alone does not give it away.
    """
    side = int(1.25 * size)
    angle = rng.uniform(0, 6.3)
    y, x = np.mgrid[0:side, 0:side] / side
    palette = rng.uniform(0, 1, (6, 3)) * rng.uniform(0.4, 1.1)
    grey = palette.mean(1, keepdims=True)
    palette = np.clip(grey + (palette - grey) * rng.uniform(0.2, 1), 0, 1)
    if rng.random() < 0.4 and len(tones):
        palette[5] = tones[rng.integers(len(tones))]

    ramp = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-0.3, 0.6)
    ramp = ramp[..., None].clip(0, 1)
    image = palette[0] * (1 - ramp) + palette[1] * ramp
    coarse = rng.integers(2, 7)
    fine = rng.integers(12, 40)
    for cells, strength in ((coarse, 0.5), (fine, 0.16)):
        noise = Image.fromarray(_to_uint8(rng.normal(0.5, 0.25, (cells, cells, 3))))
        noise = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 255 - 0.5
        image = image + strength * rng.random() * pick(rng, noise, noise.mean(2, keepdims=True))
    if rng.random() < 0.35:
        across = np.cos(angle) * y - np.sin(angle) * x
        wave = np.sin(across * rng.uniform(15, 90))[..., None]
        stripes = rng.uniform(0.02, 0.14) * np.tanh(wave * rng.uniform(1, 8))
        image = image + stripes * (palette[2] - palette[3])

    picture = Image.fromarray(_to_uint8(image))
    picture = picture.resize((2 * side, 2 * side))  # shapes are drawn large and averaged
    shapes = int(rng.integers(22)) if rng.random() < 0.8 else 0
    for _ in range(shapes):
        _draw_shape(rng, picture, palette)
    radius = pick(rng, 0, 0.6, 1.5, 3.0) * size / 128
    return np.asarray(_blur(picture.reduce(2), radius)) / 255.0


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
    texture: Callable  # coordinates (P, C) float32 -> albedo (P, 3), gloss (P,)
    wrap: tuple  # RGB: how far light reaches round the edge; more red for skin


def matt(colors: np.ndarray):
    """Texture of a surface that is painted: its coordinates are linear RGB."""
    return colors, f4(0.03)


def render(meshes: list[Mesh], K: np.ndarray, size: int, light: Light, rasterise: Callable):
    """Lit meshes without a background.

    K (3, 3): intrinsics, of pixel centres; size: side of the image in pixels; rasterise(points, faces, size,
    cull): as `draw.rasterise`.

    Returns
        layer (size, size, 4) float32: sRGB times coverage, and coverage;
        depth (2 size, 2 size) in metres, inf where nothing is;
        vertex (2 size, 2 size): the number of the first corner of the face shown, counted through all meshes,
            -1 where nothing is.
    """
    points = np.concatenate([mesh.vertices for mesh in meshes])
    normals = np.concatenate([mesh.normals for mesh in meshes])
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)])
    faces = faces[(points[:, 2] > NEAREST)[faces].all(1)]

    fine = (2 * size, 2 * size)  # averaged afterwards, which smooths the edges
    homogeneous = points @ K.T
    pixels = homogeneous[:, :2] / np.maximum(homogeneous[:, 2:], 1e-3)
    edges = (pixels + 0.5) * 2  # pixel edges of the fine image
    face, bary, depth = rasterise(np.concatenate([edges, points[:, 2:]], 1), faces, fine)
    hit = face >= 0
    corner = faces[face[hit]]  # (P, 3) of the P pixels hit
    weight = bary[hit]

    place = _interpolate(points, corner, weight)
    normal = unit(_interpolate(normals, corner, weight))
    albedo = np.empty_like(place)
    wrap = np.empty_like(place)
    gloss = np.empty(len(place), f4)
    owner = np.searchsorted(starts, corner[:, 0], side="right") - 1  # (P,) mesh of each pixel
    for k, mesh in enumerate(meshes):
        shown = owner == k
        coordinates = _interpolate(mesh.coordinates, corner[shown] - starts[k], weight[shown])
        albedo[shown], gloss[shown] = mesh.texture(coordinates)
        wrap[shown] = mesh.wrap

    lit = _key_light(points, faces, place, light.direction, rasterise)
    openness = _openness(depth, hit, size)
    color = _shade(light, place, normal, albedo, gloss, wrap, lit[:, None], openness[:, None])
    layer = np.zeros((*fine, 4), f4)
    layer[hit, :3] = color
    layer[hit, 3] = 1
    vertex = np.full(fine, -1)
    vertex[hit] = corner[:, 0]
    return half_size(layer), depth, vertex


def _interpolate(values, corner, weight):
    """Values (N, C) of vertices at pixels with corners (P, 3) and weights (P, 3): (P, C) float32."""
    return np.einsum("pk,pkc->pc", weight, values.astype(f4)[corner])


def _key_light(points, faces, place, direction, rasterise, cells=128):
    """Part (P,) of the key light that reaches places (P, 3): a depth map seen from the light, four taps."""
    right = unit(np.cross(direction, [0.3, 0.9, 0.1]))
    axes = np.stack([right, np.cross(right, direction), -direction])
    mesh = np.einsum("pk,ck->cp", points, axes)  # (3, N) in the light's frame
    u, v, far = np.einsum("pk,ck->cp", place, axes)  # (P,) each
    scale = (cells - 4) / max(np.ptp(u), np.ptp(v), 1e-6)
    corner = np.array([u.min(), v.min()])[:, None] - 2 / scale
    mesh[:2] = (mesh[:2] - corner) * scale
    u, v = (np.stack([u, v]) - corner) * scale
    depth = rasterise(mesh.T, faces, (cells, cells), cull=True)[2]
    lit = np.zeros(len(place), int)  # taps out of four
    for row in (v - 0.6, v + 0.6):
        for column in (u - 0.6, u + 0.6):
            lit += depth[row.astype(int), column.astype(int)] > far - 0.004
    return lit / 4


def _openness(depth, hit, size):
    """(P,) 1 in the open, towards 0 in hollows: how far a pixel lies behind the mean depth around it."""
    filled = np.where(hit, depth, depth[hit].max() + 0.03)
    hollow = 0
    for radius in (3, 9):  # pixels of an image of 128
        around = uniform_filter(filled, 2 * round(radius * size / 128) + 1)
        hollow = hollow + np.clip(filled - around, 0, 0.02)
    return np.exp(-45 * hollow[hit])


def _shade(light, place, normal, albedo, gloss, wrap, lit, openness):
    """sRGB (P, 3): a wrapped Lambert term, ambient light darkened in hollows, a highlight.

    place, normal, albedo, wrap (P, 3); gloss (P,); lit, openness (P, 1).
    """
    facing = np.einsum("pc,c->p", normal, light.direction.astype(f4))[:, None]
    diffuse = np.maximum(facing + wrap, 0) / (1 + wrap) * lit
    up = 0.5 - 0.5 * normal[:, 1:2]
    ambient = light.sky * up + light.bounce * (1 - up)
    color = albedo * (diffuse * light.key + openness * ambient)
    halfway = unit(light.direction - unit(place))
    shine = np.einsum("pc,pc->p", normal, halfway).clip(0, 1) ** 22 * gloss
    color = color * (0.45 + 0.55 * openness) + 2 * shine[:, None] * lit * light.key
    rolled_off = np.where(color < 0.5, color, 1 - 0.5 * np.exp(1 - 2 * color))  # highlights
    return rolled_off ** (1 / 2.2)


# ----------------------------------------------------------------------------------------------------- camera
def photograph(rng: np.random.Generator, camera: Camera, light: Light, background: np.ndarray,
               layer: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """The layer over its background, as a camera with faults sees it: exposure, blur, noise.

    background: of `random_background`; layer (size, size, 4): of `render`; motion (2,): x, y along which a
    picture is blurred now and then. Returns (size, size, 3) uint8.
    """
    size = len(layer)
    row, column = (rng.uniform(0.35, 0.65, 2) * (len(background) - size)).astype(int)
    image = background[row:row + size, column:column + size]
    if light.casts_shadow:
        image = image * (1 - _shadow(layer[..., 3], light) * (0.5 / 255))
    image = (image * (1 - layer[..., 3:]) + layer[..., :3]) * camera.gain
    if rng.random() < 0.15:
        direction = unit(motion + rng.normal(0, 0.5, 2))
        image = _motion_blur(image, direction[::-1] * rng.uniform(0.005, 0.025) * size)
    picture = _blur(Image.fromarray(_to_uint8(image)), camera.defocus * size / 128)
    noise = rng.standard_normal(image.shape, dtype=f4) * f4(camera.noise)
    return (np.asarray(picture, f4) + noise).clip(0, 255).astype(np.uint8)


def _shadow(coverage, light):
    """(size, size, 1) uint8: the layer's shadow on a wall behind it, soft."""
    size = len(coverage)
    dx, dy = light.direction[:2] * size * 0.1
    shadow = Image.fromarray((coverage * 255).astype(np.uint8))
    shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy))
    return np.asarray(_blur(shadow, size / 24))[..., None]


def _motion_blur(image, reach):
    """Mean of seven copies, shifted by -reach to reach (rows, columns)."""
    size = len(image)
    pad = int(np.abs(reach).max()) + 1
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    shifts = np.round(np.outer(np.linspace(-1, 1, 7), reach)).astype(int)
    copies = [padded[row:row + size, column:column + size] for row, column in shifts + pad]
    return np.mean(copies, 0)
