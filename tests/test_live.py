"""The live panels in a real browser: what a page computes is what PyTorch computes, and a reader can use it."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import opened

from ihbook import metrics, task, train
from ihbook.banks import encoder, load_bank
from ihbook.chapters import explore, live
from ihbook.chapters.live import data
from ihbook.chapters.live.page import WORKER
from ihbook.clamps import Ablate, Copy, Induction, PerfectLayer1, Preserve, PreviousToken, compose, run_with_clamps
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.digest import encode
from ihbook.engine.step import initial_moments, scalars_of, train_step
from ihbook.model import initial_weights, shapes, stack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("live")]

RUN = RunConfig(bank=BankConfig(n_classes=150), data_seed=5, n_sequences=3200, eval_every=800, heads_every=800, checkpoint_every=800,
                eval_size=100, lr=1e-3)
STEPS = 100
WAYS = live.ways(3, 2)
OFFERED = {f"{heads}, {name}": clamps for heads, each in WAYS.items() for name, clamps in each.items()}


@pytest.fixture(scope="module")
def splits():
    return task.split(load_bank(RUN.bank), RUN.task)


@pytest.fixture(scope="module")
def scripts(browser, splits):
    """A blank page with the worker's scripts, a network, and the training bank."""
    page = browser.new_page()
    page.add_script_tag(content=data.source(*(name for name in WORKER if name != "worker")))
    told(page, """({ names, values }) => {
      window.net = network(names);
      window.bank = floats(FEW * net.dim);
      window.acts = activations(32, net.nLabels, true);
      window.one = activations(4, net.nLabels, false);
      window.plain = activations(4, net.nLabels, false);
      window.bank.set(values);
      return null;
    }""", {"names": shapes(ModelConfig(), 512, 5), "values": splits.train_bank[0].flatten().tolist()})
    yield page
    page.close()


def told(page, function: str, given: dict):
    """What a function of the page makes of `given`; as text, because Playwright hands over long lists slowly."""
    return json.loads(page.evaluate(f"async (text) => JSON.stringify(await ({function})(JSON.parse(text)))", json.dumps(given)))


def flat(weights) -> list[float]:
    return torch.cat([tensor.flatten() for tensor in weights.values()]).tolist()


@pytest.mark.parametrize("seed, n_labels", [(5, 5), (1234, 15)])
def test_a_seed_names_the_same_network_and_the_same_sequences(scripts, splits, seed, n_labels):
    settings = TaskConfig(n_labels=n_labels)
    batch = task.training_batch(task.split(load_bank(RUN.bank), settings), seed, 3, 8192)
    found = told(scripts, """({ names, seed, sets }) => {
      const total = Object.values(names).reduce((sum, shape) => sum + shape.reduce((a, b) => a * b), 0), flat = new Float32Array(total);
      let at = 0;
      const params = Object.fromEntries(Object.entries(names).map(([name, shape]) =>
        [name, flat.subarray(at, (at += shape.reduce((a, b) => a * b)))]));
      drawWeights(params, names, seed);
      const { ids, labels } = drawSequences(`('train', ${seed}, 3)`, 8192, 50, sets);
      return { flat: [...flat], ids: [...ids], labels: [...labels] };
    }""", {"names": shapes(ModelConfig(), 512, n_labels), "seed": seed, "sets": task.label_sets(settings)[0].tolist()})
    expected = flat(initial_weights(ModelConfig(), 512, n_labels, seed).tensors)
    assert np.abs(np.array(found["flat"]) - expected).max() < 1e-6
    assert found["ids"] == batch.ids.flatten().tolist() and found["labels"] == batch.labels.flatten().tolist()


def trained_in_pytorch(initial, batch, clamps, dtype):
    """The losses `[step, run]` and the last weights `[run, ...]` of one run per list of clamps, at the `quick` learning rate."""
    params = {name: p.to(dtype) for name, p in stack([initial] * len(clamps)).items()}
    moments, plan = initial_moments(params, RUN), compose.make_plan(clamps, ModelConfig(), 2, dtype=dtype)
    parts = task.Batch(batch.bank.to(dtype), batch.ids, batch.labels).split(32)
    losses = [train_step(params, moments, part.expand(len(clamps)), plan, ModelConfig(), scalars_of([7e-4], [i], "cpu")[0].to(dtype))
              for i, part in enumerate(parts)]
    return torch.stack(losses), params


def test_every_offered_clamp_trains_as_in_pytorch(scripts, splits):
    """The losses of 100 steps and the weights after them, and the gradient through each clamp at the start. Where a gradient is as
    small as a rounding error, Adam's step can go either way: such weights, a few in a million, differ in PyTorch too between
    single and double precision, and are left out."""
    initial = initial_weights(ModelConfig(), 512, 5, 5)
    batch = task.training_batch(splits, 5, 0, 32 * STEPS)
    losses, params = trained_in_pytorch(initial, batch, list(OFFERED.values()), torch.float32)
    _, exact = trained_in_pytorch(initial, batch, list(OFFERED.values()), torch.float64)
    sequences = {"ids": batch.ids.flatten().tolist(), "labels": batch.labels.flatten().tolist()}
    for i, (name, clamps) in enumerate(OFFERED.items()):
        found = told(scripts, """({ initial, clamps, sequences, steps }) => {
          net.flat.params.set(initial);
          net.flat.exp_avg.fill(0);
          net.flat.exp_avg_sq.fill(0);
          net.steps = 0;
          const means = held(clamps), batch = { bank, n: 50, ...sequences }, losses = [];
          let first;
          for (let i = 0; i < steps; i++) {
            losses.push(trainStep(net, batch, 32 * i, means, acts, 7e-4));
            first ??= [...net.flat.grads];
          }
          return { losses, first, weights: [...net.flat.params] };
        }""", {"initial": flat(initial.tensors), "clamps": encode(clamps, defaults=True), "sequences": sequences, "steps": STEPS})
        assert np.abs(np.array(found["losses"]) - losses[:, i].numpy()).max() <= 1e-4, name
        weights, certain = np.array(flat({key: p[i] for key, p in params.items()})), np.array(flat({key: p[i] for key, p in exact.items()}))
        sure = np.abs(weights - certain) <= 5e-5
        assert np.abs(np.array(found["weights"]) - weights)[sure].max() <= 1e-4 and (~sure).sum() <= 5, name
        gradient = np.array(flat(metrics.gradients(initial, batch.split(32)[0], clamps)))
        assert np.abs(gradient).max() > 0.1 and np.abs(np.array(found["first"]) - gradient).max() <= 1e-5, name


@pytest.mark.parametrize("name", ["nothing", "copy"])
def test_with_other_labels_a_page_has_pytorchs_gradient(scripts, splits, name):
    initial, clamps = initial_weights(ModelConfig(), 512, 15, 5), WAYS["1.3 alone"][name]
    batch = task.training_batch(task.split(load_bank(RUN.bank), TaskConfig(n_labels=15)), 5, 0, 32)
    found = told(scripts, """({ names, initial, clamps, sequences }) => {
      window.net15 ??= network(names);
      window.acts15 ??= activations(32, 15, true);
      net15.flat.params.set(initial);
      const batch = { bank, n: 50, ...sequences };
      forward(net15, batch, 0, held(clamps), acts15);
      return { loss: backward(net15, batch, 0, held(clamps), acts15), gradient: [...net15.flat.grads] };
    }""", {"names": shapes(ModelConfig(), 512, 15), "initial": flat(initial.tensors), "clamps": encode(clamps, defaults=True),
           "sequences": {"ids": batch.ids.flatten().tolist(), "labels": batch.labels.flatten().tolist()}})
    assert found["loss"] == pytest.approx(metrics.measure(initial, batch, [clamps])["loss"].item(), abs=1e-5)
    assert np.abs(np.array(found["gradient"]) - flat(metrics.gradients(initial, batch, clamps))).max() <= 1e-5


OPERATIONS = {
    "nothing": [], "heads off": [Ablate(((0, 1), (1, 6)))], "clamps": [PreviousToken((0, 2)), Induction([(1, h) for h in range(8)])],
    "felt by patterns": [Ablate(((0, 1), (0, 4), (1, 3))), Preserve("values")],
    "felt by values": [Ablate(((0, 1), (0, 4), (1, 3))), Preserve("patterns"), PreviousToken((0, 2))],
    "layer 1, felt by values": [PerfectLayer1(), Ablate((1, 3)), Preserve("patterns")],
    "copy, felt by patterns": [Ablate((0, 1)), Preserve("values"), Copy((1, 3))],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pytorchs(scripts, splits, name):
    initial, clamps = initial_weights(ModelConfig(), 512, 5, 5), OPERATIONS[name]
    batch = task.training_batch(splits, 5, 0, 4)
    found = told(scripts, """({ initial, clamps, sequences }) => {
      net.flat.params.set(initial);
      const batch = { bank, n: 50, ...sequences }, means = held(clamps);
      forward(net, batch, 0, means, one, means.kept.length ? forward(net, batch, 0, held([]), plain) : null);
      return { logits: [...one.logits], patterns: one.layers.map(({ pattern }) => [...pattern]) };
    }""", {"initial": flat(initial.tensors), "clamps": encode(clamps, defaults=True),
           "sequences": {"ids": batch.ids.flatten().tolist(), "labels": batch.labels.flatten().tolist()}})
    with torch.no_grad():
        acts = run_with_clamps(initial, batch, clamps)
    assert np.array(found["logits"]) == pytest.approx(acts.logits[0].flatten().numpy(), rel=1e-5, abs=1e-4)
    for layer in (0, 1):
        pattern = torch.tensor(found["patterns"][layer]).view(4, 5, 8, 5).transpose(1, 2)
        assert torch.allclose(pattern, acts["pattern", layer][0], atol=1e-5)


def test_characters_are_embedded_as_the_bank_embeds_them(scripts):
    bank, (numbers, record) = load_bank(RUN.bank), encoder.load("glyphs")
    parts = [numbers[f"{i}.{name}"].numpy().view(np.uint8).ravel() for i in range(4) for name in ("weight", "exponent", "bias")]
    found = told(scripts, """async ({ packed, images, scale }) => {
      const layers = encoderOf(await unpacked(packed));
      return images.map((image) => [...encode(layers, image, scale)]);
    }""", {"packed": data.packed(np.concatenate(parts)), "images": bank.images[:3, 0].flatten(1).tolist(),
           "scale": float(record["scale"])})
    assert torch.equal(torch.tensor(found), bank.features[:3, 0])


# The panels.

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of a page with the live panels of a run that has learnt little, and the run's result."""
    folder = tmp_path_factory.mktemp("live")
    [result] = train([RUN], directory=folder, progress=False)
    batches = task.evaluation_sets(task.split(load_bank(RUN.bank), RUN.task), 0, 4)
    shown = [explore.Shown(name, batch.split(1)[0], None) for name, batch in batches.items()]
    page = live.Page(RUN, shown, live.networks(result))
    kinds = {"previous token (0.2)": PreviousToken((0, 2)), "copy (1.3)": Copy((1, 3))}
    rates = {"70 times the paper's": replace(RUN, lr=7e-4, n_sequences=38_400), "the paper's": replace(RUN, lr=1e-5)}
    panels = page._repr_html_() + page.operate(kinds, "<p>the replay</p>") + page.what_if(rates, live.ways(7, 4))
    assert len(panels.encode()) < 1.5e6
    (folder / "page.html").write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Live</title>{panels}</html>')
    return f"file://{folder / 'page.html'}", result


@pytest.fixture
def page(browser, site):
    """The page; at the end nothing must have gone wrong, and nothing must have been asked of a host."""
    asked = []
    page, wrong = opened(browser, site[0])
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert not wrong and all(url.startswith(("blob:", "file:", "data:")) for url in asked)


def what_if(page, *names, **fields):
    """The panel `What if?`, with these clamps chosen."""
    panel = page.locator(".ih-what-if")
    for box in panel.locator('[name="clamp"]').all():
        box.set_checked(box.get_attribute("value") in names)
    for name, value in fields.items():
        field = panel.locator(f'[name="{name}"]')
        field.fill(value) if name == "seed" else field.select_option(value)
    return panel


def rows(panel) -> dict[str, list[str]]:
    """The table beside the curves: sequences seen, loss, and when it fell, by clamp."""
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in panel.locator("tbody tr").all()}


def number(words: str) -> int:
    return int(words.replace(",", ""))


def train_until_all_have_fallen(page, panel):
    panel.get_by_role("button", name="Train", exact=True).click()
    page.wait_for_function("""() => [...document.querySelectorAll(".ih-curves td:last-child")].map((cell) => cell.textContent)
      .filter((words) => words !== "–").length === 6""")


@contextmanager
def threads(page):
    """The CPU time, in milliseconds, of each task on the page's main thread and on its workers meanwhile, by the thread's name."""
    session, events, times, done = page.context.new_cdp_session(page), [], {}, []
    session.on("Tracing.dataCollected", lambda part: events.extend(part["value"]))
    session.on("Tracing.tracingComplete", lambda _: done.append(True))
    session.send("Tracing.start", {"transferMode": "ReportEvents", "traceConfig": {"includedCategories": ["toplevel", "__metadata"]}})
    yield times
    session.send("Tracing.end")
    while not done:
        page.wait_for_timeout(100)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for e in events:
        if e["name"].endswith("RunTask") and "tdur" in e:
            times.setdefault(names.get((e["pid"], e["tid"])), []).append(e["tdur"] / 1000)


def test_the_six_curves_fall_in_the_published_order_while_the_page_stays_free(page):
    panel = what_if(page, *live.ways(7, 4)["1.7 alone"])
    with threads(page) as times:
        train_until_all_have_fallen(page, panel)
    of_page, workers = times["CrRendererMain"], sum(times["DedicatedWorker thread"])
    # The workers train, the page draws, and no task holds it up for a fiftieth of their time, whatever the machine.
    assert len(of_page) > 50 and sum(of_page) < workers and max(of_page) < workers / 50
    fell = {name: number(cells[2]) for name, cells in rows(panel).items()}
    assert max(fell["layer 1 and copy"], fell["match"], fell["copy"]) < fell["layer 1"] < fell["previous token"] < fell["nothing"]
    assert panel.locator('.ih-chart-view path[stroke-width="1.8"]').count() == 6
    assert len(page.workers) == 7 and panel.get_by_text("attention to the token before").count()
    panel.get_by_role("button", name="Reset").click()
    page.wait_for_function("() => !document.querySelector('.ih-curves table')")
    assert len(page.workers) == 1  # the other panel's


@pytest.mark.parametrize("how", ["mouse", "keyboard"])
def test_a_window_lets_the_network_learn_what_it_waits_for(page, how):
    panel = what_if(page, "hold to clamp")
    panel.get_by_role("button", name="Train", exact=True).click()
    button = panel.get_by_role("button", name="Hold to clamp")
    panel.locator('[name="window"]').select_option("match")
    page.wait_for_function("() => document.querySelectorAll('.ih-curves td')[1]?.textContent < '1'")  # on its plateau
    if how == "mouse":
        button.hover()
        page.mouse.down()
    else:
        button.focus()
        page.keyboard.down(" ")
    page.wait_for_function("() => document.querySelectorAll('.ih-curves td')[1].textContent < '0.2'")
    assert button.get_attribute("aria-pressed") == "true"
    page.mouse.up() if how == "mouse" else page.keyboard.up(" ")
    page.wait_for_function("() => document.querySelectorAll('.ih-curves td')[1].textContent > '0.5'")  # the match was not learnt
    panel.get_by_role("button", name="Pause").click()
    panel.get_by_text("Match was clamped from").wait_for()
    assert panel.locator(".ih-chart-view rect").count() == 1


def test_pause_step_continue_and_a_checkpoint_with_other_labels(page, site):
    panel = what_if(page, "nothing", heads="all 8", labels="15", seed="7", inside="nothing")
    panel.get_by_role("button", name="Train", exact=True).press("Enter")
    panel.locator('.ih-chart-view path[stroke-width="1.8"]').wait_for()
    panel.get_by_role("button", name="Pause").click()
    panel.get_by_text("No loss has fallen yet").wait_for()
    page.wait_for_timeout(300)  # until the last drawing
    [before, *_] = rows(panel)["nothing"]
    panel.get_by_role("button", name="Step").click()
    page.wait_for_function("before => document.querySelector('.ih-curves td').textContent !== before", arg=before)
    assert number(rows(panel)["nothing"][0]) == number(before) + 32
    assert panel.get_by_text("label 14").count() == 1
    panel.locator('[name="start"]').select_option(index=1)
    assert panel.locator('[name="labels"]').is_disabled()
    panel.get_by_role("button", name="Train", exact=True).click()
    panel.locator('.ih-chart-view path[stroke-width="1.8"]').wait_for()
    assert panel.get_by_text("label 14").count() == 0


def test_a_network_that_the_reader_trained_is_operated_on_and_trained_further(page, splits):
    """What the other panel measures of it is what PyTorch measures of the network that PyTorch trained as far."""
    panel, other = what_if(page, "nothing", heads="all 8", seed="5", inside="nothing"), page.locator(".ih-operate")
    operate = panel.get_by_role("button", name="Operate on it")
    assert operate.is_disabled()
    panel.get_by_role("button", name="Train", exact=True).click()
    page.evaluate("""() => new Promise((done) => {  // as soon as one can: PyTorch trains as far below
      const pause = document.querySelector(".ih-what-if [data-do=pause]");
      const soon = setInterval(() => { if (!pause.disabled) { pause.click(); clearInterval(soon); done(); } }, 5);
    })""")
    panel.get_by_text("No loss has fallen yet").wait_for()
    page.wait_for_timeout(300)
    seen = number(rows(panel)["nothing"][0])
    operate.click()
    page.wait_for_function("() => document.querySelector('.ih-operate [name=network]').value.startsWith('yours')")
    other.locator('[name="Layer 1"]').nth(5).uncheck()
    page.wait_for_timeout(300)
    page.wait_for_function("() => !document.querySelector('.ih-operate').ariaBusy")
    shown = [float(text) for text in other.locator(".ih-bars .ih-value").all_text_contents()[:2]]
    assert other.locator('[name="network"]').input_value() == f"yours: nothing, seed 5, {seen:,} sequences"

    assert 32 <= seen <= 8192
    batch = task.training_batch(splits, 5, 0, 8192).split(seen)[0]
    _, params = trained_in_pytorch(initial_weights(ModelConfig(), 512, 5, 5), batch, [()], torch.float32)
    network = replace(initial_weights(ModelConfig(), 512, 5, 5), tensors={name: p[0] for name, p in params.items()})
    measured = metrics.measure(network, task.sample(splits, 2000, task.seeded("explore", 0)), [[Ablate((0, 5))]])
    assert shown == pytest.approx([measured["accuracy"].item(), measured["loss"].item()], abs=2e-3)

    panel.locator('[name="start"]').select_option(f"yours: nothing, seed 5, {seen:,} sequences")
    panel.get_by_role("button", name="Train", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('.ih-curves td')[1]?.textContent < '1'")  # it goes on from there
    panel.locator('[name="labels"]').wait_for(state="attached")
    assert panel.locator('[name="labels"]').is_disabled() and operate.is_enabled()


def draw(page, canvas, points):
    box = canvas.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def test_drawn_characters_are_answered_as_pytorch_answers(page, site):
    _, result = site
    panel = page.locator(".ih-operate")
    panel.scroll_into_view_if_needed()
    panel.get_by_text("The network answers").wait_for()
    draw(page, panel.locator("canvas").nth(0), [(0.3, 0.2), (0.3, 0.8), (0.7, 0.8)])
    draw(page, panel.locator("canvas").nth(2), [(0.3, 0.3), (0.32, 0.8), (0.7, 0.7)])
    panel.locator('[name="Layer 1"]').nth(5).uncheck()
    panel.get_by_label("previous token (0.2)").check()
    page.wait_for_function("() => !document.querySelector('.ih-operate').ariaBusy")
    images = torch.tensor(page.evaluate("""() => [...document.querySelectorAll(".ih-operate canvas")].map((canvas) =>
      [...canvas.getContext("2d").getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 === 0).map((light) => 255 - light))"""))
    assert (images.sum(1) > 2000).all()
    features = encoder.learnt_features(images.view(3, 28, 28).to(torch.uint8), 512, "glyphs")
    network = live.rounded(result.weights)
    clamps = [Ablate((0, 5)), PreviousToken((0, 2))]
    with torch.no_grad():
        answer = run_with_clamps(network, task.from_exemplars(features[None], torch.tensor([[1, 2, 1]])), clamps).logits[0, 0].softmax(0)
    sample = task.sample(task.split(load_bank(RUN.bank), RUN.task), 2000, task.seeded("explore", 0))
    measured = metrics.measure(network, sample, [clamps])
    shown = [float(text) for text in panel.locator(".ih-bars .ih-value").all_text_contents()]
    assert shown[:2] == pytest.approx([measured["accuracy"].item(), measured["loss"].item()], abs=6e-4)
    assert shown[2:] == pytest.approx(answer.tolist(), abs=0.006)
    assert panel.get_by_text(f"The network answers {int(answer.argmax())}").count() == 1
    assert panel.get_by_label("what exemplar 1 shows").input_value() == "yours"


def test_on_a_phone_and_by_name(browser, site):
    page, wrong = opened(browser, site[0], 390)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    unnamed = page.evaluate("""[...document.querySelectorAll(".ih-panel input, .ih-panel select")]
      .filter((field) => ![...field.labels].some((label) => label.textContent.trim()) && !field.ariaLabel).map((field) => field.name)""")
    assert not unnamed and not wrong
    page.close()


def test_the_workers_stop_when_the_page_is_left(page):
    panel = what_if(page, "nothing", "match")
    panel.get_by_role("button", name="Train", exact=True).click()
    panel.locator('.ih-chart-view path[stroke-width="1.8"]').first.wait_for()
    assert len(page.workers) >= 2
    page.goto("about:blank")
    page.wait_for_timeout(200)
    assert not page.workers


@pytest.mark.parametrize("missing", ["Worker", "WebAssembly", "DecompressionStream"])
def test_a_browser_that_lacks_something_says_so(browser, site, missing):
    page, wrong = opened(browser, site[0], first=f"delete window.{missing}")
    for panel in (page.locator(".ih-operate"), page.locator(".ih-what-if")):
        assert re.search("can't compute here: it lacks (Web Workers|WebAssembly|DecompressionStream)", panel.inner_text())
        assert not panel.get_by_role("button").count()
    assert page.get_by_text("the replay").is_visible() and not wrong
    page.close()


def test_without_a_network_that_the_scripts_know_there_is_no_live_panel(site):
    other = live.Page(replace(RUN, model=ModelConfig(n_heads=4)), [], {})
    assert other._repr_html_() == "" and other.operate({}, "<p>the replay</p>") == "<p>the replay</p>" and other.what_if({}, {}) is None
    assert live.offered(replace(RUN, task=TaskConfig(n_labels=7))) and not live.offered(replace(RUN, task=TaskConfig(noise=0.1)))


def test_two_labels_are_enough_for_the_panels(tmp_path):
    run = replace(RUN, task=TaskConfig(n_labels=2), n_sequences=320, checkpoint_every=0)
    [result] = train([run], directory=tmp_path, progress=False)
    html = live.Page(run, [], live.networks(result)).operate({}, "<p>the replay</p>")
    first, second = re.findall(r'<select name="label[01]".*?</select>', html, re.DOTALL)
    assert re.findall("selected>(.)<", first + second) == ["1", "0"] and "2" not in re.findall(">(.)</option>", first)
