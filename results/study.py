"""Studies of results/README.md, a command for each row:

    python results/study.py              # names all rows
    python results/study.py gpt_adaln    # trains and scores one: OUT/study/gpt_adaln.jsonl

A row's file holds what it rests on, the logs of training and, in its last line, the tables of its evaluation;
table.py reads a copy in results/study. Cut off, the command goes on where it was. Flags of train.py after a
row outvote its own: `gpt_adaln --steps 20`. Some rows put a class of this file in the place of a model's."""
import importlib
import json
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn

from common import Parser, UserError, about, begin, run, train  # first: it puts the models on the path
import curves
import diffusion_blocks
import ensemble
import frechet
import gpt
import probe
from diffusion_blocks import to_device


class Modulated(gpt.EndToEnd):
    """gpt's baseline or control with a block's adaLN; its condition is the same for all inputs."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(gpt.Layer(config, modulated=True) for _ in range(config.n_layer))
        self.noise_embedding = gpt.NoiseEmbedding(config.n_cond)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        gpt.init_weights(self)

    def logits(self, x, cache=None):
        cond, h = self.noise_embedding(torch.ones(1)), self.embed(x)         # (1, 1, n_cond), (B, T, C)
        for layer in self.layers:
            h, _ = layer(h, cond=cond)                                       # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (1, 1, C) each
        return self.head(self.norm(h) * (1 + scale) + shift).float(), None


class Unmodulated(gpt.Block):
    """gpt's block without adaLN and without z. A learned vector tells a slot from its clean token: without
    it, both would be the same computation."""

    def __init__(self, config, b):
        super().__init__(config, b)
        for part in [self, *self.layers]:
            part.modulation.requires_grad_(False)  # stays zero
        self.z_in = nn.Linear(config.n_embd, config.n_embd)
        nn.init.zeros_(self.z_in.weight.requires_grad_(False))
        nn.init.zeros_(self.z_in.bias)


class PreferOwn(diffusion_blocks.Masking):
    """Half of the times from the block's own interval, the other half from all times."""

    def sample(self, block, n, device="cpu"):
        u, (lo, hi) = 2 * (torch.rand(1, dtype=torch.float64) + torch.arange(n)) / n, self.widened(block)
        return to_device(torch.where(u < 1, lo + u * (hi - lo), u - 1).float(), device)


def rows():
    """{name: (model, flags, what it changes in the model file)}."""
    found, edm = {}, "--p-mean -1.2 --p-std 1.2"  # the paper's noise; gates of the recorded vit began at 0

    def row(name, model, flags, part="--block all", **changes):
        found[name] = model, f"{part} {flags}".split(), changes
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
    row("mdm_middle", "mdm", "--n-layer 18 --n-blocks 3", "--block 1")  # six layers, on a third of t
    # mdm's control, two layers for all t, with MD4's other schedule, which trains more on many masks
    row("mdm_cosine", "mdm", "--n-layer 2 --n-blocks 1 --schedule cosine")
    # what stands between gpt's control and its block; "both" is a block whose noise is taken away
    noiseless = "--n-layer 2 --n-blocks 1 --sigma-min 60 --sigma-max 80"
    row("gpt_both", "gpt", f"{noiseless} --z-rate 0")
    row("gpt_streams", "gpt", f"{noiseless} --z-rate 1", Block=Unmodulated)
    row("gpt_adaln", "gpt", "", "--control", EndToEnd=Modulated)
    row("gpt_deep_double", "gpt", "--steps 1600", "--end-to-end")  # takes about the time of all blocks
    row("mdm_wide", "mdm", "", Masking=PreferOwn)
    return found


@torch.no_grad()
def tables_of(name, model, part, where):
    """The tables of a trained row."""
    if part != "block_0":  # of a network by itself
        flag = "--" + part.replace("block_", "block=").replace("_", "-")
        setup = begin(["--model", model, flag, *where, "--resume"])
        net, _ = train.trained(setup.module, model, part, setup.run.out, setup.device)
        if model == "gpt":
            found = curves.score(net, curves.held_out(setup), setup.data.bytes_per_token)
            return {"bits per byte on held-out text": {part: {"bits per byte": found["bits"]}}}
        times, (found,) = probe.masked_bits([net], setup.data)
        return {"bits per masked byte": {f"t {t:.3g}": bits for t, bits in zip(times, found)}}
    script, file = (ensemble, "ensemble") if name == "mdm_wide" else (train, "eval")
    script.main(["--model", model, "--eval", *where])
    setup = begin(["--model", model, "--eval", *where])
    tables = json.loads((setup.folder / f"{file}.json").read_text())["tables"]
    if model == "dit":
        blocks, _ = train.assemble(setup.module, model, setup.run.out, setup.device)
        loss = tables["denoising loss on held-out images"]["blocks"]["weighted squared error"]
        tables |= {"generated images": frechet.score(setup, {"blocks": blocks}),
                   "denoising loss over all levels": {"mean": {"blocks": loss}}}
    return tables


def run_row(row, own, more, argv):
    """Train a row's networks, or what is left of that, score them, and write what was found."""
    model, flags, changes = rows()[row]
    out = Path(own.out) / "study" / f"{row}{f'_seed{own.seed}' if own.seed else ''}"
    where, seed = ["--threads", str(own.threads), "--out", str(out)], ["--seed", str(own.seed)]
    command = ["--model", model, *flags, *seed, *where, *more]
    with patch.dict(vars(importlib.import_module(model)), changes):
        train.main([*command, "--resume"])
        if model == "dit":  # the judge of its images
            train.main(["--model", "vit", "--end-to-end", *seed, *where, "--resume"])
        first = min((out / model).glob("*.pt"))
        state = train.load(first, model)
        lines = [about("study", argv) | {"train": " ".join(command), "seed": own.seed} | {
            k: state[k] for k in ("config", "training", "data")}]
        for log in sorted((out / model).glob("*.jsonl")):
            lines += [{"part": log.stem} | json.loads(line) for line in log.read_text().splitlines()]
        lines.append({"tables": tables_of(row, model, first.stem, where)})
    path = out.with_name(f"{out.name}.jsonl")
    train.save(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"saved {path}")


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("row", nargs="?")
    parser.add_argument("--out", default="out", help="(default: out)")
    parser.add_argument("--seed", type=int, default=0, help="of a row (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    own, more = parser.parse_known_args(argv)
    if own.row in rows():
        return run_row(own.row, own, more, argv)
    if own.row or more:
        raise UserError(f"no row {own.row or more[0]!r}; python results/study.py names them all")
    for name, (model, flags, _) in rows().items():
        print(f"{name}: --model {model} {' '.join(flags)}")


if __name__ == "__main__":
    run(main)
