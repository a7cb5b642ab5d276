"""What the scripts that measure have in common: train.py's flags, networks, the record of a measurement."""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is silent
os.environ.setdefault("TEARDOWN_CUPTI", "0")  # ending a profile must not break CUDA graphs that live on
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train
from data import UserError


class Parser(argparse.ArgumentParser):
    """Of a script's own flags: --help prints the script's docstring, a mistake is told in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)


def begin(argv):
    """Everything that train.py makes of its flags, by the names that it has there."""
    asked = train.parse(argv)
    values = train.values_of(asked)
    run = train.replaced(train.Run(), values)
    device, training = train.set_up(run, train.replaced(train.Training(), values))
    data = asked.source.Data(train.replaced(asked.source.Settings(), values), device, training.seed)
    config = train.replaced(asked.module.Config(), {**values, **data.facts})
    return SimpleNamespace(model=asked.model, module=asked.module, config=config, training=training, run=run,
                           device=device, data=data, folder=Path(run.out) / asked.model)


def plain_logits(net, x):
    """Logits of a baseline or control; gpt's come with a cache."""
    found = net.logits(x)
    return found[0] if isinstance(found, tuple) else found


def learner(setup, part, checkpointed=False):
    """A part of the model in training, as train.py's loop has it: `train.update(learner)` trains it."""
    run = replace(setup.run, checkpoint_activations=checkpointed)
    return train.Learner(train.Job(setup.model, setup.module, part, setup.config, setup.training, run,
                                   setup.data, setup.device))


def machine():
    """The name of the GPU, or else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else 'a CPU'}"


def about(script, argv):
    """What a measurement rests on."""
    git = subprocess.run("git rev-parse --short HEAD && git status --porcelain -uno ':/*.py'", shell=True,
                         cwd=HERE, capture_output=True, text=True)
    commit, *changed = git.stdout.splitlines() or [""]
    return {"command": shlex.join(["python", f"results/{script}.py", *argv]), "commit": commit,
            "changed": bool(changed), "date": date.today().isoformat(), "torch": str(torch.__version__),
            "python": sys.version.split()[0], "threads": torch.get_num_threads(), "machine": machine()}


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
