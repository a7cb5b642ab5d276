"""Recurrent depth: one weight-tied network, trained a pass at a time instead of through its recurrence.

The shape is Huginn's (arXiv 2502.05171): a prelude turns the text so far, x, into a condition e; the core
takes a state and e to a new state, again and again; a coda reads the last state. The baseline is trained
through a random number of passes. As a DiffusionBlock a pass is one Euler step: y is the fixed embedding E of
the next token, the state is z = y + sigma * eps, and one pass guesses y from z at any sigma.

    loss = E over all sigma of  CE(prior(x, z, sigma) + z @ E^T / sigma^2, x_next)

Slot i holds e_i, which knows tokens <= i, and z_i = E[x_{i+1}] + sigma * eps. It attends to itself and to the
slots before it, whose targets are tokens that it may know.
"""
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import (LabelScores, LogNormal, bayes_logits, cross_entropy, edm_logits, euler, require,
                              require_finite, score_labels, score_loss, target_table, token_losses,
                              windows_at_once)

DATA = "text"  # the module of data/ that this model is trained on


@dataclass
class Config:
    n_prelude: int = 2          # layers before the recurrence
    n_core: int = 4             # layers of every pass
    n_coda: int = 2             # layers after it
    n_head: int = 4             # attention heads
    n_embd: int = 64            # width, and the dimension of the target embedding
    n_cond: int = 32            # width of the noise-level embedding
    seq_len: int = 128          # context length in tokens
    vocab_size: int = 0         # set from the data
    mean_passes: int = 32       # baseline: mean number of passes through the core in training (Huginn: 33)
    grad_passes: int = 8        # baseline: the last passes, which have a gradient (Huginn)
    readout: str = "bayes"      # bayes: prior + z.E/sigma^2; edm: the paper's, c_skip z + c_out F
    z_rate: float = 0.1         # scale of z's projection, which starts at 0: how fast z is learned
    table_seed: int = 0         # seed of the target embedding
    noise: LogNormal = field(default_factory=lambda: LogNormal(p_mean=1.2, p_std=1.0))

    def __post_init__(self):
        require_finite(self)
        require(self.noise.n_blocks == 1, "recurrent is one network for all noise levels: n_blocks can only be 1",
                self.noise.n_blocks)
        for name in ("n_prelude", "n_core", "n_coda", "mean_passes", "grad_passes", "n_head"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(self.n_embd >= 1 and self.n_embd % (2 * self.n_head) == 0,
                f"n_embd must be a multiple of twice n_head {self.n_head}", self.n_embd)
        require(self.n_cond >= 2 and self.n_cond % 2 == 0, "n_cond must be even and above 0", self.n_cond)
        require(self.seq_len >= 2, "seq_len must be at least 2", self.seq_len)
        require(self.readout in ("bayes", "edm"), "readout must be bayes or edm", self.readout)

    def control(self):
        """The Config of the control: one pass. A block that is no better than it has made no use of its passes."""
        return replace(self, mean_passes=1)


# A preset names fields of Config, its noise, the data's settings or train.py's Training. lm1b has the paper's sizes,
# schedule and noise. Readout, tokenizer, gates that start at 1, the fixed table, and z that enters at 0 are ours. Its
# baseline gets --epochs 5.
PRESETS = {
    "default": dict(steps=400, batch_size=16, lr=6e-3, warmup=50),
    "cpu": dict(steps=1200, batch_size=16, lr=6e-3, warmup=50),  # block, control: --steps 9600, about as long
    "lm1b": dict(n_head=8, n_embd=512, n_cond=128, seq_len=256, data="dvruette/lm1b", tokenizer="gpt2",
                 batch_size=256, accumulate=16, epochs=15.0, lr=3e-4, warmup=2500, p_mean=-1.2, p_std=1.2),
}


@dataclass
class Sampling:
    prompt: tuple = ("\n",)     # one or more texts to continue
    n_tokens: int = 256         # tokens to add to each
    temperature: float = 1.0    # baseline: of the softmax; block: scale of the starting noise; 0: most probable
    n_passes: int = 32          # passes for each token: of the recurrence, or Euler steps

    def __post_init__(self):
        require_finite(self)
        require(all(self.prompt), "a prompt must not be empty", list(self.prompt))
        require(self.n_tokens >= 0, "n_tokens must be at least 0", self.n_tokens)
        require(self.temperature >= 0, "temperature must be at least 0", self.temperature)
        require(self.n_passes >= 1, "n_passes must be at least 1", self.n_passes)


# ---- The transformer layer --------------------------------------------------------------------------------

ROPE_BASE = 50_000.0  # Huginn


def rotate(x, start=0):
    """Rotary positions start, start + 1, ... for x (B, H, T, D)."""
    half = x.shape[-1] // 2
    freq = ROPE_BASE ** (-torch.arange(half, device=x.device) / half)                   # (D/2,)
    angle = torch.arange(start, start + x.shape[-2], device=x.device)[:, None] * freq   # (T, D/2)
    a, b = x.float().chunk(2, dim=-1)                                                   # (B, H, T, D/2) each
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)         # (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key_value = nn.Linear(config.n_embd, 2 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def heads(self, x):
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)    # (B, T, C) -> (B, H, T, D)

    def keys_values(self, x, start=0):
        k, v = self.key_value(x).chunk(2, dim=-1)                       # (B, T, C) each
        return rotate(self.heads(k), start), self.heads(v)              # (B, H, T, D) each

    def forward(self, x, start=0, past=None, mask=None):
        """x (B, T, C) attends to itself causally or, given keys and values of the past, to them and itself by
        mask (T, T' + T). Returns (B, T, C), and the keys and values of x."""
        q = rotate(self.heads(self.query(x)), start)                    # (B, H, T, D)
        k, v = new = self.keys_values(x, start)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)    # (B, H, T' + T, D) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None)
        return self.out(y.transpose(1, 2).flatten(2)), new              # (B, T, C)


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


class SandwichLayer(nn.Module):
    """Huginn's layer: a norm before each sub-layer and another one after each sum.

    Modulated (adaLN): the noise level shifts, scales and gates both sub-layers; gates start at 1."""

    def __init__(self, config, modulated=False):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.norm3 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = MLP(config)
        self.norm4 = nn.RMSNorm(config.n_embd, eps=1e-6)
        if modulated:
            self.modulation = nn.Linear(config.n_cond, 6 * config.n_embd)

    def forward(self, x, start=0, past=None, mask=None, cond=None):
        """x (B, T, C), cond (B, 1, n_cond) or None -> (B, T, C), and the keys and values of x for a cache."""
        if cond is None:
            h, new = self.attention(self.norm1(x), start, past, mask)        # (B, T, C)
            x = self.norm2(x + h)
            return self.norm4(x + self.mlp(self.norm3(x))), new
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)    # (B, 1, C) each
        h, new = self.attention(self.norm1(x) * (1 + scale1) + shift1, start, past, mask)
        x = self.norm2(x + (1 + gate1) * h)
        x = self.norm4(x + (1 + gate2) * self.mlp(self.norm3(x) * (1 + scale2) + shift2))
        return x, new


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


def run(layers, h, start=0, past=None, cond=None):
    """h (B, T, C) through layers that attend causally to it and to the past -> (B, T, C), its [(k, v)]."""
    mask, out = None, []
    if past:
        n = h.shape[1]
        mask = torch.ones(n, start + n, dtype=torch.bool, device=h.device).tril(start)       # (T, start + T)
    for layer, kv in zip(layers, past or [None] * len(layers)):
        h, new = layer(h, start, kv, mask, cond)                             # (B, T, C)
        out.append(new)
    return h, out


def init_huginn(net, depth):
    """All initialisation (Huginn): N(0, 2 / 5C) cut at 3 deviations. Layers named `out` end a residual branch: less by
    sqrt(2 depth)."""
    std = (2 / (5 * net.config.n_embd)) ** 0.5
    for name, p in net.named_parameters():
        if name == "scale_weight":
            nn.init.constant_(p, 16.0)  # of the edm readout: with 1 no softmax would be sharp
        elif p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)      # norm weights are 1
        elif "modulation" in name:
            nn.init.zeros_(p)
        elif name.startswith("noise_embedding"):
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            s = std * (2 * depth) ** -0.5 if name.endswith("out.weight") else std
            nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s)


# ---- The network, as a DiffusionBlock and as the baseline -------------------------------------------------

class Recurrent(nn.Module):
    """Prelude, adapter, core and coda; the head is the embedding, transposed."""

    def __init__(self, config, modulated=False):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.prelude = nn.ModuleList(SandwichLayer(config) for _ in range(config.n_prelude))
        self.adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.core = nn.ModuleList(SandwichLayer(config, modulated) for _ in range(config.n_core))
        self.coda = nn.ModuleList(SandwichLayer(config, modulated) for _ in range(config.n_coda))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)

    def condition(self, x, start=0, past=None):
        """e (B, T, C), what the prelude makes of tokens x (B, T) after its past, and its keys and values."""
        return run(self.prelude, self.embed(x) * self.config.n_embd ** 0.5, start, past)


class Block(Recurrent):
    """The network as a denoiser for all noise levels: a state is a noisy embedding of the next token."""

    def __init__(self, config, b):
        super().__init__(config, modulated=True)
        self.b, self.noise = b, config.noise
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        if config.readout == "edm":
            self.head = nn.Linear(config.n_embd, config.n_embd, bias=False)
            self.scale_weight = nn.Parameter(torch.empty(1))
        table = target_table(config.vocab_size, config.n_embd, config.table_seed)  # (V, C)
        self.register_buffer("table", table, persistent=False)
        init_huginn(self, config.n_prelude + config.n_core + config.n_coda)
        nn.init.zeros_(self.adapter.weight[:, :config.n_embd])  # z enters at 0: at sigma_max it is pure noise
        self.title = "all layers, a pass at a time, sigma {:.3g} to {:.3g}".format(*self.noise.interval(b))

    def features(self, e, z, sigma, start=0, past=None):
        """(B, T, C), what the head reads in slots of e and z (B, T, C) at sigma (B,), after those of the
        past; and the slots' keys and values in core and coda."""
        c_in, c_noise = self.noise.input_scales(sigma)
        cond = self.noise_embedding(c_noise)                                 # (B, 1, n_cond)
        past_core, past_coda = None, None
        if past is not None:
            past_core, past_coda = past[:self.config.n_core], past[self.config.n_core:]
        h = torch.cat([self.config.z_rate * c_in[:, None, None] * z, e], dim=-1)             # (B, T, 2C)
        # the stream stays in float32: in bf16 the sum of many small changes would be lost
        h, core = run(self.core, self.adapter(h).float(), start, past_core, cond)
        h, coda = run(self.coda, self.norm(h), start, past_coda, cond)
        return self.norm(h), core + coda                                     # (B, T, C), pairs of all layers

    def readout(self, h, z, sigma):
        """Logits (B, T, V) of the next token, from features h and z, (B, T, C) each, and sigma (B,)."""
        if self.config.readout == "edm":
            return edm_logits(self.head(h), z, sigma, self.table, self.noise, self.scale_weight)
        return bayes_logits(F.linear(h, self.embed.weight), z, sigma, self.table)

    def logits(self, e, z, sigma, start=0, past=None):
        """Logits (B, T, V) of the next token in slots of e and z, and keys and values: see `features`."""
        h, new = self.features(e, z, sigma, start, past)                     # (B, T, C)
        return self.readout(h, z, sigma), new

    def forward(self, batch):
        """The score loss in nats per token, one pass through the network; batch (B, T + 1) token ids."""
        x, target = batch[:, :-1], batch[:, 1:]                              # (B, T) each
        sigma = self.noise.sample(self.b, len(x), x.device)                  # (B,)
        z = self.noise.corrupt(self.table[target], sigma)                    # (B, T, C)
        e, _ = self.condition(x)                                             # (B, T, C)
        h, _ = self.features(e, z, sigma)                                    # (B, T, C)
        readout = partial(self.readout, sigma=sigma)
        nats = token_losses(readout, self.config.vocab_size, target, h, z)   # (B, T)
        return score_loss(nats.mean(1), sigma, self.noise)


class EndToEnd(Recurrent):
    """The baseline: a random number of passes. EndToEnd(config.control()) is the control: one, from zeros."""

    def __init__(self, config):
        super().__init__(config)
        init_huginn(self, config.n_prelude + config.mean_passes * config.n_core + config.n_coda)
        self.title = f"trained end to end, {config.mean_passes} passes in the mean"

    def first_state(self, e):
        """(B, T, C) normal noise cut at 3 deviations (Huginn); by erfinv: trunc_normal_ waits for the GPU."""
        if self.config.mean_passes == 1:
            return torch.zeros_like(e)
        u = torch.rand(e.shape, device=e.device)
        std = (2 / 5) ** 0.5                                                 # sqrt(2 / 5C) * sqrt(C)
        return std * math.sqrt(2) * torch.erfinv((2 * u - 1) * math.erf(3 / math.sqrt(2)))

    def draw_passes(self):
        """The passes of a batch: 1 + Poisson with a log-normal rate (Huginn); the mean is mean_passes."""
        rate = (self.config.mean_passes - 1) * math.exp(0.5 * torch.randn(()).item() - 0.125)
        return 1 + int(torch.poisson(torch.tensor(rate)).item())

    def features(self, x, n_passes=0):
        """(B, T, C), what the head reads at each of tokens x (B, T). 0 passes: the mean number of them."""
        n_passes = n_passes or self.config.mean_passes
        train = torch.is_grad_enabled()
        e, _ = self.condition(x)                                             # (B, T, C)
        state = self.first_state(e)
        for k in range(n_passes):
            with torch.set_grad_enabled(train and k >= n_passes - self.config.grad_passes):
                h = self.adapter(torch.cat([state, e], dim=-1)).float()      # (B, T, C)
                state, _ = run(self.core, h)                                 # (B, T, C)
        h, _ = run(self.coda, self.norm(state))                              # (B, T, C)
        return self.norm(h)

    def readout(self, h):
        """Logits (B, T, V) of the next token from features h (B, T, C)."""
        return F.linear(h, self.embed.weight).float()

    def logits(self, x, n_passes=0):
        """Logits (B, T, V) of the token after each of x (B, T). 0 passes: the mean number of them."""
        return self.readout(self.features(x, n_passes))

    def forward(self, batch):
        """The cross-entropy in nats per token; batch (B, T + 1) token ids."""
        n_passes = self.draw_passes() if self.training else 0
        h = self.features(batch[:, :-1], n_passes)                           # (B, T, C)
        return token_losses(self.readout, self.config.vocab_size, batch[:, 1:], h).mean()


# ---- Generation and evaluation ----------------------------------------------------------------------------

@torch.no_grad()
def generate(nets, tokens, n_tokens, temperature=1.0, n_passes=32, use_cache=True):
    """(N, T + n_tokens): tokens (N, T), T > 0, and more. nets: the block in a list, or one EndToEnd."""
    seq_len = (nets[0] if isinstance(nets, list) else nets).config.seq_len
    half = seq_len // 2
    start, cache = 0, None
    for i in range(tokens.shape[1], tokens.shape[1] + n_tokens):
        first = max(0, math.ceil((i - seq_len) / half) * half)  # a full window drops its older half
        if first != start or not use_cache:
            start, cache = first, None
        if isinstance(nets, list):
            token, cache = next_token(nets[0], tokens[:, start:i], cache, temperature, n_passes)
        else:  # it has no cache: it computes its window again
            token = next_token_end_to_end(nets, tokens[:, start:i], temperature, n_passes)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens


def next_token_end_to_end(net, tokens, temperature, n_passes):
    """A token (N,) after tokens (N, T), from a baseline, or from a control, which has one pass."""
    if net.config.mean_passes == 1:
        n_passes = 1
    logits = net.logits(tokens, n_passes)[:, -1]                             # (N, V)
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


@dataclass
class Cache:
    """What a block keeps between two tokens. The last slot is open: its target is the next token.

    Keys and values are [(k, v)] of all layers, (N, H, T, D) each. Those of the slots depend on the noise level, so
    they are kept for every level that the sampler visits."""
    prelude: list    # keys and values of the clean tokens
    e: torch.Tensor  # (N, 1, C) of the open slot, whose target was not known yet
    slots: dict = field(default_factory=dict)  # {sigma: keys and values of the slots with known targets}


def next_token(block, tokens, cache, temperature, n_passes):
    """A token (N,) after tokens (N, T), and a Cache of them; the one given is of all but the last, or None."""
    if cache is None:
        e, prelude = block.condition(tokens)                                 # (N, T, C)
        past_slots = {}
    else:
        last = tokens.shape[1] - 1
        e, new = block.condition(tokens[:, last:], last, cache.prelude)      # (N, 1, C)
        prelude = extended(cache.prelude, new)
        e = torch.cat([cache.e, e], dim=1)                                   # (N, 2, C)
        past_slots = cache.slots
    following = Cache(prelude, e[:, -1:])  # for the next call; `denoise` fills its slots
    # the slots to run: n whose targets have become known, and the open one
    n = e.shape[1] - 1
    start = tokens.shape[1] - e.shape[1]
    known = block.table[tokens[:, start + 1:]]                               # (N, n, C)

    def denoise(z, sigma):
        level = torch.full((len(z),), sigma, device=z.device)
        # known slots are noisy, as in training; so the seed matters also at temperature 0
        slots = torch.cat([block.noise.corrupt(known, level), z], dim=1)     # (N, n + 1, C)
        past = past_slots.get(sigma)
        logits, new = block.logits(e, slots, level, start, past)             # (N, n + 1, V)
        known_kv = [(k[:, :, :n], v[:, :, :n]) for k, v in new]              # not those of the open slot
        following.slots[sigma] = extended(past, known_kv)
        return logits[:, -1:].softmax(-1) @ block.table                      # (N, 1, C)
    z = temperature * block.noise.sigma_max * torch.randn_like(e[:, -1:])    # (N, 1, C)
    steps = block.noise.steps(max(2, n_passes))[:n_passes]                   # a single pass is at sigma_max
    d = euler(denoise, z, steps)                                             # (N, 1, C)
    # after one pass d is still a mean of rows, and the row nearest to it may not be the most probable token
    return (d @ block.table.T).argmax(-1)[:, 0], following


def extended(past, new):
    """[(k, v)] of all layers: those of the past (or None) and of new slots, (B, H, T' + T, D) each."""
    if past is None:
        return new
    joined = []
    for (k, v), (new_k, new_v) in zip(past, new):
        joined.append((torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)))
    return joined


def sample(nets, sampling, data):
    """The prompts continued, as one printable text."""
    device = (nets[0] if isinstance(nets, list) else nets).embed.weight.device
    texts = []
    for prompt in sampling.prompt:
        tokens = torch.tensor([data.tokenizer.encode(prompt).tolist()], device=device)       # (1, T)
        tokens = generate(nets, tokens, sampling.n_tokens, sampling.temperature, sampling.n_passes)
        texts.append(data.tokenizer.decode(tokens[0].tolist()))
    return "\n---\n".join(texts)


@torch.no_grad()
def evaluate(blocks, others, data, n_windows=256):
    """Tables {title: {row: {column: value}}} of the block and of others {"end to end": net, "control": net}
    on held-out windows, in bits per byte whatever the tokenizer."""
    block, config = blocks[0], blocks[0].config
    windows = data.held_out(n_windows, config)                               # (N, T + 1)
    nats = Counter()  # of each of the others, summed over tokens
    scores = LabelScores.zero(1)
    for w in windows.split(windows_at_once(config.vocab_size, config.seq_len, 16)):
        x, target = w[:, :-1], w[:, 1:]                                      # (B, T) each
        for name, net in others.items():
            nats[name] += cross_entropy(net.logits(x), target).sum().item()
        e, _ = block.condition(x)                                            # (B, T, C)

        def logits(b, z, sigma):
            return block.logits(e, z, sigma)[0]                              # (B, T, V)
        scores += score_labels(logits, target, block.table, block.noise)
    per_byte = 1 / (math.log(2) * data.bytes_per_token * windows[:, 1:].numel())
    rows = {name: {"bits per byte": per_byte * nats[name]} for name in others}
    of_blocks, shares = scores.tables(per_byte, "bits per byte")
    return {"bits per byte on held-out text": rows | of_blocks, "the bound, share by share": shares}
