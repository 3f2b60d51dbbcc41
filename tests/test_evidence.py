"""Evidence: intervals, verdicts, columns in files, and the recorded columns."""

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import DATA

from ihbook.__main__ import main
from ihbook.chapters import claims, evidence
from ihbook.chapters.claims import Claim, Verdict, judge
from ihbook.chapters.experiments import Settings

BOOK = Path(__file__).parents[1] / "book"
AT_MOST_1 = Claim("x", "–", "It is at most 1", "", "a number", high=1.0, direction_high=2.0)


@pytest.mark.parametrize("values, word", [
    ([0.8, 0.9, 0.95], "holds"), ([0.8, 0.9, 1.2], "undecided"), ([1.1, 1.2, 1.3], "direction only"), ([1.1, 1.2, 2.3], "differs"),
    ([3, 4, 5], "differs"), ([0.9], "holds"), ([1.5], "direction only"), ([math.nan, 2.5], "differs"), ([math.nan], "not tested"),
    ([1.1, 1.2, math.inf], "differs"), ([0.9, 0.9, 0.9], "holds"), ([0.9, math.inf, math.inf], "undecided")])
def test_the_whole_interval_decides(values, word):
    assert judge(AT_MOST_1, values).word == word
    mirrored = Claim("y", "–", "", "", "", low=-1.0, direction_low=-2.0)
    assert judge(mirrored, [-v for v in values]).word == word
    checked = replace(AT_MOST_1, check=True)
    assert judge(checked, values).word == ("check" if word == "holds" else word)


def test_an_interval_is_of_the_median_over_seeds():
    """Compared with every one of the 3^3 equally likely samples of three, and with what the statistics say for many seeds."""
    assert judge(AT_MOST_1, [3.0, 1.0, 2.0]).interval == (1.0, 3.0)  # a median is the least with a chance of 7 in 27
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for low, high in (judge(AT_MOST_1, list(rng.standard_normal(15))).interval for _ in range(300))]
    assert 0.90 < np.mean(covered) <= 1.0
    assert judge(AT_MOST_1, [2.0]).interval is None and judge(AT_MOST_1, [2.0, 2.0]).interval == (2.0, 2.0)
    assert judge(AT_MOST_1, [1.0, math.inf, math.inf]).interval == (1.0, math.inf)


def test_a_prediction_interval_holds_one_more_run():
    rng = np.random.default_rng(1)
    draws = rng.normal(5, 2, (4000, 9))
    inside = [low <= row[-1] <= high for row in draws for low, high in [Verdict(AT_MOST_1, tuple(row[:-1])).prediction]]
    assert abs(np.mean(inside) - 0.95) < 0.012
    verdict = Verdict(replace(AT_MOST_1, published_value=1.0), (1.0, 1.2, 0.9))
    assert verdict.published_inside is True and judge(AT_MOST_1, [1.0, 1.2]).published_inside is None
    assert Verdict(replace(AT_MOST_1, published_value=9.0), (1.0, 1.2, 0.9)).published_inside is False


def test_how_many_seeds_would_decide():
    assert judge(AT_MOST_1, [0.8, 0.9, 0.95]).n_needed is None
    values = [0.7, 0.8, 0.85, 0.9, 0.97, 1.1, 1.15]
    few = judge(AT_MOST_1, values)
    assert few.word == "undecided"
    times = few.n_needed / few.n  # as many more like these decide it, and half as many do not
    assert judge(AT_MOST_1, values * math.ceil(times)).word == "holds" and judge(AT_MOST_1, values * int(times / 2)).word == "undecided"


def test_the_best_of_several_guessers():
    rng = np.random.default_rng(2)
    best = rng.binomial(40, 0.5, (20_000, 7)).max(1) / 40
    limit = claims.best_guesser(40, 7)
    assert np.mean(best <= limit) >= 0.95 and np.mean(best <= limit - 1 / 40) < 0.95
    assert claims.best_guesser(2, 7) == 1.0 and math.isnan(claims.best_guesser(0, 7))


def test_what_a_head_fills_in_is_compared_with_its_labels():
    """A head that is as often right as on these labels elsewhere does no more than they give, and no less."""
    same, more, fewer = (200, 0.9, 0.9), (200, 0.99, 0.8), (200, 0.6, 0.9)
    assert claims.beyond_labels([same], 7) == "The head gets no more than that: labels suffice."
    words = claims.beyond_labels([same, fewer, same, more], 7)
    assert "labels suffice (in 2 of 4 networks); clearly fewer" in words and "all there is to it (in 1 of 4 networks)" in words
    assert "no more than that, and could not" in claims.beyond_labels([(5, 1.0, 0.8)], 7)  # five right of five may be luck
    assert "can't be compared" in claims.beyond_labels([(5, 1.0, math.nan)], 7)


def test_seeds_without_a_number_are_named():
    assert judge("pt-faster", [0.5, math.inf, math.nan], seeds=[5, 6, 7]).without == [6, 7]
    with pytest.raises(ValueError, match="2 numbers and 1 seeds"):
        judge("pt-faster", [0.5, 0.6], seeds=[5])


def test_every_claim_says_why_since_when_and_what_refutes_it():
    for claim in claims.CLAIMS.values():
        assert claim.why and claim.source in ("printed", "read off the figure", "a sentence", claims.PREDICTED) and claim.refuted_by
        assert claim.new == (claim.figure == "new") and not (claim.new and claim.published_value)
        assert (BOOK / f"{claim.chapter}.ipynb").exists() and f'\\"{claim.key}\\"' in (BOOK / f"{claim.chapter}.ipynb").read_text()
        assert claim.bounds and claim.bounds == tuple(sorted(claim.bounds, key=lambda line: line[:10]))
        assert f": {claim.holds_if}" in claim.bounds[-1]  # a bound that changes gets a dated line
        assert claim.direction_low <= claim.low or not claim.has_direction or claim.low == -math.inf
        assert claim.direction_high >= claim.high or not claim.has_direction or claim.high == math.inf


def some_column():
    values = {"plateau": (0.7, 0.75, math.nan), "all-pt": (0.8, math.inf, 0.9), "seeds-change": (1.0,)}
    return evidence.Column("mine", evidence.provenance(Settings("quick"), [5, 6, 7], "a command"), [
        Verdict(claim, values.get(key, ()), (5, 6, 7) if len(values.get(key, ())) == 3 else ())
        for key, claim in claims.CLAIMS.items()])


def test_a_column_is_written_as_the_schema_says_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    column = some_column()
    evidence.write(column, tmp_path / "mine.json")
    found = json.loads((tmp_path / "mine.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    jsonschema.validate(found, evidence.schema())
    jsonschema.Draft202012Validator.check_schema(evidence.schema())
    again = evidence.read(tmp_path / "mine.json")
    assert again.provenance == found["provenance"] and found["provenance"]["bank"]["digest"]
    for a, b in zip(column.verdicts, again.verdicts, strict=True):
        assert a.key == b.key and a.seeds == b.seeds and repr(a.values) == repr(b.values) and a.word == b.word
    row = next(row for row in found["claims"] if row["key"] == "all-pt")
    assert row["values"][1] == {"seed": 6, "value": "inf"} and row["n"] == 3 and row["verdict"] == column["all-pt"].word
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "claims": [{**row, "verdict": "perhaps"}]}, evidence.schema())


def test_a_column_follows_the_claims_of_today(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    evidence.write(some_column(), tmp_path / "mine.json")
    monkeypatch.setitem(claims.CLAIMS, "plateau", replace(claims.CLAIMS["plateau"], low=0.72))
    monkeypatch.setitem(claims.CLAIMS, "all-pt", replace(claims.CLAIMS["all-pt"], measure="another number"))
    found = evidence.read(tmp_path / "mine.json")
    assert found["plateau"].word == "undecided" and found["all-pt"].word == "not tested"


def test_some_chapters_can_have_more_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    old = some_column()
    more = [Verdict(claim, (0.7,) * 4 if key == "plateau" else (), (5, 6, 7, 8) if key == "plateau" else ())
            for key, claim in claims.CLAIMS.items()]
    new = evidence.Column("mine", evidence.provenance(Settings("quick"), [5, 6, 7, 8], "another"), more)
    both = evidence.merged(old, new)
    assert both["plateau"].n == 4 and both["all-pt"] == old["all-pt"] and both.provenance["seeds"] == [5, 6, 7, 8]
    assert [each["date"] for each in both.provenance["earlier"]] == [old.provenance["date"]]
    assert both.provenance["command"] == "a command; another"
    for other, what in (({"bank": {"digest": "0"}}, "digest of its bank"), ({"engine": 0}, "engine"),
                        ({"settings": {**old.provenance["settings"], "profile": "paper"}}, r"profile \(paper, not quick\)")):
        with pytest.raises(ValueError, match=f"mine: the column that is there has another {what}"):
            evidence.merged(replace(old, provenance={**old.provenance, **other}), new)


def test_networks_are_added_to_a_column(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))

    def column(values, seeds):
        return evidence.Column("mine", evidence.provenance(Settings("quick"), seeds, f"seeds {seeds[0]}"), [
            Verdict(claim, *{"plateau": (values, seeds), "seeds-learn": (values[:1], ())}.get(key, ((), ()))) for key, claim in claims.CLAIMS.items()])

    first, more, once_more = column((0.5, 0.6, 0.7), (5, 6, 7)), column((0.8, 0.9), (7, 8)), column((1.0,), (4,))
    both = evidence.merged(first, more)
    assert (both["plateau"].seeds, both["plateau"].values) == ((5, 6, 7, 8), (0.5, 0.6, 0.8, 0.9))
    assert both["seeds-learn"].values == (0.8,)  # of all networks of a call, so the two can't be one
    third = evidence.merged(both, once_more)
    assert third["plateau"].seeds == (4, 5, 6, 7, 8) and len(third.provenance["earlier"]) == 2
    assert third.provenance["command"] == "seeds 5; seeds 7; seeds 4" and third.provenance["seeds"] == [4, 5, 6, 7, 8]
    jsonschema.validate(evidence.as_json(third), evidence.schema())
    assert evidence.merged(first, column((0.1, 0.2, 0.3), (5, 6, 7)))["plateau"].values == (0.1, 0.2, 0.3)


def test_a_command_names_what_is_not_usual():
    assert evidence.command_of(Settings("quick"), [5, 6]) == "python -m ihbook evidence --bank glyphs --embedding auto --profile quick --seeds 5 6"
    assert "--dim 64 --n-sequences 640 --seeds 5 --chapters 02_phase_change" in evidence.command_of(
        Settings("quick", embedding="random", dim=64, n_sequences=640), [5], ["02_phase_change"])
    assert evidence.command_of(Settings("quick", n_labels=7), [5, 6]) == (
        "evidence.measure('book', Settings(bank='glyphs', embedding='auto', profile='quick', n_labels=7), [5, 6], 'out', chapters=[])")


@pytest.mark.parametrize("content", ["", "{}", '{"form": 99, "claims": []}', '{"form": 1, "name": "x", "provenance": {}, "claims": [1]}'])
def test_a_file_that_is_no_column_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not a column of claims.*python -m ihbook evidence"):
        evidence.read(tmp_path / "x.json")


def test_where_columns_disagree():
    a = evidence.Column("a", {}, [judge(key, claim.low if math.isfinite(claim.low) else claim.high)
                                  for key, claim in claims.CLAIMS.items()])
    b = evidence.Column("b", {}, [replace(v, values=(99.0,)) if v.key in ("plateau", "redundant") else v for v in a.verdicts])
    found = evidence.disagreements([a, b])
    assert found == {"plateau": {"a": "holds", "b": "differs"}, "redundant": {"a": "holds", "b": "differs"}}
    assert evidence.matrix([a, b]).shape == (len(claims.CLAIMS), 5)
    assert evidence.counts(a) == {"holds": len(claims.CLAIMS) - 5, "check": 5}


def test_what_moves_between_two_columns_is_seen_seed_by_seed():
    """Seeds that differ much from each other, and little between the columns, in an order of their own."""
    a = evidence.Column("a", {}, [Verdict(AT_MOST_1, (1.0, 3.0, 2.0, 5.0, 4.0, 7.0, math.nan), (5, 6, 7, 8, 9, 10, 11))])
    b = evidence.Column("b", {}, [Verdict(AT_MOST_1, (1.2, 7.2, 3.3, 2.2, 5.1, 4.3, 9.0), (5, 10, 6, 7, 8, 9, 11))])
    assert evidence.moved(a, b) == ["x"] and evidence.moved(a, a) == []
    change = evidence.differences(b, a)["x"]
    assert change.n == 6 and change.median == pytest.approx(0.2) and change.interval[0] > 0
    few = replace(b, verdicts=[replace(v, values=v.values[:5], seeds=v.seeds[:5]) for v in b.verdicts])
    assert evidence.differences(a, few) == {}


@pytest.mark.parametrize("value, words", [(1.0, "1"), (0.9, "0.9"), (1.0004, "1.0004"), (0.99999, "0.99999"), (1.00000001, "1"), (1.23456, "1.23"),
                                          (2.0004, "2.0004"), (12345.6, "12,346"), (math.inf, "∞"), (-math.inf, "−∞")])
def test_a_number_is_seen_to_lie_where_it_lies(value, words):
    assert Verdict(AT_MOST_1, (value,)).measured == words
    assert Verdict(AT_MOST_1, (value, value)).measured == f"{words} ({words} to {words})"


def test_sixteen_networks_are_two_times_eight():
    verdict = Verdict(AT_MOST_1, tuple(range(16)), tuple(range(5, 21)))
    column = evidence.Column("a", {}, [verdict, replace(verdict, values=verdict.values[:15], seeds=verdict.seeds[:15])])
    (whole, first, second), = evidence.halves(column)
    assert whole is verdict and first.values + second.values == verdict.values and first.seeds == tuple(range(5, 13))


def test_chapters_with_more_seeds_are_named():
    def of(key, n):
        return Verdict(claims.CLAIMS[key], (1.0,) * n, tuple(range(5, 5 + n)))
    some = [of("plateau", 8), of("direct", 8), of("redundant", 16), of("three-pt", 16), of("seeds-change", 0)]
    assert evidence.seeds_by_chapter(evidence.Column("a", {}, some[:3])) == "5 to 12; 5 to 20 in chapter 3"
    assert evidence.seeds_by_chapter(evidence.Column("a", {}, [*some, of("classes-b", 8)])) == "5 to 12; 5 to 20 in chapters 3, 7"
    more = [*some[:4], of("pairs", 33), of("strongest-alone", 16)]
    assert evidence.seeds_by_chapter(evidence.Column("a", {}, more)) == (
        "5 to 12; 5 to 20 in chapters 3, 7; 5 to 37 for some claims of chapter 3")


def test_what_was_asked_for_can_be_looked_up():
    def of(values):
        return Verdict(AT_MOST_1, values, tuple(range(5, 5 + len(values))))
    settled, open_still, short = of((0.7, 0.8, 0.8, 0.9, 1.05, 1.1, *(0.8,) * 40)), of((0.7, 0.8, 0.8, 0.9, 1.05, 1.1) * 8), of((0.7, 0.8, 0.8, 0.9, 1.05, 1.1))
    needed = short.n_needed
    assert 6 < needed <= 46 and settled.word == "holds"
    column = evidence.Column("a", {}, [settled, short, replace(settled, values=settled.values[:needed - 1], seeds=settled.seeds[:needed - 1])])
    assert evidence.asked_for(column, 6) == [settled]
    assert evidence.asked_for(replace(column, verdicts=[open_still]), 6) == [open_still]


RECORDED = sorted((BOOK / "evidence").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_column_is_whole(path):
    found = json.loads(path.read_text())
    jsonschema.validate(found, evidence.schema())
    assert found["name"] == path.stem and found["provenance"]["settings"]["profile"] == "paper"
    calls = [found["provenance"], *found["provenance"].get("earlier", [])]
    assert len(found["provenance"]["seeds"]) >= 8 and max(call["run_steps"] for call in calls) > 1e7
    assert all(call["commit"] and "+" not in call["commit"] for call in calls)
    column, rows = evidence.read(path), {row["key"]: row for row in found["claims"]}
    assert {verdict.key for verdict in evidence.of_paper(column).verdicts} <= rows.keys()
    for verdict in column.verdicts:
        if verdict.known:
            row = rows[verdict.key]
            assert row["verdict"] == verdict.word and row["median"] in (statistics.median(verdict.known), "inf")


def test_predictions_stand_apart_from_the_papers_claims():
    column = some_column()
    paper, new = evidence.of_paper(column), evidence.of_predictions(column)
    assert len(paper.verdicts) == 62 and len(paper.verdicts) + len(new.verdicts) == len(claims.CLAIMS)
    assert set(evidence.matrix([paper])["figure"]).isdisjoint({"new"}) and set(evidence.matrix([new])["figure"]) == {"new"}
    assert list(claims.table(new.verdicts)) == ["prediction", "verdict", "measured", "n", "what is measured: when it holds"]
    assert "published" in claims.table(paper.verdicts) and sum(evidence.counts(new).values()) == len(new.verdicts)


def test_bad_questions_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    for words, message in ((["--seeds", "5"], "at least two"), (["--seeds", "5", "5"], "at least two"), (["--book", str(tmp_path)], "no chapters"),
                           (["--chapters", "99_none"], "99_none"), (["--dim", "64"], "dim=64.*embedding='random'"),
                           (["--bank", "authors", "--bank-path", "/nowhere.h5"], "/nowhere.h5"),
                           (["--chapters", "03_many_heads", "04_wirng"], "called 04_wirng; .* 04_wiring"),
                           (["--out", str(BOOK / "evidence" / "glyphs.json")], r"glyphs: .* another profile \(paper, not quick\)"),
                           (["--seeds", "5", "7", "--chapters", "10_seeds"], "consecutive")):
        with pytest.raises(SystemExit) as stop:
            main(["evidence", "--profile", "quick", "--book", str(BOOK), "--out", str(tmp_path / "x.json"), *words])
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_a_part_of_a_column_is_measured_again(tmp_path, monkeypatch):
    """By the command, at the quick profile, and compared with what it gave before; a second call runs nothing."""
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    asked = ["evidence", "--profile", "quick", "--seeds", "5", "6", "--chapters", "02_phase_change", "06_toy_model",
             "--book", str(BOOK), "--out",
             str(tmp_path / "quick.json")]
    assert main(asked) == 0
    found, before = evidence.read(tmp_path / "quick.json"), evidence.read(DATA / "quick_column.json")
    assert found.provenance["bank"] == before.provenance["bank"]
    points = [json.loads(path.read_text()) for path in (tmp_path / "evidence" / "glyphs").rglob("claims.json")]
    assert len(points) == 3  # two seeds, and the toy model's ten draws
    for point in points:  # what every sweep writes
        jsonschema.validate(point, evidence.schema())
    commands = {point["provenance"]["command"] for point in points}  # each point's own parameters, also the toy model's
    assert "papermill book/06_toy_model.ipynb out.ipynb -p profile paper -p seed 1" in commands and len(commands) == 3
    compared = 0
    for verdict in before.verdicts:
        if verdict.known:
            assert found[verdict.key].seeds == verdict.seeds == ((5, 6) if len(verdict.values) == 2 else tuple(range(1, 11)))
            np.testing.assert_allclose(found[verdict.key].values, verdict.values, rtol=0.25, atol=0.02)  # machines round differently
            compared += 1
    assert compared == 11
    monkeypatch.setattr(evidence.sweep, "execute", lambda *args: pytest.fail("a finished point was run again"))
    assert main(asked) == 0
