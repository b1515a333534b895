"""data.py: crops, mirrors, the order of hands, the index's promises, broken files, caches and packs."""

import multiprocessing
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from fixtures import ENV, ROOT, call
from PIL import Image

import cache
import data
from cache import cache_canvases
from data import (
    EpochSampler,
    HandDataset,
    HandIndex,
    MixSampler,
    UnreadImages,
    crop_canvas,
    list_images,
    make_loader,
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


@pytest.mark.parametrize("count, batch", [(10, 4), (7, 32), (100, 12)])
def test_every_process_draws_its_own_rows_of_the_same_batch(count, batch):
    """Also where a batch holds whole epochs; the order is that of one generator an epoch."""
    whole = list(EpochSampler(count, batch, 3, 2, 7))
    orders = [np.random.default_rng([3, epoch]).permutation(count) for epoch in range(7 * batch // count + 1)]
    assert sum(whole, []) == np.concatenate(orders)[2 * batch:7 * batch].tolist()
    mixed = list(MixSampler([3, 9], [2, 1], batch, 3, 2, 7))
    for world in (2, 4):
        for sampler, expected in ((EpochSampler, whole), (MixSampler, mixed)):
            hands = ([3, 9], [2, 1]) if sampler is MixSampler else (count,)
            parts = [sampler(*hands, batch, 3, 2, 7, rank, world) for rank in range(world)]
            assert [sum(step, []) for step in zip(*parts, strict=True)] == expected


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
    for name in ("a.jpg", "a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        image, _ = read_image(tmp_path / name)
        assert image.size == (512, 1024) == data.image_size(tmp_path / name)
        assert np.asarray(image)[:400].min() > 200
    small, scale = read_image(tmp_path / "a.jpg", smallest=128)
    assert scale == 0.25 and small.size == (128, 256)


def test_images_are_listed_in_the_order_of_paths(tmp_path):
    """Folders before files that continue their name, as paths compare; a link to one of them adds nothing."""
    for name in ("a/2.png", "a/10.JPG", "a-b/1.png", "a.png", "b/c/1.webp", "b.d/1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    found = (path for path in tmp_path.rglob("*") if path.suffix.lower() in data.SUFFIXES)
    slow = sorted(path for path in found if path.is_file())
    assert list_images(tmp_path) == slow and len(slow) == 6


# ----------------------------------------------------------------------------------------------------- caches
LABELS = ("joints2d", "joints", "pose")


def two_indices(folder):
    """Two small indices, of which three images cannot be read."""
    indices = [toy_index(folder / "a"), toy_index(folder / "b", count=5)]
    (folder / "a/images/2.png").write_bytes(b"")
    (folder / "a/images/3.png").unlink()
    (folder / "b/images/4.png").write_bytes(b"broken")  # the last: the first row takes its place
    return indices


def same(batch, other):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


@pytest.mark.parametrize("substitute", [True, False])
@pytest.mark.parametrize("labels", [(), LABELS])
def test_a_cache_changes_no_bit(tmp_path, labels, substitute):
    """Of some rows of two indices, with left hands and unreadable images, whoever makes and serves it."""
    indices = two_indices(tmp_path)
    rows = [10, 1, 2, 3, 5, 6, 7, 9]  # not ascending, as a shuffled split may be
    kept = {"labels": labels, "rows": rows, "substitute": substitute}
    expected = list(make_loader(HandDataset(indices, 32, **kept), batch_size=3))
    assert sorted(sum((batch["failed"].tolist() for batch in expected), [])) == [-1] * 5 + [2, 3, 10]
    for kind in ("file", "memory", "device"):
        for workers in (0, 2):
            dataset = HandDataset(indices, 32, **kept)
            cache = cache_canvases(dataset, kind, workers=workers)
            batches = list(make_loader(dataset, batch_size=3, workers=workers))
            for batch, wanted in zip(batches, expected, strict=True):
                if kind == "device":
                    assert "canvas" not in batch
                    batch["canvas"] = cache.canvases(batch["row"])
                same(batch, wanted)
    assert not list(tmp_path.rglob("*.part"))


def test_items_are_the_rows_of_a_batch(tmp_path):
    dataset = HandDataset(two_indices(tmp_path), 32, labels=LABELS)
    whole = dataset.batch(list(range(11)))
    same(torch.utils.data.default_collate([dataset[item] for item in range(11)]), whole)
    cache_canvases(dataset, "memory")
    same(torch.utils.data.default_collate([dataset[item] for item in range(11)]), whole)


def _serve(dataset, queue):
    queue.put({name: value.numpy() for name, value in dataset.batch([0, 1, 2]).items()})


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_spawned_process_reads_the_same_cache(tmp_path, kind):
    """It gets a descriptor, so the images may be gone. Packs are opened anew."""
    indices = two_indices(tmp_path)
    dataset = HandDataset(indices, 32)
    expected = dataset.batch([0, 1, 2])
    cache_canvases(dataset, kind)
    shutil.rmtree(tmp_path / "a/images")
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_serve, args=(dataset, queue))
    process.start()
    got = {name: torch.from_numpy(value) for name, value in queue.get().items()}
    process.join()
    same(got, expected)


def test_a_file_of_canvases_is_found_again_and_made_anew_for_other_hands(tmp_path, monkeypatch):
    index = toy_index(tmp_path / "a")
    expected = HandDataset([index], 32).batch(range(6))
    cache_canvases(HandDataset([index], 32), "file")
    made, = (tmp_path / "a").glob("canvases_32_*.bin")
    with monkeypatch.context() as patch:
        patch.setattr(HandDataset, "read_canvas", None)  # nothing is decoded
        dataset = HandDataset([HandIndex(tmp_path / "a")], 32)
        assert "on disk" in str(cache_canvases(dataset, "file"))
        same(dataset.batch(range(6)), expected)
    made.write_bytes(made.read_bytes()[:-1])  # cut off: made again
    dataset = HandDataset([index], 32)
    cache_canvases(dataset, "file")
    same(dataset.batch(range(6)), expected)

    columns = {name: np.array(value) for name, value in index.columns.items()}
    for change in ({"side": np.zeros(6)}, {"box": np.tile([10, 10, 30, 40], (6, 1))},
                   {"image": columns["image"][[1, 0, 2, 3, 4, 5]]}):
        (tmp_path / "a/index.json").unlink()
        write_index(tmp_path / "a", columns | change, {"name": "toy"})
        changed = HandDataset([HandIndex(tmp_path / "a")], 32)
        wanted = changed.batch(range(6))
        cache_canvases(changed, "file")
        same(changed.batch(range(6)), wanted)
    last = [HandIndex(tmp_path / "a")]
    for other in (HandDataset(last, 48), HandDataset(last, 32, 1.5), HandDataset(last, 32, rows=[1, 2])):
        wanted = other.batch([0, 1])
        cache_canvases(other, "file")
        same(other.batch([0, 1]), wanted)
    assert len(list((tmp_path / "a").glob("canvases_*.bin"))) == 7


def test_canvases_that_do_not_fit_are_refused_before_any_is_cut(tmp_path, monkeypatch):
    index = toy_index(tmp_path / "a")
    disk = namedtuple("Disk", "free")
    with monkeypatch.context() as patch:
        patch.setattr(HandDataset, "read_canvas", None)
        patch.setattr(shutil, "disk_usage", lambda path: disk(9000))
        patch.setattr(cache, "_free_memory", lambda: 9000)
        for kind, other in (("file", "memory"), ("memory", "file"), ("device", "file")):
            message = f"--cache {kind}: 0.0 MB of canvases, but .* 0.0 MB .*free: use --cache {other}"
            with pytest.raises(ValueError, match=message):
                cache_canvases(HandDataset([index], 32), kind)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for kind, owner, name in (("file", cache.CanvasFile, "write"), ("memory", cache.CanvasFile, "write"),
                              ("file", os, "ftruncate"), ("memory", os, "ftruncate"), ("file", os, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            if name == "open":  # of a disk that is read-only, where nothing can be removed either
                patch.setattr(cache.Path, "unlink", fail)
            with pytest.raises(ValueError, match="No space left on device.* --cache"):
                cache_canvases(HandDataset([index], 32), kind)
    assert not list((tmp_path / "a").glob("canvases*"))
    assert cache._free_memory() is None or cache._free_memory() > 2**20


def test_processes_of_one_machine_share_the_work_and_the_memory(tmp_path):
    two_indices(tmp_path)
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
from cache import cache_canvases
from data import HandDataset, HandIndex

dist.init_process_group("gloo")
rank = dist.get_rank()
expected = HandDataset([HandIndex("a"), HandIndex("b")], 32).batch(range(11))
for kind in ("file", "memory", "device"):
    dataset = HandDataset([HandIndex("a"), HandIndex("b")], 32)
    cache = cache_canvases(dataset, kind, rank=rank, world=2, local_rank=rank)
    batch = dataset.batch(range(11))
    canvas = cache.canvases(batch["row"]) if kind == "device" else batch["canvas"]
    assert torch.equal(canvas, expected["canvas"]) and torch.equal(batch["failed"], expected["failed"])
    sys.stdout.write(f"{{rank}} {{kind}} same\\n")
dist.barrier()
dist.destroy_process_group()
""")
    done = call(tmp_path / "script.py", processes=2, env=ENV, cwd=tmp_path)
    assert done.stdout.count("same\n") == 6, done.stderr[-2000:]


def test_a_small_dev_shm_means_fewer_processes_not_a_bus_error(monkeypatch, capsys):
    disk = namedtuple("Disk", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(64 << 20))
    assert data._fit_shared_memory(4, 1 << 20) == (4, 2) and not capsys.readouterr().err
    assert data._fit_shared_memory(4, 12 << 20) == (4, 1) and not capsys.readouterr().err
    assert data._fit_shared_memory(4, 20 << 20) == (2, 1)
    warning = capsys.readouterr().err
    assert "--workers 4" in warning and "--shm-size" in warning and warning.count("\n") == 1
    assert data._fit_shared_memory(4, 60 << 20) == (0, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(64 << 30))
    assert data._fit_shared_memory(16, 201 << 20) == (16, 1)  # 1,024 hands of a ResNet: 3.2 GB, not 6.4


# ------------------------------------------------------------------------------------------------------ packs
def with_masks(folder):
    """An index of six hands: two share an image, some have masks of both kinds, one image is missing."""
    index = toy_index(folder)
    mask = np.zeros((50, 70), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(folder / "images/mask.png")
    np.savez(folder / "images/labels.npz", seg=mask)
    (folder / "images/5.png").unlink()
    columns = {name: np.array(value) for name, value in index.columns.items()}
    columns["image"] = columns["image"][[0, 1, 2, 3, 0, 5]]
    masks = np.array([b"images/mask.png", b"", b"images/labels.npz", b"", b"images/mask.png", b""])
    (folder / "index.json").unlink()
    write_index(folder, columns | {"mask": masks}, {"name": "toy"})
    return HandIndex(folder)


def test_a_packed_index_gives_the_same_items(tmp_path, monkeypatch):
    single = with_masks(tmp_path / "single")
    monkeypatch.setattr(data, "PACK_BYTES", 20_000)  # about two images
    done = call("prepare_data.py", "pack", tmp_path / "single", "--out", tmp_path / "packed")
    assert "image or mask missing, of a hand that is kept: 1:" in done.stdout and "5.png" in done.stdout
    packs = sorted((tmp_path / "packed").glob("pack_*.bin"))
    stored = {path: path.stat().st_size for path in (tmp_path / "single/images").iterdir()}
    stored.pop(tmp_path / "single/images/4.png")  # no hand names it any more
    assert len(packs) > 2 and sum(path.stat().st_size for path in packs) == sum(stored.values())
    expected = HandDataset([single], 32, labels=("mask", *LABELS)).batch(range(6))
    assert expected["has_mask"].tolist() == [1, 0, 1, 0, 1, 1] and expected["failed"][5] == 5
    shutil.move(tmp_path / "packed", tmp_path / "moved")  # it needs nothing else
    shutil.rmtree(tmp_path / "single")
    dataset = HandDataset([HandIndex(tmp_path / "moved")], 32, labels=("mask", *LABELS))
    same(dataset.batch(range(6)), expected)  # and leaves descriptors open, which forked processes share
    for batch in make_loader(dataset, batch_size=6, workers=1):
        same(batch, expected)
    cache_canvases(dataset, "memory", workers=1)
    same(dataset.batch(range(6)), expected)
    done = call("prepare_data.py", "pack", tmp_path / "moved", "--out", tmp_path / "again", check=False)
    assert done.returncode == 2 and "packed already" in done.stderr and not (tmp_path / "again").exists()


def test_a_damaged_pack_is_named(tmp_path):
    with_masks(tmp_path / "a")
    call("prepare_data.py", "pack", tmp_path / "a", "--out", tmp_path / "b")
    pack = tmp_path / "b/pack_0000.bin"
    content = pack.read_bytes()
    index = HandIndex(tmp_path / "b")
    start, size = index.columns["image_place"][1, 1:]
    pack.write_bytes(content[:start] + bytes(size) + content[start + size:])
    with pytest.raises(ValueError, match=f"images/1.png in pack_0000.bin at {start}: not a readable image"):
        read_image(index.open_image(1))
    assert HandDataset([index], 32).batch(range(3))["failed"].tolist() == [-1, 1, -1]  # never ends a run
    with pytest.raises(FileNotFoundError, match="images/5.png: was not there"):
        index.open_image(5)
    pack.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="pack_0000.bin has .* bytes instead of"):
        HandIndex(tmp_path / "b")
    with pytest.raises(ValueError, match="pack_0000.bin: there is no"):  # cut off after it was opened
        [index.open_mask(row) for row in range(5)]
    pack.unlink()
    with pytest.raises(ValueError, match="pack_0000.bin"):
        HandIndex(tmp_path / "b")


def test_an_index_without_any_image_is_not_packed(tmp_path):
    toy_index(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/images")
    done = call("prepare_data.py", "pack", tmp_path / "a", "--out", tmp_path / "b", check=False)
    assert done.returncode == 2 and "nothing to pack" in done.stderr and not (tmp_path / "b").exists()
