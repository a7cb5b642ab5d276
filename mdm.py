"""Masked diffusion, block by block: every block guesses masked tokens at its own share of masks.

y is the text, z the same text with masks: at time t a token is visible with probability alpha(t). Block b
owns an interval of t (block 0: nearly all is masked) and guesses masked tokens from the visible ones.

    loss of block b = E over t in its interval of  -alpha'(t) / (1 - alpha(t)) * sum over masks of CE

The mean over the interval times its length is the block's share of a bound on -log p(y); the shares add up.
`EndToEnd` is the baseline: B = 1, one network for all t, as MD4.
"""
import math
import re
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import (Masking, bound_draws, cross_entropy, largest_block, require, require_finite, score_loss,
                              split_layers, windows_at_once)

DATA = "text"  # the module of data/ that this model is trained on


@dataclass
class Config:
    n_layer: int = 6            # transformer layers of the whole model
    layer_split: str = ""       # layers of each block, e.g. 3,2,1; empty: the same number in each
    n_head: int = 4             # attention heads
    n_embd: int = 96            # width
    n_cond: int = 32            # width of the embedding of t
    seq_len: int = 256          # context length in tokens
    vocab_size: int = 0         # set from the data; the mask is one token more
    noise: Masking = field(default_factory=lambda: Masking(n_blocks=3))

    def __post_init__(self):
        require_finite(self)
        split_layers(self.n_layer, self.noise.n_blocks, self.layer_split)
        require(self.n_head >= 1, "n_head must be at least 1", self.n_head)
        require(self.n_embd >= 1 and self.n_embd % (2 * self.n_head) == 0,
                f"n_embd must be a multiple of twice n_head {self.n_head}", self.n_embd)
        require(self.n_cond >= 2 and self.n_cond % 2 == 0, "n_cond must be even and above 0", self.n_cond)
        require(self.seq_len >= 2, "seq_len must be at least 2", self.seq_len)

    def control(self):
        """The Config of the control: as many layers as the largest block has, trained end to end. Blocks that are
        no better than it have made no use of the other layers."""
        n_layer = largest_block(self.n_layer, self.noise.n_blocks, self.layer_split)
        return replace(self, n_layer=n_layer, layer_split="", noise=replace(self.noise, n_blocks=1))


# A preset names fields of Config, its noise, the data's settings or train.py's Training. Few masks teach little, and
# nearly all masked too: default and cpu train at t .2 to 1, and blocks learn half a step of their neighbours' times, too
# (see results/choices/README.md). text8 is the paper's.
PRESETS = {
    "default": dict(steps=1200, batch_size=16, lr=3e-3, warmup=100, weight_decay=0.03, beta2=0.99, ema=0.999,
                    t_min=0.2, gamma=0.5),
    "cpu": dict(steps=4000, batch_size=16, lr=3e-3, warmup=100, weight_decay=0.03, beta2=0.99, ema=0.999,
                t_min=0.2, gamma=0.5),
    "text8": dict(data="afmck/text8", n_layer=12, n_head=12, n_embd=768, n_cond=128, batch_size=256,
                  epochs=100.0, lr=3e-4, warmup=2000, weight_decay=0.03, beta2=0.999, ema=0.9999),
}


@dataclass
class Sampling:
    prompt: tuple = ()          # one or more texts; <gap:8> in a text is filled with eight tokens; none: a window of gaps
    n_moves: int = 64           # moves from all masks to none
    grid: str = "uniform"       # of t: uniform or cosine (MD4), which reveals fewer tokens at first
    temperature: float = 1.0    # of the softmax over tokens; 0: the most probable

    def __post_init__(self):
        require_finite(self)
        require(self.n_moves >= 1, "n_moves must be at least 1", self.n_moves)
        require(self.temperature >= 0, "temperature must be at least 0", self.temperature)
        require(self.grid in ("uniform", "cosine"), "grid must be uniform or cosine", self.grid)


# ---- The transformer layer --------------------------------------------------------------------------------

ROPE_BASE = 10_000.0  # Llama


def rotate(x, start=0):
    """Rotary positions start, start + 1, ... for x (B, H, T, D)."""
    half = x.shape[-1] // 2
    freq = ROPE_BASE ** (-torch.arange(half, device=x.device) / half)                   # (D/2,)
    angle = torch.arange(start, start + x.shape[-2], device=x.device)[:, None] * freq   # (T, D/2)
    a, b = x.float().chunk(2, dim=-1)                                                   # (B, H, T, D/2) each
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)         # (B, H, T, D)


class BidirectionalAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C): every token attends to all tokens, at rotary positions."""
        qkv = self.query_key_value(x).unflatten(-1, (3, self.n_head, -1))    # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (B, H, T, D) each
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)          # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))                        # (B, T, C)


class MLP(nn.Module):
    """SwiGLU with 8/3 of the width, rounded up to a multiple of 8 (Llama)."""

    def __init__(self, config):
        super().__init__()
        hidden = 8 * math.ceil(config.n_embd / 3)
        self.gate_up = nn.Linear(config.n_embd, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)                     # (B, T, 8/3 C) each
        return self.out(F.silu(gate) * up)                              # (B, T, C)


class MaskedLayer(nn.Module):
    """Pre-norm layer. adaLN shifts, scales and gates both sub-layers by the embedding of t, zero-initialised
    around the plain layer: gates start at 1, not at 0."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
        self.attention = BidirectionalAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
        self.mlp = MLP(config)
        self.modulation = nn.Linear(config.n_cond, 6 * config.n_embd)

    def forward(self, x, cond):
        """x (B, T, C), cond (B, 1, n_cond) -> (B, T, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + (1 + gate1) * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


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


def init_masked(net):
    """All initialisation: N(0, 1 / fan-in), embeddings N(0, 1). Layers named `out`, which end a residual branch:
    divided by sqrt(2 * number of layers)."""
    for name, p in net.named_parameters():
        if p.dim() == 1 or "modulation" in name or name.startswith("head"):
            nn.init.zeros_(p)   # the first guess is uniform (MD4)
        elif name.startswith("embed"):
            nn.init.normal_(p)
        else:
            depth = 2 * len(net.layers) if name.endswith("out.weight") else 1
            nn.init.normal_(p, std=(p.shape[1] * depth) ** -0.5)


# ---- One block of the model, and the baseline -------------------------------------------------------------

class Block(nn.Module):
    """Block b: a complete network for its own times. It shares nothing with any other block."""

    def __init__(self, config, b):
        super().__init__()
        self.config, self.b, self.noise = config, b, config.noise
        self.mask_id = config.vocab_size  # a token that no text has
        layers = split_layers(config.n_layer, config.noise.n_blocks, config.layer_split)[b]
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)      # the last row: the mask
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        self.layers = nn.ModuleList(MaskedLayer(config) for _ in layers)
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)              # no logit for the mask
        init_masked(self)
        self.title = "layers {} to {} of {}, t {:.3g} to {:.3g}".format(
            layers[0], layers[-1], config.n_layer, *self.noise.interval(b))

    def logits(self, z, t):
        """Logits (B, T, V) of the token at every place of z (B, T), masked or not, at times t (B,)."""
        cond = self.noise_embedding(t)                                       # (B, 1, n_cond)
        h = self.embed(z)                                                    # (B, T, C)
        for layer in self.layers:
            h = layer(h, cond)                                               # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        return self.head(self.norm(h) * (1 + scale) + shift).float()         # (B, T, V)

    def masked_nats(self, z, t, y):
        """Cross-entropy (B,) of y (B, T), summed over the masked places of z (B, T)."""
        nats = cross_entropy(self.logits(z, t), y)                           # (B, T)
        # a token that is visible is known: guessing it again would teach copying
        masked = z == self.mask_id                                           # (B, T)
        return (nats * masked).sum(1)

    def forward(self, batch):
        """The score loss in nats per token of this block; batch (B, T + 1) token ids, the last unused."""
        y = batch[:, :-1]                                                    # (B, T)
        t = self.noise.sample(self.b, len(y), y.device)                      # (B,)
        z = self.noise.corrupt(y, t, self.mask_id)                           # (B, T)
        error = self.masked_nats(z, t, y) / y.shape[1]                       # (B,)
        return score_loss(error, t, self.noise)


class EndToEnd(Block):
    """The baseline: all layers, for all times (MD4). EndToEnd(config.control()) is the control."""

    def __init__(self, config):
        noise = replace(config.noise, n_blocks=1)                            # all times
        super().__init__(replace(config, layer_split="", noise=noise), 0)
        self.title = f"{config.n_layer} layers, trained end to end"


# ---- Generation and evaluation ----------------------------------------------------------------------------

def with_gaps(prompt, tokenizer, mask_id, seq_len):
    """(1, T) token ids of a prompt, masks in the place of <gap:N>. Raises ValueError."""
    tokens = []
    for i, piece in enumerate(re.split(r"<gap:(\d+)>", prompt)):             # text, number, text, ..., text
        if i % 2 == 0:
            tokens += tokenizer.encode(piece).tolist()
        else:
            tokens += [mask_id] * int(piece)
    if mask_id not in tokens or len(tokens) > seq_len:
        raise ValueError(f"the prompt {prompt!r} must have a gap, such as def <gap:8>(self), and at most "
                         f"{seq_len} tokens with its gaps; it has {len(tokens)}")
    return torch.tensor([tokens])


@torch.no_grad()
def fill(nets, z, sampling):
    """Token ids (B, T) with every mask of z filled by ancestral sampling: what is revealed stays.

    nets: the list of blocks, or one EndToEnd. A move runs the block that owns the time it starts from. The first
    time is the one at which as much is masked in training as in z. At times below t_min the last block meets fewer
    masks than it was trained on."""
    blocks = nets if isinstance(nets, list) else [nets]
    noise, mask_id = blocks[0].noise, blocks[0].mask_id
    start = noise.time_of((z == mask_id).float().mean().item())
    times = noise.times(sampling.n_moves, sampling.grid, start)              # (n_moves + 1,)
    for t, s in zip(times[:-1], times[1:]):
        level = torch.full((len(z),), t.item(), device=z.device)             # (B,)
        logits = blocks[noise.block_of(t.item())].logits(z, level)           # (B, T, V)
        if sampling.temperature == 0:
            token = logits.argmax(-1)                                        # (B, T)
        else:
            p = (logits / sampling.temperature).softmax(-1)
            token = torch.multinomial(p.flatten(0, 1), 1).view_as(z)         # (B, T)
        if s > 0:
            # of the tokens that are masked at t, the fraction that is visible at s
            reveal = (1 - noise.mask_probability(s) / noise.mask_probability(t)).item()
        else:
            reveal = 1.0  # the last move reveals all that is left
        revealed = (z == mask_id) & (torch.rand(z.shape, device=z.device) < reveal)
        z = torch.where(revealed, token, z)
    return z


def sample(nets, sampling, data):
    """The prompts with their gaps filled, as one printable text. Raises ValueError."""
    net = nets[0] if isinstance(nets, list) else nets
    device = net.embed.weight.device
    texts = []
    for prompt in sampling.prompt or (f"<gap:{net.config.seq_len}>",):
        z = with_gaps(prompt, data.tokenizer, net.mask_id, net.config.seq_len)           # (1, T)
        tokens = fill(nets, z.to(device), sampling)                                      # (1, T)
        texts.append(data.tokenizer.decode(tokens[0].tolist()))
    return "\n---\n".join(texts)


@torch.no_grad()
def bound_share(net, windows, noise, b):
    """The share, in nats a token, of the bound that falls into block b's interval of t, for windows (N, T)."""
    total = 0.0
    for y in windows.split(windows_at_once(net.config.vocab_size, windows.shape[1], 64)):    # (B, T)
        for t, importance in bound_draws(noise, b, y, n=1):                  # (B,) each
            z = noise.corrupt(y, t, net.mask_id)                             # (B, T)
            total += (importance * net.masked_nats(z, t, y)).mean().item() * len(y)
    return total / windows.numel()


def evaluate(blocks, others, data):
    """Tables {title: {row: {column: value}}} of the blocks and of others {"end to end": net, "control": net}:
    the bound on the whole held-out text, and its share from each block's interval of t, in bits per byte."""
    config, noise = blocks[0].config, blocks[0].noise
    windows = data.held_out(None, config)[:, :-1]                            # (N, T)
    per_byte = 1 / math.log(2) / data.bytes_per_token
    names = [*others, "blocks"]
    shares = {}
    for b in range(len(blocks)):
        row = {name: per_byte * bound_share(net, windows, noise, b) for name, net in others.items()}
        row["blocks"] = per_byte * bound_share(blocks[b], windows, noise, b)
        shares["block {}, t {:.3g} to {:.3g}".format(b, *noise.interval(b))] = row
        print(f"scored the levels of block {b}", flush=True)
    # masked at t = 0, or visible at t = 1 already, and then guessed among all tokens; MD4 counts the first
    ends = 2 * noise.eps * math.log2(config.vocab_size) / data.bytes_per_token
    shares["ends"] = dict.fromkeys(names, ends)
    rows = {name: {"bits per byte": sum(row[name] for row in shares.values())} for name in names}
    return {"bits per byte on held-out text (bound)": rows, "the bound by interval, bits per byte": shares}
