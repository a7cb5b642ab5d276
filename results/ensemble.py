"""The blocks of a label or token model beside what could be made of the same time: more, or longer, controls.

    python results/ensemble.py --model gpt --out out/gpt/seed0      # writes OUT/gpt/ensemble.json

OUT holds blocks, baseline and control, trained with `--out OUT`. If they are there, too: OUT/control1,
OUT/control2 and so on, controls of other seeds; OUT/long, a control with as many updates as all blocks
together; OUT/double, a baseline with twice the updates. An ensemble is the mean of log p, renormalised."""
from pathlib import Path

import torch
import torch.nn as nn

from common import about, begin, run, train, write  # first: it puts the models on the path

from diffusion_blocks import ensemble, seed_of


def readout(module, log_p):
    """A baseline whose log-probabilities are log_p(x)."""
    class Readout(module.EndToEnd):
        def __init__(self):
            nn.Module.__init__(self)

        def logits(self, x):
            return (log_p(x), None) if module.DATA == "text" else log_p(x)
    return Readout()


def plain(net, x):
    """Log-probabilities of a network that was trained end to end."""
    found = net.logits(x)
    return (found[0] if isinstance(found, tuple) else found).log_softmax(-1)


def main(argv):
    setup = begin([*argv, "--eval"])
    module, model, out, device = setup.module, setup.model, Path(setup.run.out), setup.device
    blocks, state = train.assemble(module, model, out, device)

    def found(part, folder, like=state):
        return train.trained(module, model, part, folder, device, like)[0]
    others = {"end to end": found("end_to_end", out), "control": found("control", out)}
    if (out / "double").exists():
        others["end to end, twice the updates"] = found("end_to_end", out / "double")
    if (out / "long").exists():
        others["control, as long as all blocks"] = found("control", out / "long")
    more = [others["control"], *(found("control", folder) for folder in sorted(out.glob("control[0-9]*")))]
    if len(more) > 1:
        def mean(x):
            return (sum(plain(net, x) for net in more) / len(more)).log_softmax(-1)
        others[f"{len(more)} controls (ensemble)"] = readout(module, mean)
    for b, block in enumerate(blocks if model == "vit" else []):  # its accuracy; evaluate has the bits
        def alone(x, b=b, net=block):
            how = (lambda _, z, sigma: net.logits(x, z, sigma)), (len(x),), net.table, net.noise
            return ensemble(*how, [b])
        others[f"block {b}, z = 0"] = readout(module, alone)
    torch.manual_seed(seed_of(state["training"]["seed"], "eval"))
    with torch.no_grad():
        tables = module.evaluate(blocks, others, setup.data)
    write(out / model / "ensemble.json", about("ensemble", argv) | {
        k: state[k] for k in ("config", "training", "settings", "data")} | {"tables": tables})


if __name__ == "__main__":
    run(main)
