"""Which files are used, and as what: the layout of a folder is decided here, and nowhere else.

    text      a text file, or a folder of .txt files (each also .gz or .zst)
    images    FOLDER/CLASS/x.png, or FOLDER/train/CLASS/x.png beside FOLDER/val/CLASS/x.png
    tables    a file in hub form (.parquet, .arrow, .jsonl, .json, .csv, .tsv, each also .gz or .zst), or a folder
              of files of one such form

Splits come from names. A file belongs to a split if a folder above it, or its own name, holds one of SPLITS between
separators (`train/a.txt`, `wiki.test.csv`, `my_validation-2.jsonl`), or if it is named as the hub names its files
(`unsupervised-00000-of-00002.parquet`). Either all files say their split, or none does: else the folder is refused.
"""
import fnmatch
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from data import UserError, user_error

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TABLE_FORMS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv",
               ".tsv": "tsv"}
PACKED = (".gz", ".zst")
# what holds no plain text
BINARY_SUFFIXES = IMAGE_SUFFIXES | {
    ".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar", ".npz", ".npy", ".pt", ".pth",
    ".pkl", ".safetensors", ".bin", ".h5", ".db", ".sqlite", ".pdf", ".doc", ".docx", ".odt", ".epub", ".xls",
    ".xlsx", ".heic", ".mp3", ".mp4", ".wav"}
# what `datasets` writes beside its own files
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "test": "test", "testing": "test"}
WORDS = "training|train|validation|valid|val|dev|testing|test"
SPLIT_WORD = re.compile(rf"(?:^|[-_.])({WORDS})(?=[-_.0-9]|$)", re.IGNORECASE)
GLUED_WORD = re.compile(WORDS, re.IGNORECASE)
HUB_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}$")


# ---- Listing ----------------------------------------------------------------------------------------------

@dataclass
class Listing:
    """The files of a source, in natural order."""
    root: Path
    files: list                                       # names relative to root, with /; "" is root itself, a file
    left_out: Counter = field(default_factory=Counter)  # {reason: how many}
    folders: list = field(default_factory=list)       # names of the folders in it, relative to root

    def path(self, name):
        return self.root / name if name else self.root

    def form(self, name):
        return form(name or self.root.name)

    def keep(self, names, reason):
        """This listing with some of its files; the others are counted as left out."""
        names = set(names)
        kept = []
        left_out = self.left_out.copy()
        for name in self.files:
            if name in names:
                kept.append(name)
            else:
                left_out[reason(name or self.root.name)] += 1
        return replace(self, files=kept, left_out=left_out)

    def stamps(self, splits):
        """What changes when a file of {split: names} is renamed, moved or replaced, or changes its split: where the
        data are, and the name, size and time of change of each."""
        found = {"root": str(self.root.resolve())}
        for split, names in splits.items():
            found[split] = []
            for name in names:
                with user_error(f"{self.path(name)} cannot be read", OSError):
                    status = self.path(name).stat()
                found[split].append((name, status.st_size, status.st_mtime_ns))
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


def in_order(name):
    """A key to sort names of files by: the files of a folder lie together."""
    return [natural(part) for part in name.split("/")]


def listing(root):
    """All files of a folder (or a file alone). Names that begin with a dot are skipped; links are followed, and
    what is reached twice counts once: where it lies rather than where a link leads to it, and for training rather
    than for another split."""
    root = Path(root)
    if root.is_file():
        return Listing(root, [""])
    files = {}    # {identity: names}
    folders = {}  # {identity: name}
    links = []    # to folders, which are followed last
    left_out = Counter()
    waiting = [""]
    while waiting or links:
        if not waiting:
            links.sort(key=preference)
            waiting.append(links.pop(0))
        folder = waiting.pop()
        try:
            names = os.listdir(root / folder)
            _, identity = kind_of(root / folder)
        except OSError as e:
            raise UserError(f"--data {root}: {e.filename} cannot be read ({e.strerror})") from None
        if identity in folders:
            left_out["links to a folder that is used already"] += 1
            continue
        folders[identity] = folder
        for name in names:
            if name.startswith("."):
                left_out["names that begin with a dot"] += 1
                continue
            name = f"{folder}/{name}".lstrip("/")
            kind, identity = kind_of(root / name)
            if kind == "folder":
                waiting.append(name)
            elif kind == "link to a folder":
                links.append(name)
            elif kind == "file":
                files.setdefault(identity, []).append(name)
            else:
                left_out[kind] += 1
    used = [used_name(root, names) for names in files.values()]
    n_again = sum(map(len, files.values())) - len(used)
    if n_again > 0:
        left_out["links to a file that is used already"] = n_again
    below = [folder for folder in folders.values() if folder != ""]
    return Listing(root, sorted(used, key=in_order), left_out, sorted(below, key=in_order))


def kind_of(path):
    """(folder, link to a folder, file, or why it is left out; what is the same for two names of the same thing)."""
    try:
        status = path.stat()
    except OSError:
        return "links that lead nowhere" if path.is_symlink() else "that cannot be read", None
    identity = (status.st_dev, status.st_ino)
    if stat.S_ISREG(status.st_mode):
        return "file", identity
    if not stat.S_ISDIR(status.st_mode):
        return "that are pipes, sockets or devices", identity
    return "link to a folder" if path.is_symlink() else "folder", identity


def used_name(root, names):
    """The one of a file's names that is used."""
    if len(names) > 1:
        names.sort(key=preference)
        names.sort(key=lambda name: (root / name).is_symlink())
    return names[0]


def preference(name):
    """A key to sort names of the same thing by: the first is used."""
    return split_of(name) != "train", in_order(name)


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


# ---- Layout: splits by name -------------------------------------------------------------------------------

def split_word(name):
    """train, validation or test, if the name of a file or folder holds such a word between separators; else ""."""
    found = SPLIT_WORD.search(name)
    if found:
        return SPLITS[found[1].lower()]
    return ""


def split_of(name):
    """The split that a file's name, or one of a folder above it, tells; or ""."""
    *folders, last = name.split("/")
    for folder in folders:
        if split_word(folder):
            return split_word(folder)
    hub = HUB_NAME.match(last.split(".")[0])
    if hub and hub[1] != "data":  # which is save_to_disk's name for a dataset without splits
        return SPLITS.get(hub[1].lower(), hub[1])
    return split_word(last)


def splits_by_name(listing):
    """{split: names}: {"train": all} if no name tells a split. Raises UserError if only some do, or if names differ
    as those of splits do, such as `trainset` and `testset`."""
    splits = {}
    for name in listing.files:
        splits.setdefault(split_of(name), []).append(name)
    unnamed = splits.pop("", [])
    if not splits:
        refuse_glued(listing)
        return {"train": unnamed}
    if unnamed:
        split, names = list(splits.items())[0]
        raise UserError(f"--data {listing.root}: {names[0]!r} looks like the split {split!r}, but {unnamed[0]!r} "
                        f"belongs to no split; rename one of them, or name a single file or folder")
    return splits


def refuse_glued(listing):
    """Raises UserError if two names are the same but for the name of a split within."""
    first = {}  # {name without the word: the first name}
    for name in listing.files:
        rest = GLUED_WORD.sub("*", name)
        other = first.setdefault(rest, name)
        if "*" in rest and other.lower() != name.lower():
            raise UserError(f"--data {listing.root}: {other!r} and {name!r} look like splits; put separators around "
                            f"the word, as in a-train.txt and a-test.txt, or name a single file or folder")


# ---- Layout: images by class ------------------------------------------------------------------------------

LAYOUT = "images must be in FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/"


def class_folders(listing):
    """{split: [(name, class folder)]} of images in folders by class.

    A folder at the top is a class, whatever its name: FOLDER/CLASS/x.png. But if those with the names of splits hold
    folders, it is FOLDER/SPLIT/CLASS/x.png. Then every folder at the top is a split, also one called `unused`, if it
    has no other classes. Raises UserError where it could be both."""
    below = {}    # {folder at the top: names of the folders in it that lead to images}
    flat = set()  # folders at the top that hold images themselves
    for name in listing.files:
        folder, *rest = name.split("/")
        if len(rest) == 1:
            flat.add(folder)
        if len(rest) >= 1:
            below.setdefault(folder, set())
        if len(rest) >= 2:
            below[folder].add(rest[0])
    named = [folder for folder in below if split_word(folder) != ""]
    refuse_other_layouts(listing.root, below, flat, named)

    classes = set()
    for folder in named:
        classes |= below[folder]
    splits = {}
    if len(classes) == 0:
        for name in listing.files:
            folder, *rest = name.split("/")
            if len(rest) >= 1:
                splits.setdefault("train", []).append((name, folder))
        return splits
    for folder in below:
        is_like_a_split = below[folder] != set() and below[folder] <= classes
        if folder not in named and not is_like_a_split:
            raise UserError(f"--data {listing.root}: {named[0]!r}, with folders in it, looks like a split, but "
                            f"{folder!r} beside it does not; {LAYOUT}, and not in both")
    for name in listing.files:
        folder, *rest = name.split("/")
        if len(rest) >= 2:
            split = split_word(folder) or folder
            splits.setdefault(split, []).append((name, f"{folder}/{rest[0]}"))
    return splits


def refuse_other_layouts(root, below, flat, named):
    """Raises UserError if there are no class folders, or if they are one level further down."""
    if len(below) == 0:
        raise UserError(f"--data {root}: there are images, but no class folders; {LAYOUT}")
    folders = list(below)
    if named == folders and flat == set(folders) and not any(below.values()):
        raise UserError(f"--data {root}: {', '.join(named)} hold images, but no class folders; {LAYOUT}")
    if len(folders) == 1 and len(flat) == 0 and len(named) == 0:
        raise UserError(f"--data {root}: all images are in folders of {folders[0]!r}; did you mean --data "
                        f"{root / folders[0]}?")


def folders_without_images(listing, used):
    """Names of the folders beside those of the classes used that would be classes if there were images in them."""
    beside = {folder.rpartition("/")[0] for folder in used}
    found = []
    for folder in listing.folders:
        if folder.rpartition("/")[0] in beside and folder not in used:
            found.append(folder)
    return found


# ---- Layout: tables, as README.md declares them -----------------------------------------------------------

def strings(value):
    """A string or a list of strings, as a list. Raises TypeError for anything else."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no text")
    for one in value:
        if not isinstance(one, str):
            raise TypeError(f"{one!r} is no text")
    return value


def patterns_of(data_files):
    """{split: patterns of names}, of what the hub documents as forms of data_files: a pattern, a list of them,
    {split: patterns}, and a list of {"split": split, "path": patterns}."""
    found = {}
    if data_files is None:
        return found
    if isinstance(data_files, dict):
        for split, patterns in data_files.items():
            found[split] = strings(patterns)
    elif isinstance(data_files, list) and isinstance(data_files[0], dict):
        for one in data_files:
            found.setdefault(one["split"], []).extend(strings(one["path"]))
    else:
        found["train"] = strings(data_files)
    return found


@dataclass
class Configuration:
    """What a README.md in hub form declares under one name."""
    folder: str       # where its files are, relative to the README.md
    patterns: dict    # {split: patterns of names}; {}: splits are told by names
    is_default: bool


def declared(listing):
    """{name: Configuration} that the README.md of a folder in hub form declares, or {}. Raises UserError."""
    if "README.md" not in listing.files:
        return {}
    text = listing.path("README.md").read_text(encoding="utf-8-sig", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if head is None or re.search("^configs:", head[1], re.MULTILINE) is None:
        return {}
    import yaml  # comes with datasets
    found = {}
    with user_error(f"--data {listing.root}: configs of README.md cannot be understood"):
        for entry in yaml.safe_load(head[1])["configs"]:
            name = str(entry.get("config_name", "default"))
            if name in found:
                raise ValueError(f"{name!r} is declared twice")
            folder = entry.get("data_dir", "")
            patterns = patterns_of(entry.get("data_files"))
            strings([folder, *patterns])
            is_default = entry.get("default") is True or name == "default"
            found[name] = Configuration(folder, patterns, is_default)
    return found


def configuration(listing, wanted):
    """The Configuration that is wanted, or the default; None if none is declared. Raises UserError."""
    found = declared(listing)
    names = ", ".join(repr(name) for name in found)
    if wanted in found:
        return found[wanted]
    if wanted:
        has = f"it has {names}" if found else "it declares none"
        raise UserError(f"--data {listing.root} has no --config {wanted!r}; {has}")
    if not found:
        return None
    if len(found) == 1:
        return list(found.values())[0]
    for one in found.values():
        if one.is_default:
            return one
    raise UserError(f"--data {listing.root} has several configurations; choose one with --config: {names}")


def matches(parts, pattern):
    """Whether the parts of a path match those of a pattern. ** stands for any number of parts."""
    if len(pattern) == 0:
        return len(parts) == 0
    if pattern[0] == "**":
        for i in range(len(parts) + 1):
            if matches(parts[i:], pattern[1:]):
                return True
        return False
    if len(parts) == 0:
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def matching(listing, folder, pattern):
    """The names that a pattern of a README.md stands for: a file, all files of a folder, or with * and **."""
    if "://" in pattern:
        raise UserError(f"--data {listing.root}: README.md declares {pattern!r}, which is not read from here; "
                        f"download it")
    wanted = PurePosixPath(folder, pattern).parts
    if set(pattern) & set("*?[") == set():
        wanted += ("**",)  # it may be a folder
    found = [name for name in listing.files if matches(name.split("/"), wanted)]
    if len(found) == 0:
        raise UserError(f"--data {listing.root}: README.md declares {'/'.join(wanted)!r}, but no file in hub form "
                        f"matches it")
    return found


def declared_splits(listing, folder, patterns):
    """{split: names} that a configuration declares. Raises UserError if a file is of two splits."""
    split_by_file = {}
    for split, own in patterns.items():
        split = SPLITS.get(split.lower(), split)
        for pattern in own:
            for name in matching(listing, folder, pattern):
                if split_by_file.setdefault(name, split) != split:
                    raise UserError(f"--data {listing.root}: README.md declares {name!r} for the split "
                                    f"{split_by_file[name]!r} and for {split!r}")
    splits = {}
    for name in listing.files:
        if name in split_by_file:
            splits.setdefault(split_by_file[name], []).append(name)
    return splits


def table_splits(listing, config=""):
    """(listing of the tables used, {split: names}), by what README.md declares or else by names."""
    chosen = configuration(listing, config)
    tables = listing.keep([name for name in listing.files if listing.form(name)], other_kind)
    splits = None
    if chosen is not None and chosen.patterns == {}:
        inside = matching(tables, chosen.folder, "")
        tables = tables.keep(inside, lambda name: "of another configuration")
    elif chosen is not None:
        splits = declared_splits(tables, chosen.folder, chosen.patterns)
        tables = tables.keep(sum(splits.values(), []), lambda name: "of another configuration")
    refuse_several_forms(tables)
    return tables, splits or splits_by_name(tables)


def refuse_several_forms(tables):
    first = {}  # {form: a file that has it}
    for name in tables.files:
        first.setdefault(tables.form(name), name)
    if len(first) > 1:
        raise UserError(f"--data {tables.root}: there are files of several forms, such as "
                        f"{' and '.join(first.values())}; name one file, or a folder with one form")


def split_called(splits, name):
    """The split that is called so, or usually: `val` means `validation`. "" if there is none."""
    for called in (name, SPLITS.get(name.lower())):
        if called in splits:
            return called
    return ""


def choose(splits, source, split, held_out):
    """(training split, held-out split or "") of a source's splits, as typed or by their names."""
    names = ", ".join(repr(name) for name in splits)
    train = split_called(splits, split)
    if train == "":
        raise UserError(f"--data {source} has no --split {split!r}; choose one of {names}")
    if held_out:
        chosen = split_called(splits, held_out)
        if chosen in ("", train):
            raise UserError(f"--data {source}: --held-out {held_out!r} must be another split than {train!r}, of "
                            f"{names}")
        return train, chosen
    for kind in ("validation", "test"):
        for name in splits:
            if name != train and SPLITS.get(name.lower()) == kind:
                return train, name
    return train, ""
