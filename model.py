"""Networks: the plain ViT, ResNets, the pre-training heads, and the PyMAF head that regresses MANO.

Parameter names are timm's for the ViT and torchvision's for a ResNet: public weights load, and ours load
elsewhere. Both encoders have features(images) -> summary (B,D), map (B,D,h,w): class token and patch grid, or
pooled and last map. The hand model comes as a callable, so nothing of MANO is stored with a network.

Example::

    import torch
    from model import MeshHead, ViT

    encoder = ViT("vit_micro", image_size=64)
    summary, feature_map = encoder.features(torch.rand(2, 3, 64, 64))  # (2, 192), (2, 192, 4, 4)

    def hand(rotmats, betas):                                          # in place of mano.Mano
        return torch.rand(len(betas), 778, 3), torch.rand(len(betas), 21, 3)

    hand.template = torch.rand(778, 3)
    estimates = MeshHead(hand, 192, 192, iterations=2)(feature_map, summary)
    assert estimates[-1]["vertices"].shape == (2, 778, 3)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import json
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Patches of 16 x 16 pixels. Sizes of DeiT (Touvron et al. 2021); vit_micro and resnet_micro are ours, for
# minutes on a CPU.
ARCHS = {
    "vit_micro": {"dim": 192, "depth": 4, "heads": 3},
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "resnet_micro": {"blocks": (2, 2, 2, 2), "expansion": 1, "width": 32},
    "resnet18": {"blocks": (2, 2, 2, 2), "expansion": 1, "width": 64},
    "resnet50": {"blocks": (3, 4, 6, 3), "expansion": 4, "width": 64},
    "resnet101": {"blocks": (3, 4, 23, 3), "expansion": 4, "width": 64},
    "resnet152": {"blocks": (3, 8, 36, 3), "expansion": 4, "width": 64},
}
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as in views.py; a test holds them equal
STD = (0.229, 0.224, 0.225)
# Standard deviations of what MeshHead.settle finds, about the network's estimate: degrees of freedom as the
# hand model's natural poses have them times `fingers`, radians of the wrist, log of the camera's scale, its
# shift in the view; and of a joint map's peak, as a share of the hand's size. Where a detector has seen the
# joints, the estimate is believed less: fingers, wrist and scale deviate `seen` times as much. Ours.
SETTLE = {"fingers": 0.4, "wrist": 0.2, "log_scale": 0.03, "shift": 0.3, "place": 0.03, "seen": 2.5}
FORMAT = 1  # of encoder.pt; a file without a number was written before there were any and counts as 1


# -------------------------------------------------------------------------------------------------------- ViT
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, 1+N, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, 1+N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, 1+N, D/heads) each
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def attend(q, k, v):
    """Attention of queries to keys, softmax(q k^T / sqrt(D)) v; all (B,heads,N,D)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # The fused operator's backward takes 2 to 7 times as long there (torch 2.13).
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def stochastic_depth(self, branch):
        """Drops the branch for some images of the batch and scales the others up (Huang et al. 2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, N, D)


class ViT(nn.Module):
    """Plain pre-norm ViT with a class token (Dosovitskiy et al. 2021), timm's names.

    Square images of any multiple of `patch`. forward(images (B,3,S,S), mask (B,N) bool or None, mask_token
    (1,D)) -> tokens (B,1+N,D) after the final LayerNorm, class token first. Where mask is True, mask_token
    replaces the patch's embedding; the pre-training owns it.

    registers: tokens without a place that all others attend to and no output holds (Darcet et al. 2024).
    pooled: the norm is that of the patches' mean, which stands where the class token does; the patches have
    none (timm's fc_norm: MAE, fine-tuned).
    """

    def __init__(self, arch="vit_small", image_size=224, patch=16, drop_path=0.0, dim=None, depth=None,
                 heads=None, registers=0, pooled=False):
        super().__init__()
        default = ARCHS.get(arch, {})
        size = {"dim": dim or default.get("dim"),
                "depth": depth or default.get("depth"),
                "heads": heads or default.get("heads")}
        if image_size % patch or None in size.values():
            raise ValueError(f"ViT {arch}: --image-size {image_size} must be a multiple of the patch {patch}")
        self.arch = arch
        extras = {"registers": registers, "pooled": pooled}
        self.config = {"image_size": image_size, "patch": patch, **size}
        self.config |= {name: value for name, value in extras.items() if value}
        self.pooled = pooled
        self.patch = patch
        self.dim, depth, heads = size["dim"], size["depth"], size["heads"]
        side = image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side ** 2, self.dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, self.dim)) if registers else None
        self.patch_embed = PatchEmbed(patch, self.dim)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(self.dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed.data[:, 1:] = sine_positions(side, self.dim)
        self.apply(_init_linear)

    def forward(self, images, mask=None, mask_token=None):
        x = self.patch_embed(images)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + resize_positions(self.pos_embed, x.shape[1] - 1)  # (B, 1+N, D)
        tokens = x.shape[1]
        if self.reg_token is not None:  # last, because attention knows no order
            x = torch.cat([x, self.reg_token.expand(x.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = x[:, :tokens]
        if self.pooled:
            return torch.cat([self.norm(x[:, 1:].mean(1, keepdim=True)), x[:, 1:]], dim=1)
        return self.norm(x)

    def features(self, images):
        tokens = self(images)
        side = images.shape[-1] // self.patch
        feature_map = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return tokens[:, 0], feature_map  # (B, D), (B, D, h, w)

    def layer_of(self, name):
        """Depth of a parameter for layer-wise learning rates: 0 the embeddings, i+1 block i, `layers` the
        rest."""
        if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.layers

    @property
    def layers(self):
        return len(self.blocks) + 1


def _init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def sine_positions(side, dim):
    """Start (side^2, dim) of a learned position embedding: sines and cosines of y and x, as MAE's, in view
    coordinates.

    Ours, in place of noise of 0.02: from noise a small ViT needs several times the images to learn where a
    patch is."""
    place = (torch.arange(side) + 0.5) / side
    angle = torch.pi * place[:, None] * 2 ** torch.linspace(0, 5, dim // 4)  # (side, dim / 4)
    code = 0.5 * torch.cat([angle.sin(), angle.cos()], 1)  # (side, dim / 2)
    of_row = code[:, None].expand(-1, side, -1)
    of_column = code.expand(side, -1, -1)
    return torch.cat([of_row, of_column], -1).flatten(0, 1)


def resize_positions(pos_embed, patches):
    """Position embedding (1,1+M,D) for another number of patches: bicubic on the grid; the class token's row
    stays.

    As MAE and DINOv2 do it, but for DINOv2's shift by a tenth of a patch. timm smooths first where the grid
    gets smaller (antialias): other features, of cosine .998 from 224 to 64 pixels."""
    if pos_embed.shape[1] - 1 == patches:
        return pos_embed
    old, new = (int(round(n ** 0.5)) for n in (pos_embed.shape[1] - 1, patches))
    if old * old != pos_embed.shape[1] - 1:
        raise ValueError(f"a position embedding for {pos_embed.shape[1]} tokens is not that of one class "
                         "token and a square of patches")
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


# ---------------------------------------------------------------------------------------------------- ResNets
class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x)))


def _shortcut(channels, out, stride):
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """ResNet (He et al. 2016; stride in the 3x3 convolution and names as torchvision) without its classifier.

    forward(images (B,3,S,S)) -> the last map (B,D,S/32,S/32), D = 256 for resnet_micro, 512 for resnet18,
    else 2048.
    """

    def __init__(self, arch="resnet50", image_size=224):
        super().__init__()
        self.arch = arch
        self.config = {"image_size": image_size}
        expansion = ARCHS[arch]["expansion"]
        channels = ARCHS[arch]["width"]
        self.widths = [channels * expansion * 2 ** i for i in range(4)]  # of the maps of `pyramid`
        block = Bottleneck if expansion == 4 else BasicBlock
        self.dim = self.widths[-1]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for i, blocks in enumerate(ARCHS[arch]["blocks"]):
            width = ARCHS[arch]["width"] * 2 ** i
            layer = []
            for j in range(blocks):
                layer.append(block(channels, width, 2 if i and j == 0 else 1))
                channels = expansion * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # what a GPU's convolutions are fastest in

    def forward(self, images):
        return self.pyramid(images)[-1]

    def pyramid(self, images):
        """The maps of the four stages, of stride 4, 8, 16 and 32."""
        images = images.contiguous(memory_format=torch.channels_last)
        maps = [F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps[1:]

    def features(self, images):
        x = self(images)
        return x.mean((2, 3)), x  # (B, D), (B, D, h, w)


ResNet50 = partial(ResNet, "resnet50")


# --------------------------------------------------------------------------------------------------- encoders
def is_resnet(arch):
    return arch.startswith("resnet")


def build_encoder(arch, image_size, drop_path=0.0, **config):
    """A fresh encoder by the name of --arch; config: other arguments of its constructor."""
    if is_resnet(arch):
        return ResNet(arch, image_size)
    return ViT(arch, image_size, drop_path=drop_path, **config)


def choose_encoder(arch, init, image_size, default="vit_small", drop_path=0.0, saved=None, heads=None,
                   pixels=None):
    """The encoder in the file `init`, or without one a fresh `arch`, `default` where that is None too.

    saved: {"arch", "config"} of a run's checkpoint, which brings the weights; `init` is then not read.
    heads, pixels: as load_encoder's."""
    if saved:
        try:
            return build_encoder(saved["arch"], drop_path=drop_path, **saved["config"])
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError("--resume: the checkpoint's encoder cannot be rebuilt "
                             f"({_reason(error)}); is last.pt damaged?") from None
    if not init and (heads or pixels):
        raise ValueError("--heads and --pixels say what --init does not: give --init, or leave them out")
    if not init:
        return build_encoder(arch or default, image_size, drop_path)
    encoder = load_encoder(init, image_size, drop_path, heads, pixels)
    if arch and arch != encoder.arch:
        raise ValueError(f"--arch {arch}, but {init} holds {encoder.arch}: leave --arch out")
    return encoder


def load_encoder(path: Path | str, image_size: int | None = None, drop_path: float = 0.0,
                 heads: int | None = None, pixels: str | None = None):
    """The encoder in a file, on the CPU, in eval mode.

    Reads our encoder.pt and mesh runs, and ViTs and ResNets of others: docs/mesh.md lists the families.
    Prefixes and heads are dropped; every weight of the trunk must be there, and none be left over.
    image_size: interpolates the position embedding to another input size. ValueError says what does not fit;
    nothing in the file is executed.

    What weights of others do not say: heads, the number of attention heads (default: that of the width, with
    a note, and MoCo v3's by its names); pixels, what they were trained on: "imagenet", or "half" (mean and
    deviation .5: timm's augreg, which is known by its name). "half" is folded into the patch embedding, so
    the encoder takes ImageNet's like all others from then on."""
    content = read_weights(path)
    try:
        arch, config, weights = _encoder_in(path, content, heads, pixels)
        config["image_size"] = image_size or config["image_size"]
        if not is_resnet(arch):
            _check_depth(config["depth"], weights)
            side = config["image_size"] // config["patch"]
            weights["pos_embed"] = resize_positions(weights["pos_embed"].float(), side * side)
        with torch.device("meta"):  # takes no memory: a file may ask for any size
            wanted = build_encoder(arch, **config).state_dict()
    except _Unfit as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}: its encoder cannot be rebuilt ({_reason(error)})") from None
    absent = sorted(name for name in wanted if name not in weights)
    missing = [name for name in absent if not name.endswith("num_batches_tracked")]
    wrong = sorted(name for name in wanted
                   if name in weights and getattr(weights[name], "shape", None) != wanted[name].shape)
    trunk = ("blocks.", "layer", "norm_pre", "reg_token")
    extra = sorted(str(name) for name in weights if name not in wanted and str(name).startswith(trunk))
    if missing or wrong or extra:
        raise ValueError(f"{path}: not a plain {arch}: missing {missing[:4]}, other shapes {wrong[:4]}, "
                         f"unknown {extra[:4]}")
    encoder = build_encoder(arch, drop_path=drop_path, **config)
    encoder.load_state_dict({name: weights.get(name, fresh) for name, fresh in encoder.state_dict().items()})
    return encoder.eval()


class _Unfit(ValueError):
    """Why a file has no encoder for us, without its path."""


def _check_depth(depth, weights):
    """A file of one weight can ask for any number of blocks, which take minutes to make."""
    blocks = {name.split(".")[1] for name in map(str, weights) if name.startswith("blocks.")}
    if depth > len(blocks):
        raise _Unfit(f"a ViT of {depth} blocks, of which it has {len(blocks)}")


def _encoder_in(path, content, heads, pixels):
    """Arch, config and weights under our names, of the encoder in a file that `read_weights` has read."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind in ("mim", "contrastive"):
        raise _Unfit("holds a whole run: give the encoder.pt beside it")
    if kind == "mesh":
        arch, config = content["encoder"]["arch"], dict(content["encoder"]["config"])
        weights = {name.removeprefix("encoder."): tensor for name, tensor in content["ema"].items()
                   if name.startswith("encoder.")}
    elif isinstance(content, dict) and {"arch", "config", "state_dict"} <= set(content):
        if content.get("format", 1) != FORMAT:
            raise _Unfit(f"an encoder.pt of format {content['format']}, this version reads {FORMAT}; "
                         "use the revision in the run's config.json")
        arch, config, weights = content["arch"], dict(content["config"]), dict(content["state_dict"])
    else:
        names, weights = _trunk_weights(content)
        if "conv1.weight" in weights:
            arch, config = _resnet_of(weights), {"image_size": 224}
        else:
            arch, config, weights = _vit_of(names, weights)
            heads = _known_heads(path, names, config["dim"]) if heads is None else heads
            if heads < 1 or config["dim"] % heads:
                raise _Unfit(f"a ViT of width {config['dim']}, which {heads} heads do not share evenly")
            if pixels is None and re.search(r"vit_[^/]*\.augreg", str(path)):  # timm's own names
                pixels = "half"
                print(f"note: {path}: taken for an augreg ViT, whose pixels have mean and deviation .5",
                      file=sys.stderr)
            if pixels == "half":
                _fold_pixels(weights)
                pixels = None
            config["heads"] = heads
    if pixels == "half" or heads not in (None, config.get("heads")):
        raise _Unfit(f"a {arch} whose heads and pixels are known: leave the flags for them out")
    return arch, config, weights


def _resnet_of(weights):
    """The name of --arch by its blocks."""
    names = [name.split(".") for name in weights]
    blocks = tuple(1 + max([int(name[1]) for name in names if name[0] == f"layer{i}"], default=-1)
                   for i in (1, 2, 3, 4))
    width = len(weights["conv1.weight"])
    size = {"blocks": blocks, "expansion": 4 if "layer1.0.conv3.weight" in weights else 1, "width": width}
    if size not in ARCHS.values():
        raise _Unfit(f"a ResNet of {blocks} blocks, {width} wide, which is none of --arch")
    return next(arch for arch, known in ARCHS.items() if known == size)


# A weight that a ViT unlike ours has, and what that means.
_UNLIKE = {
    "patch_embed.proj.0.weight": "convolutions before the patches",  # MoCo v3's vit_conv
    "last_norm.weight": "no class token, and patches that are padded and overlap (ViTPose, HaMeR)",
    "rope_embed.periods": "rotary positions (DINOv3)",
    "blocks.0.gamma_1": "rotary or relative positions (DINOv3 of timm, EVA, BEiT)",
    "blocks.0.mlp.w12.weight": "a gated MLP (DINOv2's giant)",
    "blocks.0.attn.q_norm.weight": "normalised queries and keys",
    "norm_pre.weight": "a norm before the blocks (CLIP)",
}


def _vit_of(names, weights):
    """Arch, config without heads, and weights under our names, of a ViT of others.

    What is linear is folded: LayerScale into the projection before it, the distilled token of DeiT and its
    position into a register."""
    unlike = [meaning for name, meaning in _UNLIKE.items() if name in weights]
    if unlike:
        raise _Unfit(f"a ViT with {unlike[0]}, which the plain one here has not")
    if not {"pos_embed", "patch_embed.proj.weight", "cls_token"} <= set(weights):
        raise _Unfit(f"neither a ViT with a class token nor a ResNet (first names: {sorted(weights)[:3]})")
    weights = {name: tensor.float() if tensor.is_floating_point() else tensor
               for name, tensor in weights.items()}
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    if "register_tokens" in weights:  # DINOv2
        weights["reg_token"] = weights.pop("register_tokens")
    positions = weights["pos_embed"]  # (1, 1+M, D)
    if "dist_token" in weights:  # DeiT, distilled: its second position
        weights["reg_token"] = weights.pop("dist_token") + positions[:, 1:2]
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    if int(positions.shape[1] ** 0.5) ** 2 == positions.shape[1]:  # timm's no_embed_class
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    weights["pos_embed"] = positions
    for name in [name for name in weights if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        branch = name.replace("ls1.gamma", "attn.proj.").replace("ls2.gamma", "mlp.fc2.")
        gamma = weights.pop(name)  # (D,)
        weights[branch + "weight"] = gamma[:, None] * weights[branch + "weight"]
        weights[branch + "bias"] = gamma * weights[branch + "bias"]
    pooled = "fc_norm.weight" in weights and "norm.weight" not in weights
    if pooled:
        weights |= {f"norm.{part}": weights.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    side = int((positions.shape[1] - 1) ** 0.5)
    config = {"dim": dim, "depth": depth, "patch": patch, "image_size": patch * side, "pooled": pooled,
              "registers": weights["reg_token"].shape[1] if "reg_token" in weights else 0}
    alike = (name for name, size in ARCHS.items() if size.get("dim") == dim and size["depth"] == depth)
    return next(alike, "vit"), config, weights


def _known_heads(path, names, dim):
    """The number of attention heads, of which no weight shows a trace: by the names, else by the width."""
    if any("base_encoder." in name for name in names):  # MoCo v3, which has 12 in its small ViT as well
        return 12
    if dim != 1280 and (dim % 64 or dim > 1024):
        raise _Unfit(f"a ViT of width {dim}: how many heads it has is not known; --heads says it")
    heads = 16 if dim == 1280 else dim // 64
    print(f"note: {path}: {heads} attention heads assumed, as is usual for a width of {dim}; the weights do "
          "not say", file=sys.stderr)
    return heads


def _fold_pixels(weights):
    """Makes a ViT for pixels of mean and deviation .5 one for ImageNet's. Exact: its patches have no padding.

    w (x - .5) / .5, with x = m + s z, is (2 s w) z + 2 w (m - .5)."""
    weight = weights["patch_embed.proj.weight"]  # (D, 3, P, P)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    added = (2 * weight * (mean - 0.5)).sum((1, 2, 3))
    weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + added
    weights["patch_embed.proj.weight"] = 2 * std * weight


# -------------------------------------------------------------------------------------------- files of others
class _Inert:
    """In place of a class that a file names and that no weight needs: keeps nothing, does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Flags and counters that people save beside weights. torch's reader knows tensors and plain values alone.
_STAND_INS = [(_Inert, name) for name in (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.Path", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "numpy.dtype",
    "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping")]
_STAND_INS += [(OrderedDict, name) for name in (
    "easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode", "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict", "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict")]


def read_weights(path: Path | str):
    """What torch.save or safetensors wrote into a file, on the CPU; of flags beside weights nothing is kept.

    Runs nothing that the file asks for. FileNotFoundError; ValueError says what is not plain in it."""
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":
                return _read_safetensors(path)
        parts = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else ()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed, which torch.save does not do")
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in _tensors(content)):
            raise ValueError("a tensor is larger than its numbers")
        return content
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such weight file") from None
    except Exception as error:  # a damaged file can fail in any way
        named = re.search(r"GLOBAL (\S+)", str(error))
        told = re.search(r"WeightsUnpickler error: (.{1,120})", str(error))
        reason = f"it names {named[1]}, which was not run" if named else told[1] if told else _reason(error)
        raise ValueError(f"{path}: no weight file of plain tensors ({reason}); save plain ones where it came "
                         "from: torch.save(model.state_dict(), PATH)") from None


def _tensors(content):
    """All tensors in nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _tensors(each)


def _read_safetensors(path):
    """{name: tensor} of a file of safetensors: eight bytes of a length, that much JSON, then the numbers."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            part = memoryview(data)[start + first:start + last]
            tensors[name] = torch.frombuffer(part, dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _trunk_weights(content):
    """Unwraps the usual containers and prefixes: the names as they were, and {timm's or torchvision's name:
    tensor}."""
    for key in ("state_dict", "model", "teacher", "student"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    prefixes = ("module.", "backbone.", "encoder.", "backend_model.", "model.", "teacher.", "encoder_q.",
                "base_encoder.")
    peclr = {"features.0.": "conv1.", "features.1.": "bn1.", "features.4.": "layer1.",
             "features.5.": "layer2.", "features.6.": "layer3.", "features.7.": "layer4."}
    weights, names = {}, []
    for full_name, tensor in (content.items() if isinstance(content, dict) else ()):
        if not (isinstance(full_name, str) and isinstance(tensor, torch.Tensor)):
            continue
        names.append(full_name)
        name = full_name.replace("_orig_mod.", "")
        while name.startswith(prefixes):
            name = name.split(".", 1)[1]
        for old, new in peclr.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        if name in weights:
            raise _Unfit(f"two weights are {name}: it holds two networks, save one of them alone")
        weights[name] = tensor
    return names, weights


# ----------------------------------------------------------------------------------------- pre-training heads
class PrototypeHead(nn.Module):
    """Tokens (...,D) -> logits (...,P), cosines to P prototypes.

    An MLP to 256 numbers, normalised, against normalised prototypes (bytedance/ibot models/head.py, whose
    weight-normed last layer of fixed magnitude is the same function)."""

    def __init__(self, dim, prototypes, width=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(),
                                 nn.Linear(width, width), nn.GELU(),
                                 nn.Linear(width, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        self.mlp.apply(_init_linear)

    def forward(self, x):
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class KeypointHead(nn.Module):
    """Class token (B,D) -> K pseudo keypoints (B,K,2) in coordinates of the view.

    Ours: the bias spreads them over the middle of the view, so that the points differ before anything is
    learned."""

    def __init__(self, dim, keypoints):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * keypoints)
        _init_linear(self.linear)
        steps = torch.tensor([0.7548777, 0.5698403])  # of a low-discrepancy sequence in the square (R2)
        spots = torch.arange(1, keypoints + 1)[:, None] * steps  # (K, 2)
        with torch.no_grad():
            self.linear.bias.copy_((spots % 1 - 0.5).flatten())

    def forward(self, x):
        return self.linear(x).unflatten(-1, (-1, 2))


class ProjectionHead(nn.Sequential):
    """Features (B,D) -> latents (B,128), 64 points for PeCLR (dahiyaaneesh/peclr
    src/models/unsupervised/simclr_model.py).

    Ours: standardised over the batch, as at the end of SimCLR's own head. What all hands have in common would
    otherwise be turned by each view's theta. It would be noise in every similarity, and similar hands of
    other videos would not emerge."""

    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 512), nn.BatchNorm1d(512), nn.ReLU(),
                         nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128, affine=False))


# -------------------------------------------------------------------------------------------------- mesh head
class MeshHead(nn.Module):
    """PyMAF's mesh-aligned feedback loop on MANO (HongwenZhang/PyMAF models/maf_extractor.py; hand branch of
    PyMAF-X).

    Iteration t samples the feature map F_t: first on a grid, then at the projected vertices of the last
    estimate. It reduces every sample to 5 numbers and regresses a correction of the state: 16 rotations
    (6-D), 10 betas, camera. F_t doubles in resolution with t. Ours: GroupNorm instead of BatchNorm, which is
    the same function for any batch size and any number of processes; no dense auxiliary; a scale that is
    positive by construction, and never more than e^2 from the mean, because one outlying hand could otherwise
    make it infinite.

    hand: callable (rotmats (B,16,3,3), betas (B,10)) -> vertices (B,778,3), joints (B,21,3) in metres, with
    `template` (778,3). channels: of the encoder's map. summary: width of its class token or pooled features,
    which every iteration sees too (ours: pre-training puts the pose there; 0 leaves it out). strides: True
    for a map of stride 32 (ResNet), which is upsampled once more.

    joint_maps: every F_t also says where the 21 joints are, and the regressor sees these places and how far
    the last estimate's joints lie from them (ours: where joints are is learnt from far fewer images than how
    a hand is turned, and tells it). laterals: channels of finer maps of a ResNet, stride 16 first, which are
    added to F_0, F_1, ... (as in a feature pyramid, Lin et al. 2017). In use, not in training, `settle` then
    makes one more estimate.

    forward(map (B,C,h,w), summary (B,D), finer maps) -> list over t of dicts: rotmats, betas, camera (B,3) =
    scale, tx, ty; vertices and joints relative to the kinematic wrist; `points` (B,P,2), where the features
    were read, in [-1,1] of the view; with joint_maps also `joint_maps` (B,21,h,w), logits."""

    def __init__(self, hand, channels, summary=0, strides=False, iterations=3, width=256, mesh_points=195,
                 grid=21, dropout=0.1, scale_bound=2.0, hidden=1024, joint_maps=False, laterals=()):
        super().__init__()
        self.hand = hand
        self.config = {"channels": channels, "summary": summary, "strides": strides, "iterations": iterations,
                       "width": width, "mesh_points": mesh_points, "grid": grid, "dropout": dropout,
                       "scale_bound": scale_bound, "hidden": hidden, "joint_maps": joint_maps,
                       "laterals": list(laterals)}
        self.scale_bound = scale_bound
        if strides:
            first = _deconv(channels, width)
        else:
            first = nn.Sequential(nn.Conv2d(channels, width, 1), MapNorm(32, width), nn.ReLU())
        self.maps = nn.ModuleList([first] + [_deconv(width, width) for _ in range(iterations - 1)])
        samples = [grid * grid] + [mesh_points] * (iterations - 1)
        self.reduce = nn.ModuleList(PointReducer(width) for _ in samples)
        self.norm = nn.LayerNorm(summary) if summary else None
        self.laterals = nn.ModuleList(nn.Conv2d(finer, width, 1) for finer in laterals[:iterations])
        self.joint_maps = nn.ModuleList(nn.Conv2d(width, 21, 1) for _ in samples) if joint_maps else None
        known = summary + (21 * 5 if joint_maps else 0)
        self.regress = nn.ModuleList(Regressor(5 * points + known, dropout, hidden) for points in samples)
        self.register_buffer("mesh_points", farthest_points(hand.template, mesh_points), persistent=False)
        line = torch.arange(grid) * 2 / (grid - 1) - 1
        grid_points = torch.cartesian_prod(line, line).flip(1)  # (441, 2) x, y
        self.register_buffer("grid_points", grid_points, persistent=False)
        no_turn = torch.eye(3)[:, :2].T.flatten().repeat(16)
        self.register_buffer("mean_state", torch.cat([no_turn, torch.zeros(13)]))
        self.register_buffer("mean_scale", torch.tensor(9.0))  # image units a metre; a view of 1.2 x the box

    def set_mean(self, rotmats, scale):
        """The state before the first iteration: rotmats (16,3,3), the training set's mean, and the mean
        scale."""
        self.mean_state[:96] = rotmats[:, :, :2].transpose(1, 2).reshape(96)
        self.mean_scale.fill_(scale)

    def forward(self, feature_map, summary=None, finer=()):
        state = self.mean_state.expand(feature_map.shape[0], -1)  # (B, 109)
        points = self.grid_points.expand(feature_map.shape[0], -1, -1)
        outputs = []
        seen_joints = 0.0  # where the last estimate has the joints in the view, (B, 21, 2); none yet
        for t in range(len(self.maps)):
            feature_map = self.maps[t](feature_map)  # F_t
            if self.laterals:
                feature_map = feature_map + self.laterals[t](finer[t])
            features = self.reduce[t](sample(feature_map, points))  # (B, 5 P)
            if self.norm is not None:
                features = torch.cat([features, self.norm(summary)], dim=1)
            maps = {}
            if self.joint_maps is not None:
                maps = {"joint_maps": self.joint_maps[t](feature_map).float()}
                places, certainty = read_joint_maps(maps["joint_maps"].detach())
                features = torch.cat([features, places.flatten(1), (places - seen_joints).flatten(1),
                                      certainty], dim=1)
            with torch.autocast("cuda" if feature_map.is_cuda else "cpu", enabled=False):
                # An iteration learns to correct the last estimate as it stands, not to make it easy to
                # correct.
                state = state.detach() + self.regress[t](features.float(), state.detach())
                output = self.decode(state) | {"points": points} | maps
            scale, shift = output["camera"][:, None, :1], output["camera"][:, None, 1:]
            points = (scale * (output["vertices"][:, self.mesh_points, :2] + shift)).detach()
            seen_joints = (scale * (output["joints"][..., :2] + shift)).detach()
            outputs.append(output)
        return outputs

    def settle(self, estimate, seen=None):
        """The estimate, bent so that its joints lie where its joint maps have their peaks; fp32.

        seen (B,21,3): places of the joints in [-1,1] of the view as a detector has them, and its certainty,
        0 where it knows none. They count beside the peaks, or alone where the head has no joint maps.

        Ours. Maps find joints on photographs unlike those trained on, where the regressors follow them only
        in part. Rounds of Gauss and Newton find the most probable hand. Two are enough for peaks, which lie
        near the estimate. A detector's points may lie far away: eight. The deviations of what is to be
        found, about the estimate, are those of SETTLE; that of a peak is the larger, the less of the map's
        probability lies there. What is far away counts by its distance, not by the square."""
        measured = [read_peaks(estimate["joint_maps"])] if "joint_maps" in estimate else []
        measured += [] if seen is None else [(seen[..., :2], seen[..., 2])]
        rotmats, betas, camera = estimate["rotmats"], estimate["betas"], estimate["camera"]
        scale, shift = camera[:, :1], camera[:, :1] * camera[:, 1:]
        device = camera.device
        looser = torch.ones(camera.shape[0], 1, device=device)
        if seen is not None:
            is_seen = seen[..., 2:].amax(1) > 0  # (B, 1)
            looser = torch.where(is_seen, SETTLE["seen"], looser)
        scale_spread = SETTLE["log_scale"] * looser  # (B, 1)
        spread = torch.block_diag(SETTLE["wrist"] * torch.eye(3, device=device),
                                  SETTLE["fingers"] * self.hand.pose_spread)  # (48, 48)
        to_shift = SETTLE["shift"] * torch.eye(2, device=device).expand(camera.shape[0], 21, 2, 2)
        found = torch.zeros(camera.shape[0], 51, device=device)  # in deviations: 48 turns, scale, shift
        for done in range(2 if seen is None else 8):
            _, joints = self.hand(rotmats, betas)
            joints = joints - joints[:, :1]
            flat = scale[..., None] * joints[..., :2]  # (B, 21, 2)
            turned = self.hand.joint_jacobian(rotmats, joints)[:, :, :2].flatten(3)  # (B, 21, 2, 48)
            ways = torch.cat([(looser * scale)[..., None, None] * turned @ spread,
                              (scale_spread[..., None] * flat)[..., None], to_shift], dim=3)  # (B, 21, 2, 51)
            ways = ways.flatten(1, 2)  # (B, 42, 51), how the places move
            size = (flat.amax(1) - flat.amin(1)).amax(1)[:, None]  # (B, 1)
            curvature, slope = torch.eye(51, device=device), -found
            for places, certainty in measured:
                away = places - flat - shift[:, None]  # (B, 21, 2)
                away = torch.where(certainty[..., None] > 0, away, 0.0)  # else they may be anything, also NaN
                exact = certainty / (SETTLE["place"] * size)  # (B, 21), one over a place's deviation
                weights = exact ** 2 * 2 / (exact * away.norm(dim=2)).clamp(min=2)  # robust (Huber)
                weighted = ways.transpose(1, 2) * weights.repeat_interleave(2, 1)[:, None]  # (B, 51, 42)
                curvature = curvature + weighted @ ways
                slope = slope + (weighted @ away.flatten(1)[..., None])[..., 0]
            step = (conjugate_gradients(curvature, slope) if torch.compiler.is_compiling()
                    else torch.linalg.solve(curvature, slope))
            if done >= 2:  # a hand without points settles as if it were alone
                step = torch.where(is_seen, step, 0.0)
            found = found + step
            rotmats = self.hand.turn(rotmats, (looser * step[:, :48] @ spread.T).unflatten(1, (16, 3)))
            scale = scale * (scale_spread * step[:, 48:49]).exp()
            shift = shift + SETTLE["shift"] * step[:, 49:]
        vertices, joints = self.hand(rotmats, betas)
        root = joints[:, :1]
        return estimate | {"rotmats": rotmats, "camera": torch.cat([scale, shift / scale], dim=1),
                           "vertices": vertices - root, "joints": joints - root}

    def decode(self, state):
        """State (B,109) -> rotations, shape, camera and the hand they make; fp32."""
        rotmats = rotmat_from_6d(state[:, :96].unflatten(1, (16, 6)))
        betas = state[:, 96:106]
        log_scale = state[:, 106:107]
        if self.scale_bound:
            log_scale = self.scale_bound * (log_scale / self.scale_bound).tanh()
        camera = torch.cat([self.mean_scale * log_scale.exp(), 0.1 * state[:, 107:]], dim=1)
        vertices, joints = self.hand(rotmats, betas)
        root = joints[:, :1]
        return {"rotmats": rotmats, "betas": betas, "camera": camera,
                "vertices": vertices - root, "joints": joints - root}


class PointReducer(nn.Module):
    """256 -> 128 -> 64 -> 5 for every point, the input concatenated again before the later layers (PyMAF).

    Ours: no ReLU at the end. With it, all five numbers of all points were zero after 400 steps from scratch,
    for good."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 128)
        self.fc2 = nn.Linear(width + 128, 64)
        self.fc3 = nn.Linear(width + 64, 5)

    def forward(self, x):  # (B, P, C)
        y = F.leaky_relu(self.fc1(x), 0.01)
        y = F.leaky_relu(self.fc2(torch.cat([x, y], -1)), 0.01)
        return self.fc3(torch.cat([x, y], -1)).flatten(1)  # (B, 5 P)


class Regressor(nn.Module):
    """Features and state -> correction of the state (B,109). Ours: GELU between the layers, where PyMAF has
    nothing."""

    def __init__(self, features, dropout, hidden):
        super().__init__()
        self.fc1 = nn.Linear(features + 109, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, n) for n in (96, 10, 3))
        self.dropout = nn.Dropout(dropout)
        for head in self.heads:
            nn.init.xavier_uniform_(head.weight, gain=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features, state):
        x = self.dropout(F.gelu(self.fc1(torch.cat([features, state], 1))))
        x = self.dropout(F.gelu(self.fc2(x)))
        return torch.cat([head(x) for head in self.heads], dim=1)


def _deconv(channels, width):
    up = nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False)
    return nn.Sequential(up, MapNorm(32, width), nn.ReLU())


class MapNorm(nn.GroupNorm):
    """GroupNorm of maps in any memory format. On a CPU, PyTorch's own is slow in channels_last."""

    def forward(self, x):
        return super().forward(x if x.is_cuda else x.contiguous())


def sample(feature_map, points):
    """Map (B,C,h,w) read bilinearly at points (B,P,2) in [-1,1], +-1 the edges -> (B,P,C). Zero outside.

    In the points' precision: in bf16 they would be off by 0.05 pixels of a 56-pixel map.
    """
    places = points[:, :, None]  # (B, P, 1, 2)
    values = F.grid_sample(feature_map.to(points.dtype), places, align_corners=False)  # (B, C, P, 1)
    return values[..., 0].transpose(1, 2)


def read_joint_maps(logits):
    """Logits (B,J,h,w) -> expected places (B,J,2) in [-1,1], x and y, and the largest probability (B,J)."""
    chance = _chances(logits)
    return _expected_places(chance), chance.amax((2, 3))


def read_peaks(logits, reach=2):
    """Logits (B,J,h,w) -> expected places (B,J,2) in [-1,1] of the cells within `reach` of the likeliest, and
    their share (B,J) of the probability.

    Where a map is in doubt between two places, read_joint_maps lies between them, and this on one."""
    chance = _chances(logits)
    height, width = logits.shape[2:]
    best = chance.flatten(2).argmax(2)[..., None]  # (B, J, 1)
    near_row = (torch.arange(height, device=logits.device) - best // width).abs() <= reach  # (B, J, h)
    near_column = (torch.arange(width, device=logits.device) - best % width).abs() <= reach
    near = chance * near_row[..., None] * near_column[:, :, None]
    share = near.sum((2, 3))
    return _expected_places(near / share[..., None, None]), share


def _chances(logits):
    """Maps (B,J,h,w) of which each sums to 1."""
    return logits.flatten(2).softmax(2).unflatten(2, logits.shape[2:])


def _expected_places(chance):
    """Maps (B,J,h,w) that sum to 1 -> the means (B,J,2) of their cells' places in [-1,1], x and y."""
    height, width = chance.shape[2:]
    x = (torch.arange(width, device=chance.device) + 0.5) * 2 / width - 1
    y = (torch.arange(height, device=chance.device) + 0.5) * 2 / height - 1
    # No matrix product: autocast would round the places.
    return torch.stack([(chance.sum(2) * x).sum(2), (chance.sum(3) * y).sum(2)], dim=2)


def joint_map_loss(logits, places):
    """Cross-entropy (B,J) of joint maps (B,J,h,w) with the places (B,J,2) in [-1,1] (ours).

    The four cells around a place share its weight bilinearly, so that the expected place can be exact. Places
    outside are moved in."""
    height, width = logits.shape[2:]
    log_chance = logits.flatten(2).log_softmax(2)  # (B, J, h w)
    loss = 0
    for column, share_x in _two_cells(places[..., 0], width):
        for row, share_y in _two_cells(places[..., 1], height):
            cell = (row * width + column).long()  # (B, J)
            loss = loss - share_x * share_y * log_chance.gather(2, cell[..., None])[..., 0]
    return loss


def _two_cells(places, count):
    """Places (B,J) in [-1,1] -> the two of `count` cells that each lies between: (cell, share) of (B,J)."""
    cells = ((places + 1) * count / 2 - 0.5).clamp(0, count - 1)
    low = cells.floor()
    share = cells - low
    return (low, 1 - share), ((low + 1).clamp(max=count - 1), share)


def conjugate_gradients(matrix, wanted, steps=20):
    """x (B,N) near matrix^-1 wanted, of symmetric positive matrices (B,N,N) (Hestenes, Stiefel 1952). ONNX,
    which has no solver, can run it."""
    x = torch.zeros_like(wanted)
    way = left = wanted
    size = left.square().sum(1, keepdim=True)
    for _ in range(steps):
        ahead = (matrix @ way[..., None])[..., 0]
        length = size / (way * ahead).sum(1, keepdim=True).clamp(min=1e-20)
        x = x + length * way
        left = left - length * ahead
        before, size = size, left.square().sum(1, keepdim=True)
        way = left + size / before.clamp(min=1e-20) * way
    return x


def farthest_points(points, count):
    """(count,) indices by farthest-point sampling, from the point farthest from the mean; ties to the lower
    index (ours)."""
    points = points.detach().double().cpu()
    chosen = [int((points - points.mean(0)).norm(dim=1).argmax())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def rotmat_from_6d(x):
    """(...,6) -> (...,3,3): two contiguous 3-vectors, made orthonormal, are the first two COLUMNS (Zhou et
    al. 2019).

    Written here as well as in mano.py, so that either file can be copied alone; a test holds them equal.
    """
    a1, a2 = x[..., :3], x[..., 3:]
    b1 = F.normalize(a1, dim=-1)
    b2 = F.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2)], dim=-1)


class HandMesh(nn.Module):
    """Encoder and mesh head: normalised views (B,3,S,S) -> the head's list of estimates, of which the last is
    the answer. In eval mode that is MeshHead.settle's, where the head has joint maps, or joints are `seen`
    (B,21,3), as there."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images, seen=None):
        if self.head.laterals:
            *finer, last = self.encoder.pyramid(images)
            estimates = self.head(last, last.mean((2, 3)), finer[::-1])
        else:
            summary, feature_map = self.encoder.features(images)
            estimates = self.head(feature_map, summary)
        if self.training or (self.head.joint_maps is None and seen is None):
            return estimates
        with torch.autocast("cuda" if images.is_cuda else "cpu", enabled=False):
            return [*estimates, self.head.settle(estimates[-1], seen)]


def load_mesh(state: dict, hand) -> HandMesh:
    """HandMesh in eval mode from a checkpoint of kind "mesh", with its averaged weights. hand: as
    MeshHead's."""
    try:
        encoder = build_encoder(state["encoder"]["arch"], **state["encoder"]["config"])
        head = {"scale_bound": 0} | state["head"]  # an older network has no bound
        net = HandMesh(encoder, MeshHead(hand, **head))
        net.load_state_dict(state["ema"])
        if not 0 < state["box_scale"] < 100:
            raise ValueError(f"box_scale {state['box_scale']}")
    except Exception as error:  # a damaged file can fail in any way
        reason = _reason(error)
        raise ValueError(f"--checkpoint: its network cannot be rebuilt ({reason}); is it damaged?") from None
    return net.eval()


def _reason(error):
    """The first line of an error's text, or its kind."""
    if "Weights only load failed" in str(error):  # torch goes on with advice to load it unsafely
        return "torch.save did not write it"
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
