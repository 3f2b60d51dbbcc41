"""The book: notebooks run with other parameters, name bad parameters, and build into pages."""

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from statistics import median

import h5py
import jsonschema
import nbformat
import numpy as np
import papermill
import pytest
from conftest import BUILD, ROOT, TOOLS, copy_of_the_book, shared

from ihbook.chapters import evidence, pages
from ihbook.chapters.claims import CLAIMS, PREDICTED

CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))


@pytest.fixture(scope="module")
def store(quick):
    """The store of the quick profile, for every notebook executed here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick.items():
            patch.setenv(name, value)
        yield Path(os.environ["IHBOOK_STORE"])


def execute(name, tmp_path, parameters, wanted="None"):
    """Run a chapter from another folder; return the value of the expression `wanted` in it, passed as JSON."""
    notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print('WANTED' + json.dumps({wanted}))"))
    nbformat.write(notebook, tmp_path / "in.ipynb")
    out = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", parameters, kernel_name="python3",
                                     progress_bar=False, cwd=tmp_path)
    text = "".join(o["text"] for o in out.cells[-1].outputs if o.get("name") == "stdout")
    return json.loads(text.split("WANTED")[1])


PUBLISHED = ["3a", "3b", "§3", "4a", "13", "T2", "4b", "17", "5a", "9", "5b", "10", "7", "8", "6", "11", "T1", "12", "14", "15", "16",
             "T3", "18"]  # the paper's figures and tables


def test_every_figure_and_table_of_the_paper_is_in_the_book():
    headings = [line for path in CHAPTERS for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"
                for line in cell.source.splitlines() if line.startswith("#")]
    found = {claim.figure for claim in CLAIMS.values()}
    for line in headings:
        for kind, rest in re.findall(r"(Figure|Table)s?\s([^)]*)", line):
            found |= {("T" if kind == "Table" else "") + name for name in re.findall(r"\d+[a-z]?", rest)}
    assert set(PUBLISHED) <= found, set(PUBLISHED) - found


def test_the_list_above_is_that_of_the_specification():
    rows = re.findall(r"^\| ([^|]+?) \| ", shared("spec/experiments.md").read_text().split("## 4.")[1], re.MULTILINE)
    ids = [name.removesuffix(" text") for row in rows for name in row.split(", ")]
    assert sorted(set(ids) - {"id"}) == sorted(PUBLISHED)


# A notebook defines a model, clamp or metric only where it teaches how to.
TAUGHT = {"05_clamping": ["class Uniform:", "class Before:"],
          "extending": ["class Borrow:", "class Margin:", "class Match:", "class TwoBack:"]}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    classes = [line for cell in code for line in cell.source.splitlines() if line.lstrip().startswith("class ")]
    assert classes == TAUGHT.get(path.stem, [])
    subprocess.run([TOOLS / "nbstripout", "--keep-id", "--verify", str(path)], check=True)


@pytest.mark.slow
def test_01_with_other_parameters(tmp_path):
    parameters = {"n_labels": 10, "n_classes": 20, "seed": 3}
    found = execute("01_task", tmp_path, parameters, "[len(everything), len(splits.test_sets), right.item()]")
    assert found[:2] == [20 * 19 * 36 * 2 * 2, 9] and 0.9 < found[2] < 1
    assert execute("01_task", tmp_path, {"bank": "onehot"}, "right.item()") == 1.0


VERDICTS = "{v.key: [v.word, *v.values] for v in verdicts}"


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_02_finds_the_phase_change_of_each_seed(tmp_path, store):
    wanted = "[int(last), [r.run.init_seed for r in results], changes['phase change'].tolist(), strengths]"
    parameters = {"seed": 7, "n_seeds": 2}
    last, seeds, changes, strengths = execute("02_phase_change", tmp_path, parameters, wanted)
    assert (last, seeds, len(strengths)) == (64_000, [7, 8], 8)
    assert all(6_000 < change < 40_000 for change in changes) and max(strengths) > 0.5
    trained = len(list(store.glob("runs/*/manifest.json")))
    assert execute("02_phase_change", tmp_path, parameters, wanted) == [last, seeds, changes, strengths]
    assert len(list(store.glob("runs/*/manifest.json"))) == trained  # read back


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_02_of_another_task_and_network(tmp_path, store):
    parameters = {"n_labels": 10, "n_sequences": 9_600, "n_layers": 3, "mlp_ratio": 1.0, "n_heads": 4, "positions": "learned",
                  "n_pairs": 4, "burstiness": 2, "noise": 0.1, "zipf": 0.5, "bank": "authors", "bank_path": str(tmp_path / "mine.h5"),
                  "dim": 64, "n_classes": 30, "n_test_classes": 30}
    with h5py.File(tmp_path / "mine.h5", "w") as file:  # a bank of the reader's own, as Extending says
        file["resnet18/224/feat"] = np.random.default_rng(0).standard_normal((60, 5, 64)).astype("float32")
    wanted = f"[int(last), result.weights.n_labels, end['loss']['train'], layer, len(strengths), {VERDICTS}]"
    last, n_labels, loss, layer, n_heads, verdicts = execute("02_phase_change", tmp_path, parameters, wanted)
    assert (last, n_labels, n_heads) == (9_600, 10, 4) and 0.5 < loss < 2.4 and layer in (1, 2)
    assert {word for word, *_ in verdicts.values()} == {"not tested"}  # no phase change yet


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_05_gradients_stop_where_something_is_clamped(tmp_path, store):
    norms, times = execute("05_clamping", tmp_path, {"seed": 6}, "[norms.to_dict('index'), {n: metrics.phase_change("
                                                               "r.metrics) for n, r in zip(windows, trained)}]")
    zero = {name: {part for part, norm in row.items() if norm == 0} for name, row in norms.items()}
    its = {"its queries", "its keys", "its values", "its output"}
    assert zero == {"nothing": set(), "Ablate this head": its, "Induction": {"its queries", "its keys"},
                    "PerfectLayer1": {"the layer before"},
                    "Copy": {"its values", "its output", "unembedding"},
                    "PerfectLayer1 and Copy": {"its values", "its output", "the layer before", "unembedding"}}
    assert times["always"] < times["never"]


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_06_with_other_parameters(tmp_path, store):
    parameters = {"n_seeds": 3, "n_dims": 10, "seed": 11}
    found = execute("06_toy_model", tmp_path, parameters, "[times.values.tolist(), list(times), found['run'].nunique()]")
    rows = [dict(zip(found[1], row, strict=True)) for row in found[0]]
    assert found[2] == 3 and median(row["b and c clamped"] for row in rows) < median(row["c clamped"] for row in rows)
    assert all(not row["nothing clamped"] <= row["c clamped"] for row in rows)  # later, or never


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_07_orders_the_clamped_runs_as_the_paper_does(tmp_path, store):
    times, fair, graft = execute("07_subcircuits", tmp_path, {"seed": 6}, "[times.iloc[0].to_dict(), fair.iloc[0].to_dict(), {s: "
                                 "metrics.phase_change(r.metrics) for s, r in grafts.items()}]")
    assert max(times[n] for n in ("match", "copy", "layer 1", "layer 1 and copy")) < 0.5 * times["nothing"]
    assert times["previous token"] < times["nothing"]
    assert times["layer 1 and copy"] < times["layer 1"] and times["match"] < times["layer 1"]
    assert graft["6"] < min(graft["7"], graft["8"])
    assert fair["copy"] == pytest.approx(times["copy"], rel=1e-3)  # labels out of context are masked already
    assert fair["match"] < 0.9 * times["match"]


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_04_finds_the_wiring_of_another_seed(tmp_path, store):
    verdicts, n, heads = execute("04_wiring", tmp_path, {"seed": 6}, f"[{VERDICTS}, len(order), sorted(order)]")
    assert n == 8 and heads == list(range(8))
    for key in ("direct", "pt-patterns", "pt-values", "direct-late", "layer2-direct"):
        assert verdicts[key][0] == "holds", (key, verdicts[key])


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_09_of_another_seed(tmp_path, store):
    times, perfect, labels, verdicts = execute("09_match_and_copy", tmp_path, {"seed": 6}, f"[list(times.items()), "
                                               f"[computed.tolist(), perfect.tolist()], accuracy.shape, {VERDICTS}]")
    times = dict(times)
    assert times[1] < times[.8] < times[.6] and times[0] < times[.3] and labels == [8, 5]
    assert max(perfect[1]) > max(perfect[0]) - 1e-3 and sum(perfect[1]) > sum(perfect[0])  # a better match helps, on the whole
    assert verdicts["negative-learns"][0] == verdicts["negative-fails"][0] == "holds"


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["03_many_heads", "04_wiring", "07_subcircuits", "08_data_properties", "09_match_and_copy",
                                  "10_seeds", "11_critical_windows", "12_who_wins", "13_scale"])
def test_a_run_too_short_for_a_phase_change_says_so(tmp_path, store, name):
    """The chapter also takes other numbers of heads and pairs."""
    parameters = {"n_sequences": 320, "n_seeds": 2, "n_heads": 4, "n_pairs": 3}
    verdicts = execute(name, tmp_path, parameters, VERDICTS)
    assert {word for word, *_ in verdicts.values()} == {"not tested"}
    assert name != "07_subcircuits" or len(verdicts["graft-own"]) == 3  # the word, and both networks on their own Layer 1


@pytest.mark.parametrize("name, parameters, words", [
    ("02_phase_change", {"n_labels": 1}, "n_labels=1"),
    ("02_phase_change", {"n_classes": 1600}, "n_classes=1600"),
    ("02_phase_change", {"n_sequences": 0}, "n_sequences=0"),
    ("02_phase_change", {"bank": "klingon"}, "bank='klingon'"),
    ("02_phase_change", {"bank": "authors", "bank_path": "/nowhere.h5"}, "/nowhere.h5"),
    ("02_phase_change", {"seed": -1}, "seed=-1"),
    ("03_many_heads", {"n_seeds": 0}, "n_seeds=0"),
    ("04_wiring", {"profile": "fast"}, "profile='fast'"),
    ("06_toy_model", {"n_dims": 0}, "n_dims=0"),
    ("07_subcircuits", {"device": "tpu"}, "device='tpu'"),
    ("08_data_properties", {"n_labels": 2.5}, "n_labels=2.5"),
    ("claims", {"bank": 3}, "bank=3"),
    ("01_task", {"n_labels": "five"}, "n_labels='five'"),
    *((name, {"n_layers": 3}, "n_layers=3: this chapter takes Layer 1 and Layer 2 apart") for name in
      ("03_many_heads", "04_wiring", "05_clamping", "07_subcircuits", "08_data_properties", "09_match_and_copy", "10_seeds", "11_critical_windows", "12_who_wins", "explore")),
    ("11_critical_windows", {"starts": (2,)}, r"starts=(2,) must be a list of numbers from 0 to 1"),
    ("11_critical_windows", {"lengths": ()}, "lengths=()"), ("13_scale", {"along": ["five layers"]}, "along='five layers'"),
    ("03_many_heads", {"n_heads": 1}, "n_heads=1: this chapter compares heads"),
    ("02_phase_change", {"n_heads": 7}, "n_heads=7 must divide"), ("02_phase_change", {"positions": "alibi"}, "positions='alibi'"),
    ("02_phase_change", {"n_pairs": 6}, "n_pairs=6"), ("04_wiring", {"mlp_ratio": -1}, "mlp_ratio=-1"),
])
@pytest.mark.xdist_group("chapters")
def test_bad_parameters_fail_with_the_named_error(store, name, parameters, words):
    """The error comes from the first cells, before anything is trained; only these are executed here."""
    code = [cell for cell in nbformat.read(ROOT / "book" / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    first = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", ()))
    names: dict = {}
    exec(code[first].source, names)
    assert set(parameters) <= set(names)
    names |= parameters
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        for cell in code[first + 1:first + 3]:
            exec(cell.source, names)
    assert words in str(error.value)


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_the_examples_of_extending_do_what_the_page_says(tmp_path, built, store):
    wanted = ("[[experiments.loss_at(r, settings.n_sequences) for r in trained], steered, margin['value'].tolist(), "
              "sorted(set(with_sets.metrics['eval_set'])), on_signs.weights.d_exemplar, deep['three layers'].run.model.n_layers, "
              "verdicts[0].word]")
    alone_and_borrowed, steered, margins, eval_sets, dim, n_layers, word = execute("extending", tmp_path, {}, wanted)  # the runs of the book's build
    assert alone_and_borrowed[1] < alone_and_borrowed[0]  # in training, a borrowed match helps
    assert dim == 64 and n_layers == 3 and word in ("holds", "differs") and max(margins) > min(margins) + 1
    assert {"both_new", "pair 1 matches", "pair 2 matches", "train"} < set(eval_sets)
    toward, away = ([row[name] for row in steered] for name in ("answers 3", "answers 0"))
    assert toward == sorted(toward) and toward[-1] > 0.5 and away == sorted(away, reverse=True) and away[-1] < 0.05


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_a_bad_parameter_fails_papermill(tmp_path, store):
    with pytest.raises(papermill.PapermillExecutionError, match="profile='fast'"):
        execute("04_wiring", tmp_path, {"profile": "fast"})


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_the_book_builds(built):
    root, log = built
    assert "run-step" in log and "loss" in log  # the progress of training
    texts = {p.stem: p.read_text() for p in root.glob("*.html")}
    assert {path.stem for path in CHAPTERS} | {"bibliography", "index"} <= texts.keys()
    for path in CHAPTERS:
        page = texts[path.stem]
        few = path.stem in ("scale", "extending")
        assert path.stem in ("claims", "differs") or (page.count('alt="') > (not few) and 'src="data:image/png;base64,' in page)
        assert "Traceback" not in page and "run-step/s" not in page  # nothing of the progress bar is left
    found = json.loads((root / "claims.json").read_text())  # the page's numbers, for machines
    jsonschema.validate(found, evidence.schema())
    words = Counter(row["verdict"] for row in found["claims"] if row["source"] != PREDICTED)
    # One claim can't be tested where the strongest head makes no mistakes (Table 3).
    assert words["not tested"] <= 1 and words["holds"] + words["check"] >= 0.8 * sum(words.values())
    assert len(found["claims"]) == len(CLAIMS) and all(row["verdict"] != "not tested" for row in found["claims"] if row["source"] == PREDICTED)
    assert found["provenance"]["settings"]["profile"] == "quick" and found["provenance"]["run_steps"] > 50_000
    assert all(f">{row['claim']}<" in texts["claims"] for row in found["claims"] if "'" not in row["claim"])


def solutions(notebook):
    """The cells between the beginning and the end of each solution, by the exercise's label."""
    found, label = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if "{solution-end}" in cell.source:
                label = None
            if "{solution-start}" in cell.source:
                label = re.findall(r"\{solution-start\} (\S+)", cell.source)[-1]
                found[label] = []
        elif label:
            found[label].append(cell)
    return found


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_exercise_has_a_solution_whose_answer_is_checked(path):
    notebook = nbformat.read(path, 4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    labels = re.findall(r":label: (\S+)", text)
    found = solutions(notebook)
    assert list(found) == labels and len(set(labels)) == len(labels)
    assert len(labels) >= (2 if path.stem[:2].isdigit() else 0)
    assert text.count("*Hint:*") == len(labels)
    for label, cells in found.items():
        assert label.startswith(path.stem[:2]) and any("assert " in cell.source for cell in cells), label


@pytest.mark.xdist_group("book")
@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CHAPTERS if "{solution-start}" in path.read_text()], ids=lambda p: p.stem)
def test_solutions_run(path, tmp_path, quick, built, monkeypatch):
    """Also those that are too long for the pages, from the networks that the book's build has trained."""
    for name, value in quick.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.metadata["tags"] = [tag for tag in cell.metadata.get("tags", ()) if tag != "skip-execution"]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False, cwd=tmp_path)


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_pages_say_their_answers(built):
    root, _ = built
    for path in CHAPTERS:
        page = (root / f"{path.stem}.html").read_text()
        asked = "pages.nutshell()" in path.read_text()
        assert page.count('class="admonition tip nutshell"') == asked and pages.WAITING not in page, path.stem
        assert asked or not path.stem[:2].isdigit()
    front = (root / "intro.html").read_text()
    for chapter, words in pages.HEADLINES.items():
        assert f'href="{chapter}.html">{words.title}' in re.sub(r"</?(span|em)[^>]*>", "", front), chapter


@pytest.mark.xdist_group("chapters")
@pytest.mark.slow
def test_a_failing_cell_fails_the_build(tmp_path, store):
    root = copy_of_the_book(tmp_path)
    (root / "book/02_phase_change.ipynb").unlink()
    (root / "book/_toc.yml").write_text("format: jb-book\nroot: intro\nchapters:\n  - file: 01_task\n")
    notebook = nbformat.read(root / "book/01_task.ipynb", 4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell("raise ArithmeticError('this cell fails')"))
    nbformat.write(notebook, root / "book/01_task.ipynb")
    done = subprocess.run(BUILD, cwd=root, capture_output=True, text=True)
    assert done.returncode != 0 and "this cell fails" in done.stdout + done.stderr
