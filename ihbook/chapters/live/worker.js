// A Web Worker that trains one network, and looks into it, while the page stays free. It answers every message with a report.

const EVERY = 20; // steps whose losses are averaged into one point of a curve
const SLICE = 30; // milliseconds of training between two looks at the messages
const PAUSE = 120; // milliseconds between two reports

/** Bytes that ihbook.chapters.live packed: deflated, in base 64. */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

/** Numbers of half precision as numbers. */
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

/** A network, in initial weights drawn with a seed or in a checkpoint's; `shapes` says for how many labels. */
async function loaded({ shapes, weights, seed }) {
  const net = network(shapes);
  if (weights === null) drawWeights(net.params, shapes, seed);
  else net.flat.params.set(Float32Array.from(new Uint16Array(await unpacked(weights)), fromHalf));
  return net;
}

let net, acts, one, batch, task, clamps, shown, looking = null, until = 0, points = [], sums = null, drawn = -1;
let busy = 0, done = 0, reported = 0; // milliseconds, steps
const turn = new MessageChannel(); // a timer would wait four milliseconds

/** Train for a while; report, and go on unless that was the end. */
function train() {
  const start = performance.now();
  while (net.steps < until && performance.now() - start < SLICE) step();
  busy += performance.now() - start;
  if (net.steps >= until || performance.now() - reported > PAUSE) report();
  if (net.steps < until) turn.port2.postMessage(0);
}
turn.port1.onmessage = train;

function step() {
  done++;
  const chunk = Math.floor(32 * net.steps / CHUNK), from = 32 * net.steps % CHUNK;
  if (chunk !== drawn) Object.assign(batch, drawSequences(task.seed, (drawn = chunk), task.nClasses, task.sets));
  const loss = trainStep(net, batch, from, clamps, acts, task.lr);
  const { previous, induction } = strengths(acts, batch.labels, from), found = [loss, ...previous, ...induction];
  sums = sums ? sums.map((sum, i) => sum + found[i]) : found;
  if (net.steps % EVERY) return;
  const [mean, ...heads] = sums.map((sum) => sum / EVERY);
  points.push({ seen: 32 * net.steps, loss: mean, heads });
  sums = null;
}

/** What the page draws: the new points and, if it looks inside, the attention patterns and the answer on one sequence. */
function report(more = {}) {
  if (looking !== null) {
    forward(net, { ...batch, ...shown, n: task.n }, looking, clamps, one);
    more = { ...more, patterns: one.layers.map(({ pattern }) => [...pattern]), logits: [...one.logits] };
  }
  postMessage({ ...more, seen: 32 * net.steps, points, running: net.steps < until, perSecond: busy && 1000 * done / busy });
  points = [];
  reported = performance.now();
}

const DO = {
  async begin(message) {
    ({ task, shown } = message);
    clamps = held(message.clamps);
    net = await loaded(message);
    const bank = floats(FEW * net.dim);
    bank.set(new Float32Array(await unpacked(message.bank)));
    batch = { bank, n: task.nClasses };
    acts = activations(32, net.nLabels, true);
    one = activations(1, net.nLabels, false);
  },
  /** A window of training opens or closes: it holds from the next step on. */
  clamp(message) {
    clamps = held(message.clamps);
    report({ held: message.held });
  },
  train({ steps }) {
    const still = net.steps >= until;
    until = net.steps + steps;
    if (still) train();
  },
  pause() { until = net.steps; report(); },
  look({ sequence }) { looking = sequence; report(); },
};
let queue = Promise.resolve(); // messages are answered in order, also while the first unpacks
onmessage = ({ data }) => { queue = queue.then(() => DO[data.do](data)); };
