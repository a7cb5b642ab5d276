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
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    folders: list = field(default_factory=list)       # names of all folders, relative to root

    def path(self, name):
        return self.root / name if name else self.root

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
    what is reached twice counts once: for training rather than for another split, and where it lies rather than
    where a link leads to it."""
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
        identity, names = read_folder(root, folder)
        if identity in folders:
            left_out["links to a folder that is used already"] += 1
            continue
        folders[identity] = folder
        for name in names:
            name = f"{folder}/{name}".lstrip("/")
            kind = kind_of(root / name)
            if kind == "folder":
                waiting.append(name)
            elif kind == "link to a folder":
                links.append(name)
            elif kind == "file":
                files.setdefault(identity_of(root / name), []).append(name)
            else:
                left_out[kind] += 1
    used = []
    for names in files.values():
        used.append(min(names, key=lambda name: ((root / name).is_symlink(), preference(name))))
        if len(names) > 1:
            left_out["links to a file that is used already"] += len(names) - 1
    return Listing(root, sorted(used, key=in_order), left_out, sorted(folders.values(), key=in_order))


def identity_of(path):
    """The same for two names of a file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino


def read_folder(root, name):
    """(identity, names in it) of a folder."""
    try:
        return identity_of(root / name), os.listdir(root / name)
    except OSError as e:
        raise UserError(f"--data {root}: {e.filename} cannot be read ({e.strerror})") from None


def kind_of(path):
    """folder, link to a folder, file, or why it is left out."""
    if path.name.startswith("."):
        return "names that begin with a dot"
    if os.path.isdir(path):
        return "link to a folder" if path.is_symlink() else "folder"
    if os.path.isfile(path):
        return "file"
    if os.path.exists(path):
        return "that are pipes, sockets or devices"
    if path.is_symlink():
        return "links that lead nowhere"
    return "that cannot be read"


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
    classes_in = {}  # {folder at the top: names of the folders in it that lead to images}
    is_flat = False  # whether there are images in a folder at the top itself
    for name in listing.files:
        folder, *below = name.split("/")
        if below:
            classes_in.setdefault(folder, set()).update(below[:-1][:1])
            is_flat = is_flat or len(below) == 1
    if not classes_in:
        raise UserError(f"--data {listing.root}: there are images, but no class folders; {LAYOUT}")
    named = [folder for folder in classes_in if split_word(folder)]
    others = [folder for folder in classes_in if folder not in named]
    classes = set().union(*(classes_in[folder] for folder in named))
    if named and not others and not classes:
        raise UserError(f"--data {listing.root}: {', '.join(named)} hold images, but no class folders; {LAYOUT}")
    if len(others) == 1 and not named and not is_flat:
        raise UserError(f"--data {listing.root}: all images are in folders of {others[0]!r}; did you mean --data "
                        f"{listing.root / others[0]}?")
    if not classes:
        return {"train": [(name, name.split("/")[0]) for name in listing.files if "/" in name]}
    strange = [folder for folder in others if not classes_in[folder] or classes_in[folder] - classes]
    if strange:
        raise UserError(f"--data {listing.root}: {named[0]!r}, with folders in it, looks like a split, but "
                        f"{strange[0]!r} beside it does not; {LAYOUT}, and not in both")
    splits = {}
    for name in listing.files:
        folder, *below = name.split("/")
        if len(below) >= 2:
            split = split_word(folder) or folder
            splits.setdefault(split, []).append((name, f"{folder}/{below[0]}"))
    return splits


def folders_without_images(listing, used):
    """Names of the folders beside those of the classes used that would be classes if there were images in them."""
    beside = {folder.rpartition("/")[0] for folder in used}
    found = []
    for folder in listing.folders:
        is_beside = folder != "" and folder.rpartition("/")[0] in beside
        if is_beside and folder not in used:
            found.append(folder)
    return found


# ---- Layout: tables, as README.md declares them -----------------------------------------------------------

def strings(value):
    """A string or a list of strings, as a list. Raises TypeError for anything else."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TypeError(f"{value!r} is no text")
    return found


def patterns_of(data_files):
    """{split: patterns of names}, of what the hub documents as forms of data_files: a pattern, a list of them,
    {split: patterns}, and a list of {"split": split, "path": patterns}."""
    if data_files is None:
        return {}
    if isinstance(data_files, dict):
        return {split: strings(patterns) for split, patterns in data_files.items()}
    if isinstance(data_files, str) or isinstance(data_files[0], str):
        return {"train": strings(data_files)}
    found = {}
    for one in data_files:
        found.setdefault(one["split"], []).extend(strings(one["path"]))
    return found


@dataclass
class Configuration:
    """What a README.md in hub form declares under one name."""
    folder: str       # where its files are, relative to the README.md; "": beside it
    patterns: dict    # {split: patterns of names}; {}: splits are told by names
    is_default: bool


def declared(listing):
    """{name: Configuration} that the README.md of a folder in hub form declares, or {}. Raises UserError."""
    if "README.md" not in listing.files:
        return {}
    text = listing.path("README.md").read_text(encoding="utf-8-sig", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if not head or not re.search("^configs:", head[1], re.MULTILINE):
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
            found[name] = Configuration(folder.removeprefix("./").strip("/"), patterns, is_default)
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
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    if not parts or not fnmatch.fnmatchcase(parts[0], pattern[0]):
        return False
    return matches(parts[1:], pattern[1:])


def matching(listing, pattern):
    """The names that a pattern of a README.md stands for: a file, all files of a folder, or with * and **."""
    if "://" in pattern:
        raise UserError(f"--data {listing.root}: README.md declares {pattern!r}, which is not read from here; "
                        f"download it")
    path = pattern.removeprefix("./").strip("/")
    is_plain = not set(path) & set("*?[")
    found = []
    for name in listing.files:
        if is_plain and name.startswith(f"{path}/") or matches(name.split("/"), path.split("/")):
            found.append(name)
    if not found:
        raise UserError(f"--data {listing.root}: README.md declares {pattern!r}, but no file in hub form matches it")
    return found


def declared_splits(listing, folder, patterns):
    """{split: names} that a configuration declares. Raises UserError if a file is of two splits."""
    split_by_file = {}
    for split, own in patterns.items():
        split = SPLITS.get(split.lower(), split)
        for pattern in own:
            for name in matching(listing, f"{folder}/{pattern.removeprefix('./')}".lstrip("/")):
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
    tables = listing.keep([name for name in listing.files if form(name or listing.root.name)], other_kind)
    if chosen is None:
        refuse_several_forms(tables)
        return tables, splits_by_name(tables)
    if chosen.patterns:
        splits = declared_splits(tables, chosen.folder, chosen.patterns)
    else:
        inside = matching(tables, chosen.folder) if chosen.folder else tables.files
        splits = splits_by_name(replace(tables, files=inside))
    used = [name for names in splits.values() for name in names]
    tables = tables.keep(used, lambda name: "of another configuration")
    refuse_several_forms(tables)
    return tables, splits


def refuse_several_forms(tables):
    first = {}  # {form: a file that has it}
    for name in tables.files:
        first.setdefault(form(name or tables.root.name), name)
    if len(first) > 1:
        raise UserError(f"--data {tables.root}: there are files of several forms, such as "
                        f"{' and '.join(first.values())}; name one file, or a folder with one form")


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
