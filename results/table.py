"""Rebuild the tables of README.md and of the pages in results/ from the logs: python results/table.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. The function of that name in this file makes it: it
reads logs beside this file, and returns lines of markdown. --check changes nothing, and fails if a page has another
table than the logs give."""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE / "gpu" / "README.md", HERE / "choices" / "README.md")


# ---- Numbers from logs ------------------------------------------------------------------------------------

# how logs from before commit f4c34a8 call what was scored
OLD_NAMES = {" (ensemble)": ", averaged", "blocks (bound)": "blocks, bound",
             "blocks from z = 0": "blocks, chain from z = 0", "blocks from noise": "blocks, chain from noise"}


def reports(pattern):
    """The content of each log that fits a pattern; of a log with several lines the last one."""
    found = []
    for path in sorted(HERE.glob(pattern)):
        text = path.read_text()
        if path.suffix == ".jsonl":
            text = text.splitlines()[-1]
        for old, new in OLD_NAMES.items():
            text = text.replace(old, new)
        found.append(json.loads(text))
    return found


def last_update(log, part):
    """The last line of a part in a log that holds several."""
    rows = [json.loads(line) for line in (HERE / log).read_text().splitlines()]
    return [row for row in rows if row["part"] == part][-1]


def lookup(report, keys):
    """What lies at a path of keys, or None. A key that ends in * is the one that begins so: the title of a
    table may hold the size of a batch."""
    for key in keys:
        if key.endswith("*"):
            key = next(name for name in report if name.startswith(key[:-1]))
        if key not in report:
            return None
        report = report[key]
    return report


def numbers(pattern, *keys):
    """The number at a path of keys in each report that fits a pattern, one a seed; [] if one lacks it."""
    found = [lookup(report, keys) for report in reports(pattern)]
    return [] if None in found else found


def scores(pattern, *keys):
    return numbers(pattern, "tables", *keys)


# ---- Cells and lines --------------------------------------------------------------------------------------

def cell(values, digits):
    """The mean of numbers, with their standard deviation where there are several; empty without any."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def lines(head, rows):
    """Lines of markdown; head and rows are lists of cells."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


# ---- The five models at --preset cpu ----------------------------------------------------------------------

BITS = "bits per byte"
TEXT = "bits per byte on held-out text"
LOSS = "denoising loss on held-out images"


def vit_scores(row, column="accuracy, %"):
    return scores("cpu/seed*/vit/eval.json", "held-out images", row, column)


def text_scores(model, row):
    """Of gpt or recurrent."""
    return scores(f"cpu/seed*/{model}/eval.json", TEXT, row, BITS)


def mdm_scores(row):
    return scores("cpu/seed*/mdm/compare.json", f"{TEXT} (bound)", row, BITS)


def dit_scores(row, *keys):
    """Of seed 0, which was trained on a CPU, and of seed 1, on a GPU in float32."""
    log = "long_scores" if row == LONGER else "eval"
    return scores(f"cpu/seed0/dit/{log}.json", *keys) + scores("gpu/dit_cpu/seed1.json", *keys)


def dit_losses(row):
    return dit_scores(row, LOSS, row, "weighted squared error")


def dit_distances(row):
    log = "frechet_long" if row == LONGER else "frechet"
    return scores(f"cpu/seed*/dit/{log}.json", "generated images", f"{row}, guidance 1",
                  "Frechet distance, features of EfficientNet-lite0")


LONGER = "control, as long as all blocks"


def longer_scores(model):
    """Scores of a control with as many updates as all blocks together."""
    if model == "vit":
        return scores("cpu/seed*/vit/compare.json", "held-out images", LONGER, "accuracy, %")
    if model == "gpt":
        return scores("cpu/seed*/gpt/compare.json", TEXT, LONGER, BITS)
    if model == "mdm":
        return mdm_scores(LONGER)
    return dit_losses(LONGER)


def best_block(model, column):
    """Scores of the best block alone after the last update, one a seed."""
    curves = scores(f"cpu/seed*/{model}/curves.json", "best block alone")
    return [list(rows.values())[-1][column] for rows in curves]


def peak_share(model, network):
    """Peak memory of an update, % of the baseline's."""
    return cell(scores(f"cpu/bench/{model}/memory.json", "of end to end, %", network, "peak"), 0)


def time_share(model, network):
    """Time of an update, % of the baseline's."""
    return cell(scores(f"cpu/bench/{model}/bench.json", "one update of *", network, "of end to end, %"), 0)


CHECKPOINTED = "end to end, activations checkpointed"


def main_row(model, task, digits, end_to_end, control, longer, chain, averaged=(), alone=()):
    values = [cell(found, digits) for found in (end_to_end, control, longer, chain, averaged, alone)]
    memory = f"{peak_share(model, 'one block')} ({peak_share(model, CHECKPOINTED)})"
    return [f"`{model}.py`", task, *values, memory, time_share(model, "all blocks")]


def main():
    """Scores and costs, a row for each model and figure of merit."""
    head = ["", "task and figure of merit", "end to end", "control: one block's layers",
            "control with the updates of all blocks", "**blocks, chain** (gpt: bound)", "**blocks, averaged**", "one block alone",
            "peak memory of a block's update (of end to end, checkpointed), % of end to end",
            "time of an update of all blocks, %"]
    text = "Python sources: bits per byte ↓"
    return lines(head, [
        main_row("vit", "CIFAR-100: accuracy, % ↑", 1, vit_scores("end to end"), vit_scores("control"),
                 longer_scores("vit"), vit_scores("blocks, chain from z = 0"), vit_scores("blocks, averaged"),
                 best_block("vit", "right, %")),
        main_row("gpt", text, 3, text_scores("gpt", "end to end"), text_scores("gpt", "control"),
                 longer_scores("gpt"), text_scores("gpt", "blocks, bound"), text_scores("gpt", "blocks, averaged"),
                 best_block("gpt", "bits")),
        main_row("mdm", text, 3, mdm_scores("end to end"), mdm_scores("control"), longer_scores("mdm"),
                 mdm_scores("blocks"), mdm_scores("mean of the blocks at every t"),
                 mdm_scores("block 2 at every t")),
        main_row("dit", "CIFAR-10: denoising loss ↓", 4, dit_losses("end to end"), dit_losses("control"),
                 longer_scores("dit"), dit_losses("blocks")),
        main_row("dit", "CIFAR-10: Fréchet distance ↓", 0, dit_distances("end to end"),
                 dit_distances("control"), dit_distances(LONGER), dit_distances("blocks"))])


def short_row(model, task, digits, end_to_end, control, longer, blocks):
    values = [cell(found, digits) for found in (end_to_end, control, longer, blocks)]
    return [task, *values, f"{peak_share(model, 'one block')} %", f"{time_share(model, 'all blocks')} %"]


def gpu_row(model, task, digits, end_to_end, control, longer, blocks, time):
    """Of the paper's networks, on a GPU; time: of all blocks, % of the baseline's."""
    values = [cell(found, digits) for found in (end_to_end, control, longer, blocks)]
    memory = cell(scores(f"gpu/{model}/memory.json", "of end to end, %", "one block", "peak"), 0)
    return [task, *values, f"{memory} %", f"{time:.0f} %"]


CIFAR100 = "gpu/vit_cifar100_29epochs"
CIFAR10 = "gpu/dit_cifar10_20epochs"


def cifar100(folder, row):
    """Accuracies of vit on a GPU."""
    return scores(f"{CIFAR100}/{folder}/eval.json", "held-out images", row, "accuracy, %")


def cifar10(row):
    """Losses of dit on a GPU."""
    return scores(f"{CIFAR10}/compare.json", LOSS, row, "weighted squared error")


def gpu_rows():
    """The paper's networks, for a part of the paper's epochs."""
    whole, blocks = whole_run()
    vit_time = 100 * sum(blocks) / whole
    dit_time = all_blocks_time("gpu/update/dit_time.json", 3, "recorded")
    return [
        gpu_row("vit_cifar100", "`vit --preset cifar100-ours`, 29 of 500 epochs: accuracy, % ↑", 1,
                cifar100("ours", "end to end"), cifar100("ours", "control"), cifar100("long", "control"),
                cifar100("ours", "blocks, averaged"), vit_time),
        gpu_row("dit_cifar10", "`dit --preset cifar10`, 20 of 100 epochs: denoising loss ↓", 4,
                cifar10("end to end"), cifar10("control"), cifar10(LONGER), cifar10("blocks"), dit_time),
        gpu_row("dit_cifar10", "the same: Fréchet distance (no FID) ↓", 0, distance("end to end", 1), distance("control", 1),
                distance(LONGER, 1), distance("blocks", 1), dit_time)]


def short():
    """For a first screen: the rows that can judge, with the readout of the blocks that is the default."""
    head = ["", "end to end", "control", "control, updates of all blocks", "**blocks**",
            "memory of a block's update, of end to end's", "time of all blocks' updates, of end to end's"]
    return lines(head, [
        *gpu_rows(),
        short_row("vit", "`vit --preset cpu`, CIFAR-100: accuracy, % ↑", 1, vit_scores("end to end"),
                  vit_scores("control"), longer_scores("vit"), vit_scores("blocks, averaged")),
        short_row("gpt", "`gpt --preset cpu`, Python sources: bits per byte ↓", 3, text_scores("gpt", "end to end"),
                  text_scores("gpt", "control"), longer_scores("gpt"), text_scores("gpt", "blocks, averaged")),
        short_row("mdm", "`mdm --preset cpu`, Python sources: bits per byte ↓", 3, mdm_scores("end to end"),
                  mdm_scores("control"), longer_scores("mdm"), mdm_scores("blocks")),
        short_row("dit", "`dit --preset cpu`, CIFAR-10: denoising loss ↓", 4, dit_losses("end to end"),
                  dit_losses("control"), longer_scores("dit"), dit_losses("blocks")),
        short_row("dit", "the same: Fréchet distance (no FID) ↓", 0, dit_distances("end to end"),
                  dit_distances("control"), dit_distances(LONGER), dit_distances("blocks"))])


# one pass through a block's layers, which a control costs too
ONE_BLOCK = {"vit": "block alone", "gpt": "block alone", "mdm": "blocks", "dit": "blocks"}


def best_cell(found, digits, highest=False):
    """The name and the score of the best of {name: scores}, or the names of those whose scores are equal as rounded."""
    found = {name: values for name, values in found.items() if values}
    rounded = {name: round(statistics.mean(values), digits) for name, values in found.items()}
    best = max(rounded.values()) if highest else min(rounded.values())
    names = [name for name in found if rounded[name] == best]
    return f"{' = '.join(names)}, {cell(found[names[0]], digits)}"


def best_row(model, task, digits, end_to_end, control, longer, blocks, one_block, controls=(), highest=False,
             folder=""):
    """one_block: scores of what costs a block's layers for each step of sampling, or for an answer. controls: of as
    many controls as blocks, averaged. folder: where the memory of this network was measured, if not in cpu/bench."""
    folder = folder or f"cpu/bench/{model}"
    averaged = {"controls, averaged": controls}
    compute = {"end to end": end_to_end, "longer control": longer, "blocks": blocks, **averaged}
    sampling = {"control": control, "longer control": longer, ONE_BLOCK[model]: one_block}
    memory = {"control": control, "longer control": longer, "blocks": blocks, **averaged}
    peak = {network: numbers(f"{folder}/memory.json", "tables", "of end to end, %", network, "peak")[0]
            for network in (CHECKPOINTED, "one block")}
    if peak[CHECKPOINTED] <= peak["one block"]:
        memory["end to end, checkpointed"] = end_to_end
    return [task, *(best_cell(found, digits, highest) for found in (compute, sampling, memory))]


def best():
    """Which of end to end, control, longer control and blocks is best where what they cost is equal."""
    return lines(["", "equal compute in training", "equal compute for an answer", "equal memory in training"], [
        best_row("vit", "vit, CIFAR-100, % ↑", 1, vit_scores("end to end"), vit_scores("control"),
                 longer_scores("vit"), vit_scores("blocks, averaged"), best_block("vit", "right, %"), highest=True),
        best_row("vit", "vit, a tenth of CIFAR-100, % ↑", 1, tenth_scores("end to end"), tenth_scores("control"),
                 tenth_scores(LONGER), tenth_scores("blocks, averaged"), tenth_scores("block 2 alone"),
                 tenth_scores("3 controls, averaged"), highest=True),
        best_row("gpt", "gpt, bits ↓", 3, text_scores("gpt", "end to end"), text_scores("gpt", "control"),
                 longer_scores("gpt"), text_scores("gpt", "blocks, averaged"), best_block("gpt", "bits")),
        best_row("mdm", "mdm, 6 layers, bits ↓", 3, mdm_scores("end to end"), mdm_scores("control"),
                 longer_scores("mdm"), mdm_scores("blocks"), mdm_scores("blocks")),
        best_row("dit", "dit, 6 layers, loss ↓", 4, dit_losses("end to end"), dit_losses("control"),
                 longer_scores("dit"), dit_losses("blocks"), dit_losses("blocks")),
        best_row("mdm", "mdm, a tenth of tiny-shakespeare, bits ↓", 3, tenth_bits("end to end"), tenth_bits("control"),
                 tenth_bits(LONGER), tenth_bits("blocks"), tenth_bits("blocks"), tenth_bits("3 controls, averaged")),
        best_row("dit", "dit, a tenth of CIFAR-10, loss ↓", 4, tenth_loss("end to end"), tenth_loss("control"),
                 tenth_loss(LONGER), tenth_loss("blocks"), tenth_loss("blocks")),
        best_row("dit", "dit, digits, loss ↓", 4, digits_loss("end to end"), digits_loss("control"),
                 digits_loss(LONGER), digits_loss("blocks"), digits_loss("blocks"), folder="cpu/default/dit"),
        best_row("vit", "vit, H200, 29 epochs, % ↑", 1, cifar100("ours", "end to end"), cifar100("ours", "control"),
                 cifar100("long", "control"), cifar100("ours", "blocks, averaged"), (), highest=True,
                 folder="gpu/vit_cifar100"),
        best_row("dit", "dit, H200, 20 epochs, loss ↓", 4, cifar10("end to end"), cifar10("control"), cifar10(LONGER),
                 cifar10("blocks"), cifar10("blocks"), folder="gpu/dit_cifar10")])


def readout_row(name, accuracy, vit_bits, gpt_bits):
    return [name, cell(accuracy, 2), cell(vit_bits, 3), cell(gpt_bits, 3)]


def evaluated_row(name, row):
    return readout_row(name, vit_scores(row), vit_scores(row, "bits per label"), text_scores("gpt", row))


def compared_row(name, vit_row, gpt_row, seeds):
    """A row of compare.py."""
    vit_keys = f"cpu/seed{seeds}/vit/compare.json", "held-out images", vit_row
    gpt_keys = f"cpu/seed{seeds}/gpt/compare.json", TEXT, gpt_row
    return readout_row(name, scores(*vit_keys, "accuracy, %"), scores(*vit_keys, "bits per label"),
                       scores(*gpt_keys, BITS))


def readouts():
    """vit and gpt: the blocks' readouts, and what controls make of the same updates."""
    average = "blocks, averaged"
    return lines(["", "vit: accuracy, %", "vit: bits per label", "gpt: bits per byte"], [
        evaluated_row("end to end", "end to end"),
        evaluated_row("control", "control"),
        compared_row("a control with the updates of all blocks", LONGER, LONGER, "*"),
        compared_row("as many controls as blocks, averaged", "3 controls, averaged", "4 controls, averaged", 0),
        evaluated_row("**blocks, averaged**", average),
        evaluated_row("chain from z = 0", "blocks, chain from z = 0"),
        evaluated_row("chain from noise", "blocks, chain from noise"),
        evaluated_row("blocks, bound", "blocks, bound"),
        evaluated_row("block 0 alone", "block 0 alone")])


INTERVALS = {"t 0.733 to 1": "block 0, t 0.733 to 1", "0.467 to 0.733": "block 1, t 0.467 to 0.733",
             "0 to 0.467": "block 2, t 0 to 0.467"}


def mdm_row(name, log, row):
    """A row of compare.py on mdm: the bound, and the part of it in the interval of each block."""
    shares = [scores(log, "the bound by interval, bits per byte", interval, row) for interval in INTERVALS.values()]
    return [name, cell(scores(log, f"{TEXT} (bound)", row, BITS), 3), *(cell(share, 3) for share in shares)]


def mdm():
    """mdm with 6 layers and with 12, two seeds of each but for the longer control with 12."""
    log, log12 = "cpu/seed*/mdm/compare.json", "cpu/layers12/mdm/compare*.json"
    return lines(["", "bound", *INTERVALS], [
        mdm_row("6 layers, end to end", log, "end to end"),
        mdm_row("control, 2 layers", log, "control"),
        mdm_row("control with the updates of all blocks", log, LONGER),
        mdm_row("3 blocks of 2 layers, each on its own interval", log, "blocks"),
        mdm_row("block 1 at every t", log, "block 1 at every t"),
        mdm_row("block 2 at every t", log, "block 2 at every t"),
        mdm_row("mean of the blocks at every t", log, "mean of the blocks at every t"),
        mdm_row("12 layers, end to end", log12, "end to end"),
        mdm_row("control, 4 layers", log12, "control"),
        mdm_row("control with the updates of all blocks", "cpu/layers12/mdm/compare.json", LONGER),
        mdm_row("3 blocks of 4 layers, each on its own interval", log12, "blocks"),
        mdm_row("mean of the blocks at every t", log12, "mean of the blocks at every t")])


def loss_cells(log, row):
    """A row of compare.py on dit: the loss, in all and in the interval of each of three blocks."""
    intervals = [cell(scores(log, "denoising loss by block", f"block {b}", row), 4) for b in range(3)]
    return [cell(scores(log, LOSS, row, "weighted squared error"), 4), *intervals]


def dit():
    """dit's denoising loss, in all and in each block's interval, and the distance of its images."""
    rows = []
    for row, name in (("end to end", "6 layers, end to end"), ("control", "control, 2 layers"),
                      (LONGER, "control with the updates of all blocks"), ("blocks", "3 blocks of 2 layers")):
        intervals = [dit_scores(row, "denoising loss by block", f"block {b}", row) for b in range(3)]
        rows.append([name, cell(dit_losses(row), 4), *(cell(loss, 4) for loss in intervals),
                     cell(dit_distances(row), 1)])
    for name, log, row in (
            ("blocks of 1, 2 and 3 layers", "split", "blocks"),
            ("blocks with 4,000, 4,000 and 10,000 updates", "updates", "blocks"),
            ("12 layers, end to end", "layers12", "end to end"),
            ("control, 4 layers", "layers12", "control"),
            ("control with the updates of all blocks", "layers12", LONGER),
            ("3 blocks of 4 layers", "layers12", "blocks"),
            ("the same, overlap .2", "layers12_gamma2", "blocks")):
        rows.append([name, *loss_cells(f"gpu/dit_cpu/{log}.json", row), ""])
    two_blocks = scores("gpu/dit_cpu/layers12_blocks2.json", LOSS, "blocks", "weighted squared error")
    rows.append(["2 blocks of 6 layers", cell(two_blocks, 4), "", "", "", ""])  # they own other intervals
    return lines(["", "denoising loss", "interval of block 0", "of block 1", "of block 2", "Fréchet distance"],
                 rows)


def cups_cells(log, row):
    """Right answers with 1, 4 and 16 passes."""
    return [cell(scores(f"choices/cups/{log}.json", "right answers", f"{row}, passes {n}", "all, %"), 1)
            for n in (1, 4, 16)]


def recurrent():
    """recurrent on Python sources, and on the text on which passes should count."""
    of_sources = {row: cell(text_scores("recurrent", row), 3) for row in ("end to end", "control", "block 0 alone")}
    return lines(["", "Python sources, bits per byte", "cups, right answers with 1 pass, %", "with 4 passes, %",
                  "with 16, %"], [
        ["end to end; cups: 4 passes in the mean", of_sources["end to end"], *cups_cells("cups", "end to end")],
        ["cups: 12 passes in the mean, 3,000 updates", "", *cups_cells("cups12", "end to end")],
        ["control: one pass", of_sources["control"], *cups_cells("cups", "control")],
        ["block", of_sources["block 0 alone"], *cups_cells("cups", "block")]])


MODELS = ("vit", "gpt", "mdm", "dit", "recurrent")


def cost():
    """Memory and time of an update on a CPU, as shares of the baseline's."""
    head = ["", "peak, end to end, MB", "of a block, %", "of the baseline, checkpointed, %",
            "of a checkpointed block, %", "update, end to end, ms", "checkpointed, %", "control, %",
            "all blocks, %", "step of sampling, end to end, ms", "of block 0, %"]
    rows = []
    for model in MODELS:
        log = f"cpu/bench/{model}/bench.json"
        step = "one step of sampling*"
        rows.append([
            model, cell(scores(f"cpu/bench/{model}/memory.json", "memory of one update, MB", "end to end", "peak"), 1),
            peak_share(model, "one block"), peak_share(model, CHECKPOINTED),
            peak_share(model, "one block, activations checkpointed"),
            cell(scores(log, "one update of *", "end to end", "ms"), 0), time_share(model, CHECKPOINTED),
            time_share(model, "control"), time_share(model, "all blocks"),
            cell(scores(log, step, "end to end", "ms"), 1),
            cell(scores(log, step, "block 0", "of end to end, %"), 0)])
    return lines(head, rows)


# ---- Few data, and masks where they teach -----------------------------------------------------------------

def tenth_scores(row, column="accuracy, %"):
    """vit on a tenth of CIFAR-100."""
    return scores("cpu/tenth/vit/compare.json", "held-out images", row, column)


def tenth_loss(row):
    """dit on a tenth of CIFAR-10."""
    return scores("cpu/tenth/dit/compare.json", LOSS, row, "weighted squared error")


def digits_loss(row):
    """dit's default, on digits."""
    return scores("cpu/default/dit/compare.json", LOSS, row, "weighted squared error")


def tenth_bits(row):
    """mdm on a tenth of tiny-shakespeare."""
    return scores("cpu/tenth/mdm/compare.json", f"{TEXT} (bound)", row, BITS)


def tenth():
    """vit on a tenth of CIFAR-100, dit on a tenth of CIFAR-10, mdm on one of tiny-shakespeare, and dit on digits."""
    rows = []
    for name, vit_row, dit_row in (
            ("end to end", "end to end", "end to end"),
            ("control", "control", "control"),
            ("control with the updates of all blocks", LONGER, LONGER),
            ("as many controls as blocks, averaged", "3 controls, averaged", "3 controls, averaged"),
            ("**blocks** (vit: averaged)", "blocks, averaged", "blocks"),
            ("mdm: mean of the blocks at every t", "", "mean of the blocks at every t"),
            ("block 2 alone, the best of the three", "block 2 alone", "")):
        rows.append([name, cell(tenth_scores(vit_row), 1), cell(tenth_scores(vit_row, "bits per label"), 2),
                     cell(tenth_bits(dit_row), 3), cell(tenth_loss(dit_row), 4), cell(digits_loss(dit_row), 4)])
    chain = scores("cpu/tenth/vit/eval.json", "held-out images", "blocks, chain from z = 0", "accuracy, %")
    rows.append(["blocks, chain from z = 0", cell(chain, 1), "", "", "", ""])
    head = ["", "vit, a tenth of CIFAR-100: accuracy, %", "vit: bits per label", "mdm, a tenth of tiny-shakespeare: bits per byte",
            "dit, a tenth of CIFAR-10: denoising loss", "dit, digits: denoising loss"]
    return lines(head, rows)


def masks():
    """mdm's bound after training at a part of the times, and with other weights, at both budgets on a CPU, seed 0."""
    runs = json.loads((HERE / "choices/masks/scores.json").read_text())

    def of(run, row):
        return cell([runs[run]["tables"][f"{TEXT} (bound)"][row][BITS]], 3)
    longer = scores("cpu/seed0/mdm/compare.json", f"{TEXT} (bound)", LONGER, BITS)
    whole, control, blocks = "end to end", "control", "blocks"
    return lines(["", "trained at t", "default, 1,200 updates", "the same, root of the weight", "the same, no weight",
                  "`--preset cpu`, 4,000 updates"], [
        [whole, "0 to 1", "", "", "", of("whole", whole)],
        ["", ".3 to .8", of("eval1", whole), "", "", of("cpu", whole)],
        ["", ".2 to .9", of("eval2", whole), of("root", whole), "", ""],
        ["", "1/3 to 2/3", of("eval3", whole), "", "", ""],
        ["", ".2 to .7", "", "", "", of("cpu2", whole)],
        [control, "0 to 1", of("control 0 to 1", control), of("root 0 to 1, overlap 1", control), of("flat 0 to 1", control),
         of("whole", control)],
        ["", ".1 to .8", "", of("root .1 to .8", control), of("flat .1 to .8", control), ""],
        ["", ".3 to .8", of("eval1", control), "", "", of("cpu", control)],
        ["", ".3 to .9", of("eval4", control), "", "", ""],
        ["", "1/3 to 2/3", of("eval2", control), "", "", ""],
        ["", ".2 to .7", of("eval3", control), "", of("flat .2 to .7", control), of("cpu2", control)],
        ["", ".2 to .6", of("eval5", control), of("root", control), "", ""],
        ["block 2 in its place", ".2 to .6", of("block 2", "block 2 at every t"), "", "", ""],
        ["control with the updates of all blocks", "0 to 1", "", "", "", of("whole_long", LONGER)],
        ["", ".2 to .7", "", "", "", cell(longer, 3)],
        [blocks, "0 to 1, overlap .05", "", "", "", of("whole", blocks)],
        ["", ".2 to 1, overlap .5", of("eval1", blocks), of("root", blocks), "", of("cpu", blocks)],
        ["", ".2 to 1, overlap 1", of("root 0 to 1, overlap 1", blocks), "", "", ""],
        ["", ".2 to .9, overlap .5", of("eval2", blocks), "", "", ""],
        ["", ".2 to .8, overlap .5", "", "", "", of("cpu2", blocks)]])


# ---- On a GPU ---------------------------------------------------------------------------------------------

RECORDED = {"unrecorded": ", not recorded", "recorded": ", recorded"}


def all_blocks_time(log, n_blocks, how):
    """Time of an update of all blocks, % of the baseline's; how: recorded or unrecorded."""
    whole = scores(log, "an update", "end_to_end" + RECORDED[how], "ms")[0]
    block = scores(log, "an update", "block_0" + RECORDED[how], "ms")[0]
    return 100 * n_blocks * block / whole


def update_row(name, log, n_blocks):
    """Times of check_gpu.py --time."""
    row = [name]
    for part in ("end_to_end", "block_0", "control"):
        for ending in RECORDED.values():
            row.append(cell(scores(log, "an update", part + ending, "ms"), 1))
        row.append(cell(scores(log, "an update", part + ", recorded", "kernel time, ms"), 1))
    for how in RECORDED:
        row.append(f"{all_blocks_time(log, n_blocks, how):.0f}")
    return row


def gpu_updates():
    """Milliseconds of an update on an H200, recorded as a CUDA graph or not, and of its kernels."""
    head = ["ms", "end to end, unrecorded", "recorded", "its kernels", "block 0, unrecorded", "recorded",
            "its kernels", "control, unrecorded", "recorded", "its kernels", "all blocks, unrecorded, %",
            "recorded, %"]
    rows = [update_row("vit cifar100", "gpu/update/vit_time.json", 3),
            update_row("dit cifar10", "gpu/update/dit_time.json", 3),
            update_row("mdm text8", "gpu/update/mdm_time.json", 3),
            update_row("gpt cpu, batches of 64", "gpu/update/gpt_time.json", 4)]
    # each part's first updates compile it, but blocks 1 and 2 use what was compiled for block 0
    whole, blocks = whole_run()
    control = numbers(f"{CIFAR100}/long/control.jsonl", "ms")[0]
    rows.append(["vit cifar100, mean of a whole run, compilation included", "", f"{whole:.2f}", "", "",
                 f"{blocks[0]:.2f}", "", "", f"{control:.2f}", "", "", f"{100 * sum(blocks) / whole:.0f}"])
    return lines(head, rows)


def whole_run():
    """Milliseconds of an update of vit cifar100, the mean over a whole run: (end to end, [each block])."""
    log = f"{CIFAR100}/ours/train.jsonl"
    return last_update(log, "end_to_end")["ms"], [last_update(log, f"block_{b}")["ms"] for b in range(3)]


def gpu_cifar100():
    """vit --preset cifar100, 29 of the paper's 500 epochs."""
    rows = []
    for name, folder, row, trained, note in (
            ("end to end, 12 layers", "ours", "end to end", "end to end", ""),
            ("control, 4 layers", "ours", "control", "control", ""),
            ("control, 4 layers, the updates of all blocks", "long", "control", "control", ""),
            ("3 blocks of 4 layers, averaged", "ours", "blocks, averaged", "3 blocks", " each"),
            ("the same, chain from z = 0", "ours", "blocks, chain from z = 0", "", ""),
            ("3 blocks with the paper's noise and readout, averaged", "paper", "blocks, averaged", "3 blocks",
             " each"),
            ("the same, chain from z = 0", "paper", "blocks, chain from z = 0", "", ""),
            ("the same, chain from noise", "paper", "blocks, chain from noise", "", "")):
        log = f"{CIFAR100}/{folder}/eval.json"
        updates = f"{numbers(log, 'updates', trained)[0]:,}{note}" if trained else ""
        rows.append([name, updates, cell(scores(log, "held-out images", row, "accuracy, %"), 1),
                     cell(scores(log, "held-out images", row, "bits per label"), 3)])
    return lines(["", "updates", "accuracy, %", "bits per label"], rows)


def distance(row, guidance):
    """Fréchet distances of dit on a GPU."""
    return scores(f"{CIFAR10}/frechet_guidance{guidance}.json", "generated images", f"{row}, guidance {guidance}",
                  "Frechet distance, features of EfficientNet-lite0")


def gpu_cifar10():
    """dit --preset cifar10, 20 of the paper's 100 epochs."""
    rows = []
    for row, name in (("end to end", "end to end, 12 layers"), ("control", "control, 4 layers"),
                      (LONGER, "control, 4 layers, the updates of all blocks"), ("blocks", "3 blocks of 4 layers")):
        part = LONGER if row == LONGER else "end_to_end"  # the updates of any other are those of the baseline
        updates = f"{last_update(f'{CIFAR10}/train.jsonl', part)['step']:,}" + (" each" if row == "blocks" else "")
        rows.append([name, updates, *loss_cells(f"{CIFAR10}/compare.json", row),
                     cell(distance(row, 1), 0), cell(distance(row, 2), 0)])
    return lines(["", "updates", "denoising loss", "interval of block 0", "of block 1", "of block 2",
                  "Fréchet distance", "with guidance 2"], rows)


def gpu_memory():
    """Peaks of an update of the paper's presets, on an H200 and, of gpt, on a CPU."""
    head = ["", "peak, end to end, MB", "one block: weights, gradients, optimizer, %", "peak of a block, %",
            "of the baseline, checkpointed, %", "of a checkpointed block, %"]
    rows = []
    for name, log in (("vit cifar100, B = 3", "gpu/vit_cifar100/memory"),
                      ("vit tiny-imagenet, B = 2", "gpu/vit_tiny-imagenet/memory"),
                      ("dit cifar10, B = 3", "gpu/dit_cifar10/memory"),
                      ("dit imagenet256, B = 3", "gpu/dit_imagenet256/memory"),
                      ("mdm text8, B = 3", "gpu/mdm_text8/memory"),
                      ("gpt lm1b, B = 4", "gpu/gpt_lm1b/memory"),
                      ("the same at 9ec85c7, float32, CPU", "cpu/bench/gpt_lm1b/memory_9ec85c7")):
        row = [name, cell(scores(f"{log}.json", "memory of one update, MB", "end to end", "peak"), 0)]
        for network, term in (("one block", "weights, gradients, optimizer"), ("one block", "peak"),
                              (CHECKPOINTED, "peak"), ("one block, activations checkpointed", "peak")):
            row.append(cell(scores(f"{log}.json", "of end to end, %", network, term), 0))
        rows.append(row)
    return lines(head, rows)


# ---- Choices ----------------------------------------------------------------------------------------------

def noise():
    """Another mean and deviation of ln sigma in training."""
    columns = {"gpt: bound": ("gpt", TEXT, "blocks, bound", BITS, 3),
               "averaged": ("gpt", TEXT, "blocks, averaged", BITS, 3),
               "CIFAR-100: averaged, %": ("vit", "held-out images", "blocks, averaged", "accuracy, %", 1),
               "bound, bits": ("vit", "held-out images", "blocks, bound", "bits per label", 3),
               "recurrent: bound": ("recurrent", TEXT, "blocks, bound", BITS, 3),
               "alone": ("recurrent", TEXT, "block 0 alone", BITS, 3)}
    settings = {"-1.2, 1.2": "-1.2, 1.2 (the paper)", "-1.2, 1": "-1.2, 1", "-0.3, 1.2": "-.3, 1.2",
                "-0.3, 1": "-.3, 1", "0.5, 1.2": ".5, 1.2", "0.5, 1": ".5, 1", "1.2, 1.2": "1.2, 1.2",
                "1.2, 1": "1.2, 1 (default)"}
    rows = []
    for setting, name in settings.items():
        row = [name]
        for model, *keys, digits in columns.values():
            found = numbers(f"choices/noise/{model}.json", setting, "tables", *keys)
            row.append(cell(found, digits) if found else "not run")
        rows.append(row)
    return lines(["p_mean, p_std", *columns], rows)


def why_scores(pattern, row):
    return scores(f"choices/why/{pattern}", TEXT, row, BITS)


def why():
    """What stands between gpt's control and its block."""
    of_blocks = [why_scores("default_seed*.json", f"block {b} alone") for b in range(4)]
    block = [statistics.mean(seed) for seed in zip(*of_blocks)]
    quiet = [why_scores("noiseless.json", f"block without noise, {k}")[0] for k in range(4)]
    return lines(["", "bits per byte"], [
        ["control", cell(why_scores("default_seed*.json", "control"), 3)],
        ["control with adaLN", cell(why_scores("adaln_seed*.jsonl", "control"), 3)],
        ["control with two streams", cell(why_scores("streams_seed*.jsonl", "block 0 alone"), 3)],
        ["with both: a block without noise (mean of four seeds)", f"{statistics.mean(quiet):.3f}"],
        ["a block, mean of the four", cell(block, 3)],
        ["end to end, 8 layers", cell(why_scores("default_seed*.json", "end to end"), 3)],
        ["4 blocks, averaged", cell(why_scores("default_seed*.json", "blocks, averaged"), 3)],
        ["4 blocks without noise, averaged (seed 0)",
         cell(why_scores("noiseless.json", "4 blocks without noise, averaged"), 3)]])


TABLES = {function.__name__: function for function in (
    main, short, best, readouts, mdm, dit, recurrent, cost, tenth, masks, gpu_updates, gpu_cifar100, gpu_cifar10,
    gpu_memory, noise, why)}


# ---- Pages ------------------------------------------------------------------------------------------------

def rebuilt(page):
    """The text of a page with the tables of today."""
    def replace(match):
        name = match[1]
        if name not in TABLES:
            sys.exit(f"error: {page} asks for a table {name}; there are {', '.join(TABLES)}")
        return "\n".join([f"<!-- table: {name} -->", *TABLES[name](), "<!-- end -->"])
    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is not of today")
    check = parser.parse_args().check
    for page in PAGES:
        text = rebuilt(page)
        if check and text != page.read_text():
            sys.exit(f"error: {page} is not what the logs say: python results/table.py")
        if not check:
            page.write_text(text)
