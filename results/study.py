"""The rows of README.md's studies, one command each, and probes of trained models.

    python results/study.py                          # the names of all rows
    python results/study.py dit12_uniform_444        # train and score it: study/dit12_uniform_444.jsonl
    python results/study.py --probe gpt --out out/0  # what lies in out/0/gpt, noise level by noise level
    python results/study.py --edges gpt --blocks 4   # edges at equal drops of the measured cross-entropy
    python results/study.py --rival mdm --out out/0  # checkpointed activations at the blocks' memory and time

A row's file holds what it rests on (command, commit, machine, versions, seed, date), thinned training logs,
and the tables of `train.py --eval`."""
import argparse
import datetime
import gc
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import dit
import gpt
import mdm
import recurrent
import train
import vit
from diffusion_blocks import bayes_logits, target_table

MODULES = {"vit": vit, "dit": dit, "gpt": gpt, "mdm": mdm, "recurrent": recurrent}


# -----------------------------------------------------------------------------------------------------------
# Rows

def rows():
    """{name: (model, flags, variant)}; a variant names a function below that changes what no flag can."""
    found = {}

    def row(name, model, flags, variant=None):
        found[name] = model, flags.split(), variant
    # the paper's partition study, at its depth: 12 layers, 3 blocks, no overlap
    for edges in ("probability", "uniform"):
        for split in ("4,4,4", "3,6,3", "6,4,2", "2,4,6"):
            row(f"dit12_{edges}_{split.replace(',', '')}", "dit",
                f"--n-layer 12 --gamma 0 --edges {edges} --layer-split {split} --steps 1000")
    for n in (1, 2, 3, 4, 6):
        row(f"dit12_b{n}", "dit", f"--n-layer 12 --n-blocks {n} --steps 1000")
        row(f"mdm12_b{n}", "mdm", f"--n-layer 12 --n-blocks {n} --seq-len 128 --steps 500")
        row(f"vit12_b{n}", "vit", f"--n-layer 12 --n-blocks {n} --steps 1500")
    for gamma in ("0.1", "0.2"):  # 0 is dit12_probability_444, 0.05 dit12_b3
        row(f"dit12_gamma_{gamma}", "dit", f"--n-layer 12 --gamma {gamma} --steps 1000")
    row("mdm_middle", "mdm", "--n-layer 18 --n-blocks 3", "middle")  # six layers, on a third of t alone
    # mdm's control, B = 1 of two layers, with MD4's other schedule, which trains more on many masks
    row("mdm_cosine", "mdm", "--n-layer 2 --n-blocks 1 --schedule cosine")
    row("recurrent_two", "recurrent", "--streams two")
    short = "--steps 400"  # gpt: half of the default's updates, 4 blocks of 2 layers
    row("gpt_short", "gpt", short)
    for gamma in ("0", "0.05", "0.2"):
        row(f"gpt_gamma_{gamma}", "gpt", f"{short} --gamma {gamma}")
    row("gpt_uniform", "gpt", f"{short} --edges uniform")
    row("gpt_range", "gpt", f"{short} --sigma-min 0.15 --sigma-max 20 --p-mean -0.3 --p-std 0.8")
    row("gpt_edm_readout", "gpt", f"{short} --readout edm")
    row("gpt_weighted", "gpt", f"{short} --weighting edm")
    row("gpt_batch_mean", "gpt", f"{short} --weighting edm", "batch_mean")
    row("gpt_learned_table", "gpt", short, "learned_table")
    if (HERE / "probe" / "gpt.json").exists():
        row("gpt_equal_information", "gpt", f"{short} --edges {equal_information('gpt', 4)}")
    return found


def batch_mean(out):
    """The released code's loss: (N,) times (N, 1), whose mean is the product of two means."""
    def score_loss(error, y, noise, block):
        level = noise.sample(block, len(y), y.device)                        # (B,)
        err = error(noise.corrupt(y, level), level)                          # (B,)
        return noise.weight(level).mean() * err.mean()
    gpt.score_loss = score_loss


def learned_table(out):
    """Block 0 trains its table with all else; the other blocks have it frozen."""
    class Block(gpt.Block):
        def __init__(self, config, b):
            super().__init__(config, b)
            rows = target_table(config.vocab_size, config.n_embd, config.table_seed)
            del self.table
            if b == 0:
                self.rows = nn.Parameter(rows.clone())
            else:
                path = Path(out) / "gpt" / "block_0.pt"
                if path.exists():  # else the network is only built to count its parameters
                    rows = torch.load(path, weights_only=True)["net"]["rows"]
                self.register_buffer("rows", rows)

        @property
        def table(self):
            return F.normalize(self.rows, dim=-1)  # (V, C)
    gpt.Block = Block


def middle(out):
    """The middle block alone, scored for all shares of masks as a probe does."""
    net, state = train.finished(mdm, "mdm", "block_1", out)
    settings = train.settle(train.TextTraining, state["training"])
    data = train.load_fitting(mdm, state["config"], settings, torch.device("cpu"))
    torch.manual_seed(0)
    times, found = masked_bits({"net": net}, data)
    return {"tables": {"bits per masked byte": {f"t {t:.3g}": v for t, v in zip(times, found["net"])}},
            **{k: state[k] for k in ("config", "training", "data")}}


def about(command):
    """What a measurement rests on."""
    def git(*what):
        return subprocess.run(["git", *what], cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {"command": command, "commit": git("rev-parse", "--short", "HEAD"), "changed": bool(git(
                "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")),
            "date": datetime.date.today().isoformat(), "torch": str(torch.__version__),
            "python": platform.python_version(), "machine": machine(), "threads": torch.get_num_threads()}


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def run_row(name, out, seed, threads, score_only):
    """Train a row's blocks and score them; or score again what lies in out, and keep the logs of training."""
    model, flags, variant = rows()[name]
    out, part = Path(out) / name, "1" if variant == "middle" else "all"
    common = ["--model", model, *flags, "--seed", str(seed), "--threads", str(threads), "--out", str(out)]
    path = HERE / "study" / f"{name}{f'_seed{seed}' if seed else ''}.jsonl"
    began = about(f"python results/study.py {name} --seed {seed}")
    if variant in ("batch_mean", "learned_table"):
        globals()[variant](out)
    if model == "dit" and not (out / "vit" / "end_to_end.pt").exists():  # the judge: our vit.py
        train.run(["--model", "vit", "--end-to-end", *common[-6:]])
    if not score_only:
        train.run([*common, "--block", part, "--log-every", "200"])
    if variant == "middle":
        report = middle(out)
    else:
        train.run(["--model", model, "--eval", *common[-4:]])
        report = json.loads((out / model / "eval.json").read_text())
    if model == "dit":
        report["tables"]["denoising loss over all levels"] = over_all_levels(out)
    if score_only:
        lines = [json.loads(line) for line in path.read_text().splitlines()][:-1]
    else:
        command = f"python train.py --model {model} --block {part} {' '.join(flags)}"
        lines = [began | {"train": command, "variant": variant, "seed": seed}
                 | {k: report[k] for k in ("config", "training", "data")}]
        for log in sorted((out / model).glob("block_*.jsonl")):
            lines += [{"part": log.stem} | json.loads(line) for line in log.read_text().splitlines()]
    lines.append({"scored": about(f"python results/study.py {name} --score --seed {seed}"),
                  "tables": report["tables"]})
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


@torch.no_grad()
def over_all_levels(out, n=48):
    """The mean loss of the owning blocks at levels that are the same however the range is cut: n at equal
    quantiles of the training noise."""
    blocks, state = train.assemble(dit, "dit", out, {}, torch.device("cpu"))
    settings = train.LOADERS["images"].settings
    data = train.load_fitting(dit, state["config"], train.settle(settings, state["training"]),
                              torch.device("cpu"))
    levels = blocks[0].noise.icdf([(i + 0.5) / n for i in range(n)]).tolist()
    losses = [dit.denoising_loss(blocks, *data.held_out(1000, blocks[0].config), s) for s in levels]
    return {"mean": {"blocks": sum(losses) / n}, **{f"sigma {s:.4g}": {"blocks": v}
                                                    for s, v in zip(levels, losses)}}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")


# -----------------------------------------------------------------------------------------------------------
# Probes: the loss of every block at every noise level, the number of steps, each block left out

def load(model, out):
    """(blocks, baseline, control, data) of what lies in out/model."""
    module, device = MODULES[model], torch.device("cpu")
    blocks, state = train.assemble(module, model, out, {}, device)
    others = [train.finished(module, model, part, out)[0] for part in ("end_to_end", "control")]
    settings = train.LOADERS[module.DATA].settings
    data = train.load_fitting(module, state["config"], train.settle(settings, state["training"]), device)
    return blocks, *others, data


def grid_of(noise):
    """(41,) float64: levels at equal steps of ln sigma, both ends exact."""
    sigmas = torch.logspace(math.log10(noise.sigma_min), math.log10(noise.sigma_max), 41).double()
    sigmas[0], sigmas[-1] = noise.sigma_min, noise.sigma_max
    return sigmas


@torch.no_grad()
def text_curve(model, blocks, baseline, control, data, n_windows=64):
    """Bits per byte at each level: of every block, of baseline and control (which see no noise), from z
    alone."""
    config, noise, table = blocks[0].config, blocks[0].noise, blocks[0].table
    windows, scale = data.held_out(n_windows, config).split(16), 0.0
    sigmas = grid_of(noise)
    found = {"blocks": [[0.0] * len(sigmas) for _ in blocks], "z alone": [0.0] * len(sigmas),
             "baseline": 0.0, "control": 0.0}
    prior = data.unigram()
    for w in windows:
        x, target = w[:, :-1], w[:, 1:]
        y, scale = table[target], scale + math.log(2) * data.token_bytes[target].sum().item()

        def nats(logits):
            return gpt.cross_entropy(logits, target).sum().item()
        if model == "gpt":
            contexts = [block.context(x) for block in blocks]
            found["baseline"] += nats(baseline(x)[0])
            found["control"] += nats(control(x)[0])
        else:
            contexts, (x, _) = [None], blocks[0].condition(x)
            found["baseline"] += nats(baseline(w[:, :-1], config.mean_passes)[0])
            found["control"] += nats(control(w[:, :-1], 1)[0])
        for i, s in enumerate(sigmas.tolist()):
            level = torch.full((len(w),), s)
            z = noise.corrupt(y, level)
            for b, block in enumerate(blocks):
                found["blocks"][b][i] += nats(block.logits(x, z, level, contexts[b]))
            found["z alone"][i] += nats(bayes_logits(prior, z, level, table))
    found = {k: ([[v / scale for v in row] for row in rows] if k == "blocks" else
                 [v / scale for v in rows] if k == "z alone" else rows / scale) for k, rows in found.items()}
    return {"level": sigmas.tolist(), "unit": "bits per byte", **found}


@torch.no_grad()
def masked_bits(nets, data, n_windows=256):
    """Times t, and {name: bits per masked byte at each} of {name: net}."""
    config, noise = (net := next(iter(nets.values()))).config, net.noise
    windows = [w[:, :-1] for w in data.held_out(n_windows, config).split(64)]
    times, found = [(i + 0.5) / 24 for i in range(24)], {name: [] for name in nets}
    for t in times:
        nats, masks, level = {name: 0.0 for name in nets}, 0, torch.full((64,), t)
        for y in windows:
            z = noise.corrupt(y, level[:len(y)])
            masks += (z == config.vocab_size).sum().item()
            for name, net in nets.items():
                nats[name] += net.masked_nats(z, level[:len(y)], y).sum().item()
        for name in nets:
            found[name].append(nats[name] / masks / math.log(2))
    return times, found


def mdm_curve(model, blocks, baseline, control, data):
    """Bits per masked byte at each t."""
    times, found = masked_bits({**dict(enumerate(blocks)), "baseline": baseline, "control": control}, data)
    return {"level": times, "unit": "bits per masked byte", "blocks": [found[b] for b in range(len(blocks))],
            "baseline": found["baseline"], "control": found["control"]}


@torch.no_grad()
def vit_curve(model, blocks, baseline, control, data, repeat=4):
    """Bits per label at each level, the mean over a few draws of noise."""
    noise, table = blocks[0].noise, blocks[0].table
    x, label = data.held_out(0, blocks[0].config)
    sigmas = grid_of(noise)
    found, alone = [[0.0] * len(sigmas) for _ in blocks], [0.0] * len(sigmas)
    for i, s in enumerate(sigmas.tolist()):
        for _ in range(repeat):
            level = torch.full((len(x),), s)
            z = noise.corrupt(table[label], level)
            for b, block in enumerate(blocks):
                said = vit.batched(block.logits, x, z, level)
                found[b][i] += vit.cross_entropy_bits(said, label) / repeat
            free = bayes_logits(torch.zeros(len(x), len(table)), z, level, table)
            alone[i] += vit.cross_entropy_bits(free, label) / repeat
    return {"level": sigmas.tolist(), "unit": "bits per label", "blocks": found, "z alone": alone,
            "baseline": vit.cross_entropy_bits(vit.batched(baseline, x), label),
            "control": vit.cross_entropy_bits(vit.batched(control, x), label)}


@torch.no_grad()
def dit_curve(model, blocks, baseline, control, data):
    """EDM-weighted squared error per pixel at each level, one draw of noise for all."""
    noise, (x, label) = blocks[0].noise, data.held_out(1000, blocks[0].config)
    sigmas = grid_of(noise)

    def loss(net, s):  # of this net, whoever owns the level
        return dit.denoising_loss([net] * net.noise.n_blocks, x, label, s)
    return {"level": sigmas.tolist(), "unit": "weighted squared error per pixel",
            "blocks": [[loss(net, s) for s in sigmas.tolist()] for net in blocks],
            "baseline": [loss(baseline, s) for s in sigmas.tolist()],
            "control": [loss(control, s) for s in sigmas.tolist()]}


def without(blocks, b, steps):
    """Levels of a sampler's grid that block b does not own: the chain jumps over its interval, or, without
    block 0, begins below it."""
    return torch.stack([s for s in steps if blocks[0].noise.block_of(s).item() != b])


@torch.no_grad()
def gpt_steps(blocks, baseline, control, data, out):
    """The next byte right over the number of levels and without each block; generated text, judged."""
    config, noise, grid = blocks[0].config, blocks[0].noise, blocks[0].noise.steps
    windows, tables = data.held_out(64, config).split(16), {"levels": {}, "left out": {}, "text": {}}

    def right(temperature):
        hits = 0
        for w in windows:
            x = w[:, :-1]
            contexts = [block.context(x) for block in blocks]
            hits += (gpt.denoise_token(blocks, x, contexts, temperature, 0) == w[:, 1:]).sum().item()
        return 100 * hits / sum(w[:, 1:].numel() for w in windows)
    for n in (2, 3, 4, 5, 8, 16, 32):
        noise.steps = lambda _, n=n: grid(n)
        tables["levels"][n] = {"from z = 0, %": right(0.0), "from noise, %": right(1.0)}
    full = grid(16)
    for b in range(len(blocks)):
        noise.steps = lambda _, b=b: without(blocks, b, full)
        tables["left out"][f"block {b}"] = {"from z = 0, %": right(0.0), "from noise, %": right(1.0)}
    noise.steps = lambda _: full
    tables["left out"]["none"] = {"from z = 0, %": right(0.0), "from noise, %": right(1.0)}
    noise.steps = grid
    held = data.held_out(64, config)[:, :config.seq_len]
    prompts = held[:, :64].tolist()

    def score(tokens):
        return gpt.score_text(tokens, lambda x: baseline(x)[0], 64, 192, data)
    tables["text"]["held-out text"] = score(held)
    for n in (2, 3, 5, 9, 17, 33):
        tables["text"][f"{n} levels"] = score(gpt.generate(blocks, prompts, 128, euler_steps=n))
    return tables


@torch.no_grad()
def dit_steps(blocks, baseline, control, data, out):
    """Frechet distance over the number of levels and without each block's levels."""
    judge, _ = train.finished(vit, "vit", "end_to_end", out)
    held, _ = data.held_out(0, blocks[0].config)
    of_held, label = vit.batched(judge.features, held), torch.arange(2000) % blocks[0].config.n_class
    grid, noise = blocks[0].noise.steps, blocks[0].noise

    def score(nets, n):
        torch.manual_seed(0)  # the same starting noise for all
        images = dit.generate_images(nets, label, replace(dit.Sampling(), euler_steps=n))
        judged = vit.batched(judge, images).argmax(-1)
        return {"Frechet distance": dit.frechet_distance(vit.batched(judge.features, images), of_held),
                "of its class, %": 100 * (judged == label).float().mean().item()}
    tables = {"levels": {n: {name: score(nets, n) for name, nets in (
        ("blocks", blocks), ("baseline", [baseline]))} for n in (4, 6, 10, 20, 50, 100)}, "left out": {}}
    for b in range(len(blocks)):
        noise.steps = lambda n, b=b: without(blocks, b, grid(n))
        tables["left out"][f"block {b}"] = score(blocks, 50)
    noise.steps = grid
    tables["left out"]["none"] = score(blocks, 50)
    return tables


@torch.no_grad()
def vit_steps(blocks, baseline, control, data, out):
    """Accuracy over the number of levels."""
    x, label = data.held_out(0, blocks[0].config)
    tables = {"levels": {}}
    for n in (2, 3, 4, 8, 16, 32):
        steps = blocks[0].noise.steps(n)

        def right(z):
            d = vit.batched(lambda x, z: vit.denoise_labels(blocks, x, z, steps)[-1], x, z)
            return 100 * ((d @ blocks[0].table.T).argmax(-1) == label).float().mean().item()
        y = blocks[0].table[label]
        draws = [right(steps[0].item() * torch.randn(y.shape)) for _ in range(8)]
        tables["levels"][n] = {"from z = 0, %": right(torch.zeros_like(y)), "from noise, %": sum(draws) / 8}
    return tables


@torch.no_grad()
def mdm_steps(blocks, baseline, control, data, out):
    """Text filled in from nothing, over the number of moves, under the end-to-end gpt.py of the same run."""
    judge, _ = train.finished(gpt, "gpt", "end_to_end", out)
    tables = {"text": {"held-out text": gpt.score_text(
        data.held_out(64, blocks[0].config)[:, :-1], lambda x: judge(x)[0], 1, 256, data)}}
    for n in (4, 8, 16, 32, 64, 128, 256):
        for name, nets in (("blocks", blocks), ("baseline", baseline)):
            torch.manual_seed(0)
            z = torch.full((64, blocks[0].config.seq_len), blocks[0].noise.mask_id)
            tokens = mdm.fill(nets, z, replace(mdm.Sampling(), n_moves=n))
            tables["text"][f"{name}, {n} moves"] = gpt.score_text(
                tokens, lambda x: judge(x)[0], 1, 256, data)
    return tables


def probe(model, out, seed):
    """Write the loss by noise level, and for seed 0 what samples and accuracies depend on."""
    torch.manual_seed(0)
    nets = load(model, out)
    curve = {"vit": vit_curve, "dit": dit_curve, "mdm": mdm_curve}.get(model, text_curve)(model, *nets)
    noise = nets[0][0].noise
    report = about(f"python results/study.py --probe {model} --seed {seed} --out {out}")
    report["intervals"] = [noise.interval(b) for b in range(noise.n_blocks)]
    report["curve"] = curve
    if seed == 0 and model != "recurrent":  # of which --eval has them
        report["steps"] = {"vit": vit_steps, "dit": dit_steps, "gpt": gpt_steps, "mdm": mdm_steps}[model](
            *nets, out)
    write(HERE / "probe" / f"{model}{f'_seed{seed}' if seed else ''}.json", json.dumps(report, indent=1))


def equal_information(model, n_blocks):
    """The value of --edges that gives every block an equal drop of the cross-entropy that a probe measured,
    each level scored by the block that owns it."""
    report = json.loads((HERE / "probe" / f"{model}.json").read_text())
    sigma, intervals = report["curve"]["level"], report["intervals"]
    loss, most = [], 0.0
    for i, s in enumerate(sigma):
        owner = next(b for b, (lo, hi) in enumerate(intervals) if s > lo or b == len(intervals) - 1)
        most = max(most, report["curve"]["blocks"][owner][i])  # a noisy measurement must not turn back
        loss.append(most)
    edges = [sigma[0]]
    for k in range(1, n_blocks):
        wanted = loss[0] + k / n_blocks * (loss[-1] - loss[0])
        i = next(i for i in range(1, len(loss)) if loss[i] >= wanted)
        part = (wanted - loss[i - 1]) / (loss[i] - loss[i - 1])
        edges.append(float(f"{sigma[i - 1] ** (1 - part) * sigma[i] ** part:.4g}"))
    return ",".join(f"{e:.4g}" for e in [*edges, sigma[-1]])


# -----------------------------------------------------------------------------------------------------------
# The rival: end to end with checkpointed activations, at the blocks' memory and time

def rival(model, out, threads):
    """Find the smallest number of pieces with which an end-to-end update with checkpointed activations fits a
    block's peak, and how many such updates take the time of all the blocks'; train as many, beside the blocks
    in out, and score both."""
    module, device = MODULES[model], torch.device("cpu")
    args, _, preset = train.parse(["--model", model, "--end-to-end", "--threads", str(threads)])
    loader = train.LOADERS[module.DATA]
    training = train.settle(loader.settings, preset, args)
    config, data = train.settle(module.Config, preset, args), loader.load(training, device)
    train.choose_speed(training, device)
    for name, fact in data.facts.items():
        setattr(config, name, fact)
    parts = [f"block_{b}" for b in range(config.n_blocks)]

    def peak(part, pieces=1, checkpointed=False):
        gc.collect()  # checkpointed layers refer to themselves
        net = train.build(module, config, part)
        if checkpointed:
            train.checkpoint_layers(net)
        batch = data.batch(training.batch_size // pieces, config, 0)
        measured = train.measure_memory(net, train.make_optimizer(net, training, device), batch, device,
                                        pieces=min(2, pieces))
        mean = sum(train.storages([*net.parameters(), *net.buffers()]).values()) if training.ema else 0
        return measured["peak"] + mean
    block = max(peak(part) for part in parts)
    peaks = {"end to end": peak("end_to_end"), "one block": block,
             "one block, checkpointed": max(peak(part, checkpointed=True) for part in parts)}
    pieces = 1
    while True:
        peaks[f"end to end, checkpointed, {pieces} pieces"] = least = peak("end_to_end", pieces, True)
        if least <= block or pieces == training.batch_size:
            break
        pieces *= 2
    how = replace(training, checkpoint_activations=True, accumulate=pieces)
    learners = {part: (train.begin(module, config, part, training, device), training) for part in parts}
    learners["end to end"] = train.begin(module, config, "end_to_end", training, device), training
    learners["rival"] = train.begin(module, config, "end_to_end", how, device), how
    times = {name: [] for name in learners}
    for i in range(23):  # three to warm up
        for name, (learner, settings) in learners.items():
            times[name].append(train.timed(
                lambda: train.update(learner, data, config, settings, i, 23, device), device))
    ms = {name: 1000 * sum(t[3:]) / 20 for name, t in times.items()}
    blocks = sum(ms[part] for part in parts)
    steps = round(training.steps * blocks / ms["rival"])
    flags = ["--model", model, "--end-to-end", "--checkpoint-activations", "--accumulate", str(pieces),
             "--steps", str(steps), "--threads", str(threads), "--out", str(out)]
    report = about(f"python results/study.py --rival {model} --out {out}") | {
        "peak, bytes": peaks, "pieces": pieces, "fits": least <= block,
        "mean of an update, ms": ms | {"all blocks": blocks}, "updates": steps,
        "of the blocks' updates, %": 100 * steps / training.steps, "train": " ".join(flags)}
    print(json.dumps(report))
    train.run([*flags, "--log-every", "200"])
    train.run(["--model", model, "--eval", *flags[-4:]])
    evaluation = json.loads((Path(out) / model / "eval.json").read_text())
    log = (Path(out) / model / "end_to_end.jsonl").read_text().splitlines()
    write(HERE / "rival" / f"{model}.json", json.dumps(
        report | {"log": [json.loads(line) for line in log], "tables": evaluation["tables"]}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("row", nargs="?", help="one, since variants change the modules; none: name them")
    parser.add_argument("--probe", choices=MODULES)
    parser.add_argument("--rival", choices=MODULES)
    parser.add_argument("--edges", choices=("vit", "gpt", "recurrent"))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--score", action="store_true", help="score the row again, without training it")
    parser.add_argument("--out", default="out/study")
    parser.add_argument("--seed", type=int, default=0, help="of a row; of a probe, what out was trained with")
    parser.add_argument("--threads", type=int, default=1)
    own = parser.parse_args()
    torch.set_num_threads(own.threads)
    if own.probe:
        probe(own.probe, own.out, own.seed)
    elif own.rival:
        rival(own.rival, own.out, own.threads)
    elif own.edges:
        print(f"--edges {equal_information(own.edges, own.blocks)}")
    elif not own.row:
        for name, (model, flags, variant) in rows().items():
            print(f"{name}: --model {model} {' '.join(flags)}{f' ({variant})' if variant else ''}")
    elif own.row not in rows():
        sys.exit(f"error: no row {own.row!r}; python results/study.py names them all")
    else:
        run_row(own.row, own.out, own.seed, own.threads, own.score)
