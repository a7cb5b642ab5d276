"""A text on which passes should count: a ball lies under one of five cups, and neighbouring cups are swapped.

    python results/cups.py --write cups.txt
    python train.py --model recurrent --data cups.txt --seq-len 64 --control    # then --block 0, --end-to-end
    python results/cups.py --model recurrent --data cups.txt --out out          # writes OUT/recurrent/cups.json

A line begins with the ball's cup, 0 to 4. Then `a` swaps cups 0 and 1, `b` 1 and 2, `c` 2 and 3, `d` 3 and 4. After a
capital letter, which swaps like the small one, stands the cup where the ball is now: 3D4dccbC2. The further the last
known cup is away, the more swaps have to be followed, one after another.

The last command asks for these cups in the held-out text, with 64 characters before each, and counts right answers,
with 1 pass and with as many as --passes says. A control always has one. A block starts from z = 0, at temperature 0."""
import random
import re
from pathlib import Path

import torch

from common import Parser, UserError, about, begin, run, train, write

CUPS = 5
ANSWERS = 12        # in a line
P_ANSWER = 0.15     # of each swap; so 6.7 swaps in the mean lie between two answers
CONTEXT = 64        # characters before an answer
DISTANCES = ((1, 4), (5, 8), (9, 64))  # swaps since the last answer


def cup_line(rng):
    """A line of the text, drawn from a random.Random."""
    ball = rng.randrange(CUPS)
    line = str(ball)
    for _ in range(ANSWERS):
        asked = False
        while not asked:
            left = rng.randrange(CUPS - 1)
            ball = {left: left + 1, left + 1: left}.get(ball, ball)
            asked = rng.random() < P_ANSWER
            letter = "abcd"[left]
            line += f"{letter.upper()}{ball}" if asked else letter
    return line


def write_text(path, n_lines=100_000):
    rng = random.Random(0)
    text = "".join(cup_line(rng) + "\n" for _ in range(n_lines))
    train.save(Path(path), text.encode())
    print(f"{path}: {n_lines:,} lines, {len(text):,} bytes")


def questions(setup, n):
    """Of the first n answers in the held-out text: prompts (n, CONTEXT), answers (n,) and distances (n,)."""
    text = bytes(setup.data.arrays["val"])
    prompts, answers, distances = [], [], []
    for found in re.finditer(rb"[a-d]*[A-D](?=[0-4])", text):
        if found.end() >= CONTEXT and len(prompts) < n:
            prompts.append(list(text[found.end() - CONTEXT:found.end()]))
            answers.append(text[found.end()])
            distances.append(len(found.group()))
    if not prompts:
        raise UserError("no answers in this text; write one with --write cups.txt, and name it with --data")
    return [torch.tensor(column, device=setup.device) for column in (prompts, answers, distances)]


def networks(setup):
    """{name: what generates} of the parts that are in OUT, and {name: the settings of its training}."""
    found, settings = {}, {}
    for name, part in (("end to end", "end_to_end"), ("control", "control"), ("block", "block_0")):
        path = train.checkpoint_path(setup.run.out, setup.model, part)
        if not path.exists():
            continue
        net, state = train.trained(setup.module, setup.model, part, setup.run.out, setup.device)
        if state["data"]["fingerprint"] != setup.data.about["fingerprint"]:
            raise UserError(f"{path} was trained on {state['data']['source']}, not on this text: name it with --data")
        if net.config.seq_len < CONTEXT:
            raise UserError(f"{path} was trained with --seq-len {net.config.seq_len}; it needs {CONTEXT} or more")
        found[name] = [net] if name == "block" else net
        settings[name] = {**train.flat(net.config), **state["training"], "updates": state["step"]}
    if not found:
        raise UserError(f"nothing of {setup.model} is trained in {setup.run.out}")
    return found, settings


@torch.no_grad()
def accuracy(setup, net, n_passes, prompts, answers, distances):
    """{column: % of right answers}, of all and by distance."""
    guesses = []
    for some in prompts.split(500):
        guesses.append(setup.module.generate(net, some, 1, temperature=0, n_passes=n_passes)[:, -1])
    right = (torch.cat(guesses) == answers).double()
    row = {"all, %": 100 * right.mean().item()}
    for low, high in DISTANCES:
        here = (low <= distances) & (distances <= high)
        if here.any():
            row[f"{low} to {high} swaps, %"] = 100 * right[here].mean().item()
    return row


def numbers_of_passes(text):
    """"4,16" -> [4, 16]. Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UserError(f"--passes must be one or more whole numbers above 0, such as 4,16; got {text!r}")
    return [int(number) for number in text.split(",")]


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--write", metavar="FILE", help="write the text, and end")
    parser.add_argument("--passes", default="4,16", help="further numbers of passes (default: 4,16)")
    parser.add_argument("--n", type=int, default=3000, help="answers to ask for (default: 3000)")
    own, rest = parser.parse_known_args(argv)
    if own.write is not None:
        if rest or not own.write:
            raise UserError("--write takes the name of a file, and no other flag")
        return write_text(own.write)
    if own.n < 1:
        raise UserError(f"--n must be at least 1; got {own.n}")
    passes = [1, *numbers_of_passes(own.passes)]
    setup = begin([*rest, "--eval"])
    if setup.model != "recurrent" or setup.data.settings.tokenizer != "bytes":
        raise UserError("this asks --model recurrent, trained with --tokenizer bytes")
    asked = questions(setup, own.n)
    nets, settings = networks(setup)
    rows = {}
    for name, net in nets.items():
        for n_passes in [1] if name == "control" else passes:
            torch.manual_seed(0)  # of the baseline's first state, and of the noise in a block's slots of known tokens
            rows[f"{name}, passes {n_passes}"] = accuracy(setup, net, n_passes, *asked)
    report = {**about("cups", argv), "data": setup.data.about, "trained": settings,
              "tables": {"right answers": rows}}
    write(setup.folder / "cups.json", report)


if __name__ == "__main__":
    run(main)
