"""A learnt encoder: a small convolutional network, in whole numbers, so that its features are the same on every machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ihbook.banks.glyphs import SIDE
from ihbook.files import sha256

WIDTHS = (32, 64, 128, 512)  # channels of the four convolutions, 3x3; each is followed by a ReLU, the first three by a max-pool
GRID = 2**-8  # activations are rounded to multiples of this
TOGETHER = 16  # images embedded at once; more would not fit a core's caches
KINDS = ("glyphs", "omniglot")  # what an encoder was trained on
GLYPH_SEED = 19_930_212  # of the glyphs that trained and judged the encoder: no bank is drawn with it


def weights_path(kind: str) -> Path:
    """The file of the encoder that was trained on drawn glyphs, or on Omniglot's background alphabets."""
    return Path(__file__).with_name(f"encoder_{kind}.safetensors")


@cache
def load(kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder's whole numbers, and its record: how it was trained and chosen. Do not write to them."""
    with safe_open(weights_path(kind), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118, not a dict


def described(kind: str) -> str:
    """An encoder in a few words, with a digest of its weights."""
    return f"learnt on {load(kind)[1]['trained_on']} (encoder {sha256(weights_path(kind))[:16]})"


def learnt_features(images: Tensor, dim: int, kind: str) -> Tensor:
    """Features `[..., 512]` of images uint8 `[..., 28, 28]` (ink 255 on 0) under a shipped encoder.

    They are exact: every product and sum is of multiples of a power of two that fit a float64, so that neither the order of
    computation nor the machine shows. They are scaled to a mean square of 1 on characters that did not train the encoder.
    Raises ValueError for another `dim`.
    """
    if dim != WIDTHS[-1]:
        raise ValueError(f"dim={dim} but the learnt encoder has {WIDTHS[-1]}; set dim={WIDTHS[-1]} or embedding='random'")
    numbers, record = load(kind)
    return (encode(images, numbers) * float(record["scale"])).float()


@torch.no_grad()
def encode(images: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """Features before scaling (sums over places), float64 `[..., 512]`, of images uint8 `[..., 28, 28]`."""
    parts = [_encode(part, numbers) for part in images.reshape(-1, SIDE, SIDE).split(TOGETHER)]
    return torch.cat(parts).unflatten(0, images.shape[:-2])


def _encode(images: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    x = images[:, None].double() / 256
    for i in range(len(WIDTHS)):
        if i:
            x = F.max_pool2d(x, 2)
        weight = numbers[f"{i}.weight"].double() * 2.0 ** -numbers[f"{i}.exponent"].double()[:, None, None, None]
        columns = F.unfold(x, 3, padding=1)  # as a product: a library's convolution may transform its input inexactly
        y = weight.flatten(1) @ columns.transpose(0, 1).flatten(1) + numbers[f"{i}.bias"].double()[:, None] * GRID
        x = ((y / GRID).round() * GRID).relu().unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
    return x.sum((2, 3))


def quantised(weights: list[Tensor], biases: list[Tensor]) -> dict[str, Tensor]:
    """An encoder's whole numbers from real weights `[out, in, 3, 3]` and biases `[out]`: 8 bits per weight, and one power of
    two per channel."""
    numbers = {}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        exponent = (127 / weight.flatten(1).abs().amax(1).clamp_min(1e-6)).log2().floor()
        numbers |= {f"{i}.weight": (weight * 2**exponent[:, None, None, None]).round().to(torch.int8).contiguous(),
                    f"{i}.exponent": exponent.to(torch.int8), f"{i}.bias": (bias / GRID).round().to(torch.int32)}
    return numbers
