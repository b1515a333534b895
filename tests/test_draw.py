"""The rasteriser against a double loop; every picture shows its points at their places."""

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
    large = [[-1e6, -1e6, 1.0], [1e6, -1e6, 1], [0, 1e6, 1]]
    points = np.array([*large, [np.nan, 0, 1], [50, 50, 1], [60, 50, 1], [50, 60, 1]])
    whole, broken, outside = [0, 1, 2], [3, 1, 2], [4, 5, 6]
    assert (draw.rasterise(points, np.array([broken, outside, whole]), (9, 7))[0] == 2).all()
    assert (draw.rasterise(points, np.array([broken, outside]), (9, 7))[0] == -1).all()
    assert (draw.rasterise(points, np.array([whole]), (9, 7), cull=True)[0] == -1).all()
    assert (draw.rasterise(points, np.array([whole[::-1]]), (9, 7), cull=True)[0] == 0).all()
    both = np.array([whole, whole[::-1]])
    assert (draw.rasterise(points, both, (9, 7), cull=np.array([True, False]))[0] == 1).all()
    assert (draw.rasterise(points, both[::-1], (9, 7), cull=np.array([True, True]))[0] == 0).all()
    face, bary, depth = draw.rasterise(points, both, (9, 7), weights=False)
    assert bary is None and (face == 0).all() and (depth == 1).all()
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


def test_hog_strokes_run_across_their_gradients():
    cells = np.zeros((8, 2, 2))
    cells[0, 0, 0] = 3  # a gradient along x
    cells[4, 0, 1] = 3  # along y
    cells[2, 1, 0] = 1.5  # down to the right
    page = draw.draw_hog(cells, 40)[..., 0].astype(int)
    upright, level = page[:20, :20], page[:20, 20:]
    slanted, empty = page[20:, :20], page[20:, 20:]
    assert upright[4:16, 9:11].min() > 80 and upright[:, :7].max() == 0
    assert np.abs(level - upright.T).mean() < 5
    assert empty.max() == 0 < slanted.max() < 140
    y, x = np.nonzero(slanted)
    assert np.corrcoef(x, y)[0, 1] < -0.9  # up to the right


def test_points_and_rings_of_a_number_share_a_colour():
    points = np.array([[10.0, 10.0], [40.0, 12.0]])
    rings = points + [0, 30]
    out = draw.draw_points(np.zeros((60, 60, 3), np.uint8), points, rings, radius=4).astype(int)
    for (x, y), (u, v) in zip(points.astype(int), rings.astype(int), strict=True):
        assert out[y, x].max() == 255 and out[v, u].max() == 0  # a dot is full, a ring is empty
        assert np.abs(out[v, u + 2 : u + 7].max(0) / 255 - out[y, x] / 255).max() < 0.5
    assert (out[10, 10] != out[12, 40]).any()


def test_grid_places_and_saves(tmp_path):
    images = [np.full((10, 20, 3), k * 40, np.uint8) for k in range(5)]
    page = draw.grid(images, 3, labels=list("abcde"), cell=30)
    assert page.shape == (2 * (15 + 14 + 4) + 4, 3 * 34 + 4, 3)
    assert (page[5, 5] == 0).all() and (page[5, 5 + 34] == 40).all()
    assert (page[4 + 33 : 4 + 33 + 15, 4:34] == 120).all()  # the second row begins with the fourth
    with pytest.raises(ValueError, match="no image"):
        draw.grid([], 3)
    draw.save_image(tmp_path / "new" / "page.png", page)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "page.png")), page)


def right_edge(chart):
    """The column at which the plot ends and the names of the lines begin."""
    return np.nonzero((chart == draw.FRAME).all(2))[1].max()


def line_of(chart, k):
    """Rows and columns of the pixels in the colour of line k, without the legend."""
    rows, columns = np.nonzero((chart == draw.CURVE_COLORS[k]).all(2))
    plot = columns < right_edge(chart)
    return rows[plot], columns[plot]


def test_curve_goes_through_its_points_and_breaks():
    x = np.arange(101.0)
    y = np.where((x > 40) & (x < 60), np.nan, x)
    chart = draw.curve({"rising": (x, y), "flat": (x, 0 * x)}, title="t", x_label="step", y_label="mm")
    assert chart.shape == (320, 480, 3)
    rows, columns = line_of(chart, 0)
    assert np.corrcoef(rows, columns)[0, 1] < -0.999  # up to the right
    gaps = np.diff(np.unique(columns))
    assert gaps.max() > 0.15 * np.ptp(columns) and (gaps > 2).sum() == 1
    flat_rows, flat_columns = line_of(chart, 1)
    assert np.ptp(flat_rows) <= 1 and flat_rows.min() > rows.max() - 5
    assert np.ptp(flat_columns) > 250
    rows, columns = np.nonzero((chart == draw.CURVE_COLORS[0]).all(2))
    assert columns.max() > right_edge(chart) + 10  # its sign, beside its name


def test_a_long_line_is_drawn_with_every_peak():
    """Of a long log only the points that can be seen are drawn."""
    x = np.arange(30_000.0)
    y = np.sin(x / 3000)
    y[[7000, 21_000]] = 3, -3
    chart = draw.curve({"line": (x, y)})
    rows, columns = line_of(chart, 0)
    left, right = 62, right_edge(chart)
    for peak, row in ((7000, rows.min()), (21_000, rows.max())):
        place = left + peak / 30_000 * (right - left)
        np.testing.assert_allclose(columns[rows == row], place, atol=1.5)
    dense = draw._thinned(np.stack([x / 25, y], 1))
    assert len(dense) < 2000 and set(dense[[0, -1], 0]) == {0, x[-1] / 25}


@pytest.mark.parametrize("x, y", [([], []), ([0, 0], [5, 5]), ([1], [0]), ([0], [np.nan])])
def test_curve_takes_little(x, y):
    assert draw.curve({"line": (x, y)}).shape == draw.curve({}).shape == (320, 480, 3)


def test_a_band_shades_between_its_edges_and_widens_the_chart():
    x, y = [0, 1], [2.0, 2.0]
    plain = draw.curve({"line": (x, y)}).astype(int)
    banded = draw.curve({"line": (x, y)}, bands={"line": (x, [1.0, 1.0], [3.0, 3.0])}).astype(int)
    column = banded[26:282, 200]  # inside the frame
    blue = draw.CURVE_COLORS[0]
    shade = np.round(255 + (np.array(blue) - 255) * 50 / 255)
    shaded = (np.abs(column - shade) <= 2).all(1)
    assert 0.7 < shaded.mean() < 0.95 and not (np.abs(plain[26:282, 200] - shade) <= 2).all(1).any()
    assert shaded.argmax() > 5 and shaded[::-1].argmax() > 5  # the axis goes beyond the band


def test_curves_of_a_log(tmp_path):
    curves = {"loss": [(1, 3.0), (4, 1.0)], "val": [(2, 7.0)], "hinge": []}
    pictures = {"training": ("loss", "hinge"), "validation": ("val",), "collapse": ("entropy",)}
    draw.save_curves(tmp_path / "samples", curves, pictures)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["training.png", "validation.png"]
    expected = draw.curve({"loss": ([1, 4], [3, 1])}, title="training", x_label="step")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "training.png")), expected)


def test_histogram_shares():
    middles, shares = draw.histogram(np.array([0.1, 0.2, 0.9, 5.0]), np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(middles, [0.25, 0.75])
    np.testing.assert_allclose(shares, [0.5, 0.25])
