"""The promises of this project, as tests: CPU, no network, small networks. Run: pytest test_all.py"""
import argparse
import contextlib
import copy
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import diffusion_blocks
import dit
import gpt
import mdm
import recurrent
import train
import vit
from data import UserError, augment, images, text
from diffusion_blocks import (LabelScores, LogNormal, Masking, average, bayes_logits, bound_draws,
                              cross_entropy, decode_labels, edm_logits, euler, score_loss, split_layers,
                              target_table, token_losses, windows_at_once)

HERE = Path(train.__file__).parent
sys.path.append(str(HERE / "results"))
import bench  # noqa: E402
import check_gpu  # noqa: E402
import compare  # noqa: E402
import cups  # noqa: E402
import mlp  # noqa: E402
from frechet import frechet_distance  # noqa: E402

# a test that pins numbers or text of the present code; a fork that changes them: pytest -m "not reference"
warnings.filterwarnings("ignore", "Unknown pytest.mark.reference")
reference = pytest.mark.reference

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also where there is an NVIDIA GPU, and in child processes

MODELS = (gpt, vit, dit, mdm, recurrent)
EDM = dict(p_mean=-1.2, p_std=1.2)  # the paper's noise
TEXT = dict(EDM, n_head=2, n_embd=32, n_cond=8, seq_len=16, vocab_size=64)
IMAGE = dict(EDM, n_layer=4, n_head=2, n_embd=32, n_cond=8, n_mlp=64, patch_size=2,
             image_size=8, n_channel=3, n_class=10, data_mean=.1, data_std=.6)
SIZES = {
    gpt: dict(TEXT, n_layer=4),
    vit: IMAGE,
    dit: IMAGE,
    mdm: dict(TEXT, n_layer=4),
    recurrent: dict(TEXT, n_prelude=1, n_core=2, n_coda=1, mean_passes=4, grad_passes=2),
}
FIXED = torch.Generator().manual_seed(5)
TOKENS = torch.randint(64, (6, 17), generator=FIXED)
IMAGES = torch.rand(6, 3, 8, 8, generator=FIXED) * 2 - 1
LABELS = torch.randint(10, (6,), generator=FIXED)
BATCH = {
    gpt: TOKENS,
    vit: (IMAGES, LABELS),
    dit: (IMAGES, LABELS),
    mdm: TOKENS,
    recurrent: TOKENS,
}


@pytest.fixture(autouse=True)
def clean(place, monkeypatch):
    """What train.main changes in its process is as it was: signal handlers, signals that came, threads."""
    monkeypatch.setattr(data, "DATA_DIR", place / "data")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.STOP.clear()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def name_of(module):
    return module.__name__


def each(*modules):
    """A test that runs once for each of the modules, which it gets as `module`."""
    return pytest.mark.parametrize("module", modules, ids=name_of)


def tiny(module, **changes):
    """A Config of four layers of width 32 in two blocks; changes name fields of it or of its noise."""
    values = {"n_blocks": 2, **SIZES[module], **changes}
    if module is recurrent:
        values["n_blocks"] = 1
    return train.replaced(module.Config(), values)


def randomised(net, scale=.1):
    """A network with every parameter moved, by draws that its name decides: no path is closed by zeros."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p += scale * torch.randn(p.shape, generator=generator)
    return net


def blocks_of(module, **changes):
    """All blocks of a tiny model, with every parameter moved."""
    config = tiny(module, **changes)
    return [randomised(module.Block(config, b)) for b in range(config.noise.n_blocks)]


def baseline_of(module, **changes):
    """The baseline of a tiny model, with every parameter moved."""
    return randomised(module.EndToEnd(tiny(module, **changes)))


def nets_of(module, part):
    """The list of "blocks" of a tiny model, or its baseline, "end_to_end"."""
    return blocks_of(module) if part == "blocks" else baseline_of(module)


@dataclass
class Evaluation:
    """What the network of a block was asked, and its answer."""
    block: int
    level: float          # sigma or t, the same for all examples
    z: torch.Tensor
    answer: torch.Tensor  # logits, of dit the denoised images


def record_evaluations(module, monkeypatch):
    """A list that fills with an Evaluation each time that the network of a block is asked."""
    name = "denoise" if module is dit else "logits"
    original = getattr(module.Block, name)
    signature = inspect.signature(original)
    evaluations = []

    def recorded(self, *args, **keywords):
        given = signature.bind(self, *args, **keywords).arguments
        level = given["t"] if module is mdm else given["sigma"]
        assert level.shape == (len(given["z"]),)
        assert (level == level[0]).all()
        result = original(self, *args, **keywords)
        answer = result[0] if module is recurrent else result  # recurrent returns a cache, too
        evaluations.append(Evaluation(self.b, level[0].item(), given["z"], answer))
        return result
    monkeypatch.setattr(module.Block, name, recorded)
    return evaluations


def record_arguments(module, name, monkeypatch):
    """A list that fills with {parameter: value} of each call of a function of a module."""
    original = getattr(module, name)
    signature = inspect.signature(original)
    calls = []

    def recorded(*args, **keywords):
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return original(*args, **keywords)
    monkeypatch.setattr(module, name, recorded)
    return calls


# ---- Golden values, computed with the first version of this code (commit 7bfb360) -------------------------

# Loss and sum of |gradients| of a fresh network, and of one with every parameter moved. The recurrent
# baseline's are of the old code with the two changes that the new one makes: the first state is drawn by
# erfinv, and the passes are 1 + Poisson(3), so the mean is mean_passes. vit's blocks: since gates start at 1.
GOLDEN = [
    (gpt, "block_0", 2.066228, 47.52098, 2.185629, 149.9363),
    (gpt, "block_1", .3053154, 18.03651, .2951656, 60.28576),
    (gpt, "end_to_end", 4.158187, 69.75466, 4.292978, 317.9784),
    (gpt, "control", 4.18109, 55.58989, 4.293616, 183.6529),
    (vit, "block_0", 1.62422, 216.6492, 2.57153, 462.3892),
    (vit, "block_1", .4822856, 125.3076, .7110007, 277.8672),
    (vit, "end_to_end", 2.783963, 399.9604, 3.202677, 582.4865),
    (vit, "control", 2.418402, 232.2355, 2.548443, 454.3647),
    (dit, "block_0", 1.04864, 8.054747, 1.395229, 37.71406),
    (dit, "block_1", 1.058097, 6.045897, 1.391394, 35.49639),
    (dit, "end_to_end", 1.036943, 6.798394, 1.390885, 61.8035),
    (dit, "control", 1.036943, 6.867258, 1.372071, 35.78201),
    (mdm, "block_0", 4.08305, 21.20951, 4.438284, 135.9221),
    (mdm, "block_1", 3.274767, 31.30708, 3.398198, 166.372),
    (mdm, "end_to_end", 3.39958, 23.70708, 3.518213, 194.4144),
    (mdm, "control", 3.39958, 23.38088, 3.563424, 133.4495),
    (recurrent, "block_0", 1.483386, 67.58465, 1.585702, 167.4994),
    (recurrent, "end_to_end", 4.343582, 113.2207, 4.500504, 275.9472),
    (recurrent, "control", 4.402275, 106.4613, 4.456502, 261.4965),
]


def loss_and_size_of_gradients(module, config, part, moved):
    """The loss of a network on BATCH, and the sum of its |gradients|; its parameters are moved that far."""
    torch.manual_seed(0)
    net = randomised(train.build(module, config, part), moved)
    torch.manual_seed(1)
    loss = net(BATCH[module])
    loss.backward()
    size = 0.0
    for p in net.parameters():
        if p.grad is not None:
            size += p.grad.double().abs().sum().item()
    return loss.item(), size


@reference
@pytest.mark.parametrize("module, part, loss, gradients, moved_loss, moved_gradients", GOLDEN)
def test_losses_and_gradients_are_those_of_the_first_version(module, part, loss, gradients, moved_loss,
                                                             moved_gradients):
    config = tiny(module)
    if module is vit:  # above the noise at which z alone names the label, where a loss would be all rounding
        config = tiny(vit, sigma_min=.3)

    fresh = loss_and_size_of_gradients(module, config, part, moved=0.0)
    moved = loss_and_size_of_gradients(module, config, part, moved=.1)

    assert fresh == pytest.approx((loss, gradients), rel=1e-5)
    assert moved == pytest.approx((moved_loss, moved_gradients), rel=1e-5)


def golden_nets(module, part):
    """As `nets_of`, and torch's random numbers in a known state."""
    torch.manual_seed(0)
    nets = nets_of(module, part)
    torch.manual_seed(2)
    return nets


@reference
@pytest.mark.parametrize("module, part, settings, expected", [
    (gpt, "blocks", dict(sampler="chain"), [26, 20, 21, 63, 8, 28, 35, 33, 5, 22]),
    (gpt, "end_to_end", {}, [41, 43, 14, 22, 10, 63, 56, 4]),
    (recurrent, "blocks", dict(n_passes=4), [51, 8, 22, 47, 27, 42, 59, 18]),
    (recurrent, "end_to_end", dict(n_passes=3), [59, 38, 63, 63, 5]),
])
def test_text_is_that_of_the_first_version(module, part, settings, expected):
    nets = golden_nets(module, part)
    text = module.generate(nets, torch.tensor([[1, 2, 3]]), len(expected), **settings)
    assert text[0, 3:].tolist() == expected


@reference
def test_filled_masks_labels_and_images_are_those_of_the_first_version():
    masks = torch.full((1, 16), 64)
    text = mdm.fill(golden_nets(mdm, "blocks"), masks, mdm.Sampling(n_moves=8))
    assert text[0, -8:].tolist() == [50, 0, 14, 52, 10, 17, 3, 22]

    labels = vit.classify(golden_nets(vit, "blocks"), IMAGES, "chain", 4, temperature=1.0)
    assert labels.tolist() == [6, 1, 3, 3, 3, 3]

    images = dit.generate_images(golden_nets(dit, "blocks"), LABELS, 6, 1.5)
    assert images.abs().sum().item() == pytest.approx(602.6353, rel=1e-4)


@reference
def test_levels_noise_and_masks_are_drawn_as_in_the_first_version():
    noise, masking = LogNormal(3), Masking(3)
    y = target_table(20, 8, 0)[:6]
    lowest = torch.full((6,), noise.sigma_min)
    tokens = TOKENS[:, :-1]

    sigma = noise.sample(1, 3).tolist()
    t = masking.sample(1, 2).tolist()
    size_of_noise = (noise.corrupt(y, lowest) - y).abs().sum(1).mean().item()
    shares = []  # of a bound to which each masked token adds 1
    for b in range(3):
        share = 0.0
        for level, density in bound_draws(masking, b, tokens):
            n_masked = (masking.corrupt(tokens, level, 64) == 64).sum(1)
            share += (density * n_masked).mean().item() / 4
        shares.append(share)

    assert sigma == pytest.approx([.24797505, .32497409, .429831], rel=1e-5)
    assert t == pytest.approx([.48547041, .66880375], rel=1e-5)
    assert size_of_noise == pytest.approx(.010794488, rel=1e-5)
    assert shares == pytest.approx([5.4013019, 5.3454314, 6.9884796], rel=1e-5)


# ---- Noise levels and their division among blocks ---------------------------------------------------------

def test_layers_are_cut_evenly_or_as_told():
    first, second, third = split_layers(12, 3)
    assert (first, second, third) == (range(0, 4), range(4, 8), range(8, 12))
    first, second, third = split_layers(12, 3, "3,6,3")
    assert (first, second, third) == (range(0, 3), range(3, 9), range(9, 12))


@pytest.mark.parametrize("n_layer, n_blocks, split", [
    (12, 5, ""),         # no whole number each
    (2, 3, ""),          # a block would be empty
    (0, 1, ""),
    (12, 0, ""),
    (12, 3, "4,9,1"),    # more than there are
    (12, 3, "6,6"),      # too few blocks
    (12, 3, "3,3,3,3"),  # too many
    (12, 3, "0,6,6"),    # an empty block
    (12, 3, "6,6,0"),
    (12, 3, "6,x,6"),
    (12, 3, "6,,6"),
    (12, 3, "-1,7,6"),
])
def test_layers_that_do_not_fit_are_refused(n_layer, n_blocks, split):
    with pytest.raises(ValueError, match="layers cannot be cut"):
        split_layers(n_layer, n_blocks, split)


@pytest.mark.parametrize("boundaries", [
    [.002, .3012, 80],
    [.002, .1796, .5050, 80],
    [.002, .1341, .3012, .6766, 80],
])
def test_levels_are_divided_by_the_papers_formula(boundaries):
    noise = LogNormal(n_blocks=len(boundaries) - 1)
    assert noise.boundaries == pytest.approx(boundaries, abs=5e-5)        # computed by hand


def test_levels_are_divided_evenly_in_ln_sigma_or_as_told():
    uniform = LogNormal(2, sigma_min=.01, sigma_max=100, edges="uniform")
    assert uniform.boundaries == pytest.approx([.01, 1, 100])
    for edges in ("0.1,7", "1e-1,7", " .1, 7e0"):
        noise = LogNormal(3, edges=edges)
        assert noise.interval(0) == (7, 80)
        assert noise.interval(1) == (.1, 7)
        assert noise.interval(2) == (.002, .1)


@pytest.mark.parametrize("edges", [
    "7", "1,2,3",                 # of another number of blocks
    "7,1", "1,1",                 # not rising
    "100,1", "1,100", "0.001,1",  # outside of all levels
    "-1,7", "nan,7", "1,inf", "1,seven", "",
])
def test_edges_that_do_not_fit_are_refused(edges):
    with pytest.raises(ValueError, match="edges"):
        LogNormal(3, edges=edges)


@pytest.mark.parametrize("kind, wrong", [
    (LogNormal, dict(sigma_min=90.0)),
    (LogNormal, dict(sigma_min=0.0)),
    (LogNormal, dict(p_std=0.0)),
    (LogNormal, dict(p_mean=math.nan)),
    (LogNormal, dict(sigma_max=math.inf)),
    (LogNormal, dict(sigma_data=0.0)),
    (LogNormal, dict(gamma=-1.0)),
    (LogNormal, dict(n_blocks=0)),
    (LogNormal, dict(weighting="EDM")),
    (Masking, dict(gamma=-1.0)),
    (Masking, dict(n_blocks=0)),
    (Masking, dict(schedule="square")),
    (Masking, dict(eps=0.0)),
    (Masking, dict(eps=.5)),
])
def test_noise_that_cannot_be_is_refused_by_the_name_of_its_setting(kind, wrong):
    name, = wrong
    with pytest.raises(ValueError, match=name):
        kind(**wrong)


@pytest.mark.parametrize("far", [
    dict(p_mean=60.0),                                       # all levels are below
    dict(p_mean=-60.0),                                      # or above
    dict(p_mean=0.0, p_std=.1, n_blocks=8, edges="uniform"),   # those of an outer block
    dict(p_mean=4.0, p_std=.1, n_blocks=3, edges=".05,.5"),
])
def test_levels_that_would_never_be_drawn_are_refused_in_one_line(far):
    with pytest.raises(data.UserError, match="37 p_std") as refused:
        train.replaced(gpt.Config(n_layer=24), far)
    assert "\n" not in str(refused.value)


def test_levels_are_drawn_up_to_36_standard_deviations_away_on_either_side():
    far_above = LogNormal(p_mean=math.log(80) + 36, p_std=1.0)
    far_below = LogNormal(p_mean=math.log(.002) - 36, p_std=1.0)
    highest = far_above.sample(0, 1000)
    lowest = far_below.sample(0, 1000)
    # in the tail at x, what is drawn beyond it is about exponential, with mean 1 / x
    assert (80 / highest).log().mean().item() == pytest.approx(1 / 36, rel=.01)
    assert (lowest / .002).log().mean().item() == pytest.approx(1 / 36, rel=.01)


def probability(noise, lo, hi):
    """Of sigma in [lo, hi] before it is cut, by the tail on whose side that lies: 1 - 1e-20 would be 1."""
    a = (math.log(lo) - noise.p_mean) / noise.p_std / math.sqrt(2)
    b = (math.log(hi) - noise.p_mean) / noise.p_std / math.sqrt(2)
    if a > 0:
        return (math.erfc(a) - math.erfc(b)) / 2
    return (math.erfc(-b) - math.erfc(-a)) / 2


@pytest.mark.parametrize("noise", [LogNormal(4, gamma=.1), LogNormal(6, edges="uniform", p_std=.4)])
def test_draws_follow_the_log_normal_cut_to_the_widened_interval_even_in_the_far_tails(noise):
    for b in range(noise.n_blocks):
        lo, hi = noise.interval(b)
        overlap = (hi / lo) ** noise.gamma
        lo = max(lo / overlap, .002)
        hi = min(hi * overlap, 80)
        everything = probability(noise, lo, hi)

        drawn = sorted(noise.sample(b, 1000).tolist())

        for i, sigma in enumerate(drawn):  # stratified: each lies in its 1000th
            below = probability(noise, lo, sigma) / everything
            assert below == pytest.approx((i + .5) / 1000, abs=6e-4)


def test_the_median_of_draws_is_known_in_the_far_tail():
    noise = LogNormal(6, edges="uniform", p_std=.4)
    assert noise.sample(0, 1001).median().item() == pytest.approx(12.9, abs=.05)


ONE_OWNER = [
    LogNormal(1),
    LogNormal(4),
    LogNormal(4, edges="uniform"),
    LogNormal(4, edges="0.05,0.5,2"),
    Masking(3),
    Masking(5, schedule="cosine"),
]


@pytest.mark.parametrize("noise", ONE_OWNER)
def test_each_level_has_one_owner_the_same_in_training_and_in_sampling(noise):
    last = noise.n_blocks - 1
    noise = replace(noise, gamma=0.0)
    for b in range(noise.n_blocks):
        lo, hi = noise.interval(b)
        assert noise.block_of(hi) == b                       # lo < level <= hi
        assert noise.block_of(math.nextafter(lo, 99)) == b
        assert noise.block_of(lo) == min(b + 1, last)        # and the lowest level has an owner, too
        drawn = noise.sample(b, 200)                         # in float32
        assert lo * .99999 <= drawn.min()
        assert drawn.max() <= hi * 1.00001


@pytest.mark.parametrize("noise", ONE_OWNER)
def test_block_0_owns_the_highest_levels_and_nobody_those_outside(noise):
    assert noise.interval(0)[1] == noise.boundaries[-1]
    for outside in (noise.boundaries[0] - .001, noise.boundaries[-1] + .001):
        with pytest.raises(ValueError, match="no block owns"):
            noise.block_of(outside)


def test_a_samplers_levels_are_equal_quantiles_of_edms_noise_whatever_blocks_are_trained_on():
    expected = LogNormal(4).boundaries[::-1]
    trained_on = [LogNormal(4), LogNormal(2, p_mean=1.2, p_std=.8), LogNormal(3, edges="uniform")]
    for noise in trained_on:
        assert noise.steps(5).tolist() == expected           # to the bit: a level can be the end of a block


def test_a_sampler_has_four_levels_or_one_more_than_there_are_blocks_if_not_told():
    assert len(LogNormal(2).steps()) == 4
    assert len(LogNormal(6).steps()) == 7
    assert len(LogNormal(6).steps(2)) == 2
    with pytest.raises(ValueError, match="at least 2"):
        LogNormal(6).steps(1)


MASKINGS = [Masking(1), Masking(3), Masking(3, schedule="cosine")]


def visible_by_definition(masking, t):
    """alpha(t), but for eps (MD4, table 4)."""
    if masking.schedule == "linear":
        return 1 - t
    return 1 - torch.cos(math.pi / 2 * (1 - t))


@pytest.mark.parametrize("masking", MASKINGS)
def test_masks_have_their_schedule(masking):
    y = torch.randint(9, (4, 100_000))
    t = torch.tensor([0.0, .3, .8, 1.0])

    z = masking.corrupt(y, t, mask_id=9)

    masked = z == 9
    assert torch.equal(z[~masked], y[~masked])
    expected = 1 - visible_by_definition(masking, t)
    assert torch.allclose(masked.float().mean(1), expected, atol=.006)


@pytest.mark.parametrize("masking", MASKINGS)
def test_a_time_is_found_from_the_part_that_is_masked(masking):
    for t in (0.0, .3, .8, 1.0):
        masked = masking.mask_probability(torch.tensor(t, dtype=torch.float64)).item()
        assert masking.time_of(masked) == pytest.approx(t)
    assert masking.time_of(0.0) == 0                         # no time has as few masks, or as many
    assert masking.time_of(1.0) == 1


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_weight_of_masks_is_the_derivative_of_the_log_of_the_masked_part(masking):
    masking = replace(masking, eps=.05)
    t = torch.tensor([.0, .05, .3, .8], dtype=torch.float64)
    h = 1e-7
    rise = masking.mask_probability(t + h).log() - masking.mask_probability(t).log()
    assert torch.allclose(masking.weight(t), rise / h, rtol=2e-3)


@pytest.mark.parametrize("masking", MASKINGS)
def test_every_block_has_an_equal_step_of_alpha_and_an_overlap_with_each_neighbour(masking):
    step = (1 - 2e-4) / masking.n_blocks
    for b in range(masking.n_blocks):
        lo, hi = masking.interval(b)
        wide_lo, wide_hi = masking.widened(b)
        overlap_below = .05 * step * (lo > 0)
        overlap_above = .05 * step * (hi < 1)
        times = torch.tensor([wide_lo, lo, hi, wide_hi], dtype=torch.float64)
        steps = masking.mask_probability(times).diff().tolist()
        assert steps == pytest.approx([overlap_below, step, overlap_above], abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_blocks_own_all_times_also_those_that_they_are_not_trained_on(schedule):
    masking = Masking(3, schedule=schedule, t_min=.2, t_max=.7, gamma=0)
    trained = [masking.widened(b) for b in range(3)]
    owned = [masking.interval(b) for b in range(3)]
    assert trained[0][1] == pytest.approx(.7)
    assert trained[2][0] == pytest.approx(.2)
    for b in (0, 1):
        assert trained[b][0] == pytest.approx(trained[b + 1][1])           # without overlap they meet
        assert owned[b][0] == pytest.approx(trained[b][0])                 # inner ends are those of training
    assert owned[0][1] == 1
    assert owned[2][0] == 0

    masked = masking.mask_probability(torch.tensor([.2, trained[1][0], trained[0][0], .7], dtype=torch.float64))
    assert masked.diff().tolist() == pytest.approx([masked.diff().mean().item()] * 3)    # equal steps of alpha
    t = masking.sample(0, 64)
    assert trained[0][0] - 1e-6 <= t.min() and t.max() <= .7 + 1e-6
    wide = replace(masking, gamma=5.0)
    assert wide.widened(1) == pytest.approx((.2, .7))        # an overlap ends where training does


@pytest.mark.parametrize("masking", MASKINGS)
def test_times_of_a_batch_are_equally_far_apart(masking):
    for b in range(masking.n_blocks):
        lo, hi = masking.widened(b)
        t = masking.sample(b, 64).double().sort().values
        assert lo - 1e-6 <= t.min()
        assert t.max() <= hi + 1e-6
        assert (t.diff() - (hi - lo) / 64).abs().max() < 1e-4 / 64


def test_times_between_moves_are_at_equal_distances_or_for_a_cosine_grid_near_1():
    masking = Masking()
    assert masking.times(4).tolist() == pytest.approx([1, .75, .5, .25, 0])
    assert masking.times(2, start=.6).tolist() == pytest.approx([.6, .3, 0])

    cosine = masking.times(3, "cosine").tolist()
    assert cosine == pytest.approx([1, 3 ** .5 / 2, .5, 0])  # sines of 90, 60, 30 and 0 degrees
    assert masking.times(2, "cosine", start=.6).tolist() == pytest.approx([.6, .6 / 2 ** .5, 0])


def test_levels_of_the_bound_integrate_over_a_blocks_interval():
    noise = LogNormal(3)
    for b in range(3):
        lo, hi = noise.interval(b)
        integral = 0.0
        for sigma, density in bound_draws(noise, b, torch.zeros(6, 8), 500):
            integral += (density * sigma ** 2).mean().item() / 500
        assert integral == pytest.approx(math.log(hi / lo), rel=.02)      # of sigma^-3 sigma^2


# ---- Loss, readout, sampler: against closed forms ---------------------------------------------------------

def test_preconditioning_has_its_known_values_and_identities():
    noise = LogNormal(weighting="edm")
    sigma = torch.tensor([.002, .5, 3.0, 80.0], dtype=torch.float64)

    c_skip, c_out = noise.output_scales(sigma)
    c_in, c_noise = noise.input_scales(sigma)

    one = torch.ones_like(sigma)
    assert c_skip[1].item() == pytest.approx(.5)
    assert c_out[1].item() == pytest.approx(.5 ** .5 / 2)
    assert c_noise[2].item() == pytest.approx(math.log(3) / 4)
    assert torch.allclose(c_in ** 2 * (sigma ** 2 + .25), one)
    assert torch.allclose(noise.weight(sigma) * c_out ** 2, one)
    assert torch.equal(LogNormal().weight(sigma), one)


def test_the_weighted_loss_of_a_denoiser_that_does_nothing_has_its_known_mean():
    noise = LogNormal(weighting="edm")
    y = torch.zeros(200_000, 3)
    sigma = noise.sample(0, len(y))

    error = (noise.corrupt(y, sigma) - y).pow(2).sum(1)      # D = z, so that it is sigma^2 |eps|^2
    loss = score_loss(error, sigma, noise).item()

    quantiles = (torch.arange(100_000) + .5) / 100_000
    levels = noise.icdf(quantiles)
    expected = 3 * (levels ** 2 + .25) / .25                 # 3 sigma^2 times the weight
    assert loss == pytest.approx(expected.mean().item(), rel=.05)


@pytest.mark.parametrize("errors, levels", [
    ((9, 1), (9,)),
    ((9,), (9, 1)),
    ((9,), (8,)),
    ((), (9,)),
])
def test_a_loss_of_other_shapes_than_its_levels_is_refused_by_both_shapes(errors, levels):
    both = f"{re.escape(str(errors))}.*{re.escape(str(levels))}"
    with pytest.raises(ValueError, match=both):              # or the weight would be averaged away
        score_loss(torch.ones(errors), torch.ones(levels), LogNormal())


def test_the_target_table_has_unit_rows_at_right_angles_where_there_is_room():
    square = target_table(10, 32, 7)
    assert torch.allclose(square @ square.T, torch.eye(10), atol=1e-6)
    crowded = target_table(256, 32, 0)
    assert torch.allclose(crowded.norm(dim=1), torch.ones(256))


@reference
def test_the_target_table_is_the_same_everywhere():
    rounded = (target_table(256, 32, 0) * 2 ** 20).round().int()
    digest = hashlib.sha256(rounded.numpy().tobytes()).hexdigest()
    assert digest[:16] == "41254622d3f45911"


@each(gpt, vit, recurrent)
def test_the_target_table_has_the_seed_that_config_names(module):
    tables = [block.table for block in blocks_of(module, table_seed=3)]
    for table in tables:
        assert torch.equal(table, target_table(len(table), 32, 3))
        assert not torch.equal(table, target_table(len(table), 32, 0))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_bayes_readout_is_bayes_rule_also_where_products_are_in_bf16(bf16):
    table = target_table(20, 8, 0)
    sigma = torch.tensor([.2, .7, 3.0])
    z = torch.randn(3, 8)
    log_prior = torch.randn(20).log_softmax(0)

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = bayes_logits(log_prior.expand(3, 20), z, sigma, table)

    likelihood = torch.distributions.Normal(table.double(), sigma.double().view(3, 1, 1))    # (3, 20, 8)
    log_likelihood = likelihood.log_prob(z.double()[:, None]).sum(-1)                        # (3, 20)
    exact = (log_likelihood + log_prior.double()).softmax(-1)
    assert torch.allclose(logits.softmax(-1).double(), exact, atol=1e-5)


def test_the_edm_readout_takes_z_at_low_noise_and_the_network_at_high_noise():
    table = target_table(20, 8, 0)
    z, f = torch.randn(2, 2, 3, 8)
    low, high = edm_logits(f, z, torch.tensor([.002, 80.0]), table, LogNormal(), 16.0)
    assert torch.allclose(low, 16 * z[0] @ table.T, atol=.2)               # c_skip 1, c_out 0
    assert torch.allclose(high, 8 * f[1] @ table.T, atol=.2)               # c_skip 0, c_out 1/2


def test_a_perfect_denoiser_is_carried_exactly():
    steps = LogNormal().steps(6)
    y, eps = torch.randn(2, 4, 5).double()
    seen = []

    def perfect(z, sigma):
        assert torch.allclose(z, y + sigma * eps)
        seen.append(sigma)
        return y
    end = euler(perfect, y + 80 * eps, steps)

    assert torch.allclose(end, y)
    assert seen == steps.tolist()


PRIOR = torch.tensor([.05] * 8 + [.2, .4]).log()


@pytest.fixture
def ideal_blocks():
    """What blocks would say that know a prior of ten labels, and that a label has nothing to do with x."""
    noise = LogNormal(4)
    table = target_table(10, 16, 0)

    def logits(b, z, sigma):
        assert noise.block_of(sigma[0].item()) == b
        prior = 7 + PRIOR.expand(len(z), 10)                 # not normalised
        return bayes_logits(prior, z, sigma, table)
    return SimpleNamespace(noise=noise, table=table, logits=logits)


def test_a_chain_of_ideal_blocks_draws_from_the_prior(ideal_blocks):
    steps = ideal_blocks.noise.steps(32)
    labels = decode_labels(ideal_blocks.logits, (4000,), ideal_blocks.table, ideal_blocks.noise, steps, 1.0)
    frequencies = labels.bincount(minlength=10) / 4000
    assert torch.allclose(frequencies, PRIOR.exp(), atol=.05)


def test_without_starting_noise_a_chain_of_ideal_blocks_ends_at_the_most_probable(ideal_blocks):
    steps = ideal_blocks.noise.steps(5)
    labels = decode_labels(ideal_blocks.logits, (3,), ideal_blocks.table, ideal_blocks.noise, steps)
    assert labels.tolist() == [9, 9, 9]


def test_an_average_of_ideal_blocks_is_the_prior(ideal_blocks):
    log_p = average(ideal_blocks.logits, (3,), ideal_blocks.table, ideal_blocks.noise, range(4))
    assert torch.allclose(log_p, PRIOR.expand(3, 10), atol=1e-5)


def test_an_average_is_the_normalised_geometric_mean_of_what_blocks_say():
    p = (2 * torch.randn(3, 5, 10)).softmax(-1)              # of three blocks for five examples

    def logits(b, z, sigma):
        return p[b].log() + 3 * b                            # not normalised
    log_p = average(logits, (5,), target_table(10, 16, 0), LogNormal(3), range(3))

    mean = p.double().prod(0) ** (1 / 3)
    expected = mean / mean.sum(-1, keepdim=True)
    assert torch.allclose(log_p.exp().double(), expected, atol=1e-6)


@pytest.mark.parametrize("noise", [
    LogNormal(3, gamma=.3),
    LogNormal(2, p_mean=1.2, p_std=1.0, edges="4"),
])
def test_for_an_average_a_block_is_asked_at_z_0_and_the_median_of_its_own_interval(noise):
    asked = {}

    def logits(b, z, sigma):
        assert z.shape == (5, 16)
        assert (z == 0).all()
        asked[b] = sigma.tolist()
        return torch.zeros(5, 10)
    average(logits, (5,), target_table(10, 16, 0), noise, range(noise.n_blocks))

    for b in range(noise.n_blocks):
        not_widened = replace(noise, gamma=0.0)
        median = not_widened.sample(b, 10_001).median().item()
        assert asked[b] == pytest.approx([median] * 5, rel=1e-3)


def test_scores_of_batches_add_up():
    first = LabelScores(shares=[1.0, 2.0], ends=.5, alone=[3.0, 4.0], averaged=5.0)
    second = LabelScores(shares=[10.0, 20.0], ends=.25, alone=[30.0, 40.0], averaged=50.0)
    total = LabelScores.zero(2)
    total += first
    total += second
    assert total == LabelScores(shares=[11.0, 22.0], ends=.75, alone=[33.0, 44.0], averaged=55.0)


def test_tables_of_scores_name_each_block_and_the_bound_is_the_sum_of_its_shares():
    scores = LabelScores(shares=[1.0, 2.0], ends=.5, alone=[3.0, 4.0], averaged=5.0)

    rows, shares = scores.tables(10, "bits")

    assert rows == {"blocks, averaged": {"bits": 50}, "block 0 alone": {"bits": 30},
                    "block 1 alone": {"bits": 40}, "blocks, bound": {"bits": 35}}
    assert shares == {"block 0": {"bits": 10}, "block 1": {"bits": 20}, "ends": {"bits": 5}}


def test_one_block_has_no_average():
    scores = LabelScores(shares=[1.0], ends=.5, alone=[3.0], averaged=3.0)
    rows, _ = scores.tables(1, "bits")
    assert rows == {"block 0 alone": {"bits": 3}, "blocks, bound": {"bits": 1.5}}


def test_windows_are_scored_together_as_many_as_have_512_megabytes_of_logits():
    assert windows_at_once(n_class=2 ** 15, seq_len=2 ** 8, most=32) == 16
    assert windows_at_once(n_class=64, seq_len=16, most=32) == 32
    assert windows_at_once(n_class=2 ** 18, seq_len=2 ** 12, most=32) == 1


# ---- All five models, by one contract ---------------------------------------------------------------------

def sample_in_six_steps(module, nets, temperature=1.0):
    """Labels, images or a token, by an Euler sampler or, of mdm, with six moves."""
    start = TOKENS[:, :5]
    if module is vit:
        return vit.classify(nets, IMAGES, "chain", 6, temperature)
    if module is dit:
        return dit.generate_images(nets, LABELS, 6)
    if module is mdm:
        masks = torch.full((6, 16), 64)
        return mdm.fill(nets, masks, mdm.Sampling(n_moves=6))
    if module is gpt:
        return gpt.generate(nets, start, 1, temperature, sampler="chain", euler_steps=6)
    return recurrent.generate(nets, start, 1, temperature, n_passes=6)


@each(*MODELS)
def test_each_level_runs_its_owner_only(module, monkeypatch):
    nets = blocks_of(module)
    evaluations = record_evaluations(module, monkeypatch)

    sample_in_six_steps(module, nets)

    owners = [evaluation.block for evaluation in evaluations]
    levels = [evaluation.level for evaluation in evaluations]
    if module is recurrent:
        assert owners == [0, 0, 0, 0, 0, 0]
    else:  # quantiles 1, .8, .6 | .4, .2, 0 of two blocks' halves
        assert owners == [0, 0, 0, 1, 1, 1]
    if module is mdm:
        assert [6 * level for level in levels] == pytest.approx([6, 5, 4, 3, 2, 1])
    else:
        assert levels == pytest.approx(nets[0].noise.steps(6).tolist())


def first_z(module, evaluations):
    """What a chain starts from: of slots, the last is the one that is generated."""
    z = evaluations[0].z
    return z if module.DATA == "images" else z[:, -1]


@each(vit, dit, gpt, recurrent)
def test_a_chain_starts_at_the_full_noise(module, monkeypatch):
    nets = blocks_of(module)
    evaluations = record_evaluations(module, monkeypatch)
    sample_in_six_steps(module, nets)
    assert first_z(module, evaluations).std().item() == pytest.approx(80, rel=.15)


@each(vit, gpt, recurrent)
def test_temperature_scales_the_noise_that_a_chain_starts_from(module, monkeypatch):
    nets = blocks_of(module)
    evaluations = record_evaluations(module, monkeypatch)

    sample_in_six_steps(module, nets, temperature=.25)
    assert first_z(module, evaluations).std().item() == pytest.approx(20, rel=.15)

    evaluations.clear()
    sample_in_six_steps(module, nets, temperature=0.0)
    assert (first_z(module, evaluations) == 0).all()


@each(gpt, vit, recurrent)
def test_a_fresh_modulated_layer_is_a_plain_one(module):
    block = module.Block(tiny(module), 0)
    layer = block.core[0] if module is recurrent else block.layers[0]
    plain = type(layer)(block.config)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 9, 32)

    out = layer(x, cond=torch.randn(2, 1, 8))
    expected = plain(x)

    if module is not vit:  # the second value is a cache
        out, expected = out[0], expected[0]
    assert torch.equal(out, expected)


@each(gpt, vit, recurrent)
@pytest.mark.parametrize("readout, scale", [("bayes", 1 / .002 ** 2), ("edm", 16)])
def test_the_readout_is_the_one_that_config_names(module, readout, scale):
    block = module.Block(tiny(module, n_blocks=1, readout=readout), 0)
    z = .05 * torch.randn(6, 16, 32)
    sigma = torch.full((6,), .002)                           # so low that z decides

    if module is vit:
        z = z[:, 0]
        logits = block.logits(IMAGES, z, sigma)
    elif module is gpt:
        x = TOKENS[:, :-1]
        logits = block.logits(x, z, sigma, block.context(x))
    else:
        e, _ = block.condition(TOKENS[:, :-1])
        logits, _ = block.logits(e, z, sigma)

    found = logits - logits.mean(-1, keepdim=True)
    expected = scale * z @ block.table.T
    expected = expected - expected.mean(-1, keepdim=True)
    assert (found - expected).norm() < .05 * expected.norm()


@each(*MODELS)
def test_blocks_share_nothing(module):
    config = tiny(module, n_blocks=4)
    nets = [module.Block(config, b) for b in range(config.noise.n_blocks)]
    owned = set()
    for net in nets:
        assert all(p.requires_grad for p in net.parameters())
        tensors = [*net.parameters()]
        tensors += [buffer for name, buffer in net.named_buffers() if name != "table"]
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert not places & owned
        owned |= places


@each(gpt, vit, dit, mdm)
def test_blocks_have_the_layers_of_the_split_and_the_control_those_of_the_largest(module):
    def n_layers(part):
        return len(train.build(module, config, part).layers)
    config = tiny(module, n_blocks=4)
    assert n_layers("block_0") == 1
    assert n_layers("block_3") == 1
    assert n_layers("end_to_end") == 4
    assert n_layers("control") == 1

    config = tiny(module, n_layer=6, layer_split="4,2")
    assert n_layers("block_0") == 4
    assert n_layers("block_1") == 2
    assert n_layers("end_to_end") == 6
    assert n_layers("control") == 4

    config = tiny(module, n_layer=6, n_blocks=3, layer_split="1,2,3")
    assert n_layers("control") == 3


def test_the_control_of_recurrent_makes_one_pass_from_an_empty_state():
    control = recurrent.EndToEnd(tiny(recurrent).control())
    assert len(control.core) == 2
    assert {control.draw_passes() for _ in range(50)} == {1}
    assert (control.first_state(torch.ones(1, 2, 32)) == 0).all()


@each(dit, mdm)
def test_the_control_and_the_baseline_are_trained_on_all_levels(module):
    config = tiny(module, n_blocks=4, layer_split="1,1,1,1")
    lowest, *_, highest = config.noise.boundaries
    for part in ("end_to_end", "control"):
        net = train.build(module, config, part)
        assert net.noise.interval(0) == (lowest, highest)
        assert replace(net.noise, n_blocks=4) == config.noise


@pytest.mark.parametrize("module, wrong", [
    (gpt, dict(n_head=0)), (gpt, dict(n_embd=34)), (gpt, dict(n_embd=0)),
    (gpt, dict(n_cond=7)), (gpt, dict(seq_len=1)), (gpt, dict(readout="softmax")),
    (vit, dict(n_head=0)), (vit, dict(n_embd=33)), (vit, dict(n_mlp=0)),
    (vit, dict(n_cond=0)), (vit, dict(patch_size=3)), (vit, dict(patch_size=0)),
    (vit, dict(dropout=1.0)), (vit, dict(readout="")),
    (dit, dict(n_embd=34)), (dit, dict(n_cond=7)), (dit, dict(patch_size=3)),
    (dit, dict(dropout=-.1)), (dit, dict(label_drop=1.1)),
    (mdm, dict(n_head=0)), (mdm, dict(n_embd=34)), (mdm, dict(n_cond=7)), (mdm, dict(seq_len=1)),
    (recurrent, dict(n_core=0)), (recurrent, dict(mean_passes=0)), (recurrent, dict(grad_passes=0)),
    (recurrent, dict(n_embd=34)), (recurrent, dict(seq_len=1)), (recurrent, dict(readout="none")),
])
def test_a_config_that_cannot_be_built_is_refused_by_the_name_of_its_setting(module, wrong):
    name, = wrong
    with pytest.raises(data.UserError, match=name):
        tiny(module, **wrong)


@pytest.mark.parametrize("module, wrong", [
    (gpt, dict(prompt=("",))), (gpt, dict(n_tokens=-1)),
    (gpt, dict(temperature=-1.0)), (gpt, dict(sampler="euler")),
    (vit, dict(n_images=0)), (vit, dict(temperature=-1.0)), (vit, dict(sampler="ensemble")),
    (dit, dict(n_images=0)), (dit, dict(euler_steps=1)), (dit, dict(guidance=math.nan)),
    (mdm, dict(n_moves=0)), (mdm, dict(temperature=-1.0)), (mdm, dict(grid="linear")),
    (recurrent, dict(prompt=("a", ""))), (recurrent, dict(n_passes=0)), (recurrent, dict(temperature=-1.0)),
])
def test_sampling_that_cannot_be_is_refused_by_the_name_of_its_setting(module, wrong):
    name, = wrong
    with pytest.raises(ValueError, match=name):
        module.Sampling(**wrong)


def without_noise(self, y, sigma):
    return y


def logits_of_training(module, block, x, z, sigma):
    """Logits (B, T, V) of all slots at once, as a block computes them in training."""
    if module is gpt:
        return block.logits(x, z, sigma, block.context(x))
    e, _ = block.condition(x)
    logits, _ = block.logits(e, z, sigma)
    return logits


@pytest.mark.parametrize("module, per_token, settings", [
    (gpt, 4, dict(sampler="chain", euler_steps=4)),
    (gpt, 2, dict(sampler="averaged")),
    (recurrent, 4, dict(n_passes=4)),
])
def test_generation_computes_what_training_computes_with_a_cache_and_without(module, per_token, settings,
                                                                             monkeypatch):
    monkeypatch.setattr(LogNormal, "corrupt", without_noise)  # known slots hold their tokens
    nets = blocks_of(module)
    evaluations = record_evaluations(module, monkeypatch)
    start = TOKENS[:2, :4]

    torch.manual_seed(1)
    text = module.generate(nets, start, 30, use_cache=True, **settings)    # far beyond the window of 16
    cached = list(evaluations)
    evaluations.clear()
    torch.manual_seed(1)
    assert torch.equal(text, module.generate(nets, start, 30, use_cache=False, **settings))
    uncached = list(evaluations)

    assert text.shape == (2, 34)
    assert torch.equal(text[:, :4], start)
    assert len(text.unique()) > 8
    assert len(cached) == len(uncached) == 30 * per_token
    for k, (one, other) in enumerate(zip(cached, uncached)):
        size = min(1.0, one.level ** 2)                      # of what the network adds to z
        answer = size * one.answer[:, -1]
        assert torch.allclose(answer, size * other.answer[:, -1], atol=1e-3)
        x = text[:, :4 + k // per_token]
        if x.shape[1] <= 16:  # in the first window: all slots at once
            block = nets[one.block]
            known = block.table[x[:, 1:]]
            z = torch.cat([known, one.z[:, -1:]], dim=1)
            whole = logits_of_training(module, block, x, z, torch.full((2,), one.level))
            assert torch.allclose(answer, size * whole[:, -1], atol=1e-3)


@each(gpt, recurrent)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("part", ["blocks", "end_to_end"])
def test_a_full_window_drops_its_older_half_and_no_position_is_untrained(module, part, use_cache,
                                                                         monkeypatch):
    nets = nets_of(module, part)
    rotations = record_arguments(module, "rotate", monkeypatch)

    module.generate(nets, TOKENS[:1, :4], 30, use_cache=use_cache)

    last_positions = [call["start"] + call["x"].shape[2] for call in rotations]  # from 1
    windows = [length for length, _ in itertools.groupby(last_positions)]
    until_full = [*range(4, 17)]
    from_half = [*range(9, 17)]
    assert windows == until_full + from_half + from_half + [9]


@each(gpt, recurrent)
def test_a_prompt_longer_than_the_window_is_read_from_its_last_part(module, monkeypatch):
    prompt = torch.arange(40).expand(1, -1)
    embedded = []

    def record(net, args):
        embedded.append(args[0].tolist())
    net = baseline_of(module)
    net.embed.register_forward_pre_hook(record)
    module.generate(net, prompt, 1)
    assert embedded == [[list(range(24, 40))]]


# ---- Dropout ----------------------------------------------------------------------------------------------

def record_dropout(monkeypatch):
    """A list that fills with (is training, shape) of each call of a dropout, which then drops nothing."""
    calls = []

    def forward(self, x):
        calls.append((self.training, tuple(x.shape)))
        return x
    monkeypatch.setattr(nn.Dropout, "forward", forward)
    return calls


@each(vit, dit)
def test_dropout_is_after_attention_and_inside_and_after_the_mlp(module, monkeypatch):
    net = module.Block(tiny(module, n_blocks=4, dropout=.3), 0)    # of one layer
    rates = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) == {.3}
    calls = record_dropout(monkeypatch)

    net(BATCH[module])

    n_token = 17 if module is vit else 16
    shapes = [shape for _, shape in calls]
    assert shapes == [(6, n_token, 32), (6, n_token, 64), (6, n_token, 32)]


def test_training_is_with_dropout_and_what_is_scored_or_sampled_is_without(tmp_path, monkeypatch):
    calls = record_dropout(monkeypatch)
    flags = ["--model=vit", f"--out={tmp_path}", "--device=cpu", "--threads=1"]
    size = ["--n-layer=1", "--n-blocks=1", "--n-embd=8", "--n-mlp=8", "--steps=1"]

    train.main([*flags, *size, "--block=all"])
    train.main([*flags, *size, "--end-to-end"])
    assert any(training for training, _ in calls)

    calls.clear()
    train.main([*flags, "--eval"])
    train.main([*flags, "--sample"])
    assert len(calls) > 20
    assert not any(training for training, _ in calls)


def test_validation_is_without_dropout_and_training_goes_on_with_it(monkeypatch):
    calls = record_dropout(monkeypatch)
    net = vit.EndToEnd(tiny(vit, dropout=.1))
    assert math.isfinite(train.validate(net, BATCH[vit]))
    assert calls
    assert not any(training for training, _ in calls)
    assert net.training


# ---- Presets, and code that five files share --------------------------------------------------------------

def preset_config(module, name):
    """The Config of a preset, with facts as its data would have them."""
    facts = dict(vocab_size=300, image_size=32, n_channel=3, n_class=100)
    if "tiny" in name:
        facts["image_size"] = 64
    if "256" in name:
        facts["n_channel"] = 4
        facts["n_class"] = 1000
    return train.replaced(module.Config(), module.PRESETS[name] | facts)


@pytest.mark.parametrize("module, name", [(module, name) for module in MODELS for name in module.PRESETS])
def test_presets_name_what_exists_and_can_be_built(module, name):
    source = importlib.import_module(f"data.{module.DATA}")
    known = set()
    for settings in (module.Config(), module.Sampling(), train.Training(), source.Settings()):
        known |= set(train.flat(settings))
    assert set(module.PRESETS[name]) <= known - set(source.FACTS)
    config = preset_config(module, name)
    with torch.device("meta"):
        module.EndToEnd(config)
        module.Block(config, config.noise.n_blocks - 1)


@reference
@pytest.mark.parametrize("module, name, millions", [
    (vit, "tiny-imagenet", 86),  # ViT-B
    (dit, "cifar10", 33),        # DiT-S/2
    (dit, "imagenet256", 458),   # DiT-L/2
])
def test_presets_have_the_papers_sizes(module, name, millions):
    with torch.device("meta"):
        whole = module.EndToEnd(preset_config(module, name))
    n_parameters = sum(p.numel() for p in whole.parameters())
    assert n_parameters / 1e6 == pytest.approx(millions, rel=.02)


@reference
def test_what_has_the_same_name_in_two_model_files_is_the_same_code():
    sources = {}
    for module in MODELS:
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") == module.__name__:
                sources.setdefault(name, set()).add(inspect.getsource(thing))
    different = {name for name, found in sources.items() if len(found) > 1}
    assert different == {"Config", "Sampling", "Block", "EndToEnd", "generate", "next_token", "sample",
                         "evaluate"}


@each(gpt, mdm, recurrent)
def test_rotary_positions_let_a_product_depend_on_the_distance_alone(module):
    q, k = torch.randn(2, 1, 1, 1, 16)

    def product(position_of_q, position_of_k):
        return (module.rotate(q, position_of_q) * module.rotate(k, position_of_k)).sum().item()
    assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(7, 4) != pytest.approx(product(7, 5), abs=1e-3)
    assert torch.equal(module.rotate(q), q)                  # at position 0


# ---- What is each model's own -----------------------------------------------------------------------------

def embeddings_as_leaves(block):
    """A list that fills with what a block's embedding returns, from where gradients go no further back."""
    leaves = []

    def detach(net, args, out):
        leaf = out.detach().requires_grad_()
        leaves.append(leaf)
        return leaf
    block.embed.register_forward_hook(detach)
    return leaves


def reaches(gradient):
    """[whether a token has a gradient] of gradients (1, T, C)."""
    return gradient[0].abs().sum(-1) > 0


@each(gpt, recurrent)
def test_a_slot_sees_what_is_known_when_it_is_generated(module):
    block = blocks_of(module)[0]
    leaves = embeddings_as_leaves(block)
    z = torch.randn(1, 16, 32, requires_grad=True)
    sigma = torch.ones(1)

    logits = logits_of_training(module, block, TOKENS[:1, :-1], z, sigma)
    from_z_directly = bayes_logits(torch.zeros(64), z, sigma, block.table)
    said = logits - from_z_directly                          # by the network itself

    for i in range(16):
        something = said[0, i].sin().sum()
        of_z, *of_tokens = torch.autograd.grad(something, [z, *leaves], retain_graph=True)
        sees_token = sum(gradient.abs() for gradient in of_tokens)
        assert reaches(sees_token).tolist() == [j <= i for j in range(16)]
        # z_j is of token j + 1: gpt has clean tokens beside, recurrent reads the earlier slots
        if module is gpt:
            assert reaches(of_z).tolist() == [j == i for j in range(16)]
        else:
            assert reaches(of_z).tolist() == [j <= i for j in range(16)]


@each(gpt, recurrent)
def test_a_slot_is_scored_on_its_own_token(module):
    # at low noise z alone names the token, so that the loss is next to nothing if it is the target
    net = train.build(module, tiny(module, n_blocks=1, sigma_max=.05), "block_0")
    assert net(TOKENS).item() < 1e-3


@each(gpt, recurrent)
def test_the_baseline_is_causal(module):
    net = baseline_of(module)

    def logits(x):
        torch.manual_seed(1)
        found = net.logits(x)
        return found[0] if module is gpt else found          # gpt returns a cache, too
    before = logits(TOKENS[:, :16])
    other = TOKENS[:, :16].clone()
    other[:, 9] = (other[:, 9] + 1) % 64
    after = logits(other)

    same = torch.isclose(before, after).all(-1)              # (6, 16)
    assert same[:, :9].all()
    assert not same[:, 9:].any()


@each(gpt, recurrent)
def test_a_cache_changes_nothing_that_the_baseline_generates(module):
    net = baseline_of(module)
    torch.manual_seed(1)
    cached = module.generate(net, TOKENS[:, :4], 20, use_cache=True)
    torch.manual_seed(1)
    uncached = module.generate(net, TOKENS[:, :4], 20, use_cache=False)
    assert torch.equal(cached, uncached)


def test_an_ideal_denoiser_carries_noise_to_data(monkeypatch):
    nets = blocks_of(dit, image_size=4, n_channel=4)
    data = torch.randn(12, 4, 4, 4) * .5

    def posterior_mean(self, z, sigma, label):
        distance = (z[:, None] - data).flatten(2).norm(dim=2)              # (B, 12)
        log_p = -(distance.double() / sigma[:, None]) ** 2 / 2
        return (log_p.softmax(1).float() @ data.flatten(1)).view_as(z)
    monkeypatch.setattr(dit.Block, "denoise", posterior_mean)
    images = dit.generate_images(nets, torch.zeros(200, dtype=torch.long), 60)

    difference = images[:, None] - nets[0].decode(data)
    far = difference.abs().amax((2, 3, 4))                   # (200, 12)
    assert far.min(1).values.max() < 1e-3                    # every sample is a data point
    assert len(far.argmin(1).unique()) >= 10                 # and nearly all of them are found


def constant_of_a_class(self, z, sigma, label):
    """In the place of denoise: an image of class k is k everywhere; without a label it is 3."""
    value = torch.where(label == 10, 3.0, label.float())
    return value.view(-1, 1, 1, 1).expand_as(z)


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
def test_guidance_extrapolates_from_no_label_to_the_label(guidance, monkeypatch):
    nets = blocks_of(dit, n_channel=4)
    monkeypatch.setattr(dit.Block, "denoise", constant_of_a_class)
    images = dit.generate_images(nets, torch.tensor([5]), 4, guidance)
    expected = nets[0].decode(torch.tensor(3 + guidance * (5 - 3.0)))
    assert torch.allclose(images, expected, atol=1e-4)


def test_many_images_are_each_of_their_class(monkeypatch):
    nets = blocks_of(dit, n_channel=4)
    monkeypatch.setattr(dit.Block, "denoise", constant_of_a_class)
    label = torch.arange(600) % 10                           # more than are generated at once
    images = dit.generate_images(nets, label, 2)
    expected = nets[0].decode(label.float()).view(600, 1, 1, 1)
    assert (images - expected).abs().max() < 1e-4


def test_images_are_scaled_to_mean_0_and_the_standard_deviation_sigma_data():
    net = blocks_of(dit, data_mean=.3, data_std=.2)[0]
    images = .3 + .2 * torch.randn(64, 3, 8, 8)
    y = net.encode(images)
    assert y.mean().item() == pytest.approx(0, abs=.02)
    assert y.std().item() == pytest.approx(.5, rel=.02)
    assert torch.allclose(net.decode(y), images, atol=1e-6)


def test_a_label_is_withheld_in_training_as_often_as_told_and_never_in_validation(monkeypatch):
    net = dit.Block(tiny(dit, label_drop=.25), 0)
    labels = []

    def denoise(self, z, sigma, label):
        labels.append(label)
        return z
    monkeypatch.setattr(dit.Block, "denoise", denoise)
    batch = (torch.zeros(4000, 3, 8, 8), torch.arange(4000) % 10)

    net(batch)
    withheld = labels[0] == 10
    assert withheld.float().mean().item() == pytest.approx(.25, abs=.02)
    assert torch.equal(labels[0][~withheld], batch[1][~withheld])

    labels.clear()
    train.validate(net, batch)
    assert torch.equal(torch.cat(labels), batch[1])


@each(vit, dit)
def test_patches_are_squares_row_by_row(module):
    pixels = torch.arange(36.0).view(1, 1, 6, 6)
    found = module.patches(pixels, 2)
    assert found.shape == (1, 9, 4)
    assert found[0, 0].tolist() == [0, 1, 6, 7]
    assert found[0, 1].tolist() == [2, 3, 8, 9]
    assert found[0, 3].tolist() == [12, 13, 18, 19]


def test_patches_are_put_together_where_they_were():
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(dit.unpatch(dit.patches(images, 2), 2, 6), images)


def test_a_position_of_dit_tells_row_and_column():
    positions = dit.sincos_positions(5, 16).view(5, 5, 16)
    rows, columns = positions.split(8, dim=-1)
    assert torch.equal(rows, rows[:, :1].expand(5, 5, 8))
    assert torch.equal(columns, columns[:1].expand(5, 5, 8))
    assert torch.equal(rows[:, 0], columns[0])
    assert len(positions.view(25, 16).unique(dim=0)) == 25


def test_pixels_are_rounded_to_bytes():
    exact = torch.arange(256) / 127.5 - 1
    for images in (exact, exact + 1e-3, exact - 1e-3):
        assert torch.equal(dit.to_bytes(images), torch.arange(256).byte())
    assert dit.to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("n_channel, rounded", [(1, True), (3, True), (4, False)])
def test_generated_pixels_are_whole_bytes_and_latents_are_not(n_channel, rounded):
    images = dit.generate_images(blocks_of(dit, n_channel=n_channel), LABELS, 3)
    levels = (images + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3) == rounded


def test_an_image_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(dit.Block, "denoise", lambda self, z, sigma, label: z * math.nan)
    with pytest.raises(ValueError, match="not finite"):
        dit.generate_images(blocks_of(dit), LABELS, 3)


def test_a_picture_has_images_in_rows_enlarged_with_a_black_frame():
    greys = torch.tensor([10, 20, 30, 40, 50, 60]) / 127.5 - 1
    images = greys.view(6, 1, 1, 1).expand(6, 1, 8, 8).clone()
    images[0, 0, 0, 1] = 1.0                                 # a white dot: first row, second column

    pixels = dit.picture(images, n_columns=3)

    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2 * 34, 3 * 34, 3)               # 8 pixels four times, and a frame
    middles = pixels[17::34, 17::34, 0]
    assert middles.tolist() == [[10, 20, 30], [40, 50, 60]]
    assert torch.equal(pixels[..., 0], pixels[..., 2])       # grey
    assert (pixels[0] == 0).all()
    assert (pixels[:, 33] == 0).all()
    assert pixels[1:5, 5:9].unique().tolist() == [255]
    assert (pixels == 255).sum() == 3 * 16


def test_a_class_is_found_by_its_name_or_else_by_its_number():
    names = ["cat", "dog", "0"]
    assert dit.class_number("dog", names) == 1
    assert dit.class_number("1", names) == 1
    assert dit.class_number(1, names) == 1
    assert dit.class_number("0", names) == 2                 # a name
    for wrong in ("cow", "3", "-1", ""):
        with pytest.raises(ValueError, match="no class"):
            dit.class_number(wrong, names)


def test_a_picture_has_a_row_per_class(monkeypatch, capsys):
    calls = record_arguments(dit, "generate_images", monkeypatch)
    data = SimpleNamespace(class_names=lambda n: [f"name {c}" for c in range(n)])
    sampling = dit.Sampling(classes=("name 7", 2), n_images=3, guidance=1.5, euler_steps=4)
    nets = blocks_of(dit)

    made = dit.sample(nets, sampling, data)

    assert list(made) == ["sample"]
    assert made["sample"].shape == (2 * 34, 3 * 34, 3)
    assert calls[0]["label"].tolist() == [7, 7, 7, 2, 2, 2]
    assert "class 7 (name 7), class 2 (name 2)" in capsys.readouterr().out


def test_latents_are_not_made_a_picture():
    sampling = dit.Sampling(n_images=2, euler_steps=2, classes=(1, 3))
    made = dit.sample(blocks_of(dit, n_channel=4), sampling)
    assert made["sample"].shape == (4, 4, 8, 8)
    assert made["sample"].dtype == torch.float32


@pytest.mark.parametrize("n_class, shown", [(10, 10), (3, 3), (30, 10)])
def test_the_first_ten_classes_are_shown_if_not_told(n_class, shown, monkeypatch):
    calls = record_arguments(dit, "generate_images", monkeypatch)
    dit.sample(blocks_of(dit, n_class=n_class), dit.Sampling(n_images=1, euler_steps=2))
    assert calls[0]["label"].tolist() == list(range(shown))


def test_a_recurrence_starts_from_normal_noise_cut_at_three_deviations():
    net = recurrent.EndToEnd(tiny(recurrent, mean_passes=32))
    std = .4 ** .5
    state = net.first_state(torch.empty(100, 100, 32))
    assert state.abs().max() < 3.001 * std
    assert abs(state.mean()) < .005
    density = math.exp(-3 ** 2 / 2) / math.sqrt(2 * math.pi)
    within = math.erf(3 / math.sqrt(2))
    variance = 1 - 2 * 3 * density / within                  # of a normal number cut at 3
    assert state.var().item() == pytest.approx(.4 * variance, rel=.01)


def test_a_recurrence_has_its_mean_of_passes():
    net = recurrent.EndToEnd(tiny(recurrent, mean_passes=32))
    n = torch.tensor([net.draw_passes() for _ in range(20000)]).float()    # 1 + Poisson, rate of mean 31
    assert n.min() >= 1
    assert n.mean().item() == pytest.approx(32, rel=.02)


def passes_of(net):
    """A list that fills with whether a pass through the core has gradients, for each pass."""
    passes = []

    def record(layer, args, out):
        passes.append(out[0].requires_grad)
    net.core[-1].register_forward_hook(record)
    return passes


def test_a_recurrence_has_gradients_in_the_last_passes():
    net = recurrent.EndToEnd(tiny(recurrent, mean_passes=6)).eval()
    passes = passes_of(net)
    net(TOKENS).backward()
    assert passes == [False] * 4 + [True] * 2


def test_a_baseline_is_scored_after_its_mean_of_passes():
    net = baseline_of(recurrent, mean_passes=6)
    passes = passes_of(net)
    recurrent.evaluate(blocks_of(recurrent), {"end to end": net}, held_out(TOKENS))
    assert len(passes) == 6


def test_generation_makes_as_many_passes_as_told_and_those_of_the_control_one():
    net = baseline_of(recurrent)
    passes = passes_of(net)
    recurrent.generate(net, TOKENS[:, :4], 3, n_passes=5)
    assert len(passes) == 3 * 5

    control = recurrent.EndToEnd(tiny(recurrent).control())
    passes = passes_of(control)
    recurrent.generate(control, TOKENS[:, :4], 3, n_passes=5)
    assert len(passes) == 3


@pytest.mark.parametrize("n_passes", [1, 2, 5])
def test_each_pass_of_a_block_is_a_level_from_the_highest(n_passes, monkeypatch):
    evaluations = record_evaluations(recurrent, monkeypatch)
    recurrent.generate(blocks_of(recurrent), TOKENS[:, :4], 1, n_passes=n_passes)
    levels = [evaluation.level for evaluation in evaluations]
    if n_passes == 1:
        assert levels == [80]
    else:
        assert levels == pytest.approx(LogNormal().steps(n_passes).tolist())


@pytest.mark.parametrize("euler_steps, n_levels", [(0, 4), (2, 2), (7, 7)])
def test_a_chain_visits_as_many_levels_as_told(euler_steps, n_levels, monkeypatch):
    evaluations = record_evaluations(gpt, monkeypatch)
    gpt.generate(blocks_of(gpt), TOKENS[:, :4], 1, sampler="chain", euler_steps=euler_steps)
    assert len(evaluations) == n_levels

    evaluations = record_evaluations(vit, monkeypatch)
    vit.classify(blocks_of(vit), IMAGES, "chain", euler_steps)
    assert len(evaluations) == n_levels


def test_a_masked_place_is_guessed_from_both_sides_and_at_its_time():
    net = blocks_of(mdm)[1]
    z = TOKENS[:1, :-1].clone()
    z[0, 3] = z[0, 9] = 64
    t = torch.tensor([.2])
    logits = net.logits(z, t)                                # (1, 16, 64): none for the mask
    assert logits.shape == (1, 16, 64)

    others = [net.logits(z, t / 2)]
    for place in (0, 2, 4, 15):
        other = z.clone()
        other[0, place] = (z[0, place] + 1) % 64
        others.append(net.logits(other, t))

    for other in others:
        assert (other - logits)[0, 3].abs().mean() > 1e-3


def test_masked_places_alone_are_scored():
    net = blocks_of(mdm)[1]
    y = TOKENS[:2, :-1]
    z = y.clone()
    z[0, 3] = z[0, 9] = 64
    t = torch.tensor([.2, .4])

    found = net.masked_nats(z, t, y)

    nats = -net.logits(z, t).log_softmax(-1)
    expected = nats[0, 3, y[0, 3]] + nats[0, 9, y[0, 9]]
    assert torch.allclose(found, torch.stack([expected, torch.tensor(0.0)]))


def test_a_mask_is_the_token_after_the_vocabulary_also_of_a_config_that_was_replaced(monkeypatch):
    read = []

    def logits(self, z, t):
        read.append(z)
        return torch.zeros(*z.shape, 64)
    monkeypatch.setattr(mdm.Block, "logits", logits)
    config = replace(tiny(mdm), n_layer=2)
    config = replace(config, noise=replace(config.noise, gamma=.2))

    for part in ("block_0", "end_to_end", "control"):
        net = train.build(mdm, config, part)
        assert net.mask_id == 64
        assert len(net.embed.weight) == 65                   # a row for the mask
        net(TOKENS)
        z = read.pop()
        changed = z[z != TOKENS[:, :-1]]
        assert len(changed) > 20
        assert changed.unique().tolist() == [64]


@pytest.fixture(params=[{"schedule": "linear"}, {"schedule": "cosine"}, {"t_min": .3, "t_max": .6}], ids=str)
def exact_pairs(request, monkeypatch):
    """Two dependent tokens of three, p (3, 3), and blocks that know the conditional probabilities."""
    p = (2 * torch.randn(9)).softmax(0).view(3, 3)

    def logits(self, z, t):
        first, second = z.clamp(max=2).T                     # (B,) each
        mask = z == 3                                        # (B, 2)
        of_first = torch.where(mask[:, 1:], p.sum(1), p.T[second])         # (B, 3)
        of_second = torch.where(mask[:, :1], p.sum(0), p[first])           # (B, 3)
        return torch.stack([of_first, of_second], dim=1).log()
    monkeypatch.setattr(mdm.Block, "logits", logits)
    nets = blocks_of(mdm, vocab_size=3, seq_len=2, **request.param)
    return SimpleNamespace(p=p, nets=nets)


def test_exact_conditionals_draw_the_joint_distribution(exact_pairs):
    masks = torch.full((8000, 2), 3)
    out = mdm.fill(exact_pairs.nets, masks, mdm.Sampling(n_moves=64))
    pairs = 3 * out[:, 0] + out[:, 1]
    frequencies = pairs.bincount(minlength=9) / 8000
    assert torch.allclose(frequencies, exact_pairs.p.flatten(), atol=.02)


def test_the_bound_of_exact_conditionals_is_the_entropy(exact_pairs, monkeypatch):
    monkeypatch.setattr(mdm, "windows_at_once", lambda *sizes: 300_000)    # so many are quick together
    p = exact_pairs.p
    as_expected = (300_000 * p.flatten()).round().long()
    pairs = torch.arange(9).repeat_interleave(as_expected)
    text = torch.stack([pairs // 3, pairs % 3, pairs], dim=1)              # the last token is not scored

    tables = mdm.evaluate(exact_pairs.nets, {}, held_out(text))

    bits = tables["bits per byte on held-out text (bound)"]["blocks"]["bits per byte"]
    entropy = -(p * p.log2()).sum().item() / 4               # bits, of two tokens of two bytes
    assert bits == pytest.approx(entropy, rel=.02)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_after_each_move_as_much_is_masked_as_at_its_time(schedule, grid, monkeypatch):
    nets = blocks_of(mdm, schedule=schedule)
    evaluations = record_evaluations(mdm, monkeypatch)

    masks = torch.full((500, 16), 64)
    mdm.fill(nets, masks, mdm.Sampling(n_moves=8, grid=grid))

    times = nets[0].noise.times(8, grid)
    levels = [evaluation.level for evaluation in evaluations]
    assert levels == pytest.approx(times[:-1].tolist())
    for evaluation, t in zip(evaluations, times):
        masked = (evaluation.z == 64).float().mean().item()
        visible = visible_by_definition(nets[0].noise, t).item()
        assert masked == pytest.approx(1 - visible, abs=.02)


class Letters:
    """A tokenizer of 64 characters, from @ on."""

    def encode(self, text):
        return torch.tensor([ord(letter) - 64 for letter in text])

    def decode(self, tokens):
        return "".join(chr(64 + token) for token in tokens)


def test_gaps_of_a_prompt_are_masks():
    z = mdm.with_gaps("ABC<gap:6>DE<gap:1>", Letters(), 64, 16)
    assert z.tolist() == [[1, 2, 3, *[64] * 6, 4, 5, 64]]


@pytest.mark.parametrize("prompt", ["text", "<gap:17>", "<gap:0>", "abcdefgh<gap:9>", "<gap:x>"])
def test_a_prompt_without_a_gap_or_too_long_for_the_window_is_refused(prompt):
    with pytest.raises(ValueError, match="must have a gap"):
        mdm.with_gaps(prompt, Letters(), 64, 16)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_gaps_are_filled_and_what_is_given_stays(temperature):
    z = mdm.with_gaps("abcde<gap:6>fghij", Letters(), 64, 16)
    out = mdm.fill(blocks_of(mdm), z, mdm.Sampling(n_moves=8, temperature=temperature))
    assert (out < 64).all()
    assert torch.equal(out[z < 64], z[z < 64])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_gaps_are_filled_from_the_time_at_which_as_much_is_masked(schedule, monkeypatch):
    nets = blocks_of(mdm, schedule=schedule)
    evaluations = record_evaluations(mdm, monkeypatch)
    z = mdm.with_gaps("abcde<gap:6>fghij", Letters(), 64, 16)

    mdm.fill(nets, z, mdm.Sampling(n_moves=8, grid="cosine"))

    part = (6 / 16 - 1e-4) / (1 - 2e-4)
    start = part if schedule == "linear" else 2 / math.pi * math.asin(part)
    assert evaluations[0].level == pytest.approx(start, abs=1e-6)
    assert evaluations[4].level == pytest.approx(start / 2 ** .5, abs=1e-6)    # of a cosine grid
    assert {evaluation.block for evaluation in evaluations} == {1}  # so few masks are not for block 0


# ---- What --sample was told reaches the sampler -----------------------------------------------------------

SAME = torch.full((64,), -999.0)         # logits of tokens: but for three they never come
SAME[:3] = torch.tensor([2.0, 1.0, 0.0])


def assert_tempered(tokens, temperature):
    """Tokens (N,) have the frequencies of SAME divided by a temperature."""
    assert len(tokens) == 4000
    found = tokens.bincount(minlength=64) / 4000
    assert torch.allclose(found, (SAME / temperature).softmax(0), atol=.03)


def say_the_same(net):
    """Puts SAME in the place of what a network says, whatever it reads."""

    def logits(x, *others):
        found = SAME.expand(*x.shape, 64)
        return (found, None) if isinstance(net, gpt.EndToEnd) else found
    net.logits = logits
    net.context = lambda x, past: None
    return net


@pytest.mark.parametrize("temperature", [.5, 1.0, 3.0])
def test_temperature_divides_the_logits_of_tokens(temperature):
    start = TOKENS[:1, :4].expand(4000, 4)
    for module in (gpt, recurrent):
        net = say_the_same(module.EndToEnd(tiny(module)))
        text = module.generate(net, start, 1, temperature)
        assert_tempered(text[:, 4], temperature)

    blocks = [say_the_same(block) for block in blocks_of(gpt)]
    text = gpt.generate(blocks, start, 1, temperature)
    assert_tempered(text[:, 4], temperature)

    blocks = [say_the_same(block) for block in blocks_of(mdm)]
    sampling = mdm.Sampling(n_moves=2, temperature=temperature)
    text = mdm.fill(blocks, torch.full((4000, 1), 64), sampling)
    assert_tempered(text[:, 0], temperature)


def test_at_temperature_0_the_most_probable_is_chosen():
    start = TOKENS[:1, :4].expand(50, 4)
    for module in (gpt, recurrent):
        net = say_the_same(module.EndToEnd(tiny(module)))
        assert (module.generate(net, start, 1, 0.0)[:, 4] == 0).all()
    blocks = [say_the_same(block) for block in blocks_of(gpt)]
    assert (gpt.generate(blocks, start, 1, 0.0)[:, 4] == 0).all()
    blocks = [say_the_same(block) for block in blocks_of(mdm)]
    sampling = mdm.Sampling(n_moves=2, temperature=0.0)
    assert (mdm.fill(blocks, torch.full((50, 4), 64), sampling) == 0).all()


def assert_passed_on(sampling, call, *names):
    """A call of a sampler got what the fields `names` of a Sampling say."""
    for name in names:
        assert call[name] == getattr(sampling, name), name


@pytest.mark.parametrize("part", ["blocks", "end_to_end"])
@pytest.mark.parametrize("sampling", [
    gpt.Sampling(prompt=("abc", "x"), n_tokens=3, temperature=.7, sampler="chain", euler_steps=5),
    gpt.Sampling(prompt=("abc", "x"), n_tokens=2, temperature=1.3, sampler="averaged", euler_steps=6),
])
def test_gpt_continues_each_prompt_as_told(sampling, part, monkeypatch):
    calls = record_arguments(gpt, "generate", monkeypatch)
    nets = nets_of(gpt, part)

    texts = gpt.sample(nets, sampling, SimpleNamespace(tokenizer=Letters())).split("\n---\n")

    for prompt, text, call in zip(sampling.prompt, texts, calls, strict=True):
        assert text.startswith(prompt)
        assert len(text) == len(prompt) + sampling.n_tokens
        assert call["nets"] is nets
        assert_passed_on(sampling, call, "n_tokens", "temperature", "sampler", "euler_steps")


@pytest.mark.parametrize("part", ["blocks", "end_to_end"])
def test_recurrent_continues_each_prompt_as_told(part, monkeypatch):
    calls = record_arguments(recurrent, "generate", monkeypatch)
    sampling = recurrent.Sampling(prompt=("abc", "x"), n_tokens=3, temperature=.7, n_passes=5)
    nets = nets_of(recurrent, part)

    texts = recurrent.sample(nets, sampling, SimpleNamespace(tokenizer=Letters())).split("\n---\n")

    for prompt, text, call in zip(sampling.prompt, texts, calls, strict=True):
        assert text.startswith(prompt)
        assert len(text) == len(prompt) + 3
        assert call["nets"] is nets
        assert_passed_on(sampling, call, "n_tokens", "temperature", "n_passes")


@pytest.mark.parametrize("part", ["blocks", "end_to_end"])
def test_mdm_fills_each_prompt_as_told(part, monkeypatch):
    calls = record_arguments(mdm, "fill", monkeypatch)
    sampling = mdm.Sampling(prompt=("ab<gap:3>cd", "x<gap:1>"), n_moves=3, grid="cosine", temperature=.7)
    nets = nets_of(mdm, part)

    texts = mdm.sample(nets, sampling, SimpleNamespace(tokenizer=Letters())).split("\n---\n")

    assert len(texts[0]) == 7
    assert texts[0].startswith("ab")
    assert texts[0].endswith("cd")
    assert len(texts[1]) == 2
    for call in calls:
        assert call["nets"] is nets
        assert call["sampling"] is sampling


def test_mdm_fills_a_window_of_gaps_without_a_prompt():
    nets = nets_of(mdm, "blocks")

    text = mdm.sample(nets, mdm.Sampling(n_moves=2), SimpleNamespace(tokenizer=Letters()))

    assert len(text) == nets[0].config.seq_len


@pytest.mark.parametrize("part", ["blocks", "end_to_end"])
def test_dit_generates_as_told(part, monkeypatch):
    calls = record_arguments(dit, "generate_images", monkeypatch)
    sampling = dit.Sampling(n_images=1, guidance=1.5, euler_steps=3)
    nets = nets_of(dit, part)
    dit.sample(nets, sampling)
    assert calls[0]["nets"] is nets
    assert_passed_on(sampling, calls[0], "guidance", "euler_steps")


class HeldOutImages:
    """Data that has held-out images only, and no way to others."""
    names = [f"name {c}" for c in range(10)]

    def held_out(self, n, config):
        return IMAGES[:n], LABELS[:n]


@pytest.mark.parametrize("part", ["blocks", "end_to_end"])
@pytest.mark.parametrize("sampling", [
    vit.Sampling(n_images=3, sampler="chain", temperature=.5, euler_steps=7),
    vit.Sampling(n_images=2, sampler="averaged", temperature=.25, euler_steps=8),
])
def test_vit_classifies_held_out_images_as_told(sampling, part, monkeypatch):
    calls = record_arguments(vit, "classify", monkeypatch)
    nets = nets_of(vit, part)

    lines = vit.sample(nets, sampling, HeldOutImages()).splitlines()

    call, = calls
    assert call["nets"] is nets
    assert torch.equal(call["x"], IMAGES[:sampling.n_images])
    assert_passed_on(sampling, call, "sampler", "temperature", "euler_steps")
    assert len(lines) == sampling.n_images


def test_vit_tells_the_true_name_and_the_one_that_was_found(monkeypatch):
    monkeypatch.setattr(vit, "classify", lambda nets, x, *settings: torch.arange(len(x)))
    lines = vit.sample(blocks_of(vit), vit.Sampling(n_images=3), HeldOutImages()).splitlines()
    for i in range(3):
        assert lines[i] == f"image {i}: name {LABELS[i]}, classified as name {i}"


# ---- Evaluation: who knows nothing scores log2 V ----------------------------------------------------------

def held_out(*columns):
    """Data to be scored, with two bytes a token."""
    batch = columns if len(columns) > 1 else columns[0]
    return SimpleNamespace(bytes_per_token=2.0, held_out=lambda n, config: batch)


class Asked(Exception):
    """Raised in the place of an answer."""


@pytest.mark.parametrize("module, expected", [
    (mdm, None),
    (vit, None),
    (dit, 1000),
    (gpt, 256),
    (recurrent, 256),
])
def test_as_much_is_scored_as_is_promised_all_where_none_is_said(module, expected):
    asked_for = []

    def held_out(n, config):
        asked_for.append(n)
        raise Asked
    with pytest.raises(Asked):
        module.evaluate(blocks_of(module), {}, SimpleNamespace(held_out=held_out, bytes_per_token=1.0))
    assert asked_for == [expected]


def labelled_images(n):
    """n images that have their label in each pixel, and the labels."""
    label = torch.arange(n) % 10
    images = label.float().view(n, 1, 1, 1).expand(n, 3, 8, 8)
    return images, label


def counting_text(n):
    """(n, 17) texts in which every token is followed by the next."""
    return (torch.arange(n)[:, None] + torch.arange(17)) % 64


def truth_of(x):
    """The labels of labelled images, or the next tokens of a counting text."""
    if x.dim() == 4:
        return x[:, 0, 0, 0].long()                                        # (B,)
    return (x + 1) % 64                                                    # (B, T)


def give_prior(block, scale):
    """Puts a prior in the place of a network: the truth is exp(scale) times as probable as another label."""

    def logits(x, z, sigma, context=block.b):
        assert context == block.b                                          # each reads its own context
        prior = scale * F.one_hot(truth_of(x), len(block.table))
        found = bayes_logits(prior, z, sigma, block.table)
        return (found, None) if isinstance(block, recurrent.Block) else found
    block.logits = logits
    block.context = lambda x: block.b
    block.condition = lambda x: (x, None)


def blocks_with_priors(module, scales, **noise):
    config = tiny(module, n_blocks=len(scales), **noise)
    blocks = [module.Block(config, b) for b in range(len(scales))]
    for block, scale in zip(blocks, scales):
        give_prior(block, scale)
    return blocks


def cross_entropy_of_prior(scale, n_class):
    """Nats of the truth that has exp(scale) times the probability of each other."""
    return math.log(math.exp(scale) + n_class - 1) - scale


def hidden_nats(block, scale, sigma):
    """Nats of y that a block with a prior does not know when it sees z, by Bayes' rule."""
    table = block.table
    y = torch.arange(300 * len(table)) % len(table)
    z = table[y] + sigma * torch.randn(len(y), 32)
    posterior = z @ table.T / sigma ** 2 + scale * F.one_hot(y)
    return F.cross_entropy(posterior, y).item()


def shares_by_bayes_rule(blocks, scales):
    """{row: nats} of the bound: what a block learns from its interval, and what is hidden at the ends."""
    noise = blocks[0].noise
    expected = {}
    for block, scale in zip(blocks, scales):
        lo, hi = noise.interval(block.b)
        expected[f"block {block.b}"] = hidden_nats(block, scale, hi) - hidden_nats(block, scale, lo)
    not_read = hidden_nats(blocks[-1], scales[-1], noise.sigma_min)
    expected["ends"] = not_read + 1 / (2 * noise.sigma_max ** 2)
    return expected


def silent_baseline(config, module):
    """A baseline that finds all labels equally probable."""
    net = module.EndToEnd(config)
    for p in net.parameters():
        nn.init.zeros_(p)
    return net


def scored_nats(module, blocks, others, n_examples):
    """What evaluate finds, in nats a label or token: {row: nats} of scores, and of shares of the bound."""
    if module is vit:
        data = held_out(*labelled_images(n_examples))
        unit, nats = "bits per label", math.log(2)
    else:
        data = held_out(counting_text(n_examples))
        unit, nats = "bits per byte", 2 * math.log(2)
    found = []
    for table in module.evaluate(blocks, others, data).values():
        in_nats = {}
        for row, values in table.items():
            if unit in values:  # an accuracy is not
                in_nats[row] = nats * values[unit]
        found.append(in_nats)
    return found


@pytest.mark.parametrize("noise", [dict(), dict(sigma_min=.3, sigma_max=5.0)])  # narrow: the ends carry bits
@pytest.mark.parametrize("module, scales", [
    (vit, [0]), (vit, [0, 0]),
    (vit, [30, 0]), (vit, [0, 30]),
    (gpt, [0]), (gpt, [0, 0]),
    (gpt, [30, 0]), (gpt, [0, 30]),
    (gpt, [2, 2]), (gpt, [-2, -2]),
    (recurrent, [0]), (recurrent, [-2]),
])
def test_an_exact_posteriors_bound_is_its_cross_entropy_log2_V_if_it_knows_nothing(module, scales, noise):
    blocks = blocks_with_priors(module, scales, **noise)
    n_class = len(blocks[0].table)
    others = {"end to end": silent_baseline(blocks[0].config, module)}
    n_examples = 1600 if module is vit else 650              # the last batch is smaller

    scores, shares = scored_nats(module, blocks, others, n_examples)

    assert shares == pytest.approx(shares_by_bayes_rule(blocks, scales), abs=.12)
    assert scores["blocks, bound"] == pytest.approx(sum(shares.values()))
    if len(set(scales)) == 1:
        exact = cross_entropy_of_prior(scales[0], n_class)
        assert scores["blocks, bound"] == pytest.approx(exact, abs=.12)
    for b, scale in enumerate(scales):
        exact = cross_entropy_of_prior(scale, n_class)
        assert scores[f"block {b} alone"] == pytest.approx(exact, abs=1e-3)
    if len(scales) > 1:  # the mean of log p is the prior of the mean
        mean = sum(scales) / len(scales)
        exact = cross_entropy_of_prior(mean, n_class)
        assert scores["blocks, averaged"] == pytest.approx(exact, abs=1e-3)
    assert scores["end to end"] == pytest.approx(math.log(n_class))


def answer_always(net, c):
    """Puts logits in the place of a network's that find label c far more probable than any other."""

    def logits(x, z=None, sigma=None):
        prior = 50.0 * F.one_hot(torch.full((len(x),), c), 10)
        if z is None:
            return prior
        return bayes_logits(prior, z, sigma, net.table)
    net.logits = logits
    return net


def test_accuracies_are_in_per_cent_of_all_held_out_images():
    label = torch.arange(650) % 10                           # a batch of 500, and a smaller one of 150
    label[600:] = 0
    config = tiny(vit)
    blocks = [answer_always(vit.Block(config, b), 0) for b in range(2)]
    others = {"end to end": answer_always(vit.EndToEnd(config), 0),
              "control": answer_always(vit.EndToEnd(config.control()), 1)}

    tables = vit.evaluate(blocks, others, held_out(torch.zeros(650, 3, 8, 8), label))

    rows = tables["held-out images"]
    accuracies = {name: row["accuracy, %"] for name, row in rows.items() if "accuracy, %" in row}
    zeros = 100 * (60 + 50) / 650
    ones = 100 * 60 / 650
    assert accuracies == pytest.approx({
        "end to end": zeros,
        "control": ones,
        "blocks, averaged": zeros,
        "blocks, chain from z = 0": zeros,
        "blocks, chain from noise": zeros,
    })


def test_the_accuracy_of_a_chain_from_noise_is_a_mean_of_four_draws(monkeypatch):
    temperatures = []

    def classify(nets, x, sampler="averaged", euler_steps=0, temperature=0.0):
        if sampler == "chain":
            temperatures.append(temperature)
        right = temperatures.count(1.0) == 3                 # one draw of four is right
        return labelled_images(len(x))[1] + (not right)
    monkeypatch.setattr(vit, "classify", classify)
    blocks = blocks_with_priors(vit, [0, 0])

    rows = vit.evaluate(blocks, {}, held_out(*labelled_images(100)))["held-out images"]

    assert temperatures == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert rows["blocks, chain from noise"]["accuracy, %"] == pytest.approx(25)
    assert rows["blocks, chain from z = 0"]["accuracy, %"] == 0


@pytest.mark.parametrize("n_blocks, knows", [(1, None), (2, None), (2, 0), (2, 1)])
def test_masked_blocks_that_know_nothing_score_their_steps_of_alpha_in_all_log2_V(n_blocks, knows):
    config = tiny(mdm, n_blocks=n_blocks, eps=.05)
    text = torch.arange(17).expand(650, -1)
    truth = F.one_hot(text[0, :16], 64).float()              # (16, 64)
    blocks = [mdm.Block(config, b) for b in range(n_blocks)]
    if knows is not None:
        blocks[knows].logits = lambda z, t: (30 * truth).expand(len(z), -1, -1)
    others = {"end to end": mdm.EndToEnd(config)}            # fresh networks find all equally probable

    main, shares = mdm.evaluate(blocks, others, held_out(text)).values()

    step = 2.7 / n_blocks                                    # of the 3 bits of a byte of unknown text
    ends = .3
    of_baseline = [step] * n_blocks + [ends]
    of_blocks = list(of_baseline)
    if knows is not None:
        of_blocks[knows] = 0.0
    for name, expected in (("end to end", of_baseline), ("blocks", of_blocks)):
        found = [row[name] for row in shares.values()]
        assert found == pytest.approx(expected, abs=.05)
        assert main[name]["bits per byte"] == pytest.approx(sum(found))


def test_the_denoising_loss_is_that_of_the_owner_of_each_level():
    config = tiny(dit)
    images = torch.full((600, 3, 8, 8), config.data_mean)    # y is 0
    data = held_out(images, torch.arange(600) % 10)

    def be_off(net, off):  # by off * c_out, where the weight is 1 / c_out^2
        def denoise(z, sigma, label):
            _, c_out = config.noise.output_scales(sigma)
            return off * c_out.view(-1, 1, 1, 1)
        net.denoise = denoise
        return net
    blocks = [be_off(dit.Block(config, 0), 1), be_off(dit.Block(config, 1), 2)]
    baseline = be_off(dit.EndToEnd(config), 3)

    main, by_block = dit.evaluate(blocks, {"end to end": baseline}, data).values()

    assert main["end to end"]["weighted squared error"] == pytest.approx(9)
    assert main["blocks"]["weighted squared error"] == pytest.approx((1 + 4) / 2)
    assert by_block["block 0"] == pytest.approx({"blocks": 1, "end to end": 9})
    assert by_block["block 1"] == pytest.approx({"blocks": 4, "end to end": 9})


def test_the_denoising_loss_is_a_mean_over_levels_that_are_equally_likely_in_training(monkeypatch):
    evaluations = record_evaluations(dit, monkeypatch)
    blocks = blocks_of(dit, p_mean=.3, p_std=.8)

    dit.evaluate(blocks, {}, held_out(IMAGES, LABELS))

    noise = blocks[0].noise
    assert len(evaluations) == 24
    for i, evaluation in enumerate(evaluations):
        below = probability(noise, .002, evaluation.level) / probability(noise, .002, 80)
        assert below == pytest.approx((i + .5) / 24, abs=1e-5)
        assert evaluation.block == noise.block_of(evaluation.level)


def test_an_interval_that_is_too_narrow_to_be_scored_is_not_called_perfect():
    blocks = blocks_of(dit, n_blocks=4, edges="uniform")     # nearly all levels are those of blocks 1 and 2

    _, by_block = dit.evaluate(blocks, {}, held_out(IMAGES, LABELS)).values()

    assert list(by_block) == ["block 1", "block 2", "block 3"]
    assert min(row["blocks"] for row in by_block.values()) > 0


def test_all_models_are_scored_on_the_same_noise():
    net = blocks_of(dit, n_blocks=1)[0]
    others = {"end to end": net, "control": net}
    data = held_out(IMAGES, LABELS)

    main, by_block = dit.evaluate([net], others, data).values()
    torch.manual_seed(7)
    again, _ = dit.evaluate([net], others, data).values()

    assert main["end to end"] == main["control"] == main["blocks"]
    assert len(set(by_block["block 0"].values())) == 1
    assert main == again


# ---- Training, checkpoints, processes, command line -------------------------------------------------------

SMALL_TEXT = "--n-layer=2 --n-blocks=2 --n-head=2 --n-embd=16 --seq-len=16"
SMALL_IMAGE = "--n-layer=2 --n-blocks=2 --n-head=2 --n-embd=16 --n-mlp=32 --dropout=.1"
SMALL_RECURRENT = "--n-prelude=1 --n-core=1 --n-coda=1 --n-head=2 --n-embd=16 --seq-len=16"
SMALL = {
    "gpt": SMALL_TEXT,
    "mdm": f"{SMALL_TEXT} --ema=.9",
    "dit": f"{SMALL_IMAGE} --ema=.9",
    "vit": f"{SMALL_IMAGE} --augment=crop,flip,rand",
    "recurrent": f"{SMALL_RECURRENT} --mean-passes=3 --grad-passes=2 --readout=edm",
}
SAMPLE = {
    "gpt": ["--n-tokens=3"],
    "mdm": ["--prompt=a<gap:6>b", "--n-moves=3"],
    "dit": ["--n-images=1", "--euler-steps=3"],
    "vit": [],
    "recurrent": ["--n-tokens=2", "--n-passes=3"],
}
PARTS = ("--block=all", "--end-to-end", "--control")

# train.py as a user starts it, but on the data that is prepared already: child.py DATA_DIR flags
CHILD = """import pathlib, runpy, sys
import data
data.DATA_DIR = pathlib.Path(sys.argv.pop(1))
sys.argv[0] = "train.py"
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, prepared data, and a script that starts train.py on that data."""
    import gc
    folder = tmp_path_factory.mktemp("training")
    (folder / "data").mkdir()
    lines = [f"line {i}: the quick brown fox has number {i * i % 97}\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "child.py").write_text(CHILD.format(train=str(HERE / "train.py")))
    # train.main collects garbage after each part; it need not look at all of torch each time
    importlib.import_module("torch._dynamo")  # an optimizer imports it
    gc.freeze()
    return folder


@pytest.fixture
def flags(place):
    """flags(model, more...) is a command line that trains a model as small as it gets for four updates."""
    def small(model, *more):
        args = [f"--model={model}", *SMALL[model].split()]
        if model not in ("vit", "dit"):
            args.append(f"--data={place}/text.txt")
        args += ["--threads=1", "--batch-size=4", "--steps=4", "--log-every=2", "--save-every=2"]
        return [*args, *more]
    return small


def train_all_parts(args):
    for part in PARTS:
        train.main([*args, part])


def jobs_of(monkeypatch, args):
    """What train.main would train, without training it."""
    jobs = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", jobs.append)
        train.main(args)
    return jobs


def cut(monkeypatch, args):
    """Train, and end after the first checkpoint as if killed."""
    save = train.save

    def save_and_end(path, content):
        save(path, content)
        if path.suffix == ".pt":
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", save_and_end)
        train.main(args)


def started(args, env=None, folder=HERE):
    """Python in a process of its own, which is killed if it has not ended after two minutes."""
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **(env or {})}
    child = subprocess.Popen([sys.executable, *args], cwd=folder, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timer = threading.Timer(120, child.kill)
    timer.daemon = True
    timer.start()
    return child


def child_args(place, args):
    """The arguments that make Python run train.py with these flags."""
    return [str(place / "child.py"), str(place / "data"), *args]


def bits(net):
    """{name: bytes} of a network's weights."""
    return {name: weight.numpy().tobytes() for name, weight in net.items()}


def weights(path):
    """The bits of the weights in a checkpoint, and of their running mean."""
    state = torch.load(path, weights_only=True)
    return bits(state["net"]), bits(state["average"] or {})


def untimed(rows):
    """Rows of a log, without milliseconds."""
    return [{name: value for name, value in row.items() if name != "ms"} for row in rows]


def untimed_log(path):
    """The log in a checkpoint, without milliseconds."""
    return untimed(torch.load(path, weights_only=True)["log"])


def log_of(path):
    """The rows of the log beside a checkpoint."""
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def report_of(folder):
    """What --eval saved."""
    return json.loads((folder / "eval.json").read_text())


CPU = torch.device("cpu")
FIVE_ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))  # held out; cut into 2, 2 and 1


class Toy(nn.Module):
    """A network with a matrix, an embedding, a norm and a bias, whose loss is large enough to be clipped."""

    def __init__(self, config=None, b=0):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.RMSNorm(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, batch):                                   # batch (n, 4)
        token = batch[:, 0].abs().long() % 5                    # (n,)
        h = self.linear(self.norm(self.embed(token)))           # (n, 3)
        return ((h - batch[:, 1:]) ** 2).mean() * 3


def toy_job(out, net=Toy, run=None, **training):
    """A Job that trains a Toy on random rows, six in an update, and validates it on FIVE_ROWS."""
    no_settings = mlp.Sampling()
    module = SimpleNamespace(Config=mlp.Sampling, Block=net)
    source = SimpleNamespace(
        settings=no_settings,
        about={"fingerprint": ""},
        batch=lambda n, config, index: torch.randn(n, 4),
        held_out=lambda n, config: FIVE_ROWS)
    training = train.Training(batch_size=6, **training)
    run = train.Run(out=str(out), **(run or {}))
    return train.Job("toy", module, "block_0", no_settings, training, run, source, CPU)


# -- one update, written out

def gradients_of(state, batch):
    """{name: gradient} of a Toy with these weights, on one batch."""
    net = Toy()
    net.load_state_dict(state)
    net(batch).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def norm_of(gradients):
    return math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))


def test_updates_are_those_of_adamw_written_out(tmp_path):
    # arrange: five updates of two warm-up steps and a cosine, each of three pieces of two rows
    job = toy_job(tmp_path, run=dict(save_every=99, log_every=99), steps=5, accumulate=3, lr=.02, beta2=.9,
                  weight_decay=.3, warmup=2, final_lr=.1, clip=10.0)
    batches, indices = [], []

    def batch(n, config, index):
        indices.append(index)
        batches.append(3 * torch.randn(n, 4))
        return batches[-1]
    job.data.batch = batch
    torch.manual_seed(train.seed_of(0, "block_0 weights"))
    weight = {name: p.detach() for name, p in Toy().named_parameters()}

    # act
    train.train(job)

    # check: the same by hand, with the mean over all six rows at once
    trained = torch.load(job.path, weights_only=True)["net"]
    lrs = [.01, .02, .02, .02 * (.1 + .9 * .75), .02 * (.1 + .9 * .25)]
    m = {name: torch.zeros_like(w) for name, w in weight.items()}
    v = {name: torch.zeros_like(w) for name, w in weight.items()}
    norms = []
    for t, lr in enumerate(lrs, 1):
        gradients = gradients_of(weight, torch.cat(batches[3 * t - 3:3 * t]))
        norms.append(norm_of(gradients))
        for name, g in gradients.items():
            g = g * min(1, 10 / norms[-1])
            m[name] = .9 * m[name] + .1 * g
            v[name] = .9 * v[name] + .1 * g ** 2
            m_hat = m[name] / (1 - .9 ** t)
            v_hat = v[name] / (1 - .9 ** t)
            decay = .3 if name in ("embed.weight", "linear.weight") else 0
            weight[name] = weight[name] * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + 1e-8)
    assert indices == list(range(15))
    assert min(norms) < 10 < max(norms)  # some are clipped, some are not
    for name, w in weight.items():
        torch.testing.assert_close(trained[name], w, rtol=1e-4, atol=1e-6)


# -- the running mean, validation, log lines

def test_the_running_mean_is_carried_with_a_decay_that_warms_up(tmp_path):
    learner = train.Learner(toy_job(tmp_path, ema=.3, lr=.1, warmup=0, steps=5, accumulate=2))
    mean = copy.deepcopy(learner.net.state_dict())

    for decay in (2 / 11, 3 / 12, .3, .3, .3):  # (1 + t) / (10 + t), but at most .3
        train.update(learner)
        for name, weight in learner.net.state_dict().items():
            mean[name] = decay * mean[name] + (1 - decay) * weight

    for name, weight in learner.average.state_dict().items():
        torch.testing.assert_close(weight, mean[name], rtol=1e-4, atol=1e-6)


def test_the_running_mean_is_what_is_validated_saved_and_scored(tmp_path):
    job = toy_job(tmp_path, ema=.5, lr=.1, warmup=0, steps=5)
    train.train(job)

    state = train.load(job.path, "toy")
    mean, last = Toy(), Toy()
    mean.load_state_dict(state["average"])
    last.load_state_dict(state["net"])
    logged = state["log"][-1]["val_loss"]
    assert logged == pytest.approx(mean(FIVE_ROWS).item(), rel=1e-5)
    assert logged != pytest.approx(last(FIVE_ROWS).item(), rel=1e-3)
    scored, _ = train.trained(job.module, "toy", "block_0", tmp_path, CPU)
    assert scored(FIVE_ROWS).item() == mean(FIVE_ROWS).item()


class Mean(nn.Module):
    """Its loss is the mean of what it is given, or of the product of two columns."""

    def forward(self, batch):
        if torch.is_tensor(batch):
            return batch.mean()
        first, second = batch
        return (first * second).mean()


@pytest.mark.parametrize("n", range(1, 10))
def test_the_validation_loss_is_the_mean_over_rows_however_they_are_cut(n):
    rows = torch.arange(n).float() ** 2
    assert train.validate(Mean(), rows) == pytest.approx(rows.mean().item())
    assert train.validate(Mean(), (rows, rows)) == pytest.approx((rows ** 2).mean().item())


class Noise(nn.Module):
    """Its loss is noise below 1, and a thousand, which dropout would change."""

    def __init__(self, config=None, b=0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.dropout = nn.Dropout(.5)

    def forward(self, batch):
        thousand = 1e3 * self.dropout(torch.ones(99)).mean()
        return thousand + torch.rand(()) + 0 * self.weight.sum()


def test_validation_is_without_dropout_and_with_the_same_noise_at_every_line(tmp_path):
    job = toy_job(tmp_path, Noise, dict(log_every=1), steps=4)
    train.train(job)

    rows = log_of(job.path)
    assert len({row["loss"] for row in rows}) == 4
    assert len({row["val_loss"] for row in rows}) == 1
    assert 1e3 <= rows[0]["val_loss"] < 1e3 + 1


@pytest.mark.parametrize("mode", [True, False])
def test_validation_leaves_the_mode_of_a_network_as_it_was_and_makes_no_gradient(mode):
    net = Noise().train(mode)
    losses = [train.validate(net, FIVE_ROWS) for _ in range(2)]
    assert losses[0] == losses[1]
    assert 1e3 <= losses[0] < 1e3 + 1
    assert net.training == net.dropout.training == mode
    assert net.weight.grad is None


@pytest.mark.parametrize("log_every, save_every, lines, checkpoints", [
    (3, 4, [3, 6, 7], [4, 7]),
    (1, 9, [1, 2, 3, 4, 5, 6, 7], [7]),
    (0, 0, [7], [7])])
def test_lines_and_checkpoints_come_when_asked_with_the_mean_loss_since_the_line_before(
        log_every, save_every, lines, checkpoints, tmp_path, monkeypatch, capsys):
    # arrange: a Toy that notes each training loss, and a `save` that notes each checkpoint
    losses, saved = [], []
    save = train.save

    class NotesLosses(Toy):
        def forward(self, batch):
            loss = super().forward(batch)
            if self.training:
                losses.append(loss.item())
            return loss

    def save_and_note(path, content):
        if path.suffix == ".pt":
            saved.append(content["step"])
        save(path, content)
    monkeypatch.setattr(train, "save", save_and_note)
    run = dict(log_every=log_every, save_every=save_every)
    job = toy_job(tmp_path, NotesLosses, run, steps=7, accumulate=2, lr=.02, warmup=2, final_lr=.1)

    # act
    train.train(job)

    # check
    printed, rows = capsys.readouterr().out, log_of(job.path)
    assert [row["step"] for row in rows] == lines
    assert saved == checkpoints
    assert train.load(job.path, "toy")["log"] == rows
    assert printed.count("| step ") == len(rows)
    of_update = np.reshape(losses, (7, 2)).mean(1)  # two pieces an update
    cosine = [1 + math.cos(math.pi * i / 5) for i in range(5)]  # over the five after the warm-up
    lrs = [.01, .02] + [.02 * (.1 + .9 * c / 2) for c in cosine]
    for before, row in zip([0, *lines], rows):
        step = row["step"]
        assert row["loss"] == pytest.approx(of_update[before:step].mean())
        assert row["lr"] == pytest.approx(lrs[step - 1])
        assert (f"block 0 | step {step}/7 | loss {row['loss']:.4f} | val {row['val_loss']:.4f} | "
                f"lr {row['lr']:.1e} | {row['ms']:.0f} ms/step") in printed


def test_held_out_examples_are_four_pieces_of_a_batch(tmp_path):
    job = toy_job(tmp_path, steps=1, accumulate=3)
    numbers = []

    def held_out(n, config):
        numbers.append(n)
        return FIVE_ROWS
    job.data.held_out = held_out
    train.train(job)
    assert numbers == [4 * 2]


def test_milliseconds_and_minutes_left_are_those_of_this_run(tmp_path, monkeypatch, capsys):
    # arrange: a checkpoint at update 4 that seems to be of a run of 10, and a clock of six seconds a look
    every_two = dict(log_every=2, save_every=2)
    train.train(toy_job(tmp_path, run=every_two, steps=4))
    job = toy_job(tmp_path, run=dict(every_two, resume=True), steps=10, final_lr=1)
    state = torch.load(job.path, weights_only=True)
    state["training"] = train.flat(job.training)
    torch.save(state, job.path)
    clock = itertools.count(step=6)  # it is read before the first update, and at each line
    monkeypatch.setattr(train.time, "time", lambda: next(clock))
    capsys.readouterr()

    # act
    train.train(job)

    # check: 6 s for 2 updates, 12 s for 4, 18 s for 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "| step " in line]
    assert len(lines) == 3
    for line, left in zip(lines, ("0.2 min left", "0.1 min left", "0.0 min left")):
        assert "| 3000 ms/step |" in line
        assert line.endswith(f"| {left}")


# -- how long it trains

def without_steps(args):
    return [arg for arg in args if not arg.startswith("--steps")]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("model", ["vit", "gpt"])
def test_epochs_are_passes_over_images_or_over_windows_of_a_text(
        model, pieces, place, flags, tmp_path, monkeypatch):
    examples = 1347  # training digits
    if model == "gpt":
        n_bytes = len((place / "text.txt").read_bytes())
        examples = (n_bytes * 9 // 10) // 16  # the last tenth is held out; seq_len is 16
    args = flags(model, "--block=all", "--epochs=2.5", f"--accumulate={pieces}", f"--out={tmp_path}")

    jobs = jobs_of(monkeypatch, without_steps(args))

    assert [job.training.steps for job in jobs] == [math.ceil(2.5 * examples / 4)] * 2


@pytest.mark.parametrize("typed, steps, epochs", [
    ("--preset=cpu", 1000, 10),
    ("--preset=cpu --steps=7", 7, 0),
    ("--preset=cpu --epochs=7", 1000, 7),
    ("--preset=default", 1500, 0),
    ("--preset=default --epochs=7", 1500, 7),
    ("--steps=7", 7, 0)])
def test_what_is_typed_of_steps_and_epochs_outvotes_the_preset(typed, steps, epochs):
    asked = train.parse(["--model=vit", "--block=0", *typed.split()])
    training = train.replaced(train.Training(), train.values_of(asked))
    assert (training.steps, training.epochs) == (steps, epochs)


def test_a_run_of_epochs_goes_on_for_the_steps_or_epochs_that_are_typed(flags, tmp_path):
    constant = flags("vit", "--block=0", "--final-lr=1")
    resume = ["--model=vit", "--block=0", "--resume", f"--out={tmp_path}"]
    path = tmp_path / "vit/block_0.pt"

    train.main([*without_steps(constant), "--epochs=.005", f"--out={tmp_path}"])
    assert train.load(path, "vit")["step"] == 2  # .005 * 1347 / 4, rounded up

    train.main([*resume, "--steps=3"])
    state = train.load(path, "vit")
    assert state["step"] == state["training"]["steps"] == 3
    assert state["training"]["epochs"] == 0
    with pytest.raises(UserError, match=r"steps \(2; it has 3 already\)"):
        train.main([*resume, "--epochs=.005"])

    train.main([*resume, "--epochs=.01"])
    train.main([*constant, "--steps=4", f"--out={tmp_path}/whole"])  # .01 * 1347 / 4, rounded up
    assert weights(path) == weights(tmp_path / "whole/vit/block_0.pt")


def test_what_is_typed_outvotes_the_checkpoint_and_this_the_preset(flags, tmp_path):
    train.main([*without_steps(flags("vit", "--block=0")), "--epochs=.005", f"--out={tmp_path}"])
    typed = ["--resume", f"--out={tmp_path}", "--preset=cpu", "--lr=.5"]
    asked = train.parse(["--model=vit", "--block=0", *typed])
    values = train.values_of(asked)
    assert values["lr"] == .5
    assert values["n_embd"] == 16
    assert values["augment"] == "crop,flip,rand"
    assert values["epochs"] == .005 != asked.preset["epochs"]


def test_values_of_a_typed_preset_that_the_checkpoint_outvotes_are_told(flags, tmp_path, capsys):
    args = [*flags("vit", "--block=0", "--lr=.5", f"--out={tmp_path}"), "--data=digits"]
    train.main([*args, "--preset=default"])                            # nothing is there that could outvote it
    train.main([*args, "--resume"])                                    # no preset was typed
    assert "outvotes" not in capsys.readouterr().out

    train.main([*args, "--resume", "--preset=cpu"])

    told = [line for line in capsys.readouterr().out.splitlines() if "outvotes" in line]
    assert told == ["note: the checkpoint outvotes --preset cpu: patch_size 2, not 8"]


def test_a_run_with_a_constant_learning_rate_can_be_prolonged(flags, tmp_path):
    common = flags("mdm", "--block=0", "--warmup=2", "--final-lr=1")
    resume = ["--model=mdm", "--block=0", "--resume", f"--out={tmp_path}/two"]
    train.main([*common, "--steps=8", f"--out={tmp_path}/whole"])
    train.main([*common, "--steps=4", f"--out={tmp_path}/two"])

    train.main([*resume, "--steps=8"])

    assert weights(tmp_path / "whole/mdm/block_0.pt") == weights(tmp_path / "two/mdm/block_0.pt")
    with pytest.raises(UserError, match="it has 8 already"):
        train.main([*resume, "--steps=5"])


def test_a_run_whose_learning_rates_depend_on_its_length_cannot_be_prolonged(flags, tmp_path, capsys):
    train.main(flags("mdm", "--block=0", f"--out={tmp_path}"))
    resume = ["--model=mdm", "--block=0", "--resume", f"--out={tmp_path}"]
    says = r"steps \(4 -> 8\), on which its learning rates depend .*--final-lr 1"
    with pytest.raises(UserError, match=says):
        train.main([*resume, "--steps=8"])
    capsys.readouterr()
    train.main(resume)
    assert "has all its 4 updates" in capsys.readouterr().out


# ---- Same bits --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["mdm", "vit"])  # with a running mean; with augmentation and dropout
def test_a_run_cut_and_resumed_ends_at_the_bits_of_one_that_was_not(model, flags, tmp_path, monkeypatch):
    common = flags(model, "--steps=5", "--accumulate=2", "--block=0")
    train.main([*common, f"--out={tmp_path}/whole"])
    cut(monkeypatch, [*common, f"--out={tmp_path}/cut"])

    train.main([f"--model={model}", "--block=0", "--resume", "--log-every=2", f"--out={tmp_path}/cut"])

    whole = tmp_path / "whole" / model / "block_0.pt"
    again = tmp_path / "cut" / model / "block_0.pt"
    assert weights(whole) == weights(again)
    assert [row["step"] for row in log_of(whole)] == [2, 4, 5]
    assert [row["step"] for row in log_of(again)] == [2, 4, 5]
    for row, other in zip(log_of(whole), log_of(again)):
        assert row["val_loss"] == other["val_loss"]
    net, state = train.trained(importlib.import_module(model), model, "block_0", tmp_path / "cut", "cpu")
    assert bits(net.state_dict()) == bits(state["average"] or state["net"])


@pytest.mark.parametrize("more", ["--log-every=1", "--checkpoint-activations"])
def test_logging_and_checkpointed_activations_change_no_weight(more, flags, tmp_path):
    common = flags("vit", "--dropout=.3", "--block=1", "--log-every=99", "--save-every=99")
    train.main([*common, f"--out={tmp_path}/without"])
    train.main([*common, more, f"--out={tmp_path}/with"])
    assert weights(tmp_path / "without/vit/block_1.pt") == weights(tmp_path / "with/vit/block_1.pt")


def test_every_part_update_and_piece_has_random_numbers_of_its_own(flags, tmp_path, monkeypatch):
    # arrange: note the seed of each batch, and its windows with the number that is drawn next
    seeds, draws = [], []
    real = data.text.Data.batch

    def batch(self, n, config, index):
        seeds.append(torch.initial_seed())
        windows = real(self, n, config, index)
        draws.append(windows.numpy().tobytes() + torch.rand(1).numpy().tobytes())
        return windows
    monkeypatch.setattr(data.text.Data, "batch", batch)

    # act and check: four parts of four updates of two pieces
    train_all_parts(flags("gpt", "--accumulate=2", f"--out={tmp_path}"))
    assert len(seeds) == 4 * 4 * 2
    assert len(set(seeds)) == len(set(draws)) == len(seeds)
    # another seed shares none of them
    train.main(flags("gpt", "--block=0", "--seed=1", f"--out={tmp_path}/1"))
    assert len(set(seeds)) == 4 * 4 * 2 + 4
    # blocks begin with other weights
    first, _ = weights(tmp_path / "gpt/block_0.pt")
    second, _ = weights(tmp_path / "gpt/block_1.pt")
    for name in first:
        assert first[name] != second[name]


def test_a_block_has_the_same_bits_alone_killed_interrupted_and_resumed(place, flags, tmp_path):
    # arrange: both blocks, one after another, in one process
    common = flags("vit", "--steps=100", "--log-every=9")
    train.main([*common, "--block=all", "--save-every=0", f"--out={tmp_path}/whole"])
    alone = [*common, "--block=1", f"--out={tmp_path}/a b"]
    path = tmp_path / "a b/vit/block_1.pt"

    # act: kill one that trains block 1 alone when its first checkpoint is there
    child = started(child_args(place, alone))
    while not path.exists() and child.poll() is None:
        time.sleep(.005)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    killed_at = train.load(path, "vit")["step"]
    assert 0 < killed_at < 100

    # act: resume it, and interrupt it when it trains
    child = started(child_args(place, [*alone, "--resume"]))
    lines = []
    while not lines or "| step " not in lines[-1]:
        lines.append(next(child.stdout))
    child.send_signal(signal.SIGINT)
    lines += child.stdout.read().splitlines()
    assert child.wait() == 130, lines
    step = train.load(path, "vit")["step"]
    assert killed_at < step < 100
    assert f"holds update {step} of 100; go on: the same" in lines[-1]

    # act: resume it to its end
    train.main(["--model=vit", "--block=1", f"--out={tmp_path}/a b", "--resume"])

    # check
    assert weights(path) == weights(tmp_path / "whole/vit/block_1.pt")
    assert not path.with_name("block_0.pt").exists()


# ---- Signals, processes, pipes ----------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_update_end_and_saves_it(number, flags, tmp_path, monkeypatch, capsys):
    # arrange: the signal comes while the batch of the third update is drawn
    real, batches = data.text.Data.batch, []

    def batch(self, n, config, index):
        batches.append(index)
        if len(batches) == 3:
            os.kill(os.getpid(), number)
        return real(self, n, config, index)

    def unhandled(number, frame):
        raise AssertionError("the signal is not handled")
    common = flags("gpt", "--block=all", "--log-every=0", "--save-every=0")
    train.main([*common, f"--out={tmp_path}/whole"])
    path = tmp_path / "cut/gpt/block_0.pt"
    signal.signal(number, unhandled)
    monkeypatch.setattr(data.text.Data, "batch", batch)

    # act
    with pytest.raises(SystemExit) as end:
        train.main([*common, f"--out={tmp_path}/cut"])

    # check: what was saved and printed, and that block 1 was not begun
    assert end.value.code == 128 + number
    assert signal.getsignal(number) is unhandled
    assert train.load(path, "gpt")["step"] == 3
    assert [row["step"] for row in log_of(path)] == [3]
    assert f"{path} holds update 3 of 4; go on: the same command with --resume" in capsys.readouterr().out
    assert not path.with_name("block_1.pt").exists()

    # check: it goes on to the same bits
    train.main([*common, f"--out={tmp_path}/cut", "--resume"])
    for name in ("block_0.pt", "block_1.pt"):
        assert weights(path.with_name(name)) == weights(tmp_path / "whole/gpt" / name)


def test_a_stopped_run_that_overwrote_is_resumed_without_overwrite(tmp_path):
    job = toy_job(tmp_path, steps=9)
    assert train.how_to_go_on(job, 4).endswith("the same command with --resume")
    job = toy_job(tmp_path, run=dict(overwrite=True), steps=9)
    line = train.how_to_go_on(job, 4)
    assert "update 4 of 9" in line
    assert line.endswith("--resume in the place of --overwrite")


def test_two_processes_a_block_share_its_batch_under_torchrun(place, flags, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    four = started([*torchrun, *child_args(place, flags("vit", "--block=all", f"--out={tmp_path}/four"))])
    train.main(flags("vit", "--block=all", "--accumulate=2", f"--out={tmp_path}/one"))
    printed, _ = four.communicate()
    assert four.returncode == 0, printed
    for b in range(2):
        one = train.load(tmp_path / f"one/vit/block_{b}.pt", "vit")
        two = train.load(tmp_path / f"four/vit/block_{b}.pt", "vit")
        assert one["training"] == two["training"]
        assert one["log"][0]["val_loss"] != one["log"][1]["val_loss"]
        for name, weight in one["net"].items():
            torch.testing.assert_close(two["net"][name], weight, rtol=1e-5, atol=1e-6)


# one of two ranks that share the pieces of a batch; in update 3 rank 1 alone gets SIGTERM
RANK = """import os, pathlib, signal, sys
import data, gpt, train
from data import text

def batch(self, n, config, index):
    if index == 9 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, n, config, index)

data.DATA_DIR = pathlib.Path(sys.argv.pop(1))
gpt.PRESETS["default"]["clip"] = 1e9
real, text.Data.batch = text.Data.batch, batch
train.main(sys.argv[1:])
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started_ranks(args):
    """Two processes, as torchrun starts them."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first = started(args, {**meeting, "RANK": "0", "LOCAL_RANK": "0"})
    second = started(args, {**meeting, "RANK": "1", "LOCAL_RANK": "1"})
    return first, second


def test_ranks_exchange_the_gradients_of_all_pieces_and_stop_together(place, flags, tmp_path, monkeypatch):
    # arrange: no clipping, so that AdamW's moments are the gradients' own
    monkeypatch.setitem(gpt.PRESETS["default"], "clip", 1e9)
    common = flags("gpt", "--block=0", "--batch-size=12", "--warmup=0", "--final-lr=1", "--log-every=1",
                   "--save-every=0")
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    # act: three pieces become four, two for each rank
    args = [*common, "--accumulate=3", f"--out={tmp_path}/ranks"]
    ranks = started_ranks([str(script), str(place / "data"), *args])
    train.main([*common, "--accumulate=4", "--steps=3", f"--out={tmp_path}/one"])
    printed = [rank.communicate()[0] for rank in ranks]

    # check: both stopped after update 3, and the first alone tells of it
    assert [rank.returncode for rank in ranks] == [143, 143], printed
    assert "Traceback" not in "".join(printed), printed
    assert printed[0].count("| step ") == 3
    assert "holds update 3 of 4" in printed[0]
    assert "| step " not in printed[1]
    assert "holds update" not in printed[1]

    # check: weights, moments and losses are those of one process
    one = train.load(tmp_path / "one/gpt/block_0.pt", "gpt")
    two = train.load(tmp_path / "ranks/gpt/block_0.pt", "gpt")
    assert one["step"] == two["step"] == 3
    assert two["training"]["accumulate"] == 4
    for name, weight in one["net"].items():
        torch.testing.assert_close(two["net"][name], weight, rtol=1e-4, atol=1e-5)
    for number, moments in one["optimizer"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(two["optimizer"][number][name], moments[name], rtol=1e-3, atol=1e-7)
    for row, other in zip(one["log"], two["log"], strict=True):
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)  # the mean over both ranks' pieces


def test_fewer_ranks_than_blocks_take_them_in_turn():
    blocks = ["block_0", "block_1", "block_2"]
    assert train.assign(blocks, rank=0, n_ranks=2) == (["block_0", "block_2"], 0, 1)
    assert train.assign(blocks, rank=1, n_ranks=2) == (["block_1"], 0, 1)


def test_more_ranks_than_blocks_share_batches_if_they_can_do_so_evenly():
    blocks = ["block_0", "block_1", "block_2"]
    assert train.assign(blocks, rank=4, n_ranks=6) == (["block_2"], 0, 2)
    assert train.assign(blocks, rank=1, n_ranks=6) == (["block_0"], 1, 2)
    with pytest.raises(UserError, match="4 processes cannot share 3 blocks"):
        train.assign(blocks, rank=0, n_ranks=4)


def test_a_batch_that_ranks_cannot_share_and_scoring_by_ranks_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes cannot share a batch of 4"):
        train.main(flags("gpt", "--end-to-end", f"--out={tmp_path}"))
    for action in ("--eval", "--sample"):
        with pytest.raises(UserError, match=f"{action} runs in one process"):
            train.main(["--model=gpt", action, f"--out={tmp_path}"])


@pytest.mark.parametrize("rank, tells", [("0", True), ("1", False)])
def test_the_first_rank_alone_tells_of_the_data(rank, tells, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    jobs_of(monkeypatch, flags("gpt", "--block=all", f"--out={tmp_path}"))
    assert ("data: " in capsys.readouterr().out) == tells


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch):
    devices = []

    def zeros(n, device):
        devices.append(device)
        return torch.ones(n)
    monkeypatch.setattr(torch, "zeros", zeros)
    train.set_up(train.Run(device="cuda"), train.Training(), local_rank=3)
    assert devices == ["cuda:3"]


def runs_into_a_closed_pipe(monkeypatch, args):
    """Run train.py, whose output nobody reads. Returns the code with which it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    stdout = open(writer, "w")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "argv", ["train.py", *args])
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    stdout.close()  # as the interpreter's end does
    return end.value.code


def test_a_closed_pipe_ends_training_scoring_and_sampling_with_code_1_and_no_traceback(
        flags, tmp_path, monkeypatch):
    train.main(flags("vit", "--block=all", "--steps=1", f"--out={tmp_path}"))
    training = flags("vit", "--control", "--log-every=1", f"--out={tmp_path}")
    scoring = ["--model=vit", "--eval", f"--out={tmp_path}"]
    sampling = ["--model=vit", "--sample", f"--out={tmp_path}"]  # one line, at the end
    for args in (training, scoring, sampling):
        assert runs_into_a_closed_pipe(monkeypatch, args) == 1


# ---- Checkpoints, and what is refused ---------------------------------------------------------------------

@pytest.mark.parametrize("error", [RuntimeError, OSError])  # of torch.save, of the system
def test_a_checkpoint_is_never_half_written(error, flags, tmp_path, monkeypatch):
    common = flags("gpt", "--block=0", f"--out={tmp_path}")
    path = tmp_path / "gpt/block_0.pt"
    cut(monkeypatch, common)
    before = path.read_bytes()

    def write_half(state, file):
        file.write(before[:1000])
        raise error
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(UserError, match="cannot write"):
        train.main([*common, "--resume"])

    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.part"))  # a full disk is not made fuller


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused_as_damaged(path, content):
    """Whether a checkpoint with this content is refused in one line, and left as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} is damaged, or not of this model") as error:
        train.load(path, path.parent.name)
    return "\n" not in str(error.value) and path.read_bytes() == content


def test_a_file_that_is_no_whole_checkpoint_of_this_part_is_refused(flags, tmp_path):
    train.main(flags("gpt", "--block=0", f"--out={tmp_path}"))
    whole = (tmp_path / "gpt/block_0.pt").read_bytes()
    wrong = tmp_path / "wrong/gpt/block_0.pt"
    assert refused_as_damaged(wrong, b"")
    assert refused_as_damaged(wrong, b"text")
    assert refused_as_damaged(wrong, whole[:-9])
    # one bit of a weight is another
    state = torch.load(tmp_path / "gpt/block_0.pt", weights_only=True)
    place = whole.index(state["net"]["head.weight"].numpy().tobytes()) + 9
    changed = bytearray(whole)
    changed[place] ^= 1
    assert refused_as_damaged(wrong, bytes(changed))
    # it is of another part, of another model
    assert refused_as_damaged(tmp_path / "wrong/gpt/control.pt", whole)
    assert refused_as_damaged(tmp_path / "wrong/mdm/block_0.pt", whole)


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_is_not_run(flags, tmp_path):
    train.main(flags("gpt", "--block=0", f"--out={tmp_path}"))
    trap = Code(tmp_path / "trap")
    state = torch.load(tmp_path / "gpt/block_0.pt", weights_only=True)
    torch.save({**state, "log": trap}, tmp_path / "code.pt")
    wrong = tmp_path / "wrong/gpt/block_0.pt"
    assert refused_as_damaged(wrong, (tmp_path / "code.pt").read_bytes())
    assert refused_as_damaged(wrong, pickle.dumps(trap))
    assert not trap.path.exists()


def test_other_settings_and_training_over_a_checkpoint_are_refused(flags, tmp_path, monkeypatch):
    common = flags("gpt", "--block=0", f"--out={tmp_path}", "--lr=.002")
    path = tmp_path / "gpt/block_0.pt"
    cut(monkeypatch, common)
    before = path.read_bytes()
    (tmp_path / "b.txt").write_text("another text\n" * 400)
    for more, says in (("--lr=.01", r"lr \(0.002 -> 0.01\)"),
                       ("--n-embd=32", r"n_embd \(16 -> 32\)"),
                       ("--gamma=.3", "gamma"),
                       ("--steps=9", "steps"),
                       (f"--data={tmp_path}/b.txt", "data")):
        with pytest.raises(UserError, match=f"trained with other settings: .*{says}"):
            train.main([*common, "--resume", more])
    with pytest.raises(UserError, match="is there already: --resume .* --overwrite .* --out"):
        train.main(common)
    assert path.read_bytes() == before


def test_overwrite_trains_anew(flags, tmp_path, monkeypatch):
    common = flags("gpt", "--block=0")
    cut(monkeypatch, [*common, "--lr=.1", f"--out={tmp_path}"])
    train.main([*common, "--overwrite", f"--out={tmp_path}"])
    train.main([*common, f"--out={tmp_path}/new"])
    assert weights(tmp_path / "gpt/block_0.pt") == weights(tmp_path / "new/gpt/block_0.pt")


# of these, --resume accepts other values
FREE = ("data", "epochs", "compile")


def another(value):
    if isinstance(value, str):
        return value + "x"
    return value + 1


@pytest.mark.parametrize("model", ["gpt", "vit"])
def test_resume_refuses_another_value_of_every_setting_that_decides_the_weights(
        model, flags, tmp_path, monkeypatch):
    [job] = jobs_of(monkeypatch, flags(model, "--block=0", "--ema=.5", f"--out={tmp_path}"))
    learner = train.Learner(job)
    train.save(job.path, learner.state())
    train.load_checkpoint(learner)  # with the same settings it goes on

    changed = set()
    for settings in (job.config, job.config.noise, job.training, job.data.settings):
        for field in fields(settings):
            value = getattr(settings, field.name)
            if not field.init or is_dataclass(value) or field.name in FREE:
                continue
            setattr(settings, field.name, another(value))
            with pytest.raises(UserError, match=rf"trained with other settings: .*\b{field.name} \("):
                train.load_checkpoint(learner)
            setattr(settings, field.name, value)
            changed.add(field.name)

    assert changed > {"n_embd", "p_mean", "lr", "clip", "seed", "steps", "split"}
    if model == "vit":
        assert "augment" in changed


def test_resume_of_an_older_checkpoint_takes_what_it_does_not_know_as_usual(flags, tmp_path, monkeypatch):
    [job] = jobs_of(monkeypatch, flags("gpt", "--block=0", f"--out={tmp_path}"))
    learner = train.Learner(job)
    state = learner.state()
    del state["settings"]["held_out"]
    del state["config"]["gate_start"]
    train.save(job.path, state)

    train.load_checkpoint(learner)  # both are as usual: it goes on
    job.data.settings.held_out = "test"
    with pytest.raises(UserError, match=r"held_out \( -> test\)"):
        train.load_checkpoint(learner)


def test_a_sample_function_that_returns_nothing_is_told(tmp_path, flags, monkeypatch):
    train.main(flags("gpt", "--block=all", "--steps=1", f"--out={tmp_path}"))
    monkeypatch.setattr(gpt, "sample", lambda nets, sampling, data: None)
    with pytest.raises(UserError, match="sample has to return"):
        train.main(["--model=gpt", "--sample", f"--out={tmp_path}", "--device=cpu", "--threads=1"])


def test_resume_accepts_the_same_data_in_another_place_and_no_other_data(flags, tmp_path, monkeypatch):
    [job] = jobs_of(monkeypatch, flags("gpt", "--block=0", f"--out={tmp_path}"))
    learner = train.Learner(job)
    train.save(job.path, learner.state())
    job.data.settings.data = "elsewhere"
    job.training.compile = "on"
    train.load_checkpoint(learner)
    monkeypatch.setitem(job.data.about, "fingerprint", "another")
    with pytest.raises(UserError, match="trained with other settings: the data's content;"):
        train.load_checkpoint(learner)


def test_no_block_is_trained_where_the_checkpoint_of_a_later_one_would_be_lost(flags, tmp_path):
    path = tmp_path / "gpt/block_1.pt"
    train.main(flags("gpt", "--block=1", "--steps=1", f"--out={tmp_path}"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="block_1.pt is there already"):
        train.main(flags("gpt", "--block=all", f"--out={tmp_path}"))
    assert path.read_bytes() == before
    assert not path.with_name("block_0.pt").exists()


def test_a_missing_part_is_trained_with_the_settings_of_those_that_are_there(flags, tmp_path, capsys):
    train.main(flags("gpt", "--block=1", "--weight-decay=.3", "--z-rate=.2", f"--out={tmp_path}/a b"))
    with pytest.raises(UserError, match="there is no .*block_0.pt; train it: ") as error:
        train.main(["--model=gpt", "--eval", f"--out={tmp_path}/a b"])
    command = shlex.split(str(error.value).split("train it: ")[1])
    assert command[:2] == ["python", "train.py"]
    capsys.readouterr()

    train.main(command[2:])

    # --resume says that nothing is to be resumed
    assert "it begins at update 0, with the settings of block_1.pt" in capsys.readouterr().out
    first = train.load(tmp_path / "a b/gpt/block_0.pt", "gpt")
    second = train.load(tmp_path / "a b/gpt/block_1.pt", "gpt")
    for settings in ("config", "training", "settings"):
        assert first[settings] == second[settings]


def test_a_checkpoint_of_its_own_is_followed_before_that_of_another_part(flags, tmp_path, monkeypatch):
    train.main(flags("gpt", "--block=0", "--lr=.001", "--steps=1", f"--out={tmp_path}"))
    train.main(flags("gpt", "--block=1", "--lr=.002", "--steps=1", f"--out={tmp_path}"))
    [job] = jobs_of(monkeypatch, ["--model=gpt", "--block=1", "--resume", f"--out={tmp_path}"])
    assert job.training.lr == .002
    [job] = jobs_of(monkeypatch, ["--model=gpt", "--control", "--resume", f"--out={tmp_path}"])
    assert job.training.lr == .001  # the first block's


def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_last_checkpoint(flags, tmp_path, monkeypatch):
    real, calls = gpt.EndToEnd.forward, []

    def forward(self, batch):
        """The fourth time the loss is finite, but its gradient is not: the slope of a root at 0."""
        calls.append(batch)
        loss = real(self, batch)
        if len(calls) == 4:
            loss = loss + (0 * self.head.weight.sum()).abs().sqrt()
        return loss
    monkeypatch.setattr(gpt.EndToEnd, "forward", forward)
    monkeypatch.setattr(train, "validate", lambda net, held_out: 0.0)
    with pytest.raises(UserError, match="the loss of end_to_end is not finite at update 4"):
        train.main(flags("gpt", "--end-to-end", f"--out={tmp_path}"))
    assert train.load(tmp_path / "gpt/end_to_end.pt", "gpt")["step"] == 2


# ---- Scores and samples -----------------------------------------------------------------------------------

def test_what_was_trained_otherwise_is_not_scored_beside_the_blocks(flags, tmp_path, capsys):
    # arrange: a baseline of another size, a control of other data, a first block with more updates
    (tmp_path / "b.txt").write_text("another text\n" * 400)
    common = flags("gpt", "--steps=1", f"--out={tmp_path}")
    train.main([*common, "--block=all"])
    train.main([*common, "--block=0", "--steps=2", "--overwrite"])
    train.main([*common, "--end-to-end", "--n-embd=32"])
    train.main([*common, "--control", f"--data={tmp_path}/b.txt"])
    capsys.readouterr()

    # act
    train.main(["--model=gpt", "--eval", f"--out={tmp_path}"])

    # check
    printed = capsys.readouterr().out
    assert re.search(r"without end to end: .*trained with other settings .*n_embd \(16 -> 32\)", printed)
    assert re.search("without control: .*trained with other settings .*the data's content", printed)
    report = report_of(tmp_path / "gpt")
    assert report["updates"] == {"2 blocks": 1}  # the fewest of any block
    rows = report["tables"]["bits per byte on held-out text"]
    assert "blocks, bound" in rows
    assert "end to end" not in rows
    assert "control" not in rows


def test_blocks_that_do_not_fit_together_are_neither_scored_nor_sampled(flags, tmp_path):
    common = flags("gpt", "--steps=1", f"--out={tmp_path}")
    train.main([*common, "--block=0"])
    train.main([*common, "--block=1", "--n-embd=32"])
    says = "block_1.pt was trained with other settings than block_0: n_embd"
    for action in ("--eval", "--sample"):
        with pytest.raises(UserError, match=says):
            train.main(["--model=gpt", action, f"--out={tmp_path}"])


def test_blocks_of_older_code_fit_newer_ones_whose_new_settings_are_as_usual(flags, tmp_path):
    train.main(flags("gpt", "--block=all", "--steps=1", f"--out={tmp_path}"))
    path = train.checkpoint_path(tmp_path, "gpt", "block_0")
    state = train.load(path, "gpt")
    del state["config"]["gate_start"]
    train.save(path, state)
    blocks, _ = train.assemble(gpt, "gpt", tmp_path, torch.device("cpu"))
    assert [net.config.gate_start for net in blocks] == [1.0, 1.0]

    train.main(flags("gpt", "--block=1", "--steps=1", "--gate-start=0", "--overwrite", f"--out={tmp_path}"))
    with pytest.raises(UserError, match=r"gate_start \(1.0 -> 0.0\)"):
        train.assemble(gpt, "gpt", tmp_path, torch.device("cpu"))


def test_scores_on_other_data_are_marked_so(flags, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("another text, as long as it has to be\n" * 400)
    train.main(flags("gpt", "--block=all", "--steps=1", f"--out={tmp_path}"))
    train.main(["--model=gpt", "--eval", f"--out={tmp_path}"])
    assert "other data" not in capsys.readouterr().out
    train.main(["--model=gpt", "--eval", f"--data={tmp_path}/other.txt", f"--out={tmp_path}"])
    assert "note: scored on other data than the blocks were trained on" in capsys.readouterr().out


def seed_all(seed):
    """Random states as in another process."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def scores_of_mdm(out, global_seed):
    seed_all(global_seed)
    train.main(["--model=mdm", "--eval", f"--out={out}"])
    return report_of(out / "mdm")["tables"]


def samples_of_mdm(out, capsys, global_seed, *more):
    """What is printed as sample of the blocks, the baseline and the control."""
    command = ["--model=mdm", "--sample", "--prompt=a<gap:9>b", "--n-moves=3", f"--out={out}", *more]
    capsys.readouterr()
    for part in ([], ["--end-to-end"], ["--control"]):
        seed_all(global_seed)
        train.main([*command, *part])
    return capsys.readouterr().out


def ruin_what_is_no_running_mean(folder, model):
    for path in folder.glob("*.pt"):
        state = train.load(path, model)
        for weight in state["net"].values():
            weight.fill_(math.nan)
        torch.save(state, path)


def test_scores_and_samples_are_those_of_the_running_mean_and_the_same_again(flags, tmp_path, capsys):
    train_all_parts(flags("mdm", f"--out={tmp_path}"))
    scores = scores_of_mdm(tmp_path, 1)
    samples = samples_of_mdm(tmp_path, capsys, 1)
    ruin_what_is_no_running_mean(tmp_path / "mdm", "mdm")
    assert scores_of_mdm(tmp_path, 2) == scores
    assert samples_of_mdm(tmp_path, capsys, 2) == samples
    assert samples_of_mdm(tmp_path, capsys, 1, "--seed=1") != samples


def sample_files(folder):
    """{name: bytes} of the arrays and pictures that --sample saved."""
    files = {}
    for path in folder.iterdir():
        if path.suffix in (".npy", ".png"):
            files[path.name] = path.read_bytes()
    return files


def test_samples_of_blocks_baseline_and_control_lie_beside_one_another_of_the_same_noise(
        flags, tmp_path, monkeypatch):
    # arrange: a `sample` that notes the networks and returns nothing but noise
    sampled = []

    def sample(nets, sampling, data):
        sampled.append(nets)
        return {"array": torch.randn(3), "picture": torch.randint(256, (2, 2, 3), dtype=torch.uint8)}
    monkeypatch.setattr(dit, "sample", sample)
    train_all_parts(flags("dit", "--steps=1", f"--out={tmp_path}"))
    command = ["--model=dit", "--sample", f"--out={tmp_path}"]

    # act
    for part in ([], ["--end-to-end"], ["--control"]):
        train.main([*command, *part])

    # check: each is of its networks
    blocks, baseline, control = sampled
    assert [block.b for block in blocks] == [0, 1]
    assert len(baseline.layers) == 2
    assert len(control.layers) == 1
    # check: each has files of its own, with the same noise
    files = sample_files(tmp_path / "dit")
    assert set(files) == {"array.npy", "array_end_to_end.npy", "array_control.npy",
                          "picture.png", "picture_end_to_end.png", "picture_control.png"}
    assert len(set(files.values())) == 2  # one array, one picture

    # check: another seed is other noise
    train.main([*command, "--end-to-end", "--seed=1"])
    again = sample_files(tmp_path / "dit")
    changed = {name for name in files if again[name] != files[name]}
    assert changed == {"array_end_to_end.npy", "picture_end_to_end.png"}


# ---- Precision, compiled layers, memory, threads ----------------------------------------------------------

@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_products_of_training_and_validation_have_the_precision_that_was_asked_for(
        precision, dtype, flags, tmp_path, monkeypatch):
    in_training, in_validation = set(), set()
    real = F.linear

    def linear(x, weight, bias=None):
        out = real(x, weight, bias)
        seen = in_training if torch.is_grad_enabled() else in_validation
        seen.add(out.dtype)
        return out
    monkeypatch.setattr(F, "linear", linear)
    train.main(flags("vit", "--end-to-end", f"--precision={precision}", f"--out={tmp_path}"))
    assert in_training == in_validation == {dtype}


@pytest.mark.parametrize("compile, n_compiled", [("off", 0), ("on", 3)])
def test_layers_are_compiled_if_asked_for_and_only_then(compile, n_compiled, monkeypatch):
    compiled = []

    def note(function):
        compiled.append(function)
        return function
    monkeypatch.setattr(torch, "compile", note)
    net = vit.Block(tiny(vit, layer_split="3,1"), 0)
    train.prepare_layers(net, train.Training(compile=compile), train.Run())
    assert len(compiled) == n_compiled


def kept_for_backward(module, checkpointed):
    """How many numbers a forward pass of the baseline keeps, and the gradients that it leads to."""
    source = SimpleNamespace(batch=lambda n, config, index: BATCH[module])
    training = train.Training(batch_size=6)
    run = train.Run(checkpoint_activations=checkpointed)
    learner = train.Learner(train.Job(module.__name__, module, "end_to_end", tiny(module), training, run,
                                      source, CPU))
    sizes = []

    def keep(x):
        sizes.append(x.numel())
        return x
    batch = train.draw(learner, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        train.forward_backward(learner, batch)
    return sum(sizes), [p.grad for p in learner.net.parameters() if p.grad is not None]


@each(*MODELS)
def test_checkpointed_activations_keep_less_for_the_backward_pass(module):
    all_kept, gradients = kept_for_backward(module, checkpointed=False)
    kept, recomputed = kept_for_backward(module, checkpointed=True)
    assert kept < all_kept / 2
    for gradient, other in zip(gradients, recomputed, strict=True):
        assert torch.equal(gradient, other)


def test_threads_are_as_many_as_are_asked_for():
    train.set_up(train.Run(device="cpu", threads=2), train.Training())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at a.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 9 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB"),
    MemoryError()])
def test_too_little_memory_is_one_line(error):
    assert train.is_out_of_memory(error)
    line = train.out_of_memory_line(error)
    assert line.startswith("not enough memory (")
    for noise in ("enforce", "GPU 0", "\n"):
        assert noise not in line


def test_another_error_is_not_about_memory():
    assert not train.is_out_of_memory(RuntimeError("shapes do not match"))


# ---- Pretended devices: a GPU, its recorded updates, an Apple GPU -----------------------------------------
#
# These tests need no GPU. A tensor "on the device" is a CPU tensor whose storage carries a mark, `place`. Two
# modes of torch keep the marks:
#   PretendGPU sees each call from Python. It answers x.device and x.is_cuda by the mark, and marks what is
#     moved to the device or made there.
#   Kernels sees each operator that is computed, those of the backward pass and of the optimizer, too. What an
#     operator makes of marked tensors is marked.
# So two kinds of faults are found: an operator that is given tensors of both the CPU and the device, and, in
# every second update (it logs and saves nothing), whatever would make the CPU wait for the device.
#
# A CUDA graph is played, too. While an update is recorded, `Recording` lists the operators that touch the
# device, with their arguments; whatever they changed is put back, since a real recording computes nothing. A
# replay runs the list again, on the same tensors and with the same Python numbers, and puts what an operator
# returns into the tensors that it returned while it was recorded. So a number that was baked in, a tensor
# that was replaced, or a draw on the CPU shows as other weights than without a recording.
#
# An Apple GPU is the same under the name mps. It has no float64: a float64 tensor on it is a fault. Waiting
# is none, and nothing is recorded.
#
# What this cannot notice: time and memory; what GPU kernels compute (here the CPU's do), and which of them
# are missing or forbidden in a recording; what torch.compile makes of a layer (here it does nothing); bf16
# (is_bf16_supported says no); races between streams, and memory that is written before a copy beside the
# computation is done; code in C++ that asks a tensor for its device (the one place that the optimizer needs
# is replaced). `python results/check_gpu.py` looks at a real GPU.

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount")
DRAWS = ("rand", "randn", "randint", "randperm", "poisson", "bernoulli", "bernoulli_", "randn_like",
         "rand_like", "normal_", "uniform_", "native_dropout")


def tensors_in(*values):
    """All tensors in nested tuples, lists and dictionaries."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def where(x):
    """Where a tensor pretends to be: device, pinned or cpu."""
    return getattr(x.untyped_storage(), "place", "cpu")


def is_on_device(x):
    return where(x) == "device"


def any_on_device(*values):
    return any(map(is_on_device, tensors_in(*values)))


def put(values, place="device"):
    """Mark all tensors in `values`. Returns `values`."""
    for x in tensors_in(values):
        if x.device.type == "cpu":
            x.untyped_storage().place = place
    return values


def returning(value):
    """A function of anything that returns this value."""
    def function(*args, **kwargs):
        return value
    return function


class PretendGPU(TorchFunctionMode):
    """Python's view of a device that is not there: see above."""

    def __init__(self, patch, name="cuda", may_wait=False):
        super().__init__()
        self.name = name
        self.device = torch.device(name, 0)
        self.may_wait = may_wait
        self.faults = []               # a fault is an error, too, but an error may be caught
        self.updates = 0               # steps of an optimizer
        self.makes_on_device = False   # where the call of now makes tensors, if it is given none
        self.kernels = Kernels(self)
        self.replace_functions(patch)

    def replace_functions(self, patch):
        """What torch knows of devices without being asked about a tensor."""
        patch.setattr(torch.backends.mps, "is_available", returning(self.name == "mps"))
        patch.setattr(torch.cuda, "is_available", returning(self.name == "cuda"))
        patch.setattr(torch.cuda, "device_count", returning(1))
        patch.setattr(torch.cuda, "set_device", self.set_device)
        patch.setattr(torch.cuda, "is_bf16_supported", returning(False))
        patch.setattr(torch.cuda, "max_memory_allocated", returning(2 ** 20))
        patch.setattr(torch.cuda, "is_current_stream_capturing", returning(False))
        patch.setattr(torch.cuda, "Stream", returning(None))
        patch.setattr(torch.cuda, "set_stream", returning(None))
        step = torch.optim.AdamW.step
        group = torch._C._group_tensors_by_device_and_dtype

        def counted_step(optimizer):
            step(optimizer)
            self.updates += 1

        def group_by_mark(*args):
            groups = {}
            for (_, dtype), content in group(*args).items():
                first = content[0][0][0]
                device = self.device if is_on_device(first) else torch.device("cpu")
                groups[device, dtype] = content
            return groups
        patch.setattr(torch.optim.AdamW, "step", counted_step)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group_by_mark)

    def set_device(self, device):
        if torch.device(device).index is None:
            self.fault(f"Expected a torch.device with a specified index, but got: {device}")

    def fault(self, what):
        self.faults.append(what)
        raise RuntimeError(what)

    def wait(self, what):
        if self.updates % 2 == 1 and not self.may_wait:
            self.fault(f"{what} waits for the device within an update")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.__name__
        on_device = any_on_device(args, kwargs)
        if on_device and function == torch.Tensor.device.__get__:
            return self.device
        if on_device and function == torch.Tensor.is_cuda.__get__:
            return self.name == "cuda"
        if name == "pin_memory":
            return put(args[0].clone(), "pinned")
        if name in ("to", "cpu", "cuda"):
            return self.move(name, *args, **kwargs)
        if on_device and name in ("numpy", "__array__"):
            self.fault("a tensor on the device cannot be converted to numpy")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == self.name:
            on_device = True
            kwargs["device"] = "cpu"  # where it is made in truth
        if on_device and name in ("tolist", "tensor", "as_tensor"):
            self.wait(name)
        outer, self.makes_on_device = self.makes_on_device, on_device
        try:
            returned = function(*args, **kwargs)
        finally:
            self.makes_on_device = outer
        return put(returned) if on_device else returned

    def move(self, name, x, *args, non_blocking=False, **kwargs):
        """x.to(...), x.cpu() or x.cuda(): x itself, or a copy with another mark. Some copies wait."""
        given = [*args, *kwargs.values()]
        dtypes = [a for a in given if isinstance(a, torch.dtype)]
        target = self.place_after(name, x, given)
        if target == where(x):
            return x.to(*dtypes) if dtypes else x
        stays_off_device = {target, where(x)} == {"cpu", "pinned"}
        runs_beside = non_blocking and where(x) == "pinned"
        if not stays_off_device and not runs_beside:
            self.wait(f"a copy to the {target}")
        return put(x.to(*dtypes, copy=True), target)

    def place_after(self, name, x, given):
        """Where x is after x.to(*given), x.cpu() or x.cuda()."""
        if name == "cpu":
            return "cpu"
        if name == "cuda":
            return "device"
        for a in given:
            if isinstance(a, torch.Tensor):
                return where(a)
            if isinstance(a, (str, torch.device)):
                return "device" if torch.device(a).type == self.name else "cpu"
        return where(x)


class CountsOperators(TorchDispatchMode):
    """Counts operators of a pretended device; which, a class that inherits says."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu
        self.count = 0


class Kernels(CountsOperators):
    """The operators that are computed on the pretended device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given = tensors_in(args, kwargs)
        on_device = self.runs_on_device(given)
        if on_device and given:
            self.count += 1
            self.check(name, given)
        returned = function(*args, **kwargs)
        if on_device:
            self.check_dtypes(name, returned)
            put(returned)
        return returned

    def runs_on_device(self, given):
        """Whether an operator does, with the tensors that it was given."""
        if given:
            return any(map(is_on_device, given))
        return self.gpu.makes_on_device

    def check(self, name, given):
        """A fault if the operator waits for the device, or mixes tensors of CPU and device."""
        masks = [x for x in given[1:] if x.dtype in (torch.bool, torch.uint8)]
        elsewhere = [x for x in given if not is_on_device(x)]
        if name in WAITS or (name.startswith("index") and masks):
            self.gpu.wait(name)
        elif name in ("copy_", "_to_copy"):
            if elsewhere:
                self.gpu.wait(name)
        elif any(x.dim() > 0 for x in elsewhere):  # a single number may be on the CPU
            self.gpu.fault(f"{name} mixes tensors of CPU and device")

    def check_dtypes(self, name, returned):
        """A fault if the operator makes float64 on an Apple GPU."""
        if self.gpu.name == "mps":
            if any(x.dtype == torch.float64 for x in tensors_in(returned)):
                self.gpu.fault(f"{name} makes a float64 tensor on the device")


@contextlib.contextmanager
def pretended(monkeypatch, name="cuda", **more):
    """A pretended device, within this block. Yields the PretendGPU; no fault may be left at the end."""
    with PretendGPU(monkeypatch, name, **more) as gpu, gpu.kernels:
        yield gpu
    assert gpu.faults == []
    assert gpu.kernels.count > 0


@pytest.mark.parametrize("model", SMALL)
def test_a_model_trains_resumes_is_scored_and_sampled_and_on_a_gpu_no_update_waits(
        model, flags, tmp_path, monkeypatch, capsys):
    # arrange: a baseline cut on the CPU after two updates, to be resumed on the device
    common = flags(model, f"--out={tmp_path}", "--compile=off")
    cut(monkeypatch, [*common, "--end-to-end"])
    asked = [f"--model={model}", f"--out={tmp_path}"]

    with pretended(monkeypatch) as gpu:
        train.main([*asked, "--end-to-end", "--resume"])
        train.main([*common, "--block=all"])
        train.main([*common, "--control"])
        n_blocks = 1 if model == "recurrent" else 2
        assert gpu.updates == 2 + 4 * n_blocks + 4
        train.main([*asked, "--eval"])
        for part in ([], ["--end-to-end"], ["--control"]):
            capsys.readouterr()
            train.main([*asked, "--sample", *SAMPLE[model], *part])
            assert capsys.readouterr().out.strip()
    assert gpu.kernels.count > 1000

    assert train.load(tmp_path / model / "end_to_end.pt", model)["step"] == 4
    report = report_of(tmp_path / model)
    assert report["device"] == "cuda:0"
    assert set(report["updates"].values()) == {4}
    rows = list(list(report["tables"].values())[0])
    assert rows[:2] == ["end to end", "control"]
    assert any(row.startswith("blocks") for row in rows)
    for table in report["tables"].values():
        for row in table.values():
            assert np.isfinite(list(row.values())).all()


# -- recorded updates

def storage(x):
    return x.untyped_storage().data_ptr()


class PretendGraph:
    """A list of operators in the place of a torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operators = []  # (function, args, kwargs, what it returned, the storages that it made)
        self.replays = 0

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, returned, made in self.operators:
                again = function(*args, **kwargs)
                for old, new in zip(tensors_in(returned), tensors_in(again)):
                    if storage(old) in made and old.numel() > 0:
                        old.detach().copy_(new.detach())


class Recording(TorchDispatchMode):
    """Lists the operators on the device in a PretendGraph, and remembers what they write to."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.made = set()    # storages made while recording
        self.before = {}     # of other storages that were written to: (tensor, content before)
        self.kept = []       # addresses must not be used twice, as in a graph's own memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given = tensors_in(args, kwargs)
        assert name != "_pin_memory", "pinned memory while recording"
        if name in WAITS:
            assert not any_on_device(given), f"{name} waits for the device while recording"
        self.remember_what_is_written(function, args)
        returned = function(*args, **kwargs)
        made = {storage(x) for x in tensors_in(returned)} - {storage(x) for x in given}
        self.made |= made
        self.kept += [args, returned]
        if any_on_device(given, returned):
            self.graph.operators.append((function, args, kwargs, returned, made))
        return returned

    def remember_what_is_written(self, function, args):
        for argument, value in zip(function._schema.arguments, args):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in tensors_in(value):
                if storage(x) not in self.made and storage(x) not in self.before:
                    self.before[storage(x)] = (x, x.untyped_storage().clone())


@contextlib.contextmanager
def pretend_recording(graph, stream=None):
    """torch.cuda.graph: nothing that happens within it lasts, but for the list of operators."""
    generator = torch.get_rng_state()
    recording = Recording(graph)
    with recording:
        yield
    for x, content in recording.before.values():
        x.untyped_storage().copy_(content)
    torch.set_rng_state(generator)


class CountsCPUDraws(CountsOperators):
    """The number of draws that are not on the device: it stands for the state of the CPU's generators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = self.gpu.kernels.runs_on_device(tensors_in(args, kwargs))
        if function.overloadpacket.__name__ in DRAWS and not on_device:
            self.count += 1
        return function(*args, **kwargs)


def as_it_is(function):
    """In the place of torch.compile."""
    return function


@contextlib.contextmanager
def recording_gpu(monkeypatch):
    """The pretended GPU with CUDA graphs. Yields the list of graphs that were made."""
    graphs = []

    def make_graph():
        graphs.append(PretendGraph())
        return graphs[-1]
    monkeypatch.setattr(train, "EXAMPLES_PER_CHUNK", 8)  # two batches: six updates need three draws
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_graph)
    monkeypatch.setattr(torch.cuda, "graph", pretend_recording)
    monkeypatch.setattr(torch.cuda, "current_stream", returning(None))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", returning(None))
    monkeypatch.setattr(torch, "compile", as_it_is)
    # replayed updates are not counted, so that it is not known which of them log
    with pretended(monkeypatch, may_wait=True) as gpu, CountsCPUDraws(gpu) as draws:
        monkeypatch.setattr(train, "cpu_random_state", lambda: draws.count)
        yield graphs


@pytest.mark.parametrize("model", SMALL)
def test_a_recorded_update_is_the_update(model, flags, tmp_path, monkeypatch):
    common = flags(model, "--steps=6", "--warmup=3", "--log-every=4")
    with recording_gpu(monkeypatch) as graphs:
        train_all_parts([*common, f"--out={tmp_path}/recorded"])
        monkeypatch.setattr(train, "can_be_recorded", returning(False))
        train_all_parts([*common, f"--out={tmp_path}/plain"])

    # recurrent's baseline and control draw the number of their passes on the CPU
    n_recorded = 1 if model == "recurrent" else 4
    assert [graph.replays for graph in graphs] == [3] * n_recorded
    paths = list((tmp_path / "recorded" / model).glob("*.pt"))
    assert len(paths) == (3 if model == "recurrent" else 4)
    for path in paths:
        other = tmp_path / "plain" / model / path.name
        assert weights(path) == weights(other)
        assert untimed_log(path) == untimed_log(other)


def test_a_recorded_run_goes_on_within_a_chunk_of_batches_to_the_same_bits(flags, tmp_path, monkeypatch):
    common = flags("vit", "--steps=9", "--log-every=4", "--save-every=5", "--end-to-end")
    with recording_gpu(monkeypatch):
        train.main([*common, f"--out={tmp_path}/whole"])
        cut(monkeypatch, [*common, f"--out={tmp_path}/cut"])
        train.main([*common, f"--out={tmp_path}/cut", "--resume"])
    assert weights(tmp_path / "whole/vit/end_to_end.pt") == weights(tmp_path / "cut/vit/end_to_end.pt")


@pytest.mark.parametrize("more", ["--accumulate=2", "--checkpoint-activations", "--compile=off"])
def test_what_cannot_be_recorded_runs_unrecorded(more, flags, tmp_path, monkeypatch):
    with recording_gpu(monkeypatch) as graphs:
        train.main(flags("gpt", "--block=0", "--steps=6", more, f"--out={tmp_path}"))
    assert graphs == []
    assert train.load(tmp_path / "gpt/block_0.pt", "gpt")["step"] == 6


def test_a_model_that_waits_for_the_device_is_not_recorded_and_is_told_so(
        flags, tmp_path, monkeypatch, capsys):
    real = gpt.Block.forward

    def forward(self, batch):
        warnings.warn("called a synchronizing CUDA operation")  # as torch does in its mode "warn"
        return real(self, batch)
    monkeypatch.setattr(gpt.Block, "forward", forward)
    with recording_gpu(monkeypatch) as graphs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train.main(flags("gpt", "--block=0", "--steps=6", f"--out={tmp_path}"))
    assert graphs == []
    assert "not recorded as a CUDA graph: the model waits for the device" in capsys.readouterr().out


def test_an_error_while_recording_is_one_line_that_says_what_to_do(flags, tmp_path, monkeypatch):
    def fail(graph, stream=None):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    with recording_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "graph", fail)
        with pytest.raises(UserError, match="stream is capturing.*--compile off") as error:
            train.main(flags("gpt", "--block=0", "--steps=6", f"--out={tmp_path}"))
    assert "\n" not in str(error.value)


def draw_torch(batch):
    torch.rand(1)


def draw_numpy(batch):
    np.random.rand()


def draw_python(batch):
    random.random()


@pytest.mark.parametrize("draws", [draw_torch, draw_numpy, draw_python])
def test_a_watched_call_notices_every_generator(draws, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", returning(None))
    assert train.Recorded(draws).watch(None) == "draws random numbers on the CPU"
    assert train.Recorded(returning(None)).watch(None) == ""


def test_a_watched_call_leaves_the_mode_as_it_was_also_after_an_error(monkeypatch):
    def fail(batch):
        raise ZeroDivisionError
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    train.Recorded(returning(None)).watch(None)
    assert modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        train.Recorded(fail).watch(None)
    assert modes == ["warn", "default"] * 2


def test_batches_of_all_chunks_differ(flags, tmp_path, monkeypatch):
    with recording_gpu(monkeypatch):
        [job] = jobs_of(monkeypatch, flags("gpt", "--control", "--steps=12", f"--out={tmp_path}"))
        learner = train.Learner(job)
        batches = {train.draw(learner, index).cpu().numpy().tobytes() for index in range(12)}
    assert learner.batches_per_chunk == 2
    assert len(batches) == 12


def test_on_cuda_nothing_that_is_not_finite_is_saved(flags, tmp_path, monkeypatch):
    def diverge(learner, batch):
        learner.loss_sum.fill_(math.nan)
    monkeypatch.setattr(train.Learner, "forward_backward_step", diverge)
    monkeypatch.setattr(train, "Recorded", as_it_is)
    with recording_gpu(monkeypatch):
        [job] = jobs_of(monkeypatch, flags("gpt", "--control", f"--out={tmp_path}"))
        run = replace(job.run, log_every=0, save_every=3)
        with pytest.raises(UserError, match="not finite at update 3"):
            train.train(replace(job, run=run))
    assert not job.path.exists()


def test_the_check_of_a_gpu_compares_recorded_with_unrecorded_updates(flags, tmp_path, monkeypatch):
    with recording_gpu(monkeypatch) as graphs:
        setup = check_gpu.begin(flags("gpt", "--end-to-end", f"--out={tmp_path}"))
        distances = check_gpu.compare(setup, "block_0", 6)
    assert [graph.replays for graph in graphs] == [3]  # one of the three runs
    assert set(distances.values()) == {0.0}


# -- an Apple GPU

@pytest.mark.parametrize("model", SMALL)
def test_no_float64_is_on_a_device_that_has_none(model, flags, tmp_path, monkeypatch):
    asked = [f"--model={model}", f"--out={tmp_path}", "--device=mps"]
    with pretended(monkeypatch, "mps", may_wait=True) as gpu:
        train_all_parts(flags(model, "--steps=2", f"--out={tmp_path}", "--device=mps"))
        train.main([*asked, "--eval"])
        train.main([*asked, "--sample", *SAMPLE[model]])
        unasked, _ = train.set_up(train.Run(), train.Training())
    assert gpu.kernels.count > 1000
    assert report_of(tmp_path / model)["device"] == "mps:0"
    assert unasked.type == "cpu"


# ---- Command lines ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, says", [
    # what to do
    ("--eval --end-to-end", "say what to do"),
    ("--block 0 --end-to-end", "not allowed with"),
    ("--block 7", "no block 7; gpt has blocks 0 to 3"),
    ("--model nope --block 0", "no nope.py here"),
    ("--preset nope --block 0", "lacks a preset 'nope'"),
    ("--eval", "train it: python train.py --model gpt --block 0"),
    ("--block 0 --overwrite --resume", "type one of them"),
    ("--block 0 --steps 5 --epochs 2", "type one of them"),
    # flags that are none
    ("--block 0 --vocab-size 9", "unknown flag"),
    ("--block 0 --batchsize=9", "did you mean --batch-size"),
    ("--block 0 --clip 2", "unknown flag --clip"),
    # flags without effect
    ("--block 0 --prompt a", "--prompt has no effect"),
    ("--block 0 --sampler x", "--sampler has no effect"),
    ("--sample --n-layer 4", "--n-layer has no effect"),
    ("--eval --resume", "--resume has no effect"),
    # values
    ("--block 0 --device cuda:7", "cannot be used"),
    ("--block 0 --n-layer 7", "7 layers cannot be cut into 4"),
    ("--block 0 --lr nine", "--lr: invalid float"),
    ("--block 0 --lr 0", "lr must be above 0; got 0.0"),
    ("--block 0 --lr nan", "lr must be finite; got nan"),
    ("--block 0 --threads -2", "threads must be at least 0; got -2"),
    ("--block 0 --threads 100000000", "at most 1024"),
    ("--block 0 --seed -1", "seed must be at least 0; got -1"),
    ("--block 0 --steps 0", "steps must be at least 1; got 0"),
    ("--block 0 --epochs inf", "epochs must be finite; got inf"),
    ("--block 0 --epochs 1e308", "epochs must be at most a million"),
    ("--block 0 --batch-size 9 --accumulate 2", "accumulate must divide batch_size 9; got 2"),
    ("--block 0 --p-mean inf", "p_mean must be finite"),
    ("--block 0 --z-rate nan", "z_rate must be finite"),
    ("--block 0 --gamma 300", "gamma must be 0 to 10; got 300.0"),
    ("--block 0 --n-blocks 1 --edges one", "edges must be probability, uniform or 0 rising ends"),
    ("--sample --temperature inf", "temperature must be finite")])
def test_a_bad_command_line_gets_one_clear_line(line, says, tmp_path):
    with pytest.raises((UserError, argparse.ArgumentError)) as error:
        train.main([*line.split(), "--out", str(tmp_path)])
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_with_code_1_and_one_line(place):
    child = started(child_args(place, ["--blok=0"]))
    printed, _ = child.communicate()
    assert child.returncode == 1
    assert printed.startswith("error: unknown flag --blok")
    assert len(printed.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_found_before_the_first_update(flags, tmp_path, monkeypatch):
    def update(learner):
        pytest.fail("it was trained")
    monkeypatch.setattr(train, "update", update)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=f"^--out {tmp_path}/file: .* cannot be written") as error:
        train.main(flags("gpt", "--block=0", f"--out={tmp_path}/file"))
    assert "\n" not in str(error.value)


def test_a_preset_that_names_no_setting_is_refused(monkeypatch):
    monkeypatch.setitem(gpt.PRESETS, "typo", dict(lerning_rate=.1))
    with pytest.raises(UserError, match="the preset 'typo' names 'lerning_rate', which is no setting"):
        train.main(["--model=gpt", "--preset=typo", "--block=0"])


def help_of(capsys, *args):
    """What --help prints, in one line."""
    with pytest.raises(SystemExit) as end:
        train.main([*args, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_every_flag_with_its_comment(capsys):
    printed = help_of(capsys, "--model=gpt")
    names = {"model", "preset", *train.NO_SETTINGS}
    for settings in (train.Training(), train.Run(), data.text.Settings(), gpt.Config(), gpt.Sampling()):
        names |= set(train.flat(settings))
    no_flags = {*data.text.FACTS, *train.NO_FLAGS}
    for name in names:
        listed = re.search(f"--{name.replace('_', '-')}[ ,]", printed) is not None
        assert listed == (name not in no_flags), name
    assert "--warmup WARMUP updates of linear warm-up" in printed


def test_help_begins_with_what_people_type(capsys):
    printed = help_of(capsys, "--model=gpt")
    seldom = printed.index("--warmup WARMUP")
    for flag in ("--data DATA", "--steps STEPS", "--out OUT", "--n-blocks N_BLOCKS", "--resume,"):
        assert printed.index(flag) < seldom


def test_help_shows_the_values_of_the_preset(capsys):
    printed = help_of(capsys, "--model=gpt", "--preset=owt")
    assert "context length in tokens (default: 1024)" in printed


# ---- A model of one's own ---------------------------------------------------------------------------------

MLP = (HERE / "results/mlp.py").read_text()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(name, old, new) writes a changed results/mlp.py to NAME.py, where train.py looks for models."""
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, old="", new=""):
        assert old in MLP
        (tmp_path / f"{name}.py").write_text(MLP.replace(old, new))
    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_model_of_ones_own_trains_and_is_scored(own, tmp_path):
    own("own")
    common = ["--model=own", f"--out={tmp_path}", "--threads=1"]
    train_all_parts([*common, "--steps=60", "--batch-size=32", "--lr=.005", "--warmup=5"])
    train.main([*common, "--eval"])
    rows = report_of(tmp_path / "own")["tables"]["held-out images"]
    assert list(rows) == ["end to end", "control", "blocks, averaged"]
    for row in rows.values():
        assert row["accuracy, %"] > 80


def test_a_field_of_an_own_config_is_a_flag_without_a_comment_and_with_postponed_annotations(own, tmp_path):
    own("own", "class Config:", "class Config:\n    own: int = 3")
    path = tmp_path / "own.py"
    path.write_text("from __future__ import annotations\n" + path.read_text())
    asked = train.parse(["--model=own", "--block=0", "--own=7"])
    assert train.values_of(asked)["own"] == 7


@pytest.mark.parametrize("old, new, line, says", [
    ("PRESETS", "P", "--block=0", "own.py lacks PRESETS"),
    ("", "", "--sample", "own.py lacks sample"),
    ("class Config:", "class Config:\n    own: float | None = None", "--block=0",
     r"Config.own has the type .*float . None.*; a flag can be .*"),
    ("@dataclass\nclass Config", "class Config", "--block=0", "own.py: Config must be a dataclass"),
    ('DATA = "images"', 'DATA = "sounds"', "--block=0",
     "own.py: DATA is 'sounds'; choose text or images, or .*"),
    ("class Config:", "class Config:\n    own: int", "--block=0",
     r"every field of Config needs a default \(.*own.*\)"),
    ("        super().__init__(r", "        raise ValueError('so it cannot be')\n        super().__init__(r",
     "--block=0", "so it cannot be")])
def test_a_mistake_in_a_model_of_ones_own_is_one_line(old, new, line, says, own, tmp_path):
    own("own", old, new)
    with pytest.raises(UserError, match=f"^{says}$"):
        train.main(["--model=own", line, f"--out={tmp_path}", "--threads=1"])


def model_in_readme():
    """The code of words.py in README.md's section "Your own model"."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Your own model\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if block.startswith("# words.py")]
    assert len(found) == 1, "README.md's section 'Your own model' needs one block that begins with # words.py"
    return found[0]


# runs train.py once for each line of a file
ALL_LINES = """import pathlib, runpy, shlex, sys
import data
data.DATA_DIR = pathlib.Path(sys.argv[1])
for line in open("commands.txt"):
    print("python train.py", line, flush=True)
    sys.argv = ["train.py", *shlex.split(line)]
    runpy.run_path("train.py", run_name="__main__")
"""


def test_the_text_model_of_the_readme_trains_and_is_scored_in_a_copy_of_the_repository(place, tmp_path):
    # arrange
    folder = tmp_path / "copy"
    (folder / "data").mkdir(parents=True)
    for path in [*HERE.glob("*.py"), *HERE.glob("data/*.py")]:
        shutil.copy(path, folder / path.relative_to(HERE))
    (folder / "words.py").write_text(model_in_readme(), encoding="utf-8")
    common = f"--model words --threads=1 --out={tmp_path}/out"
    training = (f"{common} --data={place}/text.txt --steps 5 --batch-size=4 --n-layer=2 --n-blocks=2 "
                f"--n-embd=8 --seq-len=8")
    commands = [f"{training} {part}" for part in ("--block all", "--end-to-end", "--control")]
    commands.append(f"{common} --eval")
    (folder / "commands.txt").write_text("\n".join(commands))
    (folder / "all_lines.py").write_text(ALL_LINES)

    # act
    child = started(["all_lines.py", str(place / "data")], {"PYTHONPATH": str(folder)}, folder)
    printed, _ = child.communicate()

    # check
    assert child.returncode == 0, printed
    report = report_of(tmp_path / "out/words")
    assert report["updates"] == {"2 blocks": 5, "end to end": 5, "control": 5}
    rows = list(report["tables"].values())[0]
    assert {"end to end", "control"} < set(rows)
    for row in rows.values():
        assert np.isfinite(list(row.values())).all()
        assert min(row.values()) > 0


# ---- Data -------------------------------------------------------------------------------------------------

@pytest.fixture
def prepared(clean, tmp_path, monkeypatch):
    """An empty folder of prepared data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "prepared")
    data.DATA_DIR.mkdir()


def load(module, source, seed=0, **settings):
    return module.Data(module.Settings(data=str(source), **settings), "cpu", seed)


def write_hub(folder, split="train", n=300):
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"text": f"{split} document {i}", "label": i % 2}) for i in range(n)]
    (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def write_pets(folder, *pets):
    for i, pixels in enumerate(pets):  # the last three are dogs
        file = folder / ("cat" if i < len(pets) - 3 else "dog") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


def write_latents(path, **changes):  # training latents say which row they are
    rows = np.arange(23)
    arrays = {"latents": np.broadcast_to(rows[:, None, None, None], (23, 2, 3, 3)), "labels": rows % 3}
    np.savez(path, **arrays | {"val_latents": np.ones((7, 2, 3, 3)), "val_labels": rows[:7] % 3} | changes)
    return path.with_suffix(".npz")


def noise(n, *shape):
    return [np.random.RandomState(sum(shape) + i).randint(256, size=shape, dtype=np.uint8) for i in range(n)]


@pytest.fixture
def little_is_enough(monkeypatch):
    """Every 100th document is held out, however short it is."""
    monkeypatch.setattr(text, "ENOUGH", 0)


def test_text_that_is_held_out_is_not_trained_on(tmp_path, prepared, little_is_enough):
    def both(source):
        return [bytes(load(text, source).stored[1][split]) for split in ("train", "val")]
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"document {i:02}" * (i != 9))
    train, val = both(tmp_path / "texts")
    assert val == b"document 19" and train.split(b"\n") == [b"document %02d" % i for i in range(19) if i != 9]
    train, val = (part.split(b"\n") for part in both(write_hub(tmp_path / "hub")))
    assert val == [b"train document %d" % i for i in (99, 199, 299)]
    assert sorted(train + val) == sorted(b"train document %d" % i for i in range(300))
    train, val = both(write_hub(tmp_path / "hub", "test", 2))
    assert val == b"test document 0\ntest document 1" and train.count(b"\n") == 299


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_windows_and_counts_are_of_the_text_itself(tokenizer, tmp_path, words, prepared):
    (tmp_path / "a.txt").write_text(whole := "".join(f"the naïve line   {i}\n\n" for i in range(60000)))
    d, config = load(text, tmp_path / "a.txt", tokenizer=tokenizer), type("Config", (), {"seq_len": 16})
    train, val = (d.stored[1][split] for split in ("train", "val"))
    first, last = d.tokenizer.decode(train), d.tokenizer.decode(val)
    assert first + last == whole and len(val) * d.bytes_per_token == len(last.encode())
    assert d.tokenizer.encode(first).tolist() == train.tolist()  # though it was cut into chunks of 1 MB
    rows, held = (x.numpy().astype(train.dtype) for x in (d.batch(9, config, 0), d.held_out(7, config)))
    assert rows.shape == (9, 17) and all(row.tobytes() in train.tobytes() for row in rows)
    assert held.shape == (7, 17) and (held[0] == val[:17]).all() and (held[-1] == val[-17:]).all()


def test_images_that_are_held_out_are_not_trained_on(tmp_path, prepared):
    cats, dogs = noise(25, 5, 5, 3), noise(3, 5, 5)  # in colour, grey
    d = load(images, write_pets(tmp_path / "pets", *cats, *dogs))
    (x, y), (more, labels) = d.batch(25, None, 0), d.held_out(None, None)
    rows = ((torch.cat([x, more]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    known = {p.tobytes(): 0 for p in cats} | {p.repeat(3).tobytes(): 1 for p in dogs}
    assert {p.tobytes(): c for p, c in zip(rows, y.tolist() + labels.tolist())} == known
    assert labels.bincount().tolist() == [2, 1] and d.names == ["cat", "dog"]  # a tenth of each class
    x, y = load(images, "digits").held_out(None, None)
    assert x.shape == (450, 1, 8, 8) and x.min() == -1 and x.max() == 1
    assert 44 <= y.bincount().min() and y.bincount().max() <= 46  # a quarter of 174 to 183 of each class
    assert torch.equal(load(images, "digits", augment="crop", seed=3).held_out(7, None)[0], x[:7])


def test_an_epoch_of_latents_is_a_permutation_however_it_is_cut(tmp_path, prepared):
    def rows(n, *indices, seed=0):
        batches = [load(images, tmp_path / "a.npz", seed).batch(n, None, i) for i in indices]
        assert all(torch.equal(x[:, 1, 2, 2] % 3, y.float()) for x, y in batches)
        return torch.cat([x[:, 0, 0, 0] for x, _ in batches]).tolist()
    assert [*load(images, write_latents(tmp_path / "a")).facts.values()] == [3, 2, 3, 11.0, 6.63325]
    three = rows(69, 0)
    assert all(sorted(three[i:i + 23]) == list(range(23)) for i in (0, 23, 46)) and three[:23] != three[23:46]
    assert rows(10, 4, 2, 0) == three[40:50] + three[20:30] + three[:10] != rows(10, 4, 2, 0, seed=1)


@pytest.mark.parametrize("module, source, settings, says", [
    (text, "nowhere.txt", {}, "no such file"), (images, "stdlib", {}, "is text"),
    (text, write_hub, dict(column="body"), "line 1 .*label"), (text, write_hub, dict(split="x"), "one of 'train'"),
    (text, lambda p: write_hub(p, n=0), {}, "no text in a"), (images, write_hub, {}, "no images.* 1 .jsonl"),
    (images, lambda p: write_pets(p, *noise(5, 5, 5), *noise(1, 6, 6)), {}, "dog/05.png: .*6 x 6"),
    (images, lambda p: write_pets(p, *noise(6, 5, 6)), {}, "cat/00.png: .*square.*6 x 5"),
    (images, lambda p: write_latents(p, latents=np.full((23, 2, 3, 3), np.nan)), {}, "finite"),
    (images, lambda p: write_latents(p, labels=1 + np.arange(23) % 3), {}, "class 0 "),
    (images, write_latents, dict(augment="flip"), "for images")])
def test_unfit_data_gets_one_line_and_leaves_nothing(module, source, settings, says, tmp_path, prepared):
    with pytest.raises(data.UserError, match=says) as e:
        load(module, source(tmp_path / "a") if callable(source) else source, **settings).about
    assert "\n" not in str(e.value) and list(data.DATA_DIR.iterdir()) == []


def test_prepared_data_is_whole_or_said_to_be_damaged(tmp_path, prepared):
    source = write_hub(tmp_path / "hub")
    assert load(text, source).about == load(text, source).about
    folder, = data.DATA_DIR.iterdir()  # one, and no temporary one
    for file in folder.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(data.UserError, match="delete that folder"):
            load(text, source).about
        file.write_bytes(whole)


# ---- Data: which files are used, and as what --------------------------------------------------------------

def write_files(folder, contents):
    """A folder with these files: {name: text or bytes}."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_picture(path, seed=0, shape=(8, 8, 3)):
    """An image of random pixels. Returns the pixels."""
    pixels = np.random.RandomState(seed).randint(256, size=shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_classes(folder, *classes, n=12):
    """A folder of images by class: 0.png to 11.png in each."""
    for number, name in enumerate(classes):
        for i in range(n):
            write_picture(folder / name / f"{i}.png", seed=100 * number + i)
    return folder


def stored_text(source, **settings):
    """The text that is trained on, and that is held out."""
    arrays = load(text, source, **settings).arrays
    return bytes(arrays["train"]).decode(), bytes(arrays["val"]).decode()


def refusal(module, source, **settings):
    """The one line in which a source is refused."""
    with pytest.raises(UserError) as caught:
        load(module, source, **settings).about
    message = str(caught.value)
    assert "\n" not in message and list(data.DATA_DIR.iterdir()) == []
    return message


def counts(source, **settings):
    """How many images are trained on, and how many are held out."""
    about = load(images, source, **settings).about
    return about["train"], about["val"]


@pytest.mark.parametrize("name", ["train", "test", "val", "dev"])
def test_a_class_folder_is_a_class_whatever_its_name(name, tmp_path, prepared):
    d = load(images, write_classes(tmp_path / "set", "bus", "car", name))
    assert d.names == sorted(["bus", "car", name])
    assert (d.about["train"], d.about["val"]) == (33, 3)


def test_an_image_is_used_whatever_its_name(tmp_path, prepared):
    for name in ("cat", "dog"):
        for i in range(4):
            write_picture(tmp_path / "set" / name / f"train {i}.png", i)
            write_picture(tmp_path / "set" / name / f"test-{i}.PNG", 4 + i)
    assert sum(counts(tmp_path / "set")) == 16


def test_class_folders_inside_splits_keep_to_their_split(tmp_path, prepared):
    source = tmp_path / "set"
    write_classes(source, "train/a", "train/b", n=5)
    write_classes(source, "val/a", "val/b", n=3)
    write_classes(source, "unused/a", "unused/b", n=2)
    d = load(images, source)
    assert d.names == ["a", "b"] and (d.about["train"], d.about["val"]) == (10, 6)
    assert "4 of other splits" in d.describe()


def test_a_folder_that_could_be_class_or_split_is_refused(tmp_path, prepared):
    write_classes(tmp_path / "set", "bus", "car", "train/old")
    message = refusal(images, tmp_path / "set")
    assert "'train'" in message and "'bus'" in message


def test_images_without_class_folders_are_refused(tmp_path, prepared):
    write_picture(tmp_path / "flat" / "0.png")
    assert "no class folders" in refusal(images, tmp_path / "flat")
    write_picture(tmp_path / "splits" / "train" / "0.png")
    write_picture(tmp_path / "splits" / "val" / "0.png")
    assert "no class folders" in refusal(images, tmp_path / "splits")


def test_captions_beside_images_are_left_out_and_counted(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a", "b")
    write_files(source, {f"a/{i}.txt": "a caption" for i in range(12)})
    d = load(images, source)
    assert d.about["train"] + d.about["val"] == 24
    assert "24 files (left out: 12 .txt)" in d.describe()


@pytest.mark.parametrize("name", ["set [v2]", "what?", "a*b", "my data [v2]/train"])
def test_a_path_is_no_pattern(name, tmp_path, prepared):
    if os.name == "nt" and set(name) & set("?*"):
        pytest.skip("no such names on Windows")
    assert sum(counts(write_classes(tmp_path / "images" / name, "a", "b"))) == 24
    source = write_files(tmp_path / "text" / name, {"a [1].txt": "first " * 50, "b.TXT": "second " * 50})
    assert "first" in stored_text(source)[0] and "second" in "".join(stored_text(source))


def test_hidden_files_and_folders_are_skipped(tmp_path, prepared):
    for i in range(12):
        write_files(tmp_path / "books", {
            f"{i:02}.txt": f"document {i:02}",
            f"._{i:02}.txt": b"Mac OS X \xff",
            f".ipynb_checkpoints/{i:02}-checkpoint.txt": f"document {i:02}"})
    train, val = stored_text(tmp_path / "books")
    assert val == "document 09"
    assert train.split("\n") == [f"document {i:02}" for i in range(12) if i != 9]
    source = write_classes(tmp_path / "set", "a", "b", ".thumbnails")
    write_files(source, {"a/._0.png": b"Mac OS X"})
    assert sum(counts(source)) == 24


def test_linked_folders_are_followed(tmp_path, prepared):
    write_files(tmp_path / "store", {"x/a.txt": "first " * 100})
    source = write_files(tmp_path / "texts", {"b.txt": "second " * 100})
    (source / "x").symlink_to(tmp_path / "store" / "x")
    train, val = stored_text(source)
    assert "first" in train + val and "second" in train + val
    write_classes(tmp_path / "store", "cat", "dog")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name)
    assert load(images, tmp_path / "set").names == ["cat", "dog"]
    assert sum(counts(tmp_path / "set")) == 24


def test_links_that_go_round_or_nowhere_are_left_out(tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"a/b/c.txt": "some text " * 20})
    (source / "a" / "b" / "up").symlink_to(source / "a")
    (source / "self").symlink_to(source)
    (source / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    assert "1 file (left out: 1 links that lead nowhere, 2 links to a folder" in load(text, source).describe()
    assert "".join(stored_text(source)) == "some text " * 20


def test_a_file_that_is_linked_twice_is_used_once(tmp_path, prepared):
    source = write_files(tmp_path / "books", {f"{i:02}.txt": f"document {i:02}" for i in range(10)})
    for i in range(5, 10):
        (source / f"again {i:02}.txt").symlink_to(source / f"{i:02}.txt")
        os.link(source / f"{i:02}.txt", source / f"once more {i:02}.txt")
    (source / "all again").symlink_to(source)
    train, val = stored_text(source)
    documents = train.split("\n") + val.split("\n")
    assert sorted(documents) == [f"document {i:02}" for i in range(10)]


def test_numbered_class_folders_are_in_the_order_of_their_numbers(tmp_path, prepared):
    classes = [str(c) for c in range(12)]
    source = write_classes(tmp_path / "set", *classes, n=2)
    d = load(images, source)
    assert d.names == classes
    x, label = d.fixed("train")
    for image, c in zip(x, label.tolist()):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        own = [np.asarray(Image.open(source / str(c) / f"{i}.png")) for i in range(2)]
        assert (pixels == own[0]).all() or (pixels == own[1]).all()


@pytest.mark.parametrize("word, label", [("2", 2), ("10", 10), ("dog", 12)])
def test_dit_draws_the_class_that_is_named(word, label, tmp_path, prepared, monkeypatch, capsys):
    classes = [str(c) for c in range(12)] + ["dog"]
    d = load(images, write_classes(tmp_path / "set", *classes, n=2))
    drawn = []

    def generate_images(nets, label, *how):
        drawn.extend(label.tolist())
        return torch.zeros(len(label), 3, 8, 8)
    monkeypatch.setattr(dit, "generate_images", generate_images)
    net = dit.EndToEnd(tiny(dit, n_class=13, n_blocks=1))
    dit.sample(net, dit.Sampling(classes=(word,), n_images=2), d)
    assert drawn == [label, label]
    assert f"class {label} ({word})" in capsys.readouterr().out


@pytest.mark.parametrize("train, val", [
    ("train.txt", "valid.txt"), ("train/a.txt", "dev/a.txt"), ("Training-1.txt", "TEST_1.txt"),
    ("corpus/train/a.txt", "corpus/validation/a.txt"), ("train-00000-of-00001.txt", "val-00000-of-00001.txt")])
def test_splits_of_text_are_told_by_names(train, val, tmp_path, prepared):
    source = write_files(tmp_path / "texts", {train: "to train on", val: "held out", "readme.md": "neither"})
    assert stored_text(source) == ("to train on", "held out")


def test_names_that_only_contain_the_name_of_a_split_tell_none(tmp_path, prepared):
    names = ["part-b", "pretrain", "trainspotting", "contest", "latest", "test pilots"]
    rows = {f"{name}.jsonl": json.dumps({"text": name * 20}) for name in names}
    train, val = stored_text(write_files(tmp_path / "corpus", rows))
    assert all(name in train + val for name in names)


def test_a_split_for_some_files_only_is_refused(tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"train.txt": "one", "valid.txt": "two", "more.txt": "three"})
    message = refusal(text, source)
    assert "'more.txt'" in message and "split" in message


def test_tables_beside_text_or_images_or_other_tables_are_refused(tmp_path, prepared):
    table = {"index.csv": "file,text\n00.txt,me\n"}
    texts = write_files(tmp_path / "books", table | {f"{i}.txt": "a document" for i in range(12)})
    assert "0.txt" in refusal(text, texts) and "index.csv" in refusal(text, texts)
    tables = write_files(tmp_path / "tables", table | {"a.jsonl": '{"text": "a"}'})
    assert "index.csv" in refusal(text, tables) and "a.jsonl" in refusal(text, tables)
    pictures = write_classes(tmp_path / "set", "a", "b", n=2)
    write_image_table(pictures / "more.parquet", 4)
    assert "a/0.png" in refusal(images, pictures) and "more.parquet" in refusal(images, pictures)


@pytest.mark.parametrize("train, val", [
    ("ptb.train.txt", "ptb.valid.txt"), ("wiki.train.txt", "wiki.test.txt"), ("my_train.txt", "my_test.txt"),
    ("c4-train.00000-of-00002.jsonl", "c4-validation.00000-of-00001.jsonl"), ("en/my-train/a.txt", "en/my-dev/a.txt")])
def test_splits_are_told_by_words_within_names(train, val, tmp_path, prepared):
    contents = {train: "to train on", val: "held out"}
    if train.endswith(".jsonl"):
        contents = {name: json.dumps({"text": content}) for name, content in contents.items()}
    assert stored_text(write_files(tmp_path / "texts", contents)) == ("to train on", "held out")


def test_a_word_that_is_part_of_a_title_tells_no_split(tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"Test pilots.txt": "in the air " * 20, "Moby Dick.txt": "at sea " * 20})
    train, val = stored_text(source)
    assert "in the air" in train + val and "at sea" in train + val


def test_names_that_differ_only_in_a_split_that_is_glued_on_are_refused(tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"trainset.txt": "one", "testset.txt": "two"})
    message = refusal(text, source)
    assert "'testset.txt' and 'trainset.txt' look like splits" in message


def test_a_split_within_one_name_of_several_is_refused(tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"part-b.txt": "one", "pre-train.txt": "two"})
    assert "'pre-train.txt' looks like the split 'train', but 'part-b.txt'" in refusal(text, source)


def test_folders_of_images_may_have_a_split_within_their_names(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "seg_train/a", "seg_train/b", n=5)
    write_classes(source, "seg_test/a", "seg_test/b", n=2)
    assert load(images, source).names == ["a", "b"]
    assert counts(source) == (10, 4)


@pytest.mark.parametrize("classes", [("root/train/a", "root/val/a"), ("archive/a", "archive/b")])
def test_a_folder_above_the_right_one_is_refused(classes, tmp_path, prepared):
    source = write_classes(tmp_path / "set", *classes, n=3)
    below = source / classes[0].split("/")[0]
    assert f"did you mean --data {below}?" in refusal(images, source)


def test_images_in_deeper_folders_and_empty_class_folders_are_told(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a/x", "a/y", "b", n=4)
    write_files(source, {"c/0.heic": b"of no kind that is read"})
    (source / "empty").mkdir()
    line = load(images, source).describe()
    assert "8 of the files in folders below these" in line
    assert "1 .heic" in line and "2 class folders without images: c, empty" in line


@pytest.mark.parametrize("name", ["x.jsonl.xz", "x.parquet.gz", "x.log.gz", "x.zip", "x.npz", "x.pdf", "x.PNG"])
def test_a_packed_or_binary_file_is_no_text(name, tmp_path, prepared):
    source = write_files(tmp_path, {name: b"no plain text" * 10}) / name
    assert f"{name} is packed or binary" in refusal(text, source)


@pytest.mark.parametrize("name", ["x.txt.gz", "x.TXT.zst"])
def test_a_packed_text_is_unpacked(name, tmp_path, prepared):
    import pyarrow
    (tmp_path / "texts").mkdir()
    packing = {"gz": "gzip", "zst": "zstd"}[name.split(".")[2]]
    with pyarrow.output_stream(str(tmp_path / "texts" / name), compression=packing) as file:
        file.write(b"a packed text " * 100)
    for source in (tmp_path / "texts", tmp_path / "texts" / name):
        assert stored_text(source) == ("a packed text " * 90, "a packed text " * 10)


def test_a_flag_that_this_source_does_not_read_is_refused(tmp_path, prepared):
    texts = write_files(tmp_path, {"a.txt": "some text " * 20}) / "a.txt"
    pictures = write_classes(tmp_path / "set", "a", "b", n=2)
    latents = write_latents(tmp_path / "latents")
    assert "--config has no effect" in refusal(text, texts, config="zzz")
    assert "--column has no effect" in refusal(text, "stdlib", column="q")
    assert "--image-column has no effect" in refusal(images, pictures, image_column="zz")
    assert "--split has no effect" in refusal(images, latents, split="test")


def test_folders_that_link_to_each_other_are_read_once(tmp_path, prepared):
    for i in range(12):
        write_files(tmp_path / "texts" / f"{i:02}", {"a.txt": f"document {i:02}"})
    for i, j in itertools.permutations(range(12), 2):
        (tmp_path / "texts" / f"{i:02}" / f"to {j:02}").symlink_to(tmp_path / "texts" / f"{j:02}")
    train, val = stored_text(tmp_path / "texts")
    assert sorted((train + "\n" + val).split("\n")) == [f"document {i:02}" for i in range(12)]


@pytest.mark.parametrize("link", ["test", "zz-test"])
def test_a_folder_that_is_linked_as_test_counts_for_training(link, tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"store/a.txt": "some text " * 20})
    (source / "store").rename(tmp_path / "store")
    for name in (link, "train"):
        (source / name).symlink_to(tmp_path / "store")
    assert "".join(stored_text(source)) == "some text " * 20
    assert "1 links to a folder that is used already" in load(text, source).describe()


def test_a_name_of_two_hundred_characters_can_be_prepared(tmp_path, prepared):
    assert "is not on the disk" in refusal(text, "b" * 300)
    source = tmp_path / ("a" * 250)
    source.write_text("some text " * 20)
    assert "".join(stored_text(source)) == "some text " * 20


def test_control_characters_of_names_are_not_printed(tmp_path, prepared):
    if os.name == "nt":
        pytest.skip("no such names on Windows")
    source = write_files(tmp_path / "line\nend", {"a.txt": "some text " * 20})
    assert "line end, 1 file" in load(text, source).describe()
    assert str(UserError("line\nend")) == "line end"


# ---- Data: prepared anew when it changes, and held out ----------------------------------------------------

def test_a_moved_image_is_prepared_anew(tmp_path, prepared):
    source = tmp_path / "set"
    write_classes(source, "train/a", "train/b", "val/a", "val/b", n=4)
    assert counts(source) == (8, 8)
    (source / "train/b/3.png").rename(source / "val/b/9.png")  # keeps its time, as mv does
    assert counts(source) == (7, 9)
    (source / "val/b/9.png").rename(source / "val/a/9.png")
    assert load(images, source).held_out(None, None)[1].tolist().count(0) == 5
    (source / "val").rename(source / "unused")
    assert counts(source) == (5, 2)  # a tenth of each class, one at least


def test_a_renamed_text_is_prepared_anew(tmp_path, prepared):
    source = write_files(tmp_path / "texts", {"train.txt": "one", "valid.txt": "two"})
    assert stored_text(source) == ("one", "two")
    (source / "train.txt").rename(source / "x.txt")
    (source / "valid.txt").rename(source / "train.txt")
    (source / "x.txt").rename(source / "valid.txt")
    assert stored_text(source) == ("two", "one")


def test_a_replaced_text_of_the_same_size_is_prepared_anew(tmp_path, prepared):
    path = tmp_path / "a.txt"
    path.write_text("old text " * 10)
    os.utime(path, ns=(0, 10 ** 18))
    before = load(text, path).about["fingerprint"]
    path.write_text("new text " * 10)
    os.utime(path, ns=(0, 10 ** 18 + 1))
    assert stored_text(path)[0].startswith("new text")
    assert load(text, path).about["fingerprint"] != before


def test_the_fingerprint_is_of_the_content_and_not_of_place_or_time(tmp_path, prepared):
    first = write_files(tmp_path / "first", {"a.txt": "the same text " * 10})
    second = write_files(tmp_path / "second", {"b.txt": "the same text " * 10})
    fingerprint = load(text, first).about["fingerprint"]
    assert load(text, second).about["fingerprint"] == fingerprint
    os.utime(first / "a.txt", ns=(0, 10 ** 18))
    assert load(text, first).about["fingerprint"] == fingerprint
    assert len(list(data.DATA_DIR.iterdir())) == 3
    other = write_files(tmp_path / "other", {"a.txt": "the same text " * 9 + "that ends so "})
    assert load(text, other).about["fingerprint"] != fingerprint


def test_other_settings_are_prepared_anew(tmp_path, prepared, words):
    source = write_files(tmp_path / "texts", {"train.txt": "one", "valid.txt": "two", "test.txt": "three"})
    assert stored_text(source) == ("one", "two")
    assert stored_text(source, held_out="test") == ("one", "three")
    assert stored_text(source, split="test") == ("three", "two")
    load(text, source, tokenizer="words").about
    assert len(list(data.DATA_DIR.iterdir())) == 4


def test_folders_of_the_same_name_have_their_own_preparations(tmp_path, prepared):
    for place, content in (("first", "one text " * 20), ("second", "two text " * 20)):
        path = write_files(tmp_path / place / "texts", {"a.txt": content}) / "a.txt"
        os.utime(path, ns=(0, 10 ** 18))
    assert stored_text(tmp_path / "first" / "texts")[0].startswith("one")
    assert stored_text(tmp_path / "second" / "texts")[0].startswith("two")


def test_files_that_are_declared_for_another_split_are_prepared_anew(tmp_path, prepared):
    source = write_files(tmp_path / "set", {"a.jsonl": '{"text": "text a"}', "b.jsonl": '{"text": "text b"}'})
    for train, test in ("ab", "ba"):
        head = f"---\nconfigs:\n- data_files: {{train: {train}.jsonl, test: {test}.jsonl}}\n---\n"
        (source / "README.md").write_text(head)
        assert stored_text(source) == (f"text {train}", f"text {test}")


@pytest.mark.parametrize("change", [
    lambda facts: {}, lambda facts: [], lambda facts: facts | {"train": facts["train"] + 1},
    lambda facts: facts | {"arrays": ["train", "other"]}])
def test_a_preparation_that_does_not_fit_its_facts_is_damaged(change, tmp_path, prepared):
    source = write_hub(tmp_path / "hub")
    load(text, source).about
    [folder] = data.DATA_DIR.iterdir()
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(change(facts)))
    with pytest.raises(UserError, match="is damaged"):
        load(text, source).about


def test_a_preparation_that_lacks_an_array_is_damaged(tmp_path, prepared):
    source = write_hub(tmp_path / "hub")
    load(text, source).about
    [folder] = data.DATA_DIR.iterdir()
    (folder / "val.npy").unlink()
    with pytest.raises(UserError, match="is damaged"):
        load(text, source).about


def test_what_a_killed_preparation_left_is_deleted_after_a_day(tmp_path, prepared):
    source = write_hub(tmp_path / "hub")
    load(text, source).about
    [folder] = data.DATA_DIR.iterdir()
    shutil.rmtree(folder)
    old, new = (data.DATA_DIR / f".{folder.name}-{word}" for word in ("old", "new"))
    for scratch in (old, new):
        (scratch / "part").mkdir(parents=True)
    for path in (old, old / "part"):
        os.utime(path, (time.time() - 25 * 3600, time.time() - 25 * 3600))
    load(text, source).about
    assert sorted(data.DATA_DIR.iterdir()) == sorted([folder, new])


def test_few_short_documents_are_held_out_by_their_last_tenth(tmp_path, prepared):
    rows = "\n".join(json.dumps({"text": f"document {i:03}"}) for i in range(120))
    train, val = stored_text(write_files(tmp_path, {"a.jsonl": rows}) / "a.jsonl")
    assert len(val) == pytest.approx(.1 * len(train + val), abs=2)
    assert train.startswith("document 000\n") and val.endswith("document 119")


def test_an_empty_tenth_file_is_not_all_that_is_held_out(tmp_path, prepared):
    contents = {f"{i:02}.txt": f"document {i:02}" * 20 for i in range(12)} | {"09.txt": ""}
    train, val = stored_text(write_files(tmp_path / "texts", contents))
    assert len(val) == pytest.approx(.1 * len(train + val), abs=2)


@pytest.mark.parametrize("name, content", [
    ("a.txt", ""), ("a.csv", "text\n"), ("a.csv", 'text,name\n,1\n,2\n'), ("a.jsonl", '{"text": null}\n{"text": ""}')])
def test_data_without_text_are_said_to_have_none(name, content, tmp_path, prepared):
    assert f"there is no text in {name}" in refusal(text, write_files(tmp_path, {name: content}) / name)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, prepared, monkeypatch):
    texts = write_files(tmp_path / "texts", {f"{i}.txt": f"document {i}" for i in range(20)})
    pictures = write_classes(tmp_path / "set", "a", "b")

    def interrupted(progress, n):
        if progress.done > 3:
            raise KeyboardInterrupt
        progress.done += n
    with monkeypatch.context() as patch:
        patch.setattr(data.Progress, "add", interrupted)
        for module, source in ((text, texts), (images, pictures)):
            with pytest.raises(KeyboardInterrupt):
                load(module, source).about
    assert list(data.DATA_DIR.iterdir()) == []
    assert "document 18" in stored_text(texts)[0] and sum(counts(pictures)) == 24


def test_few_long_documents_are_held_out_by_their_last_tenth(tmp_path, prepared):
    rows = [json.dumps({"text": f"book {i:02} " * 100}) for i in range(60)]
    train, val = stored_text(write_files(tmp_path / "books", {"train.jsonl": "\n".join(rows)}))
    assert len(val) == pytest.approx(.1 * len(train + val), abs=2)
    assert train.startswith("book 00") and val.endswith("book 59 ")
    one = write_files(tmp_path / "one", {"train.jsonl": rows[0]})
    assert stored_text(one) == ("book 00 " * 90, "book 00 " * 10)


@pytest.mark.parametrize("block_size", range(5, 12))
def test_a_text_is_cut_between_characters(block_size, tmp_path, prepared, monkeypatch, words):
    monkeypatch.setattr(text, "PIECE", block_size)  # blocks, too, end within characters
    for length in range(20, 26):
        whole = "x" * (length % 3) + "日本語のé🙂" * length
        path = tmp_path / f"{length}.txt"
        path.write_text(whole, encoding="utf-8")
        train, val = stored_text(path)
        assert train + val == whole
        assert 0 <= len(train.encode()) - len(whole.encode()) * 9 // 10 <= 3
        d = load(text, path, tokenizer="words")
        assert d.tokenizer.decode(d.arrays["train"]) == train


@pytest.mark.parametrize("held_out, expected", [
    ("", "validation"), ("val", "validation"), ("test", "test"), ("extra", "extra")])
def test_a_named_split_is_held_out_and_never_trained_on(held_out, expected, tmp_path, prepared):
    files = {}
    for split in ("train", "test", "validation", "extra"):
        files[f"{split}-00000-of-00001.jsonl"] = json.dumps({"text": f"of {split}"})
    source = write_files(tmp_path / "hub", files)
    assert stored_text(source, held_out=held_out) == ("of train", f"of {expected}")


@pytest.mark.parametrize("held_out", ["train", "nowhere"])
def test_a_split_that_cannot_be_held_out_is_refused(held_out, tmp_path, prepared):
    write_hub(tmp_path / "hub", "train", 3)
    write_hub(tmp_path / "hub", "test", 3)
    assert f"--held-out '{held_out}'" in refusal(text, tmp_path / "hub", held_out=held_out)


def test_the_test_split_never_scores_its_own_rows(tmp_path, prepared, little_is_enough):
    source = write_hub(tmp_path / "hub", "train", 3)
    write_hub(source, "test", 200)
    train, val = stored_text(source, split="test")
    assert train.count("test") == 198 and val.split("\n") == ["test document 99", "test document 199"]
    write_hub(source, "validation", 3)
    train, val = stored_text(source, split="test")
    assert train.count("test") == 200 and val.count("validation") == 3
    pictures = tmp_path / "set"
    write_classes(pictures, "train/a", "train/b", n=20)
    write_classes(pictures, "test/a", "test/b", n=10)
    assert counts(pictures, split="test") == (18, 2)
    assert counts(pictures) == (40, 20)


# ---- Data: hub form ---------------------------------------------------------------------------------------

def write_table(path, texts):
    """A table with a column "text", in the form that the path's suffixes tell."""
    import pyarrow
    import pyarrow.parquet
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[1]
    table = pyarrow.table({"text": texts})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=70)
    else:
        rows = [{"text": one} for one in texts]
        if kind == "json":
            content = json.dumps(rows)
        elif kind == "jsonl":
            content = "\n".join(json.dumps(row) for row in rows)
        else:
            content = "\n".join(["text", *texts])
        packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pyarrow.output_stream(str(path), compression=packing) as file:
            file.write(content.encode())
    return path


def write_image_table(path, n, seed=0, shape=(8, 8, 3), labels=None):
    """A table of n images of random pixels in two classes, as `datasets` writes it. Returns the pixels."""
    import datasets
    pixels = []
    for i in range(n):
        pixels.append(np.random.RandomState(1000 * seed + i).randint(256, size=shape, dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"picture": [Image.fromarray(one) for one in pixels], "kind": labels or [i % 2 for i in range(n)]}
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return pixels


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz",
                                  "a.csv.gz", "a.json.zst", "a.jsonl.zst", "a.tsv.zst"])
def test_a_file_in_hub_form_is_read_by_rows(name, tmp_path, prepared, little_is_enough):
    texts = [f"dócument {i}" for i in range(200)]
    train, val = stored_text(write_table(tmp_path / name, texts))
    assert val.split("\n") == [texts[99], texts[199]]
    assert train.split("\n") == texts[:99] + texts[100:199]


def test_an_arrow_file_of_the_other_format_is_read_too(tmp_path, prepared, little_is_enough):
    import pyarrow
    table = pyarrow.table({"text": [f"document {i}" for i in range(200)]})
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert stored_text(tmp_path / "a.arrow")[1] == "document 99\ndocument 199"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_words_that_look_like_nothing_are_text(name, tmp_path, prepared):
    words = ["null", "NA", "None", "nan", "N/A", "true", "1"]
    texts = words + [f"document {i}" for i in range(93)]
    train, val = stored_text(write_table(tmp_path / name, texts))
    assert train.split("\n")[:7] == words


def test_a_cell_of_csv_holds_commas_quotes_and_lines(tmp_path, prepared):
    rows = ["\ufefftext,name", '"one, two\nthree",1', '"say ""four""",2', "", ",3", "x" * 200_000 + ",4", ""]
    train, val = stored_text(write_files(tmp_path, {"a.csv": "\r\n".join(rows)}) / "a.csv")
    assert train + val == 'one, two\nthree\nsay "four"\n' + "x" * 200_000


def test_rows_without_text_are_left_out_and_counted(tmp_path, prepared):
    rows = [{"text": "first " * 20}, {"text": None}, {"text": "second " * 20}, {"text": None}]
    source = write_files(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}) / "a.jsonl"
    assert "left out: 2 rows without text" in load(text, source).describe()


GOOD_ROWS = "\n".join('{"text": "document %d"}' % i for i in range(150)) + "\n"


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", GOOD_ROWS + '{"text": "oops', "a.jsonl, line 151 is not JSON"),
    ("a.jsonl", GOOD_ROWS + '"text"', "a.jsonl, line 151 holds no columns"),
    ("a.jsonl", GOOD_ROWS + '{"body": "text"}', "a.jsonl, line 151 has no column 'text'; it has body"),
    ("a.jsonl", GOOD_ROWS + '{"text": 7}', "a.jsonl, line 151: column 'text' holds no text, but int"),
    ("a.jsonl", GOOD_ROWS + r'{"text": "half \ud83d"}', "a.jsonl, line 151 is no valid text"),
    ("a.jsonl", GOOD_ROWS.encode() + '{"text": "café"}'.encode("latin-1"), "a.jsonl, line 151 is not JSON"),
    ("a.json", '[{"text": "a"}, 3]', "a.json, row 1 holds no columns"),
    ("a.json", '[{"text": "a"', "a.json cannot be read"),
    ("a.csv", "text\none\na,b,c\n", "a.csv, row 1: 3 cells, but the first line names 1"),
    ("a.csv", "text,name\none,1\ntwo\n", "a.csv, row 1: 1 cells, but the first line names 2"),
    ("a.csv", "text\none\ncafé\n".encode("latin-1"), "a.csv, row 1 cannot be read"),
    ("a.csv", "täxt\none\n".encode("latin-1"), "a.csv, row 0 cannot be read"),
    ("a.csv", 'text\none\n"two', "a.csv, row 1 cannot be read"),
    ("a.tsv", "text\tname\none\n", "a.tsv, row 0: 1 cells, but the first line names 2"),
    ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read"),
    ("a.arrow", b"ARROW1 and no more", "a.arrow cannot be read"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read")])
def test_a_row_that_cannot_be_read_is_named(name, content, says, tmp_path, prepared):
    source = write_files(tmp_path / "set", {name: content})
    assert says in refusal(text, source)
    assert says in refusal(text, source / name)


def test_a_damaged_parquet_file_is_named_with_its_row(tmp_path, prepared):
    source = write_table(tmp_path / "a.parquet", [f"document {i} {'x' * i}" for i in range(400)])
    content = bytearray(source.read_bytes())
    content[20:400] = bytes(380)
    source.write_bytes(content)
    assert "a.parquet cannot be read after row 0" in refusal(text, source)


def test_one_of_several_configurations_must_be_chosen(tmp_path, prepared):
    head = ("---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n"
            "- config_name: de\n  data_files:\n  - split: train\n    path: de/a*.jsonl\n"
            "  - split: validation\n    path: [de/b.jsonl]\n---\n")
    source = write_files(tmp_path / "set", {
        "README.md": head, "en/a.jsonl": '{"text": "english text"}', "de/a1.jsonl": '{"text": "deutsch"}',
        "de/b.jsonl": '{"text": "Abend"}'})
    assert "choose one with --config: 'en', 'de'" in refusal(text, source)
    assert "has no --config 'fr'; it has 'en', 'de'" in refusal(text, source, config="fr")
    assert "".join(stored_text(source, config="en")) == "english text"
    assert stored_text(source, config="de") == ("deutsch", "Abend")


def write_declared(folder, configs):
    """Six tables, and a README.md that declares these configurations."""
    contents = {"README.md": f"\ufeff---\nlicense: mit\nconfigs:\n{configs}\n---\n# A set"}
    for name in ("a.jsonl", "b.jsonl", "en/a.jsonl", "en/b.jsonl", "en/more/c.jsonl", "de/a.csv"):
        content = json.dumps({"text": f"of {name}"})
        if name.endswith(".csv"):
            content = f"text\nof {name}"
        contents[name] = content
    return write_files(folder, contents)


@pytest.mark.parametrize("configs, train, val", [
    ("- data_files: {train: a.jsonl, test: b.jsonl}", "of a.jsonl", "of b.jsonl"),
    ("- data_files: {train: [en/a.jsonl, en/more], test: b.jsonl}", "of en/a.jsonl\nof en/more/c.jsonl", "of b.jsonl"),
    ("- data_files:\n  - split: train\n    path: ['*.jsonl']\n  - {split: dev, path: 'en/*'}",
     "of a.jsonl\nof b.jsonl", "of en/a.jsonl\nof en/b.jsonl"),
    ("- data_files: {train: '**/c.jsonl', test: './b.jsonl'}", "of en/more/c.jsonl", "of b.jsonl"),
    ("- data_dir: en\n  data_files: {train: '**', test: ../b.jsonl}", "refused", "no file in hub form matches"),
    ("- data_dir: ./en/\n  data_files: {train: more/**, test: ./b.jsonl}", "of en/more/c.jsonl", "of en/b.jsonl"),
    ("- {config_name: x, data_dir: de}\n- {config_name: y, data_files: {train: a.jsonl, test: b.jsonl}, default: true}",
     "of a.jsonl", "of b.jsonl"),
    ("- {config_name: x, data_dir: de}\n- {config_name: default, data_files: {train: a.jsonl, test: b.jsonl}}",
     "of a.jsonl", "of b.jsonl"),
    ("- data_dir: .\n  data_files: {train: a.jsonl, test: b.jsonl}", "of a.jsonl", "of b.jsonl"),
    ("- data_files: {train: '*.jsonl', test: 'b.jsonl'}", "refused", "'b.jsonl' for the split 'train' and for 'test'"),
    ("- data_files: {train: a.jsonl, test: 'z*'}", "refused", "'z*', but no file in hub form matches"),
    ("- data_files: https://a.org/b.jsonl", "refused", "not read from here"),
    ("- {config_name: x, data_dir: en}\n- {config_name: x, data_dir: de}", "refused", "'x' is declared twice"),
    ("- data_files: {train: 2024-99-99}", "refused", "configs of README.md cannot be understood"),
    ("- data_files: [a.jsonl, {split: train}]", "refused", "configs of README.md cannot be understood"),
    ("- data_files: [{path: a.jsonl}]", "refused", "configs of README.md cannot be understood"),
    ("- data_files: 3", "refused", "configs of README.md cannot be understood"),
    ("- a.jsonl", "refused", "configs of README.md cannot be understood"),
    ("- data_dir: null\n  data_files: a.jsonl", "refused", "configs of README.md cannot be understood"),
    ("  [", "refused", "configs of README.md cannot be understood")])
def test_configurations_of_a_readme_are_understood_or_refused(configs, train, val, tmp_path, prepared):
    source = write_declared(tmp_path / "set", configs)
    if train == "refused":
        assert val in refusal(text, source)
    else:
        assert stored_text(source) == (train, val)


def test_a_configuration_is_chosen_before_its_files_are_looked_at(tmp_path, prepared):
    source = write_declared(tmp_path / "set", "- {config_name: 1, data_dir: en}\n- {config_name: 2, data_dir: de}")
    assert "choose one with --config: '1', '2'" in refusal(text, source)
    assert "".join(stored_text(source, config="2")) == "of de/a.csv"
    assert "of en/b.jsonl" in "".join(stored_text(source, config="1"))


def test_a_readme_whose_head_declares_nothing_is_not_understood_in_vain(tmp_path, prepared):
    source = write_files(tmp_path / "set", {"README.md": "---\n: [ no yaml\n---\n", "a.jsonl": '{"text": "some text"}'})
    assert "".join(stored_text(source)) == "some text"


@pytest.mark.parametrize("name, content, says", [
    ("a.csv", "\ntext\none", "a.csv: the first line is empty"),
    ("a.csv", "text,text\none,two", "a.csv: the first line names the column 'text' twice"),
    ("a.csv", "body\none", "choose one with --column"), ("a.parquet", None, "choose one with --column")])
def test_columns_that_are_not_named_well_are_told(name, content, says, tmp_path, prepared):
    if content is None:
        write_table(tmp_path / name, ["one"])
    else:
        write_files(tmp_path, {name: content})
    column = "other" if name == "a.parquet" else "text"
    assert says in refusal(text, tmp_path / name, column=column)


@pytest.mark.parametrize("before", ["\ufeff", " \n ", "\ufeff\n"])
def test_a_mark_or_space_may_stand_before_a_list_of_json(before, tmp_path, prepared):
    path = write_files(tmp_path, {"a.json": before + '[{"text": "some text"}]'}) / "a.json"
    assert "".join(stored_text(path)) == "some text"
    path = write_files(tmp_path, {"a.jsonl": before + '{"text": "some text"}'}) / "a.jsonl"
    assert "".join(stored_text(path)) == "some text"


def write_labels(path, labels, names=None, column="kind"):
    """A table of grey images with labels, whose classes may have names."""
    import datasets
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("string" if isinstance(labels[0], str) else "int64")
    pixels = [Image.fromarray(one) for one in noise(len(labels), 8, 8)]
    features = datasets.Features({"picture": datasets.Image(), column: kind})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"picture": pixels, column: labels}, features=features).to_parquet(path)


def test_files_that_number_classes_differently_are_refused(tmp_path, prepared):
    write_labels(tmp_path / "set" / "train.parquet", [0, 1] * 10, ["cat", "dog"])
    write_labels(tmp_path / "set" / "test.parquet", [0, 1] * 10, ["dog", "cat"])
    message = refusal(images, tmp_path / "set")
    assert "train.parquet and test.parquet number the classes of 'kind' differently" in message


def test_a_split_without_the_column_of_labels_is_not_held_out(tmp_path, prepared, capsys):
    write_labels(tmp_path / "set" / "train.parquet", [0, 1] * 10, ["cat", "dog"])
    write_labels(tmp_path / "set" / "test.parquet", [0] * 5, column="number")
    assert counts(tmp_path / "set") == (18, 2)
    assert "'test' has no labels" in capsys.readouterr().out


@pytest.mark.parametrize("labels, says", [
    (["a", "b"], "--label-column must hold class numbers"), ([-1, -1], "there are no labels"),
    ([0, 2, 0, 2], "class 1 (1) has no image to train on, and 0 held out"),
    ([0, 0, 1], "class 1 (1) has no image to train on, and 1 held out")])
def test_labels_that_do_not_fit_are_told(labels, says, tmp_path, prepared):
    write_labels(tmp_path / "a.parquet", labels)
    assert says in refusal(images, tmp_path / "a.parquet", label_column="kind")


def test_what_datasets_says_in_a_table_may_be_damaged(tmp_path, prepared):
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"text": ["one"]}).replace_schema_metadata({"huggingface": "{no json"})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet cannot be read" in refusal(images, tmp_path / "a.parquet")


def test_images_in_hub_form_keep_their_labels_and_splits(tmp_path, prepared):
    source = tmp_path / "hub"
    train = write_image_table(source / "data" / "train-00000-of-00001.parquet", 7, seed=1)
    test = write_image_table(source / "data" / "test-00000-of-00001.parquet", 5, seed=2)
    d = load(images, source)
    assert d.names == ["cat", "dog"] and d.facts["n_channel"] == 3
    for split, pixels in (("train", train), ("val", test)):
        assert d.arrays[f"{split}_labels"].tolist() == [i % 2 for i in range(len(pixels))]
        assert (d.arrays[f"{split}_images"] == np.stack(pixels).transpose(0, 3, 1, 2)).all()
    assert counts(source, split="test") == (3, 2)  # and never scores its own rows


def test_a_split_without_labels_is_not_held_out(tmp_path, prepared, capsys):
    source = tmp_path / "hub"
    write_image_table(source / "train.parquet", 20, seed=1)
    write_image_table(source / "test.parquet", 10, seed=2, labels=[-1] * 10)
    assert counts(source) == (18, 2)
    assert "'test' has no labels, so it is not held out" in capsys.readouterr().out
    write_image_table(source / "validation.parquet", 6, seed=3, labels=[-1] * 6)
    assert counts(source) == (18, 2)
    write_image_table(source / "validation.parquet", 4, seed=3)
    assert counts(source) == (20, 4)


def test_columns_of_images_are_found_or_asked_for(tmp_path, prepared):
    write_image_table(tmp_path / "a.parquet", 20)
    assert counts(tmp_path / "a.parquet", image_column="picture", label_column="kind") == (18, 2)
    shutil.rmtree(data.DATA_DIR)
    data.DATA_DIR.mkdir()
    assert "has no column 'image' (--image-column); it has picture, kind" in refusal(
        images, tmp_path / "a.parquet", image_column="image")
    write_table(tmp_path / "b.parquet", ["no image"] * 5)
    assert "choose --image-column of text" in refusal(images, tmp_path / "b.parquet")


class FakeDataset:
    """A dataset of the hub, as `datasets` streams it, whose connection is lost after some rows."""
    features = None

    def __init__(self, n, lost_after=None):
        self.n, self.lost_after = n, lost_after

    def __iter__(self):
        for i in range(self.n):
            if i == self.lost_after:
                raise ConnectionError("the server hung up\nand says more")
            yield {"text": f"document {i}"}


def pretend_hub(monkeypatch, configs, splits):
    """The hub holds a dataset with these configurations and splits. Returns a list of what is asked for."""
    asked = []

    def load_dataset(source, config, streaming):
        asked.append((source, config))
        return splits
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda source: configs)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_a_connection_lost_while_rows_are_streamed_gets_one_line(prepared, monkeypatch):
    pretend_hub(monkeypatch, ["default"], {"train": FakeDataset(300, lost_after=170)})
    message = refusal(text, "someone/texts")
    assert "someone/texts, train: row 170 cannot be read" in message and "hung up" in message


def test_datasets_of_the_hub_have_splits_and_configurations(prepared, monkeypatch):
    splits = {"train": FakeDataset(3), "unsupervised": FakeDataset(5), "test": FakeDataset(2)}
    asked = pretend_hub(monkeypatch, ["en", "de"], splits)
    assert "choose one with --config: 'en', 'de'" in refusal(text, "someone/texts")
    assert "no --config 'fr'; it has 'en', 'de'" in refusal(text, "someone/texts", config="fr")
    train, val = stored_text("someone/texts", config="de")
    assert asked == [("someone/texts", "de")]
    assert train.count("document") == 3 and val.count("document") == 2


class FailingDataset(FakeDataset):
    def __iter__(self):
        yield {"text": "document 0"}
        raise ValueError("a row of another form")


def test_the_network_is_asked_for_only_where_it_failed(prepared, monkeypatch):
    pretend_hub(monkeypatch, ["default"], {"train": FailingDataset(2)})
    message = refusal(text, "someone/texts")
    assert "row 1 cannot be read (ValueError: a row of another form)" in message


# ---- Data: text and its tokens ----------------------------------------------------------------------------

# of GPT-2, and of cl100k_base, whose tokens may hold a line end after a sign
PATTERNS = {"words": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
            "lines": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                     r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"}


@pytest.fixture
def words(monkeypatch):
    """Two small encodings in the place of tiktoken's. Ids 268 to 299 have no token."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    for merged in (" a", "ab", " ab", "\n\n", "  ", ".\n", "\r\n", "\t ", "12", "na", "é", "\u3000"):
        ranks[merged.encode()] = len(ranks)
    encodings = {}
    for name, pattern in PATTERNS.items():
        encodings[name] = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                            special_tokens={"<|end|>": 300})
    monkeypatch.setattr(tiktoken, "get_encoding", encodings.__getitem__)
    return encodings


def random_text(rng, length):
    signs = ["a", "b", "ab", "é", "日", "1", "12", ".", ",", "'s"]
    spaces = [" ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000"]
    return "".join(rng.choice(signs + spaces) for _ in range(length))


@pytest.mark.parametrize("name", ["words", "lines"])
def test_the_tokens_of_pieces_are_those_of_the_whole_document(name, words, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 10)
    tokenizer, rng, n_pieces = text.Tokenizer(name), random.Random(0), 0
    for _ in range(300):
        whole = random_text(rng, 50).encode()
        cuts = sorted(rng.sample(range(len(whole)), 3))
        blocks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)])]
        found = list(text.pieces(blocks))
        assert b"".join(found) == whole
        ids = np.concatenate(tokenizer.encode_all(found))
        assert ids.tolist() == words[name].encode_ordinary(whole.decode())
        n_pieces += len(found)
    assert n_pieces > 2 * 300


def test_a_text_without_white_space_is_cut_between_characters(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 10)
    monkeypatch.setattr(text, "LONGEST", 40)
    whole = "日本語のé🙂" * 50
    blocks = [whole.encode()[i:i + 7] for i in range(0, len(whole.encode()), 7)]
    found = list(text.pieces(blocks))
    assert "".join(piece.decode() for piece in found) == whole
    assert max(map(len, found)) <= 40


def test_blocks_of_a_large_text_never_gather_in_memory(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 1000)
    n_read = 0

    def blocks():
        nonlocal n_read
        for _ in range(500):
            n_read += 1000
            yield b"some words of a long text, that repeats itself .. \n" * 20

    n_given, parts = 0, []
    for split, part in text.cut_in_two(blocks(), 300_000):
        for piece in text.pieces(part):
            n_given += len(piece)
            assert n_read - n_given < 4000 and len(piece) < 3000
        parts.append((split, n_given))
    assert parts == [("train", 300_000), ("val", 500 * 1020)]


def test_tokens_are_written_as_soon_as_there_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 1000)
    monkeypatch.setattr(text, "AT_ONCE", 5000)
    tokenizer, sizes = text.Tokenizer("bytes"), []
    real = tokenizer.encode_all

    def encode_all(texts):
        sizes.append(sum(map(len, texts)))
        return real(texts)
    monkeypatch.setattr(tokenizer, "encode_all", encode_all)
    documents = [("train", [b"word " * 200] * 100), ("val", [b"word " * 200] * 20)]
    arrays = text.tokenize(documents, tokenizer, tmp_path, data.Progress("bytes")).arrays()
    assert bytes(arrays["train"]) == b"word " * 20_000 and bytes(arrays["val"]) == b"word " * 4_000
    assert max(sizes) < 8000


@pytest.mark.parametrize("n_cores", [1, 2, 7, None])
def test_tokens_are_the_same_whatever_the_number_of_cores(n_cores, words, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    rng = random.Random(1)
    texts = [random_text(rng, 30) for _ in range(60)]
    found = text.Tokenizer("words").encode_all([one.encode() for one in texts])
    assert [ids.tolist() for ids in found] == [words["words"].encode_ordinary(one) for one in texts]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf8_is_refused_where_a_tokenizer_needs_it(encoding, tmp_path, prepared, words,
                                                                    monkeypatch):
    monkeypatch.setattr(text, "PIECE", 16)
    raw = ("plain words, then é" * 5).encode("utf-8") + "déjà vu, naïve café\n".encode(encoding)
    (tmp_path / "a.txt").write_bytes(raw)
    place = len(("plain words, then é" * 5).encode()) + (1 if encoding == "latin-1" else 0)
    assert f"is not UTF-8 at byte {place};" in refusal(text, tmp_path / "a.txt", tokenizer="words")
    (tmp_path / "b.txt").write_bytes("ends within a character: é".encode()[:-1])
    assert "is not UTF-8 at byte 25" in refusal(text, tmp_path / "b.txt", tokenizer="words")
    arrays = load(text, tmp_path / "a.txt").arrays
    assert bytes(arrays["train"]) + bytes(arrays["val"]) == raw


def test_ids_without_a_token_are_shown(words):
    tokenizer = text.Tokenizer("words")
    assert tokenizer.n_vocab == 301
    assert tokenizer.decode([104, 105, 289, 300, 33]) == "hi\N{REPLACEMENT CHARACTER}<|end|>!"
    assert text.Tokenizer("bytes").decode([104, 105, 0xC3]) == "hi\N{REPLACEMENT CHARACTER}"


def test_an_array_that_is_larger_than_memory_is_read(tmp_path, prepared):
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    load(text, tmp_path / "a.txt").about
    [folder] = data.DATA_DIR.iterdir()
    n = 2 ** 42  # bytes of a sparse file, which takes no room
    try:
        with open(folder / "train.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n,)})
            file.truncate(file.tell() + n)
    except OSError:
        pytest.skip("there are no sparse files of this size here")
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | {"train": n}))
    d = load(text, tmp_path / "a.txt")
    assert d.batch(4, SimpleNamespace(seq_len=16), 0).shape == (4, 17)
    assert not d.arrays["train"].flags.writeable
    (folder / "train.npy").unlink()


# ---- Data: images -----------------------------------------------------------------------------------------

def test_images_of_one_colour_are_refused(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a", "b", n=2)
    for path in source.glob("*/*.png"):
        Image.new("RGB", (8, 8), (77, 77, 77)).save(path)
    assert "the same value" in refusal(images, source)


def test_what_transparent_pixels_hide_is_white(tmp_path, prepared):
    for name, value in (("black", 0), ("white", 255)):
        (tmp_path / "icons" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.RandomState(i).randint(256, size=(8, 8, 4), dtype=np.uint8)
            pixels[..., 3] = 0
            pixels[2:6, 2:6] = value, value, value, 255
            Image.fromarray(pixels).save(tmp_path / "icons" / name / f"{i}.png")
    x, label = load(images, tmp_path / "icons").fixed("train")
    assert (x[:, :, 0, 0] == 1).all()
    assert torch.equal(x[:, 0, 3, 3], 2.0 * label - 1)


@pytest.mark.parametrize("shape, n_channel", [((8, 8), 1), ((8, 8, 3), 3)])
def test_grey_images_have_one_channel(shape, n_channel, tmp_path, prepared):
    source = tmp_path / "set"
    pixels = {}
    for name in ("a", "b"):
        for i in range(3):
            pixels[name, i] = write_picture(source / name / f"{i}.png", i, shape)
    d = load(images, source)
    assert d.facts["n_channel"] == n_channel
    stored = np.concatenate([d.arrays["train_images"], d.arrays["val_images"]])
    known = {one.reshape(8, 8, -1).transpose(2, 0, 1).tobytes() for one in pixels.values()}
    assert stored.shape == (6, n_channel, 8, 8) and {one.tobytes() for one in stored} == known


def test_an_image_that_cannot_be_read_is_named(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a", "b", n=3)
    whole = (source / "b" / "1.png").read_bytes()
    for damaged in (whole[:60], b"<html>not found</html>", b""):
        (source / "b" / "1.png").write_bytes(damaged)
        assert "b/1.png cannot be read as an image" in refusal(images, source)


def test_a_cell_that_holds_no_image_is_named(tmp_path, prepared):
    import pyarrow
    import pyarrow.parquet
    source = tmp_path / "a.parquet"
    write_image_table(source, 6)
    table = pyarrow.parquet.read_table(source)
    for cell, says in (({"bytes": b"no image", "path": None}, "a.parquet, row 4 cannot be read as an image"),
                       (None, "a.parquet, row 4: --image-column picture holds no image")):
        cells = table["picture"].to_pylist()
        cells[4] = cell
        changed = pyarrow.array(cells, type=table.schema.field("picture").type)
        pyarrow.parquet.write_table(table.set_column(0, table.schema.field("picture"), changed), source)
        assert says in refusal(images, source)


@pytest.mark.parametrize("shape", [(7, 2, 4, 4), (7, 2, 1, 1), (7, 4, 3, 3)])
def test_held_out_latents_of_another_shape_are_refused(shape, tmp_path, prepared):
    source = write_latents(tmp_path / "a", val_latents=np.ones(shape))
    assert f"val_latents {shape}" in refusal(images, source)


def test_a_class_without_an_image_to_train_on_is_refused(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a", "b", n=3)
    write_classes(source, "lonely", n=1)
    assert "(lonely)" in refusal(images, source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on Windows")
def test_a_path_in_a_table_that_is_no_file_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), str(tmp_path / "nowhere.png")):
        with pytest.raises(UserError, match="holds no image"):
            images.file_of({"bytes": None, "path": path}, "row 0", "picture")


def test_images_of_sixteen_bits_are_refused(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a", "b", n=3)
    rows = b"".join(b"\0" + bytes(6 * 8) for _ in range(8))  # 8 pixels of 3 channels of 2 bytes

    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    header = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])  # 16 bits, in colour
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (source / "b" / "1.png").write_bytes(whole)
    assert "b/1.png: images must have 8 bits a channel, but this one has 16" in refusal(images, source)


def test_bytes_that_are_no_image_are_told_without_python(tmp_path, prepared):
    source = write_classes(tmp_path / "set", "a", "b", n=3)
    (source / "b" / "1.png").write_bytes(b"no image")
    message = refusal(images, source)
    assert "b/1.png cannot be read as an image: its bytes are those of no known kind" in message


@pytest.mark.parametrize("latents, says", [
    (np.ones((23, 2, 3, 3), complex), "not real numbers"), (np.full((23, 2, 3, 3), 1e300), "not finite as float32")])
def test_latents_that_float32_cannot_hold_are_refused(latents, says, tmp_path, prepared):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert says in refusal(images, write_latents(tmp_path / "a", latents=latents))


@pytest.mark.parametrize("name, says", [("x.png", "left out: 1 .png"), ("x.csv", "left out: 1 .csv")])
def test_a_single_file_that_holds_no_images_is_told_by_its_suffix(name, says, tmp_path, prepared):
    assert says in refusal(images, write_files(tmp_path, {name: "some text"}) / name)


def test_classes_without_names_are_said_to_be_shown_by_number(tmp_path, prepared, capsys):
    assert load(images, tmp_path / "typo.npz").class_names(2) == ["0", "1"]
    assert "typo.npz: there is no such file" in capsys.readouterr().out


def test_a_full_disk_is_told_when_images_are_written(tmp_path, prepared, monkeypatch):
    def full(file, rows):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(images.ArrayFile, "write", full)
    assert "No space left on device" in refusal(images, write_classes(tmp_path / "set", "a", "b"))


@pytest.mark.parametrize("name, replaced, says", [
    ("noiseless", "    noise: ", "Config needs a field noise"), ("alone", "def control(", "Config needs control()")])
def test_what_a_config_lacks_is_told_before_data_are_prepared(name, replaced, says, tmp_path, prepared, monkeypatch):
    code = (HERE / "results/mlp.py").read_text()
    assert replaced in code
    (tmp_path / f"{name}.py").write_text(code.replace(replaced, replaced.replace("noise", "other").replace("control", "c")))
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        train.main([f"--model={name}", "--control", f"--out={tmp_path}"])
    assert says in str(caught.value) and list(data.DATA_DIR.iterdir()) == []


# ---- Data: progress ---------------------------------------------------------------------------------------

def test_progress_is_a_line_a_minute_where_there_is_no_terminal(monkeypatch, capsys):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(data, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with data.Progress("documents", 1000) as progress:
        for _ in range(20):
            clock.now += 10
            progress.add(20)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["prepared 120 documents, 2 a second, 12 %, 7 min left",
                     "prepared 240 documents, 2 a second, 24 %, 6 min left",
                     "prepared 360 documents, 2 a second, 36 %, 5 min left"]


def test_progress_without_a_known_end_tells_the_speed(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(data, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with data.Progress("bytes") as progress:
        clock.now += 100
        progress.add(5_000_000)
    assert capsys.readouterr().out == "prepared 5,000,000 bytes, 50,000 a second\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with data.Progress("images", 10) as progress:
        progress.add(4)
        assert progress.bar.n == 4 and progress.bar.total == 10
    printed = capsys.readouterr()
    assert printed.out == "" and "10" in printed.err


def test_preparing_tells_what_was_done_of_how_much(tmp_path, prepared, monkeypatch, little_is_enough):
    told = []

    class Told(data.Progress):
        def __exit__(self, *error):
            told.append((self.unit, self.done, self.total))
    monkeypatch.setattr(text, "Progress", Told)
    monkeypatch.setattr(images, "Progress", Told)
    load(text, write_files(tmp_path / "texts", {"a.txt": "x" * 50, "b.txt": "y" * 50})).about
    load(text, write_table(tmp_path / "a.parquet", [f"document {i}" for i in range(120)])).about
    load(text, write_table(tmp_path / "a.jsonl", [f"document {i}" for i in range(120)])).about
    load(images, write_classes(tmp_path / "set", "a", "b")).about
    assert told == [("bytes", 101, 100), ("documents", 120, 120), ("documents", 120, None), ("images", 24, 24)]


# ---- Data: augmentation -----------------------------------------------------------------------------------

def operation(name, x, s):
    return augment.OPERATIONS[name](x, torch.full((len(x), 1, 1, 1), float(s)))


def photographs(channels):  # whole numbers 0..255, smooth as real ones; one is dark, one of a single colour
    x = 25 + 190 * F.interpolate(torch.rand(7, channels, 5, 5), (32, 32), mode="bicubic")
    return torch.cat([x[:6], x[6:].clamp(max=90), torch.full_like(x[:1], 77)]).round().clamp(9, 240)


@pytest.mark.parametrize("name, theirs, s", [
    ("equalize", ImageOps.equalize, 1), ("autocontrast", ImageOps.autocontrast, 1),
    ("posterize", lambda p: ImageOps.posterize(p, 7), .3),
    ("solarize", lambda p: ImageOps.solarize(p, 178.5), .3),
    ("brightness", lambda p: ImageEnhance.Brightness(p).enhance(1.27), .3),
    ("colour", lambda p: ImageEnhance.Color(p).enhance(.73), -.3),
    ("contrast", lambda p: ImageEnhance.Contrast(p).enhance(1.9), 1),
    ("sharpness", lambda p: ImageEnhance.Sharpness(p).enhance(.1), -1)])
def test_operations_on_colours_agree_with_pil(name, theirs, s):
    grey, colour = photographs(1), photographs(3)
    for a, b in [*zip(grey, operation(name, grey, s)), *zip(colour, operation(name, colour, s))]:
        picture = theirs(Image.fromarray(a.byte().permute(1, 2, 0).numpy().squeeze()))
        true = np.asarray(picture, dtype=np.float32).reshape(32, 32, -1)
        assert abs(b.permute(1, 2, 0).numpy() - true).max() <= 1


def test_crops_and_flips_treat_each_image_by_itself():
    x = F.pad(torch.rand(300, 3, 6, 6), (1, 1, 1, 1), value=-1.0)
    moved = [[torch.equal(a, b.roll((i, j), (1, 2))) for i in (-1, 0, 1) for j in (-1, 0, 1)]
             for a, b in zip(augment.crop(x), x)]
    assert (np.sum(moved, 1) == 1).all() and (np.sum(moved, 0) > 10).all()  # one pixel of 8, every way
    assert 100 < sum(torch.equal(a, b.flip(2)) for a, b in zip(augment.flip(x), x)) < 200


SHARE = 150 / 331  # of the side, by which RandAugment translates


@pytest.mark.parametrize("s", [.3, -.3, 1, -1])
@pytest.mark.parametrize("name", ["shear x", "shear y", "translate x", "translate y", "rotate"])
def test_geometry_agrees_with_pil(name, s):
    cos, sin = math.cos(s * math.pi / 6), math.sin(s * math.pi / 6)  # by 30 degrees
    across, along, shift_x, shift_y = 1, 1, 0, 0
    shear_x, shear_y = 0, 0
    if name == "shear x":
        shear_x = .3 * s
    elif name == "shear y":
        shear_y = .3 * s
    elif name == "translate x":
        shift_x = 32 * SHARE * s
    elif name == "translate y":
        shift_y = 32 * SHARE * s
    else:
        across, along, shear_x, shear_y = cos, cos, -sin, sin
    # where a pixel comes from, as Pillow wants it; the centre (16, 16) stays, but for a translation
    coefficients = (across, shear_x, 16 - 16 * (across + shear_x) + shift_x,
                    shear_y, along, 16 - 16 * (shear_y + along) + shift_y)
    before = photographs(3)
    for image, changed in zip(before, operation(name, before, s)):
        picture = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
        true = picture.transform((32, 32), Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST,
                                 fillcolor=(128, 128, 128))
        differ = (changed.permute(1, 2, 0).numpy() != np.asarray(true)).any(2)
        assert differ.sum() <= 5  # of 1024: places that lie between two pixels


def record_operations(monkeypatch):
    """14 operations that each add 1 to an image. Returns a list of (operation, grey level, strength)."""
    calls = []

    def operation_number(number):
        def add_one(x, s):
            for level, strength in zip(x[:, 0, 0, 0].tolist(), s.flatten().tolist()):
                calls.append((number, level, strength))
            return x + 1
        return add_one
    names = list(augment.OPERATIONS)
    monkeypatch.setattr(augment, "OPERATIONS", {name: operation_number(i) for i, name in enumerate(names)})
    return calls


def test_two_operations_of_fourteen_change_each_image_at_strength_nine_of_thirty(monkeypatch):
    calls = record_operations(monkeypatch)
    levels = torch.arange(140.0)
    x = (levels / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    changed = ((augment.rand(x) + 1) * 127.5).round()
    assert torch.equal(changed[:, 0, 0, 0], levels + 2)  # twice, and each image in its place
    numbers = np.bincount([number for number, _, _ in calls])
    assert numbers.tolist() == [20] * 14
    strengths = [strength for _, _, strength in calls]
    assert all(abs(strength) == pytest.approx(.3) for strength in strengths)
    assert 80 < sum(strength > 0 for strength in strengths) < 200
    first = {level: number for number, level, _ in calls[:140]}
    second = {level - 1: number for number, level, _ in calls[140:]}
    assert sum(first[level] == second[level] for level in first) < 40  # drawn anew: 10 of 140 are expected
    for drawn in (first, second):
        assert len({drawn[level] for level in range(10)}) > 2  # neighbours do not share theirs


def test_operations_are_drawn_for_each_batch_anew(monkeypatch):
    calls = record_operations(monkeypatch)
    drawn = []
    for _ in range(30):
        calls.clear()
        augment.rand(torch.zeros(1, 3, 4, 4))
        drawn.append([number for number, _, _ in calls])
    assert all(len(numbers) == 2 for numbers in drawn)
    assert len(set(itertools.chain(*drawn))) > 8


def test_rand_augment_without_strength_keeps_images_in_their_places(monkeypatch):
    for name in ("autocontrast", "equalize", "solarize"):  # which have no strength, or change white
        monkeypatch.delitem(augment.OPERATIONS, name)
    x = photographs(3) / 127.5 - 1
    assert torch.allclose(augment.rand(x, strength=0), x, atol=1e-5)


@pytest.mark.parametrize("name", ["crop", "flip", "rand", "rand,crop,flip"])
def test_batches_are_augmented_and_keep_their_labels(name, tmp_path, prepared):
    source = tmp_path / "set"
    for number, c in enumerate("ab"):
        for i in range(10):
            pixels = write_picture(source / c / f"{i}.png", i) // 4 + 150 * number  # b is brighter than a
            Image.fromarray(pixels).save(source / c / f"{i}.png")
    plain, plain_labels = load(images, source).batch(16, None, 0)
    x, labels = load(images, source, augment=name).batch(16, None, 0)
    assert x.shape == plain.shape and x.dtype == plain.dtype and x.min() >= -1 and x.max() <= 1
    assert torch.equal(labels, plain_labels) and not torch.equal(x, plain)
    held_out = load(images, source).held_out(None, None)[0]
    assert torch.equal(load(images, source, augment=name).held_out(None, None)[0], held_out)
    if name == "flip":
        for image, own in zip(x, plain):
            assert torch.equal(image, own) or torch.equal(image.flip(2), own)


# ---- Measuring --------------------------------------------------------------------------------------------

class TwoLayers(nn.Module):
    """A network of which all sizes are known: 100 inputs, 200 hidden numbers, 50 outputs."""

    def __init__(self, config):
        super().__init__()
        self.first = nn.Linear(100, 200, bias=False)
        self.second = nn.Linear(200, 50, bias=False)

    def forward(self, batch):  # saves the batch, sigmoid's output, and the (1,) square's input
        hidden = torch.sigmoid(self.first(batch))
        return self.second(hidden).sum().square()


def ones_of_a_batch(n, config, index):
    return torch.ones(n, 100)


def test_the_memory_meter_counts_the_bytes_of_a_network_that_are_known():
    setup = SimpleNamespace(
        model="own",
        module=SimpleNamespace(EndToEnd=TwoLayers),
        config=None,
        device=torch.device("cpu"),
        run=train.Run(),
        data=SimpleNamespace(batch=ones_of_a_batch),
        training=train.Training(batch_size=64, precision="float32", compile="off", ema=0.9))

    found = bench.memory_of(setup, "end_to_end")

    weights = 4 * (100 * 200 + 200 * 50)
    batch = 4 * 64 * 100
    hidden = 4 * 64 * 200
    outputs = 4 * 64 * 50
    assert found["weights"] == weights
    assert found["gradients"] == weights
    assert found["running mean"] == weights
    assert found["optimizer"] == 2 * weights + 2 * 4  # two moments, and for each matrix the number of updates
    assert found["activations"] == batch + hidden + 4
    # the batch was there before; weights, gradients, two moments, running mean
    beyond = found["peak"] + batch - 5 * weights - found["activations"]
    assert 0 <= beyond <= batch + weights + hidden + outputs


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    x = torch.randn(500, 4, dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(torch.cov(x.T))
    white = x @ torch.linalg.inv(root).T                     # mean 0, covariance 1
    a = torch.tensor([1.0, 2, 3, 4])
    b = torch.tensor([2.0, 2, 0.5, 1])
    mean = torch.tensor([1.0, 0, -2, 0])

    found = frechet_distance(white * a + mean, white * b)

    of_means = 5                                             # |mean|^2
    of_deviations = (a - b).pow(2).sum().item()
    assert found == pytest.approx(of_means + of_deviations)


def test_a_line_of_cups_says_where_the_ball_is():
    for seed in range(20):
        line = cups.cup_line(random.Random(seed))
        places = [int(line[0]) == cup for cup in range(5)]   # True: the ball lies there
        n_answers = 0
        for letter, following in zip(line[1:], line[2:] + " "):
            if letter.isalpha():
                i = "abcd".index(letter.lower())
                places[i], places[i + 1] = places[i + 1], places[i]
            assert letter.isupper() == following.isdigit()
            if following.isdigit():
                n_answers += 1
                assert places[int(following)]
        assert n_answers == cups.ANSWERS


def test_cups_are_asked_for_with_the_characters_before_them_and_right_answers_are_counted():
    text = "3abC2dD1\n" * 20
    data = SimpleNamespace(arrays={"val": torch.tensor(list(text.encode()), dtype=torch.uint8).numpy()})

    def generate(net, prompts, n_tokens, temperature, n_passes):
        assert (n_tokens, temperature, n_passes) == (1, 0, 4)
        guess = torch.full((len(prompts), 1), ord("2"))      # right after C, wrong after D
        return torch.cat([prompts, guess], dim=1)
    setup = SimpleNamespace(data=data, device="cpu", module=SimpleNamespace(generate=generate))

    prompts, answers, distances = cups.questions(setup, 10)

    first = text.index("C", cups.CONTEXT - 1)                # the first with so many characters before it
    assert bytes(prompts[0].tolist()).decode() == text[first - cups.CONTEXT + 1:first + 1]
    assert prompts.shape == (10, cups.CONTEXT)
    assert answers.tolist() == [ord("2"), ord("1")] * 5
    assert distances.tolist() == [3, 2] * 5
    row = cups.accuracy(setup, None, 4, prompts, answers, distances)
    assert row["all, %"] == row["1 to 4 swaps, %"] == 50
    with pytest.raises(UserError, match="--write cups.txt"):
        cups.questions(SimpleNamespace(data=SimpleNamespace(arrays={"val": b"no cups"}), device="cpu"), 10)


def share_of_weights(net, windows, noise, b):
    """A share of the sum of all weights, as large as block b's interval is of all t."""
    low, high = noise.interval(b)
    return (high - low) * sum(p.double().sum().item() for p in net.parameters())


@pytest.mark.parametrize("model, blocks, of_curve, of_all", [
    ("vit", "blocks, averaged", "bits", "bits per label"),
    ("dit", "blocks", "weighted squared error", "weighted squared error"),
    ("mdm", "blocks", "bits per byte", "bits per byte"),
])
def test_curves_end_at_the_scores_of_the_last_checkpoints(model, blocks, of_curve, of_all, flags, tmp_path,
                                                          monkeypatch):
    # mdm's score is random; in its place stands a number that tells which network was scored
    monkeypatch.setattr(mdm, "bound_share", share_of_weights)
    args = flags(model, f"--out={tmp_path}")
    for part in PARTS:
        compare.main(["--train", *args, part])               # 4 updates, a checkpoint every 2
    compare.main(["--train", *args, "--control", "--steps=6", f"--out={tmp_path}/long"])

    place = [f"--model={model}", f"--out={tmp_path}"]
    compare.main([*place, "--curves"])
    compare.main(place)

    curves = json.loads((tmp_path / model / "curves.json").read_text())["tables"]
    scores = next(iter(json.loads((tmp_path / model / "compare.json").read_text())["tables"].values()))
    ends = {"end to end": "4", "control": "4", blocks: "4"}
    if model != "vit":
        ends[compare.LONGER] = "6"
    for what, end in ends.items():
        assert curves[what][end][of_curve] == pytest.approx(scores[what][of_all])
        assert curves[what]["2"][of_curve] != curves[what][end][of_curve]
        assert curves[what][end]["minutes"] > 0


def test_curves_of_mdm_have_the_same_masks_each_time(flags, tmp_path):
    for part in PARTS:
        compare.main(["--train", *flags("mdm", part, f"--out={tmp_path}")])
    place = ["--model=mdm", f"--out={tmp_path}", "--curves"]
    curves = []
    for _ in range(2):
        compare.main(place)
        curves.append(json.loads((tmp_path / "mdm/curves.json").read_text())["tables"])
    assert curves[0] == curves[1]


def test_controls_of_mdm_are_averaged_at_every_place(flags, tmp_path):
    train_all_parts(flags("mdm", f"--out={tmp_path}"))
    train.main(flags("mdm", "--control", "--seed=1", f"--out={tmp_path}/control1"))

    compare.main(["--model=mdm", f"--out={tmp_path}"])

    tables = json.loads((tmp_path / "mdm/compare.json").read_text())["tables"]
    rows = tables["bits per byte on held-out text (bound)"]
    assert "2 controls, averaged" in rows
    nets = [train.trained(mdm, "mdm", "control", folder, "cpu")[0] for folder in (tmp_path, tmp_path / "control1")]
    y = torch.tensor([[3, 1, 4]])
    z = torch.tensor([[3, nets[0].mask_id, nets[0].mask_id]])
    t = torch.tensor([0.5])
    p = [net.logits(z, t).softmax(-1) for net in nets]
    mean = (p[0] * p[1]).sqrt()                              # the mean of log p, then renormalised
    mean = mean / mean.sum(-1, keepdim=True)
    expected = -mean[0, 1, 1].log() - mean[0, 2, 4].log()    # the first token is visible
    assert compare.MeanOfMasked(nets).masked_nats(z, t, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_weight_of_compare_py_is_for_training_only(flags, tmp_path):
    args = flags("mdm", "--block=1")
    losses = {}
    for variant in ("root", "flat"):
        compare.main(["--train", f"--variant={variant}", *args, f"--out={tmp_path / variant}"])
        losses[variant] = log_of(tmp_path / variant / "mdm" / "block_1.pt")[0]["loss"]
    train.main([*args, f"--out={tmp_path / 'plain'}"])
    losses["plain"] = log_of(tmp_path / "plain" / "mdm" / "block_1.pt")[0]["loss"]

    # the bound's weight, 1 / t, is above 1
    assert losses["flat"] < losses["root"] < losses["plain"]
    with pytest.raises(UserError, match="is for --model mdm --train"):
        compare.main(["--variant=root", "--model=mdm", f"--out={tmp_path / 'root'}"])
    with pytest.raises(UserError, match="is for --model gpt"):
        compare.main(["--train", "--variant=adaln", *args])


# ---- Cross-entropy in chunks ------------------------------------------------------------------------------

WORDS = 4096  # a vocabulary whose logits are most of what a tiny network makes
# the baseline does not read Config.readout
PARTS_AND_READOUTS = [("block_0", "bayes"), ("block_0", "edm"), ("end_to_end", "bayes")]


class TensorSizes(TorchDispatchMode):
    """Writes down how many numbers each tensor has that is made while it is active."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.sizes.append(x.numel())
        return made


def loss_and_gradients(module, part, readout, chunk, monkeypatch):
    """Of six sequences of 16 tokens, with logits of at most `chunk` tokens of each at a time."""
    monkeypatch.setattr(diffusion_blocks, "MAX_LOGITS", 6 * chunk * WORDS)
    torch.manual_seed(0)
    config = tiny(module, vocab_size=WORDS, readout=readout)
    net = randomised(train.build(module, config, part), .02)
    tokens = torch.randint(WORDS, (6, 17))
    loss = net(tokens)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


@each(gpt, recurrent)
@pytest.mark.parametrize("part, readout", PARTS_AND_READOUTS)
def test_in_chunks_the_loss_and_its_gradients_are_the_same(module, part, readout, monkeypatch):
    loss, gradients = loss_and_gradients(module, part, readout, 16, monkeypatch)
    # of 7, 7 and 2 tokens
    loss_in_chunks, found_gradients = loss_and_gradients(module, part, readout, 7, monkeypatch)

    assert torch.allclose(loss_in_chunks, loss, rtol=1e-6, atol=0)
    for found, expected in zip(found_gradients, gradients, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-6 * expected.norm()


@each(gpt, recurrent)
@pytest.mark.parametrize("part, readout", PARTS_AND_READOUTS)
def test_in_chunks_the_logits_of_all_tokens_never_exist(module, part, readout, monkeypatch):
    with TensorSizes() as at_once:
        loss_and_gradients(module, part, readout, 16, monkeypatch)
    with TensorSizes() as in_chunks:
        loss_and_gradients(module, part, readout, 7, monkeypatch)

    assert max(at_once.sizes) == 6 * 16 * WORDS
    assert max(in_chunks.sizes) == 6 * 7 * WORDS                           # the head has 32 * WORDS


@each(gpt, recurrent)
@pytest.mark.parametrize("part, readout", PARTS_AND_READOUTS)
def test_no_chunks_logits_are_kept_for_the_backward_pass(module, part, readout, monkeypatch):
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    def give_back(x):
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        loss_and_gradients(module, part, readout, 7, monkeypatch)
        assert max(kept) < 6 * 2 * WORDS                                   # the last chunk has 2 tokens
        loss_and_gradients(module, part, readout, 16, monkeypatch)
        assert max(kept) == 6 * 16 * WORDS


@each(gpt, recurrent)
@pytest.mark.parametrize("part", ["block_0", "end_to_end"])
def test_few_logits_are_made_once_and_all_together(module, part, monkeypatch):
    net = train.build(module, tiny(module), part)
    original = net.readout
    shapes = []

    def readout(h, *args, **keywords):
        shapes.append(h.shape)
        return original(h, *args, **keywords)
    monkeypatch.setattr(net, "readout", readout)
    net(TOKENS).backward()
    assert shapes == [(6, 16, 32)]


def test_gradients_of_chunks_are_not_added_in_bf16(monkeypatch):
    h = torch.randn(8, 64, 32)
    weight = .02 * torch.randn(500, 32)
    target = torch.randint(500, (8, 64))

    def gradient(chunk, bf16):
        monkeypatch.setattr(diffusion_blocks, "MAX_LOGITS", 8 * chunk * 500)
        head = weight.clone().requires_grad_()

        def readout(h):
            return F.linear(h, head).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = token_losses(readout, 500, target, h).mean()
        loss.backward()
        return head.grad
    exact = gradient(64, bf16=False)
    error_at_once = (gradient(64, bf16=True) - exact).norm()
    error_in_chunks = (gradient(1, bf16=True) - exact).norm()
    assert error_in_chunks < 1.5 * error_at_once
