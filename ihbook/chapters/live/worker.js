// A Web Worker that trains one network, or operates on it, while the page stays free.

const CHUNK = 8192; // training sequences drawn at once: `CHUNK_STEPS` of 32
const EVERY = 20; // steps whose losses are averaged into one point of a curve
const SLICE = 30; // milliseconds of training between two looks at the messages
const PAUSE = 120; // milliseconds between two reports

/** Numbers of half precision as numbers. */
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

/** Fill a network with weights: a page's checkpoint, or those that another worker handed over. */
async function adopt(net, weights) {
  if (weights instanceof Float32Array) return net.flat.params.set(weights);
  const bytes = new Uint8Array(await unpacked(weights)), n = bytes.length / 2;
  net.flat.params.set(Float32Array.from({ length: n }, (_, i) => fromHalf(bytes[i] | (bytes[n + i] << 8))));
}

let net, acts, one, batch, task, clamps, shown, looking = null, until = 0, points = [], sums = null, drawn = -1, reported = 0;
let waiting = false; // for the next turn
const turn = new MessageChannel(); // messages are read between two turns; a timer would wait four milliseconds

/** Train for a while; report, and go on unless that was the end. */
function train() {
  const start = performance.now();
  waiting = false;
  while (net.steps < until && performance.now() - start < SLICE) step();
  if (net.steps >= until || performance.now() - reported > PAUSE) report();
  if (net.steps >= until) return;
  waiting = true;
  if (task.rest) setTimeout(train, task.rest * SLICE); // there are more networks than cores: one core stays free for the page
  else turn.port2.postMessage(0);
}
turn.port1.onmessage = train;

function step() {
  const chunk = Math.floor(32 * net.steps / CHUNK), from = 32 * net.steps % CHUNK;
  if (chunk !== drawn) Object.assign(batch, drawSequences(`('train', ${task.seed}, ${chunk})`, CHUNK, task.nClasses, task.sets));
  drawn = chunk;
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
    forward(net, { ...batch, ...shown, n: FEW }, looking, clamps, one);
    more = { ...more, patterns: one.layers.map(({ pattern }) => [...pattern]), logits: [...one.logits] };
  }
  postMessage({ ...more, seen: 32 * net.steps, points, running: net.steps < until });
  points = [];
  reported = performance.now();
}

/** Accuracy and mean loss of the network under clamps, over a sample of training sequences. */
function measured(sample, clamps) {
  let right = 0, loss = 0;
  for (let from = 0; from < sample.size; from += acts.size) {
    forward(net, sample, from, clamps, acts, clamps.kept.length ? forward(net, sample, from, NOTHING, plain) : null);
    loss += crossEntropy(acts, sample.labels, from, net.nLabels) * acts.size;
    for (let i = 0; i < acts.size; i++) {
      const own = acts.logits.subarray(i * net.nLabels, (i + 1) * net.nLabels);
      right += own.indexOf(Math.max(...own)) === sample.labels[3 * (from + i) + 2];
    }
  }
  return { accuracy: right / sample.size, loss: loss / sample.size };
}

/** A batch of one sequence: three characters as images, and the labels of both exemplars and the right one. */
function sequenceOf({ images, labels }) {
  images.forEach((image, i) => {
    const key = image.join();
    if (known.size > 100) known.clear(); // a drawing in the making is a new character with each stroke
    if (!known.has(key)) known.set(key, encode(encoder, image, scale));
    batch.bank.set(known.get(key), (task.nClasses + i) * net.dim);
  });
  return { bank: batch.bank, n: task.nClasses + 3, ids: [0, 1, 2].map((i) => task.nClasses + i), labels };
}

let encoder, scale, sample, plain, onePlain, cost = {};
const known = new Map(), NOTHING = held([]);

const DO = {
  /** Get ready to train a network. */
  async begin(message) {
    await prepare(message, 32);
    clamps = held(message.clamps);
    shown = message.shown;
  },
  /** A window of training opens or closes: it holds from the next step on. */
  clamp(message) {
    clamps = held(message.clamps);
    report({ held: message.held });
  },
  /** Train so many steps, or to the end. */
  train({ steps = Infinity }) {
    until = Math.min(net.steps + steps, task.steps);
    if (!waiting) train();
  },
  pause() { until = net.steps; report(); },
  look({ sequence }) { looking = sequence; report(); },
  /** Hand over the weights as they are now. */
  hand() { postMessage({ seen: 32 * net.steps, weights: net.flat.params.slice() }); },

  /** Get ready to operate on a network. */
  async operateOn(message) {
    await prepare(message, 40);
    plain = activations(acts.size, net.nLabels, true);
    onePlain = activations(1, net.nLabels, false);
    encoder = encoderOf(await unpacked(message.encoder));
    scale = message.scale;
    sample = { ...batch, size: 2000, ...drawSequences("('explore', 0)", 2000, task.nClasses, task.sets) };
  },
  async weights({ weights }) {
    await adopt(net, weights);
    cost = {};
  },
  /** The network's answer on one sequence, with its attention, and what the operation costs over the sample. */
  operate(message) {
    const clamps = held(message.clamps), own = sequenceOf(message);
    forward(net, own, 0, clamps, one, clamps.kept.length ? forward(net, own, 0, NOTHING, onePlain) : null);
    const key = JSON.stringify(message.clamps);
    if (key !== cost.key) cost = { key, ...measured(sample, clamps) }; // a new character does not change it
    postMessage({ patterns: one.layers.map(({ pattern }) => [...pattern]), logits: [...one.logits], ...cost });
  },
};

async function prepare(message, size) {
  ({ task } = message);
  net = network(message.shapes);
  if (message.weights) await adopt(net, message.weights);
  else drawWeights(net.params, net.shapes, task.seed);
  batch = { bank: floats(FEW * net.dim), n: task.nClasses };
  batch.bank.set(new Float32Array(await unpacked(message.bank)));
  acts = activations(size, net.nLabels, true);
  one = activations(1, net.nLabels, false);
}

let queue = Promise.resolve(); // messages are answered in order, also while the first unpacks
onmessage = ({ data }) => {
  queue = queue.then(() => DO[data.do](data)).catch((error) => postMessage({ error: error.message }));
};
