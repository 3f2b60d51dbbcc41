"""Parity with the authors' implementation, case by case, on fixed weights and batches."""

import warnings

import numpy as np
import pytest
import torch
from cases import VARIANTS, clamps
from conftest import read_npz, shared, tensors
from data.make_golden import N_SEQUENCES, compact

from ihbook.clamps import compose, run_with_clamps
from ihbook.config import ModelConfig, RunConfig
from ihbook.engine import compiled, step
from ihbook.metrics import cross_entropy
from ihbook.model import Weights, initial_weights, stack
from ihbook.task import from_exemplars

DONOR = initial_weights(ModelConfig(), 32, 5, seed=0)  # only to name the cases
NAMES = [*clamps(DONOR), *VARIANTS, "four_pairs"]


@pytest.fixture(scope="module", params=["compact", "full"])
def record(request, golden):
    """The golden numbers: the compact copy, and the full record where it exists."""
    if request.param == "compact":
        return golden
    return read_npz(shared("golden/golden.npz"))


def case(name, golden, networks, batch):
    """A case's network, batch and clamps."""
    if name in VARIANTS:
        return Weights(VARIANTS[name], tensors(golden, f"{name}/params/")), batch, ()
    if name == "four_pairs":
        batch = from_exemplars(torch.tensor(golden["four_pairs/exemplars"]), torch.tensor(golden["four_pairs/labels"]))
        return networks[0], batch, ()
    return networks[0], batch, clamps(networks[1])[name]


def test_every_case_of_the_record_is_tested(record):
    assert {name.split("/")[0] for name in record if name.endswith("/query_logits")} == set(NAMES)


@pytest.mark.parametrize("query_only", [False, True], ids=["every-position", "query-only"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients(name, query_only, record, networks, batch):
    weights, batch, chosen = case(name, record, networks, batch)
    params = {key: p.requires_grad_() for key, p in stack([weights]).items()}
    plan = compose.make_plan([chosen], weights.config, batch.labels.shape[2] - 1)
    acts = plan(params, batch, weights.config, query_only=query_only)
    loss = cross_entropy(acts.logits, batch)
    loss.sum().backward()

    assert np.abs(acts.logits[0].detach().numpy() - record[f"{name}/query_logits"]).max() <= 1e-5
    assert abs(loss.item() - record[f"{name}/loss"]) <= 1e-5

    ours = {f"{name}/grad/{key}": np.zeros(p.shape[1:]) if p.grad is None else p.grad[0].numpy() for key, p in params.items()}
    ours_small = compact(ours)
    for key in ours:
        expected = record[key]
        found = ours[key] if expected.shape == ours[key].shape else ours_small[key]
        largest = record.get(key.replace("/grad/", "/grad_max/"), np.abs(expected).max(initial=0))
        assert np.abs(found - expected).max() <= 1e-4 * (largest or 1.0), key
        assert np.abs(ours[key]).max() == pytest.approx(largest, rel=1e-4, abs=1e-9), key


@pytest.mark.parametrize("name", NAMES)
def test_attention(name, record, networks, batch):
    """The patterns under clamps agree. Two cases record another pass than the one that a clamp's definition names."""
    weights, batch, chosen = case(name, record, networks, batch)
    patterns = [run_with_clamps(weights, batch, chosen)["pattern", i][0] for i in range(weights.config.n_layers)]
    if name == "layer1_copy":  # both layers' patterns are those of the unclamped pass
        patterns = [run_with_clamps(weights, batch)["pattern", i][0] for i in (0, 1)]
    elif name == "graft_from_layer2_of_donor":  # Layer 1's pattern is the donor's, on its own embeddings
        patterns[0] = run_with_clamps(networks[1], batch)["pattern", 0][0]
    expected = record[f"{name}/attention"]
    ours = torch.stack(patterns, 1).numpy()[:len(expected)]
    assert len(ours) >= N_SEQUENCES
    assert np.abs(ours - expected).max() <= 1e-5


@pytest.mark.parametrize("grouping", ["family", "alone"])
def test_25_training_steps(grouping, record, networks):
    """The engine's own step of Adam at lr 1e-3, from the golden weights: every case, as one family and one by one."""
    cases = clamps(networks[1])
    run = RunConfig(model=ModelConfig(), lr=1e-3)
    for names in [list(cases)] if grouping == "family" else [[name] for name in cases]:
        check_25_steps(step.train_step, names, cases, run, record, networks[0])


@pytest.mark.slow
@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")
def test_25_training_steps_compiled(record, networks):
    """The compiled step gives the same, with all the clamps in one program."""
    cases = clamps(networks[1])
    run = RunConfig(model=ModelConfig(), lr=1e-3)
    program = compiled.program_for(True, "cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*can't be compiled")  # a clamp that can't be compiled fails here
        check_25_steps(program.step, list(cases), cases, run, record, networks[0])


def check_25_steps(train_step, names, cases, run, record, weights):
    plan = compose.make_plan([cases[name] for name in names], run.model, 2)
    params = stack([weights] * len(names))
    moments = step.initial_moments(params, run)
    losses = []
    for i, (exemplars, labels) in enumerate(zip(record["train/exemplars"], record["train/labels"], strict=True)):
        batch = from_exemplars(torch.tensor(exemplars), torch.tensor(labels)).expand(len(names))
        losses.append(train_step(params, moments, batch, plan, run.model, step.scalars_of([run.lr], [i], "cpu")[0]))
    for i, name in enumerate(names):
        found = torch.stack(losses)[:, i].numpy()
        assert np.abs(found - record[f"{name}/train_loss"]).max() <= 1e-4, name
        for key in (k for k in record if k.startswith(f"{name}/trained/")):
            ours = {key: params[key.split("/trained/")[1]][i].numpy()}
            ours = ours if ours[key].shape == record[key].shape else compact(ours)
            assert np.abs(ours[key] - record[key]).max() <= 5e-4, key
