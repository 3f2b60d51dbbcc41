"""Run a chapter at every point of a grid of parameters, by papermill, here or elsewhere; gather its numbers in one table."""

from __future__ import annotations

import ast
import hashlib
import html
import itertools
import json
import multiprocessing
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

import ihbook
from ihbook.chapters import kernel, verdict_pictures
from ihbook.chapters.claims import CLAIMS
from ihbook.engine import cluster
from ihbook.files import writing

LAST_CELL = "from ihbook.chapters import evidence\n\nevidence.hand_over(verdicts, globals().get('settings'))"
UNKNOWN = "as its sweep says"  # a point's command, until its sweep writes it
NUMBERS = "application/vnd.ihbook.numbers+json"  # the type of the output that holds a notebook's numbers


@dataclass(frozen=True, eq=False)
class Point:
    """One choice of parameters, and the folder of its results: `out.ipynb` and, once the point is finished, `numbers.json` and
    `claims.json` (of the form of `claims.schema.json`)."""

    parameters: dict[str, Any]
    folder: Path

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.parameters.items())

    def numbers(self) -> list[dict] | None:
        """The point's numbers, one dict per claim and seed; None where the point is not finished."""
        try:
            return json.loads((self.folder / "numbers.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


@dataclass(frozen=True, eq=False)
class Sweep:
    """The results of a sweep. `table` is tidy: the parameters, claim, nth (of the seeds, from 0), value, verdict. `failed` maps
    each point that failed to its error; `page` is the path of the HTML page with small multiples."""

    table: pd.DataFrame
    failed: dict[Point, str]
    page: Path


def code_of(notebook: str | Path) -> list[str]:
    """The sources of a notebook's code cells."""
    import nbformat  # slow, and a kernel that only hands its numbers over does not need it

    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


def has_claims(code: Sequence[str]) -> bool:
    """Whether a chapter's code makes a list `verdicts`, of the claims that it tests."""
    return any("verdicts = [" in source for source in code)


@cache
def _package() -> str:
    """A digest of the package's own code and data, so that a point is not taken for finished when they have changed."""
    root, found = Path(ihbook.__file__).parent, hashlib.sha256()
    for path in sorted(path for kind in ("py", "cpp", "toml", "safetensors") for path in root.rglob(f"*.{kind}")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def points(notebook: str | Path, grid: Mapping[str, Sequence], out: str | Path) -> list[Point]:
    """Every point of the grid, in order. If the grid has no `profile`, the profile is this process's (IHBOOK_PROFILE). A point's
    folder is named by its parameters, the chapter's code and the package's.

    Raises ValueError for a notebook that does not exist or tests no claims, a parameter that it does not have, a parameter
    without values or with the same value twice, and a value that is not a scalar.
    """
    import papermill  # slow, as nbformat in `code_of`

    notebook = Path(notebook)
    if not notebook.is_file():
        raise ValueError(f"there is no notebook {notebook}; name one, such as book/08_data_properties.ipynb")
    code = code_of(notebook)
    if not has_claims(code):
        raise ValueError(f"{notebook} makes no list `verdicts` to gather numbers from; choose a chapter that tests claims")
    try:
        known = papermill.inspect_notebook(str(notebook))
    except ValueError as error:
        raise ValueError(f"{notebook} can't be run ({error}); save it from Jupyter, which names its kernel") from error
    if not known:
        raise ValueError(f"{notebook} has no parameters; give its cell of them the tag `parameters`")
    every: dict[str, list] = {"profile": [None]} if "profile" in known else {}
    for name, values in grid.items():
        if name not in known:
            raise ValueError(f"{notebook} has no parameter {name!r}; it has {', '.join(known)}")
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise ValueError(f"{name}={values!r}: give a list of values, [{values!r}]")
        every[name] = [value.item() if hasattr(value, "item") else value for value in values]
        if not every[name] or len(set(map(repr, every[name]))) < len(every[name]):
            raise ValueError(f"{name}={every[name]!r}: give at least one value, and none twice")
        for value in every[name]:
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise ValueError(f"{name}={value!r}: a parameter is a number, a string, True, False or None")
    if "profile" in every:  # a worker's environment is not this one's
        every["profile"] = [value or os.environ.get("IHBOOK_PROFILE") or "paper" for value in every["profile"]]
    found = []
    for values in itertools.product(*every.values()):
        parameters = dict(zip(every, values, strict=True))
        name = hashlib.sha256(json.dumps([_package(), code, parameters], sort_keys=True).encode()).hexdigest()[:16]
        found.append(Point(parameters, Path(out).absolute() / "points" / name))
    return found


def sweep(notebook: str | Path, grid: Mapping[str, Sequence], out: str | Path, *, executor: Executor | None = None,
          progress: bool = True) -> Sweep:
    """Run a chapter at every point of a grid, such as {"n_labels": [5, 10], "seed": range(8)}, and gather its numbers.

    `out` then holds one folder per point, `numbers.parquet`, and `index.html`. Finished points are kept, and the next call skips
    them. A point that fails does not stop the others. Points run on `executor`, any of `concurrent.futures` or a Dask client's
    (None: here, one after another); it needs no folder in common with this process. Raises ValueError as `points` does, OSError
    where `out` can't be written or the scheduler is lost.
    """
    every = points(notebook, grid, out)
    _try_to_write(Path(out))
    waiting = [point for point in every if point.numbers() is None]
    failed: dict[Point, str] = {}
    try:
        with tqdm(total=len(every), initial=len(every) - len(waiting), desc="points", disable=not progress) as bar:
            for point, (executed, numbers, error) in _executed(Path(notebook).read_text(encoding="utf-8"), waiting, executor):
                if executed:
                    with writing(point.folder / "out.ipynb") as partial:
                        partial.write_text(executed, encoding="utf-8")
                if error is None:
                    if numbers["column"] is not None:
                        numbers["column"]["provenance"]["command"] = _command(Path(notebook).stem, point.parameters)
                        with writing(point.folder / "claims.json") as partial:
                            partial.write_text(json.dumps(numbers["column"], indent=1, ensure_ascii=False), encoding="utf-8")
                    with writing(point.folder / "numbers.json") as partial:  # the last: it says that the point is finished
                        partial.write_text(json.dumps(numbers["rows"]))
                else:
                    failed[point] = error
                bar.update()
    finally:  # also when the sweep is interrupted
        done = _gathered(Path(notebook).stem, every, failed, Path(out))
    return done


def _command(name: str, parameters: Mapping[str, Any]) -> str:
    """The command that runs a point again."""
    return f"papermill book/{name}.ipynb out.ipynb" + "".join(
        f" -p {parameter} {shlex.quote(str(value))}" for parameter, value in parameters.items())


def _gathered(name: str, every: Sequence[Point], failed: dict[Point, str], out: Path) -> Sweep:
    """Write the numbers of all finished points to `out`, as a table and a page."""
    names = list(every[0].parameters)
    rows = [{**point.parameters, **row} for point in every for row in point.numbers() or ()]
    table = pd.DataFrame(rows, columns=[*names, "claim", "nth", "value", "verdict"]).astype({"value": float})
    for column in names:
        kinds = {type(point.parameters[column]) for point in every}
        if len(kinds - {int, float}) + bool(kinds & {int, float}) > 1:  # such as None and numbers
            table[column] = [str(row[column]) for row in rows]
    varied = [column for column in names if len({repr(point.parameters[column]) for point in every}) > 1]
    page = out / "index.html"
    with writing(out / "numbers.parquet") as partial:
        table.to_parquet(partial)
    with writing(page) as partial:
        partial.write_text(_page(name, every, failed, table, varied), encoding="utf-8")
    return Sweep(table, failed, page)


def _try_to_write(out: Path) -> None:
    """Raise OSError that names `out` where nothing can be written there, before any point runs."""
    try:
        (out / "points").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"can't write to {out} ({error}); choose another folder for out") from error


def grid(parameters: Sequence[Sequence[str]]) -> dict[str, list]:
    """A grid from a command line's lists of a name and its values: "5" is a number, "0:8" stands for 0 to 7, "None" for None.

    Raises ValueError for a name without values or given twice.
    """
    found: dict[str, list] = {}
    for name, *words in parameters:
        if not words or name in found:
            raise ValueError(f"-p {name}: give its values once, such as -p {name} 1 2 3")
        found[name] = []
        for word in words:
            stretch = re.fullmatch(r"(-?\d+):(-?\d+)", word)
            found[name] += range(int(stretch[1]), int(stretch[2])) if stretch else [_value(word)]
    return found


def _value(word: str) -> Any:
    """A word of a command line as a Python literal, or else as a string."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


@contextmanager
def executor_for(processes: int | None = None, scheduler: str | None = None) -> Iterator[Executor | None]:
    """Yield the executor of a sweep: `processes` processes, the Dask cluster of `scheduler`, or None (here). Raises ValueError
    for fewer than one process, OSError where no scheduler answers or it has no workers, ImportError without Dask."""
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    if scheduler is not None:
        with cluster.connect(scheduler) as client:
            cluster.workers(client)
            yield client.get_executor(pure=False)
    elif processes:
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            try:
                yield pool
            except BaseException:  # such as Ctrl-C: do not wait for points that have begun
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    else:
        yield None


Outcome = tuple[str, dict | None, str | None]  # the executed notebook, its numbers (`evidence.hand_over`), its error


def _executed(source: str, waiting: Sequence[Point], executor: Executor | None) -> Iterator[tuple[Point, Outcome]]:
    """Yield each point with its outcome, as they finish. Raises OSError where the scheduler is lost."""
    if executor is None:
        for point in waiting:
            yield point, execute(source, point.parameters)
        return
    jobs = {executor.submit(execute, source, point.parameters): point for point in waiting}
    try:
        for job in as_completed(jobs):
            try:
                outcome = job.result()
            except CancelledError as error:
                raise OSError("the scheduler was lost; finished points are kept, and the same command goes on") from error
            except Exception as error:  # such as a worker that was killed again and again
                outcome = "", None, f"{type(error).__name__}: {error}"
            yield jobs[job], outcome
    finally:
        for job in jobs:
            job.cancel()


def execute(source: str, parameters: Mapping[str, Any]) -> Outcome:
    """Run a notebook, given as JSON text, with these parameters. An error is part of the outcome; it is not raised."""
    import nbformat  # as in `points`
    import papermill

    notebook = nbformat.reads(source, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_CELL))
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "in.ipynb", Path(folder) / "out.ipynb"
        nbformat.write(notebook, given)
        try:
            done = papermill.execute_notebook(str(given), str(out), dict(parameters), kernel_name="python3", progress_bar=False,
                                              kernel_manager_class=kernel.Manager)
        except Exception as error:  # any error of a point is reported, and the others continue
            return out.read_text(encoding="utf-8") if out.exists() else "", None, f"{type(error).__name__}: {error}"
        numbers = next(output.data[NUMBERS] for output in done.cells[-1].outputs if NUMBERS in output.get("data", {}))
        return out.read_text(encoding="utf-8"), numbers, None


def _page(name: str, every: Sequence[Point], failed: Mapping[Point, str], table: pd.DataFrame, varied: Sequence[str]) -> str:
    """The sweep as one HTML page: small multiples, then every point with its notebook."""
    figure = verdict_pictures.sweep(table, varied, CLAIMS)._repr_html_() if table["value"].notna().any() else ""
    finished = {point for point in every if point.numbers() is not None}
    rows = ""
    for point in every:
        word = "finished" if point in finished else "failed" if point in failed else "not run yet"
        link = f'<a href="points/{point.folder.name}/out.ipynb">notebook</a>' if (point.folder / "out.ipynb").exists() else ""
        rows += (f"<tr><td>{html.escape(str(point))}</td><td>{word}</td><td>{link}</td>"
                 f"<td>{html.escape(failed.get(point, ''))}</td></tr>")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(name)}: a sweep</title><style>"
            "body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; "
            "margin: 2rem auto; padding: 0 1rem } td { padding: 0.2em 0.8em; vertical-align: top } img { max-width: 100% }</style>"
            f"<h1>{html.escape(name)}</h1><p>{len(finished)} of {len(every)} points are finished. Every number is in "
            f"<code>numbers.parquet</code>.</p>{figure}<table>{rows}</table></html>")
