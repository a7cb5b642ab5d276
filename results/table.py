"""Rebuild the numbers of README.md from the logs beside this file: python results/table.py [--check]

What stands between the README's marks comes from results/MODEL/seed*/eval.json (`train.py --eval`)."""
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


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


def row(name):
    """(what it rests on, tables) of a row of results/study.py."""
    lines = [json.loads(line) for line in (HERE / "study" / f"{name}.jsonl").read_text().splitlines()]
    return lines[0], lines[-1]["tables"]


def score(name):
    """What rows of a model are compared by: the denoising loss over all levels of dit, else the bound."""
    about, found = row(name)
    text = "bits per byte on held-out text"
    return {"dit": lambda: found["denoising loss over all levels"]["mean"]["blocks"],
            "mdm": lambda: found[f"{text} (bound)"]["blocks"]["bits per byte"],
            "gpt": lambda: found[text]["blocks (bound)"]["bits per byte"],
            "vit": lambda: found["held-out images"]["blocks (bound)"]["bits per label"]}[name[:3]]()


def tables():
    """{mark: text} for README.md."""
    return {**main_table(), **gpt_tables(), **recurrent_tables(), **mdm_tables(), **vit_tables(),
            **dit_tables(), **cifar_tables(), **memory_tables(), **bench_tables()}


def main_table():
    gpt, vit, dit, mdm = (Runs(model) for model in ("gpt", "vit", "dit", "mdm"))
    recurrent, longer = Runs("recurrent"), Runs("recurrent", "time*")
    text, images, drawn = "bits per byte on held-out text", "held-out images", "generated images"
    distance, loss = "Frechet distance, features of our ViT", "denoising loss by block"

    def weighted(name):  # every block's interval has the same probability: the plain mean is over all levels
        return spread([statistics.mean(row[name] for row in run[loss].values()) for run in dit.tables])
    return {"main": markdown(
        ["", "measured", "end to end", "control: one block's layers", "**blocks, each trained alone**"], [
            ["`vit.py`, 8x8 digits, 3 blocks", "accuracy, %, higher is better",
             *(vit.cell(images, r, "accuracy, %", 1) for r in ("baseline", "control", "blocks from z = 0"))],
            ["`dit.py`, 8x8 digits, 3 blocks", "denoising loss, lower is better",
             *(weighted(r) for r in ("baseline", "control", "blocks"))],
            ["", "Fréchet distance, features of our ViT, lower is better",
             *(dit.cell(drawn, f"{r}, guidance 1", distance) for r in ("baseline", "control", "blocks"))],
            ["`gpt.py`, bytes of Python sources, 4 blocks", "bits per byte, lower is better",
             *(gpt.cell(text, r, "bits per byte") for r in ("baseline", "control", "blocks (bound)"))],
            ["`mdm.py`, the same text, 3 blocks", "bits per byte, lower is better",
             *(mdm.cell(f"{text} (bound)", r, "bits per byte") for r in ("baseline", "control", "blocks"))],
            ["`recurrent.py`, the same text, 1 block, equal updates", "bits per byte, lower is better",
             *(recurrent.cell(text, r, "bits per byte") for r in ("baseline", "control", "blocks (bound)"))],
            ["the same, about equal time", "bits per byte, lower is better",
             *(longer.cell(text, r, "bits per byte") for r in ("baseline", "control", "blocks (bound)"))]])}


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


def filled(readme):
    for mark, text in tables().items():
        place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.S)
        readme, n = place.subn(lambda m: m[1] + text + "\n" + m[2], readme)
        assert n == 1, f"README.md has {n} places marked {mark}"
    return readme


if __name__ == "__main__":
    before = README.read_text()
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit("README.md is not what the logs say: python results/table.py" if before != after else 0)
    README.write_text(after)
