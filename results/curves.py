"""Held-out scores of vit or gpt while they are trained: end to end, control, and the blocks averaged.

    python results/curves.py --model gpt --block 0 --out out/long      # as train.py; keeps every checkpoint
    python results/curves.py --model gpt --score --out out/long        # OUT/gpt/curves.json, of all parts

The checkpoint of update N (--save-every) is kept in OUT/at_N. A row has bits, the share of right answers and
the minutes of training until then, with validation and saving: of averaged blocks the sum over blocks. Rows
before the last are in the middle of the learning rate's schedule. --log-every has to be no larger than
--save-every. The best block is chosen on these data."""
import json
import math
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from common import about, begin, run, train, write  # first: it puts the models on the path
from diffusion_blocks import cross_entropy
from ensemble import alone, mean, plain


def keep(path, content, save=train.save):
    """train.save, and a copy of each checkpoint, without moments, in the folder of its update."""
    save(path, content)
    if isinstance(content, dict):
        copy = path.parents[1] / f"at_{content['step']}" / path.parent.name / path.name
        save(copy, content | {"optimizer": {}})


def held_out(setup):
    """Pairs (x, target) of the held-out data that the models' `evaluate` scores."""
    if setup.module.DATA == "text":
        return [(w[:, :-1], w[:, 1:]) for w in setup.data.held_out(256, setup.config).split(32)]
    return list(zip(*(column.split(500) for column in setup.data.held_out(None, setup.config))))


def score(net, pairs, unit):
    """Bits and right answers of logits, the mean over all targets."""
    found = [(cross_entropy(logits, target), logits.argmax(-1) == target)
             for x, target in pairs for logits in [plain(net, x)]]
    nats, right = (torch.cat([v.flatten().double() for v in column]).mean().item() for column in zip(*found))
    return {"bits": nats / math.log(2) / unit, "right, %": 100 * right}


@torch.no_grad()
def tables_of(setup):
    """{model: {update: {column: number}}}, of all updates whose checkpoints were kept."""
    out, module, model, device = Path(setup.run.out), setup.module, setup.model, setup.device
    pairs, unit = held_out(setup), setup.data.bytes_per_token if module.DATA == "text" else 1
    logs = {log.stem: [json.loads(line) for line in log.open()] for log in (out / model).glob("*.jsonl")}

    def minutes(part, step):
        return step * [row["ms"] for row in logs[part] if row["step"] <= step][-1] / 6e4
    tables = {"end to end": {}, "control": {}, "blocks, averaged": {}, "best block alone": {}}
    for folder in sorted(out.glob("at_*"), key=lambda p: int(p.name[3:])):
        step = int(folder.name[3:])
        blocks, state = train.assemble(module, model, folder, device)
        readouts = [partial(alone, net, b) for b, net in enumerate(blocks)]
        time = [minutes(f"block_{b}", step) for b in range(len(blocks))]
        tables["blocks, averaged"][step] = score(mean(module, readouts), pairs, unit) | {"minutes": sum(time)}
        each = [score(mean(module, [readout]), pairs, unit) for readout in readouts]
        best = min(range(len(blocks)), key=lambda b: each[b]["bits"])
        tables["best block alone"][step] = each[best] | {"minutes": time[best]}
        for name in ("end to end", "control"):
            part = name.replace(" ", "_")
            net, _ = train.trained(module, model, part, folder, device, state)
            tables[name][step] = score(net, pairs, unit) | {"minutes": minutes(part, step)}
    return tables


def main(argv):
    if "--score" not in argv:
        with patch.object(train, "save", keep):
            return train.main(argv)
    setup = begin([*(a for a in argv if a != "--score"), "--eval"])
    write(setup.folder / "curves.json", about("curves", argv) | {
        "config": train.flat(setup.config), "data": setup.data.about, "tables": tables_of(setup)})


if __name__ == "__main__":
    run(main)
