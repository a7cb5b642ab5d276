"""Show what --augment does to ten images: results/images/augmentation.png and augmentation_digits.png.

    python results/augmentation.py path/to/cifar100

The path is anything that --data of an image model takes; the digits are at hand."""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
import train

HERE, MARGIN = Path(__file__).parent / "images", 76  # pixels at the left for the names of rows


def rows_of(x, names):
    """{row: images (n, C, H, W) in [-1, 1]}: each augmentation alone, each operation of rand alone."""
    rows = {"original": x} | {name: train.AUGMENTATIONS[name](x) for name in names if name != "rand"}
    if "rand" in names:
        sign = torch.ones(len(x), 1, 1, 1)
        sign[1::2] = -1  # every other image the other way
        for name, operation in train.OPERATIONS.items():
            rows[name] = operation(((x + 1) * 127.5).round(), 9 / 30 * sign) / 127.5 - 1
        rows |= {"rand": train.rand(x), "rand again": train.rand(x)}
    return rows


def picture(rows, scale):
    """One line of enlarged images for each row, its name before it, in few colours: a small file."""
    lines = [((torch.cat(list(x), dim=2) + 1) * 127.5).round().byte() for x in rows.values()]  # (C, H, n * W)
    pixels = torch.cat(lines, dim=1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    pixels = np.pad(pixels, ((0, 0), (MARGIN, 0), (0, 0)), constant_values=255)
    image = Image.fromarray(pixels)
    height = image.height // len(rows)
    for i, name in enumerate(rows):
        ImageDraw.Draw(image).text((4, i * height + height // 2 - 6), name, fill=0)
    return image.quantize(128, dither=Image.Dither.NONE)


HERE.mkdir(exist_ok=True)
for source, names, scale, file in ((sys.argv[1], train.AUGMENTATIONS, 2, "augmentation.png"),
                                   ("digits", ["crop"], 4, "augmentation_digits.png")):
    torch.manual_seed(0)
    data = train.load_images(train.ImageTraining(data=source), torch.device("cpu"))
    picture(rows_of(data.batch(10, None, 0)[0], names), scale).save(HERE / file, optimize=True)
    print(f"{HERE / file}: {(HERE / file).stat().st_size} bytes")
