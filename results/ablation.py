"""Why is a block of gpt better than the control? What stands between the two, one change at a time:

    python results/ablation.py adaln --seed 0     # writes OUT/ablation/adaln_seed0.json

control     one stream of tokens, plain layers
adaln       the control with layers that are modulated (adaLN) by a constant in the place of the noise level
streams     a block that sees no noise: slots beside the clean stream, plain layers
both        the same with adaLN: what is left of a block if its noise is taken away
deep        the baseline; with --steps 1600 it takes the time of the default's four blocks
deep_adaln  the baseline, modulated by a constant

All have the same number of updates if no --steps follows, or other flags of train.py. And of mdm:

wide        blocks that take half of their times from all of [0, 1]; ensemble.py scores them there"""
import math
from functools import partial
from unittest.mock import patch

import torch
import torch.nn as nn

from common import Parser, about, begin, run, train, write  # first: it puts the models on the path
import ensemble
import gpt
from diffusion_blocks import Masking, cross_entropy, to_device

NO_NOISE = "--block 0 --n-layer 2 --n-blocks 1 --sigma-min 60 --sigma-max 80 --z-rate 0"


class Modulated(gpt.EndToEnd):
    """The baseline or control with a block's adaLN; its condition is the same for all inputs."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(gpt.Layer(config, modulated=True) for _ in range(config.n_layer))
        self.noise_embedding = gpt.NoiseEmbedding(config.n_cond)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        gpt.init_weights(self)

    def logits(self, x, cache=None):
        cond, h = self.noise_embedding(torch.ones(1)), self.embed(x)         # (1, 1, n_cond), (B, T, C)
        for layer in self.layers:
            h, _ = layer(h, cond=cond)                                       # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (1, 1, C) each
        return self.head(self.norm(h) * (1 + scale) + shift).float(), None


class Unmodulated(gpt.Block):
    """A block whose adaLN stays at its first value, which is zero."""

    def __init__(self, config, b):
        super().__init__(config, b)
        for part in [self, *self.layers]:
            part.modulation.requires_grad_(False)


def prefer_own(noise, block, n, device="cpu"):
    """Masking.sample with one half of the times from the block's interval, the other one from all times."""
    u, (lo, hi) = 2 * (torch.rand(1, dtype=torch.float64) + torch.arange(n)) / n, noise.widened(block)
    return to_device(torch.where(u < 1, lo + u * (hi - lo), u - 1).float(), device)


VARIANTS = {"control": ("--control", {}), "adaln": ("--control", {"EndToEnd": Modulated}),
            "streams": (NO_NOISE, {"Block": Unmodulated}), "both": (NO_NOISE, {}),
            "deep": ("--end-to-end", {}), "deep_adaln": ("--end-to-end", {"EndToEnd": Modulated}),
            "wide": ("--block all", {})}


@torch.no_grad()
def bits(readout, data, config, n_windows=256):
    """Bits per byte of log-probabilities readout(x), on the windows that gpt's `evaluate` scores."""
    windows, nats = data.held_out(n_windows, config), 0.0                    # (N, T + 1)
    for w in windows.split(32):
        nats += cross_entropy(readout(w[:, :-1]), w[:, 1:]).sum().item()
    return nats / (math.log(2) * data.bytes_per_token * windows[:, 1:].numel())


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--seed", default="0", help="(default: 0)")
    parser.add_argument("--out", default="out", help="(default: out)")
    own, more = parser.parse_known_args(argv)
    name, (flags, changes) = f"{own.variant}_seed{own.seed}", VARIANTS[own.variant]
    out = train.Path(own.out) / "ablation"
    folder = ["--out", str(out / name)]
    argv = ["--model", "mdm" if own.variant == "wide" else "gpt", *flags.split(), *more, "--seed", own.seed]
    if own.variant == "wide":
        with patch.object(Masking, "sample", prefer_own):
            train.main([*argv, *folder, "--resume"])
        return ensemble.main(["--model", "mdm", "--threads", str(torch.get_num_threads()), *folder])
    with patch.dict(vars(gpt), changes):
        train.main([*argv, *folder, "--resume"])
        setup = begin([*argv, *folder, "--resume"])
        part = flags.split()[0][2:].replace("block", "block_0").replace("-", "_")
        net, state = train.trained(gpt, "gpt", part, out / name, setup.device)
        readout = partial(ensemble.alone, net, 0) if part == "block_0" else partial(ensemble.plain, net)
        write(out / f"{name}.json", about("ablation", argv) | {
            k: state[k] for k in ("config", "training", "data", "log")} | {
            "tables": {"held-out text": {name: {"bits per byte": bits(readout, setup.data, setup.config)}}}})


if __name__ == "__main__":
    run(main)
