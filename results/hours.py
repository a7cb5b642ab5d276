"""Operations and hours of the paper's rows, counted on networks of full size: writes results/hours.json.

    python results/hours.py

The loss of an example is counted, forward and backward, and multiplied by batch and updates. Hours are
computed, not measured: operations / RATE."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import dit
import gpt
import mdm
import recurrent
import train
import vit

RATE = 300e12  # operations a second: 30 % of the dense bf16 peak of an H100 or H200, 989e12 (data sheet)
CIFAR = dict(image_size=32, n_channel=3, data_std=.5)
# examples in an epoch: images; text8's 90 M characters; LM1B's 30.3 M sentences, about 0.9 G GPT-2 tokens (an
# estimate); OpenWebText's 9.04 G GPT-2 tokens
ROWS = {
    "vit --preset cifar100": (vit, dict(CIFAR, n_class=100), 50_000),
    "vit --preset tiny-imagenet": (vit, dict(CIFAR, image_size=64, n_class=200), 100_000),
    "dit --preset cifar10": (dit, dict(CIFAR, n_class=10), 50_000),
    "dit --preset imagenet256": (dit, dict(CIFAR, n_channel=4, n_class=1000), 1_281_167),
    "mdm --preset text8": (mdm, dict(vocab_size=256), 90_000_000 // 256),
    "gpt --preset lm1b": (gpt, dict(vocab_size=50_257), 900_000_000 // 256),
    "gpt --preset owt": (gpt, dict(vocab_size=50_257), 9_035_582_198 // 1024),
    "recurrent --preset lm1b": (recurrent, dict(vocab_size=50_257), 900_000_000 // 256)}


def operations(net, config):
    """Of the loss of an example and its gradients, forward and backward: a third of that of three, of which
    gpt.py and recurrent.py compute some logits a second time, as they do with a whole batch."""
    if hasattr(net, "n_passes"):
        net.n_passes = lambda: 1 if net.single else config.mean_passes + 1   # the mean of Huginn's draws
    if hasattr(config, "seq_len"):
        batch = torch.zeros(3, config.seq_len + 1, dtype=torch.long)
    else:
        batch = (torch.zeros(3, config.n_channel, config.image_size, config.image_size),
                 torch.zeros(3, dtype=torch.long))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net.loss(batch).backward()
    return counter.get_total_flops() / 3


def main():
    found = {}
    for name, (module, facts, n_train) in ROWS.items():
        preset = module.PRESETS[name.split()[-1]]
        settings = train.settle(train.LOADERS[module.DATA].settings, preset)
        config = replace(train.settle(module.Config, preset), **facts)
        updates = round(settings.epochs * n_train / settings.batch_size)
        row = {"updates": updates, "batch": settings.batch_size}
        parts = {"end to end": [module.EndToEnd], "control": [module.control],
                 "blocks": [lambda c, b=b: module.Block(c, b)
                            for b in range(getattr(config, "n_blocks", 1))]}
        for part, makers in parts.items():
            total = 0
            for make in makers:
                total += operations(make(config), config)
            n = updates // 3 if "recurrent" in name and part == "end to end" else updates  # 5 epochs, not 15
            row[part] = {"TFLOP an update": total * settings.batch_size / 1e12, "updates": n,
                         "hours": total * settings.batch_size * n / RATE / 3600}
            print(name, part, row[part], flush=True)
        found[name] = row
    report = {"command": "python results/hours.py", "rate": RATE, "torch": str(torch.__version__),
              "rows": found}
    (HERE / "hours.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
