"""Files of export.py: the same hands as the network's for any batch, refused where they are not."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import call, random_mano

import export
from data import HandIndex, read_image
from mano import Mano, hand_fingerprint, joints_from_vertices, rotmat_from_axis_angle
from model import HandMesh, MeshHead, build_encoder, is_resnet, load_mesh
from saving import FORMATS, load_checkpoint
from synthetic_hand import synthetic_mano
from views import normalise

PAGE = Path(__file__).resolve().parent.parent / "docs" / "export.md"
HAS_ONNX = all(map(importlib.util.find_spec, export.PACKAGES))
NEEDS_ONNX = pytest.mark.skipif(not HAS_ONNX, reason="requirements-export.txt is not installed")


def write_weights(path, arch="vit_micro", size=32, arrays=None):
    """A file as of weights/hand.pt, in half precision, whose network answers every picture differently. That
    of a ResNet has joint maps."""
    arrays = arrays or synthetic_mano()
    torch.manual_seed(0)
    encoder = build_encoder(arch, size)
    maps = {"joint_maps": True, "laterals": encoder.widths[2::-1]} if is_resnet(arch) else {}
    head = MeshHead(Mano(arrays), encoder.dim, encoder.dim, strides=is_resnet(arch), width=32, hidden=64,
                    **maps)
    for regressor in head.regress:
        for last in regressor.heads:
            torch.nn.init.normal_(last.weight, std=0.2)
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in HandMesh(encoder, head).state_dict().items()}
    torch.save({"kind": "mesh", "format": FORMATS["mesh"], "hand": hand_fingerprint(arrays),
                "encoder": {"arch": arch, "config": encoder.config}, "head": head.config, "box_scale": 1.25,
                "ema": weights}, path)
    return path


@torch.no_grad()
def as_predicted(path, images, arrays):
    """What predict.py makes of views."""
    estimate = load_mesh(load_checkpoint(path, "mesh"), Mano(arrays))(normalise(images))[-1]
    return estimate | {"joints": joints_from_vertices(estimate["vertices"], arrays)}


def test_the_plain_hand_is_manos_function():
    """Also with MANO's arrays, whose axes differ from the synthetic hand's."""
    g = torch.Generator().manual_seed(0)
    rotmats = rotmat_from_axis_angle(torch.randn(7, 16, 3, generator=g, dtype=torch.float64))
    betas = torch.randn(7, 10, generator=g, dtype=torch.float64)
    for arrays in (synthetic_mano(), random_mano()):
        hand = Mano(arrays).double()
        vertices, joints = hand(rotmats, betas)
        plain, plain_joints = export.PlainHand(hand)(rotmats, betas)
        assert (plain - vertices).abs().max() < 1e-12
        assert (plain_joints - joints).abs().max() < 1e-12


def test_a_camera_that_is_off_is_a_difference_too():
    vertices, joints = torch.randn(2, 778, 3), torch.randn(2, 21, 3)
    truth = {"vertices": vertices, "joints": joints, "camera": torch.tensor([[8.0, 0.1, 0.0]]).repeat(2, 1)}
    moved = truth | {"camera": truth["camera"] + torch.tensor([0, 0, 0.002])}  # 2 mm down
    assert export.difference(truth, truth) == 0
    assert export.difference(truth, moved) == pytest.approx(2, rel=1e-3)
    moved = truth | {"joints": joints + torch.tensor([0, 0, 0.003])}
    assert export.difference(truth, moved) == pytest.approx(3, rel=1e-3)


@pytest.mark.commands
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=NEEDS_ONNX)])
@pytest.mark.parametrize("arch, size, arrays", [("vit_micro", 32, synthetic_mano()),
                                                ("resnet_micro", 64, random_mano())])
def test_the_file_gives_the_networks_hands(tmp_path, arch, size, arrays, suffix):
    checkpoint = write_weights(tmp_path / "hand.pt", arch, size, arrays)
    np.savez(tmp_path / "mano.npz", **arrays)
    out = tmp_path / "new" / f"hand{suffix}"
    done = call("export.py", "--checkpoint", checkpoint, "--out", out, "--mano", tmp_path / "mano.npz")
    assert re.search(r"mm from the network on 64 random pictures; [\d.]+ ms a hand", done.stdout)
    assert list(out.parent.iterdir()) == [out]
    infer = export.FILES[suffix][1](out)
    with torch.no_grad():
        for count in (1, 3, 70):
            images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))
            truth = as_predicted(checkpoint, images, arrays)
            found = infer(images)
            assert list(found) == ["vertices", "joints", "rotmats", "betas", "camera"]
            for name, value in found.items():
                assert value.shape == truth[name].shape
                assert torch.allclose(value, truth[name], rtol=1e-4, atol=1e-5), name
        assert truth["vertices"].std(0).max() > 1e-3  # metres: pictures do not all give one hand
    if suffix == ".pt2":
        extra = {"hand.json": ""}
        torch.export.load(out, extra_files=extra)
        facts = json.loads(extra["hand.json"])
    else:
        import onnxruntime

        meta = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
        facts = {name: json.loads(text) for name, text in meta.items()}
    assert (facts["image_size"], facts["box_scale"]) == (size, 1.25) and "right" in facts["sides"]
    assert np.array_equal(facts["faces"], arrays["f"])


@pytest.mark.commands
@pytest.mark.commands
def test_weights_to_give_away_hold_the_averages_alone(hands, tmp_path):
    """A trained run becomes a small file, from which predict.py and the other exports work."""
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", tmp_path / "run",
         "--arch", "resnet_micro", "--image-size", 64, "--head-width", 32, "--head-hidden", 32,
         "--batch-size", 8, "--steps", 2, "--workers", 0)
    call("export.py", "--checkpoint", tmp_path / "run" / "last.pt", "--out", tmp_path / "new" / "hand.pt")
    run, file = (load_checkpoint(path, "mesh")
                 for path in (tmp_path / "run" / "last.pt", tmp_path / "new" / "hand.pt"))
    assert set(file) == {"kind", "format", "ema", *export.KEPT}
    for name, value in run["ema"].items():
        is_half = value.is_floating_point() and value.ndim > 1
        assert file["ema"][name].dtype == (torch.float16 if is_half else value.dtype)
        assert torch.allclose(file["ema"][name].to(value.dtype), value, rtol=1e-3, atol=1e-4), name
    images = export.random_pictures(8, 64)
    hands_before, hands_after = (as_predicted(path, images, synthetic_mano())
                                 for path in (tmp_path / "run" / "last.pt", tmp_path / "new" / "hand.pt"))
    assert export.difference(hands_before, hands_after) < 1
    again = call("export.py", "--checkpoint", tmp_path / "run" / "last.pt", "--out",
                 tmp_path / "new" / "hand.pt", check=False)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = write_weights(tmp_path / "hand.pt")
    there = tmp_path / "there.pt2"
    there.write_bytes(b"mine")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    write_weights(tmp_path / "mano.pt", arrays=random_mano())
    monkeypatch.setattr(export, "PACKAGES", ("no_such_package",))
    before = sorted(tmp_path.iterdir())
    for weights, name, message in ((checkpoint, "hand.bin", ".onnx, .pt2 or .pt"),
                                   (checkpoint, "there.pt2", "already"),
                                   (checkpoint, "hand.onnx", "pip install -r requirements-export.txt"),
                                   (tmp_path / "broken.pt", "hand.pt2", "broken.pt"),
                                   (tmp_path / "mano.pt", "hand.pt2", "pass its file with --mano"),
                                   (tmp_path / "none.pt", "hand.pt2", "no such checkpoint")):
        done = call("export.py", "--checkpoint", weights, "--out", tmp_path / name, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1

    def read_another(path):
        infer = export.read_pt2(path)
        return lambda image: {name: 1.01 * value for name, value in infer(image).items()}

    monkeypatch.setitem(export.FILES, ".pt2", (export.write_pt2, read_another))
    done = call("export.py", "--checkpoint", checkpoint, "--out", tmp_path / "hand.pt2", check=False)
    assert done.returncode == 2 and "differ from the network by" in done.stderr
    assert sorted(tmp_path.iterdir()) == before and there.read_bytes() == b"mine"


@pytest.mark.commands
@NEEDS_ONNX
def test_the_pages_example_gives_the_hands_of_predict(hands, tmp_path, monkeypatch):
    """That of ONNX, which tests/test_pages.py leaves out; on a crop that leaves the picture."""
    monkeypatch.chdir(tmp_path)
    checkpoint = write_weights(tmp_path / "hand.pt")
    call("export.py", "--checkpoint", checkpoint, "--out", "hand.onnx")
    index = HandIndex(hands / "train")
    read_image(index.open_image(0))[0].resize((300, 300)).save("photo.jpg")
    Path("boxes.csv").write_text("image,x0,y0,x1,y1\nphoto.jpg,110,60,290,270\n")
    call("predict.py", "photo.jpg", "--checkpoint", checkpoint, "--boxes", "boxes.csv", "--out", "out")
    (snippet,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    names = {}
    exec(compile(snippet.replace("212, 80, 391, 340", "110, 60, 290, 270"), "docs/export.md", "exec"), names)
    with np.load("out/photo.npz") as truth:
        x0, y0, x1, _ = truth["crop"]
        points = truth["camera"][0] * (truth["vertices"][:, :2] + truth["camera"][1:])
        assert np.abs(names["vertices"][0] - truth["vertices"]).max() < 2e-3  # metres; it is cut at once
        off = names["points"] - (points + 1) / 2 * (x1 - x0) - [x0, y0]  # pixels of the photograph
        assert np.abs(off).max() < (x1 - x0) / 32 / 4  # a quarter of a pixel that the network sees
