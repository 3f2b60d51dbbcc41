"""Panels show what the package computes, both in live widgets and in the script of a built page."""

import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import nbformat
import pytest
import torch
from conftest import ROOT, TOOLS, opened
from nbclient import NotebookClient

from ihbook import metrics, task, toy, train
from ihbook.banks import load_bank
from ihbook.chapters import experiments, explore, panels
from ihbook.clamps import Ablate, Copy, Induction, PerfectLayer1, Preserve, PreviousToken, run_with_clamps
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learnt little, with checkpoints; the panels need no more."""
    run = RunConfig(bank=BankConfig(n_classes=150), n_sequences=3200, eval_every=800, heads_every=800, checkpoint_every=800,
                    eval_size=100, lr=1e-3)
    [result] = train([run], directory=tmp_path_factory.mktemp("run"), progress=False)
    splits = task.split(load_bank(run.bank), run.task)
    batch = task.evaluation_sets(splits, 0, 100)["train"]
    shown = [explore.Shown(f"sequence {i}", one, None) for i, one in enumerate(batch.split(1)[:2])]
    return result, shown, batch


def find(widget, description):
    """The widget with this description, among the children at every depth."""
    inside = [widget, *(w for child in getattr(widget, "children", ()) for w in [find(child, description)] if w)]
    return next((w for w in inside[1:] if w), inside[0] if getattr(inside[0], "description", None) == description else None)


def texts(html):
    """The numbers written in a drawing."""
    return [float(text) for text in re.findall(r'class="ih-value"[^>]*>([^<]*)<', html)]


def test_a_panel_follows_its_controls_and_its_page_holds_the_same():
    calls = []
    part = panels.Part("<b>{}</b>", ("n", "s"), lambda n, s: [calls.append((n, s)) or f"{n}:{s}"])
    panel = panels.Panel([panels.Control("n", ("zero", "one"), "slider"), panels.Control("s", ("a", "b"), "switches", "01")],
                         [part], label="words")
    view = panel.children[-1]
    assert "<b>0:01</b>" in view.value and calls == [("0", "01")]
    find(panel, "n").value = 1
    find(panel, "a").value = True
    assert "<b>1:11</b>" in view.value and calls[1:] == [("1", "01"), ("1", "11")]
    page = panel._repr_mimebundle_()["text/html"]
    assert all(f'"{n}|{s}":["{n}:{s}"]' in page for n in "01" for s in ("11", "10", "01", "00"))
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()


def test_an_error_of_the_values_is_shown_and_passes():
    def values(n):
        if n == "1":
            raise ValueError("two <clamps>")
        return [n]

    panel = panels.Panel([panels.Control("n", ("zero", "one"))], [panels.Part("<b>{}</b>", ("n",), values)], label="words")
    find(panel, "n").value = 1
    assert "two &lt;clamps&gt;" in panel.children[-1].value and "<b>" not in panel.children[-1].value
    find(panel, "n").value = 0
    assert "<b>0</b>" in panel.children[-1].value
    assert '"1":{"instead":"<p class=\\"ih-error\\" role=\\"alert\\">two &lt;clamps&gt;' in panel.page  # also without a kernel


@pytest.mark.parametrize("number, text", [(0.5, ".5"), (1, "1"), (0.004, "0"), (-0.25, "-.25"), (-0.001, "0"), (10, "10"),
                                          (12.345, "12.35")])
def test_short_numbers(number, text):
    assert panels.short(number) == text


def test_scrub_shows_the_checkpoint(trained):
    result, shown, _ = trained
    panel = explore.scrub(result, shown)
    slider, chosen = panel.children[:2]
    for at, i in ((0, 0), (3, 1)):
        slider.value, chosen.value = at, i
        seen = sorted(result.checkpoints)[at]
        acts = run_with_clamps(result.checkpoints[seen], shown[i].batch)
        charts, patterns = panel.children[-2].value, panel.children[-1].value
        strength = result.heads.query(f"sequences == {seen} and layer == 1")["strength"].tolist()
        found = texts(charts)
        assert found[1:9] == pytest.approx(strength, abs=0.006)
        assert found[9:] == pytest.approx(acts.logits[0, 0].softmax(0).tolist(), abs=0.006)
        assert found[0] == pytest.approx(experiments.loss_at(result, seen), abs=0.0006)
        opacity = [float(x) for x in re.findall(r'opacity="([\d.]+)"', patterns)]
        below = torch.ones(5, 5).tril().bool()
        whole = torch.cat([acts["pattern", layer][0, 0][:, below].flatten() for layer in (0, 1)])
        assert opacity == pytest.approx(whole.tolist(), abs=0.006)


def test_scrub_needs_checkpoints(trained):
    run = RunConfig(bank=BankConfig(n_classes=150), n_sequences=64, eval_size=10)
    with pytest.raises(ValueError, match="checkpoint_every"):
        explore.scrub(train([run], progress=False)[0], trained[1])


def test_operate_computes_what_is_asked(trained):
    result, shown, batch = trained
    panel = explore.operate(result, shown, batch)
    best = next(iter(experiments.by_strength(result, batch)))

    def bars():
        return texts(panel.children[-3].value)

    def expected(*clamps):
        values = metrics.measure(result.weights, batch, [clamps])
        return pytest.approx([values["accuracy"].item(), values["loss"].item()], abs=6e-5)

    assert bars() == expected()
    find(panel, "1.3").value = False
    assert bars() == expected(Ablate((1, 3)))
    assert 'opacity:.25"><figcaption style="color:' in panel.children[-1].value
    find(panel, "0.0").value = find(panel, "0.5").value = False
    find(panel, "what is switched off in Layer 1 is felt by").value = 1
    both = Ablate(((0, 0), (0, 5))), Ablate((1, 3)), Preserve("values")
    assert bars() == expected(*both)
    find(panel, f"copy (1.{best})").value = True
    find(panel, "match (all of Layer 2)").value = True
    assert bars() == expected(*both, Copy((1, best)), Induction([(1, h) for h in range(8)]))
    find(panel, "layer 1").value = True
    assert bars() == expected(*both, Copy((1, best)), Induction([(1, h) for h in range(8)]), PerfectLayer1())


def test_operates_page_holds_every_set_of_heads(trained):
    result, shown, batch = trained
    page = explore.operate(result, shown, batch)._repr_mimebundle_()["text/html"]
    frames = re.findall(r'"(\d)\|([01]{8})":\[([^\]]*)\]', page)
    assert len({(i, bits) for i, bits, _ in frames}) == 8 * 256
    pt = experiments.previous_token_heads(result)[-1]
    for clamped, clamp in (("0", ()), ("4", (PreviousToken((0, pt)),)), ("7", (PerfectLayer1(),))):
        [values] = [v for i, bits, v in frames if (i, bits) == (clamped, "10110001")]
        loss = metrics.measure(result.weights, batch, [(Ablate([(1, 1), (1, 4), (1, 5), (1, 6)]), *clamp)])["loss"].item()
        assert float(values.split(",")[-1].strip('"')) == pytest.approx(loss, abs=6e-5)


def test_wiring_shows_what_a_head_reads(trained):
    result, _, batch = trained
    panel = explore.wiring(result, batch)
    order = list(experiments.by_strength(result, batch))
    panel.children[0].value = 2
    found = torch.tensor(texts(panel.children[-1].value)).view(4, 8)
    assert torch.allclose(found[0], metrics.composition_scores(result.weights, "keys")[order[2]], atol=0.006)
    assert torch.allclose(found[2], metrics.composition_scores(result.weights, "values")[order[2]], atol=0.006)
    alone = experiments.only(order[2], 8)
    lists = [[alone], [alone, Ablate((0, 6)), Preserve("values")], [alone, Ablate((0, 6)), Preserve("patterns")]]
    accuracy = metrics.measure(result.weights, batch, lists)["accuracy"]
    assert found[1, 6].item() == pytest.approx((accuracy[0] - accuracy[1]).item(), abs=0.006)
    assert found[3, 6].item() == pytest.approx((accuracy[0] - accuracy[2]).item(), abs=0.006)


def test_the_toy_model_follows_its_sliders():
    panel = explore.toy_model(1, n_iterations=200)
    panel.children[0].value = panel.children[1].value = 4
    found = toy.descend((1,), ("a", "b"), n_iterations=200)
    half = found.loc[found["relative_loss"] < 0.5, "iteration"].iloc[0]
    assert f"half at iteration {half}" in panel.children[-1].value
    with pytest.raises(ValueError, match="strength of b is 1.5"):
        toy.descend((1,), {"b": 1.5})


def test_partly_given_is_between(trained):
    free, half, whole = (toy.descend((1,), {"c": s}, n_iterations=60)["misaligned_c"].iloc[0] for s in (0.0, 0.5, 1.0))
    assert free > half > whole == pytest.approx(0, abs=1e-12)


@pytest.fixture
def what_if():
    settings = experiments.Settings("quick", n_sequences=6400)
    return explore.WhatIf(settings, {"nothing": [], "layer 1": [PerfectLayer1()]})


def test_what_if_trains_stops_and_goes_on(what_if):
    what_if.chosen.value = ("nothing", "layer 1")
    what_if.train.click()
    while not what_if._curves["nothing"]:
        time.sleep(0.01)
    what_if.stop.click()
    what_if.wait(60)
    assert what_if.results is None and not what_if.go_on.disabled and "stopped" in what_if.said.value
    what_if.go_on.click()
    what_if.wait(120)
    assert "phase change" in what_if.said.value and what_if.go_on.disabled and not what_if.train.disabled
    [plain, _] = what_if.results
    whole, _ = train(what_if.runs, progress=False)
    assert plain.metrics.equals(whole.metrics)  # as if it had never stopped
    assert what_if.view.value.count("<path d=\"M") >= 3 and "layer 1" in what_if.view.value


def test_what_if_says_what_is_wrong(what_if):
    what_if.chosen.value = ()
    what_if.train.click()
    assert "choose" in what_if.said.value
    what_if.choices["nothing"] = [Induction((1, 9))]
    what_if.chosen.value = ("nothing",)
    what_if.train.click()
    assert "no head 1.9" in what_if.said.value and not what_if.train.disabled


def test_what_if_trains_where_there_is_a_kernel_and_otherwise_shows_its_page(what_if):
    shown = explore.WhatIf(what_if.settings, what_if.choices, page="<p>live</p>")._repr_mimebundle_()
    assert shown["text/html"] == "<p>live</p>" and "application/vnd.jupyter.widget-view+json" in shown


def test_a_network_of_another_shape(tmp_path):
    run = RunConfig(model=ModelConfig(n_heads=4), task=TaskConfig(n_labels=4, n_classes=20), bank=BankConfig(n_classes=120),
                    n_sequences=640, eval_every=320, heads_every=320, checkpoint_every=320, eval_size=40)
    [result] = train([run], directory=tmp_path, progress=False)
    batch = task.evaluation_sets(task.split(load_bank(run.bank), run.task), 0, 40)["train"]
    shown = [explore.Shown("one", batch.split(1)[0], None)]
    panel = explore.scrub(result, shown)
    assert len(texts(panel.children[-2].value)) == 1 + 4 + 4
    assert "0.3" in explore.operate(result, shown, batch).children[-1].value


# The notebook, the built page and JupyterLab.

@pytest.fixture(scope="module")
def executed(quick):
    """explore.ipynb, executed, with the state of its widgets."""
    notebook = nbformat.read(ROOT / "book/explore.ipynb", 4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick.items():
            patch.setenv(name, value)
        NotebookClient(notebook, kernel_name="python3", timeout=600, store_widget_state=True).execute()
    return notebook


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_the_notebooks_widgets(executed):
    state = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    words = [s["state"].get("description") for s in state]
    for word in ("sequences seen", "sequence", "what is switched off in Layer 1 is felt by", "share of a given", "share of b given",
                 "share of c given", "clamps", "Train", "Stop", "Continue",
                 *(f"{layer}.{h}" for layer in (0, 1) for h in range(8))):
        assert word in words, word
    assert "head of Layer 2, the strongest first" in words
    drawn = "".join(s["state"].get("value", "") for s in state if s["model_name"] == "HTMLModel")
    for figure in ("Attention of head 0.0", "Attention of head 1.7", "induction strength", "answer: probability of",
                   "values: composition score", "The toy model", "Training losses", 'alt="query"'):
        assert figure in drawn, figure
    shown = [o for cell in executed.cells for o in cell.get("outputs", ()) if "data" in o]
    assert all("text/html" in o["data"] for o in shown if "application/vnd.jupyter.widget-view+json" in o["data"])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(built):
    """The built book, served on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built[0]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_every_page_loads_without_a_network(browser, site, built):
    pages = sorted(path.name for path in built[0].glob("*.html"))
    assert "explore.html" in pages and "07_subcircuits.html" in pages
    for name in pages:
        page, wrong = opened(browser, f"{site}/{name}")
        assert not wrong, (name, wrong)
        if name == "06_toy_model.html":
            assert page.locator("mjx-container").count() > 0  # formulas are typeset
        page.close()


CONTRAST = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(".nutshell p, .said, .discussion p, table.dataframe td")].map(element => {
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(ground(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@pytest.mark.xdist_group("book")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", ["07_subcircuits", "claims"])
def test_computed_sentences_and_tables_can_be_read(browser, site, name, mode):
    page, _ = opened(browser, f"{site}/{name}.html")
    page.evaluate("mode => document.documentElement.dataset.theme = mode", mode)
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 100 and min(contrasts) >= 4.5  # what WCAG asks of text
    page.close()


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(browser, site, built):
    wide = []
    for name in sorted(path.name for path in built[0].glob("*.html")):
        page, _ = opened(browser, f"{site}/{name}", 390)
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            wide.append(name)
        page.close()
    assert not wide


@pytest.mark.xdist_group("book")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1366, 390])
def test_the_static_scrubber_moves(browser, site, width):
    page, wrong = opened(browser, f"{site}/explore.html", width)
    panel = page.locator("section.ih-panel").first
    slider, view = panel.locator("input[type=range]"), panel.locator(".ih-view").nth(2)
    before, words = view.inner_html(), panel.locator("output").inner_text()
    slider.focus()
    page.keyboard.press("Home")
    first = view.inner_html()
    assert first != before and panel.locator("output").inner_text() == "0" != words
    page.keyboard.press("ArrowRight")
    assert view.inner_html() != first
    tiles = page.evaluate("[...document.querySelectorAll('.ih-tokens img')].map(image => image.getBoundingClientRect().width)")
    assert tiles and max(tiles) < 70 and max(tiles) > 50  # figures of a page grow on a phone, tiles of characters do not
    header = panel.locator(".ih-view").first.inner_html()
    panel.locator("select").select_option("4")
    assert panel.locator(".ih-view").first.inner_html() != header
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not wrong
    page.close()


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_the_static_operating_table(browser, site):
    page, _ = opened(browser, f"{site}/explore.html", first="delete window.Worker")  # with workers, the page computes: see test_live
    panel = page.locator(".ih-operate .ih-instead section.ih-panel")
    numbers = panel.locator(".ih-view").first
    whole = texts(numbers.inner_html())
    for box in panel.locator("input[type=checkbox]").all():
        box.uncheck()
    assert texts(numbers.inner_html())[0] < 0.5 < whole[0]
    panel.get_by_label("clamped").select_option("6")  # the copy: no head's value is needed
    assert texts(numbers.inner_html())[0] > 0.5
    labelled = page.evaluate("[...document.querySelectorAll('.ih-controls input, .ih-controls select')]"
                             ".every(f => f.labels.length)")
    assert labelled and page.locator(".ih-panel svg:not([aria-label])").count() == 0
    page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, quick):
    """JupyterLab on loopback, over a copy of the book."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "book/explore.ipynb", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [TOOLS / "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=",
               "--ServerApp.password=", "--allow-root", f"--notebook-dir={folder}", "--LabApp.news_url=None", "--expose-app-in-browser"]
    settings = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # every cell is then in the page, whatever is scrolled into view
    environment = os.environ | quick | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
                                        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None, "JupyterLab did not start"
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.mark.xdist_group("book")
@pytest.mark.slow
def test_the_live_panels_in_jupyterlab(browser, lab, quick, executed):
    page, _ = opened(browser, f"{lab}/lab/tree/explore.ipynb")
    page.wait_for_function("window.jupyterapp && window.jupyterapp.commands.hasCommand('notebook:run-all-cells')")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    # Before the kernel is idle, JupyterLab would ask which kernel to start.
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")  # and does not wait for the end
    page.get_by_role("button", name="Continue").wait_for()  # the last panel is there
    panels_ = page.locator(".widget-vbox.ih-panel")
    scrub, operate = panels_.nth(0), panels_.nth(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick.items():
            patch.setenv(name, value)
        settings = experiments.Settings(n_seeds=1)
        from ihbook import fetch
        [result] = fetch(experiments.main_runs(settings), progress=False)
        splits = task.split(load_bank(result.run.bank), result.run.task)

    handle = scrub.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    box, track = handle.bounding_box(), scrub.locator(".noUi-base").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] + 20, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    last = max(result.checkpoints)
    strength = result.heads.query(f"sequences == {last} and layer == 1")["strength"].tolist()
    page.wait_for_function("words => document.querySelector('.ih-panel').innerText.includes(words)", arg=f"{last:,}")

    def shown(where):
        return [float(x) for x in where.locator("text.ih-value").all_text_contents()]

    def until(read, expected):
        for _ in range(100):
            if read() == expected:
                return
            page.wait_for_timeout(100)
        assert read() == expected

    until(lambda: shown(scrub)[1:9], pytest.approx(strength, abs=0.006))

    sample = task.sample(splits, 2000, task.seeded("explore", 0))
    before = shown(operate)
    strong = [strength.index(s) for s in sorted(strength)[-4:]]
    for head in strong:
        operate.get_by_role("button", name=f"1.{head}", exact=True).click()
    found = metrics.measure(result.weights, sample, [[Ablate([(1, head) for head in strong])]])
    expected = [found["accuracy"].item(), found["loss"].item()]
    until(lambda: shown(operate), pytest.approx(expected, abs=1e-3))
    assert shown(operate) != before
    page.close()
