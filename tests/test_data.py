"""data.py: views against one-pixel images, crops, mirrors, the index's promises, broken files."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import EpochSampler, HandDataset, HandIndex, crop_canvas, mirror, read_image, square, write_index
from views import apply_theta, compose_theta, invert_theta, random_theta, theta_rotation, warp


def thetas(count=64, seed=0):
    return random_theta(count, torch.Generator().manual_seed(seed), math.pi, (0.5, 1.2), 0.3)


def test_theta_brings_a_blob_of_the_view_to_its_place_on_the_canvas():
    size, theta = 224, random_theta(32, torch.Generator().manual_seed(1), math.pi / 4, (0.6, 1.0), 0.15)
    place = torch.tensor([0.21, -0.13])                            # of the blob on the canvas
    centres = (2 * torch.arange(256) + 1) / 256 - 1
    blob = torch.exp(-((centres[None, :] - place[0]) ** 2 + (centres[:, None] - place[1]) ** 2) / (2 * 0.03 ** 2))
    views = warp(blob.expand(32, 1, 256, 256), theta, size)[:, 0]
    axis = (2 * torch.arange(size) + 1) / size - 1
    mass = views.sum((1, 2))
    centroid = torch.stack([(views.sum(1) * axis).sum(1), (views.sum(2) * axis).sum(1)], 1) / mass[:, None]
    error = apply_theta(theta, centroid[:, None])[:, 0] - place
    assert error.abs().max() * size / 2 < 0.02                     # pixels of the view


def test_theta_moves_one_pixel_where_it_says():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1
    theta = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])    # quarter turn: view (x, y) shows canvas (-y, x)
    view = warp(image, theta, 8)
    row, column = divmod(int(view.argmax()), 8)
    point = torch.tensor([[[(2 * column + 1) / 8 - 1, (2 * row + 1) / 8 - 1]]])
    torch.testing.assert_close(apply_theta(theta, point)[0, 0], torch.tensor([(2 * 5 + 1) / 8 - 1, (2 * 2 + 1) / 8 - 1]))


def test_theta_algebra():
    outer, inner, points = thetas(seed=1), thetas(seed=2), torch.randn(64, 21, 2)
    torch.testing.assert_close(apply_theta(compose_theta(outer, inner), points), apply_theta(outer, apply_theta(inner, points)),
                               atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apply_theta(compose_theta(outer, invert_theta(outer)), points), points, atol=1e-5, rtol=1e-5)


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
    view = warp(checker, data.centre_theta(1, 1.0), 64)
    assert (view - 0.5).abs().max() < 1e-3


def test_crop_is_square_padded_by_reflection_and_knows_what_is_real():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    canvas, valid = crop_canvas(Image.fromarray(pixels), 10, 20, 40, 40)       # x from -10 to 30, y from 0 to 40
    np.testing.assert_array_equal(canvas[:, 10:], pixels[:, :30])
    np.testing.assert_array_equal(canvas[:, :10], pixels[:, 9::-1])
    np.testing.assert_allclose(valid, [-0.5, -1, 1, 1])
    with pytest.raises(ValueError, match="outside the image"):
        crop_canvas(Image.fromarray(pixels), -100, 0, 20, 20)


def test_random_draws_are_functions_of_the_generator():
    assert torch.equal(thetas(seed=5), thetas(seed=5))
    big, rank1 = thetas(8, seed=6), thetas(8, seed=6)[4:]
    assert torch.equal(big[4:], rank1)


def test_sampler_is_a_function_of_the_step_and_splits_over_processes():
    whole = list(EpochSampler(10, 4, seed=3, start=0, stop=9))
    assert list(EpochSampler(10, 4, seed=3, start=5, stop=9)) == whole[5:]
    parts = [list(EpochSampler(10, 4, seed=3, start=0, stop=9, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    flat = sum(whole, [])
    assert sorted(flat[:10]) == list(range(10)) and sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]


# ---------------------------------------------------------------------------------------------------------------- index
def toy_index(folder, count=6, **extra):
    """An index of small images whose joints2d sit on known pixels."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        names.append(f"images/{i}.png".encode())
    joints2d = rng.uniform([20, 10], [50, 40], (count, 21, 2)).astype(np.float32)
    box = np.concatenate([joints2d.min(1), joints2d.max(1)], 1) + 0.5
    columns = {"image": np.array(names), "box": box, "side": np.arange(count) % 2, "joints2d": joints2d,
               "joints": rng.normal(size=(count, 21, 3)), "pose": rng.normal(size=(count, 48))} | extra
    write_index(folder, columns, {"name": "toy"})
    return HandIndex(folder)


def test_dataset_mirrors_left_hands_with_their_labels(tmp_path):
    index = toy_index(tmp_path / "a")
    right, left = (HandDataset([index], 64, 2.0, ("joints2d", "joints", "pose"))[i] for i in (0, 1))
    for row, item in ((0, right), (1, left)):
        centre_x, centre_y, side = square(index.columns["box"][row], 2.0)
        canvas, valid = crop_canvas(read_image(index.image_path(row))[0], centre_x, centre_y, side, 64)
        sign = -1 if row else 1
        np.testing.assert_array_equal(item["canvas"].numpy(), (canvas[:, ::-1] if row else canvas).transpose(2, 0, 1))
        expected = (index.columns["joints2d"][row] + 0.5 - [centre_x, centre_y]) / (side / 2) * [sign, 1]
        np.testing.assert_allclose(item["joints2d"], expected, atol=1e-6)
        np.testing.assert_allclose(item["joints"], index.columns["joints"][row] * [sign, 1, 1])
    np.testing.assert_allclose(left["pose"].reshape(16, 3), index.columns["pose"][1].reshape(16, 3) * [1, -1, -1])
    for name in ("joints2d", "joints", "vertices", "pose"):        # twice is the identity (T5)
        value = np.random.default_rng(1).normal(size=data.LABEL_COLUMNS[name])
        np.testing.assert_array_equal(mirror(name, mirror(name, value)), value)


def test_broken_images_are_replaced_and_told(tmp_path):
    index = toy_index(tmp_path / "a")
    (tmp_path / "a/images/2.png").write_bytes(b"")
    (tmp_path / "a/images/3.png").unlink()
    items = [HandDataset([index], 64)[i] for i in range(6)]
    assert [item["failed"] for item in items] == [-1, -1, 2, 3, -1, -1] and items[2]["row"] == 4
    strict = HandDataset([index], 64, substitute=False)[2]
    assert strict["failed"] == 2 and strict["row"] == 2 and not strict["canvas"].any()


@pytest.mark.parametrize("change, named", [
    ({"joints": np.full((6, 21, 3), np.nan)}, "column joints: entry 0 is not finite"),
    ({"joints": np.zeros((5, 21, 3))}, "column joints: shape"),
    ({"K": np.zeros((6, 3, 3))}, "column K: entry 0"),
    ({"side": np.full(6, 7)}, "column side: entry 0"),
    ({"box": np.zeros((6, 4))}, "column box: entry 0"),
    ({"label": np.full(6, 9)}, "column label"),
    ({"colour": np.zeros(6)}, "unknown"),
])
def test_contradicting_columns_are_refused_and_nothing_is_written(tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        toy_index(tmp_path / "a", **change)
    assert not list((tmp_path / "a").glob("*.npy")) and not (tmp_path / "a/index.json").exists()


def test_broken_index_is_refused_by_name(tmp_path):
    toy_index(tmp_path / "a")
    np.save(tmp_path / "a/box.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match="box.npy has 3 rows"):
        HandIndex(tmp_path / "a")
    (tmp_path / "a/index.json").write_text("{")
    with pytest.raises(ValueError, match="broken index"):
        HandIndex(tmp_path / "a")
    with pytest.raises(ValueError, match="no index"):
        HandIndex(tmp_path)


def test_an_opened_index_stays_on_disk(tmp_path):
    count = 20_000
    columns = {"image": np.full(count, b"frames/00000000.jpg"), "box": np.tile(np.float32([0, 0, 9, 9]), (count, 1)),
               "keypoints": np.zeros((count, 21, 2), np.float32)}
    write_index(tmp_path / "big", columns, {"name": "big"})
    index = HandIndex(tmp_path / "big")
    assert len(index) == count and index.image_path(count - 1).name == "00000000.jpg"
    assert isinstance(index.columns["keypoints"], np.memmap)


# --------------------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("P", "png"), ("L", "png"), ("RGBA", "png"), ("1", "png"), ("LA", "png"),
                                          ("I;16", "png"), ("RGB", "webp")])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    image = (Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else
             Image.fromarray(grey).quantize(64) if mode == "P" else Image.fromarray(np.stack([grey] * 3, -1)).convert(mode))
    image.save(tmp_path / f"a.{suffix}")
    read, scale = read_image(tmp_path / f"a.{suffix}")
    assert read.mode == "RGB" and scale == 1
    if mode != "1":
        assert np.abs(np.asarray(read).astype(int) - grey[..., None]).mean() < 4


def test_photographs_are_turned_upright_and_large_jpegs_shrink_while_decoding(tmp_path):
    pixels = np.zeros((512, 1024, 3), np.uint8)
    pixels[:, :512] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                               # the camera was turned: rotate by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image, _ = read_image(tmp_path / "a.jpg")
    assert image.size == (512, 1024) == data.image_size(tmp_path / "a.jpg") and np.asarray(image)[:400].min() > 200
    small, scale = read_image(tmp_path / "a.jpg", smallest=128)
    assert scale == 0.25 and small.size == (128, 256)
