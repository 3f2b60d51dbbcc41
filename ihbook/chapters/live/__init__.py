"""Panels that train and take apart the paper's network in a built page, without a kernel.

Their scripts are the network (`network.js`, `step.js`, over `products.js` and `random.js`), what a Web Worker does with it
(`worker.js`), and the panels. Weights, sequences and clamps are PyTorch's, and tests hold the scripts to it in a browser.
"""

from ihbook.chapters.live.data import offered, rounded
from ihbook.chapters.live.what_if import checkpoints, ways, what_if

__all__ = ["checkpoints", "offered", "rounded", "ways", "what_if"]
