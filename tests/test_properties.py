"""Properties over thousands of configurations and clamps: each one trains, or is refused by the name of what is wrong."""

import dataclasses
import re
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ihbook import clamps
from ihbook.clamps import compose
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.engine.prepared import prepare, shape_of
from ihbook.engine.step import initial_moments, scalars_of, train_step
from ihbook.model import initial_weights, stack
from ihbook.task import training_batch

MODEL = ModelConfig(d_model=8, n_heads=2)
RUN = RunConfig(task=TaskConfig(n_classes=6, n_test_classes=4), model=MODEL, n_sequences=32, batch_size=4, eval_size=4)
CLAMPS = [
    clamps.PreviousToken((0, 1)), clamps.BlockPreviousToken([(0, 0), (0, 1)]), clamps.Induction((1, 0)),
    clamps.SimilarityMatch((1, 1)), clamps.HeadTemperature((1, 0), 0.5), clamps.LabelAttentionOnly((1, 0)), clamps.Ablate((1, 1)),
    clamps.Preserve("patterns"), clamps.Copy((1, 0)), clamps.PerfectLayer1(), clamps.AblateEmbedding(),
    clamps.Graft(initial_weights(MODEL, 24, 5, 3)), clamps.Steer("resid_pre", 1, (1.0,) * 8, (-1,)),
    clamps.During(clamps.Ablate((1, 0)), 0, 64)]

scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.text(max_size=3),
                    st.sampled_from(["rotary", "learned", "sgd", "cosine", "below", "above", "values", "v", "resid_pre", "logits", b"x",
                                     1e-9, torch.tensor(1), torch.ones(2), object(), ModelConfig, RUN, MODEL, CLAMPS[0]]))
junk = st.one_of(scalars, st.lists(scalars, max_size=3), st.lists(st.lists(scalars, max_size=3), max_size=3).map(tuple),
                 st.tuples(st.integers(0, 3), st.integers(0, 3)), st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)), max_size=3),
                 st.dictionaries(st.text(max_size=2), scalars, max_size=2))


def names_it(error, value, names):
    """Whether the message says what was wrong: the class, or one of the fields that were changed, or a value of theirs."""
    words = [type(value).__name__, type(getattr(value, "clamp", value)).__name__, *names, *(["bank"] if isinstance(value, BankConfig) else [])]  # as in the chapters
    return any(re.search(rf"\b{re.escape(word)}\b", str(error)) for word in words)


def takes_a_step(run, bank):
    """Prepare the run and take one step. Losses need not be finite: a learning rate of 12 is a choice."""
    [prepared] = prepare([run], bank)
    params = stack([prepared.weights])
    plan = compose.make_plan([compose.active(run.clamps, 0)], run.model, run.task.n_pairs)
    compose.check(run.clamps, shape_of(run), prepared.weights)
    batch = training_batch(prepared.splits, run.data_seed, 0, run.batch_size)
    losses = train_step(params, initial_moments(params, run), batch, plan, run.model, scalars_of([run.lr], [0], "cpu")[0])
    assert losses.shape == (1,)


MANY = settings(max_examples=1500, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.slow
@MANY
@given(st.data())
def test_every_clamp_trains_or_is_refused_by_name(small_bank, data):
    clamp = data.draw(st.sampled_from(CLAMPS))
    changed = data.draw(st.lists(st.sampled_from([f.name for f in fields(clamp)] or ["none"]), max_size=2, unique=True))
    values = {name: data.draw(junk, label=name) for name in changed if name != "none"}
    others = data.draw(st.lists(st.sampled_from(CLAMPS), max_size=2))
    kind = type(clamp)
    try:
        made = replace(clamp, **values)
        run = replace(RUN, clamps=(made, *others))
        prepare([run], small_bank)
    except ValueError as error:
        assert names_it(error, clamp, values) or any(names_it(error, each, ()) for each in others), error
        return
    assert isinstance(made, kind)
    takes_a_step(run, small_bank)


@pytest.mark.slow
@MANY
@given(st.data())
def test_every_run_trains_or_is_refused_by_name(small_bank, data):
    part = data.draw(st.sampled_from([RUN.bank, RUN.task, RUN.model, RUN]))
    names = [f.name for f in fields(part)]
    values = {name: data.draw(junk, label=name) for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))}
    try:
        made = replace(part, **values)
        run = made if part is RUN else replace(RUN, **{{BankConfig: "bank", TaskConfig: "task", ModelConfig: "model"}[type(part)]: made})
        prepare([run], small_bank)
    except ValueError as error:
        assert names_it(error, part, values), error
        return
    except TypeError as error:  # a value without a digest, such as a clamp that is a bare object
        assert "digest" in str(error) or names_it(error, part, values), error
        return
    assert dataclasses.is_dataclass(run)
    takes_a_step(run, small_bank)
