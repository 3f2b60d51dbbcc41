"""The paper's claims as values: how each claim is measured, when it holds, and what was found."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from statistics import median

import pandas as pd
from IPython.display import display

from ihbook.chapters.experiments import Settings
from ihbook.engine.store import default_root
from ihbook.files import writing

NUMBERS = "application/vnd.ihbook.numbers+json"  # the type of the output that holds a notebook's numbers


@dataclass(frozen=True)
class Claim:
    """A published claim. It holds where the median over seeds of the measured number lies from `low` to `high`.

    Where the published number is close to zero, `high` is as a rule three times that number.
    """

    key: str
    figure: str
    sentence: str
    published: str
    measure: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self):
        if not (isinstance(self.low, (int, float)) and isinstance(self.high, (int, float)) and self.low <= self.high
                and (math.isfinite(self.low) or math.isfinite(self.high))):
            raise ValueError(f"the claim {self.key!r} has low={self.low!r}, high={self.high!r}; one of them at least must be "
                             "finite, and low at most high")

    @property
    def holds_if(self) -> str:
        """The condition in words."""
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Verdict:
    """A claim with what was measured, one number per seed."""

    claim: Claim
    values: tuple[float, ...]

    @property
    def key(self) -> str:
        return self.claim.key

    @property
    def word(self) -> str:
        """The verdict: "holds", "differs", or "not tested" where no seed gave a number."""
        known = [v for v in self.values if not math.isnan(v)]
        if not known:
            return "not tested"
        return "holds" if self.claim.low <= median(known) <= self.claim.high else "differs"

    @property
    def measured(self) -> str:
        """The median over seeds and their range, in words; "–" where no seed gave a number."""
        known = sorted(v for v in self.values if not math.isnan(v))
        if not known:
            return "–"
        middle = _number(median(known))
        return middle if len(known) == 1 else f"{middle} ({_number(known[0])} to {_number(known[-1])})"


def _number(x: float) -> str:
    if math.isinf(x):
        return "∞"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def ratios(times: Sequence[float], to: Sequence[float]) -> list[float]:
    """Each of `times` over its partner in `to` (NaN: never); infinite if only the first is NaN, NaN if the second is."""
    return [math.nan if math.isnan(b) else math.inf if math.isnan(a) else a / b for a, b in zip(times, to, strict=True)]


def judge(claim: str | Claim, values: float | Sequence[float]) -> Verdict:
    """The verdict on a claim (a key of the book's claims, or a claim of your own), from one number per seed (NaN: no number).

    Raises KeyError for an unknown key.
    """
    if isinstance(claim, str):
        if claim not in CLAIMS:
            raise KeyError(f"no claim {claim!r}; they are {', '.join(CLAIMS)}")
        claim = CLAIMS[claim]
    return Verdict(claim, tuple(float(v) for v in (values if isinstance(values, Sequence) else [values])))


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Claims and verdicts as the book shows them, one row per claim."""
    return pd.DataFrame([(c.figure, c.sentence, c.published, v.measured, v.word, f"{c.measure}: {c.holds_if}")
                         for v in verdicts for c in [v.claim]],
                        columns=["figure", "claim", "published", "measured", "verdict", "what is measured: when it holds"])


def record(verdicts: Sequence[Verdict], settings: Settings) -> pd.DataFrame:
    """Save a chapter's verdicts in the default store, for the page of all claims; return their table. Raises OSError."""
    for verdict in verdicts:
        with writing(_folder(settings) / f"{verdict.key}.json") as partial:
            partial.write_text(json.dumps({"claim": asdict(verdict.claim), "values": verdict.values}))
    return table(verdicts)


def hand_over(verdicts: Sequence[Verdict]) -> None:
    """Hand a chapter's numbers to the sweep that runs it, which adds a last cell with this call to the chapter."""
    rows = [{"claim": verdict.key, "nth": i, "value": value if math.isfinite(value) else str(value), "verdict": verdict.word}
            for verdict in verdicts for i, value in enumerate(verdict.values or [math.nan])]  # JSON has no NaN
    display({NUMBERS: rows}, raw=True)


def gathered(settings: Settings) -> list[Verdict]:
    """The verdict on every claim under these settings: "not tested" if its chapter has not run, or if the claim has changed."""
    found = []
    for key, claim in CLAIMS.items():
        try:
            book = json.loads((_folder(settings) / f"{key}.json").read_text())
            found.append(Verdict(claim, tuple(book["values"]) if book["claim"] == asdict(claim) else ()))
        except (OSError, ValueError, KeyError):
            found.append(Verdict(claim, ()))
    return found


def _folder(settings: Settings):
    return default_root() / "claims" / settings.digest


def load(text: str) -> dict[str, Claim]:
    """Claims by key, from TOML text. Raises ValueError for a key that is given twice, TypeError for an unknown field."""
    return {key: Claim(key, **fields) for key, fields in tomllib.loads(text).items()}


CLAIMS = load(files("ihbook.chapters").joinpath("claims.toml").read_text(encoding="utf-8"))
