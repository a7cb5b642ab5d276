"""The promises of this project, as tests. CPU, no network, small networks: pytest test_all.py"""
import ast
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from dataclasses import fields, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import dit
import gpt
import mdm
import recurrent
import train
import vit
from diffusion_blocks import (LogNormal, Masking, bayes_logits, bound_chain, bound_ends, bound_share,
                              edm_logits, euler, heun, masked_ends, masked_share, score_loss, split_layers,
                              target_table)

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"  # real datasets, where they are at hand; never needed
GOLDEN = {2: [.002, .3012, 80], 3: [.002, .1796, .5050, 80], 4: [.002, .1341, .3012, .6766, 80],
          6: [.002, .0943, .1796, .3012, .5050, .9617, 80]}  # computed independently from the paper's formula
TINY = dict(n_layer=4, n_blocks=2, n_head=2, n_embd=32, n_cond=8, seq_len=16)
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
FLAGS += ["--batch-size=4", "--threads=1", "--device=cpu"]


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Prepared data goes to a folder of the test's own."""
    monkeypatch.setattr(train, "DATA_DIR", tmp_path / "data")
    return tmp_path / "data"


def prepared(data_dir):
    """What is there but the lock."""
    return [path for path in data_dir.iterdir() if path.name != ".lock"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox number {i * i % 97}\n" for i in range(400)))
    return path


def config(**changes):
    return gpt.Config(**{**TINY, "vocab_size": 64, **changes})


def shaken(net):
    """A network with no zero left in it: what zero-initialised paths would hide shows."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def left_of_the_loss(net, batch):
    """The loss after 200 updates on one batch, as a part of the first."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    first = net.loss(batch).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = net.loss(batch)
        loss.backward()
        optimizer.step()
    return loss.item() / first


# -----------------------------------------------------------------------------------------------------------
# Noise levels and their division among blocks

@pytest.mark.parametrize("n_blocks", GOLDEN)
def test_equal_probability_edges_have_the_papers_values(n_blocks):
    noise = LogNormal(n_blocks)
    ends = sorted({end for b in range(n_blocks) for end in noise.interval(b)})
    assert ends == pytest.approx(GOLDEN[n_blocks], abs=5e-5)
    assert ends[0] == 0.002 and ends[-1] == 80.0


def test_the_distribution_function_and_its_inverse_agree_with_the_standard_library():
    noise, normal = LogNormal(), NormalDist(-1.2, 1.2)
    lo, hi = normal.cdf(math.log(.002)), normal.cdf(math.log(80))
    for sigma in (.002, .01, .3, 2.0, 80.0):
        q = (normal.cdf(math.log(sigma)) - lo) / (hi - lo)
        assert noise.cdf(sigma).item() == pytest.approx(q, abs=1e-12)
        assert noise.icdf(q).item() == pytest.approx(sigma, rel=1e-6)
    assert noise.icdf(.5).item() == pytest.approx(math.exp(normal.inv_cdf((lo + hi) / 2)), rel=1e-12)


def test_uniform_edges_are_equal_in_log_sigma_and_hand_set_edges_are_kept():
    noise = LogNormal(2, sigma_min=.01, sigma_max=100, edges="uniform")
    assert noise.interval(0) == (pytest.approx(1.0), 100.0) and noise.interval(1)[0] == .01
    noise = LogNormal(3, edges="0.002,0.1,7,80")
    assert [noise.interval(b) for b in range(3)] == [(7, 80), (.1, 7), (.002, .1)]


@pytest.mark.parametrize("wrong", [dict(edges="0.002,80"), dict(edges="0.002,9,1"), dict(edges="0.01,1,80"),
                                   dict(edges="even"), dict(sigma_min=0), dict(sigma_min=90), dict(p_std=0),
                                   dict(weighting="snr"), dict(gamma=-1)])
def test_impossible_noise_is_refused(wrong):
    with pytest.raises(ValueError):
        LogNormal(**{"n_blocks": 2, **wrong})


@pytest.mark.parametrize("edges", ["probability", "uniform", "0.002,0.05,0.5,2,80"])
def test_the_router_gives_each_level_to_the_one_block_that_owns_it(edges):
    noise = LogNormal(4, edges=edges)
    assert noise.block_of(80.0) == 0 and noise.block_of(.002) == 3  # block 0 runs first, at the highest noise
    for b in range(4):
        lo, hi = noise.interval(b)
        assert noise.block_of(hi) == b and noise.block_of(math.nextafter(lo, 99)) == b
        assert noise.block_of(lo) == min(b + 1, 3)  # lo < sigma <= hi, but sigma_min has an owner too
        many = torch.tensor([lo, (lo + hi) / 2, hi], dtype=torch.float64)
        assert noise.block_of(many).tolist() == [min(b + 1, 3), b, b]
    for outside in (.0019, 80.1):
        with pytest.raises(ValueError):
            noise.block_of(outside)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 6])
def test_training_and_sampling_use_the_same_block_for_a_level(n_blocks):
    noise = LogNormal(n_blocks, gamma=0.0)
    for b in range(n_blocks):
        lo, hi = noise.interval(b)
        drawn = noise.sample(b, 256).double()
        assert drawn.min() > lo * (1 - 1e-6) and drawn.max() < hi * (1 + 1e-6)  # float32 may round past
        inside = drawn[(drawn > lo * (1 + 1e-6)) & (drawn < hi * (1 - 1e-6))]
        assert len(inside) > 250 and (noise.block_of(inside) == b).all()
        # the grid whose levels are the edges: each goes to the block below which it is the upper end
        assert [noise.block_of(s) for s in noise.steps(n_blocks + 1)[:-1].tolist()] == list(range(n_blocks))
    blocks = [gpt.Block(config(n_layer=12, n_blocks=n_blocks), b) for b in range(n_blocks)]
    first_layers = [block.layer_range[0] for block in blocks]
    # block 0: first layers and highest noise
    assert first_layers == sorted(first_layers) and first_layers[0] == 0


def test_draws_follow_the_truncated_log_normal_within_the_widened_interval():
    noise = LogNormal(4, gamma=.1)
    for b in range(4):
        lo, hi = noise.interval(b)
        a = (hi / lo) ** .1
        lo, hi = max(lo / a, .002), min(hi * a, 80)
        draws = noise.sample(b, 4000).double().sort().values
        normal = NormalDist(-1.2, 1.2)
        f_lo, f_hi = normal.cdf(math.log(lo)), normal.cdf(math.log(hi))
        q = torch.tensor([(normal.cdf(math.log(s)) - f_lo) / (f_hi - f_lo) for s in draws.tolist()])
        assert (q - torch.linspace(0, 1, 4000)).abs().max() < 1e-3  # stratified: far closer than random draws


def test_sampling_grids_are_free_of_the_number_of_blocks():
    assert LogNormal(3).steps(7).tolist() == LogNormal(5).steps(7).tolist()
    grid = LogNormal(3).steps(7)
    assert grid[0] == 80 and grid[-1] == .002 and (grid.diff() < 0).all()
    with pytest.raises(ValueError):
        LogNormal().steps(1)


def test_edm_preconditioning_has_its_known_values_and_identities():
    noise = LogNormal(weighting="edm")
    sigma = torch.tensor([.002, .5, 3.0, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = noise.precondition(sigma)
    assert c_skip[1].item() == pytest.approx(.5) and c_out[1].item() == pytest.approx(.5 ** .5 / 2)
    assert torch.allclose(noise.weight(sigma) * c_out ** 2, torch.ones_like(sigma))
    assert torch.allclose(c_in ** 2 * (sigma ** 2 + .25), torch.ones_like(sigma))
    assert c_noise[2].item() == pytest.approx(math.log(3) / 4)
    assert (LogNormal().weight(sigma) == 1).all()


def test_layers_are_split_evenly_or_as_told():
    assert split_layers(12, 3) == [range(0, 4), range(4, 8), range(8, 12)]
    assert split_layers(12, 3, "3,6,3") == [range(0, 3), range(3, 9), range(9, 12)]
    with pytest.raises(ValueError, match="1, 2, 3, 4, 6, 12"):
        split_layers(12, 5)
    for wrong in ("4,4", "4,4,5", "0,6,6"):
        with pytest.raises(ValueError):
            split_layers(12, 3, wrong)


# -----------------------------------------------------------------------------------------------------------
# Loss, readout, sampler, bound: against closed forms

def test_a_loss_of_the_wrong_shape_cannot_average_the_weight_away():
    noise, y = LogNormal(weighting="edm"), torch.randn(8, 3)
    with pytest.raises(AssertionError):
        score_loss(lambda z, sigma: (z - y).pow(2).sum(1, keepdim=True), y, noise, 0)
    # with D = z the error is sigma^2 |eps|^2, of mean 3 sigma^2: the weighted loss has a known expectation
    y = torch.zeros(200_000, 3)
    loss = score_loss(lambda z, sigma: (z - y).pow(2).sum(1), y, noise, 0)
    levels = noise.icdf((torch.arange(100_000) + .5) / 100_000)
    assert loss.item() == pytest.approx((3 * (levels ** 2 + .25) / .25).mean().item(), rel=.05)


def test_the_target_table_is_the_same_everywhere_and_has_unit_rows():
    square = target_table(10, 32, 7)
    assert torch.allclose(square @ square.T, torch.eye(10), atol=1e-6)
    table = target_table(256, 32, 0)
    assert torch.allclose(table.norm(dim=1), torch.ones(256))
    # the bits: what blocks trained on different machines have to agree on
    rounded = (table * 2 ** 20).round().int().numpy().tobytes()
    assert hashlib.sha256(rounded).hexdigest()[:16] == "41254622d3f45911"
    assert not torch.equal(table, target_table(256, 32, 1))


def test_the_bayes_readout_is_bayes_rule():
    table, sigma = target_table(20, 8, 0).double(), torch.tensor([.2, .7, 3.0], dtype=torch.float64)
    z, log_prior = torch.randn(3, 8).double(), torch.randn(20).log_softmax(0).double()
    gauss = torch.distributions.Normal(table, sigma.view(3, 1, 1))                  # (3, 20, 8)
    exact = (gauss.log_prob(z[:, None]).sum(-1) + log_prior).softmax(-1)
    ours = bayes_logits(log_prior.expand(3, 20), z, sigma.float(), table.float()).softmax(-1)
    assert torch.allclose(ours.double(), exact, atol=1e-5)


def test_the_edm_readout_trusts_z_at_low_noise_and_the_network_at_high_noise():
    table, noise = target_table(5, 8, 0), LogNormal()
    z, f = table[[1, 1]], table[[3, 3]]
    logits = edm_logits(f, z, torch.tensor([.002, 80.0]), table, noise, 16.0)
    assert logits.argmax(-1).tolist() == [1, 3]
    assert logits[0, 1].item() == pytest.approx(16.0, abs=.2)  # c_skip 1
    assert logits[1, 3].item() == pytest.approx(8.0, abs=.2)   # c_out 1/2


def test_a_perfect_denoiser_is_carried_from_level_to_level_exactly():
    noise = LogNormal(3)
    y, eps, seen = torch.randn(4, 5).double(), torch.randn(4, 5).double(), []

    def denoise(z, sigma):
        assert torch.allclose(z, y + sigma * eps)   # y + sigma eps at every level it is asked at
        seen.append(sigma.item())
        return y
    assert torch.allclose(euler(denoise, y + 80 * eps, noise.steps(6)), y)
    assert seen == noise.steps(6).tolist()


def test_the_ideal_denoiser_lands_on_data_and_from_zero_on_the_most_probable():
    noise, table = LogNormal(4), target_table(10, 16, 0)
    log_p = torch.tensor([.05] * 8 + [.2, .4]).log()

    def denoise(z, sigma):
        logits = bayes_logits(log_p.expand(len(z), 10), z, sigma.float().expand(len(z)), table)
        return logits.softmax(-1) @ table
    d = euler(denoise, 80 * torch.randn(4000, 16), noise.steps(200))
    label = (d @ table.T).argmax(-1)
    assert (d - table[label]).norm(dim=1).max() < 1e-3
    # samples of the distribution
    assert torch.allclose(label.bincount(minlength=10) / 4000, log_p.exp(), atol=.03)
    assert (euler(denoise, torch.zeros(1, 16), noise.steps(5)) @ table.T).argmax() == 9  # temperature 0


def bound_of(log_p, log_q, dim, noise, runs=24, batch=4096):
    """The bound and its standard error for targets drawn from log_p and the exact posterior under the prior
    log_q."""
    table, totals, n_class = target_table(len(log_p), dim, 0), [], len(log_p)
    for _ in range(runs):
        y = torch.multinomial(log_p.exp(), batch, replacement=True)

        def logits(z, sigma):
            return bayes_logits(log_q.expand(batch, n_class), z, sigma, table)

        def squared_error(z, sigma):
            return (table[y] - logits(z, sigma).softmax(-1) @ table).pow(2).sum(1)
        shares = [bound_share(squared_error, table[y], noise, b) for b in range(noise.n_blocks)]
        ends = bound_ends(lambda z, s: F.cross_entropy(logits(z, s), y, reduction="none"), table[y], noise)
        totals.append(shares + list(ends))
    totals = torch.tensor(totals)
    return totals.sum(1).mean().item(), totals.sum(1).std().item() / runs ** .5, totals.mean(0)


@pytest.mark.parametrize("n_class, dim, wrong, noise", [
    (27, 32, False, LogNormal(4)), (27, 32, True, LogNormal(1)),
    (200, 16, False, LogNormal(3)), (200, 16, True, LogNormal(4)),
    (27, 32, False, LogNormal(2, sigma_min=.3, sigma_max=5.0))])   # a narrow range: the end terms carry bits
def test_the_bound_of_an_exact_posterior_is_the_true_cross_entropy(n_class, dim, wrong, noise):
    log_p = (1.5 * torch.randn(n_class)).log_softmax(0)
    log_q = (1.5 * torch.randn(n_class)).log_softmax(0) if wrong else log_p
    bound, error, shares = bound_of(log_p, log_q, dim, noise)
    truth = -(log_p.exp() * log_q).sum().item()  # entropy, or cross-entropy under the wrong prior
    assert error < .03
    assert bound == pytest.approx(truth, abs=4 * error)
    assert shares.sum().item() == pytest.approx(bound, rel=1e-5)
    if noise.sigma_min == .3:
        assert shares[-2] > 10 * error and shares[-1] > .01  # without either end term the equality would fail


def test_the_shares_of_the_bound_do_not_depend_on_where_it_is_cut():
    log_p = torch.randn(27).log_softmax(0)
    one = bound_of(log_p, log_p, 32, LogNormal(1))
    four = bound_of(log_p, log_p, 32, LogNormal(4))
    assert one[0] == pytest.approx(four[0], abs=4 * (one[1] ** 2 + four[1] ** 2) ** .5)
    assert four[2][3] < .01 < four[2][0]                           # the lowest block is a dictionary look-up


# -----------------------------------------------------------------------------------------------------------
# Mask noise

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5])
def test_masking_gives_every_block_an_equal_step_of_alpha_and_each_time_to_its_owner(schedule, n_blocks):
    noise = Masking(n_blocks, schedule=schedule)

    def alpha(t):
        return 1 - noise.hidden(torch.tensor(t, dtype=torch.float64))
    assert noise.interval(0)[1] == 1 and noise.interval(n_blocks - 1)[0] == 0
    for b in range(n_blocks):
        lo, hi = noise.interval(b)
        step = (alpha(lo) - alpha(hi)).item()
        assert step == pytest.approx((1 - 2e-4) / n_blocks, abs=1e-9)      # equal steps of alpha
        assert noise.block_of(hi) == b and noise.block_of((lo + hi) / 2) == b
        ends = torch.tensor([lo, hi], dtype=torch.float64)
        assert noise.block_of(ends).tolist() == [min(b + 1, n_blocks - 1), b]
        wide_lo, wide_hi = noise.interval(b, overlap=True)
        for inner, outer, end in ((lo, wide_lo, 0), (hi, wide_hi, 1)):
            wider = abs(alpha(outer) - alpha(inner)).item()
            assert wider == pytest.approx(0 if inner == end else .05 * step, abs=1e-9)
        t = noise.sample(b, 64).double()
        assert wide_lo - 1e-6 <= t.min() and t.max() <= wide_hi + 1e-6
        # antithetic: sorted draws are equally far apart
        assert (t.sort().values.diff() * 64 - (wide_hi - wide_lo)).abs().max() < 1e-4
    with pytest.raises(ValueError):
        noise.block_of(1.01)
    for grid in ("uniform", "cosine"):
        times = noise.steps(8, grid)
        assert len(times) == 9 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    assert times[1] > 1 - 1 / 8 > times[-2]                                # cosine: dense near 1


@pytest.mark.parametrize("wrong", [dict(schedule="square"), dict(n_blocks=0), dict(eps=0), dict(gamma=-1)])
def test_impossible_masking_is_refused(wrong):
    with pytest.raises(ValueError):
        Masking(**wrong)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_masks_have_their_probability_and_the_weight_is_that_of_the_schedule(schedule):
    noise, y = Masking(mask_id=9, schedule=schedule), torch.randint(9, (4, 100_000))
    t = torch.tensor([0.0, .3, .8, 1.0])
    z = noise.corrupt(y, t)
    plain = 1 - t if schedule == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))
    assert torch.allclose((z == 9).float().mean(1), 1 - plain, atol=.006)
    assert (z[z != 9] == y[z != 9]).all()                                  # what is not masked is untouched
    # against a numerical derivative of -log of the masked part, which is the weight's integral
    s, h = torch.tensor([.0, .05, .3, .8], dtype=torch.float64), 1e-7
    rate = (noise.hidden(s + h).log() - noise.hidden(s).log()) / h
    assert torch.allclose(noise.weight(s), rate, rtol=2e-3)


def conditionals(log_p):
    """For a joint distribution (V,) * T over sequences: cross_entropy(z, target) (B,) of the exact
    p(token | visible tokens), summed over the masked tokens, V being the mask."""
    v, n = log_p.shape[0], log_p.dim()
    every = torch.cartesian_prod(*[torch.arange(v)] * n)                   # (V^T, T)
    p = log_p.exp().flatten()                                              # (V^T,)

    def cross_entropy(z, target):
        fits = ((z[:, None] == every) | (z[:, None] == v)).all(-1)         # (B, V^T)
        joint = fits * p                                                   # (B, V^T)
        same = every[None] == target[:, None]                              # (B, V^T, T)
        q = (joint[..., None] * same).sum(1) / joint.sum(1, keepdim=True)  # (B, T)
        return -(q.log() * (z == v)).sum(1)
    return every, p, cross_entropy


def masked_bound(noise, log_p, runs=20, batch=2048):
    """Mean of the masked bound, its standard error and its shares, for the exact conditionals of log_p."""
    every, p, exact = conditionals(log_p)
    totals = []
    for _ in range(runs):
        y = every[torch.multinomial(p, batch, replacement=True)]
        shares = [masked_share(lambda z, t: exact(z, y), y, noise, b) for b in range(noise.n_blocks)]
        totals.append(shares + list(masked_ends(y.shape[1], log_p.shape[0], noise)))
    totals = torch.tensor(totals)
    return totals.sum(1).mean().item(), totals.sum(1).std().item() / runs ** .5, totals.mean(0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_masked_bound_of_exact_conditionals_is_the_entropy_wherever_it_is_cut(schedule):
    log_p = (2 * torch.randn(27)).log_softmax(0).view(3, 3, 3)             # tokens depend on one another
    entropy = -(log_p.exp() * log_p).sum().item()
    for n_blocks in (1, 3):
        bound, error, shares = masked_bound(Masking(n_blocks, mask_id=3, schedule=schedule), log_p)
        assert error < .03
        assert bound == pytest.approx(entropy, abs=4 * error + .001)       # the ends: 6e-4 ln 3
        assert len(shares) == n_blocks + 2 and (shares[:n_blocks] > .05).all()


def test_the_score_loss_of_masking_is_its_share_in_expectation():
    """One loss serves both kinds of noise: without overlap, a share is its interval's length times the loss.
    """
    log_p = (2 * torch.randn(27)).log_softmax(0).view(3, 3, 3)
    every, p, exact = conditionals(log_p)
    noise, losses = Masking(3, mask_id=3, gamma=0.0), []
    _, _, shares = masked_bound(noise, log_p)
    for b in range(3):
        for _ in range(20):
            y = every[torch.multinomial(p, 2048, replacement=True)]
            losses.append(score_loss(lambda z, t: exact(z, y), y, noise, b).item() / 3)
    means = torch.tensor(losses).view(3, 20).mean(1)
    assert torch.allclose(means, shares[:3].float(), atol=.03)


# -----------------------------------------------------------------------------------------------------------
# gpt.py

@pytest.mark.parametrize("readout", ["bayes", "edm"])
def test_a_slot_cannot_see_the_future_and_sees_everything_else(readout):
    c = config(readout=readout, seq_len=8)
    block = shaken(gpt.Block(c, 0))
    embedded = []

    def leaf(module, args, out):
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]
    block.embed.register_forward_hook(leaf)
    x, z = torch.randint(64, (1, 8)), torch.randn(1, 8, 32, requires_grad=True)
    logits = block.logits(x, z, torch.tensor([1.0]), block.context(x))
    for i in range(8):
        grads = torch.autograd.grad(logits[0, i].sin().sum(), [z, *embedded], retain_graph=True)
        noisy, clean = grads[0][0].abs().sum(-1), sum(g[0].abs().sum(-1) for g in grads[1:])
        assert (noisy > 0).tolist() == [j == i for j in range(8)]   # its own z and no other
        assert (clean > 0).tolist() == [j <= i for j in range(8)]   # clean tokens up to its own


def test_the_clean_stream_sees_neither_noise_nor_future():
    block, x = shaken(gpt.Block(config(), 1)), torch.randint(64, (2, 16))
    other = x.clone()
    other[:, 9] = (other[:, 9] + 1) % 64
    for (k, v), (k2, v2) in zip(block.context(x), block.context(other)):
        assert torch.equal(k[:, :, :9], k2[:, :, :9]) and torch.equal(v[:, :, :9], v2[:, :, :9])
        assert not torch.equal(k[:, :, 9], k2[:, :, 9])


def test_the_baseline_is_causal():
    net, x = shaken(gpt.EndToEnd(config())), torch.randint(64, (1, 16))
    other = x.clone()
    other[:, 9] = (other[:, 9] + 1) % 64
    a, b = net(x)[0], net(other)[0]
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("module, make", [
    (gpt, lambda: gpt.Block(config(), 0)), (gpt, lambda: gpt.EndToEnd(config())),
    (recurrent, lambda: recurrent.Block(recurrent_config(seq_len=16), 0)),
    (recurrent, lambda: recurrent.EndToEnd(recurrent_config(seq_len=16)))])
def test_logits_of_few_rows_at_a_time_give_the_same_loss_and_gradients(module, make, monkeypatch):
    net, batch, most, real = shaken(make()), torch.randint(64, (6, 17)), [], module.by_rows
    results = []
    for limit in (2 ** 25, 2 * 16 * 64):               # all rows, two at a time
        def by_rows(nats, *rest):
            def record(h, *more):
                most.append(len(h))
                return nats(h, *more)
            return real(record, *rest, most=limit)
        monkeypatch.setattr(module, "by_rows", by_rows)
        net.zero_grad()
        torch.manual_seed(3)
        loss = net.loss(batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
        assert most == {2 ** 25: [6]}.get(limit, [6] + 6 * [2])                # three parts, each twice
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_slot_is_scored_on_the_token_that_its_noise_was_added_to():
    """Alignment: at low noise z alone names the next token, so the loss is next to nothing; it could not be
    if slots held the current token."""
    block = gpt.Block(config(sigma_min=.002, sigma_max=.05, edges="0.002,0.01,0.05"), 0)
    assert block.loss(torch.randint(64, (4, 17))).item() < 1e-3
    x = torch.randint(64, (2, 16))
    z = block.table[torch.randint(64, (2, 16))]
    d = block.denoise(x, z, torch.full((2,), .01), block.context(x))
    assert torch.allclose(d, z, atol=1e-4)


def test_the_output_depends_on_the_hint_and_on_the_context():
    block = shaken(gpt.Block(config(), 0))
    x, z, sigma = torch.randint(64, (1, 16)), torch.randn(1, 16, 32), torch.tensor([1.0])
    out = block.logits(x, z, sigma, block.context(x))
    assert not torch.allclose(out, block.logits(x, z + 1, sigma, block.context(x)))
    assert not torch.allclose(out, block.logits(x.flip(1), z, sigma, block.context(x.flip(1))))
    assert not torch.allclose(out, block.logits(x, z, sigma * 2, block.context(x)))


def test_a_fresh_block_is_the_plain_decoder_whatever_the_noise():
    """z and the noise level enter through zeros: before training, the prior logits do not know of them."""
    block, x = gpt.Block(config(), 0), torch.randint(64, (1, 16))
    for sigma in (1.0, 50.0):
        zero = block.logits(x, torch.zeros(1, 16, 32), torch.tensor([sigma]), block.context(x))
        z = torch.randn(1, 16, 32)
        noisy = block.logits(x, z, torch.tensor([sigma]), block.context(x)) - z @ block.table.T / sigma ** 2
        assert torch.allclose(zero, noisy, atol=1e-4)


@pytest.mark.parametrize("make", [lambda c: gpt.Block(c, 0), lambda c: gpt.Block(c, 1), gpt.EndToEnd,
                                  lambda c: gpt.Block(replace(c, readout="edm"), 0)])
def test_one_batch_is_overfitted(make):
    c = config(sigma_min=.3, sigma_max=20.0)
    assert left_of_the_loss(make(c), torch.randint(64, (4, 17))) < .2


@pytest.mark.parametrize("blocks", [True, False])
def test_generation_with_the_cache_equals_generation_without(blocks):
    c = config()
    nets = [shaken(gpt.Block(c, b)) for b in range(2)] if blocks else shaken(gpt.EndToEnd(c))
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11]]
    out = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        out.append(gpt.generate(nets, prompts, 40, use_cache=use_cache))   # far past seq_len 16
    assert torch.equal(*out) and out[0].shape == (2, 47)
    assert out[0][0, :3].tolist() == prompts[0] and out[0][1, :7].tolist() == prompts[1]


@pytest.mark.parametrize("sigma", [80.0, 1.0])
def test_a_cache_built_token_by_token_gives_the_logits_of_a_fresh_context(sigma):
    block, net, x = shaken(gpt.Block(config(), 0)), shaken(gpt.EndToEnd(config())), torch.randint(64, (2, 12))
    cache, plain = block.context(x[:, :5]), net(x[:, :5])[1]
    for i in range(5, 12):
        cache = block.context(x[:, i:i + 1], cache)
        logits, plain = net(x[:, i:i + 1], plain)
    z, level = torch.randn(2, 1, 32), torch.full((2,), sigma)
    cached, fresh = (block.logits(x[:, -1:], z, level, c) for c in (cache, block.context(x)))
    assert torch.allclose(cached, fresh, atol=1e-4) and cached.std() > .1
    assert torch.allclose(logits[:, -1], net(x)[0][:, -1], atol=1e-4)


def test_temperature_0_is_deterministic():
    blocks = [shaken(gpt.Block(config(), b)) for b in range(2)]
    a, b = (gpt.generate(blocks, [[1, 2]], 8, temperature=0.0) for _ in range(2))
    assert torch.equal(a, b)


def test_the_control_has_one_blocks_layers_and_a_split_gives_each_block_its_own():
    assert len(gpt.control(config(n_layer=8)).layers) == 4
    assert [len(gpt.Block(config(layer_split="3,1"), b).layers) for b in range(2)] == [3, 1]


def test_the_edm_readout_starts_with_a_scale_that_lets_the_loss_fall():
    assert gpt.Block(config(readout="edm"), 0).scale_weight.item() == 16.0


def test_a_new_token_costs_no_pass_over_the_past(monkeypatch):
    blocks, widths = [gpt.Block(config(seq_len=64), b) for b in range(2)], []
    real = gpt.Block.context

    def context(self, x, cache=None):
        widths.append(x.shape[1])
        return real(self, x, cache)
    monkeypatch.setattr(gpt.Block, "context", context)
    gpt.generate(blocks, [[1] * 20], 10)
    assert widths == [20, 20] + [1] * 18


def test_each_noise_level_runs_only_the_block_that_owns_it(monkeypatch):
    blocks, calls = [gpt.Block(config(), b) for b in range(2)], []
    real = gpt.Block.logits

    def logits(self, x, z, sigma, context):
        calls.append(self.b)
        return real(self, x, z, sigma, context)
    monkeypatch.setattr(gpt.Block, "logits", logits)
    gpt.generate(blocks, [[1, 2]], 1, euler_steps=6)   # quantiles 1, .8, .6 | .4, .2, 0 of two halves
    assert calls == [0, 0, 0, 1, 1, 1]


def test_top_k_and_temperature_choose_among_the_probable():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(500, 1)
    assert (gpt.choose(logits, 0, 0) == 1).all()
    assert set(gpt.choose(logits, 1.0, 2).tolist()) == {1, 2}
    share = (gpt.choose(logits.repeat(20, 1), 2.0, 0) == 1).float().mean().item()
    assert share == pytest.approx(math.exp(1.5) / sum(math.exp(v / 2) for v in (0, 3, 2, 1)), abs=.03)


def test_presets_name_fields_that_exist_and_networks_that_can_be_built():
    known = {f.name for cls in (gpt.Config, train.TextTraining) for f in fields(cls)}
    for name, preset in gpt.PRESETS.items():
        assert set(preset) <= known, name
        c = replace(train.settle(gpt.Config, preset), vocab_size=50257)
        gpt.check(c)
        with torch.device("meta"):
            n = sum(p.numel() for p in gpt.EndToEnd(c).layers.parameters())
        if name != "default":
            assert 80e6 < n < 90e6                    # twelve layers of 768, as in the paper


# -----------------------------------------------------------------------------------------------------------
# vit.py and dit.py

IMAGES = dict(n_layer=4, n_blocks=2, n_head=2, n_embd=32, n_mlp=64, n_cond=16, image_size=8, n_channel=1,
              n_class=10, data_mean=-.4, data_std=.75)


def image_config(module, **changes):
    return module.Config(**{**IMAGES, **changes})


def image_batch(n=16, channels=1, size=8):
    return torch.rand(n, channels, size, size) * 2 - 1, torch.arange(n) % 10


@pytest.mark.parametrize("readout", ["bayes", "edm"])
def test_a_vit_block_sees_the_noisy_label_and_every_pixel(readout):
    block = shaken(vit.Block(image_config(vit, readout=readout), 1))
    x, z = image_batch(3)[0].requires_grad_(), torch.randn(3, 32, requires_grad=True)
    logits = block.logits(x, z, torch.tensor([.05, .2, .3]))
    if readout == "bayes":  # what the network itself makes of z, beside the likelihood that is added to it
        logits = logits - bayes_logits(torch.zeros_like(logits), z, torch.tensor([.05, .2, .3]), block.table)
    seen_x, seen_z = torch.autograd.grad(logits.sin().sum(), [x, z])
    assert (seen_x.abs() > 0).all() and (seen_z.abs() > 0).all()


def test_a_dit_block_sees_every_pixel_its_label_and_its_level():
    block = shaken(dit.Block(image_config(dit), 0))
    z, sigma = torch.randn(2, 1, 8, 8, requires_grad=True), torch.tensor([.7, 3.0])
    label = torch.tensor([1, 2])
    d = block(z, sigma, label)
    # one pixel of the output depends on all of the input
    assert (torch.autograd.grad(d[:, 0, 0, 0].sum(), z)[0].abs() > 0).all()
    assert not torch.allclose(d, block(z, sigma, label + 1))
    assert not torch.allclose(d, block(z, 2 * sigma, label))


@pytest.mark.parametrize("module, make", [
    (vit, lambda c: vit.Block(c, 0)), (vit, lambda c: vit.Block(c, 1)), (vit, vit.EndToEnd),
    (vit, lambda c: vit.Block(replace(c, readout="edm"), 0)),
    (dit, lambda c: dit.Block(c, 0)), (dit, lambda c: dit.Block(c, 1)), (dit, dit.EndToEnd)])
def test_one_batch_of_images_is_overfitted(module, make):
    # a narrow range of levels: what is left is to know the images by heart
    c = image_config(module, **(dict(sigma_min=.3, sigma_max=20.0) if module is vit else dict(sigma_min=.2)))
    net, batch = make(c), image_batch()
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for _ in range(300):
        optimizer.zero_grad()
        losses.append(net.loss(batch))
        losses[-1].backward()
        optimizer.step()
    before, after = sum(losses[:5]).item() / 5, sum(losses[-20:]).item() / 20
    assert after < (.1 if module is vit else .4) * before


def test_a_fresh_dit_predicts_what_its_preconditioning_does_and_a_fresh_vit_prior_ignores_z():
    block, z, sigma = dit.Block(image_config(dit), 0), torch.randn(2, 1, 8, 8), torch.tensor([.6, 40.0])
    c_skip = .25 / (sigma ** 2 + .25)
    assert torch.allclose(block(z, sigma, torch.tensor([0, 1])), c_skip.view(2, 1, 1, 1) * z, atol=1e-6)
    block, x = vit.Block(image_config(vit), 0), image_batch(2)[0]
    priors = [block.logits(x, z, sigma) - bayes_logits(torch.zeros(2, 10), z, sigma, block.table)
              for z in (torch.zeros(2, 32), torch.randn(2, 32))]
    assert torch.allclose(*priors, atol=1e-4)


def test_patches_are_squares_row_by_row_and_come_back():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    tokens = dit.patches(x, 4)
    assert tokens.shape == (2, 4, 48)
    assert torch.equal(tokens[1, 1].view(3, 4, 4), x[1, :, :4, 4:])       # second patch: top right
    assert torch.equal(dit.unpatch(tokens, 4, (8, 8)), x)


def test_fixed_positions_tell_every_place_apart_and_are_not_trained():
    position = dit.sincos_positions(8, 32)[0]
    assert position.shape == (64, 32) and torch.cdist(position, position).fill_diagonal_(9).min() > .1
    row = position.view(8, 8, 32)
    assert torch.equal(row[3, 0, :16], row[3, 7, :16]) and torch.equal(row[0, 3, 16:], row[7, 3, 16:])
    assert "position" not in dit.Block(image_config(dit), 0).state_dict()


def test_a_label_is_read_by_the_block_that_owns_each_level(monkeypatch):
    blocks, calls = [vit.Block(image_config(vit), b) for b in range(2)], []
    real = vit.Block.logits

    def logits(self, x, z, sigma):
        calls.append((self.b, sigma[0].item()))
        return real(self, x, z, sigma)
    monkeypatch.setattr(vit.Block, "logits", logits)
    steps = blocks[0].noise.steps(6)                   # quantiles 1, .8, .6 | .4, .2, 0 of two halves
    seen = vit.denoise_labels(blocks, image_batch(2)[0], torch.zeros(2, 32), steps)
    assert [b for b, _ in calls] == [0, 0, 0, 1, 1, 1] and len(seen) == 6
    assert [s for _, s in calls] == pytest.approx(steps.tolist())


def test_blocks_that_know_the_label_classify_without_error_and_their_shares_are_the_bound():
    c = image_config(vit)
    blocks = [vit.Block(c, b) for b in range(2)]
    x, label = image_batch(20)

    class Data:
        def held_out(self, n, config):
            return x, label

    def knows(scale):  # a prior that is sure of the label, as far as scale says
        prior = scale * F.one_hot(label, 10)
        return lambda x, z, sigma: bayes_logits(prior[:len(x)], z, sigma, blocks[0].table)
    for block in blocks:
        block.logits = knows(30.0)
    tables, _ = vit.evaluate(blocks, None, None, Data(), vit.Sampling(n_draws=2))
    summary = tables["held-out images"]
    for row in ("blocks from z = 0", "blocks from noise", "blocks, mean of draws"):
        assert summary[row]["accuracy, %"] == 100
    by_block = tables["each block: its share, by itself, and the chain without it"]
    assert by_block["block 0"]["left out, accuracy, %"] == 100
    assert summary["blocks (bound)"]["bits per label"] < .01
    for block in blocks:                                # knows nothing: chance, and log2 of 10 bits
        block.logits = knows(0.0)
    tables, _ = vit.evaluate(blocks, None, None, Data(), vit.Sampling(n_draws=2))
    summary = tables["held-out images"]
    assert summary["blocks from noise"]["accuracy, %"] < 50
    for row, off in (("blocks, cross-entropy at sigma_max", .05), ("blocks (bound)", .4)):
        assert summary[row]["bits per label"] == pytest.approx(math.log2(10), abs=off)


def test_guidance_1_is_no_guidance_and_costs_no_second_evaluation():
    block, sizes = shaken(dit.Block(image_config(dit), 0)), []
    z, sigma, label = torch.randn(3, 1, 8, 8), torch.tensor([.7, 3.0, 9.0]), torch.tensor([1, 2, 3])
    plain, without = block(z, sigma, label), block(z, sigma, torch.full((3,), 10))
    block.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    assert torch.equal(block.denoise(z, sigma, label, 1.0), plain) and sizes == [3]
    twice = block.denoise(z, sigma, label, 2.5)
    assert torch.allclose(twice, without + 2.5 * (plain - without), rtol=1e-3, atol=1e-3) and sizes == [3, 6]
    assert torch.allclose(block.denoise(z, sigma, label, 0.0), without, rtol=1e-4, atol=1e-4)
    nets = [shaken(dit.Block(image_config(dit), b)) for b in range(2)]
    drawn = []
    for plainly in (True, False):
        torch.manual_seed(3)
        if plainly:
            for net in nets:
                net.denoise = lambda z, sigma, label, guidance, net=net: net(z, sigma, label)
        drawn.append(dit.generate_images(nets, label, dit.Sampling(guidance=1.0, euler_steps=8)))
        for net in nets:
            net.__dict__.pop("denoise", None)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("heun", [False, True])
def test_an_ideal_denoiser_carries_noise_to_data(heun, monkeypatch):
    c = image_config(dit, image_size=4, n_channel=4)
    nets, data = [dit.Block(c, b) for b in range(2)], torch.randn(12, 4, 4, 4) * .5
    asked = []

    def forward(self, z, sigma, label):
        asked.append((self.b, sigma[0].item()))
        far = (z[:, None] - data).pow(2).flatten(2).sum(2)                 # (B, 12)
        near = (-far.double() / (2 * sigma.double()[:, None] ** 2)).softmax(1).float()
        return (near @ data.flatten(1)).view_as(z)                         # the posterior mean
    monkeypatch.setattr(dit.Block, "forward", forward)
    sampling = dit.Sampling(euler_steps=60, heun=heun)
    images = dit.generate_images(nets, torch.zeros(200, dtype=torch.long), sampling)
    points = nets[0].decode(data)
    far = (images[:, None] - points).abs().amax((2, 3, 4))                 # (200, 12)
    assert far.min(1).values.max() < 1e-3                                  # every sample is a data point
    assert len(far.argmin(1).unique()) >= 10                               # and nearly all of them are found
    assert len(asked) == (119 if heun else 60)
    assert all(nets[0].noise.block_of(min(max(s, .002), 80.0)) == b for b, s in asked)


def test_heun_asks_at_both_ends_of_a_move_and_beats_euler_on_a_gaussian():
    noise, z, ends = LogNormal(3), torch.tensor([[80.0]], dtype=torch.float64), []
    # y ~ N(0, .25): the ODE in closed form, down to .002, and the last denoising
    exact = 80.0 * ((.25 + .002 ** 2) / (.25 + 80.0 ** 2)) ** .5 * .25 / (.25 + .002 ** 2)
    for method in (euler, heun):
        seen = []

        def denoise(z, sigma):
            seen.append(sigma.item())
            return z * .25 / (sigma ** 2 + .25)
        ends.append(abs(method(denoise, z, noise.edm_steps(20)).item() - exact))
    assert ends[1] < ends[0] / 3
    steps = noise.edm_steps(20).tolist()
    assert steps[0] == 80 and steps[-1] == .002 and steps[9] == pytest.approx(3.1708, rel=1e-3)
    assert seen == [s for pair in zip(steps, steps[1:]) for s in pair] + steps[-1:]


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    def exactly(mean, root):  # features whose sample mean and covariance are exactly these
        x = torch.randn(500, 2, dtype=torch.float64)
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
        return (x @ root.T + mean).float()
    a, b = torch.tensor([[2.0, 0.0], [1.0, .5]]).double(), torch.tensor([[1.0, .7], [-.3, 3.0]]).double()
    cov_a, cov_b, mean = a @ a.T, b @ b.T, torch.tensor([1.0, -2.0]).double()
    # for 2 x 2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)); these two do not commute
    root = ((cov_a @ cov_b).trace() + 2 * (cov_a.det() * cov_b.det()).sqrt()).sqrt()
    expected = (mean @ mean + cov_a.trace() + cov_b.trace() - 2 * root).item()
    found = dit.frechet_distance(exactly(mean, a), exactly(0 * mean, b))
    assert found == pytest.approx(expected, rel=1e-4) and expected > 1
    same = exactly(mean, a)
    assert dit.frechet_distance(same, same) == pytest.approx(0, abs=1e-5)


def test_labels_are_withheld_in_training_only():
    c, seen = image_config(dit, label_drop=.5), []
    block = dit.Block(c, 0)
    block.condition.register_forward_hook(lambda net, args, out: seen.append((args[1] == 10).float().mean()))
    block.loss(image_batch(1000))
    block.eval().loss(image_batch(1000))
    assert .4 < seen[0] < .6 and seen[1] == 0


def test_images_are_scaled_to_sigma_data_and_back():
    block, x = dit.Block(image_config(dit), 0), torch.randn(1000, 1, 8, 8) * .75 - .4
    assert block.encode(x).std().item() == pytest.approx(.5, rel=.02)
    assert abs(block.encode(x).mean().item()) < .02
    assert torch.allclose(block.decode(block.encode(x)), x, atol=1e-5)


def test_the_running_mean_is_counted_in_a_blocks_own_updates():
    net = torch.nn.Linear(1, 1, bias=False)
    average, values = torch.nn.Linear(1, 1, bias=False), [5.0, 2.0, 7.0, 1.0]
    expected = 5.0
    average.weight.data.fill_(expected)
    for step, value in enumerate(values, 1):
        net.weight.data.fill_(value)
        train.update_average(average, net, .25, step)
        decay = min(.25, (1 + step) / (10 + step))                         # 2/11, 3/12, then .25
        expected = decay * expected + (1 - decay) * value
        assert average.weight.item() == pytest.approx(expected)


IMAGE_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in IMAGES.items()
               if k in ("n_layer", "n_blocks", "n_head", "n_embd", "n_mlp", "n_cond")]
IMAGE_FLAGS += ["--threads=1", "--device=cpu", "--log-every=1000", "--save-every=4"]


def test_a_running_mean_is_saved_used_and_resumed_to_the_same_bits(tmp_path, monkeypatch):
    def go(out, *more):
        train.run(["--model=dit", *IMAGE_FLAGS, "--block=1", "--steps=10", "--dropout=.1", "--augment=crop",
                   "--batch-size=8", "--ema=.2", f"--out={out}", *more])
        return torch.load(out / "dit/block_1.pt", weights_only=True)
    whole, real = go(tmp_path / "whole"), train.update_average

    def interrupt(average, net, decay, step):
        if step == 7:
            raise KeyboardInterrupt
        real(average, net, decay, step)
    monkeypatch.setattr(train, "update_average", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut")
    monkeypatch.setattr(train, "update_average", real)
    resumed = go(tmp_path / "cut", "--resume")
    for kind in ("net", "average"):
        assert all(torch.equal(v, resumed[kind][k]) for k, v in whole[kind].items())
    assert not all(torch.equal(v, whole["net"][k]) for k, v in whole["average"].items())
    net, _ = train.finished(dit, "dit", "block_1", tmp_path / "cut")
    assert all(torch.equal(v, whole["average"][k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("module", [vit, dit])
def test_training_a_block_of_an_image_model_leaves_the_others_alone(module, tmp_path, monkeypatch):
    name, built, real = module.__name__, [], module.Block.__init__

    def record(self, c, b):
        real(self, c, b)
        if next(self.parameters()).device.type != "meta":  # meta: counted, not in memory
            built.append(b)
    monkeypatch.setattr(module.Block, "__init__", record)

    def go(what):
        train.run([f"--model={name}", *IMAGE_FLAGS, what, "--steps=2", "--batch-size=8", f"--out={tmp_path}"])
    go("--block=0")
    before = (tmp_path / name / "block_0.pt").read_bytes()
    go("--block=1")
    assert built == [0, 1] and (tmp_path / name / "block_0.pt").read_bytes() == before
    alone = sum(p.numel() for p in module.Block(image_config(module), 1).parameters())
    state = torch.load(tmp_path / name / "block_1.pt", weights_only=True)
    assert alone == sum(s["exp_avg"].numel() for s in state["optimizer"]["state"].values())
    assert net_bits(tmp_path / name / "block_0.pt") != net_bits(tmp_path / name / "block_1.pt")


def test_assembled_vit_blocks_beat_chance_by_far_and_dit_is_judged_by_the_baseline(tmp_path, capsys):
    def go(model, *args):
        train.run([f"--model={model}", *IMAGE_FLAGS, f"--out={tmp_path}", *args])
        return capsys.readouterr().out
    for part in ("--block=all", "--end-to-end", "--control"):
        go("vit", part, "--steps=200")
    go("vit", "--eval")
    result = json.loads((tmp_path / "vit/eval.json").read_text())
    summary = result["tables"]["held-out images"]
    for row in ("baseline", "control", "blocks from z = 0", "blocks from noise", "blocks, mean of draws"):
        assert summary[row]["accuracy, %"] > 60, row   # chance is 10
    shares = [row["share of the bound, bits"] for row in
              result["tables"]["each block: its share, by itself, and the chain without it"].values()]
    assert summary["blocks (bound)"]["bits per label"] == pytest.approx(sum(shares))
    out = go("vit", "--sample", "--n-images=3")
    assert out.count("\n") == 4 and "sigma 80" in out and "truth" in out
    assert "truth" in go("vit", "--sample", "--control")

    go("dit", "--block=all", "--steps=300")
    assert "without a judge" not in go("dit", "--eval", "--n-eval=100", "--euler-steps=10", "--guidance=1.5")
    tables = json.loads((tmp_path / "dit/eval.json").read_text())["tables"]
    distance = {name: row["Frechet distance, features of our ViT"]
                for name, row in tables["generated images"].items()}
    assert set(distance) == {"training images", "blocks, guidance 1", "blocks, guidance 1.5"}
    assert distance["training images"] < distance["blocks, guidance 1"]
    # of the right class by far more often than by chance, which is 10
    assert tables["generated images"]["blocks, guidance 1"]["judged to be of its class, %"] > 40
    # an untrained one has a loss of 1 at every level
    assert max(row["blocks"] for row in tables["denoising loss by block"].values()) < .8
    (tmp_path / "vit/end_to_end.pt").unlink()
    assert "python train.py --model vit --end-to-end" in go("dit", "--eval", "--n-eval=20", "--euler-steps=4")


def test_the_same_seed_gives_the_same_picture_a_row_for_each_class(tmp_path):
    def go(*args):
        train.run(["--model=dit", *IMAGE_FLAGS, f"--out={tmp_path}", "--steps=20", "--euler-steps=6", *args])
        return (tmp_path / "dit/sample.png").read_bytes() if "--sample" in args else None
    go("--block=all")
    a, c = go("--sample"), go("--sample", "--seed=1")
    go("--eval", "--n-eval=10")
    assert a == go("--sample") != c
    assert Image.open(io.BytesIO(a)).size == (10 * 34, 10 * 34)            # 8 pixels, four times, and a rim
    few = Image.open(io.BytesIO(go("--sample", "--classes", "3", "7", "--n-images=4", "--heun")))
    assert few.size == (4 * 34, 2 * 34)
    with pytest.raises(train.UserError, match="no class 12"):
        go("--sample", "--classes", "12")


def test_latents_are_trained_on_and_sampled_as_arrays(tmp_path, data_dir):
    latents = np.random.default_rng(0).normal(3, 7, (40, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "latents.npz", latents=latents, labels=np.arange(40) % 4)
    for args in (["--block=all"], ["--sample", "--classes", "0", "2", "--n-images=3", "--euler-steps=5"]):
        train.run(["--model=dit", *IMAGE_FLAGS, f"--out={tmp_path}", "--steps=3", "--batch-size=8",
                   f"--data={tmp_path / 'latents.npz'}", *args])
    np.savez(tmp_path / "latents.npz", latents=latents[:, :3], labels=np.arange(40) % 4)
    with pytest.raises(train.UserError, match="1 or 3 channels"):
        train.run(["--model=dit", "--block=0", f"--out={tmp_path}", f"--data={tmp_path / 'latents.npz'}"])
    np.savez(tmp_path / "latents.npz", latents=0 * latents + 1, labels=np.arange(40) % 4)
    with pytest.raises(train.UserError, match="the same in every pixel"):
        train.run(["--model=dit", "--block=0", f"--out={tmp_path}", f"--data={tmp_path / 'latents.npz'}"])
    drawn = np.load(tmp_path / "dit/sample.npy")
    assert drawn.shape == (6, 4, 8, 8) and 2 < drawn.std() < 30            # in the latents' own units


def test_image_presets_can_be_built_and_have_the_papers_sizes():
    sizes = {}
    for module in (vit, dit):
        known = {f.name for cls in (module.Config, module.Sampling, train.ImageTraining) for f in fields(cls)}
        for name, preset in module.PRESETS.items():
            assert set(preset) <= known, name
            facts = dict(image_size={"tiny-imagenet": 64, "default": 8}.get(name, 32), n_class=100,
                         data_std=.5, n_channel=4 if name == "imagenet256" else 3)
            c = replace(train.settle(module.Config, preset), **facts)
            module.check(c)
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in module.EndToEnd(c).parameters())
                blocks = sum(p.numel() for b in range(c.n_blocks) for p in module.Block(c, b).parameters())
            assert blocks < 1.5 * sizes[name]
    assert 32e6 < sizes["cifar10"] < 34e6              # DiT-S/2: 33 M
    assert 455e6 < sizes["imagenet256"] < 462e6        # DiT-L/2: 458 M
    assert 84e6 < sizes["tiny-imagenet"] < 88e6        # ViT-B: 86 M


def test_a_damaged_file_of_digits_gets_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "digits.npz").write_bytes(b"PK" + bytes(100))
    monkeypatch.setattr(train, "DIGITS", tmp_path / "digits.npz")
    with pytest.raises(train.UserError, match="git restore"):
        train.load_images(train.ImageTraining(), torch.device("cpu"))


def test_sampling_reads_the_data_where_it_lies_now_if_it_fits(tmp_path, data_dir):
    rng = np.random.default_rng(0)
    for name, size in (("a", 8), ("b", 4)):
        latents = rng.normal(size=(20, 4, size, size))
        np.savez(tmp_path / f"{name}.npz", latents=latents, labels=np.arange(20) % 4)
    flags = ["--model=vit", *IMAGE_FLAGS, f"--out={tmp_path}"]
    train.run([*flags, "--end-to-end", "--steps=2", f"--data={tmp_path / 'a.npz'}"])
    (tmp_path / "a.npz").rename(tmp_path / "moved.npz")
    train.run([*flags, "--sample", "--end-to-end", f"--data={tmp_path / 'moved.npz'}"])
    with pytest.raises(train.UserError, match=r"image_size \(8 -> 4\)"):
        train.run([*flags, "--sample", "--end-to-end", f"--data={tmp_path / 'b.npz'}"])


def test_the_standard_fid_is_asked_of_torch_fidelity(monkeypatch):
    asked = {}

    def calculate_metrics(input1, input2, **settings):
        asked.update(sizes=(len(input1), len(input2)), picture=input1[0], **settings)
        return {"frechet_inception_distance": 12.5}
    module = types.ModuleType("torch_fidelity")
    module.calculate_metrics = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    assert dit.standard_fid(image_batch(5)[0], image_batch(7)[0]) == 12.5
    assert asked["sizes"] == (7, 5) and asked["fid"] and asked["picture"].shape == (3, 8, 8)
    assert asked["picture"].dtype == torch.uint8


def test_code_of_the_same_name_is_the_same_code():
    own = {"Config", "Sampling", "Block", "EndToEnd", "check", "check_sampling", "sample", "sampling_step",
           "evaluate", "next_token"}  # the last asked for by the shared `generate`
    variants = {("recurrent", "control")}                                  # it has no n_layer to cut
    seen, shared = {}, set()
    for name in train.MODELS:
        for node in ast.parse((HERE / f"{name}.py").read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and \
                    node.name not in own and (name, node.name) not in variants:
                source = ast.unparse(node)
                shared |= {node.name} & set(seen)
                assert seen.setdefault(node.name, source) == source, f"{node.name} in {name}.py differs"
    assert {"make_noise", "control", "SelfAttention", "EncoderLayer", "NoiseEmbedding"} <= shared


# -----------------------------------------------------------------------------------------------------------
# recurrent.py

def recurrent_config(**changes):
    return recurrent.Config(**{**dict(n_head=2, n_embd=32, n_cond=8, seq_len=8, vocab_size=64, mean_passes=6,
                                      grad_passes=2), **changes})


STREAMS = pytest.mark.parametrize("streams", ["aligned", "two"])


@STREAMS
@pytest.mark.parametrize("chained", [False, True])
def test_a_recurrent_slot_sees_no_token_but_those_before_it(streams, chained):
    """chained: as in a chain, where a slot's own z may be anything and earlier slots hold the true tokens."""
    block, sigma = shaken(recurrent.Block(recurrent_config(streams=streams), 0)), torch.tensor([1.0])
    embedded = []

    def leaf(module, args, out):
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]
    block.embed.register_forward_hook(leaf)
    x, z = torch.randint(64, (1, 8)), torch.randn(1, 8, 32, requires_grad=True)
    known = torch.randn(1, 8, 32, requires_grad=True)
    e, _ = block.condition(x)
    context = block.context(e, known, sigma) if chained else None
    logits = block.logits(e, z, sigma, context)
    for i in range(8):
        grads = torch.autograd.grad(logits[0, i].sin().sum(), [z, known, *embedded], retain_graph=True,
                                    materialize_grads=True)
        own, earlier, clean = (g[0].abs().sum(-1) > 0 for g in grads)
        before = [streams == "aligned" and j < i for j in range(8)]        # z_j is of token j + 1 <= i
        assert clean.tolist() == [j <= i for j in range(8)]
        assert own.tolist() == [j == i or not chained and before[j] for j in range(8)]
        assert earlier.tolist() == [chained and before[j] for j in range(8)]


def test_aligned_slots_of_true_tokens_give_the_same_with_a_context_and_without():
    block = shaken(recurrent.Block(recurrent_config(), 0))
    e, z, sigma = torch.randn(2, 8, 32), torch.randn(2, 8, 32), torch.tensor([.5, 3.0])
    apart = block.logits(e, z, sigma, block.context(e, z, sigma))
    assert torch.allclose(block.logits(e, z, sigma), apart, atol=1e-4) and apart.std() > .1


@STREAMS
def test_the_recurrent_output_depends_on_hint_level_and_text_and_at_first_on_the_text_alone(streams):
    fresh, sigma = recurrent.Block(recurrent_config(streams=streams), 0), torch.tensor([1.0])
    e, z = torch.randn(1, 8, 32), torch.randn(1, 8, 32)
    prior = [fresh.logits(e, v, s) - v @ fresh.table.T / s ** 2
             for v in (z, 0 * z) for s in (sigma, 9 * sigma)]
    assert all(torch.allclose(p, prior[0], atol=1e-4) for p in prior)
    block = shaken(fresh)
    out = block.logits(e, z, sigma)
    for other in ((e + 1, z, sigma), (e, z + 1, sigma), (e, z, 2 * sigma)):
        assert not torch.allclose(out, block.logits(*other))


def test_a_recurrent_slot_is_scored_on_the_token_that_its_noise_was_added_to():
    block = recurrent.Block(recurrent_config(sigma_min=.002, sigma_max=.05), 0)
    assert block.loss(torch.randint(64, (4, 9))).item() < 1e-3


@pytest.mark.parametrize("make", [lambda c: recurrent.Block(c, 0), recurrent.EndToEnd, recurrent.control,
                                  lambda c: recurrent.Block(replace(c, streams="two"), 0)])
def test_one_batch_is_overfitted_by_recurrent_depth(make):
    c = recurrent_config(sigma_min=.3, sigma_max=20.0)
    assert left_of_the_loss(make(c), torch.randint(64, (4, 9))) < .2


def test_the_recurrent_baseline_is_causal_and_its_first_state_is_huginns():
    net, x = shaken(recurrent.EndToEnd(recurrent_config())), torch.randint(64, (1, 8))
    other = x.clone()
    other[:, 5] = (other[:, 5] + 1) % 64
    out = []
    for tokens in (x, other):
        torch.manual_seed(1)
        out.append([net(tokens, n)[0] for n in (1, 3)])
    for a, b in zip(*out):
        assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 5:], b[:, 5:])
    state = net.first_state(torch.empty(100, 100, 32))
    assert state.std() == pytest.approx(.4 ** .5, rel=.02) and state.abs().max() < 3.01 * .4 ** .5


def test_passes_are_poisson_with_a_log_normal_rate_and_only_the_last_have_a_gradient(monkeypatch):
    net, real, graded = recurrent.EndToEnd(recurrent_config(mean_passes=32)), recurrent.Recurrent.one_pass, []
    n = torch.tensor([net.n_passes() for _ in range(20000)]).float()
    # of Poisson(rate) + 1: mean E rate + 1, variance E rate + var rate, with E rate 32
    assert n.min() >= 1 and n.mean().item() == pytest.approx(33, rel=.02)
    assert n.var().item() == pytest.approx(32 + 32 ** 2 * (math.exp(.25) - 1), rel=.08)
    assert net.eval().n_passes() == 32 and recurrent.control(recurrent_config()).n_passes() == 1

    def one_pass(self, state, *rest):
        state, own = real(self, state, *rest)
        graded.append(state.requires_grad)
        return state, own
    monkeypatch.setattr(recurrent.Recurrent, "one_pass", one_pass)
    recurrent.EndToEnd(recurrent_config()).eval().loss(torch.randint(64, (2, 9))).backward()
    assert graded == [False] * 4 + [True] * 2


@pytest.mark.parametrize("make", [recurrent.EndToEnd, recurrent.control, lambda c: [recurrent.Block(c, 0)],
                                  lambda c: [recurrent.Block(replace(c, streams="two"), 0)]])
def test_recurrent_generation_with_the_cache_equals_generation_without(make, monkeypatch):
    """Without fresh noise: a state of zeros, and known tokens that are not corrupted."""
    monkeypatch.setattr(recurrent.EndToEnd, "first_state", lambda self, e: torch.zeros_like(e))
    monkeypatch.setattr(LogNormal, "corrupt", lambda self, y, sigma: y)
    nets = make(recurrent_config())
    shaken(nets[0] if isinstance(nets, list) else nets)
    prompts, out = [[1, 2], [5, 6, 7, 8]], []
    for use_cache in (True, False):
        torch.manual_seed(1)
        out.append(recurrent.generate(nets, prompts, 20, use_cache=use_cache, n_passes=4))   # past seq_len 8
    assert torch.equal(*out) and out[0].shape == (2, 24) and len(out[0].unique()) > 5


@STREAMS
@pytest.mark.parametrize("n", [1, 4])
def test_a_chain_of_passes_is_as_many_evaluations_and_the_past_is_not_computed_again(streams, n, monkeypatch):
    block, levels, known, widths = recurrent.Block(recurrent_config(streams=streams), 0), [], [], []
    logits, corrupt, one_pass = recurrent.Block.logits, LogNormal.corrupt, recurrent.Recurrent.one_pass
    monkeypatch.setattr(recurrent.Block, "logits", lambda self, e, z, sigma, *rest, **more: (
        levels.append(sigma[0].item()), logits(self, e, z, sigma, *rest, **more))[1])
    monkeypatch.setattr(LogNormal, "corrupt", lambda self, y, sigma: (
        known.append((sigma[0].item(), y.shape[1])), corrupt(self, y, sigma))[1])
    monkeypatch.setattr(recurrent.Recurrent, "one_pass", lambda self, state, *rest: (
        widths.append(state.shape[1]), one_pass(self, state, *rest))[1])
    recurrent.generate([block], [[1, 2, 3]], 3, n_passes=n)
    grid = [80.0] if n == 1 else block.noise.steps(4).tolist()
    assert levels == pytest.approx(3 * grid)
    if streams == "aligned":  # of 3 tokens 2 have a known next one; each later token adds one, at every level
        assert [s for s, _ in known] == pytest.approx(3 * grid)
        assert [t for _, t in known] == [2] * n + [1] * 2 * n and widths == [2, 1] * n + [1, 1] * 2 * n
    else:
        assert known == [] and widths == [3] + [1] * n + ([1] + [1] * n) * 2


def test_a_block_that_knows_the_next_token_finds_it_in_every_slot(monkeypatch):
    block = recurrent.Block(recurrent_config(), 0)
    x = torch.randint(64, (4, 9))
    e, y = torch.randn(4, 8, 32), block.table[x[:, 1:]]
    sure = 50 * F.one_hot(x[:, 1:], 64).float()
    monkeypatch.setattr(block, "head", lambda h: sure)
    for temperature, n in ((0.0, 1), (1.0, 4)):
        assert torch.equal(recurrent.denoise_tokens(block, e, y, temperature, n), x[:, 1:])


def test_the_bound_of_a_chain_falls_to_the_continuous_one_as_its_steps_get_finer():
    noise, table = LogNormal(1), target_table(27, 27, 0)
    log_p = (2 * torch.randn(27)).log_softmax(0)
    label = torch.multinomial(log_p.exp(), 20000, replacement=True)
    y = table[label]

    def squared_error(z, sigma):
        return (y - bayes_logits(log_p, z, sigma, table).softmax(-1) @ table).pow(2).sum(1)
    steps = [torch.logspace(math.log10(80), math.log10(.05), n, dtype=torch.float64) for n in (8, 32, 512)]
    coarse, finer, finest = (bound_chain(squared_error, y, noise, s) for s in steps)
    assert coarse > finer + .1 and finer > finest + .1
    assert finest == pytest.approx(-log_p[label].mean().item(), abs=.06)


def test_generated_text_is_scored_over_passes_by_the_baseline():
    class Text:
        token_bytes = torch.ones(64, dtype=torch.long)

        def held_out(self, n, config):
            return torch.randint(64, (4, config.seq_len + 1))
    c = recurrent_config()
    rows = recurrent.generation_by_passes([recurrent.Block(c, 0)], recurrent.EndToEnd(c), Text(), c)
    for row in rows.values():                                              # an untrained judge
        assert row["judge, bits per byte"] == pytest.approx(6, abs=2) and 0 < row["distinct-2"] <= 1
        assert 0 < row["unigram entropy, bits"] <= 6


def test_recurrent_presets_can_be_built_and_lm1b_has_the_papers_shape():
    for preset in recurrent.PRESETS.values():
        assert set(preset) <= {f.name for cls in (recurrent.Config, train.TextTraining) for f in fields(cls)}
        c = replace(train.settle(recurrent.Config, preset), vocab_size=50257)
        recurrent.check(c)
    assert (c.n_prelude, c.n_core, c.n_coda, c.n_embd, c.n_head, c.seq_len) == (2, 4, 2, 512, 8, 256)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make(c).parameters()) for make in
                 (recurrent.EndToEnd, recurrent.control, lambda c: recurrent.Block(c, 0))]
    assert sizes[0] == sizes[1] == pytest.approx(8 * 12 * 512 ** 2 + 50257 * 512 + 2 * 512 ** 2, rel=.01)
    assert sizes[2] < 1.1 * sizes[0]                                       # and the noise level's way in


def test_recurrent_depth_is_trained_scored_and_sampled(data_dir, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recurrent, "PASSES", (1, 4, 16))
    monkeypatch.setattr(recurrent, "generation_by_passes", lambda *args: {})   # has its own test
    flags = ["--model=recurrent", "--n-head=2", "--n-embd=32", "--n-cond=8", "--seq-len=16",
             "--mean-passes=4", "--batch-size=4", "--threads=1", "--device=cpu", f"--data={text_file}",
             f"--out={tmp_path}"]
    for part in ("--block=all", "--end-to-end", "--control"):
        train.run([*flags, part, "--steps=100"])
    train.run([flags[0], "--eval", f"--out={tmp_path}"])
    tables = json.loads((tmp_path / "recurrent/eval.json").read_text())["tables"]
    summary = tables["bits per byte on held-out text"]
    for row in ("baseline", "control", "blocks (bound)"):                  # a uniform guess is 8
        assert summary[row]["bits per byte"] < 3
    rows = tables["by number of passes"]
    few, many = rows["4 passes"], rows["16 passes"]
    for row in (few, many):                                                # it knows more than z alone tells
        assert row["bound of the sampler, bits per byte"] < .8 * row["the same from z alone (Bayes)"]
    assert many["bound of the sampler, bits per byte"] < few["bound of the sampler, bits per byte"]
    capsys.readouterr()
    for more in ([], ["--end-to-end"], ["--control"]):
        train.run([flags[0], "--sample", f"--out={tmp_path}", "--prompt=line ", "--n-tokens=8",
                   "--n-passes=4", *more])
        assert capsys.readouterr().out.startswith("line ")
    with pytest.raises(train.UserError, match="one block, 0, for all noise levels"):
        train.run([*flags, "--block=1"])


# -----------------------------------------------------------------------------------------------------------
# mdm.py

def masked_config(**changes):
    return mdm.Config(**{**TINY, "vocab_size": 12, **changes})


def test_a_masked_place_is_guessed_from_both_sides_and_from_the_time():
    net = shaken(mdm.Block(masked_config(), 0))
    z, t = torch.randint(12, (1, 16)), torch.tensor([.8])
    z[0, 7] = net.noise.mask_id
    logits = net(z, t)
    assert logits.shape == (1, 16, 12)                                     # the mask itself is no answer
    for place in (0, 6, 8, 15):
        other = z.clone()
        other[0, place] = (z[0, place] + 1) % 12
        assert not torch.allclose(net(other, t)[0, 7], logits[0, 7])
    assert not torch.allclose(net(z, t / 2)[0, 7], logits[0, 7])


def test_only_masked_places_are_scored():
    net, y = shaken(mdm.Block(masked_config(), 1)), torch.randint(12, (2, 16))
    z, t = y.clone(), torch.tensor([.2, .4])
    assert (net.masked_nats(z, t, y) == 0).all()
    z[0, 3] = z[0, 9] = net.noise.mask_id
    nats = -net(z, t).log_softmax(-1)[0].gather(1, y[0, :, None])[:, 0]
    assert torch.allclose(net.masked_nats(z, t, y), torch.stack([nats[3] + nats[9], torch.tensor(0.0)]))


@pytest.mark.parametrize("make, left", [(lambda c: mdm.Block(c, 0), .6), (lambda c: mdm.Block(c, 1), .1),
                                        (mdm.EndToEnd, .2)])
def test_one_batch_of_masked_text_is_overfitted(make, left):
    # positions are relative: where next to all is masked, nothing tells where the row begins
    net, batch = make(masked_config(eps=.05)), (torch.arange(17) % 12).expand(8, -1)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(net.loss(batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(math.log(12), rel=.35)        # a fresh head knows nothing
    assert sum(losses[-10:]).item() / 10 < left * losses[0].item()


class Windows:
    """Held-out windows of random tokens, of one byte each."""
    token_bytes = torch.ones(12, dtype=torch.long)

    def held_out(self, n, config):
        return torch.randint(12, (512, config.seq_len + 1), generator=torch.Generator().manual_seed(0))


def test_shares_of_blocks_that_are_copies_add_up_to_the_one_networks_bound():
    one = mdm.EndToEnd(masked_config(n_layer=2))
    torch.nn.init.normal_(one.head.weight, std=.3)                         # wrong guesses, to make it a test
    blocks = [mdm.Block(masked_config(n_layer=6, n_blocks=3), b) for b in range(3)]
    for block in blocks:
        block.load_state_dict(one.state_dict())
    tables, _ = mdm.evaluate(blocks, one, None, Windows(), mdm.Sampling())
    summary = tables["bits per byte on held-out text (bound)"]
    gap = summary["blocks - baseline"]
    assert abs(gap["bits per byte"]) < 4 * gap["+-"] < .4
    assert summary["baseline"]["bits per byte"] > math.log2(12)
    by_interval = tables["the bound by interval, bits per byte"].values()
    assert summary["blocks"]["bits per byte"] == pytest.approx(sum(row["blocks"] for row in by_interval))


@pytest.mark.parametrize("schedule, grid", [("linear", "uniform"), ("cosine", "cosine")])
def test_each_move_runs_its_owner_and_what_is_given_stays(schedule, grid, monkeypatch):
    c, calls, real = masked_config(schedule=schedule), [], mdm.Block.forward
    nets = [shaken(mdm.Block(c, b)) for b in range(2)]

    def forward(self, z, t):
        calls.append((self.b, t[0].item()))
        return real(self, z, t)
    monkeypatch.setattr(mdm.Block, "forward", forward)
    z = torch.randint(12, (3, 16))
    z[:, 4:12] = 12
    for temperature in (0.0, 1.0):
        out = mdm.fill(nets, z, mdm.Sampling(n_moves=8, grid=grid, temperature=temperature))
        assert (out < 12).all() and torch.equal(out[:, :4], z[:, :4]) and torch.equal(out[:, 12:], z[:, 12:])
    assert len(calls) == 16 and {b for b, _ in calls} == {0, 1}
    assert all(nets[0].noise.block_of(t) == b for b, t in calls)


def test_ancestral_sampling_with_exact_conditionals_draws_from_the_joint_distribution(monkeypatch):
    log_p = (2 * torch.randn(9)).log_softmax(0).view(3, 3)                 # the tokens are not independent
    nets = [mdm.Block(masked_config(vocab_size=3), b) for b in range(2)]

    def forward(self, z, t):
        p = log_p.exp()
        first = torch.where(z[:, 1:] == 3, p.sum(1), p.T[z[:, 1].clamp(max=2)])       # (B, 3), of token 0
        second = torch.where(z[:, :1] == 3, p.sum(0), p[z[:, 0].clamp(max=2)])        # (B, 3), of token 1
        return torch.stack([first, second], 1).log()
    monkeypatch.setattr(mdm.Block, "forward", forward)
    out = mdm.fill(nets, torch.full((8000, 2), 3), mdm.Sampling(n_moves=64))
    share = torch.bincount(3 * out[:, 0] + out[:, 1], minlength=9) / 8000
    assert torch.allclose(share, log_p.exp().flatten(), atol=.02)


def test_masked_presets_can_be_built_and_text8_has_the_papers_size():
    for name, preset in mdm.PRESETS.items():
        assert set(preset) <= {f.name for cls in (mdm.Config, train.TextTraining) for f in fields(cls)}
        c = replace(train.settle(mdm.Config, preset), vocab_size=256)
        mdm.check(c)
        with torch.device("meta"):
            whole = sum(p.numel() for p in mdm.EndToEnd(c).parameters())
            one = sum(p.numel() for p in mdm.Block(c, 0).parameters())
    # the last, text8: a block is a third of the layers and has an embedding and a head of its own
    assert 85e6 < whole < 110e6 and 1 / 3 < one / whole < .35


def test_gaps_in_a_prompt_are_masks_and_can_be_escaped():
    tokenizer = train.Tokenizer("bytes")
    z = mdm.with_gaps("ab<gap:3>c\\<gap:2>", tokenizer, 256, 16)[0].tolist()
    assert z == [*b"ab", 256, 256, 256, *b"c<gap:2>"]
    for prompt, says in (("text", "no gap to fill"), ("<gap:17>", "more than the 16"), ("<gap:0>", "no gap")):
        with pytest.raises(ValueError, match=says):
            mdm.with_gaps(prompt, tokenizer, 256, 16)


def test_masked_blocks_are_trained_assembled_scored_and_fill_gaps(data_dir, text_file, tmp_path, capsys):
    flags = ["--model=mdm", *FLAGS, f"--data={text_file}", f"--out={tmp_path}", "--log-every=1000"]
    for part in ("--block=all", "--end-to-end", "--control"):
        train.run([*flags, part, "--steps=300"])
    train.run([*flags[:1], "--eval", f"--out={tmp_path}"])
    tables = json.loads((tmp_path / "mdm/eval.json").read_text())["tables"]
    for row in ("baseline", "control", "blocks"):                          # a uniform guess is 8
        assert tables["bits per byte on held-out text (bound)"][row]["bits per byte"] < 5
    capsys.readouterr()
    for more in ([], ["--end-to-end"]):
        train.run(["--model=mdm", "--sample", f"--out={tmp_path}", "--prompt", "ab<gap:3>yz", *more])
        out = capsys.readouterr().out
        assert out.startswith("ab") and out.rstrip("\n").endswith("yz")


# -----------------------------------------------------------------------------------------------------------
# train.py: one block alone, resumed, assembled

def cli(*args):
    """Run train.py as a user would, in a process of its own; returns the finished process."""
    return subprocess.run([sys.executable, str(HERE / "train.py"), *map(str, args)], text=True,
                          capture_output=True, timeout=300)


def go(*args, data, out, steps=6):
    """train.run in this process on a small text."""
    own = [f"--data={data}", f"--out={out}", f"--steps={steps}", "--log-every=3", "--save-every=3"]
    train.run([*FLAGS, *own, *args])


def net_bits(path):
    state = torch.load(path, weights_only=True)
    return [(k, v.numpy().tobytes()) for k, v in state["net"].items()]


def test_training_a_block_builds_and_changes_no_other(data_dir, text_file, tmp_path, monkeypatch):
    built, real = [], gpt.Block.__init__

    def record(self, c, b):
        real(self, c, b)
        if self.embed.weight.device.type != "meta":    # meta: counted, not in memory
            built.append(b)
    monkeypatch.setattr(gpt.Block, "__init__", record)
    go("--block=0", data=text_file, out=tmp_path)
    before = (tmp_path / "gpt/block_0.pt").read_bytes()
    built.clear()
    go("--block=1", data=text_file, out=tmp_path)
    assert built == [1]
    assert (tmp_path / "gpt/block_0.pt").read_bytes() == before
    state = torch.load(tmp_path / "gpt/block_1.pt", weights_only=True)
    alone = sum(p.numel() for p in gpt.Block(gpt.Config(**state["config"]), 1).parameters())
    moments = sum(s["exp_avg"].numel() for s in state["optimizer"]["state"].values())
    # one block's weights, one block's Adam
    assert alone == moments == sum(v.numel() for v in state["net"].values())


def test_blocks_share_no_parameter_and_no_random_stream():
    nets = [gpt.Block(config(), b) for b in range(2)]
    assert not {p.data_ptr() for p in nets[0].parameters()} & {p.data_ptr() for p in nets[1].parameters()}
    seeds = {train.seed_of(s, p) for s in range(3) for p in ("block_0", "block_1", "end_to_end", "control")}
    assert len(seeds) == 12


def test_blocks_trained_in_any_process_and_order_have_the_same_bits(text_file, tmp_path):
    common = [*FLAGS, f"--data={text_file}", "--steps=6"]
    done = cli(*common, "--block=all", f"--out={tmp_path}/a")
    assert done.returncode == 0, done.stderr
    for b in (1, 0):
        assert cli(*common, f"--block={b}", f"--out={tmp_path}/b").returncode == 0
    for b in (0, 1):
        assert net_bits(tmp_path / f"a/gpt/block_{b}.pt") == net_bits(tmp_path / f"b/gpt/block_{b}.pt")
    assert net_bits(tmp_path / "a/gpt/block_0.pt") != net_bits(tmp_path / "a/gpt/block_1.pt")


class Child:
    """train.py's main in a fork of this process, which saves importing torch once more. limit: the most bytes
    that a file may have, as if the disk were full there."""

    def __init__(self, *args, limit=resource.RLIM_INFINITY):
        self.output, end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            return
        try:
            with os.fdopen(end, "w", buffering=1) as out, contextlib.redirect_stdout(out):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                sys.argv, code = ["train.py", *map(str, args)], 0
                try:
                    train.main()
                except SystemExit as e:
                    code = e.code if isinstance(e.code, int) else 1
                    print(e.code if code == 1 else "")
                except BaseException:
                    traceback.print_exc(file=out)
                    code = 99
        finally:
            os._exit(code)

    def kill(self, number):
        os.kill(self.pid, number)

    def end(self):
        """(exit code, or minus the signal that ended it; lines printed), when it has ended."""
        with os.fdopen(self.output) as f:
            lines = f.read().split("\n")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), [line for line in lines if line]


    def wait_for(self, condition):
        """Until a condition holds; not for ever, and not for a process that has ended."""
        deadline = time.time() + 200
        while not condition():
            assert time.time() < deadline
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), "it ended too early"
            time.sleep(.01)


def small(model, text_file, *more):
    """A command line that trains block 0 of a model as small as it gets."""
    images = ["--batch-size=4", *IMAGE_FLAGS]
    depth = ["--n-head=2", "--n-embd=16", "--n-cond=8", "--seq-len=16", "--batch-size=4", "--threads=1"]
    own = {"vit": images, "dit": images, "recurrent": [*depth, f"--data={text_file}"]}
    return [f"--model={model}", *own.get(model, [*FLAGS, f"--data={text_file}"]), "--block=0",
            "--save-every=2", "--log-every=5", *more]


@pytest.mark.parametrize("model", train.MODELS)
def test_a_run_that_is_killed_at_any_instant_resumes_to_the_same_bits(model, data_dir, text_file, tmp_path):
    common, path = small(model, text_file, "--steps=60", "--ema=.9"), tmp_path / f"cut/{model}/block_0.pt"
    began = time.time()
    code, lines = Child(*common, f"--out={tmp_path}/whole").end()
    assert code == 0, lines
    seconds, chance, kills = time.time() - began, random.Random(model), 0
    for _ in range(9):
        run = Child(*common, f"--out={tmp_path}/cut", *["--resume"] * path.exists())
        time.sleep(seconds * chance.uniform(0, .5))
        run.kill(signal.SIGKILL)
        code, lines = run.end()
        assert code in (0, -signal.SIGKILL), lines
        kills += code != 0
        if path.exists():
            train.load(path, model)                    # whole, whenever that was
    code, lines = Child(*common, f"--out={tmp_path}/cut", *["--resume"] * path.exists()).end()
    assert code == 0 and kills, lines
    assert net_bits(path) == net_bits(tmp_path / f"whole/{model}/block_0.pt")
    assert not list(path.parent.glob(".*"))            # what killed processes had half written is gone
    logs = [(tmp_path / f"{d}/{model}/block_0.jsonl").read_text().splitlines() for d in ("whole", "cut")]
    steps, again = ([json.loads(line)["step"] for line in lines] for lines in logs)
    assert steps == again                              # the log has no gap and no line twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("model", train.MODELS)
def test_a_signal_ends_a_run_after_an_update_that_is_saved(model, number, data_dir, text_file, tmp_path):
    path, log = tmp_path / model / "block_0.pt", tmp_path / model / "block_0.jsonl"
    run = Child(*small(model, text_file, "--steps=99999", "--save-every=99999"), f"--out={tmp_path}")
    run.wait_for(lambda: log.exists() and log.read_text())
    run.kill(number)
    code, lines = run.end()
    assert code == 128 + number, lines
    step = train.load(path, model)["step"]
    says = f"interrupted; {path} holds step {step} of 99999; go on with: python train.py"
    assert lines[-1].startswith(says) and lines[-1].endswith("--resume")


def test_the_command_that_an_interrupted_run_prints_goes_on_to_the_same_bits(data_dir, text_file, tmp_path):
    common = small("gpt", text_file, "--steps=600", "--save-every=9999")
    assert Child(*common, f"--out={tmp_path}/whole").end()[0] == 0
    path = tmp_path / "a b/gpt/block_0.pt"
    run = Child(*common, "--save-minutes=1e-4", "--out", tmp_path / "a b")
    run.wait_for(path.exists)                          # long before 9,999 updates: minutes save, too
    run.kill(signal.SIGTERM)
    code, lines = run.end()
    assert code == 128 + signal.SIGTERM and 0 < train.load(path, "gpt")["step"] < 600, lines
    code, lines = Child(*shlex.split(lines[-1].split("train.py ")[1])).end()
    assert code == 0 and net_bits(path) == net_bits(tmp_path / "whole/gpt/block_0.pt"), lines


def test_a_full_disk_gets_one_clear_line_and_costs_no_checkpoint(data_dir, text_file, tmp_path):
    common, path = small("gpt", text_file, f"--out={tmp_path}"), tmp_path / "gpt/block_0.pt"
    code, lines = Child(*common, limit=3000).end()
    assert code == 1 and lines[-1].startswith("error: cannot write prepared data"), lines
    assert not prepared(data_dir)
    assert Child(*common, "--steps=4").end()[0] == 0
    state, common = torch.load(path, weights_only=True), [*common, "--resume", "--steps=4000"]
    torch.save(state | {"steps": 4000, "training": state["training"] | {"steps": 4000}}, path)
    before = path.read_bytes()
    for limit, more in ((len(before) // 2, ["--save-every=2"]),
                        (1000, ["--save-every=9999", "--log-every=1"])):
        code, lines = Child(*common, *more, limit=limit).end()
        assert code == 1 and lines[-1].startswith("error: cannot write") and "untouched" in lines[-1], lines
        assert path.read_bytes() == before and not list(path.parent.glob(".*"))


def test_a_folder_that_cannot_be_written_to_gets_one_clear_line(data_dir, text_file):
    code, lines = Child(*small("gpt", text_file), "--out=/sys/firmware/none").end()  # not even by root
    assert code == 1 and lines[-1].startswith("error: cannot write /sys/firmware"), lines


def test_two_processes_cannot_train_the_same_part(data_dir, text_file, tmp_path):
    common, path = small("gpt", text_file, f"--out={tmp_path}", "--steps=99999"), tmp_path / "gpt/block_0.pt"
    run = Child(*common)
    run.wait_for(path.exists)
    code, lines = Child(*common).end()
    assert code == 1 and lines[-1].startswith(f"error: another process is training {path}"), lines
    log = path.with_suffix(".jsonl").read_text()
    run.kill(signal.SIGKILL)
    run.end()
    assert log and path.with_suffix(".jsonl").read_text().startswith(log)
    assert Child(*common, "--resume", "--block=1", "--steps=2").end()[0] == 1      # block 1 was not begun
    state = train.load(path, "gpt")
    run = Child(*common, "--resume")                   # the lock of a killed process is gone
    run.wait_for(lambda: train.load(path, "gpt")["step"] > state["step"])
    run.kill(signal.SIGKILL)
    run.end()


@pytest.mark.parametrize("where", ["load", "prepare", "choose_speed"])
def test_a_signal_before_training_ends_the_program_and_is_taken_for_nothing_else(
        where, data_dir, text_file, tmp_path, monkeypatch):
    common, path = small("gpt", text_file, f"--out={tmp_path}"), tmp_path / "gpt/block_0.pt"
    assert Child(*common, "--steps=2").end()[0] == 0
    before = path.read_bytes()
    inner = {"load": (torch, "load"), "prepare": (train, "write_tokens"), "choose_speed": (torch, "compile")}

    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    monkeypatch.setattr(*inner[where], interrupt)
    monkeypatch.setattr(train, "DATA_DIR", tmp_path / "other")
    args = {"load": ["--sample"], "prepare": ["--steps=2"], "choose_speed": ["--compile=default"]}[where]
    common = [c for c in common if where != "load" or c != "--block=0"]
    code, lines = Child(*common, *args).end()
    assert code == 128 + signal.SIGINT and lines[-1] == "interrupted", lines
    assert path.read_bytes() == before and (where == "load" or not list((tmp_path / "other").glob(".*.part")))


def test_several_processes_prepare_a_text_once(data_dir, text_file, tmp_path):
    runs = [Child(*small("gpt", text_file, "--steps=1"), f"--out={tmp_path}/{i}") for i in range(3)]
    assert [run.end()[0] for run in runs] == [0, 0, 0] and len(prepared(data_dir)) == 1


def torchrun(n, *args):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}",
                             "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", HERE / "train.py",
                             *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_all(run):
    """SIGKILL for torchrun and the processes that it has started."""
    pairs = [line.split() for line in subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True)
             .splitlines()]
    for pid in [run.pid, *(int(pid) for pid, parent in pairs if int(parent) == run.pid)]:
        os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=60)


def test_ranks_are_dealt_over_blocks():
    blocks = ["block_0", "block_1", "block_2"]
    for n in range(1, 10):
        if n > 3 and n % 3:
            with pytest.raises(train.UserError, match=f"{n} processes cannot be dealt over 3 blocks"):
                train.deal(blocks, 0, n)
            continue
        dealt = [train.deal(blocks, rank, n) for rank in range(n)]
        for block in blocks:                           # each by one group that is complete
            groups = [group for own, group in dealt if block in own]
            assert sorted(groups) == [(rank, max(1, n // 3)) for rank in range(max(1, n // 3))]
        assert max(len(own) for own, _ in dealt) == max(1, math.ceil(3 / n))


def test_blocks_under_torchrun_are_to_the_bit_those_trained_alone_also_when_killed(text_file, tmp_path):
    common = [*FLAGS, f"--data={text_file}", "--steps=400", "--save-every=2", "--block=all"]
    alone = cli(*common, f"--out={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    paths = [tmp_path / f"ranks/gpt/block_{b}.pt" for b in range(2)]
    run = torchrun(2, *common, f"--out={tmp_path}/ranks")
    while not all(p.exists() for p in paths) and run.poll() is None:
        time.sleep(.01)
    kill_all(run)
    assert any(0 < train.load(p, "gpt")["step"] < 400 for p in paths), "they ended before they were killed"
    run = torchrun(2, *common, f"--out={tmp_path}/ranks", "--resume")
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and text.count("from step 0 of") == 0, text
    for p in paths:
        assert net_bits(p) == net_bits(tmp_path / f"alone/gpt/{p.name}")


@pytest.mark.parametrize("model, part", [("gpt", "--block=all"), ("vit", "--end-to-end")])
def test_a_group_with_shares_of_a_batch_equals_one_process_with_all_of_it(model, part, text_file, tmp_path):
    own = ["--model=vit", *IMAGE_FLAGS, "--dropout=.1", "--augment=crop"]
    own = [*(FLAGS if model == "gpt" else own), *[f"--data={text_file}"] * (model == "gpt")]
    common = [*own, "--batch-size=8", "--steps=12", "--save-every=6", "--ema=.9", part]
    one = cli(*common, "--accumulate=2", f"--out={tmp_path}/one")
    assert one.returncode == 0, one.stderr
    run = torchrun(4 if part == "--block=all" else 2, *common, f"--out={tmp_path}/two")
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "2 processes; from step 0" in text, text
    for p in sorted((tmp_path / f"one/{model}").glob("*.pt")):
        a, b = train.load(p, model), train.load(tmp_path / f"two/{model}/{p.name}", model)
        assert all(torch.equal(x, y) for s, t in zip(a["streams"], b["streams"]) for x, y in zip(s, t))
        for kind in ("net", "average"):
            for k, v in a[kind].items():
                torch.testing.assert_close(v, b[kind][k], rtol=1e-4, atol=1e-5)


def test_torchruns_processes_end_the_same_update_on_a_signal_and_refuse_what_cannot_be(text_file, tmp_path):
    common = [*FLAGS, f"--data={text_file}", "--save-every=99999", "--log-every=5", f"--out={tmp_path}"]
    run, path = torchrun(2, *common, "--block=1", "--steps=99999"), tmp_path / "gpt/block_1.pt"
    while not (path.with_suffix(".jsonl").exists() and path.with_suffix(".jsonl").read_text()):
        assert run.poll() is None, run.communicate()
        time.sleep(.01)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=300)
    step = train.load(path, "gpt")["step"]
    assert run.returncode != 0 and text.count(f"holds step {step} of 99999") == 1, text
    assert "go on with: torchrun --nproc-per-node 2 train.py" in text
    run = torchrun(3, *common, "--block=all")
    text, _ = run.communicate(timeout=300)
    assert "3 processes cannot be dealt over 2 blocks" in text and run.returncode != 0
    # what two processes began, one can go on with
    state = train.load(path, "gpt")
    end = state | {"steps": step + 3, "training": state["training"] | {"steps": step + 3}}
    torch.save(end, path)
    more = cli(*common, "--block=1", f"--steps={step + 3}", "--accumulate=2", "--threads=1", "--resume")
    assert more.returncode == 0 and f"from step {step} of {step + 3}" in more.stdout, more.stderr


def test_killing_one_blocks_job_leaves_the_others_to_finish(text_file, tmp_path):
    common = [*FLAGS, f"--data={text_file}", "--save-every=2", f"--out={tmp_path}"]
    jobs = [torchrun(2, *common, f"--block={b}", f"--steps={(99999, 40)[b]}") for b in range(2)]
    while not (tmp_path / "gpt/block_0.pt").exists():
        assert jobs[0].poll() is None, jobs[0].communicate()
        time.sleep(.01)
    kill_all(jobs[0])
    text, _ = jobs[1].communicate(timeout=300)
    assert jobs[1].returncode == 0 and train.load(tmp_path / "gpt/block_1.pt", "gpt")["step"] == 40, text
    assert train.load(tmp_path / "gpt/block_0.pt", "gpt")["step"] < 99999


class Known(torch.nn.Module):
    """A network whose bytes can be written down."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(30, 50, bias=False)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Sigmoid())
                                          for _ in range(3))
        self.register_buffer("table", torch.ones(7))

    def loss(self, batch):
        h = self.embed(batch)
        for layer in self.layers:
            h = layer(h)
        return h.exp().mean()


def test_the_memory_meter_agrees_with_a_network_whose_bytes_are_known():
    net, n = Known(), 40
    optimizer = torch.optim.AdamW(net.parameters())
    found = train.measure_memory(net, optimizer, torch.randn(n, 30), torch.device("cpu"))
    embed, layers = 4 * 30 * 50, 4 * 3 * (50 * 50 + 50)
    steps = 4 * 7                                      # AdamW counts them for each of seven tensors
    assert found["weights"] == embed + layers + 4 * 7 and found["gradients"] == embed + layers
    assert found["optimizer"] == 2 * (embed + layers) + steps
    # the input, h before the layers, each layer's output, exp's output; a sigmoid is saved as it comes out
    assert found["activations"] == 4 * n * (30 + 50 + 3 * 50 + 50)
    assert found["interface, activations"] == 4 * n * (30 + 50)
    assert found["interface, state"] == 4 * embed + 4 * 7 + 4
    least = found["weights"] + found["optimizer"] + found["activations"] - 4 * n * 30
    assert least < found["peak"] < least + found["gradients"] + 4 * n * 50 * 4
    train.checkpoint_layers(net)
    again = train.measure_memory(net, optimizer, torch.randn(n, 30), torch.device("cpu"))
    assert again["activations"] == 4 * n * (30 + 3 * 50 + 50)               # each layer's input, not more
    assert {k: found[k] for k in ("weights", "gradients", "optimizer")} == {
        k: again[k] for k in ("weights", "gradients", "optimizer")}


@pytest.mark.parametrize("part", ["--block=0", "--end-to-end"])
@pytest.mark.parametrize("model", train.MODELS)
def test_checkpointed_activations_are_fewer_and_change_no_bit(model, part, data_dir, text_file, tmp_path):
    flags = [f for f in small(model, text_file, "--steps=3") if f != "--block=0"]
    flags += ["--dropout=.1"] * (model in ("vit", "dit"))
    train.run([*flags, part, f"--out={tmp_path}/a"])
    train.run([*flags, part, f"--out={tmp_path}/b", "--checkpoint-activations"])
    name = f"{model}/{'block_0' if 'block' in part else 'end_to_end'}.pt"
    assert net_bits(tmp_path / "a" / name) == net_bits(tmp_path / "b" / name)
    train.run([*flags, "--memory", f"--out={tmp_path}/a"])
    report = json.loads((tmp_path / f"a/{model}/memory.json").read_text())
    rows = report["tables"]["memory of one update, MB"]
    assert list(rows) == [name + more for name in ("end to end", "one block")
                          for more in ("", ", activations checkpointed")]
    for name in ("end to end", "one block"):
        assert rows[name + ", activations checkpointed"]["activations"] < .6 * rows[name]["activations"]
    assert report["tables"]["of end to end, %"]["end to end"] == dict.fromkeys(
        ("weights, gradients, optimizer", "activations", "peak"), 100)


@pytest.mark.parametrize("model", train.MODELS)
def test_the_benchmark_gives_every_part_its_turn(model, data_dir, text_file, tmp_path, monkeypatch, capsys):
    turns, real = [], train.update

    def record(learner, *rest):
        turns.append(learner.net.title)
        return real(learner, *rest)
    monkeypatch.setattr(train, "update", record)
    flags = [f for f in small(model, text_file) if f != "--block=0"]
    train.run([*flags, "--bench", "3", f"--out={tmp_path}"])
    report = json.loads((tmp_path / model / "bench.json").read_text())
    updates, steps = report["tables"].values()
    blocks = [f"block {b}" for b in range(report["config"]["n_blocks"])]
    assert list(updates) == ["end to end", "control", *blocks, "all blocks"]
    assert list(steps) == ["end to end", "control", *blocks]
    n = len(steps)
    assert turns == turns[:n] * (1 + 3 + 3)            # to count operations, to warm up, three rounds
    assert updates["all blocks"]["ms"] == pytest.approx(sum(updates[b]["ms"] for b in blocks))
    for row in updates.values():
        assert row["of end to end, %"] == pytest.approx(100 * row["ms"] / updates["end to end"]["ms"])
    if model in ("vit", "dit", "mdm"):                 # operations, unlike times, can be counted
        done = [row["TFLOP per second"] * row["ms"] for row in updates.values() if "TFLOP per second" in row]
        assert .3 < done[2] / done[0] < .7 and done[2] == pytest.approx(done[3])


def test_in_bf16_the_noise_and_the_losses_stay_exact():
    block, batch, losses = gpt.Block(config(vocab_size=64), 1), torch.randint(64, (8, 17)), []
    z, sigma = torch.randn(8, 16, 32), torch.full((8,), .01)
    plain = bayes_logits(torch.zeros(8, 16, 64), z, sigma, block.table)
    for precision in ("float32", "bf16"):
        torch.manual_seed(1)
        with train.autocast(train.Training(precision=precision), torch.device("cpu")):
            losses.append(block.loss(batch))
            assert torch.equal(bayes_logits(torch.zeros(8, 16, 64), z, sigma, block.table), plain)
            product = (z @ z.mT).dtype
    assert product == torch.bfloat16                   # while what is not protected is in bf16
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=.01)


@pytest.mark.parametrize("flag", ["--precision=bf16", "--compile=default"])
def test_bf16_and_compiled_layers_train_alike_and_resume_to_the_same_bits(flag, tmp_path):
    if flag == "--compile=default" and not shutil.which("g++"):
        pytest.skip("there is no compiler")
    common = small("dit", None, "--steps=6", "--log-every=6")
    for out, flags in (("plain", []), ("whole", [flag])):
        train.run([*common, *flags, f"--out={tmp_path}/{out}"])
    logs = [(tmp_path / f"{out}/dit/block_0.jsonl").read_text() for out in ("plain", "whole")]
    losses = [json.loads(log)["loss"] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=.01)
    path, real = tmp_path / "cut/dit/block_0.pt", train.checkpoint

    def stop(path, about, step, learner):
        real(path, about, step, learner)
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "checkpoint", stop)
        train.run([*common, flag, f"--out={tmp_path}/cut"])
    train.run([*common, flag, f"--out={tmp_path}/cut", "--resume"])
    assert net_bits(path) == net_bits(tmp_path / "whole/dit/block_0.pt")
    other = "--precision=float32" if "precision" in flag else "--compile=off"
    with pytest.raises(train.UserError, match=f"{flag[2:9]}"):
        train.run([*common, other, f"--out={tmp_path}/cut", "--resume"])


def test_layers_are_compiled_also_with_checkpointed_activations(monkeypatch):
    compiled = []

    def compile(function, mode):
        def call(*args, **kwargs):
            compiled.append(mode)
            return function(*args, **kwargs)
        return call
    monkeypatch.setattr(torch, "compile", compile)
    for checkpointed, calls in ((False, 2), (True, 4)):                        # twice: forward, and again
        training = train.Training(batch_size=4, compile="default", precision="float32",
                                  checkpoint_activations=checkpointed)
        learner = train.begin(mdm, masked_config(vocab_size=256), "block_0", training, torch.device("cpu"))
        compiled.clear()
        learner.loss_of(torch.randint(256, (4, 17))).backward()
        assert compiled == ["default"] * calls


def test_without_a_working_compiler_training_goes_on_and_says_so(
        data_dir, text_file, tmp_path, monkeypatch, capsys):
    def compile(function, mode):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", compile)
    train.run(small("gpt", text_file, "--steps=2", "--compile=default", f"--out={tmp_path}"))
    assert "note: torch.compile does not work here (RuntimeError)" in capsys.readouterr().out
    assert train.load(tmp_path / "gpt/block_0.pt", "gpt")["training"]["compile"] == "off"


@pytest.mark.parametrize("flags", [
    "--model=mdm --preset=text8 --seq-len=64", "--model=dit --preset=cifar10 --image-size=8",
    "--model=vit --preset=cifar100 --image-size=8"])
def test_a_block_of_the_papers_width_needs_its_share_of_memory(flags):
    """A third, and the interface: as --memory measures, with two short examples."""
    args, module, preset = train.parse([*flags.split(), "--memory"])
    c = train.settle(module.Config, preset, args)
    batch = torch.randint(256, (2, c.seq_len + 1)) if module is mdm else (
        torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    facts = {"n_channel": 3, "n_class": 10, **({"data_std": .5} if module is dit else {})}
    c = replace(c, **({"vocab_size": 256} if module is mdm else facts))
    training = train.settle(train.Training, preset, args)
    rows = [train.measure_memory(net, train.make_optimizer(net, training, torch.device("cpu")), batch,
                                 torch.device("cpu")) for net in (module.EndToEnd(c), module.Block(c, 0))]
    held = [sum(row[k] for k in ("weights", "gradients", "optimizer")) for row in rows]
    assert held[1] / held[0] < 1 / 3 + .05
    assert rows[1]["activations"] / rows[0]["activations"] < 1 / 3 + .08


def damaged(data, chance):
    """Bytes with one fault of a random kind at a random place."""
    i, n = chance.randrange(len(data)), chance.randrange(1, 65)
    before, after, some = data[:i], data[i + n:], chance.randbytes(n)
    flipped = bytes([data[i] ^ 1 << chance.randrange(8)])
    return chance.choice([before, before + flipped + data[i + 1:], before + some + data[i:], before + after,
                          before + bytes(n) + after, before + some + after, some])


@pytest.mark.parametrize("kind", ["checkpoint", "log", "text", "prepared text", "prepared images", "latents",
                                  "digits"])
def test_damaged_bytes_are_refused_in_one_line_or_load_as_what_was_written(
        kind, data_dir, text_file, tmp_path, monkeypatch):
    def arrays(data):
        return {s: [np.asarray(a).tobytes() for a in pair] for s, pair in data.items()}

    if kind in ("checkpoint", "log"):
        train.run(small("gpt", text_file, "--n-embd=8", "--steps=2", "--log-every=1", f"--out={tmp_path}"))
        files = [tmp_path / "gpt" / ("block_0.pt" if kind == "checkpoint" else "block_0.jsonl")]

        def read():
            if kind == "checkpoint":
                net, _ = train.finished(gpt, "gpt", "block_0", tmp_path)
                return [(k, v.numpy().tobytes()) for k, v in net.state_dict().items()]
            with train.open_log(tmp_path / "gpt", "block_0") as file:
                train.rewind(file, 9)
            lines = files[0].read_bytes().splitlines(keepends=True)            # the first ones, no other
            return all(type(json.loads(line)["step"]) is int for line in lines)
    elif kind == "text":                               # any bytes are a text
        files = [text_file]

        def read():
            text = load(data_dir, data=str(text_file))
            return b"".join(bytes(text.tokens[s]) for s in train.SPLITS) == text_file.read_bytes()
    elif kind == "prepared text":
        load(data_dir, data=str(text_file))
        folder, = prepared(data_dir)
        files, cpu = sorted(folder.iterdir()), torch.device("cpu")

        def read():
            text = train.Text(folder, cpu)
            return [bytes(text.tokens[s]) for s in train.SPLITS], text.token_bytes.tolist(), text.meta
    elif kind == "digits":
        files = [tmp_path / "digits.npz"]
        files[0].write_bytes(train.DIGITS.read_bytes())
        monkeypatch.setattr(train, "DIGITS", files[0])

        def read():
            return arrays(train.digits())
    else:
        source = latents(tmp_path / "a.npz")
        images(data=source)
        files = [Path(source)] if kind == "latents" else sorted(prepared(data_dir)[0].iterdir())

        def read():
            return arrays(images(data=source).arrays)
    wholes, refused, chance = [f.read_bytes() for f in files], 0, random.Random(kind)
    expected = read()
    for case in range(200):
        file, whole = chance.choice(list(zip(files, wholes)))
        stamp = file.stat()
        file.write_bytes(damaged(whole, chance))
        if kind == "prepared images":                  # as if the disk had done it
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        try:
            assert read() == expected
        except train.UserError as e:
            refused += 1
            assert "\n" not in str(e)
        file.write_bytes(whole)
    assert refused > 100 or kind in ("log", "text")
    assert read() == expected


def test_logging_and_saving_change_no_weight(data_dir, text_file, tmp_path):
    go("--block=0", data=text_file, out=tmp_path / "a")
    go("--block=0", "--log-every=1", "--save-every=2", data=text_file, out=tmp_path / "b")
    assert net_bits(tmp_path / "a/gpt/block_0.pt") == net_bits(tmp_path / "b/gpt/block_0.pt")


def test_resuming_with_other_settings_is_refused_by_name(data_dir, text_file, tmp_path):
    go("--block=0", data=text_file, out=tmp_path)
    with pytest.raises(train.UserError, match="gamma.*lr") as e:
        go("--block=0", "--resume", "--lr=0.5", "--gamma=0.2", data=text_file, out=tmp_path)
    assert "n_layer" not in str(e.value)
    text_file.write_text(text_file.read_text() + "more" * 50)
    with pytest.raises(train.UserError, match="data"):
        go("--block=0", "--resume", data=text_file, out=tmp_path)


def test_the_learning_rate_is_counted_in_a_blocks_own_updates():
    t = train.Training(lr=1.0, warmup=10, final_lr=.1)
    assert [train.lr_at(s, t, 110) for s in (0, 4, 9)] == pytest.approx([.1, .5, 1.0])
    assert train.lr_at(60, t, 110) == pytest.approx(.55) and train.lr_at(110, t, 110) == pytest.approx(.1)


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(data_dir, text_file, tmp_path, monkeypatch):
    real, calls = gpt.Block.loss, []

    def loss(self, batch):
        calls.append(self.training)
        return real(self, batch) * (math.nan if calls.count(True) > 8 else 1.0)
    monkeypatch.setattr(gpt.Block, "loss", loss)
    with pytest.raises(train.UserError, match="block_0 is nan by step 9; saved is step 6 in "):
        go("--block=0", steps=30, data=text_file, out=tmp_path)
    state = torch.load(tmp_path / "gpt/block_0.pt", weights_only=True)
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["net"].values())


def test_trained_blocks_are_assembled_scored_and_sampled(data_dir, text_file, tmp_path, capsys):
    for part in ("--block=all", "--end-to-end", "--control"):
        go(part, "--lr=0.003", "--no-checkpoint-activations", steps=150, data=text_file, out=tmp_path)
    go("--eval", data=text_file, out=tmp_path)
    result = json.loads((tmp_path / "gpt/eval.json").read_text())
    first = result["tables"]["bits per byte on held-out text"]
    shares = [row["bits per byte"] for row in result["tables"]["the bound, share by share"].values()]
    assert first["blocks (bound)"]["bits per byte"] == pytest.approx(sum(shares))
    for name in ("baseline", "control", "blocks (bound)"):
        assert first[name]["bits per byte"] < 4.5  # a uniform guess among 256 is 8, the unigram about 4.6
    suggested = re.findall(r"next: python train\.py (.*)", capsys.readouterr().out)
    assert [line.split()[2] for line in suggested] == ["--end-to-end", "--control", "--eval"]
    for line in suggested:                              # what is suggested can be typed as it stands
        assert "--no-checkpoint-activations" in line
        assert train.parse(line.split())[0]["n_embd"] == 32
    assert result["data"]["tokenizer"] == "bytes" and result["config"]["n_blocks"] == 2
    capsys.readouterr()
    (tmp_path / "gpt").rename(tmp_path / "moved")           # checkpoints do not mind where they lie
    (tmp_path / "else").mkdir()
    (tmp_path / "moved").rename(tmp_path / "else/gpt")
    for args in (["--sample"], ["--sample", "--end-to-end"]):
        train.run([*args, f"--out={tmp_path / 'else'}", "--prompt", "line 7", "the", "--n-tokens=20"])
        assert capsys.readouterr().out.startswith("line 7")


def test_bits_per_byte_is_a_ratio_of_sums_with_its_standard_error():
    b = gpt.bits([10 * math.log(2), 30 * math.log(2)], [5, 10])
    assert b["bits per byte"] == pytest.approx(40 / 15)
    assert b["+-"] == pytest.approx(10 / 3 / 7.5, rel=1e-6)  # residuals -+10/3, their std / sqrt 2 is 10/3


@pytest.mark.parametrize("args, says", [
    (["--block=0", "--n-layers=3"], "--n-layers"), (["--model=gtp", "--block=0"], "choose one of"),
    (["--block=7"], "0 to 3"), (["--block=-1"], "0 to 3"), (["--block=two"], "0 to 3"), ([], "--block all"),
    (["--eval", "--block=1"], "--block all"), (["--block=0", "--n-layer=10"], "1, 2, 5, 10"),
    (["--block=0", "--edges=1,2"], "5 ascending"),
    (["--block=0", "--steps=0"], "--steps"),
    (["--block=0", "--lr=abc"], "--lr"), (["--block=0", "--preset=huge"], "lm1b"),
    (["--block=0", "--device=tpu"], "tpu"), (["--block=0", "--data=no/such.txt"], "no/such.txt"),
    (["--block=0", "--n-head=5"], "n_head"), (["--block=0", "--readout=softmax"], "bayes"),
    (["--block=0", "--accumulate=3"], "--accumulate"), (["--block=0", "--threads=-1"], "--threads"),
    (["--block=0", "--n-blocks=0"], "at least 1"), (["--block=0", "--n-layer=-4"], "at least 1"),
    (["--block=0", "--p-mean=nan"], "p_mean"), (["--block=0", "--p-mean=99"], "p_mean"),
    (["--block=0", "--steps=5", "--epochs=1"], "not both"), (["--sample", "--n-tokens=-5"], "negative"),
    (["--sample", "--euler-steps=1"], "euler_steps"),
    (["--model=vit", "--block=0", "--tokenizer=bytes"], "--tokenizer"),
    (["--model=vit", "--block=0", "--patch-size=3"], "patch_size 3"),
    (["--model=vit", "--block=3"], "0 to 2"),
    (["--model=vit", "--block=0", "--n-class=7"], "the data has 10"),
    (["--model=vit", "--block=0", "--augment=spin"], "spin"),
    (["--model=dit", "--block=0", "--n-embd=30"], "n_embd"),
    (["--model=dit", "--sample", "--classes=x"], "numbers"),
    (["--model=dit", "--block=0", "--ema=1"], "--ema"),
    (["--model=dit", "--eval", "--fid"], "pip install torch-fidelity"),
    (["--model=dit", "--block=0", "--data={tmp}/no.npz"], "no.npz"),
    (["--model=vit", "--block=0", "--data={short}"], "is a file"),
    (["--model=mdm", "--block=0", "--schedule=square"], "linear or cosine"),
    (["--model=mdm", "--sample", "--grid=log"], "uniform or cosine"),
    (["--model=mdm", "--block=0", "--n-head=5"], "n_head"), (["--model=mdm", "--block=0", "--eps=0"], "eps"),
    (["--block=0", "--tokenizer=gpt9", "--data={short}"], "gpt9"),
    (["--block=0", "--data={short}"], "too few"), (["--block=0", "--data={empty}"], "empty"),
    (["--block=0", "--resume", "--out={tmp}/none"], "does not exist"),
    (["--block=0", "--precision=fp8"], "bf16"), (["--block=0", "--compile=fast"], "reduce-overhead"),
    (["--bench", "1"], "--bench"), (["--block=0", "--save-minutes=-1"], "--save-minutes"),
    (["--eval", "--out={tmp}"], "--block 0")])
def test_bad_input_gets_one_clear_line(args, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("too short\n" * 9)
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setattr(train, "DATA_DIR", tmp_path / "data")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    names = dict(short=tmp_path / "short.txt", empty=tmp_path / "empty.txt", tmp=tmp_path)
    args = [a.format(**names) for a in args]
    if not any(a.startswith("--out") for a in args):
        args.append(f"--out={tmp_path / 'out'}")
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as e:
        train.main()
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ") and "\n" not in e.value.code
    assert says in e.value.code


def test_a_wrong_command_exits_with_one_line_and_without_a_traceback():
    done = cli("--block=9")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "0 to 3" in done.stderr


def test_help_names_every_flag_with_its_meaning_and_default():
    text = cli("--help").stdout
    for cls in (gpt.Config, gpt.Sampling, train.TextTraining):
        for f in fields(cls):
            assert f"--{f.name.replace('_', '-')}" in text
    assert text.count("(default: ") >= len(fields(gpt.Config)) + len(fields(train.TextTraining))
    # the default shown is the one in force, the preset's
    assert re.search(rf"--lr LR.*?\(default:\s+{gpt.PRESETS['default']['lr']}\)\n", text, re.S)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("damage", ["cut", "noise", "bomb", "other block", "other model", "old form"])
def test_a_bad_checkpoint_is_refused_and_runs_no_code(damage, data_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    go("--block=all", data=text_file, out=tmp_path)
    path = tmp_path / "gpt/block_1.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "noise":
        path.write_bytes(os.urandom(3000))
    elif damage == "other block":
        path.write_bytes((tmp_path / "gpt/block_0.pt").read_bytes())
    elif damage == "bomb":
        torch.save({"model": "gpt", "config": Bomb()}, path)
    else:
        torch.save({"model": "vit", "part": "block_1"}, path)
    if damage == "old form":
        torch.save({"model": "gpt", "part": "block_1", "config": {"older": 1}}, path)
    with pytest.raises(train.UserError, match="block_1.pt") as e:
        go("--sample", data=text_file, out=tmp_path)
    assert "\n" not in str(e.value) and not Path("exploded").exists()


def test_a_block_of_other_settings_does_not_fit(data_dir, text_file, tmp_path):
    go("--block=all", data=text_file, out=tmp_path)
    go("--block=1", "--table-seed=5", data=text_file, out=tmp_path)
    with pytest.raises(train.UserError, match=r"block 1 does not fit.*table_seed \(0 -> 5\).*--block 1"):
        go("--sample", data=text_file, out=tmp_path)
    (tmp_path / "gpt/block_1.pt").unlink()
    with pytest.raises(train.UserError, match="--block 1"):
        go("--sample", data=text_file, out=tmp_path)


# -----------------------------------------------------------------------------------------------------------
# Data

def load(data_dir, **settings):
    return train.load_text(train.TextTraining(**settings), torch.device("cpu"))


def test_the_default_text_is_the_interpreters_own_and_the_same_each_time(data_dir):
    text = load(data_dir)
    assert text.meta["python"] == ".".join(map(str, sys.version_info[:3])) and len(text.meta["sha256"]) == 64
    n, held = text.meta["train"]["tokens"], text.meta["val"]["tokens"]
    assert n > 2_000_000 and .03 < held / (n + held) < .2
    again = load(data_dir)
    assert again.fingerprint == text.fingerprint and len(prepared(data_dir)) == 1
    assert b"import" in bytes(text.tokens["train"][:100_000])


def test_a_text_file_is_cut_once_and_comes_back_unchanged(data_dir, text_file):
    text = load(data_dir, data=str(text_file))
    joined = bytes(text.tokens["train"]) + bytes(text.tokens["val"])
    assert joined == text_file.read_bytes() and text.tokens["train"].dtype == "uint8"
    assert len(text.tokens["val"]) == pytest.approx(len(joined) / 10, abs=1)


def test_of_a_folder_of_texts_every_tenth_is_held_out(data_dir, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"document {i:02}")
    text = load(data_dir, data=str(tmp_path / "texts"))
    assert bytes(text.tokens["val"]) == b"document 09\ndocument 19"


def test_windows_are_shifted_by_one_and_held_out_ones_never_change(data_dir, text_file):
    text, c = load(data_dir, data=str(text_file)), config()
    assert text.batch(4, c, 0).shape == (4, 17) and text.batch(4, c, 0).dtype == torch.int64
    row = bytes(text.batch(1, c, 0)[0].tolist())
    assert row in text_file.read_bytes()
    assert torch.equal(text.held_out(8, c), text.held_out(8, c))


def test_a_changed_text_is_prepared_anew_and_a_damaged_one_refused(data_dir, text_file):
    first = load(data_dir, data=str(text_file))
    text_file.write_text(text_file.read_text().upper())
    assert load(data_dir, data=str(text_file)).fingerprint != first.fingerprint
    for folder in prepared(data_dir):
        with open(folder / "train.bin", "r+b") as f:
            f.truncate(1000)
    with pytest.raises(train.UserError, match="delete that folder"):
        load(data_dir, data=str(text_file))


def test_preparation_that_fails_half_way_leaves_nothing(data_dir, text_file, monkeypatch):
    real = train.write_tokens

    def fail(documents, path, *rest):
        result = real(documents, path, *rest)
        if path.stem == "val":
            raise OSError(28, "No space left on device")
        return result
    monkeypatch.setattr(train, "write_tokens", fail)
    with pytest.raises(train.UserError, match="No space left"):
        load(data_dir, data=str(text_file))
    assert prepared(data_dir) == []


@pytest.fixture
def hub_folder(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, n in (("train", 300), ("test", 20)):
        rows = (json.dumps({"text": f"{split} document {i}", "label": i % 2}) for i in range(n))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_a_folder_in_hub_form_is_read_through_datasets_once(data_dir, hub_folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    text = load(data_dir, data=str(hub_folder))
    assert bytes(text.tokens["train"][:35]) == b"train document 0\ntrain document 1\nt"
    assert bytes(text.tokens["val"][:15]) == b"test document 0"
    monkeypatch.setitem(sys.modules, "datasets", None)    # from now on it is not installed
    assert load(data_dir, data=str(hub_folder)).fingerprint == text.fingerprint
    with pytest.raises(train.UserError, match="needs datasets"):
        load(data_dir, data=str(hub_folder), split="test")


@pytest.mark.parametrize("settings, says", [
    (dict(column="body"), "text, label"), (dict(column="label"), "no text"),
    (dict(split="dev"), "train, test")])
def test_a_dataset_without_the_column_or_split_says_what_it_has(settings, says, data_dir, hub_folder):
    pytest.importorskip("datasets")
    with pytest.raises(train.UserError, match=says):
        load(data_dir, data=str(hub_folder), **settings)
    assert not data_dir.exists() or prepared(data_dir) == []


def test_bytes_of_tokens_are_counted_for_a_real_tokenizer(data_dir, text_file, monkeypatch):
    if not (SHARED / "tiktoken_cache").exists():
        pytest.skip("tiktoken's GPT-2 files are not beside this checkout, and tests use no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    text = load(data_dir, data=str(text_file), tokenizer="gpt2")
    assert text.tokens["train"].dtype == "uint16" and text.facts["vocab_size"] == 50257
    n_bytes = sum(text.token_bytes[t.astype("int64")].sum().item() for t in text.tokens.values())
    assert n_bytes == text_file.stat().st_size           # metrics per byte are per byte of the text
    monkeypatch.setitem(sys.modules, "tiktoken", None)   # prepared tokens need it no more
    assert load(data_dir, data=str(text_file), tokenizer="gpt2").fingerprint == text.fingerprint


def test_long_texts_are_cut_where_no_token_is():
    for text in ("word " * 300_000, "def f():\n        return  1\n" * 60_000):
        parts = list(train.pieces(text))
        assert "".join(parts) == text and len(parts) == 2
        assert parts[1][0] in " \n" and parts[0][-1] not in " \n"
    assert list(train.pieces(b"")) == []


# -----------------------------------------------------------------------------------------------------------
# Data: images and their augmentation

def images(**settings):
    return train.load_images(train.ImageTraining(**settings), torch.device("cpu"))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise_pictures(n, *shape):
    return [np.random.RandomState(i).randint(256, size=shape, dtype=np.uint8) for i in range(n)]


@pytest.fixture
def hub_images(data_dir, tmp_path, monkeypatch):
    """Writes a dataset in hub form, {split: (pictures or files, labels)}, with columns to choose from."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    kinds = datasets.Features({
        "note": datasets.Value("string"), "number": datasets.Value("int32"), "photo": datasets.Image(),
        "coarse": datasets.ClassLabel(names=["x", "y"]), "fine": datasets.ClassLabel(names=["a", "b", "c"])})

    def write(splits):
        for split, (pictures, labels) in splits.items():
            files = [{"bytes": p if isinstance(p, bytes) else png(p), "path": None} for p in pictures]
            rows = {"note": ["-"] * len(files), "photo": files, "coarse": [0] * len(files), "fine": labels,
                    "number": labels}
            datasets.Dataset.from_dict(rows, kinds).to_parquet(tmp_path / "pictures" / f"{split}.parquet")
        return str(tmp_path / "pictures")
    return write


def test_the_digits_are_the_uci_set_and_a_quarter_of_each_class_is_held_out(data_dir):
    with np.load(HERE / "data" / "digits.npz") as file:
        pixels, labels, held_out = (file[k] for k in ("images", "labels", "held_out"))
    sums = [hashlib.sha256(a.tobytes()).hexdigest()[:16] for a in (pixels, labels, held_out)]
    assert sums == ["8f26b2bd9d135c25", "8ba4f891220f5e4c", "a9e7983dedd769cf"]
    assert pixels.shape == (1797, 8, 8) and pixels.min() == 0 and pixels.max() == 16 and held_out.sum() == 450
    # as the set is described: the number of images of each class
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (abs(np.bincount(labels[held_out]) - np.bincount(labels) / 4) < 1).all()
    data = images()
    x, y = data.held_out(0, None)
    assert x.shape == (450, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1 and data.facts["n_class"] == 10 and data.length(None) == 1347
    level = torch.from_numpy(pixels[held_out]).double() / 8 - 1
    assert x.sum().item() == pytest.approx(level.sum().item(), abs=len(x) * 64 / 255)
    assert sorted(y.tolist()) == sorted(labels[held_out].tolist()) and not data_dir.exists()
    x, _ = data.batch(1347, None, 0)
    assert data.facts["data_mean"] == pytest.approx(x.mean().item(), abs=1e-5)
    assert data.facts["data_std"] == pytest.approx(x.std(correction=0).item(), abs=1e-5)


def test_of_several_label_columns_the_finest_is_taken_and_a_dataset_is_decoded_once(hub_images, monkeypatch):
    pictures = noise_pictures(9, 6, 6, 3)
    source = hub_images({"train": (pictures[:6], [0, 1, 2, 2, 1, 0]), "test": (pictures[6:], [2, 1, 0])})
    data = images(data=source)
    assert data.names == ["a", "b", "c"] and data.meta["label_column"] == "fine"
    assert data.facts | {"data_mean": 0, "data_std": 0} == {
        "image_size": 6, "n_channel": 3, "n_class": 3, "data_mean": 0, "data_std": 0}
    for (x, y), own, labels in ((data.batch(6, None, 0), pictures[:6], [0, 1, 2, 2, 1, 0]),
                                (data.held_out(0, None), pictures[6:], [2, 1, 0])):
        known = {p.tobytes(): c for p, c in zip(own, labels)}
        back = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert {p.tobytes(): c for p, c in zip(back, y.tolist())} == known
    monkeypatch.setitem(sys.modules, "datasets", None)    # from now on it is not installed
    assert images(data=source).fingerprint == data.fingerprint and images(data=source).names == data.names
    with pytest.raises(train.UserError, match="needs datasets"):
        images(data=source, label_column="number")


def test_images_in_folders_by_class_are_read_and_without_test_images_a_tenth_of_each_class_is_held_out(
        data_dir, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    grey = noise_pictures(28, 5, 5)
    for i, pixels in enumerate(grey):
        file = tmp_path / "pets" / ("cat" if i < 25 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pixels))
    data = images(data=str(tmp_path / "pets"))
    assert data.names == ["cat", "dog"] and data.facts["n_channel"] == 1
    x, y = data.held_out(0, None)
    assert sorted(y.tolist()) == [0, 0, 1] and data.n_train == 25
    more, labels = data.batch(25, None, 0)
    back = ((torch.cat([x, more]) + 1) * 127.5).round().byte().numpy()
    found = {p.tobytes(): c for p, c in zip(back, y.tolist() + labels.tolist())}
    assert found == {p.tobytes(): int(i >= 25) for i, p in enumerate(grey)}
    (tmp_path / "pets" / "train").mkdir()
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "train" / "cat")
    (tmp_path / "pets" / "dog").rename(tmp_path / "pets" / "train" / "dog")
    (tmp_path / "pets" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "test" / "cat" / "1.png").write_bytes(png(noise_pictures(1, 5, 5, 3)[0]))
    data = images(data=str(tmp_path / "pets"))
    assert (data.n_train, data.meta["val"], data.meta["held_out"]) == (28, 1, "test")
    assert data.facts["n_channel"] == 3  # one image in colour is enough


def latents(path, n=23, **changes):
    """An .npz whose training latents say which row they are."""
    arrays = {"latents": np.arange(n)[:, None, None, None] + np.zeros((1, 2, 3, 3), np.float16),
              "labels": np.arange(n) % 3, "val_latents": np.random.RandomState(0).randn(7, 2, 3, 3),
              "val_labels": np.arange(7) % 3} | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)


def test_latents_are_kept_as_they_are(data_dir, tmp_path):
    data = images(data=latents(tmp_path / "a.npz"))
    x, y = data.batch(23, None, 0)
    assert x.dtype == torch.float32 and x.shape == (23, 2, 3, 3) and (x[:, 0, 0, 0].long() % 3 == y).all()
    assert sorted(x[:, 1, 2, 2].tolist()) == list(range(23))
    assert data.held_out(0, None)[0].shape == (7, 2, 3, 3)
    assert data.facts == {"image_size": 3, "n_channel": 2, "n_class": 3, "data_mean": 11.0,
                          "data_std": pytest.approx(((23**2 - 1) / 12) ** .5, abs=1e-6)}
    own = images(data=latents(tmp_path / "b.npz", n=60, val_latents=None, val_labels=None))
    x, y = (torch.cat(both) for both in zip(own.held_out(0, None), own.batch(54, None, 0)))
    assert y[:6].bincount().tolist() == [2, 2, 2] and torch.equal(x[:, 0, 0, 0].long() % 3, y)
    assert sorted(x[:, 0, 0, 0].tolist()) == list(range(60))


def test_an_epoch_is_a_permutation_however_it_is_cut_and_whenever_it_is_resumed(data_dir, tmp_path):
    data = images(data=latents(tmp_path / "a.npz"))

    def rows(data, n, *indices):
        return [r for i in indices for r in data.batch(n, None, i)[0][:, 0, 0, 0].long().tolist()]
    three = rows(data, 1, *range(69))
    epochs = three[:23], three[23:46], three[46:]
    assert all(sorted(e) == list(range(23)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != list(range(23))
    assert rows(data, 10, 0, 1, 2, 3, 4, 5) == rows(data, 5, *range(12)) == three[:60]
    assert rows(data, 60, 0) == three[:60]                               # more than there are
    assert rows(images(data=str(tmp_path / "a.npz")), 5, 7) == three[35:40]  # a resumed run begins anywhere
    assert rows(data, 5, 7, 2) == three[35:40] + three[10:15]
    torch.manual_seed(1)
    assert rows(data, 23, 0) == epochs[0] != rows(images(data=str(tmp_path / "a.npz"), seed=1), 23, 0)


def test_held_out_images_are_never_augmented_and_never_change():
    plain, changed = images(), images(augment="crop", seed=3)
    (x, y), (same, labels) = plain.held_out(0, None), changed.held_out(999, None)
    assert torch.equal(x, same) and torch.equal(y, labels) and len(x) == 450
    few, labels = changed.held_out(7, None)
    assert torch.equal(few, x[:7]) and torch.equal(labels, y[:7])
    assert y[:100].unique().numel() == 10  # shuffled: the first ones are of every class
    assert torch.equal(plain.batch(50, None, 2)[1], images(augment="crop").batch(50, None, 2)[1])
    assert not torch.equal(plain.batch(50, None, 2)[0], images(augment="crop").batch(50, None, 2)[0])


def test_the_real_cifar_100_has_the_published_mean(data_dir, tmp_path, monkeypatch):
    if not (SHARED / "cifar100").exists():
        pytest.skip("CIFAR-100 is not beside this checkout, and tests use no network")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    data = images(data=str(SHARED / "cifar100"), split="test")  # the smaller split; a tenth is held out
    assert (data.n_train, data.meta["val"], len(data.names)) == (9000, 1000, 100)
    assert data.held_out(0, None)[1].bincount().tolist() == [10] * 100
    assert data.names[26] == "crab" and data.facts["n_channel"] == 3
    # published for the training split: of the test split within sampling error
    assert (data.facts["data_mean"] + 1) / 2 == pytest.approx((.5071 + .4865 + .4409) / 3, abs=.01)


@pytest.mark.parametrize("settings, says", [
    (dict(augment="crop,blur"), "no 'blur'"), (dict(augment=""), "choose none"),
    (dict(augment="flip", data="a.npz"), "holds latents"), (dict(data="none.npz"), "cannot read"),
    (dict(data="there is no such/set/at all"), "cannot load")])
def test_bad_image_flags_get_one_clear_line(settings, says, data_dir):
    if "load" in says:
        pytest.importorskip("datasets")
    with pytest.raises(train.UserError, match=says) as e:
        images(**settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("changes, says", [
    (dict(labels=None), "no labels"), (dict(val_labels=None), "no val_labels"),
    (dict(latents=np.zeros((23, 2, 3, 4))), "H = W"), (dict(latents=np.zeros((23, 2, 3, 3), int)), "floats"),
    (dict(labels=np.arange(22)), "needed"), (dict(labels=np.zeros(23)), "integers"),
    (dict(val_latents=np.zeros((7, 2, 4, 4))), "all of one size"),
    (dict(latents=np.full((23, 2, 3, 3), np.nan)), "not finite"),
    (dict(labels=1 + np.arange(23) % 3), "class '0' .* no image"),
    (dict(labels=np.arange(23) - 1), "row 0 of the training split has label -1"),
    (dict(labels=np.full(23, 10**12)), "label 1000000000000"),
    (dict(val_labels=np.full(7, 3)), "held-out split has label 3, but the classes are 0 to 2"),
    (dict(latents=np.zeros((0, 2, 3, 3)), labels=np.zeros(0, int)), "row 0 of the held-out"),
    (dict(val_latents=np.zeros((0, 2, 3, 3)), val_labels=np.zeros(0, int)), "no image to hold out")])
def test_impossible_latents_get_one_clear_line_and_leave_nothing(changes, says, data_dir, tmp_path):
    with pytest.raises(train.UserError, match=says) as e:
        images(data=latents(tmp_path / "a.npz", **changes))
    assert "\n" not in str(e.value) and prepared(data_dir) == []


FINE = noise_pictures(4, 8, 8, 3)


@pytest.mark.parametrize("splits, settings, says", [
    ({}, dict(split="dev"), "it has train, test"), ({}, dict(image_column="fine"), "no image column 'fine'"),
    ({}, dict(label_column="note"), "no label column 'note'.* of note, "),
    (dict(train=(FINE, [0, 1, 1, 0])), {}, "class 'c' .label 2. has no image"),
    (dict(train=(FINE, [0, 1, 2, None])), {}, "row 3 of the training split has label -1"),
    (dict(test=(FINE, [0, 1, 2, -1])), {}, "row 3 of the held-out split has label -1"),
    (dict(train=(FINE, [0, 0, 1, 1]), test=(FINE[:1], [2])), dict(label_column="number"), "has label 2"),
    (dict(train=(FINE[:2] + [png(FINE[2])[:-60], FINE[3]], [0, 1, 2, 0])), {}, "train, row 2 cannot be read"),
    (dict(test=([b"no image"], [0])), {}, "test, row 0 cannot be read"),
    (dict(train=([FINE[0][..., 0].astype(np.uint16)] + FINE[1:], [0, 1, 2, 0])), {}, "row 0 .* than 8 bits"),
    (dict(train=(FINE[1:] + noise_pictures(1, 9, 8, 3), [0, 1, 2, 0])), {}, "row 3 is 8 x 9 .* is 8 x 8"),
    (dict(test=(noise_pictures(1, 9, 9, 3), [0])), {}, "test, row 0 is 9 x 9 .* resize"),
    (dict(train=(noise_pictures(3, 8, 6, 3), [0, 1, 2])), {}, "row 0 is 6 x 8 .* square")])
def test_an_impossible_image_set_gets_one_clear_line_and_leaves_nothing(
        splits, settings, says, data_dir, hub_images):
    whole = {"train": (FINE, [0, 1, 2, 0]), "test": (FINE[:1], [0])}
    with pytest.raises(train.UserError, match=says) as e:
        images(data=hub_images(whole | splits), **settings)
    assert "\n" not in str(e.value) and prepared(data_dir) == []


def test_a_dataset_without_images_or_class_labels_is_refused(data_dir, hub_folder, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with pytest.raises(train.UserError, match="no image column; .* text, label"):
        images(data=str(hub_folder))
    kinds = datasets.Features({"a": datasets.Image(), "b": datasets.Value("int8")})
    with pytest.raises(train.UserError, match="no label column; .* a, b"):
        train.columns(kinds, train.ImageTraining())
    assert train.columns(kinds, train.ImageTraining(label_column="b")) == ("a", "b")
    finest = {k: datasets.ClassLabel(num_classes=n) for k, n in (("b", 2), ("c", 3), ("d", 3))}
    assert train.columns(kinds | finest, train.ImageTraining()) == ("a", "c")


def test_damaged_or_half_prepared_images_are_refused(data_dir, tmp_path, monkeypatch):
    source = latents(tmp_path / "a.npz")
    images(data=source)
    folder, = prepared(data_dir)
    for name, keep in (("train_images.npy", 500), ("val_labels.npy", 0), ("meta.json", 20)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:keep])
        with pytest.raises(train.UserError, match="delete that folder"):
            images(data=source)
        (folder / name).write_bytes(whole)
    assert len(prepared(data_dir)) == 1

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "summary", fail)
    with pytest.raises(train.UserError, match="No space left"):
        images(data=latents(tmp_path / "b.npz"))
    assert prepared(data_dir) == [folder]


def test_a_crop_is_a_shift_of_the_image_padded_with_black():
    x = F.pad(torch.rand(300, 3, 6, 6), (1, 1, 1, 1), value=-1.0)
    new, seen = train.crop(x), set()
    shifts = {(i, j): x.roll((i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    for k in range(300):
        seen |= {place for place, rolled in shifts.items() if torch.equal(new[k], rolled[k])}
        assert any(torch.equal(new[k], rolled[k]) for rolled in shifts.values())
    assert seen == set(shifts)
    moved = train.crop(torch.ones(200, 1, 32, 32))  # 4 pixels of 32 either way
    assert moved.shape == (200, 1, 32, 32) and 28 == (moved > 0).any(3).sum(2).min() < 32
    assert ((moved == 1) | (moved == -1)).all()


def test_a_flip_mirrors_about_half_of_the_images_left_to_right():
    x = torch.rand(400, 3, 4, 4)
    new = train.flip(x)
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(new, x)])
    assert 140 < mirrored.sum() < 260 and torch.equal(new[~mirrored], x[~mirrored])


def photographs(channels):
    """Eight pictures of whole numbers 0..255, smooth and none using all values: as real ones are."""
    x = F.interpolate(torch.rand(8, channels, 5, 5), (32, 32), mode="bicubic")
    return (25 + 190 * x + 8 * torch.rand(8, channels, 32, 32)).round().clamp(9, 240)


def strength(x, s):
    return torch.full((len(x), 1, 1, 1), float(s))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", train.OPERATIONS)
def test_each_operation_changes_pictures_and_keeps_them_pictures(name, sign, channels):
    x = photographs(channels)
    new = train.OPERATIONS[name](x, strength(x, sign * .3))
    assert new.shape == x.shape and new.min() >= 0 and new.max() <= 255 and torch.equal(new, new.round())
    same = name == "identity" or name == "colour" and channels == 1
    assert all(torch.equal(a, b) == same for a, b in zip(new, x))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name, theirs, s", [
    ("equalize", ImageOps.equalize, 1), ("autocontrast", ImageOps.autocontrast, 1),
    ("posterize", lambda p: ImageOps.posterize(p, 7), .3),
    ("posterize", lambda p: ImageOps.posterize(p, 4), -1),
    ("solarize", lambda p: ImageOps.solarize(p, 178.5), .3),
    ("solarize", lambda p: ImageOps.solarize(p, 0), 1),
    ("brightness", lambda p: ImageEnhance.Brightness(p).enhance(1.27), .3),
    ("brightness", lambda p: ImageEnhance.Brightness(p).enhance(.1), -1),
    ("colour", lambda p: ImageEnhance.Color(p).enhance(.73), -.3),
    ("contrast", lambda p: ImageEnhance.Contrast(p).enhance(1.9), 1),
    ("contrast", lambda p: ImageEnhance.Contrast(p).enhance(.73), -.3),
    ("sharpness", lambda p: ImageEnhance.Sharpness(p).enhance(1.27), .3),
    ("sharpness", lambda p: ImageEnhance.Sharpness(p).enhance(.1), -1)])
def test_operations_on_colours_agree_with_pil(name, theirs, s, channels):
    x = photographs(channels)
    x[0] = 77  # one of a single colour
    x[1, :, :, :16] = 30
    x[2] = x[2].clamp(max=90)
    new = train.OPERATIONS[name](x, strength(x, s))
    for a, b in zip(x, new):
        pixels = a.byte().permute(1, 2, 0).numpy()
        picture = theirs(Image.fromarray(pixels if channels == 3 else pixels[..., 0]))
        true = np.asarray(picture, dtype=np.float32).reshape(32, 32, -1)
        assert abs(b.permute(1, 2, 0).numpy() - true).max() <= 1


def test_geometric_operations_move_pixels_as_far_as_they_say():
    x, op = photographs(3), train.OPERATIONS
    three = strength(x, 3 * 331 / 150 / 32)  # three pixels of 32
    assert torch.equal(op["translate x"](x, three), F.pad(x[..., 3:], (0, 3), value=128))
    assert torch.equal(op["translate x"](x, -three), F.pad(x[..., :-3], (3, 0), value=128))
    assert torch.equal(op["translate y"](x, three), F.pad(x[..., 3:, :], (0, 0, 0, 3), value=128))
    # at magnitude 9 of 30: 0.3 * 150 / 331 of the width are 4 pixels, 9 degrees, a shear by 0.09
    assert (op["translate x"](x, strength(x, .3)) == F.pad(x[..., 4:], (0, 4), value=128)).all()
    assert torch.equal(op["rotate"](x, strength(x, 3)), x.rot90(1, (2, 3)))       # 3 times 30 degrees
    assert torch.equal(op["rotate"](x, strength(x, -3)), x.rot90(-1, (2, 3)))
    for name, y in (("shear x", x), ("shear y", x.transpose(2, 3))):
        new = op[name](x, strength(x, 2 / .3))  # a row moves by twice its distance from the centre
        new = new if name == "shear x" else new.transpose(2, 3)
        for i in range(32):
            by = 2 * i - 31
            row = F.pad(y[..., i, max(by, 0):32 + min(by, 0)], (max(-by, 0), max(by, 0)), value=128)
            assert torch.equal(new[..., i, :], row)


def test_randaugment_gives_every_image_two_operations_of_its_own(monkeypatch):
    signs = []

    def operation(k):
        def apply(x, s):
            signs.extend(s.flatten().tolist())
            return x + k / 64
        return apply
    monkeypatch.setattr(train, "OPERATIONS", {str(k): operation(k) for k in range(14)})
    level = torch.arange(140).float()
    x = (level / 127.5 - 1)[:, None, None, None].expand(-1, 3, 4, 4)
    new = ((train.rand(x) + 1) * 127.5 - level[:, None, None, None]) * 64  # the sum of two numbers
    sums = new[:, 0, 0, 0].round()
    assert (new - sums[:, None, None, None]).abs().max() < .01  # each at its place, all its pixels
    assert sums.sum() == 2 * 10 * sum(range(14)) and sums.min() >= 0 and sums.max() <= 26
    assert 15 < sums.unique().numel() and len(signs) == 280
    assert set(np.round(signs, 6)) == {-.3, .3} and 100 < sum(s > 0 for s in signs) < 180
    torch.manual_seed(5)
    first = train.rand(x)
    torch.manual_seed(5)
    assert torch.equal(train.rand(x), first) and not torch.equal(train.rand(x), first)


@pytest.mark.parametrize("n", [1, 5, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_batches_are_still_images(n, channels):
    x = photographs(channels).repeat(8, 1, 1, 1)[:n] / 127.5 - 1
    for name, change in train.AUGMENTATIONS.items():
        new = change(x)
        assert new.shape == x.shape and new.dtype == x.dtype and new.min() >= -1 and new.max() <= 1, name
    small = train.rand(x[..., :8, :8])
    assert small.shape == (n, channels, 8, 8) and small.isfinite().all()
    assert list(train.augmentation(train.ImageTraining(augment="flip,rand"))) == ["rand", "flip"]


# -----------------------------------------------------------------------------------------------------------
# The paper's settings

AR = dict(n_layer=12, n_blocks=4, n_embd=768, n_head=12, seq_len=256, batch_size=256, epochs=10, lr=3e-4,
          warmup=2500, gamma=.1, tokenizer="gpt2")
DIT = dict(n_blocks=3, patch_size=2, batch_size=512, epochs=100, label_drop=.1, guidance=2, gamma=.05,
           euler_steps=50, warmup=0, final_lr=1)
PAPER = {  # typed here from the paper's tables; recurrent's batch, rate and warm-up are our choice
    ("vit", "cifar100"): dict(n_layer=12, n_blocks=3, n_embd=128, n_head=4, patch_size=4, n_mlp=3072,
                              batch_size=128, epochs=500, lr=5e-4, final_lr=.1, warmup=10 * 391, gamma=.05,
                              dropout=.1, augment="crop,flip,rand", data="uoft-cs/cifar100"),
    ("vit", "tiny-imagenet"): dict(n_layer=12, n_blocks=2, n_embd=768, patch_size=4, batch_size=256,
                                   epochs=100, lr=1e-4, gamma=.05, data="zh-plus/tiny-imagenet"),
    ("dit", "cifar10"): dict(DIT, n_layer=12, n_embd=384, n_head=6, lr=1e-4, data="uoft-cs/cifar10"),
    ("dit", "imagenet256"): dict(DIT, n_layer=24, n_embd=1024, n_head=16, lr=5e-5),
    ("mdm", "text8"): dict(n_layer=12, n_blocks=3, n_embd=768, n_head=12, seq_len=256, batch_size=256,
                           epochs=100, lr=3e-4, weight_decay=.03, warmup=2000, gamma=.05, schedule="linear",
                           data="afmck/text8", tokenizer="bytes"),
    ("gpt", "lm1b"): dict(AR, data="dvruette/lm1b"),
    ("gpt", "owt"): dict(AR, seq_len=1024, data="Skylion007/openwebtext"),
    ("recurrent", "lm1b"): dict(n_prelude=2, n_core=4, n_coda=2, n_embd=512, n_head=8, seq_len=256,
                                mean_passes=32, n_passes=32, epochs=15, tokenizer="gpt2",
                                data="dvruette/lm1b", batch_size=256, lr=3e-4, warmup=2500)}


class OneExample:
    """Data of the shapes that a configuration asks for, an example at a time."""

    def batch(self, n, config, index):
        if hasattr(config, "seq_len"):
            return torch.randint(config.vocab_size, (1, config.seq_len + 1))
        size = config.image_size
        return torch.rand(1, config.n_channel, size, size) * 2 - 1, torch.randint(config.n_class, (1,))


@pytest.mark.parametrize("model, name", PAPER)
def test_a_preset_has_the_papers_settings_and_its_full_size_block_takes_updates(model, name):
    module = sys.modules[model]
    assert [n for n in module.PRESETS if n != "default"] == [n for m, n in PAPER if m == model]
    preset = module.PRESETS[name]
    training = train.settle(train.LOADERS[module.DATA].settings, preset)
    config, sampling = (train.settle(cls, preset) for cls in (module.Config, module.Sampling))
    for field, value in PAPER[model, name].items():
        owner = next(o for o in (training, config, sampling) if hasattr(o, field))
        assert getattr(owner, field) == value, field
    facts = dict(vocab_size=256 if name == "text8" else 50257, image_size=64 if "tiny" in name else 32,
                 n_channel=4 if "imagenet256" in name else 3, n_class=1000, data_std=.5)
    config = replace(config, **{k: v for k, v in facts.items() if hasattr(config, k)})
    module.check(config)
    with torch.device("meta"):
        deep, shallow = module.EndToEnd(config), module.control(config)
    assert len(train.layers_of(deep)) == (8 if model == "recurrent" else config.n_layer)
    assert len(train.layers_of(shallow)) == (8 if model == "recurrent" else config.n_layer // config.n_blocks)
    training.warmup, training.weight_decay = 0, 0.0  # or steps were too small, or not the gradient's
    train.choose_speed(training, torch.device("cpu"))
    learner = train.begin(module, config, "block_0", training, torch.device("cpu"))
    before = [p.double().sum().item() for p in learner.net.parameters()]
    for step in range(2):
        assert train.update(learner, OneExample(), config, training, step, 2, torch.device("cpu")).isfinite()
    assert before != [p.double().sum().item() for p in learner.net.parameters()]


# -----------------------------------------------------------------------------------------------------------
# README.md and results/

def test_every_number_in_the_readmes_tables_comes_from_a_log():
    command = [sys.executable, HERE / "results" / "table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_counts_the_lines_of_every_file():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (HERE / "README.md").read_text(), re.M)
    assert len(rows) == 8
    for name, count in rows:
        assert len((HERE / name).read_text().splitlines()) == pytest.approx(int(count), rel=.05), name


# the README's commands run on a copy in which default runs and measurements are short: (file, what, by what)
CUTS = [(f"{model}.py", r'("default": dict\(steps)=\d+', r"\1=2") for model in train.MODELS] + [
    ("gpt.py", "n_windows=256", "n_windows=2"), ("gpt.py", "n=64, length=128", "n=2, length=2"),
    ("train.py", "const=30", "const=2"), ("results/study.py", "n_windows=64", "n_windows=2"),
    ("results/study.py", r"held_out\(64, config\)(.split|\[)", r"held_out(2, config)\1"),
    ("results/study.py", ", 128, euler_steps", ", 2, euler_steps"),
    ("results/study.py", r"\[0\], 64, 192, data", "[0], 64, 66, data")]
SBATCH = """#!/bin/bash
# as Slurm would, one after another
for i in 0 1 2 3; do SLURM_ARRAY_TASK_ID=$i bash -c "${@: -1}" || exit 1; done
"""


def readme_commands():
    """Every command of README.md: lines of its blocks without a language, and what stands within a text."""
    text = re.sub(r"```python.*?```", "", (HERE / "README.md").read_text(), flags=re.S)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if re.match("python |torchrun |for |sbatch |pip ", line)]
    inline = re.sub(r"```.*?```", "", text, flags=re.S)
    return lines + re.findall(r"`(python (?:train|results/\w+)\.py[^`]*)`", inline)


def test_every_command_of_the_readme_works_as_written_and_so_does_its_sixth_model(tmp_path):
    repo, stubs = tmp_path / "repo", tmp_path / "stubs"
    shutil.copytree(HERE, repo, ignore=lambda folder, names: {
        n for n in names if n in (".git", ".venv", "env", "out", "__pycache__", ".pytest_cache") or
        Path(folder).name == "data" and not n.startswith("digits")})
    for file, what, by in CUTS:
        text, n = re.subn(what, by, (repo / file).read_text())
        assert n, f"nothing to cut in {file}: {what}"
        (repo / file).write_text(text)
    sixth = re.search(r"```python\n(\"\"\"Residual MLP.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    assert sixth.count("\n") < 150
    (repo / "mlp.py").write_text(sixth)
    stubs.mkdir()
    for name, script in (("pip", "#!/bin/sh\n"), ("pytest", "#!/bin/sh\n"), ("sbatch", SBATCH)):
        (stubs / name).write_text(script)  # the first two are run by .ci/run
        (stubs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {"PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PET_MASTER_PORT": port,
           "CUDA_VISIBLE_DEVICES": "", **{k: v for k, v in os.environ.items() if k in ("HOME", "TMPDIR")}}

    def run(line):
        done = subprocess.run(["bash", "-c", line], cwd=repo, env=env, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0 and "Traceback" not in said and "error:" not in said, f"{line}\n{said}"
    for model in ("dit", "mdm"):  # what is sampled must have been trained
        run(f"python train.py --model {model} --block all")
    commands = readme_commands()
    assert len(commands) >= 25
    for line in commands:
        run(line)
    rows = json.loads((repo / "out/mlp/eval.json").read_text())["tables"]["held-out images"]
    assert len(rows) == 3 and min(row["accuracy, %"] for row in rows.values()) > 95


def test_the_readmes_pictures_are_there_and_were_drawn_from_these_logs(monkeypatch):
    text = (HERE / "README.md").read_text()
    named = re.findall(r"\]\((results/\S+\.png)\)", text)
    assert len(named) >= 8 and all((HERE / name).exists() for name in named)
    assert not re.search(r"@[A-Z]+@", text + (HERE / "results" / "README.md").read_text())  # yet to be filled
    monkeypatch.syspath_prepend(HERE / "results")
    drawn_from = (HERE / "results" / "images" / "drawn_from").read_text().strip()
    assert importlib.import_module("table").fingerprint() == drawn_from, "python results/figures.py"


def test_the_pictures_are_what_the_logs_say(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the pictures, is not installed here")
    shutil.copytree(HERE / "results", tmp_path / "results")
    shutil.copy(HERE / "diffusion_blocks.py", tmp_path)
    drawn = tmp_path / "results" / "images"
    shutil.rmtree(drawn)
    subprocess.run([sys.executable, tmp_path / "results" / "figures.py"], check=True)
    assert len(list(drawn.glob("*.png"))) == 7
    for path in drawn.glob("*.png"):
        with Image.open(path) as new, Image.open(HERE / "results" / "images" / path.name) as old:
            assert new.size == old.size
            difference = np.abs(np.asarray(new.convert("L"), float) - np.asarray(old.convert("L"), float))
            assert difference.mean() < 1, f"{path.name} is not what the logs say: python results/figures.py"


def test_the_readmes_five_lines_are_the_loss_that_is_trained():
    lines = re.search(r"```python\n(sigma = .*?)```", (HERE / "README.md").read_text(), re.S)[1]
    net = shaken(vit.Block(image_config(vit), 1))
    x, label = image_batch()
    E, y = net.table, net.table[label]

    def prior(x, z, sigma):
        return net.logits(x, z, sigma[:, 0]) - z @ E.T / sigma ** 2
    names = dict(noise=net.noise, b=1, y=y, x=x, E=E, label=label, block=prior, torch=torch, F=F)
    torch.manual_seed(1)
    exec(lines, names)
    torch.manual_seed(1)
    assert names["loss"].item() == pytest.approx(net.loss((x, label)).item(), rel=1e-5)
    sigma = names["sigma"][:, 0]
    torch.testing.assert_close(names["D"], net.denoise(x, names["z"], sigma), rtol=1e-4, atol=1e-5)
