"""Make golden.npz, the compact copy that the parity tests always have, from the full record: make_golden.py FULL.npz

Weights and batches are whole; of large results only evenly spread entries are kept (`picked`), and each gradient's
largest absolute value, to which its tolerance is relative.
"""

import sys
from pathlib import Path

import numpy as np

N_PICKED = 257
N_SEQUENCES = 8  # whose attention is kept


def picked(array: np.ndarray) -> np.ndarray:
    """At most 257 entries of an array, evenly spread (a prime, so that they fall into many different columns)."""
    flat = array.reshape(-1)
    return flat if flat.size <= N_PICKED else flat[np.linspace(0, flat.size - 1, N_PICKED).astype(int)]


def compact(full) -> dict[str, np.ndarray]:
    small = {}
    for name in full:
        array, part = full[name], name.split("/", 1)[-1]
        if part == "attention":
            array = array[:N_SEQUENCES]
        elif part.startswith("grad/"):
            small[name.replace("/grad/", "/grad_max/")] = np.abs(array).max(initial=0)
            array = picked(array)
        elif part.startswith("trained/"):
            array = picked(array)
        small[name] = array
    return small


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **compact(np.load(sys.argv[1])))
