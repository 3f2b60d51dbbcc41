"""From images to features, by a fixed random projection or by ResNet-18."""

from __future__ import annotations

import hashlib
import socket
import warnings
import zipfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

from ihbook.banks.downloads import TIMEOUT, cache_dir
from ihbook.banks.glyphs import SIDE
from ihbook.files import writing

SIGMA, FLOOR = 1.5, 0.003  # pixels of the blur, and the least spread of a pixel
RANDOM = f"random: {SIDE}x{SIDE}, blurred ({SIGMA} px), standardised per pixel, ReLU of a fixed N(0, 1/784) projection"


def random_features(images: torch.Tensor, dim: int, reference: torch.Tensor) -> torch.Tensor:
    """ReLU features `[..., dim]` of images `[..., 28, 28]` under a fixed projection, standardised by the `reference` images."""
    place = torch.arange(SIDE, dtype=torch.float64)
    kernel = (-((place[:, None] - place) ** 2) / (2 * SIGMA**2)).exp() / (SIGMA * (2 * torch.pi) ** 0.5)

    def blur(ink: torch.Tensor) -> torch.Tensor:
        return (kernel @ (ink.flatten(0, -3).double() / 255) @ kernel).flatten(1)

    base = blur(reference)
    spread = base.std(0, correction=0) + FLOOR  # keeps pixels that are never inked from blowing up
    # Rounded to these grids, every product and sum below is exact, whatever the threads, the batch and the machine.
    pixels = ((blur(images) - base.mean(0)) / spread * 2**12).round() / 2**12
    projection = np.random.default_rng(0).standard_normal((SIDE * SIDE, dim)) / SIDE
    features = (pixels @ torch.from_numpy((projection * 2**16).round() / 2**16)).relu().float()
    return features.unflatten(0, images.shape[:-2])


def resnet18_features(pages: np.ndarray, dim: int) -> tuple[torch.Tensor, str]:
    """Penultimate activations `[class, exemplar, 512]` of ImageNet's ResNet-18 for uint8 pages `[class, exemplar, h, w]`.

    They take minutes, so the cache keeps them. Raises ValueError for another `dim`, RuntimeError where ResNet-18 can't be had.
    """
    how = "resnet18: torchvision IMAGENET1K_V1, penultimate layer, 224 px, three equal channels, ImageNet normalisation"
    if dim != 512:
        raise ValueError(f"dim={dim} but ResNet-18 has 512; set dim=512 or embedding='random'")
    cached = cache_dir() / f"resnet18-{hashlib.sha256(how.encode() + repr(pages.shape).encode() + pages.tobytes()).hexdigest()}.npz"
    try:
        with np.load(cached) as file:  # a zip file, whose checksums np.load verifies
            return torch.from_numpy(file["features"]), how
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged: compute it again
    features = _resnet18_run(_resnet18(), pages)
    try:
        with writing(cached) as partial, partial.open("wb") as file:
            np.savez(file, features=features.numpy())
    except OSError as error:
        warnings.warn(f"{cached} can't be kept ({error}); set IHBOOK_CACHE to a folder that can be", stacklevel=5)
    return features, how


def _resnet18() -> torch.nn.Module:
    """torchvision's ResNet-18 with ImageNet weights and without its last layer."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # otherwise torch.hub waits for ever
    try:
        from torchvision.models import ResNet18_Weights, resnet18

        with torch.random.fork_rng(devices=[]):  # its random initialisation must not move the caller's generator
            model = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # absent, unfit for this torch, no weights
        raise RuntimeError(
            f"torchvision's ResNet-18 or its ImageNet weights can't be had ({type(error).__name__}: {error}); "
            "pip install torchvision and connect to the internet once, or choose embedding='random'"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    model.fc = torch.nn.Identity()
    return model.eval()


@torch.inference_mode()
def _resnet18_run(model: torch.nn.Module, pages: np.ndarray) -> torch.Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    features = []
    for batch in tqdm(torch.from_numpy(pages).flatten(0, 1).split(64), "ResNet-18", leave=False):
        page = torch.nn.functional.interpolate(batch[:, None] / 255, (224, 224), mode="bilinear")
        features.append(model((page.expand(-1, 3, -1, -1) - mean) / std))
    return torch.cat(features).unflatten(0, pages.shape[:2]).clone()
