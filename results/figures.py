"""Draw the pictures of README.md from the logs beside this file: python results/figures.py

Needs matplotlib (pip install matplotlib), which the program does not. The pictures go to results/images/ and
lie on a light card, so that print and dark pages show the same."""
import json
import statistics
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
from diffusion_blocks import LogNormal
from table import Runs, fingerprint, score

BLOCKS = ["#1b4b8a", "#d9822b", "#3f9e6b", "#8a3f7d", "#7a6a2f", "#2fa0a8"]
BASELINE, CONTROL, ALONE = "#222222", "#777777", "#b0b0b0"
plt.rcParams.update({
    "figure.facecolor": "#fbfaf7", "axes.facecolor": "#fbfaf7", "savefig.facecolor": "#fbfaf7",
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.8, "savefig.dpi": 130})


def read(path):
    return json.loads((HERE / path).read_text())


def save(figure, name):
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(HERE / "images" / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


def shade(axis, intervals):
    """The intervals of the blocks, behind the curves."""
    for b, (lo, hi) in enumerate(intervals):
        axis.axvspan(lo, hi, color=BLOCKS[b], alpha=.13, linewidth=0)


def edges():
    """How the paper's edges cut the training noise into equal parts, and equal steps of ln sigma do not."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    x = torch.linspace(torch.tensor(.002).log(), torch.tensor(80.).log(), 600)
    density = torch.exp(-(x + 1.2) ** 2 / (2 * 1.2 ** 2)) / (1.2 * (2 * torch.pi) ** .5)
    for axis, kind, title in zip(axes, ("probability", "uniform"), (
            "equal probability (the paper's, default)", "equal steps of ln sigma (--edges uniform)")):
        noise = LogNormal(4, edges=kind)
        shade(axis, [noise.interval(b) for b in range(4)])
        axis.plot(x.exp(), density, color=BASELINE)
        for b in range(4):
            lo, hi = noise.interval(b)
            share = (noise.cdf(hi) - noise.cdf(lo)).item()
            axis.text((lo * hi) ** .5, .35 if b % 2 else .42, f"block {b}\n{share:.1%}", ha="center",
                      fontsize=8)
        axis.set(xscale="log", xlim=(.002, 80), ylim=(0, .48), xlabel="noise level sigma", title=title)
    axes[0].set_ylabel("density of ln sigma in training")
    save(figure, "edges")


def curve(axis, model, title, baseline="end to end", ylim=None, log_y=False):
    report = read(f"probe/{model}.json")
    found, intervals = report["curve"], report["intervals"]
    x = found["level"]
    shade(axis, intervals)
    for b, (loss, (lo, hi)) in enumerate(zip(found["blocks"], intervals)):
        axis.plot(x, loss, color=BLOCKS[b], linewidth=.9, alpha=.8)
        inside = [i for i, s in enumerate(x) if lo <= s <= hi]
        axis.plot([x[i] for i in inside], [loss[i] for i in inside], color=BLOCKS[b], linewidth=3,
                  label=f"block {b}")
    for name, colour, style in (("baseline", BASELINE, "--"), ("control", CONTROL, ":")):
        y = found[name] if isinstance(found[name], list) else [found[name]] * len(x)
        axis.plot(x, y, color=colour, linestyle=style, label=baseline if name == "baseline" else name)
    if "z alone" in found:
        axis.plot(x, found["z alone"], color=ALONE, label="z alone, no network")
    axis.set(title=title, ylabel=found["unit"], ylim=ylim)
    if model == "mdm":
        axis.set(xlabel="time t: the share of tokens that is masked", xlim=(0, 1))
    else:
        axis.set(xscale="log", xlabel="noise level sigma", xlim=(x[0], x[-1]))
    if log_y:
        axis.set_yscale("log")
    axis.legend(fontsize=7.5)


def loss():
    figure, axes = plt.subplots(3, 2, figsize=(10, 11))
    curve(axes[0, 0], "vit", "vit.py, digits")
    curve(axes[0, 1], "dit", "dit.py, digits", ylim=(.2, 2))
    curve(axes[1, 0], "gpt", "gpt.py, bytes of Python sources")
    curve(axes[1, 1], "recurrent", "recurrent.py, the same text, about equal time", "end to end, 32 passes")
    curve(axes[2, 0], "mdm", "mdm.py, the same text")
    axes[2, 1].axis("off")
    axes[2, 1].text(0, .5, "\n".join([
        "Shaded: the interval of noise that a block owns.", "Thick: the block inside it, which is what the",
        "assembled model uses; thin: the same block", "elsewhere, where (but for a small overlap) it",
        "was never trained. Seed 0.", "",
        "vit, gpt, recurrent: baseline and control see no", "noise, so theirs is one number. Grey: what the",
        "noisy target alone gives away (Bayes)."]), va="center", fontsize=10)
    save(figure, "loss")


def chain():
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    title = "accuracy along the chain, %"
    for axis, folder, name, ylim in zip(axes, ("seed*", "cifar100"), (
            "digits, mean and std of 6 seeds", "CIFAR-100, 1,000 updates, one seed"), ((97, 99.3), (0, 25))):
        tables = Runs("vit", folder).tables
        levels = list(tables[0][title])
        for column, colour, marker, b in (("from z = 0", BLOCKS[0], "o", -.04),
                                          ("from noise", BLOCKS[1], "s", .04)):
            values = [[t[title][s][column] for t in tables] for s in levels]
            spread = [statistics.stdev(v) for v in values] if len(tables) > 1 else None
            axis.errorbar([i + b for i in range(len(levels))], list(map(statistics.mean, values)), spread,
                          color=colour, marker=marker, capsize=3, label=column)
        for row_, colour, style in (("baseline", BASELINE, "--"), ("control", CONTROL, ":")):
            mean = statistics.mean(t["held-out images"][row_]["accuracy, %"] for t in tables)
            axis.axhline(mean, color=colour, linestyle=style,
                         label="end to end" if row_ == "baseline" else row_)
        owners = [tables[0][title][s]["block"] for s in levels]
        axis.set_xticks(range(len(levels)), [f"{s[6:]}\nblock {b}" for s, b in zip(levels, owners)])
        axis.set(title=name, xlabel="noise level visited, and its owner", ylim=ylim, ylabel="label right, %")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside upper center")
    save(figure, "chain")


def bits():
    """Each block's share of the bound, stacked, beside the baselines; mean of the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), width_ratios=(1, 1.3, 1.6))

    def stack(axis, at, shares, colours):
        bottom = 0.0
        for b, share in enumerate(shares):
            axis.bar(at, share, bottom=bottom, color=colours[b], width=.6, edgecolor="#fbfaf7")
            if share > .06 * axis.get_ylim()[1]:
                axis.text(at, bottom + share / 2, f"{share:.2f}", ha="center", va="center", color="white",
                          fontsize=8)
            bottom += share
    for axis, model, first, second, unit, top in (
            (axes[0], "vit", "held-out images", "each block: its share, by itself, and the chain without it",
             "bits per label", .3),
            (axes[1], "gpt", "bits per byte on held-out text", "the bound, share by share", "bits per byte",
             2.9)):
        tables = Runs(model).tables
        column = "bits per label" if model == "vit" else "bits per byte"
        share = "share of the bound, bits" if model == "vit" else "bits per byte"
        axis.set_ylim(0, top)
        for i, name in enumerate(("baseline", "control")):
            mean = statistics.mean(t[first][name][column] for t in tables)
            stack(axis, i, [mean], [BASELINE if i == 0 else CONTROL])
        parts = [r for r in tables[0][second] if r.startswith("block")]
        shares = [statistics.mean(t[second][r][share] for t in tables) for r in parts]
        stack(axis, 2, shares, BLOCKS)
        axis.set_xticks(range(3), ["end to\nend", "control", "blocks\n(bound)"])
        axis.set(title=f"{model}.py", ylabel=unit)
    tables, axis = Runs("mdm").tables, axes[2]
    second = "the bound by interval, bits per byte"
    axis.set_ylim(0, 3.7)
    for i, name in enumerate(("baseline", "control", "blocks")):
        parts = [r for r in tables[0][second] if r.startswith("t ")]
        stack(axis, i, [statistics.mean(t[second][r][name] for t in tables) for r in parts], BLOCKS)
    axis.set_xticks(range(3), ["end to\nend", "control", "blocks"])
    axis.set(title="mdm.py, all three by interval", ylabel="bits per byte (bound)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=BLOCKS[b]) for b in range(4)]
    axes[1].legend(handles, [f"block {b}" for b in range(4)], fontsize=7.5, loc="upper left", ncols=2)
    save(figure, "bits")


def memory():
    terms = {"weights": BLOCKS[0], "gradients": BLOCKS[1], "optimizer": BLOCKS[2], "running mean": BLOCKS[4],
             "activations": BLOCKS[3]}
    presets = {"mdm": "mdm text8, B = 3", "dit": "dit cifar10, B = 3", "vit": "vit cifar100, B = 3",
               "gpt": "gpt lm1b, B = 4"}
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), layout="constrained")
    for axis, (model, name) in zip(axes, presets.items()):
        table = read(f"memory/{model}.json")["tables"]["memory of one update, MB"]
        for i, (what, line) in enumerate(table.items()):
            bottom = 0.0
            for term, colour in terms.items():
                axis.bar(i, line.get(term, 0), bottom=bottom, color=colour, width=.7,
                         label=term if i == 0 else None)
                bottom += line.get(term, 0)
            axis.plot(i, line["peak"], marker="_", markersize=16, color=BASELINE, linestyle="",
                      label="peak, measured" if i == 0 else None)
        axis.set_xticks(range(4), ["end to\nend", "check-\npointed", "one\nblock", "check-\npointed"],
                        fontsize=8)
        axis.set(title=name, ylabel="MB")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=6, loc="outside upper center")
    save(figure, "memory")


def blocks():
    """Quality over the number of blocks, 12 layers, equal updates."""
    units = {"dit": "denoising loss", "mdm": "bits per byte (bound)", "vit": "bits per label (bound)"}
    runs = {model: [n for n in (1, 2, 3, 4, 6) if (HERE / f"study/{model}12_b{n}.jsonl").exists()]
            for model in units}
    runs = {model: n for model, n in runs.items() if len(n) > 1}  # a model that was not run has no panel
    figure, axes = plt.subplots(1, len(runs), figsize=(3.2 * len(runs), 3.2), squeeze=False)
    for axis, (model, n) in zip(axes[0], runs.items()):
        y = [score(f"{model}12_b{k}", {"dit": "loss"}.get(model, model)) for k in n]
        axis.plot(n, y, color=BLOCKS[0], marker="o")
        for k, v in zip(n, y):
            axis.annotate(f"{v:.3f}", (k, v), textcoords="offset points", xytext=(0, 6), ha="center",
                          fontsize=8)
        axis.set(title=f"{model}.py", xlabel="blocks B, of 12 / B layers each", ylabel=units[model])
        axis.set_xticks((1, 2, 3, 4, 6))
        axis.margins(y=.25)
    save(figure, "blocks")


def grid():
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
    for axis, name, title in zip(axes, ("eval_baseline", "eval_blocks"), (
            "end to end, 6 layers at every step", "3 blocks, 2 layers at every step")):
        axis.imshow(plt.imread(HERE / "dit" / f"{name}.png"), interpolation="nearest", cmap="gray")
        axis.set(title=title)
        axis.axis("off")
    save(figure, "dit_grid")


if __name__ == "__main__":
    (HERE / "images").mkdir(exist_ok=True)
    for draw in (edges, loss, chain, bits, memory, blocks, grid):
        if len(sys.argv) < 2 or draw.__name__ in sys.argv[1:]:
            draw()
            print(f"drew {draw.__name__}")
    if len(sys.argv) < 2:
        (HERE / "images" / "drawn_from").write_text(fingerprint() + "\n")
