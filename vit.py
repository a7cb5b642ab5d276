"""Vision transformer, block by block: every block denoises the embedding of an image's label.

x is the image, cut into patches; y the fixed unit-norm embedding E of its label, and z = y + sigma * eps is
one token, in the place of CLS. A block runs patches and noisy label through its own layers, modulated by the
noise level (adaLN), and reads the label from that token.

    loss of block b = E over sigma in its interval of  CE(prior_b(x, z, sigma) + z @ E^T / sigma^2, label)

To classify, start from z = 0 (or from noise) and let the blocks move z towards a row of E. `EndToEnd` is the
baseline: a plain pre-norm ViT with CLS, cross-entropy, no noise.

    python train.py --model vit --block all
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import (LogNormal, bayes_logits, bound_ends, bound_share, edm_logits, euler, score_loss,
                              split_layers, target_table)

DATA = "images"  # what train.py has to load for this model


@dataclass
class Config:
    n_layer: int = 6                # transformer layers of the whole model
    n_blocks: int = 3               # blocks it is cut into, each trained alone
    layer_split: str = ""           # layers of each block, e.g. 3,2,1; empty: the same number in each
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # width, and the dimension of the target embedding
    n_mlp: int = 256                # hidden width of the MLP (released code: 3072, whatever the width)
    n_cond: int = 32                # width of the noise-level embedding (released code: n_embd / 6)
    patch_size: int = 2             # pixels of a patch's side
    dropout: float = 0.0            # after attention and inside and after the MLP (paper: 0.1)
    image_size: int = 0             # pixels of an image's side; 0: as in the data
    n_channel: int = 0              # 0: as in the data
    n_class: int = 0                # 0: as in the data
    data_mean: float = 0.0          # of the training pixels in [-1, 1]; set from the data
    data_std: float = 0.0           # their standard deviation; set from the data
    readout: str = "bayes"          # bayes: prior + z.E/sigma^2; edm: the paper's, c_skip z + c_out F
    p_mean: float = -1.2            # mean of ln sigma in training (EDM)
    p_std: float = 1.2              # its standard deviation (EDM)
    sigma_min: float = 0.002        # lowest noise level (EDM)
    sigma_max: float = 80.0         # highest noise level (EDM)
    sigma_data: float = 0.5         # EDM's; scales z at the input (and the edm readout)
    gamma: float = 0.05             # overlap of neighbouring blocks in training (paper)
    edges: str = "probability"      # probability (paper), uniform in ln sigma, or all ends: 0.002,0.3,80
    weighting: str = "none"         # of the cross-entropy: none (in effect the released code's) or edm
    z_rate: float = 0.1             # scale of z's zero-initialised way in: in effect its learning rate
    table_seed: int = 0             # seed of the target embedding; the same in every block


# A preset names fields of Config above or of train.py's ImageTraining. cifar100 follows the paper and the
# heavy recipe of the released code; warm-up is 10 epochs of 391 updates. What the paper does not say of
# Tiny-ImageNet (heads, MLP, dropout, augmentation, warm-up) is taken over from cifar100 or from ViT-B.
PAPER = dict(dropout=0.1, n_mlp=3072, patch_size=4, augment="crop,flip,rand", beta2=0.999, weight_decay=0.01,
             final_lr=0.1)
PRESETS = {
    "default": dict(steps=1500, batch_size=64, lr=2e-3, warmup=100, weight_decay=0.5),
    "cifar100": dict(PAPER, data="uoft-cs/cifar100", n_layer=12, n_blocks=3, n_head=4, n_embd=128, n_cond=22,
                     batch_size=128, epochs=500.0, lr=5e-4, warmup=3910),
    "tiny-imagenet": dict(PAPER, data="zh-plus/tiny-imagenet", n_layer=12, n_blocks=2, n_head=12, n_embd=768,
                          n_cond=128, batch_size=256, epochs=100.0, lr=1e-4, warmup=3910),
}


@dataclass
class Sampling:
    n_images: int = 10              # held-out images that --sample classifies
    temperature: float = 0.0        # scale of the starting noise; 0: deterministic, the most probable label
    n_draws: int = 8                # starting noises that --eval averages over
    euler_steps: int = 0            # noise levels visited for each image; 0: max(n_blocks + 1, 4)


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


class PatchEmbedding(nn.Module):
    """Standardised patches through one linear layer, plus a learned position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n_patch = (config.image_size // config.patch_size) ** 2
        self.linear = nn.Linear(config.n_channel * config.patch_size ** 2, config.n_embd)
        self.position = nn.Parameter(torch.empty(1, n_patch, config.n_embd))

    def forward(self, x):
        """x (B, K, H, W), pixels in [-1, 1] -> (B, T, C)."""
        x = (x - self.config.data_mean) / self.config.data_std
        return self.linear(patches(x, self.config.patch_size)) + self.position


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, 1, n_cond): Fourier features, then a two-layer MLP."""

    def __init__(self, n_cond):
        super().__init__()
        self.register_buffer("freq", torch.logspace(-1, 1.5, n_cond // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(n_cond, n_cond), nn.SiLU(), nn.Linear(n_cond, n_cond), nn.SiLU())

    def forward(self, c_noise):
        angle = c_noise[:, None, None] * self.freq                        # (B, 1, n_cond / 2)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))    # (B, 1, n_cond)


def init_fan_in(net):
    """All initialisation: N(0, 1 / fan-in), residual outputs smaller by sqrt(2 layers); z and noise enter at
    zero."""
    for name, p in net.named_parameters():
        if name == "scale_weight":
            nn.init.constant_(p, 16.0)  # of the edm readout: between unit vectors alone no softmax is sharp
        elif p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)   # norm weights are 1
        elif p.dim() == 3:
            nn.init.normal_(p)  # positions, as large as patches: at std 0.02 they are learned late, if at all
        elif "modulation" in name or name.startswith("z_in"):
            nn.init.zeros_(p)   # adaLN-Zero; and z must earn its way in
        else:
            depth = 2 * len(net.layers) if name.endswith("out.weight") else 1
            nn.init.normal_(p, std=(p.shape[1] * depth) ** -0.5)


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
        self.embed = PatchEmbedding(config)
        self.token = nn.Parameter(torch.empty(1, 1, config.n_embd))  # in the place of CLS; z is added to it
        self.z_in = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        self.layers = nn.ModuleList(EncoderLayer(config, modulated=True) for _ in self.layer_range)
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        bayes = config.readout == "bayes"
        self.head = nn.Linear(config.n_embd, config.n_class if bayes else config.n_embd)
        if not bayes:
            self.scale_weight = nn.Parameter(torch.empty(1))
        table = target_table(config.n_class, config.n_embd, config.table_seed)  # (V, C)
        self.register_buffer("table", table, persistent=False)
        init_fan_in(self)
        self.title = "block {}, sigma {:.3g} to {:.3g}".format(b, *self.noise.interval(b))

    def describe(self):
        c, layers, (lo, hi) = self.config, self.layer_range, self.noise.interval(self.b)
        wide_lo, wide_hi = self.noise.interval(self.b, overlap=True)
        return (f"block {self.b} of 0 to {c.n_blocks - 1}, layers {layers[0]} to {layers[-1]} of 0 to "
                f"{c.n_layer - 1}, sigma {lo:.4g} to {hi:.4g}, trained on {wide_lo:.4g} to {wide_hi:.4g}")

    def logits(self, x, z, sigma):
        """Logits (B, V) of the label of images x (B, K, H, W), given z (B, C) and sigma (B,)."""
        _, _, c_in, c_noise = self.noise.precondition(sigma)
        cond = self.noise_embedding(c_noise)                                 # (B, 1, n_cond)
        token = self.token + self.config.z_rate * self.z_in(c_in[:, None] * z)[:, None]      # (B, 1, C)
        h = torch.cat([token, self.embed(x)], dim=1)                         # (B, 1 + T, C)
        for layer in self.layers:
            h = layer(h, cond)                                               # (B, 1 + T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        f = self.head(self.norm(h[:, :1]) * (1 + scale) + shift)[:, 0]       # (B, V), or (B, C) for edm
        if self.config.readout == "bayes":
            return bayes_logits(f, z, sigma, self.table)
        return edm_logits(f, z, sigma, self.table, self.noise, self.scale_weight)

    def denoise(self, x, z, sigma):
        """D(z, sigma, x) = E[y | z, x] (B, C): the expected embedding of the label."""
        return self.logits(x, z, sigma).softmax(-1) @ self.table

    def loss(self, batch):
        """Score loss in nats of this block alone; batch: images (B, K, H, W) in [-1, 1], labels (B,)."""
        x, label = batch

        def error(z, sigma):
            return F.cross_entropy(self.logits(x, z, sigma), label, reduction="none")        # (B,)
        return score_loss(error, self.table[label], self.noise, self.b)


class EndToEnd(nn.Module):
    """The baseline: all layers, backpropagation through all of them. With one block's layers it is the
    control."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = PatchEmbedding(config)
        self.token = nn.Parameter(torch.empty(1, 1, config.n_embd))          # CLS
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.n_class)
        init_fan_in(self)
        self.title = f"end to end, {config.n_layer} layers"

    def describe(self):
        return f"{self.config.n_layer} layers, end to end"

    def features(self, x):
        """What the head reads, (B, C), of images x (B, K, H, W) in [-1, 1]."""
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1)             # (B, 1 + T, C)
        for layer in self.layers:
            h = layer(h)                                                     # (B, 1 + T, C)
        return self.norm(h[:, 0])                                            # (B, C)

    def forward(self, x):
        """Logits (B, V) of the label of images x (B, K, H, W) in [-1, 1]."""
        return self.head(self.features(x)).float()

    def loss(self, batch):
        """Cross-entropy in nats; batch: images (B, K, H, W) in [-1, 1], labels (B,)."""
        return F.cross_entropy(self(batch[0]), batch[1])


def check(config):
    """Raises ValueError, in words for the user, if no network can be built from this configuration."""
    if min(config.n_layer, config.n_blocks, config.n_head, config.n_embd, config.n_mlp) < 1:
        raise ValueError("n_layer, n_blocks, n_head, n_embd and n_mlp must be at least 1")
    make_noise(config)
    split_layers(config.n_layer, config.n_blocks, config.layer_split)
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
    if config.n_cond < 2 or config.n_cond % 2 or not 0 <= config.dropout < 1:
        raise ValueError("n_cond must be even and at least 2, dropout at least 0 and below 1")
    if config.patch_size < 1 or config.image_size % config.patch_size:
        raise ValueError(f"patch_size {config.patch_size} must divide the images' side {config.image_size}")
    if config.readout not in ("bayes", "edm"):
        raise ValueError(f"unknown readout {config.readout!r}; choose bayes or edm")


def check_sampling(sampling):
    """Raises ValueError, in words for the user, for values that nothing can be sampled with."""
    if sampling.n_images < 1 or sampling.n_draws < 1 or sampling.temperature < 0:
        raise ValueError("n_images and n_draws must be at least 1, temperature not negative")
    if sampling.euler_steps < 0 or sampling.euler_steps == 1:
        raise ValueError("euler_steps must be 0, for the default, or at least 2")


def control(config):
    """The control: one block's worth of layers, trained end to end. If the blocks do no better, depth was not
    used."""
    return EndToEnd(replace(config, n_layer=max(1, config.n_layer // config.n_blocks)))


# -----------------------------------------------------------------------------------------------------------
# Classification

@torch.no_grad()
def denoise_labels(blocks, x, z, steps):
    """[D (B, C)], the denoised label embedding after every level of `steps`, of images x, from z (B, C)."""
    seen = []

    def denoise(z, sigma):
        block = blocks[blocks[0].noise.block_of(sigma).item()]  # the one block that owns the level
        seen.append(block.denoise(x, z, torch.full((len(x),), sigma.item(), device=x.device)))
        return seen[-1]
    euler(denoise, z, steps)
    return seen


def sampling_step(net, n):
    """A function that evaluates a block, or a baseline, once for n images, as a level of the chain does."""
    c, device = net.config, net.token.device
    x = torch.randn(n, c.n_channel, c.image_size, c.image_size, device=device)
    if isinstance(net, EndToEnd):
        return lambda: net(x)
    z, sigma = torch.randn(n, c.n_embd, device=device), torch.ones(n, device=device)
    return lambda: net.denoise(x, z, sigma)


def levels(blocks, sampling):
    """The sampler's grid: sigmas from the highest to the lowest."""
    return blocks[0].noise.steps(sampling.euler_steps or max(len(blocks) + 1, 4))


def sample(nets, sampling, load):
    """Held-out images of the data that load() gives, classified, as one printable text: the label after every
    level beside the true one."""
    net, data = nets[0] if isinstance(nets, list) else nets, load()
    x, label = data.held_out(sampling.n_images, net.config)
    if isinstance(nets, list):
        steps = levels(nets, sampling)
        z = sampling.temperature * steps[0].item() * torch.randn(len(x), net.config.n_embd).to(x.device)
        said = [(d @ net.table.T).argmax(-1) for d in denoise_labels(nets, x, z, steps)]
        heads = [f"sigma {s:.3g}" for s in steps.tolist()]
    else:
        with torch.no_grad():
            said, heads = [net(x).argmax(-1)], [net.title]
    rows = [["held-out image", "truth", *heads]]
    rows += [[str(i), *(data.names[n] for n in (label[i], *(s[i] for s in said)))] for i in range(len(x))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


# -----------------------------------------------------------------------------------------------------------
# Evaluation

def batched(function, *tensors):
    """function(*tensors), computed for 500 examples at a time."""
    return torch.cat([function(*part) for part in zip(*(t.split(500) for t in tensors))])


def accuracy(logits, label):
    """Accuracy in % of logits (N, V), and its standard error over images."""
    p = (logits.argmax(-1) == label).float().mean().item()
    return {"accuracy, %": 100 * p, "+-": 100 * math.sqrt(p * (1 - p) / len(label))}


def cross_entropy_bits(logits, label):
    """Cross-entropy of logits (N, V)."""
    return F.cross_entropy(logits, label).item() / math.log(2)


@torch.no_grad()
def evaluate(blocks, end_to_end, control, data, sampling):
    """(tables {title: {row: {column: value}}}, {}) of blocks, baseline and control (None: left out) on all
    held-out images. Accuracy in %, the rest in bits per label."""
    config, noise, table = blocks[0].config, blocks[0].noise, blocks[0].table
    x, label = data.held_out(0, config)
    y, no_hint, steps = table[label], torch.zeros_like(table[label]), levels(blocks, sampling)

    def logits(b, z, sigma):
        """(N, V) from block b, with z (N, C), at one level or at one for each image."""
        return batched(blocks[b].logits, x, z, torch.as_tensor(sigma, device=x.device).expand(len(x)))

    def chain(z, steps):
        """(N, levels, V): how much of each label there is after each level on the way from z (N, C)."""
        return batched(lambda x, z: torch.stack(denoise_labels(blocks, x, z, steps), 1), x, z) @ table.T

    from_zero, right, votes = chain(no_hint, steps), [], 0.0
    for _ in range(sampling.n_draws):
        seen = chain(steps[0].item() * torch.randn(y.shape).to(x.device), steps)             # (N, levels, V)
        right.append((seen.argmax(-1) == label[:, None]).float().mean(0))                    # (levels,)
        votes = votes + seen[:, -1]
    draws = 100 * torch.stack(right)                                         # (draws, levels)
    mean, spread = draws.mean(0).tolist(), draws.std(0, correction=0).tolist()

    by_block, by_level, along = {}, {}, {}
    for b in range(len(blocks)):
        lo, hi = noise.interval(b)
        share = bound_share(lambda z, sigma: (y - logits(b, z, sigma).softmax(-1) @ table).pow(2).sum(1),
                            y, noise, b, n=max(2, 7200 // len(x)))
        alone = logits(b, no_hint, math.sqrt(lo * hi))                       # (N, V)
        row = by_block[f"block {b}"] = {"share of the bound, bits": share / math.log(2),
                                        "z = 0, accuracy, %": accuracy(alone, label)["accuracy, %"],
                                        "z = 0, bits": cross_entropy_bits(alone, label)}
        others = [s for s in steps if noise.block_of(s).item() != b]
        if len(others) > 1:
            row["left out, accuracy, %"] = accuracy(chain(no_hint, others)[:, -1], label)["accuracy, %"]
    ends = bound_ends(lambda z, s: F.cross_entropy(logits(-1, z, s), label, reduction="none"), y, noise)
    for name, nats in zip(("reconstruction", "prior"), ends):
        by_block[name] = {"share of the bound, bits": nats / math.log(2)}
    for sigma in [noise.interval(b)[1] for b in range(len(blocks))] + [noise.sigma_min]:
        b, level = noise.block_of(sigma), torch.full((len(x),), sigma, device=x.device)
        z = noise.corrupt(y, level)                                          # (N, C)
        free = bayes_logits(torch.zeros_like(z @ table.T), z, level, table)  # (N, V), from z alone
        by_level[f"sigma {sigma:.4g}"] = {
            "block": b, "cross-entropy": cross_entropy_bits(logits(b, z, level), label),
            "context-free Bayes": cross_entropy_bits(free, label)}
    for i, sigma in enumerate(steps.tolist()):
        along[f"sigma {sigma:.4g}"] = {
            "block": noise.block_of(sigma), "from z = 0": accuracy(from_zero[:, i], label)["accuracy, %"],
            "from noise": mean[i], "spread over draws": spread[i]}

    summary = {}
    for name, net in (("baseline", end_to_end), ("control", control)):
        if net is not None:
            said = batched(net, x)                                           # (N, V)
            summary[name] = accuracy(said, label) | {"bits per label": cross_entropy_bits(said, label)}
    for name, seen in (("blocks from z = 0", from_zero[:, -1]), ("blocks, mean of draws", votes)):
        summary[name] = accuracy(seen, label)
    summary["blocks from noise"] = {"accuracy, %": mean[-1], "spread over draws": spread[-1]}
    bound = sum(row["share of the bound, bits"] for row in by_block.values())
    summary["blocks (bound)"] = {"bits per label": bound}
    summary["blocks, cross-entropy at sigma_max"] = {
        "bits per label": by_level[f"sigma {noise.sigma_max:.4g}"]["cross-entropy"]}
    return {"held-out images": summary, "accuracy along the chain, %": along,
            "each block: its share, by itself, and the chain without it": by_block,
            "cross-entropy by noise level, owning block, bits per label": by_level}, {}
