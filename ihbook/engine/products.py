"""The matrix products of compiled programs, by a kernel of our own (`products.cpp`), compiled once on a machine like the programs.

A training step makes some twenty small products. PyTorch's library, MKL, is made for large ones, and for its maker's processors: on
another it takes twice as long.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
SHIM = "AOTITorchError aoti_torch_cpu_matrix_product(AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle* out)"


@torch.library.custom_op("ihbook::matrix_product", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, float32, of two matrices or of two stacks of them."""
    return a @ b


@matrix_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


OPERATION = torch.ops.ihbook.matrix_product.default


def products_of(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The graph's float32 matrix products on a CPU."""
    return [node for node in graph.graph.nodes if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
            and (node.meta["val"].dtype, node.meta["val"].device.type) == (torch.float32, "cpu")]


def replace(graph: torch.fx.GraphModule, nodes: list[torch.fx.Node]) -> None:
    """Make these products of a graph `matrix_product`s, in place."""
    for node in nodes:
        node.target = OPERATION
    graph.recompile()


def build(path: Path) -> None:
    """Compile the kernel for this processor, as a library at `path`."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchOptions(vec_isa=pick_vec_isa(), extra_flags=["-O3", "-ffp-contract=fast"])
    with tempfile.TemporaryDirectory() as directory:
        builder = CppBuilder(SOURCE.stem, [str(SOURCE)], options, directory)
        builder.build()
        shutil.copy(builder.get_target_file_path(), path)


@cache
def load(path: Path) -> ctypes.CDLL:
    """Load the kernel, so that the programs loaded after it find it."""
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
