"""The rasteriser against a double loop, and that every picture maker draws where it is told."""

import numpy as np
import pytest
from PIL import Image

import draw


def rasterise_by_loops(points, faces, size):
    """The same picture face by face and pixel by pixel."""
    height, width = size
    face, depth = np.full(size, -1), np.full(size, np.inf, np.float32)
    bary = np.zeros((*size, 3))
    for index, (i, j, k) in enumerate(faces):
        matrix = np.stack([points[[i, j, k], 0], points[[i, j, k], 1], np.ones(3)])
        if abs(np.linalg.det(matrix)) < 1e-12:
            continue
        for row in range(height):
            for column in range(width):
                w = np.linalg.solve(matrix, [column + 0.5, row + 0.5, 1.0])
                z = np.float32(w @ points[[i, j, k], 2])
                if w.min() >= 0 and z < depth[row, column]:
                    face[row, column], depth[row, column], bary[row, column] = index, z, w
    return face, bary, depth


@pytest.mark.parametrize("chunk", [draw.CHUNK, 50])
def test_rasterise_equals_double_loop(monkeypatch, chunk):
    monkeypatch.setattr(draw, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    points = rng.uniform([-8, -8, 1], [28, 22, 3], (40, 3))  # many corners lie outside the image
    faces = rng.integers(0, 40, (30, 3))  # a few are degenerate
    face, bary, depth = draw.rasterise(points, faces, (14, 20))
    face_loop, bary_loop, depth_loop = rasterise_by_loops(points, faces, (14, 20))
    assert face.dtype == np.int32 and bary.dtype == depth.dtype == np.float32
    np.testing.assert_array_equal(face, face_loop)
    np.testing.assert_allclose(bary, bary_loop, atol=1e-5)
    np.testing.assert_allclose(depth, depth_loop, atol=1e-5)
    assert (face >= 0).any() and (face < 0).any()


def test_rasterise_depth_order_and_ties():
    square = np.array([[2, 2, 5.0], [8, 2, 5], [8, 8, 5], [2, 8, 5]])
    points = np.concatenate([square, square + [0, 0, -1], square + [0, 0, -1]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    face, _, depth = draw.rasterise(points, np.concatenate([faces, faces + 4, faces + 8]), (10, 10))
    assert set(np.unique(face)) == {-1, 2, 3}  # the nearer square, and its first copy
    assert (face >= 0).sum() == 36 and (depth[face >= 0] == 4).all() and np.isinf(depth[face < 0]).all()


def test_rasterise_interpolates_positions_and_meets_without_holes():
    rng = np.random.default_rng(1)
    x, y = np.meshgrid(np.linspace(-5, 70, 9), np.linspace(-5, 50, 8))
    x, y = x + rng.uniform(-2, 2, x.shape), y + rng.uniform(-2, 2, y.shape)
    points = np.stack([x, y, rng.uniform(1, 2, x.shape)], -1).reshape(-1, 3)
    corner = (np.arange(7)[:, None] * 9 + np.arange(8)).ravel()
    faces = np.concatenate([np.stack([corner, corner + 1, corner + 9], 1),
                            np.stack([corner + 1, corner + 10, corner + 9], 1)])
    face, bary, depth = draw.rasterise(points, faces, (40, 60))
    assert (face >= 0).all()
    place = np.einsum("hwk,hwkc->hwc", bary, points[faces[face]])
    centres = np.stack(np.meshgrid(np.arange(60) + 0.5, np.arange(40) + 0.5), -1)
    np.testing.assert_allclose(place[..., :2], centres, atol=1e-4)
    np.testing.assert_allclose(place[..., 2], depth, atol=1e-5)


def test_rasterise_clips_culls_and_skips_bad_faces():
    points = np.array([[-1e6, -1e6, 1.0], [1e6, -1e6, 1], [0, 1e6, 1], [np.nan, 0, 1], [50, 50, 1], [60, 50, 1],
                       [50, 60, 1]])
    whole, broken, outside = [0, 1, 2], [3, 1, 2], [4, 5, 6]
    assert (draw.rasterise(points, np.array([broken, outside, whole]), (9, 7))[0] == 2).all()
    assert (draw.rasterise(points, np.array([broken, outside]), (9, 7))[0] == -1).all()
    assert (draw.rasterise(points, np.array([whole]), (9, 7), cull=True)[0] == -1).all()
    assert (draw.rasterise(points, np.array([whole[::-1]]), (9, 7), cull=True)[0] == 0).all()
    assert draw.rasterise(points, np.zeros((0, 3), int), (9, 7))[0].shape == (9, 7)


def test_overlay_is_antialiased_shaded_and_keeps_the_rest():
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    points = np.concatenate([[[32, 32, -1.0]], np.stack([32 + 20 * np.cos(angle), 32 + 20 * np.sin(angle),
                                                         np.zeros(20)], 1)])
    faces = np.array([[0, 1 + (k + 1) % 20, 1 + k] for k in range(20)])
    image = np.full((64, 64, 3), 200, np.uint8)
    out = draw.overlay(image, points, faces, color=(255, 0, 0), alpha=1.0)
    assert out.dtype == np.uint8 and (out[:10] == 200).all() and (image == 200).all()
    assert (out[20:44, 20:44, 1] == 0).all()
    assert out[24, 24, 0] > out[40, 40, 0] + 10  # lit from the upper left
    assert ((out[..., 1] > 0) & (out[..., 1] < 200)).sum() > 20
    metres = draw.overlay(image, points * [1, 1, 0.001], faces, color=(255, 0, 0), alpha=1.0)
    np.testing.assert_array_equal(metres, out)  # the unit of depth does not matter
    np.testing.assert_array_equal(draw.overlay(image, points + [500, 0, 0], faces), image)


def test_joints_are_drawn_at_pixel_centres():
    joints = np.stack([np.linspace(10, 90, 21), np.full(21, 30.0)], 1)
    joints[7] = np.nan
    out = draw.draw_joints(np.zeros((60, 100, 3), np.uint8), joints, thickness=2)
    weight = out.astype(float).sum(2)
    assert abs((weight.sum(1) * np.arange(60)).sum() / weight.sum() - 30) < 0.1
    assert (out[30, 90] > 20).any() and tuple(out[30, 10]) == (255, 255, 255)
    faint = draw.draw_joints(np.zeros((60, 100, 3), np.uint8), joints, visible=np.zeros(21), thickness=2)
    assert faint.sum() < 0.6 * out.sum()


def test_edges_run_across_their_gradients():
    cells = np.zeros((8, 2, 2))
    cells[0, 0, 0], cells[4, 0, 1], cells[2, 1, 0] = 3, 3, 1.5                                 # gradients along x, y and down to the right
    page = draw.draw_edges(cells, 40)[..., 0].astype(int)
    upright, level, slanted, empty = page[:20, :20], page[:20, 20:], page[20:, :20], page[20:, 20:]
    assert upright[4:16, 9:11].min() > 80 and upright[:, :7].max() == 0 and np.abs(level - upright.T).mean() < 5
    assert empty.max() == 0 < slanted.max() < 140
    y, x = np.nonzero(slanted)
    assert np.corrcoef(x, y)[0, 1] < -0.9                                                      # up to the right


def test_grid_curve_and_save(tmp_path):
    images = [np.full((10, 20, 3), k * 40, np.uint8) for k in range(5)]
    page = draw.grid(images, 3, labels=list("abcde"), cell=30)
    assert page.shape == (2 * (15 + 14 + 4) + 4, 3 * 34 + 4, 3)
    assert (page[5, 5] == 0).all() and (page[5, 5 + 34] == 40).all()
    with pytest.raises(ValueError, match="no image"):
        draw.grid([], 3)
    chart = draw.curve({"loss": ([0, 1, 2, 3], [3, 2, np.nan, 1]), "flat": ([0, 3], [2, 2]), "one": ([1], [1])},
                       title="training", x_label="step", y_label="mm")
    assert chart.shape == (320, 480, 3) and (chart == draw.CURVE_COLORS[0]).all(2).any()
    assert draw.curve({}).shape == (320, 480, 3)
    assert draw.curve({"constant": ([0, 0], [5, 5])}).shape == (320, 480, 3)
    draw.save_image(tmp_path / "new" / "chart.png", chart)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "chart.png")), chart)
