"""Which files are used, and as what: the layout of a folder is decided here, and nowhere else.

    text      a text file, or a folder of .txt files
    images    FOLDER/CLASS/x.png, or FOLDER/train/CLASS/x.png beside FOLDER/val/CLASS/x.png
    tables    a file in hub form (.parquet, .arrow, .jsonl, .json, .csv, .tsv, each also .gz or .zst), or a folder
              of files of one such form

Splits come from names. A file belongs to a split if a folder above it, or the beginning of its own name, is one of
SPLITS (`train/a.txt`, `test.csv`, `validation-2.jsonl`), or if it is named as the hub names its files
(`unsupervised-00000-of-00002.parquet`). Either all files say their split, or none does: else the folder is refused.
"""
import fnmatch
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TABLE_FORMS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv",
               ".tsv": "tsv"}
PACKED = (".gz", ".zst")
# what `datasets` writes beside its own files
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "test": "test", "testing": "test"}
HUB_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}$")


# ---- Listing ----------------------------------------------------------------------------------------------

@dataclass
class Listing:
    """The files of a source, in natural order."""
    root: Path
    files: list                                       # names relative to root, with /; "" is root itself, a file
    left_out: Counter = field(default_factory=Counter)  # {reason: how many}

    def path(self, name):
        return self.root / name if name else self.root

    def keep(self, names, reason):
        """This listing with some of its files; the others are counted as left out."""
        left_out = self.left_out.copy()
        for name in set(self.files) - set(names):
            left_out[reason(name)] += 1
        return Listing(self.root, [n for n in self.files if n in set(names)], left_out)

    def stamps(self):
        """What changes when a file is renamed, moved or replaced: (name, size, time of change) of each."""
        found = []
        for name in self.files:
            status = self.path(name).stat()
            found.append((name, status.st_size, status.st_mtime_ns))
        return found

    def describe(self):
        text = f"{len(self.files):,} {'file' if len(self.files) == 1 else 'files'}"
        if self.left_out:
            reasons = [f"{n:,} {reason}" for reason, n in sorted(self.left_out.items())]
            text += f" (left out: {', '.join(reasons)})"
        return text


def natural(name):
    """A key to sort names by, so that 2 comes before 10."""
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, name


def listing(root):
    """All files of a folder (or a file alone). Names that begin with a dot are skipped; links are followed, and a
    file that is reached twice counts once."""
    root = Path(root)
    if root.is_file():
        return Listing(root, [""])
    found, left_out, seen = [], Counter(), set()

    def visit(folder, prefix, above):
        for name in sorted(os.listdir(folder), key=natural):
            path = folder / name
            if name.startswith("."):
                left_out["with a name that begins with a dot"] += 1
                continue
            try:
                status = path.stat()
            except OSError:
                left_out["links that lead nowhere"] += 1
                continue
            identity = (status.st_dev, status.st_ino)
            if path.is_dir():
                if identity in above:
                    left_out["links to a folder that they are in"] += 1
                else:
                    visit(path, prefix + name + "/", above | {identity})
            elif not path.is_file():
                left_out["that are pipes, sockets or devices"] += 1
            elif identity in seen:
                left_out["links to a file that is used already"] += 1
            else:
                seen.add(identity)
                found.append(prefix + name)

    try:
        status = root.stat()
        visit(root, "", {(status.st_dev, status.st_ino)})
    except OSError as e:
        raise UserError(f"--data {root}: {e.filename} cannot be read ({e.strerror})") from None
    return Listing(root, found, left_out)


def suffix(name):
    """The suffix of a file in small letters, without that of a packed file."""
    name = name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def form(name):
    """parquet, arrow, json, csv or tsv for a table; else ""."""
    if Path(name).name in DESCRIPTIONS:
        return ""
    kind = TABLE_FORMS.get(suffix(name), "")
    if kind in ("parquet", "arrow") and name.lower().endswith(PACKED):
        return ""
    return kind


def other_kind(name):
    """Why a file is left out: what it is called, for a message."""
    return Path(name).suffix.lower() or "without suffix"


# ---- Layout -----------------------------------------------------------------------------------------------

def split_of(name):
    """The split that a file's name tells, or "". SPLITS has the names, which become train, validation or test."""
    *folders, last = name.split("/")
    for folder in folders:
        if folder.lower() in SPLITS:
            return SPLITS[folder.lower()]
    stem = last.split(".")[0]
    hub = HUB_NAME.match(stem)
    if hub and hub[1] != "data":  # which is save_to_disk's name for a dataset without splits
        return SPLITS.get(hub[1].lower(), hub[1])
    word = re.match(r"[A-Za-z]+", stem)
    if word and word[0].lower() in SPLITS:
        return SPLITS[word[0].lower()]
    return ""


def splits_by_name(listing):
    """{split: names}: {"train": all} if no name tells a split. Raises UserError if only some do."""
    splits = {}
    for name in listing.files:
        splits.setdefault(split_of(name), []).append(name)
    unnamed = splits.pop("", [])
    if not splits:
        return {"train": unnamed}
    if unnamed:
        split, names = list(splits.items())[0]
        raise UserError(f"--data {listing.root}: {names[0]!r} looks like the split {split!r}, but {unnamed[0]!r} "
                        f"belongs to no split; rename one of them, or name a single file or folder")
    return splits


def class_folders(listing):
    """{split: [(name, class)]} of images in folders by class.

    A folder at the top is a class, whatever its name: FOLDER/CLASS/x.png. But if those with the names of splits hold
    folders, it is FOLDER/SPLIT/CLASS/x.png. Then every folder at the top is a split, also one called `unused`, if it
    has no other classes. Raises UserError where it could be both."""
    classes_in = {}  # {folder at the top: names of the folders in it that lead to images}
    for name in listing.files:
        folder, *below = name.split("/")
        if below:
            classes_in.setdefault(folder, set()).update(below[:-1][:1])
    layout = "images must be in FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/"
    if not classes_in:
        raise UserError(f"--data {listing.root}: there are images, but no class folders; {layout}")
    named = [folder for folder in classes_in if folder.lower() in SPLITS]
    others = [folder for folder in classes_in if folder not in named]
    classes = set().union(*(classes_in[folder] for folder in named))
    if named and not others and not classes:
        raise UserError(f"--data {listing.root}: {', '.join(named)} hold images, but no class folders; {layout}")
    splits = {}
    if not classes:
        splits["train"] = [(name, name.split("/")[0]) for name in listing.files if "/" in name]
        return splits
    strange = [folder for folder in others if not classes_in[folder] or classes_in[folder] - classes]
    if strange:
        raise UserError(f"--data {listing.root}: {named[0]!r}, with folders in it, looks like a split, but "
                        f"{strange[0]!r} beside it does not; {layout}, and not in both")
    for name in listing.files:
        folder, *below = name.split("/")
        if len(below) >= 2:
            split = SPLITS.get(folder.lower(), folder)
            splits.setdefault(split, []).append((name, below[0]))
    return splits


def table_files(listing):
    """This listing with its tables alone. Raises UserError if they are of several forms."""
    tables = []
    first = {}  # {form: a file that has it}
    for name in listing.files:
        kind = form(name or listing.root.name)
        if kind:
            tables.append(name)
            first.setdefault(kind, name)
    if len(first) > 1:
        raise UserError(f"--data {listing.root}: there are files of several forms, such as "
                        f"{' and '.join(first.values())}; name one file, or a folder with one form")
    return listing.keep(tables, other_kind)


def declared(listing):
    """{configuration: {split: patterns of names}} that the README.md of a folder in hub form declares, or {}."""
    if "README.md" not in listing.files:
        return {}
    text = listing.path("README.md").read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if not head:
        return {}
    import yaml  # comes with datasets
    try:
        content = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return {}
    found = {}
    entries = content.get("configs") if isinstance(content, dict) else None
    for entry in entries or []:
        files = entry.get("data_files")
        if isinstance(files, str) or files and isinstance(files[0], str):
            files = [{"split": "train", "path": files}]
        patterns = {}
        for one in files or []:
            path = one["path"]
            patterns[one["split"]] = [path] if isinstance(path, str) else path
        found[entry.get("config_name", "default")] = patterns
    return found


def table_splits(listing, config=""):
    """(listing of the tables used, {split: names}), by what README.md declares or else by names."""
    configs = declared(listing)
    tables = table_files_of(listing, configs, config)
    if not configs:
        return tables, splits_by_name(tables)
    splits = {}
    for split, patterns in configs[config or list(configs)[0]].items():
        names = [n for n in tables.files if any(fnmatch.fnmatchcase(n, p.removeprefix("./")) for p in patterns)]
        if names:
            splits[SPLITS.get(split.lower(), split)] = names
    if not splits:  # declared, but without patterns of files
        splits = splits_by_name(tables)
    used = {name for names in splits.values() for name in names}
    return tables.keep(used, lambda name: "of another configuration"), splits


def table_files_of(listing, configs, config):
    """The tables of a listing, after a look at the configuration that was asked for."""
    names = ", ".join(repr(name) for name in configs)
    if config and config not in configs:
        found = f"it has {names}" if configs else "it declares none"
        raise UserError(f"--data {listing.root} has no --config {config!r}; {found}")
    if len(configs) > 1 and not config:
        raise UserError(f"--data {listing.root} has several configurations; choose one with --config: {names}")
    return table_files(listing)


def choose(splits, source, split, held_out):
    """(training split, held-out split or "") of a source's splits, as typed or by their names."""
    names = ", ".join(repr(name) for name in splits)
    wanted = SPLITS.get(split.lower(), split)
    train = split if split in splits else wanted
    if train not in splits:
        raise UserError(f"--data {source} has no --split {split!r}; choose one of {names}")
    if held_out:
        chosen = held_out if held_out in splits else SPLITS.get(held_out.lower(), held_out)
        if chosen not in splits or chosen == train:
            raise UserError(f"--data {source}: --held-out {held_out!r} must be another split than {train!r}, of "
                            f"{names}")
        return train, chosen
    for kind in ("validation", "test"):
        for name in splits:
            if name != train and SPLITS.get(name.lower()) == kind:
                return train, name
    return train, ""
