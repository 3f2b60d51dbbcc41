"""Claims as values, the paper's and the book's own predictions: how each is measured, when it holds, and what was found."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from statistics import median

import numpy as np
import pandas as pd
from scipy import stats

from ihbook.chapters.experiments import Settings
from ihbook.engine.store import default_root
from ihbook.files import writing

WORDS = ("holds", "direction only", "differs", "undecided", "check", "not tested")
COVERAGE = 0.95  # of all intervals
PREDICTED = "predicted here"  # the source of a claim that nobody has published


@dataclass(frozen=True)
class Claim:
    """A published claim, or a prediction of this book (`source` says so). It holds where the median over seeds of the measured
    number lies from `low` to `high` (`why` says why there, `source` where the published number comes from, `bounds` when they were
    set and changed), and in direction only where it lies from `direction_low` to `direction_high`. A `check` is true by definition
    or algebra, so that it is no evidence.
    """

    key: str
    figure: str
    sentence: str
    published: str
    measure: str
    low: float = -math.inf
    high: float = math.inf
    why: str = ""
    source: str = ""
    bounds: tuple[str, ...] = ()
    direction_low: float = -math.inf
    direction_high: float = math.inf
    published_value: float | None = None
    check: bool = False
    chapter: str = ""

    def __post_init__(self):
        object.__setattr__(self, "bounds", tuple(self.bounds))
        for low, high in (("low", "high"), ("direction_low", "direction_high")):
            a, b = getattr(self, low), getattr(self, high)
            if not (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a <= b
                    and (math.isfinite(a) or math.isfinite(b) or low != "low")):
                raise ValueError(f"the claim {self.key!r} has {low}={a!r}, {high}={b!r}; one of them at least must be finite, and "
                                 "low at most high")

    @property
    def holds_if(self) -> str:
        """The condition in words."""
        return _between(self.low, self.high)

    @property
    def refuted_by(self) -> str:
        """What would have refuted the claim, in words."""
        parts = [f"below {self.low:g}"] * (self.low > -math.inf) + [f"above {self.high:g}"] * (self.high < math.inf)
        weaker = f" (in direction only if {_between(self.direction_low, self.direction_high)})" if self.has_direction else ""
        return "an interval all " + " or all ".join(parts) + weaker

    @property
    def new(self) -> bool:
        """Whether this is a prediction of this book, and no claim of the paper."""
        return self.source == PREDICTED

    @property
    def has_direction(self) -> bool:
        return (self.direction_low, self.direction_high) != (-math.inf, math.inf)


def _between(low: float, high: float) -> str:
    if low == -math.inf:
        return f"at most {high:g}"
    return f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"


@dataclass(frozen=True)
class Verdict:
    """A claim with what was measured, one number per seed: NaN where a seed gave none, infinite where it never got there."""

    claim: Claim
    values: tuple[float, ...]
    seeds: tuple[int, ...] = ()  # of the values, where there is one for each

    @property
    def key(self) -> str:
        return self.claim.key

    @cached_property
    def known(self) -> list[float]:
        """The numbers, sorted."""
        return sorted(v for v in self.values if not math.isnan(v))

    @property
    def n(self) -> int:
        return len(self.known)

    @property
    def median(self) -> float:
        """The median over seeds; NaN where no seed gave a number."""
        return median(self.known) if self.known else math.nan

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95% bootstrap interval of the median over seeds (percentiles of 9,999 samples); None for fewer than two numbers."""
        if self.n < 2:
            return None
        if self.known[0] == self.known[-1]:
            return self.known[0], self.known[0]
        most = 1e100  # stands for "never", as the difference of two infinities has no value
        found = stats.bootstrap((np.minimum(self.known, most),), np.median, n_resamples=9999, confidence_level=COVERAGE,
                                method="percentile", random_state=0).confidence_interval
        return tuple(math.inf if bound > most / 10 else float(bound) for bound in found)

    @cached_property
    def prediction(self) -> tuple[float, float] | None:
        """The interval that one more run falls into 95 times in 100, mean ± t s √(1 + 1/n); None where it can't be had."""
        if self.n < 2 or not all(map(math.isfinite, (self.known[0], self.known[-1]))):
            return None
        half = stats.t.ppf((1 + COVERAGE) / 2, self.n - 1) * np.std(self.known, ddof=1) * math.sqrt(1 + 1 / self.n)
        return float(np.mean(self.known) - half), float(np.mean(self.known) + half)

    @property
    def published_inside(self) -> bool | None:
        """Whether the published number is one that another run could give. Only runs on the authors' features can tell."""
        if self.claim.published_value is None or self.prediction is None:
            return None
        return self.prediction[0] <= self.claim.published_value <= self.prediction[1]

    @property
    def word(self) -> str:
        """The verdict. The whole interval counts, or the number itself where there is only one:

        - "holds": it lies within the bounds; "check" if that is no evidence;
        - "undecided": it straddles a bound, so that more seeds are needed;
        - "direction only": it lies outside the bounds, but within those of the direction;
        - "differs": it lies outside;
        - "not tested": no seed gave a number.
        """
        if not self.known:
            return "not tested"
        claim = self.claim
        least, most = self.interval or (self.known[0], self.known[0])
        if claim.low <= least and most <= claim.high:
            return "check" if claim.check else "holds"
        if most >= claim.low and least <= claim.high:
            return "undecided"
        direction = claim.has_direction and claim.direction_low <= least and most <= claim.direction_high
        return "direction only" if direction else "differs"

    @property
    def n_needed(self) -> int | None:
        """About how many seeds would decide an undecided claim, if the median stays where it is; None for another, for fewer than
        six numbers, whose interval is no more than their range, and where the median lies on a bound (more than 10,000)."""
        if self.word != "undecided" or self.n < 6:
            return None
        middle, ratios = self.median, []
        for bound in (self.claim.low, self.claim.high):
            for end in self.interval or ():
                if min(middle, end) < bound < max(middle, end) and math.isfinite(end - middle):
                    ratios.append((end - middle) / (bound - middle))  # an interval shrinks with √n
        needed = math.ceil(self.n * max(ratios) ** 2) if ratios else math.inf
        return needed if needed <= 10_000 else None

    @property
    def measured(self) -> str:
        """The median over seeds and its interval, in words; "–" where no seed gave a number."""
        if not self.known:
            return "–"
        middle = _number(self.median, self.claim)
        return f"{middle} ({self.spread})" if self.interval else middle

    @property
    def spread(self) -> str:
        """The interval, in words; empty where there is none."""
        return " to ".join(_number(end, self.claim) for end in self.interval) if self.interval else ""

    @property
    def without(self) -> list[int]:
        """The seeds that gave no number, or never got there."""
        return [seed for seed, value in zip(self.seeds, self.values, strict=False) if not math.isfinite(value)]


def measured_in_words(verdict: Verdict) -> str:
    """A verdict and its numbers in a table's cell."""
    return f"{verdict.word} · {verdict.measured} · n\N{NO-BREAK SPACE}{verdict.n}" if verdict.known else verdict.word


@cache
def misses(n: int) -> float:
    """The share of intervals (`Verdict.interval`) that leave out the true median of what the n numbers come from, of 1,000 normal
    samples: more than 1 - COVERAGE (n 8: 8%; n 16: 7%), as the medians of samples of so few numbers vary too little."""
    chance = np.random.default_rng(0)
    drawn, again = chance.standard_normal((1000, n)), chance.integers(0, n, (999, n))
    tail = 100 * (1 - COVERAGE) / 2
    least, most = np.percentile([np.median(numbers[again], 1) for numbers in drawn], [tail, 100 - tail], axis=1)
    return float(((least > 0) | (most < 0)).mean())


def _number(x: float, claim: Claim) -> str:
    """Three digits, or as many more as show on which side of the claim's bounds the number lies."""
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    bounds = np.array([claim.low, claim.high, claim.direction_low, claim.direction_high])
    texts = [f"{x:.{digits}g}" for digits in range(3, 8)]
    return next((text for text in texts if (np.sign(float(text) - bounds) == np.sign(x - bounds)).all()), texts[0])


def ratios(times: Sequence[float], to: Sequence[float]) -> list[float]:
    """Each of `times` over its partner in `to` (NaN: never); infinite if only the first is NaN, NaN if the second is."""
    return [math.nan if math.isnan(b) else math.inf if math.isnan(a) else a / b for a, b in zip(times, to, strict=True)]


def best_guesser(n_questions: int, n_guessers: int, chance: float = 0.5) -> float:
    """The share of `n_questions` that the best of `n_guessers` gets right by luck, at most, in 19 of 20 cases: what the best of
    several must exceed (Tables 2 and 3). NaN without questions."""
    if not n_questions:
        return math.nan
    each = COVERAGE ** (1 / n_guessers)  # so that all of them stay within in 19 of 20 cases
    return float(stats.binom.ppf(each, n_questions, chance)) / n_questions


def beyond_labels(found: Sequence[tuple[int, float, float]], n_guessers: int) -> str:
    """Whether the best of several heads does more than its labels give, in words. `found` has for each network a number of
    sequences, the share that the head gets right, and the share if only the label mattered (Tables 2 and 3)."""
    def kind(n: int, share: float, by_label: float) -> str:
        if math.isnan(by_label):
            return "a share that can't be compared: on one of the labels the strongest is never right"
        limit = best_guesser(n, n_guessers, by_label)
        if share > limit:
            return "clearly more right than that, so that labels are not all there is to it"
        if stats.binom.cdf(round(share * n), n, by_label) < (1 - COVERAGE) / 2:
            return "clearly fewer: what the strongest gets wrong of a label is hard for it too"
        return "no more than that" + (": labels suffice" if limit < 1 else ", and could not: its labels may give it all of them")

    kinds = [kind(*each) for each in found]
    counted = [f"{words}{f' (in {n} of {len(kinds)} networks)' * (len(kinds) > 1)}" for words in dict.fromkeys(kinds)
               if (n := kinds.count(words))]
    return f"The head gets {'; '.join(counted)}."


def judge(claim: str | Claim, values: float | Sequence[float], seeds: Sequence[int] = ()) -> Verdict:
    """The verdict on a claim (a key of the book's claims, or a claim of your own), from one number per seed (NaN: no number).

    Raises KeyError for an unknown key, ValueError where there is not one of `seeds` for each number.
    """
    if isinstance(claim, str):
        if claim not in CLAIMS:
            raise KeyError(f"no claim {claim!r}; they are {', '.join(CLAIMS)}")
        claim = CLAIMS[claim]
    values = tuple(float(v) for v in (values if isinstance(values, Sequence) else [values]))
    if seeds and len(seeds) != len(values):
        raise ValueError(f"{claim.key}: {len(values)} numbers and {len(seeds)} seeds; give one seed for each number, or none")
    return Verdict(claim, values, tuple(map(int, seeds)))


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Claims and verdicts as the book shows them, one row per claim. A prediction has no figure, and nothing published."""
    rows = pd.DataFrame([(c.figure, c.sentence, v.word, v.measured, c.published, v.n, f"{c.measure}: {c.holds_if}")
                         for v in verdicts for c in [v.claim]],
                        columns=["figure", "claim", "verdict", "measured", "published", "n", "what is measured: when it holds"])
    predictions = all(verdict.claim.new for verdict in verdicts)
    return rows.drop(columns=["figure", "published"]).rename(columns={"claim": "prediction"}) if predictions else rows


def record(verdicts: Sequence[Verdict], settings: Settings, seeds: Sequence[int] | None = None) -> pd.DataFrame:
    """Save a chapter's verdicts in the default store, for the page of all claims; return their table. `seeds` are those of its
    networks (None: the settings'); a verdict with one number for each has them. Raises OSError."""
    seeds = tuple(settings.seeds if seeds is None else seeds)
    for verdict in verdicts:
        if not verdict.seeds and len(verdict.values) == len(seeds):
            verdict = replace(verdict, seeds=seeds)
        with writing(_folder(settings) / f"{verdict.key}.json") as partial:
            partial.write_text(json.dumps({"claim": asdict(verdict.claim), "values": verdict.values, "seeds": verdict.seeds}))
    return table(verdicts)


def gathered(settings: Settings) -> list[Verdict]:
    """The verdict on every claim under these settings: "not tested" if its chapter has not run, or if the claim is now measured
    otherwise."""
    found = []
    for key, claim in CLAIMS.items():
        try:
            book = json.loads((_folder(settings) / f"{key}.json").read_text())
            same = book["claim"]["measure"] == claim.measure
            found.append(Verdict(claim, tuple(book["values"]), tuple(book["seeds"])) if same else Verdict(claim, ()))
        except (OSError, ValueError, KeyError):
            found.append(Verdict(claim, ()))
    return found


def _folder(settings: Settings):
    return default_root() / "claims" / settings.digest


def load(text: str) -> dict[str, Claim]:
    """Claims by key, from TOML text. Raises ValueError for a key that is given twice, TypeError for an unknown field."""
    return {key: Claim(key, **fields) for key, fields in tomllib.loads(text).items()}


CLAIMS = load("\n".join(files("ihbook.chapters").joinpath(name).read_text(encoding="utf-8")
                        for name in ("claims.toml", "predictions.toml")))
