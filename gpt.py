"""Autoregressive GPT, block by block: every block denoises the embedding of the next token.

x is the clean text so far, y the fixed unit-norm embedding E of the next token at every position, z = y +
sigma * eps. A block carries two streams through its own layers. The clean stream is a plain causal decoder
over x. Slot i of the noisy stream starts from token i and z_i = E[x_{i+1}] + sigma_i * eps, attends to clean
tokens <= i and to itself, and predicts x_{i+1}. Only slots see the noise level, so clean keys and values are
computed once a token, and cached.

    loss of block b = E over sigma in its interval of  CE(prior_b(x, z, sigma) + z @ E^T / sigma^2, x_next)

`EndToEnd` is the baseline: the same Llama-2 style layers, next-token cross-entropy, no noise.

    python train.py --model gpt --block 2
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from diffusion_blocks import (LogNormal, bayes_logits, bound_ends, bound_share, edm_logits, euler, score_loss,
                              split_layers, target_table)

DATA = "text"  # what train.py has to load for this model


@dataclass
class Config:
    n_layer: int = 8                # transformer layers of the whole model
    n_blocks: int = 4               # blocks it is cut into, each trained alone
    layer_split: str = ""           # layers of each block, e.g. 3,3,1,1; empty: the same number in each
    n_head: int = 4                 # attention heads
    n_embd: int = 96                # width, and the dimension of the target embedding
    n_cond: int = 32                # width of the noise-level embedding (released ViT: n_embd / 6)
    seq_len: int = 256              # context length in tokens
    vocab_size: int = 0             # 0: as the tokenizer has it
    readout: str = "bayes"          # bayes: prior + z.E/sigma^2; edm: the paper's, c_skip z + c_out F
    p_mean: float = -1.2            # mean of ln sigma in training (EDM)
    p_std: float = 1.2              # its standard deviation (EDM)
    sigma_min: float = 0.002        # lowest noise level (EDM)
    sigma_max: float = 80.0         # highest noise level (EDM)
    sigma_data: float = 0.5         # EDM's; scales z at the input (and the edm readout)
    gamma: float = 0.1              # overlap of neighbouring blocks in training (paper: 0.1 for text)
    edges: str = "probability"      # probability (paper), uniform in ln sigma, or all ends: 0.002,0.3,80
    weighting: str = "none"         # of the cross-entropy: none (in effect the released code's) or edm
    z_rate: float = 0.1             # scale of z's zero-initialised way in: in effect its learning rate
    table_seed: int = 0             # seed of the target embedding; the same in every block


# A preset names fields of Config above or of train.py's Training. lm1b and owt have the paper's shape and
# schedule, with the GPT-2 tokenizer in the place of Llama-2's, which is not freely downloadable.
PAPER = dict(n_layer=12, n_blocks=4, n_head=12, n_embd=768, n_cond=128, seq_len=256, gamma=0.1,
             tokenizer="gpt2", batch_size=256, epochs=10.0, lr=3e-4, warmup=2500)
PRESETS = {
    "default": dict(steps=800, batch_size=8, lr=3e-3, warmup=50),
    "lm1b": dict(PAPER, data="dvruette/lm1b"),
    "owt": dict(PAPER, data="Skylion007/openwebtext", seq_len=1024),
}


@dataclass
class Sampling:
    prompt: tuple = ("\n",)         # one or more texts to continue
    n_tokens: int = 256             # tokens to add to the longest prompt
    temperature: float = 1.0        # blocks: scale of the starting noise; baseline: of the softmax
    top_k: int = 0                  # baseline only: choose among the k most probable tokens; 0: among all
    euler_steps: int = 0            # noise levels visited for each token; 0: max(n_blocks + 1, 4)


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


class Layer(nn.Module):
    """Pre-norm decoder layer. Given the noise level's embedding, adaLN shifts, scales and gates both
    sub-layers.

    The modulation is zero-initialised around the plain layer (gates start at 1): see README, differences."""

    def __init__(self, config, modulated=False):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = MLP(config)
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
        x = x + (1 + gate1) * h
        x = x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x, own

    def keys_values(self, x, start=0):
        """What slots attend to in the last layer, without the rest of the layer, which nobody would read."""
        return self.attention.keys_values(self.norm1(x), start)


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, 1, n_cond): Fourier features, then a two-layer MLP."""

    def __init__(self, n_cond):
        super().__init__()
        self.register_buffer("freq", torch.logspace(-1, 1.5, n_cond // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(n_cond, n_cond), nn.SiLU(), nn.Linear(n_cond, n_cond), nn.SiLU())

    def forward(self, c_noise):
        angle = c_noise[:, None, None] * self.freq                        # (B, 1, n_cond / 2)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))    # (B, 1, n_cond)


def init_weights(net):
    """All initialisation: N(0, 0.02), residual outputs smaller by sqrt(2 layers) (GPT-2); z and noise enter
    at zero."""
    for name, p in net.named_parameters():
        if name == "scale_weight":
            nn.init.constant_(p, 16.0)  # of the edm readout: between unit vectors alone no softmax is sharp
        elif p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)   # norm weights are 1
        elif "modulation" in name or name.startswith("z_in"):
            nn.init.zeros_(p)   # z is unit noise beside embeddings of std 0.02: it must earn its way in
        else:
            std = 0.02 / math.sqrt(2 * len(net.layers)) if name.endswith("out.weight") else 0.02
            nn.init.normal_(p, std=std)


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
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.z_in = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        self.layers = nn.ModuleList(Layer(config, modulated=True) for _ in self.layer_range)
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        bayes = config.readout == "bayes"
        self.head = nn.Linear(config.n_embd, config.vocab_size if bayes else config.n_embd, bias=False)
        if not bayes:
            # unit vectors alone cannot make a sharp softmax
            self.scale_weight = nn.Parameter(torch.empty(1))
        table = target_table(config.vocab_size, config.n_embd, config.table_seed)  # (V, C)
        self.register_buffer("table", table, persistent=False)
        init_weights(self)
        self.title = "block {}, sigma {:.3g} to {:.3g}".format(b, *self.noise.interval(b))

    def describe(self):
        c, layers, (lo, hi) = self.config, self.layer_range, self.noise.interval(self.b)
        wide_lo, wide_hi = self.noise.interval(self.b, overlap=True)
        return (f"block {self.b} of 0 to {c.n_blocks - 1}, layers {layers[0]} to {layers[-1]} of 0 to "
                f"{c.n_layer - 1}, sigma {lo:.4g} to {hi:.4g}, trained on {wide_lo:.4g} to {wide_hi:.4g}")

    def context(self, x, cache=None):
        """Keys and values of the clean tokens x (B, T) in every layer, after those of an earlier cache; no
        noise here."""
        assert not cache or x.shape[1] == 1  # tokens added together would see each other's future
        start = cache[0][0].shape[2] if cache else 0
        h, out = self.embed(x), []                                           # (B, T, C)
        for i, layer in enumerate(self.layers):
            past = cache[i] if cache else None
            if layer is self.layers[-1]:
                own = layer.keys_values(h, start)
            else:
                h, own = layer(h, start, past)
            out.append(tuple(torch.cat(pair, dim=2) for pair in zip(past, own)) if cache else own)
        return out  # [(k, v)], (B, H, start + T, D) each

    def hidden(self, x, z, sigma, context):
        """What the head reads (B, T, C) in the slots of the last T clean tokens x, given z (B, T, C), sigma
        (B,)."""
        _, _, c_in, c_noise = self.noise.precondition(sigma)
        cond = self.noise_embedding(c_noise)                                 # (B, 1, n_cond)
        n, start = x.shape[1], context[0][0].shape[2] - x.shape[1]
        # a slot sees itself, no other slot, and clean tokens up to its own
        own = torch.eye(n, dtype=torch.bool, device=x.device)
        seen = torch.ones(n, start + n, dtype=torch.bool, device=x.device).tril(start)
        mask = torch.cat([seen, own], dim=1)                                 # (T, start + 2T)
        h = self.embed(x) + self.config.z_rate * self.z_in(c_in[:, None, None] * z)      # (B, T, C)
        for layer, clean in zip(self.layers, context):
            h, _ = layer(h, start, clean, mask, cond)                        # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        return self.norm(h) * (1 + scale) + shift                            # (B, T, C)

    def read(self, h, z, sigma):
        """Logits (B, T, V) of the next token from what the head reads, h (B, T, C), and z."""
        f = self.head(h)                                                     # (B, T, V), or (B, T, C) for edm
        if self.config.readout == "bayes":
            return bayes_logits(f, z, sigma, self.table)
        return edm_logits(f, z, sigma, self.table, self.noise, self.scale_weight)

    def logits(self, x, z, sigma, context):
        """Logits (B, T, V) of the next token: `read` of `hidden`."""
        return self.read(self.hidden(x, z, sigma, context), z, sigma)

    def denoise(self, x, z, sigma, context):
        """D(z, sigma, x) = E[y | z, x] (B, T, C): the expected embedding of the next token."""
        return self.logits(x, z, sigma, context).softmax(-1) @ self.table

    def loss(self, batch):
        """Score loss in nats per token of this block alone; batch (B, T + 1) token ids."""
        x, target = batch[:, :-1], batch[:, 1:]                              # (B, T) each
        context = self.context(x)

        def nats(h, z, sigma, target):
            return cross_entropy(self.read(h, z, sigma), target).mean(1)     # (B,)

        def error(z, sigma):
            return by_rows(nats, self.config, self.hidden(x, z, sigma, context), z, sigma, target)
        return score_loss(error, self.table[target], self.noise, self.b)


class EndToEnd(nn.Module):
    """The baseline: all layers, backpropagation through all of them. With one block's layers it is the
    control."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self)
        self.title = f"end to end, {config.n_layer} layers"

    def describe(self):
        return f"{self.config.n_layer} layers, end to end"

    def hidden(self, x, cache=None):
        """What the head reads (B, T, C), of x (B, T), and the keys and values of all tokens so far."""
        assert not cache or x.shape[1] == 1  # tokens added together would see each other's future
        start = cache[0][0].shape[2] if cache else 0
        h, out = self.embed(x), []                                           # (B, T, C)
        for i, layer in enumerate(self.layers):
            past = cache[i] if cache else None
            h, own = layer(h, start, past)
            out.append(tuple(torch.cat(pair, dim=2) for pair in zip(past, own)) if cache else own)
        return self.norm(h), out

    def forward(self, x, cache=None):
        """Logits (B, T, V) of the token after each of x (B, T), and the keys and values of all tokens so
        far."""
        h, cache = self.hidden(x, cache)
        return self.head(h).float(), cache

    def loss(self, batch):
        """Cross-entropy in nats per token; batch (B, T + 1) token ids."""
        def nats(h, target):
            return cross_entropy(self.head(h).float(), target).mean(1)       # (B,)
        return by_rows(nats, self.config, self.hidden(batch[:, :-1])[0], batch[:, 1:]).mean()


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
    if min(config.n_layer, config.n_blocks, config.n_head, config.n_embd) < 1:
        raise ValueError("n_layer, n_blocks, n_head and n_embd must be at least 1")
    make_noise(config)
    split_layers(config.n_layer, config.n_blocks, config.layer_split)
    if config.n_embd % (2 * config.n_head):
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of twice n_head {config.n_head}")
    if config.n_cond < 2 or config.n_cond % 2 or config.seq_len < 2:
        raise ValueError("n_cond must be even and at least 2, seq_len at least 2")
    if config.readout not in ("bayes", "edm"):
        raise ValueError(f"unknown readout {config.readout!r}; choose bayes or edm")


def check_sampling(sampling):
    """Raises ValueError, in words for the user, for values that nothing can be sampled with."""
    if sampling.n_tokens < 0 or sampling.temperature < 0 or sampling.top_k < 0:
        raise ValueError("n_tokens, temperature and top_k must not be negative")
    if sampling.euler_steps < 0 or sampling.euler_steps == 1:
        raise ValueError("euler_steps must be 0, for the default, or at least 2")


def control(config):
    """The control: one block's worth of layers, trained end to end. If the blocks do no better, depth was not
    used."""
    return EndToEnd(replace(config, n_layer=max(1, config.n_layer // config.n_blocks)))


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


def next_token(nets, tokens, cache, temperature=1.0, top_k=0, euler_steps=0):
    """A token (N,) after tokens (N, T), and the cache, which holds all of them; the one given holds all but
    the last, or is None.

    With a cache a token costs one pass of the clean stream through every block and one slot for each noise
    level; the past is not computed again."""
    new = tokens[:, -1:] if cache else tokens
    if isinstance(nets, list):
        cache = [block.context(new, past) for block, past in zip(nets, cache or [None] * len(nets))]
        return denoise_token(nets, new[:, -1:], cache, temperature, euler_steps)[:, 0], cache
    logits, cache = nets(new, cache)
    return choose(logits[:, -1], temperature, top_k), cache


def denoise_token(blocks, x, contexts, temperature, euler_steps):
    """The tokens (N, T) after each of the last T clean tokens x: from noise through the blocks, then the
    nearest row."""
    noise, table = blocks[0].noise, blocks[0].table
    steps = noise.steps(euler_steps or max(len(blocks) + 1, 4))
    z = temperature * steps[0].item() * torch.randn(*x.shape, table.shape[1], device=x.device)  # (N, T, C)

    def denoise(z, sigma):
        b = noise.block_of(sigma).item()
        return blocks[b].denoise(x, z, sigma.float().to(x.device).expand(len(x)), contexts[b])
    return (euler(denoise, z, steps) @ table.T).argmax(-1)                                      # (N, T)


def sampling_step(net, n):
    """A function that evaluates a block, or a baseline, once for the last token of n windows, the rest of
    which is in a cache."""
    x = torch.zeros(n, net.config.seq_len, dtype=torch.long, device=net.embed.weight.device)
    if isinstance(net, EndToEnd):
        _, cache = net(x[:, 1:])
        return lambda: net(x[:, :1], cache)
    context, sigma = net.context(x), torch.ones(n, device=x.device)
    z = torch.randn(n, 1, net.config.n_embd, device=x.device)
    return lambda: net.denoise(x[:, :1], z, sigma, context)


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
    rows = generate(nets, prompts, sampling.n_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                    euler_steps=sampling.euler_steps)
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


@torch.no_grad()
def evaluate(blocks, end_to_end, control, data, sampling, n_windows=256):
    """(tables {title: {row: {column: value}}}, {}) of blocks, baseline and control (None: left out) on
    held-out windows. Of sampling, euler_steps is used.

    Bits per byte whatever the tokenizer. A block's share of the bound is in the same unit, and the shares add
    up."""
    config, noise, table = blocks[0].config, blocks[0].noise, blocks[0].table
    at_once = max(1, min(32, 2 ** 27 // (config.vocab_size * config.seq_len)))  # at most 512 MB of logits
    windows = data.held_out(n_windows, config).split(at_once)
    sizes = [data.token_bytes[w[:, 1:]].sum().item() for w in windows]     # bytes scored in each batch
    ends = [noise.interval(b)[::-1] for b in range(config.n_blocks)]
    grid = [s for hi, lo in ends for s in (hi, noise.icdf(noise.cdf([hi, lo]).mean()).item())]
    grid.append(noise.sigma_min)  # so: every upper end, a level inside each interval, and the lowest
    names = [f"block {b}" for b in range(config.n_blocks)]
    scores = {n: [] for n in ["baseline", "control", "reconstruction", "prior", *names]}
    hint_free, at_level = {n: [] for n in names}, {s: [] for s in grid}
    right = {"baseline": [], "control": [], "blocks from z = 0": [], "blocks from noise": []}
    for w in windows:
        x, target = w[:, :-1], w[:, 1:]                                    # (B, T)
        y, count = table[target], target.numel()                           # (B, T, C)
        for name, net in (("baseline", end_to_end), ("control", control)):
            if net is not None:
                logits = net(x)[0]                                         # (B, T, V)
                scores[name].append(cross_entropy(logits, target).sum().item())
                right[name].append((logits.argmax(-1) == target).sum().item() / count)
        contexts = [block.context(x) for block in blocks]

        def nats(b, z, sigma):
            return cross_entropy(blocks[b].logits(x, z, sigma, contexts[b]), target).sum(1)           # (B,)

        for b, block in enumerate(blocks):
            def squared_error(z, sigma):
                return (y - block.denoise(x, z, sigma, contexts[b])).pow(2).sum((1, 2))               # (B,)
            scores[f"block {b}"].append(bound_share(squared_error, y, noise, b) * len(w))
            middle = torch.full((len(w),), math.sqrt(math.prod(noise.interval(b))), device=w.device)
            hint_free[f"block {b}"].append(nats(b, torch.zeros_like(y), middle).sum().item())
        reconstruction, prior = bound_ends(lambda z, sigma: nats(-1, z, sigma), y, noise)
        scores["reconstruction"].append(reconstruction * len(w))
        scores["prior"].append(prior * len(w))
        for s in grid:
            level = torch.full((len(w),), s, device=w.device)
            at_level[s].append(nats(noise.block_of(s), noise.corrupt(y, level), level).sum().item())
        for name, temperature in (("blocks from z = 0", 0.0), ("blocks from noise", 1.0)):
            token = denoise_token(blocks, x, contexts, temperature, sampling.euler_steps)
            right[name].append((token == target).sum().item() / count)

    shares = [*names, "reconstruction", "prior"]
    bound = [sum(scores[n][i] for n in shares) for i in range(len(windows))]
    summary = {n: bits(scores[n], sizes) for n in ("baseline", "control") if scores[n]}
    summary["blocks (bound)"] = bits(bound, sizes)
    at_max = at_level[grid[0]]
    summary["blocks, cross-entropy at sigma_max"] = bits(at_max, sizes)
    summary["bound - cross-entropy at sigma_max"] = bits([a - b for a, b in zip(bound, at_max)], sizes)
    if control is not None:
        summary["blocks (bound) - control"] = bits([a - b for a, b in zip(bound, scores["control"])], sizes)
    for name, values in (("baseline", right["baseline"]), ("control", right["control"])):
        if values:
            summary[name]["next token right, %"] = 100 * sum(values) / len(values)
    tables = {"bits per byte on held-out text": summary}
    tables["the bound, share by share"] = {n: bits(scores[n], sizes) for n in shares}
    tables["each block without its hint (z = 0)"] = {n: bits(v, sizes) for n, v in hint_free.items()}
    prior = data.unigram()  # (V,) log-probabilities in the training text
    tables["cross-entropy by noise level, owning block"] = {
        f"sigma {s:.4g}": {"block": noise.block_of(s), **bits(v, sizes),
                           "context-free Bayes": context_free(prior, table, s, windows, sizes)}
        for s, v in at_level.items()}
    tables["next token right, %"] = {n: {"%": 100 * sum(v) / len(v)} for n, v in right.items() if v}
    if end_to_end is not None:
        tables["generated text"] = generation(blocks, end_to_end, data, config)
    return tables, {}


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


def generation(blocks, judge, data, config, n=64, length=128):
    """Continuations of held-out beginnings: bits per byte under the judge, with distinct-2 and entropy beside
    it.

    A low score from the judge is no merit by itself: a text that repeats one word has it, with distinct-2
    near 0."""
    windows = data.held_out(n, config)[:, :config.seq_len]
    start = max(1, min(config.seq_len // 4, config.seq_len - length))
    prompts, stop = windows[:, :start].tolist(), min(config.seq_len, start + length)

    def score(tokens):
        return score_text(tokens, lambda x: judge(x)[0], start, stop, data)

    rows = {"held-out text": score(windows)}
    for t in (0.7, 0.85, 1.0):
        rows[f"baseline, temperature {t}"] = score(generate(judge, prompts, stop - start, temperature=t))
    for t, levels in ((0.0, 5), (0.7, 5), (0.85, 5), (1.0, 5), (1.0, 32)):
        row = f"blocks, temperature {t}, {levels} levels"
        rows[row] = score(generate(blocks, prompts, stop - start, temperature=t, euler_steps=levels))
    return rows
