"""Mining and contrastive pre-training.

Oracles: brute force, double loops in float64, gradcheck, ideal latents, the gradients of a step from its
public functions, one process against two.
"""

import colorsys
import contextlib
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import call, log
from scipy.spatial.distance import cdist

import mine_pairs
import pretrain_contrastive as pc
from data import (
    PAIRS_FORMAT, EpochSampler, HandDataset, HandIndex, PairSampler, has_points, pair_rows, write_index,
)
from mine_pairs import mine, normalise_pose
from model import build_encoder
from runtime import Runtime, generator
from views import (
    apply_color,
    apply_hsv,
    apply_light,
    apply_theta,
    blur,
    invert_theta,
    normalise,
    random_hsv,
    rows_to_blur,
    strong_color,
    two_views,
    warp,
)


# ----------------------------------------------------------------------------------------------------- mining
def poses(count, seed=0, latent=6):
    """Keypoints (count,21,2): a smooth map of a few numbers, with noise, of any place and size."""
    rng = np.random.default_rng(seed)
    points = np.tanh(rng.normal(size=(count, latent)) @ rng.normal(size=(latent, 42)) / 2)
    points = points.reshape(count, 21, 2) + 0.02 * rng.normal(size=(count, 21, 2))
    return 30 * rng.uniform(0.5, 2, (count, 1, 1)) * points + 100 * rng.random((count, 1, 2))


def uneven_videos(count, videos, seed=0):
    """(count,) ids: the first video holds 40 % of the hands, the others uneven shares of the rest."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(videos - 1, 0.5)) * 0.6
    return rng.choice(videos, count, p=np.r_[0.4, share])


@pytest.mark.parametrize("count, videos, neighbours", [(6000, 150, 10), (700, 3, 4), (40, 8, 45)])
def test_neighbours_are_those_of_brute_force(count, videos, neighbours):
    keypoints = poses(count)
    video = uneven_videos(count, videos)
    found = mine(keypoints, video, neighbours)
    x = (normalise_pose(keypoints) - found["mean"]) @ found["components"].T
    assert found["idx"].dtype == np.int32 and found["dist"].dtype == np.float32
    for rows in np.arange(count).reshape(-1, 20).T:
        distance = cdist(x[rows], x)
        distance[video[rows, None] == video] = np.inf
        idx = found["idx"][rows]
        dist = found["dist"][rows]
        wanted = np.sort(np.partition(distance, min(neighbours, count - 1), axis=1)[:, :neighbours], axis=1)
        missing = neighbours - wanted.shape[1]
        wanted = np.pad(wanted, ((0, 0), (0, missing)), constant_values=np.inf)
        exists = np.isfinite(wanted)
        assert np.array_equal(exists, idx >= 0) and np.array_equal(exists, np.isfinite(dist))
        assert np.abs(wanted[exists] - dist[exists]).max() < 1e-6
        anchor = np.nonzero(exists)[0]
        assert (video[idx[exists]] != video[rows][anchor]).all()
        assert np.abs(distance[anchor, idx[exists]] - wanted[exists]).max() < 1e-9


@pytest.mark.parametrize("count", [6000, 2049, 33, 3])
def test_what_searches_together_changes_no_answer(count, monkeypatch):
    """On a GPU whole cells search together. The last leaf may lack points."""
    keypoints = poses(count)
    video = uneven_videos(count, 30)
    monkeypatch.setattr(mine_pairs, "MOST_LEAVES", 64)  # many products for each
    alone = mine(keypoints, video)
    monkeypatch.setattr(mine_pairs, "TOGETHER", {})
    together = mine(keypoints, video)
    assert all(np.array_equal(alone[name], together[name]) for name in ("idx", "dist"))
    square = torch.rand(7, 50, generator=generator(count))
    expected = (square <= 0.1).flatten().nonzero()[:, 0].numpy()
    assert np.array_equal(mine_pairs._passing(square, torch.full((7, 1), 0.1)), expected)


def test_mining_knows_place_and_size_not_rotation():
    keypoints = poses(5)
    moved = 3 * keypoints + [100, -7]
    turned = keypoints @ [[0, 1], [-1, 0]]
    assert np.allclose(normalise_pose(keypoints), normalise_pose(moved))
    assert np.abs(normalise_pose(keypoints) - normalise_pose(turned)).max() > 0.1
    others = normalise_pose(keypoints).reshape(5, 21, 2)[:, 1:]
    assert np.allclose((others**2).sum(2).mean(1), 1)


def test_unusable_hands_have_no_neighbours_and_equal_ones_come_by_number():
    keypoints = poses(600)  # several cells
    video = np.arange(600) % 6
    keypoints[7, 3] = np.nan
    keypoints[8] = 5.0  # all on one spot
    same = 6 * np.arange(20) + 9  # of video 3
    keypoints[same] = keypoints[1]  # of video 1
    found = mine(keypoints, video, 20)
    assert (found["idx"][[7, 8]] == -1).all() and np.isinf(found["dist"][[7, 8]]).all()
    assert not np.isin(found["idx"], [7, 8]).any()
    assert np.array_equal(found["idx"][1], same) and (found["dist"][1] == 0).all()
    halves = [mine(keypoints, video, 20, share=(i, 2)) for i in (0, 1)]
    assert np.array_equal(np.maximum(halves[0]["idx"], halves[1]["idx"]), found["idx"])


def test_the_same_picture_in_two_videos_can_be_passed_over():
    """Every hand twice. With a least distance its neighbours are brute force's without its copy."""
    keypoints = np.concatenate([poses(700), poses(700)])
    video = np.arange(1400) // 20  # a copy is in another video
    assert (mine(keypoints, video, 3)["dist"][:, 0] == 0).all()
    found = mine(keypoints, video, 3, least_distance=0.05)
    x = (normalise_pose(keypoints) - found["mean"]) @ found["components"].T
    distance = cdist(x, x)
    distance[(video[:, None] == video) | (distance < 0.05)] = np.inf
    assert np.abs(np.sort(distance, 1)[:, :3] - found["dist"]).max() < 1e-6


def test_components_are_those_of_the_svd():
    x = normalise_pose(poses(400))
    _, axes, explained = mine_pairs.principal(poses(400), 14)
    _, values, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert np.allclose(np.abs((axes * rows[:14]).sum(1)), 1, atol=1e-6)
    assert np.allclose(axes @ axes.T, np.eye(14), atol=1e-9)
    assert np.allclose(explained, values[:14] ** 2 / (values**2).sum())


def index_of(path, keypoints, width=200, **columns):
    """An index of hands with these keypoints; its images do not exist."""
    count = len(keypoints)
    hands = {"image": np.array([f"{row}.jpg".encode() for row in range(count)]),
             "box": np.tile(np.float32([0, 0, width, width]), (count, 1)), "keypoints": keypoints}
    write_index(path, hands | columns, {"name": path.name})
    return HandIndex(path)


def test_a_left_hand_is_mined_as_the_right_hand_in_the_mirror(tmp_path):
    """Each of 30 right hands is also there as the left hand of its mirrored image: they are each other's
    nearest, and so are their labelled joints."""
    right = poses(30).astype(np.float32)
    left = right * [-1, 1] + [199, 0]
    joints = np.random.default_rng(1).normal(size=(30, 21, 3)).astype(np.float32)
    sides = np.repeat([0, 1], 30)
    index = index_of(tmp_path / "both", np.concatenate([right, left]), side=sides, video=np.arange(60),
                     joints=np.concatenate([joints, joints * [-1, 1, 1]]))
    points, _ = mine_pairs.read_poses(index, "keypoints", 0.5)
    found = mine(points, np.arange(60), 1)
    assert np.array_equal(found["idx"][:, 0], (np.arange(60) + 30) % 60)
    assert found["dist"].max() < 1e-4
    true = mine_pairs.true_joints([index])
    assert mine_pairs.pose_error(true, np.arange(30), np.arange(30) + 30) < 1e-3


def test_hands_that_a_detector_missed_are_left_out_and_counted(tmp_path):
    keypoints = poses(12).astype(np.float32)
    keypoints[3] = 7.0
    scores = np.ones((12, 21), np.float32)
    scores[0, 5] = 0
    scores[1] = 0.4
    videos = np.arange(12)
    videos[2] = -1
    index = index_of(tmp_path / "some", keypoints, keypoints_score=scores, video=videos)
    points, reasons = mine_pairs.read_poses(index, "keypoints", 0.5)
    assert np.isnan(points).all((1, 2)).nonzero()[0].tolist() == [0, 1, 2, 3]
    assert np.array_equal(points[4:], keypoints[4:]) and list(reasons.values()) == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------- loss
def slow_nt_xent(a, b, temperature, positive, negative):
    h = np.concatenate([a, b])
    N = len(a)
    total = 0.0
    for i in range(2 * N):
        partner = (i + N) % (2 * N)
        below = sum(math.exp(negative[i, j] * float(h[i] @ h[j]) / temperature)
                    for j in range(2 * N) if j != i)
        total -= math.log(math.exp(positive[i % N] * float(h[i] @ h[partner]) / temperature) / below)
    return total / (2 * N)


@pytest.mark.parametrize("N", [1, 2, 7, 20])
def test_nt_xent_is_the_double_loop(N, monkeypatch):
    g = generator(N)
    a, b = torch.nn.functional.normalize(torch.randn(2, N, 6, generator=g, dtype=torch.float64), dim=2)
    joints = torch.randn(2, N, 21, 2, generator=g, dtype=torch.float64)
    positive, negative = pc.pair_weights(*joints)
    one = torch.ones(2 * N, 2 * N, dtype=torch.float64)
    for chunk in (1024, 3):
        monkeypatch.setattr(pc, "CHUNK", chunk)
        for plus, minus in ((None, None), (positive, None), (None, negative), (positive, negative)):
            found = pc.nt_xent(a, b, 0.5, plus, minus)
            w_positive = (one[0] if plus is None else plus).numpy()
            w_negative = (one if minus is None else minus).numpy()
            wanted = slow_nt_xent(a.numpy(), b.numpy(), 0.5, w_positive, w_negative)
            assert float(found) == pytest.approx(wanted, abs=1e-9)
        _, negative_rows = pc.pair_weights_by_rows(*joints)
        by_rows = pc.nt_xent(a, b, 0.5, positive, negative_rows)
        assert float(by_rows) == pytest.approx(float(found), abs=1e-12)


def test_nt_xent_has_the_right_gradient(monkeypatch):
    g = generator(3)
    pair = [torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    positive, negative = pc.pair_weights(*torch.randn(2, 4, 21, 2, generator=g, dtype=torch.float64))
    for chunk in (1024, 3):
        monkeypatch.setattr(pc, "CHUNK", chunk)
        assert torch.autograd.gradcheck(lambda a, b: pc.nt_xent(a, b, 0.5, positive, negative), pair)


def test_weights_are_one_for_the_closest_and_all_one_where_all_are_equal():
    joints = torch.randn(2, 9, 21, 2, generator=generator(4))
    positive, negative = pc.pair_weights(*joints)
    both = joints.flatten(0, 1)
    distance = torch.tensor([[sum(float((a[k] - b[k]).norm()) for k in range(21)) / 21 for b in both]
                             for a in both])
    assert torch.allclose(negative, 1 - distance / distance.max(), atol=1e-5)
    of_pairs = distance[torch.arange(9), torch.arange(9) + 9]
    wanted = (of_pairs.max() - of_pairs) / (of_pairs.max() - of_pairs.min())
    assert torch.allclose(positive, wanted, atol=1e-5)
    assert positive.min() == 0 and positive.max() == 1
    assert negative.min() == 0 and (negative.diagonal() == 1).all()
    alike = joints[:1, :1].expand(2, 9, 21, 2)
    assert all((weights == 1).all() for weights in pc.pair_weights(*alike))


def test_lars_is_its_formula():
    """g <- (g + wd p) min(1, eta |p| / (|g| + wd |p|) / lr), no decay (wd = 0) on 1-D tensors; a tensor that
    is 0 or has no slope keeps its gradient."""
    g = generator(5)
    shapes = [(4, 3), (5,), (2, 3, 2), (3, 3), (4,), (2, 2)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    for k, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=g) * 10.0 ** (k - 1)
    parameters[3].data.zero_()
    parameters[5].grad.zero_()
    parameters.append(torch.nn.Parameter(torch.ones(2, 2)))  # without a gradient
    lr, weight_decay, eta = 0.05, 0.1, 0.02

    def length(numbers):
        return math.sqrt(sum(float(number) ** 2 for number in numbers))

    wanted = []
    rates = []
    for parameter in parameters[:-1]:
        p, slope = parameter.detach().numpy(), parameter.grad.numpy()
        decay = weight_decay if p.ndim > 1 else 0.0
        new = slope.copy()
        if length(p.flat) > 0 and length(slope.flat) > 0:
            rates.append(eta * length(p.flat) / (length(slope.flat) + decay * length(p.flat) + 1e-8) / lr)
            for place in np.ndindex(p.shape):
                new[place] = (slope[place] + decay * p[place]) * min(1.0, rates[-1])
        wanted.append(new)
    assert min(rates) < 0.1 and max(rates) > 1
    pc.lars(parameters, lr, weight_decay, eta)
    assert parameters[-1].grad is None
    for parameter, new in zip(parameters, wanted, strict=False):
        np.testing.assert_allclose(parameter.grad.numpy(), new, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ views
def draw(pairs=512, rotation=45, zoom=(0.9, 1.5), both_ways=True):
    """theta (2,B,2,3), middle (2,B,2) and joints (2,B,21,2) on the canvas: two views of each hand."""
    hand = torch.randn(pairs, 21, 2, generator=generator(5)) * 0.15 + 0.05
    joints = hand.expand(2, pairs, 21, 2)
    middle, radius = pc.hand_circle(joints, torch.ones(2, pairs, dtype=torch.bool))
    unit = torch.rand(2, pairs, 4, generator=generator(6))
    theta = pc.hand_theta(unit, middle, radius, rotation, zoom, 15 / 112, both_ways)
    return theta, middle, joints


def test_windows_lie_around_the_joints_or_the_box():
    joints = torch.zeros(2, 2, 21, 2)
    joints[:, 0, 0] = torch.tensor([0.42, 0.21])  # mean .02, .01; the farthest joint is this one
    known = torch.tensor([[True, False], [True, False]])
    middle, radius = pc.hand_circle(joints, known)
    torch.testing.assert_close(middle[:, 0], torch.tensor([[0.02, 0.01]] * 2))
    torch.testing.assert_close(radius[:, 0], torch.tensor([math.hypot(0.4, 0.2)] * 2))
    assert (middle[:, 1] == 0).all() and torch.allclose(radius[:, 1], torch.tensor(1.3 / 2))


def test_strong_color_changes_looks_and_not_geometry():
    theta, *_ = draw(pairs=4)
    canvas = (255 * torch.rand(2, 4, 3, 64, 64, generator=generator(3))).byte()
    hsv = random_hsv(8, generator(1)).unflatten(0, (2, 4))
    light, color, sigma = (two_views(draw)(4, generator(1)) for draw in strong_color(1.0, 32))
    looks = {"light": light, "color": color, "sigma": sigma, "blurred": rows_to_blur(sigma)}
    plain = pc.make_views(canvas, theta, 32, 1, {"hsv": hsv})
    strong = pc.make_views(canvas, theta, 32, 1, looks)
    assert plain.shape == strong.shape == (2, 4, 3, 32, 32)
    assert ((plain - strong).abs().mean((2, 3, 4)) > 0.2).all()
    for view in (0, 1):
        seen = warp(canvas[view], theta[view], 32, finer=1)
        torch.testing.assert_close(plain[view], normalise(apply_hsv(seen, hsv[view])))
        expected = apply_color(apply_light(seen, light[view]), color[view])
        expected = blur(expected, sigma[view], rows_to_blur(sigma[view]), 3 * 32 / 224)
        torch.testing.assert_close(strong[view], normalise(expected))


def test_an_ideal_latent_agrees_once_undone():
    """64 points fixed to the canvas, as each view shows them. Exact undoing brings both views to the same
    vector, the public arithmetic nearly; without undoing they differ."""
    points = draw()[2].repeat(1, 1, 4, 1)[:, :, :64]
    cosine = {}
    for undo, both_ways in (("exact", True), ("official", False), ("none", True)):
        theta, middle, _ = draw(both_ways=both_ways)
        latent = apply_theta(invert_theta(theta), points).flatten(2)
        a, b = pc.embed(latent, theta, middle, undo)
        cosine[undo] = float((a * b).sum(1).mean())
    assert cosine["exact"] > 0.9999 > cosine["official"] > 0.98 > 0.95 > cosine["none"]


def test_official_undoing_is_the_public_arithmetic():
    """Of one view: points of norm 1; plus the shift in pixels of a crop of 224, over 128, times the points'
    own range; turned about their mean."""
    angle, shift = 0.4, np.array([11.0, 6.0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = np.array([0.1, -0.2])
    moved = turn @ shift / 112 * 1.3 / 2  # on the canvas
    theta = torch.from_numpy(np.c_[0.7 * turn, middle + moved])
    points = torch.randn(64, 2, generator=generator(2), dtype=torch.float64)
    wanted = (points / points.norm()).numpy()
    wanted = wanted + shift / 128 * np.ptp(wanted, axis=0)
    mean = wanted.mean(0)
    wanted = np.array([turn @ (point - mean) + mean for point in wanted])
    found = pc.undo_official(points, theta, torch.from_numpy(middle))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("undo", ["exact", "official"])
def test_where_a_hand_lies_in_its_box_does_not_matter(undo):
    """Whatever the network puts out: a hand moved within its canvas, window and all, embeds alike."""
    theta, middle, _ = draw(pairs=64)
    latent = torch.randn(2, 64, 128, generator=generator(8))
    away = torch.rand(2, 64, 2, generator=generator(9)) - 0.5
    moved = torch.cat([theta[..., :2], theta[..., 2:] + away[..., None]], -1)
    found = pc.embed(latent, moved, middle + away, undo)
    torch.testing.assert_close(found, pc.embed(latent, theta, middle, undo), atol=1e-5, rtol=0)


def test_rings_lie_on_dots_where_the_views_agree(monkeypatch):
    """The picture of a step: the other view's points of an ideal latent arrive at the view's own."""
    theta, middle, joints = draw(pairs=2)
    latent = apply_theta(invert_theta(theta), joints.repeat(1, 1, 4, 1)[:, :, :64]).flatten(2)
    drawn = []
    monkeypatch.setattr(pc, "draw_points", lambda tile, dots, rings: drawn.append((dots, rings)) or tile)
    pc.draw_views(torch.zeros(2, 2, 3, 32, 32), theta, middle, joints, latent)
    assert len(drawn) == 4
    for dots, rings in drawn:
        assert dots.shape == (16, 2)
        np.testing.assert_allclose(dots, rings, atol=1e-3)

    latent = torch.randn(2, 2, 128, generator=generator(2))
    pc.draw_views(torch.zeros(2, 2, 3, 32, 32), theta, middle, joints, latent)
    dots, rings = drawn[6]  # view a of pair 1
    own, other = latent[:, 1].reshape(2, 64, 2)[:, 4].numpy()  # every fourth point is drawn: this is number 1
    np.testing.assert_allclose(dots[1], (own + 1) * 16 - 0.5, atol=1e-4)
    A, t = theta[:, 1, :, :2].numpy(), theta[:, 1, :, 2].numpy()
    around_the_hand = A[1] @ other + t[1] - middle[1, 1].numpy()
    brought = np.linalg.solve(A[0], around_the_hand + middle[0, 1].numpy() - t[0])
    np.testing.assert_allclose(rings[1], (brought + 1) * 16 - 0.5, rtol=1e-4)


def test_windows_turn_zoom_and_move_as_far_as_asked():
    theta, middle, joints = draw(rotation=0, zoom=(1.25, 1.25))
    radius = (joints - middle[..., None, :]).norm(dim=3).amax(2)
    assert (theta[..., 0, 1] == 0).all() and torch.allclose(theta[..., 0, 0], 1.25 * radius)
    moved = (theta[..., 2] - middle).flatten()
    furthest = 15 / 112 * 1.3 / 2
    assert 0.98 * furthest < moved.max() <= furthest and -furthest <= moved.min() < -0.98 * furthest
    reach = apply_theta(invert_theta(theta), joints).abs().max()
    assert reach < (1 + furthest / radius.min()) / 1.25  # the hand stays in the view
    theta, middle, _ = draw()
    angle = torch.rad2deg(torch.atan2(theta[..., 1, 0], theta[..., 0, 0]))
    assert 40 < angle.max() <= 45 and -45 <= angle.min() < -40
    zoom = theta[..., 0].norm(dim=2) / radius
    assert 0.9 <= zoom.min() < 0.91 and 1.49 < zoom.max() <= 1.5 + 1e-6
    theta, middle, _ = draw(both_ways=False)
    turn = theta[..., :2] / theta[..., 0].norm(dim=2)[..., None, None]
    moved = turn.transpose(2, 3) @ (theta[..., 2] - middle)[..., None]
    assert moved.min() > -1e-6 and moved.max() < furthest + 1e-6


def test_an_image_that_cannot_be_read_is_replaced_by_its_partner():
    failed = torch.full((8,), -1)
    failed[[1, 6]] = torch.tensor([70, 90])  # view a of pair 1, view b of pair 2
    assert pair_rows(failed, 4).tolist() == [[0, 5, 2, 3], [4, 5, 2, 7]]
    assert pair_rows(failed[:4], 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]  # a hand with itself


def test_hue_is_that_of_colorsys():
    images = torch.rand(4, 3, 3, 3, generator=generator(6))
    images[0, :, 0, 0] = 0.3  # grey has no hue
    factors = random_hsv(4, generator(7))
    made = apply_hsv(images, factors)
    for b in range(4):
        hue, saturation, value, added = factors[b].tolist()
        for y in range(3):
            for x in range(3):
                h, s, v = colorsys.rgb_to_hsv(*images[b, :, y, x].tolist())
                wanted = colorsys.hsv_to_rgb(h * hue, s * saturation, v * value + added)
                assert np.allclose(np.clip(wanted, 0, 1), made[b, :, y, x], atol=1e-5)


def test_pairs_come_with_their_neighbours():
    idx = np.array([[3, 4], [0, -1], [-1, -1], [0, 1], [1, 0]])
    anchors = np.array([0, 1, 3, 4])

    def pairs_of(neighbour, start=0):  # (steps, 2, 8)
        sampler = PairSampler(EpochSampler(4, 8, 0, start, 5), anchors, idx, neighbour)
        return np.array(list(sampler)).reshape(-1, 2, 8)

    nearest = pairs_of(1)
    assert (nearest[:, 1] == idx[nearest[:, 0], 0]).all() and set(nearest[:, 0].flat) == {0, 1, 3, 4}
    second = pairs_of(2)
    assert (second[:, 1] == np.where(second[:, 0] == 1, 0, idx[second[:, 0], 1])).all()
    random = pairs_of(0)
    assert np.array_equal(random[:, 0], nearest[:, 0])  # the hands do not depend on the neighbours
    drawn = set(zip(random[:, 0].flat, random[:, 1].flat, strict=True))
    assert drawn == {(hand, other) for hand in anchors for other in idx[hand] if other >= 0}
    assert np.array_equal(pairs_of(0, start=3), random[3:])  # a function of the step
    halves = [list(PairSampler(EpochSampler(4, 8, 0, 0, 5, rank, 2), anchors, idx, 0)) for rank in (0, 1)]
    joined = [a[:4] + b[:4] + a[4:] + b[4:] for a, b in zip(*halves, strict=True)]
    assert joined == random.reshape(-1, 16).tolist()


def test_a_share_of_the_hands_is_paired_and_the_others_are_their_own():
    idx = np.array([[3, 4], [0, -1], [-1, -1], [0, 1], [1, 0]])

    def pairs_of(share, start=0, rank=0, world=1):  # (steps, 2, B)
        order = EpochSampler(5, 100, 0, start, 40, rank, world)
        sampler = PairSampler(order, np.arange(5), idx, 0, seed=1, share=share)
        return np.array(list(sampler)).reshape(40 - start, 2, -1)

    every, some = pairs_of(1), pairs_of(0.3)
    assert np.array_equal(every[:, 0], some[:, 0])
    hand = every[:, 0]
    assert (every[:, 1][hand == 2] == 2).all()  # it has no neighbour
    is_paired = some[:, 1] != hand
    assert np.array_equal(some[:, 1], np.where(is_paired, every[:, 1], hand))
    assert is_paired[hand != 2].mean() == pytest.approx(0.3, abs=0.03)
    assert (is_paired[0] != is_paired[1]).any()  # drawn anew in each step
    assert np.array_equal(pairs_of(0.3, start=7), some[7:])
    halves = [pairs_of(0.3, 0, rank, 2) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(halves, axis=2), some)


# -------------------------------------------------------------------------------------------------- the loop
TINY = ("--labelled", "--arch", "vit_micro", "--image-size", 32, "--batch-size", 8, "--log-every", 1,
        "--workers", 0, "--precision", "fp32", "--device", "cpu")


def train(*flags, **options):
    return call("pretrain_contrastive.py", *flags, **options)


def fresh_model():
    torch.manual_seed(0)
    return pc.Contrastive(build_encoder("vit_micro", 32)).train()


@pytest.fixture(scope="module")
def pairs(hands, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "pairs.npz"
    done = call("mine_pairs.py", "--data", hands / "train", "--out", out, "--neighbours", 3, "--labelled")
    assert "hands paired" in done.stdout
    return out


@pytest.fixture
def spy(monkeypatch):
    """Name of a function of the loop -> list of (arguments, result). "update": list of (gradients, weight
    decays of the groups, gradients after `adapt`)."""
    calls = {}

    def watch(name):
        real = getattr(pc, name)

        def wrapper(*arguments, **options):
            result = real(*arguments, **options)
            calls.setdefault(name, []).append((arguments, result))
            return result

        monkeypatch.setattr(pc, name, wrapper)

    for name in ("make_views", "hand_circle", "hand_theta", "pair_weights_by_rows"):
        watch(name)
    real_update = pc.update

    def update(optimizer, scaler, parameters, adapt=None):
        def gradients():
            return [parameter.grad.clone() for parameter in parameters]

        def watched():
            if adapt:
                adapt()
            calls["update"][-1] += (gradients(),)

        decays = {group["weight_decay"] for group in optimizer.param_groups}
        calls.setdefault("update", []).append((gradients(), decays))
        return real_update(optimizer, scaler, parameters, adapt=watched)

    monkeypatch.setattr(pc, "update", update)
    return calls


def test_an_update_has_the_mean_gradient_of_the_losses_of_the_parts(hands, pairs, spy, tmp_path):
    """One step in two parts against the figure in the docstring, by the public functions: each part has its
    own batch statistics, weights and loss. The weights come from the joints in the view."""
    train("--data", hands / "train", "--method", "simhand", "--pairs", pairs, *TINY, "--steps", 1,
          "--accumulate", 2, "--temperature", 0.3, "--out", tmp_path / "run")
    (joints, _), (middle, _) = spy["hand_circle"][0]
    theta = spy["hand_theta"][0][1]
    views = spy["make_views"][0][1]
    assert views.shape == (2, 8, 3, 32, 32)

    dataset = HandDataset([HandIndex(hands / "train")], 64, labels=("joints2d",))
    anchors = next(iter(EpochSampler(24, 8, 0, 0, 1)))
    with np.load(pairs) as file:
        neighbours = file["idx"][anchors, 0]
    for view, rows in enumerate((anchors, neighbours)):
        wanted = np.stack([dataset[row]["joints2d"] for row in rows])
        np.testing.assert_allclose(joints[view].numpy(), wanted, atol=1e-6)

    in_view = np.empty((2, 8, 21, 2))  # p with A p + t = joint
    for view, pair in np.ndindex(2, 8):
        A, t = theta[view, pair, :, :2].double().numpy(), theta[view, pair, :, 2].double().numpy()
        in_view[view, pair] = np.linalg.solve(A, (joints[view, pair].double().numpy() - t).T).T
    weighed = torch.cat([torch.stack(arguments) for arguments, _ in spy["pair_weights_by_rows"]], 1)
    np.testing.assert_allclose(weighed.numpy(), in_view, atol=1e-4)

    model = fresh_model()
    losses = []
    for part in (slice(0, 4), slice(4, 8)):
        a, b = pc.embed(model(views[:, part]), theta[:, part], middle[:, part], "exact")
        positive, negative = pc.pair_weights(*torch.from_numpy(in_view[:, part]).float())
        losses.append(pc.nt_xent(a, b, 0.3, positive, negative))
    loss = sum(losses) / 2
    loss.backward()
    gradients, decays, _ = spy["update"][0]
    for parameter, found in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)
    assert log(tmp_path / "run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert decays == {0.0}  # lars adds the decay, AdamW must not add it again


def test_an_update_is_adapted_by_lars_at_the_rate_of_the_step(hands, spy, tmp_path):
    train("--data", hands / "train", "--method", "peclr", *TINY, "--steps", 4, "--warmup", 0.5,
          "--weight-decay", 0.5, "--undo", "official", "--out", tmp_path / "run")
    model = fresh_model()
    gradients, _, adapted = spy["update"][0]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    lr = log(tmp_path / "run")[0]["lr"]
    assert lr == pytest.approx(0.5e-4 * math.sqrt(8))  # half way up
    pc.lars(list(model.parameters()), lr, 0.5)
    for parameter, found in zip(model.parameters(), adapted, strict=True):
        torch.testing.assert_close(found, parameter.grad)

    theta = spy["hand_theta"][0][1]  # the public code moves windows one way only
    turn = theta[..., :2] / theta[..., 0].norm(dim=2)[..., None, None]
    moved = turn.transpose(2, 3) @ (theta[..., 2] - spy["hand_circle"][0][1][0])[..., None]
    assert moved.min() > -1e-6


def test_hands_with_missing_keypoints_are_cut_around_their_box_and_not_weighed(hands, spy, tmp_path):
    train("--data", hands / "train", "--method", "peclr", *TINY[1:], "--steps", 1, "--out", tmp_path / "run")
    index = HandIndex(hands / "train")
    is_known = (np.asarray(index.columns["keypoints_score"]) > 0).all(1)
    assert 0 < is_known.sum() < 24
    rows = next(iter(EpochSampler(24, 8, 0, 0, 1)))
    arguments, (_, radius) = spy["hand_circle"][0]
    assert np.array_equal(arguments[1].numpy(), [is_known[rows]] * 2)
    assert np.allclose(radius[:, ~is_known[rows]], 1.3 / 2)

    args = SimpleNamespace(data=[hands / "train"], pairs=None, labelled=False, weights="none")
    assert len(pc.read_hands(args, "keypoints")[3]) == 24
    args.weights = "both"
    assert np.array_equal(pc.read_hands(args, "keypoints")[3], np.flatnonzero(is_known))

    index.columns["joints2d"] = np.array(index.columns["joints2d"])
    index.columns["joints2d"][3, 7] = np.nan  # a label of a partial index
    assert np.flatnonzero(~has_points(index, "joints2d")).tolist() == [3]


def test_the_head_computes_in_full_precision():
    views = torch.randn(2, 4, 3, 32, 32, generator=generator(1))
    model = fresh_model()
    inputs = []
    model.head.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    model.head[0].register_forward_hook(lambda module, given, result: inputs.append(result))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(views).dtype == torch.float32
    assert [x.dtype for x in inputs] == [torch.float32] * 2


@pytest.mark.parametrize("weights", ["none", "positive", "negative"])
def test_weights_go_where_the_flag_says(weights, hands, pairs, spy, tmp_path):
    train("--data", hands / "train", "--method", "peclr", *TINY, "--steps", 1, "--weights", weights,
          "--undo", "none", "--out", tmp_path / "run")
    theta = spy["hand_theta"][0][1]
    joints = apply_theta(invert_theta(theta), spy["hand_circle"][0][0][0])
    positive, negative = pc.pair_weights(*joints)
    latent = fresh_model()(spy["make_views"][0][1]).detach()
    h = torch.nn.functional.normalize(latent, dim=2)
    wanted = pc.nt_xent(*h, 0.5, positive if weights == "positive" else None,
                        negative if weights == "negative" else None)
    assert log(tmp_path / "run")[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_weight_decay_leaves_1d_tensors_alone(hands, tmp_path):
    """One AdamW step with and without decay: the weights differ by lr x decay x weight, biases and norms not
    at all."""
    states = []
    for decay in (0.0, 0.5):
        out = tmp_path / f"decay{decay}"
        train("--data", hands / "train", "--method", "simclr", *TINY, "--steps", 1, "--optimizer", "adamw",
              "--weight-decay", decay, "--out", out)
        states.append(torch.load(out / "last.pt", weights_only=True)["model"])
    lr = log(out)[0]["lr"]
    assert lr == pytest.approx(1e-4 * math.sqrt(8))
    for name, parameter in fresh_model().named_parameters():
        shrinks = 0.5 * lr * parameter.detach() * (parameter.ndim > 1)
        torch.testing.assert_close(states[0][name] - states[1][name], shrinks, atol=2e-7, rtol=1e-3)


def test_the_last_part_of_a_batch_synchronises(hands, monkeypatch, tmp_path):
    synchronised = []

    class Recorder(Runtime):
        def sync_gradients(self, model, now):
            synchronised.append(now)
            return super().sync_gradients(model, now)

    machine = Recorder(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    monkeypatch.setattr(pc, "setup", lambda args: machine)
    train("--data", hands / "train", "--method", "simclr", *TINY, "--steps", 2, "--accumulate", 4,
          "--out", tmp_path / "run")
    assert synchronised == 2 * [False, False, False, True]

    entered = []
    model = SimpleNamespace(no_sync=lambda: contextlib.nullcontext(entered.append("no_sync")))
    two = Runtime(torch.device("cpu"), torch.float32, 0, 2, 0, 0)
    with two.sync_gradients(model, True):
        assert not entered
    with two.sync_gradients(model, False):
        assert entered == ["no_sync"]


# --------------------------------------------------------------------------------------------------- commands
def test_mining_as_a_command_in_one_process_and_in_two(hands, pairs, tmp_path):
    with np.load(pairs) as file:
        found = {name: file[name] for name in file}
    assert set(found) == {"idx", "dist", "mean", "components", "explained", "fingerprint", "format"}
    assert found["components"].shape == (14, 42) and found["format"] == PAIRS_FORMAT
    video = np.asarray(HandIndex(hands / "train").columns["video"])
    assert (video[found["idx"]] != video[:, None]).all()
    assert pairs.with_name("pairs.png").is_file() and pairs.with_name("pairs_distances.png").is_file()
    done = call("mine_pairs.py", "--data", hands / "train", "--out", tmp_path / "two.npz", "--neighbours", 3,
                "--labelled", processes=2)
    errors = re.search(r"PA-MPJPE in mm: (\S+) of .*, (\S+) of .*, (\S+) of", done.stdout).groups()
    assert float(errors[0]) < float(errors[2])  # the nearest is nearer than a random hand
    with np.load(tmp_path / "two.npz") as file:
        assert all(np.array_equal(file[name], found[name]) for name in found)


def test_videos_of_two_indices_are_not_the_same(hands, tmp_path):
    """The same index twice. With --mix a hand's copy is its nearest, else all are of its own index."""
    flags = ("mine_pairs.py", "--data", hands / "train", hands / "train", "--labelled", "--neighbours", 1)
    found = {}
    for name, mix in (("apart", ()), ("mixed", ("--mix",))):
        call(*flags, *mix, "--out", tmp_path / f"{name}.npz")
        with np.load(tmp_path / f"{name}.npz") as file:
            found[name] = file["idx"][:, 0]
    assert np.array_equal(found["mixed"], (np.arange(48) + 24) % 48)
    assert np.array_equal(found["apart"] // 24, np.arange(48) // 24)


@pytest.mark.parametrize("method", ["simclr", "peclr", "simhand"])
def test_training_resumes_as_if_it_had_not_stopped(method, hands, pairs, monkeypatch, tmp_path):
    with np.load(pairs) as file:
        few = {name: file[name] for name in file}
    few["idx"][10:] = -1
    np.savez(tmp_path / "few.npz", **few)  # the pairs of ten hands
    special = {"simclr": ("--accumulate", 2), "peclr": ("--pairs", tmp_path / "few.npz", "--color", 1),
               "simhand": ("--pairs", pairs, "--neighbour", 0)}
    flags = ("--data", hands / "train", "--method", method, *TINY, "--steps", 4, "--save-every", 2,
             *special[method])
    whole = tmp_path / "whole"
    printed = train(*flags, "--out", whole).stdout
    assert ("10 of 24 hands have a neighbour" in printed) == (method == "peclr")
    rows = log(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "alignment", "uniformity", "lr", "gradient_norm"} <= set(rows[0])
    assert ("positive_weight_mean" in rows[0]) == (method == "simhand")
    pictures = {"step_0000001.png", "step_0000002.png", "step_0000004.png", "loss.png", "agreement.png",
                "similarity.png"}
    assert {path.name for path in (whole / "samples").iterdir()} == pictures

    class Killed(Exception):
        pass

    def save_and_die(path, **state):
        save_checkpoint(path, **state)
        if path.name == "last.pt":
            raise Killed

    save_checkpoint = pc.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pc, "save_checkpoint", save_and_die)
        train(*flags, "--out", tmp_path / "part")
    assert torch.load(tmp_path / "part" / "last.pt", weights_only=True)["step"] == 2
    train(*flags, "--out", tmp_path / "part", "--resume")
    one, two = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "part"))
    assert all(torch.equal(two["model"][name], value) for name, value in one["model"].items())


def test_gathered_processes_are_one(hands, pairs, tmp_path):
    flags = ("--data", hands / "train", "--method", "simhand", "--pairs", pairs, *TINY, "--steps", 3,
             "--gather", "--optimizer", "adamw", "--color", 1)
    train(*flags, "--out", tmp_path / "one")
    train(*flags, "--out", tmp_path / "two", processes=2)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def without_image(index, row, path):
    """A copy of an index in which the image of a row is missing."""
    columns = {name: np.array(value) for name, value in index.columns.items()}
    columns["image"][row] = b"gone.jpg"
    write_index(path, columns, {"name": path.name}, root=index.root.resolve())
    return path


def test_parts_and_processes_are_the_same_division(hands, tmp_path):
    """Four parts in one process, or two parts in each of two: four losses over the same hands, one update.
    What the second process could not read is printed by the first."""
    row = next(iter(EpochSampler(24, 8, 0, 0, 3, 1, 2)))[0]
    data = without_image(HandIndex(hands / "train"), row, tmp_path / "holes")
    flags = ("--data", data, "--method", "peclr", *TINY, "--steps", 3, "--optimizer", "adamw")
    train(*flags, "--accumulate", 4, "--out", tmp_path / "one")
    done = train(*flags, "--accumulate", 2, "--out", tmp_path / "two", processes=2)
    assert "gone.jpg" in done.stdout
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["lr"] == one["lr"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


def test_an_unreadable_image_does_not_end_a_run(hands, tmp_path):
    data = without_image(HandIndex(hands / "train"), 3, tmp_path / "holes")
    done = train("--data", data, "--method", "simclr", *TINY, "--epochs", 1, "--out", tmp_path / "run")
    assert re.search(r"1 images? could not be read.*gone\.jpg", done.stdout)


def test_flags_that_a_method_ignores_are_refused():
    def read(*flags):
        return pc.read_flags([str(flag) for flag in ("--data", "x", "--out", "y", *flags)])

    for method, flag in (("simclr", ("--rotation", 30)), ("simclr", ("--zoom", 1, 1.2)),
                         ("simclr", ("--undo", "official")), ("simclr", ("--neighbour", 2)),
                         ("peclr", ("--neighbour", 0))):
        with pytest.raises(ValueError, match=f"^{flag[0]}: --method {method} does not use it"):
            read("--method", method, *flag)
    args = read("--method", "simclr", "--shift", 0.2, "--color", 0)
    assert (args.rotation, args.zoom, args.undo, args.weights) == (0, [1.25, 1.25], "none", "none")
    assert (args.shift, args.color) == (0.2, 0)
    args = read("--pairs", "z", "--neighbour", 2, "--zoom", 1, 1.2)
    assert (args.method, args.weights, args.color, args.neighbour) == ("simhand", "both", None, 2)


def test_refusals_say_what_to_do(hands, pairs, tmp_path):
    index = HandIndex(hands / "train")
    lone = {name: np.asarray(value) for name, value in index.columns.items()}
    lone["video"] = np.zeros(len(index))
    write_index(tmp_path / "lone", lone, {"name": "lone"}, root=hands / "train")
    other = {name: value[::-1] for name, value in lone.items()} | {"video": np.arange(len(index))}
    write_index(tmp_path / "other", other, {"name": "other"}, root=hands / "train")
    bare = {name: lone[name] for name in ("image", "box")}
    write_index(tmp_path / "bare", bare, {"name": "bare"}, root=hands / "train")
    (tmp_path / "broken.npz").write_text("no pairs")
    (tmp_path / "photo.png").touch()
    with np.load(pairs) as file:
        np.savez(tmp_path / "later.npz", **{name: file[name] for name in file} | {"format": 99})
    learn, mining = "pretrain_contrastive.py", "mine_pairs.py"
    simhand = ("--data", hands / "train", "--method", "simhand", "--labelled")
    peclr = ("--data", hands / "train", "--method", "peclr")
    for command, flags, message in (
            (learn, simhand, "needs --pairs"),
            (learn, (*peclr, "--rotation", 0), "--rotation 0"),
            (learn, (*peclr, "--batch-size", 8, "--accumulate", 8), "--accumulate"),
            (learn, (*peclr, "--batch-size", 1), "--batch-size"),
            (learn, (*peclr, "--zoom", 1.2, 1.1), "--zoom"),
            (learn, (*peclr, "--color", 3), "--color"),
            (learn, ("--data", tmp_path / "other", *simhand[2:], "--pairs", pairs), "other indices"),
            (learn, (*simhand, "--pairs", tmp_path / "broken.npz"), "no pairs of mine_pairs.py"),
            (learn, (*simhand, "--pairs", tmp_path / "later.npz"), "format 99"),
            (learn, (*simhand, "--pairs", tmp_path / "none.npz"), "no such file"),
            (learn, ("--data", tmp_path / "bare", *peclr[2:], "--weights", "both"), "--weights none"),
            (mining, ("--data", tmp_path / "lone", "--labelled"), "one video"),
            (mining, ("--data", tmp_path / "bare"), "no column keypoints"),
            (mining, ("--data", hands / "train", "--out", pairs), "exists"),
            (mining, ("--data", hands / "train", "--out", tmp_path / "photo.npz"), "photo.png exists"),
            (mining, ("--data", hands / "train", "--out", tmp_path / "x.txt"), "npz"),
            (mining, ("--data", hands / "train", "--components", 43), "--components")):
        out = tmp_path / ("out.npz" if command == mining else "out")
        done = call(command, "--out", out, *flags, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not out.exists()


def test_a_live_probe_stands_in_the_log_and_resumes(hands, pairs, tmp_path):
    """Also without 3-D joints. It changes no weight, and other hands to probe are refused."""
    flags = ("--data", hands / "train", "--pairs", pairs, *TINY, "--steps", 4, "--save-every", 2)
    index = HandIndex(hands / "train")
    columns = {name: np.array(values) for name, values in index.columns.items() if name != "joints"}
    write_index(tmp_path / "flat", columns, {"name": "flat"}, root=str(index.root.resolve()))
    train(*flags, "--out", tmp_path / "plain")
    train(*flags, "--out", tmp_path / "run", "--probe", tmp_path / "flat")
    plain, probed = (torch.load(tmp_path / name / "encoder.pt", weights_only=True)["state_dict"]
                     for name in ("plain", "run"))
    assert all(torch.equal(value, probed[name]) for name, value in plain.items())
    rows = [row for row in log(tmp_path / "run") if "loss" not in row]
    names = {"probe_ridge_percent", "probe_neighbour_percent", "probe_orientation_r2"}
    assert [set(row) for row in rows] == [{"step", *names}] * 2
    other = train(*flags, "--out", tmp_path / "run", "--probe", hands / "val", "--resume", check=False)
    assert other.returncode == 2 and "--probe" in other.stderr
