"""The kernel of compiled programs' products: any sizes and strides, one product or a stack, against float64."""

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ihbook.engine import compiled, products, programs

# Around the sizes of a tile on every processor: 8 or 4 rows, 8, 16, 24 or 32 columns; and the empty and the published ones.
SIZES = [(1, 1, 1), (3, 2, 5), (4, 7, 8), (5, 64, 32), (7, 3, 9), (8, 16, 16), (9, 5, 17), (13, 1, 31), (64, 512, 50), (64, 50, 512), (64, 96, 50),
         (192, 64, 160), (128, 160, 64), (11, 33, 49), (12, 9, 23), (6, 6, 24), (64, 64, 200), (2, 700, 3), (5, 0, 4)]


def operands(seed=0):
    """Pairs of matrices and of stacks of two, each contiguous, transposed, a slice of a larger one, or with rows in between."""
    generator = torch.Generator().manual_seed(seed)

    def lie(x, how):
        if how == "transposed":
            return x.mT.contiguous().mT
        if how == "slice":
            return torch.cat([x, x, x], -1)[..., x.shape[-1]:2 * x.shape[-1]]
        if how == "every other":
            return x.repeat_interleave(2, -1).repeat_interleave(3, -2)[..., ::3, ::2]
        return x

    hows = itertools.cycle(itertools.product(("contiguous", "transposed", "slice", "every other"), repeat=2))
    for (m, k, n), stack in itertools.product(SIZES, ((), (2,))):
        for how_a, how_b in itertools.islice(hows, 5):  # 5 and 16 share no factor: every size meets other pairs
            yield (lie(torch.randn(*stack, m, k, generator=generator), how_a), lie(torch.randn(*stack, k, n, generator=generator), how_b))


def multiply(*flat):
    return {str(i): flat[i] @ flat[i + 1] for i in range(0, len(flat), 2)}


@pytest.mark.slow
@pytest.mark.xdist_group("programs")
@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")
def test_products_of_all_sizes_and_layouts_are_those_of_float64(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "cache"))
    flat = [x for pair in operands() for x in pair]
    found = programs.compiled(multiply, tuple(flat), flat)(*flat)
    assert len(found) == len(flat) // 2
    for (a, b), c in zip(operands(), found.values(), strict=True):
        expected = a.double() @ b.double()
        assert c.shape == expected.shape and c.is_contiguous()
        bound = a.double().abs() @ b.double().abs() * a.shape[-1] * 2**-24 + 1e-30  # the classical bound of a sum of products
        assert ((c - expected).abs() <= bound).all(), (tuple(a.shape), a.stride(), tuple(b.shape), b.stride())


def test_only_float32_products_are_replaced():
    def several(a, b, c):
        return a @ b, torch.bmm(a[None], b[None]), c @ c.T, a * 2

    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(2, 2, dtype=torch.float64)
    graph = make_fx(several, tracing_mode="fake", _allow_non_fake_inputs=True)(a, b, c)
    products.replace(graph, products.products_of(graph))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(products.OPERATION) == 2 and targets.count(torch.ops.aten.mm.default) == 1
    for found, expected in zip(graph(a, b, c), several(a, b, c), strict=True):  # in Python, it is the product that it says it is
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.xdist_group("programs")
@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")
def test_where_the_kernel_cannot_be_built_programs_multiply_by_pytorchs_library(tmp_path, monkeypatch):
    def refuse(path):
        raise RuntimeError("no such option\nmore")

    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "build", refuse)
    flat = [torch.randn(3, 4), torch.randn(4, 5)]
    with pytest.warns(UserWarning, match="PyTorch's library, which may take twice as long: no such option$"):
        found = programs.compiled(multiply, tuple(flat), flat)(*flat)
    torch.testing.assert_close(found["0"], flat[0] @ flat[1])
    assert len(list(programs.folder().glob("*.so"))) == 1
