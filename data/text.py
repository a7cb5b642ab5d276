"""Text: tokens to train on and held-out ones. Held out is a dataset's validation or test split, or else every
100th document; every tenth of ten files or more; the last tenth of fewer files."""
import functools
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import HUB_FORM, UserError, files_under, load_hub, local_path, prepared, user_error
from diffusion_blocks import to_device

FACTS = ("vocab_size",)  # fields of a model's Config that the data decides
# a megabyte of text, up to white space after a word, within which GPT-2's encoding has no token; or the rest
CHUNK = re.compile(rb".{1048576}.*?(?<![ \n])(?=[ \n])|.+", re.DOTALL)


@dataclass
class Settings:
    data: str = "stdlib"      # stdlib, a text file, a folder of .txt files or in hub form, or a hub id
    split: str = "train"      # split of a dataset to train on
    column: str = "text"      # column of a dataset that holds the text
    tokenizer: str = "bytes"  # bytes, or a tiktoken encoding such as gpt2


@dataclass
class Tokenizer:
    """Bytes, or a tiktoken encoding, which is loaded when first needed."""
    name: str

    @functools.cached_property
    def encoding(self):
        with user_error(f"--tokenizer {self.name} cannot be loaded; choose bytes or a tiktoken encoding, and "
                        f"without network set TIKTOKEN_CACHE_DIR to a folder that holds its files"):
            import tiktoken
            return tiktoken.get_encoding(self.name)

    n_vocab = property(lambda self: 256 if self.name == "bytes" else self.encoding.n_vocab)

    def encode(self, text):
        """str or bytes -> 1-d integer array of token ids."""
        text = text.encode() if isinstance(text, str) else text
        if self.name == "bytes":
            return np.frombuffer(text, dtype=np.uint8)
        return np.array(self.encoding.encode_ordinary(text.decode(errors="replace")), dtype=np.uint32)

    def decode(self, ids):
        ids = [int(i) for i in ids]
        return bytes(ids).decode(errors="replace") if self.name == "bytes" else self.encoding.decode(ids)


def stdlib_files():
    """The running Python's own library, without its tests, which not every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    files = [p for top in root.iterdir() if top.name not in skip for p in files_under(top)]
    return sorted(p for p in files if p.suffix == ".py" and not skip & set(p.relative_to(root).parts))


def file_documents(files):
    """Yields (split, document) of text files."""
    documents = (p.read_bytes() for p in files)
    if len(files) >= 10:
        yield from (("val" if i % 10 == 9 else "train", document) for i, document in enumerate(documents))
    else:
        text = b"\n".join(documents)
        cut = len(text) * 9 // 10
        yield from (("train", text[:cut]), ("val", text[cut:]))


def hub_documents(settings, path):
    """Yields (split, document) of a dataset, which is streamed."""
    datasets = load_hub(settings.data, path, settings.split, streaming=True)
    for split, dataset in zip(("train", "val"), datasets):
        for i, row in enumerate(dataset):
            with user_error(f"{settings.data}, row {i}: no text in --column {settings.column} of {[*row]}"):
                document = row[settings.column].encode()
            yield "val" if len(datasets) == 1 and i % 100 == 99 else split, document


def tokenize(documents, tokenizer, scratch):
    """(facts, {split: token ids}) of documents, with a line end between two, by way of files in a folder."""
    n_bytes, dtype = {"train": 0, "val": 0}, np.min_scalar_type(tokenizer.n_vocab - 1)
    with open(scratch / "train", "wb") as train, open(scratch / "val", "wb") as val:
        for split, document in documents:
            for chunk in ([b"\n"] if n_bytes[split] and document else []) + CHUNK.findall(document):
                (train if split == "train" else val).write(tokenizer.encode(chunk).astype(dtype))
                n_bytes[split] += len(chunk)
    if not all(n_bytes.values()):
        raise UserError(f"too little text; bytes found (of a folder, in .txt files): {n_bytes}")
    ids = {split: np.memmap(scratch / split, dtype, "r") for split in n_bytes}
    return {"train": len(ids["train"]), "val": len(ids["val"]), "vocab_size": tokenizer.n_vocab,
            "bytes_per_token": n_bytes["val"] / len(ids["val"])}, ids


class Data:
    """Windows of a text, which is prepared and read when first needed: to sample, the tokenizer is enough."""

    def __init__(self, settings, device, seed=0):
        self.settings, self.device = settings, torch.device(device)
        self.tokenizer = Tokenizer(settings.tokenizer)

    @functools.cached_property
    def stored(self):
        """(facts, {split: token ids})."""
        source, path = self.settings.data, local_path(self.settings.data, "text")
        files, about = files_under(path), {"tokenizer": self.tokenizer.name}
        if source == "stdlib":
            files, about["python"] = stdlib_files(), platform.python_version()
            documents = file_documents(files)
        elif not files or any(p.suffix in HUB_FORM for p in files):
            about |= {"split": self.settings.split, "column": self.settings.column}
            documents = hub_documents(self.settings, path)
        else:
            documents = file_documents([p for p in files if p == path or p.suffix == ".txt"])
        return prepared(source, path, files, about, functools.partial(tokenize, documents, self.tokenizer))

    about = property(lambda self: self.stored[0])
    facts = property(lambda self: {k: self.about[k] for k in FACTS})
    bytes_per_token = property(lambda self: self.about["bytes_per_token"])  # of the held-out text

    def describe(self):
        python = f" of Python {self.about['python']}" if "python" in self.about else ""
        return ("{source}" + python + ", tokenizer {tokenizer}, {train:,} tokens to train on, {val:,} held "
                "out, fingerprint {fingerprint:.12}").format(**self.about)

    def length(self, config):  # examples in an epoch
        return self.about["train"] // config.seq_len

    def windows(self, split, starts, config):
        """(n, T + 1) tokens from each start onwards."""
        if min(self.about["train"], self.about["val"]) < config.seq_len + 2:
            raise UserError(f"too little text for --seq-len {config.seq_len}: {self.describe()}")
        rows = np.stack([self.stored[1][split][i:i + config.seq_len + 1] for i in starts])
        return to_device(torch.from_numpy(rows.astype(np.int64)), self.device)

    def batch(self, n, config, index):
        """(n, T + 1) windows of the training text, at places drawn from torch's CPU random stream. `index` is
        not looked at: the seed that train.py sets before a batch is another for each."""
        high = max(1, self.about["train"] - config.seq_len)
        return self.windows("train", torch.randint(high, (n,)).tolist(), config)

    def held_out(self, n, config):
        """(at most n, T + 1) windows at even distances over the held-out text; always the same."""
        n = max(1, min(n, self.about["val"] // config.seq_len))
        last = self.about["val"] - config.seq_len - 1
        return self.windows("val", np.linspace(0, last, n).astype(np.int64), config)

    def unigram(self):
        """(V,) log-probabilities of tokens in the training text, each counted once more than it occurs."""
        counts = np.ones(self.about["vocab_size"])
        for ids in np.array_split(self.stored[1]["train"], self.about["train"] // 2 ** 20 + 1):
            counts += np.bincount(ids, minlength=len(counts))
        return to_device(torch.from_numpy(np.log(counts / counts.sum())).float(), self.device)
