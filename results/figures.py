"""Draw the pictures of README.md and results/README.md from the logs: python results/figures.py

It needs matplotlib, which the program does not. The picture of the idea has a light and a dark form, the others look the
same on dark pages."""
import argparse
import io
import json
import math
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from diffusion_blocks import LogNormal

BLOCKS = ["#1b4b8a", "#d9822b", "#3f9e6b", "#8a3f7d"]
BASELINE, CONTROL = "#222222", "#777777"
LONGER = "control, as long as all blocks"
plt.rcParams.update({
    "figure.facecolor": "#fbfaf7", "axes.facecolor": "#fbfaf7", "savefig.facecolor": "#fbfaf7",
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.8, "savefig.dpi": 130})


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / "images" / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


# ---- How the noise is cut ---------------------------------------------------------------------------------

def draw_edges(axis, kind, title):
    """The density of ln sigma in training, the intervals of four blocks, and the share that each gets."""
    noise = LogNormal(4, edges=kind)
    left, right = 0.006, 40                  # the noise reaches from .002 to 80, but hardly any is drawn there
    x = np.linspace(math.log(noise.sigma_min), math.log(noise.sigma_max), 6001)
    density = np.exp(-0.5 * ((x - noise.p_mean) / noise.p_std) ** 2)
    density /= noise.p_std * math.sqrt(2 * math.pi)
    axis.plot(np.exp(x), density, color=BASELINE)
    for b in range(4):
        low, high = noise.interval(b)
        inside = (x > math.log(low)) & (x <= math.log(high))
        share = density[inside].sum() / density.sum()
        axis.axvspan(low, high, color=BLOCKS[b], alpha=0.13, linewidth=0)
        middle = math.sqrt(max(low, left) * min(high, right))
        axis.text(middle, 0.36, f"block\n{b}\n{100 * share:.2g}%", ha="center", fontsize=8)
    axis.set(xscale="log", xlim=(left, right), ylim=(0, 0.48), xlabel="noise level sigma", title=title)


def edges():
    """The noise of images, cut at the paper's edges and at uniform ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    draw_edges(left, "probability", "equal probability (the paper's, default)")
    draw_edges(right, "uniform", "equal steps of ln sigma (--edges uniform)")
    left.set_ylabel("density of ln sigma in training")
    save(figure, "edges")


# ---- Scores on the way ------------------------------------------------------------------------------------

def mean_over_seeds(seeds, name, column):
    """A column of rows {update: {column: number}}, (updates,)."""
    rows = [[row[column] for row in tables[name].values()] for tables in seeds]
    return np.mean(rows, axis=0)


def longer_control(model, title, column):
    """(minutes, score) of the control with the updates of all blocks, means over seeds. It has no curve: its learning
    rate falls over another number of updates."""
    minutes, scores = [], []
    for log in sorted(HERE.glob(f"cpu/seed*/{model}/long.jsonl")):
        last = json.loads(log.read_text().splitlines()[-1])
        minutes.append(last["step"] * last["ms"] / 60_000)
        tables = json.loads(log.with_name("compare.json").read_text())["tables"]
        scores.append(tables[title][LONGER][column])
    return np.mean(minutes), np.mean(scores)


def draw_curves(left, right, model, score, label):
    """Held-out scores over updates of each network (left) and over minutes of training (right)."""
    logs = sorted(HERE.glob(f"cpu/seed*/{model}/curves.json"))
    seeds = [json.loads(log.read_text())["tables"] for log in logs]
    for name, colour in zip(seeds[0], (BASELINE, CONTROL, *BLOCKS)):
        y = mean_over_seeds(seeds, name, score)
        updates = [int(step) for step in seeds[0][name]]
        left.plot(updates, y, color=colour, label=name, marker=".")
        right.plot(mean_over_seeds(seeds, name, "minutes"), y, color=colour, label=name, marker=".")
    left.set(xlabel="updates of each network", ylabel=label)
    right.set(xlabel="minutes of training, one CPU core")
    left.legend(fontsize=8)
    right.legend(fontsize=8)


def curves():
    figure, (above, below) = plt.subplots(2, 2, figsize=(9, 7), sharey="row")
    longer = dict(color=CONTROL, marker="*", markersize=10, linestyle="none", label="control, updates of all blocks")
    above[1].plot(*longer_control("gpt", "bits per byte on held-out text", "bits per byte"), **longer)
    below[1].plot(*longer_control("vit", "held-out images", "accuracy, %"), **longer)
    draw_curves(*above, "gpt", "bits", "gpt: bits per byte on held-out text")
    draw_curves(*below, "vit", "right, %", "vit, CIFAR-100: accuracy, %")
    save(figure, "curves")


def update_times(model):
    """{network: milliseconds of an update}, as bench.py measured them in one run."""
    tables = json.loads((HERE / f"cpu/bench/{model}/bench.json").read_text())["tables"]
    title = next(name for name in tables if name.startswith("one update of"))
    return {network: row["ms"] for network, row in tables[title].items()}


def draw_tenth(left, right, model, score, label, networks):
    """Held-out scores over epochs (left), and over what the updates cost (right).

    networks: {row of curves.json: (row of bench.json, colour, line)}."""
    tables = json.loads((HERE / f"cpu/tenth/{model}/curves.json").read_text())["tables"]
    ms = update_times(model)
    end = max(int(step) for step in tables["end to end"])  # the updates of 100 epochs
    for name, (timed, colour, line) in networks.items():
        updates = np.array([int(step) for step in tables[name]])
        scores = [row[score] for row in tables[name].values()]
        style = dict(color=colour, linestyle=line, marker=".", label=name)
        if name != LONGER:  # it has three times as many, and stays at the right
            left.plot(100 * updates / end, scores, **style)
        right.plot(100 * updates * ms[timed] / (end * ms["end to end"]), scores, **style)
    left.set(xlabel="epochs of each network", ylabel=label)
    right.set(xlabel="time of training, % of the baseline's 100 epochs")
    left.legend(fontsize=8)


def tenth():
    """vit and dit on a tenth of CIFAR, mdm on a tenth of tiny-shakespeare, for 100 epochs."""
    figure, (above, middle, below) = plt.subplots(3, 2, figsize=(9, 10.5), sharey="row")
    single = {"end to end": ("end to end", BASELINE, "-"), "control": ("control", CONTROL, "-")}
    draw_tenth(*above, "vit", "right, %", "vit, a tenth of CIFAR-100: accuracy, %", {
        **single, "blocks, averaged": ("all blocks", BLOCKS[0], "-")})
    longer = json.loads((HERE / "cpu/tenth/vit/compare.json").read_text())["tables"]["held-out images"][LONGER]
    ms = update_times("vit")
    above[1].plot(300 * ms["control"] / ms["end to end"], longer["accuracy, %"], color=CONTROL, marker="*",
                  markersize=10, linestyle="none", label=LONGER)
    four = {**single, "blocks": ("all blocks", BLOCKS[0], "-"), LONGER: ("control", CONTROL, "--")}
    draw_tenth(*middle, "dit", "weighted squared error", "dit, a tenth of CIFAR-10: denoising loss", four)
    draw_tenth(*below, "mdm", "bits per byte", "mdm, tiny-shakespeare: bits per byte", four)
    for axis in (above[1], middle[1], below[1]):
        axis.legend(fontsize=8)
    save(figure, "tenth")


# ---- Images that dit made ---------------------------------------------------------------------------------

def draw_pair(name, end_to_end, blocks):
    """Two pictures that train.py --sample wrote, side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    titles = ("end to end, 6 layers at every step", "3 blocks, 2 layers at every step")
    for axis, file, title in zip(axes, (end_to_end, blocks), titles):
        axis.imshow(plt.imread(HERE / file), interpolation="nearest", cmap="gray")
        axis.set(title=title)
        axis.axis("off")
    save(figure, name)


def dit_grids():
    draw_pair("dit_grid", "images/dit_digits_end_to_end.png", "images/dit_digits_blocks.png")
    draw_pair("dit_cifar10", "cpu/seed0/dit/sample_end_to_end.png", "cpu/seed0/dit/sample.png")


# ---- The picture of the idea: points are (right, down) on a page of 800 x 450, and so is a README's width ----

PAGES = {"light": {"page": "#ffffff", "ink": "#1f2328", "pale": "#656d76", "layer": "#dfe3e8", "back": "#cf222e"},
         "dark": {"page": "#0d1117", "ink": "#e6edf3", "pale": "#9198a1", "layer": "#2f363e", "back": "#ff6b63"}}
TOP, ZONE, GAP = 52, 100, 8      # a zone is what belongs to one block; three of them, one below another
LAYER_WIDTH, LAYER_HEIGHT, PICTURE = 92, 26, 44
DIGIT = 0                        # of data/digits.npz
IN_TRAINING = 1


def mix(colour, other, share):
    """The colour, with a share of another one in it."""
    colour, other = (np.array(matplotlib.colors.to_rgb(name)) for name in (colour, other))
    return tuple((1 - share) * colour + share * other)


def block_colour(page, b):
    return mix(BLOCKS[b], "#ffffff", .35) if page is PAGES["dark"] else BLOCKS[b]


def zone_top(b):
    return TOP + b * (ZONE + GAP)


def write(axis, page, x, y, text, colour="ink", size=9, align="left", **more):
    more = {"va": "center_baseline", **more}
    axis.text(x, y, text, color=page[colour], fontsize=size, ha=align, **more)


def headline(axis, page, x, title, caption):
    write(axis, page, x, 26, title, size=13, fontweight="bold")
    for i, line in enumerate(caption):
        write(axis, page, x, 388 + 17 * i, line)


def box(axis, x, y, width, height, fill, edge, line="-", thick=1., corner=4):
    axis.add_patch(matplotlib.patches.FancyBboxPatch(
        (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={corner}", facecolor=fill, edgecolor=edge,
        linestyle=line, linewidth=thick))


def arrow(axis, start, end, colour, thick=1.2):
    axis.annotate("", end, start, arrowprops={
        "arrowstyle": "-|>,head_width=.28,head_length=.5", "color": colour, "linewidth": thick, "shrinkA": 0,
        "shrinkB": 0, "mutation_scale": 9, "joinstyle": "miter"})


def layers(axis, page, x, tops, first, fill, edge, text, line):
    """Layers one below another, and the arrows of the forward pass between them."""
    middle = x + LAYER_WIDTH / 2
    for i, top in enumerate(tops):
        box(axis, x, top, LAYER_WIDTH, LAYER_HEIGHT, fill, edge, line)
        write(axis, page, middle, top + LAYER_HEIGHT / 2, f"layer {first + i}", text, align="center")
    for top, following in zip(tops, tops[1:]):
        arrow(axis, (middle, top + LAYER_HEIGHT + 1), (middle, following - 1), page[text])


def loss_and_back(axis, page, x, first_top, last_top, text, back):
    """The loss at the right of the last layer, and backpropagation from there up to the first one."""
    first = first_top + LAYER_HEIGHT / 2
    last = last_top + LAYER_HEIGHT / 2
    arrow(axis, (x + 1, last), (x + 13, last), page[text])
    write(axis, page, x + 28, last, "loss", text, align="center")
    axis.plot([x + 28, x + 28, x + 14], [last - 9, first, first], color=back, linewidth=2.2, solid_capstyle="butt",
              solid_joinstyle="miter")
    arrow(axis, (x + 15, first), (x + 2, first), back, 2.2)


def noised(sigma):
    """A digit with noise, grey levels in 0 to 1; the same noise at every sigma."""
    digits = np.load(HERE.parent / "data" / "digits.npz")["images"]
    y = digits[DIGIT] / 8 - 1
    z = y + sigma * np.random.default_rng(0).standard_normal(y.shape)
    white = (1 + 2 * sigma ** 2) ** .5
    return (z.clip(-white, white) / white + 1) / 2


def picture(axis, page, x, y, sigma, edge, shown=1.):
    """The noised digit with its upper left corner at (x, y)."""
    axis.imshow(noised(sigma), cmap="gray", vmin=0, vmax=1, alpha=shown, interpolation="nearest", zorder=2,
                extent=(x, x + PICTURE, y + PICTURE, y))
    axis.add_patch(plt.Rectangle((x, y), PICTURE, PICTURE, fill=False, edgecolor=edge, linewidth=1.2, zorder=3))


def end_to_end(axis, page):
    headline(axis, page, 20, "End to end", (
        "All layers, gradients,", "activations and optimizer", "state in memory at once."))
    box(axis, 20, TOP, 176, 3 * ZONE + 2 * GAP, mix(page["layer"], page["page"], .6), page["ink"], thick=1.6)
    write(axis, page, 30, TOP + 13, "all layers", fontweight="bold")
    write(axis, page, 186, TOP + 13, "in memory", align="right")
    tops = np.linspace(TOP + 26, zone_top(2) + 66, 6)
    layers(axis, page, 36, tops, 0, page["layer"], page["pale"], "ink", "-")
    loss_and_back(axis, page, 36 + LAYER_WIDTH, tops[0], tops[-1], "ink", page["back"])
    write(axis, page, 174, (tops[0] + tops[-1] + LAYER_HEIGHT) / 2, "backpropagation", "back", align="center",
          rotation=90, va="center")


def sigma_text(sigma):
    return f"{sigma:.2g}".removeprefix("0")


def noise_axis(axis, page, noise, x):
    """The noise levels from top to bottom, cut where the blocks are."""
    write(axis, page, x - 16, TOP + 58, "noise σ", "pale", align="center", rotation=90, va="center")
    for b in range(3):
        axis.plot([x, x], [zone_top(b) - GAP / 2, zone_top(b) + ZONE + GAP / 2], color=block_colour(page, b),
                  linewidth=4, solid_capstyle="butt")
    cuts = (TOP + 6, zone_top(1) - GAP / 2, zone_top(2) - GAP / 2, zone_top(2) + ZONE - 4)
    for y, sigma in zip(cuts, reversed(noise.boundaries)):
        write(axis, page, x - 8, y, sigma_text(sigma), align="right")


def one_block(axis, page, noise, b, x):
    """A block, its own input, loss and backpropagation; pale if another block is the one in training."""
    own, top = block_colour(page, b), zone_top(b)
    here = b == IN_TRAINING
    text = "ink" if here else "pale"
    edge = own if here else mix(own, page["page"], .5)
    line = "-" if here else (0, (4, 3))
    box(axis, x, top, 222, ZONE, mix(own, page["page"], .82 if here else .95), edge, line, 2. if here else 1.)
    write(axis, page, x + 10, top + 13, f"block {b}", text, fontweight="bold")
    write(axis, page, x + 212, top + 13, "in memory" if here else "not in memory", text, align="right")
    lo, hi = noise.interval(b)
    tops = (top + 26, top + 66)
    picture(axis, page, x + 10, top + 26, (lo * hi) ** .5, edge, 1. if here else .4)
    write(axis, page, x + 10 + PICTURE / 2, top + 83, "input z", text, align="center")
    arrow(axis, (x + 12 + PICTURE, tops[0] + LAYER_HEIGHT / 2), (x + 76, tops[0] + LAYER_HEIGHT / 2), page[text])
    layers(axis, page, x + 78, tops, 2 * b, mix(own, page["page"], .5 if here else .9), edge, text, line)
    loss_and_back(axis, page, x + 78 + LAYER_WIDTH, *tops, text,
                  page["back"] if here else mix(page["back"], page["page"], .55))


def in_blocks(axis, page, noise):
    x = 300
    headline(axis, page, 248, "In blocks", (
        "Only one block in memory. It learns to clean", "z = answer + σ · noise, for the σ it owns,",
        "and needs no other block."))
    noise_axis(axis, page, noise, x - 14)
    for b in range(3):
        one_block(axis, page, noise, b, x)


def chain(axis, page, noise):
    left = 580
    middle = left + LAYER_WIDTH / 2
    headline(axis, page, left, "Images: a chain", (
        "From pure noise to the answer.", "Each step runs one block:", "the one that owns its noise."))
    tops = np.linspace(TOP, zone_top(2) + ZONE - PICTURE, 4)
    names = ("pure noise", "", "", "the answer")
    for top, sigma, name in zip(tops, reversed(noise.boundaries), names):
        picture(axis, page, middle - PICTURE / 2, top, sigma, page["pale"])
        write(axis, page, middle + 60, top + PICTURE / 2 + (9 if name else 0), f"σ = {sigma_text(sigma)}", "pale")
        write(axis, page, middle + 60, top + PICTURE / 2 - 8, name)
    for b, top in enumerate(tops[:-1]):
        own, start, end = block_colour(page, b), top + PICTURE, tops[b + 1]
        y = (start + end) / 2
        arrow(axis, (middle, start + 1), (middle, y - 10), page["ink"])
        box(axis, middle - LAYER_WIDTH / 2, y - 9, LAYER_WIDTH, 18, mix(own, page["page"], .5), own)
        write(axis, page, middle, y, f"block {b}", align="center", fontweight="bold")
        arrow(axis, (middle, y + 10), (middle, end - 1), page["ink"])


def save_in_256_colours(figure, page, path):
    """A third of the bytes, and no difference that one sees."""
    file = io.BytesIO()
    figure.savefig(file, dpi=200, facecolor=page["page"])
    plt.close(figure)
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def idea():
    """End to end beside blocks, and how blocks are used: one picture for light pages, one for dark ones."""
    noise = LogNormal(3)
    for name, page in PAGES.items():
        figure = plt.figure(figsize=(8, 4.5))
        axis = figure.add_axes((0, 0, 1, 1))
        end_to_end(axis, page)
        in_blocks(axis, page, noise)
        chain(axis, page, noise)
        axis.set(xlim=(0, 800), ylim=(450, 0))
        axis.axis("off")
        save_in_256_colours(figure, page, HERE / "images" / f"idea_{name}.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for draw in (idea, edges, curves, tenth, dit_grids):
        draw()
        print(f"drew {draw.__name__}")
