"""Networks: the plain ViT, ResNet-50, and the PyMAF mesh head that regresses MANO from either.

Parameter names are timm's for the ViT and torchvision's for ResNet-50, so that public weights load and ours load elsewhere.
Both encoders answer features(images) -> summary (B,D), map (B,D,h,w): class token and patch grid, or pooled and last map.
The file stands alone: the hand comes as a callable, so nothing of MANO is stored with a network.
"""

import argparse
import contextlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ARCHS = {                                                          # Touvron et al. (DeiT) sizes, patch 16; vit_micro is ours,
    "vit_micro": {"dim": 192, "depth": 4, "heads": 3},             # for minutes on a CPU
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "resnet50": {},
}


# ------------------------------------------------------------------------------------------------------------------ ViT
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                          # (B, 1+N, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # 3 x (B, heads, 1+N, D/heads)
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
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)
        self.drop_path = drop_path

    def keep(self, branch):
        """Stochastic depth: drops the branch for some samples of the batch, rescales the others."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.keep(self.attn(self.norm1(x)))
        return x + self.keep(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)        # (B, N, D)


class ViT(nn.Module):
    """Plain pre-norm ViT with a class token (Dosovitskiy et al.; timm's names). Square images of any multiple of `patch`.

    forward(images (B,3,S,S), mask (B,N) bool or None, mask_token (1,D)) -> tokens (B,1+N,D), class token first, after the
    final LayerNorm. Where mask is True the patch's embedding is replaced by mask_token, which the pre-training owns.
    """

    def __init__(self, arch="vit_small", image_size=224, patch=16, drop_path=0.0, dim=None, depth=None, heads=None):
        super().__init__()
        size = {name: given or ARCHS.get(arch, {}).get(name) for name, given in (("dim", dim), ("depth", depth), ("heads", heads))}
        if image_size % patch or None in size.values():
            raise ValueError(f"ViT {arch}: --image-size {image_size} must be a multiple of the patch, {patch}")
        self.arch, self.config = arch, {"image_size": image_size, "patch": patch, **size}
        self.dim, self.patch, depth = size["dim"], patch, size["depth"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, self.dim))
        self.patch_embed = PatchEmbed(patch, self.dim)
        self.blocks = nn.ModuleList(Block(self.dim, size["heads"], drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed.data[:, 1:] = sine_positions(image_size // patch, self.dim)
        self.apply(init_linear)

    def forward(self, images, mask=None, mask_token=None):
        x = self.patch_embed(images)                               # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + resize_positions(self.pos_embed, x.shape[1] - 1)   # (B, 1+N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images):
        tokens = self(images)
        side = images.shape[-1] // self.patch
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))        # (B, D), (B, D, h, w)

    def layer_of(self, name):
        """Depth of a parameter for layer-wise learning rates: 0 the embeddings, i+1 block i, depth+1 the rest."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.layers

    @property
    def layers(self):
        return len(self.blocks) + 1


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def sine_positions(side, dim):
    """(side^2, dim): where a learned position embedding starts, sines and cosines of y and x (as MAE's, in coordinates of the view).
    Ours in place of noise of 0.02, from which a small ViT needs several times the images to learn where anything is."""
    place = (torch.arange(side) + 0.5) / side
    angle = torch.pi * place[:, None] * 2 ** torch.linspace(0, 5, dim // 4)                  # (side, dim / 4)
    code = 0.5 * torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([code[:, None].expand(-1, side, -1), code.expand(side, -1, -1)], -1).flatten(0, 1)


def resize_positions(pos_embed, patches):
    """Position embedding (1,1+M,D) for another number of patches: bicubic on the grid, the class token's row is kept."""
    if pos_embed.shape[1] - 1 == patches:
        return pos_embed
    old, new = (int(round(n ** 0.5)) for n in (pos_embed.shape[1] - 1, patches))
    if old * old != pos_embed.shape[1] - 1:
        raise ValueError(f"a position embedding for {pos_embed.shape[1]} tokens is not that of one class token and a square of patches")
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


# ------------------------------------------------------------------------------------------------------------ ResNet-50
class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 (He et al.; stride in the 3x3 convolution and names as torchvision) without its classifier."""

    arch, dim = "resnet50", 2048

    def __init__(self, image_size=224):
        super().__init__()
        self.config = {"image_size": image_size}
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
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

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))                         # (B, 2048, S/32, S/32)

    def features(self, images):
        x = self(images)
        return x.mean((2, 3)), x


# -------------------------------------------------------------------------------------------------------------- loading
def build_encoder(arch, image_size, drop_path=0.0, **config):
    """A fresh encoder by the name of --arch; config: other arguments of its constructor."""
    if arch == "resnet50":
        return ResNet50(image_size)
    return ViT(arch, image_size, drop_path=drop_path, **config)


def choose_encoder(args, default, drop_path=0.0):
    """The encoder that a training script's --init, --arch and --image-size ask for: from a file, or fresh, `default` without --arch.
    With --resume that of the run, whose --init may be gone."""
    own = Path(args.out) / "encoder.pt"
    source = own if args.resume and own.exists() else args.init
    if not source:
        return build_encoder(args.arch or default, args.image_size, drop_path)
    encoder = load_encoder(source, args.image_size, drop_path)
    if args.arch and args.arch != encoder.arch:
        raise ValueError(f"--arch {args.arch}, but {source} holds {encoder.arch}: leave --arch out")
    return encoder


def load_encoder(path, image_size=None, drop_path=0.0):
    """The encoder in a file: our encoder.pt, ViT weights of timm, MAE, DINO or iBOT, or ResNet-50 weights under torchvision's
    names (also as PeCLR and SiMHand publish them). Prefixes and heads are dropped; every weight of the trunk must be there.
    image_size: interpolates the position embedding to another input size. Returns the module, on the CPU, in eval mode.
    ValueError says what does not fit; nothing in the file is executed."""
    state = read_weights(path)
    if isinstance(state, dict) and state.get("kind") in ("mim", "contrastive", "mesh"):
        raise ValueError(f"{path} holds a whole run: give the encoder.pt beside it")
    ours = isinstance(state, dict) and {"arch", "config", "state_dict"} <= set(state)
    weights = trunk_weights(state)
    if ours:
        arch, config = state["arch"], dict(state["config"])
    elif "conv1.weight" in weights:
        arch, config = "resnet50", {"image_size": 224}
    elif {"pos_embed", "patch_embed.proj.weight", "cls_token"} <= set(weights):
        dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        if dim % 64 or dim > 1024:                                 # wider ones do not have 64 numbers a head
            raise ValueError(f"{path}: a ViT of width {dim}: how many heads it has is not known")
        config = {"dim": dim, "depth": depth, "heads": dim // 64, "patch": patch,
                  "image_size": patch * int((weights["pos_embed"].shape[1] - 1) ** 0.5)}
        arch = next((name for name, size in ARCHS.items() if size.get("dim") == dim and size["depth"] == depth), "vit")
    else:
        raise ValueError(f"{path}: neither a ViT nor a ResNet-50 (first names: {sorted(weights)[:3]})")
    config["image_size"] = image_size or config["image_size"]
    encoder = build_encoder(arch, drop_path=drop_path, **config)
    if arch != "resnet50":
        weights["pos_embed"] = resize_positions(weights["pos_embed"].float(), encoder.pos_embed.shape[1] - 1)
    wanted = encoder.state_dict()
    missing = sorted(name for name in wanted if name not in weights and not name.endswith("num_batches_tracked"))
    extra = sorted(name for name in weights if name not in wanted and name.startswith(("blocks.", "layer", "norm_pre", "reg_token")))
    wrong = sorted(name for name in wanted if name in weights and weights[name].shape != wanted[name].shape)
    if missing or wrong or extra:
        raise ValueError(f"{path}: not a plain {arch}: missing {missing[:4]}, other shapes {wrong[:4]}, unknown {extra[:4]}")
    encoder.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})
    return encoder.eval()


def read_weights(path):
    namespace = getattr(torch.serialization, "safe_globals", None)   # MAE and DINO store their argparse flags as well
    try:
        with namespace([argparse.Namespace]) if namespace else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such weight file") from None
    except Exception as error:                                     # a damaged file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no weight file of plain tensors ({reason[:120]})") from None


def trunk_weights(state):
    """Unwraps the usual containers and prefixes: {name as timm or torchvision has it: tensor}."""
    for key in ("state_dict", "model", "teacher", "student"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    weights = {}
    renamed = {f"features.{i}.": name for i, name in ((0, "conv1."), (1, "bn1."), *((4 + i, f"layer{i + 1}.") for i in range(4)))}
    for name, tensor in (state.items() if isinstance(state, dict) else ()):
        for prefix in ("module.", "backbone.", "encoder.", "backend_model.", "model."):
            name = name.removeprefix(prefix)
        for old, new in renamed.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        if isinstance(tensor, torch.Tensor):
            weights[name] = tensor
    return weights


# -------------------------------------------------------------------------------------------------- self-supervised heads
class PrototypeHead(nn.Module):
    """Inputs (...,D) -> logits (...,P), cosines to P prototypes: an MLP to 256 numbers, normalised, against normalised
    prototypes (bytedance/ibot models/head.py, whose weight-normed last layer of fixed magnitude is the same function)."""

    def __init__(self, dim, prototypes, width=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        self.mlp.apply(init_linear)

    def forward(self, x):
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class DistanceHead(nn.Module):
    """Point sets (B,2K) -> logits (B,P) = -|q - C|^2 / (0.2 K) for free prototypes C (ours: no free map between the points and
    the loss)."""

    def __init__(self, dim, prototypes):
        super().__init__()
        self.prototypes = nn.Parameter(0.4 * torch.randn(prototypes, dim))

    def forward(self, x):
        return -torch.cdist(x, self.prototypes) ** 2 / (0.1 * x.shape[-1])


class ProjectionHead(nn.Sequential):
    """Features (B,D) -> latents (B,128), 64 points for PeCLR (dahiyaaneesh/peclr src/models/unsupervised/simclr_model.py), standardised
    over the batch as at the end of SimCLR's own head (here ours): what all hands have in common would otherwise be turned by each view's
    theta and so be noise in every similarity, from which similar hands of other videos do not emerge."""

    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128, bias=False),
                         nn.BatchNorm1d(128, affine=False))


class KeypointHead(nn.Module):
    """Class token (B,D) -> K pseudo keypoints (B,K,2) in coordinates of the view. The bias spreads them over the middle of
    the view, so that the set is not degenerate before anything is learned (ours)."""

    def __init__(self, dim, keypoints):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * keypoints)
        spots = torch.arange(1, keypoints + 1)[:, None] * torch.tensor([0.7548777, 0.5698403])        # a low-discrepancy sequence
        init_linear(self.linear)
        with torch.no_grad():
            self.linear.bias.copy_((spots % 1 - 0.5).flatten())

    def forward(self, x):
        return self.linear(x).unflatten(-1, (-1, 2))


# ------------------------------------------------------------------------------------------------------------ mesh head
class MeshHead(nn.Module):
    """PyMAF's mesh-aligned feedback loop on MANO (HongwenZhang/PyMAF models/maf_extractor.py; hand branch of PyMAF-X).

    Iteration t samples the feature map F_t, first on a grid, then at the projected vertices of the last estimate, reduces
    every sample to 5 numbers and regresses a correction of the state: 16 rotations (6-D), 10 betas, camera. F_t doubles in
    resolution with t. Ours: GroupNorm instead of BatchNorm, which is the same function for any batch size and any number of
    processes; no dense auxiliary; a scale that is positive by construction.

    hand: callable (rotmats (B,16,3,3), betas (B,10)) -> vertices (B,778,3), joints (B,21,3) in metres, with `template` (778,3).
    channels: of the encoder's map, and `summary` of its class token or pooled features, which every iteration sees too (ours:
    the pose-aware class token is what pre-training makes; 0 leaves it out). `strides` True for a map of stride 32 (ResNet),
    which is upsampled once more.
    forward(map (B,C,h,w), summary (B,D)) -> list over t of dicts: rotmats, betas, camera (B,3) = scale, tx, ty; vertices and
    joints relative to the kinematic wrist; `points` (B,P,2), where the features were read, in [-1,1] of the view.
    """

    def __init__(self, hand, channels, summary=0, strides=False, iterations=3, width=256, mesh_points=195, grid=21, dropout=0.1):
        super().__init__()
        self.hand = hand
        self.config = {"channels": channels, "summary": summary, "strides": strides, "iterations": iterations, "width": width,
                       "mesh_points": mesh_points, "grid": grid, "dropout": dropout}
        first = deconv(channels, width) if strides else nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(32, width), nn.ReLU())
        self.maps = nn.ModuleList([first] + [deconv(width, width) for _ in range(iterations - 1)])
        counts = [grid * grid] + [mesh_points] * (iterations - 1)
        self.reduce = nn.ModuleList(PointReducer(width) for _ in counts)
        self.norm = nn.LayerNorm(summary) if summary else None
        self.regress = nn.ModuleList(Regressor(5 * count + summary, dropout) for count in counts)
        self.register_buffer("mesh_points", farthest_points(hand.template, mesh_points), persistent=False)
        line = torch.arange(grid) * 2 / (grid - 1) - 1
        self.register_buffer("grid_points", torch.cartesian_prod(line, line).flip(1), persistent=False)     # (441, 2) x, y
        self.register_buffer("mean_state", torch.cat([torch.eye(3)[:, :2].T.flatten().repeat(16), torch.zeros(13)]))
        self.register_buffer("mean_scale", torch.tensor(9.0))      # image units a metre in a view of 1.2 x the box

    def set_mean(self, rotmats, scale):
        """The state before the first iteration: rotmats (16,3,3), the training set's mean, and the mean scale."""
        self.mean_state[:96] = rotmats[:, :, :2].transpose(1, 2).reshape(96)
        self.mean_scale.fill_(scale)

    def forward(self, feature_map, summary=None):
        state = self.mean_state.expand(len(feature_map), -1)       # (B, 109)
        points = self.grid_points.expand(len(feature_map), -1, -1)
        outputs = []
        for make_map, reduce, regress in zip(self.maps, self.reduce, self.regress, strict=True):
            feature_map = make_map(feature_map)                    # F_t
            features = reduce(sample(feature_map, points))         # (B, 5 P)
            if self.norm is not None:
                features = torch.cat([features, self.norm(summary)], dim=1)
            with torch.autocast("cuda" if feature_map.is_cuda else "cpu", enabled=False):
                state = state.detach() + regress(features.float(), state.detach())
                output = self.decode(state) | {"points": points}
            points = output["camera"][:, None, :1] * (output["vertices"][:, self.mesh_points, :2] + output["camera"][:, None, 1:])
            points = points.detach()
            outputs.append(output)
        return outputs

    def decode(self, state):
        """State (B,109) -> rotations, shape, camera and the hand they make; fp32."""
        rotmats = rotmat_from_6d(state[:, :96].unflatten(1, (16, 6)))
        betas = state[:, 96:106]
        camera = torch.cat([self.mean_scale * state[:, 106:107].exp(), 0.1 * state[:, 107:]], dim=1)
        vertices, joints = self.hand(rotmats, betas)
        root = joints[:, :1]
        return {"rotmats": rotmats, "betas": betas, "camera": camera, "vertices": vertices - root, "joints": joints - root}


class PointReducer(nn.Module):
    """256 -> 128 -> 64 -> 5 for every point, the input concatenated again before the later layers (PyMAF).
    Ours: no ReLU at the end. With it, all five numbers of all points were zero after 400 steps from scratch, for good."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, 128), nn.Linear(width + 128, 64), nn.Linear(width + 64, 5)

    def forward(self, x):                                          # (B, P, C)
        y = F.leaky_relu(self.fc1(x), 0.01)
        y = F.leaky_relu(self.fc2(torch.cat([x, y], -1)), 0.01)
        return self.fc3(torch.cat([x, y], -1)).flatten(1)          # (B, 5 P)


class Regressor(nn.Module):
    """Features and state -> correction of the state. Ours: GELU between the layers, where PyMAF has nothing."""

    def __init__(self, features, dropout):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features + 109, 1024), nn.Linear(1024, 1024)
        self.heads = nn.ModuleList(nn.Linear(1024, n) for n in (96, 10, 3))
        self.dropout = nn.Dropout(dropout)
        for head in self.heads:
            nn.init.xavier_uniform_(head.weight, gain=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features, state):
        x = self.dropout(F.gelu(self.fc1(torch.cat([features, state], 1))))
        x = self.dropout(F.gelu(self.fc2(x)))
        return torch.cat([head(x) for head in self.heads], dim=1)  # (B, 109)


def deconv(channels, width):
    return nn.Sequential(nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False), nn.GroupNorm(32, width), nn.ReLU())


def sample(feature_map, points):
    """Map (B,C,h,w) read bilinearly at points (B,P,2) in [-1,1], +-1 the edges -> (B,P,C). Zero outside. In the points'
    precision: in bf16 they would be off by 0.05 pixels of a 56-pixel map."""
    return F.grid_sample(feature_map.to(points.dtype), points[:, :, None], align_corners=False)[..., 0].transpose(1, 2)


def farthest_points(points, count):
    """(count,) indices by farthest-point sampling, from the point farthest from the mean; ties to the lower index (ours)."""
    points = points.detach().double().cpu()
    chosen = [int((points - points.mean(0)).norm(dim=1).argmax())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def rotmat_from_6d(x):
    """(...,6) -> (...,3,3): two contiguous 3-vectors, made orthonormal, are the first two COLUMNS (Zhou et al.).
    Written here as well as in mano.py, so that either file can be copied alone; a test holds them equal."""
    a1, a2 = x[..., :3], x[..., 3:]
    b1 = F.normalize(a1, dim=-1)
    b2 = F.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2)], dim=-1)


class HandMesh(nn.Module):
    """Encoder and mesh head: normalised views (B,3,S,S) -> the head's list of estimates, the last is the answer."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images):
        summary, feature_map = self.encoder.features(images)
        return self.head(feature_map, summary)


def load_mesh(state, hand):
    """HandMesh in eval mode from a checkpoint of kind "mesh", with its averaged weights."""
    encoder = build_encoder(state["encoder"]["arch"], **state["encoder"]["config"])
    net = HandMesh(encoder, MeshHead(hand, **state["head"]))
    net.load_state_dict(state["ema"])
    return net.eval()
