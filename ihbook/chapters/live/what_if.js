// The panel `What if?`: one worker per network; what they report is drawn some ten times per second.
(() => {
  const panel = document.currentScript.parentElement;
  const one = (selector) => panel.querySelector(selector);
  const lacks = missing();
  if (lacks) return sayInstead(panel, lacks);
  showWorking(panel);
  const data = JSON.parse(one(".ih-data").textContent), shared = sharedData(), script = workerScript();
  const field = (name) => one(`[name="${name}"]`), doing = (name) => one(`[data-do="${name}"]`);
  let networks = [], pace = data.paces[0], waiting = false;

  const ways = () => data.ways[field("heads").value];
  const say = (words) => { one(".ih-said").textContent = words; };
  const number = (n) => n.toLocaleString("en");

  function begin() {
    reset();
    const names = [...panel.querySelectorAll('[name="clamp"]:checked')].map((box) => box.value);
    const seed = Number(field("seed").value), start = field("start").value, nLabels = start ? shared.nLabels : Number(field("labels").value);
    if (!names.length) return say("Choose one or more clamps first.");
    if (!field("seed").checkValidity() || field("seed").value === "") return say("A seed is a whole number from 0 to 9,999.");
    pace = data.paces[field("pace").value];
    const rest = Math.max(0, names.length / Math.max(1, (navigator.hardwareConcurrency || 2) - 1) - 1);
    networks = names.map((name) => {
      const network = { name, worker: worker(script), points: [], windows: [], seen: 0, running: true, fell: null };
      network.worker.onmessage = ({ data: report }) => told(network, report);
      network.worker.onerror = (event) => say(`Training failed: ${event.message}`);
      network.worker.postMessage({ do: "begin", clamps: ways()[name === data.held ? "nothing" : name], shapes: shared.shapes[nLabels],
        bank: shared.bank, shown: shared.shown, weights: shared.networks[start],
        task: { nClasses: shared.nClasses, sets: shared.sets[nLabels], lr: pace.lr, seed, rest } });
      return network;
    });
    all({ do: "train", steps: pace.last / 32 });
    field("inside").innerHTML = names.map((name) => `<option>${name}</option>`).join("");
    one(".ih-hold").hidden = !names.includes(data.held);
    say("Training …");
    look();
  }

  const send = (network, message) => network.worker.postMessage(message);
  const all = (message) => networks.forEach((network) => send(network, message));

  function told(network, report) {
    network.points.push(...report.points);
    if (report.error) return say(`Training failed: ${report.error}`);
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
    const going = networks.some(({ running }) => running), still = networks.length && !going;
    doing("pause").disabled = !going;
    doing("step").disabled = doing("continue").disabled = !still;
    doing("reset").disabled = !networks.length;
    const [[left, bottom], [right, top]] = pace.corners, last = Math.max(pace.last, ...networks.map(({ seen }) => seen));
    const x = (seen) => left + (right - left) * seen / last, y = (loss) => bottom - (bottom - top) * clip(loss / pace.top, 0, 1);
    const lines = networks.map(({ name, points, windows, seen }) => {
      const colour = data.colours[name];
      const held = windows.map(({ start, end }) => `<rect x="${x(start)}" y="${top}" width="${x(end ?? seen) - x(start)}" `
        + `height="${bottom - top}" fill="${colour}" opacity=".15"/>`).join("");
      const every = Math.ceil(points.length / 400), path = points.filter((_, i) => i % every === 0).map((point) => `${x(point.seen).toFixed(1)} ${y(point.loss).toFixed(1)}`).join("L");
      return held + (path && `<path d="M${path}" fill="none" stroke="${colour}" stroke-width="1.8"/>`);
    });
    one(".ih-chart-view").innerHTML = filled(pace.chart, [lines.join("")]);
    one(".ih-curves").innerHTML = networks.length ? `<table><thead><tr><th scope="col">clamped<th scope="col">sequences seen<th scope="col">loss`
      + `<th scope="col">fell at</thead><tbody>${networks.map((network) => `<tr><th scope="row" style="--own: `
      + `${data.colours[network.name]}">${network.name}<td>${number(network.seen)}<td>`
      + `${network.points.at(-1)?.loss.toFixed(3) ?? "–"}<td>${network.fell === null ? "–" : number(network.fell)}`).join("")}</tbody></table>` : "";
    inside();
  }

  /** The heads, the answer and the attention of the network that the reader looks into. */
  function inside() {
    const network = networks.find(({ name }) => name === field("inside").value), sequence = field("sequence").value;
    const drawing = data.drawings[sequence];
    if (one(".ih-sequence").dataset.of !== sequence) Object.assign(one(".ih-sequence"), { innerHTML: drawing }).dataset.of = sequence;
    if (!network?.patterns) return;
    const heads = network.points.at(-1)?.heads ?? Array(16).fill(0);
    one(".ih-bars").innerHTML = [...data.bars.map((each, i) => [each, heads.slice(8 * i, 8 * i + 8)]),
      [shared.answers[network.logits.length], softmax(network.logits)]].map(([each, values]) => filled(each.template, barValues(values, each))).join("");
    shared.patterns.forEach((template, i) => drawPatterns(panel.querySelectorAll(".ih-patterns")[i], template, network.patterns[i]));
  }

  /** Ask the network that the reader looks into for what is inside, and no other. */
  function look() {
    for (const network of networks) {
      send(network, { do: "look", sequence: network.name === field("inside").value ? Number(field("sequence").value) : null });
    }
    later();
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
    send(network, { do: "clamp", held: on ? field("window").value : "", clamps: ways()[on ? field("window").value : "nothing"] });
  }

  const click = { train: begin, reset, pause: () => all({ do: "pause" }), step: () => all({ do: "train", steps: 1 }),
    continue: () => { say("Training …"); all({ do: "train", steps: pace.last / 32 }); } };
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
  draw();
})();
