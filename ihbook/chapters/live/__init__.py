"""Panels that train and take apart the paper's network in a built page, without a kernel.

Their scripts are the network (`network.js`, `step.js`, over `products.js` and `random.js`), the encoder of characters
(`encoder.js`), what a Web Worker does with them (`worker.js`), and the panels. Weights, sequences and clamps are PyTorch's; tests
hold the scripts to it in a browser.
"""

from ihbook.chapters.live.data import offered, rounded
from ihbook.chapters.live.page import Page, networks
from ihbook.chapters.live.what_if import ways

__all__ = ["Page", "networks", "offered", "rounded", "ways"]
