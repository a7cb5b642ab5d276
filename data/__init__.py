"""Data is prepared on first use: text.py and images.py turn what --data names into memory-mapped arrays in a
folder beside this file, and read batches from those alone. files.py decides which files are used and as what;
tables.py reads those in hub form. This file holds what they share.

A module of data/ has
    FACTS       names of fields of a model's Config that the data decides, such as vocab_size
    NEEDS       names of fields that a model's Config must have, such as seq_len
    Settings    a dataclass, whose fields become flags; `data` is what --data names
    Data        Data(settings, device, seed), with
        settings, about       the Settings; facts for the checkpoint, among them "fingerprint" of the content
        facts                 {name: value} for FACTS
        describe()            a line of text
        length(config)        examples in an epoch
        batch(n, config, index)   batch number `index` of n examples, on the device: a tensor, or a tuple of
                              tensors with n rows each. train.py seeds torch's random numbers before each call.
                              text: places are drawn from that seed, and `index` is not looked at. images: the
                              examples follow from (seed, index) alone, and only augmentation is drawn.
        held_out(n, config)   at most n examples (None: all) that are never trained on, always the same
"""
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

DATA_DIR = Path(__file__).parent  # where prepared data goes
FORMAT = 5  # of prepared folders: another number prepares anew
BUILT_IN = {"stdlib": "text", "digits": "images"}
# a name with one of these is a path, and no id of the hub
PATH = re.compile(r"^[./~]|/.*/|\.(txt|md|py|npz|csv|tsv|jsonl?|arrow|parquet)(\.gz|\.zst)?$")


def one_line(text):
    """A text without line ends and other control characters, which names of files may hold."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)


class UserError(Exception):
    """A mistake that the user can mend, told in one line."""

    def __init__(self, text):
        super().__init__(one_line(text))


def first_line(error):
    """An error's kind, and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def user_error(problem, kind=Exception):
    """Turn an error of this kind into a UserError: the problem, then the first line of the error."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except kind as e:
        if isinstance(e, OSError) and e.errno == errno.ENOMEM:
            raise MemoryError(problem) from None
        raise UserError(f"{problem} ({first_line(e)})") from None


def local_path(source, kind):
    """The path that --data is, or None for stdlib, digits and hub ids. `kind` is what the model needs."""
    if BUILT_IN.get(source, kind) != kind:
        raise UserError(f"--data {source} is {BUILT_IN[source]}, but this model needs {kind}")
    if source in BUILT_IN:
        return None
    path = Path(source).expanduser()
    if source and os.path.exists(path):  # Path("") is the working directory
        return path
    if not source or PATH.search(source):
        raise UserError(f"--data {source}: there is no such file or folder")
    return None


def refuse_without_effect(settings, read):
    """Raises UserError if a field of Settings is not as usual, though this source does not read it."""
    for one in fields(settings):
        if one.name not in read and getattr(settings, one.name) != one.default:
            flag = one.name.replace("_", "-")
            raise UserError(f"--{flag} has no effect with --data {settings.data}")


class Progress:
    """How far long work is: tqdm's bar on a terminal, elsewhere a line a minute. Use it in a `with`."""

    EVERY = 60  # seconds

    def __init__(self, unit, total=None):
        self.unit, self.total, self.done = unit, total, 0
        self.began = self.told = time.time()
        self.bar = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # it comes with `datasets`
                from tqdm import tqdm
                self.bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, leave=False)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def add(self, n):
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.time() - self.told >= self.EVERY:
            self.told = time.time()
            print(self.line(self.told - self.began), flush=True)

    def line(self, seconds):
        speed = self.done / seconds
        text = f"prepared {self.done:,} {self.unit}, {speed:,.0f} a second"
        if self.total:
            minutes = (self.total - self.done) / speed / 60
            text += f", {100 * self.done / self.total:.0f} %, {minutes:.0f} min left"
        return text


def prepared(name, settings, stamps, build):
    """(facts, {name: memory-mapped array}) of prepared data, from a folder for these settings and files.

    name: of the source; stamps: what changes with the content, such as names, sizes and times of files. If there
    is no such folder, build(scratch folder) returns facts and arrays; they are written to another folder, renamed
    when complete. An array's name begins with that of a split, and facts say how many rows each split has. Raises
    UserError."""
    about = {"source": name} | settings
    key = hashlib.sha256(json.dumps([FORMAT, about, stamps]).encode()).hexdigest()[:12]
    shown = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:100]  # a name of a folder has 255 characters at most
    folder = DATA_DIR / f"{shown}-{key}"
    if not folder.exists():
        print(f"preparing {folder}", flush=True)
        remove_abandoned(folder)
        write_prepared(folder, about, build)
    return read_prepared(folder)


def read_prepared(folder):
    """(facts, {name: memory-mapped array}) of a prepared folder. Raises UserError if it is not whole."""
    try:
        facts = json.loads((folder / "meta.json").read_text())
        arrays = {}
        for name in facts.pop("arrays"):
            # mapped read-only: they may be larger than memory
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
            n_rows = facts[name.split("_")[0]]
            if len(arrays[name]) != n_rows:
                raise ValueError(f"{name}.npy has {len(arrays[name])} rows, not {n_rows}")
        return facts, arrays
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError) as e:
        if getattr(e, "errno", None) == errno.ENOMEM:
            raise MemoryError(f"to map {folder}") from None
        raise UserError(f"{folder} is damaged; delete that folder and run again ({first_line(e)})") from None


def scratch_prefix(folder):
    return f".{folder.name}-"


def remove_abandoned(folder):
    """Delete what a process that was killed has left of this preparation, after a day."""
    for scratch in DATA_DIR.glob(scratch_prefix(folder) + "*"):
        with contextlib.suppress(OSError):  # another process deletes it, too
            last = max(path.stat().st_mtime for path in [scratch, *scratch.rglob("*")])
            if time.time() - last > 24 * 3600:
                shutil.rmtree(scratch)


def write_prepared(folder, about, build):
    with (user_error(f"cannot prepare {folder}", OSError),
          tempfile.TemporaryDirectory(prefix=scratch_prefix(folder), dir=DATA_DIR) as scratch):
        part = Path(scratch) / "part"
        part.mkdir()
        facts, arrays = build(Path(scratch))
        names = list(arrays)
        digests = []
        for name in names:
            array = arrays.pop(name)  # one at a time; an array that is mapped must be let go before its file
            digests.append(hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
            np.save(part / f"{name}.npy", array)
            del array
        n_digits = 32 // len(digests)
        facts["fingerprint"] = "".join(digest[:n_digits] for digest in digests)
        (part / "meta.json").write_text(json.dumps(about | facts | {"arrays": names}))
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(folder)
