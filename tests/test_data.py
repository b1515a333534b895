"""data.py: crops, mirrors, the order of hands, the index's promises, broken files."""

import numpy as np
import pytest
from PIL import Image

import data
from data import (
    EpochSampler,
    HandDataset,
    HandIndex,
    UnreadImages,
    crop_canvas,
    mirror,
    read_image,
    square,
    write_index,
)


def test_crop_is_square_padded_by_reflection_and_knows_what_is_real():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    canvas, valid = crop_canvas(Image.fromarray(pixels), 10, 20, 40, 40)  # x from -10 to 30, y from 0 to 40
    np.testing.assert_array_equal(canvas[:, 10:], pixels[:, :30])
    np.testing.assert_array_equal(canvas[:, :10], pixels[:, 9::-1])
    np.testing.assert_allclose(valid, [-0.5, -1, 1, 1])
    with pytest.raises(ValueError, match="outside the image"):
        crop_canvas(Image.fromarray(pixels), -100, 0, 20, 20)


def test_sampler_is_a_function_of_the_step_and_splits_over_processes():
    whole = list(EpochSampler(10, 4, seed=3, start=0, stop=9))
    assert list(EpochSampler(10, 4, seed=3, start=5, stop=9)) == whole[5:]
    parts = [list(EpochSampler(10, 4, seed=3, start=0, stop=9, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    flat = sum(whole, [])
    first, second = flat[:10], flat[10:20]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


# ------------------------------------------------------------------------------------------------------ index
def toy_index(folder, count=6, **extra):
    """An index of small images whose joints2d sit on known pixels."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (50, 70, 3),
                                     dtype=np.uint8)).save(folder / "images" / f"{i}.png")
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
        np.testing.assert_array_equal(item["canvas"].numpy(),
                                      (canvas[:, ::-1] if row else canvas).transpose(2, 0, 1))
        expected = (index.columns["joints2d"][row] + 0.5 - [centre_x, centre_y]) / (side / 2) * [sign, 1]
        np.testing.assert_allclose(item["joints2d"], expected, atol=1e-6)
        np.testing.assert_allclose(item["joints"], index.columns["joints"][row] * [sign, 1, 1])
    np.testing.assert_allclose(left["pose"].reshape(16, 3),
                               index.columns["pose"][1].reshape(16, 3) * [1, -1, -1])
    for name in ("joints2d", "joints", "vertices", "pose"):        # twice is the identity
        value = np.random.default_rng(1).normal(size=data.LABEL_COLUMNS[name])
        np.testing.assert_array_equal(mirror(name, mirror(name, value)), value)


def test_padding_is_mirrored_with_a_left_hand(tmp_path):
    """A hand at the image's left edge: the padding lies left in its canvas, and right once it is mirrored."""
    box = np.tile(np.float32([0, 10, 20, 30]), (6, 1))
    index = toy_index(tmp_path / "a", box=box)
    right, left = (HandDataset([index], 64)[i] for i in (0, 1))
    np.testing.assert_allclose(right["valid"], [-0.5, -1, 1, 1])
    np.testing.assert_allclose(left["valid"], [-1, -1, 0.5, 1])


def test_broken_images_are_replaced_and_told(tmp_path):
    index = toy_index(tmp_path / "a")
    (tmp_path / "a/images/2.png").write_bytes(b"")
    (tmp_path / "a/images/3.png").unlink()
    items = [HandDataset([index], 64)[i] for i in range(6)]
    assert [item["failed"] for item in items] == [-1, -1, 2, 3, -1, -1] and items[2]["row"] == 4
    unread = UnreadImages(HandDataset([index], 64))
    list(unread.watch([{"failed": np.array([item["failed"] for item in items])}]))
    assert "2 images could not be read" in str(unread) and "2.png; " in str(unread) and "3.png" in str(unread)
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
    columns = {"image": np.full(count, b"frames/00000000.jpg"),
               "box": np.tile(np.float32([0, 0, 9, 9]), (count, 1)),
               "keypoints": np.zeros((count, 21, 2), np.float32)}
    write_index(tmp_path / "big", columns, {"name": "big"})
    index = HandIndex(tmp_path / "big")
    assert len(index) == count and index.image_path(count - 1).name == "00000000.jpg"
    assert isinstance(index.columns["keypoints"], np.memmap)


# ----------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("P", "png"), ("L", "png"), ("RGBA", "png"),
                                          ("1", "png"), ("LA", "png"),
                                          ("I;16", "png"), ("RGB", "webp")])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(grey).quantize(64)
    else:
        image = Image.fromarray(np.stack([grey] * 3, -1)).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    read, scale = read_image(tmp_path / f"a.{suffix}")
    assert read.mode == "RGB" and scale == 1
    if mode != "1":
        assert np.abs(np.asarray(read).astype(int) - grey[..., None]).mean() < 4


def test_photographs_are_turned_upright_and_large_jpegs_shrink_while_decoding(tmp_path):
    pixels = np.zeros((512, 1024, 3), np.uint8)
    pixels[:, :512] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image, _ = read_image(tmp_path / "a.jpg")
    assert image.size == (512, 1024) == data.image_size(tmp_path
                                                        / "a.jpg") and np.asarray(image)[:400].min() > 200
    small, scale = read_image(tmp_path / "a.jpg", smallest=128)
    assert scale == 0.25 and small.size == (128, 256)
