"""Recurrent depth: one weight-tied network, trained a pass at a time instead of through its recurrence.

The shape is Huginn's (arXiv 2502.05171): a prelude turns the text so far, x, into a condition e; the core
takes a state and e to a new state, again and again; a coda reads the last state. The baseline is trained
through a random number of passes. As a DiffusionBlock every pass is one Euler step: y is the fixed embedding
E of the next token, the state z = y + sigma * eps, and one pass guesses y from z at any sigma.

    loss = E over all sigma of  CE(prior(x, z, sigma) + z @ E^T / sigma^2, x_next)

Slot i holds e_i, which knows tokens <= i, and z_i = E[x_{i+1}] + sigma_i * eps. Slots either attend to each
other causally (aligned: z_j of an earlier slot is of a token that is known) or to a clean copy (two streams).

    python train.py --model recurrent --block 0
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from diffusion_blocks import (LogNormal, bayes_logits, bound_chain, bound_ends, bound_share, euler,
                              score_loss, target_table)

DATA = "text"  # what train.py has to load for this model


@dataclass
class Config:
    n_prelude: int = 2              # layers before the recurrence
    n_core: int = 4                 # layers of every pass
    n_coda: int = 2                 # layers after it
    n_blocks: int = 1               # one network for all noise levels: there is nothing to cut
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # width, and the dimension of the target embedding
    n_cond: int = 32                # width of the noise-level embedding
    seq_len: int = 128              # context length in tokens
    vocab_size: int = 0             # 0: as the tokenizer has it
    mean_passes: int = 32           # baseline: mean number of passes through the core in training (Huginn)
    grad_passes: int = 8            # baseline: the last passes, which have a gradient (Huginn)
    streams: str = "aligned"        # aligned: slots see earlier slots; two: slots see a clean copy
    p_mean: float = -1.2            # mean of ln sigma in training (EDM)
    p_std: float = 1.2              # its standard deviation (EDM)
    sigma_min: float = 0.002        # lowest noise level (EDM)
    sigma_max: float = 80.0         # highest noise level (EDM)
    z_rate: float = 0.1             # scale of z's zero-initialised way in: in effect its learning rate
    table_seed: int = 0             # seed of the target embedding


# lm1b has the paper's shape, with the GPT-2 tokenizer in the place of Llama-2's; its baseline: --epochs 5
PRESETS = {
    "default": dict(steps=400, batch_size=16, lr=6e-3, warmup=50),
    "lm1b": dict(n_head=8, n_embd=512, n_cond=128, seq_len=256, data="dvruette/lm1b", tokenizer="gpt2",
                 batch_size=256, epochs=15.0, lr=3e-4, warmup=2500),
}


@dataclass
class Sampling:
    prompt: tuple = ("\n",)         # one or more texts to continue
    n_tokens: int = 256             # tokens to add to the longest prompt
    temperature: float = 1.0        # block: scale of the starting noise; baseline: of the softmax
    top_k: int = 0                  # baseline only: choose among the k most probable tokens; 0: among all
    n_passes: int = 32              # passes for each token: of the recurrence, or Euler steps


# -----------------------------------------------------------------------------------------------------------
# The transformer layer

ROPE_BASE = 50_000.0  # Huginn


def rotate(x, start=0):
    """Rotary positions start, start + 1, ... for x (B, H, T, D): pairs of channels turn at geometric
    frequencies."""
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

    def forward(self, x, start=0, context=None, mask=None):
        """x (B, T, C) attends to itself causally or, given a context of keys and values, to that and itself
        by mask."""
        q = rotate(self.heads(self.query(x)), start)                    # (B, H, T, D)
        k, v = own = self.keys_values(x, start)
        if context is not None:
            k, v = torch.cat([context[0], k], dim=2), torch.cat([context[1], v], dim=2)  # (B, H, T' + T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=context is None)
        return self.out(y.transpose(1, 2).flatten(2)), own              # (B, T, C)


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


class SandwichLayer(nn.Module):
    """Huginn's layer: a norm before each sub-layer and another one after each sum. Given the noise level's
    embedding, adaLN shifts, scales and gates both sub-layers, zero-initialised around the plain layer."""

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

    def forward(self, x, start=0, context=None, mask=None, cond=None):
        """x (B, T, C), cond (B, 1, n_cond) or None -> the same shape, and the keys and values of x for a
        cache."""
        shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = 0.0
        if cond is not None:
            # (B, 1, C) each
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        h, own = self.attention(self.norm1(x) * (1 + scale1) + shift1, start, context, mask)
        x = self.norm2(x + (1 + gate1) * h)
        x = self.norm4(x + (1 + gate2) * self.mlp(self.norm3(x) * (1 + scale2) + shift2))
        return x, own

    def keys_values(self, x, start=0, cond=None):
        """What slots attend to in the last layer, without the rest of the layer, which nobody would read."""
        shift, scale = (0.0, 0.0) if cond is None else self.modulation(cond).chunk(6, dim=-1)[:2]
        return self.attention.keys_values(self.norm1(x) * (1 + scale) + shift, start)


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, 1, n_cond): Fourier features, then a two-layer MLP."""

    def __init__(self, n_cond):
        super().__init__()
        self.register_buffer("freq", torch.logspace(-1, 1.5, n_cond // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(n_cond, n_cond), nn.SiLU(), nn.Linear(n_cond, n_cond), nn.SiLU())

    def forward(self, c_noise):
        angle = c_noise[:, None, None] * self.freq                        # (B, 1, n_cond / 2)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))    # (B, 1, n_cond)


def run(layers, h, start=0, past=None, mask=None, cond=None):
    """h (B, T, C) through layers that attend to past keys and values, too -> the same shape, and those of
    h."""
    out = []
    for i, layer in enumerate(layers):
        h, own = layer(h, start, past[i] if past else None, mask, cond)      # (B, T, C)
        out.append(own)
    return h, out


def join(past, own):
    """Keys and values of all tokens so far, in each layer: [(k, v)], (B, H, start + T, D) each."""
    return [tuple(torch.cat(kv, dim=2) for kv in zip(a, b)) for a, b in zip(past, own)] if past else own


def init_huginn(net, depth):
    """All initialisation: N(0, 2 / 5C) cut at 3 deviations, residual outputs smaller by sqrt(2 depth)
    (Huginn); of the noise embedding N(0, 1 / fan-in), and its modulation at zero."""
    std = (2 / (5 * net.config.n_embd)) ** 0.5
    for name, p in net.named_parameters():
        if p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)      # norm weights are 1
        elif "modulation" in name:
            nn.init.zeros_(p)
        elif name.startswith("noise_embedding"):
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            s = std * (2 * depth) ** -0.5 if name.endswith("out.weight") else std
            nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s)


# -----------------------------------------------------------------------------------------------------------
# The network, as a DiffusionBlock and as the baseline

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

    def condition(self, x, past=None):
        """e (B, T, C), what the prelude makes of clean tokens x (B, T) and the past, and its keys and
        values."""
        start = past[0][0].shape[2] if past else 0
        assert start == 0 or x.shape[1] == 1  # tokens added together would see each other's future
        return run(self.prelude, self.embed(x) * self.config.n_embd ** 0.5, start, past)

    def one_pass(self, state, e, start=0, past=None, mask=None, cond=None):
        """The next state (B, T, C) from a state and e, and the core's keys and values."""
        return run(self.core, self.adapter(torch.cat([state, e], dim=-1)), start, past, mask, cond)

    def finish(self, state, start=0, past=None, mask=None, cond=None):
        """What the head reads (B, T, C), from a state (B, T, C), and the coda's keys and values."""
        h, own = run(self.coda, self.norm(state), start, past, mask, cond)   # (B, T, C)
        return self.norm(h), own

    def head(self, h):
        """Logits (B, T, V) from what `finish` gives (B, T, C)."""
        return F.linear(h, self.embed.weight).float()


class Block(Recurrent):
    """The whole network as a denoiser for all noise levels: a state is a noisy embedding of the next
    token."""

    def __init__(self, config, b):
        super().__init__(config, modulated=True)
        self.b = b
        self.noise = LogNormal(1, config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
        self.aligned = config.streams == "aligned"
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        table = target_table(config.vocab_size, config.n_embd, config.table_seed)  # (V, C)
        self.register_buffer("table", table, persistent=False)
        init_huginn(self, config.n_prelude + config.n_core + config.n_coda)
        nn.init.zeros_(self.adapter.weight[:, :config.n_embd])  # z must earn its way in, as in gpt.py
        self.title = f"block 0, sigma {config.sigma_min:.3g} to {config.sigma_max:.3g}"

    def describe(self):
        c = self.config
        return (f"block 0, the only one: {c.n_prelude} + {c.n_core} + {c.n_coda} layers for all noise, sigma "
                f"{c.sigma_min:.4g} to {c.sigma_max:.4g}, streams: {c.streams}")

    def state(self, z, sigma):
        """The state (B, T, C) of slots with z (B, T, C) at sigma (B,), and the noise embedding (B, 1,
        n_cond)."""
        _, _, c_in, c_noise = self.noise.precondition(sigma)
        return self.config.z_rate * c_in[:, None, None] * z, self.noise_embedding(c_noise)

    def context(self, e, z=None, sigma=None, past=None):
        """Keys and values [(k, v)], (B, H, start + T, D), for slots to attend to, one pair a layer of core
        and coda.

        Two streams: of a clean copy, which has an empty state and no noise level. Aligned: of slots of tokens
        that are known, z (B, T, C) at sigma (B,)."""
        start, n = past[0][0].shape[2] if past else 0, self.config.n_core
        assert start == 0 or e.shape[1] == 1
        state, cond = self.state(z, sigma) if self.aligned else (torch.zeros_like(e), None)
        h, own = self.one_pass(state, e, start, past and past[:n], None, cond)                # (B, T, C)
        h, more = run(self.coda[:-1], self.norm(h), start, past and past[n:], None, cond)     # (B, T, C)
        return join(past, own + more + [self.coda[-1].keys_values(h, start, cond)])

    def hidden(self, e, z, sigma, context=None, start=0):
        """What the head reads (B, T, C) in slots start, start + 1, ... that hold e and z (B, T, C) at sigma
        (B,).

        Without a context z is that of the true tokens at the level sigma, as in training. With one, slots
        attend to that and to themselves only, so that z may be anything."""
        if context is None and not self.aligned:
            context = self.context(e)
        mask, n = None, e.shape[1]
        if context is not None:
            # a slot sees earlier ones (aligned), or clean tokens up to its own, and itself
            seen = torch.ones(n, context[0][0].shape[2], dtype=torch.bool, device=e.device)
            itself = torch.eye(n, dtype=torch.bool, device=e.device)
            mask = torch.cat([seen.tril(start - self.aligned), itself], dim=1)       # (T, T' + T)
        (state, cond), n = self.state(z, sigma), self.config.n_core
        h, _ = self.one_pass(state, e, start, context and context[:n], mask, cond)   # (B, T, C)
        return self.finish(h, start, context and context[n:], mask, cond)[0]         # (B, T, C)

    def read(self, h, z, sigma):
        """Logits (B, T, V) of the next token from what the head reads, h (B, T, C), and z."""
        return bayes_logits(self.head(h), z, sigma, self.table)

    def logits(self, e, z, sigma, context=None, start=0):
        """Logits (B, T, V) of the next token: `read` of `hidden`."""
        return self.read(self.hidden(e, z, sigma, context, start), z, sigma)

    def denoise(self, e, z, sigma, context=None, start=0):
        """D(z, sigma, e) = E[y | z, e] (B, T, C): the expected embedding of the next token."""
        return self.logits(e, z, sigma, context, start).softmax(-1) @ self.table

    def loss(self, batch):
        """Score loss in nats per token, one pass through the network; batch (B, T + 1) token ids."""
        x, target = batch[:, :-1], batch[:, 1:]                              # (B, T) each
        e, _ = self.condition(x)                                             # (B, T, C)

        def nats(h, z, sigma, target):
            return cross_entropy(self.read(h, z, sigma), target).mean(1)     # (B,)

        def error(z, sigma):
            return by_rows(nats, self.config, self.hidden(e, z, sigma), z, sigma, target)
        return score_loss(error, self.table[target], self.noise, self.b)


class EndToEnd(Recurrent):
    """The baseline: from random states, a random number of passes, backpropagation through the last few. With
    one pass, from an empty state, it is the control."""

    def __init__(self, config, single=False):
        super().__init__(config)
        self.single = single
        n_passes = 1 if single else config.mean_passes
        init_huginn(self, config.n_prelude + n_passes * config.n_core + config.n_coda)
        self.title = "control, one pass" if single else f"end to end, {n_passes} passes in the mean"

    def describe(self):
        c = self.config
        return f"{self.title}, of {c.n_prelude} + {c.n_core} + {c.n_coda} layers"

    def first_state(self, e):
        """Truncated normal noise of the embedding's scale (Huginn), of e's shape."""
        if self.single:
            return torch.zeros_like(e)
        std = (2 / 5) ** 0.5                                                 # sqrt(2 / 5C) * sqrt(C)
        return nn.init.trunc_normal_(torch.empty_like(e), std=std, a=-3 * std, b=3 * std)

    def hidden(self, x, n_passes, past=None):
        """What the head reads (B, T, C), of x (B, T), and a cache: the keys and values of all tokens so far
        in the prelude, in each pass and in the coda.

        past: None, {} to begin a cache, or the cache. Only the last passes have a gradient."""
        past, keep, cache = past or {}, past is not None, {}

        def store(name, own):
            if keep:
                cache[name] = join(past.get(name), own)
        start = past["prelude"][0][0].shape[2] if past else 0
        e, own = self.condition(x, past.get("prelude"))                      # (B, T, C)
        store("prelude", own)
        state, with_gradient = self.first_state(e), torch.is_grad_enabled()
        for k in range(1, n_passes + 1):
            with torch.set_grad_enabled(with_gradient and k > n_passes - self.config.grad_passes):
                state, own = self.one_pass(state, e, start, past.get(k))     # (B, T, C)
            store(k, own)
        h, own = self.finish(state, start, past.get("coda"))                 # (B, T, C)
        store("coda", own)
        return h, cache

    def forward(self, x, n_passes, past=None):
        """Logits (B, T, V) of the token after each of x (B, T), and the cache: see `hidden`."""
        h, cache = self.hidden(x, n_passes, past)
        return self.head(h), cache

    def n_passes(self):
        """A draw of the number of passes, one for a batch: Poisson with a log-normal rate, plus 1 (Huginn);
        the mean when not training."""
        if self.single:
            return 1
        if not self.training:
            return self.config.mean_passes
        rate = math.exp(math.log(self.config.mean_passes) - 0.125 + 0.5 * torch.randn(()).item())
        return int(torch.poisson(torch.tensor(rate)).item()) + 1

    def loss(self, batch):
        """Cross-entropy in nats per token; batch (B, T + 1) token ids."""
        def nats(h, target):
            return cross_entropy(self.head(h), target).mean(1)               # (B,)
        h, _ = self.hidden(batch[:, :-1], self.n_passes())                   # (B, T, C)
        return by_rows(nats, self.config, h, batch[:, 1:]).mean()


def by_rows(nats, config, *tensors, most=2 ** 25):
    """nats(*tensors) (B,) of tensors (B, ...), for so few rows at a time that no more than `most` logits are
    there at once: the backward pass computes them again."""
    rows = max(1, most // (config.seq_len * config.vocab_size))
    if len(tensors[0]) <= rows:
        return nats(*tensors)
    parts = zip(*(t.split(rows) for t in tensors))
    return torch.cat([recompute(nats, *part, use_reentrant=False) for part in parts])


def cross_entropy(logits, target):
    """(B, T, V), (B, T) -> (B, T) nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def check(config):
    """Raises ValueError, in words for the user, if no network can be built from this configuration."""
    if min(config.n_prelude, config.n_core, config.n_coda, config.n_head, config.n_embd) < 1:
        raise ValueError("n_prelude, n_core, n_coda, n_head and n_embd must be at least 1")
    if config.n_blocks != 1:
        raise ValueError("recurrent is one weight-tied network for all noise levels: n_blocks can only be 1")
    if config.mean_passes < 1 or config.grad_passes < 1:
        raise ValueError("mean_passes and grad_passes must be at least 1")
    LogNormal(1, config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
    if config.n_embd % (2 * config.n_head):
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of twice n_head {config.n_head}")
    if config.n_cond < 2 or config.n_cond % 2 or config.seq_len < 2:
        raise ValueError("n_cond must be even and at least 2, seq_len at least 2")
    if config.streams not in ("aligned", "two"):
        raise ValueError(f"unknown streams {config.streams!r}; choose aligned or two")


def check_sampling(sampling):
    """Raises ValueError, in words for the user, for values that nothing can be sampled with."""
    if sampling.n_tokens < 0 or sampling.temperature < 0 or sampling.top_k < 0:
        raise ValueError("n_tokens, temperature and top_k must not be negative")
    if sampling.n_passes < 1:
        raise ValueError("n_passes must be at least 1")


def control(config):
    """The control: the same network trained with one pass, from an empty state, without noise. If the block
    does no better, its passes were not used."""
    return EndToEnd(config, single=True)


# -----------------------------------------------------------------------------------------------------------
# Generation

def window_start(i, seq_len):
    """First token that the prediction of token i may see. When a window is full, it begins anew with its last
    half."""
    half = seq_len // 2
    return 0 if i <= seq_len else math.ceil((i - seq_len) / half) * half


@torch.no_grad()
def generate(nets, prompts, n_tokens, use_cache=True, **how):
    """Continue prompts (lists of token ids, none empty) by n_tokens beyond the longest; returns (N, length)
    token ids.

    nets: the list of blocks, or one EndToEnd; how: see `next_token`. Rows with shorter prompts begin
    earlier."""
    net = nets[0] if isinstance(nets, list) else nets
    seq_len, device = net.config.seq_len, net.embed.weight.device
    first, last = min(map(len, prompts)), max(map(len, prompts)) + n_tokens
    tokens = torch.zeros(len(prompts), last, dtype=torch.long, device=device)
    given = torch.zeros(len(prompts), last, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.as_tensor(list(prompt), device=device)
        given[row, :len(prompt)] = True
    start, cache = None, None
    for i in range(first, last):
        if start != window_start(i, seq_len) or not use_cache:
            start, cache = window_start(i, seq_len), None
        token, cache = next_token(nets, tokens[:, start:i], cache, **how)
        tokens[:, i] = torch.where(given[:, i], tokens[:, i], token)
    return tokens


def next_token(nets, tokens, cache, temperature=1.0, top_k=0, n_passes=32):
    """A token (N,) after tokens (N, T), and the cache, which holds all of them; the one given holds all but
    the last, or is None.

    Each pass has a cache of its own. Aligned slots of tokens that are known hold noise of each level, as in
    training: they cost a second slot for each token and pass."""
    new = tokens[:, -1:] if cache else tokens
    if isinstance(nets, EndToEnd):
        logits, cache = nets(new, n_passes, cache or {})
        return choose(logits[:, -1], temperature, top_k), cache
    block, past = nets[0], cache or {}
    e, own = block.condition(new, past.get("prelude"))                       # (N, 1 or T, C)
    cache = {"prelude": join(past.get("prelude"), own), "e": torch.cat([past["e"], e], 1) if past else e}
    # of aligned slots, the last has no target yet: it is the one that is denoised
    e = cache["e"][:, :-1] if block.aligned else cache["e"]                  # (N, T - 1 or T, C)
    y = block.table[tokens[:, 1:]]                                           # (N, T - 1, C)

    def context(level, sigma):
        before = past.get(level)
        start = before[0][0].shape[2] if before else 0
        if start < e.shape[1]:
            z = block.noise.corrupt(y[:, start:], sigma) if block.aligned else None
            cache[level] = block.context(e[:, start:], z, sigma, before)
        return cache.get(level)                                              # None: no slot before the first

    shared = None if block.aligned else context("clean", None)

    def denoise(z, sigma):
        level = sigma.float().to(z.device).expand(len(z))
        seen = context(sigma.item(), level) if block.aligned else shared
        return block.denoise(cache["e"][:, -1:], z, level, seen, start=tokens.shape[1] - 1)
    z = temperature * block.noise.sigma_max * torch.randn_like(cache["e"][:, -1:])       # (N, 1, C)
    d = euler(denoise, z, chain(block.noise, n_passes))                                  # (N, 1, C)
    return (d @ block.table.T).argmax(-1)[:, 0], cache


def chain(noise, n_passes):
    """The levels of a chain of passes, from sigma_max down; a single pass is one at sigma_max, and greedy."""
    return noise.steps(n_passes) if n_passes > 1 else noise.steps(2)[:1]


def sampling_step(net, n):
    """A function of prelude, one pass and coda for the last token of n windows, the rest of which is in a
    cache."""
    x = torch.zeros(n, net.config.seq_len, dtype=torch.long, device=net.embed.weight.device)
    if isinstance(net, EndToEnd):
        _, cache = net(x[:, 1:], 1, {})
        return lambda: net(x[:, :1], 1, cache)
    (e, past), sigma = net.condition(x[:, 1:]), torch.ones(n, device=x.device)
    z = torch.randn(n, net.config.seq_len, net.config.n_embd, device=x.device)
    context = net.context(e, z[:, 1:], sigma)
    return lambda: net.denoise(net.condition(x[:, :1], past)[0], z[:, :1], sigma, context, x.shape[1] - 1)


def choose(logits, temperature, top_k):
    """A token (N,) from logits (N, V): softmax with a temperature (0: the most probable), among the top_k if
    not 0."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


def sample(nets, sampling, tokenizer):
    """The user's prompts continued, as one printable text. Raises ValueError for an empty prompt."""
    prompts = [tokenizer.encode(p).tolist() for p in sampling.prompt]
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one character")
    n_passes = 1 if isinstance(nets, EndToEnd) and nets.single else sampling.n_passes
    rows = generate(nets, prompts, sampling.n_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                    n_passes=n_passes)
    return "\n---\n".join(tokenizer.decode(row.tolist()) for row in rows)


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


PASSES = (1, 2, 4, 8, 16, 32, 64)


@torch.no_grad()
def evaluate(blocks, end_to_end, control, data, sampling, n_windows=256):
    """(tables {title: {row: {column: value}}}, {}) of the block, baseline and control (None: left out) on
    held-out windows; what depends on the number of passes, which is dear, on the first quarter of them.

    Bits per byte whatever the tokenizer."""
    block, config, noise, table = blocks[0], blocks[0].config, blocks[0].noise, blocks[0].table
    at_once = max(1, min(16, 2 ** 27 // (config.vocab_size * config.seq_len)))  # at most 512 MB of logits
    windows = data.held_out(n_windows, config).split(at_once)
    sizes = [data.token_bytes[w[:, 1:]].sum().item() for w in windows]     # bytes scored in each batch
    grid = noise.steps(9).tolist()
    scores = {n: [] for n in ("baseline", "control", "share", "reconstruction", "prior")}
    at_level, hint_free = {s: [] for s in grid}, {s: [] for s in grid}
    for w in windows:
        x, target = w[:, :-1], w[:, 1:]                                    # (B, T)
        y = table[target]                                                  # (B, T, C)
        for name, net, n_passes in (("baseline", end_to_end, config.mean_passes), ("control", control, 1)):
            if net is not None:
                logits, _ = net(x, n_passes)                               # (B, T, V)
                scores[name].append(cross_entropy(logits, target).sum().item())
        e, _ = block.condition(x)                                          # (B, T, C)

        def nats(z, sigma, context=None):
            return cross_entropy(block.logits(e, z, sigma, context), target).sum(1)            # (B,)

        def squared_error(z, sigma):
            return (y - block.denoise(e, z, sigma)).pow(2).sum((1, 2))                         # (B,)
        scores["share"].append(bound_share(squared_error, y, noise, 0, n=8) * len(w))
        reconstruction, prior = bound_ends(nats, y, noise)
        scores["reconstruction"].append(reconstruction * len(w))
        scores["prior"].append(prior * len(w))
        for s in grid:
            level = torch.full((len(w),), s, device=w.device)
            z = noise.corrupt(y, level)
            at_level[s].append(nats(z, level).sum().item())
            # a slot's own z is 0, those of the slots before it are not
            hint_free[s].append(nats(torch.zeros_like(y), level, block.context(e, z, level)).sum().item())

    bound = [sum(scores[n][i] for n in ("share", "reconstruction", "prior")) for i in range(len(windows))]
    others, at_max = {n: scores[n] for n in ("baseline", "control") if scores[n]}, at_level[grid[0]]
    summary = {name: bits(nats, sizes) for name, nats in others.items()}
    summary["blocks (bound)"] = bits(bound, sizes)
    summary["blocks, cross-entropy at sigma_max"] = bits(at_max, sizes)
    for name, other in {"cross-entropy at sigma_max": at_max, **others}.items():
        summary[f"blocks (bound) - {name}"] = bits([a - b for a, b in zip(bound, other)], sizes)
    prior = data.unigram()  # (V,) log-probabilities in the training text
    tables = {"bits per byte on held-out text": summary, "cross-entropy by noise level": {
        f"sigma {s:.4g}": {**bits(v, sizes),
                           "without its hint (z = 0)": bits(hint_free[s], sizes)["bits per byte"],
                           "context-free Bayes": context_free(prior, table, s, windows, sizes)}
        for s, v in at_level.items()}}
    quarter = math.ceil(len(windows) / 4)
    tables["by number of passes"] = by_passes(block, end_to_end, windows[:quarter], sizes[:quarter], prior)
    if end_to_end is not None:
        tables["generated text"] = generation_by_passes(blocks, end_to_end, data, config)
    return tables, {}


def by_passes(block, end_to_end, windows, sizes, prior):
    """{row: {column: value}} for each of PASSES: the baseline's bits per byte; the next token right, of the
    baseline and of a chain of Euler steps; the bound of an ancestral sampler that visits the chain's levels.

    That bound is a property of the grid, too: beside it stands that of the exact posterior from z and the
    frequencies of tokens, `prior` (V,), alone. With one or two passes a chain "from noise" is greedy, since
    its output at sigma_min is the nearest row to what it guessed at sigma_max."""
    noise, table = block.noise, block.table
    names = [f"{how}, next token right, %" for how in ("baseline", "from z = 0", "from noise")]
    right = {k: {name: [] for name in names} for k in PASSES}
    nats = {k: {"baseline": [], "bound": [], "from z alone": []} for k in PASSES}
    for w in windows:
        x, target = w[:, :-1], w[:, 1:]                                    # (B, T)
        y, (e, _) = table[target], block.condition(x)                      # (B, T, C)

        def hits(token):
            return 100 * (token == target).sum().item() / target.numel()

        def squared_error(z, sigma):
            return (y - block.denoise(e, z, sigma)).pow(2).sum((1, 2))     # (B,)

        def unigram_error(z, sigma):
            d = bayes_logits(prior, z, sigma, table).softmax(-1) @ table   # (B, T, C)
            return (y - d).pow(2).sum((1, 2))                              # (B,)
        for k in PASSES:
            if end_to_end is not None:
                logits, _ = end_to_end(x, k)                               # (B, T, V)
                nats[k]["baseline"].append(cross_entropy(logits, target).sum().item())
                right[k][names[0]].append(hits(logits.argmax(-1)))
            if k > 1:
                for column, error in (("bound", squared_error), ("from z alone", unigram_error)):
                    nats[k][column].append(bound_chain(error, y, noise, noise.steps(k)) * len(w))
            for name, temperature in zip(names[1:], (0.0, 1.0)):
                right[k][name].append(hits(denoise_tokens(block, e, y, temperature, k)))
    titles = {"baseline": "baseline, bits per byte", "bound": "bound of the sampler, bits per byte",
              "from z alone": "the same from z alone (Bayes)"}
    return {f"{k} passes": {
        **{titles[column]: bits(v, sizes)["bits per byte"] for column, v in nats[k].items() if v},
        **{name: sum(v) / len(v) for name, v in right[k].items() if v}} for k in PASSES}


def denoise_tokens(block, e, y, temperature, n_passes):
    """The token (B, T) that a chain ends at in every slot, from e (B, T, C); y (B, T, C) are the true
    targets, of which a slot knows the earlier ones."""
    shared = None if block.aligned else block.context(e)

    def denoise(z, sigma):
        level = sigma.float().to(e.device).expand(len(e))
        context = block.context(e, block.noise.corrupt(y, level), level) if block.aligned else shared
        return block.denoise(e, z, level, context)
    z = temperature * block.noise.sigma_max * torch.randn_like(y)          # (B, T, C)
    return (euler(denoise, z, chain(block.noise, n_passes)) @ block.table.T).argmax(-1)


def context_free(prior, table, sigma, windows, sizes):
    """Bits per byte of the posterior from z alone, log p(y) + z.E_y / sigma^2 normalised: what is left for x
    to tell."""
    total = 0.0
    for w in windows[:4]:
        y = table[w[:, 1:]]
        level = torch.full((len(w),), sigma, device=w.device)
        logits = bayes_logits(prior, y + sigma * torch.randn_like(y), level, table)
        total += cross_entropy(logits, w[:, 1:]).sum().item()
    return total / math.log(2) / sum(sizes[:4])


def score_text(tokens, logits, start, stop, data):
    """Token start to stop of rows (N, >= stop): bits per byte under a judge, logits(x) (N, T, V) of the token
    after each of x (N, T), and what tells a text that repeats itself, which any judge likes."""
    new, x, target = tokens[:, start:stop], tokens[:, :stop - 1], tokens[:, 1:stop]
    nats = cross_entropy(logits(x), target)[:, start - 1:]             # (N, length)
    pairs = torch.stack([new[:, :-1], new[:, 1:]], -1).flatten(0, 1)   # (N * (length - 1), 2)
    p = torch.bincount(new.flatten().cpu()).double() / new.numel()
    p = p[p > 0]
    return {"judge, bits per byte": nats.sum().item() / math.log(2) / data.token_bytes[new].sum().item(),
            "distinct-2": len(pairs.unique(dim=0)) / len(pairs),
            "unigram entropy, bits": -(p * p.log2()).sum().item()}


def generation_by_passes(blocks, judge, data, config, n=32, length=64):
    """Continuations of held-out beginnings, over the number of passes: bits per byte under the judge, with
    distinct-2 and entropy beside it.

    A low score from the judge is no merit by itself: a text that repeats one word has it, with distinct-2
    near 0."""
    windows = data.held_out(n, config)[:, :config.seq_len]
    start = max(1, min(config.seq_len // 2, config.seq_len - length))
    prompts, stop = windows[:, :start].tolist(), min(config.seq_len, start + length)

    def score(tokens):
        return score_text(tokens, lambda x: judge(x, config.mean_passes)[0], start, stop, data)

    rows = {"held-out text": score(windows)}
    for t, n_passes in ((0.7, 32), (0.85, 32), (1.0, 32), (1.0, 4)):
        rows[f"baseline, temperature {t}, {n_passes} passes"] = score(
            generate(judge, prompts, stop - start, temperature=t, n_passes=n_passes))
    for t, n_passes in ((0.0, 32), (0.7, 32), (0.85, 32), *((1.0, k) for k in PASSES[2:])):
        rows[f"blocks, temperature {t}, {n_passes} passes"] = score(
            generate(blocks, prompts, stop - start, temperature=t, n_passes=n_passes))
    return rows
