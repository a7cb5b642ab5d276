"""Seconds per training step of a text model's baseline, control and blocks, interleaved in one run.

    python results/step_time.py --model recurrent

Random tokens in the place of text, forward, backward and AdamW of the default preset. The mean is over all
steps but the first: the recurrent baseline draws a new number of passes for each. Flags of the model may be
given as for train.py (--streams two); one JSON line is printed."""
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import train


def main():
    argv = sys.argv[1:]
    n = int(argv.pop(argv.index("--n") + 1)) if "--n" in argv else 40
    argv = [a for a in argv if a != "--n"]
    args, module, preset = train.parse([*argv, "--end-to-end"])
    settings = train.settle(train.TextTraining, preset, args)
    config = replace(train.settle(module.Config, preset, args), vocab_size=args.get("vocab_size", 256))
    torch.set_num_threads(settings.threads or os.cpu_count())
    torch.manual_seed(settings.seed)
    parts = ["end_to_end", "control"] + [f"block_{b}" for b in range(config.n_blocks)]
    nets = {part: train.build(module, config, part) for part in parts}
    cpu = torch.device("cpu")
    optimizers = {part: train.make_optimizer(net, settings, cpu) for part, net in nets.items()}
    seconds = {part: [] for part in parts}
    for _ in range(n + 1):
        batch = torch.randint(config.vocab_size, (settings.batch_size, config.seq_len + 1))
        for part in parts:
            began = time.perf_counter()
            nets[part].loss(batch).backward()
            optimizers[part].step()
            optimizers[part].zero_grad()
            seconds[part].append(time.perf_counter() - began)
    mean = {part: statistics.mean(s[1:]) for part, s in seconds.items()}
    spread = {part: statistics.stdev(s[1:]) / n ** 0.5 for part, s in seconds.items()}
    blocks = sum(mean[part] for part in parts[2:])
    print(json.dumps({"flags": " ".join(argv), "n": n, "batch_size": settings.batch_size,
                      "threads": torch.get_num_threads(), "torch": str(torch.__version__),
                      "machine": platform.machine(), "seconds per step": mean, "+-": spread,
                      "end_to_end / all blocks": mean["end_to_end"] / blocks}))


if __name__ == "__main__":
    main()
