"""Diffusion transformer, block by block: every block denoises images at its own noise levels.

y is the image (or a latent), scaled to standard deviation sigma_data; x its class label, which is dropped now
and then for guidance; z = y + sigma * eps.

    D_b(z, sigma, x) = c_skip z + c_out F_b(c_in z, c_noise, x)                      EDM preconditioning
    loss of block b  = E over sigma in its interval of  w(sigma) * mean over pixels of (D_b - y)^2

To generate, noise goes down the probability-flow ODE; each step runs the one block that owns its level, L/B
layers and not L. `EndToEnd` is the baseline: B = 1, one network for all levels, which is EDM on a DiT.

    python train.py --model dit --block all && python train.py --model dit --sample
"""
import importlib.util
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import LogNormal, euler, expand, heun, score_loss, send, split_layers

DATA = "images"  # what train.py has to load for this model
JUDGE = "vit"    # its baseline, trained on the same data, gives the features for the Frechet distance


@dataclass
class Config:
    n_layer: int = 6                # transformer layers of the whole model
    n_blocks: int = 3               # blocks it is cut into, each trained alone
    layer_split: str = ""           # layers of each block, e.g. 3,2,1; empty: the same number in each
    n_head: int = 4                 # attention heads
    n_embd: int = 96                # width
    n_mlp: int = 384                # hidden width of the MLP (DiT: 4 n_embd)
    n_cond: int = 96                # width of the embedding of noise level and label (DiT: n_embd)
    patch_size: int = 2             # pixels of a patch's side
    dropout: float = 0.0            # after attention and inside and after the MLP
    label_drop: float = 0.1         # how often the label is withheld in training, for guidance (paper)
    image_size: int = 0             # pixels of an image's side; 0: as in the data
    n_channel: int = 0              # 0: as in the data
    n_class: int = 0                # 0: as in the data
    data_mean: float = 0.0          # of the training pixels in [-1, 1]; set from the data
    data_std: float = 0.0           # their standard deviation; set from the data
    p_mean: float = -1.2            # mean of ln sigma in training (EDM)
    p_std: float = 1.2              # its standard deviation (EDM)
    sigma_min: float = 0.002        # lowest noise level (EDM)
    sigma_max: float = 80.0         # highest noise level (EDM)
    sigma_data: float = 0.5         # standard deviation that images are scaled to (EDM)
    gamma: float = 0.05             # overlap of neighbouring blocks in training (paper)
    edges: str = "probability"      # probability (paper), uniform in ln sigma, or all ends: 0.002,0.3,80
    weighting: str = "edm"          # of the squared error: edm (paper) or none


# A preset names fields of Config above, of Sampling below or of train.py's ImageTraining. The paper's shapes,
# batches, rates and lengths; EMA and flips are DiT's. Shorter runs than 90,000 updates average less: --help.
PAPER = dict(patch_size=2, batch_size=512, epochs=100.0, final_lr=1.0, warmup=0, beta2=0.999,
             weight_decay=0.0, ema=0.9999, guidance=2.0)
PRESETS = {
    "default": dict(steps=3000, batch_size=64, lr=2e-3, warmup=100, weight_decay=0.0, beta2=0.99,
                    ema=0.999),
    "cifar10": dict(PAPER, data="uoft-cs/cifar10", augment="flip", n_layer=12, n_blocks=3, n_head=6,
                    n_embd=384, n_mlp=1536, n_cond=384, lr=1e-4),
    # latents of the training images, N x 4 x 32 x 32, made with any VAE: see README, images
    "imagenet256": dict(PAPER, data="imagenet256.npz", n_layer=24, n_blocks=3, n_head=16, n_embd=1024,
                        n_mlp=4096, n_cond=1024, lr=5e-5),
}


@dataclass
class Sampling:
    classes: tuple = ()             # class numbers, a row of the picture each; none: the first ten
    n_images: int = 10              # images of each class in the picture
    guidance: float = 1.0           # classifier-free guidance scale; 1: none, and no second evaluation
    euler_steps: int = 50           # noise levels visited (paper: 50)
    heun: bool = False              # EDM's sampler: Heun's method on its own grid, twice the evaluations
    n_eval: int = 2000              # images that --eval generates from each model for the Frechet distance
    fid: bool = False               # with --eval: the standard FID, too, through torch-fidelity


# -----------------------------------------------------------------------------------------------------------
# The transformer layer

class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C): every token attends to all tokens."""
        qkv = self.query_key_value(x).unflatten(-1, (3, self.n_head, -1))    # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v)                          # (B, H, T, D)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))          # (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.hidden = nn.Linear(config.n_embd, config.n_mlp)
        self.out = nn.Linear(config.n_mlp, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        h = self.dropout(F.gelu(self.hidden(x), approximate="tanh"))
        return self.dropout(self.out(h))


class EncoderLayer(nn.Module):
    """Pre-norm layer without a causal order. Modulated, it is DiT's adaLN-Zero: the condition shifts, scales
    and gates both sub-layers, and gates start at 0."""

    def __init__(self, config, modulated=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=not modulated)
        self.attention = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=not modulated)
        self.mlp = FeedForward(config)
        if modulated:
            self.modulation = nn.Linear(config.n_cond, 6 * config.n_embd)

    def forward(self, x, cond=None):
        """x (B, T, C), cond (B, 1, n_cond) or None -> (B, T, C)."""
        if cond is None:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        # (B, 1, C) each
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def patches(x, size):
    """(B, K, H, W) -> (B, T, K * size * size): squares, row by row."""
    return F.unfold(x, size, stride=size).transpose(1, 2)


def unpatch(tokens, size, image_size):
    """(B, T, K * size * size) -> (B, K, H, W): the inverse of `patches`."""
    return F.fold(tokens.transpose(1, 2), image_size, size, stride=size)


def sincos_positions(n_side, dim):
    """(1, n_side * n_side, dim) fixed embeddings: sines and cosines of the row in one half, of the column in
    the other."""
    freq = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))                 # (C/4,)
    angle = torch.arange(n_side)[:, None] * freq                             # (S, C/4)
    one = torch.cat([angle.sin(), angle.cos()], dim=-1)                      # (S, C/2)
    rows = one[:, None].expand(-1, n_side, -1)                               # (S, S, C/2)
    return torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)[None]


class Condition(nn.Module):
    """Noise level and label -> (B, 1, n_cond): Fourier features through an MLP, plus the label's row."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("freq", torch.logspace(-1, 1.5, config.n_cond // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(config.n_cond, config.n_cond), nn.SiLU(),
                                 nn.Linear(config.n_cond, config.n_cond))
        self.label = nn.Embedding(config.n_class + 1, config.n_cond)  # the last row: no label

    def forward(self, c_noise, label):
        """c_noise (B,), label (B,), n_class where it is withheld."""
        angle = c_noise[:, None] * self.freq                                 # (B, n_cond / 2)
        level = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))      # (B, n_cond)
        return F.silu(level + self.label(label))[:, None]                    # (B, 1, n_cond)


def init_dit(net):
    """All initialisation: Xavier, modulations and last layer at zero (DiT); the condition at full size."""
    for name, p in net.named_parameters():
        if name.endswith("bias") or "modulation" in name or name.startswith("patch_out"):
            nn.init.zeros_(p)
        elif name == "condition.label.weight":
            nn.init.normal_(p)  # DiT's 0.02 is for long runs: at first neither label nor level would be seen
        elif name.startswith("condition"):
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            nn.init.xavier_uniform_(p)


# -----------------------------------------------------------------------------------------------------------
# One block of the model, and the baseline

def make_noise(config):
    """The Gaussian noise of a configuration. Raises ValueError for impossible ranges, edges or weightings."""
    names = "n_blocks p_mean p_std sigma_min sigma_max sigma_data gamma edges weighting"
    return LogNormal(**{name: getattr(config, name) for name in names.split()})


class Block(nn.Module):
    """Block b of the model: a complete denoiser for its own noise levels, sharing nothing with any other
    block."""

    def __init__(self, config, b):
        super().__init__()
        self.config, self.b, self.noise = config, b, make_noise(config)
        self.layer_range = split_layers(config.n_layer, config.n_blocks, config.layer_split)[b]
        n_pixel = config.n_channel * config.patch_size ** 2
        positions = sincos_positions(config.image_size // config.patch_size, config.n_embd)  # (1, T, C)
        self.register_buffer("position", positions, persistent=False)
        self.patch_in = nn.Linear(n_pixel, config.n_embd)
        self.condition = Condition(config)
        self.layers = nn.ModuleList(EncoderLayer(config, modulated=True) for _ in self.layer_range)
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        self.patch_out = nn.Linear(config.n_embd, n_pixel)
        init_dit(self)
        self.title = "block {}, sigma {:.3g} to {:.3g}".format(b, *self.noise.interval(b))

    def describe(self):
        c, layers, (lo, hi) = self.config, self.layer_range, self.noise.interval(self.b)
        wide_lo, wide_hi = self.noise.interval(self.b, overlap=True)
        return (f"block {self.b} of 0 to {c.n_blocks - 1}, layers {layers[0]} to {layers[-1]} of 0 to "
                f"{c.n_layer - 1}, sigma {lo:.4g} to {hi:.4g}, trained on {wide_lo:.4g} to {wide_hi:.4g}")

    def forward(self, z, sigma, label):
        """D(z, sigma, label) = E[y | z, label], of z's shape (B, K, H, W); sigma (B,), label (B,)."""
        c_skip, c_out, c_in, c_noise = self.noise.precondition(sigma)
        c_skip, c_out, c_in = (expand(c, z) for c in (c_skip, c_out, c_in))
        cond = self.condition(c_noise, label)                                # (B, 1, n_cond)
        h = self.patch_in(patches(c_in * z, self.config.patch_size)) + self.position         # (B, T, C)
        for layer in self.layers:
            h = layer(h, cond)                                               # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        f = self.patch_out(self.norm(h) * (1 + scale) + shift)               # (B, T, K * P * P)
        f = unpatch(f, self.config.patch_size, z.shape[2:])                  # (B, K, H, W)
        return c_skip * z + c_out * f.float()

    def denoise(self, z, sigma, label, guidance=1.0):
        """D with classifier-free guidance: D_none + guidance * (D_label - D_none), on all channels."""
        if guidance == 1:
            return self(z, sigma, label)
        none = torch.full_like(label, self.config.n_class)
        both = self(torch.cat([z, z]), torch.cat([sigma, sigma]), torch.cat([label, none]))  # (2B, K, H, W)
        given, withheld = both.chunk(2)
        return withheld + guidance * (given - withheld)

    def encode(self, images):
        """Images with pixels in [-1, 1] -> the space of y: mean 0, standard deviation sigma_data."""
        return (images - self.config.data_mean) * (self.config.sigma_data / self.config.data_std)

    def decode(self, y):
        """The inverse of `encode`."""
        return y * (self.config.data_std / self.config.sigma_data) + self.config.data_mean

    def loss(self, batch):
        """Score loss per pixel of this block alone; batch: images (B, K, H, W) in [-1, 1], labels (B,)."""
        y, label = self.encode(batch[0]), batch[1]
        if self.training:
            drop = send(torch.rand(len(y)), y.device) < self.config.label_drop   # (B,)
            label = label.masked_fill(drop, self.config.n_class)

        def error(z, sigma):
            return (self(z, sigma, label) - y).pow(2).flatten(1).mean(1)     # (B,)
        return score_loss(error, y, self.noise, self.b)


class EndToEnd(Block):
    """The baseline: one network of all layers for all noise levels. With one block's layers it is the
    control."""

    def __init__(self, config):
        # ends set by hand are those of several blocks
        edges = config.edges if config.edges in ("probability", "uniform") else "probability"
        super().__init__(replace(config, n_blocks=1, layer_split="", edges=edges), 0)
        self.title = f"end to end, {config.n_layer} layers"

    def describe(self):
        return f"{self.config.n_layer} layers, end to end"


def check(config):
    """Raises ValueError, in words for the user, if no network can be built from this configuration."""
    if min(config.n_layer, config.n_blocks, config.n_head, config.n_embd, config.n_mlp) < 1:
        raise ValueError("n_layer, n_blocks, n_head, n_embd and n_mlp must be at least 1")
    make_noise(config)
    split_layers(config.n_layer, config.n_blocks, config.layer_split)
    if config.n_embd % config.n_head or config.n_embd % 4:
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head} and of 4")
    if config.n_cond < 2 or config.n_cond % 2:
        raise ValueError("n_cond must be even and at least 2")
    if not 0 <= config.dropout < 1 or not 0 <= config.label_drop <= 1:
        raise ValueError("dropout must be at least 0 and below 1, label_drop from 0 to 1")
    if config.patch_size < 1 or config.image_size % config.patch_size:
        raise ValueError(f"patch_size {config.patch_size} must divide the images' side {config.image_size}")


def check_sampling(sampling):
    """Raises ValueError, in words for the user, for values that nothing can be sampled with."""
    if not all(c.isdecimal() for c in sampling.classes):
        raise ValueError("classes are numbers from 0, such as 3 7")
    if sampling.n_images < 1 or sampling.n_eval < 2 or sampling.euler_steps < 2:
        raise ValueError("n_images must be at least 1, n_eval and euler_steps at least 2")
    if not math.isfinite(sampling.guidance):
        raise ValueError("guidance must be a number; 1 is none")
    if sampling.fid and not all(map(importlib.util.find_spec, ("torch_fidelity", "torchvision"))):
        raise ValueError("the standard FID needs two packages: pip install torch-fidelity torchvision")


def control(config):
    """The control: one block's worth of layers, trained end to end. If the blocks do no better, depth was not
    used."""
    return EndToEnd(replace(config, n_layer=max(1, config.n_layer // config.n_blocks)))


# -----------------------------------------------------------------------------------------------------------
# Generation

@torch.no_grad()
def generate_images(nets, label, sampling):
    """Images (N, K, H, W) of the classes label (N,): pixels in [-1, 1], as bytes have them, or latents.

    nets: the list of blocks, or one EndToEnd. The starting noise comes from torch's CPU random stream."""
    blocks = nets if isinstance(nets, list) else [nets]
    net, config = blocks[0], blocks[0].config
    method, out = heun if sampling.heun else euler, []
    steps = (net.noise.edm_steps if sampling.heun else net.noise.steps)(sampling.euler_steps)
    for part in label.split(512):
        shape = (len(part), config.n_channel, config.image_size, config.image_size)
        z = steps[0].item() * torch.randn(shape).to(part.device)             # (N, K, H, W)

        def denoise(z, sigma):
            block = blocks[net.noise.block_of(sigma).item()]  # the one block that owns the level
            level = torch.full((len(z),), sigma.item(), device=z.device)     # (N,)
            return block.denoise(z, level, part, sampling.guidance)
        out.append(net.decode(method(denoise, z, steps)))
    images = torch.cat(out)
    if not images.isfinite().all():
        raise ValueError(f"what {net.title} and those below it generate is not finite; train again with a "
                         f"lower lr")
    return to_bytes(images).float() / 127.5 - 1 if config.n_channel in (1, 3) else images


def to_bytes(images):
    """Pixels in [-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture(images, n_columns):
    """(N, K, H, W) in [-1, 1] -> uint8 (height, width, 3): rows of n_columns images, small ones enlarged."""
    grow = max(1, 32 // images.shape[-1])
    images = to_bytes(images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1))
    images = F.pad(images.repeat_interleave(grow, 2).repeat_interleave(grow, 3), (1,) * 4)
    rows = images.unflatten(0, (-1, n_columns)).permute(0, 3, 1, 4, 2)       # (R, H, columns, W, 3)
    return rows.flatten(2, 3).flatten(0, 1).cpu()


def sample(nets, sampling, _=None):
    """{"sample": picture with a row per class}; of latents, the array, which a VAE of yours can decode."""
    net = nets[0] if isinstance(nets, list) else nets
    classes = [int(c) for c in sampling.classes] or list(range(min(10, net.config.n_class)))
    if max(classes) >= net.config.n_class:
        raise ValueError(f"no class {max(classes)}; the data has {net.config.n_class} classes, from 0")
    label = torch.tensor(classes, device=net.position.device).repeat_interleave(sampling.n_images)
    images = generate_images(nets, label, sampling)
    if net.config.n_channel not in (1, 3):
        return {"sample": images.cpu()}
    return {"sample": picture(images, sampling.n_images)}


# -----------------------------------------------------------------------------------------------------------
# Evaluation

def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric."""
    a, b = a.cpu().double(), b.cpu().double()
    mean = (a.mean(0) - b.mean(0)).pow(2).sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                            # (D, D) each
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                  # C_a^(1/2)
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * shared).item()


def standard_fid(real, images):
    """The FID of torch-fidelity between two sets of images (N, K, H, W) in [-1, 1]."""
    import torch_fidelity

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = to_bytes(images.expand(-1, 3, -1, -1)).cpu()

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]
    result = torch_fidelity.calculate_metrics(input1=Pictures(images), input2=Pictures(real), fid=True,
                                              cuda=images.is_cuda, verbose=False)
    return result["frechet_inception_distance"]


def batched(function, *tensors):
    """function(*tensors), computed for 500 examples at a time."""
    return torch.cat([function(*part) for part in zip(*(t.split(500) for t in tensors))])


@torch.no_grad()
def denoising_loss(nets, images, label, sigma):
    """Weighted squared error per pixel at one noise level (a float), with the same noise for every model."""
    block = nets[nets[0].noise.block_of(sigma)]
    y, level = block.encode(images), torch.full((len(images),), sigma, device=images.device)
    eps = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device)
    error = (batched(block, y + sigma * eps, level, label) - y).pow(2).flatten(1).mean(1)    # (N,)
    return (block.noise.weight(level) * error).mean().item()


def sampling_step(block, n):
    """A function that evaluates a block, or a baseline, once for n images, as a step of the sampler does."""
    c, device = block.config, block.position.device
    z = torch.randn(n, c.n_channel, c.image_size, c.image_size, device=device)
    sigma, label = torch.ones(n, device=device), torch.zeros(n, dtype=torch.long, device=device)
    return lambda: block(z, sigma, label)


@torch.no_grad()
def step_times(models, n=64, rounds=15):
    """{name: median milliseconds of one evaluation for n images}, interleaved, mean over a model's blocks."""
    times = {name: [[] for _ in nets] for name, nets in models.items()}
    for _ in range(rounds):
        for name, nets in models.items():
            for block, seconds in zip(nets, times[name]):
                evaluation = sampling_step(block, n)
                began = time.perf_counter()
                evaluation().sum().item()  # .item() waits for the device
                seconds.append(1000 * (time.perf_counter() - began))
    return {name: statistics.mean(map(statistics.median, each)) for name, each in times.items()}


def evaluate(blocks, end_to_end, control, data, sampling, judge=None):
    """(tables {title: {row: {column: value}}}, pictures {name: array}) of blocks, baseline and control (None:
    left out).

    The denoising loss is EDM-weighted and per pixel. The Frechet distance is between generated and held-out
    images on the features of `judge`, an end-to-end vit.py trained on the same data (None: left out)."""
    noise, config = blocks[0].noise, blocks[0].config
    models = {"blocks": blocks, "baseline": [end_to_end], "control": [control]}
    models = {name: nets for name, nets in models.items() if nets[0] is not None}
    if sampling.fid and config.n_channel not in (1, 3):
        raise ValueError("the standard FID is of pixels; of latents there is none: decode them first")
    held, held_label = data.held_out(1000, config)
    tables = {"denoising loss by noise level": {}, "denoising loss by block": {}}
    for b in range(config.n_blocks):
        lo, hi = noise.cdf(noise.interval(b)).tolist()
        rows = [noise.icdf(lo + (i + 0.5) / 4 * (hi - lo)).item() for i in range(4)]
        rows = {f"sigma {s:.4g}": {"block": b} | {name: denoising_loss(nets, held, held_label, s)
                                                  for name, nets in models.items()} for s in rows}
        tables["denoising loss by noise level"] |= rows
        tables["denoising loss by block"][f"block {b}"] = {
            name: statistics.mean(row[name] for row in rows.values()) for name in models}
    pictures, start = {}, torch.get_rng_state()
    for name, nets in models.items():
        torch.set_rng_state(start)  # the same starting noise for all
        pictures[f"eval_{name}"] = sample(nets, sampling)["sample"]
    torch.set_rng_state(start)
    tables["generated images"] = score_images(models, data, sampling, judge)
    times = step_times(models)
    tables["one evaluation of 64 images"] = {name: {"ms": ms} for name, ms in times.items()}
    for name, row in tables["one evaluation of 64 images"].items():
        if end_to_end is not None:
            row["of the baseline's, %"] = 100 * row["ms"] / times["baseline"]
    return tables, pictures


@torch.no_grad()
def score_images(models, data, sampling, judge):
    """Table of what each model generates, without guidance and with that of `sampling`."""
    config = models["blocks"][0].config
    held, _ = data.held_out(0, config)
    label = torch.arange(sampling.n_eval, device=held.device) % config.n_class
    distance, rows, start = "Frechet distance, features of our ViT", {}, torch.get_rng_state()
    if judge is not None:
        if len(held) < 2:
            raise ValueError("one held-out image has no covariance; hold out more for the Frechet distance")
        of_held = batched(judge.features, held)                              # (M, D)
        real, _ = data.fixed("train", len(label))
        rows["training images"] = {distance: frechet_distance(batched(judge.features, real), of_held)}
    for name, nets in models.items():
        for guidance in sorted({1.0, sampling.guidance}):
            torch.set_rng_state(start)  # the same starting noise for all
            began = time.time()
            images = generate_images(nets, label, replace(sampling, guidance=guidance))
            row = rows[f"{name}, guidance {guidance:g}"] = {
                "seconds per image": (time.time() - began) / len(images)}
            if judge is not None:
                row[distance] = frechet_distance(batched(judge.features, images), of_held)
                row["judged to be of its class, %"] = 100 * (
                    (batched(judge, images).argmax(-1) == label).float().mean().item())
            if sampling.fid:
                try:
                    fid = standard_fid(held, images)
                except Exception as e:  # its weights come over the network; the other figures are kept
                    fid = f"failed: {type(e).__name__}: {e}"[:80]
                row[f"FID, {len(images)} against {len(held)} held out"] = fid
    return rows
