"""Data is prepared on first use: text.py and images.py turn what --data names into memory-mapped arrays in a
folder beside this file, and read batches from those alone. This file holds what both need.

A module of data/ has
    FACTS       names of fields of a model's Config that the data decides, such as vocab_size
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
        held_out(n, config)   at most n examples (images: 0 are all) that are never trained on, always the same
"""
import contextlib
import hashlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np

DATA_DIR = Path(__file__).parent  # where prepared data goes
BUILT_IN = {"stdlib": "text", "digits": "images"}
HUB_FORM = (".parquet", ".arrow", ".jsonl", ".csv")  # a folder with such a file is read through `datasets`
PATH = re.compile(r"^[./~]|/.*/|\.(txt|md|py|npz|csv|jsonl?|arrow|parquet)$")  # a name that is no hub id


class UserError(Exception):
    """A mistake that the user can mend, told in one line."""


@contextlib.contextmanager
def user_error(problem, kind=Exception):
    """Turn an error of this kind into a UserError: the problem, then the first line of the error."""
    try:
        yield
    except kind as e:
        raise UserError(f"{problem} ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})") from None


def local_path(source, kind):
    """The path that --data is, or None for stdlib, digits and hub ids. `kind` is what the model needs."""
    if BUILT_IN.get(source, kind) != kind:
        raise UserError(f"--data {source} is {BUILT_IN[source]}, but this model needs {kind}")
    path = Path(source).expanduser()
    if not source or PATH.search(source) and not path.exists():
        raise UserError(f"--data {source}: there is no such file or folder")
    return path if path.exists() and source not in BUILT_IN else None


def files_under(path):
    paths = [] if path is None else path.rglob("*") if path.is_dir() else [path]
    return sorted(p for p in paths if p.is_file())


def load_hub(source, path, split, streaming=False):
    """[training split, held-out split if there is one] of a folder `path` or, if that is None, of the hub."""
    problem = "cannot be loaded" if path else "is not on the disk, and asking the Hugging Face hub failed"
    with user_error(f"--data {source} {problem}"):
        import datasets
        import huggingface_hub
        if path is None and not datasets.config.HF_HUB_OFFLINE:
            # ask once whether it is there: load_dataset repeats a request that fails for half a minute
            huggingface_hub.HfApi().dataset_info(source, timeout=10)
        found = datasets.load_dataset(str(path or source), streaming=streaming)
    if split not in found:
        raise UserError(f"--data {source} has no --split {split!r}; choose one of {', '.join(found)}")
    held_out = [s for s in ("validation", "valid", "val", "test") if s in found and s != split]
    return [found[s] for s in (split, *held_out[:1])]


def prepared(source, path, files, settings, build):
    """(facts, {name: memory-mapped array}) of a source, from a folder for its settings and files. If there is
    none, build(scratch folder) returns both; they are written to another folder, renamed when complete."""
    about = {"source": path.resolve().name if path else source} | settings
    stamps = [(p.parent.name, p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([3, about, stamps]).encode()).hexdigest()[:12]  # 3: the format's version
    folder = DATA_DIR / re.sub(r"[^A-Za-z0-9.]+", "-", f"{about['source']}-{key}")
    if not folder.exists():
        print(f"preparing {folder}", flush=True)
        with (user_error(f"cannot prepare {folder}", OSError),
              tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=DATA_DIR) as scratch):
            part = Path(scratch) / "part"
            part.mkdir()
            facts, arrays = build(Path(scratch))
            digests = [hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for a in arrays.values()]
            facts["fingerprint"] = "".join(digest[:32 // len(arrays)] for digest in digests)
            (part / "meta.json").write_text(json.dumps(about | facts))
            for name, array in arrays.items():
                np.save(part / f"{name}.npy", array)
            with contextlib.suppress(OSError):  # another process was faster
                part.rename(folder)
    with user_error(f"{folder} is damaged; delete that folder and run again"):
        arrays = {p.stem: np.load(p, mmap_mode="c") for p in folder.glob("*.npy")}
        return json.loads((folder / "meta.json").read_text()), arrays
