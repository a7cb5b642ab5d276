"""A model of one's own: a residual MLP that classifies images, block by block. Copy it beside train.py:

    cp results/mlp.py . && python train.py --model mlp --block all     # then --end-to-end, --control, --eval

train.py needs DATA, Config, PRESETS, Sampling, Block and EndToEnd; --eval needs evaluate, --sample sample."""
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn

from diffusion_blocks import (LogNormal, bayes_logits, average, cross_entropy, score_loss, split_layers,
                              target_table)

DATA = "images"  # a batch is images (B, K, H, W) in [-1, 1] and labels (B,)
PRESETS = {"default": dict(steps=1000, batch_size=64, lr=2e-3)}  # values of Config and of train.py's Training


@dataclass
class Config:
    n_layer: int = 6        # residual layers of the whole model
    n_embd: int = 64        # width, and the dimension of the target embedding
    image_size: int = 0     # pixels of a side; set from the data, as the next two
    n_channel: int = 0      # colours
    n_class: int = 0        # classes
    noise: LogNormal = field(default_factory=lambda: LogNormal(n_blocks=3, p_mean=1.2, p_std=1.0))

    def control(self):
        return replace(self, n_layer=self.n_layer // self.noise.n_blocks, noise=LogNormal())


@dataclass
class Sampling:
    pass  # nothing to choose


class EndToEnd(nn.Module):
    """The baseline: pixels in, layers, logits of the label out."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Linear(config.n_channel * config.image_size ** 2, config.n_embd)
        self.layers = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd)) for _ in range(config.n_layer))
        self.head = nn.Sequential(nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, config.n_class))

    def logits(self, x, more=0.0):
        """(B, V) of images x (B, K, H, W); more (B, C) is added to their embedding."""
        h = self.embed(x.flatten(1)) + more                                  # (B, C)
        for layer in self.layers:
            h = h + layer(h)                                                 # (B, C)
        return self.head(h).float()                                          # (B, V)

    def forward(self, batch):
        return cross_entropy(self.logits(batch[0]), batch[1]).mean()


class Block(EndToEnd):
    """The same with the layers of block b, a noisy label z, and its noise level."""

    def __init__(self, config, b):
        super().__init__(replace(config, n_layer=len(split_layers(config.n_layer, config.noise.n_blocks)[b])))
        self.b, self.noise = b, config.noise
        self.z_in = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.level_in = nn.Linear(1, config.n_embd)
        nn.init.zeros_(self.z_in.weight)  # at sigma_max z is pure noise: it enters at 0
        self.register_buffer("table", target_table(config.n_class, config.n_embd, seed=0), persistent=False)

    def denoise(self, x, z, sigma):
        """Logits (B, V) of the labels of x, given z (B, C) at sigma (B,)."""
        c_in, c_noise = self.noise.input_scales(sigma)
        prior = self.logits(x, self.z_in(c_in[:, None] * z) + self.level_in(c_noise[:, None]))   # (B, V)
        return bayes_logits(prior, z, sigma, self.table)

    def forward(self, batch):
        x, label = batch
        sigma = self.noise.sample(self.b, len(x), x.device)                  # (B,)
        z = self.noise.corrupt(self.table[label], sigma)                     # (B, C)
        error = cross_entropy(self.denoise(x, z, sigma), label)              # (B,)
        return score_loss(error, sigma, self.noise)


@torch.no_grad()
def evaluate(blocks, others, data):
    """{title: {row: {column: number}}} of the blocks and of others {"end to end": net, "control": net}."""
    x, label = data.held_out(None, None)

    def logits(b, z, sigma):
        return blocks[b].denoise(x, z, sigma)                                # (B, V)
    found = {name: net.logits(x).argmax(-1) for name, net in others.items()}
    log_p = average(logits, label.shape, blocks[0].table, blocks[0].noise, range(len(blocks)))   # (B, V)
    found["blocks, averaged"] = log_p.argmax(-1)
    rows = {}
    for name, guess in found.items():
        rows[name] = {"accuracy, %": 100 * (guess == label).float().mean().item()}
    return {"held-out images": rows}
