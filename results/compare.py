"""What else could be made of the blocks' time: means of controls, longer controls, scores on the way.

    python results/compare.py --model gpt --out out            # writes OUT/gpt/compare.json
    python results/compare.py --model gpt --train --block 0    # trains as train.py; keeps every checkpoint
    python results/compare.py --model gpt --curves             # scores those: OUT/gpt/curves.json

The first scores what lies in OUT: blocks, baseline and control, trained with `--out OUT`, and if they are there
OUT/control1, OUT/control2 and so on: controls of other seeds, which are averaged with the first;
OUT/long: a control with as many updates as all blocks together;
OUT/noiseless1 and so on: a block 0 that was trained without noise (gpt).
vit and gpt: every block alone and the mean of all. mdm: the same at every t, also beyond a block's own interval.

--train keeps the checkpoint of update N (--save-every) in OUT/at_N. A row of --curves has the scores and the
minutes of training until then: of all blocks the sum over blocks. Rows before the last are in the middle of
the learning rate's schedule. --log-every has to be no larger than --save-every. --curves is for vit, gpt, dit and mdm.

--variant, with any of the three, puts a class of this file in the place of one of gpt's, to see which part of a
block beats the control: adaln (in the control) or streams (in a block). With --train there are two for mdm: in
training masked tokens get the root of the weight that they have in the bound (root), or all the same (flat). So has
the val loss of these logs. A checkpoint does not know its variant: type it with --resume, too."""
import contextlib
import json
import math
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn

from common import Parser, UserError, about, begin, plain_logits, run, train, write  # first: it sets the path
import gpt
from diffusion_blocks import Masking, average, cross_entropy, seed_of


LONGER = "control, as long as all blocks"  # the row of what lies in OUT/long


# ---- Guesses: functions that give log-probabilities of the targets of x -----------------------------------

def log_p_of_net(net, x):
    """Of a baseline or control."""
    return plain_logits(net, x).log_softmax(-1)


def log_p_of_block(net, b, x):
    """Of block b by itself, asked at z = 0."""
    shape, context = x.shape[:1], ()  # vit: a label for each image
    if hasattr(net, "context"):       # gpt: a token at every position
        shape, context = x.shape, (net.context(x),)

    def logits(_, z, sigma):
        return net.logits(x, z, sigma, *context)
    return average(logits, shape, net.table, net.noise, [b])


def mean_of(guesses):
    """The guess whose log-probabilities are the mean of those of others."""
    def guess(x):
        total = sum(one(x) for one in guesses)
        return (total / len(guesses)).log_softmax(-1)
    return guess


# ---- Scores -----------------------------------------------------------------------------------------------

class HeldOut:
    """The held-out data that vit's or gpt's `evaluate` scores, and the names that it gives to scores."""

    def __init__(self, setup):
        if setup.module.DATA == "text":
            windows = setup.data.held_out(256, setup.config)
            self.pairs = [(w[:, :-1], w[:, 1:]) for w in windows.split(32)]
            self.unit, self.title = "bits per byte", "bits per byte on held-out text"
            self.bytes = setup.data.bytes_per_token
        else:
            images, labels = setup.data.held_out(None, setup.config)
            self.pairs = list(zip(images.split(500), labels.split(500)))
            self.unit, self.title = "bits per label", "held-out images"
            self.bytes = 1

    def score(self, guess):
        """(bits, % of right answers) of a guess, the mean over all targets."""
        nats, right = [], []
        for x, target in self.pairs:
            log_p = guess(x)
            nats.append(cross_entropy(log_p, target).flatten().double())
            right.append((log_p.argmax(-1) == target).flatten().double())
        bits = torch.cat(nats).mean().item() / math.log(2) / self.bytes
        return bits, 100 * torch.cat(right).mean().item()


def networks(setup, part, folders, same_settings=True):
    """The networks of a part in those of the folders that have one."""
    first = train.settings_to_follow(train.checkpoint_path(setup.run.out, setup.model, "block_0"))
    like = train.load(first, setup.model) if first and same_settings else None
    found = []
    for folder in folders:
        if train.checkpoint_path(folder, setup.model, part).exists():
            net, _ = train.trained(setup.module, setup.model, part, folder, setup.device, like)
            found.append(net)
    return found


def blocks_in(setup, folder):
    """The blocks in a folder; none if there is no block 0."""
    if not train.checkpoint_path(folder, setup.model, "block_0").exists():
        return []
    blocks, _ = train.assemble(setup.module, setup.model, folder, setup.device)
    return blocks


def single_networks(setup):
    """{row: network} of baseline, control and the longer control."""
    out = Path(setup.run.out)
    rows = {}
    for row, part, folder in (("end to end", "end_to_end", out), ("control", "control", out),
                              (LONGER, "control", out / "long")):
        for net in networks(setup, part, [folder]):
            rows[row] = net
    return rows


def all_controls(setup):
    """The control, and those of other seeds."""
    out = Path(setup.run.out)
    return networks(setup, "control", [out, *sorted(out.glob("control[0-9]*"))])


def label_tables(setup):
    """Tables of vit or gpt: single networks, and means of several."""
    out = Path(setup.run.out)
    guesses = {row: partial(log_p_of_net, net) for row, net in single_networks(setup).items()}
    controls = all_controls(setup)
    if len(controls) > 1:
        guesses[f"{len(controls)} controls, averaged"] = mean_of([partial(log_p_of_net, c) for c in controls])
    alone = [partial(log_p_of_block, net, b) for b, net in enumerate(blocks_in(setup, out))]
    for b, guess in enumerate(alone):
        guesses[f"block {b} alone"] = guess
    if alone:
        guesses["blocks, averaged"] = mean_of(alone)
    quiet = networks(setup, "block_0", sorted(out.glob("noiseless*")), same_settings=False)
    noiseless = [partial(log_p_of_block, net, 0) for net in quiet]
    for k, guess in enumerate(noiseless):
        guesses[f"block without noise, {k}"] = guess
    if noiseless:
        guesses[f"{len(noiseless)} blocks without noise, averaged"] = mean_of(noiseless)
    if not guesses:
        raise UserError(f"nothing of {setup.model} is trained in {setup.run.out}")
    held_out = HeldOut(setup)
    rows = {}
    for row, guess in guesses.items():
        bits, right = held_out.score(guess)
        rows[row] = {held_out.unit: bits, "accuracy, %": right}
    return {held_out.title: rows}


class MeanOfMasked(nn.Module):
    """What mdm's `evaluate` takes for a baseline: the mean of the log p of blocks, or of controls, at every t."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nets
        self.config, self.noise, self.mask_id = nets[0].config, nets[0].noise, nets[0].mask_id

    def masked_nats(self, z, t, y):
        """Cross-entropy (B,) of y (B, T), summed over the masked places of z (B, T), at times t (B,)."""
        total = sum(net.logits(z, t).log_softmax(-1) for net in self.nets)
        log_p = (total / len(self.nets)).log_softmax(-1)                     # (B, T, V)
        masked = z == self.mask_id                                           # (B, T)
        return (cross_entropy(log_p, y) * masked).sum(1)


def evaluated_tables(setup):
    """Tables of any other model: what its own `evaluate` says, also of the longer control."""
    blocks, state = train.assemble(setup.module, setup.model, setup.run.out, setup.device)
    others = single_networks(setup)
    if setup.model == "mdm":
        controls = all_controls(setup)
        if len(controls) > 1:
            others[f"{len(controls)} controls, averaged"] = MeanOfMasked(controls)
        others["mean of the blocks at every t"] = MeanOfMasked(blocks)
        for b, net in enumerate(blocks):
            others[f"block {b} at every t"] = net
    torch.manual_seed(seed_of(state["training"]["seed"], "eval"))
    return setup.module.evaluate(blocks, others, setup.data)


# ---- Scores on the way ------------------------------------------------------------------------------------

def train_and_keep(argv):
    """What train.py does with these flags; a copy of each checkpoint, without moments, stays in OUT/at_N."""
    save = train.save

    def save_and_keep(path, content):
        save(path, content)
        if isinstance(content, dict):  # a checkpoint, not a log
            folder = path.parents[1] / f"at_{content['step']}" / path.parent.name
            save(folder / path.name, {**content, "optimizer": {}})
    with patch.object(train, "save", save_and_keep):
        train.main(argv)


class Minutes:
    """How long parts were trained until an update, from their logs, with validation and saving."""

    def __init__(self, folder):
        self.logs = {}
        for log in folder.glob("*.jsonl"):
            self.logs[log.stem] = [json.loads(line) for line in log.read_text().splitlines()]

    def until(self, part, step):
        """A log line has the mean of all updates before it."""
        ms = [row["ms"] for row in self.logs[part] if row["step"] <= step][-1]
        return step * ms / 60_000


def kept(out, model):
    """[(update, folder)] of what --train has kept in a folder, in the order of updates."""
    folders = [f for f in Path(out).glob("at_*") if (f / model).is_dir()]
    return sorted((int(f.name.removeprefix("at_")), f) for f in folders)


def label_curves(setup):
    """{what: {update: {column: number}}} of vit or gpt, at all updates whose checkpoints were kept."""
    held_out, minutes = HeldOut(setup), Minutes(setup.folder)

    def row(guess, time):
        bits, right = held_out.score(guess)
        return {"bits": bits, "right, %": right, "minutes": time}
    tables = {"end to end": {}, "control": {}, "blocks, averaged": {}, "best block alone": {}}
    for step, folder in kept(setup.run.out, setup.model):
        blocks, state = train.assemble(setup.module, setup.model, folder, setup.device)
        for name, part in (("end to end", "end_to_end"), ("control", "control")):
            net, _ = train.trained(setup.module, setup.model, part, folder, setup.device, state)
            tables[name][step] = row(partial(log_p_of_net, net), minutes.until(part, step))
        alone = [partial(log_p_of_block, net, b) for b, net in enumerate(blocks)]
        times = [minutes.until(f"block_{b}", step) for b in range(len(blocks))]
        tables["blocks, averaged"][step] = row(mean_of(alone), sum(times))
        each = [row(guess, time) for guess, time in zip(alone, times)]
        # chosen on the same held-out data
        tables["best block alone"][step] = min(each, key=lambda scores: scores["bits"])
    return tables


# what `evaluate` calls the table of these models' scores
TITLES = {"dit": "denoising loss on held-out images", "mdm": "bits per byte on held-out text (bound)"}


def evaluated_curves(setup):
    """The same of dit or mdm, also of OUT/long, whose updates are counted by themselves."""
    out, model = Path(setup.run.out), setup.model
    tables = {"end to end": {}, "control": {}, "blocks": {}, LONGER: {}}
    minutes, minutes_long = Minutes(setup.folder), Minutes(out / "long" / model)

    def evaluated(blocks, others, state):
        torch.manual_seed(seed_of(state["training"]["seed"], "eval"))
        return setup.module.evaluate(blocks, others, setup.data)[TITLES[model]]
    for step, folder in kept(out, model):
        blocks, state = train.assemble(setup.module, model, folder, setup.device)
        others = {}
        for name, part in (("end to end", "end_to_end"), ("control", "control")):
            others[name], _ = train.trained(setup.module, model, part, folder, setup.device, state)
        times = {"end to end": minutes.until("end_to_end", step), "control": minutes.until("control", step),
                 "blocks": sum(minutes.until(f"block_{b}", step) for b in range(len(blocks)))}
        for name, scores in evaluated(blocks, others, state).items():
            tables[name][step] = {**scores, "minutes": times[name]}
    for step, folder in kept(out / "long", model):
        net, state = train.trained(setup.module, model, "control", folder, setup.device)
        scores = evaluated([net], {}, state)["blocks"]  # as if the control were a single block
        tables[LONGER][step] = {**scores, "minutes": minutes_long.until("control", step)}
    return tables


# ---- Parts of a block of gpt ------------------------------------------------------------------------------

class Modulated(gpt.EndToEnd):
    """gpt's control with a block's adaLN, whose condition is the same for all inputs."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(gpt.Layer(config, modulated=True) for _ in range(config.n_layer))
        self.noise_embedding = gpt.NoiseEmbedding(config.n_cond)
        self.modulation = nn.Linear(config.n_cond, 2 * config.n_embd)
        gpt.init_weights(self)

    def features(self, x, cache=None):
        """(B, T, C) of tokens x (B, T). There is no cache: nothing is generated."""
        level = torch.ones(1, device=x.device)
        cond = self.noise_embedding(level)                                   # (1, 1, n_cond)
        h = self.embed(x)                                                    # (B, T, C)
        for layer in self.layers:
            h, _ = layer(h, cond=cond)                                       # (B, T, C)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)                # (1, 1, C) each
        return self.norm(h) * (1 + scale) + shift, None                      # (B, T, C)


class TwoStreams(gpt.Block):
    """gpt's block without adaLN and without z. A learned vector tells a slot from its clean token: without
    it, both would be the same computation."""

    def __init__(self, config, b):
        super().__init__(config, b)
        for part in (self, *self.layers):
            part.modulation.requires_grad_(False)  # stays zero
        self.z_in = nn.Linear(config.n_embd, config.n_embd)
        nn.init.zeros_(self.z_in.weight.requires_grad_(False))
        nn.init.zeros_(self.z_in.bias)  # the vector


# ---- Variants ---------------------------------------------------------------------------------------------

bound_weight = Masking.weight


def root_weight(noise, t):
    return bound_weight(noise, t).sqrt()


def flat_weight(noise, t):
    return torch.ones_like(t)


CLASSES_OF_GPT = {"adaln": ("EndToEnd", Modulated), "streams": ("Block", TwoStreams)}
WEIGHTS_OF_MDM = {"root": root_weight, "flat": flat_weight}


def varied(name, model, trains):
    """A context in which gpt.py has a variant's class, or `Masking` its weight; without a variant nothing changes."""
    if name is None:
        return contextlib.nullcontext()
    if name in CLASSES_OF_GPT:
        if model != "gpt":
            raise UserError(f"--variant {name} is for --model gpt")
        return patch.object(gpt, *CLASSES_OF_GPT[name])
    if model != "mdm" or not trains:
        raise UserError(f"--variant {name} is for --model mdm --train: the bound that is scored has its own weight")
    return patch.object(Masking, "weight", WEIGHTS_OF_MDM[name])


@torch.no_grad()
def score(own, argv, rest):
    """Score what is there, and write the report."""
    setup = begin([*rest, "--eval"])
    labels = setup.model in ("vit", "gpt")
    if own.curves and not labels and setup.model not in TITLES:
        raise UserError(f"--curves is for vit, gpt, dit and mdm, not {setup.model}")
    if own.curves:
        name, tables = "curves", label_curves(setup) if labels else evaluated_curves(setup)
    elif labels:
        name, tables = "compare", label_tables(setup)
    else:
        name, tables = "compare", evaluated_tables(setup)
    report = {**about("compare", argv), "config": train.flat(setup.config), "data": setup.data.about,
              "tables": tables}
    write(setup.folder / f"{name}.json", report)


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--train", action="store_true", help="train as train.py does, and keep every checkpoint")
    parser.add_argument("--curves", action="store_true", help="score every checkpoint that was kept")
    parser.add_argument("--variant", choices=[*CLASSES_OF_GPT, *WEIGHTS_OF_MDM],
                        help="a class of this file in gpt, or a weight in mdm (default: none)")
    own, rest = parser.parse_known_args(argv)
    if own.train and own.curves:
        raise UserError("first --train, then --curves")
    action = [] if own.train else ["--eval"]
    with varied(own.variant, train.parse([*rest, *action]).model, own.train):
        if own.train:
            train_and_keep(rest)
        else:
            score(own, argv, rest)


if __name__ == "__main__":
    run(main)
