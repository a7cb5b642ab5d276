"""What an update costs, in bytes and in time, with train.py's flags for model, data and training:

    python results/bench.py --model mdm --memory    # bytes, term by term: OUT/mdm/memory.json
    python results/bench.py --model mdm --time      # an update and a step of sampling: OUT/mdm/bench.json

--memory: the second update of the whole network and of its largest block, not compiled. Activations are what
the forward pass of one piece of the batch saves for the backward pass. The peak is the most that is allocated
at once, with weights, moments and running mean. "Checkpointed": only each layer's input is kept.
--time: an update as train.py's loop makes it (on CUDA one launch), and a step of sampling. Baseline, control
and blocks take turns, and only one of them is in memory at a time. Wall time is the median and the quartiles
of all rounds. The kernels are those of one update: on CUDA what the profiler saw, with their own time; on a
CPU the operators of torch that compute something."""
import gc
import itertools
import statistics
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import Parser, UserError, about, begin, learner, run, train, write

TURNS = 4  # how often each part is built and timed
WARM_UP = 4  # updates before it is timed: what is compiled, and the recording of the update
SHARED = (("weights", "gradients", "optimizer"), ("activations",), ("peak",))  # terms whose sums are compared


# ---- Memory -----------------------------------------------------------------------------------------------

def storages(tensors):
    """{address: bytes} of the storages that tensors lie in, each counted once."""
    found = {}
    for t in tensors:
        if torch.is_tensor(t):
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def peak_during(function, device):
    """The most bytes that were allocated at once while a function ran, beyond those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def memory_of(setup, part, checkpointed=False):
    """{what: bytes} of the second update of a part."""
    gc.collect()  # layers that are computed twice refer to themselves
    trained = learner(setup, part, checkpointed)
    net, optimizer = trained.net, trained.optimizer
    weights = storages([*net.parameters(), *net.buffers()])
    mean = {}
    if trained.average is not None:
        mean = storages([*trained.average.parameters(), *trained.average.buffers()])
    saved, gradients = {}, {}

    def save(t):
        """Called with each tensor that the forward pass saves for the backward pass."""
        for address, size in storages([t]).items():
            if address not in weights:
                saved[address] = size
        return t

    def before_forward(*_):
        saved.clear()  # the pieces of a batch do not add up

    def before_step(*_):
        gradients.update(storages(p.grad for p in net.parameters()))
    train.update(trained)  # in which the optimizer makes its state
    net.register_forward_pre_hook(before_forward)
    optimizer.register_step_pre_hook(before_step)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        peak = peak_during(lambda: train.update(trained), setup.device)
    moments = storages(t for state in optimizer.state.values() for t in state.values())
    found = {"weights": weights, "gradients": gradients, "optimizer": moments, "running mean": mean,
             "activations": saved}
    sizes = {name: sum(of_storages.values()) for name, of_storages in found.items()}
    # what was there before the update comes on top
    sizes["peak"] = sizes["weights"] + sizes["optimizer"] + sizes["running mean"] + peak
    return sizes


def largest_block(setup):
    """The part with the most parameters among the blocks."""
    counts = {}
    with torch.device("meta"):
        for b in range(setup.config.noise.n_blocks):
            net = train.build(setup.module, setup.config, f"block_{b}")
            counts[f"block_{b}"] = sum(p.numel() for p in net.parameters())
    return max(counts, key=counts.get)


def share(row, whole, terms):
    """The sum of some terms, % of the same of the whole network."""
    return 100 * sum(row[term] for term in terms) / sum(whole[term] for term in terms)


def memory_tables(setup):
    """Bytes of the whole network and of the largest block, with and without checkpointed activations."""
    n = min(2, setup.training.accumulate)  # a third piece of the batch would add nothing
    size = setup.training.batch_size // setup.training.accumulate
    few = replace(setup.training, accumulate=n, batch_size=n * size, compile="off")
    setup = SimpleNamespace(**{**vars(setup), "training": few})
    rows = {}
    for name, part in (("end to end", "end_to_end"), ("one block", largest_block(setup))):
        rows[name] = memory_of(setup, part)
        rows[f"{name}, activations checkpointed"] = memory_of(setup, part, checkpointed=True)
    whole = rows["end to end"]
    megabytes, shares = {}, {}
    for name, row in rows.items():
        megabytes[name] = {term: size / 1e6 for term, size in row.items()}
        shares[name] = {", ".join(terms): share(row, whole, terms) for terms in SHARED}
    return {"memory of one update, MB": megabytes, "of end to end, %": shares}


# ---- Time -------------------------------------------------------------------------------------------------

def sampling_step(model, net, n=16):
    """A function that evaluates a network once for n examples, as a step of its sampler does; in gpt and
    recurrent for the last token of a window, the rest of which is cached. None where there is no such step:
    recurrent's baseline has no cache, and of a model of one's own nothing is known."""
    if model not in ("vit", "dit", "gpt", "mdm", "recurrent"):
        return None
    c, device = net.config, next(net.parameters()).device
    is_block = hasattr(net, "table")
    level = torch.ones(n, device=device)                                     # (N,)
    if model in ("vit", "dit"):
        x = torch.randn(n, c.n_channel, c.image_size, c.image_size, device=device)
        if model == "dit":
            return partial(net.denoise, x, level, level.long())
        if is_block:
            return partial(net.logits, x, torch.randn(n, c.n_embd, device=device), level)
        return partial(net.logits, x)
    x = torch.zeros(n, c.seq_len, dtype=torch.long, device=device)           # (N, T)
    if model == "mdm":
        return partial(net.logits, x, level)
    z = torch.randn(n, c.seq_len, c.n_embd, device=device)                   # (N, T, C)
    if model == "gpt" and is_block:
        return partial(net.logits, x[:, :1], z[:, :1], level, net.context(x))
    if model == "gpt":
        _, cache = net.logits(x[:, 1:])
        return partial(net.logits, x[:, :1], cache)
    if not is_block:
        return None
    return recurrent_step(net, x, z, level)


def recurrent_step(net, x, z, level):
    """The same of recurrent's block: prelude, one pass and coda for the last token."""
    last = x.shape[1] - 1
    e, past = net.condition(x[:, 1:])
    _, cache = net.logits(e, z[:, 1:], level)

    def step():
        e, _ = net.condition(x[:, :1], last, past)
        return net.logits(e, z[:, :1], level, last, cache)
    return step


def is_view(operator):
    """Whether what it returns lies in the memory of what it was given, unchanged."""
    infos = [returned.alias_info for returned in operator._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


class Operators(TorchDispatchMode):
    """Counts torch's operators that compute something: not views, not empty tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not is_view(function) and not name.startswith(("empty", "detach", "alias")):
            self.count += 1
        return function(*args, **(kwargs or {}))


def kernels_of(function, device):
    """{"kernels": number, on CUDA "kernel time, ms": their sum} of a call."""
    if device.type != "cuda":
        with Operators() as operators:
            function()
        return {"kernels": operators.count}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize(device)
    events = [e for e in record.profiler.kineto_results.events()
              if e.device_type() == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(events), "kernel time, ms": sum(e.duration_ns() for e in events) / 1e6}


def milliseconds(function, device, n):
    """Wall time of n calls in turn, a list; on CUDA of 16 calls each, since a call does not wait."""
    at_once = 16 if device.type == "cuda" else 1
    times = []
    for _ in range(n):
        began = time.perf_counter()
        for _ in range(at_once):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - began) / at_once)
    return times


def time_part(setup, part, checkpointed, n):
    """(ms of n updates, kernels of an update, ms of n steps of sampling) of a part, built for it alone."""
    trained = learner(setup, part, checkpointed)

    def update():
        train.update(trained)
    milliseconds(update, setup.device, WARM_UP)
    updates = milliseconds(update, setup.device, n)
    update()  # on CUDA this one may draw a chunk of batches, which is not what one update costs
    kernels = kernels_of(update, setup.device)
    samples = []
    with torch.no_grad():
        step = sampling_step(setup.model, trained.net.eval())
        if step is not None and not checkpointed:
            milliseconds(step, setup.device, 1)
            samples = milliseconds(step, setup.device, n)
    return updates, kernels, samples


def time_tables(setup, rounds):
    """Time of an update and of a step of sampling of all parts."""
    blocks = [f"block {b}" for b in range(setup.config.noise.n_blocks)]
    names = ["end to end", "control", *blocks, "end to end, activations checkpointed"]
    updates = {name: [] for name in names}
    samples = {name: [] for name in names}
    kernels = {}
    for _ in range(TURNS):
        for name in names:
            part, _, checkpointed = name.partition(",")
            found = time_part(setup, part.replace(" ", "_"), bool(checkpointed), max(1, rounds // TURNS))
            updates[name] += found[0]
            kernels[name] = found[1]
            samples[name] += found[2]
            gc.collect()  # a recorded function and a wrapped layer refer to themselves
    updates["all blocks"] = [sum(ms) for ms in zip(*(updates[b] for b in blocks))]
    kernels["all blocks"] = {column: sum(kernels[b][column] for b in blocks) for column in kernels[blocks[0]]}
    tables = {f"one update of {setup.training.batch_size}": time_rows(updates, kernels)}
    if any(samples.values()):
        tables["one step of sampling, 16 at once"] = time_rows(samples, {})
    return tables


def time_rows(times, kernels):
    """{name: {column: number}} of lists of milliseconds; those that are empty are left out."""
    rows = {}
    for name, ms in times.items():
        if not ms:
            continue
        low, middle, high = statistics.quantiles(ms, n=4)
        rows[name] = {"ms": middle, "mean, ms": statistics.mean(ms), "lower quartile, ms": low,
                      "upper quartile, ms": high, **kernels.get(name, {})}
        if "end to end" in rows:
            rows[name]["of end to end, %"] = 100 * middle / rows["end to end"]["ms"]
    return rows


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=20, help="updates timed of each part (default: 20)")
    own, rest = parser.parse_known_args(argv)
    if not (own.memory or own.time) or own.rounds < 2 * TURNS:
        raise UserError(f"say --memory, --time or both; --rounds has to be at least {2 * TURNS}")
    setup = begin([*rest, "--end-to-end", "--overwrite"])  # nothing is trained, nothing overwritten
    report = about("bench", argv) | {"model": setup.model, "config": train.flat(setup.config),
                                     "training": train.flat(setup.training), "data": setup.data.about}
    if own.memory:
        write(setup.folder / "memory.json", report | {"tables": memory_tables(setup)})
    if own.time:
        report |= {"rounds": own.rounds, "tables": time_tables(setup, own.rounds)}
        write(setup.folder / "bench.json", report)


if __name__ == "__main__":
    run(main)
