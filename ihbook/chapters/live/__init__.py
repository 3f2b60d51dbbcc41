"""Panels that train and take apart the paper's network in a built page, without a kernel.

Their scripts are the network (`network.js`, `step.js`, over `products.js` and `random.js`), the encoder of characters
(`encoder.js`), what a Web Worker does with them (`worker.js`), and the panels. Weights, sequences and clamps are PyTorch's; tests
hold the scripts to it in a browser. A page has one `shared`, before its panels.
"""

from ihbook.chapters.live.data import offered, rounded, shared
from ihbook.chapters.live.operate import drawable, operate
from ihbook.chapters.live.what_if import networks, ways, what_if

__all__ = ["drawable", "networks", "offered", "operate", "rounded", "shared", "ways", "what_if"]
