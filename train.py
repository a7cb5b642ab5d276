"""Train one block of a model alone, or the whole model end to end; evaluate and sample what has been trained.

    python train.py --model gpt --block 2       one block: nothing of the other blocks is ever in this process
    python train.py --model gpt --block all     every block, one after another, one in memory at a time
    python train.py --model gpt --end-to-end    the baseline: all layers, backpropagation through all of them
    python train.py --model gpt --control       the control: one block's worth of layers, end to end
    python train.py --model gpt --eval          assemble out/gpt and score it beside baseline and control
    python train.py --model gpt --memory        what an update needs, term by term; --bench: its time
    python train.py --model gpt --sample        generate from the blocks (or --end-to-end: the baseline)

This file holds flags, data, one training loop, checkpoints, the division among processes, and the measuring
of memory and time; it knows nothing of noise levels. A model file offers Config, PRESETS, Sampling, DATA,
check, check_sampling, Block, EndToEnd, control, evaluate, sample, sampling_step, and JUDGE if it is scored by
another model's baseline. """
import argparse
import contextlib
import copy
import fcntl
import functools
import gc
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import statistics
import sys
import sysconfig
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Callable, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

from diffusion_blocks import send

MODELS = ("gpt", "vit", "dit", "mdm", "recurrent")
# what a model file offers
CONTRACT = ("Config", "PRESETS", "Sampling", "DATA", "check", "check_sampling", "Block", "EndToEnd",
            "control", "evaluate", "sample", "sampling_step")


@dataclass
class Training:
    steps: int = 1000               # optimizer updates for each block (and as many for the baseline)
    epochs: float = 0.0             # passes over the data in the place of steps; 0: as --steps says
    batch_size: int = 16            # sequences or images in an update
    accumulate: int = 1             # parts a process cuts its batch into, to save memory (gradients add up)
    lr: float = 1e-3                # peak learning rate (AdamW, betas 0.9 and --beta2)
    beta2: float = 0.95             # AdamW's second beta
    weight_decay: float = 0.1       # on matrices only, not on gains and biases
    warmup: int = 50                # updates of linear warm-up, counted for each block by itself
    final_lr: float = 0.05          # where the cosine ends, as a fraction of lr
    clip: float = 1.0               # largest gradient norm
    checkpoint_activations: bool = False  # keep only each layer's input and compute the layer twice
    precision: str = "auto"         # of products: bf16, tf32 or float32; auto: bf16 on CUDA, else float32
    compile: str = "auto"           # torch.compile of layers: off, default, reduce-overhead..; auto: on CUDA
    ema: float = 0.0                # decay of a running mean of the weights, at most (1+n)/(10+n); 0: none
    seed: int = 0                   # a block's random stream is a function of (seed, block) alone
    threads: int = 0                # CPU threads; 0: all cores, or torchrun's share. Same number, same bits
    device: str = "auto"            # auto, cpu, cuda, cuda:1, mps
    out: str = "out"                # checkpoints and logs go to OUT/MODEL
    resume: bool = False            # go on from the checkpoint; on CPU the result is the same to the bit
    log_every: int = 50             # updates between log lines
    save_every: int = 200           # updates between checkpoints
    save_minutes: float = 0.0       # a checkpoint also after so many minutes; 0: by updates only


@dataclass
class TextTraining(Training):
    data: str = "stdlib"  # stdlib, a text file, a folder, or a Hugging Face hub id (a folder in hub form too)
    split: str = "train"            # split of a hub dataset to train on
    column: str = "text"            # column of a hub dataset that holds the text
    tokenizer: str = "bytes"        # bytes, or any tiktoken encoding such as gpt2


@dataclass
class ImageTraining(Training):
    data: str = "digits"  # digits, a hub id, a folder in hub form or of images by class, an .npz of latents
    split: str = "train"            # split of a dataset to train on
    image_column: str = ""          # column that holds the images; empty: the one whose type is image
    label_column: str = ""          # column that holds the labels; empty: the class label with most classes
    augment: str = "none"           # none, or any of crop, flip, rand (RandAugment), joined by commas


# what may differ between a checkpoint and the command that resumes it: none of these changes a weight
FREE = {"data", "split", "column", "image_column", "label_column", "device", "out", "resume", "log_every",
        "save_every", "save_minutes", "checkpoint_activations"}


class UserError(Exception):
    """What the user has to mend, in one line."""


class Interrupted(BaseException):
    """A signal that asks the program to end: its number, and what there is to go on from, if anything."""


def say(text):
    print(f"{text}\n", end="", flush=True)  # as one piece, since processes share a terminal


def progress(text):
    """A line that is overwritten; on terminals only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------------------------------------
# Flags: one for each field of Training, of the model's Config and of its Sampling; its comment is its help

def add_flags(parser, cls, preset):
    """One flag for every field. An absent flag leaves no trace, so that presets can be told from what was
    typed."""
    source = "".join(inspect.getsource(c) for c in cls.__mro__[:-1])
    notes = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", source, re.M))
    for field, kind in get_type_hints(cls).items():
        default = preset.get(field, getattr(cls, field))
        text = f"{notes[field]} (default: {' '.join(map(repr, default)) if kind is tuple else default!r})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if kind is tuple:
            how = {"type": str, "nargs": "+"}
        parser.add_argument("--" + field.replace("_", "-"), default=argparse.SUPPRESS,
                            help=text.replace("%", "%%"), **how)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; `python train.py --help` lists the flags")


def parse(argv):
    """(model name, module, flags given, preset) of a command line. Raises UserError."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="gpt")
    first.add_argument("--preset", default="default")
    known, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    own = Path(__file__).parent / f"{known.model}.py"
    if known.model not in MODELS and not (known.model.isidentifier() and own.exists()):
        raise UserError(f"no model {known.model!r}; choose one of {', '.join(MODELS)}, or name a file of "
                        f"your own beside train.py, without its .py")
    try:
        module = importlib.import_module(known.model)
    except ImportError as e:
        raise UserError(f"{own.name} cannot be imported: {e}") from None
    lacks = [name for name in CONTRACT if not hasattr(module, name)]
    if lacks:
        raise UserError(f"{own.name} is not a model file: it lacks {', '.join(lacks)}")
    if known.preset not in module.PRESETS:
        raise UserError(f"{known.model} has no preset {known.preset!r}; it has {', '.join(module.PRESETS)}")
    preset = module.PRESETS[known.preset]

    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt", help=f"one of {', '.join(MODELS)} (default: 'gpt')")
    parser.add_argument("--preset", default="default",
                        help=f"one of {', '.join(module.PRESETS)} (default: 'default')")
    what = parser.add_argument_group("what to do (one; --sample also with --end-to-end or --control)")
    what.add_argument("--block", metavar="N|all", help="train block N alone, or every block in turn")
    what.add_argument("--end-to-end", action="store_true", help="train the baseline")
    what.add_argument("--control", action="store_true", help="train the control, one block's worth of layers")
    what.add_argument("--eval", action="store_true", help="score the blocks beside baseline and control")
    what.add_argument("--memory", action="store_true", help="measure what an update needs, uncompiled")
    what.add_argument("--bench", type=int, nargs="?", const=30, metavar="ROUNDS",
                      help="time updates and sampling of all parts in turn, 30 rounds unless told")
    what.add_argument("--sample", action="store_true", help="generate")
    add_flags(parser.add_argument_group("training"), LOADERS[module.DATA].settings, preset)
    add_flags(parser.add_argument_group(f"model {known.model}"), module.Config, preset)
    add_flags(parser.add_argument_group("sampling"), module.Sampling, preset)
    args = vars(parser.parse_args(argv))
    chosen = [k for k in ("block", "end_to_end", "control", "eval", "memory", "bench", "sample")
              if args[k]]
    if "steps" in args:
        if "epochs" in args:
            raise UserError("give --steps or --epochs, not both")
        args["epochs"] = 0.0  # a preset's epochs do not outvote what was typed
    if len(chosen) != 1 and chosen not in (["end_to_end", "sample"], ["control", "sample"]):
        raise UserError("say what to do, one thing: --block N, --block all, --end-to-end, --control, --eval, "
                        "--memory, --bench or --sample")
    if args["bench"] is not None and args["bench"] < 2:
        raise UserError("--bench needs at least 2 rounds")
    return args, module, preset


def settle(cls, *layers):
    """An instance of a dataclass from its defaults and then each layer of values, the last one winning."""
    names = {f.name for f in fields(cls)}
    return cls(**{k: v for layer in layers for k, v in layer.items() if k in names})


def check(training):
    for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
        if getattr(training, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if training.batch_size % training.accumulate:
        raise UserError(f"--accumulate {training.accumulate} must divide --batch-size {training.batch_size}")
    if (training.threads < 0 or training.warmup < 0 or not 0 <= training.epochs < math.inf
            or not training.save_minutes >= 0):
        raise UserError("--threads, --warmup, --epochs and --save-minutes must not be negative")
    if not (math.isfinite(training.lr) and training.lr > 0 and 0 <= training.beta2 < 1 and training.clip > 0
            and 0 <= training.ema < 1):
        raise UserError("need --lr > 0, 0 <= --beta2 < 1, --clip > 0 and 0 <= --ema < 1")
    if training.precision not in ("auto", "bf16", "tf32", "float32"):
        raise UserError(f"--precision {training.precision}: choose auto, bf16, tf32 or float32")
    modes = ("auto", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    if training.compile not in modes:
        raise UserError(f"--compile {training.compile}: choose one of {', '.join(modes)}")


def pick_device(name, local_rank=None):
    """A torch.device from a name; auto takes CUDA, then Apple's MPS, then the CPU; of torchrun's processes
    each takes its own GPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and local_rank is not None and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs are too few for torchrun's processes here; "
                            f"start one for each")
        name = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=name)
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None


def choose_speed(training, device):
    """Settle what `auto` means for --precision and --compile on a device, and set torch accordingly."""
    cuda = device.type == "cuda"
    if training.precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        training.precision = "bf16" if bf16 else "tf32" if cuda else "float32"
    torch.set_float32_matmul_precision("highest" if training.precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = training.precision != "float32"
    if training.compile == "auto":
        training.compile = "default" if cuda else "off"
    if training.compile != "off":
        for limit in {"recompile_limit", "cache_size_limit"} & set(dir(torch._dynamo.config)):
            setattr(torch._dynamo.config, limit, 64)  # all layers of all parts share one function
        try:
            net, x = nn.Linear(8, 8, device=device), torch.ones(8, 8, device=device)
            torch.compile(net.forward, mode=training.compile)(x).sum().backward()
        except Exception as e:  # no compiler, no Triton, a GPU that is too old, ...
            say(f"note: torch.compile does not work here ({type(e).__name__}); going on without it")
            training.compile = "off"


@contextlib.contextmanager
def replacing(path):
    """A file to write that takes the place of `path` when it is complete: whatever happens, what has that
    name is whole, the old or the new. Raises UserError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too
        os.close(folder)
    except (OSError, RuntimeError) as e:  # torch.save turns the first into the second, and its reason is lost
        reason = getattr(e, "strerror", None) or "writing failed, as where a disk is full"
        raise UserError(f"cannot write {path}: {reason}; what was there before is untouched") from None
    finally:
        part.unlink(missing_ok=True)


# -----------------------------------------------------------------------------------------------------------
# Text: prepared once into memory-mapped token files under data/, then read from there alone

DATA_DIR = Path(__file__).parent / "data"
SPLITS = ("train", "val")
PIECE = 1 << 20  # characters tokenised at a time


class Tokenizer:
    """Bytes, or a tiktoken encoding, which is imported when a text is first encoded or decoded."""

    def __init__(self, name):
        self.name = name

    def _tiktoken(self):
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"--tokenizer {self.name} needs tiktoken: pip install tiktoken") from None
        try:
            return tiktoken.get_encoding(self.name)
        except ValueError:
            raise UserError(f"tiktoken has no encoding {self.name!r}; choose bytes, "
                            f"{', '.join(tiktoken.list_encoding_names())}") from None
        except Exception as e:  # whatever the network raises
            raise UserError(f"tiktoken could not fetch {self.name!r} ({type(e).__name__}); without network, "
                            f"set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None

    def encode(self, text):
        """str or bytes -> 1-d integer array of token ids."""
        if self.name == "bytes":
            return np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return np.array(self._tiktoken().encode_ordinary(text), dtype=np.uint32)

    def decode(self, tokens):
        tokens = [int(t) for t in tokens]
        if self.name == "bytes":
            return bytes(tokens).decode(errors="replace")
        return self._tiktoken().decode(tokens)

    def token_bytes(self):
        """(V,) number of bytes that each token stands for."""
        if self.name == "bytes":
            return np.ones(256, dtype=np.int64)
        encoding = self._tiktoken()
        # special tokens, and numbers that are no token, stay 0
        sizes = np.zeros(encoding.n_vocab, dtype=np.int64)
        special = {encoding.encode_single_token(s) for s in encoding.special_tokens_set}
        for i in set(range(encoding.n_vocab)) - special:
            try:
                sizes[i] = len(encoding.decode_single_token_bytes(i))
            except KeyError:
                pass
        return sizes


def pieces(text):
    """A long text cut before the first white space after a word, where GPT-2's encoding cuts no token."""
    start = 0
    while start < len(text):
        end = start + PIECE
        space = b" \n" if isinstance(text, bytes) else " \n"
        while end < len(text) and (text[end:end + 1] not in space or text[end - 1:end] in space):
            end += 1
        yield text[start:end]
        start = end


def stdlib_files():
    """The standard library's own sources, sorted: no installed packages, no tests (not every machine has
    them)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    return root, [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]


def local_documents(source):
    """(identity, train documents, held-out documents) of stdlib, a text file or a folder of .txt files, as
    bytes."""
    if source == "stdlib":
        root, files = stdlib_files()
        identity = {"source": "stdlib", "python": platform.python_version()}
    else:
        root = Path(source) if Path(source).is_dir() else Path(source).parent
        files = sorted(root.rglob("*.txt")) if Path(source).is_dir() else [Path(source)]
        if files and files[0].suffix in HUB_FORM:
            raise UserError(f"{source} is a dataset file, not a text; give the folder that holds it")
        if not files:
            raise UserError(f"{source} holds no .txt file and no dataset file ({', '.join(HUB_FORM)})")
        identity = {"source": Path(source).name}
    try:
        documents = [p.read_bytes() for p in files]
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
    digest = hashlib.sha256()
    for path, document in zip(files, documents):
        digest.update(f"{path.relative_to(root)} {len(document)}\n".encode() + document)
    identity |= {"files": len(files), "bytes": sum(map(len, documents)), "sha256": digest.hexdigest()}
    if len(documents) >= 10:
        held = documents[9::10]
        return identity, [d for i, d in enumerate(documents) if i % 10 != 9], held
    text = b"\n".join(documents)
    cut = len(text) * 9 // 10
    return identity, [text[:cut]], [text[cut:]]


HUB_FORM = (".parquet", ".arrow", ".jsonl", ".csv")


def is_hub_folder(path):
    suffixes = {p.suffix for p in path.rglob("*")} if path.is_dir() else set()
    return bool(suffixes & set(HUB_FORM))


def import_datasets(source):
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {source} needs datasets: pip install -r requirements.txt") from None
    datasets.disable_progress_bars()
    return datasets


def hub_documents(source, split, column):
    """(train documents, held-out documents) of a dataset, streamed. Held out: its validation or test split if
    it has one other than `split`, else every hundredth document."""
    datasets = import_datasets(source)
    try:
        names = datasets.get_dataset_split_names(source)
        if split not in names:
            raise UserError(f"{source} has no split {split!r}; it has {', '.join(names)}")
        train = datasets.load_dataset(source, split=split, streaming=True)
        other = next((n for n in ("validation", "test") if n in names and n != split), None)
        held = datasets.load_dataset(source, split=other, streaming=True) if other else None
        columns = list(next(iter(train.take(1))))
    except UserError:
        raise
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(f"cannot load {source!r} ({type(e).__name__}: {reason}); give a hub id, a folder in "
                        f"hub form, a text file, a folder of .txt files, or stdlib") from None
    if column not in columns:
        raise UserError(f"{source} has no column {column!r}; choose by --column one of {', '.join(columns)}")

    def read(dataset, keep):
        for i, row in enumerate(dataset):
            if keep(i):
                if not isinstance(row[column], str):
                    raise UserError(f"column {column!r} of {source}, row {i}, is no text")
                yield row[column]
    if held is not None:
        return read(train, lambda i: True), read(held, lambda i: True)
    return read(train, lambda i: i % 100 != 99), read(train, lambda i: i % 100 == 99)


def write_tokens(documents, path, tokenizer, dtype):
    """Token ids of all documents, a line end between two, into a flat binary file; returns (tokens,
    sha256)."""
    digest, count, line_end = hashlib.sha256(), 0, tokenizer.encode("\n").astype(dtype)
    with open(path, "wb") as f:
        for i, document in enumerate(documents):
            for j, piece in enumerate(pieces(document)):
                ids = tokenizer.encode(piece).astype(dtype)
                data = (ids if i == 0 or j else np.concatenate([line_end, ids])).tobytes()
                f.write(data)
                digest.update(data)
                count += len(data) // dtype.itemsize
            progress(f"preparing {path.stem}: {i + 1:,} documents, {count:,} tokens")
        f.flush()
        os.fsync(f.fileno())
    progress("")
    return count, digest.hexdigest()


class Text:
    """Prepared text: random windows for training, evenly spaced ones for evaluation."""

    def __init__(self, folder, device):
        try:
            self.meta = read_meta(folder)
            dtype = np.dtype(self.meta["dtype"])
            self.tokens = {s: np.memmap(folder / f"{s}.bin", dtype, "r") for s in SPLITS}
            token_bytes = np.load(folder / "token_bytes.npy")
            whole = (sha256(token_bytes) == self.meta["token_bytes"]
                     and all(sha256(self.tokens[s]) == self.meta[s]["sha256"] for s in self.tokens))
        except Exception:  # of a damaged file: numpy's parser of headers raises what it likes
            whole = False
        if not whole:
            raise UserError(f"prepared data in {folder} is damaged; delete that folder and run again")
        self.token_bytes = torch.from_numpy(token_bytes).to(device)
        self.device, self.facts = device, {"vocab_size": len(token_bytes)}
        self.fingerprint = self.meta["train"]["sha256"][:16] + self.meta["val"]["sha256"][:16]

    def describe(self):
        m = self.meta
        where = f" of Python {m['python']}" if "python" in m else ""
        return (f"{m['source']}{where}, tokenizer {m['tokenizer']}, {m['train']['tokens']:,} tokens to train "
                f"on, {m['val']['tokens']:,} held out, fingerprint {self.fingerprint[:12]}")

    def length(self, config):
        """Examples in one epoch."""
        return len(self.tokens["train"]) // config.seq_len

    def require(self, config):
        for split, tokens in self.tokens.items():
            if len(tokens) < config.seq_len + 2:
                raise UserError(f"the {split} text has {len(tokens):,} tokens, too few for --seq-len "
                                f"{config.seq_len}; give a longer text or a smaller --seq-len")

    def cut(self, split, starts, config):
        rows = np.stack([self.tokens[split][i:i + config.seq_len + 1] for i in starts])  # (B, T + 1)
        return send(torch.from_numpy(rows.astype(np.int64)), self.device)

    def batch(self, n, config, index):
        """(n, T + 1) random windows of the training text, from torch's CPU random stream, whatever the
        index."""
        high = len(self.tokens["train"]) - config.seq_len
        return self.cut("train", torch.randint(high, (n,)).tolist(), config)

    def held_out(self, n, config):
        """(n, T + 1) windows at even distances over the held-out text; always the same."""
        n = max(1, min(n, len(self.tokens["val"]) // config.seq_len))
        last = len(self.tokens["val"]) - config.seq_len - 1
        return self.cut("val", np.linspace(0, last, n).astype(np.int64), config)

    def unigram(self):
        """(V,) log-probabilities of the tokens in the training text, each counted once more than it
        occurs."""
        counts = np.ones(len(self.token_bytes))
        for i in range(0, len(self.tokens["train"]), 1 << 24):
            counts += np.bincount(self.tokens["train"][i:i + (1 << 24)], minlength=len(counts))
        return torch.from_numpy(np.log(counts / counts.sum())).float().to(self.device)


def prepare(folder, write):
    """Let write(part) fill a temporary folder with prepared data and return what is to be known about it;
    rename that to `folder`: what has the name is whole. Of several processes one does it, the others wait.
    Raises UserError where nothing can be written."""
    part = DATA_DIR / f".{folder.name}.part"
    try:
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        with open(DATA_DIR / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, whatever happens
            if folder.exists():
                return
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            try:
                part.mkdir()
                meta = write(part)
                (part / "meta.json").write_text(json.dumps({"checksum": checksum(meta)} | meta))
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write prepared data under {DATA_DIR}: {e.strerror}") from None


def checksum(meta):
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def read_meta(folder):
    """meta.json of prepared data. Raises ValueError or OSError if it is not as it was written."""
    meta = json.loads((folder / "meta.json").read_text())
    if not isinstance(meta, dict) or meta.pop("checksum", None) != checksum(meta):
        raise ValueError("wrong checksum")
    return meta


def sha256(array):
    """Of an array's bytes, in hexadecimal; of a memory-mapped one this reads the whole file."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()


def load_text(training, device):
    """Text as --data, --split, --column and --tokenizer say, prepared if it is not yet. Raises UserError."""
    source, tokenizer = training.data, Tokenizer(training.tokenizer)
    local = source == "stdlib" or (Path(source).exists() and not is_hub_folder(Path(source)))
    if local:
        identity, train, held = local_documents(source)
    else:
        identity = {"source": source.rstrip("/").split("/")[-1] if Path(source).is_dir() else source,
                    "split": training.split, "column": training.column}
        files = sorted(p for p in Path(source).rglob("*") if p.is_file()) if Path(source).is_dir() else []
        identity["files"] = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    key = hashlib.sha256(json.dumps([2, identity, training.tokenizer]).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{identity['source']}-{training.tokenizer}")
    folder = DATA_DIR / f"{name}-{key}"

    def write(part):
        texts = (train, held) if local else hub_documents(source, training.split, training.column)
        token_bytes = tokenizer.token_bytes()
        dtype = np.min_scalar_type(len(token_bytes) - 1)
        np.save(part / "token_bytes.npy", token_bytes)
        meta = identity | {"tokenizer": training.tokenizer, "dtype": dtype.name,
                           "token_bytes": sha256(token_bytes)}
        for split, documents in zip(SPLITS, texts):
            count, digest = write_tokens(documents, part / f"{split}.bin", tokenizer, dtype)
            if count < 2:
                raise UserError(f"{source}: the {split} text is empty; give a longer text")
            meta[split] = {"tokens": count, "sha256": digest}
        return meta
    if not folder.exists():
        prepare(folder, write)
    return Text(folder, device)


# -----------------------------------------------------------------------------------------------------------
# Images: prepared once like text, into memory-mapped arrays; batches are cut from a row of shuffled epochs

DIGITS = Path(__file__).parent / "data" / "digits.npz"  # made by results/make_digits.py
def shuffled(n, *what):
    """(n,) a permutation that is a function of `what` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*what)))


def divide(source, labels, held, names):
    """{split: rows} to train on and held out, from the labels of the one split and of the other. If `held` is
    None, a tenth of each class is held out, at least one image. Raises UserError."""
    for split, own in (("training", labels), ("held-out", labels if held is None else held)):
        odd = np.flatnonzero((own < 0) | (own >= len(names)))
        if len(odd):
            raise UserError(f"{source}: row {odd[0]} of the {split} split has label {own[odd[0]]}, but the "
                            f"classes are 0 to {len(names) - 1}; mend it or name another --label-column")
    if held is None:
        of_class = [np.flatnonzero(labels == c) for c in range(len(names))]
        tenths = [own[shuffled(len(own), 0, "held out").numpy()[:max(1, len(own) // 10)]] for own in of_class]
        others = np.sort(np.concatenate(tenths or [np.arange(0)]))
        rows = np.setdiff1d(np.arange(len(labels)), others)
    else:
        rows, others = np.arange(len(labels)), np.arange(len(held))
    if not len(rows) or not len(others):
        raise UserError(f"{source}: no image to {'hold out' if len(rows) else 'train on'}; give more images")
    absent = np.setdiff1d(np.arange(len(names)), labels[rows])
    if len(absent):
        raise UserError(f"{source}: class {names[absent[0]]!r} (label {absent[0]}) has no image to train on; "
                        f"remove the class, or name another --split or --label-column")
    return {"train": rows, "val": others}


def numbered(labels):
    """Names of the classes 0, 1, ... to the greatest label; no more than make sense."""
    return [str(c) for c in range(min(labels.max(initial=-1), len(labels)) + 1)]


def prepare_latents(training, part):
    """Write the arrays of an .npz of latents into the folder `part`; returns facts for meta.json. Raises
    UserError."""
    source = training.data
    try:
        with np.load(source, allow_pickle=False) as file:
            data = {k: file[k] for k in ("latents", "labels", "val_latents", "val_labels") if k in file.files}
    except Exception as e:  # zipfile's, zlib's, numpy's or the system's
        raise UserError(f"cannot read {source} ({type(e).__name__}); it must be an .npz of latents "
                        f"(N, C, H, W) and labels (N,)") from None
    prefixes = ("", "val_") if "val_latents" in data or "val_labels" in data else ("", "")
    if "latents" in data and data["latents"].ndim == 4 and data["latents"].shape[1] in (1, 3):
        raise UserError(f"{source}: latents of 1 or 3 channels would be taken for pixels; give images as "
                        f"images, or latents of another VAE")
    for x, y in [(f"{prefix}latents", f"{prefix}labels") for prefix in prefixes]:
        if x not in data or y not in data:
            raise UserError(f"{source} has no {y if x in data else x}; it must hold latents and labels, and "
                            f"both or none of val_latents and val_labels")
        shape = data[x].shape
        if (len(shape) != 4 or shape[2] != shape[3] or shape[1:] != data["latents"].shape[1:]
                or data[x].dtype.kind != "f" or data[y].shape != shape[:1] or data[y].dtype.kind not in "iu"):
            raise UserError(f"{source}: {x} are {data[x].dtype} {shape}, {y} {data[y].dtype} "
                            f"{data[y].shape}; needed: floats (N, C, H, W), H = W, all of one size, and "
                            f"integers (N,)")
        if not np.isfinite(data[x]).all():
            raise UserError(f"{source}: {x} hold a number that is not finite; mend them")
    names = numbered(data["labels"])
    rows = divide(source, data["labels"], data.get("val_labels"), names)
    for split, prefix in zip(SPLITS, prefixes):
        latents = data[f"{prefix}latents"][rows[split]].astype(np.float32, copy=False)
        np.save(part / f"{split}_images.npy", latents)
        np.save(part / f"{split}_labels.npy", data[f"{prefix}labels"][rows[split]].astype(np.int64))
    return {"names": names}


def columns(features, training):
    """(image column, label column) of a dataset with these features. Raises UserError."""
    import datasets
    images = [k for k, v in features.items() if isinstance(v, datasets.Image)]
    classes = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
    integers = [k for k, v in features.items() if re.match("u?int", str(getattr(v, "dtype", "")))]
    classes.sort(key=lambda k: -features[k].num_classes)  # the finest: CIFAR-100 has superclasses, too
    for what, wish, fit, kind in (
            ("image", training.image_column, images, "images"),
            ("label", training.label_column, integers if training.label_column else classes, "class labels")):
        if not fit or wish and wish not in fit:
            raise UserError(f"{training.data} has no {what} column{f' {wish!r}' if wish else ''}; choose by "
                            f"--{what}-column one that holds {kind}, of {', '.join(features)}; a folder of "
                            f"images needs two classes or more")
    return training.image_column or images[0], training.label_column or classes[0]


def prepare_images(training, part):
    """Write the arrays of a dataset, read through `datasets`, into the folder `part`; returns facts for
    meta.json. Raises UserError."""
    source, split = training.data, training.split
    datasets = import_datasets(source)
    if Path(source).is_file():
        raise UserError(f"{source} is a file; give digits, a hub id, a folder in hub form or of images by "
                        f"class, or an .npz of latents")
    try:
        found = datasets.load_dataset(source)
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(f"cannot load {source!r} ({type(e).__name__}: {reason}); give digits, a hub id, a "
                        f"folder in hub form or of images by class, or an .npz of latents") from None
    if split not in found:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(found)}")
    image, label = columns(found[split].features, training)
    other = next((s for s in ("validation", "valid", "val", "test") if s in found and s != split), None)
    labels, held = (np.array([-1 if v is None else v for v in found[s][label]], dtype=np.int64)
                    if s else None for s in (split, other))
    names = getattr(found[split].features[label], "names", None) or numbered(labels)
    rows = divide(source, labels, held, names)
    undecoded = found.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    names_of = {"train": split, "val": other or split}
    decode({s: (f"{source}, split {name}", undecoded[name].select(rows[s]), rows[s])
            for s, name in names_of.items()}, image, part)
    np.save(part / "train_labels.npy", labels[rows["train"]])
    np.save(part / "val_labels.npy", (labels if held is None else held)[rows["val"]])
    return {"image_column": image, "label_column": label, "held_out": other or "a tenth", "names": names}


def decode(parts, column, part):
    """Write the images of {split: (its name, dataset, row numbers)} into the folder `part` as uint8
    (N, C, H, W), C = 1 if every one is grey, else 3. Raises UserError."""
    def cells(split, doing):
        name, dataset, rows = parts[split]
        for i, cell in enumerate(cell for batch in dataset.iter(1000) for cell in batch[column]):
            if i % 1000 == 0:
                progress(f"{doing} {name}: {i:,} of {len(rows):,} images")
            yield i, f"{name}, row {rows[i]}", cell
        progress("")
    size, mode = 0, "L"
    for split in SPLITS:
        for _, where, cell in cells(split, "checking"):
            head = open_image(cell, where)
            size = size or head.size[0]
            if head.size != (size, size):
                raise UserError(f"{where} is {head.size[0]} x {head.size[1]} pixels; needed is {size} x "
                                f"{size}, as images must be square and of one size; resize them first")
            mode = mode if head.mode in ("1", "L") else "RGB"
    for split in SPLITS:
        shape = (len(parts[split][2]), len(mode), size, size)
        # straight into the file: a large set need not fit into memory
        path = part / f"{split}_images.npy"
        pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a bus error later
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
        for i, where, cell in cells(split, "decoding"):
            pixels[i] = np.asarray(open_image(cell, where, mode)).reshape(size, size, -1).transpose(2, 0, 1)
        pixels.flush()


def open_image(cell, where, mode=None):
    """A PIL image of an undecoded cell: its header alone is read, unless it is to be decoded to a mode.
    Raises UserError that says where a damaged image is."""
    from PIL import Image
    try:
        raw = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        image = Image.open(io.BytesIO(raw))
        if image.mode[0] in "IF":
            raise ValueError(f"more than 8 bits in a pixel, mode {image.mode}")
        return image.convert(mode) if mode else image
    except Exception as e:  # decoders raise what they like
        path = f" ({cell['path']})" if cell and cell["path"] else ""
        reason = re.sub(" <.*>", "", (str(e).splitlines() or [""])[0])
        raise UserError(f"{where}{path} cannot be read as an image: {reason} "
                        f"({type(e).__name__}); mend it or remove it") from None


def digits():
    """{split: (images, labels)} of the digits in data/; their 17 levels are spread over 0..255."""
    try:
        with np.load(DIGITS) as file:
            images, labels, held_out = (file[k] for k in ("images", "labels", "held_out"))
    except Exception as e:  # zipfile's, zlib's, numpy's or the system's
        raise UserError(f"cannot read {DIGITS} ({type(e).__name__}: {e}); it comes with this project: git "
                        f"restore it") from None
    images = np.rint(images[:, None] * (255 / 16)).astype(np.uint8)  # (N, 1, 8, 8)
    labels = labels.astype(np.int64)
    return {s: (images[held_out == (s == "val")], labels[held_out == (s == "val")]) for s in SPLITS}


def on_scale(images):
    """Bytes 0..255 to [-1, 1]; latents stay as they are. Arrays and tensors alike."""
    return images if images.dtype.itemsize > 1 else images / 127.5 - 1


def summary(arrays, about):
    """What meta.json holds: where the arrays are from, their sizes and sums, mean and standard deviation."""
    images, total, squares = arrays["train"][0], 0.0, 0.0
    step = max(1, PIECE // images[0].size)
    for i in range(0, len(images), step):
        x = on_scale(images[i:i + step]).astype(np.float64)
        total, squares = total + float(x.sum()), squares + float(np.square(x).sum())
    mean = total / images.size
    variance = squares / images.size - mean ** 2
    if not variance > 1e-8:
        raise UserError(f"{about['source']}: all training images are the same in every pixel; give others")
    return about | {
        "train": len(images), "val": len(arrays["val"][0]), "image_size": images.shape[-1],
        "n_channel": images.shape[1], "n_class": len(about["names"]), "data_mean": round(mean, 6),
        "data_std": round(math.sqrt(variance), 6),
        "sha256": [sha256(a) for split in SPLITS for a in arrays[split]]}


def open_arrays(folder):
    """{split: (images, labels)} of a prepared folder, memory-mapped."""
    return {s: tuple(np.load(folder / f"{s}_{kind}.npy", mmap_mode="r") for kind in ("images", "labels"))
            for s in SPLITS}


class Images:
    """Prepared images and their labels: shuffled epochs for training, one fixed order for evaluation."""

    def __init__(self, arrays, meta, training, device):
        self.names = meta["names"]  # of the classes
        self.meta = {k: v for k, v in meta.items() if k != "names"}
        self.facts = {k: meta[k] for k in ("image_size", "n_channel", "n_class", "data_mean", "data_std")}
        self.fingerprint = "".join(digest[:8] for digest in meta["sha256"])
        self.n_train, self.seed, self.device = meta["train"], training.seed, device
        self.augment, self.arrays, self.order = augmentation(training), arrays, (None, None)

    def describe(self):
        m = self.meta
        return (f"{m['source']}, {m['train']:,} images to train on, {m['val']:,} held out, "
                f"{m['n_channel']} x {m['image_size']} x {m['image_size']}, {m['n_class']} classes, "
                f"augmentation {','.join(self.augment) or 'none'}, fingerprint {self.fingerprint[:12]}")

    def length(self, config):
        """Examples in one epoch."""
        return self.n_train

    def require(self, config):
        """Nothing: what the data decides (facts) is put into the config."""

    def fetch(self, split, rows):
        """Images (n, C, H, W), float32 in [-1, 1] or latents, and labels (n,) of rows (n,), on the device."""
        if self.device.type == "cpu":  # only these rows are read from the files
            images, labels = (torch.from_numpy(a[rows.numpy()]) for a in self.arrays[split])
        else:                          # the whole split is moved once, and stays there
            if isinstance(self.arrays[split][0], np.ndarray):
                copies = [torch.from_numpy(np.array(a)) for a in self.arrays[split]]
                self.arrays[split] = [a.to(self.device) for a in copies]
            rows = send(rows, self.device)
            images, labels = (a[rows] for a in self.arrays[split])
        return on_scale(images), labels

    def batch(self, n, config, index):
        """Images (n, C, H, W) and labels (n,): places index * n onwards in an endless row of epochs, each the
        whole training set in an order that (seed, epoch) alone decides; augmented."""
        rows, at, end = [], index * n, (index + 1) * n
        while at < end:
            epoch, start = divmod(at, self.n_train)
            if self.order[0] != epoch:
                self.order = epoch, shuffled(self.n_train, self.seed, f"epoch {epoch}")
            rows.append(self.order[1][start:start + end - at])
            at += len(rows[-1])
        images, labels = self.fetch("train", torch.cat(rows))
        for change in self.augment.values():
            images = change(images)
        return images, labels

    def fixed(self, split, n):
        """Images (n, C, H, W) and labels (n,), the first of a split (n = 0: all) in one shuffled order,
        whatever the seed; never augmented."""
        return self.fetch(split, shuffled(self.meta[split], 0, "held out")[:n or None])

    def held_out(self, n, config):
        """As `fixed`, of the held-out images."""
        return self.fixed("val", n)


def load_images(training, device):
    """Images as --data, --split and the column flags say, prepared if they are not yet. Raises UserError."""
    source, path = training.data, Path(training.data)
    augmentation(training)  # its errors before hours of decoding
    if source == "digits":
        arrays = digits()
        about = {"source": source, "names": [str(c) for c in range(10)]}
        return Images(arrays, summary(arrays, about), training, device)
    name, latents = path.resolve().name if path.exists() else source, source.endswith(".npz")
    about = {"source": name} | ({} if latents else {"split": training.split})
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stamps = [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    wishes = [] if latents else [training.image_column, training.label_column]
    key = hashlib.sha256(json.dumps([2, "images", about, wishes, stamps]).encode()).hexdigest()[:12]
    folder = DATA_DIR / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{key}"

    def write(part):
        facts = (prepare_latents if latents else prepare_images)(training, part)
        return summary(open_arrays(part), about | facts)
    if not folder.exists():
        prepare(folder, write)
    try:
        meta, arrays = read_meta(folder), open_arrays(folder)
        whole = meta["sha256"] == [sha256(a) for split in SPLITS for a in arrays[split]]
    except Exception:  # as in Text
        whole = False
    if not whole:
        raise UserError(f"prepared data in {folder} is damaged; delete that folder and run again")
    return Images(arrays, meta, training, device)


# -----------------------------------------------------------------------------------------------------------
# Augmentation: of whole batches on their device, images in [-1, 1]; all chance is from torch's CPU stream

def crop(x):
    """Pad with black by an eighth of the size, then cut the old size out, at each image's own place."""
    n, _, size, _ = x.shape
    pad = max(1, size // 8)
    x = F.pad(x, (pad,) * 4, value=-1.0).unfold(2, size, 1).unfold(3, size, 1)  # (n, C, 2P+1, 2P+1, H, W)
    top, left = send(torch.randint(2 * pad + 1, (2, n)), x.device)
    return x[torch.arange(n, device=x.device), :, top, left]                    # (n, C, H, W)


def flip(x):
    """Mirror each image, left to right, with probability 1/2."""
    return torch.where(send(torch.rand(len(x), 1, 1, 1) < 0.5, x.device), x.flip(-1), x)


# RandAugment's operations: x (n, C, H, W), whole numbers 0..255; s (n, 1, 1, 1), how strongly, in [-1, 1]

def warp(x, entries):
    """Affine maps about the centre that differ from the identity in {(row, column): value}; nearest pixel,
    mid grey outside."""
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)  # (n, 2, 3), in halves of the image
    for (i, j), value in entries.items():
        theta[:, i, j] = value.flatten()
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x - 128, grid, mode="nearest", align_corners=False) + 128


def rotate(x, s):
    sin, cos = torch.sin(math.pi / 6 * s), torch.cos(math.pi / 6 * s)  # up to 30 degrees
    return warp(x, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos})


def blend(x, other, s):
    """Up to 0.9 of the way away from `other` for s > 0, towards it for s < 0."""
    return (x + 0.9 * s * (x - other)).round().clamp(0, 255)


def grey(x):
    """(n, 1, H, W) luminance, ITU-R 601."""
    return x if x.shape[1] == 1 else (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).round()


def smooth(x):
    """PIL's SMOOTH filter: a neighbour weighs 1/13, the pixel itself 5/13; the rim stays."""
    out = x.clone()
    out[..., 1:-1, 1:-1] = ((9 * F.avg_pool2d(x, 3, 1) + 4 * x[..., 1:-1, 1:-1]) / 13).round()
    return out


def autocontrast(x, s):
    """Stretch each channel to 0..255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((x - low) * 255 / (high - low).clamp(min=1)).floor(), x)


def equalize(x, s):
    """Make each channel's histogram flat as PIL.ImageOps.equalize does, which leaves pictures of
    under 256 pixels alone."""
    flat = x.long().flatten(2)                                                  # (n, C, H * W)
    counts = x.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(x).flatten(2))
    step = ((flat.shape[2] - counts.gather(2, flat.amax(2, keepdim=True))) / 255).floor()   # (n, C, 1)
    table = ((step / 2).floor() + counts.cumsum(2) - counts) / step.clamp(min=1)            # (n, C, 256)
    new = table.floor().clamp(max=255).gather(2, flat).view_as(x)
    return torch.where(step.unsqueeze(3) > 0, new, x)


OPERATIONS = {
    "identity": lambda x, s: x,
    "shear x": lambda x, s: warp(x, {(0, 1): 0.3 * s}),
    "shear y": lambda x, s: warp(x, {(1, 0): 0.3 * s}),
    "translate x": lambda x, s: warp(x, {(0, 2): 2 * 150 / 331 * s}),  # by 150 pixels of 331
    "translate y": lambda x, s: warp(x, {(1, 2): 2 * 150 / 331 * s}),
    "rotate": rotate,
    "brightness": lambda x, s: blend(x, 0, s),
    "colour": lambda x, s: blend(x, grey(x), s),
    "contrast": lambda x, s: blend(x, grey(x).mean((1, 2, 3), keepdim=True).round(), s),
    "sharpness": lambda x, s: blend(x, smooth(x), s),
    "posterize": lambda x, s: x - x % 2 ** (4 * s.abs()).round(),      # the lowest 4 bits
    "solarize": lambda x, s: torch.where(x < 255 * (1 - s.abs()), x, 255 - x),
    "autocontrast": autocontrast,
    "equalize": equalize}


def rand(x, strength=9 / 30):
    """RandAugment (Cubuk et al. 2019): two of the 14 operations for each image, at magnitude 9 of 30."""
    x = ((x + 1) * 127.5).round()
    for _ in range(2):
        # each operation gets a random fourteenth of the batch: parts whose sizes are known without asking the
        # device, as those of a boolean mask are not; for each image all operations are equally likely
        order = torch.randperm(len(x))
        there, back = send(torch.stack([order, order.argsort()]), x.device)
        signs = send(2.0 * torch.randint(2, (len(x), 1, 1, 1)) - 1, x.device)
        names = [list(OPERATIONS)[i] for i in torch.randperm(len(OPERATIONS)).tolist()]
        parts = zip(names, x[there].tensor_split(len(names)), signs.tensor_split(len(names)))
        x = torch.cat([OPERATIONS[name](own, strength * sign) if len(own) else own
                       for name, own, sign in parts])[back]
    return x / 127.5 - 1


AUGMENTATIONS = {"rand": rand, "crop": crop, "flip": flip}  # in the order in which they are applied


def augmentation(training):
    """{name: function} of what --augment names. Raises UserError."""
    names = [] if training.augment == "none" else training.augment.split(",")
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise UserError(f"--augment knows no {unknown[0]!r}; choose none, or any of crop, flip, rand, "
                        f"joined by commas")
    if names and training.data.endswith(".npz"):
        raise UserError(f"--augment {training.augment} is for pixels; {training.data} holds latents; drop it")
    return {name: change for name, change in AUGMENTATIONS.items() if name in names}


class Loader(NamedTuple):
    settings: type    # Training with this data's own flags
    load: Callable    # (training, device) -> the data
    codec: Callable   # (training, function that loads the data) -> what a model file's `sample` is given


# a model file's DATA -> its data
LOADERS = {"text": Loader(TextTraining, load_text, lambda training, load: Tokenizer(training.tokenizer)),
           "images": Loader(ImageTraining, load_images, lambda training, load: load)}


# -----------------------------------------------------------------------------------------------------------
# Checkpoints

def load(path, model):
    """A checkpoint's dictionary on the CPU; never runs code from the file. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not compare the checksums
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["model"], state["part"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; to begin anew, drop --resume") from None
    except Exception as e:
        raise UserError(f"{path} is damaged or no checkpoint of this program ({type(e).__name__}); "
                        f"delete it and train again") from None
    if found != (model, path.stem):
        raise UserError(f"{path} is a checkpoint of {found[0]} {found[1]}, not of {model} {path.stem}")
    return state


def differing(old, new, *sections):
    """Names of the settings that change a weight and differ between two checkpoints, with both values."""
    pairs = [(k, old[s].get(k), new[s].get(k)) for s in sections for k in sorted({*old[s], *new[s]} - FREE)]
    pairs.append(("data", old["data"]["fingerprint"][:12], new["data"]["fingerprint"][:12]))
    return [f"{k} ({a} -> {b})" for k, a, b in pairs if a != b]


def build(module, config, part):
    """The network of a part: block_N, end_to_end or control. Only this one is built."""
    if part.startswith("block_"):
        return module.Block(config, int(part[6:]))
    return module.EndToEnd(config) if part == "end_to_end" else module.control(config)


TYPED = []  # the settings of this command line, (name, as typed), for the commands that messages name


def command(model, part):
    """The command that trains or scores a part, with the settings of this command line that the model has."""
    module = importlib.import_module(model)
    known = {f.name for cls in (LOADERS[module.DATA].settings, module.Config) for f in fields(cls)}
    typed = [text for name, text in TYPED if name in known or name == "preset" and text[9:] in module.PRESETS]
    flag = f"--block {part[6:]}" if part.startswith("block_") else "--" + part.replace("_", "-")
    return " ".join([f"python train.py --model {model} {flag}", *typed])


# -----------------------------------------------------------------------------------------------------------
# Several processes: torchrun's ranks are dealt over the parts to train, and distinct parts never communicate

class Group(NamedTuple):
    """The processes that train one part, and this one's number among them."""
    rank: int = 0
    size: int = 1


def torchrun():
    """{rank, world_size, local_rank, local_world_size} of this process, if torchrun started it, else {}."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {n.lower(): int(os.environ[n]) for n in names} if set(names) <= set(os.environ) else {}


def deal(parts, rank, n_ranks):
    """(the parts that a rank trains in turn, its Group) of parts dealt over n_ranks. Raises UserError."""
    if n_ranks <= len(parts):
        return parts[rank::n_ranks], Group()
    if n_ranks % len(parts):
        raise UserError(f"{n_ranks} processes cannot be dealt over {len(parts)} blocks; start at most "
                        f"{len(parts)}, or a multiple of {len(parts)}")
    size = n_ranks // len(parts)
    return [parts[rank // size]], Group(rank % size, size)


def connect(part, group, device):
    """Make the processes that train a part a process group of their own: no other part's are in it."""
    store, _, _ = next(dist.rendezvous("env://"))  # torchrun's: only here do parts meet, under other names
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(part, store), rank=group.rank,
                            world_size=group.size)


class Loss(nn.Module):
    """A network's loss as its forward, which is what DistributedDataParallel can call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net.loss(batch)


def distributed(net, device):
    """A function as net.loss, whose backward leaves the mean gradient of all processes of the group."""
    wrap = nn.parallel.DistributedDataParallel
    names = inspect.signature(wrap).parameters  # torch 2.13 has a new name for it
    own = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    # buffers are fixed tables, the same in every process
    return wrap(Loss(net), device_ids=devices, **{own: False})


def over_group(values, group, how):
    """Numbers that every process of the group has, reduced over them."""
    if group.size == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values, how)
    return values.tolist()


def gather(streams, own, group):
    """The pieces' random streams, each as the process that owns it has it."""
    if group.size == 1:
        return streams
    every = [None] * group.size
    dist.all_gather_object(every, [streams[i] for i in own])
    return [state for part in every for state in part]


# -----------------------------------------------------------------------------------------------------------
# The training loop

def lr_at(step, training, steps):
    """Linear warm-up, then a cosine to final_lr; step counts this block's own updates."""
    warm = min(1.0, (step + 1) / max(1, training.warmup))
    after = max(0, step - training.warmup) / max(1, steps - training.warmup)
    cosine = (1 + math.cos(math.pi * after)) / 2
    return training.lr * warm * (training.final_lr + (1 - training.final_lr) * cosine)


def seed_of(seed, part):
    """A 63-bit seed from (seed, block): no block's stream depends on which others are trained, or when."""
    return int.from_bytes(hashlib.sha256(f"{seed} {part}".encode()).digest()[:8], "big") >> 1


def memory(device):
    """Peak megabytes: allocated on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def rng_state(device):
    """The random streams of the CPU and, if there is one, of the accelerator."""
    more = {"cuda": torch.cuda.get_rng_state, "mps": lambda _: torch.mps.get_rng_state()}.get(device.type)
    return [torch.get_rng_state()] + ([more(device)] if more else [])


def set_rng_state(states, device):
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    if len(states) > 1 and device.type == "mps":
        torch.mps.set_rng_state(states[1])


@torch.no_grad()
def validate(net, held_out, size):
    """Mean loss on the held-out batch with fixed noise. Leaves the training's random stream as it was."""
    columns = (held_out,) if torch.is_tensor(held_out) else held_out  # a batch is a tensor, or several
    before, training = rng_state(columns[0].device), net.training
    torch.manual_seed(0)
    net.eval()
    total = 0.0
    for part in zip(*(column.split(size) for column in columns)):
        total += net.loss(part if len(part) > 1 else part[0]) * len(part[0])
    net.train(training)
    set_rng_state(before, columns[0].device)
    return total.item() / len(columns[0])


@torch.no_grad()
def update_average(average, net, decay, step):
    """Move a running mean of the weights towards net's; step counts this block's own updates, from 1.

    The decay is at most (1 + step) / (10 + step), a mean over the last ninth or so: in a run of less than
    9 / (1 - decay) updates the first weights would weigh too much."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


def layers_of(net):
    """The layers of a network: what it holds in lists."""
    return [layer for layers in net.modules() if isinstance(layers, nn.ModuleList) for layer in layers]


def checkpoint_layers(net):
    """Let each layer keep its input alone for the backward pass, which computes the rest a second time."""
    for layer in layers_of(net):
        layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)


def autocast(training, device):
    """Matrix products in bf16 if --precision says so; noise, likelihoods and losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16")


def make_optimizer(net, training, device):
    """AdamW with weight decay on matrices and embeddings, none on gains and biases."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, training.beta2), fused=device.type == "cuda")


@dataclass
class Learner:
    """A network in training with all that an update changes."""
    net: nn.Module
    average: nn.Module | None       # running mean of its weights
    optimizer: torch.optim.Optimizer
    loss_of: Callable               # net.loss, or that with the gradients averaged over the group
    streams: list                   # random streams of the pieces that a batch is cut into
    own: range                      # the pieces that this process computes


def begin(module, config, part, training, device, group=Group()):
    """A Learner of a part, before its first update: a function of (seed, part) and the settings alone."""
    torch.manual_seed(seed_of(training.seed, part))
    net = build(module, config, part).to(device)
    average = copy.deepcopy(net).eval() if training.ema else None
    if training.compile != "off":
        for layer in layers_of(net):  # they are alike: quickly compiled, and the rest is a small part
            layer.forward = torch.compile(layer.forward, mode=training.compile)
    if training.checkpoint_activations:
        checkpoint_layers(net)
    # each piece has a random stream of its own, whichever process computes it; the first goes on from here
    streams = [rng_state(device)]
    for i in range(1, training.accumulate * group.size):
        torch.manual_seed(seed_of(training.seed, f"{part} {i}"))
        streams.append(rng_state(device))
    own = range(group.rank * training.accumulate, (group.rank + 1) * training.accumulate)
    loss_of = distributed(net, device) if group.size > 1 else net.loss
    return Learner(net.train(), average, make_optimizer(net, training, device), loss_of, streams, own)


def update(learner, data, config, training, step, steps, device):
    """Update number step + 1. Returns the mean loss of this process's pieces, which is not finite if a
    gradient is not. Waits for the device nowhere."""
    net, own, n_pieces = learner.net, learner.own, len(learner.streams)
    for settings in learner.optimizer.param_groups:
        settings["lr"] = lr_at(step, training, steps)
    total = 0.0
    for i in own:
        set_rng_state(learner.streams[i], device)
        # processes exchange gradients once, with the last piece
        later = n_pieces > len(own) and i != own[-1]
        with learner.loss_of.no_sync() if later else contextlib.nullcontext():
            if training.compile != "off":
                torch.compiler.cudagraph_mark_step_begin()  # what earlier graphs gave is not needed any more
            batch = data.batch(training.batch_size // n_pieces, config, step * n_pieces + i)
            with autocast(training, device):
                loss = learner.loss_of(batch) / len(own)
            loss.backward()
        learner.streams[i] = rng_state(device)
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), training.clip)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.average is not None:
        update_average(learner.average, net, training.ema, step + 1)
    return total + 0.0 * norm


def checkpoint(path, about, step, learner):
    """All that the run needs to go on to the same bits: settings, step, weights, moments, random streams."""
    state = about | {"step": step, "net": learner.net.state_dict(), "streams": learner.streams,
                     "optimizer": learner.optimizer.state_dict(), "torch": str(torch.__version__)}
    if learner.average is not None:
        state["average"] = learner.average.state_dict()
    with replacing(path) as f:
        torch.save(state, f)


def restore(path, about, learner):
    """Put a checkpoint into a learner; returns its step. Raises UserError."""
    state = load(path, about["model"])
    try:
        changed = differing(state, about, "config", "training")
        if changed:
            raise UserError(f"cannot resume {path}, trained with other settings: {', '.join(changed)}")
        learner.net.load_state_dict(state["net"])
        if learner.average is not None:
            learner.average.load_state_dict(state["average"])
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.streams = state["streams"]
        return state["step"]
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} does not fit this version of the program; train it again without "
                        f"--resume") from None


@contextlib.contextmanager
def open_log(folder, part):
    """OUT/MODEL/PART.jsonl, which no other process has open: two that train the same part would spoil each
    other's work. Raises UserError."""
    path = folder / f"{part}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(path, "ab+", buffering=0)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; choose another place with --out") from None
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when the process ends
        except BlockingIOError:
            raise UserError(f"another process is training {folder / part}.pt; wait for it, or choose "
                            f"another place with --out") from None
        for rest in folder.glob(f".{part}.pt.*.part"):       # of a process that was killed as it wrote
            rest.unlink(missing_ok=True)
        yield log


def rewind(log, step):
    """Cut a log after its lines up to a step: none of an earlier run, no line twice of a resumed one."""
    log.seek(0)
    end = 0
    for line in log.read().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):  # damaged
            break
        end += len(line)
    log.truncate(end)


def write_line(log, row):
    """Add a row to a log. Raises UserError."""
    try:
        log.write(json.dumps(row).encode() + b"\n")
    except OSError as e:
        raise UserError(f"cannot write the log: {e.strerror}; what was saved before is untouched; make room, "
                        f"then go on with --resume") from None


def parameters(module, config, parts):
    """Number of parameters of several parts together, from shapes alone: the meta device holds no memory."""
    with torch.device("meta"):
        return sum(p.numel() for part in parts for p in build(module, config, part).parameters())


STOP = {"signal": 0, "later": False}  # the signal that came; later: an update must be ended first


def on_signal(number, frame):
    """SIGINT or SIGTERM ends the program at once, but training after the update that it is at. A second one
    does not wait for that, except under torchrun, which sends one more for each that the terminal sends."""
    if not STOP["later"] or STOP["signal"] and not torchrun():
        raise Interrupted(number, "")
    STOP["signal"] = number


def train(module, model, part, config, training, data, device, resume, group):
    """Train one part, in this process alone or with the others of its group, and write OUT/MODEL/PART.pt and
    PART.jsonl. Raises UserError and Interrupted."""
    folder = Path(training.out) / model
    path, steps = folder / f"{part}.pt", training.steps
    if training.epochs:
        steps = math.ceil(training.epochs * data.length(config) / training.batch_size)
    n_pieces = training.accumulate * group.size
    if training.batch_size % n_pieces:
        raise UserError(f"--batch-size {training.batch_size} must be a multiple of {n_pieces}: "
                        f"{group.size} processes train {part}, with --accumulate {training.accumulate}")
    about = {"model": model, "part": part, "steps": steps, "config": asdict(config),
             "training": asdict(replace(training, accumulate=n_pieces)),
             "data": data.meta | {"fingerprint": data.fingerprint}}
    learner = begin(module, config, part, training, device, group)
    net, leads = learner.net, group.rank == 0  # the first of a group writes what there is to write
    with open_log(folder, part) if leads else contextlib.nullcontext() as log:
        first = step = restore(path, about, learner) if resume else 0
        if leads:
            rewind(log, step)
            parts = [f"block_{b}" for b in range(config.n_blocks)] if part.startswith("block_") else [part]
            trained, whole = parameters(module, config, [part]), parameters(module, config, parts)
            say(f"{model} {net.describe()}")
            say(f"parameters trained: {trained:,} of {whole:,} in the whole model; device {device}, "
                f"{training.threads} CPU threads{f', {group.size} processes' if group.size > 1 else ''}; "
                f"from step {step} of {steps}")
        held_out, size = data.held_out(4 * training.batch_size, config), training.batch_size // n_pieces
        total, since, began = 0.0, 0, time.time()
        last_saved, saved = first if resume else None, began
        while step < steps:
            total = total + update(learner, data, config, training, step, steps, device)
            step, since = step + 1, since + 1
            progress(f"{net.title} | step {step}/{steps}")
            due = bool(training.save_minutes) and time.time() - saved > 60 * training.save_minutes
            stop, due = over_group([STOP["signal"], due], group, dist.ReduceOp.MAX)
            logs = step % training.log_every == 0 or step == steps
            saves = step % training.save_every == 0 or step == steps or stop or due
            if logs or saves or device.type == "cpu":
                mean, = over_group([float(total) / since / group.size], group, dist.ReduceOp.SUM)
                if not math.isfinite(mean):
                    kept = "nothing of this run" if last_saved is None else f"step {last_saved} in {path}"
                    raise UserError(f"the loss of {part} is {mean} by step {step}; saved is {kept}; try a "
                                    f"lower --lr")
            if logs:
                total, since = 0.0, 0
            if logs and leads:
                with autocast(training, device):
                    val_loss = validate(learner.average or net, held_out, size)
                row = {"part": part, "title": net.title, "step": step, "loss": mean, "val_loss": val_loss,
                       "lr": learner.optimizer.param_groups[0]["lr"],
                       "ms": 1000 * (time.time() - began) / (step - first), "memory_mb": memory(device)}
                row["minutes_left"] = (steps - step) * row["ms"] / 60000
                progress("")
                say(f"{net.title} | step {step}/{steps} | loss {mean:.4f} | val {row['val_loss']:.4f} | "
                    f"lr {row['lr']:.1e} | {row['ms']:.0f} ms/step | {row['memory_mb']:.0f} MB | "
                    f"{row['minutes_left']:.1f} min left")
                write_line(log, row)
            if saves:
                learner.streams = gather(learner.streams, learner.own, group)
                if leads:
                    checkpoint(path, about, step, learner)
                last_saved, saved = step, time.time()
            if stop and step < steps:
                progress("")
                over_group([0], group, dist.ReduceOp.MAX)  # nobody leaves before that is saved
                raise Interrupted(int(stop), f"{path} holds step {step} of {steps}" if leads else None)
        over_group([0], group, dist.ReduceOp.MAX)  # nor after the last update
        if leads:
            say(f"done: {path}, peak memory {memory(device):.0f} MB, {time.time() - began:.0f} s")


# -----------------------------------------------------------------------------------------------------------
# What an update costs

def storages(tensors):
    """{address: bytes} of the storages that tensors lie in, each counted once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}


def measure_memory(net, optimizer, batch, device, context=contextlib.nullcontext(), pieces=1):
    """{what: bytes} of an update of a network, measured at its second: weights and buffers, gradients, the
    optimizer's state, activations that are saved for the backward pass, the most that is there at once; and
    what of the state and of the activations is the interface's, that is, not in the layers."""
    layers = layers_of(net)
    interface = set(net.parameters()) - {p for layer in layers for p in layer.parameters()}
    fixed, gradients = storages([*net.parameters(), *net.buffers()]), {}
    saved, where = {"layers": {}, "interface": {}}, ["interface"]

    def pack(t):
        saved[where[-1]].update({k: v for k, v in storages([t]).items() if k not in fixed})
        return t

    def update():
        for _ in range(pieces):  # from the second on, gradients are there already
            for found in saved.values():
                found.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), context:
                loss = net.loss(batch)
            loss.backward()
        gradients.update({p: sum(storages([p.grad]).values()) for p in net.parameters()})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state(p):
        return sum(storages([t for t in optimizer.state[p].values() if torch.is_tensor(t)]).values())
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: where.append("layers"))
        layer.register_forward_hook(lambda *_: where.pop() and None)
    update()  # in which the optimizer makes its state
    peak = peak_during(update, device)
    weights, moments = sum(fixed.values()), sum(map(state, net.parameters()))
    return {"weights": weights, "gradients": sum(gradients.values()), "optimizer": moments,
            "activations": sum((saved["layers"] | saved["interface"]).values()),
            "peak": weights + moments + peak,
            "interface, state": sum(storages([*interface, *net.buffers()]).values()) + sum(
                gradients[p] + state(p) for p in interface),
            "interface, activations": sum(saved["interface"].values())}


def peak_during(function, device):
    """The most bytes that were allocated at once while a function ran, beyond those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@contextlib.contextmanager
def quiet():
    """Without what libraries write to the standard error by themselves."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nothing, open(os.dup(2), "w") as old:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(old.fileno(), 2)


# dense bf16 operations a second, by a part of the GPU's name (NVIDIA's data sheets)
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}


def timed(function, device):
    """Seconds until a function's work is done, on the device too."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bench(module, model, config, training, data, device, rounds):
    """Print and save the time of an update, and of a step of sampling, of the baseline, of the control and of
    every block: median and quartiles over rounds in each of which every one has its turn."""
    parts = ["end_to_end", "control", *(f"block_{b}" for b in range(config.n_blocks))]
    plain, flops = replace(training, compile="off", checkpoint_activations=False), {}
    for part in parts:  # operations of the plain network, attention in the form that can be counted
        learner = begin(module, config, part, plain, device)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            update(learner, data, config, plain, 0, 1, device)
        flops[part] = counter.get_total_flops()
    learners = {part: begin(module, config, part, training, device) for part in parts}
    updates, steps = ({part: [] for part in parts} for _ in range(2))
    with torch.no_grad():
        sampling = {part: module.sampling_step(learner.net, 16) for part, learner in learners.items()}
    for i in range(rounds + 3):  # three to warm up
        for part, learner in learners.items():
            progress(f"round {i - 2} of {rounds}: {part}")
            learner.net.train()
            updates[part].append(timed(
                lambda: update(learner, data, config, training, i, rounds + 3, device), device))
            learner.net.eval()
            with torch.no_grad():
                steps[part].append(timed(sampling[part], device))
    progress("")
    quartiles = {part: statistics.quantiles(u[3:], n=4) for part, u in updates.items()}
    ms = {part: 1000 * q[1] for part, q in quartiles.items()} | {
        "all blocks": 1000 * sum(quartiles[part][1] for part in parts[2:])}
    steps = {part: 1000 * statistics.median(s[3:]) for part, s in steps.items()}
    name, per_update = device_name(device), training.batch_size * getattr(config, "seq_len", 1)
    peak = next((n for gpu, n in PEAK_FLOPS.items() if gpu in name and training.precision == "bf16"), None)
    table = {part.replace("_", " "): {"ms": t, "of end to end, %": 100 * t / ms["end_to_end"]}
             for part, t in ms.items()}
    for part, (low, middle, high) in quartiles.items():
        table[part.replace("_", " ")] |= {
            "quartiles, ms": f"{1000 * low:.4g} to {1000 * high:.4g}",
            "mean, ms": 1000 * statistics.mean(updates[part][3:]),
            f"{'tokens' if hasattr(config, 'seq_len') else 'images'} per second": per_update / middle,
            "TFLOP per second": flops[part] / middle / 1e12} | (
                {"of the device's peak, %": 100 * flops[part] / middle / peak} if peak else {})
    tables = {f"one update of {training.batch_size}": table, "one step of sampling, 16 at once": {
        part.replace("_", " "): {"ms": t, "of end to end, %": 100 * t / steps["end_to_end"]}
        for part, t in steps.items()}}
    show(tables)
    path = Path(training.out) / model / "bench.json"
    save_report(path, model, asdict(config), asdict(training), data, device, tables, rounds=rounds)
    say(f"\nsaved {path}")


def memory_table(module, model, config, training, data, device):
    """Print and save what one update needs, end to end and of the largest block, without and with activations
    checkpointed; layers are not compiled for it."""
    blocks = [f"block_{b}" for b in range(config.n_blocks)]
    largest = max(blocks, key=lambda part: parameters(module, config, [part]))
    rows, batch = {}, data.batch(training.batch_size // training.accumulate, config, 0)
    for part in ("end_to_end", largest):
        for checkpointed in (False, True):
            gc.collect()  # checkpointed layers refer to themselves
            net = build(module, config, part).to(device)
            if checkpointed:
                checkpoint_layers(net)
            name = (part if part == "end_to_end" else "one_block").replace("_", " ")
            name += ", activations checkpointed" if checkpointed else ""
            rows[name] = measure_memory(net, make_optimizer(net, training, device), batch, device,
                                        autocast(training, device), min(2, training.accumulate))
            if training.ema:
                mean = sum(storages([*net.parameters(), *net.buffers()]).values())  # a copy has as many
                rows[name] |= {"running mean": mean, "peak": rows[name]["peak"] + mean}
            progress(f"measured: {name}")
    progress("")
    base = rows["end to end"]
    held = ("weights", "gradients", "optimizer")
    tables = {"memory of one update, MB": {
        name: {k: v / 1e6 for k, v in row.items()} for name, row in rows.items()}, "of end to end, %": {
        name: {"weights, gradients, optimizer": 100 * sum(row[k] for k in held) / sum(base[k] for k in held),
               "activations": 100 * row["activations"] / base["activations"],
               "peak": 100 * row["peak"] / base["peak"]} for name, row in rows.items()}}
    show(tables)
    path = Path(training.out) / model / "memory.json"
    save_report(path, model, asdict(config), asdict(training), data, device, tables)
    say(f"\nsaved {path}")


# -----------------------------------------------------------------------------------------------------------
# What has been trained, put together

def finished(module, model, part, out):
    """A trained part on the CPU with its checkpoint. Raises UserError that names the command that trains
    it."""
    path = Path(out) / model / f"{part}.pt"
    if not path.exists():
        raise UserError(f"{path} is missing; train it with: {command(model, part)}")
    state = load(path, model)
    try:
        net = build(module, module.Config(**state["config"]), part)
        net.load_state_dict(state.get("average", state["net"]))
        unfinished = state["step"] < state["steps"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{path} does not fit this version of the program; train it again: "
                        f"{command(model, part)}") from None
    if unfinished:
        say(f"note: {part} stands at step {state['step']} of {state['steps']}; go on with: "
            f"{command(model, part)} --resume")
    return net.eval(), state


def assemble(module, model, out, given, device):
    """The trained blocks, as a list, and block 0's checkpoint. Raises UserError if one is missing or does not
    fit."""
    _, first = finished(module, model, "block_0", out)
    nets = []
    for b in range(first["config"]["n_blocks"]):
        net, state = finished(module, model, f"block_{b}", out)
        odd = differing(first, state, "config")
        if odd:
            raise UserError(f"block {b} does not fit block 0: {', '.join(odd)}; train it again: "
                            f"{command(model, f'block_{b}')}")
        if state["step"] != first["step"]:
            say(f"note: block {b} has had {state['step']} updates, block 0 {first['step']}: not equal")
        nets.append(net.to(device))
    odd = [f"{k} ({v} -> {given[k]})" for k, v in first["config"].items() if given.get(k, v) != v]
    if odd:
        raise UserError(f"the blocks in {out}/{model} were trained with other settings: {', '.join(odd)}")
    return nets, first


def load_fitting(module, config, training, device):
    """The data, if it has the sizes that this configuration (a dict) was trained for. Raises UserError."""
    data = LOADERS[module.DATA].load(training, device)
    odd = [f"{k} ({config[k]} -> {v})" for k, v in data.facts.items() if config[k] != v]
    if odd:
        raise UserError(f"this data does not fit what was trained: {', '.join(odd)}; drop the flags of the "
                        f"data")
    return data


def show(tables):
    """Print {title: {row: {column: number or text}}}."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(c for row in rows.values() for c in row))
        cells = [[""] + columns] + [[name] + [row.get(c, "") for c in columns] for name, row in rows.items()]
        cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in line] for line in cells]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
        say(f"\n{title}")
        for line in cells:
            rest = "".join(cell.rjust(width + 3) for cell, width in zip(line[1:], widths[1:]))
            say(f"  {line[0].ljust(widths[0])}{rest}")


def find_judge(module, training, data, device):
    """The baseline of the model that a model file names as its JUDGE, trained on the same data, or None."""
    path = Path(training.out) / module.JUDGE / "end_to_end.pt"
    own = {k: getattr(training, k) for k in ("data", "split", "image_column", "label_column", "out")}
    how = f"python train.py --model {module.JUDGE} --end-to-end " + " ".join(
        f"--{k.replace('_', '-')} {shlex.quote(v)}" for k, v in own.items() if v)
    if not path.exists():
        say(f"without a judge, which {path} would be; train it with: {how}")
        return None
    judge, state = finished(importlib.import_module(module.JUDGE), module.JUDGE, "end_to_end", training.out)
    if state["data"]["fingerprint"] != data.fingerprint:
        say(f"without a judge: {path} was trained on other data; train it again: {how}")
        return None
    return judge.to(device)


def write_arrays(folder, results):
    """Write {name: tensor} into a folder: bytes (height, width, 3) as name.png, others as name.npy."""
    for name, array in results.items():
        path = folder / f"{name}.{'png' if array.dtype == torch.uint8 else 'npy'}"
        with replacing(path) as f:
            if path.suffix == ".png":
                from PIL import Image
                Image.fromarray(array.numpy()).save(f, "png")
            else:
                np.save(f, array.numpy())
        say(f"saved {path}")


def save_report(path, model, config, training, data, device, tables, **more):
    """Write tables with all that they depend on. Raises UserError."""
    about = {"model": model, "config": config,
             "training": {k: v for k, v in training.items() if k not in FREE},
             "data": data.meta | {"fingerprint": data.fingerprint},
             "torch": str(torch.__version__), "python": platform.python_version(),
             "device": device_name(device), "threads": torch.get_num_threads()}
    try:
        text = json.dumps(about | more | {"tables": tables}, indent=1, allow_nan=False)
    except ValueError:
        raise UserError(f"a figure above is not finite, so {path} was not written; train longer, or with a "
                        f"lower --lr") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        f.write(text.encode())


def evaluate(module, model, args, training, sampling, device):
    began = time.time()
    blocks, state = assemble(module, model, training.out, args, device)
    others, updates = {}, {"block_0": state["step"]}
    for part in ("end_to_end", "control"):
        if (Path(training.out) / model / f"{part}.pt").exists():
            net, other = finished(module, model, part, training.out)
            odd = differing(state, other, "config")
            if odd:
                raise UserError(f"{part} does not fit the blocks: {', '.join(odd)}; train it again: "
                                f"{command(model, part)}")
            if other["step"] != state["step"]:
                say(f"note: {part} has had {other['step']} updates, block 0 {state['step']}: not equal")
            others[part] = net.to(device)
            updates[part] = other["step"]
        else:
            say(f"without {part}, which is not there; train it with: {command(model, part)}")
    data = load_fitting(module, state["config"], training, device)
    data.require(blocks[0].config)
    if data.fingerprint != state["data"]["fingerprint"]:
        say("note: scored on other data than the blocks were trained on")
    torch.manual_seed(seed_of(training.seed, "eval"))
    judge = {"judge": find_judge(module, training, data, device)} if hasattr(module, "JUDGE") else {}
    try:
        tables, arrays = module.evaluate(blocks, others.get("end_to_end"), others.get("control"), data,
                                         sampling, **judge)
    except ValueError as e:
        raise UserError(str(e)) from None
    show(tables)
    path = Path(training.out) / model / "eval.json"
    write_arrays(path.parent, arrays)
    save_report(path, model, state["config"], state["training"], data, device, tables,
                updates=updates, sampling=asdict(sampling), seconds=round(time.time() - began, 1))
    say(f"\nsaved {path}; peak memory {memory(device):.0f} MB, {time.time() - began:.0f} s")


def sample(module, model, args, training, sampling, device):
    part = "end_to_end" if args["end_to_end"] else "control" if args["control"] else None
    if part:
        net, state = finished(module, model, part, training.out)
        nets = net.to(device)
    else:
        nets, state = assemble(module, model, training.out, args, device)
    torch.manual_seed(seed_of(training.seed, "sample"))
    loader = LOADERS[module.DATA]
    # where the data lies may have changed, its tokenizer may not
    known = settle(loader.settings, state["training"], {k: v for k, v in args.items() if k in FREE})
    codec = loader.codec(known, lambda: load_fitting(module, state["config"], known, device))
    try:
        result = module.sample(nets, sampling, codec)
    except ValueError as e:
        raise UserError(str(e)) from None
    if isinstance(result, str):
        say(result)
    else:
        named = {f"{name}_{part}" if part else name: array for name, array in result.items()}
        write_arrays(Path(training.out) / model, named)


def run(argv):
    args, module, preset = parse(argv)
    settings = LOADERS[module.DATA].settings
    model, training = args["model"], settle(settings, preset, args)
    config, sampling = settle(module.Config, preset, args), settle(module.Sampling, preset, args)
    own = {f.name for cls in (settings, module.Config) for f in fields(cls)} - {"resume"}
    own -= {"epochs"} if "steps" in args else set()  # parse has put it there
    TYPED[:] = [("preset", f"--preset {args['preset']}")] if args["preset"] != "default" else []
    for k, v in args.items():
        flag = k.replace("_", "-")
        if k in own:
            TYPED.append((k, f"--{'' if v else 'no-'}{flag}" if isinstance(v, bool)
                          else f"--{flag} {shlex.quote(str(v))}"))
    check(training)
    try:
        module.check(config)
        module.check_sampling(sampling)
    except ValueError as e:
        raise UserError(str(e)) from None
    parts = ["end_to_end"] if args["end_to_end"] else ["control"] if args["control"] else []
    if args["block"] == "all":
        parts = [f"block_{b}" for b in range(config.n_blocks)]
    elif args["block"] is not None:
        if not args["block"].isdigit() or int(args["block"]) >= config.n_blocks:
            has = f"{config.n_blocks} blocks, 0 to {config.n_blocks - 1}, or all"
            raise UserError(f"no block {args['block']}: {model} has "
                            f"{has if config.n_blocks > 1 else 'one block, 0, for all noise levels'}")
        parts = [f"block_{args['block']}"]
    ranks = torchrun()
    device = pick_device(training.device, ranks.get("local_rank"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    training.threads = training.threads or max(1, cores // ranks.get("local_world_size", 1))
    torch.set_num_threads(training.threads)
    if ranks and not parts:
        raise UserError("torchrun is for training; score and sample without it: python train.py ...")

    if args["eval"] or args["sample"]:
        # what was trained decides the data and the tokenizer, unless the command line names them
        path = Path(training.out) / model / f"{parts[0] if parts else 'block_0'}.pt"
        if not path.exists():
            raise UserError(f"{path} is missing; train it with: {command(model, path.stem)}")
        own = {f.name for f in fields(settings)} - {f.name for f in fields(Training)}
        of_data = {k: v for k, v in load(path, model)["training"].items() if k in own}
        training = settle(settings, of_data, args)
        training.threads = torch.get_num_threads()
        if args["eval"]:
            return evaluate(module, model, args, training, sampling, device)
        return sample(module, model, args, training, sampling, device)

    choose_speed(training, device)
    data = LOADERS[module.DATA].load(training, device)
    if not ranks.get("rank"):
        say(f"data: {data.describe()}")
    for name, fact in data.facts.items():
        if name in args and args[name] not in (0, fact):
            raise UserError(f"--{name.replace('_', '-')} {args[name]}: the data has {fact}; drop the flag")
        setattr(config, name, fact)
    data.require(config)
    try:
        module.check(config)  # again, now that the data's sizes are known
    except ValueError as e:
        raise UserError(str(e)) from None
    if args["memory"]:
        return memory_table(module, model, config, training, data, device)
    if args["bench"]:
        return bench(module, model, config, training, data, device, args["bench"])
    here, several = Path(training.out) / model, len(parts) > 1
    own, group = deal(parts, ranks.get("rank", 0), ranks.get("world_size", 1))
    if group.size > 1:
        connect(own[0], group, device)
    try:
        STOP["later"] = True
        for part in own:  # of several blocks, those that were not begun are begun
            resume = training.resume and (not several or (here / f"{part}.pt").exists())
            train(module, model, part, config, training, data, device, resume, group)
            if STOP["signal"] and part != own[-1]:
                raise Interrupted(STOP["signal"], f"{part} is done")
    except RuntimeError as e:
        if group.size == 1:
            raise
        raise UserError(f"{part}: this process lost the others of its group, or failed "
                        f"({str(e).splitlines()[0][:200]}); the last checkpoint is whole") from None
    finally:
        STOP["later"] = False
    if group.size > 1:
        gc.collect()  # what still holds the group goes before it
        dist.destroy_process_group()
    if ranks:  # others may not have ended
        return
    missing = [p for p in [f"block_{b}" for b in range(config.n_blocks)] + ["end_to_end", "control"]
               if not (here / f"{p}.pt").exists()]
    say(f"next: {command(model, missing[0]) if missing else command(model, 'eval')}")


def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        run(sys.argv[1:])
    except UserError as e:
        sys.exit(f"error: {e}")
    except Interrupted as e:
        number, state = e.args
        ranks = torchrun()
        start = f"torchrun --nproc-per-node {ranks['local_world_size']}" if ranks else "python"
        argv = [a for a in sys.argv[1:] if a != "--resume"] + ["--resume"]
        again = f"; {state}; go on with: {start} train.py {shlex.join(argv)}" if state else ""
        if state is not None:
            say(f"interrupted{again}")
        sys.exit(128 + number)  # as a shell has it


if __name__ == "__main__":
    main()
