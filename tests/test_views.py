"""views.py: theta against one-pixel images and its own algebra, colours against plain formulas."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d

from runtime import generator
from views import (
    apply_color,
    apply_cover,
    apply_strong_color,
    apply_theta,
    blur,
    centre_theta,
    choose_finer,
    compose_theta,
    invert_theta,
    normalise,
    random_color,
    random_cover,
    random_theta,
    rows_to_blur,
    strong_color,
    theta_rotation,
    to_rgb,
    two_views,
    warp,
)


def thetas(count=64, seed=0):
    return random_theta(count, torch.Generator().manual_seed(seed), math.pi, (0.5, 1.2), 0.3)


def test_theta_brings_a_blob_of_the_view_to_its_place_on_the_canvas():
    size, theta = 224, random_theta(32, torch.Generator().manual_seed(1), math.pi / 4, (0.6, 1.0), 0.15)
    place = torch.tensor([0.21, -0.13])                            # of the blob on the canvas
    centres = (2 * torch.arange(256) + 1) / 256 - 1
    blob = torch.exp(-((centres[None, :] - place[0]) ** 2 + (centres[:, None] - place[1]) ** 2)
                     / (2 * 0.03 ** 2))
    views = warp(blob.expand(32, 1, 256, 256), theta, size)[:, 0]
    axis = (2 * torch.arange(size) + 1) / size - 1
    mass = views.sum((1, 2))
    centroid = torch.stack([(views.sum(1) * axis).sum(1), (views.sum(2) * axis).sum(1)], 1) / mass[:, None]
    error = apply_theta(theta, centroid[:, None])[:, 0] - place
    assert error.abs().max() * size / 2 < 0.02                     # pixels of the view


def test_theta_moves_one_pixel_where_it_says():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1
    # quarter turn: view (x, y) shows canvas (-y, x)
    theta = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    view = warp(image, theta, 8)
    row, column = divmod(int(view.argmax()), 8)
    point = torch.tensor([[[(2 * column + 1) / 8 - 1, (2 * row + 1) / 8 - 1]]])
    torch.testing.assert_close(apply_theta(theta, point)[0, 0],
                               torch.tensor([(2 * 5 + 1) / 8 - 1, (2 * 2 + 1) / 8 - 1]))


def test_theta_algebra():
    outer, inner, points = thetas(seed=1), thetas(seed=2), torch.randn(64, 21, 2)
    torch.testing.assert_close(apply_theta(compose_theta(outer, inner), points),
                               apply_theta(outer, apply_theta(inner, points)),
                               atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apply_theta(compose_theta(outer, invert_theta(outer)), points), points,
                               atol=1e-5, rtol=1e-5)


def test_3d_labels_turn_with_the_image():
    """x_view = s (X_xy + t) / sigma holds before and after: the 3-D rotation and the 2-D view agree."""
    theta, points = thetas(seed=3), torch.randn(64, 21, 3)
    turned = points @ theta_rotation(theta).transpose(1, 2)
    seen = apply_theta(invert_theta(theta), points[..., :2])
    scale = theta[:, :, 0].norm(dim=1)[:, None, None]
    offset = apply_theta(invert_theta(theta), torch.zeros(64, 1, 2))
    torch.testing.assert_close(turned[..., :2] / scale + offset, seen, atol=2e-5, rtol=1e-5)


def test_coarse_views_are_averaged_not_aliased():
    checker = ((torch.arange(256)[:, None] + torch.arange(256)) % 2).float().expand(1, 1, 256, 256)
    view = warp(checker, centre_theta(1, 1.0), 64)
    assert (view - 0.5).abs().max() < 1e-3


def test_random_draws_are_functions_of_the_generator():
    assert torch.equal(thetas(seed=5), thetas(seed=5))
    big, rank1 = thetas(8, seed=6), thetas(8, seed=6)[4:]
    assert torch.equal(big[4:], rank1)


def test_random_views_are_rotations_times_a_scale_and_a_shift():
    """A = s R(phi), with phi > 0 turning the window clockwise on the screen: its right edge goes down."""
    phi, zoom, x, y = torch.rand(4, 64, generator=generator(7))
    theta = random_theta(64, generator(7), 0.6, (0.5, 1.2), 0.3)
    phi, scale = (2 * phi - 1) * 0.6, 0.5 * (1.2 / 0.5) ** zoom
    right_edge = apply_theta(theta, torch.tensor([[1.0, 0]]))[:, 0] - theta[:, :, 2]
    torch.testing.assert_close(right_edge, torch.stack([scale * phi.cos(), scale * phi.sin()], 1))
    torch.testing.assert_close(theta[:, :, 2], torch.stack([2 * x - 1, 2 * y - 1], 1) * 0.3)


def test_a_view_is_drawn_as_finely_as_it_needs_whatever_the_others_need():
    """A coarse view is the mean of finer samples; its neighbour in the batch stays as it is alone."""
    canvas = torch.rand(2, 3, 64, 64, generator=generator(1))
    fine, coarse = thetas(1)[0] * 0.2, torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    views = warp(canvas, torch.stack([fine, coarse]), 16)
    assert torch.equal(views[:1], warp(canvas[:1], fine[None], 16, finer=1))
    torch.testing.assert_close(views[1], F.avg_pool2d(canvas[1], 4))
    assert [choose_finer(scale, 64, 16) for scale in (0.3, 0.4, 0.75, 0.76)] == [1, 2, 2, 4]


def test_leading_axes_are_batches_one_after_the_other():
    """Two views of three canvases at once are what two calls give, for images, points and colours."""
    canvas = torch.rand(3, 3, 40, 40, generator=generator(1))
    theta = thetas(6).unflatten(0, (2, 3))
    points = torch.randn(2, 3, 5, 2)
    views = warp(canvas, theta, 16)
    assert views.shape == (2, 3, 3, 16, 16)
    for view in range(2):
        assert torch.equal(views[view], warp(canvas, theta[view], 16))
        torch.testing.assert_close(apply_theta(theta, points)[view], apply_theta(theta[view], points[view]))
        torch.testing.assert_close(invert_theta(theta)[view], invert_theta(theta[view]))
    draws = [two_views(draw)(3, generator(2)) for draw in strong_color(1, 16)]
    colored = apply_strong_color(views, *draws, rows_to_blur(draws[2]))
    for view in range(2):
        light, color, sigma = (drawn[view] for drawn in draws)
        alone = apply_strong_color(views[view], light, color, sigma, rows_to_blur(sigma))
        torch.testing.assert_close(colored[view], alone)


def test_colours_are_gains_then_contrast_then_saturation():
    """Against a loop in float64; grey views have three equal channels; factors of 1 change nothing."""
    images = torch.rand(4, 3, 6, 6, generator=generator(3), dtype=torch.float64) * 0.5 + 0.2
    factors = random_color(4, generator(4)).double()
    factors[3, 5] = 0
    found = apply_color(images, factors)
    for k in range(4):
        image = images[k].numpy() * (factors[k, :3] * factors[k, 3]).numpy()[:, None, None]
        image = (image - image.mean()) * float(factors[k, 4]) + image.mean()
        grey = image.mean(0)
        np.testing.assert_allclose(found[k], ((image - grey) * float(factors[k, 5]) + grey).clip(0, 1))
    assert (found[3, 0] - found[3, 1]).abs().max() < 1e-12
    torch.testing.assert_close(apply_color(images, torch.ones(4, 6).double()), images)


def test_blur_is_a_gaussian():
    images, sigma = torch.rand(3, 3, 24, 24, generator=generator(3)), torch.tensor([0.0, 0.8, 1.5])
    found = blur(images, sigma, rows_to_blur(sigma), 1.5)
    assert torch.equal(found[0], images[0])
    for k in (1, 2):  # both are cut where the widest is
        wanted = images[k].double().numpy()
        for axis in (1, 2):
            wanted = gaussian_filter1d(wanted, float(sigma[k]), axis=axis, mode="mirror",
                                       truncate=5 / float(sigma[k]))
        np.testing.assert_allclose(found[k], wanted, atol=1e-5)


def test_normalised_views_come_back_as_pictures():
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    assert np.array_equal(to_rgb(normalise(pixels.float() / 255)), pixels.permute(0, 2, 3, 1).numpy())


def test_a_cover_shows_what_lies_opposite():
    """In its rectangle and nowhere else, in a share of the pictures."""
    images = torch.rand(400, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    boxes = random_cover(400, torch.Generator().manual_seed(1), 0.25)
    covered = apply_cover(images, boxes)
    line = (torch.arange(20) + 0.5) / 10 - 1
    for image, found, (x0, y0, x1, y1) in zip(images, covered, boxes, strict=True):
        inside = ((line > y0) & (line < y1))[:, None] & ((line > x0) & (line < x1))
        assert torch.equal(found, torch.where(inside, image.rot90(2, (1, 2)), image))
    assert 0.15 < (covered != images).flatten(1).any(1).float().mean() < 0.35
