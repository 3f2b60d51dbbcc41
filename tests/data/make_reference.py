"""Make reference.npz, all that is needed to check analyses of the authors' trained network: make_reference.py SHARED_FOLDER"""

import sys
from pathlib import Path

import h5py
import numpy as np

shared = Path(sys.argv[1])
with np.load(shared / "reference/final_weights_main.npz") as weights, h5py.File(shared / "data/omniglot_relu.h5") as bank:
    np.savez_compressed(
        Path(__file__).with_name("reference.npz"),
        features=bank["resnet18/224/feat"][:50, 0],
        measured=(shared / "reference/final_main.json").read_text(),
        **{f"weights/{name}": weights[name] for name in weights.files},
    )
