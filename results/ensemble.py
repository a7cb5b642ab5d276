"""Means of log p, of blocks and of what could be made of the same time: more, or longer, controls.

    python results/ensemble.py --model gpt --out out/gpt/seed0      # writes OUT/gpt/ensemble.json

OUT holds blocks, baseline and control, trained with `--out OUT`. If they are there, too: OUT/control1,
OUT/control2 and so on, controls of other seeds; OUT/long, a control with as many updates as all blocks
together; OUT/noiseless1 and so on, a block 0 trained without noise. mdm: every block and the mean of all at
every t, also beyond their own. recurrent: the mean of its block at K levels."""
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from common import Parser, about, begin, plain_logits, run, train, write  # first: it sets the path
from diffusion_blocks import cross_entropy, average, seed_of


def plain(net, x):
    """Log-probabilities of a network that was trained end to end."""
    return plain_logits(net, x).log_softmax(-1)


def alone(net, b, x):
    """Log-probabilities of block b by itself, at z = 0."""
    more, shape = ((net.context(x),), x.shape) if hasattr(net, "context") else ((), x.shape[:1])
    return average(lambda _, z, sigma: net.logits(x, z, sigma, *more), shape, net.table, net.noise, [b])


def at_levels(net, n, x):
    """Log-probabilities of recurrent's block: the mean over n noise levels; z = 0 in all slots."""
    e, _ = net.condition(x)
    return average(lambda _, z, sigma: net.logits(e, z, sigma)[0], x.shape, net.table,
                    replace(net.noise, n_blocks=n), range(n))


class MeanOfMasked(nn.Module):
    """What mdm's `evaluate` takes for a baseline: the mean of the blocks' log p at every t."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.noise = blocks, blocks[0].noise

    def masked_nats(self, z, t, y):
        log_p = sum(block.logits(z, t).log_softmax(-1) for block in self.blocks) / len(self.blocks)
        return (cross_entropy(log_p.log_softmax(-1), y) * (z == self.noise.mask_id)).sum(1)


def mean(module, readouts):
    """What `evaluate` takes for a baseline: the mean of functions that give log-probabilities of x."""
    class Mean(module.EndToEnd):
        def __init__(self):
            nn.Module.__init__(self)

        def logits(self, x):
            log_p = (sum(readout(x) for readout in readouts) / len(readouts)).log_softmax(-1)
            return (log_p, None) if hasattr(module.Block, "context") else log_p
    return Mean()


def main(argv):
    setup = begin([*Parser(__doc__).parse_known_args(argv)[1], "--eval"])
    module, model, out, device = setup.module, setup.model, Path(setup.run.out), setup.device
    blocks, state = train.assemble(module, model, out, device)

    def trained(part, pattern="", like=state):
        """The networks of a part that were trained with OUT, or with the folders in it that fit a pattern."""
        folders = sorted(out.glob(pattern)) if pattern else [out]
        return [train.trained(module, model, part, p, device, like)[0] for p in folders
                if (p / model / f"{part}.pt").exists()]
    others = {name: net for name, part, pattern in (
        ("end to end", "end_to_end", ""), ("control", "control", ""),
        ("control, as long as all blocks", "control", "long")) for net in trained(part, pattern)}
    if model == "mdm":
        others["mean of the blocks at every t"] = MeanOfMasked(blocks)
        others |= {f"block {b} at every t": net for b, net in enumerate(blocks)}
    elif model == "recurrent":
        others |= {f"block, mean over {n} levels": mean(module, [partial(at_levels, blocks[0], n)])
                   for n in (2, 4, 16)}
    else:
        more = [partial(plain, net) for net in (*trained("control"), *trained("control", "control[0-9]*"))]
        others |= {f"{len(more)} controls (ensemble)": mean(module, more)} if len(more) > 1 else {}
        quiet = [partial(alone, net, 0) for net in trained("block_0", "noiseless*", None)]
        others |= {f"block without noise, {k}": mean(module, [readout]) for k, readout in enumerate(quiet)}
        others |= {f"{len(quiet)} blocks without noise (ensemble)": mean(module, quiet)} if quiet else {}
    for b, net in enumerate(blocks if model == "vit" else []):  # its accuracy; evaluate has the bits
        others[f"block {b}, z = 0"] = mean(module, [partial(alone, net, b)])
    torch.manual_seed(seed_of(state["training"]["seed"], "eval"))
    with torch.no_grad():
        tables = module.evaluate(blocks, others, setup.data)
    write(out / model / "ensemble.json", about("ensemble", argv) | {
        k: state[k] for k in ("config", "training", "settings", "data")} | {"tables": tables})


if __name__ == "__main__":
    run(main)
