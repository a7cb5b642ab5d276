"""Autoregressive GPT, block by block: every block denoises the embedding of the next token.

x is the clean text so far, y the fixed unit-norm embedding E of the next token at every position, and z = y +
sigma * eps. A block carries two streams through its own layers. The clean stream is a plain causal decoder
over x. The noisy stream has a slot for each token to predict: slot i starts from token i and z_i = E[x_{i+1}]
+ sigma * eps, attends to clean tokens <= i and to itself, and predicts x_{i+1}. Only slots see the noise
level, so the clean keys and values are computed once for each token, and cached.

    loss of block b = E over sigma in its interval of  CE(prior_b(x, z, sigma) + z @ E^T / sigma^2, x_next)

`EndToEnd` is the baseline: the same Llama-2 style layers, next-token cross-entropy, no noise.
"""
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion_blocks import (LabelScores, LogNormal, average, bayes_logits, cross_entropy, decode_labels,
                              edm_logits, largest_block, require, require_finite, score_labels, score_loss,
                              split_layers, target_table, token_losses, windows_at_once)

DATA = "text"  # the module of data/ that this model is trained on


@dataclass
class Config:
    n_layer: int = 8            # transformer layers of the whole model
    layer_split: str = ""       # layers of each block, e.g. 3,3,1,1; empty: the same number in each
    n_head: int = 4             # attention heads
    n_embd: int = 96            # width, and the dimension of the target embedding
    n_cond: int = 32            # width of the noise-level embedding (released ViT: n_embd / 6)
    seq_len: int = 256          # context length in tokens
    vocab_size: int = 0         # set from the data
    readout: str = "bayes"      # bayes: prior + z.E/sigma^2; edm: the paper's, c_skip z + c_out F
    gate_start: float = 1.0     # where adaLN's gates start: 1, a plain layer, or 0, as DiT's (paper)
    z_rate: float = 0.1         # scale of z's projection, which starts at 0: how fast z is learned
    table_seed: int = 0         # seed of the target embedding; the same in every block
    noise: LogNormal = field(default_factory=lambda: LogNormal(n_blocks=4, p_mean=1.2, p_std=1.0, gamma=0.1))

    def __post_init__(self):
        require_finite(self)
        split_layers(self.n_layer, self.noise.n_blocks, self.layer_split)
        require(self.n_head >= 1, "n_head must be at least 1", self.n_head)
        require(self.n_embd >= 1 and self.n_embd % (2 * self.n_head) == 0,
                f"n_embd must be a multiple of twice n_head {self.n_head}", self.n_embd)
        require(self.n_cond >= 2 and self.n_cond % 2 == 0, "n_cond must be even and above 0", self.n_cond)
        require(self.seq_len >= 2, "seq_len must be at least 2", self.seq_len)
        require(self.readout in ("bayes", "edm"), "readout must be bayes or edm", self.readout)

    def control(self):
        """The Config of the control: as many layers as the largest block has, trained end to end. Blocks that are
        no better than it have made no use of the other layers."""
        n_layer = largest_block(self.n_layer, self.noise.n_blocks, self.layer_split)
        return replace(self, n_layer=n_layer, layer_split="", noise=LogNormal())


# A preset names fields of Config, its noise, Sampling, the data's settings or train.py's Training. cpu: a longer run on
# a CPU. lm1b, owt: the paper's shape, schedule, readout and chain of 4 levels. What stays ours: GPT-2's tokenizer, since
# Llama-2's is not free; blocks share nothing, the table is fixed, and z enters through a projection that starts at 0.
# What we have found better: --readout bayes --gate-start 1 --p-mean 1.2 --p-std 1 --sampler averaged.
PAPER = dict(n_layer=12, n_blocks=4, n_head=12, n_embd=768, n_cond=128, seq_len=256, p_mean=-1.2, p_std=1.2,
             tokenizer="gpt2", batch_size=256, accumulate=16, epochs=10.0, lr=3e-4, warmup=2500, gamma=0.1,
             readout="edm", gate_start=0.0, sampler="chain", temperature=0.0, euler_steps=4)
PRESETS = {
    "default": dict(steps=800, batch_size=8, lr=3e-3, warmup=50),
    "cpu": dict(steps=4000, batch_size=8, lr=3e-3, warmup=50),
    "lm1b": dict(PAPER, data="dvruette/lm1b"),
    "owt": dict(PAPER, data="Skylion007/openwebtext", seq_len=1024, accumulate=64),
}


@dataclass
class Sampling:
    prompt: tuple = ("\n",)     # one or more texts to continue
    n_tokens: int = 256         # tokens to add to each
    temperature: float = 1.0    # of the softmax (chain: scale of the starting noise); 0: greedy
    sampler: str = "averaged"   # of blocks: averaged, the mean of their log p; or chain, over noise levels
    euler_steps: int = 0        # chain: noise levels visited; with few, not all blocks run; 0: max(n_blocks + 1, 4)

    def __post_init__(self):
        require_finite(self)
        require(all(self.prompt), "a prompt must not be empty", list(self.prompt))
        require(self.n_tokens >= 0, "n_tokens must be at least 0", self.n_tokens)
        require(self.temperature >= 0, "temperature must be at least 0", self.temperature)
        require(self.sampler in ("averaged", "chain"), "sampler must be averaged or chain", self.sampler)


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


class Layer(nn.Module):
    """Pre-norm decoder layer. Given the noise level's embedding, adaLN shifts, scales and gates both
    sub-layers. The modulation is zero-initialised, so that with gate_start 1 it begins as the plain layer."""

    def __init__(self, config, modulated=False):
        super().__init__()
        self.gate_start = config.gate_start
        self.norm1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = MLP(config)
        if modulated:
            self.modulation = nn.Linear(config.n_cond, 6 * config.n_embd)

    def forward(self, x, start=0, past=None, mask=None, cond=None):
        """x (B, T, C), cond (B, 1, n_cond) or None -> (B, T, C), and the keys and values of x for a cache."""
        if cond is None:
            h, new = self.attention(self.norm1(x), start, past, mask)        # (B, T, C)
            x = x + h
            return x + self.mlp(self.norm2(x)), new
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)    # (B, 1, C) each
        h, new = self.attention(self.norm1(x) * (1 + scale1) + shift1, start, past, mask)
        x = x + (self.gate_start + gate1) * h
        x = x + (self.gate_start + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
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


def join(past, new):
    """Keys and values of the past and of new tokens, (B, H, T' + T, D) each; past may be None."""
    if past is None:
        return new
    return torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)


def read_cache(cache, x, n_layer):
    """The position of the first of tokens x (B, T) after a cache, and the past of every layer, a pair or None."""
    if cache is None:
        return 0, [None] * n_layer
    assert x.shape[1] == 1  # tokens added together would see each other's future
    return cache[0][0].shape[2], cache


def init_weights(net):
    """All initialisation (GPT-2): N(0, 0.02). Layers named `out`, which end a residual branch: divided by
    sqrt(2 * number of layers)."""
    for name, p in net.named_parameters():
        if name == "scale_weight":
            nn.init.constant_(p, 16.0)  # of the edm readout: with 1 no softmax would be sharp
        elif p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)   # norm weights are 1
        elif "modulation" in name or name.startswith("z_in"):
            nn.init.zeros_(p)   # z, pure noise at sigma_max, would drown the embeddings: it enters at 0
        else:
            std = 0.02 / math.sqrt(2 * len(net.layers)) if name.endswith("out.weight") else 0.02
            nn.init.normal_(p, std=std)


# ---- One block of the model, and the baseline -------------------------------------------------------------

class Block(nn.Module):
    """Block b: a complete denoiser for its own noise levels. It shares nothing with any other block."""

    def __init__(self, config, b):
        super().__init__()
        self.config, self.b, self.noise = config, b, config.noise
        layers = split_layers(config.n_layer, config.noise.n_blocks, config.layer_split)[b]
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.z_in = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.noise_embedding = NoiseEmbedding(config.n_cond)
        self.layers = nn.ModuleList(Layer(config, modulated=True) for _ in layers)
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        bayes = config.readout == "bayes"
        self.head = nn.Linear(config.n_embd, config.vocab_size if bayes else config.n_embd, bias=False)
        self.scale_weight = None if bayes else nn.Parameter(torch.empty(1))
        table = target_table(config.vocab_size, config.n_embd, config.table_seed)  # (V, C)
        self.register_buffer("table", table, persistent=False)
        init_weights(self)
        self.title = "layers {} to {} of {}, sigma {:.3g} to {:.3g}".format(
            layers[0], layers[-1], config.n_layer, *self.noise.interval(b))

    def context(self, x, cache=None):
        """[(k, v)] of every layer: keys and values (B, H, T' + T, D) of clean tokens x (B, T), after those of
        an earlier cache. They do not depend on noise."""
        start, past = read_cache(cache, x, len(self.layers))
        h, out = self.embed(x), []                                           # (B, T, C)
        for layer, kv in zip(self.layers[:-1], past):
            h, new = layer(h, start, kv)                                     # (B, T, C)
            out.append(join(kv, new))
        last = self.layers[-1]  # its output is not used: compute its keys and values only
        return out + [join(past[-1], last.attention.keys_values(last.norm1(h), start))]

    def features(self, x, z, sigma, context):
        """(B, T, C), what the head reads in the slots of the last T clean tokens x (B, T), given z (B, T, C)
        and sigma (B,)."""
        c_in, c_noise = self.noise.input_scales(sigma)
        cond = self.noise_embedding(c_noise)                                 # (B, 1, n_cond)
        n = x.shape[1]
        start = context[0][0].shape[2] - n
        # a slot sees clean tokens up to its own, itself, and no other slot
        clean = torch.ones(n, start + n, dtype=torch.bool, device=x.device).tril(start)
        itself = torch.eye(n, dtype=torch.bool, device=x.device)
        mask = torch.cat([clean, itself], dim=1)                             # (T, start + 2T)
        # a slot begins with its current token: it need not look it up. z enters small, as in vit.py
        h = self.embed(x) + self.config.z_rate * self.z_in(c_in[:, None, None] * z)      # (B, T, C)
        for layer, kv in zip(self.layers, context):
            h, _ = layer(h, start, kv, mask, cond)                           # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (B, 1, C) each
        return self.norm(h) * (1 + scale) + shift                            # (B, T, C)

    def readout(self, h, z, sigma):
        """Logits (B, T, V) of the next token, from features h and z, (B, T, C) each, and sigma (B,)."""
        f = self.head(h)                                                     # (B, T, V), or (B, T, C) for edm
        if self.config.readout == "bayes":
            return bayes_logits(f, z, sigma, self.table)
        return edm_logits(f, z, sigma, self.table, self.noise, self.scale_weight)

    def logits(self, x, z, sigma, context):
        """Logits (B, T, V) of the next token in the slots of x: see `features`."""
        return self.readout(self.features(x, z, sigma, context), z, sigma)

    def forward(self, batch):
        """The score loss in nats per token of this block alone; batch (B, T + 1) token ids."""
        x, target = batch[:, :-1], batch[:, 1:]                              # (B, T) each
        sigma = self.noise.sample(self.b, len(x), x.device)                  # (B,)
        z = self.noise.corrupt(self.table[target], sigma)                    # (B, T, C)
        h = self.features(x, z, sigma, self.context(x))                      # (B, T, C)
        readout = partial(self.readout, sigma=sigma)
        nats = token_losses(readout, self.config.vocab_size, target, h, z)   # (B, T)
        return score_loss(nats.mean(1), sigma, self.noise)


class EndToEnd(nn.Module):
    """The baseline: backpropagation through all layers. EndToEnd(config.control()) is the control."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self)
        self.title = f"{config.n_layer} layers, trained end to end"

    def features(self, x, cache=None):
        """(B, T, C), what the head reads at each of tokens x (B, T), and a cache of all tokens so far."""
        start, past = read_cache(cache, x, len(self.layers))
        h, out = self.embed(x), []                                           # (B, T, C)
        for layer, kv in zip(self.layers, past):
            h, new = layer(h, start, kv)                                     # (B, T, C)
            out.append(join(kv, new))
        return self.norm(h), out                                             # (B, T, C), pairs of all layers

    def readout(self, h):
        """Logits (B, T, V) of the next token from features h (B, T, C)."""
        return self.head(h).float()

    def logits(self, x, cache=None):
        """Logits (B, T, V) of the token after each of x (B, T), and a cache of all tokens so far."""
        h, out = self.features(x, cache)                                     # (B, T, C)
        return self.readout(h), out

    def forward(self, batch):
        """The cross-entropy in nats per token; batch (B, T + 1) token ids."""
        h, _ = self.features(batch[:, :-1])                                  # (B, T, C)
        return token_losses(self.readout, self.config.vocab_size, batch[:, 1:], h).mean()


# ---- Generation and evaluation ----------------------------------------------------------------------------

@torch.no_grad()
def generate(nets, tokens, n_tokens, temperature=1.0, sampler="averaged", euler_steps=0, use_cache=True):
    """(N, T + n_tokens): tokens (N, T), T > 0, and more. nets: the list of blocks, or one EndToEnd."""
    seq_len = (nets[0] if isinstance(nets, list) else nets).config.seq_len
    half = seq_len // 2
    start, cache = 0, None
    for i in range(tokens.shape[1], tokens.shape[1] + n_tokens):
        first = max(0, math.ceil((i - seq_len) / half) * half)  # a full window drops its older half
        if first != start or not use_cache:
            start, cache = first, None
        token, cache = next_token(nets, tokens[:, start:i], cache, temperature, sampler, euler_steps)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens


def next_token(nets, tokens, cache, temperature, sampler, euler_steps):
    """A token (N,) after tokens (N, T), and a cache of them all; the one given holds all but the last, or is
    None. It costs a block one position of the clean stream and a slot (chain: one for each of its levels)."""
    new = tokens if cache is None else tokens[:, -1:]                        # (N, T or 1)
    if isinstance(nets, EndToEnd):
        logits, cache = nets.logits(new, cache)                              # (N, T or 1, V)
        return draw(logits[:, -1], temperature), cache
    pasts = [None] * len(nets) if cache is None else cache
    contexts = [block.context(new, past) for block, past in zip(nets, pasts)]

    def slot(b, z, sigma):
        return nets[b].logits(new[:, -1:], z, sigma, contexts[b])            # (N, 1, V)
    shape, table, noise = (len(tokens), 1), nets[0].table, nets[0].noise
    if sampler == "chain":
        token = decode_labels(slot, shape, table, noise, noise.steps(euler_steps), temperature)
        return token[:, 0], contexts
    log_p = average(slot, shape, table, noise, range(len(nets)))             # (N, 1, V)
    return draw(log_p[:, 0], temperature), contexts


def draw(logits, temperature):
    """Tokens (N,) drawn from logits (N, V); at temperature 0 the most probable."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


def sample(nets, sampling, data):
    """The prompts continued, as one printable text."""
    device = (nets[0] if isinstance(nets, list) else nets).embed.weight.device
    texts = []
    for prompt in sampling.prompt:
        tokens = torch.tensor([data.tokenizer.encode(prompt).tolist()], device=device)       # (1, T)
        tokens = generate(nets, tokens, sampling.n_tokens, sampling.temperature, sampling.sampler,
                          sampling.euler_steps)                                              # (1, T + n_tokens)
        texts.append(data.tokenizer.decode(tokens[0].tolist()))
    return "\n---\n".join(texts)


@torch.no_grad()
def evaluate(blocks, others, data, n_windows=256):
    """Tables {title: {row: {column: value}}} of the blocks and of others {"end to end": net, "control": net}
    on held-out windows, in bits per byte whatever the tokenizer."""
    config, noise, table = blocks[0].config, blocks[0].noise, blocks[0].table
    windows = data.held_out(n_windows, config)                               # (N, T + 1)
    nats = Counter()  # of each of the others, summed over tokens
    scores = LabelScores.zero(len(blocks))
    for w in windows.split(windows_at_once(config.vocab_size, config.seq_len, 32)):
        x, target = w[:, :-1], w[:, 1:]                                      # (B, T) each
        for name, net in others.items():
            nats[name] += cross_entropy(net.logits(x)[0], target).sum().item()
        contexts = [block.context(x) for block in blocks]

        def logits(b, z, sigma):
            return blocks[b].logits(x, z, sigma, contexts[b])                # (B, T, V)
        scores += score_labels(logits, target, table, noise)
    per_byte = 1 / (math.log(2) * data.bytes_per_token * windows[:, 1:].numel())
    rows = {name: {"bits per byte": per_byte * nats[name]} for name in others}
    of_blocks, shares = scores.tables(per_byte, "bits per byte")
    return {"bits per byte on held-out text": rows | of_blocks, "the bound, share by share": shares}
