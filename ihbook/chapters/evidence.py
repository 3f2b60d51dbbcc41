"""The book's evidence: every claim on one bank over many seeds, as a column of numbers with their provenance."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from IPython.display import display

from ihbook import engine
from ihbook.banks import load_bank
from ihbook.chapters import sweep
from ihbook.chapters.claims import CLAIMS, Claim, Verdict, gathered, measured_in_words
from ihbook.chapters.experiments import Settings
from ihbook.engine.store import Store, default_root
from ihbook.files import writing

FORM = 1  # of the files, as claims.schema.json describes it
COMPARE_SEEDS = ("10_seeds", "12_who_wins")  # their claims compare networks, so that one notebook has all; others have one each
RECORDED = ("glyphs", "glyphs-random", "omniglot", "omniglot-random", "gaussian", "authors")  # columns, in the page's order


@dataclass(frozen=True, eq=False)
class Column:
    """Every claim on one bank: its name, where its numbers come from, and the verdicts in the claims' order."""

    name: str
    provenance: Mapping[str, Any]
    verdicts: Sequence[Verdict]

    def __getitem__(self, key: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.key == key)


def measure(book: str | Path, settings: Settings, seeds: Sequence[int], out: str | Path, *, name: str | None = None,
            chapters: Sequence[str] = (), executor: Executor | None = None, progress: bool = True) -> Column:
    """Run the chapters that test claims, with each of `seeds`, and gather their numbers in a column. `out` keeps what is finished,
    and the same call, with the same characters and code, goes on from there. `chapters` (such as "03_many_heads") leaves out the
    others; without it, those that test predictions of this book are left out. `executor`: see `sweep.sweep`.

    Raises ValueError for a `book` without such chapters, for fewer than two seeds, for seeds that are not consecutive where a
    chapter compares them, and what `load_bank` raises; RuntimeError where a chapter fails.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: give at least two different ones; an interval over seeds needs them")
    past = {claim.chapter for claim in CLAIMS.values() if claim.new}
    notebooks = [path for path in sorted(Path(book).glob("[0-9]*.ipynb")) if sweep.has_claims(sweep.code_of(path))]
    unknown = set(chapters) - {path.stem for path in notebooks}
    if not notebooks or unknown:
        called, among = ", ".join(sorted(unknown)), ", ".join(path.stem for path in notebooks)
        raise ValueError(f"{book} has no chapters that test claims" + f" and are called {called}" * bool(unknown)
                         + "; give the folder of the book's notebooks" + f", and chapters among {among}" * bool(notebooks))
    notebooks = [path for path in notebooks if (path.stem in chapters if chapters else path.stem not in past)]
    out = Path(out) / load_bank(settings.run().bank).digest[:16]
    notebooks.sort(key=lambda path: path.stem not in COMPARE_SEEDS)  # these train the others' networks too, many at a time
    found: dict[str, dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))  # by claim and seed
    for notebook in notebooks:
        done = sweep.sweep(notebook, _grid(notebook, settings, seeds), out / notebook.stem, executor=executor, progress=progress)
        if done.failed:
            point, error = next(iter(done.failed.items()))
            raise RuntimeError(f"{notebook.stem} failed at {len(done.failed)} points, first at {point}: {error.strip()[-2000:]}")
        by_point = "bank" in done.table and notebook.stem not in COMPARE_SEEDS
        for claim, rows in done.table.groupby("claim"):
            for row in rows.itertuples():
                # The numbers of one point are of consecutive seeds, unless it has one for all of them.
                seed = row.seed if by_point else row.seed + row.nth if len(rows) > 1 else None
                found[claim][seed].append(row.value)
    return Column(name or column_name(settings), provenance(settings, seeds, command_of(settings, seeds, chapters)), [
        Verdict(claim, *_by_seed(found[key])) for key, claim in CLAIMS.items()])


def merged(old: Column, new: Column) -> Column:
    """The new column, with what it did not measure from the old one: the other claims, and other seeds of the same claims. So some
    chapters can have more seeds than others, and networks can be added to those that are there. The provenance is the new one's,
    with the old one's under `earlier`. Raises ValueError as `check_same` does."""
    check_same(old, new.provenance)
    verdicts = [_together(old[verdict.key], verdict) for verdict in new.verdicts]
    if verdicts == list(new.verdicts):
        return new  # nothing of the old one is left
    earlier = [*old.provenance.get("earlier", []), {name: old.provenance.get(name) for name in _OF_ONE_CALL}]
    provenance = {**new.provenance, "seeds": sorted({*old.provenance["seeds"], *new.provenance["seeds"]}), "earlier": earlier,
                  "command": "; ".join(dict.fromkeys(f"{old.provenance['command']}; {new.provenance['command']}".split("; ")))}
    return Column(new.name, provenance, verdicts)


_OF_ONE_CALL = ("ihbook", "torch", "device", "commit", "date", "stored_runs", "run_steps")  # of a column's provenance


def _together(old: Verdict, new: Verdict) -> Verdict:
    """A claim's numbers of both, the new one where both have a seed. Numbers that are not of single seeds can't stand together."""
    if not (old.seeds and new.seeds):
        return new if new.values else old
    by_seed = {**dict(zip(old.seeds, old.values, strict=True)), **dict(zip(new.seeds, new.values, strict=True))}
    seeds = tuple(sorted(by_seed))
    return replace(new, values=tuple(by_seed[seed] for seed in seeds), seeds=seeds)


def check_same(old: Column, stamp: Mapping[str, Any]) -> None:
    """Raise ValueError unless numbers with this `stamp` can stand in a column: of the same bank, engine and settings."""
    has, gets = ({"digest of its bank": of["bank"]["digest"], "engine": of["engine"], **of["settings"]}
                 for of in (old.provenance, stamp))
    for name in gets:
        if has.get(name, gets[name]) != gets[name]:
            raise ValueError(f"{old.name}: the column that is there has another {name} ({has[name]}, not {gets[name]}); choose "
                             "another file for out, or remove this one")


def _grid(notebook: Path, settings: Settings, seeds: Sequence[int]) -> dict[str, list]:
    """The points of a chapter: every seed with one network, or one point with all; a chapter without a bank has its own seeds."""
    import papermill  # as in `sweep.points`

    known = papermill.inspect_notebook(str(notebook))
    if "bank" not in known:
        return {"seed": [int(known["seed"]["default"])]}
    several = notebook.stem in COMPARE_SEEDS
    if several and list(seeds) != list(range(min(seeds), max(seeds) + 1)):
        raise ValueError(f"seeds={list(seeds)}: {notebook.stem} compares consecutive seeds, such as 5:13; or leave it out")
    return {name: [value] for name, value in asdict(settings).items() if name in known and value is not None} | {
        "seed": [min(seeds)] if several else list(seeds), "n_seeds": [len(seeds) if several else 1]}


def _by_seed(found: Mapping[int | None, Sequence[float]]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """One number per seed, the median where a seed gave several, and the seeds."""
    seeds = sorted(found, key=lambda seed: -1 if seed is None else seed)
    values = []
    for seed in seeds:
        known = [value for value in found[seed] if not math.isnan(value)]
        values.append(median(known) if known else math.nan)
    return tuple(values), tuple(seeds) if None not in seeds else ()


def column_name(settings: Settings) -> str:
    """The name of the column of these settings: the bank, and its embedding where that is not the usual one."""
    return settings.bank + f"-{settings.embedding}" * (settings.embedding != "auto")


def stamp(settings: Settings, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """Where numbers come from: code, data, networks, and the command that measures them again."""
    bank = load_bank(settings.run().bank)
    return {"ihbook": version("ihbook"), "engine": engine.VERSION, "torch": torch.__version__, "device": settings.device,
            "commit": commit(), "date": time.strftime("%Y-%m-%d"),
            "settings": {name: value for name, value in asdict(settings).items()
                         if name not in ("device", "bank_path", "seed", "n_seeds")},
            "seeds": list(map(int, seeds)),
            "bank": {"name": settings.bank, "embedding": bank.metadata["embedding"], "source": bank.metadata["source"],
                     "digest": bank.digest},
            "command": command}


def _changed(settings: Settings) -> dict[str, Any]:
    """The settings that a command must name: the profile, and what is not at its default. A path is FILE, as it is on no other
    machine."""
    usual = {each.name: each.default for each in fields(Settings)} | {"n_sequences": settings.scale.n_sequences}
    return {name: "FILE" if name == "bank_path" else value for name, value in asdict(settings).items()
            if name == "profile" or value != usual[name] and name not in ("seed", "n_seeds", "device")}


def command_of(settings: Settings, seeds: Sequence[int], chapters: Sequence[str] = ()) -> str:
    """The command that measures a column; a call in Python where the settings are not all of the command's."""
    changed = {"bank": settings.bank, "embedding": settings.embedding, **_changed(settings)}
    if set(changed) - {"bank", "bank_path", "embedding", "profile", "dim", "n_sequences"}:
        given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        return f"evidence.measure('book', Settings({given}), {list(seeds)}, 'out', chapters={list(chapters)})"
    return ("python -m ihbook evidence" + "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
            + f" --seeds {' '.join(map(str, seeds))}" + f" --chapters {' '.join(chapters)}" * bool(chapters))


def provenance(settings: Settings, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """The `stamp` of a column, with the number of runs on its bank that are in the store, and their steps."""
    found = stamp(settings, seeds, command)
    runs = [entry.config["run"] for entry in Store().entries()
            if entry.config.get("bank", {}).get("digest") == found["bank"]["digest"] and entry.config["version"] == engine.VERSION]
    return found | {"stored_runs": len(runs), "run_steps": sum(-(-run["n_sequences"] // run["batch_size"]) for run in runs)}


def commit() -> str | None:
    """The commit of the package's checkout, with a + where files differ from it; None outside one."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip()[:12] + "+" * bool(git("status", "--porcelain", "--untracked-files=no", ".").strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(column: Column) -> dict[str, Any]:
    """A column as claims.schema.json describes it. Numbers that JSON has no word for are "inf", "-inf" and "nan"."""
    return {"form": FORM, "name": column.name, "provenance": dict(column.provenance),
            "claims": [_row(verdict) for verdict in column.verdicts]}


def hand_over(verdicts: Sequence[Verdict], settings: Settings | None = None) -> None:
    """Hand a chapter's numbers to the sweep that runs it, which adds a last cell with this call to the chapter. With `settings`,
    they are handed over as a column too."""
    rows = [{"claim": verdict.key, "nth": i, "value": plain(value), "verdict": verdict.word}
            for verdict in verdicts for i, value in enumerate(verdict.values or [math.nan])]
    column = None
    if settings is not None:
        column = as_json(Column(column_name(settings), provenance(settings, settings.seeds, sweep.UNKNOWN), verdicts))
    display({sweep.NUMBERS: {"rows": rows, "column": column}}, raw=True)


def _row(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    seeds = verdict.seeds or [None] * len(verdict.values)
    return {
        "key": claim.key, "chapter": claim.chapter, "figure": claim.figure, "claim": claim.sentence, "published": claim.published,
        "source": claim.source, "published_value": claim.published_value, "measure": claim.measure,
        "low": plain(claim.low), "high": plain(claim.high), "direction_low": plain(claim.direction_low),
        "direction_high": plain(claim.direction_high), "why": claim.why, "bounds": list(claim.bounds), "check": claim.check,
        "refuted_by": claim.refuted_by,
        "values": [{"seed": seed, "value": plain(value)} for seed, value in zip(seeds, verdict.values, strict=True)],
        "n": verdict.n, "median": plain(verdict.median) if verdict.known else None,
        "interval": verdict.interval and list(map(plain, verdict.interval)),
        "prediction": verdict.prediction and list(map(plain, verdict.prediction)),
        "published_inside": verdict.published_inside, "verdict": verdict.word,
    }


def plain(x: float | str) -> float | str:
    """The number as JSON can write it; a word is left as it is."""
    return x if isinstance(x, str) or math.isfinite(x) else str(x)


def write(column: Column, path: str | Path) -> None:
    """Write a column as JSON, whole or not at all. Raises OSError."""
    with writing(Path(path)) as partial:
        partial.write_text(json.dumps(as_json(column), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: str | Path) -> Column:
    """Read a column. Verdicts are computed from the values by today's claims, so that they follow a bound that changed; a claim
    that is now measured otherwise has none. Raises ValueError for a file of another form, FileNotFoundError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["form"] != FORM:
            raise ValueError(f"form {found['form']}, not {FORM}")
        rows = {row["key"]: row for row in found["claims"]}
        verdicts = [_verdict(claim, rows.get(key)) for key, claim in CLAIMS.items()]
        return Column(found["name"], found["provenance"], verdicts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a column of claims ({error}); remove it, and write it with python -m ihbook evidence"
                         ) from error


def _verdict(claim: Claim, row: Mapping[str, Any] | None) -> Verdict:
    if row is None or row["measure"] != claim.measure:
        return Verdict(claim, ())
    seeds = tuple(each["seed"] for each in row["values"])
    return Verdict(claim, tuple(float(each["value"]) for each in row["values"]), seeds if None not in seeds else ())


def of_book(folder: str | Path) -> Path:
    """A folder of the book, where a page is run in the book's folder, as a build does, or at the root of the repository."""
    return Path(folder) if Path(folder).exists() else Path("book", folder)


def columns(folder: str | Path) -> list[Column]:
    """The columns recorded in a folder of the book, in the page's order."""
    found = [read(path) for path in of_book(folder).glob("*.json")]
    rank = {name: i for i, name in enumerate(RECORDED)}
    return sorted(found, key=lambda column: (rank.get(column.name, len(rank)), column.name))


def schema() -> dict[str, Any]:
    """The JSON schema of a column."""
    return json.loads(files("ihbook.chapters").joinpath("claims.schema.json").read_text(encoding="utf-8"))


def matrix(every: Sequence[Column]) -> pd.DataFrame:
    """Claims × columns: the verdict, the median and its interval, and n."""
    rows = [{"figure": verdict.claim.figure, "claim": verdict.claim.sentence, "holds if": verdict.claim.holds_if,
             **{column.name: measured_in_words(column[verdict.key]) for column in every}} for verdict in every[0].verdicts]
    return pd.DataFrame(rows)


def of_paper(column: Column) -> Column:
    """The column's verdicts on the paper's claims."""
    return replace(column, verdicts=[verdict for verdict in column.verdicts if not verdict.claim.new])


def of_predictions(column: Column) -> Column:
    """The column's verdicts on this book's own predictions."""
    return replace(column, verdicts=[verdict for verdict in column.verdicts if verdict.claim.new])


def of_build(settings: Settings) -> Column:
    """The column of the build at hand, from what its chapters recorded. It is also written to the default store as claims.json,
    from where the build takes it."""
    others = ", ".join(f"{name}={value}" for name, value in _changed(settings).items() if name != "profile")
    command = f"IHBOOK_PROFILE={settings.profile} jupyter-book build book/" + f" (of pages with {others})" * bool(others)
    column = Column("this build", provenance(settings, settings.seeds, command), gathered(settings))
    write(column, default_root() / "claims.json")
    return column


def disagreements(every: Sequence[Column]) -> dict[str, dict[str, str]]:
    """The claims on which columns that decide disagree: the verdict by column. One that is undecided or untested has no say."""
    found = {}
    for key in (verdict.key for verdict in every[0].verdicts):
        words = {column.name: column[key].word for column in every}
        decided = {name: word for name, word in words.items() if word not in ("undecided", "not tested")}
        if len(set(decided.values())) > 1:
            found[key] = decided
    return found


def differences(a: Column, b: Column) -> dict[str, Verdict]:
    """The differences of two columns' numbers, seed by seed, by claim: those that have numbers of six seeds or more in both and are
    no checks. What lies between the columns *moves* a claim where the interval of these leaves out 0."""
    found = {}
    for verdict in a.verdicts:
        others = dict(zip(b[verdict.key].seeds, b[verdict.key].values, strict=False))
        paired = {seed: value - others[seed] for seed, value in zip(verdict.seeds, verdict.values, strict=False) if seed in others}
        change = Verdict(verdict.claim, tuple(paired.values()), tuple(paired))
        if change.n >= 6 and not verdict.claim.check:
            found[verdict.key] = change
    return found


def moved(a: Column, b: Column) -> list[str]:
    """The claims that what lies between two columns moves."""
    return [key for key, change in differences(a, b).items() if change.interval[0] > 0 or change.interval[1] < 0]


def halves(column: Column) -> list[tuple[Verdict, Verdict, Verdict]]:
    """The verdicts that have sixteen networks or more, each with those of the first eight alone and of all others alone."""
    return [(verdict, _part(verdict, slice(8)), _part(verdict, slice(8, None))) for verdict in column.verdicts
            if len(verdict.seeds) >= 16]


def _part(verdict: Verdict, which: slice) -> Verdict:
    """The verdict on some of a claim's networks alone."""
    return replace(verdict, values=verdict.values[which], seeds=verdict.seeds[which])


def asked_for(column: Column, n: int) -> list[Verdict]:
    """The verdicts that their first `n` networks left undecided, and that have the networks that these asked for, or more."""
    return [verdict for verdict in column.verdicts
            if len(verdict.seeds) > n and (_part(verdict, slice(n)).n_needed or math.inf) <= verdict.n]


def seeds_by_chapter(column: Column) -> str:
    """The seeds of a column's networks, in words: "5 to 12; 5 to 20 in chapters 3, 7; 5 to 37 for some claims of chapter 3"."""
    of: dict[tuple[int, int], list[str]] = defaultdict(list)
    part: dict[tuple[int, int], list[str]] = defaultdict(list)
    for chapter in dict.fromkeys(verdict.claim.chapter for verdict in column.verdicts):
        ends = [(min(verdict.seeds), max(verdict.seeds)) for verdict in column.verdicts
                if verdict.claim.chapter == chapter and verdict.seeds]
        most = max(dict.fromkeys(ends), key=ends.count, default=None)
        for each in dict.fromkeys(ends):
            (of if each == most else part)[each].append(chapter[:2].lstrip("0"))
    usual = max(of, key=lambda ends: len(of[ends]), default=None)
    words = [(ends, "" if ends == usual else f" in chapter{'s' * (len(of[ends]) > 1)} {', '.join(of[ends])}")
             for ends in sorted(of, key=lambda ends: ends != usual)]
    words += [(ends, f" for some claims of chapter{'s' * (len(part[ends]) > 1)} {', '.join(part[ends])}") for ends in part]
    return "; ".join(f"{first} to {last}{where}" for (first, last), where in words)


def encoders(every: Sequence[Column]) -> list[tuple[Column, Column]]:
    """The pairs of columns of the same characters, under the learnt encoder and under random features."""
    by_name = {column.name: column for column in every}
    return [(column, by_name[f"{name}-random"]) for name, column in by_name.items() if f"{name}-random" in by_name]


def missing(every: Sequence[Column]) -> pd.DataFrame:
    """The seeds that gave a claim no number, or never got there, by claim and column."""
    return pd.DataFrame([(verdict.claim.figure, verdict.claim.sentence, column.name, ", ".join(map(str, verdict.without)))
                         for column in every for verdict in column.verdicts if verdict.known and verdict.without],
                        columns=["figure", "claim", "column", "seeds without a number"])


def undecided(every: Sequence[Column]) -> pd.DataFrame:
    """The undecided claims, by column: what was measured, and about how many seeds would decide."""
    rows = [(verdict.claim.figure, verdict.claim.sentence, column.name, verdict.measured, verdict.claim.holds_if, verdict.n,
             verdict.n_needed) for column in every for verdict in column.verdicts if verdict.word == "undecided"]
    names = ["figure", "claim", "column", "measured", "holds if", "n", "n needed"]
    return pd.DataFrame(rows, columns=names).astype({"n needed": "Int64"})


def counts(column: Column) -> dict[str, int]:
    """How many claims have each verdict."""
    words = [verdict.word for verdict in column.verdicts]
    return {word: words.count(word) for word in dict.fromkeys(words)}
