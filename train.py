"""Train one block of a model alone, or the whole model end to end; score and sample what has been trained.

    python train.py --model gpt --block 2       one block: nothing of the other blocks is ever in this process
    python train.py --model gpt --block all     every block, one after another, one in memory at a time
    python train.py --model gpt --end-to-end    the baseline: all layers, backpropagation through all of them
    python train.py --model gpt --control       the control: one block's worth of layers, end to end
    python train.py --model gpt --eval          score the blocks in out/gpt beside baseline and control
    python train.py --model gpt --sample        generate from the blocks (or --end-to-end, --control)

Begin to read at `update` and `train`: they are the loop. What a model is, only the model file knows.
"""
import argparse
import contextlib
import copy
import difflib
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import typing
import warnings
import zipfile
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as recompute

from data import UserError
from diffusion_blocks import require, require_finite, seed_of

os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # fails with recurrent, torch 2.11


# ---- Training: an update, and the loop around it ----------------------------------------------------------

def update(learner):
    """The next update of a part: draw a batch, forward, backward, clip, AdamW's step, running mean.

    What is random in it is a function of (seed, part, update, piece): see `draw`. So an update is the same in
    whatever process, order or number of runs, and a checkpoint holds no generator's state."""
    training, step = learner.job.training, learner.step
    set_lr(learner.optimizer, lr_at(step, training))
    if learner.recorded is not None:
        # on CUDA: the same forward, backward, clip and step as below; from the fourth call on they are one launch
        learner.recorded(draw(learner, step))
    else:
        for piece in learner.pieces:  # of the batch: usually one, all of it
            batch = draw(learner, step * training.accumulate + piece)
            if learner.job.world_size > 1:
                # processes that share a batch exchange gradients once, with their last piece
                learner.network.require_backward_grad_sync = piece == learner.pieces[-1]
            forward_backward(learner, batch)
        clip_and_step(learner)
    if learner.average is not None:
        decay = min(training.ema, (2 + step) / (11 + step))  # the first updates are forgotten sooner
        weights = [p.data for p in learner.net.parameters()]
        torch._foreach_lerp_(list(learner.average.parameters()), weights, 1 - decay)
    learner.step += 1
    learner.since_log += 1


def forward_backward(learner, batch):
    """The loss of a piece of the batch, and its gradients, which add up over pieces."""
    with learner.autocast():
        loss = learner.network(batch) / len(learner.pieces)
    loss.backward()
    learner.loss_sum += loss.detach()


def clip_and_step(learner):
    norm = nn.utils.clip_grad_norm_(learner.net.parameters(), learner.job.training.clip)
    learner.norm_sum += norm  # not finite if one gradient since the last log line was not
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def train(job):
    """Train a part to its last update, with log lines and checkpoints on the way. Returns the number of the
    signal that stopped it before, or 0."""
    steps, run = job.training.steps, job.run
    learner = Learner(job)
    if run.resume:
        load_checkpoint(learner)
    # in 4 pieces, so that it needs no more memory than training does
    held_out = job.data.held_out(4 * learner.piece_size, job.config)
    if job.rank == 0:
        print(learner.describe(), flush=True)
    first, began = learner.step, time.time()
    while learner.step < steps:
        update(learner)
        signal_number = asked_to_stop(job)
        last = learner.step == steps or signal_number > 0
        logs = last or is_due(learner.step, run.log_every)
        saves = last or is_due(learner.step, run.save_every)
        # on CUDA nothing but logging and saving waits for the device
        if logs or saves or job.device.type == "cpu":
            refuse_infinite(learner)
        if logs:
            loss = take_mean_loss(learner)
        if logs and job.rank == 0:
            ms = 1000 * (time.time() - began) / (learner.step - first)
            write_log(learner, loss, held_out, ms)
        if saves and job.rank == 0:
            save(job.path, learner.state())
        if signal_number > 0 and learner.step < steps:
            if job.rank == 0:
                print(how_to_go_on(job, learner.step))
            return signal_number
    return 0


def how_to_go_on(job, step):
    line = f"{job.path} holds update {step} of {job.training.steps}; go on: the same command with --resume"
    if job.run.overwrite:
        line += " in the place of --overwrite"
    return line


def is_due(step, every):
    return every > 0 and step % every == 0


def lr_at(step, training):
    """Linear warm-up, then a cosine to final_lr * lr; step counts this part's own updates."""
    warm = min(1.0, (step + 1) / max(1, training.warmup))
    after = max(0, step - training.warmup) / max(1, training.steps - training.warmup)
    cosine = (1 + math.cos(math.pi * after)) / 2
    return training.lr * warm * (training.final_lr + (1 - training.final_lr) * cosine)


# ---- Settings of training ---------------------------------------------------------------------------------

@dataclass
class Training:
    """The settings that decide the weights. --resume takes them from the checkpoint, and refuses others. Two may
    differ: compile, which changes the last bits only, and steps, if the learning rate is constant (--final-lr 1)."""
    steps: int = 1000           # optimizer updates for each block (and as many for the baseline)
    epochs: float = 0.0         # passes over the data in the place of steps; 0: as --steps says
    batch_size: int = 16        # sequences or images in an update
    accumulate: int = 1         # gradient accumulation: pieces (micro-batches) of a batch, shared by ranks
    lr: float = 1e-3            # peak learning rate of AdamW, whose first beta is 0.9
    beta2: float = 0.95         # AdamW's second beta
    weight_decay: float = 0.1   # on matrices and embeddings, not on norms and biases
    warmup: int = 50            # updates of linear warm-up, counted for each block by itself
    final_lr: float = 0.05      # where the cosine ends, as a fraction of lr
    clip: float = 1.0           # largest gradient norm
    ema: float = 0.0            # decay of a running mean of the weights, which is scored and sampled; 0: none
    precision: str = "auto"     # of matrix products: bf16 or float32; auto: bf16 on CUDA, else float32
    compile: str = "auto"       # compiled layers, on CUDA a recorded update, too: on or off; auto: on CUDA
    seed: int = 0               # random numbers are a function of (seed, part, update, piece)

    def __post_init__(self):
        require_finite(self)
        for name in ("steps", "batch_size", "accumulate"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("epochs", "warmup", "final_lr", "weight_decay", "seed"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0", getattr(self, name))
        require(self.batch_size % self.accumulate == 0,
                f"accumulate must divide batch_size {self.batch_size}", self.accumulate)
        require(self.epochs <= 1e6, "epochs must be at most a million", self.epochs)
        require(self.lr > 0, "lr must be above 0", self.lr)
        require(self.clip > 0, "clip must be above 0", self.clip)
        require(0 <= self.beta2 < 1, "beta2 must be at least 0 and below 1", self.beta2)
        require(0 <= self.ema < 1, "ema must be at least 0 and below 1", self.ema)
        require(self.precision in ("auto", "bf16", "float32"),
                "precision must be auto, bf16 or float32", self.precision)
        require(self.compile in ("auto", "on", "off"), "compile must be auto, on or off", self.compile)


@dataclass
class Run:
    """Where and how it runs: not in the checkpoint."""
    device: str = "auto"        # cpu, cuda, cuda:1 or mps; auto: cuda where there is one, else cpu
    threads: int = 0            # CPU threads; 0: as torch chooses. Another number may change the last bits
    out: str = "out"            # checkpoints and logs go to OUT/MODEL
    resume: bool = False        # go on from the checkpoint, with its settings; on CPU to the same bits
    overwrite: bool = False     # train anew where a checkpoint is
    checkpoint_activations: bool = False  # keep each layer's input only, compute the rest twice: less memory
    log_every: int = 50         # updates between log lines; 0: at the end only
    save_every: int = 200       # updates between checkpoints; 0: at the end only

    def __post_init__(self):
        for name in ("threads", "log_every", "save_every"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0", getattr(self, name))
        require(self.threads <= 1024, "threads must be at most 1024", self.threads)
        require(self.out != "", "out must name a folder", repr(self.out))
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite trains anew: type one of them")


@dataclass
class Job:
    """A part to train, and all that its training needs."""
    model: str              # name of the model file
    module: object          # the model file itself
    part: str               # block_N, end_to_end or control
    config: object          # the model file's Config
    training: Training
    run: Run
    data: object            # Data of a module of data/
    device: torch.device    # with its index
    rank: int = 0           # of this process, among those that share each batch of this part
    world_size: int = 1     # how many these are

    @property
    def path(self):
        return checkpoint_path(self.run.out, self.model, self.part)


# ---- A part in training -----------------------------------------------------------------------------------

class Learner:
    """A part in training: network, running mean of the weights, optimizer, and what the log adds up."""

    def __init__(self, job):
        training = job.training
        self.job = job
        self.step = 0   # updates made
        self.log = []   # a row for each log line
        torch.manual_seed(seed_of(training.seed, f"{job.part} weights"))
        self.net = build(job.module, job.config, job.part).to(job.device).train()
        self.average = None
        if training.ema > 0:
            self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.net, training, job.device)
        prepare_layers(self.net, training, job.run)
        self.network = self.net  # what is called: it also exchanges the gradients of several processes
        if job.world_size > 1:
            self.network = nn.parallel.DistributedDataParallel(self.net)
            self.network.broadcast_buffers = False  # they are constants

        self.seed = seed_of(training.seed, job.part)
        self.pieces = range(job.rank, training.accumulate, job.world_size)  # of each batch, in this process
        self.piece_size = training.batch_size // training.accumulate
        self.batches_per_chunk = batches_per_chunk(job, self.piece_size)
        self.chunk, self.chunk_index = None, None  # the chunk of batches drawn last

        self.loss_sum = torch.zeros((), device=job.device)  # of the updates since the last log line
        self.norm_sum = torch.zeros((), device=job.device)
        self.since_log = 0  # their number
        self.recorded = Recorded(self.forward_backward_step) if can_be_recorded(job) else None

    def forward_backward_step(self, batch):
        forward_backward(self, batch)
        clip_and_step(self)

    def autocast(self):
        """Where matrix products are in bf16, if so asked. There is no cache of bf16 copies of weights: a copy
        that a pass without gradients has made (recurrent's baseline) would give none later (until torch 2.10 or so)."""
        bf16 = self.job.training.precision == "bf16"
        return torch.autocast(self.job.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def describe(self):
        """The line that is printed when training begins."""
        job, count = self.job, sum(p.numel() for p in self.net.parameters())
        title = f"{self.net.title}; " if hasattr(self.net, "title") else ""
        return (f"{job.model} {job.part.replace('_', ' ')}: {title}{count:,} parameters, "
                f"{16 * count / 1e6:.1f} MB of weights, gradients and moments; "
                f"update {self.step} of {job.training.steps}; to {job.path}")

    def settings(self):
        """What decides the weights, as it stands in a checkpoint."""
        job = self.job
        return {"model": job.model, "part": job.part, "config": flat(job.config),
                "training": flat(job.training), "settings": flat(job.data.settings),
                "data": job.data.about, "torch": str(torch.__version__)}

    def state(self):
        """The content of a checkpoint."""
        average = None if self.average is None else self.average.state_dict()
        return {**self.settings(), "step": self.step, "log": self.log, "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict()["state"], "average": average}


def build(module, config, part):
    """The network of a part: block_N, end_to_end or control. Nothing of any other part is built."""
    with user_errors():
        if part == "end_to_end":
            return module.EndToEnd(config)
        if part == "control":
            if not hasattr(config, "control"):
                raise ValueError("a Config needs control(), which returns the Config of the control")
            return module.EndToEnd(config.control())
        return module.Block(config, int(part.removeprefix("block_")))


def make_optimizer(net, training, device):
    """AdamW with weight decay on matrices and embeddings, none on norms and biases."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    cuda = device.type == "cuda"
    # a recorded update reads the learning rate where it lies on the device
    lr = torch.tensor(training.lr, device=device) if cuda else training.lr
    return torch.optim.AdamW(groups, lr, betas=(0.9, training.beta2), fused=cuda, capturable=cuda)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def prepare_layers(net, training, run):
    """Compile the layers, and let them keep only their inputs for the backward pass, if so asked.

    The layers are what lies in an nn.ModuleList. They have one code, so they are compiled once."""
    layers = [layer for m in net.modules() if isinstance(m, nn.ModuleList) for layer in m]
    if run.checkpoint_activations and not layers:
        raise UserError("--checkpoint-activations has no effect: no layers in an nn.ModuleList")
    for layer in layers:
        if training.compile == "on":
            torch._dynamo.config.cache_size_limit = 64  # the layers of all parts share one function
            layer.forward = torch.compile(layer.forward)
        if run.checkpoint_activations:
            layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)


# ---- Batches ----------------------------------------------------------------------------------------------

# Where random numbers come from. Each is given to torch.manual_seed, which seeds the CPU's and the GPU's draws:
#   weights        (seed, part)                     Learner
#   a batch        (seed, part, update, piece)      draw: places of texts, augmentation, noise, dropout
#                  on CUDA places and augmentation are drawn for a chunk of updates: (seed, part, chunk)
#   images         (seed, epoch)                    data/images.py: their order, the same for all parts
#   validation     always 0                         validate
#   --eval, --sample   (seed, "eval") and (seed, "sample")

def draw(learner, index):
    """Batch number `index` of a part, on the device. Seeds torch's random numbers for the network's draws."""
    job, size, n = learner.job, learner.piece_size, learner.batches_per_chunk
    if n == 1:
        torch.manual_seed(learner.seed + index)
        return job.data.batch(size, job.config, index)  # the network goes on drawing from this seed
    chunk_index, place = divmod(index, n)
    if learner.chunk_index != chunk_index:
        torch.manual_seed(seed_of(learner.seed, f"chunk {chunk_index}"))
        learner.chunk = None  # not two of them in memory
        learner.chunk = job.data.batch(n * size, job.config, chunk_index)
        learner.chunk_index = chunk_index
    torch.manual_seed(learner.seed + index)
    return rows(learner.chunk, place * size, (place + 1) * size)


EXAMPLES_PER_CHUNK = 2048  # a GPU augments 2,048 images about as fast as 128: it waits for the launches


def batches_per_chunk(job, piece_size):
    """How many batches are drawn at once: one on a CPU, and where processes or pieces share a batch."""
    if job.device.type != "cuda" or job.training.accumulate > 1:
        return 1
    return max(1, EXAMPLES_PER_CHUNK // piece_size)


def tensors(batch):
    """The tensors of a batch, which is one tensor or a tuple of tensors with as many rows."""
    return (batch,) if torch.is_tensor(batch) else batch


def rows(batch, start, stop):
    """Rows start to stop of a batch."""
    if torch.is_tensor(batch):
        return batch[start:stop]
    return tuple(column[start:stop] for column in batch)


# ---- On CUDA an update is one launch ----------------------------------------------------------------------

def can_be_recorded(job):
    """Whether an update may be recorded. Ranks, pieces and recomputed layers run unrecorded."""
    return (job.device.type == "cuda" and job.training.compile == "on" and job.training.accumulate == 1
            and job.world_size == 1 and not job.run.checkpoint_activations)


class Recorded:
    """A function of a batch, recorded as a CUDA graph in its fourth call and from then on replayed.

    The kernels of a small network take less time than Python needs to launch them one by one; a graph launches
    all at once. A replay repeats the operations that were recorded, on the memory that they had. So all that
    changes from call to call must be read from the device. Calls 1 to 3 run normally: what is compiled, chosen
    or allocated once must not be recorded. Call 3 is watched, and a function that draws random numbers on the
    CPU or waits for the device is never recorded. Call 4 is recorded, and from then on all are replayed."""

    WARM_UP = 3

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.batch = None   # where the graph reads its batch
        self.graph = None
        self.obstacle = ""  # why it cannot be recorded

    def __call__(self, batch):
        self.calls += 1
        if self.calls < self.WARM_UP or self.obstacle:
            return self.function(batch)
        if self.calls == self.WARM_UP:
            self.obstacle = self.watch(batch)
            if self.obstacle:
                print(f"updates are not recorded as a CUDA graph: the model {self.obstacle}", flush=True)
            return None
        if self.graph is None:
            self.record(batch)
        for recorded, given in zip(tensors(self.batch), tensors(batch)):
            recorded.copy_(given)
        self.graph.replay()

    def watch(self, batch):
        """Call the function. Returns what forbids to record it, or an empty string."""
        before = cpu_random_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # itself warns that it is a prototype
            try:
                self.function(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if any("called a synchronizing" in str(w.message) for w in caught):
            return "waits for the device within an update"
        if cpu_random_state() != before:
            return "draws random numbers on the CPU"
        return ""

    def record(self, batch):
        if torch.is_tensor(batch):
            self.batch = batch.clone()
        else:
            self.batch = tuple(column.clone() for column in batch)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # on the stream of the calls before: gradients are added up on the stream where they were made
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.function(self.batch)  # nothing is computed yet
        except RuntimeError as e:
            cause = e.__context__ or e  # the end of a recording that failed is an error of its own
            if is_out_of_memory(cause):
                raise cause
            raise UserError(f"an update of this model cannot be recorded as a CUDA graph "
                            f"({str(cause).splitlines()[0]}); train it with --compile off") from e


def cpu_random_state():
    """The states of all generators that a model may draw from on the CPU, as bytes."""
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))


# ---- Log lines --------------------------------------------------------------------------------------------

def refuse_infinite(learner):
    """Raises UserError if a loss or a gradient since the last log line was not finite."""
    if not math.isfinite(float(learner.loss_sum)) or not math.isfinite(float(learner.norm_sum)):
        raise UserError(f"the loss of {learner.job.part} is not finite at update {learner.step}; what was saved "
                        f"before is untouched; try a lower --lr, and look at the values of the flags typed")


def take_mean_loss(learner):
    """The mean training loss since the last log line; then its sums begin anew. All ranks of a part call it."""
    if learner.job.world_size > 1:
        dist.all_reduce(learner.loss_sum)
    loss = float(learner.loss_sum) / learner.job.world_size / learner.since_log
    learner.loss_sum.zero_()
    learner.norm_sum.zero_()
    learner.since_log = 0
    return loss


def write_log(learner, loss, held_out, ms):
    """Print a line, and add it to the file beside the checkpoint. ms: milliseconds an update, with all work."""
    job, step, steps = learner.job, learner.step, learner.job.training.steps
    net = learner.net if learner.average is None else learner.average
    with learner.autocast():
        val_loss = validate(net, held_out)
    lr = lr_at(step - 1, job.training)
    line = f"{job.part.replace('_', ' ')} | step {step}/{steps} | loss {loss:.4f} | val {val_loss:.4f}"
    line += f" | lr {lr:.1e} | {ms:.0f} ms/step"
    if job.device.type == "cuda":
        line += f" | {torch.cuda.max_memory_allocated(job.device) / 1e6:.0f} MB"
    print(f"{line} | {(steps - step) * ms / 60_000:.1f} min left", flush=True)
    learner.log.append({"step": step, "loss": loss, "val_loss": val_loss, "lr": lr, "ms": ms})
    lines = [json.dumps(row) + "\n" for row in learner.log]
    save(job.path.with_suffix(".jsonl"), "".join(lines).encode())


@torch.no_grad()
def validate(net, held_out):
    """Mean loss on the held-out batch, in 4 pieces, with the same noise every time and without dropout."""
    torch.manual_seed(0)
    was_training = net.training
    net.eval()
    n = len(tensors(held_out)[0])
    size = math.ceil(n / 4)
    total = 0.0
    for start in range(0, n, size):
        piece = rows(held_out, start, start + size)
        total += net(piece).item() * len(tensors(piece)[0])
    net.train(was_training)
    return total / n


# ---- Stopping ---------------------------------------------------------------------------------------------

STOP = []  # numbers of the signals that came


def request_stop(number, frame):
    """Let the update end and be saved: `train` looks at STOP after each."""
    STOP.append(number)


@contextlib.contextmanager
def stopping_by_signal():
    """Ctrl-C and SIGTERM call `request_stop` within this block."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, request_stop)
    try:
        yield
    finally:
        STOP.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(job):
    """The number of a signal that came to any process of this part, or 0. All of them get the same answer."""
    number = STOP[0] if STOP else 0
    if job.world_size == 1:
        return number
    numbers = torch.tensor([number])  # on the CPU: nothing waits for the device
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


# ---- Checkpoints ------------------------------------------------------------------------------------------

CHECKPOINT = ("model", "part", "config", "training", "settings", "data", "torch",  # what decides the weights
              "step", "log", "net", "optimizer", "average")


def checkpoint_path(out, model, part):
    return Path(out) / model / f"{part}.pt"


def save(path, content):
    """Write bytes, or a state by torch.save, beside `path` and rename it: what has the name is whole."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as e:  # of a full disk torch.save makes the second
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0] if str(e) else type(e).__name__}); is the "
                        f"disk full? What was there before is untouched") from None


def load(path, model):
    """A checkpoint as a dictionary on the CPU. Never runs code from the file. Raises UserError."""
    if not path.exists():
        raise UserError(f"there is no {path}; train it: {command_to_train(path, model)}")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare the checksums
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        lacks = set(CHECKPOINT) - set(state)
        if lacks:
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        if (state["model"], state["part"]) != (model, path.stem):
            raise ValueError(f"it holds {state['part']} of {state['model']}")
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise  # the file may be whole
    except Exception as e:
        raise UserError(f"{path} is damaged, or not of this model and code ({type(e).__name__}: "
                        f"{str(e)[:80]!r}); train it again with --overwrite") from None
    return state


def command_to_train(path, model):
    """The command that trains what is missing. --resume takes the settings of the parts that are there."""
    part = path.stem.replace("block_", "block ").replace("_", "-")
    out = shlex.quote(str(path.parents[1]))
    resume = " --resume" if settings_to_follow(path) else ""
    return f"python train.py --model {model} --{part} --out {out}{resume}"


def settings_to_follow(path):
    """The checkpoint whose settings --resume takes: this one, or else another part's beside it, or None."""
    folder = path.parent
    for other in [path, *sorted(folder.glob("block_*.pt")), folder / "end_to_end.pt", folder / "control.pt"]:
        if other.exists():
            return other
    return None


def load_checkpoint(learner):
    """Take weights, running mean, moments, number of updates and log from the checkpoint, if there is one.

    `main` has applied its settings already: see `values_of`."""
    job = learner.job
    if not job.path.exists():
        other = settings_to_follow(job.path)
        source = f", with the settings of {other.name}" if other else ""
        print(f"nothing to resume: there is no {job.path} yet; it begins at update 0{source}", flush=True)
        return
    state = load(job.path, job.model)
    refuse_other_settings(learner, state)
    learner.step, learner.log = state["step"], state["log"]
    learner.net.load_state_dict(state["net"])
    if learner.average is not None:
        learner.average.load_state_dict(state["average"])
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": state["optimizer"]})
    if learner.step == job.training.steps:
        longer = "--steps N" if job.training.final_lr == 1 else "a new run, --steps N --overwrite"
        print(f"{job.path} has all its {learner.step} updates; to train longer: {longer}", flush=True)


def refuse_other_settings(learner, state):
    """Raises UserError if a checkpoint was not trained as this learner is to be."""
    job, new = learner.job, learner.settings()
    wrong = other_data(state["data"], new["data"])
    usual = {"config": flat(type(job.config)()), "training": flat(Training()),
             "settings": flat(type(job.data.settings)())}
    for section in usual:
        old = {**usual[section], **state[section]}  # an older checkpoint does not know what was added since
        wrong += differences(old, new[section], ignore=("data", "steps", "epochs", "compile"))
    steps, before = job.training.steps, state["training"]["steps"]
    if steps != before and job.training.final_lr != 1:
        wrong.append(f"steps ({before} -> {steps}), on which its learning rates depend (but with --final-lr 1)")
    if steps < state["step"]:
        wrong.append(f"steps ({steps}; it has {state['step']} already)")
    if wrong:
        raise UserError(f"{job.path} was trained with other settings: {', '.join(wrong)}; leave those flags out, "
                        f"or train anew with --overwrite")


def other_data(old, new):
    """["the data's content"] if two descriptions of data have another fingerprint, else []."""
    return [] if old["fingerprint"] == new["fingerprint"] else ["the data's content"]


def differences(old, new, ignore=()):
    """["name (old -> new)"] of two dictionaries of settings."""
    names = [name for name in {**old, **new} if name not in ignore]
    return [f"{name} ({old.get(name)} -> {new.get(name)})" for name in names if old.get(name) != new.get(name)]


LEVELS_OF_TRAINING = ("gamma", "t_min", "t_max")  # fields of a noise that matter in training, and to blocks


def trained(module, model, part, out, device, like=None):
    """A trained network, ready to be scored, and its checkpoint, which has to fit the checkpoint `like`."""
    path = checkpoint_path(out, model, part)
    state = load(path, model)
    if like is not None:
        # a baseline may be trained on the levels that are best for it, and is scored on all
        ignore = () if part.startswith("block_") else LEVELS_OF_TRAINING
        usual = flat(module.Config())  # an older checkpoint does not know what was added since
        wrong = differences({**usual, **like["config"]}, {**usual, **state["config"]}, ignore)
        wrong += other_data(like["data"], state["data"])
        if wrong:
            raise UserError(f"{path} was trained with other settings than {like['part']}: {', '.join(wrong)}")
    net = build(module, replaced(module.Config(), state["config"]), part)
    net.load_state_dict(state["average"] or state["net"])
    return net.to(device).eval(), state


def assemble(module, model, out, device):
    """The trained blocks, a list, and block 0's checkpoint, with the fewest updates of any block."""
    block_0 = load(checkpoint_path(out, model, "block_0"), model)
    blocks, updates = [], []
    for b in range(block_0["config"]["n_blocks"]):
        net, state = trained(module, model, f"block_{b}", out, device, block_0)
        blocks.append(net)
        updates.append(state["step"])
    if len(set(updates)) > 1:
        print(f"note: blocks 0, 1, ... have {', '.join(map(str, updates))} updates")
    return blocks, {**block_0, "step": min(updates)}


# ---- Evaluation and sampling ------------------------------------------------------------------------------

def evaluate(module, model, run, data, device):
    """Score the blocks beside baseline and control, as far as they are trained; print and save the tables."""
    blocks, state = assemble(module, model, run.out, device)
    updates = {f"{len(blocks)} blocks": state["step"]}
    others = {}
    for part in ("end_to_end", "control"):
        name = part.replace("_", " ")
        try:
            others[name], other = trained(module, model, part, run.out, device, state)
            updates[name] = other["step"]
        except UserError as e:
            print(f"without {name}: {e}")
    if other_data(state["data"], data.about):
        print("note: scored on other data than the blocks were trained on")
    print("scoring", ", ".join(f"{name} ({n} updates)" for name, n in updates.items()), flush=True)
    torch.manual_seed(seed_of(state["training"]["seed"], "eval"))
    with user_errors():
        tables = module.evaluate(blocks, others, data)
    print_tables(tables)
    kept = {k: state[k] for k in ("model", "config", "training", "settings", "data", "torch")}
    report = {**kept, "updates": updates, "device": str(device), "threads": torch.get_num_threads(),
              "tables": tables}
    path = Path(run.out) / model / "eval.json"
    save(path, json.dumps(report, indent=1).encode())
    print(f"\nsaved {path}")


def print_tables(tables):
    """A line with the first column of the first table, then all tables {title: {row: {column: value}}}."""
    main_table = list(tables.values())[0]
    first_row = list(main_table.values())[0]
    unit = list(first_row)[0]
    verdict = [f"{name} {row[unit]:.4g}" for name, row in main_table.items() if unit in row]
    print(", ".join([*verdict, unit]))
    for title, table in tables.items():
        print(f"\n{title}")
        for name, row in table.items():
            print(f"  {name:36} " + "   ".join(f"{value:.4g} {column}" for column, value in row.items()))


def sample(module, model, part, run, sampling, seed, data, device):
    """Generate from the blocks (part "blocks"), baseline or control: print a text, save pictures, arrays."""
    if part == "blocks":
        nets, _ = assemble(module, model, run.out, device)
    else:
        nets, _ = trained(module, model, part, run.out, device)
    torch.manual_seed(seed_of(seed, "sample"))
    with user_errors():
        result = module.sample(nets, sampling, data)
    if result is None:
        raise UserError(f"{model}.py: sample has to return a text, or {{name: picture or array}}; it returns nothing")
    if isinstance(result, str):
        print(result)
        return
    for name, array in result.items():
        file = name if part == "blocks" else f"{name}_{part}"
        if array.dtype == torch.uint8:  # a picture (height, width, 3)
            from PIL import Image
            path = Path(run.out) / model / f"{file}.png"
            Image.fromarray(array.numpy()).save(path)
        else:
            path = Path(run.out) / model / f"{file}.npy"
            np.save(path, array.numpy())
        print(f"saved {path}")


# ---- Several processes: torchrun's ranks are assigned to parts; different parts do not communicate --------

def torchrun_ranks():
    """(rank, number of processes, rank on this machine); (0, 1, 0) without torchrun."""
    rank = int(os.environ.get("RANK", 0))
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return rank, n_ranks, local_rank


def assign(parts, rank, n_ranks):
    """(parts that a rank trains in turn, its rank among those that share a part, their number)."""
    if n_ranks <= len(parts):
        return parts[rank::n_ranks], 0, 1
    if n_ranks % len(parts):
        raise UserError(f"{n_ranks} processes cannot share {len(parts)} blocks; start a multiple, or fewer")
    size = n_ranks // len(parts)
    return [parts[rank // size]], rank % size, size


def connect(part, rank, size, device):
    """Make the processes that train one part a process group of their own: no other part's are in it."""
    store, _, _ = next(dist.rendezvous("env://"))  # torchrun's; parts meet only here, under different names
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(part, store), rank=rank, world_size=size)


# ---- The command line: what was asked for -----------------------------------------------------------------

CONTRACT = ("DATA", "Config", "PRESETS", "Sampling", "Block", "EndToEnd")  # of a model file
NO_SETTINGS = ("model", "preset", "block", "end_to_end", "control", "eval", "sample")  # flags that are none
# the flags that people type, first in --help
OFTEN = ("data", "steps", "epochs", "batch_size", "lr", "seed", "n_layer", "n_blocks", "n_embd", "out", "resume",
         "overwrite", "device")
# fields that are no flags: a preset or an edit changes them
NO_FLAGS = ("beta2", "clip", "n_cond", "table_seed", "sigma_data")


@dataclass
class Asked:
    """What a command line asks for."""
    action: str     # train, eval or sample
    part: str       # block_N, end_to_end or control; blocks: all of them
    model: str      # name of the model file
    module: object  # the model file itself
    source: object  # the module of data/ that it names
    preset: dict    # {field: value}, as the model file has it
    typed: dict     # {field: value}
    typed_preset: str = ""  # its name, if one was typed


def parse(argv):
    """The Asked of a command line. Raises UserError or argparse.ArgumentError."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument("--model", default="gpt", help="vit, dit, gpt, mdm, recurrent, or your NAME.py's NAME")
    before.add_argument("--preset", default="", help="a set of values that the model file names (default: default)")
    known, _ = before.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    module = import_model(known.model)
    source = importlib.import_module(f"data.{module.DATA}")
    lacks = [name for name in getattr(source, "NEEDS", ()) if name not in flat(defaults(module.Config))]
    if lacks:
        raise UserError(f"{known.model}.py: Config needs the field {lacks[0]}, as DATA is {module.DATA!r}")
    preset = preset_of(known.model, module, source, known.preset or "default")

    parser = argparse.ArgumentParser(
        usage="python train.py --model NAME (--block N | --block all | --end-to-end | --control | --eval | "
              "--sample) [flags]", description=__doc__, parents=[before], allow_abbrev=False,
        exit_on_error=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--block", metavar="N|all", help="train block N alone, or every block in turn")
    parts.add_argument("--end-to-end", action="store_true", help="train (with --sample: sample) the baseline")
    parts.add_argument("--control", action="store_true", help="the same with the control: one block's layers")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--eval", action="store_true", help="score the blocks beside baseline and control")
    actions.add_argument("--sample", action="store_true", help="generate from the blocks, baseline or control")
    often = parser.add_argument_group("often used")
    for title, cls in (("training", Training), ("run", Run), ("data", source.Settings),
                       (f"model {known.model}", module.Config), ("sampling", module.Sampling)):
        group = parser.add_argument_group(title)
        add_flags(often, group, replaced(defaults(cls), preset), hidden=(*source.FACTS, *NO_FLAGS))
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = re.findall(r"--[a-z][\w-]+", parser.format_help())
        near = difflib.get_close_matches(unknown[0], flags, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown flag {unknown[0]}{hint}")
    action, part = what_was_asked(typed)
    needs = {"train": "Block", "eval": "evaluate", "sample": "sample"}[action]
    if not hasattr(module, needs):
        raise UserError(f"{known.model}.py lacks {needs}")
    settings = {name: value for name, value in vars(typed).items() if name not in NO_SETTINGS}
    return Asked(action, part, known.model, module, source, preset, settings, known.preset)


def import_model(name):
    """The model file NAME.py beside this one. Raises UserError if it is not there or lacks something."""
    if not name.isidentifier() or not Path(__file__).with_name(f"{name}.py").exists():
        raise UserError(f"no {name}.py here; choose vit, dit, gpt, mdm, recurrent or write your own")
    module = importlib.import_module(name)
    lacks = [part for part in CONTRACT if not hasattr(module, part)]
    if lacks:
        raise UserError(f"{name}.py lacks {', '.join(lacks)}")
    for settings in ("Config", "Sampling"):
        if not is_dataclass(getattr(module, settings)):
            raise UserError(f"{name}.py: {settings} must be a dataclass")
    if not hasattr(defaults(module.Config), "noise"):
        raise UserError(f"{name}.py: Config needs a field noise, LogNormal or Masking")
    if module.DATA not in ("text", "images") and importlib.util.find_spec(f"data.{module.DATA}") is None:
        raise UserError(f"{name}.py: DATA is {module.DATA!r}; choose text or images, or write data/{module.DATA}.py")
    return module


def preset_of(model, module, source, name):
    """The values of a preset. Raises UserError if there is none of that name, or it names no setting."""
    if name not in module.PRESETS:
        raise UserError(f"{model}.py lacks a preset {name!r}; it has {', '.join(module.PRESETS)}")
    known = set()
    for cls in (Training, Run, source.Settings, module.Config, module.Sampling):
        known |= set(flat(defaults(cls)))
    unknown = set(module.PRESETS[name]) - known
    if unknown:
        raise UserError(f"{model}.py: the preset {name!r} names {min(unknown)!r}, which is no setting")
    return module.PRESETS[name]


def what_was_asked(typed):
    """(action, part) of the flags typed. Raises UserError if they are too few or do not go together."""
    part = "blocks"
    if typed.end_to_end:
        part = "end_to_end"
    elif typed.control:
        part = "control"
    elif typed.block not in (None, "all"):
        part = f"block_{typed.block}"
    if typed.eval:
        if typed.block or part != "blocks":
            raise UserError("say what to do: --eval scores all parts; drop --block, --end-to-end or --control")
        return "eval", part
    if typed.sample:
        if typed.block:
            raise UserError("say what to do: --sample asks all blocks; drop --block")
        return "sample", part
    if part == "blocks" and typed.block is None:
        raise UserError("say what to do: --block N, --block all, --end-to-end, --control, --eval or --sample")
    return "train", part


# ---- Settings: a flag for each field of Training, Run, the data's Settings, the model's Config and Sampling

def defaults(cls):
    try:
        return cls()
    except TypeError as e:
        raise UserError(f"every field of {cls.__name__} needs a default ({e})") from None


def flat(settings):
    """{field: value} of a dataclass and of those nested in it, such as a Config's noise."""
    values = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            values |= flat(value)
        elif f.init:
            values[f.name] = value
    return values


def replaced(settings, values):
    """A dataclass with the fields that `values` names replaced, in it and in those nested in it."""
    new = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            new[f.name] = replaced(value, values)
        elif f.init:
            new[f.name] = values.get(f.name, value)
    with user_errors():
        return replace(settings, **new)


@contextlib.contextmanager
def user_errors():
    """A ValueError of a model file, such as a Config's about its values, becomes a one-line error."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from e


def add_flags(often, group, settings, hidden):
    """A flag for every field of a dataclass and of those nested in it; the field's comment is its help."""
    cls = type(settings)
    types, comments = typing.get_type_hints(cls), comments_of(cls)
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            add_flags(often, group, value, hidden)
        elif f.init and f.name not in hidden:
            where = often if f.name in OFTEN else group
            options = options_for(types[f.name], f"{cls.__name__}.{f.name}")
            text = f"{comments.get(f.name, '')} (default: {value!r})".replace("%", "%%")
            where.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **options)


def options_for(kind, name):
    """What argparse has to know of a field's type. Raises UserError for a type that no flag can have."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is tuple:
        return {"nargs": "+"}
    if kind in (int, float, str):
        return {"type": kind}
    raise UserError(f"{name} has the type {kind}; a flag can be bool, int, float, str or a plain tuple, and a "
                    f"field that is no flag needs field(init=False)")


def comments_of(cls):
    """{field: the comment at the end of its line} of a dataclass."""
    try:
        source = inspect.getsource(cls)
    except OSError:  # made at run time
        return {}
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", source, re.MULTILINE))


def values_of(asked):
    """{field: value} of all settings: a preset's, those of a checkpoint outvote it, typed ones outvote both."""
    typed = dict(asked.typed)
    if "steps" in typed and "epochs" in typed:
        raise UserError("--steps and --epochs both say how long to train; type one of them")
    if "steps" in typed:
        typed["epochs"] = 0.0
    refuse_without_effect(asked)
    saved = {}
    if asked.action != "train" or typed.get("resume"):
        out = {**asked.preset, **typed}.get("out", Run.out)
        part = "block_0" if asked.part == "blocks" else asked.part
        path = settings_to_follow(checkpoint_path(out, asked.model, part))
        if path is not None:
            state = load(path, asked.model)
            saved = {**state["config"], **state["training"], **state["settings"]}
    return {**asked.preset, **saved, **typed}


def tell_outvoted(asked, values):
    """Print which values of a preset that was typed a checkpoint outvotes."""
    if not asked.typed_preset or not asked.typed.get("resume"):
        return
    typed = set(asked.typed)
    if typed & {"steps", "epochs"}:
        typed |= {"steps", "epochs"}  # one says what the other is
    others = [f"{name} {values[name]}, not {value}" for name, value in asked.preset.items()
              if name not in typed and values[name] != value and value != "auto"]
    if others:
        print(f"note: the checkpoint outvotes --preset {asked.typed_preset}: {'; '.join(others)}")


def refuse_without_effect(asked):
    """Raises UserError that names a typed flag which this action does not look at."""
    used = set(flat(defaults(asked.source.Settings)))
    if asked.action == "train":
        used |= {*flat(Run()), *flat(Training()), *flat(defaults(asked.module.Config))}
    else:
        used |= {"device", "threads", "out"}
    if asked.action == "sample":
        used |= {*flat(defaults(asked.module.Sampling)), "seed"}
    useless = set(asked.typed) - used
    if useless:
        raise UserError(f"--{min(useless).replace('_', '-')} has no effect here; drop it")


# ---- From the command line to the loop --------------------------------------------------------------------

def set_up(run, training, local_rank=0):
    """The device with its index, and Training with what auto means there. Raises UserError."""
    name = run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # mps, which no one tried yet, only if typed
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {run.device} cannot be used here: {str(e).splitlines()[0]}") from None
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # on the default stream nothing can be recorded
    if run.threads > 0:
        torch.set_num_threads(run.threads)
    if training.precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        training = replace(training, precision="bf16" if bf16 else "float32")
    if training.compile == "auto":
        training = replace(training, compile="on" if cuda else "off")
    return device, training


def parts_to_train(asked, values):
    """["block_0", ...], ["end_to_end"] or ["control"]. Raises UserError for a block that does not exist."""
    if asked.part == "control" and not hasattr(asked.module.Config, "control"):
        raise UserError(f"{asked.model}.py: Config needs control(), which returns the Config of the control")
    if asked.part in ("end_to_end", "control"):
        return [asked.part]
    n_blocks = replaced(asked.module.Config(), values).noise.n_blocks
    blocks = [f"block_{b}" for b in range(n_blocks)]
    if asked.part == "blocks":
        return blocks
    if asked.part not in blocks:
        number = asked.part.removeprefix("block_")
        raise UserError(f"no block {number}; {asked.model} has blocks 0 to {n_blocks - 1}")
    return [asked.part]


def check_out(run, model, parts):
    """Raises UserError if a checkpoint would be replaced unasked, or nothing can be written."""
    for part in parts:
        path = checkpoint_path(run.out, model, part)
        if path.exists() and not (run.resume or run.overwrite):
            raise UserError(f"{path} is there already: --resume goes on with it, --overwrite trains it anew, "
                            f"--out names another place")
    folder = Path(run.out) / model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"--out {run.out}: {folder} cannot be written ({e.strerror}); name another place") from None


def train_parts(asked, parts, values, run, training, data, device):
    """Train the parts, or those of them that this process is there for."""
    rank, n_ranks, _ = torchrun_ranks()
    parts, part_rank, world_size = assign(parts, rank, n_ranks)
    check_out(run, asked.model, parts)
    config = replaced(asked.module.Config(), {**values, **data.facts})
    if training.epochs > 0:
        steps = math.ceil(training.epochs * data.length(config) / training.batch_size)
        training = replace(training, steps=max(1, steps))
    if world_size > 1:
        # each rank gets as many pieces as any other
        pieces = math.ceil(training.accumulate / world_size) * world_size
        if training.batch_size % pieces:
            raise UserError(f"{world_size} processes cannot share a batch of {training.batch_size} evenly, in "
                            f"{pieces} pieces; choose another --batch-size, --accumulate or number of processes")
        training = replace(training, accumulate=pieces)
        connect(parts[0], part_rank, world_size, device)
    if rank == 0:
        tell_outvoted(asked, values)
        print(f"data: {data.describe()}; {device}, {torch.get_num_threads()} threads", flush=True)
    signal_number = 0
    with stopping_by_signal():
        for part in parts:
            signal_number = train(Job(asked.model, asked.module, part, config, training, run, data, device,
                                      part_rank, world_size))
            gc.collect()  # compiled layers form reference cycles; free them before the next part
            if signal_number:
                break
    if world_size > 1:
        dist.barrier()  # the first to leave takes with it what the others still need
        dist.destroy_process_group()
    if signal_number:
        sys.exit(128 + signal_number)


def main(argv):
    asked = parse(argv)
    values = values_of(asked)
    run = replaced(Run(), values)
    training = replaced(Training(), values)
    _, n_ranks, local_rank = torchrun_ranks()
    if asked.action == "train":
        parts = parts_to_train(asked, values)  # first: a mistake is told before the data is prepared
    elif n_ranks > 1:
        raise UserError(f"--{asked.action} runs in one process: start it without torchrun")
    device, training = set_up(run, training, local_rank)
    with user_errors():
        data = asked.source.Data(replaced(asked.source.Settings(), values), device, training.seed)
    if asked.action == "train":
        train_parts(asked, parts, values, run, training, data, device)
    elif asked.action == "eval":
        evaluate(asked.module, asked.model, run, data, device)
    else:
        sampling = replaced(asked.module.Sampling(), values)
        sample(asked.module, asked.model, asked.part, run, sampling, training.seed, data, device)


def is_out_of_memory(error):
    """Whether an error says that memory, of a device or of the machine, was not enough."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def out_of_memory_line(error):
    text = str(error)
    what = text.split("DefaultCPUAllocator: ")[-1].split(" GPU ")[0]
    return f"not enough memory ({what}); to train, try --accumulate or --checkpoint-activations"


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack characters of a text or of a file's name
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a closed pipe is noticed here, and not at the interpreter's end
    except (UserError, argparse.ArgumentError) as e:
        sys.exit(f"error: {e}")
    except (BrokenPipeError, KeyboardInterrupt):  # as of `| head`, or of Ctrl-C while nothing is trained
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PermissionError as e:
        sys.exit(f"error: {e.filename} cannot be read or written ({e.strerror})")
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(f"error: {out_of_memory_line(e)}")
