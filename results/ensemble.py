"""The blocks of vit or gpt beside what could be made of the same time: more, or longer, controls.

    python results/ensemble.py --model gpt --out out/gpt/seed0      # writes OUT/gpt/ensemble.json

OUT holds blocks, baseline and control, trained with `--out OUT`. If they are there, too: OUT/control1,
OUT/control2 and so on, controls of other seeds; OUT/long, a control with as many updates as all blocks
together; OUT/noiseless1 and so on, a block 0 trained without noise. An ensemble is the mean of log p."""
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from common import about, begin, run, train, write  # first: it puts the models on the path
from diffusion_blocks import ensemble, seed_of


def plain(net, x):
    """Log-probabilities of a network that was trained end to end."""
    return (net.logits(x)[0] if x.dim() == 2 else net.logits(x)).log_softmax(-1)  # text (B, T), or images


def alone(net, b, x):
    """Log-probabilities of block b by itself, at z = 0."""
    more, shape = ((net.context(x),), x.shape) if hasattr(net, "context") else ((), x.shape[:1])
    return ensemble(lambda _, z, sigma: net.logits(x, z, sigma, *more), shape, net.table, net.noise, [b])


def mean(module, readouts):
    """What `evaluate` takes for a baseline: the mean of functions that give log-probabilities of x."""
    class Mean(module.EndToEnd):
        def __init__(self):
            nn.Module.__init__(self)

        def logits(self, x):
            log_p = (sum(readout(x) for readout in readouts) / len(readouts)).log_softmax(-1)
            return (log_p, None) if module.DATA == "text" else log_p
    return Mean()


def main(argv):
    setup = begin([*argv, "--eval"])
    module, model, out, device = setup.module, setup.model, Path(setup.run.out), setup.device
    blocks, state = train.assemble(module, model, out, device)

    def trained(part, pattern, like=state):
        return [train.trained(module, model, part, p, device, like)[0] for p in sorted(out.glob(pattern))]
    others = {part: train.trained(module, model, part.replace(" ", "_"), out, device, state)[0]
              for part in ("end to end", "control")}
    others |= {"control, as long as all blocks": net for net in trained("control", "long")}
    more = [partial(plain, net) for net in (others["control"], *trained("control", "control[0-9]*"))]
    others[f"{len(more)} controls (ensemble)"] = mean(module, more)
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
