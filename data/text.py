"""Text: tokens to train on and held-out ones.

Held out is a validation or test split, or the split that --held-out names. Where there is none, it is every tenth of
ten text files or more, every 100th document in hub form, or the last tenth of all, if those are too little text."""
import codecs
import functools
import itertools
import os
import platform
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from data import Progress, UserError, local_path, one_line, prepared, refuse_without_effect, user_error
from data.files import (BINARY_SUFFIXES, PACKED, Listing, choose, listing, other_kind, splits_by_name, suffix,
                        table_splits)
from data.tables import LocalTable, hub_tables, open_packed, refuse_missing
from diffusion_blocks import to_device

FACTS = ("vocab_size",)  # fields of a model's Config that the data decides
NEEDS = ("seq_len",)     # fields that it must have


@dataclass
class Settings:
    data: str = "stdlib"      # stdlib, a text file, a folder of .txt files, a file or folder in hub form, or a hub id
    config: str = ""          # configuration of a dataset of the hub that has several
    split: str = "train"      # split of a dataset to train on
    held_out: str = ""        # split that is held out; empty: validation or test, or else a part of --split
    column: str = "text"      # column of a dataset that holds the text
    tokenizer: str = "bytes"  # bytes, or a tiktoken encoding such as gpt2


# ---- Tokens -----------------------------------------------------------------------------------------------

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

    @property
    def n_vocab(self):
        if self.name == "bytes":
            return 256
        return self.encoding.n_vocab

    def encode(self, text):
        """str or bytes -> 1-d integer array of token ids."""
        text = text.encode(errors="replace") if isinstance(text, str) else text
        return self.encode_all([text])[0]

    def encode_all(self, texts):
        """A list of bytes -> a list of 1-d integer arrays, by all cores. Bytes must be UTF-8 for an encoding."""
        if self.name == "bytes":
            return [np.frombuffer(text, dtype=np.uint8) for text in texts]
        texts = [text.decode() for text in texts]
        ids = self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return [np.array(own, dtype=np.uint32) for own in ids]

    def bytes_of(self, ids):
        """The bytes that ids stand for; an id that has no token is the character for what is unknown."""
        if self.name == "bytes":
            return bytes(int(i) for i in ids)
        found = []
        for i in ids:
            try:
                found.append(self.encoding.decode_single_token_bytes(int(i)))
            except KeyError:
                found.append("\N{REPLACEMENT CHARACTER}".encode())
        return b"".join(found)

    def decode(self, ids):
        return self.bytes_of(ids).decode(errors="replace")


PIECE = 2 ** 20  # bytes that are tokenized together, if there is white space to cut at
LONGEST = 16 * PIECE  # bytes without white space after which a text is cut anyway
# places within which no token of tiktoken's encodings lies: before a space that follows anything but white space,
# and before a line end that follows a letter or digit of ASCII (cl100k_base has a token for ".\n")
BOUNDARY = re.compile(rb"(?<=[!-~])(?= )"
                      rb"|(?<=[\xc3-\xdf][\x80-\xbf])(?= )"               # two bytes: none of these is white space
                      rb"|(?<=[\xe0\xe4-\xef][\x80-\xbf][\x80-\xbf])(?= )"  # three bytes: nor of these
                      rb"|(?<=[A-Za-z0-9])(?=\n)")


def pieces(blocks):
    """Cuts a document, which comes in blocks of bytes, into pieces of about a megabyte. The tokens of the pieces are
    those of the document as a whole. So memory stays constant, however large it is."""
    text = b""
    for block in blocks:
        text += block
        while len(text) > PIECE + 1:
            found = BOUNDARY.search(text, PIECE)
            if found:
                cut = found.start()
            elif len(text) > LONGEST:
                cut = between_characters(text, len(text) // 2)
            else:
                break
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def between_characters(text, place):
    """The first place from here on that is not within a character of UTF-8."""
    while place < len(text) and text[place] & 0b11000000 == 0b10000000:
        place += 1
    return place


# ---- Documents: (split, blocks of bytes) ------------------------------------------------------------------

def stdlib_listing():
    """The running Python's own library, without its tests, which not every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return Listing(root, [p.relative_to(root).as_posix() for p in sorted(paths)])


def read_blocks(path, is_utf8=False):
    """The bytes of a file, unpacked, in blocks. With is_utf8, raises UserError where they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0
    with user_error(f"{path} cannot be read", OSError), open_text(path) as file:
        while True:
            block = file.read(PIECE)
            if is_utf8:
                pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as e:
                    raise UserError(f"{path} is not UTF-8 at byte {place - pending + e.start}; convert it (iconv -f "
                                    f"LATIN1 -t UTF-8), or train with --tokenizer bytes") from None
            if not block:
                return
            yield block
            place += len(block)


def is_packed(path):
    return path.name.lower().endswith(PACKED)


def open_text(path):
    """A file's bytes as a stream."""
    if is_packed(path):
        return open_packed(path)
    return open(path, "rb")


def size_of(path):
    """Bytes of a file, unpacked."""
    if is_packed(path):
        return sum(len(block) for block in read_blocks(path))
    with user_error(f"{path} cannot be read", OSError):
        return path.stat().st_size


def joined(documents):
    """The blocks of documents, one after another, with a line end between two."""
    for i, blocks in enumerate(documents):
        if i > 0:
            yield b"\n"
        yield from blocks


def cut_in_two(blocks, cut):
    """The documents "train", the first `cut` bytes, and "val", the rest. The cut falls between characters."""
    blocks = iter(blocks)
    rest = []

    def first():
        place = 0
        for block in blocks:
            if place + len(block) > cut:
                block += next(blocks, b"")  # a character may go on there
                end = between_characters(block, cut - place)
                rest.append(block[end:])
                yield block[:end]
                return
            place += len(block)
            yield block

    yield "train", first()
    yield "val", itertools.chain(rest, blocks)


def files_joined(paths, is_utf8):
    return joined(read_blocks(path, is_utf8) for path in paths)


def file_documents(paths, is_utf8=False):
    """Documents of text files without splits: every tenth file is held out, or the last tenth of all."""
    if len(paths) >= 10:
        for i, path in enumerate(paths):
            yield "val" if i % 10 == 9 else "train", read_blocks(path, is_utf8)
    else:
        n_bytes = sum(size_of(path) for path in paths) + len(paths) - 1
        yield from cut_in_two(files_joined(paths, is_utf8), n_bytes * 9 // 10)


def split_documents(train, val, is_utf8=False):
    """Documents of text files with splits."""
    for path in train:
        yield "train", read_blocks(path, is_utf8)
    for path in val:
        yield "val", read_blocks(path, is_utf8)


def table_texts(table, column, left_out):
    """The texts of a table, as bytes. Rows that hold none are counted in left_out, a Counter."""
    for where, row in table.rows([column]):
        refuse_missing(column, row, where)
        text = row[column]
        if text in (None, ""):
            left_out["rows"] += 1
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{where}: column {column!r} holds no text, but {type(text).__name__}")
        with user_error(f"{where} is no valid text", UnicodeEncodeError):
            yield text.encode()


def table_joined(table, column, left_out):
    return joined([text] for text in table_texts(table, column, left_out) if text)


def table_documents(train, val, column, left_out):
    """Documents of a table, and of the one that is held out; if there is none, every 100th is."""
    for i, text in enumerate(table_texts(train, column, left_out)):
        if val is None and i % 100 == 99:
            yield "val", [text]
        else:
            yield "train", [text]
    if val is not None:
        for text in table_texts(val, column, left_out):
            yield "val", [text]


# ---- Preparing --------------------------------------------------------------------------------------------

AT_ONCE = 16 * PIECE  # bytes that are given to all cores together
ENOUGH = 10_000       # bytes of held-out text that are enough, however much text there is


class TokenFiles:
    """A file of token ids for each split. Pieces of text wait until there are enough for all cores. Use it in a
    `with`."""

    def __init__(self, tokenizer, folder):
        self.tokenizer, self.folder = tokenizer, folder
        self.dtype = np.min_scalar_type(tokenizer.n_vocab - 1)
        self.n_bytes = {"train": 0, "val": 0}
        self.files = {split: open(folder / split, "wb") for split in self.n_bytes}
        self.waiting = []  # (split, piece)
        self.n_waiting = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            file.close()

    def add(self, split, piece):
        self.waiting.append((split, piece))
        self.n_bytes[split] += len(piece)
        self.n_waiting += len(piece)
        if self.n_waiting >= AT_ONCE:
            self.write()

    def write(self):
        all_ids = self.tokenizer.encode_all([piece for _, piece in self.waiting])
        for (split, _), ids in zip(self.waiting, all_ids):
            self.files[split].write(ids.astype(self.dtype))
        self.waiting.clear()
        self.n_waiting = 0

    def arrays(self):
        """{split: token ids}, mapped, of closed files."""
        return {split: np.memmap(self.folder / split, self.dtype, "r") for split in self.files}


def tokenize(documents, tokenizer, folder, progress):
    """Write the tokens of documents (split, blocks), with a line end between two. Returns the TokenFiles."""
    with progress, TokenFiles(tokenizer, folder) as tokens:
        for split, blocks in documents:
            is_new = True
            for piece in pieces(blocks):
                if is_new and tokens.n_bytes[split] > 0:
                    tokens.add(split, b"\n")
                is_new = False
                tokens.add(split, piece)
                if progress.unit == "bytes":
                    progress.add(len(piece))
            if progress.unit == "documents":
                progress.add(1)
        tokens.write()
    return tokens


def prepare(source, tokenizer, folder):
    """(facts, {split: token ids}) of a Source, by way of files in a folder."""
    left_out = Counter()
    progress = Progress(source.unit, source.total)
    tokens = tokenize(source.documents(left_out), tokenizer, folder, progress)
    n_all = sum(tokens.n_bytes.values())
    if n_all == 0:
        raise UserError(f"there is no text in {source.name}: {source.used}, {left_out['rows']:,} rows without text")
    n_held_out = tokens.n_bytes["val"]
    if n_held_out < ENOUGH and n_held_out < .02 * n_all:
        left_out.clear()
        text = source.joined(left_out)
        if text is not None:  # no split is held out: the last tenth is, and all is read again
            progress = Progress("bytes", n_all)
            tokens = tokenize(cut_in_two(text, n_all * 9 // 10), tokenizer, folder, progress)
    n_bytes = tokens.n_bytes
    if min(n_bytes.values()) == 0:
        raise UserError(f"too little text: {n_bytes['train']:,} bytes to train on, {n_bytes['val']:,} held out")
    arrays = tokens.arrays()
    facts = {split: len(ids) for split, ids in arrays.items()}
    facts["vocab_size"] = tokenizer.n_vocab
    facts["bytes_per_token"] = n_bytes["val"] / facts["val"]
    if left_out["rows"] > 0:
        facts["rows_without_text"] = left_out["rows"]
    return facts, arrays


# ---- Which source it is -----------------------------------------------------------------------------------

@dataclass
class Source:
    """What --data names, and how to read it."""
    name: str
    choice: dict         # settings that decide the content
    stamps: dict         # where its files are; of each split their names, sizes and times
    used: str            # the files that are used, in words
    documents: Callable  # documents(left_out) yields (split, blocks), and counts in left_out the rows without text
    joined: Callable     # joined(left_out): the blocks of all documents; None if a split is held out
    unit: str            # bytes or documents, by which progress is told
    total: int | None = None  # of these, where it is known


def find_source(settings):
    """The Source that settings name. Raises UserError."""
    path = local_path(settings.data, "text")
    if settings.data == "stdlib":
        return stdlib_source(settings)
    if path is None:
        return hub_source(settings)
    found = listing(path)
    name = path.resolve().name
    tables = [file for file in found.files if found.form(file)]
    texts = [file for file in found.files if is_text(file) and found.form(file) == ""]
    if tables and texts:
        raise UserError(f"--data {path}: there are text files, such as {texts[0]}, and tables, such as {tables[0]}; "
                        f"name one of them, or a folder with one kind")
    if tables:
        return tables_source(settings, name, found)
    if texts:
        if not is_text(path.name) and path.suffix.lower() in BINARY_SUFFIXES:
            raise UserError(f"--data {path} is packed or binary; it must be plain text, .txt.gz or .txt.zst")
        return files_source(settings, name, found.keep(texts, other_kind))
    raise UserError(f"--data {path}: there are no .txt files, and none in hub form: "
                    f"{found.keep([], other_kind).describe()}")


def is_text(name):
    """Whether a file of a folder is text. A file that is named alone, "", may have any suffix."""
    return name == "" or suffix(name) == ".txt"


def stdlib_source(settings):
    refuse_without_effect(settings, ("data", "tokenizer"))
    files = stdlib_listing()
    paths = [files.path(file) for file in files.files]

    def documents(left_out):
        return file_documents(paths)

    def everything(left_out):
        return files_joined(paths, is_utf8=False)
    choice = {"python": platform.python_version()}
    stamps = files.stamps({"train": files.files})
    return Source("stdlib", choice, stamps, files.describe(), documents, everything, "bytes")


def files_source(settings, name, files):
    refuse_without_effect(settings, ("data", "tokenizer", "split", "held_out"))
    is_utf8 = settings.tokenizer != "bytes"
    splits = splits_by_name(files)
    train, val = choose(splits, settings.data, settings.split, settings.held_out)
    used = {"train": splits[train], "val": splits.get(val, [])}
    files = files.keep(used["train"] + used["val"], lambda file: "of other splits")
    paths = [files.path(file) for file in used["train"]]
    val_paths = [files.path(file) for file in used["val"]]

    def documents(left_out):
        if val_paths:
            return split_documents(paths, val_paths, is_utf8)
        return file_documents(paths, is_utf8)

    def everything(left_out):
        if val_paths:
            return None
        return files_joined(paths, is_utf8)
    n_bytes = None
    if not any(is_packed(path) for path in paths + val_paths):
        n_bytes = sum(size_of(path) for path in paths + val_paths)
    choice = {"split": settings.split, "held_out": settings.held_out}
    return Source(name, choice, files.stamps(used), files.describe(), documents, everything, "bytes", n_bytes)


def table_choice(settings):
    return {name: getattr(settings, name) for name in ("config", "split", "held_out", "column")}


def tables_source(settings, name, files):
    files, splits = table_splits(files, settings.config)
    train, val = choose(splits, settings.data, settings.split, settings.held_out)
    used = {"train": splits[train], "val": splits.get(val, [])}
    files = files.keep(used["train"] + used["val"], lambda file: "of other splits")
    table = LocalTable(files, used["train"])
    held_out = LocalTable(files, used["val"]) if val else None

    def documents(left_out):
        return table_documents(table, held_out, settings.column, left_out)

    def everything(left_out):
        if held_out is not None:
            return None
        return table_joined(table, settings.column, left_out)
    n_rows = LocalTable(files, files.files).n_rows()
    return Source(name, table_choice(settings), files.stamps(used), files.describe(), documents, everything,
                  "documents", n_rows)


def hub_source(settings):
    def chosen():
        tables = hub_tables(settings, streaming=True)
        train, val = choose(tables, settings.data, settings.split, settings.held_out)
        return tables[train], tables.get(val)

    def documents(left_out):
        train, val = chosen()
        return table_documents(train, val, settings.column, left_out)

    def everything(left_out):
        train, val = chosen()
        if val is not None:
            return None
        return table_joined(train, settings.column, left_out)
    return Source(settings.data, table_choice(settings), {}, "a dataset of the hub", documents, everything,
                  "documents")


# ---- Batches ----------------------------------------------------------------------------------------------

class Data:
    """Windows of a text, which is prepared and read when first needed: to sample, the tokenizer is enough."""

    def __init__(self, settings, device, seed=0):
        self.settings, self.device = settings, torch.device(device)
        self.tokenizer = Tokenizer(settings.tokenizer)

    @functools.cached_property
    def source(self):
        return find_source(self.settings)

    @functools.cached_property
    def stored(self):
        """(facts for the checkpoint, {split: token ids}), prepared if need be: see `about` and `arrays`."""
        source = self.source

        def build(folder):
            return prepare(source, self.tokenizer, folder)
        return prepared(source.name, {"tokenizer": self.tokenizer.name} | source.choice, source.stamps, build)

    @property
    def about(self):
        return self.stored[0]

    @property
    def arrays(self):
        return self.stored[1]

    @property
    def facts(self):
        return {name: self.about[name] for name in FACTS}

    @property
    def bytes_per_token(self):
        """Of the held-out text."""
        return self.about["bytes_per_token"]

    def describe(self):
        about = self.about
        python = f" of Python {about['python']}" if "python" in about else ""
        line = (f"{about['source']}{python}, {self.source.used}, tokenizer {about['tokenizer']}, {about['train']:,} "
                f"tokens to train on, {about['val']:,} held out, fingerprint {about['fingerprint'][:12]}")
        if "rows_without_text" in about:
            line += f", left out: {about['rows_without_text']:,} rows without text"
        return one_line(line)

    def length(self, config):
        """Examples in an epoch."""
        return self.about["train"] // config.seq_len

    def windows(self, split, starts, config):
        """(n, T + 1) tokens from each start onwards."""
        if min(self.about["train"], self.about["val"]) < config.seq_len + 2:
            raise UserError(f"too little text for --seq-len {config.seq_len}: {self.describe()}")
        ids = self.arrays[split]
        rows = np.stack([ids[start:start + config.seq_len + 1] for start in starts])
        return to_device(torch.from_numpy(rows.astype(np.int64)), self.device)

    def batch(self, n, config, index):
        """(n, T + 1) windows of the training text, at places drawn from torch's CPU random stream. `index` is
        not looked at: the seed that train.py sets before a batch is another for each."""
        high = max(1, self.about["train"] - config.seq_len)
        return self.windows("train", torch.randint(high, (n,)).tolist(), config)

    def held_out(self, n, config):
        """(at most n, T + 1) windows at even distances over the held-out text (n None: all of it); always the
        same."""
        n_all = max(1, self.about["val"] // config.seq_len)
        n = n_all if n is None else min(n, n_all)
        last = self.about["val"] - config.seq_len - 1
        return self.windows("val", np.linspace(0, last, n).astype(np.int64), config)
