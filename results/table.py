"""Rebuild the tables of README.md and of results/README.md from the logs beside this file:

    python results/table.py [--check]

What stands between marks there comes from results/MODEL/seed*/eval.json (`train.py --eval`), results/study,
probe and rival (`results/study.py`), memory, bench (`train.py --memory`, `--bench`) and hours.json."""
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
PLACES = HERE.parent / "README.md", HERE / "README.md"
FRECHET, UPDATES = "Frechet distance, features of our ViT", "of the blocks' updates, %"


def spread(values, digits=3):
    """Mean and standard deviation over the seeds; of one seed, the value."""
    if max(values) >= 1e4:
        return f"{statistics.mean(values):.1e}"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(head, rows):
    lines = [" | ".join(head), " | ".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


class Runs:
    """The evaluations of a model, one for each seed."""

    def __init__(self, model, folders="seed*"):
        paths = sorted((HERE / model).glob(f"{folders}/eval.json"))
        self.tables = [json.loads(p.read_text())["tables"] for p in paths]

    def cell(self, title, row, column, digits=3):
        values = [tables[title][row].get(column) for tables in self.tables]
        return "" if None in values else spread(values, digits)

    def gap(self, title, row, other, column, digits=3):
        """Mean and standard deviation of the difference within a seed."""
        return spread([t[title][row][column] - t[title][other][column] for t in self.tables], digits)

    def table(self, title, columns, names=None):
        """All rows of a table, or those in `names` {row: its name}; columns {column: (its head, digits)}."""
        rows = names or {row: row for row in self.tables[0][title]}
        return markdown(["", *(head for head, _ in columns.values())], [
            [name, *(self.cell(title, row, column, digits) for column, (_, digits) in columns.items())]
            for row, name in rows.items()])


# the columns of a row of results/study.py that tables show: {name: where it stands in the row's tables}
TEXT, MASKED = "bits per byte on held-out text", "bits per byte on held-out text (bound)"
SCORES = {"loss": ("denoising loss over all levels", "mean", "blocks"),
          "distance": ("generated images", "blocks, guidance 1", FRECHET),
          "mdm": (MASKED, "blocks", "bits per byte"), "gpt": (TEXT, "blocks (bound)", "bits per byte"),
          "at_max": (TEXT, "blocks, cross-entropy at sigma_max", "bits per byte"),
          "next": ("next token right, %", "blocks from z = 0", "%"),
          "drawn": ("next token right, %", "blocks from noise", "%"),
          "vit": ("held-out images", "blocks (bound)", "bits per label"),
          "right": ("held-out images", "blocks from z = 0", "accuracy, %")}


def last_line(name):
    """The tables of a row of results/study.py."""
    return json.loads((HERE / "study" / f"{name}.jsonl").read_text().splitlines()[-1])["tables"]


def score(name, what):
    """A figure of a row of results/study.py, or None where it was not run."""
    if not (HERE / "study" / f"{name}.jsonl").exists():
        return None
    found = last_line(name)
    for key in SCORES[what]:
        found = found[key]
    return found


def cells(names, what, digits=3):
    values = [score(name, what) for name in names]
    return ["not run" if v is None else f"{v:.{digits}f}" for v in values]


def probe(model):
    return json.loads((HERE / "probe" / f"{model}.json").read_text())


def tables():
    """{mark: text} for the places named above."""
    return {**main_table(), **gpt_tables(), **recurrent_tables(), **mdm_tables(), **vit_tables(),
            **dit_tables(), **cifar_tables(), **memory_tables(), **bench_tables(), **study_tables(),
            **step_tables(), **left_out_tables(), **rival_table(), **hours_table()}


def main_table():
    gpt, vit, dit, mdm = (Runs(model) for model in ("gpt", "vit", "dit", "mdm"))
    recurrent, longer = Runs("recurrent"), Runs("recurrent", "time*")
    text, images, drawn = "bits per byte on held-out text", "held-out images", "generated images"
    loss = "denoising loss by block"

    def weighted(name):  # every block's interval has the same probability: the plain mean is over all levels
        return spread([statistics.mean(row[name] for row in run[loss].values()) for run in dit.tables])
    def peak(model):  # of an update
        path = HERE / "memory" / "default" / f"{model}.json"
        table = json.loads(path.read_text())["tables"]["of end to end, %"]
        names = "one block", "one block, activations checkpointed", "end to end, activations checkpointed"
        return " / ".join(f"{table[name]['peak']:.0f}" for name in names)
    return {"main": markdown(
        ["", "paper: end to end", "paper: blocks", "ours", "end to end", "control: one block's layers",
         "**blocks, each trained alone**", "memory, % of end to end"], [
            ["`vit.py`", "60.25 % ↑ (CIFAR-100)", "59.30 %", "8x8 digits, 3 blocks: accuracy, % ↑",
             *(vit.cell(images, r, "accuracy, %", 1) for r in ("baseline", "control", "blocks from z = 0")),
             peak("vit")],
            ["`dit.py`", "FID 39.83 ↓ (CIFAR-10)", "37.20", "8x8 digits, 3 blocks: Fréchet distance ↓",
             *(dit.cell(drawn, f"{r}, guidance 1", FRECHET) for r in ("baseline", "control", "blocks")),
             peak("dit")],
            ["", "", "", "the same: denoising loss ↓",
             *(weighted(r) for r in ("baseline", "control", "blocks")), ""],
            ["`gpt.py`", "MAUVE .50 ↑ (LM1B)", ".71", "Python sources, 4 blocks: bits per byte ↓",
             *(gpt.cell(text, r, "bits per byte") for r in ("baseline", "control", "blocks (bound)")),
             peak("gpt")],
            ["`mdm.py`", "1.56 bits ↓ (text8)", "1.45", "Python sources, 3 blocks: bits per byte ↓",
             *(mdm.cell(f"{text} (bound)", r, "bits per byte") for r in ("baseline", "control", "blocks")),
             peak("mdm")],
            ["`recurrent.py`", "MAUVE .49 ↑ (LM1B)", ".70",
             "Python sources, equal updates: bits per byte ↓",
             *(recurrent.cell(text, r, "bits per byte") for r in ("baseline", "control", "blocks (bound)")),
             peak("recurrent")],
            ["", "", "", "the same, about equal time",
             *(longer.cell(text, r, "bits per byte") for r in ("baseline", "control", "blocks (bound)")),
             ""]])}


def gpt_tables():
    runs = Runs("gpt")
    first = "bits per byte on held-out text"
    names = {"baseline": "end to end, 8 layers", "control": "control: 2 layers, end to end",
             "blocks (bound)": "**4 blocks of 2 layers, each trained alone** (bound)",
             "blocks, cross-entropy at sigma_max": "the same, cross-entropy at sigma_max (block 0 alone)",
             "blocks (bound) - control": "bound − control"}
    right = {"baseline": "baseline", "control": "control", "blocks (bound)": "blocks from z = 0"}
    main = markdown(["gpt.py, bytes of the standard library", "bits per byte", "next byte right, %"], [
        [text, runs.cell(first, row, "bits per byte"),
         runs.cell("next token right, %", right[row], "%", 1) if row in right else ""]
        for row, text in names.items()])
    gaps = [run[first]["blocks (bound)"]["bits per byte"]
            - run[first]["blocks, cross-entropy at sigma_max"]["bits per byte"] for run in runs.tables]
    main += f"\n| bound − cross-entropy at sigma_max | {spread(gaps)} | |"
    shares, free = "the bound, share by share", "each block without its hint (z = 0)"
    blocks = markdown(["", "share of the bound, bits per byte", "without its hint (z = 0), bits per byte"], [
        [row, runs.cell(shares, row, "bits per byte"),
         runs.cell(free, row, "bits per byte") if row in runs.tables[0][free] else ""]
        for row in runs.tables[0][shares]])
    levels = "cross-entropy by noise level, owning block"
    sigma = markdown(["noise level", "block", "cross-entropy, bits per byte", "from z alone (Bayes)"], [
        [row, str(runs.tables[0][levels][row]["block"]), runs.cell(levels, row, "bits per byte"),
         runs.cell(levels, row, "context-free Bayes")] for row in runs.tables[0][levels]])
    text = "generated text"
    columns = {column: (column, 2) for column in runs.tables[0][text]["held-out text"]}
    lines = [json.loads(line) for line in (HERE / "gpt" / "explore.log").read_text().splitlines()]
    explored = markdown(["block 1, one seed, 400 updates", "share of the bound, bits", "hint-free, bits"], [
        [line["what"], f"{line['share, bits per token']:.3f}", f"{line['hint-free, bits per token']:.3f}"]
        for line in lines])
    return {"gpt": main, "blocks": blocks, "levels": sigma, "generated": runs.table(text, columns),
            "explored": explored}


def mdm_tables():
    names = {"baseline": "end to end, 6 layers", "control": "control: 2 layers, end to end",
             "blocks": "**3 blocks of 2 layers, each trained alone**",
             "blocks - baseline": "blocks − end to end", "blocks - control": "blocks − control"}
    models = {name: (name, 3) for name in ("baseline", "control", "blocks")}
    first, share = "bits per byte on held-out text (bound)", "the bound by interval, bits per byte"
    # of text8 a token is a byte, and a byte a character
    bits = {"mdm": {"bits per byte": ("bits per byte", 3)},
            "mdm text8": {"bits per byte": ("bits per character", 3)}}
    runs = {"mdm": Runs("mdm"), "mdm text8": Runs("mdm", "text8")}
    return {**{mark: r.table(first, bits[mark], names) for mark, r in runs.items()},
            **{f"{mark} shares": r.table(share, models) for mark, r in runs.items()}}


def recurrent_tables():
    runs = {"recurrent": Runs("recurrent"), "recurrent time": Runs("recurrent", "time*")}
    first, passes, text = "bits per byte on held-out text", "by number of passes", "generated text"
    names = {"baseline": "end to end, through 32 passes in the mean, 400 updates",
             "control": "control: one pass, no noise",
             "blocks (bound)": "**one block, a pass at a time** (bound)",
             "blocks, cross-entropy at sigma_max": "the same, cross-entropy at sigma_max (one pass)",
             "blocks (bound) - control": "bound − control",
             "blocks (bound) - baseline": "bound − end to end"}
    digits = {"baseline, bits per byte": 3, "baseline, next token right, %": 1,
              "from z = 0, next token right, %": 1, "from noise, next token right, %": 1,
              "bound of the sampler, bits per byte": 2, "the same from z alone (Bayes)": 2}
    summary = markdown(["", "equal updates", "about equal time"], [
        [name, *(r.cell(first, row, "bits per byte") for r in runs.values())] for row, name in names.items()])
    columns = {column: (column, 2) for column in runs["recurrent"].tables[0][text]["held-out text"]}
    levels = {"bits per byte": ("cross-entropy, bits per byte", 3),
              "without its hint (z = 0)": ("without its hint (z = 0)", 3),
              "context-free Bayes": ("from z alone (Bayes)", 3)}
    rows = {f"{k} passes": str(k) for k in (1, 2, 4, 8, 16, 32, 64)}
    by_passes = {f"{mark} passes": r.table(passes, {c: (c, d) for c, d in digits.items()}, rows)
                 for mark, r in runs.items()}
    longer = runs["recurrent time"]
    return {"recurrent": summary, **by_passes,
            "recurrent levels": longer.table("cross-entropy by noise level", levels),
            "recurrent generated": longer.table(text, columns)}


def vit_tables():
    runs = Runs("vit")
    names = {"baseline": "end to end, 6 layers", "control": "control: 2 layers, end to end",
             "blocks from z = 0": "**3 blocks of 2 layers, each trained alone**, from z = 0",
             "blocks from noise": "the same, from noise (mean of 8 draws' accuracies)",
             "blocks, mean of draws": "the same, the 8 draws averaged",
             "blocks (bound)": "the same, bound on the likelihood",
             "blocks, cross-entropy at sigma_max": "the same, cross-entropy at sigma_max (block 0 alone)"}
    columns = {"accuracy, %": ("accuracy, %", 2), "bits per label": ("bits per label", 3),
               "spread over draws": ("std over draws, %", 2)}
    chain = {"from z = 0": ("from z = 0, %", 2), "from noise": ("from noise, %", 2)}
    blocks = {"share of the bound, bits": ("share of the bound, bits", 3),
              "z = 0, accuracy, %": ("by itself with z = 0, %", 1), "z = 0, bits": ("the same, bits", 3),
              "left out, accuracy, %": ("chain without it, %", 1)}
    levels = {"cross-entropy": ("cross-entropy, bits", 3), "context-free Bayes": ("from z alone (Bayes)", 3)}
    gap = runs.gap("held-out images", "blocks from z = 0", "baseline", "accuracy, %", 2)
    gap = f"\n| from z = 0 − end to end | {gap} | | |"
    return {"vit": runs.table("held-out images", columns, names) + gap,
            "vit chain": runs.table("accuracy along the chain, %", chain),
            "vit blocks": runs.table("each block: its share, by itself, and the chain without it", blocks),
            "vit levels": runs.table("cross-entropy by noise level, owning block, bits per label", levels)}


def dit_tables():
    runs = Runs("dit")
    models = {name: (name, 4) for name in ("baseline", "control", "blocks")}
    drawn = {"Frechet distance, features of our ViT": ("Fréchet distance, features of our ViT", 3),
             "judged to be of its class, %": ("judged to be of its class, %", 1)}
    speed = {"of the baseline's, %": ("one evaluation of 64 images, % of the baseline's time", 0)}
    gaps = [runs.gap("generated images", "blocks, guidance 1", "baseline, guidance 1", column, digits)
            for column, (_, digits) in drawn.items()]
    return {"dit": runs.table("generated images", drawn) + f"\n| blocks − baseline | {' | '.join(gaps)} |",
            "dit loss": runs.table("denoising loss by block", models),
            "dit speed": runs.table("one evaluation of 64 images", speed)}


def cifar_tables():
    vit, dit = Runs("vit", "cifar100"), Runs("dit", "cifar10")
    names = {"baseline": "end to end, 6 layers", "control": "control: 2 layers, end to end",
             "blocks from z = 0": "3 blocks of 2 layers, from z = 0",
             "blocks from noise": "the same, from noise", "blocks (bound)": "the same, bound",
             "blocks, cross-entropy at sigma_max": "the same, cross-entropy at sigma_max"}
    alone = {"z = 0, accuracy, %": ("by itself with z = 0, %", 1), "z = 0, bits": ("the same, bits", 2)}
    levels = {"cross-entropy": ("cross-entropy, bits", 3), "context-free Bayes": ("from z alone (Bayes)", 3)}
    scores = json.loads((HERE / "dit" / "cifar10" / "efficientnet.json").read_text())
    title = "Frechet distance, EfficientNet-lite0 features"
    fd = [f"{scores[title][name]:.0f}" for name in ("end to end", "control", "blocks")]
    models = {name: (name, 3) for name in ("baseline", "control", "blocks")}
    return {
        "cifar100": vit.table("held-out images", {"accuracy, %": ("accuracy, %", 1),
                                                  "bits per label": ("bits per label", 2)}, names),
        "cifar100 blocks": vit.table("each block: its share, by itself, and the chain without it", alone,
                                     {f"block {b}": f"block {b}" for b in range(3)}),
        "cifar100 levels": vit.table("cross-entropy by noise level, owning block, bits per label", levels),
        "cifar10": dit.table("denoising loss by block", models)
        + f"\n| Fréchet distance, EfficientNet-lite0 features | {' | '.join(fd)} |"}


def memory_tables():
    presets = {"mdm": "`mdm --preset text8`, B = 3", "dit": "`dit --preset cifar10`, B = 3",
               "vit": "`vit --preset cifar100`, B = 3", "gpt": "`gpt --preset lm1b`, B = 4"}
    rows, kinds = [], ("weights, gradients, optimizer", "activations", "peak")
    for model, name in presets.items():
        table = json.loads((HERE / "memory" / f"{model}.json").read_text())["tables"]["of end to end, %"]
        shares = [*(table["one block"][k] for k in kinds),
                  *(table[f"{who}, activations checkpointed"]["peak"] for who in ("end to end", "one block"))]
        rows.append([name, *(f"{share:.1f}" for share in shares)])
    return {"memory": markdown(["of end to end, %", "one block: weights, gradients, optimizer", "activations",
                                "peak", "peak, end to end, checkpointed", "peak, one block, checkpointed"],
                               rows)}


def bench_tables():
    runs = {"vit": "`vit`, B = 3", "dit": "`dit`, B = 3", "mdm": "`mdm`, B = 3", "gpt": "`gpt`, B = 4",
            "recurrent": "`recurrent`, aligned", "recurrent_two": "`recurrent --streams two`",
            "vit_cifar100": "`vit --preset cifar100`, 8 images",
            "dit_cifar10": "`dit --preset cifar10`, 8 images",
            "mdm_text8": "`mdm --preset text8`, 2 windows"}
    rows = []
    for file, name in runs.items():
        updates, steps = json.loads((HERE / "bench" / f"{file}.json").read_text())["tables"].values()
        share = "of end to end, %"
        block = statistics.mean(row[share] for part, row in steps.items() if part.startswith("block"))
        rows.append([name, f"{updates['end to end']['ms']:.0f}", f"{updates['all blocks'][share]:.0f}",
                     f"{updates['control'][share]:.0f}", f"{block:.0f}"])
    return {"bench": markdown(["one CPU thread", "update, end to end, ms", "all blocks' updates, % of it",
                               "control's, %", "step of sampling by a block, % of the baseline's"], rows)}


def study_tables():
    """The paper's questions at small scale, one seed."""
    splits = {"4,4,4": ("38.03", "43.53"), "3,6,3": ("41.64", "43.59"), "6,4,2": ("45.42", "47.49"),
              "2,4,6": ("40.40", "42.37")}  # the paper's FID, equal probability and uniform
    partition = []
    for split, paper in splits.items():
        line = [split]
        for edges, fid in zip(("probability", "uniform"), paper):
            name = [f"dit12_{edges}_{split.replace(',', '')}"]
            line += [*cells(name, "loss", 4), *cells(name, "distance"), fid]
        partition.append(line)
    n = 1, 2, 3, 4, 6
    sweep = [[what, *cells([f"{model}12_b{k}" for k in n], key, digits)] for what, model, key, digits in (
        ("dit, denoising loss", "dit", "loss", 4), ("dit, Fréchet distance", "dit", "distance", 3),
        ("mdm, bits per byte", "mdm", "mdm", 3),
        ("vit, accuracy, %", "vit", "right", 1), ("vit, bits per label (bound)", "vit", "vit", 3))]
    sweep += [["paper: CIFAR-10 test FID (gamma 0)", "39.83", "35.47", "38.03", "45.43", "53.32"],
              ["paper: ImageNet test FID", "12.09", "9.90", "11.11", "11.90", "14.43"],
              ["paper: LM1B MAUVE, higher is better", "", ".61", ".65", ".67", ".62"]]
    of_dit = ["dit12_probability_444", "dit12_b3", "dit12_gamma_0.1", "dit12_gamma_0.2"]
    of_gpt = ["gpt_gamma_0", "gpt_gamma_0.05", "gpt_short", "gpt_gamma_0.2"]
    gamma = [["dit, denoising loss", *cells(of_dit, "loss", 4)],
             ["dit, Fréchet distance", *cells(of_dit, "distance")],
             ["gpt, bits per byte (bound)", *cells(of_gpt, "gpt")],
             ["paper: CIFAR-10 test FID", "38.03", "37.20", "", ""]]
    choices = {
        "default: equal probability, Bayes readout, no weight, fixed table": "gpt_short",
        "edges uniform in ln sigma": "gpt_uniform", "edges at equal information": "gpt_equal_information",
        "noise range [.15, 20], p_mean -.3, p_std .8": "gpt_range",
        "weight: EDM's, per sample": "gpt_weighted",
        "weight: the released code's batch mean": "gpt_batch_mean",
        "readout: EDM's": "gpt_edm_readout",
        "table: trained by block 0, then frozen": "gpt_learned_table"}
    chosen = [[what, *cells([name], "gpt"), *cells([name], "at_max"), *cells([name], "next", 1),
               *cells([name], "drawn", 1)] for what, name in choices.items()]
    return {
        "partition": markdown(["layers", "equal probability: loss", "Fréchet distance", "paper, FID",
                           "uniform: loss", "Fréchet distance", "paper, FID"], partition),
        "sweep": markdown(["12 layers", *(f"B = {k}" for k in n)], sweep),
        "gamma": markdown(["overlap gamma", "0", ".05", ".1", ".2"], gamma),
        "choices": markdown(["gpt.py, 4 blocks of 2 layers, 400 updates", "bound, bits per byte",
                         "cross-entropy at sigma_max", "next byte right from z = 0, %", "from noise, %"],
                        chosen)}


def step_tables():
    """Quality over the number of noise levels visited."""
    dit, vit, gpt, mdm = (probe(model)["steps"] for model in ("dit", "vit", "gpt", "mdm"))
    bits, drawn = "judge, bits per byte", "Frechet distance"
    moves = [int(row.split()[1]) for row in mdm["text"] if row.startswith("blocks")]
    return {
        "dit steps": markdown(["dit, levels", *dit["levels"]], [
            [name, *(f"{row[name][drawn]:.3f}" for row in dit["levels"].values())]
            for name in ("blocks", "baseline")]),
        "vit steps": markdown(["vit, levels", *vit["levels"]], [
            [name, *(f"{row[name]:.1f}" for row in vit["levels"].values())]
            for name in ("from z = 0, %", "from noise, %")]),
        "gpt steps": markdown(["gpt, levels", *gpt["levels"]], [
            [name, *(f"{row[name]:.1f}" for row in gpt["levels"].values())]
            for name in ("from z = 0, %", "from noise, %")]),
        "mdm steps": markdown(["mdm, moves", *map(str, moves), "held-out text"], [
            [f"{name}, {what}", *(f"{mdm['text'][f'{name}, {n} moves'][what]:.2f}" for n in moves),
             f"{mdm['text']['held-out text'][what]:.2f}"]
            for name in ("blocks", "baseline") for what in (bits, "distinct-2")])}


def left_out_tables():
    """The chain without a block's levels; each block on each interval."""
    dit, gpt = (probe(model)["steps"]["left out"] for model in ("dit", "gpt"))
    rows = []
    for name in sorted(gpt, reverse=True):  # "none" first
        of_dit = f"{dit[name]['Frechet distance']:.3f}" if name in dit else ""
        rows.append([name, of_dit, *(f"{gpt[name][how]:.1f}" for how in ("from z = 0, %", "from noise, %"))])
    found = {"left out": markdown(["left out", "dit: Fréchet distance", "gpt: next byte right from z = 0, %",
                                   "from noise, %"], rows[:1] + rows[:0:-1])}
    for model, level in (("mdm", "t"), ("dit", "sigma"), ("gpt", "sigma")):
        paths = sorted((HERE / "probe").glob(f"{model}*.json"))  # one for each seed
        curves, intervals = [json.loads(p.read_text())["curve"] for p in paths], probe(model)["intervals"]

        def over(losses, lo, hi):
            levels = curves[0]["level"]
            return spread([statistics.mean(v for s, v in zip(levels, one)
                                           if lo < s <= hi or s == lo == levels[0]) for one in losses])
        nets = {f"block {b}": [c["blocks"][b] for c in curves] for b in range(len(intervals))}
        owners = [next((b for b, (lo, _) in enumerate(intervals) if s > lo), len(intervals) - 1)
                  for s in curves[0]["level"]]
        nets["each on its own"] = [[c["blocks"][b][i] for i, b in enumerate(owners)] for c in curves]
        if model != "gpt":  # whose baseline and control see no noise
            nets |= {name: [c[name] for c in curves] for name in ("baseline", "control")}
        columns = {f"{level} {lo:.3g} to {hi:.3g}": (lo, hi) for lo, hi in intervals}
        if model == "mdm":  # the weight 1 / t is the inverse of the share that is masked
            columns["0 to 1: the bound, bits per byte"] = 0, 1
        found[f"exchanged {model}"] = markdown(
            [f"{model}, {curves[0]['unit']}", *columns],
            [[name, *(over(losses, lo, hi) for lo, hi in columns.values())] for name, losses in nets.items()])
        if model == "mdm":
            rows = [last_line(p.stem) for p in sorted((HERE / "study").glob("mdm_middle*.jsonl"))]
            bits = [list(row["bits per masked byte"].values()) for row in rows]
            found["exchanged mdm"] += "\n| six layers, trained on the middle third alone | {} |".format(
                " | ".join(over(bits, lo, hi) for lo, hi in columns.values()))
    return found


def rival_table():
    """End to end with checkpointed activations, at the blocks' time and no more memory than a block."""
    lines = []
    for model in ("dit", "mdm", "gpt"):
        path = HERE / "rival" / f"{model}.json"
        if not path.exists():
            lines.append([f"`{model}`", *["not run"] * 7])
            continue
        found, text = json.loads(path.read_text()), TEXT if model == "gpt" else MASKED
        peaks, first = found["peak, bytes"], Runs(model, "seed0").tables[0]
        least, part = peaks[f"end to end, checkpointed, {found['pieces']} pieces"], found[UPDATES]
        if model == "dit":
            def value(tables, who):
                return statistics.mean(row[who] for row in tables["denoising loss by block"].values())
        else:
            def value(tables, who):
                bound = "blocks (bound)" if model == "gpt" and who == "blocks" else who
                return tables[text][bound]["bits per byte"]
        lines.append([f"`{model}`", f"{peaks['one block'] / 1e6:.0f}",
                      f"{peaks['one block, checkpointed'] / 1e6:.0f}",
                      f"{least / 1e6:.0f} ({found['pieces']}{'' if found['fits'] else ', does not fit'})",
                      f"{part:.0f}", f"{value(found['tables'], 'blocks'):.3f}",
                      f"{value(found['tables'], 'baseline'):.3f}", f"{value(first, 'baseline'):.3f}"])
    return {"rival": markdown(["", "peak of a block, MB", "of a block, checkpointed", "of the rival (pieces)",
                               "rival's updates, % of a block's", "blocks", "rival",
                               "end to end, as many updates as a block"], lines)}


def hours_table():
    found, rows = json.loads((HERE / "hours.json").read_text())["rows"], []
    parts = "end to end", "control", "blocks"
    for name, row in found.items():
        hours = [f"{h:.0f}" if h >= 10 else f"{h:.2g}" for h in (row[part]["hours"] for part in parts)]
        if name == "vit --preset cifar100":  # the paper's seconds an update, end to end and of three blocks
            n = row["updates"]
            hours = [f"{s * n / 3600:.2f} (the paper's step time)" for s in (.0507, .0181, .0543)]
        updates = sorted({row[part]["updates"] for part in parts}, reverse=True)
        rows.append([f"`{name}`", ", end to end ".join(f"{n:,}" for n in updates),
                     *(f"{row[part]['TFLOP an update']:.3g}" for part in ("end to end", "blocks")), *hours])
    return {"hours": markdown(["preset", "updates of a part", "TFLOP an update, end to end", "all blocks",
                               "hours, end to end", "control", "all blocks"], rows)}


def fingerprint():
    """Of all logs that pictures are drawn from: in images/drawn_from after `python results/figures.py`."""
    digest = hashlib.sha256((HERE / "figures.py").read_bytes())
    for path in sorted(p for p in HERE.rglob("*") if p.suffix in (".json", ".jsonl")):
        digest.update(path.relative_to(HERE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def filled(texts):
    """The texts with every table between its marks."""
    for mark, table in tables().items():
        place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.S)
        texts, counts = zip(*(place.subn(lambda m: m[1] + table + "\n" + m[2], text) for text in texts))
        assert sum(counts) == 1, f"there are {sum(counts)} places marked {mark}"
    return texts


if __name__ == "__main__":
    before = tuple(path.read_text() for path in PLACES)
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit("the README is not what the logs say: python results/table.py" if before != after else 0)
    for path, text in zip(PLACES, after):
        path.write_text(text)
