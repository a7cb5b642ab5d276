"""What one choice in gpt.py is worth: train a block with it changed, print that block's share of the bound.

    python results/explore.py --what "gates at 0" --gate 0 -- --block 1 --seed 0
    python results/explore.py --what "z at full rate" -- --block 1 --seed 0 --z-rate 1

What follows -- goes to train.py."""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import train
from diffusion_blocks import bound_share

parser = argparse.ArgumentParser()
parser.add_argument("--gate", type=float, default=1.0, help="adaLN gates before training; 0: as in DiT")
parser.add_argument("--what", default="", help="a name for the row")
parser.add_argument("rest", nargs="+")
own = parser.parse_args()

plain_init = gpt.init_weights


def init_weights(net):
    plain_init(net)
    for layer in net.layers:
        if hasattr(layer, "modulation"):
            bias = layer.modulation.bias.data.view(6, -1)  # shift, scale, gate of attention, then of the MLP
            bias[2], bias[5] = own.gate - 1, own.gate - 1


gpt.init_weights = init_weights
train.run(own.rest)

args, module, preset = train.parse(own.rest)
training = train.settle(train.TextTraining, preset, args)
block, state = train.finished(gpt, "gpt", f"block_{args['block']}", training.out)
data = train.load_text(training, torch.device("cpu"))
torch.manual_seed(0)
shares, hint_free = [], []
with torch.no_grad():
    for w in data.held_out(256, block.config).split(32):
        x, target = w[:, :-1], w[:, 1:]
        y, context = block.table[target], block.context(x)

        def squared_error(z, sigma):
            return (y - block.denoise(x, z, sigma, context)).pow(2).sum(-1).mean(1)
        shares.append(bound_share(squared_error, y, block.noise, block.b) / math.log(2))
        middle = torch.full((len(w),), math.prod(block.noise.interval(block.b)) ** .5)
        logits = block.logits(x, torch.zeros_like(y), middle, context)
        hint_free.append(gpt.cross_entropy(logits, target).mean().item() / math.log(2))
row = {"what": own.what, "gate": own.gate, "flags": " ".join(own.rest),
       "share, bits per token": sum(shares) / len(shares),
       "hint-free, bits per token": sum(hint_free) / len(hint_free)}
print(json.dumps(row))
