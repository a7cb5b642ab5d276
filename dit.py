"""Diffusion transformer, block by block: every block denoises images at its own noise levels.

y is the image (or a latent), scaled to standard deviation sigma_data; x its class label, which is dropped now
and then for guidance; z = y + sigma * eps.

    D_b(z, sigma, x) = c_skip z + c_out F_b(c_in z, c_noise, x)                      EDM preconditioning
    loss of block b  = E over sigma in its interval of  w(sigma) * mean over pixels of (D_b - y)^2

To generate, noise goes down the probability-flow ODE. Each step runs the one block that owns its level: L/B
layers, not L. `EndToEnd` is the baseline: B = 1, one network for all levels, which is EDM on a DiT.
"""
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import (LogNormal, euler, expand, largest_block, require, require_finite, score_loss,
                              split_layers)

DATA = "images"  # the module of data/ that this model is trained on


@dataclass
class Config:
    n_layer: int = 6            # transformer layers of the whole model
    layer_split: str = ""       # layers of each block, e.g. 3,2,1; empty: the same number in each
    n_head: int = 4             # attention heads
    n_embd: int = 96            # width
    n_mlp: int = 384            # hidden width of the MLP (DiT: 4 n_embd)
    n_cond: int = 96            # width of the embedding of noise level and label (DiT: n_embd)
    patch_size: int = 2         # pixels of a patch's side
    dropout: float = 0.0        # after attention and inside and after the MLP
    label_drop: float = 0.1     # how often the label is withheld in training, for guidance (paper)
    image_size: int = 0         # pixels of an image's side; this and the next four are set from the data
    n_channel: int = 0          # colours
    n_class: int = 0            # classes
    data_mean: float = 0.0      # of the training pixels in [-1, 1]
    data_std: float = 1.0       # their standard deviation
    noise: LogNormal = field(default_factory=lambda: LogNormal(n_blocks=3, weighting="edm"))

    def __post_init__(self):
        require_finite(self)
        split_layers(self.n_layer, self.noise.n_blocks, self.layer_split)
        require(self.n_head >= 1, "n_head must be at least 1", self.n_head)
        require(self.n_embd >= 1 and self.n_embd % self.n_head == 0 and self.n_embd % 4 == 0,
                f"n_embd must be a multiple of n_head {self.n_head} and of 4", self.n_embd)
        require(self.n_cond >= 2 and self.n_cond % 2 == 0, "n_cond must be even and above 0", self.n_cond)
        require(0 <= self.dropout < 1, "dropout must be at least 0 and below 1", self.dropout)
        require(0 <= self.label_drop <= 1, "label_drop must be from 0 to 1", self.label_drop)
        require(self.patch_size >= 1 and self.image_size % self.patch_size == 0,
                f"patch_size must divide the images' side {self.image_size}", self.patch_size)

    def control(self):
        """The Config of the control: as many layers as the largest block has, trained end to end. Blocks that are
        no better than it have made no use of the other layers."""
        n_layer = largest_block(self.n_layer, self.noise.n_blocks, self.layer_split)
        noise = replace(self.noise, n_blocks=1, edges="probability")
        return replace(self, n_layer=n_layer, layer_split="", noise=noise)


# A preset names fields of Config, its noise, Sampling, the data's settings or train.py's Training. The
# paper's shapes, batches, rates and lengths; EMA and flips are DiT's.
PAPER = dict(patch_size=2, batch_size=512, epochs=100.0, final_lr=1.0, warmup=0, beta2=0.999,
             weight_decay=0.0, ema=0.9999, guidance=2.0)
PRESETS = {
    "default": dict(steps=3000, batch_size=64, lr=2e-3, warmup=100, weight_decay=0.0, beta2=0.99, ema=0.999),
    "cpu": dict(steps=6000, data="uoft-cs/cifar10", augment="flip", n_embd=128, n_mlp=512, patch_size=4,
                n_cond=128, batch_size=64, lr=2e-3, warmup=100, weight_decay=0.0, beta2=0.99, ema=0.999),
    "cifar10": dict(PAPER, data="uoft-cs/cifar10", augment="flip", n_layer=12, n_blocks=3, n_head=6,
                    n_embd=384, n_mlp=1536, n_cond=384, lr=1e-4),
    # latents of the training images, N x 4 x 32 x 32, made with any VAE
    "imagenet256": dict(PAPER, data="imagenet256.npz", n_layer=24, n_blocks=3, n_head=16, n_embd=1024,
                        n_mlp=4096, n_cond=1024, lr=5e-5),
}


@dataclass
class Sampling:
    classes: tuple = ()         # names or numbers of classes, a row of the picture each; none: the first ten
    n_images: int = 10          # images of each class in the picture
    guidance: float = 1.0       # classifier-free guidance scale; 1: none, and no second evaluation
    euler_steps: int = 50       # noise levels visited (paper: 50)

    def __post_init__(self):
        require_finite(self)
        require(math.isfinite(self.guidance), "guidance must be a number", self.guidance)
        require(self.n_images >= 1, "n_images must be at least 1", self.n_images)
        require(self.euler_steps >= 2, "euler_steps must be at least 2", self.euler_steps)


# ---- The transformer layer --------------------------------------------------------------------------------

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


class DiTLayer(nn.Module):
    """Pre-norm layer without a causal order. The condition shifts, scales and gates both sub-layers
    (adaLN-Zero): the gates start at 0, as DiT's."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.mlp = FeedForward(config)
        self.modulation = nn.Linear(config.n_cond, 6 * config.n_embd)

    def forward(self, x, cond):
        """x (B, T, C), cond (B, 1, n_cond) -> (B, T, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def patches(x, size):
    """(B, K, H, W) -> (B, T, K * size * size): squares, row by row."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))              # (B, K, H/P, P, W/P, P)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)          # (B, T, K * P * P)


def unpatch(tokens, size, n_side):
    """(B, T, K * size * size) -> (B, K, n_side, n_side): the inverse of `patches`."""
    x = tokens.unflatten(2, (-1, size, size)).unflatten(1, (n_side // size, -1))  # (B, H/P, W/P, K, P, P)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)                   # (B, K, H, W)


def sincos_positions(n_side, dim):
    """(1, n_side * n_side, dim) fixed embeddings: sines and cosines of the row, then of the column."""
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
        self.mlp = nn.Sequential(
            nn.Linear(config.n_cond, config.n_cond), nn.SiLU(),
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


# ---- One block of the model, and the baseline -------------------------------------------------------------

class Block(nn.Module):
    """Block b: a complete denoiser for its own noise levels. It shares nothing with any other block."""

    def __init__(self, config, b):
        super().__init__()
        self.config, self.b, self.noise = config, b, config.noise
        layers = split_layers(config.n_layer, config.noise.n_blocks, config.layer_split)[b]
        n_pixel = config.n_channel * config.patch_size ** 2
        positions = sincos_positions(config.image_size // config.patch_size, config.n_embd)  # (1, T, C)
        self.register_buffer("position", positions, persistent=False)
        self.patch_in = nn.Linear(n_pixel, config.n_embd)
        self.condition = Condition(config)
        self.layers = nn.ModuleList(DiTLayer(config) for _ in layers)
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        self.patch_out = nn.Linear(config.n_embd, n_pixel)
        init_dit(self)
        self.title = "layers {} to {} of {}, sigma {:.3g} to {:.3g}".format(
            layers[0], layers[-1], config.n_layer, *self.noise.interval(b))

    def denoise(self, z, sigma, label):
        """D(z, sigma, label) = E[y | z, label], of z's shape (B, K, H, W); sigma (B,), label (B,)."""
        c_skip, c_out = self.noise.output_scales(sigma)
        c_in, c_noise = self.noise.input_scales(sigma)
        c_skip, c_out, c_in = (expand(c, z) for c in (c_skip, c_out, c_in))  # (B, 1, 1, 1) each
        cond = self.condition(c_noise, label)                                # (B, 1, n_cond)
        h = self.patch_in(patches(c_in * z, self.config.patch_size)) + self.position         # (B, T, C)
        for layer in self.layers:
            h = layer(h, cond)                                               # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        f = self.patch_out(self.norm(h) * (1 + scale) + shift)               # (B, T, K * P * P)
        f = unpatch(f, self.config.patch_size, z.shape[3])                   # (B, K, H, W)
        # where there is little noise this is nearly z, where there is much what the network says; its output has the
        # same size at every level, so that no level rules the gradients (EDM)
        return c_skip * z + c_out * f.float()

    def encode(self, images):
        """Images with pixels in [-1, 1] -> the space of y: mean 0, standard deviation sigma_data."""
        return (images - self.config.data_mean) * (self.noise.sigma_data / self.config.data_std)

    def decode(self, y):
        """The inverse of `encode`."""
        return y * (self.config.data_std / self.noise.sigma_data) + self.config.data_mean

    def forward(self, batch):
        """The score loss per pixel of this block; batch: images (B, K, H, W) in [-1, 1], labels (B,)."""
        images, label = batch
        y = self.encode(images)                                              # (B, K, H, W)
        if self.training:
            drop = torch.rand(len(y), device=y.device) < self.config.label_drop              # (B,)
            label = label.masked_fill(drop, self.config.n_class)
        sigma = self.noise.sample(self.b, len(y), y.device)                  # (B,)
        z = self.noise.corrupt(y, sigma)                                     # (B, K, H, W)
        guess = self.denoise(z, sigma, label)                                # (B, K, H, W)
        error = (guess - y).pow(2).flatten(1).mean(1)                        # (B,)
        return score_loss(error, sigma, self.noise)


class EndToEnd(Block):
    """The baseline: all layers, for all noise levels. EndToEnd(config.control()) is the control."""

    def __init__(self, config):
        noise = replace(config.noise, n_blocks=1, edges="probability")       # all levels
        super().__init__(replace(config, layer_split="", noise=noise), 0)
        self.title = f"{config.n_layer} layers, trained end to end"


# ---- Generation and evaluation ----------------------------------------------------------------------------

@torch.no_grad()
def generate_images(nets, label, euler_steps=50, guidance=1.0):
    """Images (N, K, H, W) of the classes label (N,): pixels in [-1, 1], rounded to bytes, or latents.

    nets: the list of blocks, or one EndToEnd. The starting noise comes from torch's CPU random stream."""
    blocks = nets if isinstance(nets, list) else [nets]
    config, noise = blocks[0].config, blocks[0].noise
    out = []
    for some in label.split(512):

        def denoise(z, sigma):
            block = blocks[noise.block_of(sigma)]  # a step runs the one block that owns its level
            level = torch.full((len(z),), sigma, device=z.device)            # (N,)
            d = block.denoise(z, level, some)                                # (N, K, H, W)
            if guidance == 1:
                return d
            withheld = block.denoise(z, level, torch.full_like(some, config.n_class))
            return withheld + guidance * (d - withheld)  # classifier-free guidance, on all channels
        z = torch.randn(len(some), config.n_channel, config.image_size, config.image_size)
        z = noise.sigma_max * z.to(some.device)                              # (N, K, H, W)
        out.append(blocks[0].decode(euler(denoise, z, noise.steps(euler_steps))))
    images = torch.cat(out)                                                  # (N, K, H, W)
    if not images.isfinite().all():
        raise ValueError("a generated image is not finite; train again with a lower lr")
    if config.n_channel in (1, 3):
        return to_bytes(images).float() / 127.5 - 1
    return images


def to_bytes(images):
    """Pixels in [-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture(images, n_columns):
    """(N, K, H, W) in [-1, 1] -> uint8 (height, width, 3): rows of n_columns images, small ones enlarged."""
    grow = max(1, 32 // images.shape[-1])
    images = to_bytes(images.expand(-1, 3, -1, -1))                          # (N, 3, H, W)
    images = F.pad(images.repeat_interleave(grow, 2).repeat_interleave(grow, 3), (1,) * 4)
    rows = images.unflatten(0, (-1, n_columns)).permute(0, 3, 1, 4, 2)       # (R, H, columns, W, 3)
    return rows.flatten(2, 3).flatten(0, 1).cpu()


def class_number(word, names):
    """The number of a class that is given by its name, or else by its number from 0."""
    word = str(word)
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise ValueError(f"no class {word!r}; --classes takes names, such as {names[0]!r}, or numbers from 0 to "
                     f"{len(names) - 1}")


def sample(nets, sampling, data=None):
    """{"sample": picture with a row per class}; of latents, the array, which a VAE of yours can decode."""
    net = nets[0] if isinstance(nets, list) else nets
    if data is None:
        names = [str(c) for c in range(net.config.n_class)]
    else:
        names = data.class_names(net.config.n_class)
    classes = [class_number(word, names) for word in sampling.classes]
    if not classes:
        classes = list(range(min(10, len(names))))
    print("a row each:", ", ".join(f"class {c} ({names[c]})" for c in classes), flush=True)
    label = torch.tensor(classes, device=net.position.device).repeat_interleave(sampling.n_images)
    images = generate_images(nets, label, sampling.euler_steps, sampling.guidance)
    pixels = net.config.n_channel in (1, 3)
    return {"sample": picture(images, sampling.n_images) if pixels else images.cpu()}


@torch.no_grad()
def denoising_loss(nets, images, label, sigma):
    """Weighted squared error per pixel of sigma's owner (a float), with the same noise for all models."""
    block = nets[nets[0].noise.block_of(sigma)]
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for y, some in zip(block.encode(images).split(500), label.split(500)):   # (B, K, H, W), (B,)
        level = torch.full((len(y),), sigma, device=y.device)                # (B,)
        z = y + sigma * torch.randn(y.shape, generator=generator).to(y.device)
        guess = block.denoise(z, level, some)                                # (B, K, H, W)
        error = (guess - y).pow(2).flatten(1).mean(1)                        # (B,)
        total += error.sum().item()
    return block.noise.weight(torch.tensor(sigma)).item() * total / len(images)


def evaluate(blocks, others, data, n_levels=24):
    """Tables {title: {row: {column: value}}} of the blocks and of others {"end to end": net, "control": net}:
    the loss on held-out images, the mean over all levels, and over those that each block owns."""
    noise = blocks[0].noise
    models = {name: [net] for name, net in others.items()} | {"blocks": blocks}
    images, label = data.held_out(1000, blocks[0].config)
    # levels that are equally likely in training end to end; unlike there, the label is always given
    sigmas = noise.icdf([(i + 0.5) / n_levels for i in range(n_levels)]).tolist()
    owners = [noise.block_of(sigma) for sigma in sigmas]
    scored = sorted(set(owners))  # a narrow interval may hold none of the levels: it has no row
    rows = {}
    by_block = {f"block {b}": {} for b in scored}
    for name, nets in models.items():
        losses = [denoising_loss(nets, images, label, sigma) for sigma in sigmas]
        rows[name] = {"weighted squared error": sum(losses) / n_levels}
        for b in scored:
            of_block = [loss for owner, loss in zip(owners, losses) if owner == b]
            by_block[f"block {b}"][name] = sum(of_block) / len(of_block)
        print(f"scored {name}", flush=True)
    return {"denoising loss on held-out images": rows, "denoising loss by block": by_block}
