// The panel that operates on a network: a worker answers on three characters, picked or drawn, under the reader's clamps.
(async () => {
  const panel = document.currentScript.parentElement;
  const one = (selector) => panel.querySelector(selector), field = (name) => one(`[name="${name}"]`);
  const lacks = missing();
  if (lacks) return sayInstead(panel, lacks);
  showWorking(panel);
  const data = JSON.parse(one(".ih-data").textContent), canvases = [...panel.querySelectorAll("canvas")];
  const SHOWN = { "hand 0": { of: 0 }, "hand 1": { of: 1 }, "same 0": { of: 0, itself: true }, "same 1": { of: 1, itself: true },
    "yours 0": { of: 0 }, "yours 1": { of: 1 } }; // what a choice of query shows: of which exemplar, and whether that very image
  const drawn = [null, null, null]; // what the reader drew, by slot
  const yours = new Map(); // networks that the reader trained on this page, by words
  let images, shared, operator, busy = false, wanted = false;

  const image = (index) => images.subarray(784 * index, 784 * (index + 1)), choice = (slot) => one(`select[data-slot="${slot}"]`);
  /** The three characters: an exemplar is a class's first hand, and the query may show the second. */
  function characters() {
    const exemplars = [0, 1].map((slot) => drawn[slot] ?? image(2 * choice(slot).value)), shown = SHOWN[choice(2).value];
    return [...exemplars, drawn[2] ?? (shown.itself ? exemplars[shown.of] : image(2 * choice(shown.of).value + 1))];
  }

  function paint() {
    characters().forEach((ink, i) => {
      const context = canvases[i].getContext("2d"), pixels = context.createImageData(28, 28);
      ink.forEach((dark, j) => pixels.data.set([255 - dark, 255 - dark, 255 - dark, 255], 4 * j));
      context.putImageData(pixels, 0, 0);
      one(`button[data-slot="${i}"]`).disabled = !drawn[i];
    });
  }

  function clamps() {
    const boxes = (name) => [...panel.querySelectorAll(`[name="${name}"]`)];
    const off = ["Layer 1", "Layer 2"].flatMap((name, layer) => boxes(name).map((box, h) => [box.checked, [layer, h]]))
      .filter(([on]) => !on).map(([, head]) => head);
    const more = boxes("clamped").map((box, i) => box.checked && data.kinds[i]).filter(Boolean);
    return [...(off.length ? [{ type: "Ablate", heads: off }] : []), ...data.felt[field("felt").value], ...more];
  }

  const say = (words) => { one(".ih-said").textContent = words; }, fail = (words) => say(`This went wrong: ${words}`);

  /** Ask the worker; while it computes, only the last wish is kept. */
  function ask() {
    if (!operator) return;
    wanted = busy;
    if (busy) return;
    const labels = [0, 1].map((i) => Number(field(`label${i}`).value)), right = labels[SHOWN[choice(2).value].of];
    if (labels[0] === labels[1]) return say("Choose two different labels.");
    busy = true;
    panel.setAttribute("aria-busy", true);
    operator.postMessage({ do: "operate", clamps: clamps(), images: characters(), labels: [...labels, right] });
  }

  function told({ error, patterns, logits, accuracy, loss }) {
    busy = false;
    panel.removeAttribute("aria-busy");
    if (error) return fail(error);
    const answer = softmax(logits), best = answer.indexOf(Math.max(...answer));
    const owner = [0, 1].find((i) => Number(field(`label${i}`).value) === best);
    say(`The network answers ${best}, with ${Math.round(100 * answer[best])}%: `
      + `${owner === undefined ? "a label that is not in context" : `the label of exemplar ${owner + 1}`}.`);
    one(".ih-bars").innerHTML = filled(data.bars.template, barValues([accuracy, loss], data.bars, 4))
      + filled(shared.answers[logits.length].template, barValues(answer, shared.answers[logits.length]));
    const on = (name) => [...panel.querySelectorAll(`[name="${name}"]`)].map((box) => box.checked);
    shared.patterns.forEach((template, i) => drawPatterns(panel.querySelectorAll(".ih-patterns")[i], template, patterns[i],
      on(`Layer ${i + 1}`)));
    if (wanted) ask();
  }

  /** The pen of the drawn glyphs (ihbook/banks/glyphs.py): a pixel is as dark as the disc that covers it most. */
  function ink(slot, x, y) {
    const radius = 0.64 + 0.5;
    for (let row = Math.max(0, Math.floor(y) - 2); row <= Math.min(27, y + 2); row++) {
      for (let column = Math.max(0, Math.floor(x) - 2); column <= Math.min(27, x + 2); column++) {
        const dark = Math.round(255 * clip(radius - Math.hypot(column - x, row - y), 0, 1));
        drawn[slot][28 * row + column] = Math.max(drawn[slot][28 * row + column], dark);
      }
    }
  }

  canvases.forEach((canvas, slot) => {
    let last = null;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width * 28 - 0.5, (event.clientY - box.top) / box.height * 28 - 0.5];
    };
    const stroke = (event) => {
      const [x, y] = place(event), [from, up] = last ?? [x, y], n = Math.ceil(4 * Math.hypot(x - from, y - up)) || 1;
      for (let i = 0; i <= n; i++) ink(slot, from + (x - from) * i / n, up + (y - up) * i / n);
      last = [x, y];
      paint();
      ask();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      if (!drawn[slot]) wipe(slot);
      stroke(event);
    });
    canvas.addEventListener("pointermove", (event) => { if (last) (event.getCoalescedEvents?.() ?? [event]).forEach(stroke); });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  });

  /** Begin a drawing in a slot; of the query, the choice still says which exemplar it shows. */
  function wipe(slot) {
    drawn[slot] = new Uint8Array(784);
    choice(slot).value = slot === 2 ? `yours ${SHOWN[choice(2).value].of}` : "yours";
  }
  panel.addEventListener("click", ({ target }) => {
    if (target.dataset?.do !== "clear") return;
    wipe(Number(target.dataset.slot));
    paint();
    ask();
  });
  panel.addEventListener("input", ({ target }) => {
    const { slot } = target.dataset;
    if (target.name === "network") operator?.postMessage({ do: "weights", weights: chosen() });
    if (slot) drawn[slot] = target.value.startsWith("yours") ? drawn[slot] ?? new Uint8Array(784) : null;
    paint();
    ask();
  });
  one(".ih-works").addEventListener("submit", (event) => event.preventDefault());

  const chosen = () => yours.get(field("network").value) ?? shared.networks[field("network").value];
  document.addEventListener("ih-network", ({ detail: { words, weights } }) => {
    if (!yours.has(words)) field("network").add(new Option(words));
    yours.set(words, weights);
    field("network").value = words;
    field("network").dispatchEvent(new Event("input", { bubbles: true }));
    field("network").focus();
  });

  function begin() {
    shared = sharedData();
    operator = worker(workerScript());
    operator.onmessage = ({ data: answer }) => told(answer);
    operator.onerror = (event) => fail(event.message);
    operator.postMessage({ do: "operateOn", shapes: shared.shapes[shared.nLabels], bank: shared.bank, encoder: data.encoder,
      scale: data.scale, weights: chosen(),
      task: { nClasses: shared.nClasses, sets: shared.sets[shared.nLabels] } });
    busy = false;
    ask();
  }

  images = new Uint8Array(await unpacked(data.images));
  paint();
  const seen = new IntersectionObserver((entries) => { // the network is unpacked when the reader comes to the panel
    if (!entries.some(({ isIntersecting }) => isIntersecting)) return;
    seen.disconnect();
    begin();
  });
  seen.observe(panel);
  addEventListener("pageshow", ({ persisted }) => { if (persisted && operator) begin(); }); // the reader has come back
})();
