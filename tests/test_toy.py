"""The toy model: its loss, its gradient descent, and the effect of clamps."""

import math

import pytest
import torch

from ihbook import toy


def test_the_loss_is_that_of_the_tensors():
    generator = torch.Generator().manual_seed(0)
    v, w = ({n: torch.randn(3, 5, generator=generator, dtype=torch.float64) for n in toy.NAMES} for _ in range(2))
    products = [torch.einsum("ri,rj,rk->rijk", x["a"], x["b"], x["c"]) for x in (v, w)]
    torch.testing.assert_close(toy.loss(v, w), 0.5 * (products[0] - products[1]).square().mean((1, 2, 3)))


def test_a_step_is_down_the_gradient():
    """The losses before and after one step follow from the gradient as the chapter prints it, for one vector."""
    table = toy.descend([3], ["b", "c"], n_dims=4, n_iterations=1, lr=0.5)
    generator = torch.Generator().manual_seed(3)
    truth = {n: torch.randn(4, generator=generator, dtype=torch.float64) for n in toy.NAMES}
    a = torch.randn(4, generator=generator, dtype=torch.float64)
    size = truth["b"].norm() ** 2 * truth["c"].norm() ** 2 / 4**3
    losses = [0.5 * size * (truth["a"] - x).norm() ** 2 for x in (a, a + 0.5 * size * (truth["a"] - a))]
    assert table["loss"].tolist() == pytest.approx([x.item() for x in losses])
    assert table["loss_given_b_and_c"].iloc[0] == pytest.approx(min(losses[0].item(), 0.5 * size * (truth["a"] + a).norm() ** 2))
    assert table["relative_loss"].iloc[0] == pytest.approx((losses[0] / (0.5 * size * truth["a"].norm() ** 2)).item())


def test_a_plateau_that_clamps_shorten():
    times = {}
    for clamped in ((), ("c",), ("b", "c")):
        table = toy.descend([1, 4], clamped)
        for run, rows in table.groupby("run"):
            times[run, clamped] = (rows["relative_loss"] < 0.5).to_numpy().argmax()
    for run in (1, 4):
        assert times[run, ("b", "c")] < 0.5 * times[run, ("c",)] < 0.25 * times[run, ()]


def test_runs_do_not_touch_each_other():
    together, alone = toy.descend([1, 2], n_iterations=20), toy.descend([2], n_iterations=20)
    assert together[together["run"] == 2]["loss"].tolist() == pytest.approx(alone["loss"].tolist())
    assert (together["misaligned_c"] > 0).all() and (toy.descend([1], ["c"], n_iterations=5)["misaligned_c"].abs() < 1e-12).all()


def test_strengths_of_each_run():
    together = toy.descend([1, 1, 2], {"a": [0.0, 0.5, 1.0], "b": 0.5}, n_iterations=20)["loss"].to_numpy().reshape(21, 3)
    for i, (seed, given) in enumerate(((1, 0.0), (1, 0.5), (2, 1.0))):
        alone = toy.descend([seed], {"a": given, "b": 0.5}, n_iterations=20)
        assert together[:, i].tolist() == pytest.approx(alone["loss"].tolist())


def test_a_clamp_in_a_window():
    """Until the window opens, and from its end on, the vectors are the run's own; a clamped one does not move."""
    never, always = toy.descend([1], n_iterations=40), toy.descend([1], ["c"], n_iterations=40)
    found = toy.descend([1, 1], ["c"], start=[0, 10], until=[math.inf, 20], n_iterations=40)
    whole, window = (found["relative_loss"].to_numpy()[i::2] for i in (0, 1))
    assert whole.tolist() == pytest.approx(always["relative_loss"].tolist())
    assert window[:10].tolist() == pytest.approx(never["relative_loss"][:10].tolist()) and window[10] != pytest.approx(never["relative_loss"][10])
    lengths = found["norm_c"].to_numpy()[1::2]
    assert lengths[10:20].tolist() == [1.0] * 10 and lengths[20] == pytest.approx(never["norm_c"][10])


@pytest.mark.parametrize("bad", [{"clamped": ["d"]}, {"n_dims": 0}, {"n_iterations": 0}, {"lr": -1},
                                 {"clamped": {"a": [0.5, 0.2]}}, {"clamped": {"a": [2.0]}}, {"start": -1}, {"until": [5.0, 6.0]}])
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        toy.descend(**bad)


def test_the_loss_is_made_of_lengths_and_components():
    table = toy.descend([1, 6], ["c"], n_dims=7, n_iterations=30)
    along, size = (table[[f"{of}_{name}" for name in toy.NAMES]].prod(axis=1) for of in ("along", "norm"))
    assert (1 - 2 * along + size**2).tolist() == pytest.approx(table["relative_loss"].tolist())
    assert table["along_c"].tolist() == pytest.approx([1.0] * len(table)) and (table["norm_a"] >= table["along_a"].abs()).all()
    assert (1 - (table["along_a"] / table["norm_a"]) ** 2).tolist() == pytest.approx(table["misaligned_a"].tolist())


def test_the_product_shrinks_before_anything_is_learnt():
    """The plateau is the loss of learning nothing, because gradient descent first shrinks the product (chapter 6)."""
    table = toy.descend(range(1, 11), n_iterations=50)
    size = table[[f"norm_{name}" for name in toy.NAMES]].prod(axis=1).to_numpy().reshape(51, 10)
    assert (size[-1] < 0.5 * size[0]).all() and table["relative_loss"].tail(10).median() == pytest.approx(1, abs=0.06)
