"""Make digits.npz of the copy in scikit-learn's wheel: python data/make_digits.py scikit_learn-1.9.1-....whl

The 1,797 8x8 handwritten digits of the UCI optical-recognition set (Alpaydin and Kaynak, 1998; its test set): images
in 0..16, labels, and held_out, a mask of every fourth image of each class in a shuffled order."""
import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np

with zipfile.ZipFile(sys.argv[1]) as wheel:
    lines = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode().splitlines()
rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # 64 pixels, row by row, then the digit
images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
order = np.random.RandomState(0).permutation(len(labels))  # RandomState's stream is the same in all versions
held_out = np.zeros(len(labels), dtype=bool)
held_out[order[np.argsort(labels[order], kind="stable")][::4]] = True
np.savez_compressed(Path(__file__).parent / "digits.npz", images=images, labels=labels, held_out=held_out)
