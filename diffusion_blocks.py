"""DiffusionBlocks, the method: noise, its division among blocks, one block's loss, sampling, the bound.

Source: "DiffusionBlocks: Block-wise Neural Network Training via Diffusion Interpretation", arXiv 2506.14202,
with the EDM conventions of Karras et al., arXiv 2206.00364. Everything here is about one equation,

    z = y + sigma * eps,    D_b(z, sigma, x) ~ E[y | z, x]    for sigma in the interval of block b,

with y the target (an image, or the fixed embedding of a label or token), x the condition, and z the only
thing that blocks exchange. Block 0 owns the highest noise, holds the first layers and runs first when
sampling. Masked diffusion is the same method with masks in the place of Gaussian noise: see `Masking`.
"""
import bisect
import functools
import hashlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute


def require(holds, rule, value):
    """Raises ValueError that names the rule and the value which breaks it."""
    if not holds:
        raise ValueError(f"{rule}; got {value}")


def require_finite(settings):
    """Raises ValueError that names a field of a dataclass which is infinite or no number."""
    for name, value in vars(settings).items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{name} must be finite", value)


def split_layers(n_layer, n_blocks, split=""):
    """The layers of every block, a list of ranges: the same number in each, or the sizes in `split`, such as
    "3,6,3". Raises ValueError if they do not fit."""
    sizes = [n_layer // max(1, n_blocks)] * n_blocks
    if split:
        sizes = [int(size) if size.strip().isdigit() else 0 for size in split.split(",")]
    if len(sizes) != n_blocks or sum(sizes) != n_layer or min(sizes, default=0) < 1:
        raise ValueError(f"{n_layer} layers cannot be cut into {n_blocks} blocks {split or 'of one size'}")
    layers = []
    first = 0
    for size in sizes:
        layers.append(range(first, first + size))
        first += size
    return layers


def largest_block(n_layer, n_blocks, split=""):
    """The number of layers of the largest block: what a control of one block's size has."""
    return max(len(layers) for layers in split_layers(n_layer, n_blocks, split))


def seed_of(seed, what):
    """A 63-bit seed from (seed, what) alone: whoever trains block 2, and whenever, draws the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:8], "big") >> 1


def to_device(x, device):
    """x on the device; a copy to CUDA is queued, so that the program does not wait for it as with .to()."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def float64_device(device):
    """Where float64 numbers for a device are computed: on it, so that nothing is copied and a CUDA graph can
    draw them; on the CPU for MPS, which has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def expand(level, like):
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`."""
    return level.view(-1, *[1] * (like.dim() - 1))


# ---- Noise and its division among blocks ------------------------------------------------------------------

class Noise:
    """What both kinds of noise have in common: `boundaries`, the ascending ends of all blocks' intervals."""

    def interval(self, block):
        """(lo, hi) of the noise levels that a block owns; block 0 has the highest."""
        i = self.n_blocks - 1 - block  # boundaries ascend, blocks descend: here, in block_of, and in Masking.widened
        return self.boundaries[i], self.boundaries[i + 1]

    def block_of(self, level):
        """The block that owns a level (a float): lo < level <= hi; the last one owns the lowest end, too."""
        if not self.boundaries[0] <= level <= self.boundaries[-1]:
            raise ValueError(f"no block owns level {level}; they own {self.boundaries[0]} to {self.boundaries[-1]}")
        return self.n_blocks - 1 - bisect.bisect_left(self.boundaries[1:-1], level)


@dataclass
class LogNormal(Noise):
    """Gaussian noise whose level has ln sigma ~ N(p_mean, p_std^2), truncated to [sigma_min, sigma_max].

    Levels are computed in float64: an end that float32 has moved would belong to another block."""
    n_blocks: int = 1           # blocks that the layers are cut into, each trained alone
    p_mean: float = -1.2        # mean of ln sigma in training (EDM; for labels and tokens 1.2 is better)
    p_std: float = 1.2          # its standard deviation (EDM)
    sigma_min: float = 0.002    # lowest noise level (EDM): a unit-norm target can be read off z here
    sigma_max: float = 80.0     # highest (EDM): z tells nothing of the target here; sampling starts here
    sigma_data: float = 0.5     # std of images (EDM); with a Bayes readout it matters to c_in and the edm weight only
    gamma: float = 0.05         # overlap of neighbouring blocks in training (paper: 0.05, 0.1 for text)
    edges: str = "probability"  # probability (paper), uniform in ln sigma, or the inner ends: 0.1,0.7
    weighting: str = "none"     # of the loss at a level: none, as the released code trains, or edm (the paper)

    def __post_init__(self):
        require_finite(self)
        require(0 < self.sigma_min < self.sigma_max, "need 0 < sigma_min < sigma_max",
                f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max}")
        require(self.p_std > 0, "p_std must be above 0", self.p_std)
        require(self.sigma_data > 0, "sigma_data must be above 0", self.sigma_data)
        require(self.n_blocks >= 1, "n_blocks must be at least 1", self.n_blocks)
        require(0 <= self.gamma <= 10, "gamma must be 0 to 10", self.gamma)
        require(self.weighting in ("none", "edm"), "weighting must be none or edm", self.weighting)
        self.refuse_tail(self.sigma_min, self.sigma_max)
        self.boundaries = [self.sigma_min, *self.inner_boundaries(), self.sigma_max]
        rising = all(a < b for a, b in zip(self.boundaries, self.boundaries[1:]))
        require(len(self.boundaries) == self.n_blocks + 1 and rising,
                f"edges must be probability, uniform or {self.n_blocks - 1} rising ends: 0.1,0.7", self.edges)
        for lo, hi in zip(self.boundaries, self.boundaries[1:]):
            self.refuse_tail(lo, hi)

    def inner_boundaries(self):
        """Where one block's interval ends and another's begins, as `edges` says."""
        n = self.n_blocks
        if self.edges == "probability":  # every block gets the same part of the draws (paper, section 3.3)
            return self.icdf([i / n for i in range(1, n)]).tolist()
        if self.edges == "uniform":
            ratio = self.sigma_max / self.sigma_min
            return [self.sigma_min * ratio ** (i / n) for i in range(1, n)]
        try:
            return [float(end) for end in self.edges.split(",")]
        except ValueError:
            return [math.nan]  # no numbers: refused, as it does not rise

    def refuse_tail(self, lo, hi):
        """Raises ValueError if [lo, hi] is so far in the normal distribution's tail that float64 has 0 there."""
        x_lo, x_hi = ((math.log(sigma) - self.p_mean) / self.p_std for sigma in (lo, hi))
        require(x_lo <= 37 and x_hi >= -37, f"sigma {lo:.3g} to {hi:.3g} is more than 37 p_std away from p_mean, so "
                f"no level is ever drawn there; choose other values", f"p_mean {self.p_mean}, p_std {self.p_std}")

    def icdf(self, q, lo=None, hi=None):
        """The sigma, float64, below which a part q of the draws in [lo, hi] (all) lies. q: numbers, or a float64
        tensor of any shape, on whose device the sigma is."""
        if not torch.is_tensor(q):
            q = torch.tensor(q, dtype=torch.float64, device="cpu")
        ends = torch.tensor([lo or self.sigma_min, hi or self.sigma_max], dtype=torch.float64, device="cpu")
        x = (ends.log() - self.p_mean) / self.p_std
        # Near 1 float64 cannot tell probabilities apart (1 - 1e-20 is 1), near 0 it can. So an interval above the
        # median is mirrored to below it (sign -1), and mirrored back after ndtri.
        sign = -1.0 if x[0] > 0 else 1.0
        p_lo, p_hi = torch.erfc(-sign * x / math.sqrt(2)) / 2  # normal CDF of sign * x; unlike ndtr, exact in the tail
        x = sign * torch.special.ndtri(p_lo + q * (p_hi - p_lo))
        return torch.exp(self.p_mean + self.p_std * x).clamp(*ends.tolist())

    def widened(self, block):
        """(lo, hi) that a block is trained on: its interval and an overlap on either side."""
        lo, hi = self.interval(block)
        a = (hi / lo) ** self.gamma
        return max(lo / a, self.sigma_min), min(hi * a, self.sigma_max)

    def sample(self, block, n, device="cpu"):
        """(n,) levels to train a block on, stratified: its interval is cut into n equally likely parts, one
        draw from each, so that every batch covers it."""
        exact = float64_device(device)
        u = (torch.arange(n, device=exact) + torch.rand(n, dtype=torch.float64, device=exact)) / n
        return self.icdf(u, *self.widened(block)).float().to(device)

    def steps(self, n=0):
        """(n,) float64 levels of a sampler, from sigma_max down to sigma_min at equal quantiles of EDM's noise,
        whatever noise the blocks are trained with. So with p_mean 1.2 a short chain runs the first and the last
        block only. n = 0: max(n_blocks + 1, 4) levels."""
        n = n or max(self.n_blocks + 1, 4)
        require(n >= 2, "a sampler needs at least 2 noise levels", n)
        # i / (n - 1) is correctly rounded, so that a level which is an end of a block has the same bits there
        q = [i / (n - 1) for i in range(1, n - 1)]
        inner = LogNormal().icdf(q, self.sigma_min, self.sigma_max).tolist()
        return torch.tensor([self.sigma_max, *inner[::-1], self.sigma_min], dtype=torch.float64)

    def corrupt(self, y, sigma):
        """z = y + sigma * eps, for y (B, ...) and sigma (B,)."""
        return y + expand(sigma, y) * torch.randn_like(y)

    def weight(self, sigma):
        """The weight of the loss at levels sigma, of the same shape."""
        if self.weighting == "edm":
            return (sigma ** 2 + self.sigma_data ** 2) / (sigma * self.sigma_data) ** 2  # EDM table 1
        return torch.ones_like(sigma)

    def input_scales(self, sigma):
        """c_in, c_noise of sigma's shape: a network F reads c_in z, of variance 1 for y of std sigma_data, and c_noise."""
        c_in = 1 / (sigma ** 2 + self.sigma_data ** 2).sqrt()    # EDM table 1
        c_noise = sigma.log() / 4                                # EDM table 1
        return c_in, c_noise

    def output_scales(self, sigma):
        """c_skip, c_out of sigma's shape, for D = c_skip z + c_out F(c_in z, c_noise)."""
        total = sigma ** 2 + self.sigma_data ** 2
        c_skip = self.sigma_data ** 2 / total                    # EDM table 1
        c_out = sigma * self.sigma_data / total.sqrt()           # EDM table 1; weight * c_out^2 = 1
        return c_skip, c_out

    def bound_levels(self, block, u):
        """(sigma, importance), float64, at parts u (n,) of a block's interval: the mean of importance *
        E|y - D|^2 over u is the integral of sigma^-3 E|y - D|^2 d sigma.

        ln sigma is drawn from p, the mean of a uniform density and of EDM's: less variance than with either. The
        integral over ln sigma of sigma^-2 E|y - D|^2 is the mean of sigma^-2 / p(ln sigma) * E|y - D|^2."""
        edm = LogNormal()
        lo, hi = self.interval(block)
        uniform = lo * (2 * u * math.log(hi / lo)).exp()        # u below 1/2: equal steps of ln sigma
        sigma = torch.where(u < 0.5, uniform, edm.icdf(2 * u % 1, lo, hi))
        normal = torch.distributions.Normal(edm.p_mean, edm.p_std)
        below, above = normal.cdf(torch.tensor([lo, hi], dtype=torch.float64).log())
        p_uniform = 1 / math.log(hi / lo)
        p_edm = normal.log_prob(sigma.log()).exp() / (above - below)
        return sigma, 2 / (p_uniform + p_edm) / sigma ** 2


@dataclass
class Masking(Noise):
    """Mask noise: at time t in [0, 1] a token is still visible with probability alpha(t), else it is a mask.

    As LogNormal, with t in the place of sigma: block 0 owns the times near 1, where nearly all is
    masked. alpha keeps a distance eps from 0 and 1 (MD4), or the weight would have no bound at t = 0.

    Few masks teach little, and nearly all masked teaches little, too (BD3-LM, arXiv 2503.09573). So training may be
    limited to times from t_min to t_max. What a block owns when sampling reaches on to 0 and 1."""
    n_blocks: int = 1           # blocks that the layers are cut into, each trained alone
    gamma: float = 0.05         # overlap of neighbouring blocks in training, a part of its alpha (paper)
    schedule: str = "linear"    # alpha: linear, 1 - t (paper), or cosine, 1 - cos(pi/2 (1 - t)) (MD4)
    eps: float = 1e-4           # alpha(0) = 1 - eps and alpha(1) = eps (MD4)
    t_min: float = 0.0          # training is at times from here
    t_max: float = 1.0          # to here, cut into equal steps of alpha, one for each block

    def __post_init__(self):
        require_finite(self)
        require(self.schedule in ("linear", "cosine"), "schedule must be linear or cosine", self.schedule)
        require(self.n_blocks >= 1, "n_blocks must be at least 1", self.n_blocks)
        require(0 <= self.gamma <= 10, "gamma must be 0 to 10", self.gamma)
        require(0 < self.eps < 0.5, "eps must be above 0 and below 0.5", self.eps)
        times, n = (self.t_min, self.t_max), self.n_blocks
        require(0 <= self.t_min < self.t_max <= 1, "need 0 <= t_min < t_max <= 1", times)
        # 1 - (n - i) / n, not i / n: as `widened` computes it, so that both have the same bits
        inner = [self.training_time(1 - (n - i) / n) for i in range(1, n)]
        self.boundaries = [0.0, *inner, 1.0]

    def mask_probability(self, t):
        """1 - alpha(t), of t's shape."""
        plain = t if self.schedule == "linear" else torch.sin(math.pi / 2 * t)  # = cos(pi/2 (1 - t))
        return (1 - 2 * self.eps) * plain + self.eps

    def time_of(self, masked):
        """The time at which a token is masked with probability `masked`, a float: 0 to 1."""
        return self._inverse(min(1.0, max(0.0, (masked - self.eps) / (1 - 2 * self.eps))))

    def training_time(self, fraction):
        """The time from t_min to t_max at which alpha has fallen by this fraction of its fall between them."""
        lo, hi = self.t_min, self.t_max
        if self.schedule == "cosine":
            lo, hi = math.sin(math.pi / 2 * lo), math.sin(math.pi / 2 * hi)
        return self._inverse(lo + (hi - lo) * fraction)

    def _inverse(self, fraction):
        """The time at which alpha has fallen by this fraction of its fall from 1 - eps to eps."""
        return fraction if self.schedule == "linear" else 2 / math.pi * math.asin(fraction)

    def widened(self, block):
        """(lo, hi) that a block is trained on: its step of the training's times and an overlap on either side."""
        lo = max(0.0, (block - self.gamma) / self.n_blocks)      # in alpha
        hi = min(1.0, (block + 1 + self.gamma) / self.n_blocks)
        return self.training_time(1 - hi), self.training_time(1 - lo)

    def sample(self, block, n, device="cpu"):
        """(n,) times to train a block on: one draw, repeated at n equal distances (MD4: antithetic)."""
        lo, hi = self.widened(block)
        exact = float64_device(device)
        u = (torch.rand(1, dtype=torch.float64, device=exact) + torch.arange(n, device=exact)) / n
        return (lo + u * (hi - lo)).float().to(device)

    def times(self, n_moves, grid="uniform", start=1.0):
        """(n_moves + 1,) float64 times between a sampler's moves, from start to 0; cosine: most of them near 1."""
        t = torch.linspace(1, 0, n_moves + 1, dtype=torch.float64)
        if grid == "cosine":
            t = torch.sin(math.pi / 2 * t)
        return start * t

    def corrupt(self, y, t, mask_id):
        """Token ids y (B, ...) with the id of the mask in the place of some, t (B,)."""
        hidden = torch.rand(y.shape, device=y.device) < expand(self.mask_probability(t), y)
        return y.masked_fill(hidden, mask_id)

    def weight(self, t):
        """-alpha'(t) / (1 - alpha(t)), of t's shape, for a sum of cross-entropies over the masked tokens."""
        rate = torch.ones_like(t) if self.schedule == "linear" else math.pi / 2 * torch.cos(math.pi / 2 * t)
        return (1 - 2 * self.eps) * rate / self.mask_probability(t)

    def bound_levels(self, block, u):
        """(t, importance), float64, at parts u (n,) of a block's interval: the mean of importance * cross-entropy
        over u is the integral of weight(t) * cross-entropy dt."""
        lo, hi = self.interval(block)
        t = lo + u * (hi - lo)
        return t, self.weight(t) * (hi - lo)


# ---- Training one block -----------------------------------------------------------------------------------

def score_loss(error, level, noise):
    """The loss of one block: the mean of weight(level) * error(level) over a batch.

    level (B,): noise levels, drawn by noise.sample(block, B). error (B,): what the model got wrong at these levels,
    a squared error or nats, one number an example. Raises ValueError if the shapes differ."""
    if error.shape != level.shape:  # (B,) * (B, 1) would be (B, B), and the weight averaged away
        raise ValueError(f"score_loss needs one error for each level: errors have the shape {tuple(error.shape)}, "
                         f"levels {tuple(level.shape)}; take a mean, such as error.mean(1)")
    return (noise.weight(level) * error).mean()


# ---- Labels and tokens: the space of y that all blocks agree on, and how logits are read from it ----------

@functools.lru_cache(maxsize=2)  # on the CPU, blocks in one process share the tensor
def target_table(n_class, dim, seed):
    """(n_class, dim) float32 unit-norm rows, never trained: orthonormal if n_class <= dim, else Gaussian.
    Drawn on the CPU in float64 and then rounded: blocks trained on different machines have to agree."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_class, dim, generator=generator, dtype=torch.float64, device="cpu")
    if n_class <= dim:
        q, r = torch.linalg.qr(rows.T)        # (dim, n_class)
        rows = (q * r.diagonal().sign()).T    # with a positive diagonal the decomposition is unique
    return F.normalize(rows, dim=-1).float()


def bayes_logits(prior, z, sigma, table):
    """Logits of p(y | z, x) from the network's prior logits (B, ..., V), for z (B, ..., C), sigma (B,) and
    table (V, C).

    Bayes' rule: log p(z | y) is -|z - E_y|^2 / 2 sigma^2, and with rows of equal norm only z.E_y / sigma^2
    depends on y. It is to cross-entropy what c_skip is to squared error. In float32: the term reaches 1e5."""
    with torch.autocast(z.device.type, enabled=False):
        return prior.float() + (z.float() / expand(sigma, z) ** 2) @ table.T        # (B, ..., V)


def edm_logits(f, z, sigma, table, noise, scale):
    """The paper's logits scale * D @ E^T, with D = c_skip z + c_out f; f and z (B, ..., C), sigma (B,).
    The scale is learned: the product of two unit vectors alone cannot make a sharp softmax."""
    c_skip, c_out = (expand(c, z) for c in noise.output_scales(sigma))
    with torch.autocast(z.device.type, enabled=False):
        return scale * (c_skip * z + c_out * f.float()) @ table.T   # (B, ..., V)


def cross_entropy(logits, target):
    """Logits (..., V), target (...) -> (...) nats."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view_as(target)


# Logits of one chunk of tokens: 64 MB of float32, and three such tensors while they become gradients.
# Measured on a CPU with gpt's preset lm1b: twice as many are 4 % faster and need 200 MB more; half as many
# are 4 % slower, since every chunk adds to the gradient of the whole head, and save 100 MB.
MAX_LOGITS = 2 ** 24


def token_losses(readout, n_class, target, *columns):
    """Cross-entropy (B, T), in nats, of tokens target (B, T). readout(*columns) -> logits (B, T, n_class),
    for columns (B, T, C) or any piece of them along T.

    For training: the logits of a large vocabulary would need more memory than all else. If they are more than
    MAX_LOGITS, they are computed for a chunk of tokens at a time, and again in the backward pass."""
    def nats(target, *columns):
        return cross_entropy(readout(*columns), target)
    n = max(1, MAX_LOGITS // (len(target) * n_class))  # tokens of each sequence in a chunk
    if n >= target.shape[1]:
        return nats(target, *columns)
    losses, device = [], target.device.type
    # no cache: chunks that share one bf16 copy of the head would add up their gradients in bf16
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
        for chunk in zip(*(column.split(n, dim=1) for column in (target, *columns))):
            losses.append(recompute(nats, *chunk, use_reentrant=False, preserve_rng_state=False))  # (B, n)
    return torch.cat(losses, dim=1)


# ---- Sampling and likelihood: the blocks put together -----------------------------------------------------

def euler(denoise, z, steps):
    """Probability-flow ODE from z at steps[0] down to steps[-1]; n levels are n evaluations and n - 1 moves.

    denoise(z, sigma) -> D of z's shape; sigma is a float. Start from sigma_max * noise for a sample, or from
    0, the mean of the prior, for (mostly) the most probable outcome. Returns D at the last level. The sign is
    the released code's; the paper's printed eqs. 3-5 have the opposite one."""
    steps = steps.tolist()
    for sigma, sigma_next in zip(steps[:-1], steps[1:]):
        d = (z - denoise(z, sigma)) / sigma                      # dz / d sigma
        z = z + (sigma_next - sigma) * d
    return denoise(z, steps[-1])


def decode_labels(logits, shape, table, noise, steps, temperature=0.0):
    """Classes, of the given shape, that a chain over the levels `steps` ends at; each runs its owner only.

    logits(block, z, sigma) -> (*shape, V), for z (*shape, C) and sigma (shape[0],). The chain starts from
    noise of scale temperature * steps[0]."""
    z = temperature * steps[0].item() * torch.randn(*shape, table.shape[1], device=table.device)

    def denoise(z, sigma):
        level = torch.full((len(z),), sigma, device=z.device)
        return logits(noise.block_of(sigma), z, level).softmax(-1) @ table     # E[y | z, x], (*shape, C)
    return (euler(denoise, z, steps) @ table.T).argmax(-1)


def average(logits, shape, table, noise, blocks):
    """log p(y | x), (*shape, V): the mean of log p_b(y | x, z = 0) over blocks (a list), renormalised.
    Rows of the table have one norm, so z = 0 is as likely under each: there an exact posterior is p(y | x).
    A block is asked at the median of its own interval. logits: as in `decode_labels`."""
    z = torch.zeros(*shape, table.shape[1], device=table.device)
    total = 0.0
    for b in blocks:
        sigma = noise.icdf(0.5, *noise.interval(b)).float().to(z.device).expand(len(z))
        total = total + logits(b, z, sigma).log_softmax(-1)
    return (total / len(blocks)).log_softmax(-1)


def bound_draws(noise, block, y, n=4):
    """Yields n times (level, importance), (B,) each, to estimate a block's share of the bound on -log p(y | x).

    The share, in nats an example, is the mean over all draws of importance * error, with error(z, level) (B,) at z =
    noise.corrupt(y, level): for Gaussian noise |y - D|^2, for masks the cross-entropy, both summed over all that an
    example is scored on. Stratified and unbiased. All shares and the ends add up to the bound of the
    continuous-time model, which an exact posterior attains (VDM, arXiv 2107.00630; MD4)."""
    size = len(y)
    for k in range(n):
        u = (k + (torch.randperm(size) + torch.rand(size, dtype=torch.float64)) / size) / n
        level, importance = noise.bound_levels(block, u)
        yield level.float().to(y.device), importance.float().to(y.device)


@dataclass
class LabelScores:
    """How good blocks are on labels or tokens, in nats summed over what was scored; scores of batches add up."""
    shares: list        # of the bound on -log p, for each block
    ends: float = 0.0   # the bound's terms at the lowest and the highest noise level
    alone: list = field(default_factory=list)  # cross-entropy of each block, asked at z = 0
    averaged: float = 0.0  # cross-entropy of their average

    @classmethod
    def zero(cls, n_blocks):
        return cls(shares=[0.0] * n_blocks, alone=[0.0] * n_blocks)

    def __add__(self, other):
        shares = [a + b for a, b in zip(self.shares, other.shares)]
        alone = [a + b for a, b in zip(self.alone, other.alone)]
        return LabelScores(shares, self.ends + other.ends, alone, self.averaged + other.averaged)

    def tables(self, scale, unit):
        """(rows of scores, rows of the bound's shares), {row: {unit: value}}; scale: from nats to the unit."""
        shares = {f"block {b}": {unit: scale * nats} for b, nats in enumerate(self.shares)}
        shares["ends"] = {unit: scale * self.ends}
        scores = {}
        if len(self.alone) > 1:
            scores["blocks, averaged"] = {unit: scale * self.averaged}
        for b, nats in enumerate(self.alone):
            scores[f"block {b} alone"] = {unit: scale * nats}
        scores["blocks, bound"] = {unit: scale * (sum(self.shares) + self.ends)}
        return scores, shares


def score_labels(logits, target, table, noise, n=8):
    """LabelScores of blocks on targets (B, ...). logits: as in `decode_labels`; n: levels of each block's share."""
    y = table[target]                                                        # (B, ..., C)
    n_blocks = noise.n_blocks
    shares = []
    for b in range(n_blocks):
        total = 0.0
        for sigma, importance in bound_draws(noise, b, y, n):
            guess = logits(b, noise.corrupt(y, sigma), sigma).softmax(-1) @ table        # (B, ..., C)
            error = (y - guess).pow(2).flatten(1).sum(1)                                 # (B,)
            total += (importance * error).mean().item()
        shares.append(len(y) * (total / n))

    # the terms at the ends: E[-log p(y | z at sigma_min, x)], and the KL of z at sigma_max against N(0, sigma_max^2)
    lowest = torch.full((len(y),), noise.sigma_min, device=y.device)
    nats = cross_entropy(logits(n_blocks - 1, noise.corrupt(y, lowest), lowest), target)
    reconstruction = nats.view(len(y), -1).sum(1).mean().item()
    prior = (y.flatten(1) ** 2).sum(1).mean().item() / (2 * noise.sigma_max ** 2)

    log_p = [average(logits, target.shape, table, noise, [b]) for b in range(n_blocks)]
    alone = [cross_entropy(log_p_b, target).sum().item() for log_p_b in log_p]
    averaged = cross_entropy(sum(log_p) / n_blocks, target).sum().item()
    return LabelScores(shares, len(y) * (reconstruction + prior), alone, averaged)


def windows_at_once(n_class, seq_len, most):
    """How many windows are scored together: as many as have 2^27 logits (512 MB of float32), and at most `most`."""
    return max(1, min(most, 2 ** 27 // (n_class * seq_len)))
