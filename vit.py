"""Vision transformer, block by block: every block denoises the embedding of an image's label.

x is the image, cut into patches; y the fixed unit-norm embedding E of its label, and z = y + sigma * eps is
one token, in the place of CLS. A block runs patches and noisy label through its own layers, modulated by the
noise level (adaLN), and reads the label from that token.

    loss of block b = E over sigma in its interval of  CE(prior_b(x, z, sigma) + z @ E^T / sigma^2, label)

To classify, average what the blocks say at z = 0, or let them move z, from 0 or noise, towards a row of E.
`EndToEnd` is the baseline: a plain pre-norm ViT with CLS, cross-entropy, no noise.
"""
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import (LabelScores, LogNormal, average, bayes_logits, cross_entropy, decode_labels,
                              edm_logits, largest_block, require, require_finite, score_labels, score_loss,
                              split_layers, target_table)

DATA = "images"  # the module of data/ that this model is trained on


@dataclass
class Config:
    n_layer: int = 6            # transformer layers of the whole model
    layer_split: str = ""       # layers of each block, e.g. 3,2,1; empty: the same number in each
    n_head: int = 4             # attention heads
    n_embd: int = 64            # width, and the dimension of the target embedding
    n_mlp: int = 256            # hidden width of the MLP (released code: 3072, whatever the width)
    n_cond: int = 32            # width of the noise-level embedding (released code: n_embd / 6)
    patch_size: int = 2         # pixels of a patch's side
    dropout: float = 0.0        # after attention and inside and after the MLP (paper: 0.1)
    image_size: int = 0         # pixels of an image's side; this and the next four are set from the data
    n_channel: int = 0          # colours
    n_class: int = 0            # classes
    data_mean: float = 0.0      # of the training pixels in [-1, 1]
    data_std: float = 1.0       # their standard deviation
    readout: str = "bayes"      # bayes: prior + z.E/sigma^2; edm: the paper's, c_skip z + c_out F
    gate_start: float = 1.0     # where adaLN's gates start: 1, a plain layer, or 0, as DiT's (paper)
    z_rate: float = 0.1         # scale of z's projection, which starts at 0: how fast z is learned
    table_seed: int = 0         # seed of the target embedding; the same in every block
    noise: LogNormal = field(default_factory=lambda: LogNormal(n_blocks=3, p_mean=1.2, p_std=1.0))

    def __post_init__(self):
        require_finite(self)
        split_layers(self.n_layer, self.noise.n_blocks, self.layer_split)
        require(self.n_head >= 1, "n_head must be at least 1", self.n_head)
        require(self.n_embd >= 1 and self.n_embd % self.n_head == 0,
                f"n_embd must be a multiple of n_head {self.n_head}", self.n_embd)
        require(self.n_mlp >= 1, "n_mlp must be at least 1", self.n_mlp)
        require(self.n_cond >= 2 and self.n_cond % 2 == 0, "n_cond must be even and above 0", self.n_cond)
        require(self.readout in ("bayes", "edm"), "readout must be bayes or edm", self.readout)
        require(self.patch_size >= 1 and self.image_size % self.patch_size == 0,
                f"patch_size must divide the images' side {self.image_size}", self.patch_size)
        require(0 <= self.dropout < 1, "dropout must be at least 0 and below 1", self.dropout)
        require(self.n_class != 1, "images must be of two classes or more, to be told apart", self.n_class)

    def control(self):
        """The Config of the control: as many layers as the largest block has, trained end to end. Blocks that are
        no better than it have made no use of the other layers."""
        n_layer = largest_block(self.n_layer, self.noise.n_blocks, self.layer_split)
        return replace(self, n_layer=n_layer, layer_split="", noise=LogNormal())


# A preset names fields of Config, its noise, Sampling, the data's settings or train.py's Training.
# PAPER: the paper's settings, and the released code's heavy recipe (10 epochs of warm-up). What stays ours: blocks share
# nothing, the table is fixed, and z enters through a projection that starts at 0. Tiny-ImageNet's gaps are filled
# from cifar100 and ViT-B.
PAPER = dict(n_layer=12, dropout=0.1, n_mlp=3072, patch_size=4, augment="crop,flip,rand", beta2=0.999,
             batch_size=128, weight_decay=0.01, warmup=3910, final_lr=0.1, p_mean=-1.2, p_std=1.2,
             readout="edm", gate_start=0.0, sampler="chain", temperature=1.0)
# what this repository has found better, on the same network and schedule
OURS = dict(p_mean=1.2, p_std=1.0, readout="bayes", gate_start=1.0, sampler="averaged", temperature=0.0)
CIFAR100 = dict(PAPER, data="uoft-cs/cifar100", n_embd=128, n_cond=22, lr=5e-4, epochs=500.0, euler_steps=3)
SMALL = dict(batch_size=64, lr=2e-3, warmup=100, weight_decay=0.5)
PRESETS = {
    "default": dict(SMALL, steps=1500),
    "cpu": dict(SMALL, data="uoft-cs/cifar100", n_embd=128, patch_size=8, augment="crop,flip", epochs=10.0),
    "cifar100": CIFAR100,
    "cifar100-ours": {**CIFAR100, **OURS},
    "tiny-imagenet": dict(PAPER, data="zh-plus/tiny-imagenet", n_blocks=2, n_head=12, n_embd=768, n_cond=128,
                          batch_size=256, lr=1e-4, epochs=100.0, euler_steps=2),
}


@dataclass
class Sampling:
    n_images: int = 10          # held-out images to classify
    sampler: str = "averaged"   # of blocks: averaged, the mean of their log p; or chain, over noise levels
    temperature: float = 0.0    # chain: scale of the starting noise; 0: deterministic
    euler_steps: int = 0        # chain: noise levels visited; with few, not all blocks run; 0: max(n_blocks + 1, 4)

    def __post_init__(self):
        require_finite(self)
        require(self.n_images >= 1, "n_images must be at least 1", self.n_images)
        require(self.temperature >= 0, "temperature must be at least 0", self.temperature)
        require(self.sampler in ("averaged", "chain"), "sampler must be averaged or chain", self.sampler)


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


class EncoderLayer(nn.Module):
    """Pre-norm layer without a causal order. Modulated (adaLN), the condition shifts, scales and gates both
    sub-layers. The modulation is zero-initialised, so that with gate_start 1 it begins as the plain layer."""

    def __init__(self, config, modulated=False):
        super().__init__()
        self.gate_start = config.gate_start
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
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + (self.gate_start + gate1) * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + (self.gate_start + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def patches(x, size):
    """(B, K, H, W) -> (B, T, K * size * size): squares, row by row."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))              # (B, K, H/P, P, W/P, P)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)          # (B, T, K * P * P)


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
        # initialisation counts on inputs of mean 0 and variance 1
        x = (x - self.config.data_mean) / self.config.data_std
        return self.linear(patches(x, self.config.patch_size)) + self.position


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, 1, n_cond): Fourier features, then a two-layer MLP."""

    def __init__(self, n_cond):
        super().__init__()
        self.register_buffer("freq", torch.logspace(-1, 1.5, n_cond // 2), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(n_cond, n_cond), nn.SiLU(),
            nn.Linear(n_cond, n_cond), nn.SiLU())

    def forward(self, c_noise):
        angle = c_noise[:, None, None] * self.freq                        # (B, 1, n_cond / 2)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))    # (B, 1, n_cond)


def init_fan_in(net):
    """All initialisation: N(0, 1 / fan-in). Layers named `out`, which end a residual branch: divided by
    sqrt(2 * number of layers)."""
    for name, p in net.named_parameters():
        if name == "scale_weight":
            nn.init.constant_(p, 16.0)  # of the edm readout: with 1 no softmax would be sharp
        elif p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)   # norm weights are 1
        elif p.dim() == 3:
            # positions and the label's token, as large as patches: at std 0.02 they are learned late, if at all
            nn.init.normal_(p)
        elif "modulation" in name or name.startswith("z_in"):
            nn.init.zeros_(p)   # at sigma_max z is pure noise: it enters at 0
        else:
            depth = 2 * len(net.layers) if name.endswith("out.weight") else 1
            nn.init.normal_(p, std=(p.shape[1] * depth) ** -0.5)


# ---- One block of the model, and the baseline -------------------------------------------------------------

class Block(nn.Module):
    """Block b: a complete denoiser for its own noise levels. It shares nothing with any other block."""

    def __init__(self, config, b):
        super().__init__()
        self.config, self.b, self.noise = config, b, config.noise
        layers = split_layers(config.n_layer, config.noise.n_blocks, config.layer_split)[b]
        self.embed = PatchEmbedding(config)
        self.token = nn.Parameter(torch.empty(1, 1, config.n_embd))  # in the place of CLS; z is added to it
        self.z_in = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        self.layers = nn.ModuleList(EncoderLayer(config, modulated=True) for _ in layers)
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        bayes = config.readout == "bayes"
        self.head = nn.Linear(config.n_embd, config.n_class if bayes else config.n_embd)
        self.scale_weight = None if bayes else nn.Parameter(torch.empty(1))
        table = target_table(config.n_class, config.n_embd, config.table_seed)  # (V, C)
        self.register_buffer("table", table, persistent=False)
        init_fan_in(self)
        self.title = "layers {} to {} of {}, sigma {:.3g} to {:.3g}".format(
            layers[0], layers[-1], config.n_layer, *self.noise.interval(b))

    def logits(self, x, z, sigma):
        """Logits (B, V) of the label of images x (B, K, H, W) in [-1, 1], given z (B, C) and sigma (B,)."""
        c_in, c_noise = self.noise.input_scales(sigma)
        cond = self.noise_embedding(c_noise)                                 # (B, 1, n_cond)
        # c_in brings z from a range of 1 to 80 sqrt(C) down to at most sqrt(C). z_rate keeps it small at first: Adam
        # moves all weights at one pace, and a noisy z would be read before the image is
        token = self.token + self.config.z_rate * self.z_in(c_in[:, None] * z)[:, None]      # (B, 1, C)
        h = torch.cat([token, self.embed(x)], dim=1)                         # (B, 1 + T, C)
        for layer in self.layers:
            h = layer(h, cond)                                               # (B, 1 + T, C)
        # only the label's token is read; the patches have told it what they know
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        h = self.norm(h[:, :1]) * (1 + scale) + shift                        # (B, 1, C)
        f = self.head(h)[:, 0]                                               # (B, V), or (B, C) for edm
        if self.config.readout == "bayes":
            return bayes_logits(f, z, sigma, self.table)
        return edm_logits(f, z, sigma, self.table, self.noise, self.scale_weight)

    def forward(self, batch):
        """The score loss in nats of this block alone; batch: images (B, K, H, W) in [-1, 1], labels (B,)."""
        x, label = batch
        y = self.table[label]                                                # (B, C)
        sigma = self.noise.sample(self.b, len(y), y.device)                  # (B,)
        z = self.noise.corrupt(y, sigma)                                     # (B, C)
        error = cross_entropy(self.logits(x, z, sigma), label)               # (B,)
        return score_loss(error, sigma, self.noise)


class EndToEnd(nn.Module):
    """The baseline: backpropagation through all layers. EndToEnd(config.control()) is the control."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = PatchEmbedding(config)
        self.token = nn.Parameter(torch.empty(1, 1, config.n_embd))          # CLS
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.n_class)
        init_fan_in(self)
        self.title = f"{config.n_layer} layers, trained end to end"

    def features(self, x):
        """What the head reads, (B, C), of images x (B, K, H, W) in [-1, 1]."""
        token = self.token.expand(len(x), -1, -1)                            # (B, 1, C)
        h = torch.cat([token, self.embed(x)], dim=1)                         # (B, 1 + T, C)
        for layer in self.layers:
            h = layer(h)                                                     # (B, 1 + T, C)
        return self.norm(h[:, 0])                                            # (B, C)

    def logits(self, x):
        """Logits (B, V) of the label of images x (B, K, H, W) in [-1, 1]."""
        return self.head(self.features(x)).float()

    def forward(self, batch):
        """The cross-entropy in nats; batch: images (B, K, H, W) in [-1, 1], labels (B,)."""
        return cross_entropy(self.logits(batch[0]), batch[1]).mean()


# ---- Classification and evaluation ------------------------------------------------------------------------

@torch.no_grad()
def classify(nets, x, sampler="averaged", euler_steps=0, temperature=0.0):
    """Labels (B,) of images x (B, K, H, W). nets: the list of blocks, or one EndToEnd."""
    if isinstance(nets, EndToEnd):
        return nets.logits(x).argmax(-1)

    def logits(b, z, sigma):
        return nets[b].logits(x, z, sigma)                                   # (B, V)
    noise, table = nets[0].noise, nets[0].table
    if sampler == "averaged":
        return average(logits, (len(x),), table, noise, range(len(nets))).argmax(-1)
    return decode_labels(logits, (len(x),), table, noise, noise.steps(euler_steps), temperature)


def sample(nets, sampling, data):
    """Held-out images, classified, as one printable text."""
    config = (nets[0] if isinstance(nets, list) else nets).config
    x, label = data.held_out(sampling.n_images, config)
    found = classify(nets, x, sampling.sampler, sampling.euler_steps, sampling.temperature)
    lines = []
    for i in range(len(x)):
        true, guess = data.names[label[i]], data.names[found[i]]
        lines.append(f"image {i}: {true}, classified as {guess}")
    return "\n".join(lines)


CHAINS_FROM_NOISE = 4  # the accuracy of a chain that starts from noise is a mean of so many


@torch.no_grad()
def evaluate(blocks, others, data):
    """Tables {title: {row: {column: value}}} of the blocks and of others {"end to end": net, "control": net}
    on all held-out images."""
    noise, table = blocks[0].noise, blocks[0].table
    images, labels = data.held_out(None, blocks[0].config)
    nats, right = Counter(), Counter()  # of each row, summed over images
    scores = LabelScores.zero(len(blocks))
    for x, label in zip(images.split(500), labels.split(500)):
        for name, net in others.items():
            nats[name] += cross_entropy(net.logits(x), label).sum().item()
            right[name] += n_right(classify(net, x), label)

        def logits(b, z, sigma):
            return blocks[b].logits(x, z, sigma)                             # (B, V)
        scores += score_labels(logits, label, table, noise)
        right["blocks, averaged"] += n_right(classify(blocks, x), label)
        right["blocks, chain from z = 0"] += n_right(classify(blocks, x, "chain"), label)
        for _ in range(CHAINS_FROM_NOISE):
            found = classify(blocks, x, "chain", temperature=1.0)
            right["blocks, chain from noise"] += n_right(found, label) / CHAINS_FROM_NOISE
    per_label = 1 / math.log(2) / len(labels)
    rows = {name: {"accuracy, %": 100 * n / len(labels)} for name, n in right.items()}
    for name in others:
        rows[name]["bits per label"] = per_label * nats[name]
    of_blocks, shares = scores.tables(per_label, "bits per label")
    for name, row in of_blocks.items():
        rows[name] = {**rows.get(name, {}), **row}
    return {"held-out images": rows, "the bound, share by share": shares}


def n_right(found, label):
    return (found == label).sum().item()
