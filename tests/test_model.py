"""model.py: weights of others load, features are read where the points are, nothing of the hand is stored."""

import argparse

import pytest
import torch
from torch import nn

import mano
import model
from model import (
    HandMesh,
    MeshHead,
    ResNet50,
    ViT,
    build_encoder,
    farthest_points,
    load_encoder,
    load_mesh,
    sample,
)

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


CONTAINERS = {
    "timm": lambda s: s | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)},
    "mae": lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 64),
                                    "decoder_embed.weight": torch.zeros(32, 64)}},
    "dino": lambda s: {"student": {"module.backbone.pos_embed": torch.zeros(1, 17, 64)},
                       "teacher": {f"backbone.{n}": v for n,
                                   v in s.items()} | {"head.mlp.0.weight": torch.zeros(8, 64)},
                       "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3},
    "ibot": lambda s: {"state_dict": s | {"masked_embed": torch.zeros(1, 64)}},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_public_vit_files_load(kind, tmp_path):
    vit = ViT("test", 64, **TINY).eval()
    torch.save(CONTAINERS[kind](vit.state_dict()), tmp_path / "w.pth")
    if kind == "dino" and not hasattr(torch.serialization, "safe_globals"):
        pytest.skip("needs torch 2.5")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(load_encoder(tmp_path / "w.pth")(images), vit(images))
    larger = load_encoder(tmp_path / "w.pth", image_size=96)
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 37, 64)


PLACES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def as_peclr(name):
    layer, rest = name.split(".", 1)
    return f"encoder.features.{PLACES[layer]}.{rest}"


@pytest.mark.parametrize("rename", [lambda name: name, lambda name: "module." + name, as_peclr])
def test_public_resnet_files_load(rename, tmp_path):
    net = ResNet50().eval()
    weights = {rename(n): v for n, v in net.state_dict().items()} | {"fc.weight": torch.zeros(9, 2048)}
    torch.save({"state_dict": weights}, tmp_path / "r.pth")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_encoder(tmp_path / "r.pth").features(images)[0], net.features(images)[0])


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


@pytest.mark.parametrize("arch, size", [("vit_tiny", 64), ("resnet50", 64)])
def test_head_reads_where_it_projects_and_stores_no_hand(arch, size):
    encoder = build_encoder(arch, size)
    net = HandMesh(encoder, MeshHead(Square(), encoder.dim, encoder.dim, strides=arch == "resnet50",
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
                      "ema": net.state_dict()}, Square())
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
