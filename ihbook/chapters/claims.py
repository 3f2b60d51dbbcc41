"""What the paper claims, as values: how each claim is measured, when it holds, and what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import pandas as pd

from ihbook.chapters.experiments import Settings
from ihbook.engine.store import default_root
from ihbook.files import writing


@dataclass(frozen=True)
class Claim:
    """A published claim. It holds where the median over seeds of what is measured lies from `low` to `high`.

    Where a number near nothing was published, up to three times as much holds.
    """

    key: str
    figure: str
    sentence: str
    published: str
    measure: str
    low: float = -math.inf
    high: float = math.inf

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
        """holds, differs, or not tested: where no seed gave a number."""
        known = [v for v in self.values if not math.isnan(v)]
        if not known:
            return "not tested"
        return "holds" if self.claim.low <= median(known) <= self.claim.high else "differs"

    @property
    def measured(self) -> str:
        """The median over seeds, and their range."""
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
    """Times (NaN: never) over others: infinite where only the first never came, NaN (nothing is told) where the second did not."""
    return [math.nan if math.isnan(b) else math.inf if math.isnan(a) else a / b for a, b in zip(times, to, strict=True)]


def judge(claim: str | Claim, values: float | Sequence[float]) -> Verdict:
    """The verdict on a claim of the book, by its key, or on one of your own, from one number per seed (NaN where a seed has none).

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
    """Keep a chapter's verdicts beside the runs that they are of, for the page of all claims; returns their table."""
    for verdict in verdicts:
        with writing(_folder(settings) / f"{verdict.key}.json") as partial:
            partial.write_text(json.dumps({"claim": asdict(verdict.claim), "values": verdict.values}))
    return table(verdicts)


def gathered(settings: Settings) -> list[Verdict]:
    """The verdict on every claim under these settings; "not tested" where no chapter has run, or where the claim has changed."""
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


def by_key(claims: Sequence[Claim]) -> dict[str, Claim]:
    """Claims by their keys. Raises ValueError where two have one key: the one would be lost."""
    found = {claim.key: claim for claim in claims}
    if len(found) < len(claims):
        keys = [claim.key for claim in claims]
        raise ValueError(f"two claims have the key {next(key for key in keys if keys.count(key) > 1)!r}; give each its own")
    return found


CLAIMS = by_key((
    # Chapter 2
    Claim("plateau", "3a", "The training loss waits a little above ln 2", "0.69 at 1.6e5",
          "median loss in the second quarter of the time to the phase change", 0.67, 0.84),
    Claim("drop", "3a", "Then it drops", "0.69 to 0.35 from 1.6e5 to 2.6e5",
          "how much faster it falls in the half around the phase change than in the second quarter", 2.0),
    Claim("final-loss", "3a", "The training loss ends near nothing", "0.003", "training loss at the end", high=0.009),
    Claim("relabel", "3a", "Held-out label pairs are solved too", "0.03", "loss on test_relabel at the end", high=0.09),
    Claim("classes", "3a", "Held-out classes are solved too", "0.12", "loss on test_classes at the end", high=0.36),
    Claim("several-heads", "3b", "More than one head becomes an induction head", "6 above 0.3",
          "heads of Layer 2 with strength above 0.3", 2),
    Claim("together", "3b", "The heads rise together", "all from 1.5e5",
          "time at which the first strong head is half-way up, over that of the last", 0.6),
    Claim("with-change", "3b", "and with the phase change", "all from 1.5e5",
          "time at which the last is half-way up, over that of the phase change", 0.5, 1.5),
    # Chapter 3
    Claim("redundant", "4a", "No single ablation costs much", "≤ 0.01", "largest loss of accuracy by ablating one head", high=0.03),
    Claim("strongest-alone", "4a", "The strongest head does nearly all alone", "0.980",
          "accuracy with all but the strongest head ablated", 0.85),
    Claim("strength-accuracy", "4a", "Strength tells how well a head does alone", "rank correlation .95",
          "rank correlation of strength and only-one accuracy", 0.8),
    Claim("additive", "14", "Heads add up: each that is switched on lowers the loss", ".117 .043 .010 .005 .003 .002 .002",
          "largest ratio of a loss to the one before, the strongest heads first", high=1.0),
    Claim("others-do", "14", "Without the strongest head the others do most of its work", ".03",
          "loss with six of the seven others on, nats", high=0.09),
    Claim("complement", "T2", "Other heads are right where the strongest alone is wrong", ".717 at best",
          "largest share of its mistakes that another head alone gets right, chance among two being 0.5", 0.55),
    Claim("each-learns", "4b", "Every head learns alone", "8 of 8", "share of the heads that fall below 0.4 ln 2 alone", 1),
    Claim("alone-slower", "4b", "Each alone is slower than the eight together", "all slower",
          "time of the fastest head alone, over that of the eight", 1.0),
    Claim("pairs", "17", "The strongest head and one other come close to the full network", "all close",
          "time of the slowest of the seven pairs, over that of the eight heads", high=1.25),
    # Chapter 4
    Claim("direct", "§3", "Layer 1's direct connection to the output does not matter", ".99999 to .99986",
          "accuracy lost by ablating Layer 1, patterns and values preserved", high=0.001),
    Claim("pt-patterns", "T1", "Previous-token heads do not serve by the values", ".9985",
          "accuracy without the previous-token heads, patterns preserved", 0.9),
    Claim("pt-values", "T1", "Previous-token heads serve by the patterns", ".6987",
          "accuracy without the previous-token heads, values preserved", high=0.9),
    Claim("others-values", "T1", "The other heads do not serve by the patterns", ".9932",
          "accuracy without the other heads, values preserved", 0.9),
    Claim("others-patterns", "T1", "The other heads serve by the values", ".3427",
          "accuracy without the other heads, patterns preserved", high=0.9),
    Claim("direct-early", "12", "Layer 1's direct connection serves early", ".1 to .16",
          "largest loss added by cutting it, before the phase change, nats", 0.03),
    Claim("direct-late", "12", "and not after the phase change", "0", "loss added by cutting it at the end, nats", -0.02, 0.03),
    Claim("layer2-direct", "12", "Layer 2's direct connection serves more and more", ".4 to 1.9",
          "loss added by cutting it at the end, over that half-way to the phase change", 2.0),
    # Chapter 6
    Claim("toy-plateau", "5a", "With nothing clamped, a plateau and then a sharp drop", "plateau, drop",
          "iterations to half the plateau's loss, over those from there to a tenth, of draws that leave the plateau", 1.5),
    Claim("toy-shorter", "5a", "With c clamped, a shorter plateau", "shorter",
          "iterations to half the plateau's loss, over those with nothing clamped", high=0.8),
    Claim("toy-exponential", "5a", "With b and c clamped, plain exponential decay", "exponential",
          "iterations from a half of that loss to a quarter, over those from a quarter to an eighth", 0.8, 1.25),
    # Chapter 7
    Claim("single-plateau", "5b", "Unclamped, a single head waits on a plateau", "to 2e5",
          "how much faster the loss falls in the half around the phase change than in the second quarter of the time to it", 2.0),
    Claim("match-fast", "5b", "With the match clamped there is no plateau", "0.04 at 1e5",
          "time of the phase change, over the unclamped run's", high=0.4),
    Claim("layer1copy-fast", "5b", "With Layer 1 and the copy clamped there is none either", "0.04 at 1e5",
          "time of the phase change, over the unclamped run's", high=0.4),
    Claim("layer1-faster", "5b", "With Layer 1 clamped learning is faster", "0.16 at 1e5",
          "time of the phase change, over the unclamped run's", high=0.8),
    Claim("copy-faster", "5b", "With the copy clamped learning is faster", "0.08 at 1e5",
          "time of the phase change, over the unclamped run's", high=0.8),
    Claim("pt-faster", "5b", "With one previous-token head clamped learning is faster", "0.33 at 2e5",
          "time of the phase change, over the unclamped run's", high=0.9),
    Claim("progress-late", "10", "What a subcircuit had learnt comes later than it can be learnt", "late",
          "time at which the measure under the match clamp falls, over that of the run trained with it", 2.0),
    Claim("progress-with", "10", "and with the phase change", "with the phase change",
          "time at which the measure under the match clamp falls, over that of the phase change", 0.5, 1.2),
    Claim("graft-own", "7", "On its own trained Layer 1 the loss falls at once", "at once",
          "time of the phase change, over the standard run's", high=0.4),
    Claim("graft-others", "7", "On another network's Layer 1 there is no plateau", "no plateau",
          "how much faster the loss falls in the half around the phase change than in the second quarter of the time to it",
          high=2.0),
    Claim("graft-early", "7", "but early on learning is slower than the standard run's", "slower",
          "loss at 50,000 sequences less the standard run's, nats", 0.0),
    Claim("which-pt", "8", "Which head is clamped to the previous token hardly matters", "hardly",
          "time with one head, over that with another", 0.8, 1.25),
    Claim("three-pt", "8", "Three such heads are faster", "faster", "time with three, over that with one", high=0.9),
    Claim("all-pt", "8", "All eight are much slower than none", "much slower", "time with eight, over that with none", 1.2),
    # Chapter 8
    Claim("classes-slower", "6", "More classes delay the phase change a little", "×1.4 for 200 classes",
          "time with four times the classes, over that with the fewest", 1.1, 2.2),
    Claim("labels-slower", "6", "More labels delay it much", "×4.8 for 15 labels",
          "time with three times the labels, over that with the fewest", 2.0),
    Claim("classes-b", "6", "More classes slow the match (B)", "slower",
          "time of B alone with four times the classes, over that with the fewest", 1.1),
    Claim("classes-c", "6", "and hardly the copy (C)", "same", "the same of C alone", 0.9, 1.1),
    Claim("labels-c", "6", "More labels slow the copy (C)", "slower",
          "time of C alone with three times the labels, over that with the fewest", 1.5),
    Claim("labels-b", "6", "and not the match (B)", "same", "the same of B alone, which no label enters", 0.9, 1.1),
    # Chapter 9
    Claim("stronger-faster", "15", "A head whose match is held stronger learns faster", "faster",
          "rank correlation of strengths from 0 up with the time of the phase change", high=-0.9),
    Claim("negative-learns", "15", "Matches that are nearly always wrong learn as well", "as well",
          "lowest accuracy on training sequences at the end, strengths −1 to −0.6", 0.9),
    Claim("negative-fails", "15", "but fail with new pairs of labels", "fails test_relabel",
          "accuracy on training sequences less that on test_relabel, the median of strengths −1 to −0.6", 0.2),
    Claim("perfect-strongest", "16", "With a perfect match the strongest head alone is right", ".999", "its accuracy", 0.95),
    Claim("perfect-others", "16", "A perfect match is not enough for every head: copies differ", ".285",
          "the worst head's accuracy alone, its match perfect", high=0.8),
    Claim("some-labels", "16", "Most heads copy some labels badly", "each",
          "share of the other heads that get less than half of some label right, their match perfect", 0.5),
    Claim("others-copy", "T3", "What the strongest copies badly another copies well", ".862",
          "largest share of its mistakes that another head gets right, all matches perfect", 0.55),
    # Chapter 10
    Claim("seeds-change", "18", "The phase change comes with every seed", "seeds 5 to 9", "share of the seeds", 1),
    Claim("seeds-several", "18", "More than one head becomes strong with every seed", "seeds 5 to 9",
          "share of the seeds with two or more heads stronger than 0.3", 1),
    Claim("seeds-learn", "18", "Every head learns alone with every seed", "seeds 5 to 9", "share of the seeds", 1),
    Claim("seeds-which", "18", "Which head is the strongest varies", "varies", "different heads that are a seed's strongest", 2),
    Claim("seeds-accuracy", "18", "Strength tells a head's accuracy alone", "closely; .95 for seed 5",
          "rank correlation of strength and accuracy alone", 0.8),
    Claim("seeds-loss", "18", "and its loss alone", "closely", "rank correlation of strength and loss alone", high=-0.8),
    Claim("seeds-time", "18", "and hardly how fast it learns alone", "hardly; .26 for seed 5",
          "rank correlation of strength and time alone, without its sign", high=0.5),
))
