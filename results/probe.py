"""What an evaluation does beyond the main figures, of the blocks, baseline and control in OUT:

    python results/probe.py --model gpt --out out [--steps]    # writes OUT/gpt/probe.json

Minutes on a CPU core: 2 to 20. --steps needs a judge in OUT: for dit the end-to-end vit.py, for mdm gpt.py's.
curve: the loss of every block at every noise level, also where it was not trained; beside it the exact
posterior from z alone, without a network, baseline and control. "z = 0": the block without a noisy target.
steps: what the sampler makes of another number of levels, and without a block (the chain skips its levels);
generated text or images."""
import math

import torch

from common import Parser, UserError, about, begin, load, plain_logits, run, write  # first: it sets the path
import dit
import mdm
from diffusion_blocks import bayes_logits, cross_entropy, decode_labels
from frechet import batched, frechet_distance, judge_of

LEVELS = (1, 2, 3, 4, 5, 8, 16, 32, 64)  # of a chain, or passes


def sigma_grid(noise):
    """41 levels at equal steps of ln sigma, both ends exact."""
    ratio = noise.sigma_max / noise.sigma_min
    return [noise.sigma_min * ratio ** (i / 40) for i in range(40)] + [noise.sigma_max]


def without(noise, b, steps):
    """The levels of `steps` that block b does not own; without block 0 a chain begins below its interval."""
    return torch.stack([s for s in steps if noise.block_of(s.item()) != b])


# ---- vit, gpt and recurrent, which denoise labels or tokens -----------------------------------------------

def denoiser(model, blocks, x, target):
    """logits(b, z, sigma) of block b given x, as `decode_labels` takes it."""
    if model == "vit":
        return lambda b, z, sigma: blocks[b].logits(x, z, sigma)
    if model == "gpt":
        contexts = [block.context(x) for block in blocks]
        return lambda b, z, sigma: blocks[b].logits(x, z, sigma, contexts[b])
    e, _ = blocks[0].condition(x)
    return lambda b, z, sigma: blocks[0].logits(e, z, sigma)[0]


class Labels:
    """Held-out batches (x, target, logits), and means over them; few images are taken several times."""

    def __init__(self, setup, blocks):
        config, data, size = setup.config, setup.data, 1.0
        self.noise, self.table = blocks[0].noise, blocks[0].table
        if setup.model == "vit":
            images, labels = data.held_out(None, config)
            pairs = list(zip(images.split(500), labels.split(500))) * max(1, 2000 // len(images))
            self.unit, self.prior = "bits per label", torch.zeros(config.n_class, device=setup.device)
        else:
            at_once = max(1, min(16, 2 ** 27 // (config.vocab_size * config.seq_len)))
            pairs = [(w[:, :-1], w[:, 1:]) for w in data.held_out(64, config).split(at_once)]
            self.unit, self.prior, size = "bits per byte", data.unigram(), data.bytes_per_token
        self.batches = [(x, target, denoiser(setup.model, blocks, x, target)) for x, target in pairs]
        self.count = sum(target.numel() for _, target in pairs)
        self.scale = 1 / (math.log(2) * size * self.count)

    def total(self, score):
        """The sum of score(x, target, logits) over all batches; the same noise in every call."""
        torch.manual_seed(0)
        return sum(score(*batch) for batch in self.batches)

    def at(self, sigma, b, logits=None):
        """Bits of block b, or of other logits, at one level."""
        def nats(x, target, own):
            level = torch.full((len(target),), sigma, device=target.device)
            z = self.noise.corrupt(self.table[target], level)
            return cross_entropy((logits or own)(b, z, level), target).sum().item()
        return self.scale * self.total(nats)

    def z_alone(self, b, z, sigma):
        """Logits of the exact posterior from z and the frequencies of the targets, whatever the block."""
        return bayes_logits(self.prior, z, sigma, self.table)

    def plain(self, net, *how):
        """Bits of a baseline or control."""
        return self.scale * self.total(
            lambda x, target, _: cross_entropy(plain_logits(net, x, *how), target).sum().item())

    def chain(self, steps):
        """How many targets are right at the end of a chain over the levels `steps`."""
        return {name: 100 / self.count * self.total(lambda x, target, logits: (decode_labels(
            logits, target.shape, self.table, self.noise, steps, temperature) == target).sum().item())
            for name, temperature in (("from z = 0, %", 0.0), ("from noise, %", 1.0))}


def label_curve(setup, blocks, baseline, control):
    labels, levels, own = Labels(setup, blocks), sigma_grid(blocks[0].noise), range(len(blocks))
    return {"level": levels, "unit": labels.unit,
            "blocks": [[labels.at(s, b) for s in levels] for b in own],
            "z alone": [labels.at(s, 0, logits=labels.z_alone) for s in levels],
            "baseline": labels.plain(baseline), "control": labels.plain(control)}


def label_steps(setup, blocks, baseline, control):
    """The chain over the number of its levels, and without each block; of recurrent the baseline's passes."""
    labels, noise = Labels(setup, blocks), blocks[0].noise
    if setup.model == "recurrent":
        return {"levels": {n: {f"baseline, {labels.unit}": labels.plain(baseline, n)} | (
            labels.chain(noise.steps(n)) if n > 1 else {}) for n in LEVELS}}
    tables = {"levels": {n: labels.chain(noise.steps(n)) for n in LEVELS if n > 1},
              "left out": {"none": labels.chain(noise.steps(16))}}
    for b in range(len(blocks)) if len(blocks) > 1 else ():
        tables["left out"][f"block {b}"] = labels.chain(without(noise, b, noise.steps(16)))
    return tables | ({} if setup.model == "vit" else {"text": continued_text(setup, blocks, baseline)})


# ---- Text -------------------------------------------------------------------------------------------------

def score_text(judge, tokens, start, data):
    """Tokens from `start` on of rows (N, T): bits per byte under a judge, and what tells a text that repeats
    itself, which any judge likes."""
    new, logits = tokens[:, start:], plain_logits(judge, tokens[:, :-1])[:, start - 1:]
    pairs = torch.stack([new[:, :-1], new[:, 1:]], dim=-1).flatten(0, 1)     # (N * (length - 1), 2)
    p = torch.bincount(new.flatten().cpu()).double() / new.numel()
    bits = cross_entropy(logits, new).mean().item() / math.log(2)
    return {"judge, bits per byte": bits / data.bytes_per_token,
            "distinct-2": len(pairs.unique(dim=0)) / len(pairs),
            "unigram entropy, bits": torch.special.entr(p).sum().item() / math.log(2)}


def continued_text(setup, blocks, baseline):
    """Half a window after held-out quarters of one; the judge is the baseline, which favours its own text."""
    start, stop = setup.config.seq_len // 4, 3 * setup.config.seq_len // 4
    held_out = setup.data.held_out(64, setup.config)[:, :stop]

    def score(nets, **how):
        torch.manual_seed(0)
        tokens = setup.module.generate(nets, held_out[:, :start], stop - start, **how)
        return score_text(baseline, tokens, start, setup.data)
    ways = {"baseline": (baseline, {}), "blocks, averaged": (blocks, {}),
            "blocks, 32 levels": (blocks, {"sampler": "euler", "euler_steps": 32})}
    return {"held-out text": score_text(baseline, held_out, start, setup.data)} | {
        f"{name}, temperature {t}": score(nets, temperature=t, **how)
        for name, (nets, how) in ways.items() for t in (0.0, 0.7, 0.85, 1.0)}


# ---- mdm --------------------------------------------------------------------------------------------------

def masked_bits(nets, data):
    """Times t, and for each of nets a list of bits per masked byte at these times."""
    windows, noise = data.held_out(256, nets[0].config)[:, :-1], nets[0].noise
    times, found = [(i + 0.5) / 24 for i in range(24)], [[] for _ in nets]
    for t in times:
        torch.manual_seed(0)
        level = torch.full((len(windows),), t, device=windows.device)
        z = noise.corrupt(windows, level)
        scale = 1 / (math.log(2) * data.bytes_per_token * (z == noise.mask_id).sum().item())
        for net, row in zip(nets, found):
            parts = zip(z.split(32), level.split(32), windows.split(32))
            row.append(scale * sum(net.masked_nats(*part).sum().item() for part in parts))
    return times, found


def mdm_curve(setup, blocks, baseline, control):
    times, (*of_blocks, of_baseline, of_control) = masked_bits([*blocks, baseline, control], setup.data)
    return {"level": times, "unit": "bits per masked byte", "blocks": of_blocks, "baseline": of_baseline,
            "control": of_control}


def mdm_steps(setup, blocks, baseline, control):
    """Text made from masks alone, over the number of moves, under the end-to-end gpt.py in the same OUT."""
    judge, windows = judge_of(setup), setup.data.held_out(64, setup.config)[:, :-1]
    rows = {"held-out text": score_text(judge, windows, 1, setup.data)}
    for n in (4, 8, 16, 32, 64, 128, 256):
        for name, nets in (("blocks", blocks), ("baseline", baseline)):
            torch.manual_seed(0)
            masks = torch.full_like(windows, blocks[0].noise.mask_id)
            tokens = mdm.fill(nets, masks, mdm.Sampling(n_moves=n))
            rows[f"{name}, {n} moves"] = score_text(judge, tokens, 1, setup.data)
    return {"text": rows}


# ---- dit --------------------------------------------------------------------------------------------------

def dit_curve(setup, blocks, baseline, control):
    images, label = setup.data.held_out(1000, setup.config)
    levels = sigma_grid(blocks[0].noise)

    def loss(net):  # of this network, whoever owns the level
        return [dit.denoising_loss([net] * net.noise.n_blocks, images, label, s) for s in levels]
    return {"level": levels, "unit": "weighted squared error per pixel", "baseline": loss(baseline),
            "control": loss(control), "blocks": [loss(net) for net in blocks]}


def dit_steps(setup, blocks, baseline, control):
    """Frechet distance on the features of our own vit, over the number of levels and without each block."""
    judge, label = judge_of(setup), torch.arange(2000, device=setup.device) % setup.config.n_class
    of_held_out = batched(judge.features, setup.data.held_out(None, setup.config)[0])
    noise, grid = blocks[0].noise, blocks[0].noise.steps

    def score(nets, n):
        torch.manual_seed(0)
        images = dit.generate_images(nets, label, n)
        right = (batched(judge.logits, images).argmax(-1) == label).float().mean().item()
        return {"Frechet distance": frechet_distance(batched(judge.features, images), of_held_out),
                "of its class, %": 100 * right}
    tables = {"levels": {n: {"blocks": score(blocks, n), "baseline": score(baseline, n)}
                         for n in (4, 6, 10, 20, 50, 100)}, "left out": {"none": score(blocks, 50)}}
    for b in range(len(blocks)) if len(blocks) > 1 else ():
        noise.steps = lambda n: without(noise, b, grid(n))
        tables["left out"][f"block {b}"] = score(blocks, 50)
    return tables


@torch.no_grad()
def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--steps", action="store_true")
    own, rest = parser.parse_known_args(argv)
    setup = begin([*rest, "--eval"])
    known = dict.fromkeys(("vit", "gpt", "recurrent"), (label_curve, label_steps)) | {
        "dit": (dit_curve, dit_steps), "mdm": (mdm_curve, mdm_steps)}
    if setup.model not in known:
        raise UserError(f"probe.py knows {', '.join(known)}, not {setup.model}")
    nets = load(setup)
    if own.steps and setup.model in ("dit", "mdm"):
        judge_of(setup)  # if it is missing, this is the time to say so
    (curve, steps), noise = known[setup.model], nets[0][0].noise
    print("curve: the loss at every noise level", flush=True)
    report = about("probe", argv) | {"intervals": [noise.interval(b) for b in range(len(nets[0]))],
                                     "curve": curve(setup, *nets)}
    if own.steps:
        print("steps: other numbers of levels, and levels left out", flush=True)
        report["steps"] = steps(setup, *nets)
    write(setup.folder / "probe.json", report)


if __name__ == "__main__":
    run(main)
