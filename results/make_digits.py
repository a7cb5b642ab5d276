"""Make data/digits.npz: the 1,797 8x8 images of the UCI optical-recognition set of handwritten digits
(E. Alpaydin and C. Kaynak, 1998; its test set), from the copy inside scikit-learn's wheel, not installed.

    python results/make_digits.py scikit_learn-1.9.1-....whl [digits.npz]

images (1797, 8, 8) uint8, 0..16; labels (1797,) uint8; held_out (1797,) bool: every fourth image of the set
sorted by class, after a shuffle of seed 0, so 450 images, a quarter of each class. Rows keep their order."""
import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np

MEMBER = "sklearn/datasets/data/digits.csv.gz"  # 64 pixels, row by row, then the digit

wheel = sys.argv[1]
path = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "data" / "digits.npz"
with zipfile.ZipFile(wheel) as archive:
    lines = gzip.decompress(archive.read(MEMBER)).decode().splitlines()
rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
# RandomState, because its stream is frozen: any numpy makes the same file
shuffled = np.random.RandomState(0).permutation(len(labels))
by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
held_out = np.zeros(len(labels), dtype=bool)
held_out[by_class[::4]] = True
np.savez_compressed(path, images=images, labels=labels, held_out=held_out)
print(f"{path}: {len(labels)} images, {held_out.sum()} held out, {path.stat().st_size} bytes")
