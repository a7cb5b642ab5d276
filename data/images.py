"""Images (N, C, H, W) as bytes, or latents as floats, with labels (N,).

Held out is a validation or test split, or the split that --held-out names, or else a tenth of each class."""
import functools
import io
import itertools
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from data import Progress, UserError, local_path, one_line, prepared, refuse_without_effect, user_error
from data.augment import AUGMENTATIONS
from data.files import (IMAGE_SUFFIXES, choose, class_folders, folders_without_images, form, listing, natural,
                        other_kind, suffix, table_splits)
from data.tables import LocalTable, hub_tables
from diffusion_blocks import seed_of, to_device

FACTS = ("image_size", "n_channel", "n_class", "data_mean", "data_std")  # of a Config, decided by the data
NEEDS = ("image_size", "n_channel")  # fields of a Config that it must have


@dataclass
class Settings:
    data: str = "digits"    # digits, a folder of images by class, a file or folder in hub form, a hub id, or an .npz
    config: str = ""        # configuration of a dataset of the hub that has several
    split: str = "train"    # split of a dataset to train on
    held_out: str = ""      # split that is held out; empty: validation or test, or else a tenth of each class
    image_column: str = ""  # column that holds the images; empty: the one whose type is image
    label_column: str = ""  # column that holds the labels; empty: the class label with most classes
    one_in: int = 1         # train on one in so many images of each class, to see what few data do
    augment: str = "none"   # none, or any of crop, flip, rand (RandAugment), joined by commas


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, part):
    """(n,) a permutation that (seed, part) alone decides."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, part)))


def on_scale(images):
    """Bytes 0..255 to [-1, 1]; latents stay as they are. Arrays and tensors alike."""
    if images.dtype.itemsize > 1:
        return images
    return images / 127.5 - 1


# ---- Sources: each has examples, one after another --------------------------------------------------------

@dataclass
class Examples:
    """All examples of a source; those that are held out come last."""
    n: int              # how many
    n_train: int        # how many of them are to train on; n if the source has no held-out split
    rows: Callable      # rows() yields (image (C, H, W), label, whether it is grey) n times
    names: list | None = None  # of the classes


ALWAYS_READ = ("data", "one_in", "augment")


@dataclass
class Source:
    """What --data names, and how to read it."""
    name: str
    choice: dict     # settings that decide the content
    stamps: dict     # where its files are; of each split their names, sizes and times
    used: str        # the files that are used, in words
    read: Callable   # read() returns its Examples


def find_source(settings):
    """The Source that settings name. Raises UserError."""
    path = local_path(settings.data, "images")
    if settings.data == "digits":
        refuse_without_effect(settings, ALWAYS_READ)
        return Source("digits", {}, {}, "built in", read_digits)
    if path is None:
        return hub_source(settings)
    found = listing(path)
    name = path.resolve().name
    if path.is_file() and path.suffix.lower() == ".npz":
        refuse_without_effect(settings, ALWAYS_READ)
        stamps = found.stamps({"train": found.files})
        return Source(name, {}, stamps, found.describe(), functools.partial(read_latents, path))
    tables = [file for file in found.files if form(file or path.name) in ("parquet", "arrow")]
    pictures = [file for file in found.files if suffix(file) in IMAGE_SUFFIXES]
    if tables and pictures:
        raise UserError(f"--data {path}: there are images, such as {pictures[0]}, and tables, such as {tables[0]}; "
                        f"name one of them, or a folder with one kind")
    if tables:
        return tables_source(settings, name, found.keep(tables + ["README.md"], other_kind))
    if pictures:
        return folders_source(settings, name, found.keep(pictures, other_kind))
    raise UserError(f"--data {path}: there are no images, and no .parquet or .arrow files: "
                    f"{found.keep([], other_kind).describe()}")


def read_digits():
    images, labels, held_out = np.load(Path(__file__).parent / "digits.npz").values()
    images = np.rint(images[:, None] * (255 / 16)).astype(np.uint8)  # from 17 levels of grey
    order = np.argsort(held_out, kind="stable")  # those that are held out come last

    def rows():
        for i in order:
            yield images[i], int(labels[i]), True
    return Examples(len(images), int((~held_out).sum()), rows)


def read_latents(path):
    problem = (f"{path} must hold latents, finite (N, C, H, H) with C not 1 or 3, and labels, integers (N,), and may "
               f"hold val_latents and val_labels")
    with user_error(problem), np.load(path) as file:
        parts = [("latents", "labels")]
        if "val_latents" in file:
            parts.append(("val_latents", "val_labels"))
        all_labels = []
        for _, name in parts:
            labels = file[name].astype(np.int64, casting="same_kind")
            all_labels.append(np.atleast_1d(labels))

    def rows():
        size = None
        for (name, _), labels in zip(parts, all_labels):
            with user_error(problem):
                with np.load(path) as file:
                    images = file[name]  # one part in memory at a time
                n, channels, height, width = images.shape
                if channels in (1, 3) or height != width or labels.shape != (n,):
                    raise ValueError(f"{name} {images.shape}, labels {labels.shape}")
                if size not in (None, images.shape[1:]):
                    raise ValueError(f"{name} {images.shape}, but latents (N, {', '.join(map(str, size))})")
                size = images.shape[1:]
                if images.dtype.kind not in "fiu":
                    raise ValueError(f"{name} are {images.dtype}, not real numbers")
                for image, label in zip(images, labels.tolist()):
                    with np.errstate(over="ignore"):  # float64 beyond float32's range becomes infinite
                        image = image.astype(np.float32)
                    if not np.isfinite(image).all():
                        raise ValueError(f"a number in {name} is not finite as float32")
                    yield image, label, False
    return Examples(sum(map(len, all_labels)), len(all_labels[0]), rows)


DEEP = re.compile(r";16[BLN]")  # in what Pillow says of how pixels are stored: 16 bits, which it cuts to 8


def decode(file, where, size=None):
    """An image file as bytes (3, H, W), and whether it is grey. size: the (3, H, W) that it must have."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    with user_error(f"{where} cannot be read as an image"):
        try:
            opened = Image.open(file)
        except UnidentifiedImageError:  # whose message names an object of Python
            raise UserError(f"{where} cannot be read as an image: its bytes are those of no known kind") from None
        with opened:
            is_deep = DEEP.search(str(getattr(opened, "tile", "")))  # looked up before it is read
            picture = ImageOps.exif_transpose(opened)  # as the camera was held
        is_grey = picture.mode in ("1", "L", "LA")
        if "A" in picture.getbands() or "transparency" in picture.info:
            # what transparent pixels hide is not shown anywhere: they become white
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    shape = f"{picture.width} x {picture.height} pixels, mode {picture.mode}"
    if is_deep:
        raise UserError(f"{where}: images must have 8 bits a channel, but this one has 16")
    if picture.mode[0] in "IF" or picture.width != picture.height:
        raise UserError(f"{where}: images must be square and have 8 bits a channel, but this one has {shape}")
    if size is not None and pixels.shape != size:
        raise UserError(f"{where}: all images must be of one size, {size[2]} x {size[1]}, but this one has {shape}")
    return pixels, is_grey


def folders_source(settings, name, files):
    """Images in folders by class."""
    refuse_without_effect(settings, ALWAYS_READ + ("split", "held_out"))
    splits = class_folders(files)
    train, val = choose(splits, settings.data, settings.split, settings.held_out)
    pairs = splits[train] + splits.get(val, [])
    class_of = {folder: folder.rpartition("/")[2] for _, folder in pairs}
    classes = sorted(set(class_of.values()), key=natural)
    used = {"train": [file for file, _ in splits[train]],
            "val": [file for file, _ in splits.get(val, [])]}
    inside = [file for file, _ in sum(splits.values(), [])]
    files = files.keep(inside, lambda file: "outside class folders")
    files = files.keep(used["train"] + used["val"], lambda file: "of other splits")
    empty = folders_without_images(files, class_of)
    if empty:
        shown = ", ".join(empty[:5])  # of a thousand, five are enough to see which
        kind = "class folder" if len(empty) == 1 else "class folders"
        files.left_out[f"{kind} without images: {shown}"] = len(empty)

    def rows():
        size = None
        for file, folder in pairs:
            image, is_grey = decode(files.path(file), file, size)
            size = image.shape
            yield image, classes.index(class_of[folder]), is_grey

    def read():
        return Examples(len(pairs), len(splits[train]), rows, classes)
    shown = f"{files.describe()} in {len(classes):,} class folders"
    n_deeper = sum(file.rpartition("/")[0] != folder for file, folder in pairs)
    if n_deeper > 0:
        shown += f", {n_deeper:,} of the files in folders below these"
    choice = {"split": settings.split, "held_out": settings.held_out}
    return Source(name, choice, files.stamps(used), shown, read)


def table_choice(settings):
    return {k: getattr(settings, k) for k in ("config", "split", "held_out", "image_column", "label_column")}


def tables_source(settings, name, files):
    files, splits = table_splits(files, settings.config)
    used = files.keep([file for own in splits.values() for file in own], other_kind)
    tables = {split: LocalTable(used, own) for split, own in splits.items()}
    return Source(name, table_choice(settings), used.stamps(splits), used.describe(),
                  lambda: read_tables(settings, tables))


def hub_source(settings):
    return Source(settings.data, table_choice(settings), {}, "a dataset of the hub",
                  lambda: read_tables(settings, hub_tables(settings, streaming=False)))


def columns_of(settings, features):
    """(image column, label column) of a table. Raises UserError."""
    import datasets
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    classes.sort(key=lambda name: -features[name].num_classes)  # the finest first: CIFAR-100 has superclasses, too
    image = one_column(settings.data, features, settings.image_column, images, "--image-column")
    label = one_column(settings.data, features, settings.label_column, classes, "--label-column")
    return image, label


def one_column(source, features, typed, found, flag):
    """The column that was typed, or the first of those found by their type. Raises UserError."""
    if typed in features:
        return typed
    names = ", ".join(features)
    if typed:
        raise UserError(f"--data {source} has no column {typed!r} ({flag}); it has {names}")
    if found == []:
        raise UserError(f"--data {source}: the type of no column says that it is the one; choose {flag} of {names}")
    return found[0]


def read_tables(settings, tables):
    """The Examples of tables {split: table}. A split without labels (-1) is not held out, unless it is asked for."""
    train, val = choose(tables, settings.data, settings.split, settings.held_out)
    _, features = next(tables[train].features())
    image, label = columns_of(settings, features)
    if settings.held_out == "":
        tables = dict(tables)
        while val and not has_labels(tables[val], label):
            print(f"note: split {val!r} has no labels, so it is not held out", flush=True)
            del tables[val]
            train, val = choose(tables, settings.data, settings.split, "")
    used = [tables[train]]
    if val:
        used.append(tables[val])
    names = names_of_classes(used, label)
    sizes = [len(labels_of(table, label)) for table in used]

    def rows():
        size = None
        for table in used:
            for where, row in table.rows([image, label]):
                pixels, is_grey = decode(file_of(row[image], where, image), where, size)
                size = pixels.shape
                yield pixels, class_number(row[label], where), is_grey
    return Examples(sum(sizes), sizes[0], rows, names)


def names_of_classes(tables, column):
    """Names of the classes, or None if no file has them. Raises UserError if two files number classes differently."""
    first = None  # (file, names)
    for table in tables:
        for file, features in table.features():
            names = getattr(features.get(column), "names", None)
            if names is None:
                continue
            if first is None:
                first = file, names
            if names != first[1]:
                raise UserError(f"{first[0]} and {file} number the classes of {column!r} differently: "
                                f"{', '.join(first[1][:5])} ... and {', '.join(names[:5])} ...")
    if first is None:
        return None
    return first[1]


def file_of(cell, where, column):
    """What Image.open takes, of a cell of an image column."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, dict) and os.path.isfile(cell.get("path") or ""):  # to open a pipe would wait for ever
        return cell["path"]
    raise UserError(f"{where}: --image-column {column} holds no image")


def class_number(cell, where):
    """A label, -1 if there is none."""
    if cell is None:
        return -1
    with user_error(f"{where}: --label-column must hold class numbers", TypeError):
        return operator.index(cell)


def labels_of(table, column):
    return [class_number(row[column], where) for where, row in table.rows([column])]


def has_labels(table, column):
    for _, features in table.features():
        if column not in features:
            return False
    return min(labels_of(table, column), default=-1) >= 0


# ---- Preparing --------------------------------------------------------------------------------------------

class ArrayFile:
    """An .npy file that is written row by row, in a `with`. A mapped file would end the process on a full disk."""

    def __init__(self, path, dtype, shape):
        self.file = open(path, "wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, rows):
        self.file.write(np.ascontiguousarray(rows))


def write_images(examples, path, progress):
    """(images, labels, whether all are grey) of examples; images are mapped, so memory stays constant."""
    rows = examples.rows()
    first = next(rows, None)
    if first is None:
        raise UserError("there are no images")
    labels = []
    all_grey = True
    with ArrayFile(path, first[0].dtype, (examples.n, *first[0].shape)) as file:
        for image, label, is_grey in itertools.chain([first], rows):
            file.write(image)
            labels.append(label)
            all_grey = all_grey and is_grey
            progress.add(1)
    return np.load(path, mmap_mode="r"), np.array(labels, np.int64), all_grey


def store(examples, one_in, scratch, progress):
    """(facts, {name: array}) of examples, by way of files."""
    images, labels, all_grey = write_images(examples, scratch / "images.npy", progress)
    if all_grey:
        images = images[:, :1]
    held_out = np.arange(examples.n) >= examples.n_train
    if not held_out.any():
        held_out = tenth_of_each_class(labels)
    names = examples.names or [str(c) for c in range(min(labels.max(), examples.n) + 1)]
    refuse_labels(labels, held_out, names)
    train_rows = one_in_each_class(np.flatnonzero(~held_out), labels, one_in)
    arrays = {}
    for split, chosen in (("train", train_rows), ("val", np.flatnonzero(held_out))):
        arrays[f"{split}_images"] = taken(images, chosen, scratch / f"{split}.npy")
        arrays[f"{split}_labels"] = labels[chosen]
    mean, std = statistics_of(arrays["train_images"])
    return {"train": len(arrays["train_labels"]), "val": len(arrays["val_labels"]), "names": names,
            "n_class": len(names), "n_channel": images.shape[1], "image_size": images.shape[2],
            "data_mean": mean, "data_std": std}, arrays


def tenth_of_each_class(labels):
    """A mask (N,) of a tenth of each class, one example at least, the same every time."""
    held_out = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        held_out[own[shuffled(len(own), 0, "held out")[:max(1, len(own) // 10)]]] = True
    return held_out


def one_in_each_class(rows, labels, one_in):
    """Of these rows the first of every so many of each class, in the order in which they are."""
    if one_in == 1:
        return rows
    chosen = [rows[labels[rows] == c][::one_in] for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def refuse_labels(labels, held_out, names):
    """Raises UserError unless labels are 0 to len(names) - 1, each with an example to train on."""
    wrong = set(labels.tolist()) - set(range(len(names)))
    if names == []:
        raise UserError(f"there are no labels: the largest is {labels.max()}")
    if wrong:
        raise UserError(f"labels must be 0 to {len(names) - 1}; there is {min(wrong)}")
    untrained = set(range(len(names))) - set(labels[~held_out].tolist())
    if untrained:
        c = min(untrained)
        raise UserError(f"class {c} ({names[c]}) has no image to train on, and {(labels == c).sum()} held out; each "
                        f"class needs one to train on")


def taken(images, rows, path):
    """The given rows of a mapped array: a part of it if they lie together there, else copied into a file."""
    if images.flags.c_contiguous and len(rows) == rows[-1] + 1 - rows[0]:
        return images[rows[0]:rows[-1] + 1]
    with ArrayFile(path, images.dtype, (len(rows), *images.shape[1:])) as file:
        for start in range(0, len(rows), 1024):
            file.write(images[rows[start:start + 1024]])
    return np.load(path, mmap_mode="r")


def statistics_of(images):
    """(mean, standard deviation) of all pixels on their scale, rounded to six digits."""
    moments = []
    for image in images:
        image = on_scale(image).astype(np.float64)
        moments.append((image.mean(), np.square(image).mean()))
    mean, square = np.mean(moments, axis=0).tolist()
    std = round(max(0.0, square - mean ** 2) ** 0.5, 6)
    if std == 0:
        raise UserError("all pixels of all images have the same value: there is nothing to learn")
    return round(mean, 6), std


# ---- Batches ----------------------------------------------------------------------------------------------

class Data:
    """Images and labels: shuffled epochs to train on, one fixed order to evaluate. Read when first needed."""

    def __init__(self, settings, device, seed=0):
        self.settings, self.device, self.seed = settings, torch.device(device), seed
        if settings.one_in < 1:
            raise UserError(f"--one-in must be at least 1; got {settings.one_in}")
        chosen = set(settings.augment.split(",")) - {"none"}
        if chosen - set(AUGMENTATIONS) or chosen and settings.data.endswith(".npz"):
            raise UserError(f"--augment {settings.augment}: choose none, or for images any of crop,flip,rand")
        self.augment = {name: change for name, change in AUGMENTATIONS.items() if name in chosen}

    @functools.cached_property
    def source(self):
        return find_source(self.settings)

    @functools.cached_property
    def stored(self):
        """(facts, {name: array}), prepared if need be: see `about`, `names` and `arrays`."""
        def build(scratch):
            examples = self.source.read()
            with Progress("images", examples.n) as progress:
                return store(examples, self.settings.one_in, scratch, progress)
        choice = self.source.choice | {"one_in": self.settings.one_in}
        return prepared(self.source.name, choice, self.source.stamps, build)

    @property
    def names(self):
        """Of the classes."""
        return self.stored[0]["names"]

    def class_names(self, n):
        """Names of n classes; where the data are not there, or are others, their numbers."""
        try:
            if len(self.names) == n:
                return [one_line(name) for name in self.names]
        except UserError as e:
            print(f"note: classes are shown without their names: {e}", flush=True)
        return [str(c) for c in range(n)]

    @property
    def about(self):
        return {name: value for name, value in self.stored[0].items() if name != "names"}

    @property
    def facts(self):
        return {name: self.about[name] for name in FACTS}

    @functools.cached_property
    def arrays(self):
        """{name: array}: mapped on the CPU, tensors that were moved once on another device."""
        arrays = self.stored[1]
        if self.device.type == "cpu":
            return arrays
        return {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in arrays.items()}

    def describe(self):
        about = self.about
        augment = ",".join(self.augment) or "none"
        return one_line(
            f"{about['source']}, {self.source.used}, {about['train']:,} images to train on, {about['val']:,} held out, "
            f"{about['n_channel']} x {about['image_size']} x {about['image_size']}, {about['n_class']} classes, "
            f"augmentation {augment}, fingerprint {about['fingerprint'][:12]}")

    def length(self, config):
        """Examples in an epoch."""
        return self.about["train"]

    def fetch(self, split, rows):
        """Images (n, C, H, W), float32 in [-1, 1] or latents, and labels (n,) of rows (n,), on the device."""
        images, labels = self.arrays[f"{split}_images"], self.arrays[f"{split}_labels"]
        if self.device.type == "cpu":
            rows = rows.numpy()
            return on_scale(torch.from_numpy(images[rows])), torch.from_numpy(labels[rows])
        rows = to_device(rows, self.device)
        return on_scale(images[rows]), labels[rows]

    def batch(self, n, config, index):
        """Images (n, C, H, W) and labels (n,): places index * n onwards in an endless row of epochs, each the
        whole training set in an order that (seed, epoch) alone decides. Only the augmentation is drawn from
        torch's CPU random stream."""
        size = self.length(config)
        epochs, places = np.divmod(np.arange(index * n, (index + 1) * n), size)
        rows = []
        for epoch in np.unique(epochs):
            order = shuffled(size, self.seed, f"epoch {epoch}")
            rows.append(order[places[epochs == epoch]])
        images, labels = self.fetch("train", torch.cat(rows))
        for change in self.augment.values():
            images = change(images)
        return images, labels

    def fixed(self, split, n=None):
        """The first n images and labels of a split (or all), in one shuffled order; never augmented."""
        rows = shuffled(self.about[split], 0, "held out")
        if n:
            rows = rows[:n]
        return self.fetch(split, rows)

    def held_out(self, n, config):
        """At most n images (None: all) and labels that are never trained on, always the same."""
        return self.fixed("val", n)
