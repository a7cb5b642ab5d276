"""Draw the pictures of README.md and results/README.md from the logs: python results/figures.py

It needs matplotlib, which the program does not. Pictures in results/images/ look the same on dark pages."""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from diffusion_blocks import LogNormal

BLOCKS = ["#1b4b8a", "#d9822b", "#3f9e6b", "#8a3f7d"]
BASELINE, CONTROL, ALONE = "#222222", "#777777", "#b0b0b0"
plt.rcParams.update({
    "figure.facecolor": "#fbfaf7", "axes.facecolor": "#fbfaf7", "savefig.facecolor": "#fbfaf7",
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.8, "savefig.dpi": 130})


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / "images" / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


def shade(axis, intervals):
    """The intervals of the blocks, behind the curves."""
    for b, (lo, hi) in enumerate(intervals):
        axis.axvspan(lo, hi, color=BLOCKS[b], alpha=.13, linewidth=0)


def edges():
    """The share of the training noise that each block gets, with the paper's edges and with uniform ones."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, kind, title in zip(axes, ("probability", "uniform"), (
            "equal probability (the paper's, default)", "equal steps of ln sigma (--edges uniform)")):
        noise = LogNormal(4, edges=kind)
        x = np.linspace(np.log(noise.sigma_min), np.log(noise.sigma_max), 6001)
        density = np.exp(-.5 * ((x - noise.p_mean) / noise.p_std) ** 2) / (noise.p_std * (2 * np.pi) ** .5)
        axis.plot(np.exp(x), density, color=BASELINE)
        shade(axis, [noise.interval(b) for b in range(4)])
        for b in range(4):
            lo, hi = noise.interval(b)
            share = density[(x > np.log(lo)) & (x <= np.log(hi))].sum() / density.sum()
            axis.text((lo * hi) ** .5, .35 if b % 2 else .42, f"block {b}\n{share:.1%}", ha="center",
                      fontsize=8)
        axis.set(xscale="log", xlim=(noise.sigma_min, noise.sigma_max), ylim=(0, .48),
                 xlabel="noise level sigma", title=title)
    axes[0].set_ylabel("density of ln sigma in training")
    save(figure, "edges")


def curve(axis, model, title, baseline="end to end", ylim=None):
    """Loss over the noise level: every block, baseline and control, and the posterior from z alone."""
    log = json.loads((HERE / "probe" / f"{model}.json").read_text())
    found, level = log["curve"], np.array(log["curve"]["level"])
    shade(axis, log["intervals"])
    for b, (loss, (lo, hi)) in enumerate(zip(found["blocks"], log["intervals"])):
        inside = (level >= lo) & (level <= hi)
        axis.plot(level, loss, color=BLOCKS[b], linewidth=.9, alpha=.8)
        axis.plot(level[inside], np.array(loss)[inside], color=BLOCKS[b], linewidth=3, label=f"block {b}")
    for name, colour, style in (("baseline", BASELINE, "--"), ("control", CONTROL, ":")):
        loss = np.broadcast_to(found[name], level.shape)         # one number where it sees no noise
        axis.plot(level, loss, color=colour, linestyle=style, label=baseline if name == "baseline" else name)
    if "z alone" in found:
        axis.plot(level, found["z alone"], color=ALONE, label="z alone, no network")
    axis.set(title=title, ylabel=found["unit"], ylim=ylim, xlim=(level[0], level[-1]), xscale="log",
             xlabel="noise level sigma")
    if model == "mdm":
        axis.set(xscale="linear", xlabel="time t: the share of tokens that is masked", xlim=(0, 1))
    axis.legend(fontsize=7.5)


def loss():
    figure, axes = plt.subplots(3, 2, figsize=(10, 11))
    curve(axes[0, 0], "vit", "vit.py, digits")
    curve(axes[0, 1], "dit", "dit.py, digits", ylim=(.2, 2))
    curve(axes[1, 0], "gpt", "gpt.py, bytes of Python sources")
    curve(axes[1, 1], "recurrent", "recurrent.py, the same text, about equal time", "end to end, 32 passes")
    curve(axes[2, 0], "mdm", "mdm.py, the same text")
    axes[2, 1].axis("off")
    save(figure, "loss")


def curves():
    """Held-out scores of gpt and vit while they are trained, over updates of each network and over minutes of
    training; means over seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharey="row")
    for (left, right), model, score, ylabel in zip(axes, ("gpt", "vit"), ("bits", "right, %"), (
            "gpt: bits per byte on held-out text", "vit, CIFAR-100: accuracy, %")):
        logs = sorted(HERE.glob(f"cpu/seed*/{model}/curves.json"))
        seeds = [json.loads(log.read_text())["tables"] for log in logs]
        for name, colour in zip(seeds[0], (BASELINE, CONTROL, *BLOCKS)):
            y, minutes = (np.mean([[row[key] for row in tables[name].values()] for tables in seeds], axis=0)
                          for key in (score, "minutes"))
            for axis, x in ((left, [int(step) for step in seeds[0][name]]), (right, minutes)):
                axis.plot(x, y, color=colour, label=name, marker=".")
        left.set(xlabel="updates of each network", ylabel=ylabel)
        right.set(xlabel="minutes of training, one CPU core")
        left.legend(fontsize=8)
    save(figure, "curves")


def dit_grids():
    for name, folder, files in (("dit_grid", "dit", ("eval_baseline", "eval_blocks")),
                                ("dit_cifar10", "cpu/seed0/dit", ("sample_end_to_end", "sample"))):
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
        for axis, file, title in zip(axes, files, (
                "end to end, 6 layers at every step", "3 blocks, 2 layers at every step")):
            axis.imshow(plt.imread(HERE / folder / f"{file}.png"), interpolation="nearest", cmap="gray")
            axis.set(title=title)
            axis.axis("off")
        save(figure, name)


if __name__ == "__main__":
    for draw in (edges, loss, curves, dit_grids):
        draw()
        print(f"drew {draw.__name__}")
