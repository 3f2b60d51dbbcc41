"""The state of a family: what it holds, how it is saved, and how it is loaded."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ihbook.digest import content_digest
from ihbook.engine.checkpoints import load_weights
from ihbook.engine.prepared import Prepared
from ihbook.engine.step import Moments
from ihbook.files import writing
from ihbook.model import Params


@dataclass
class FamilyState:
    """Everything that a resumed family needs. Run axes follow `alive`, the indices in the family of the runs that still train."""

    steps_done: int
    alive: list[int]
    params: Params
    moments: Moments
    metrics: list[Tensor] = field(default_factory=list)  # float64 [row, 5]: run, sequences, eval_set, metric, value
    heads: list[Tensor] = field(default_factory=list)  # float64 [row, 6]: run, sequences, layer, head, strength, previous_token
    checkpoints: dict[str, str] = field(default_factory=dict)  # each file so far, relative to the folder, and its content digest


def save_state(folder: Path, state: FamilyState) -> None:
    """Write the state, whole or not at all. Raises OSError where that fails."""
    tensors = {f"params/{name}": p for name, p in state.params.items() if state.alive}
    for kind, moments in state.moments.items():
        tensors |= {f"{kind}/{name}": m for name, m in moments.items() if state.alive}
    for table in ("metrics", "heads"):
        if rows := getattr(state, table):
            tensors[f"tables/{table}"] = torch.cat(rows)
    tensors = {key: t.contiguous().cpu() for key, t in tensors.items()} or {"none": torch.zeros(1)}
    about = json.dumps({"step": state.steps_done, "alive": state.alive, "checkpoints": state.checkpoints})
    with writing(folder / "state.safetensors") as partial:
        save_file(tensors, partial, metadata={"about": about, "digest": _digest(tensors, about)})


def load_state(folder: Path, family: Sequence[Prepared], device: str | torch.device) -> FamilyState | None:
    """The saved state, or None where there is none. If it, or a checkpoint that was written before it, is not what was written,
    warn and return None, so that training starts again."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            # A clone has PyTorch's usual alignment: with another one, kernels may round differently.
            about, tensors = file.metadata()["about"], {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
            if file.metadata()["digest"] != _digest(tensors, about):
                raise ValueError("its checksum differs")
        found = json.loads(about)
        for name, digest in found["checkpoints"].items():
            if load_weights(folder / name).content_digest != digest:
                raise ValueError(f"the checkpoint {name} is not the one that was written")
        parts: dict[str, Params] = defaultdict(dict)
        for key in sorted(tensors.keys() - {"none"}):
            part, name = key.split("/", 1)
            parts[part][name] = tensors[key].to("cpu" if part == "tables" else device)
        tables = {name: list(rows.split(_lengths_of_equal(rows[:, 1]))) for name, rows in parts.pop("tables", {}).items()}
        names = family[0].weights.tensors if found["alive"] else ()  # in the architecture's order, which files do not keep
        parts = {part: {name: tensors[name] for name in names} for part, tensors in parts.items()}
        return FamilyState(found["step"], found["alive"], parts.pop("params", {}), parts, **tables,
                           checkpoints=found["checkpoints"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        warnings.warn(f"the saved state {path} is damaged ({error}); training these runs anew", stacklevel=2)
        return None


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    """The checksum of a saved state, whatever the order of its tensors."""
    return content_digest(dict(sorted(tensors.items())), about)


def _lengths_of_equal(x: Tensor) -> list[int]:
    """The length of each stretch of equal numbers in `x`."""
    return torch.unique_consecutive(x, return_counts=True)[1].tolist()


def leave(state: FamilyState, leaving: list[int]) -> None:
    """Remove the runs `leaving` (indices in the family) from the state's tensors and from `alive`."""
    keep = [i for i, r in enumerate(state.alive) if r not in leaving]
    state.moments = {kind: {name: m[keep] for name, m in moments.items()} for kind, moments in state.moments.items()}
    state.params = {name: p[keep] for name, p in state.params.items()}
    state.alive = [state.alive[i] for i in keep]
