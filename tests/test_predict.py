"""predict.py on people's photographs and videos: crops and sides, focal lengths and places in the room,
detectors, tracks and their smoothing, names and what may be overwritten."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import call
from PIL import Image

import camera
import predict
from data import HandIndex, image_size, list_images
from make_synthetic import random_labels
from mano import Mano
from synthetic_hand import synthetic_mano

FLIP = np.float32([-1, 1, 1])


@pytest.fixture(scope="module")
def checkpoint(hands, tmp_path_factory):
    """A mesh network after one step: it predicts anything, as fast as any."""
    run = tmp_path_factory.mktemp("run") / "mesh"
    tiny = ["--arch", "vit_micro", "--image-size", 32, "--head-width", 32, "--batch-size", 4, "--workers", 0]
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", run, *tiny,
         "--steps", 1)
    return run / "last.pt"


def picture(path, size=(300, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path, **options)
    return path


def refused(words, *command):
    done = call(*command, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr


# ------------------------------------------------------------------------------------------ crops, both sides
def volume(path):
    """Of the mesh in an .obj file; negative where its faces show their backs."""
    lines = [line.split() for line in path.read_text().splitlines()]
    points = np.array([line[1:] for line in lines if line[0] == "v"], float)
    faces = np.array([line[1:] for line in lines if line[0] == "f"], int) - 1
    a, b, c = points[faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_photographs_with_and_without_boxes_and_of_both_sides(hands, checkpoint, tmp_path):
    index = HandIndex(hands / "val")
    photo = tmp_path / "photo.png"
    with Image.open(index.image_path(0)) as image:
        image.resize((300, 200)).save(photo)
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirror.png")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1,side\nphoto.png,50,40,150,160,right\n"
                                        "photo.png,80,40,180,160,right\nmirror.png,150,40,250,160,left\n")
    command = ["predict.py", "--checkpoint", checkpoint, "--out"]
    call(*command, tmp_path / "whole", photo)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["photo.npz", "photo.obj", "photo.png"]
    hand = np.load(tmp_path / "whole/photo.npz")
    assert hand["vertices"].shape == (778, 3) and hand["rotmats"].shape == (16, 3, 3)
    assert hand["side"] == "right"
    assert image_size(tmp_path / "whole/photo.png") == (300, 200)
    call(*command, tmp_path / "boxes", photo, tmp_path / "mirror.png", "--boxes", tmp_path / "boxes.csv")
    right, left = (np.load(tmp_path / f"boxes/{name}.npz") for name in ("photo", "mirror"))
    assert (tmp_path / "boxes/photo_2.obj").exists() and left["side"] == "left"
    first, second, together = ((pixels(tmp_path / f"boxes/{name}.png") != pixels(photo)).any(2)
                               for name in ("photo", "photo_2", "photo_all"))
    assert (together == first | second).all()
    assert not (tmp_path / "boxes/mirror_all.png").exists()
    assert len(list_images(tmp_path / "boxes")) == 0
    for name in ("vertices", "joints", "camera", "translation"):
        flip = [1, -1, 1] if name == "camera" else FLIP
        np.testing.assert_allclose(left[name], right[name] * flip, rtol=2e-4, atol=2e-5)
    volumes = [volume(tmp_path / f"boxes/{name}.obj") for name in ("photo", "mirror")]
    assert volumes[0] > 0 and volumes[1] == pytest.approx(volumes[0], rel=1e-2)
    covered, mirrored = ((pixels(tmp_path / f"boxes/{name}.png") != pixels(tmp_path / f"{name}.png")).any(2)
                         for name in ("photo", "mirror"))  # by the mesh
    assert covered.mean() > 0.01 and (covered != mirrored[:, ::-1]).mean() < 0.03 * covered.mean()


def test_a_left_hand_lies_in_the_photograph_where_its_mirror_image_lies():
    """One estimate, as a right hand and as a left hand of the mirrored photograph: every pixel is mirrored.

    By the crop's camera and by the full one."""
    hand = Mano(synthetic_mano())
    vertices, joints = hand(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))
    estimate = {"vertices": vertices[0].numpy(), "joints": joints[0].numpy(), "rotmats": np.zeros((16, 3, 3)),
                "betas": np.zeros(10), "camera": np.float32([8, 0.03, -0.01])}
    width, height, focal = 300, 200, 400.0
    K = camera.pinhole(focal, (width, height))
    placed = []
    for side, x in (("right", 110), ("left", width - 110)):
        look = SimpleNamespace(side=side, crop=np.array([x - 60, 30, x + 60, 150]))
        placed.append(predict.place_hand(look, predict._as_seen(estimate, side), K, "focal"))
    right, left = placed

    def by_crop(placed):
        x0, y0, x1, _ = placed["crop"]
        scale, tx, ty = placed["camera"]
        return (scale * (placed["vertices"][:, :2] + [tx, ty]) + 1) / 2 * (x1 - x0) + [x0, y0]

    def by_full_camera(placed):
        x, y, z = (placed["vertices"] + placed["translation"]).T
        return np.stack([focal * x / z + width / 2, focal * y / z + height / 2], 1)  # pixel edges

    for project in (by_crop, by_full_camera):
        a, b = project(right), project(left)
        np.testing.assert_allclose(b, [width, 0] + a * [-1, 1], atol=1e-2)
    np.testing.assert_allclose(by_full_camera(right), by_crop(right), atol=8)  # perspective bends it a little


# ------------------------------------------------------------------------------------------ without any flags
def test_released_weights_are_the_default(checkpoint, hands, tmp_path, monkeypatch):
    """Half precision and no state of a run, found beside the script from any folder. Missing, they are named.
    """
    photo = HandIndex(hands / "val").image_path(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "WEIGHTS", tmp_path / "weights/hand.pt")
    refused("weights/hand.pt is missing: give --checkpoint", "predict.py", photo)
    state = torch.load(checkpoint, weights_only=True)
    kept = {name: state[name] for name in ("kind", "format", "hand", "encoder", "head", "box_scale")}
    halves = {name: value.half() for name, value in state["ema"].items()}
    predict.WEIGHTS.parent.mkdir()
    torch.save(kept | {"ema": halves}, predict.WEIGHTS)
    call("predict.py", photo)
    call("predict.py", photo, "--checkpoint", checkpoint, "--out", "full")
    half, full = (np.load(f"{name}/{photo.stem}.npz") for name in ("predictions", "full"))
    off = np.abs(half["joints"] - full["joints"]).max()
    assert 0 < off < 5e-4  # metres


# ---------------------------------------------------------------------------------------- where in the room
@functools.cache
def seen_hands(count=60):
    """Drawn hands with known cameras: the true labels, and for each the Look and the estimate of a network
    without error: the true mesh about the wrist, and the weak perspective that fits its joints best."""
    arrays = synthetic_mano()
    hand = Mano(arrays).double()
    rng = np.random.default_rng(0)
    hands = []
    for _ in range(count):
        labels = random_labels(rng, hand, arrays, 1, 320, 35.0, 0.25)
        labels = {name: value[0] for name, value in labels.items()}
        joints = labels["joints"] - labels["joints"][0]
        x, y = labels["joints2d"].T
        crop = np.array([x.min() - 20, y.min() - 20, x.min() - 20, y.min() - 20])
        crop[2:] += 40 + max(np.ptp(x), np.ptp(y))
        half = (crop[2] - crop[0]) / 2
        in_view = (labels["joints2d"] + 0.5 - (crop[:2] + crop[2:]) / 2) / half  # (21,2) in [-1,1]
        centred = joints[:, :2] - joints[:, :2].mean(0)
        scale = (centred * in_view).sum() / (centred ** 2).sum()
        shift = in_view.mean(0) / scale - joints[:, :2].mean(0)
        estimate = {"joints": joints, "vertices": labels["vertices"] - labels["joints"][0],
                    "rotmats": np.zeros((16, 3, 3)), "betas": labels["betas"],
                    "camera": np.array([scale, *shift])}
        hands.append((labels, SimpleNamespace(side="right", crop=crop), estimate))
    return hands


def wrist_errors(focal_of, factor=1.0, grown=1.0):
    """(N,) metres between the true wrists and those of place_hand. grown: of the network's hands."""
    errors = []
    for labels, look, estimate in seen_hands():
        K = focal_of(labels["K"])
        estimate = estimate | {name: estimate[name] * grown for name in ("joints", "vertices")}
        estimate["camera"] = estimate["camera"] * [1 / grown, grown, grown]
        hand = predict.place_hand(look, estimate, K, "K", factor)
        errors.append(np.linalg.norm(hand["translation"] - labels["joints"][0]))
    return np.array(errors)


def test_a_perfect_mesh_stands_where_it_stood():
    """With the true camera to a millimetre. A focal length that is a tenth too long puts it a tenth too far,
    a network's hand that is a tenth too large as well, and a true length brings it back."""
    true = np.median(wrist_errors(lambda K: K))
    long = np.median(wrist_errors(lambda K: K * [[1.1, 1, 1], [1, 1.1, 1], [1, 1, 1]]))
    large = np.median(wrist_errors(lambda K: K, grown=1.1))
    held = np.median(wrist_errors(lambda K: K, grown=1.1, factor=1 / 1.1))
    guess = np.median(wrist_errors(lambda K: camera.pinhole(320, (320, 320))))
    print(f"wrist, median error in mm: K {1e3 * true:.2f}; focal + 10 % {1e3 * long:.1f}; hand + 10 % "
          f"{1e3 * large:.1f}, its length given {1e3 * held:.2f}; guess {1e3 * guess:.0f}")
    assert true < 1e-3 and held < 1e-3
    assert 0.04 < long < 0.09 and 0.04 < large < 0.09


def test_points_come_back_through_any_camera():
    rng = np.random.default_rng(0)
    points = 0.1 * rng.standard_normal((21, 3))
    K = np.array([[600, 0, 100], [0, 480, 300], [0, 0, 1.0]])
    seen = (points + [0.2, -0.1, 0.7]) @ K.T
    pixels = seen[:, :2] / seen[:, 2:] + 0.5
    np.testing.assert_allclose(camera.place_points(points, pixels, K), [0.2, -0.1, 0.7], atol=1e-12)


def test_the_focal_length_in_a_photographs_tags(tmp_path, checkpoint):
    """26 mm on a phone: by the diagonals, whatever the orientation and size of the file. --focal and --K go
    before, and the .npz says which it was."""
    exif = Image.Exif()
    exif.get_ifd(camera.EXIF)[camera.FOCAL_35] = 26
    exif[0x0112] = 6  # turned
    photo = picture(tmp_path / "photo.jpg", size=(400, 300), exif=exif)
    wanted = 26 / math.hypot(36, 24) * 500
    assert camera.focal_in_exif(photo) == pytest.approx(wanted)
    assert camera.focal_in_exif(picture(tmp_path / "bare.png")) is None
    (tmp_path / "text.jpg").write_text("no image")
    assert camera.focal_in_exif(tmp_path / "text.jpg") is None
    flags = {"exif": (), "focal": ("--focal", 450), "K": ("--K", 450, 440, 150, 210)}
    for source, given in flags.items():
        call("predict.py", photo, "--checkpoint", checkpoint, "--out", tmp_path / source, *given)
        hand = np.load(tmp_path / source / "photo.npz")
        assert hand["focal_source"] == source
        focal = wanted if source == "exif" else math.sqrt(450 * (440 if source == "K" else 450))
        assert hand["focal"] == pytest.approx(focal)
        assert hand["K"][0, 2] == (150 if source == "K" else 149.5)
    refused("--K 450 440 350 210 looks beside", "predict.py", photo, "--checkpoint", checkpoint, "--out",
            tmp_path / "beside", "--K", 450, 440, 350, 210)
    assert not (tmp_path / "beside").exists()


def test_a_hand_has_the_length_that_was_given(tmp_path, checkpoint):
    """Mesh and depth grow together, and the picture stays."""
    photo = picture(tmp_path / "photo.png")
    command = ["predict.py", photo, "--checkpoint", checkpoint, "--focal", 400, "--out"]
    call(*command, tmp_path / "free")
    call(*command, tmp_path / "held", "--hand-length", 190)
    free, held = (np.load(tmp_path / name / "photo.npz") for name in ("free", "held"))
    factor = float(held["hand_scale"])
    hand = Mano(synthetic_mano())
    flat = hand(torch.eye(3).expand(1, 16, 3, 3), torch.from_numpy(free["betas"])[None])[1][0]
    assert factor * float((flat[12] - flat[0]).norm()) == pytest.approx(0.19, rel=1e-5)
    for name in ("vertices", "joints", "translation"):
        np.testing.assert_allclose(held[name], free[name] * factor, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(camera.crop_to_picture(each["joints"], each["camera"], each["crop"])
                            for each in (free, held)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
