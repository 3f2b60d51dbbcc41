"""A finished run: tidy tables, weights, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ihbook.config import RunConfig
from ihbook.engine.checkpoints import Checkpoints, load_weights
from ihbook.engine.prepared import Prepared
from ihbook.engine.state import FamilyState
from ihbook.metrics import METRICS
from ihbook.model import Weights


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. Tables are tidy; `sequences` counts the sequences seen.

    `metrics` has the columns sequences, eval_set, metric, value; it holds `metrics.query_metrics` (losses in nats) and the run's
    own metrics. `heads` has the columns sequences, layer, head, strength, previous_token (NaN in the last layer), measured on the
    evaluation set `train`. `weights` are those at the end; `checkpoints` maps sequences seen to weights.
    """

    run: RunConfig
    metrics: pd.DataFrame
    heads: pd.DataFrame
    weights: Weights
    checkpoints: Mapping[int, Weights]

    def __repr__(self) -> str:
        return f"Result({self.run.digest}, {len(self.metrics)} rows of metrics, {len(self.checkpoints)} checkpoints)"


def rows_of(runs: Sequence[int], seen: int, axes: Sequence[Sequence[int]], *values: Tensor) -> Tensor:
    """Table rows, float64: run, `seen`, the numbers of `axes`, and `values` `[run, *axes]`; one row per run and combination."""
    keys = torch.cartesian_prod(*(torch.tensor(list(axis)) for axis in (runs, [seen], *axes)))
    return torch.cat([keys.double(), *(v.flatten()[:, None].double() for v in values)], 1)


def _table(blocks: list[Tensor], r: int, columns: list[str], names: Mapping[str, list[str]]) -> pd.DataFrame:
    """Run `r`'s rows as a tidy table. Counts and indices become integers; in the columns of `names`, indices become names."""
    rows = torch.cat([torch.empty(0, len(columns) + 1, dtype=torch.float64), *blocks])
    table = pd.DataFrame(rows[rows[:, 0] == r][:, 1:].numpy(), columns=columns)
    whole = [c for c in columns if c in ("sequences", "eval_set", "metric", "layer", "head")]
    table[whole] = table[whole].astype("int64")
    return table.assign(**{column: table[column].map(dict(enumerate(of))).astype("str") for column, of in names.items()})


def result_of(r: int, prepared: Prepared, state: FamilyState, folder: Path) -> Result:
    """The result of run number `r` of a family, once it is finished; its weights are read from `folder`."""
    metrics = _table(state.metrics, r, ["sequences", "eval_set", "metric", "value"],
                     {"eval_set": list(prepared.eval_sets), "metric": metric_names(prepared.run)})
    heads = _table(state.heads, r, ["sequences", "layer", "head", "strength", "previous_token"], {})
    checkpoints = Checkpoints(folder / f"run-{r}")
    return Result(prepared.run, metrics, heads, load_weights(checkpoints.folder / "final.safetensors"), checkpoints)


def metric_names(run: RunConfig) -> list[str]:
    """The names of the metrics recorded at each evaluation, in the table's order: the book's, then the run's own."""
    return [*METRICS, *(metric.name for metric in run.metrics)]
