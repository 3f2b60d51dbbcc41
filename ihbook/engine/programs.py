"""Compiled functions on disk: compiled once on a machine, loaded by every later process in milliseconds."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ihbook import files
from ihbook.banks.downloads import cache_dir
from ihbook.engine import products
from ihbook.engine.flat import filled
from ihbook.files import Busy, kept

OPTIONS: dict[str, object] = {"size_asserts": False, "aot_inductor.custom_ops_to_c_shims": {products.OPERATION: [products.SHIM]}}


def folder() -> Path:
    """Where compiled functions are kept: beside the downloads."""
    return cache_dir() / "programs"


def compiled(plain: Callable, arguments: tuple, tensors: list[Tensor],
             wait: bool = True) -> Callable[..., dict[str, Tensor] | Tensor] | None:
    """A function of the tensors in `arguments` alone: loaded if it is kept, compiled if not. None, with a warning, if it can't be
    compiled. Nothing is run. Without `wait`, raises Busy where another process is compiling it."""
    names: list[str] | None = None

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        nonlocal names
        rest = iter(values)
        out = plain(*(filled(each, rest) for each in arguments))
        names = list(out) if isinstance(out, dict) else None
        return tuple(out.values()) if isinstance(out, dict) else (out,)

    try:
        graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        run = _loaded(graph, tensors, wait)
    except Busy:
        raise
    except Exception as error:  # the plain function is called instead, and raises an error of the caller's again
        warnings.warn(f"{plain.__name__} can't be compiled, and takes several times as long without: {_first_line(error)}",
                      stacklevel=2)
        return None
    if names is None:
        return lambda *values: run(values)[0]
    return lambda *values: dict(zip(names, run(values), strict=True))


def _loaded(graph: torch.fx.GraphModule, tensors: list[Tensor], wait: bool) -> Callable[..., list[Tensor]]:
    """The graph as a function of a list of tensors, with products of our own where they can be built."""
    if nodes := products.products_of(graph):
        try:
            products.load(_kept(_key(products.SOURCE.read_bytes()), products.build))
        except Exception as error:  # an unusual compiler, for example; PyTorch's products serve
            warnings.warn(f"compiled programs multiply by PyTorch's library, which may take twice as long: {_first_line(error)}",
                          stacklevel=3)
        else:
            products.replace(graph, nodes)
    path = _kept(_key_of(graph, tensors), lambda path: _compile(graph, tensors, path), wait)
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _kept(key: str, build: Callable[[Path], None], wait: bool = True) -> Path:
    return kept(folder() / f"{key}.so", build, {"torch": torch.__version__}, wait=wait)


def _compile(graph: torch.fx.GraphModule, tensors: list[Tensor], path: Path) -> None:
    """Compile a graph ahead of time, as a library at `path`."""
    import torch._inductor  # slow, and not needed to load what is compiled

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch says of itself
        shutil.copy(torch._inductor.aot_compile(graph, tuple(tensors), options=OPTIONS), path)


def prune(*, before: float, everything: bool = False) -> list[Path]:
    """Remove what is damaged, made by another PyTorch, or last used `before` (seconds since the epoch); or all. Returns it."""
    return files.prune(folder(), {"torch": torch.__version__}, before=before, everything=everything)


def _key_of(graph: torch.fx.GraphModule, tensors: list[Tensor]) -> str:
    """The key of a graph: it names the graph and its constants, the tensors' layout and how it is compiled."""
    constants = sorted([*graph.named_buffers(), *((n, v) for n, v in vars(graph).items() if isinstance(v, Tensor))])
    layout = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors]
    return _key(graph.code.encode(), repr(layout).encode(), repr(sorted(OPTIONS.items())).encode(), products.SOURCE.read_bytes(),
                *(part for name, constant in constants for part in (f"{name}{tuple(constant.shape)}{constant.dtype}".encode(),
                                                                    constant.contiguous().numpy().tobytes())))


def _key(*parts: bytes) -> str:
    """Names what is compiled of `parts` by this compiler for this processor and PyTorch, in 32 hex digits."""
    digest = hashlib.sha256(repr([torch.__version__, _compiler(), _processor()]).encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


@cache
def _compiler() -> str:
    """What the C++ compiler says of its version."""
    name = os.environ.get("CXX", "g++")
    try:
        return subprocess.run([name, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return name


@cache
def _processor() -> str:
    """The processor with all that it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.MULTILINE))))
