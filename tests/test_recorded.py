"""Tables that are recorded once: written whole, read with what they had, and refused by name."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from ihbook.chapters import evidence, recorded, scaling, windows
from ihbook.chapters.experiments import Settings

BOOK = Path(__file__).parents[1] / "book"

TABLE = pd.DataFrame({"clamp": ["match", "copy"], "start": [0, 0.5], "ratio": [math.inf, 0.25], "net": [math.nan, 0.1], "run": [5, 6]})


@pytest.mark.parametrize("folder", [BOOK, BOOK.parent])
def test_a_page_finds_its_tables_from_the_root_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert recorded.read("scale") and {column.name for column in evidence.columns("evidence")} >= {"glyphs", "gaussian"}


def test_a_table_comes_back_as_it_was(tmp_path, monkeypatch):
    settings = Settings("quick", n_seeds=2)
    runs = [settings.run(nth=i) for i in range(2)]
    recorded.write(tmp_path / "new", "windows", TABLE, settings, runs, "papermill …")
    monkeypatch.chdir(tmp_path)
    assert recorded.read("windows") is None
    found = recorded.read("windows", tmp_path / "new")
    pd.testing.assert_frame_equal(found.table, TABLE)
    assert found.provenance["seeds"] == [5, 6] and found.provenance["run_steps"] == 2 * 64_000 // 32 and found.provenance["runs"] == 2
    assert "seeds 5 to 6" in found.origin and found.origin.endswith("`papermill …`.") and found.provenance["bank"]["digest"]
    assert recorded.read("factorial", tmp_path / "new") is None


@pytest.mark.parametrize("content", ["", "{}", '{"form": 99, "name": "x"}', '{"form": 1, "name": "y", "provenance": {}, "columns": [], "rows": []}',
                                     '{"form": 1, "name": "x", "provenance": {}, "columns": ["a"], "rows": [[1, 2]]}'])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not a recorded table.*restore it"):
        recorded.read("x", tmp_path)


FOLLOWED = {f"{kind}-{column.name}": column for column in evidence.columns(BOOK / "evidence") for kind in ("eight-heads", "wrong-match")}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_on_a_column_is_of_its_networks(name):
    """The tables of *Where we differ* give the numbers of the claims that they follow, seed by seed."""
    table, column = recorded.read(name, BOOK / recorded.FOLDER).table.set_index("seed"), FOLLOWED[name]
    assert recorded.read(name, BOOK / recorded.FOLDER).provenance["bank"]["digest"] == column.provenance["bank"]["digest"]
    if name.startswith("eight-heads"):
        verdict, found = column["all-pt"], table["all positions"] / table["none"]
    else:
        nearly = table[table["strength"] <= -0.6]
        verdict, found = column["negative-fails"], (nearly["train"] - nearly["new pairs"]).groupby("seed").median()
    expected = dict(zip(verdict.seeds, verdict.values, strict=True))
    assert len(found) >= 8 and all(found[seed] == pytest.approx(expected[seed]) for seed in found.index)


@pytest.mark.parametrize("path", sorted((BOOK / recorded.FOLDER).glob("*.json")), ids=lambda path: path.stem)
def test_a_table_in_the_book_is_whole(path):
    found = recorded.read(path.stem, path.parent)
    settings = Settings("paper")
    of = found.provenance["settings"]  # of the networks that are in it, and not of the page's
    for name, value in asdict(scaling.variant(settings, {}) if path.stem == "scale" else settings).items():
        assert name not in of or of[name] == value or path.stem in FOLLOWED and name in ("bank", "embedding", "bank_path")
    assert of["profile"] and len(found.table) and "+" not in found.provenance["commit"]
    assert f"-p keep book/{recorded.FOLDER}" in found.provenance["command"] and json.loads(path.read_text())["form"] == recorded.FORM
    if path.stem == "windows":
        assert windows.medians(found.table)["match"].notna().all().all()
