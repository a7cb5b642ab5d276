"""The studies of results/README.md, a command for each row:

    python results/study.py                      # names all rows
    python results/study.py gpt_short            # trains and scores one: OUT/study/gpt_short.jsonl
    python results/study.py --checkpointing mdm  # the checkpointing baseline: OUT/checkpointing/mdm.json

A row's file holds what it rests on, the logs of training and, in its last line, the tables of its evaluation;
table.py reads a copy in results/study. Cut off, the command goes on where it was. Flags of train.py after a
row outvote its own: `gpt_short --steps 20`. The checkpointing baseline is the whole network with checkpointed
activations, in as many pieces as make it fit a block's memory, for the time of all blocks, those in OUT."""
import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import bench
import frechet
import probe
from common import Parser, UserError, about, begin, interleaved, learner, run, train, write
from diffusion_blocks import seed_of


def rows():
    """{name: (model, flags)}."""
    found, edm = {}, "--p-mean -1.2 --p-std 1.2"  # the paper's noise, as recorded

    def row(name, model, flags):
        found[name] = model, flags.split()
    # the paper's partition study, at its depth: 12 layers, 3 blocks, no overlap
    for edges in ("probability", "uniform"):
        for split in ("4,4,4", "3,6,3", "6,4,2", "2,4,6"):
            row(f"dit12_{edges}_{split.replace(',', '')}", "dit",
                f"--n-layer 12 --gamma 0 --edges {edges} --layer-split {split} --steps 1000")
    for n in (1, 2, 3, 4, 6):
        row(f"dit12_b{n}", "dit", f"--n-layer 12 --n-blocks {n} --steps 1000")
        row(f"mdm12_b{n}", "mdm", f"--n-layer 12 --n-blocks {n} --seq-len 128 --steps 500")
        row(f"vit12_b{n}", "vit", f"--n-layer 12 --n-blocks {n} --steps 1500 {edm}")
    for gamma in ("0.1", "0.2"):  # 0 is dit12_probability_444, 0.05 dit12_b3
        row(f"dit12_gamma_{gamma}", "dit", f"--n-layer 12 --gamma {gamma} --steps 1000")
    row("mdm_middle", "mdm", "--n-layer 18 --n-blocks 3")  # block 1 alone: six layers, on a third of t
    # mdm's control, two layers for all t, with MD4's other schedule, which trains more on many masks
    row("mdm_cosine", "mdm", "--n-layer 2 --n-blocks 1 --schedule cosine")
    short = f"--steps 400 {edm}"  # gpt: half of the default's updates, 4 blocks of 2 layers
    row("gpt_short", "gpt", short)
    for gamma in ("0", "0.05", "0.2"):
        row(f"gpt_gamma_{gamma}", "gpt", f"{short} --gamma {gamma}")
    row("gpt_uniform", "gpt", f"{short} --edges uniform")
    row("gpt_range", "gpt", f"{short} --sigma-min 0.15 --sigma-max 20 --p-mean -0.3 --p-std 0.8")
    for name, flags in (("edm_readout", "--readout edm"), ("weighted", "--weighting edm")):
        row(f"gpt_{name}", "gpt", f"{short} {flags}")
    return found


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


def run_row(row, own, more, argv):
    """Train a row's blocks, or what is left of that, score them, and write what was found."""
    (model, flags), part = rows()[row], "1" if row == "mdm_middle" else "all"
    out = Path(own.out) / "study" / f"{row}{f'_seed{own.seed}' if own.seed else ''}"
    where, seed = ["--threads", str(own.threads), "--out", str(out)], ["--seed", str(own.seed)]
    command = ["--model", model, "--block", part, *flags, *seed, *where, *more]
    train.main([*command, "--resume"])
    if model == "dit":  # the judge of its images
        train.main(["--model", "vit", "--end-to-end", *seed, *where, "--resume"])
    state = train.load(out / model / f"block_{'01'[part == '1']}.pt", model)
    lines = [about("study", argv) | {"train": " ".join(command), "seed": own.seed} | {
        k: state[k] for k in ("config", "training", "data")}]
    for log in sorted((out / model).glob("block_*.jsonl")):
        lines += [{"part": log.stem} | json.loads(line) for line in log.read_text().splitlines()]
    lines.append({"tables": tables_of(row, model, where)})
    path = out.with_name(f"{out.name}.jsonl")
    train.save(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"saved {path}")


def checkpointing(model, own, argv):
    """Fit an end-to-end update with checkpointed activations into the peak of a block of those in OUT; train
    as many of them as take the time of the blocks' updates, and score both."""
    where = ["--threads", str(own.threads), "--out", own.out]
    setup = begin(["--model", model, "--eval", *where])  # with the settings of the blocks
    blocks, state = train.assemble(setup.module, model, own.out, setup.device)
    parts = [f"block_{b}" for b in range(len(blocks))]

    def pieces_of(n, **changes):
        return SimpleNamespace(**vars(setup) | {"training": replace(setup.training, accumulate=n, **changes)})

    def peak(part, n=1, checkpointed=False):
        return bench.memory_of(pieces_of(n, compile="off"), part, checkpointed)["peak"]
    peaks = {"end to end": peak("end_to_end"), "one block": max(map(peak, parts)),
             "one block, checkpointed": max(peak(part, 1, True) for part in parts)}
    for n in (n for n in range(1, setup.training.batch_size + 1) if setup.training.batch_size % n == 0):
        least = peaks[f"end to end, checkpointed, {n} pieces"] = peak("end_to_end", n, True)
        if least <= peaks["one block"]:
            break
    updates = {part: learner(setup, part)[-1] for part in [*parts, "end_to_end"]}
    updates["checkpointing baseline"] = learner(pieces_of(n), "end_to_end", True)[-1]
    ms = {k: statistics.mean(v) for k, v in interleaved(updates, setup.device, rounds=20).items()}
    ms["all blocks"] = sum(ms[part] for part in parts)
    share = ms["all blocks"] / ms["checkpointing baseline"]
    training = pieces_of(n, steps=max(1, round(setup.training.steps * share))).training
    report = about("study", argv) | {
        "peak, bytes": peaks, "pieces": n, "fits": least <= peaks["one block"], "mean of an update, ms": ms,
        "of the blocks' updates, %": 100 * share, "config": train.flat(setup.config),
        "training": train.flat(training), "data": setup.data.about}
    out = Path(own.out) / "checkpointing"
    how = replace(setup.run, out=str(out), checkpoint_activations=True)
    train.train(setup.module, model, "end_to_end", setup.config, training, how, setup.data, setup.device)
    others = {"end to end": train.trained(setup.module, model, "end_to_end", out, setup.device, state)[0]}
    torch.manual_seed(seed_of(training.seed, "eval"))
    with torch.no_grad():
        report["tables"] = setup.module.evaluate(blocks, others, setup.data)
    write(out / f"{model}.json", report)


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("row", nargs="?")
    parser.add_argument("--checkpointing", metavar="MODEL")
    parser.add_argument("--out", default="out", help="(default: out)")
    parser.add_argument("--seed", type=int, default=0, help="of a row (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    own, more = parser.parse_known_args(argv)
    if more and not own.row:
        raise UserError(f"unknown flag {more[0]}")
    if own.row:
        if own.row not in rows():
            raise UserError(f"no row {own.row!r}; python results/study.py names them all")
        run_row(own.row, own, more, argv)
    elif own.checkpointing:
        checkpointing(own.checkpointing, own, argv)
    else:
        for name, (model, flags) in rows().items():
            print(f"{name}: --model {model} {' '.join(flags)}")


if __name__ == "__main__":
    run(main)
