// Fills the drawings' templates (ihbook/chapters/panels.py) with numbers, as `bar_values` and `pattern_values` do.

const short = (x, digits = 2) => String(+x.toFixed(digits)).replace(/^(-?)0\./, "$1.");
const filled = (template, values) => { let next = 0; return template.replace(/{}/g, () => values[next++]); };
const clip = (x, low, high) => Math.min(Math.max(x, low), high);
function softmax(x) {
  const most = Math.max(...x), powers = x.map((y) => Math.exp(y - most)), sum = powers.reduce((a, b) => a + b);
  return powers.map((y) => y / sum);
}

/** The numbers of bars from 0, each with its number; a bar stops at the limits. */
function barValues(values, { limits: [low, high], longest }, digits = 2) {
  const place = (value) => 12 + 7.2 * longest + 190 * (clip(value, low, high) - low) / (high - low), zero = place(0);
  return values.flatMap((value) => {
    const x = place(value);
    return [short(Math.min(x, zero), 1), short(Math.abs(x - zero), 1), short(Math.max(x, zero) + 4, 1),
      (value + 0).toFixed(digits).replace(/^-(0\.?0*)$/, "$1")];
  });
}

/** The numbers of a layer's patterns, [query, head, key], without what the causal mask hides; heads that are not `on` are pale. */
function patternValues(pattern, on = null) {
  const values = [];
  for (let h = 0; h < 8; h++) {
    values.push(on && !on[h] ? ".25" : "1");
    for (let pos = 0; pos < 5; pos++) for (let key = 0; key <= pos; key++) values.push(short(pattern[(pos * 8 + h) * 5 + key]));
  }
  return values;
}

/** Draws a layer's patterns in `view`: the template once, and then only what changes. */
function drawPatterns(view, template, pattern, on = null) {
  const values = patternValues(pattern, on);
  if (!view.firstChild) view.innerHTML = filled(template, values);
  view.querySelectorAll("figure").forEach((figure, h) => {
    figure.style.opacity = values[16 * h];
    figure.querySelectorAll("g:last-of-type rect").forEach((cell, i) => cell.setAttribute("opacity", values[16 * h + 1 + i]));
  });
}

/** What the scripts need and this browser lacks, in words; null if it has all. */
function missing() {
  if (typeof Worker === "undefined") return "Web Workers";
  if (typeof WebAssembly === "undefined" || !WebAssembly.validate(Uint8Array.from(VECTORS))) return "WebAssembly with vectors";
  return typeof DecompressionStream === "undefined" ? "DecompressionStream" : null;
}
function sayInstead(panel, lacks) {
  const words = `<p role="status">This browser can't compute here: it lacks ${lacks}. This was computed in advance:</p>`;
  panel.querySelector(".ih-instead").insertAdjacentHTML("afterbegin", words);
}
function showWorking(panel) {
  panel.querySelector(".ih-instead").hidden = true;
  panel.querySelector(".ih-works").hidden = false;
}
// A module with one instruction on vectors, which validates where there are some.
const VECTORS = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

/** A worker that runs a script, and stops when the page is left. */
function worker(script) {
  const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const made = new Worker(address);
  URL.revokeObjectURL(address);
  addEventListener("pagehide", () => made.terminate());
  return made;
}

/** What the live panels of a page share: networks, sequences, templates. */
const sharedData = () => JSON.parse(document.querySelector(".ih-shared").textContent);
const workerScript = () => JSON.parse(document.querySelector(".ih-worker").textContent);
