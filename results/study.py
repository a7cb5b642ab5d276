"""The rows of the studies in results/README.md, one command each:

    python results/study.py                          # names all rows
    python results/study.py dit12_uniform_444        # trains and scores one: study/dit12_uniform_444.jsonl
    python results/study.py --checkpointing mdm      # the checkpointing baseline: checkpointing/mdm.json
    python results/study.py --edges gpt --blocks 4   # inner ends at equal drops of the probed cross-entropy

A row's file holds what it rests on, the logs of training, and the tables of its evaluation. The checkpointing
baseline is the whole network with checkpointed activations, at the memory and for the time of all blocks."""
import argparse
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
from common import HERE, Learner, UserError, about, begin, interleaved, run, train, write
from diffusion_blocks import target_table


def rows():
    """{name: (model, flags, variant)}; a variant is a function below that changes what no flag can."""
    found = {}
    # the paper's partition study, at its depth: 12 layers, 3 blocks, no overlap
    for edges in ("probability", "uniform"):
        for split in ("4,4,4", "3,6,3", "6,4,2", "2,4,6"):
            found[f"dit12_{edges}_{split.replace(',', '')}"] = (
                "dit", f"--n-layer 12 --gamma 0 --edges {edges} --layer-split {split} --steps 1000")
    for n in (1, 2, 3, 4, 6):
        found[f"dit12_b{n}"] = "dit", f"--n-layer 12 --n-blocks {n} --steps 1000"
        found[f"mdm12_b{n}"] = "mdm", f"--n-layer 12 --n-blocks {n} --seq-len 128 --steps 500"
        found[f"vit12_b{n}"] = "vit", f"--n-layer 12 --n-blocks {n} --steps 1500"
    for gamma in ("0.1", "0.2"):  # 0 is dit12_probability_444, 0.05 dit12_b3
        found[f"dit12_gamma_{gamma}"] = "dit", f"--n-layer 12 --gamma {gamma} --steps 1000"
    found["vit_gates_1"], found["dit_gates_1"] = ("vit", "", gates_1), ("dit", "", gates_1)
    found["mdm_middle"] = "mdm", "--n-layer 18 --n-blocks 3", middle  # six layers, on a third of t alone
    # mdm's control, two layers for all t, with MD4's other schedule, which trains more on many masks
    found["mdm_cosine"] = "mdm", "--n-layer 2 --n-blocks 1 --schedule cosine"
    short = "--steps 400"  # gpt: half of the default's updates, 4 blocks of 2 layers
    for name, flags in {
            "short": "", "gamma_0": "--gamma 0", "gamma_0.05": "--gamma 0.05", "gamma_0.2": "--gamma 0.2",
            "uniform": "--edges uniform", "edm_readout": "--readout edm", "weighted": "--weighting edm",
            "range": "--sigma-min 0.15 --sigma-max 20 --p-mean -0.3 --p-std 0.8"}.items():
        found[f"gpt_{name}"] = "gpt", f"{short} {flags}"
    found["gpt_batch_mean"] = "gpt", f"{short} --weighting edm", batch_mean
    found["gpt_learned_table"] = "gpt", short, learned_table
    if (HERE / "probe" / "gpt.json").exists():
        found["gpt_equal_information"] = "gpt", f"{short} --edges {equal_information('gpt', 4)}"
    return {name: (*row, None)[:3] for name, row in found.items()}


# ---- Variants ---------------------------------------------------------------------------------------------

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
            rows, path = target_table(config.vocab_size, config.n_embd, config.table_seed), Path(out, "gpt", "block_0.pt")
            del self.table
            if b == 0:
                self.rows = nn.Parameter(rows.clone())
            else:
                self.register_buffer("rows", torch.load(path, weights_only=True)["net"]["rows"])

        table = property(lambda self: F.normalize(self.rows, dim=-1))        # (V, C)
    module.Block = Block


def gates_1(module, out):
    """The residual gates of a block's layers are 1 before training, not 0."""
    class EncoderLayer(module.EncoderLayer):
        def forward(self, x, cond=None): ...
