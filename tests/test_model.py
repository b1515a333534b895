"""model.py: weights of others load, features are read where the points are, nothing of the hand is stored."""

import argparse
import json
import os
import sys
import types
import zipfile
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures import call, random_mano
from torch import nn

import mano
import model
import views
from mano import Mano, rotmat_from_axis_angle
from model import (
    HandMesh,
    MeshHead,
    ResNet,
    ResNet50,
    ViT,
    build_encoder,
    conjugate_gradients,
    farthest_points,
    joint_map_loss,
    load_encoder,
    load_mesh,
    read_joint_maps,
    read_peaks,
    sample,
)
from synthetic_hand import synthetic_mano

TINY = {"dim": 64, "depth": 2, "heads": 1}


class Square(nn.Module):
    """Stands in for the hand: a fixed cloud, turned by the global rotation, stretched by the first beta."""

    def __init__(self):
        super().__init__()
        self.register_buffer("template", torch.randn(778, 3, generator=torch.Generator().manual_seed(0))
                             * 0.05, persistent=False)

    def forward(self, rotmats, betas):
        vertices = (self.template * (1 + 0.1 * betas[:, :1, None])) @ rotmats[:, 0].transpose(1, 2)
        return vertices, vertices[:, :21]


def test_vit_equals_pytorchs_own_encoder():
    ours = ViT("test", 64, **TINY)
    theirs = nn.TransformerEncoderLayer(64, 1, 256, dropout=0, activation="gelu", layer_norm_eps=1e-6,
                                        batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
             "linear2.": "mlp.fc2.",
             "norm1.": "norm1.", "norm2.": "norm2."}
    images = torch.randn(3, 3, 64, 64)
    x = torch.cat([ours.cls_token.expand(3, -1, -1), ours.patch_embed(images)], 1) + ours.pos_embed
    for block in ours.blocks:
        weights = block.state_dict()
        renamed = {name: next(mine + name.removeprefix(other) for other,
                              mine in names.items() if name.startswith(other))
                   for name in theirs.state_dict()}
        theirs.load_state_dict({name: weights[mine] for name, mine in renamed.items()})
        x = theirs(x)
    torch.testing.assert_close(ours(images), ours.norm(x), atol=1e-5, rtol=1e-5)


def test_attention_in_bf16_is_that_in_fp32():
    """On a CPU the products are written out: values and gradients within bf16's eight bits."""
    q, k, v, weights = torch.randn(4, 2, 3, 17, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        inputs = [part.to(kind).requires_grad_() for part in (q, k, v)]
        values = model.attend(*inputs)
        assert values.dtype == kind
        gradients = torch.autograd.grad((values * weights.to(kind)).sum(), inputs)
        found[kind] = torch.stack([values, *gradients]).float()
    error = (found[torch.float32] - found[torch.bfloat16]).flatten(1).norm(dim=1)
    assert (error < 0.01 * found[torch.float32].flatten(1).norm(dim=1)).all()


def test_masked_patches_do_not_show():
    vit, mask = ViT("test", 64, **TINY), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    image = torch.randn(1, 3, 64, 64)
    other = image.clone()
    other[:, :, 16:32, 16:32] = 7                                  # patch 5 = row 1, column 1
    token = torch.randn(1, 64)
    torch.testing.assert_close(vit(image, mask, token), vit(other, mask, token))
    assert not torch.allclose(vit(image), vit(other))


def test_stochastic_depth_is_unbiased_and_off_in_eval():
    block = model.Block(64, 1, drop_path=0.25)
    branch = torch.ones(40000, 1, 1)
    torch.manual_seed(0)
    kept = block.stochastic_depth(branch)
    assert abs(kept.mean() - 1) < 0.02
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.75]))
    assert torch.equal(block.eval().stochastic_depth(branch), branch)


def test_resnet50_has_torchvisions_names_and_size():
    state = ResNet50().state_dict()
    assert len(state) == 318 and sum(v.numel() for n, v in state.items() if "running"
                                     not in n and "num_batches" not in n) == 23_508_032
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight",
            "layer4.2.conv3.weight"} <= set(state)


def randomised(net, seed=0):
    """The network with every weight drawn anew, so that none is zero or one, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(mean + noise * 0.3 / tensor[0].numel() ** 0.5)
    return net.eval()


CONTAINERS = {
    "timm": lambda s: s | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)},
    "mae": lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 64),
                                    "decoder_embed.weight": torch.zeros(32, 64)}},
    "dino": lambda s: {"student": {"module.backbone.pos_embed": torch.zeros(1, 17, 64)},
                       "teacher": {f"backbone.{n}": v for n,
                                   v in s.items()} | {"head.mlp.0.weight": torch.zeros(8, 64)},
                       "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3},
    "ibot": lambda s: {"state_dict": s | {"masked_embed": torch.zeros(1, 64)}},
    "dinov2, training": lambda s: {"model": {f"student.backbone.{n}": v + 1 for n, v in s.items()}
                                   | {f"teacher.backbone.{n}": v for n, v in s.items()}},
    "compiled": lambda s: {"model": {f"_orig_mod.module._orig_mod.{n}".replace("attn.", "attn._orig_mod."): v
                                     for n, v in s.items()}},
    "lightning": lambda s: {"state_dict": {f"model.backbone.{n}": v for n, v in s.items()}, "epoch": 3,
                            "hyper_parameters": {"lr": np.float64(0.1)}, "callbacks": {"last": {}},
                            "pytorch-lightning_version": "2.1", "lr_schedulers": [{"base_lrs": [0.1]}]},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_public_vit_files_load(kind, tmp_path):
    vit = ViT("test", 64, **TINY).eval()
    torch.save(CONTAINERS[kind](vit.state_dict()), tmp_path / "w.pth")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(load_encoder(tmp_path / "w.pth")(images), vit(images))
    larger = load_encoder(tmp_path / "w.pth", image_size=96)
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 37, 64)


# ------------------------------------------------------------------------------ ViTs that are not quite plain
def public_vit(kind, depth=2, dim=384, patch=14, side=4):
    """Random weights under the names of DINOv2, of MAE's fine-tuning, and of DeiT's distillation."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, side ** 2 + 1, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    norms = ["norm" if kind != "mae, fine-tuned" else "fc_norm"]
    for i in range(depth):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        for name, out, given in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim),
                                 ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            shapes |= {f"blocks.{i}.{name}.weight": (out, given), f"blocks.{i}.{name}.bias": (out,)}
        if kind.startswith("dinov2"):
            shapes |= {f"blocks.{i}.ls1.gamma": (dim,), f"blocks.{i}.ls2.gamma": (dim,)}
    shapes |= {f"{name}.{part}": (dim,) for name in norms for part in ("weight", "bias")}
    if kind == "dinov2, registers":
        shapes |= {"register_tokens": (1, 4, dim), "mask_token": (1, dim)}
    if kind == "deit, distilled":
        shapes |= {"dist_token": (1, 1, dim), "pos_embed": (1, side ** 2 + 2, dim), "head_dist.bias": (1000,)}
    if kind == "timm, no_embed_class":
        shapes["pos_embed"] = (1, side ** 2, dim)
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) * (0.3 if len(shape) < 2 else 0.05)
            for name, shape in shapes.items()}


def their_features(state, images, heads):
    """Class token (or what stands for it) and patches, as these projects' own forward passes compute them."""
    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).mT  # (B, N, D)
    count = x.shape[1]
    tokens = [state[name] for name in ("cls_token", "dist_token") if name in state]
    if state["pos_embed"].shape[1] == count:
        x = x + state["pos_embed"]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1)
    if state["pos_embed"].shape[1] > count:
        x = x + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        q, k, v = linear(layer_norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        branch = linear((weights @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + branch * state.get(f"blocks.{i}.ls1.gamma", 1)
        hidden = F.gelu(linear(layer_norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2") * state.get(f"blocks.{i}.ls2.gamma", 1)
    if "fc_norm.weight" in state:
        return layer_norm(x[:, -count:].mean(1), "fc_norm"), x[:, -count:]
    x = layer_norm(x, "norm")
    return x[:, 0], x[:, -count:]


KINDS = ["dinov2", "dinov2, registers", "mae, fine-tuned", "deit, distilled", "timm, no_embed_class"]


@pytest.mark.parametrize("side", [4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_that_is_not_quite_plain_keeps_its_features(kind, side, tmp_path):
    state = public_vit(kind, side=side)
    torch.save(state, tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth")
    images = torch.randn(2, 3, 14 * side, 14 * side)
    summary, feature_map = encoder.features(images)
    expected, patches = their_features(state, images, heads=6)
    torch.testing.assert_close(summary, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(feature_map.flatten(2).mT, patches, atol=1e-5, rtol=1e-5)
    rebuilt = build_encoder(encoder.arch, **encoder.config)  # as from our own encoder.pt
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt.eval()(images), encoder(images))
    mask = torch.zeros(2, side ** 2, dtype=torch.bool)
    assert encoder(images, mask, torch.zeros(1, 384)).shape == (2, 1 + side ** 2, 384)


@pytest.mark.parametrize("unlike, reason", [
    ({"last_norm.weight": (384,)}, "no class token.*ViTPose"),
    ({"patch_embed.proj.0.weight": (8,)}, "convolutions"),
    ({"blocks.0.mlp.w12.weight": (8,)}, "gated MLP"), ({"norm_pre.weight": (384,)}, "CLIP"),
    ({"rope_embed.periods": (16,)}, "rotary positions"), ({"cls_token": None}, "class token"),
    ({"blocks.0.attn.q_norm.weight": (64,)}, "queries"), ({"pos_embed": (1, 193, 384)}, "square of patches"),
    ({"backbone.cls_token": (1, 1, 384)}, "two networks")])
def test_a_vit_unlike_ours_is_refused_with_the_difference(unlike, reason, tmp_path):
    state = public_vit("plain") | {name: torch.zeros(shape or 0) for name, shape in unlike.items()}
    torch.save({name: tensor for name, tensor in state.items() if tensor.numel()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth.*{reason}") as refused:
        load_encoder(tmp_path / "w.pth")
    assert "\n" not in str(refused.value)


def timm_or_skip():
    """timm needs torchvision, which PyPI has for its own builds of torch alone; make bench installs both."""
    try:
        import timm
    except Exception as error:
        pytest.skip(f"timm does not start here: {error}")
    return timm


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, options", [
    ("vit_small_patch14_dinov2", {}), ("vit_small_patch14_reg4_dinov2", {}), ("vit_base_patch14_dinov2", {}),
    ("vit_huge_patch14_224", {}), ("vit_huge_patch14_224", {"global_pool": "avg"}),
    ("vit_base_patch16_224", {"global_pool": "avg"}), ("vit_large_patch16_224", {}),
    ("vit_tiny_patch16_224", {}), ("deit_small_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {}), ("vit_small_patch8_224", {})])
@pytest.mark.parametrize("native", [True, False])
def test_vits_of_timm_keep_their_features(name, options, native, tmp_path):
    timm = timm_or_skip()
    size = None if native else 4 * int(name.split("patch")[1].split("_")[0])
    size_option = {} if native else {"img_size": size}
    theirs = randomised(timm.create_model(name, depth=2, **options, **size_option))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = load_encoder(tmp_path / "w.pth")
    side = ours.config["image_size"]
    assert size in (None, side)
    images = torch.randn(1, 3, side, side)
    tokens = theirs.forward_features(images)
    summary = theirs.forward_head(tokens, pre_logits=True) if options else tokens[:, 0]
    expected = torch.cat([summary[:, None], tokens[:, theirs.num_prefix_tokens:]], dim=1)
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, reason", [
    ("vit_giant_patch14_dinov2", "gated|other shapes|heads"), ("vit_small_patch16_dinov3", "rotary"),
    ("vit_base_patch16_clip_224", "CLIP"), ("vit_base_patch16_siglip_224", "class token"),
    ("beit_base_patch16_224", "positions"), ("swin_tiny_patch4_window7_224", "neither"),
    ("resnet50d", "neither"), ("wide_resnet50_2", "other shapes"), ("resnext50_32x4d", "other shapes"),
    ("convnext_tiny", "neither")])
def test_what_else_timm_has_is_refused_in_a_line(name, reason, tmp_path):
    timm = timm_or_skip()
    small = {} if "res" in name or "swin" in name or "conv" in name else {"depth": 1}
    torch.save(timm.create_model(name, **small).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth.*({reason})") as refused:
        load_encoder(tmp_path / "w.pth")
    assert "\n" not in str(refused.value)


def test_a_small_file_that_asks_for_much_is_refused_before_it_gets_it(tmp_path, monkeypatch):
    """Else a file of kilobytes takes minutes or all memory: nothing large may be built for it."""
    monkeypatch.setattr(model, "build_encoder", lambda *args, **config: pytest.fail("built"))
    state = ViT("test", 32, dim=64, depth=1, heads=1).state_dict()
    own = {"arch": "vit", "config": {"dim": 64, "depth": 10**6, "heads": 1, "patch": 16, "image_size": 32}}
    torch.save(state | {"blocks.1000000.norm1.weight": torch.zeros(64)}, tmp_path / "deep.pth")
    torch.save(own | {"state_dict": state}, tmp_path / "own.pt")
    torch.save(state | {"head.weight": torch.zeros(1).expand(10**5, 10**5)}, tmp_path / "one_number.pth")
    torch.save(state | {"head.weight": torch.zeros(10**6)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, \
            zipfile.ZipFile(tmp_path / "zipped.pth", "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in whole.namelist():
            zipped.writestr(name, whole.read(name))
    for name, reason in (("deep.pth", "1000001 blocks, of which it has 2"), ("own.pt", "of which it has 1"),
                         ("one_number.pth", "larger than its numbers"), ("zipped.pth", "compressed")):
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            load_encoder(tmp_path / name, heads=1 if name == "deep.pth" else None)


# -------------------------------------------------------------------------------- what the weights do not say
def test_the_number_of_heads_is_known_given_or_said(tmp_path, capsys):
    """MoCo v3's small ViT has 12 heads of 32; DeiT's, of the same shapes, 6 of 64."""
    vit = ViT("vit_small", 64, depth=1, heads=12).eval()
    state = vit.state_dict()
    moco = {f"module.base_encoder.{name}": tensor for name, tensor in state.items()}
    moco |= {f"module.momentum_encoder.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"arch": "vit_small", "state_dict": moco}, tmp_path / "moco.pth")
    torch.save(state, tmp_path / "plain.pth")
    images = torch.randn(1, 3, 64, 64)
    for path, heads in (("moco.pth", None), ("plain.pth", 12)):
        assert torch.equal(load_encoder(tmp_path / path, heads=heads)(images), vit(images))
        assert not capsys.readouterr().err
    assert not torch.allclose(load_encoder(tmp_path / "plain.pth")(images), vit(images), atol=1e-3)
    assert "plain.pth: 6 attention heads assumed" in capsys.readouterr().err
    for heads in (7, 0, -6):
        with pytest.raises(ValueError, match="share evenly"):
            load_encoder(tmp_path / "plain.pth", heads=heads)
    odd = ViT("test", 64, dim=96, depth=1, heads=2)
    torch.save(odd.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="width 96.*--heads"):
        load_encoder(tmp_path / "odd.pth")
    assert load_encoder(tmp_path / "odd.pth", heads=2).config["heads"] == 2


def test_other_pixels_are_folded_into_the_patches(tmp_path, capsys):
    """A ViT for mean and deviation .5 sees the same after ImageNet's normalisation, also from encoder.pt."""
    assert (model.MEAN, model.STD) == (views.MEAN, views.STD)
    vit = randomised(ViT("vit_tiny", 64, depth=1))
    pixels = torch.rand(2, 3, 64, 64)
    for name, asked in (("w.pth", "half"), ("vit_tiny_patch16_224.augreg_in21k.pth", None)):
        torch.save(vit.state_dict(), tmp_path / name)
        encoder = load_encoder(tmp_path / name, pixels=asked)
        expected = vit((pixels - 0.5) / 0.5)
        torch.testing.assert_close(encoder(views.normalise(pixels)), expected, atol=1e-5, rtol=1e-5)
        assert ("augreg" in capsys.readouterr().err) == (asked is None)
        own = tmp_path / f"augreg_{asked}" / "encoder.pt"
        own.parent.mkdir()
        torch.save({"arch": encoder.arch, "config": encoder.config, "state_dict": encoder.state_dict()}, own)
        assert torch.equal(load_encoder(own)(pixels), encoder(pixels))  # not twice
    with pytest.raises(ValueError, match="leave the flags"):
        load_encoder(own, pixels="half")


# ---------------------------------------------------------------------------------------------------- ResNets
PLACES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def as_peclr(name):
    layer, rest = name.split(".", 1)
    return f"encoder.features.{PLACES[layer]}.{rest}"


@pytest.mark.parametrize("arch, rename", [
    ("resnet50", lambda name: name), ("resnet50", lambda name: "module." + name), ("resnet50", as_peclr),
    ("resnet152", as_peclr), ("resnet18", lambda name: "module.encoder_q." + name), ("resnet101", str)])
def test_public_resnet_files_load(arch, rename, tmp_path):
    net = ResNet(arch).eval()
    weights = {rename(n): v for n, v in net.state_dict().items()} | {"fc.weight": torch.zeros(9, 2048)}
    torch.save({"state_dict": weights}, tmp_path / "r.pth")
    images = torch.randn(1, 3, 64, 64)
    loaded = load_encoder(tmp_path / "r.pth")
    assert loaded.arch == arch
    torch.testing.assert_close(loaded.features(images)[0], net.features(images)[0])


@pytest.mark.parametrize("arch, parameters, tensors", [
    ("resnet18", 11_176_512, 120), ("resnet101", 42_500_160, 624), ("resnet152", 58_143_808, 930)])
def test_resnets_have_torchvisions_sizes(arch, parameters, tensors):
    net = ResNet(arch).eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, net.dim, 1, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet101", "resnet152"])
def test_resnets_of_timm_keep_their_features(arch, tmp_path):
    theirs = timm_or_skip().create_model(arch).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(load_encoder(tmp_path / "w.pth")(images), theirs.forward_features(images),
                               atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- files and their code
class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def module_with(name, kind, monkeypatch):
    """A class of another package's name, which is not installed here."""
    made = type(kind.__name__, (kind,), {"__module__": name})
    for part in accumulate(name.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[name], kind.__name__, made)
    return made


class EasyDict(dict):
    pass


class AttributeDict(dict):
    pass


@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_things_beside_the_weights_are_left_out(legacy, tmp_path, monkeypatch):
    state = ResNet("resnet18").state_dict()
    easy = module_with("easydict", EasyDict, monkeypatch)
    attributes = module_with("pytorch_lightning.utilities.parsing", AttributeDict, monkeypatch)
    flags = easy(lr=0.1)
    flags.lr = 0.1
    content = {"state_dict": state, "args": argparse.Namespace(out=tmp_path, seeds=[1]), "flags": flags,
               "best": np.float64(0.5), "count": np.int64(3), "table": np.arange(3.0),
               "hyper_parameters": attributes(a=1)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    monkeypatch.undo()
    loaded = load_encoder(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function, argument, name", [
    (os.system, "touch {}", "posix.system"), (eval, "open({!r}, 'w')", ".*eval"),
    (np.loadtxt, "{}", "numpy.*loadtxt"), (nn.Identity, "{}", "torch.nn.modules.linear.Identity")])
def test_a_file_that_names_code_is_refused_and_nothing_runs(legacy, function, argument, name, tmp_path):
    trace = tmp_path / "trace"
    item = Calls(function, argument.format(str(trace)))
    torch.save({"state_dict": ResNet("resnet18").state_dict(), "more": item}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"w.pth.*names {name}, .*not run.*model.state_dict") as refused:
        load_encoder(tmp_path / "w.pth")
    assert not trace.exists() and "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_safetensors_need_no_package(tmp_path):
    """The format written by hand: eight bytes of a length, JSON, the numbers one after the other."""
    vit = randomised(ViT("vit_tiny", 64, depth=1))
    table, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in vit.state_dict().items():
        raw = tensor.numpy().tobytes()
        table[name] = {"dtype": "F32", "shape": list(tensor.shape),
                       "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    text = json.dumps(table).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_encoder(path)(images), vit(images))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: no weight file"):
        load_encoder(path)


def test_a_mesh_run_gives_its_averaged_encoder(tmp_path):
    vit = ViT("vit_tiny", 64, depth=1).eval()
    torch.save({"kind": "mesh", "encoder": {"arch": "vit_tiny", "config": vit.config},
                "ema": {f"encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
                | {"head.norm.weight": torch.zeros(3)}}, tmp_path / "last.pt")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_encoder(tmp_path / "last.pt")(images), vit(images))


def test_own_encoder_is_rebuilt_from_its_file_and_a_part_is_refused(tmp_path):
    vit = ViT("test", 64, **TINY).eval()
    state = {"arch": vit.arch, "config": vit.config, "state_dict": vit.state_dict()}
    torch.save(state, tmp_path / "encoder.pt")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_encoder(tmp_path / "encoder.pt")(images), vit(images))
    del state["state_dict"]["blocks.1.mlp.fc2.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="missing.*blocks.1.mlp.fc2.weight"):
        load_encoder(tmp_path / "part.pt")


def test_a_point_reads_the_feature_that_lies_under_it():
    """A map that holds its own coordinates; a pixel-centre keypoint p = 5 of 8 reads pixel 5 exactly."""
    axis = (2 * torch.arange(8) + 1) / 8 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]               # channels x, y
    points = torch.rand(1, 50, 2) * 1.6 - 0.8
    torch.testing.assert_close(sample(grid, points), points)
    pixels = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(sample(pixels, torch.tensor([[[axis[5], axis[2]]]]))[0, 0], pixels[0, :, 2, 5])


@pytest.mark.parametrize("arch, size", [("vit_tiny", 64), ("resnet18", 64), ("resnet50", 64)])
def test_head_reads_where_it_projects_and_stores_no_hand(arch, size):
    encoder = build_encoder(arch, size)
    net = HandMesh(encoder, MeshHead(Square(), encoder.dim, encoder.dim, strides=arch != "vit_tiny",
                                     width=32)).eval()
    outputs = net(torch.randn(2, 3, size, size))
    assert len(outputs) == 3 and outputs[0]["points"].shape == (2, 441, 2)
    for before, after in zip(outputs, outputs[1:], strict=False):
        expected = mano.weak_perspective(before["vertices"][:, net.head.mesh_points], before["camera"])
        torch.testing.assert_close(after["points"], expected)
        assert not after["points"].requires_grad
    assert outputs[-1]["joints"][:, 0].abs().max() == 0
    assert not [name for name in net.state_dict() if "hand" in name or "template" in name]
    copy = load_mesh({"encoder": {"arch": arch, "config": encoder.config}, "head": net.head.config,
                      "ema": net.state_dict(), "box_scale": 1.3}, Square())
    images = torch.randn(1, 3, size, size)
    torch.testing.assert_close(copy(images)[-1]["vertices"], net(images)[-1]["vertices"])


def test_an_iteration_learns_from_its_own_estimate_alone():
    """The loss of iteration t does not reach the regressors of earlier ones: the state is detached."""
    torch.manual_seed(0)
    head = MeshHead(Square(), 8, width=32, dropout=0)
    first, second, third = head(torch.randn(2, 8, 4, 4))
    for t, output in enumerate((first, second, third)):
        gradients = torch.autograd.grad(output["vertices"].square().sum() + output["camera"].square().sum(),
                                        [regress.fc1.weight for regress in head.regress], retain_graph=True,
                                        allow_unused=True)
        for k, gradient in enumerate(gradients):
            assert (gradient is not None and bool(gradient.any())) == (k == t), (t, k)


def test_head_starts_from_the_mean_it_was_given():
    head = MeshHead(Square(), 8, width=32)
    rotmats = mano.rotmat_from_axis_angle(torch.randn(16, 3))
    head.set_mean(rotmats, 7.0)
    output = head.decode(head.mean_state[None])
    torch.testing.assert_close(output["rotmats"][0], rotmats)
    torch.testing.assert_close(output["camera"][0], torch.tensor([7.0, 0, 0]))


def test_no_hand_sends_the_camera_to_infinity():
    """The scale stays within e^2 of the mean's. A network of before the bound keeps its cameras."""
    state = torch.zeros(3, 109)
    state[:, :96] = MeshHead(Square(), 8, width=32).mean_state[:96]
    state[:, 106] = torch.tensor([0.1, -500.0, 500.0])
    scales = {}
    for bound in (2.0, 0):
        head = MeshHead(Square(), 8, width=32, scale_bound=bound)
        scales[bound] = head.decode(state)["camera"][:, 0] / head.mean_scale
    torch.testing.assert_close(scales[2.0], torch.tensor([0.1, -2, 2]).exp(), rtol=1e-3, atol=0)
    assert scales[0][0] == torch.tensor(0.1).exp() and scales[0][2].isinf()


def test_two_copies_of_the_6d_rotation_agree():
    x = torch.randn(100, 6)
    torch.testing.assert_close(model.rotmat_from_6d(x), mano.rotmat_from_6d(x))


def test_farthest_points_is_deterministic_and_greedy():
    points = torch.randn(60, 3)
    chosen = farthest_points(points, 10)
    assert len(set(chosen.tolist())) == 10 and torch.equal(chosen, farthest_points(points, 10))
    for k in range(1, 10):
        distance = torch.cdist(points.double(), points[chosen[:k]].double()).amin(1)
        assert torch.isclose(distance[chosen[k]], distance.max())


def test_positions_start_as_a_code_of_the_place():
    small, large = model.sine_positions(4, 64).unflatten(0,
                                                         (4,
                                                          4)), model.sine_positions(12, 64).unflatten(0,
                                                                                                      (12,
                                                                                                       12))
    # the same place has the same code in a finer grid
    assert torch.allclose(small, large[1::3, 1::3], atol=1e-5)
    flat = large.flatten(0, 1)
    nearest = torch.cdist(flat, flat).fill_diagonal_(9).argmin(1)
    apart = torch.stack([nearest // 12 - torch.arange(144) // 12,
                         nearest % 12 - torch.arange(144) % 12]).abs().sum(0)
    assert (apart == 1).all()                                          # nothing is more alike than neighbours
    assert torch.equal(build_encoder("vit_micro", 64).pos_embed[0, 1:], model.sine_positions(4, 192))


# --------------------------------------------------------------------------------------------------- commands
SHORT = ["--image-size", 32, "--head-width", 32, "--batch-size", 8, "--workers", 0, "--steps", 1]


def test_joint_maps_can_say_any_place_exactly():
    """At the least of its loss a map's expected place is the joint's, between cells as well as on them."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 21, 2, generator=generator) * 1.6 - 0.8
    places[0, 0] = torch.tensor([1 / 12, -1 / 8])  # the middle of a cell
    logits = torch.zeros(2, 21, 8, 12, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.3)
    for _ in range(300):
        optimizer.zero_grad()
        joint_map_loss(logits, places).sum().backward()
        optimizer.step()
    found, certainty = read_joint_maps(logits.detach())
    assert (found - places).abs().max() < 0.01
    assert certainty.shape == (2, 21) and certainty[0, 0] > 0.95
    flat = joint_map_loss(torch.zeros(1, 21, 8, 12), places[:1])
    torch.testing.assert_close(flat, torch.full((1, 21), 96.0).log())
    edge = joint_map_loss(torch.zeros(1, 1, 8, 12), torch.tensor([[[1.0, -3.0]]]))  # outside: moved in
    assert edge.isfinite().all()


def test_peaks_lie_on_the_likelier_of_two_places():
    cells = torch.zeros(1, 2, 12, 16)
    cells[0, :, 3, 4] = 1.0
    cells[0, 0, 9, 12] = 0.6  # far away
    cells[0, 1, 3, 5] = 1.0  # beside it
    places, share = read_peaks((cells + 1e-9).log())
    expected = torch.tensor([[4.5 / 8 - 1, 3.5 / 6 - 1], [5 / 8 - 1, 3.5 / 6 - 1]])
    torch.testing.assert_close(places[0], expected)
    torch.testing.assert_close(share[0], torch.tensor([1 / 1.6, 1.0]))


def test_conjugate_gradients_solve():
    generator = torch.Generator().manual_seed(0)
    ways = torch.randn(3, 8, 20, generator=generator, dtype=torch.float64)
    matrix = torch.eye(20, dtype=torch.float64) + ways.transpose(1, 2) @ ways
    wanted = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    found = conjugate_gradients(matrix, wanted)  # nine eigenvalues: nine steps
    torch.testing.assert_close(found, torch.linalg.solve(matrix, wanted))
    assert (conjugate_gradients(matrix, torch.zeros_like(wanted)) == 0).all()


def test_a_hand_settles_where_its_joint_maps_have_their_peaks():
    """Hands bent away from what their maps show come most of the way back, in space as well; where estimate
    and maps agree, or maps know nothing, nothing moves. One wrong peak is not believed."""
    generator = torch.Generator().manual_seed(0)
    hand = Mano(synthetic_mano())
    head = MeshHead(hand, 32, width=32, hidden=32, joint_maps=True)
    pose = torch.randn(16, 45, generator=generator) @ hand.pose_spread.T + hand.hands_mean.flatten()
    pose = torch.cat([torch.randn(16, 3, generator=generator), pose], dim=1).unflatten(1, (16, 3))
    rotmats, betas = rotmat_from_axis_angle(pose), torch.zeros(16, 10)
    camera = torch.tensor([[7.0, 0.01, 0.02]]).expand(16, -1)

    def posed(rotmats):
        vertices, joints = hand(rotmats, betas)
        return {"rotmats": rotmats, "betas": betas, "camera": camera, "vertices": vertices - joints[:, :1],
                "joints": joints - joints[:, :1]}

    def seen(estimate):
        scale, shift = estimate["camera"][:, None, :1], estimate["camera"][:, None, 1:]
        return scale * (estimate["joints"][..., :2] + shift)

    def maps_of(places):
        cells = (torch.arange(48) + 0.5) / 24 - 1
        x, y = (torch.exp(-(40 * (cells - places[..., axis:axis + 1])) ** 2) for axis in (0, 1))
        return (y[..., :, None] * x[..., None, :] + 1e-12).log()  # (B, 21, 48, 48)

    truth = posed(rotmats)
    bent = posed(hand.turn(rotmats, 0.15 * torch.randn(16, 16, 3, generator=generator)))
    settled = head.settle(bent | {"joint_maps": maps_of(seen(truth))})
    for part, most in ((seen, 0.3), (lambda estimate: estimate["joints"], 0.8)):
        before, after = ((part(one) - part(truth)).norm(dim=2).mean() for one in (bent, settled))
        assert after < most * before
    torch.testing.assert_close(settled["rotmats"] @ settled["rotmats"].transpose(2, 3),
                               torch.eye(3).expand(16, 16, 3, 3), atol=1e-4, rtol=0)
    agreed = head.settle(truth | {"joint_maps": maps_of(seen(truth))})
    assert (seen(agreed) - seen(truth)).norm(dim=2).mean() < 0.005
    ignorant = head.settle(bent | {"joint_maps": torch.zeros(16, 21, 48, 48)})
    assert (seen(ignorant) - seen(bent)).norm(dim=2).mean() < 0.2 * (seen(bent)).norm(dim=2).mean()
    wrong = seen(truth)
    wrong[:, 8] = 0.9
    misled = head.settle(truth | {"joint_maps": maps_of(wrong)})
    others = [k for k in range(21) if not 5 <= k <= 8]
    assert (seen(misled) - seen(truth))[:, others].norm(dim=2).mean() < 0.05
    # What a detector saw counts beside the maps, of the hands that it saw.
    certainty = torch.ones(16, 21, 1)
    certainty[8:] = 0
    places = seen(truth)
    places[8:] = torch.nan  # not seen
    told = head.settle(bent, torch.cat([places, certainty], dim=2))
    missed = (seen(told) - seen(truth)).norm(dim=2).mean(1) / (seen(bent) - seen(truth)).norm(dim=2).mean(1)
    assert (missed[:8] < 0.3).all()
    torch.testing.assert_close(missed[8:], torch.ones(8))
    # Also where it is far from the estimate. A hand without points is as if it were alone.
    far = posed(hand.turn(rotmats, 0.6 * torch.randn(16, 16, 3, generator=generator)))
    maps = {"joint_maps": maps_of(seen(far) + 0.1)}
    maps["joint_maps"][:8] = 0  # these know nothing
    told = head.settle(far | maps, torch.cat([places, certainty], dim=2))
    missed = (seen(told) - seen(truth)).norm(dim=2).mean(1) / (seen(far) - seen(truth)).norm(dim=2).mean(1)
    assert missed[:8].median() < 0.17
    alone = head.settle({name: value[8:] for name, value in (far | maps).items()})
    torch.testing.assert_close(seen(told)[8:], seen(alone))


def test_a_head_with_joint_maps_reads_a_resnets_finer_maps():
    """Each finer map reaches the estimate, and what the maps say of joints does, too."""
    encoder = build_encoder("resnet_micro", 64)
    head = MeshHead(Square(), encoder.dim, encoder.dim, strides=True, width=32, hidden=32, dropout=0,
                    joint_maps=True, laterals=encoder.widths[2::-1])
    net = HandMesh(encoder, head)
    for regressor in head.regress:
        for last in regressor.heads:
            nn.init.normal_(last.weight, std=0.1)
    images = torch.rand(2, 3, 64, 64)
    estimates = net(images)
    shapes = [tuple(each["joint_maps"].shape) for each in estimates]
    assert shapes == [(2, 21, side, side) for side in (4, 8, 16)]
    estimates[-1]["betas"].square().sum().backward()
    for name in ("laterals.0", "laterals.2", "reduce.2.fc1"):
        assert head.get_submodule(name).weight.grad.abs().max() > 0, name
    assert head.joint_maps[0].weight.grad is None  # they learn from a loss of their own
    before = net(images)[-1]["betas"]
    with torch.no_grad():
        head.joint_maps[2].weight.normal_()
    assert (net(images)[-1]["betas"] - before).abs().max() > 1e-5


def test_a_whole_mesh_run_is_tuned_with_its_head(hands, tmp_path):
    """At a rate of zero its weights stay what they were. From encoder.pt the head is drawn anew, and the
    encoder learns more slowly than it."""
    data = ["finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", *SHORT]
    call(*data, "--arch", "resnet18", "--iterations", 2, "--out", tmp_path / "first", "--ema", 0)
    run = tmp_path / "first/last.pt"
    for name, init, rates in (("next", run, {1.0}), ("fresh", tmp_path / "first/encoder.pt", {0.1, 1.0})):
        again = [*data, "--init", init, "--iterations", 2, "--out", tmp_path / name, "--lr", 0, "--seed", 1,
                 "--box-scale", 1.5]
        done = call(*again)
        assert ("trained with --image-size" in done.stderr) == (name == "next")
        call(*again, "--steps", 4, "--resume")
        groups = torch.load(tmp_path / name / "last.pt", weights_only=True)["optimizer"]["param_groups"]
        assert {group["lr_scale"] for group in groups} == rates
    first, after, fresh = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                           for name in ("first", "next", "fresh"))
    for name in ("encoder.layer1.0.conv1.weight", "head.regress.1.fc1.weight", "head.mean_state"):
        torch.testing.assert_close(after[name], first[name], atol=1e-4, rtol=0)
    assert (fresh["head.regress.1.fc1.weight"] - first["head.regress.1.fc1.weight"]).abs().max() > 1e-2
    refused = call(*data, "--init", run, "--iterations", 3, "--out", tmp_path / "other", check=False)
    assert refused.returncode == 2 and "iterations 2" in refused.stderr and not (tmp_path / "other").exists()
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--init", run, "--steps", 1,
         "--batch-size", 8, "--workers", 0, "--out", tmp_path / "as_it_was")
    run.rename(tmp_path / "elsewhere.pt")  # to go on, it is not needed any more
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--init", run, "--steps", 2,
         "--batch-size", 8, "--workers", 0, "--out", tmp_path / "as_it_was", "--resume")
    (tmp_path / "elsewhere.pt").rename(run)
    config = json.loads((tmp_path / "as_it_was/config.json").read_text())
    assert (config["image_size"], config["head_width"], config["iterations"]) == (32, 32, 2)
    np.savez(tmp_path / "hand.npz", **random_mano())
    refused = call(*data, "--init", run, "--iterations", 2, "--mano", tmp_path / "hand.npz",
                   "--out", tmp_path / "other", check=False)
    assert refused.returncode == 2 and "another hand model" in refused.stderr
    refused = call("pretrain_mim.py", "--data", hands / "train", "--init", tmp_path / "first/encoder.pt",
                   "--image-size", 32, "--out", tmp_path / "other", check=False)
    assert refused.returncode == 2 and "holds resnet18: masks need a ViT" in refused.stderr
