"""Make digits.npz from scikit-learn's wheel: python data/make_digits.py scikit_learn-1.9.1-....whl
UCI's 1,797 handwritten digits (Alpaydin and Kaynak, 1998; the test set): images (N, 8, 8) in 0..16, labels
(N,), and held_out (N,), True for every fourth in an order that is shuffled, then sorted by class."""
import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np

with zipfile.ZipFile(sys.argv[1]) as wheel:
    text = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
rows = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)  # 64 pixels, then the digit
order = np.random.RandomState(0).permutation(len(rows))  # RandomState's stream is the same in every version
order = order[np.argsort(rows[order, -1], kind="stable")]
np.savez_compressed(Path(__file__).parent / "digits.npz", images=rows[:, :-1].reshape(-1, 8, 8),
                    labels=rows[:, -1], held_out=np.isin(np.arange(len(rows)), order[::4]))
