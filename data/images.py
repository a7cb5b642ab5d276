"""Images (N, C, H, W) as bytes, or latents as floats, with labels (N,). Held out is a dataset's validation or
test split, or a tenth of each class if it has none."""
import functools
import math
import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import SPLITS, UserError, files_under, load_hub, local_path, prepared, user_error
from data.augment import augmentation
from diffusion_blocks import seed_of, to_device

FACTS = ("image_size", "n_channel", "n_class", "data_mean", "data_std")  # of a Config, decided by the data


@dataclass
class Settings:
    data: str = "digits"    # digits, a hub id, a folder in hub form or of images by class, an .npz of latents
    split: str = "train"    # split of a dataset to train on
    image_column: str = ""  # column that holds the images; empty: the one whose type is image
    label_column: str = ""  # column that holds the labels; empty: the class label with most classes
    augment: str = "none"   # none, or any of crop, flip, rand (RandAugment), joined by commas


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, part):
    """(n,) a permutation that (seed, part) alone decides."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, part)))


def on_scale(images):
    """Bytes 0..255 to [-1, 1]; latents stay as they are. Arrays and tensors alike."""
    return images if images.dtype.itemsize > 1 else images / 127.5 - 1


# Readers return images, labels, a mask (N,) of those held out or None, names of the classes or None.

def read_digits(settings, path):
    with np.load(Path(__file__).parent / "digits.npz") as file:
        images, labels, held_out = (file[k] for k in ("images", "labels", "held_out"))
    images = np.rint(images[:, None] * (255 / 16)).astype(np.uint8)  # from 17 levels of grey
    return images, labels.astype(np.int64), held_out, None


def read_latents(settings, path):
    with user_error(f"{path} must hold latents, finite numbers (N, C, H, H) with C not 1 or 3, and labels, integers "
                    f"(N,), and may hold val_latents and val_labels"), np.load(path) as file:
        parts = ("", "val_") if "val_latents" in file else ("",)
        images, labels = (np.concatenate([file[p + k] for p in parts]) for k in ("latents", "labels"))
        held_out = np.arange(len(images)) >= len(file["latents"]) if "val_latents" in file else None
        n, channels, height, width = images.shape
        if (channels in (1, 3) or height != width or not np.isfinite(images).all() or labels.shape != (n,)
                or labels.dtype.kind not in "iu"):
            raise ValueError(f"latents {images.shape}, labels {labels.shape} {labels.dtype}")
    return images.astype(np.float32), labels.astype(np.int64), held_out, None


def read_dataset(settings, path):
    splits = load_hub(settings.data, path, settings.split)
    import datasets
    kinds = splits[0].features
    images = [k for k in kinds if isinstance(kinds[k], datasets.Image)]
    classes = [k for k in kinds if isinstance(kinds[k], datasets.ClassLabel)]
    classes.sort(key=lambda k: -kinds[k].num_classes)  # the finest first: CIFAR-100 has superclasses, too
    image, label = settings.image_column or [*images, ""][0], settings.label_column or [*classes, ""][0]
    pixels, labels, grey = [], [], True
    for split, row in ((split, row) for split in splits for row in range(len(split))):
        with user_error(f"--data {settings.data}, {split.split}, row {row}, columns {', '.join(kinds)}: no class "
                        f"number in --label-column {label!r}, or in --image-column {image!r} no image of 8 bits, "
                        f"square and as large as the first"):
            cells = split[row]
            picture = cells[image]
            pixels.append(np.asarray(picture.convert("RGB")))
            labels.append(operator.index(cells[label]))
            grey = grey and picture.mode in ("1", "L")
            if picture.size != (len(pixels[0]),) * 2 or picture.mode[0] in "IF":
                raise ValueError(f"{picture.width} x {picture.height} pixels, mode {picture.mode}")
    held_out = np.arange(len(labels)) >= len(splits[0]) if splits[1:] else None
    images = np.stack(pixels).transpose(0, 3, 1, 2)[:, :1 if grey else 3]
    return images, np.array(labels), held_out, getattr(kinds[label], "names", None)


def complete(images, labels, held_out, names):
    """(facts, arrays) of what a reader returns."""
    if held_out is None:  # a tenth of each class, one image at least
        held_out = np.zeros(len(labels), dtype=bool)
        for own in (np.flatnonzero(labels == c) for c in np.unique(labels)):
            held_out[own[shuffled(len(own), 0, "held out")[:max(1, len(own) // 10)]]] = True
    arrays = {"train_images": images[~held_out], "train_labels": labels[~held_out],
              "val_images": images[held_out], "val_labels": labels[held_out]}
    names = names or [str(c) for c in range(min(labels.max(), len(labels)) + 1)]
    classes = set(range(len(names)))
    wrong = set(labels.tolist()) - classes or classes - set(arrays["train_labels"].tolist())
    if wrong:
        raise UserError(f"labels must be 0 to {len(names) - 1}, each with an image to train on; see {min(wrong)}")
    scaled = (on_scale(x).astype(np.float64) for x in arrays["train_images"])
    mean, square = np.mean([(x.mean(), np.square(x).mean()) for x in scaled], axis=0).tolist()
    return {"train": int((~held_out).sum()), "val": int(held_out.sum()), "n_class": len(names), "names": names,
            "n_channel": images.shape[1], "image_size": images.shape[2], "data_mean": round(mean, 6),
            "data_std": round(math.sqrt(square - mean ** 2), 6)}, arrays


class Data:
    """Images and labels: shuffled epochs to train on, one fixed order to evaluate. Read when first needed."""

    def __init__(self, settings, device, seed=0):
        self.settings, self.device, self.seed = settings, torch.device(device), seed
        self.augment = augmentation(settings.augment)
        if self.augment and settings.data.endswith(".npz"):
            raise UserError(f"--augment {settings.augment} is for pixels, but {settings.data} holds latents")

    @functools.cached_property
    def stored(self):
        """(facts, {name: tensor}): moved to a GPU once; on the CPU they stay memory-mapped."""
        source, path = self.settings.data, local_path(self.settings.data, "images")
        read = read_digits if source == "digits" else read_latents if source.endswith(".npz") else read_dataset
        choice = {k: getattr(self.settings, k) for k in ("split", "image_column", "label_column")}
        facts, arrays = prepared(source, path, files_under(path), choice,
                                 lambda folder: complete(*read(self.settings, path)))
        return facts, {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    names = property(lambda self: self.stored[0]["names"])  # of the classes
    about = property(lambda self: {k: v for k, v in self.stored[0].items() if k != "names"})
    facts = property(lambda self: {k: self.stored[0][k] for k in FACTS})

    def describe(self):
        about, size = self.about, self.about["image_size"]
        return (f"{about['source']}, {about['train']:,} images to train on, {about['val']:,} held out, "
                f"{about['n_channel']} x {size} x {size}, {about['n_class']} classes, augmentation "
                f"{','.join(self.augment) or 'none'}, fingerprint {about['fingerprint'][:12]}")

    def length(self, config):
        """Examples in an epoch."""
        return self.stored[0]["train"]

    def fetch(self, split, rows):
        """Images (n, C, H, W), float32 in [-1, 1] or latents, and labels (n,) of rows (n,), on the device."""
        rows = to_device(rows, self.device)
        images, labels = (self.stored[1][f"{split}_{kind}"][rows] for kind in ("images", "labels"))
        return on_scale(images), labels

    def batch(self, n, config, index):
        """Images (n, C, H, W) and labels (n,): places index * n onwards in an endless row of epochs, each the
        whole training set in an order that (seed, epoch) alone decides; augmented."""
        size = self.length(config)
        epochs, places = np.divmod(np.arange(index * n, (index + 1) * n), size)
        rows = torch.cat([shuffled(size, self.seed, f"epoch {epoch}")[places[epochs == epoch]]
                          for epoch in np.unique(epochs)])
        images, labels = self.fetch("train", rows)
        for change in self.augment.values():
            images = change(images)
        return images, labels

    def fixed(self, split, n):
        """The first n images (0: all) and labels of a split, in one shuffled order; never augmented."""
        return self.fetch(split, shuffled(self.stored[0][split], 0, "held out")[:n or None])

    def held_out(self, n, config):
        return self.fixed("val", n)
