"""What the scripts that measure have in common: train.py's flags, networks, the record of a measurement."""
import argparse
import copy
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is silent
import torch
import torch.nn as nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train
from data import UserError
from diffusion_blocks import seed_of


class Parser(argparse.ArgumentParser):
    """Of a script's own flags: --help prints the script's docstring, a mistake is told in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)


def begin(argv):
    """Everything that train.py makes of its flags, by the names that it has there."""
    typed, preset, module, source = train.parse(argv)
    values = train.settle(typed, preset, module, source)[-1]
    run = train.replaced(train.Run(), values)
    device, training = train.set_up(run, train.replaced(train.Training(), values))
    data = source.Data(train.replaced(source.Settings(), values), device, training.seed)
    config = train.replaced(module.Config(), values | data.facts)
    return SimpleNamespace(model=typed["model"], module=module, config=config, training=training, run=run,
                           device=device, data=data, folder=Path(run.out) / typed["model"])


def load(setup):
    """(blocks, baseline, control) in OUT. Raises UserError that says how to train what is missing."""
    blocks, first = train.assemble(setup.module, setup.model, setup.run.out, setup.device)
    return blocks, *(train.trained(setup.module, setup.model, part, setup.run.out, setup.device, first)[0]
                     for part in ("end_to_end", "control"))


def plain_logits(net, x, *how):
    """Logits of a baseline or control."""
    found = net.logits(x, *how)
    return found[0] if isinstance(found, tuple) else found


def learner(setup, part, checkpointed=False):
    """A part of the model in training: network, optimizer, running mean or None, and update(step), which does
    what `train.train` does in an update."""
    training, device, seed = setup.training, setup.device, seed_of(setup.training.seed, part)
    n_pieces, bf16 = training.accumulate, training.precision == "bf16"
    torch.manual_seed(seed)
    net = train.build(setup.module, setup.config, part).to(device).train()
    average = copy.deepcopy(net).requires_grad_(False) if training.ema else None
    optimizer = train.make_optimizer(net, training, device)
    train.prepare_layers(net, training, replace(setup.run, checkpoint_activations=checkpointed))

    def update(step):
        for piece in range(step * n_pieces, (step + 1) * n_pieces):
            torch.manual_seed(seed + piece)
            batch = setup.data.batch(training.batch_size // n_pieces, setup.config, piece)
            with torch.autocast(device.type, torch.bfloat16, bf16):
                loss = net(batch) / n_pieces
            loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            torch._foreach_lerp_(list(average.parameters()), [p.data for p in net.parameters()], 0.1)
    return net, optimizer, average, update


def interleaved(functions, device, rounds, warm_up=3):
    """{name: milliseconds of each round}; in a round every function has its turn."""
    times = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function(i)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: ms[warm_up:] for name, ms in times.items()}


def about(script, argv):
    """What a measurement rests on."""
    git = subprocess.run("git rev-parse --short HEAD && git status --porcelain -uno ':/*.py'", shell=True,
                         cwd=HERE, capture_output=True, text=True).stdout.splitlines() or [""]
    info = Path("/proc/cpuinfo")
    cpu = re.findall("model name\\s*: (.*)", info.read_text() if info.exists() else "") or ["a CPU"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"command": shlex.join(["python", f"results/{script}.py", *argv]), "commit": git[0],
            "changed": len(git) > 1, "date": date.today().isoformat(), "torch": str(torch.__version__),
            "python": sys.version.split()[0], "threads": torch.get_num_threads(),
            "machine": gpu or f"{os.cpu_count()} cores of {cpu[0]}"}


def write(path, report):
    """Save a report as JSON, and print its tables {title: {row: {column: number}}}."""
    for title, rows in report.get("tables", {}).items():
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"  {name:40} " + "   ".join(f"{value:.4g} {column}" for column, value in row.items()))
    train.save(path, json.dumps(report, indent=1).encode())
    print(f"\nsaved {path}")


def run(main):
    """Call main with the command line; a user's mistake is told in one line."""
    try:
        main(sys.argv[1:])
    except (UserError, argparse.ArgumentError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
