"""Views: the one idea that every stage rests on.

A hand is stored once, as a square canvas. A view is a cut of the canvas, and one 2x3 matrix theta says which:

    theta = [A | t] maps VIEW coordinates to CANVAS coordinates        p_canvas = A p_view + t

Coordinates are [-1, 1], x right, y down, +-1 at the image's edges (align_corners=False). So

    the image of a view        warp(canvas, theta, size)               reads the canvas at A p + t
    points, view -> canvas     apply_theta(theta, points)              "undoing the view" IS applying theta
    labels, canvas -> view     apply_theta(invert_theta(theta), points)
    3-D labels                 theta_rotation(theta) @ joints          turn with the content of the view

Functions that draw (`random_...`) return theta or factors and change nothing; functions that apply (`warp`,
`apply_...`) draw nothing. So an image, its joints and the undoing of both use the same numbers. theta may
have leading axes: the two views of B hands are theta (2, B, 2, 3), and the other view is `.flip(0)`.

Example::

    import math, torch
    from views import apply_theta, invert_theta, random_theta, warp

    canvas = torch.rand(4, 3, 256, 256)                                # four hands
    theta = random_theta(4, torch.Generator().manual_seed(0), math.radians(45), (0.5, 0.8), 0.1)
    view = warp(canvas, theta, 224)                                    # (4, 3, 224, 224)
    joints = torch.zeros(4, 21, 2)                                     # at the middle of each canvas
    seen = apply_theta(invert_theta(theta), joints)                    # where the view shows them
    assert torch.allclose(apply_theta(theta, seen), joints, atol=1e-6)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB, in every stage
STD = (0.229, 0.224, 0.225)
WIDEST_BLUR = 3.0  # widest Gaussian of strong_color, in pixels of a view of 224


# --------------------------------------------------------------------------------------------------- geometry
def random_theta(batch, generator, rotation, scale, shift):
    """Random views (B,2,3): A = s R(phi), t.

    phi ~ U(-rotation, rotation), radians. log s ~ U over scale = (low, high). t ~ U(-shift, shift) in x and
    in y, in canvas units. phi > 0 turns the window clockwise on the screen, so the content turns the other
    way."""
    phi, zoom, shift_x, shift_y = torch.rand(4, batch, generator=generator)
    phi = (2 * phi - 1) * rotation
    zoom = torch.exp(math.log(scale[0]) + zoom * math.log(scale[1] / scale[0]))
    cos = zoom * phi.cos()
    sin = zoom * phi.sin()
    row_x = torch.stack([cos, -sin, (2 * shift_x - 1) * shift], -1)
    row_y = torch.stack([sin, cos, (2 * shift_y - 1) * shift], -1)
    return torch.stack([row_x, row_y], 1)


def centre_theta(batch, scale):
    """The upright view (B,2,3) in the middle of the canvas; its side is `scale` times the canvas'."""
    return torch.tensor([[scale, 0.0, 0.0], [0.0, scale, 0.0]]).expand(batch, 2, 3)


def apply_theta(theta, points):
    """Points (...,K,2) of the views -> canvas coordinates, A p + t. theta (...,2,3)."""
    return points @ theta[..., :2].transpose(-1, -2) + theta[..., None, :, 2]


def upright_views(canvas, scale, size):
    """Canvases (B,3,H,W) seen through centre_theta -> views (B,3,size,size) as the encoders see them."""
    return normalise(warp(canvas, centre_theta(len(canvas), scale).to(canvas.device), size))


def invert_theta(theta):
    """The inverse (...,2,3) of theta: canvas -> view coordinates."""
    linear = torch.linalg.inv_ex(theta[..., :2]).inverse  # inv would wait for a GPU, to see if it worked
    return torch.cat([linear, -linear @ theta[..., 2:]], dim=-1)


def compose_theta(outer, inner):
    """theta (...,2,3) of first inner, then outer: p -> outer(inner(p))."""
    linear = outer[..., :2]
    return torch.cat([linear @ inner[..., :2], linear @ inner[..., 2:] + outer[..., 2:]], dim=-1)


def theta_rotation(theta):
    """R_z(-phi) (B,3,3) of theta (B,2,3): turns 3-D labels with the content of the view (camera x right, y
    down)."""
    phi = torch.atan2(theta[:, 1, 0], theta[:, 0, 0])
    cos, sin = phi.cos(), phi.sin()
    zero, one = torch.zeros_like(phi), torch.ones_like(phi)
    return torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], -1).view(-1, 3, 3)


def warp(canvas, theta, size, finer=None):
    """Canvases (B,C,H,W), u8 or float, seen through theta (...,B,2,3) -> views (...,B,C,size,size), float; u8
    becomes [0,1].

    What lies outside the canvas is reflected. Each pixel of a view is the mean of finer x finer bilinear
    samples, which is exact under this convention. finer: a number, the same for all views, or None: what
    each view needs (choose_finer), for which its theta is read back from a GPU."""
    canvas = canvas.float() / 255 if canvas.dtype == torch.uint8 else canvas
    leading = theta.shape[:-3]
    canvas = canvas.expand(*leading, *canvas.shape).reshape(-1, *canvas.shape[1:])
    theta = theta.reshape(-1, 2, 3)
    if finer is not None:
        return _warp(canvas, theta, size, finer).unflatten(0, (*leading, -1))
    scales = theta[:, :, 0].norm(dim=1).tolist()
    needed = torch.tensor([choose_finer(scale, canvas.shape[-1], size) for scale in scales])
    views = canvas.new_empty(*canvas.shape[:2], size, size)
    for each in needed.unique().tolist():
        rows = (needed == each).nonzero().squeeze(1).to(canvas.device)
        views[rows] = _warp(canvas[rows], theta[rows], size, each)
    return views.unflatten(0, (*leading, -1))


def choose_finer(scale, canvas, size):
    """Samples along a side of a view's pixel, a power of 2, for views of side `scale` times the canvas'.

    canvas, size: sides of canvas and view in pixels. One sample aliases where a pixel of the view is wider
    than about 1.5 of the canvas."""
    pixel = scale * canvas / size
    return 1 if pixel <= 1.5 else 2 ** math.ceil(math.log2(pixel / 1.5))


def _warp(canvas, theta, size, finer):
    shape = [len(theta), canvas.shape[1], size * finer, size * finer]
    places = F.affine_grid(theta, shape, align_corners=False)
    views = F.grid_sample(canvas, places, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(views, finer) if finer > 1 else views


# ----------------------------------------------------------------------------------------------------- colour
def random_color(batch, generator, gain=0.4, brightness=0.2, contrast=0.3, saturation=0.3, grey=0.0):
    """Factors (B,6) for apply_color: three channel gains, brightness, contrast, saturation, each ~ U(1-x,
    1+x).

    A share `grey` of the views gets saturation 0.
    """
    spread = torch.tensor([gain, gain, gain, brightness, contrast, saturation])
    factors = 1 + (2 * torch.rand(batch, 6, generator=generator) - 1) * spread
    if grey:
        factors[torch.rand(batch, generator=generator) < grey, 5] = 0
    return factors


def apply_color(images, factors):
    """Images (B,3,H,W) in [0,1] with the factors of random_color (B,6); the result stays in [0,1]."""
    gains = factors[:, :3] * factors[:, 3:4]  # (B, 3)
    contrast, saturation = factors[:, 4], factors[:, 5]  # (B,)
    mean = (images.mean((2, 3)) * gains).mean(1)  # (B,), of the picture after its gains
    # All three steps are linear: the gains, the contrast about the mean, the saturation about the grey level.
    keep = torch.diag_embed(saturation[:, None].expand(-1, 3))
    mixed = keep + (1 - saturation)[:, None, None] / 3  # (B, 3, 3)
    matrix = mixed * (contrast[:, None] * gains)[:, None]
    added = ((1 - contrast) * mean)[:, None, None]
    return torch.baddbmm(added, matrix, images.flatten(2)).clamp_(0, 1).view_as(images)


def random_hsv(batch, generator):
    """Factors (B,4) for apply_hsv: hue U(.01,1), saturation U(.01,1), value U(.5,1), and U(5,20)/255 added to
    the value.

    PeCLR's ranges (dahiyaaneesh/peclr src/data_loader/sample_augmenter.py, which takes BGR for RGB; here the
    order is right)."""
    low = torch.tensor([0.01, 0.01, 0.5, 5 / 255])
    high = torch.tensor([1.0, 1.0, 1.0, 20 / 255])
    return low + (high - low) * torch.rand(batch, 4, generator=generator)


def apply_hsv(images, factors):
    """Images (B,3,H,W) in [0,1] with hue, saturation and value times the factors of random_hsv (B,4)."""
    hue, saturation, value, added = factors[:, :, None, None].unbind(1)  # (B, 1, 1) each
    brightest, channel = images.max(1)  # (B, H, W)
    spread = brightest - images.amin(1)
    r, g, b = images.unbind(1)
    sector = torch.stack([(g - b) % (6 * spread).clamp(min=1e-6), b - r + 2 * spread, r - g + 4 * spread], 1)
    h = sector.gather(1, channel[:, None])[:, 0] / spread.clamp(min=1e-6) * hue  # (B, H, W), 0 .. 6
    chroma = spread / brightest.clamp(min=1e-6) * saturation
    brightest = brightest * value + added
    chroma = chroma * brightest
    k = (_channels((5.0, 3.0, 1.0), images.device, images.dtype) + h[:, None]) % 6
    return (brightest[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def random_light(batch, generator, spread):
    """Gains (B,3,4,4) ~ U(1-spread, 1+spread) on a coarse grid: tinted light that changes smoothly over the
    view (ours)."""
    return 1 + (2 * torch.rand(batch, 3, 4, 4, generator=generator) - 1) * spread


def apply_light(images, light):
    """Images (B,3,H,W) in [0,1] times the grid of random_light, interpolated (bicubic)."""
    down, across = (_bicubic(4, length, images) for length in images.shape[-2:])
    return (images * (down @ light.to(images.dtype) @ across.T)).clamp_(0, 1)


def _bicubic(few, many, like):
    """Matrix (many,few) that interpolates `few` numbers on a line, as F.interpolate does."""
    steps = torch.eye(few, device=like.device, dtype=like.dtype)[:, None, :, None]
    return F.interpolate(steps, (many, 1), mode="bicubic", align_corners=False)[:, 0, :, 0].T


def random_blur(batch, generator, sigma, share):
    """Widths (B,) of Gaussians in pixels: U over sigma = (low, high) for a share of the views, 0 for the
    others."""
    width, chosen = torch.rand(2, batch, generator=generator)
    return torch.where(chosen < share, sigma[0] + (sigma[1] - sigma[0]) * width, 0.0)


def blur(images, sigma, rows, widest):
    """Images (B,3,H,W), of which `rows` (R,) are convolved with Gaussians of widths sigma (B,), pixels.

    Cut off at three times `widest`. Edges are reflected. rows: where sigma is above 0 (rows_to_blur)."""
    if not len(rows):
        return images
    radius = math.ceil(3 * widest)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    taps = torch.exp(-0.5 * (offsets / sigma[rows, None]) ** 2).to(images.dtype)  # (R, 2 radius + 1)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # (3R, 1, 2 radius + 1)
    planes = images[rows].flatten(0, 1)[None]  # (1, 3R, H, W): each has a kernel of its own
    across, down = taps[:, :, None], taps[..., None]
    for padding, kernels in (((radius, radius, 0, 0), across), ((0, 0, radius, radius), down)):
        planes = F.conv2d(F.pad(planes, padding, mode="reflect"), kernels, groups=len(kernels))
    return images.index_copy(0, rows, planes[0].unflatten(0, (-1, 3)))


def rows_to_blur(sigma):
    """The rows (R,) of the views, in order, that random_blur's sigma (...,B) on the CPU asks to be blurred.

    Found before sigma goes to a GPU, because there the loop would have to wait for the answer."""
    return sigma.flatten().nonzero().squeeze(1)


def strong_color(strength, size):
    """The three draws (batch, generator) -> tensor whose results apply_strong_color takes: light, color,
    blur.

    Strength 1: factors of 1 +- .4, a fifth of the views grey, three tenths blurred by up to 3 pixels at 224
    (ours, after iBOT)."""
    jitter = min(0.9, 0.4 * strength)
    pixels = size / 224
    return (partial(random_light, spread=jitter),
            partial(random_color, gain=jitter, brightness=jitter, contrast=jitter, saturation=jitter,
                    grey=min(1, 0.2 * strength)),
            partial(random_blur, sigma=(0.1 * pixels, WIDEST_BLUR * pixels), share=min(1, 0.3 * strength)))


def apply_strong_color(images, light, color, sigma, blurred):
    """Images (...,3,S,S) in [0,1] with the draws of strong_color for them; blurred: rows_to_blur(sigma)."""
    leading = images.shape[:-3]
    images = images.flatten(0, -4)
    images = apply_light(images, light.reshape(-1, 3, 4, 4))
    images = apply_color(images, color.reshape(-1, 6))
    images = blur(images, sigma.flatten(), blurred, WIDEST_BLUR * images.shape[-1] / 224)
    return images.unflatten(0, leading)


def random_cover(batch, generator, share):
    """Rectangles (B,4) = x0, y0, x1, y1 in [-1,1] for a share of the views, empty ones for the others. Middle
    U(-1, 1), sides U(.3, 1) in both directions (ours)."""
    numbers = torch.rand(5, batch, generator=generator)
    middle = 2 * numbers[:2] - 1  # (2, B)
    half = (0.3 + 0.7 * numbers[2:4]) / 2 * (numbers[4] < share)
    return torch.cat([middle - half, middle + half]).T


def apply_cover(images, boxes):
    """Images (B,3,S,S) that show, inside the rectangles of random_cover, what lies opposite in the image: a
    piece of background, or of the hand where none belongs."""
    size = images.shape[-1]
    line = (torch.arange(size, device=images.device) + 0.5) * 2 / size - 1  # (S,)
    x0, y0, x1, y1 = boxes.T[..., None]  # (B, 1) each
    across = (line > x0) & (line < x1)  # (B, S)
    down = (line > y0) & (line < y1)
    inside = down[:, None, :, None] & across[:, None, None]  # (B, 1, S, S)
    return torch.where(inside, images.flip(2, 3), images)


def two_views(draw):
    """A draw (batch, generator) -> (batch,...) as one for two views: (batch, generator) -> (2,batch,...)."""
    return lambda batch, generator: draw(2 * batch, generator).unflatten(0, (2, batch))


# ---------------------------------------------------------------------------------------------- normalisation
def normalise(images):
    """RGB (...,3,H,W) in [0,1] -> what the encoders see: minus ImageNet's mean, over its standard
    deviation."""
    mean, std = (_channels(values, images.device, images.dtype) for values in (MEAN, STD))
    return torch.addcmul(-mean / std, images, 1 / std)


@lru_cache
def _channels(values, device, dtype):
    """A number for each channel (3,1,1); made once, because a copy to a GPU makes the loop wait."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def to_pixels(points, size):
    """Points (...,2) in [-1,1] of an image -> pixel-CENTRE coordinates of one of this side, numpy."""
    return ((points + 1) * size / 2 - 0.5).cpu().numpy()


def to_rgb(views):
    """Normalised views (B,3,S,S) -> pictures (B,S,S,3), u8 numpy."""
    images = views.float().cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
