"""Views: one 2x3 matrix theta from view to canvas coordinates; warps, colours and normalisation of batches."""

import math

import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet, in every stage
BLUR = 3.0                                                    # widest Gaussian of strong_color, in pixels at 224


# ---------------------------------------------------------------------------------------------------------------- views
def random_theta(batch, generator, rotation, scale, shift):
    """(B,2,3) views: A = s R(phi), t; phi ~ U(-rotation, rotation) radians, log s ~ U over scale = (low, high), t ~
    U(-shift, shift) per axis in canvas units. phi > 0 turns the window clockwise on screen, the content the other way."""
    phi, zoom, move_x, move_y = torch.rand(4, batch, generator=generator)
    phi = (2 * phi - 1) * rotation
    zoom = torch.exp(math.log(scale[0]) + zoom * math.log(scale[1] / scale[0]))
    cos, sin = zoom * phi.cos(), zoom * phi.sin()
    rows = [torch.stack([cos, -sin, (2 * move_x - 1) * shift], -1), torch.stack([sin, cos, (2 * move_y - 1) * shift], -1)]
    return torch.stack(rows, 1)


def centre_theta(batch, scale):
    """(B,2,3) the upright view in the middle of the canvas, `scale` of its size."""
    return torch.tensor([[scale, 0.0, 0.0], [0.0, scale, 0.0]]).expand(batch, 2, 3)


def apply_theta(theta, points):
    """Points (B,K,2) of the views -> canvas coordinates: A p + t. Undoing a view IS this."""
    return points @ theta[:, :, :2].transpose(1, 2) + theta[:, None, :, 2]


def invert_theta(theta):
    """(B,2,3) such that compose_theta(theta, inverse) is the identity: canvas -> view coordinates."""
    linear = torch.linalg.inv(theta[:, :, :2])
    return torch.cat([linear, -linear @ theta[:, :, 2:]], dim=2)


def compose_theta(outer, inner):
    """(B,2,3): first inner, then outer, p -> outer(inner(p))."""
    linear = outer[:, :, :2]
    return torch.cat([linear @ inner[:, :, :2], linear @ inner[:, :, 2:] + outer[:, :, 2:]], dim=2)


def theta_rotation(theta):
    """(B,3,3) R_z(-phi): turns 3-D labels of the canvas with the content of the view (camera axes x right, y down)."""
    phi = torch.atan2(theta[:, 1, 0], theta[:, 0, 0])
    cos, sin, zero, one = phi.cos(), phi.sin(), torch.zeros_like(phi), torch.ones_like(phi)
    return torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], -1).view(-1, 3, 3)


def warp(images, theta, size):
    """Canvases (B,C,H,W) u8 or float -> views (B,C,size,size) float, u8 scaled to [0,1]; outside is reflected.

    Bilinear sampling aliases when the view is coarser than about 1.5 canvas pixels: then the view is drawn twice as fine
    and averaged 2x2, which is exact under this convention.
    """
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    step = theta[:, :, :2].norm(dim=1).amax() * images.shape[-1] / size
    finer = 1 if step <= 1.5 else 2 ** math.ceil(math.log2(float(step) / 1.5))
    grid = F.affine_grid(theta, [len(images), images.shape[1], size * finer, size * finer], align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(views, finer) if finer > 1 else views


# --------------------------------------------------------------------------------------------------------------- colour
def random_color(batch, generator, gain=0.4, brightness=0.2, contrast=0.3, saturation=0.3, grey=0.0):
    """(B,6) factors for apply_color: three channel gains, brightness, contrast, saturation, each U(1-x, 1+x); a share `grey`
    of the views loses its colours."""
    spread = torch.tensor([gain, gain, gain, brightness, contrast, saturation])
    factors = 1 + (2 * torch.rand(batch, 6, generator=generator) - 1) * spread
    if grey:
        factors[torch.rand(batch, generator=generator) < grey, 5] = 0
    return factors


def apply_color(images, factors):
    """Views (B,3,H,W) in [0,1] with the factors of random_color; stays in [0,1]."""
    factors = factors[:, :, None, None]
    images = images * (factors[:, :3] * factors[:, 3:4])
    images = (images - images.mean((1, 2, 3), keepdim=True)) * factors[:, 4:5] + images.mean((1, 2, 3), keepdim=True)
    grey = images.mean(1, keepdim=True)
    return ((images - grey) * factors[:, 5:6] + grey).clamp(0, 1)


def random_hsv(batch, generator):
    """(B,4) for apply_hsv: factors of hue U(.01,1), saturation U(.01,1) and value U(.5,1), and U(5,20)/255 added to the value
    (dahiyaaneesh/peclr src/data_loader/sample_augmenter.py, which takes BGR for RGB; here the channels are in order)."""
    low, high = torch.tensor([[0.01, 0.01, 0.5, 5 / 255], [1.0, 1.0, 1.0, 20 / 255]])
    return low + (high - low) * torch.rand(batch, 4, generator=generator)


def apply_hsv(images, factors):
    """Views (B,3,H,W) in [0,1] with hue, saturation and value times the factors of random_hsv (B,4)."""
    hue, saturation, value = (factors[:, i, None, None] for i in range(3))
    top, channel = images.max(1)                                   # (B,H,W)
    spread = top - images.amin(1)
    r, g, b = images.unbind(1)
    sector = torch.stack([(g - b) % (6 * spread).clamp(min=1e-6), b - r + 2 * spread, r - g + 4 * spread], 1)
    h = sector.gather(1, channel[:, None])[:, 0] / spread.clamp(min=1e-6) * hue              # 0 .. 6
    chroma, top = spread / top.clamp(min=1e-6) * saturation, top * value + factors[:, 3, None, None]
    chroma = chroma * top
    corner = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = (corner + h[:, None]) % 6
    return (top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def random_light(batch, generator, spread):
    """(B,3,4,4) gains U(1-spread, 1+spread) on a coarse grid: tinted light that changes smoothly over the view (ours)."""
    return 1 + (2 * torch.rand(batch, 3, 4, 4, generator=generator) - 1) * spread


def apply_light(images, light):
    """Views (B,3,H,W) in [0,1] times the grid of random_light, interpolated."""
    return (images * F.interpolate(light, images.shape[-2:], mode="bicubic", align_corners=False)).clamp(0, 1)


def random_blur(batch, generator, sigma, share):
    """(B,) Gaussian widths, U over sigma = (low, high) in pixels for a share of the views, 0 for the others."""
    width, chosen = torch.rand(2, batch, generator=generator)
    return torch.where(chosen < share, sigma[0] + (sigma[1] - sigma[0]) * width, 0.0)


def blur(images, sigma, widest):
    """Views (B,3,H,W) convolved with Gaussians of widths sigma (B,) pixels, cut at three times the widest there can be; edges are
    reflected. sigma lies on the CPU, so that the views left sharp cost nothing."""
    rows, radius = sigma.nonzero().squeeze(1), math.ceil(3 * widest)
    if not len(rows):
        return images
    offsets = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offsets / sigma[rows, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).to(images.device)[:, :, None, None, None]      # (R, 2r+1, 1, 1, 1)
    rows = rows.to(images.device)
    blurred = images[rows]
    for pad, axis in (((radius, radius, 0, 0), 3), ((0, 0, radius, radius), 2)):
        padded = F.pad(blurred, pad, mode="reflect")
        blurred = sum(taps[:, i] * padded.narrow(axis, i, images.shape[axis]) for i in range(len(offsets)))
    return images.index_copy(0, rows, blurred)


def strong_color(strength, size):
    """The three draws (batch, generator) whose results apply_strong_color takes: tinted light, gains and jitter with a share of grey, blur.
    Strength 1: factors of 1 +- .4, a fifth grey, three tenths blurred by up to 3 pixels at 224 (ours, after iBOT)."""
    jitter, pixels = min(0.9, 0.4 * strength), size / 224
    return (lambda batch, generator: random_light(batch, generator, jitter),
            lambda batch, generator: random_color(batch, generator, jitter, jitter, jitter, jitter, grey=min(1, 0.2 * strength)),
            lambda batch, generator: random_blur(batch, generator, (0.1 * pixels, BLUR * pixels), min(1, 0.3 * strength)))


def apply_strong_color(images, light, factors, sigma):
    """Views (B,3,S,S) in [0,1] with the draws of strong_color, which may lie on the CPU; sigma must."""
    images = apply_color(apply_light(images, light.to(images.device)), factors.to(images.device))
    return blur(images, sigma, BLUR * images.shape[-1] / 224)


def normalise(images):
    """RGB in [0,1] -> what the encoders see: ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def to_rgb(views):
    """Normalised views (B,3,S,S) -> pictures (B,S,S,3) u8."""
    images = views.float().cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
