"""Rebuild the tables of README.md and results/README.md from the logs: python results/table.py [--check]

A table stands between a mark, which says what is in it, and `<!-- end -->`:

    <!-- vit/seed*/eval.json/tables/held-out images/{row}/{column}
    columns: accuracy, %:1 | bits per label:3 => bits
    rows: baseline => end to end | control -->

The first line is the path of a number: a log, then keys of its JSON. {row} and {column} are entries of the
lists ("=>" renames one; without `rows`: all keys). ":3": three decimals, ":3g": three significant digits,
":0M": millions. A * in a log's name: mean ± deviation over seeds; in a key: mean. "last": the last key there.
"A minus B": difference."""
import json
import re
import statistics
import sys
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).parent


def find(log, keys):
    """What lies at a path of keys, or None."""
    if not keys or log is None:
        return log
    key, *rest = keys
    if " minus " in key:
        first, second = (find(log, [k, *rest]) for k in key.split(" minus "))
        return None if None in (first, second) else first - second
    if "*" in key:
        numbers = [find(log[k], rest) for k in log if fnmatchcase(k, key)]
        return statistics.mean(numbers) if numbers and None not in numbers else None
    if key == "last":
        return find(list(log.values())[-1], rest)
    return find(log.get(key), rest)


def values(path):
    """What lies at a path, in every log that fits: a JSON file, or the last line of a JSONL file."""
    file, keys = re.fullmatch(r"(.*?\.jsonl?)/(.*)", path).groups()
    logs = [(log.suffix, log.read_text()) for log in sorted(HERE.glob(file))]
    return [find(json.loads(text if suffix == ".json" else text.splitlines()[-1]), keys.split("/"))
            for suffix, text in logs]


def shown(numbers, digits, kind=""):
    """A number, or mean ± standard deviation of several."""
    mean = statistics.mean(numbers)
    if kind == "M":
        return f"{mean / 1e6:.{digits}f}"
    if kind == "g":
        return f"{mean:,.0f}" if mean >= 10 ** (digits - 1) else f"{mean:.{digits}g}"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def cell(path):
    """The text of a cell from its path and format; empty where a log does not have the number."""
    path, digits, kind = re.fullmatch(r"(.*):(\d)([gM]?)", path).groups()
    numbers = values(path)
    return "" if None in numbers else shown(numbers, int(digits), kind) if numbers else "not run"


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def described(mark):
    """The table that a mark describes. A row may contain {column}, a column {row}: hence {column} twice."""
    path, *lists = re.split(r"\n(?=columns:|rows:)", mark)
    entries = {}                                                # {"rows" or "columns": [(key, name), ...]}
    for name, text in (" ".join(text.split()).split(": ", 1) for text in lists):
        pairs = [entry.split(" => ") for entry in text.split(" | ")]
        entries[name] = [(pair[0], re.sub(r":\d[gM]?$", "", pair[-1])) for pair in pairs]
    rows = entries.get("rows") or [(key, key) for key in values(path.split("/{row}")[0])[0]]
    return markdown(["", *(name for _, name in entries["columns"])], [
        [name, *(cell(path.replace("{column}", column).replace("{row}", row).replace("{column}", column))
                 for column, _ in entries["columns"])] for row, name in rows])


def main_table():
    """Scores of --preset cpu, a row for each model and figure of merit, and what an update costs."""
    bits = "tables/bits per byte on held-out text{}/{{}}/bits per byte:3"
    text, alone = "eval.json/" + bits.format(""), "curves.json/tables/best block alone/last/"
    rows = [("vit", "CIFAR-100: accuracy, % ↑", "eval.json/tables/held-out images/{}/accuracy, %:1",
             "blocks from z = 0", "blocks (ensemble)", alone + "right, %:1"),
            ("gpt", "Python sources: bits per byte ↓", text,
             "blocks (bound)", "blocks (ensemble)", alone + "bits:3"),
            ("mdm", "Python sources: bits per byte ↓", "ensemble.json/" + bits.format(" (bound)"),
             "blocks", "mean of the blocks at every t", "block 1 at every t"),
            ("dit", "CIFAR-10: denoising loss ↓",
             "eval.json/tables/denoising loss on held-out images/{}/weighted squared error:4", "blocks", "", ""),
            ("dit", "CIFAR-10: Fréchet distance ↓", "frechet.json/tables/generated images/{}, guidance 1/"
             "Frechet distance, features of EfficientNet-lite0:0", "blocks", "", ""),
            ("recurrent", "Python sources, equal time (cannot judge the method): bits per byte ↓", text,
             "blocks (bound)", "", "block 0 alone")]
    head = ["", "task and figure of merit", "end to end", "control: one block's layers",
            "**blocks, a chain over noise levels**", "**blocks, averaged**", "one block alone",
            "peak memory of a block's update (of end to end, checkpointed), % of end to end",
            "time of an update of all blocks, %"]
    table = []
    for model, task, path, *names in rows:
        paths = [name if ".json" in name else name and path.format(name)
                 for name in ("end to end", "control", *names)]
        peaks = [cell(f"cpu/bench/{model}/memory.json/tables/of end to end, %/{part}/peak:0")
                 for part in ("one block", "end to end, activations checkpointed")]
        table.append([f"`{model}.py`", task, *(path and cell(f"cpu/seed*/{model}/{path}") for path in paths),
                      "{} ({})".format(*peaks),
                      cell(f"cpu/bench/{model}/bench.json/tables/one update of */all blocks/of end to end, %:0")])
    return markdown(head, table)


def exchanged(model):
    """The mean loss of every block on the interval of every block, over the probed levels in it."""
    curves, spans = values(f"probe/{model}*.json/curve"), values(f"probe/{model}.json/intervals")[0]
    owner = [min(sum(level <= lo for lo, _ in spans), len(spans) - 1) for level in curves[0]["level"]]
    nets = {f"block {b}": [c["blocks"][b] for c in curves] for b in range(len(spans))}
    nets["each on its own"] = [[c["blocks"][b][i] for i, b in enumerate(owner)] for c in curves]
    columns = {f"{lo:.3g} to {hi:.3g}": [b] for b, (lo, hi) in enumerate(spans)}
    if model != "gpt":                                          # whose baseline and control see no noise
        nets |= {name: [c[name] for c in curves] for name in ("baseline", "control")}
    if model == "mdm":                                          # the mean over all t is the bound
        columns["0 to 1: the bound, bits per byte"] = [0, 1, 2]
        middle = values("study/mdm_middle*.jsonl/tables/bits per masked byte")
        nets["six layers, trained on the middle third alone"] = [list(found.values()) for found in middle]
    return markdown([curves[0]["unit"], *columns], [
        [name, *(shown([statistics.mean(v for v, b in zip(loss, owner) if b in blocks) for loss in losses], 3)
                 for blocks in columns.values())] for name, losses in nets.items()])


def filled(match):
    """The match of a mark and its table, with the table of today."""
    name, *model = match[2].split(" ")
    code = {"main": main_table, "exchanged": exchanged}.get(name)
    return f"{match[1]}{code(*model) if code else described(match[2])}\n{match[3]}"


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("error: the only flag is --check")
    for page in (HERE.parent / "README.md", HERE / "README.md"):
        before = page.read_text()
        after = re.sub(r"(<!-- (.*?) -->\n).*?(<!-- end -->)", filled, before, flags=re.S)
        if "--check" in sys.argv and before != after:
            sys.exit(f"error: {page} is not what the logs say: python results/table.py")
        page.write_text(after)
