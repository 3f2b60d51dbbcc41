"""Tables of experiments that are larger than a build's, recorded once in `book/evidence/tables` with where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ihbook.chapters import evidence
from ihbook.chapters.experiments import Settings
from ihbook.config import RunConfig
from ihbook.files import writing

FOLDER = "evidence/tables"  # in the book's folder
FORM = 1


@dataclass(frozen=True, eq=False)
class Recorded:
    """A table and its provenance: commit, engine, date, the networks' settings where a row does not say otherwise, seeds, bank,
    runs, run_steps, and the command that measures it again."""

    name: str
    provenance: Mapping[str, Any]
    table: pd.DataFrame

    @property
    def origin(self) -> str:
        """Where the table comes from, in a sentence."""
        of, seeds = self.provenance, self.provenance["seeds"]
        named = f"seeds {min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"seed {seeds[0]}"
        return (f"Recorded on {of['date']} on {of['bank']['name']}: {named}, {of['runs']:,} runs, "
                f"{of['run_steps'] / 1e6:.1f} million run-steps. To measure it again: `{of['command']}`.")


def write(folder: str | Path, name: str, table: pd.DataFrame, settings: Settings, runs: Sequence[RunConfig], command: str) -> None:
    """Record a table as `name`.json, whole or not at all. `runs` are those that it was computed from. Raises OSError."""
    provenance = evidence.stamp(settings, settings.seeds, command) | {
        "runs": len(runs), "run_steps": sum(run.n_steps for run in runs)}
    rows = [[evidence.plain(x) for x in row] for row in table.itertuples(index=False)]
    found = {"form": FORM, "name": name, "provenance": provenance, "columns": list(table.columns), "rows": rows}
    with writing(Path(folder) / f"{name}.json") as partial:
        text = json.dumps({**found, "rows": None}, indent=1, ensure_ascii=False)
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        partial.write_text(text.replace('"rows": null', f'"rows": [\n{lines}\n ]') + "\n", encoding="utf-8")


def read(name: str, folder: str | Path = FOLDER) -> Recorded | None:
    """A recorded table, or None where there is none. Raises ValueError for a file of another form."""
    path = evidence.of_book(folder) / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["form"] != FORM or found["name"] != name:
            raise ValueError(f"form {found['form']}, name {found['name']}")
        table = pd.DataFrame([[_number(x) for x in row] for row in found["rows"]], columns=found["columns"])
        return Recorded(name, found["provenance"], table)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recorded table ({error}); restore it from the repository") from error


def _number(x: Any) -> Any:
    return float(x) if x in ("inf", "-inf", "nan") else x
