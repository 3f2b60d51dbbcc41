// The panel `What if?`: one worker per network; what they report is drawn some ten times per second.
(() => {
  const panel = document.currentScript.parentElement;
  const one = (selector) => panel.querySelector(selector);
  const lacks = missing();
  if (lacks) return sayInstead(panel, lacks);
  showWorking(panel);
  const data = JSON.parse(one(".ih-data").textContent), shared = sharedData(), script = workerScript();
  const field = (name) => one(`[name="${name}"]`), doing = (name) => one(`[data-do="${name}"]`);
  const yours = new Map(); // networks that the reader kept, by words
  let networks = [], ways = {}, pace = data.paces[0], waiting = false, nLabels = 0;

  const say = (words) => { one(".ih-said").textContent = words; }, fail = (words) => say(`Training failed: ${words}`);
  const number = (n) => n.toLocaleString("en");

  function begin() {
    reset();
    const names = [...panel.querySelectorAll('[name="clamp"]:checked')].map((box) => box.value), start = field("start").value;
    if (!names.length) return say("Choose one or more clamps first.");
    if (!field("seed").checkValidity() || field("seed").value === "") return say("A seed is a whole number from 0 to 9,999.");
    const seed = Number(field("seed").value), weights = yours.get(start) ?? shared.networks[start];
    nLabels = start ? shared.nLabels : Number(field("labels").value);
    const cores = Math.max(1, (navigator.hardwareConcurrency || 2) - 1), rest = Math.max(0, names.length / cores - 1);
    pace = data.paces[field("pace").value];
    ways = data.ways[field("heads").value];
    const task = { nClasses: shared.nClasses, sets: shared.sets[nLabels], seed, lr: pace.lr, steps: pace.last / 32, rest };
    networks = names.map((name) => {
      const network = { name, seed, worker: worker(script), points: [], windows: [], seen: 0, running: true, fell: null };
      network.worker.onmessage = ({ data: report }) => told(network, report);
      network.worker.onerror = (event) => fail(event.message);
      send(network, { do: "begin", task, shapes: shared.shapes[nLabels], weights, bank: shared.bank,
        shown: shared.shown, clamps: ways[name === data.held ? "nothing" : name] });
      return network;
    });
    all({ do: "train" });
    const before = field("inside").value;
    field("inside").innerHTML = names.map((name) => `<option${name === before ? " selected" : ""}>${name}</option>`).join("");
    one(".ih-hold").hidden = !names.includes(data.held);
    say("Training …");
    look();
  }

  const send = (network, message) => network.worker.postMessage(message);
  const all = (message) => networks.forEach((network) => send(network, message));

  function told(network, report) {
    if (report.error) return fail(report.error);
    if (report.weights) return handOver(network, report);
    network.points.push(...report.points);
    const { seen, running, patterns = network.patterns, logits = network.logits } = report;
    Object.assign(network, { seen, running, patterns, logits });
    if (report.held) network.windows.push({ what: report.held, start: seen, end: null });
    if (report.held === "") network.windows.at(-1).end = seen;
    const fell = network.points.find(({ loss }) => loss < data.threshold);
    if (fell && network.fell === null) network.fell = fell.seen;
    if (networks.every((each) => !each.running)) say(summary());
    else if (report.held === "") say(`${sentence(windows(network))} Training …`);
    later();
  }

  const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;
  const windows = (network) => network.windows.map(({ what, start, end }) =>
    `${what} was clamped from ${number(start)} to ${number(end ?? network.seen)} sequences`).join("; ");

  /** What is known so far, in a sentence. */
  function summary() {
    const fallen = networks.filter(({ fell }) => fell !== null).sort((a, b) => a.fell - b.fell);
    const words = fallen.map(({ name, fell }) => `${name} at ${number(fell)}`).join(", ");
    const held = networks.map(windows).filter(Boolean).map(sentence).join(" ");
    return `${fallen.length ? `The loss fell, in sequences seen: ${words}.` : "No loss has fallen yet."} ${held}`;
  }

  function later() {
    if (waiting) return;
    waiting = true;
    setTimeout(() => requestAnimationFrame(() => { waiting = false; draw(); }), 80); // a dozen drawings a second are enough
  }

  function draw() {
    const going = networks.some(({ running }) => running), done = networks.every(({ seen }) => seen >= pace.last);
    doing("pause").disabled = !going;
    doing("step").disabled = doing("continue").disabled = going || done;
    doing("reset").disabled = !networks.length;
    doing("operate").disabled = !networks.length || nLabels !== shared.nLabels;
    one(".ih-chart-view").innerHTML = filled(pace.chart, [networks.map(curve).join("")]);
    one(".ih-curves").innerHTML = networks.length ? table() : "";
    inside();
  }

  /** A network's losses as a line, and its windows behind it. */
  function curve({ name, points, windows, seen }) {
    const [[left, bottom], [right, top]] = pace.corners, colour = data.colours[name];
    const x = (sequences) => (left + (right - left) * sequences / pace.last).toFixed(1);
    const y = (loss) => (bottom - (bottom - top) * clip(loss / pace.top, 0, 1)).toFixed(1);
    const held = windows.map(({ start, end }) => `<rect x="${x(start)}" y="${top}" width="${x(end ?? seen) - x(start)}" `
      + `height="${bottom - top}" fill="${colour}" opacity=".15"/>`).join("");
    const every = Math.ceil(points.length / 400); // more would not show
    const path = points.filter((_, i) => i % every === 0).map((point) => `${x(point.seen)} ${y(point.loss)}`).join("L");
    return held + (path && `<path d="M${path}" fill="none" stroke="${colour}" stroke-width="1.8"/>`);
  }

  function table() {
    const head = ["clamped", "sequences seen", "loss", "fell at"].map((words) => `<th scope="col">${words}</th>`).join("");
    const rows = networks.map(({ name, seen, points, fell }) => {
      const cells = [number(seen), points.at(-1)?.loss.toFixed(3) ?? "–", fell === null ? "–" : number(fell)];
      return `<tr><th scope="row" style="--own: ${data.colours[name]}">${name}</th><td>${cells.join("</td><td>")}</td></tr>`;
    });
    return `<table><thead><tr>${head}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
  }

  /** The heads, the answer and the attention of the network that the reader looks into. */
  function inside() {
    const network = networks.find(({ name }) => name === field("inside").value), sequence = field("sequence").value;
    const drawing = one(".ih-sequence");
    if (drawing.dataset.of !== sequence) drawing.innerHTML = data.drawings[drawing.dataset.of = sequence];
    if (!network?.patterns) return;
    const heads = network.points.at(-1)?.heads ?? Array(16).fill(0), answer = shared.answers[network.logits.length];
    const bars = [[data.bars[0], heads.slice(0, 8)], [data.bars[1], heads.slice(8)], [answer, softmax(network.logits)]];
    one(".ih-bars").innerHTML = bars.map(([each, values]) => filled(each.template, barValues(values, each))).join("");
    const views = panel.querySelectorAll(".ih-patterns");
    shared.patterns.forEach((template, i) => drawPatterns(views[i], template, network.patterns[i]));
  }

  /** Ask the network that the reader looks into for what is inside, and no other. */
  function look() {
    for (const network of networks) {
      send(network, { do: "look", sequence: network.name === field("inside").value ? Number(field("sequence").value) : null });
    }
    later();
  }

  /** Give a network that the reader trained to the panel that operates, and to the choice of where training starts. */
  function handOver({ name, seed }, { seen, weights }) {
    const words = `yours: ${name}, seed ${seed}, ${number(seen)} sequences`;
    if (!yours.has(words)) field("start").add(new Option(words));
    yours.set(words, weights);
    document.dispatchEvent(new CustomEvent("ih-network", { detail: { words, weights } }));
  }

  function reset() {
    networks.forEach(({ worker }) => worker.terminate());
    networks = [];
    panel.querySelectorAll(".ih-bars, .ih-patterns").forEach((view) => { view.innerHTML = ""; });
    one(".ih-hold").hidden = true;
    say("");
    later();
  }

  /** A window of training: the clamp holds while the button is pressed. */
  function hold(on) {
    const button = doing("hold"), network = networks.find(({ name }) => name === data.held);
    if (!network || (button.getAttribute("aria-pressed") === "true") === on) return;
    button.setAttribute("aria-pressed", on);
    send(network, { do: "clamp", held: on ? field("window").value : "", clamps: ways[on ? field("window").value : "nothing"] });
  }

  const click = { train: begin, reset, pause: () => all({ do: "pause" }), step: () => all({ do: "train", steps: 1 }),
    operate: () => send(networks.find(({ name }) => name === field("inside").value), { do: "hand" }),
    continue: () => { say("Training …"); all({ do: "train" }); } };
  panel.addEventListener("click", ({ target }) => click[target.dataset?.do]?.());
  doing("hold").addEventListener("pointerdown", (event) => { event.target.setPointerCapture(event.pointerId); hold(true); });
  for (const event of ["pointerup", "pointercancel", "blur"]) doing("hold").addEventListener(event, () => hold(false));
  doing("hold").addEventListener("keydown", (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    hold(true);
  });
  doing("hold").addEventListener("keyup", () => hold(false));
  doing("hold").addEventListener("contextmenu", (event) => event.preventDefault()); // a long press on a phone
  field("start").addEventListener("input", ({ target }) => { field("labels").disabled = target.value !== ""; });
  for (const name of ["inside", "sequence"]) field(name).addEventListener("input", look);
  panel.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  addEventListener("pagehide", reset);
  doing("operate").hidden = !document.querySelector(".ih-operate");
  draw();
})();
