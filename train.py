"""Train one block of a model alone, or the whole model end to end; score and sample what has been trained.

    python train.py --model gpt --block 2       one block: nothing of the other blocks is ever in this process
    python train.py --model gpt --block all     every block, one after another, one in memory at a time
    python train.py --model gpt --end-to-end    the baseline: all layers, backpropagation through all of them
    python train.py --model gpt --control       the control: one block's worth of layers, end to end
    python train.py --model gpt --eval          score the blocks in out/gpt beside baseline and control
    python train.py --model gpt --sample        generate from the blocks (or --end-to-end, --control)

Begin to read at `train`: it is the loop. What a model is, and what its noise, only the model file knows.
"""
import argparse
import contextlib
import copy
import difflib
import functools
import gc
import importlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as recompute

from data import UserError
from diffusion_blocks import seed_of

CONTRACT = ("DATA", "Config", "PRESETS", "Sampling", "Block", "EndToEnd")  # of a model file
ACTIONS = ("model", "preset", "block", "end_to_end", "control", "eval", "sample")  # flags, but no settings
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # fails with recurrent, torch 2.11
STOP = []  # the signals that came: the update ends and is saved


@dataclass
class Training:
    """What decides the weights. --resume takes it from the checkpoint, and refuses other values."""
    steps: int = 1000           # optimizer updates for each block (and as many for the baseline)
    epochs: float = 0.0         # passes over the data in the place of steps; 0: as --steps says
    batch_size: int = 16        # sequences or images in an update
    accumulate: int = 1         # gradient accumulation: pieces (micro-batches) of a batch, shared by ranks
    lr: float = 1e-3            # peak learning rate of AdamW, whose first beta is 0.9
    beta2: float = 0.95         # AdamW's second beta
    weight_decay: float = 0.1   # on matrices and embeddings, not on norms and biases
    warmup: int = 50            # updates of linear warm-up, counted for each block by itself
    final_lr: float = 0.05      # where the cosine ends, as a fraction of lr
    clip: float = 1.0           # largest gradient norm
    ema: float = 0.0            # decay of a running mean of the weights, which is scored and sampled; 0: none
    precision: str = "auto"     # of matrix products: bf16 or float32; auto: bf16 on CUDA, else float32
    compile: str = "auto"       # torch.compile of the layers: on or off; auto: on CUDA
    seed: int = 0               # random numbers are a function of (seed, part, update, piece)

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.accumulate) < 1 or self.batch_size % self.accumulate:
            raise ValueError("need steps and batch_size of at least 1, and accumulate to divide batch_size")
        if not (self.lr > 0 and 0 <= self.beta2 < 1 and self.clip > 0 and 0 <= self.ema < 1):
            raise ValueError("need lr > 0, 0 <= beta2 < 1, clip > 0 and 0 <= ema < 1")
        if self.precision not in ("auto", "bf16", "float32") or self.compile not in ("auto", "on", "off"):
            raise ValueError("precision must be auto, bf16 or float32; compile auto, on or off")


@dataclass
class Run:
    """Where and how it runs: not in the checkpoint."""
    device: str = "auto"        # auto, cpu, cuda, cuda:1, mps
    threads: int = 0            # CPU threads; 0: as torch chooses. Another number may change the last bits
    out: str = "out"            # checkpoints and logs go to OUT/MODEL
    resume: bool = False        # go on from the checkpoint, with its settings; on CPU to the same bits
    overwrite: bool = False     # train anew where a checkpoint is
    checkpoint_activations: bool = False  # keep each layer's input only, compute the rest twice: less memory
    log_every: int = 50         # updates between log lines; 0: at the end only
    save_every: int = 200       # updates between checkpoints; 0: at the end only


# ---- Training: the loop, and what it needs ----------------------------------------------------------------

def train(module, model, part, config, training, run, data, device, rank=0, size=1):
    """Train a part (block_N, end_to_end or control), alone or as one of `size` processes that share a batch.

    The seed of all that is random in an update is a function of (seed, part, update, piece). So an update is
    the same in whatever process, order or number of runs, and a checkpoint holds no generator's state."""
    path, steps, n_pieces = Path(run.out) / model / f"{part}.pt", training.steps, training.accumulate
    about = {"model": model, "part": part, "config": flat(config), "training": flat(training),
             "settings": flat(data.settings), "data": data.about, "torch": str(torch.__version__)}
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, training.precision == "bf16")
    torch.manual_seed(seed_of(training.seed, f"{part} weights"))
    net = build(module, config, part).to(device).train()
    average = copy.deepcopy(net).eval().requires_grad_(False) if training.ema else None
    optimizer, step, log = make_optimizer(net, training, device), 0, []
    if run.resume and path.exists():
        state = load(path, model)
        require_same(path, state, about, "config", "training", "settings")
        step, log = state["step"], state["log"]
        net.load_state_dict(state["net"])
        if average is not None:
            average.load_state_dict(state["average"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]})
    prepare_layers(net, training, run)
    network = nn.parallel.DistributedDataParallel(net) if size > 1 else net
    pieces, piece_size = range(rank, n_pieces, size), training.batch_size // n_pieces
    held_out, seed = data.held_out(4 * piece_size, config), seed_of(training.seed, part)
    name, count = part.replace("_", " "), sum(p.numel() for p in net.parameters())
    print(f"{model} {name}: {getattr(net, 'title', 'own')}; {count:,} parameters, {16 * count / 1e6:.1f} MB "
          f"of weights, gradients and moments; update {step} of {steps}; to {path}", flush=True)
    total, since, first, began = 0.0, 0, step, time.time()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, training)
        for piece in pieces:
            torch.manual_seed(seed + step * n_pieces + piece)
            batch = data.batch(piece_size, config, step * n_pieces + piece)
            if size > 1:  # processes exchange gradients once, with their last piece, and no buffers
                network.require_backward_grad_sync, network.broadcast_buffers = piece == pieces[-1], False
            with autocast():
                loss = network(batch) / len(pieces)
            loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(net.parameters(), training.clip)
        total = total + 0.0 * norm  # not finite if a gradient is not
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, since = step + 1, since + 1
        if average is not None:
            decay = min(training.ema, (1 + step) / (10 + step))  # with the usual warm-up
            torch._foreach_lerp_(list(average.parameters()), [p.data for p in net.parameters()], 1 - decay)
        stop = rank == 0 and STOP  # rank 0 alone writes
        logs, saves = (n and step % n == 0 or step == steps or stop for n in (run.log_every, run.save_every))
        # on CUDA, only logging and saving wait for the device
        if (logs or saves or device.type == "cpu") and not math.isfinite(float(total)):
            raise UserError(f"the loss of {part} is not finite at update {step}; the checkpoint saved before "
                            f"is untouched; try a lower --lr")
        if logs and rank == 0:
            with autocast():
                val = validate(average or net, held_out)
            mean, ms = float(total) / since, 1000 * (time.time() - began) / (step - first)
            peak = f"{torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB | " * (device.type == "cuda")
            print(f"{name} | step {step}/{steps} | loss {mean:.4f} | val {val:.4f} | lr {group['lr']:.1e} | "
                  f"{ms:.0f} ms/step | {peak}{(steps - step) * ms / 6e4:.1f} min left", flush=True)
            log.append({"step": step, "loss": mean, "val_loss": val, "lr": group["lr"], "ms": ms})
            save(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in log).encode())
            total, since = 0.0, 0
        if saves and rank == 0:
            save(path, about | {"step": step, "log": log, "net": net.state_dict(),
                                "optimizer": optimizer.state_dict()["state"],
                                "average": average.state_dict() if average is not None else None})
        if stop and step < steps:
            print(f"{path} holds update {step} of {steps}; go on: the same command with --resume")
            sys.exit(128 + STOP[0])


def build(module, config, part):
    """The network of a part: block_N, end_to_end or control. Nothing of any other part is built."""
    with user_errors():
        if part.startswith("block_"):
            return module.Block(config, int(part[6:]))
        return module.EndToEnd(config.control() if part == "control" else config)


def make_optimizer(net, training, device):
    """AdamW with weight decay on matrices and embeddings, none on norms and biases."""
    groups = [{"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": training.weight_decay},
              {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, training.beta2), fused=device.type == "cuda")


def prepare_layers(net, training, run):
    """Compile the layers, and let them keep only their inputs for the backward pass, if so asked."""
    for layer in [layer for m in net.modules() if isinstance(m, nn.ModuleList) for layer in m]:
        if training.compile == "on":
            torch._dynamo.config.cache_size_limit = 64  # the layers of all parts share one function
            layer.forward = torch.compile(layer.forward)
        if run.checkpoint_activations:
            layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)


def lr_at(step, training):
    """Linear warm-up, then a cosine to final_lr * lr; step counts this block's own updates."""
    warm = min(1.0, (step + 1) / max(1, training.warmup))
    after = max(0, step - training.warmup) / max(1, training.steps - training.warmup)
    cosine = (1 + math.cos(math.pi * after)) / 2
    return training.lr * warm * (training.final_lr + (1 - training.final_lr) * cosine)


@torch.no_grad()
def validate(net, held_out):
    """Mean loss on the held-out batch, in 4 pieces, with the same noise every time and without dropout."""
    torch.manual_seed(0)
    training, columns = net.training, (held_out,) if torch.is_tensor(held_out) else held_out
    net.eval()
    total = sum(net(batch if len(batch) > 1 else batch[0]).item() * len(batch[0])
                for batch in zip(*(column.chunk(4) for column in columns)))
    net.train(training)
    return total / len(columns[0])


# ---- Checkpoints, and what has been trained ---------------------------------------------------------------

def save(path, content):
    """Write bytes, or a state by torch.save, beside `path` and rename it: what has the name is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(content) if isinstance(content, bytes) else torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # of a full disk torch.save makes the second
        raise UserError(f"cannot write {path} ({e}); what was there before is untouched") from None


def load(path, model):
    """A checkpoint as a dictionary on the CPU. Never runs code from the file. Raises UserError."""
    if not path.exists():
        flag, out = path.stem.replace("block_", "block ").replace("_", "-"), shlex.quote(str(path.parents[1]))
        raise UserError(f"there is no {path}; train it: python train.py --model {model} --{flag} --out {out}")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare the checksums
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if [state[k] for k in ("model", "part", "settings", "average")][:2] != [model, path.stem]:
            raise ValueError(f"it holds {state['part']} of {state['model']}")
    except Exception as e:
        raise UserError(f"{path} is damaged, or not of this model and code ({type(e).__name__}: "
                        f"{str(e)[:80]!r}); train it again") from None
    return state


def require_same(path, old, new, *sections):
    """Raises UserError that names what differs between two checkpoints. Where the data lies may differ."""
    wrong = [f"{k} ({old[s].get(k)} -> {new[s].get(k)})" for s in sections for k in {**old[s], **new[s]}
             if old[s].get(k) != new[s].get(k) and (s, k) != ("settings", "data")]
    wrong += ["the data's content"] * (old["data"]["fingerprint"] != new["data"]["fingerprint"])
    if wrong:
        raise UserError(f"{path} was trained with other settings: {', '.join(wrong)}")


def trained(module, model, part, out, device, like=None):
    """A trained network, ready to be scored, and its checkpoint, which has to fit the checkpoint `like`."""
    path = Path(out) / model / f"{part}.pt"
    state = load(path, model)
    require_same(path, state, like or state, "config")
    net = build(module, replaced(module.Config(), state["config"]), part)
    net.load_state_dict(state["average"] or state["net"])
    return net.to(device).eval(), state


def assemble(module, model, out, device):
    """The trained blocks, a list, and block 0's checkpoint, with the fewest updates of any block."""
    first = load(Path(out) / model / "block_0.pt", model)
    found = [trained(module, model, f"block_{b}", out, device, first)
             for b in range(first["config"]["n_blocks"])]
    return [net for net, _ in found], first | {"step": min(state["step"] for _, state in found)}


def evaluate(module, model, run, data, device):
    """Score the blocks beside baseline and control, as far as they are trained; print and save the tables."""
    (blocks, state), others = assemble(module, model, run.out, device), {}
    updates = {f"{len(blocks)} blocks": state["step"]}
    for part in ("end_to_end", "control"):
        name = part.replace("_", " ")
        try:
            others[name], other = trained(module, model, part, run.out, device, state)
            updates[name] = other["step"]
        except UserError as e:
            print(f"without {name}: {e}")
    if data.about["fingerprint"] != state["data"]["fingerprint"]:
        print("note: scored on other data than the blocks were trained on")
    print("scoring", ", ".join(f"{name} ({n} updates)" for name, n in updates.items()), flush=True)
    torch.manual_seed(seed_of(state["training"]["seed"], "eval"))
    with user_errors():
        tables = module.evaluate(blocks, others, data)
    rows = next(iter(tables.values()))
    unit = next(iter(next(iter(rows.values()))))
    print(", ".join(f"{name} {row[unit]:.4g}" for name, row in rows.items() if unit in row), unit, sep=", ")
    for title, rows in tables.items():
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"  {name:36} " + "   ".join(f"{value:.4g} {column}" for column, value in row.items()))
    path = Path(run.out) / model / "eval.json"
    about = {k: state[k] for k in ("model", "config", "training", "settings", "data", "torch")} | {
        "updates": updates, "device": str(device), "threads": torch.get_num_threads(), "tables": tables}
    save(path, json.dumps(about, indent=1).encode())
    print(f"\nsaved {path}")


def sample(module, model, parts, run, values, data, device):
    """Generate from the blocks (no parts), baseline or control: print a text, save pictures and arrays."""
    nets, _ = (trained(module, model, parts[0], run.out, device) if parts else
               assemble(module, model, run.out, device))
    torch.manual_seed(seed_of(values["seed"], "sample"))
    with user_errors():
        result = module.sample(nets, replaced(module.Sampling(), values), data)
    if isinstance(result, str):
        return print(result)
    for name, array in result.items():
        path = Path(run.out) / model / "_".join([name, *parts])
        if array.dtype == torch.uint8:  # a picture (height, width, 3)
            from PIL import Image
            Image.fromarray(array.numpy()).save(path := path.with_suffix(".png"))
        else:
            np.save(path := path.with_suffix(".npy"), array.numpy())
        print(f"saved {path}")


# ---- Several processes: torchrun's ranks are assigned to parts; different parts do not communicate --------

def assign(parts, rank, n_ranks):
    """(parts that a rank trains in turn, its rank among those that share a part, their number)."""
    if n_ranks <= len(parts):
        return parts[rank::n_ranks], 0, 1
    if n_ranks % len(parts):
        raise UserError(f"{n_ranks} processes cannot share {len(parts)} blocks; start a multiple, or fewer")
    size = n_ranks // len(parts)
    return [parts[rank // size]], rank % size, size


def connect(part, rank, size, device):
    """Make the processes that train one part a process group of their own: no other part's are in it."""
    store, _, _ = next(dist.rendezvous("env://"))  # torchrun's; parts meet only here, under different names
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore(part, store),
                            rank=rank, world_size=size)


# ---- Settings: a flag for each field of Training, Run, the data's Settings, the model's Config and Sampling

def flat(settings):
    """{field: value} of a dataclass and of those nested in it, such as a Config's noise."""
    out = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        out |= flat(value) if is_dataclass(value) else {f.name: value} if f.init else {}
    return out


def replaced(settings, values):
    """A dataclass with the fields that `values` names replaced, in it and in those nested in it."""
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.init}
    with user_errors():
        return replace(settings, **{k: replaced(v, values) if is_dataclass(v) else values.get(k, v)
                                    for k, v in own.items()})


@contextlib.contextmanager
def user_errors():
    """A ValueError of a model file, such as a Config's about its values, becomes a one-line error."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from e


def add_flags(group, settings, hidden):
    """A flag for every field of a dataclass and of those nested in it; the field's comment is its help."""
    notes = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(type(settings)), re.M))
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            add_flags(group, value, hidden)
        elif f.init and f.name not in hidden:
            how = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+"}}
            text = f"{notes.get(f.name, '')} (default: {value!r})".replace("%", "%%")
            group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text,
                               **how.get(f.type, {"type": f.type}))


def parse(argv):
    """(what was typed, the preset's values, the model file, the module of its data). Raises UserError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--model", default="gpt", help="vit, dit, gpt, mdm, recurrent, or your NAME.py's NAME")
    first.add_argument("--preset", default="default", help="a set of values that the model file names")
    known, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if not (known.model.isidentifier() and Path(__file__).with_name(f"{known.model}.py").exists()):
        raise UserError(f"no {known.model}.py here; choose vit, dit, gpt, mdm, recurrent or write your own")
    module = importlib.import_module(known.model)
    needs = CONTRACT + ("evaluate",) * ("--eval" in argv) + ("sample",) * ("--sample" in argv)
    lacks = [k for k in needs if not hasattr(module, k)]
    if lacks or known.preset not in module.PRESETS:
        raise UserError(f"{known.model}.py lacks {', '.join(lacks) or f'a preset {known.preset!r}'}")
    source, preset = importlib.import_module(f"data.{module.DATA}"), module.PRESETS[known.preset]
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], allow_abbrev=False, exit_on_error=False,  # it raises
        formatter_class=argparse.RawDescriptionHelpFormatter)
    part, act = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    part.add_argument("--block", metavar="N|all", help="train block N alone, or every block in turn")
    part.add_argument("--end-to-end", action="store_true", help="train (with --sample: sample) the baseline")
    part.add_argument("--control", action="store_true", help="the same with the control: one block's layers")
    act.add_argument("--eval", action="store_true", help="score the blocks beside baseline and control")
    act.add_argument("--sample", action="store_true", help="generate from the blocks, baseline or control")
    for title, cls in (("training", Training), ("run", Run), ("data", source.Settings),
                       (f"model {known.model}", module.Config), ("sampling", module.Sampling)):
        add_flags(parser.add_argument_group(title), replaced(cls(), preset), source.FACTS)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], re.findall(r"--[a-z][\w-]+", parser.format_help()), 1)
        raise UserError(f"unknown flag {unknown[0]}{f'; did you mean {near[0]}?' if near else ''}")
    return vars(typed), preset, module, source


def settle(typed, preset, module, source, rank=0, n_ranks=1):
    """(parts to train or to sample, rank and size as `assign` gives them, values of all settings). Those of a
    checkpoint (to resume, score or sample) outvote a preset's, typed ones outvote both. Raises UserError."""
    act = typed["eval"] or typed["sample"]
    parts = [k for k in ("end_to_end", "control") if typed[k]]
    if act and typed["block"] or typed["eval"] and parts or not (act or parts or typed["block"]):
        raise UserError("say what to do: --block N, --block all, --end-to-end, --control, --eval or --sample "
                        "(or the last with --end-to-end or --control)")
    own = [Run, source.Settings, *([module.Sampling] * typed["sample"] if act else [Training, module.Config])]
    useless = set(typed).difference(ACTIONS, ["seed"] * typed["sample"], *(flat(cls()) for cls in own))
    if useless:
        raise UserError(f"--{min(useless).replace('_', '-')} has no effect here; drop it")
    typed = typed | ({"epochs": 0.0} if "steps" in typed else {})
    values, name = preset | typed, f"block_{typed['block']}"
    folder = Path(replaced(Run(), values).out) / typed["model"]
    if act or typed.get("resume"):
        paths = [folder / f"{part}.pt" for part in parts or (name, "block_0")]
        for path in [path for path in paths if path.exists()][:1]:
            state = load(path, typed["model"])
            values = preset | state["config"] | state["training"] | state["settings"] | typed
    if typed["block"]:
        blocks = [f"block_{b}" for b in range(replaced(module.Config(), values).noise.n_blocks)]
        parts = blocks if typed["block"] == "all" else [part for part in blocks if part == name]
        if not parts:
            raise UserError(f"no block {typed['block']}; {typed['model']} has blocks 0 to {len(blocks) - 1}")
    parts, rank, size = (parts, 0, 1) if act else assign(parts, rank, n_ranks)
    there = [path for path in (folder / f"{part}.pt" for part in parts) if path.exists()]
    if there and not (act or typed.get("resume") or typed.get("overwrite")):
        raise UserError(f"{there[0]} is there already: --resume goes on with it, --overwrite trains it anew, "
                        f"--out names another place")
    return parts, rank, size, values


def set_up(run, training, local_rank=0):
    """The device with its index, and Training with what auto means there. Raises UserError."""
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = auto if run.device == "auto" else run.device
    try:
        device = torch.zeros(1, device=f"cuda:{local_rank}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}") from None
    if cuda := device.type == "cuda":
        torch.cuda.set_device(device)
    if run.threads > 0:
        torch.set_num_threads(run.threads)
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    auto = {"precision": "bf16" if bf16 else "float32", "compile": "on" if cuda else "off"}
    return device, replace(training, **{k: v for k, v in auto.items() if getattr(training, k) == "auto"})


def main(argv):
    typed, preset, module, source = parse(argv)
    rank, n_ranks, local_rank = (int(os.environ.get(k, default)) for k, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun's
    parts, rank, size, values = settle(typed, preset, module, source, rank, n_ranks)
    model, run = typed["model"], replaced(Run(), values)
    device, training = set_up(run, replaced(Training(), values), local_rank)
    data = source.Data(replaced(source.Settings(), values), device, training.seed)
    if typed["eval"]:
        return evaluate(module, model, run, data, device)
    if typed["sample"]:
        return sample(module, model, parts, run, values, data, device)
    config = replaced(module.Config(), values | data.facts)
    if training.epochs:
        steps = math.ceil(training.epochs * data.length(config) / training.batch_size)
        training = replaced(training, {"steps": steps})
    if size > 1:
        training = replaced(training, {"accumulate": math.ceil(training.accumulate / size) * size})
        connect(parts[0], rank, size, device)
    print(f"data: {data.describe()}; {device}, {torch.get_num_threads()} threads", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # after two of them Ctrl-C ends the program at once
        signal.signal(number, lambda n, _: STOP.append(n) or STOP[1:] and signal.signal(2, signal.SIG_DFL))
    for part in parts:
        train(module, model, part, config, training, run, data, device, rank, size)
        gc.collect()  # a wrapped layer refers to itself
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, argparse.ArgumentError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: {str(e).split(' GPU ')[0]} To train, try --accumulate or --checkpoint-activations")
    except (BrokenPipeError, KeyboardInterrupt):  # as of `| head`, or of Ctrl-C
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
