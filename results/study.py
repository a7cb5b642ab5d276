"""The studies of results/README.md, a command for each row:

    python results/study.py                          # names all rows
    python results/study.py dit12_uniform_444        # trains and scores one: study/dit12_uniform_444.jsonl
    python results/study.py --checkpointing mdm      # the checkpointing baseline: checkpointing/mdm.json
    python results/study.py --edges gpt --blocks 4   # inner ends at equal drops of the probed cross-entropy

A row's file holds what it rests on, the logs of training and, in its last line, the tables of its evaluation.
Cut off, the command goes on where it was. The checkpointing baseline is the whole network with checkpointed
activations, its batch in as many pieces as make it fit a block's memory, for the time of all blocks."""
import argparse
import importlib
import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import bench
import frechet
import probe
from common import HERE, UserError, about, begin, interleaved, learner, run, train, write
from diffusion_blocks import target_table


def rows():
    """{name: (model, flags, variant)}; a variant is a function below that changes what no flag can."""
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
    row("vit_gates_1", "vit", "", gates_1)
    row("mdm_middle", "mdm", "--n-layer 18 --n-blocks 3")  # block 1 alone: six layers, on a third of t
    # mdm's control, two layers for all t, with MD4's other schedule, which trains more on many masks
    row("mdm_cosine", "mdm", "--n-layer 2 --n-blocks 1 --schedule cosine")
    short = "--steps 400"  # gpt: half of the default's updates, 4 blocks of 2 layers
    row("gpt_short", "gpt", short)
    for gamma in ("0", "0.05", "0.2"):
        row(f"gpt_gamma_{gamma}", "gpt", f"{short} --gamma {gamma}")
    row("gpt_uniform", "gpt", f"{short} --edges uniform")
    row("gpt_range", "gpt", f"{short} --sigma-min 0.15 --sigma-max 20 --p-mean -0.3 --p-std 0.8")
    row("gpt_edm_readout", "gpt", f"{short} --readout edm")
    row("gpt_weighted", "gpt", f"{short} --weighting edm")
    row("gpt_batch_mean", "gpt", f"{short} --weighting edm", batch_mean)
    row("gpt_learned_table", "gpt", short, learned_table)
    if (HERE / "probe" / "gpt.json").exists():
        row("gpt_equal_information", "gpt", f"{short} --edges {equal_information('gpt', 4)}")
    return found


def batch_mean(module, out):
    """The released code's loss: (N,) times (N, 1), whose mean is the product of two means."""
    def score_loss(error, y, noise, block):
        level = noise.sample(block, len(y), y.device)                        # (B,)
        return noise.weight(level).mean() * error(noise.corrupt(y, level), level).mean()
    module.score_loss = score_loss


def learned_table(module, out):
    """Block 0 trains its table with all else; the other blocks have it frozen."""
    class Block(module.Block):
        def __init__(self, config, b):
            super().__init__(config, b)
            del self.table
            if b == 0:
                rows = target_table(config.vocab_size, config.n_embd, config.table_seed)
                self.rows = nn.Parameter(rows.clone())
            else:
                state = torch.load(out / "gpt" / "block_0.pt", weights_only=True)
                self.register_buffer("rows", state["net"]["rows"])

        table = property(lambda self: F.normalize(self.rows, dim=-1))        # (V, C)
    module.Block = Block


def gates_1(module, out):
    """The residual gates of the blocks' layers are 1 before training, not 0."""
    class Block(module.Block):
        def __init__(self, config, b):
            super().__init__(config, b)
            for layer in self.layers:  # shift, scale, gate of attention, then of the MLP
                layer.modulation.bias.data.view(6, -1)[[2, 5]] = 1.0
    module.Block = Block


def equal_information(model, n_blocks):
    """The value of --edges that gives every block an equal drop of the cross-entropy that a probe measured,
    each level scored by the block that owns it."""
    report = json.loads((HERE / "probe" / f"{model}.json").read_text())
    sigma, spans, loss = report["curve"]["level"], report["intervals"], [0.0]
    for i, s in enumerate(sigma):
        owner = next(b for b, (lo, _) in enumerate(spans) if s > lo or b == len(spans) - 1)
        loss.append(max(loss[-1], report["curve"]["blocks"][owner][i]))  # noise must not turn it back
    edges, loss = [], loss[1:]
    for k in range(1, n_blocks):
        wanted = loss[0] + k / n_blocks * (loss[-1] - loss[0])
        i = next(i for i in range(1, len(loss)) if loss[i] >= wanted)
        part = (wanted - loss[i - 1]) / (loss[i] - loss[i - 1])
        edges.append(f"{sigma[i - 1] ** (1 - part) * sigma[i] ** part:.4g}")
    return ",".join(edges)


def tables_of(name, model, where):
    """The tables of a trained row."""
    if name == "mdm_middle":
        setup = begin(["--model", "mdm", "--block", "1", *where, "--resume"])
        net, _ = train.trained(setup.module, "mdm", "block_1", setup.run.out, setup.device)
        with torch.no_grad():
            times, (found,) = probe.masked_bits([net], setup.data)
        return {"bits per masked byte": {f"t {t:.3g}": bits for t, bits in zip(times, found)}}
    train.main(["--model", model, "--eval", *where])
    setup = begin(["--model", model, "--eval", *where])
    tables = json.loads((setup.folder / "eval.json").read_text())["tables"]
    if model == "dit":
        blocks, _ = train.assemble(setup.module, model, setup.run.out, setup.device)
        loss = tables["denoising loss on held-out images"]["blocks"]["weighted squared error"]
        tables |= {"generated images": frechet.score(setup, {"blocks": blocks}),
                   "denoising loss over all levels": {"mean": {"blocks": loss}}}
    return tables


def run_row(name, own, argv):
    """Train a row's blocks, or what is left of that, score them, and write what was found."""
    model, flags, variant = rows()[name]
    out, part = Path(own.out) / name, "1" if name == "mdm_middle" else "all"
    where, seed = ["--threads", str(own.threads), "--out", str(out)], ["--seed", str(own.seed)]
    if variant:
        variant(importlib.import_module(model), out)
    if model == "dit":  # the judge of its images
        train.main(["--model", "vit", "--end-to-end", *seed, *where, "--resume"])
    command = ["--model", model, "--block", part, *flags, *seed, *where]
    train.main([*command, "--resume"])
    state = train.load(out / model / f"block_{'01'[part == '1']}.pt", model)
    lines = [about("study", argv) | {"train": " ".join(command), "seed": own.seed} | {
        k: state[k] for k in ("config", "training", "data")}]
    for log in sorted((out / model).glob("block_*.jsonl")):
        lines += [{"part": log.stem} | json.loads(line) for line in log.read_text().splitlines()]
    lines.append({"tables": tables_of(name, model, where)})
    path = HERE / "study" / f"{name}{f'_seed{own.seed}' if own.seed else ''}.jsonl"
    train.save(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"saved {path}")


def checkpointing(model, own, argv):
    """Fit an end-to-end update with checkpointed activations into the peak of a block; train as many of them
    as take the time of the blocks' updates, in OUT, beside the blocks that lie there, and score both."""
    where = ["--threads", str(own.threads), "--out", own.out]
    setup = begin(["--model", model, "--end-to-end", *where])
    parts = [f"block_{b}" for b in range(setup.config.noise.n_blocks)]

    def pieces_of(n, **changes):
        return SimpleNamespace(**vars(setup) | {"training": replace(setup.training, accumulate=n, **changes)})

    def peak(part, n=1, checkpointed=False):
        return bench.memory_of(pieces_of(n, compile="off"), part, checkpointed)["peak"]
    peaks, n = {"end to end": peak("end_to_end"), "one block": max(map(peak, parts)),
                "one block, checkpointed": max(peak(part, 1, True) for part in parts)}, 1
    while True:
        least = peaks[f"end to end, checkpointed, {n} pieces"] = peak("end_to_end", n, True)
        if least <= peaks["one block"] or n >= setup.training.batch_size:
            break
        n *= 2
    updates = {part: learner(setup, part)[-1] for part in [*parts, "end_to_end"]}
    updates["checkpointing baseline"] = learner(pieces_of(n), "end_to_end", True)[-1]
    ms = {k: statistics.mean(v) for k, v in interleaved(updates, setup.device, rounds=20).items()}
    ms["all blocks"] = sum(ms[part] for part in parts)
    share = ms["all blocks"] / ms["checkpointing baseline"]
    flags = ["--model", model, "--end-to-end", "--checkpoint-activations", "--accumulate", str(n),
             "--steps", str(round(setup.training.steps * share)), *where]
    report = about("study", argv) | {
        "peak, bytes": peaks, "pieces": n, "fits": least <= peaks["one block"], "mean of an update, ms": ms,
        "of the blocks' updates, %": 100 * share, "train": " ".join(flags)}
    train.main(flags)
    train.main(["--model", model, "--eval", *where])
    tables = json.loads((setup.folder / "eval.json").read_text())["tables"]
    write(HERE / "checkpointing" / f"{model}.json", report | {"tables": tables})


def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("row", nargs="?")
    parser.add_argument("--checkpointing", choices=("vit", "dit", "gpt", "mdm", "recurrent"))
    parser.add_argument("--edges", choices=("vit", "gpt", "recurrent"))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", default="out/study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    own = parser.parse_args(argv)
    torch.set_num_threads(own.threads)
    if own.checkpointing:
        checkpointing(own.checkpointing, own, argv)
    elif own.edges:
        print(f"--edges {equal_information(own.edges, own.blocks)}")
    elif own.row in rows():
        run_row(own.row, own, argv)
    elif own.row:
        raise UserError(f"no row {own.row!r}; python results/study.py names them all")
    else:
        for name, (model, flags, variant) in rows().items():
            print(f"{name}: --model {model} {' '.join(flags)}{f' ({variant.__doc__})' if variant else ''}")


if __name__ == "__main__":
    run(main)
