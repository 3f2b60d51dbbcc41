"""Downloads: each is verified, and only then moved to its place in the cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pooch

TIMEOUT = 8  # seconds of silence after which a server counts as out of reach


def cache_dir() -> Path:
    """The folder of downloads: the environment variable IHBOOK_CACHE, or else the user's cache folder."""
    return Path(os.environ.get("IHBOOK_CACHE") or platformdirs.user_cache_dir("ihbook")).expanduser()


def download(url: str, known_hash: str | None, check: Callable[[str], None] = lambda file: None) -> Path:
    """The cached file of `url`. It is downloaded to a temporary name and moved into place once it is verified.
    Raises RuntimeError where it can't be downloaded, or is not the expected file."""

    def downloader(url, output_file, pooch_):
        pooch.HTTPDownloader(progressbar=True, chunk_size=2**16, timeout=TIMEOUT)(url, output_file, pooch_)
        check(output_file)

    name = url.rsplit("/", 1)[-1]
    try:
        return Path(pooch.retrieve(url, known_hash, fname=name, path=cache_dir(), downloader=downloader))
    except ValueError as error:
        raise RuntimeError(f"{url} is not the expected file ({error}); try again, or give your own by path=") from error
    except OSError as error:  # requests' errors are OSErrors too
        raise RuntimeError(
            f"could not download {url} to {cache_dir()} ({error}); check the network and that this folder can be "
            "written (the environment variable IHBOOK_CACHE moves it), or get the file yourself and give it by path="
        ) from error


def download_blob(url: str, blob: str) -> Path:
    """`download` for a file known by its git blob id, which pooch can't check."""

    def check(file: str | Path) -> None:
        content = Path(file).read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if found != blob:
            raise ValueError(f"its git blob id is {found}, not {blob}")

    cached = cache_dir() / url.rsplit("/", 1)[-1]
    if cached.is_file():
        try:
            check(cached)
        except ValueError:
            cached.unlink()  # damaged since the download: fetch it again
    return download(url, None, check)
