"""Networks: the plain ViT, ResNet-50, the pre-training heads, and the PyMAF head that regresses MANO.

Parameter names are timm's for the ViT and torchvision's for ResNet-50: public weights load, and ours load
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

import argparse
import contextlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Patches of 16 x 16 pixels. Sizes of DeiT (Touvron et al. 2021); vit_micro is ours, for minutes on a CPU.
ARCHS = {
    "vit_micro": {"dim": 192, "depth": 4, "heads": 3},
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "resnet50": {},
}
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
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


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
    """

    def __init__(self, arch="vit_small", image_size=224, patch=16, drop_path=0.0, dim=None, depth=None,
                 heads=None):
        super().__init__()
        default = ARCHS.get(arch, {})
        size = {"dim": dim or default.get("dim"),
                "depth": depth or default.get("depth"),
                "heads": heads or default.get("heads")}
        if image_size % patch or None in size.values():
            raise ValueError(f"ViT {arch}: --image-size {image_size} must be a multiple of the patch {patch}")
        self.arch = arch
        self.config = {"image_size": image_size, "patch": patch, **size}
        self.patch = patch
        self.dim, depth, heads = size["dim"], size["depth"], size["heads"]
        side = image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side ** 2, self.dim))
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
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + resize_positions(self.pos_embed, x.shape[1] - 1)  # (B, 1+N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images):
        tokens = self(images)
        side = images.shape[-1] // self.patch
        feature_map = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return tokens[:, 0], feature_map  # (B, D), (B, D, h, w)

    def layer_of(self, name):
        """Depth of a parameter for layer-wise learning rates: 0 the embeddings, i+1 block i, `layers` the
        rest."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
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
    """Position embedding (1,1+M,D) for another number of patches: bicubic on the grid (MAE's); the class
    token's row stays."""
    if pos_embed.shape[1] - 1 == patches:
        return pos_embed
    old, new = (int(round(n ** 0.5)) for n in (pos_embed.shape[1] - 1, patches))
    if old * old != pos_embed.shape[1] - 1:
        raise ValueError(f"a position embedding for {pos_embed.shape[1]} tokens is not that of one class "
                         "token and a square of patches")
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


# -------------------------------------------------------------------------------------------------- ResNet-50
class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016; stride in the 3x3 convolution and names as torchvision) without its
    classifier.

    forward(images (B,3,S,S)) -> the last map (B,2048,S/32,S/32).
    """

    arch = "resnet50"
    dim = 2048

    def __init__(self, image_size=224):
        super().__init__()
        self.config = {"image_size": image_size}
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            layer = []
            for j in range(blocks):
                layer.append(Bottleneck(channels, width, 2 if i and j == 0 else 1))
                channels = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # what a GPU's convolutions are fastest in

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def features(self, images):
        x = self(images)
        return x.mean((2, 3)), x  # (B, 2048), (B, 2048, h, w)


# --------------------------------------------------------------------------------------------------- encoders
def build_encoder(arch, image_size, drop_path=0.0, **config):
    """A fresh encoder by the name of --arch; config: other arguments of its constructor."""
    if arch == "resnet50":
        return ResNet50(image_size)
    return ViT(arch, image_size, drop_path=drop_path, **config)


def choose_encoder(arch, init, image_size, default="vit_small", drop_path=0.0, saved=None):
    """The encoder in the file `init`, or without one a fresh `arch`, `default` where that is None too.

    saved: {"arch", "config"} of a run's checkpoint, which brings the weights; `init` is then not read."""
    if saved:
        return build_encoder(saved["arch"], drop_path=drop_path, **saved["config"])
    if not init:
        return build_encoder(arch or default, image_size, drop_path)
    encoder = load_encoder(init, image_size, drop_path)
    if arch and arch != encoder.arch:
        raise ValueError(f"--arch {arch}, but {init} holds {encoder.arch}: leave --arch out")
    return encoder


def load_encoder(path: Path | str, image_size: int | None = None, drop_path: float = 0.0):
    """The encoder in a file, on the CPU, in eval mode.

    Reads our encoder.pt, ViT weights of timm, MAE, DINO or iBOT, and ResNet-50 weights under torchvision's
    names (also as PeCLR and SiMHand publish them). Prefixes and heads are dropped; every weight of the trunk
    must be there, and none be left over. image_size: interpolates the position embedding to another input
    size. ValueError says what does not fit; nothing in the file is executed."""
    state = _read_weights(path)
    weights = _trunk_weights(state)
    arch, config = _architecture(path, state, weights)
    try:
        config["image_size"] = image_size or config["image_size"]
        encoder = build_encoder(arch, drop_path=drop_path, **config)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}: its encoder cannot be rebuilt ({_reason(error)})") from None
    if arch != "resnet50":
        weights["pos_embed"] = resize_positions(weights["pos_embed"].float(), encoder.pos_embed.shape[1] - 1)
    wanted = encoder.state_dict()
    absent = sorted(name for name in wanted if name not in weights)
    missing = [name for name in absent if not name.endswith("num_batches_tracked")]
    wrong = sorted(name for name in wanted if name in weights and weights[name].shape != wanted[name].shape)
    trunk = ("blocks.", "layer", "norm_pre", "reg_token")
    extra = sorted(name for name in weights if name not in wanted and name.startswith(trunk))
    if missing or wrong or extra:
        raise ValueError(f"{path}: not a plain {arch}: missing {missing[:4]}, other shapes {wrong[:4]}, "
                         f"unknown {extra[:4]}")
    encoder.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})
    return encoder.eval()


def _architecture(path, state, weights):
    """Name and constructor's arguments of the encoder in a file, as it says itself or as its weights show."""
    if isinstance(state, dict) and state.get("kind") in ("mim", "contrastive", "mesh"):
        raise ValueError(f"{path} holds a whole run: give the encoder.pt beside it")
    if isinstance(state, dict) and {"arch", "config", "state_dict"} <= set(state):
        if state.get("format", 1) != FORMAT:
            number = state["format"]
            raise ValueError(f"{path}: an encoder.pt of format {number}, this version reads {FORMAT}; "
                             "use the revision in the run's config.json")
        return state["arch"], dict(state["config"])
    if "conv1.weight" in weights:
        return "resnet50", {"image_size": 224}
    if not {"pos_embed", "patch_embed.proj.weight", "cls_token"} <= set(weights):
        raise ValueError(f"{path}: neither a ViT nor a ResNet-50 (first names: {sorted(weights)[:3]})")
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    if dim % 64 or dim > 1024:  # wider ones do not have 64 numbers a head
        raise ValueError(f"{path}: a ViT of width {dim}: how many heads it has is not known")
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    side = int((weights["pos_embed"].shape[1] - 1) ** 0.5)
    config = {"dim": dim, "depth": depth, "heads": dim // 64, "patch": patch, "image_size": patch * side}
    alike = (name for name, size in ARCHS.items() if size.get("dim") == dim and size["depth"] == depth)
    return next(alike, "vit"), config


def _read_weights(path):
    # MAE and DINO store their argparse flags as well; torch before 2.5 cannot allow that.
    allow = getattr(torch.serialization, "safe_globals", None)
    try:
        with allow([argparse.Namespace]) if allow else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such weight file") from None
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}: no weight file of plain tensors ({_reason(error)})") from None


def _trunk_weights(state):
    """Unwraps the usual containers and prefixes: {name as timm or torchvision has it: tensor}."""
    for key in ("state_dict", "model", "teacher", "student"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    peclr = {"features.0.": "conv1.", "features.1.": "bn1.", "features.4.": "layer1.",
             "features.5.": "layer2.", "features.6.": "layer3.", "features.7.": "layer4."}
    weights = {}
    for name, tensor in (state.items() if isinstance(state, dict) else ()):
        for prefix in ("module.", "backbone.", "encoder.", "backend_model.", "model."):
            name = name.removeprefix(prefix)
        for old, new in peclr.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        if isinstance(tensor, torch.Tensor):
            weights[name] = tensor
    return weights


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

    forward(map (B,C,h,w), summary (B,D)) -> list over t of dicts: rotmats, betas, camera (B,3) = scale, tx,
    ty; vertices and joints relative to the kinematic wrist; `points` (B,P,2), where the features were read,
    in [-1,1] of the view."""

    def __init__(self, hand, channels, summary=0, strides=False, iterations=3, width=256, mesh_points=195,
                 grid=21, dropout=0.1, scale_bound=2.0):
        super().__init__()
        self.hand = hand
        self.config = {"channels": channels, "summary": summary, "strides": strides, "iterations": iterations,
                       "width": width, "mesh_points": mesh_points, "grid": grid, "dropout": dropout,
                       "scale_bound": scale_bound}
        self.scale_bound = scale_bound
        if strides:
            first = _deconv(channels, width)
        else:
            first = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(32, width), nn.ReLU())
        self.maps = nn.ModuleList([first] + [_deconv(width, width) for _ in range(iterations - 1)])
        samples = [grid * grid] + [mesh_points] * (iterations - 1)
        self.reduce = nn.ModuleList(PointReducer(width) for _ in samples)
        self.norm = nn.LayerNorm(summary) if summary else None
        self.regress = nn.ModuleList(Regressor(5 * points + summary, dropout) for points in samples)
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

    def forward(self, feature_map, summary=None):
        state = self.mean_state.expand(len(feature_map), -1)  # (B, 109)
        points = self.grid_points.expand(len(feature_map), -1, -1)
        outputs = []
        for make_map, reduce, regress in zip(self.maps, self.reduce, self.regress, strict=True):
            feature_map = make_map(feature_map)  # F_t
            features = reduce(sample(feature_map, points))  # (B, 5 P)
            if self.norm is not None:
                features = torch.cat([features, self.norm(summary)], dim=1)
            with torch.autocast("cuda" if feature_map.is_cuda else "cpu", enabled=False):
                # An iteration learns to correct the last estimate as it stands, not to make it easy to
                # correct.
                state = state.detach() + regress(features.float(), state.detach())
                output = self.decode(state) | {"points": points}
            scale, shift = output["camera"][:, None, :1], output["camera"][:, None, 1:]
            points = (scale * (output["vertices"][:, self.mesh_points, :2] + shift)).detach()
            outputs.append(output)
        return outputs

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

    def __init__(self, features, dropout):
        super().__init__()
        self.fc1 = nn.Linear(features + 109, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.heads = nn.ModuleList(nn.Linear(1024, n) for n in (96, 10, 3))
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
    return nn.Sequential(up, nn.GroupNorm(32, width), nn.ReLU())


def sample(feature_map, points):
    """Map (B,C,h,w) read bilinearly at points (B,P,2) in [-1,1], +-1 the edges -> (B,P,C). Zero outside.

    In the points' precision: in bf16 they would be off by 0.05 pixels of a 56-pixel map.
    """
    places = points[:, :, None]  # (B, P, 1, 2)
    values = F.grid_sample(feature_map.to(points.dtype), places, align_corners=False)  # (B, C, P, 1)
    return values[..., 0].transpose(1, 2)


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
    the answer."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images):
        summary, feature_map = self.encoder.features(images)
        return self.head(feature_map, summary)


def load_mesh(state: dict, hand) -> HandMesh:
    """HandMesh in eval mode from a checkpoint of kind "mesh", with its averaged weights. hand: as
    MeshHead's."""
    try:
        encoder = build_encoder(state["encoder"]["arch"], **state["encoder"]["config"])
        head = {"scale_bound": 0} | state["head"]  # an older network has no bound
        net = HandMesh(encoder, MeshHead(hand, **head))
        net.load_state_dict(state["ema"])
    except Exception as error:  # a damaged file can fail in any way
        reason = _reason(error)
        raise ValueError(f"--checkpoint: its network cannot be rebuilt ({reason}); is it damaged?") from None
    return net.eval()


def _reason(error):
    """The first line of an error's text, or its kind."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
