"""Images (N, C, H, W) as bytes, or latents as floats, with labels (N,). Held out is a dataset's validation or
test split, or a tenth of each class if it has none."""
import functools
import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import UserError, files_under, load_hub, local_path, prepared, user_error
from data.augment import AUGMENTATIONS
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


def read_digits(settings, path):
    images, labels, held_out = np.load(Path(__file__).parent / "digits.npz").values()
    images = np.rint(images[:, None] * (255 / 16)).astype(np.uint8)  # from 17 levels of grey
    return images, labels.astype(np.int64), held_out, None


def read_latents(settings, path):
    with user_error(f"{path} must hold latents, finite (N, C, H, H) with C not 1 or 3, and labels, integers "
                    f"(N,), and may hold val_latents and val_labels"), np.load(path) as file:
        parts = ("", "val_") if "val_latents" in file else ("",)
        images, labels = (np.concatenate([file[p + k] for p in parts]) for k in ("latents", "labels"))
        held_out = np.arange(len(images)) >= len(file["latents"]) if "val_latents" in file else None
        n, channels, height, width = images.shape
        if channels in (1, 3) or height != width or labels.shape != (n,) or not np.isfinite(images).all():
            raise ValueError(f"latents {images.shape}, labels {labels.shape}")
        return images.astype(np.float32), labels.astype(np.int64, casting="same_kind"), held_out, None


def read_hub(settings, path):
    splits = load_hub(settings.data, path, settings.split)
    import datasets
    kinds = splits[0].features
    images = [k for k in kinds if isinstance(kinds[k], datasets.Image)]
    classes = [k for k in kinds if isinstance(kinds[k], datasets.ClassLabel)]
    classes.sort(key=lambda k: -kinds[k].num_classes)  # the finest first: CIFAR-100 has superclasses, too
    image, label = settings.image_column or [*images, ""][0], settings.label_column or [*classes, ""][0]
    pixels, labels, grey = [], [], True
    for split, row in ((split, row) for split in splits for row in range(len(split))):
        with user_error(f"{settings.data}, {split.split}, row {row}: of {[*kinds]}, --image-column {image!r} "
                        f"must hold square 8-bit images of one size, --label-column {label!r} classes"):
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
    """(facts, arrays) of a reader's images, labels, mask (N,) of those held out and class names, if any."""
    if held_out is None or not held_out.any():  # a tenth of each class, one image at least
        held_out = np.zeros(len(labels), dtype=bool)
        for own in (np.flatnonzero(labels == c) for c in np.unique(labels)):
            held_out[own[shuffled(len(own), 0, "held out")[:max(1, len(own) // 10)]]] = True
    arrays = {"train_images": images[~held_out], "train_labels": labels[~held_out],
              "val_images": images[held_out], "val_labels": labels[held_out]}
    names = names or [str(c) for c in range(min(labels.max(), len(labels)) + 1)]
    classes = set(range(len(names)))
    wrong = set(labels.tolist()) - classes or classes - set(arrays["train_labels"].tolist())
    if wrong:
        raise UserError(f"labels must be 0 to {max(classes)}, each with a training image; see {min(wrong)}")
    scaled = (on_scale(x).astype(np.float64) for x in arrays["train_images"])
    mean, square = np.mean([(x.mean(), np.square(x).mean()) for x in scaled], axis=0).tolist()
    return {"train": int((~held_out).sum()), "val": int(held_out.sum()), "names": names,
            "n_class": len(names), "n_channel": images.shape[1], "image_size": images.shape[2],
            "data_mean": round(mean, 6), "data_std": round((square - mean ** 2) ** 0.5, 6)}, arrays


class Data:
    """Images and labels: shuffled epochs to train on, one fixed order to evaluate. Read when first needed."""

    def __init__(self, settings, device, seed=0):
        self.settings, self.device, self.seed = settings, torch.device(device), seed
        chosen = set(settings.augment.split(",")) - {"none"}
        if chosen - set(AUGMENTATIONS) or chosen and settings.data.endswith(".npz"):
            raise UserError(f"--augment {settings.augment}: choose none, or for images any of crop,flip,rand")
        self.augment = {name: change for name, change in AUGMENTATIONS.items() if name in chosen}

    @functools.cached_property
    def stored(self):
        """(facts, {name: tensor}): moved to a GPU once; on the CPU they stay memory-mapped."""
        source, path = self.settings.data, local_path(self.settings.data, "images")
        read = read_digits if source == "digits" else read_latents if source.endswith(".npz") else read_hub
        choice = {k: getattr(self.settings, k) for k in ("split", "image_column", "label_column")}
        facts, arrays = prepared(source, path, files_under(path), choice,
                                 lambda folder: complete(*read(self.settings, path)))
        return facts, {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    names = property(lambda self: self.stored[0]["names"])  # of the classes
    about = property(lambda self: {k: v for k, v in self.stored[0].items() if k != "names"})
    facts = property(lambda self: {k: self.stored[0][k] for k in FACTS})

    def describe(self):
        return ("{source}, {train:,} images to train on, {val:,} held out, {n_channel} x {image_size} x "
                "{image_size}, {n_class} classes, augmentation {}, fingerprint {fingerprint:.12}").format(
                    ",".join(self.augment) or "none", **self.about)

    def length(self, config):  # examples in an epoch
        return self.stored[0]["train"]

    def fetch(self, split, rows):
        """Images (n, C, H, W), float32 in [-1, 1] or latents, and labels (n,) of rows (n,), on the device."""
        rows = to_device(rows, self.device)
        images, labels = (self.stored[1][f"{split}_{kind}"][rows] for kind in ("images", "labels"))
        return on_scale(images), labels

    def batch(self, n, config, index):
        """Images (n, C, H, W) and labels (n,): places index * n onwards in an endless row of epochs, each the
        whole training set in an order that (seed, epoch) alone decides. Only the augmentation is drawn from
        torch's CPU random stream."""
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
