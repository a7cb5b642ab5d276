"""Rebuild the numbers of README.md from the logs beside this file: python results/table.py [--check]

What stands between the README's marks comes from results/gpt/seed*/eval.json (`train.py --eval`)."""
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def spread(values, digits=3):
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(head, rows):
    lines = [" | ".join(head), " | ".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def tables():
    """{mark: text} for README.md."""
    runs = [json.loads(p.read_text())["tables"] for p in sorted((HERE / "gpt").glob("seed*/eval.json"))]

    def cell(title, row, column="bits per byte", digits=3):
        return spread([run[title][row][column] for run in runs], digits)
    first = "bits per byte on held-out text"
    names = {"baseline": "end to end, 8 layers", "control": "control: 2 layers, end to end",
             "blocks (bound)": "**4 blocks of 2 layers, each trained alone** (bound)",
             "blocks, cross-entropy at sigma_max": "the same, cross-entropy at sigma_max (block 0 alone)",
             "blocks (bound) - control": "bound − control"}
    right = {"baseline": "baseline", "control": "control", "blocks (bound)": "blocks from z = 0"}
    main = markdown(["gpt.py, bytes of the standard library", "bits per byte", "next byte right, %"], [
        [text, cell(first, row), cell("next token right, %", right[row], "%", 1) if row in right else ""]
        for row, text in names.items()])
    gaps = [run[first]["blocks (bound)"]["bits per byte"]
            - run[first]["blocks, cross-entropy at sigma_max"]["bits per byte"] for run in runs]
    main += f"\n| bound − cross-entropy at sigma_max | {spread(gaps)} | |"
    shares, free = "the bound, share by share", "each block without its hint (z = 0)"
    blocks = markdown(["", "share of the bound, bits per byte", "without its hint (z = 0), bits per byte"], [
        [row, cell(shares, row), cell(free, row) if row in runs[0][free] else ""] for row in runs[0][shares]])
    levels = "cross-entropy by noise level, owning block"
    sigma = markdown(["noise level", "block", "cross-entropy, bits per byte", "from z alone (Bayes)"], [
        [row, str(runs[0][levels][row]["block"]), cell(levels, row),
         cell(levels, row, "context-free Bayes")] for row in runs[0][levels]])
    text = "generated text"
    generated = markdown(["", *runs[0][text]["held-out text"]], [
        [row, *(cell(text, row, column, 2) for column in runs[0][text][row])] for row in runs[0][text]])
    lines = [json.loads(line) for line in (HERE / "gpt" / "explore.log").read_text().splitlines()]
    explored = markdown(["block 1, one seed, 400 updates", "share of the bound, bits", "hint-free, bits"], [
        [line["what"], f"{line['share, bits per token']:.3f}", f"{line['hint-free, bits per token']:.3f}"]
        for line in lines])
    return {"main": main, "blocks": blocks, "levels": sigma, "generated": generated, "explored": explored}


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
