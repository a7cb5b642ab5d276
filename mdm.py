"""Masked diffusion, block by block: every block guesses masked tokens at its own share of masks.

y is the text, z the same text with masks: at time t a token is visible with probability alpha(t). Block b
owns an interval of t, block 0 the one where nearly all is masked, and guesses every masked token from the
visible ones.

    loss of block b = E over t in its interval of  -alpha'(t) / (1 - alpha(t)) * sum over masks of CE

The mean over the interval times its length is the block's share of a bound on -log p(y); the shares add up.
`EndToEnd` is the baseline: B = 1, one network for all t, as MD4.

    python train.py --model mdm --block all
"""
import math
import re
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import Masking, masked_ends, masked_share, score_loss, split_layers

DATA = "text"  # what train.py has to load for this model


@dataclass
class Config:
    n_layer: int = 6                # transformer layers of the whole model
    n_blocks: int = 3               # blocks it is cut into, each trained alone
    layer_split: str = ""           # layers of each block, e.g. 3,2,1; empty: the same number in each
    n_head: int = 4                 # attention heads
    n_embd: int = 96                # width
    n_cond: int = 32                # width of the embedding of t
    seq_len: int = 256              # context length in tokens
    vocab_size: int = 0             # 0: as the tokenizer has it; the mask is one more
    gamma: float = 0.05             # overlap of neighbouring blocks in training (paper)
    schedule: str = "linear"        # of alpha: linear (paper) or cosine (MD4)
    eps: float = 1e-4               # alpha stays this far from 0 and 1 (MD4)


PRESETS = {
    "default": dict(steps=1200, batch_size=16, lr=3e-3, warmup=100, weight_decay=0.03, beta2=0.99, ema=0.999),
    # the paper's; EMA is MD4's; characters of text8 are bytes
    "text8": dict(data="afmck/text8", n_layer=12, n_blocks=3, n_head=12, n_embd=768, n_cond=128, seq_len=256,
                  batch_size=256, epochs=100.0, lr=3e-4, warmup=2000, weight_decay=0.03, beta2=0.999,
                  ema=0.9999),
}


@dataclass
class Sampling:
    prompt: tuple = ("<gap:256>",)  # texts; <gap:8> is filled with eight tokens, \<gap:8> stands for itself
    n_moves: int = 64               # moves from t = 1 to t = 0
    grid: str = "uniform"           # of t: uniform or cosine (MD4), which reveals fewer tokens at first
    temperature: float = 1.0        # of the softmax over tokens; 0: the most probable


# -----------------------------------------------------------------------------------------------------------
# The transformer layer

ROPE_BASE = 10_000.0  # Llama


def rotate(x, start=0):
    """Rotary positions start, start + 1, ... for x (B, H, T, D): pairs of channels turn at geometric
    frequencies."""
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
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class MaskedLayer(nn.Module):
    """Pre-norm layer with adaLN on t: shifts, scales and gates of both sub-layers.

    The modulation is zero-initialised around the plain layer (gates start at 1): see README, differences."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
        self.attention = BidirectionalAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
        self.mlp = MLP(config)
        self.modulation = nn.Linear(config.n_cond, 6 * config.n_embd)

    def forward(self, x, cond):
        """x (B, T, C), cond (B, 1, n_cond) -> (B, T, C)."""
        # (B, 1, C) each
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + (1 + gate1) * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, 1, n_cond): Fourier features, then a two-layer MLP."""

    def __init__(self, n_cond):
        super().__init__()
        self.register_buffer("freq", torch.logspace(-1, 1.5, n_cond // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(n_cond, n_cond), nn.SiLU(), nn.Linear(n_cond, n_cond), nn.SiLU())

    def forward(self, c_noise):
        angle = c_noise[:, None, None] * self.freq                        # (B, 1, n_cond / 2)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))    # (B, 1, n_cond)


def init_masked(net):
    """All initialisation: N(0, 1 / fan-in), embeddings N(0, 1), residual outputs smaller by sqrt(2 layers);
    modulation and head start at zero."""
    for name, p in net.named_parameters():
        if p.dim() == 1 or "modulation" in name or name.startswith("head"):
            nn.init.zeros_(p)
        elif name.startswith("embed"):
            nn.init.normal_(p)
        else:
            depth = 2 * len(net.layers) if name.endswith("out.weight") else 1
            nn.init.normal_(p, std=(p.shape[1] * depth) ** -0.5)


class Block(nn.Module):
    """Block b of the model: a complete network for its own times, sharing nothing with any other block."""

    def __init__(self, config, b):
        super().__init__()
        self.config, self.b = config, b
        self.noise = Masking(config.n_blocks, config.vocab_size, config.gamma, config.schedule, config.eps)
        self.layer_range = split_layers(config.n_layer, config.n_blocks, config.layer_split)[b]
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)      # the last row: the mask
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        self.layers = nn.ModuleList(MaskedLayer(config) for _ in self.layer_range)
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)              # no logit for the mask
        init_masked(self)
        self.title = "block {}, t {:.3g} to {:.3g}".format(b, *self.noise.interval(b))

    def describe(self):
        c, layers, (lo, hi) = self.config, self.layer_range, self.noise.interval(self.b)
        wide_lo, wide_hi = self.noise.interval(self.b, overlap=True)
        return (f"block {self.b} of 0 to {c.n_blocks - 1}, layers {layers[0]} to {layers[-1]} of 0 to "
                f"{c.n_layer - 1}, t {lo:.4g} to {hi:.4g}, trained on {wide_lo:.4g} to {wide_hi:.4g}")

    def forward(self, z, t):
        """Logits (B, T, V) of the token at every place of z (B, T), masked or not, at times t (B,)."""
        cond = self.noise_embedding(t)                                       # (B, 1, n_cond)
        h = self.embed(z)                                                    # (B, T, C)
        for layer in self.layers:
            h = layer(h, cond)                                               # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        return self.head(self.norm(h) * (1 + scale) + shift).float()         # (B, T, V)

    def masked_nats(self, z, t, y):
        """Cross-entropy (B,) summed over the masked places of z (B, T)."""
        return (cross_entropy(self(z, t), y) * (z == self.noise.mask_id)).sum(1)

    def loss(self, batch):
        """Score loss in nats per token of this block alone; batch (B, T + 1) token ids, the last unused."""
        y = batch[:, :-1]                                                    # (B, T)
        return score_loss(lambda z, t: self.masked_nats(z, t, y) / y.shape[1], y, self.noise, self.b)


class EndToEnd(Block):
    """The baseline: all layers, all times (MD4). With one block's layers it is the control."""

    def __init__(self, config):
        super().__init__(replace(config, n_blocks=1, layer_split=""), 0)
        self.title = f"end to end, {config.n_layer} layers"

    def describe(self):
        return f"{self.config.n_layer} layers, end to end"


def cross_entropy(logits, target):
    """(B, T, V), (B, T) -> (B, T) nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def check(config):
    """Raises ValueError, in words for the user, if no network can be built from this configuration."""
    if min(config.n_layer, config.n_blocks, config.n_head, config.n_embd) < 1:
        raise ValueError("n_layer, n_blocks, n_head and n_embd must be at least 1")
    Masking(config.n_blocks, 0, config.gamma, config.schedule, config.eps)
    split_layers(config.n_layer, config.n_blocks, config.layer_split)
    if config.n_embd % (2 * config.n_head):
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of twice n_head {config.n_head}")
    if config.n_cond < 2 or config.n_cond % 2 or config.seq_len < 2:
        raise ValueError("n_cond must be even and at least 2, seq_len at least 2")


def check_sampling(sampling):
    """Raises ValueError, in words for the user, for values that nothing can be sampled with."""
    if sampling.n_moves < 1 or not sampling.temperature >= 0:
        raise ValueError("n_moves must be at least 1, temperature not negative")
    if sampling.grid not in ("uniform", "cosine"):
        raise ValueError(f"unknown grid {sampling.grid!r}; choose uniform or cosine")


def control(config):
    """The control: one block's worth of layers, trained end to end. If the blocks do no better, depth was not
    used."""
    return EndToEnd(replace(config, n_layer=max(1, config.n_layer // config.n_blocks)))


# -----------------------------------------------------------------------------------------------------------
# Generation

GAP = re.compile(r"(?<!\\)<gap:(\d+)>")


def with_gaps(prompt, tokenizer, mask_id, seq_len):
    """(1, T) token ids of a prompt, masks where it has <gap:N>. Raises ValueError."""
    parts = GAP.split(prompt)  # text, number, text, ..., text
    tokens = []
    for i, part in enumerate(parts):
        text = part.replace("\\<gap:", "<gap:")
        tokens += [mask_id] * int(part) if i % 2 else tokenizer.encode(text).tolist()
    if mask_id not in tokens:
        raise ValueError(f"the prompt {prompt!r} has no gap to fill; write, for instance, def <gap:8>(self)")
    if len(tokens) > seq_len:
        raise ValueError(f"the prompt and its gaps have {len(tokens)} tokens, more than the {seq_len} that "
                         f"were trained on")
    return torch.tensor([tokens])


@torch.no_grad()
def fill(nets, z, sampling):
    """Token ids (B, T) with every mask of z filled by ancestral sampling: what is revealed stays.

    nets: the list of blocks, or one EndToEnd. A move runs the one block that owns the time it starts from."""
    blocks = nets if isinstance(nets, list) else [nets]
    noise = blocks[0].noise
    steps = noise.steps(sampling.n_moves, sampling.grid)
    for t, s in zip(steps[:-1], steps[1:]):
        masked = z == noise.mask_id                                          # (B, T)
        time = torch.full((len(z),), t.item(), device=z.device)              # (B,)
        logits = blocks[noise.block_of(t).item()](z, time)                   # (B, T, V)
        if sampling.temperature == 0:
            token = logits.argmax(-1)                                        # (B, T)
        else:
            p = (logits / sampling.temperature).softmax(-1)
            token = torch.multinomial(p.flatten(0, 1), 1).view_as(z)         # (B, T)
        # of what is hidden at t, the part that is visible at s; at the end everything
        reveal = 1.0 if s == 0 else (1 - noise.hidden(s) / noise.hidden(t)).item()
        z = torch.where(masked & (torch.rand(z.shape, device=z.device) < reveal), token, z)
    return z


def sampling_step(net, n):
    """A function that evaluates a block, or a baseline, once for n windows, as a move does."""
    device = net.embed.weight.device
    z = torch.full((n, net.config.seq_len), net.noise.mask_id, device=device)
    t = torch.ones(n, device=device)
    return lambda: net(z, t)


def sample(nets, sampling, tokenizer):
    """The user's prompts with their gaps filled, as one printable text. Raises ValueError."""
    net = nets[0] if isinstance(nets, list) else nets
    texts = []
    for prompt in sampling.prompt:
        z = with_gaps(prompt, tokenizer, net.noise.mask_id, net.config.seq_len).to(net.embed.weight.device)
        texts.append(tokenizer.decode(fill(nets, z, sampling)[0].tolist()))
    return "\n---\n".join(texts)


# -----------------------------------------------------------------------------------------------------------
# Evaluation

def bits(nats, n_bytes):
    """Bits per byte and its standard error, from nats and bytes of batches of windows (a ratio of two
    sums)."""
    nats, n_bytes = torch.tensor(nats).double(), torch.tensor(n_bytes).double()
    ratio = nats.sum() / n_bytes.sum()
    if len(nats) < 2:
        return {"bits per byte": ratio.item() / math.log(2)}
    error = (nats - ratio * n_bytes).std() / (n_bytes.mean() * len(nats) ** 0.5)
    return {"bits per byte": ratio.item() / math.log(2), "+-": error.item() / math.log(2)}


@torch.no_grad()
def evaluate(blocks, end_to_end, control, data, sampling):
    """(tables {title: {row: {column: value}}}, {}) of blocks, baseline and control (None: left out): the
    bound, bits per byte on the whole held-out text in windows, and the part that each interval of t costs."""
    config, noise = blocks[0].config, blocks[0].noise
    at_once = max(1, min(64, 2 ** 27 // (config.vocab_size * config.seq_len)))  # at most 512 MB of logits
    windows = [w[:, :-1] for w in data.held_out(10 ** 9, config).split(at_once)]         # (B, T) each
    sizes = [data.token_bytes[y].sum().item() for y in windows]
    ends = [len(y) * sum(masked_ends(config.seq_len, config.vocab_size, noise)) for y in windows]
    models = {"baseline": [end_to_end] * len(blocks), "control": [control] * len(blocks), "blocks": blocks}
    models = {name: nets for name, nets in models.items() if nets[0] is not None}
    nats = {name: [[masked_share(lambda z, t: nets[b].masked_nats(z, t, y), y, noise, b, n=1) * len(y)
                    for y in windows] for b in range(len(blocks))] for name, nets in models.items()}
    total = {name: [sum(batch) for batch in zip(ends, *shares)] for name, shares in nats.items()}
    summary = {name: bits(total[name], sizes) for name in models}
    for name in models:
        if name != "blocks":
            gap = [a - b for a, b in zip(total["blocks"], total[name])]
            summary[f"blocks - {name}"] = bits(gap, sizes)
    shares = {f"t {lo:.3g} to {hi:.3g}": {"block": b} | {
        name: bits(nats[name][b], sizes)["bits per byte"] for name in models}
        for b, (lo, hi) in enumerate(map(noise.interval, range(len(blocks))))}
    shares["reconstruction and prior"] = {name: bits(ends, sizes)["bits per byte"] for name in models}
    return {"bits per byte on held-out text (bound)": summary,
            "the bound by interval, bits per byte": shares}, {}
