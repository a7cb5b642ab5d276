"""DiffusionBlocks, the method: noise levels, their division among blocks, one block's loss, sampling, the
bound.

Source: "DiffusionBlocks: Block-wise Neural Network Training via Diffusion Interpretation", arXiv 2506.14202,
with the EDM conventions of Karras et al., arXiv 2206.00364. Everything here is about one equation,

    z = y + sigma * eps,    D_b(z, sigma, x) ~ E[y | z, x]    for sigma in the interval of block b,

with y the target (an image, or the fixed embedding of a label or token), x the condition, and z the only
thing that blocks exchange. Block 0 owns the highest noise, holds the first layers and runs first at
inference. Masked diffusion is the same method with masks in the place of Gaussian noise: `Masking`. """
import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def split_layers(n_layer, n_blocks, split=""):
    """Layer numbers of every block, a list of ranges: an even division, or the sizes in `split`, such as
    "3,6,3".

    Raises ValueError, with the choices that fit, if n_blocks does not divide n_layer or the sizes are
    wrong."""
    if split:
        sizes = [int(s) if s.strip().isdigit() else 0 for s in split.split(",")]
        if len(sizes) != n_blocks or sum(sizes) != n_layer or min(sizes) < 1:
            raise ValueError(f"layer split {split} does not give {n_layer} layers to {n_blocks} blocks; "
                             f"name {n_blocks} positive sizes that add up to {n_layer}")
    else:
        if n_blocks < 1 or n_layer % n_blocks:
            fit = [b for b in range(1, n_layer + 1) if n_layer % b == 0]
            raise ValueError(f"{n_layer} layers cannot be cut evenly into {n_blocks} blocks; n_blocks that "
                             f"fit: {', '.join(map(str, fit))}; or give the sizes as a layer split")
        sizes = [n_layer // n_blocks] * n_blocks
    ends = [sum(sizes[:i + 1]) for i in range(n_blocks)]
    return [range(end - size, end) for size, end in zip(sizes, ends)]


def route(level, edges):
    """The block that owns a noise level (lo < level <= hi; the last owns the lowest end too), from all
    blocks' ascending ends: the only router there is.

    A float gives an int, a tensor an int64 tensor of its shape. Raises ValueError outside the range."""
    levels = torch.as_tensor(level, dtype=torch.float64)
    if (levels < edges[0]).any() or (levels > edges[-1]).any():
        raise ValueError(f"level outside [{edges[0]}, {edges[-1]}], which no block owns")
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    block = len(edges) - 2 - torch.bucketize(levels.cpu(), inner)  # ends ascend, blocks descend
    return block if torch.is_tensor(level) else block.item()


# -----------------------------------------------------------------------------------------------------------
# Gaussian noise

@dataclass
class LogNormal:
    """Gaussian noise whose level has ln sigma ~ N(p_mean, p_std^2), truncated to [sigma_min, sigma_max].

    Levels are computed in float64 on the CPU: an end that float32 has moved would belong to another block."""
    n_blocks: int = 1
    p_mean: float = -1.2        # mean of ln sigma in training (EDM table 1); higher: noisier inputs
    p_std: float = 1.2          # its standard deviation (EDM table 1)
    sigma_min: float = 0.002    # lowest noise level (EDM): a unit-norm target can be read off z here
    sigma_max: float = 80.0     # highest (EDM): nothing of the target can be seen here; sampling starts here
    sigma_data: float = 0.5     # std of the target's entries, for the EDM preconditioning and weight
    gamma: float = 0.05         # overlap of neighbouring blocks in training (paper: .05; .1 for text)
    edges: str = "probability"  # "probability" (paper), "uniform" in ln sigma, or all ends: "0.002,0.3,80"
    weighting: str = "none"     # "none" (cross-entropy) or "edm" (squared error)

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not (self.p_std > 0 and self.sigma_data > 0 and self.gamma >= 0):
            raise ValueError("need p_std > 0, sigma_data > 0 and gamma >= 0")
        if self.weighting not in ("none", "edm"):
            raise ValueError(f"unknown weighting {self.weighting!r}; choose none or edm")
        # i / n is correctly rounded: a quantile that edges and a sampling grid share has equal bits in both
        quantiles = [i / self.n_blocks for i in range(self.n_blocks + 1)]
        if self.edges == "probability":
            with torch.device("cpu"):  # also where a network is built on another device, or on "meta"
                self._edges = self.quantile(quantiles).tolist()
            if not all(a < b for a, b in zip(self._edges, self._edges[1:])):
                raise ValueError(f"p_mean {self.p_mean} and p_std {self.p_std} leave a block no levels "
                                 f"between {self.sigma_min} and {self.sigma_max}")
        elif self.edges == "uniform":
            ratio = self.sigma_max / self.sigma_min
            inner = [self.sigma_min * ratio ** q for q in quantiles[1:-1]]
            self._edges = [self.sigma_min, *inner, self.sigma_max]
        else:
            self._edges = self._parse(self.edges)

    def _parse(self, text):
        try:
            ends = [float(s) for s in text.split(",")]
        except ValueError as e:
            raise ValueError(f"edges {text!r}: give probability, uniform or ends like 0.002,0.3,80") from e
        if len(ends) != self.n_blocks + 1 or any(a >= b for a, b in zip(ends, ends[1:])):
            raise ValueError(f"edges {text}: {self.n_blocks} blocks need {self.n_blocks + 1} ascending ends")
        if ends[0] != self.sigma_min or ends[-1] != self.sigma_max:
            raise ValueError(f"edges {text} must begin at sigma_min {self.sigma_min} and end at sigma_max "
                             f"{self.sigma_max}")
        return ends

    def cdf(self, sigma):
        """F(sigma), the truncated log-normal distribution function; any shape, float64."""
        def normal_cdf(s):
            s = torch.as_tensor(s, dtype=torch.float64)
            return torch.special.ndtr((s.log() - self.p_mean) / self.p_std)
        lo, hi = normal_cdf(self.sigma_min), normal_cdf(self.sigma_max)
        return (normal_cdf(sigma) - lo) / (hi - lo)

    def icdf(self, q):
        """The sigma with F(sigma) = q: exp(p_mean + p_std * Phi^-1(q')), q' linear in q; float64."""
        q = torch.as_tensor(q, dtype=torch.float64)
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)
        lo, hi = torch.special.ndtr((ends.log() - self.p_mean) / self.p_std)
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(lo + q * (hi - lo)))
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def quantile(self, q):
        """icdf of a list of quantiles from 0 to 1 with both ends exact, which exp(ln 80) is not."""
        sigma = self.icdf(q)
        sigma[0], sigma[-1] = self.sigma_min, self.sigma_max
        return sigma

    def interval(self, block, overlap=False):
        """(lo, hi) of a block as floats; block 0 is the highest. With overlap: as widened for training."""
        i = self.n_blocks - 1 - block  # edges ascend, blocks descend: this line and route alone know it
        lo, hi = self._edges[i], self._edges[i + 1]
        if overlap:
            a = (hi / lo) ** self.gamma
            lo, hi = max(lo / a, self.sigma_min), min(hi * a, self.sigma_max)
        return lo, hi

    def block_of(self, sigma):
        """The block that owns sigma: see `route`."""
        return route(sigma, self._edges)

    def sample(self, block, n, device="cpu"):
        """(n,) levels for training a block: the log-normal within its widened interval, one draw per n-th of
        it."""
        q_lo, q_hi = self.cdf(self.interval(block, overlap=True)).tolist()
        # stratified: a batch covers the interval
        u = (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n
        return send(self.icdf(q_lo + u * (q_hi - q_lo)).float(), device)

    def steps(self, n):
        """(n,) float64, from sigma_max down to sigma_min at equal quantiles: the sampler's grid, not the
        edges."""
        if n < 2:
            raise ValueError(f"a sampling grid needs at least 2 levels, got {n}")
        return self.quantile([i / (n - 1) for i in range(n)]).flip(0)

    def edm_steps(self, n, rho=7.0):
        """(n,) float64, from sigma_max to sigma_min at equal steps of sigma^(1/rho): the grid for `heun`.

        On `steps` the first move divides sigma by 20 or more, which a mean of two slopes does not survive."""
        lo, hi = self.sigma_min ** (1 / rho), self.sigma_max ** (1 / rho)
        sigma = torch.linspace(hi, lo, n, dtype=torch.float64) ** rho        # EDM table 1
        sigma[0], sigma[-1] = self.sigma_max, self.sigma_min
        return sigma

    def corrupt(self, y, sigma):
        """z = y + sigma * eps, for y (B, ...) and sigma (B,)."""
        return y + expand(sigma, y) * torch.randn_like(y)

    def weight(self, sigma):
        """The loss weight at each level, of sigma's shape (EDM table 1: (s^2 + sd^2) / (s * sd)^2)."""
        if self.weighting == "none":
            return torch.ones_like(sigma)
        return (sigma ** 2 + self.sigma_data ** 2) / (sigma * self.sigma_data) ** 2

    def precondition(self, sigma):
        """c_skip, c_out, c_in, c_noise, each of sigma's shape, for D = c_skip z + c_out F(c_in z,
        c_noise)."""
        s2, d2 = sigma ** 2, self.sigma_data ** 2
        c_skip = d2 / (s2 + d2)                                  # EDM table 1
        c_out = sigma * self.sigma_data / (s2 + d2).sqrt()       # EDM table 1; weight * c_out^2 = 1
        c_in = 1 / (s2 + d2).sqrt()                              # EDM table 1; c_in * z has unit variance
        c_noise = sigma.log() / 4                                # EDM table 1
        return c_skip, c_out, c_in, c_noise


# -----------------------------------------------------------------------------------------------------------
# Mask noise

@dataclass
class Masking:
    """Mask noise: at time t in [0, 1] a token is still visible with probability alpha(t), else a mask.

    The same few methods as LogNormal, with t in the place of sigma: block 0 owns the times near 1, where
    nearly all is masked. alpha keeps eps away from 0 and 1 (MD4), or the weight would have no bound at 0."""
    n_blocks: int = 1
    mask_id: int = 0            # the token that stands for a mask; none of the text's own
    gamma: float = 0.05         # overlap of neighbouring blocks in training, as a part of a block's alpha
    schedule: str = "linear"    # of alpha: "linear" 1 - t (paper), or "cosine" 1 - cos(pi/2 (1 - t)) (MD4)
    eps: float = 1e-4           # alpha(0) = 1 - eps and alpha(1) = eps (MD4)

    def __post_init__(self):
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}; choose linear or cosine")
        if self.n_blocks < 1 or not (self.gamma >= 0 and 0 < self.eps < 0.5):
            raise ValueError("need n_blocks of at least 1, gamma >= 0 and 0 < eps < 0.5")

    def hidden(self, t):
        """1 - alpha(t), the probability that a token is masked at times t (a tensor), of t's shape."""
        plain = t if self.schedule == "linear" else torch.sin(math.pi / 2 * t)  # = cos(pi/2 (1 - t))
        return (1 - 2 * self.eps) * plain + self.eps

    def interval(self, block, overlap=False):
        """(lo, hi) of a block in t, at equal steps of alpha; block 0 ends at 1. Overlap: as in training."""
        wide = self.gamma if overlap else 0.0
        alphas = max(0.0, (block - wide) / self.n_blocks), min(1.0, (block + 1 + wide) / self.n_blocks)
        hi, lo = (1 - a if self.schedule == "linear" else 2 / math.pi * math.asin(1 - a) for a in alphas)
        return lo, hi

    def block_of(self, t):
        """The block that owns t: see `route`."""
        return route(t, [self.interval(b)[0] for b in range(self.n_blocks)][::-1] + [1.0])

    def sample(self, block, n, device="cpu"):
        """(n,) times for training a block: uniform in its widened interval, one in every n-th of it, all at
        the same place there (MD4's antithetic draws)."""
        lo, hi = self.interval(block, overlap=True)
        u = (torch.rand(1, dtype=torch.float64) + torch.arange(n)) / n
        return send((lo + u * (hi - lo)).float(), device)

    def steps(self, n, grid="uniform"):
        """(n + 1,) float64, from 1 down to 0: the sampler's grid, n moves; "cosine": most of them near 1."""
        t = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        return t if grid == "uniform" else torch.sin(math.pi / 2 * t)

    def corrupt(self, y, t):
        """Token ids y (B, ...) with masks in the place of some, t (B,)."""
        return y.masked_fill(torch.rand(y.shape, device=y.device) < expand(self.hidden(t), y), self.mask_id)

    def weight(self, t):
        """-alpha'(t) / (1 - alpha(t)), of t's shape, for a sum of cross-entropies over the masked tokens."""
        rate = torch.ones_like(t) if self.schedule == "linear" else math.pi / 2 * torch.cos(math.pi / 2 * t)
        return (1 - 2 * self.eps) * rate / self.hidden(t)


def send(x, device):
    """To the device, without waiting for it as .to() would."""
    cuda = torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if cuda else x.to(device)


def expand(level, like):
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`."""
    return level.view(-1, *[1] * (like.dim() - 1))


# -----------------------------------------------------------------------------------------------------------
# Training one block

def score_loss(error, y, noise, block):
    """The loss of one block: E over its own noise levels of weight(level) * error(corrupted y, level).

    y (B, ...) is the clean target; error(z, level) -> (B,) is the model's, squared error or cross-entropy in
    nats."""
    level = noise.sample(block, len(y), y.device)  # (B,)
    err = error(noise.corrupt(y, level), level)    # (B,)
    weight = noise.weight(level)                   # (B,)
    assert err.shape == weight.shape  # (B,) * (B, 1) is (B, B): the weight would be averaged away
    return (weight * err).mean()


# -----------------------------------------------------------------------------------------------------------
# Discrete targets: the space that all blocks agree on, and how logits are read from it

@functools.lru_cache(maxsize=2)  # blocks in one process share the tensor
def target_table(n_class, dim, seed):
    """(n_class, dim) float32 unit-norm rows, never trained: orthonormal if n_class <= dim, else Gaussian.

    Drawn on the CPU in float64 and then rounded: blocks trained on different machines have to agree on it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_class, dim, generator=generator, dtype=torch.float64, device="cpu")
    if n_class <= dim:
        q, r = torch.linalg.qr(rows.T)        # (dim, n_class)
        rows = (q * r.diagonal().sign()).T    # with a positive diagonal the decomposition is unique
    return F.normalize(rows, dim=-1).float()


@contextlib.contextmanager
def exact(device):
    """Products of float32 as such: neither bf16 by autocast nor TF32, whatever was chosen for the network."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def bayes_logits(prior, z, sigma, table):
    """Logits of p(y | z, x) from the network's prior logits (B, ..., V), z (B, ..., C), sigma (B,), table (V,
    C).

    Bayes' rule: log p(z | y) is -|z - E_y|^2 / 2 sigma^2, and with rows of equal norm only z.E_y / sigma^2
    depends on y. It is to cross-entropy what c_skip is to squared error. Float32 throughout: the term reaches
    1e5."""
    with exact(z.device):
        likelihood = (z.float() / expand(sigma, z) ** 2) @ table.T  # (B, ..., V)
    return prior.float() + likelihood


def edm_logits(f, z, sigma, table, noise, scale):
    """Logits scale * D @ E^T from D = c_skip z + c_out f, as in the paper; f and z (B, ..., C), sigma (B,).

    The scale is learned: between unit vectors alone no softmax is sharp."""
    c_skip, c_out, _, _ = (expand(c, z) for c in noise.precondition(sigma))
    with exact(z.device):
        return scale * (c_skip * z + c_out * f.float()) @ table.T   # (B, ..., V)


# -----------------------------------------------------------------------------------------------------------
# Sampling and likelihood: the blocks put together

def euler(denoise, z, steps):
    """Probability-flow ODE from z at steps[0] down to steps[-1]; n levels are n evaluations and n - 1 moves.

    denoise(z, sigma) -> D of z's shape; sigma is a float64 scalar tensor, for block_of to route. Start from
    sigma_max * noise for a sample, or from 0, the mean of the prior, for the (mostly) most probable outcome.
    Returns D at the last level. The sign is the released code's; the paper's printed eqs. 3-5 reverse it."""
    for sigma, sigma_next in zip(steps[:-1], steps[1:]):
        d = (z - denoise(z, sigma)) / sigma.item()               # dz / d sigma
        z = z + (sigma_next - sigma).item() * d
    return denoise(z, steps[-1])


def heun(denoise, z, steps):
    """As euler, with the mean of the slopes at both ends of a move (EDM algorithm 1): 2n - 1 evaluations.

    Every evaluation is asked for at its own level, so that it is routed by that."""
    for sigma, sigma_next in zip(steps[:-1], steps[1:]):
        d = (z - denoise(z, sigma)) / sigma.item()
        ahead = z + (sigma_next - sigma).item() * d
        d_next = (ahead - denoise(ahead, sigma_next)) / sigma_next.item()
        z = z + (sigma_next - sigma).item() * (d + d_next) / 2
    return denoise(z, steps[-1])


def strata(size, k, n):
    """(size,) float64 in the k-th n-th of [0, 1]: one draw in every size-th of that, in random order."""
    return (k + (torch.randperm(size) + torch.rand(size, dtype=torch.float64)) / size) / n


def bound_share(squared_error, y, noise, block, n=4):
    """A block's share of the bound on -log p(y | x): the integral of sigma^-3 E|y - D|^2 over its interval,
    nats.

    y (B, ...); squared_error(z, sigma) -> (B,), summed over all that an element of the batch is scored on. An
    unbiased estimate of the mean over the batch, as a float, from n levels for each element, stratified in ln
    sigma within an element and over the batch. The shares of all blocks and `bound_ends` add up to the bound.
    It is that of the continuous-time model, not of a sampler with few steps; an exact posterior mean attains
    it."""
    lo, hi = noise.interval(block)  # not widened: intervals must tile the range once
    width, total = math.log(hi / lo), 0.0
    for k in range(n):
        sigma = (lo * (strata(len(y), k, n) * width).exp()).float().to(y.device)  # (B,)
        err = squared_error(noise.corrupt(y, sigma), sigma)              # (B,)
        assert err.shape == sigma.shape
        total += (err / sigma ** 2).mean().item()         # sigma^-3 d sigma = sigma^-2 d ln sigma
    return total / n * width


def bound_chain(squared_error, y, noise, steps):
    """As `bound_share` of all blocks, for a chain that visits only the levels `steps`, from sigma_max down:
    the sum over its moves of (1 / sigma_next^2 - 1 / sigma^2) / 2 * E|y - D(z, sigma)|^2, nats.

    With `bound_ends` it bounds -log p(y | x) of the ancestral sampler with these steps (the discrete-time
    loss of VDM, arXiv 2107.00630), and falls to the continuous bound as they get finer. An estimate of the
    mean over the batch from one draw for each element and level; squared_error is asked at all levels."""
    total = 0.0
    for sigma, sigma_next in zip(steps[:-1].tolist(), steps[1:].tolist()):
        level = torch.full((len(y),), sigma, device=y.device)            # (B,)
        err = squared_error(noise.corrupt(y, level), level)              # (B,)
        assert err.shape == level.shape
        total += err.mean().item() * (sigma_next ** -2 - sigma ** -2) / 2
    return total


def masked_share(cross_entropy, y, noise, block, n=4):
    """A block's share of the bound on -log p(y) of masked diffusion: the integral over its interval of t of
    the weight times the cross-entropy summed over the masked tokens, nats.

    y (B, ...) token ids; cross_entropy(z, t) -> (B,). An unbiased estimate of the mean over the batch, as a
    float, from n times for each element, stratified as in `bound_share`. The shares of all blocks and
    `masked_ends` add up to the bound; exact conditional distributions attain it."""
    lo, hi = noise.interval(block)  # not widened: intervals must tile [0, 1] once
    total = 0.0
    for k in range(n):
        t = (lo + strata(len(y), k, n) * (hi - lo)).float().to(y.device)     # (B,)
        err = cross_entropy(noise.corrupt(y, t), t)                          # (B,)
        assert err.shape == t.shape
        total += (noise.weight(t) * err).mean().item()
    return total / n * (hi - lo)


def masked_ends(n_token, vocab_size, noise):
    """(reconstruction, prior) in nats for n_token tokens: what is still masked at t = 0 and what is visible
    at t = 1 already is guessed among all words. Next to nothing; MD4 counts the first."""
    return (n_token * noise.eps * math.log(vocab_size),) * 2


def bound_ends(cross_entropy, y, noise):
    """(reconstruction, prior) in nats: the bound's terms at the ends of the range, averaged over the batch.

    reconstruction: E[-log p(y | z at sigma_min, x)], from the last block's cross_entropy(z, sigma) -> (B,).
    prior: KL of z at sigma_max against N(0, sigma_max^2), |y|^2 / (2 sigma_max^2) for y (B, ...)."""
    sigma = torch.full((len(y),), noise.sigma_min, device=y.device)
    reconstruction = cross_entropy(noise.corrupt(y, sigma), sigma).mean().item()
    prior = (y.flatten(1) ** 2).sum(1).mean().item() / (2 * noise.sigma_max ** 2)
    return reconstruction, prior
