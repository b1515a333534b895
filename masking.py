"""Masks over patches, and what tokens are asked for: pixels of patches, a small picture, edges (HOG).

Square images, patches in rows. A mask is bool (B,N), True = hidden. Masks are drawn on the CPU by a
generator, so that they are the same on every device.

Example::

    import torch
    from masking import block_mask, hog_targets, to_patches

    views = torch.rand(2, 4, 3, 64, 64)                          # two views of four hands
    mask = block_mask(4, 4, 0.5, torch.Generator().manual_seed(0))  # (4, 16)
    hidden = to_patches(views[0], 16)[mask]                      # (M, 768) pixels of the hidden patches
    whole, of_patches = hog_targets(views, 16)                   # (2, 4, 512), (2, 4, 16, 32)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

PICTURE = 16  # pixels a side of the small picture of a view
HOG_CELLS = 8  # cells a side of the whole view's HOG
HOG_DIRECTIONS = 8  # of 180 degrees


# ------------------------------------------------------------------------------------------------------ masks
def block_mask(batch, grid, ratio, generator):
    """Masks (B,N) bool, True = hidden: rectangles of random size and shape until ratio x N patches are
    hidden, never more.

    As bytedance/ibot loader.py. grid: patches a side, or (rows, columns). ratio: a number, or (B,) one for
    each image."""
    H, W = (grid, grid) if isinstance(grid, int) else grid
    wanted = torch.as_tensor(ratio, dtype=torch.float32).expand(batch).numpy() * H * W
    least = least_block(H, W)
    flattest = math.log(0.3)  # of the rectangles' log aspect ratio
    mask = np.zeros((batch, H, W), bool)  # numpy, because the arrays of a step are too small for torch
    hidden = np.zeros(batch, int)
    tries = np.zeros(batch, int)
    while True:
        rows = np.flatnonzero((wanted - hidden >= 1) & (tries < 10))  # (R,) unfinished
        if not len(rows):
            return torch.from_numpy(mask).flatten(1)
        area, aspect, top, left = torch.rand(4, batch, generator=generator).numpy()[:, rows]
        room = wanted[rows] - hidden[rows]
        area = np.maximum(least + area * (room - least), 0)
        aspect = np.exp(flattest - 2 * flattest * aspect)
        height = np.sqrt(area * aspect).round()
        width = np.sqrt(area / aspect).round()
        top = np.floor(top * (H - height + 1))
        left = np.floor(left * (W - width + 1))
        in_rows = _between(H, top, height)  # (R, H)
        in_columns = _between(W, left, width)  # (R, W)
        added = in_rows[:, :, None] & in_columns[:, None] & ~mask[rows]  # (R, H, W)
        count = added.sum((1, 2))
        fits = (height < H) & (width < W) & (count > 0) & (count <= room)
        mask[rows[fits]] |= added[fits]
        hidden[rows[fits]] += count[fits]
        tries[rows] = np.where(fits, 0, tries[rows] + 1)


def _between(length, first, count):
    """(R,length) True at the places first .. first + count - 1."""
    place = np.arange(length)
    return (place >= first[:, None]) & (place < (first + count)[:, None])


def least_block(H, W):
    """Patches of the smallest rectangle that block_mask starts with."""
    return max(1, min(H, W) // 3) ** 2


def random_mask(batch, grid, ratio, generator):
    """Masks (B,N) bool, True = hidden: floor(ratio x N) patches of each image, anywhere. grid, ratio: as
    block_mask's."""
    N = grid * grid if isinstance(grid, int) else grid[0] * grid[1]
    wanted = (torch.as_tensor(ratio, dtype=torch.float32).expand(batch) * N + 1e-4).floor()
    rank = torch.rand(batch, N, generator=generator).argsort(1).argsort(1)
    return rank < wanted[:, None]


def mask_sampler(make_mask, grid, ratio, share):
    """A draw (batch, generator) -> masks (B,N): a `share` of the views hides a ratio ~ U(low, high), the
    others nothing."""
    def draw(batch, generator):
        drawn, chosen = torch.rand(2, batch, generator=generator)
        wanted = ratio[0] + drawn * (ratio[1] - ratio[0])
        return make_mask(batch, grid, torch.where(chosen < share, wanted, 0.0), generator)

    return draw


# ----------------------------------------------------------------------------------------------------- pixels
def to_patches(views, patch):
    """Views (...,3,S,S) -> (...,N,3 patch patch)."""
    patches = F.unfold(views.flatten(0, -4), patch, stride=patch).transpose(1, 2)
    return patches.unflatten(0, views.shape[:-3])


def normalise_patches(patches):
    """Each patch minus its mean, over its deviation; and both (MAE; its 1e-6 would blow up the noise of flat
    patches)."""
    mean = patches.mean(-1, keepdim=True)
    deviation = (((patches - mean) ** 2).sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-2).sqrt()
    return (patches - mean) / deviation, mean, deviation


def small_picture(views):
    """Views (...,3,S,S) -> (...,256): grey, averaged to 16 x 16 pixels."""
    grey = views.flatten(0, -4).mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(grey, PICTURE).flatten(1).unflatten(0, views.shape[:-3])


def from_patches(patches, size, patch):
    """Patches (2,B,N,3pp) -> images (2B,3,S,S)."""
    return F.fold(patches.flatten(0, 1).transpose(1, 2), size, patch, stride=patch)


# ------------------------------------------------------------------------------------------------------ edges
def hog_targets(views, patch):
    """HOG of views (2,B,3,S,S): of the whole view (2,B,512), at 64 pixels in 8 x 8 cells; of each patch
    (2,B,N,32), in quarters."""
    two_views = views.shape[:2]
    views = views.flatten(0, 1)
    size = views.shape[-1]
    cells = 2 * size // patch
    quarters = hog(views, cells)  # (2B, 8, cells, cells)
    if size <= 64 and cells == HOG_CELLS:
        whole = quarters  # with 64 pixels in patches of 16 the two are one
    else:
        whole = whole_hog(views)
    patches = F.unfold(quarters, 2, stride=2).transpose(1, 2)
    return whole.flatten(1).unflatten(0, two_views), patches.unflatten(0, two_views)


def whole_hog(images):
    """HOG of images (B,3,S,S): (B,8,8,8), of at most 64 pixels a side."""
    return hog(F.adaptive_avg_pool2d(images, min(64, images.shape[-1])), HOG_CELLS)


@torch.no_grad()
def hog(images, cells):
    """Histograms of oriented gradients (Dalal and Triggs 2005): images (B,3,S,S) -> (B,8,cells,cells).

    How strongly edges run in each of 8 directions (of 180 degrees) in each cell, over what runs in the 3 x 3
    cells around; about unit variance. MaskFeat (arXiv 2112.09133) asks it of masked patches. Ours: the class
    token answers for the whole view, every patch token for its patch. Edges show where fingers run; skin,
    background and light, which grey levels show, are left out."""
    images = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = images[:, :, 1:-1, 2:] - images[:, :, 1:-1, :-2]  # (B, 3, S, S)
    down = images[:, :, 2:, 1:-1] - images[:, :, :-2, 1:-1]
    strength, steepest = (across ** 2 + down ** 2).max(1, keepdim=True)  # of the three colours
    angle = torch.atan2(down.gather(1, steepest), across.gather(1, steepest))
    direction = angle / torch.pi * HOG_DIRECTIONS % HOG_DIRECTIONS  # (B, 1, S, S), 0 .. 8
    bins = torch.arange(HOG_DIRECTIONS, device=images.device)[:, None, None]
    apart = (direction - bins).abs_()  # (B, 8, S, S): edges lie between bins
    apart[:, :1] = torch.minimum(apart[:, :1], HOG_DIRECTIONS - direction)  # the last bin is beside the first
    edges = apart.neg_().add_(1).clamp_(min=0).mul_(strength.sqrt())
    edges = F.adaptive_avg_pool2d(edges, cells)
    around = F.avg_pool2d((edges ** 2).sum(1, keepdim=True), 3, 1, 1, count_include_pad=False).sqrt()
    return edges / (around + 0.1) / 0.16
