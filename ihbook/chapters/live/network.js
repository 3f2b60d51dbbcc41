// The paper's network (ihbook/model.py), two pairs per sequence: a forward pass under clamps that names its activations.
// Activations are [sequence, position, feature]; a last layer that serves the query alone has one position.

const D_MODEL = 64, N_HEADS = 8, D_HEAD = 8, N_POS = 5, N_LAYERS = 2, EPSILON = 1e-5;
const BLOCKED = -1e9, SCALE = D_HEAD ** -0.5;
const SOURCES = [0, 0, 1, 2, 4]; // a perfect Layer 1: each token but the first and the query is replaced by the one before

/** Weights by name, their gradients and Adam's moments, each set in one array; and the transposes that products read. */
function network(shapes) {
  const sizes = Object.entries(shapes).map(([name, shape]) => [name, shape.reduce((a, b) => a * b)]);
  const total = sizes.reduce((sum, [, size]) => sum + size, 0);
  const views = (flat) => {
    let at = 0;
    return Object.fromEntries(sizes.map(([name, size]) => [name, flat.subarray(at, (at += size))]));
  };
  const flat = Object.fromEntries(["params", "grads", "exp_avg", "exp_avg_sq"].map((kind) => [kind, floats(total)]));
  const matrices = Object.entries(shapes).filter(([name, s]) => s.length === 2 && !/label|unembed/.test(name));
  const transposed = Object.fromEntries(matrices.map(([name, shape]) => [name, floats(shape[0] * shape[1])]));
  return { shapes, flat, transposed, params: views(flat.params), grads: views(flat.grads), steps: 0,
    nLabels: shapes["unembed.bias"][0], dim: shapes["exemplar_embed.weight"][1] };
}

/** What a list of clamps, as ihbook encodes them, means for each layer and head. */
function held(clamps) {
  const layers = () => Array.from({ length: N_LAYERS }, () => Array(N_HEADS).fill(null));
  const found = { off: layers(), previous: layers(), match: layers(), layer1: false, copy: null, kept: [] };
  for (const { type, heads, head, strength, what } of clamps) {
    const mark = (kind, value) => heads.forEach(([layer, h]) => { found[kind][layer][h] = value; });
    if (type === "Ablate") mark("off", true);
    else if (type === "PreviousToken") mark("previous", strength);
    else if (type === "Induction") mark("match", strength);
    else if (type === "PerfectLayer1") found.layer1 = true;
    else if (type === "Copy") found.copy = head[1]; // a head of Layer 2
    else if (type === "Preserve") found.kept.push(...what);
    else throw new Error(`the page has no clamp ${type}`);
  }
  return found;
}

/** Room for the activations of `size` sequences and their gradients; with `queryOnly` the last layer has the query's row alone. */
function activations(size, nLabels, queryOnly) {
  const rows = size * N_POS, stream = (n = rows) => floats(n * D_MODEL, D_MODEL);
  const norm = (n) => ({ hat: stream(n), rstd: floats(n), out: stream(n) });
  const layers = Array.from({ length: N_LAYERS }, (_, i) => {
    const first = queryOnly && i === N_LAYERS - 1 ? N_POS - 1 : 0, n = N_POS - first, queries = size * n;
    const attention = () => floats(queries * N_HEADS * N_POS); // [sequence, query, head, key]
    return { first, n, queries, resid_pre: stream(), norm: norm(rows), qk_input: stream(), qk_norm: norm(rows), q: stream(queries),
      k: stream(), v: stream(), attn_scores: attention(), pattern: attention(), z: stream(queries), resid_post: stream(queries),
      d: { out: stream(queries), z: stream(queries), q: stream(queries), k: stream(), v: stream(), norm: stream(),
        qk_norm: stream(), qk_input: stream(), resid_pre: stream() } };
  });
  return { size, rows, queryOnly, layers, token_embed: stream(), table: stream(FEW), final: { ...norm(size), d: stream(size) },
    logits: floats(size * nLabels), d_logits: floats(size * nLabels), d_token_embed: stream(), d_table: stream(FEW) };
}

const FEW = 68; // rows of a bank at most; a multiple of 4

/** The activations of sequences number `from` on of `batch`: its bank [n, dim], and ids and labels [sequence, 3]. */
function forward(net, batch, from, clamps, acts, unclamped = null) {
  const { params, transposed, shapes } = net, { layers, size } = acts;
  for (const [name, wt] of Object.entries(transposed)) {
    const [rows, columns] = shapes[name], third = name.endsWith("qkv.weight") ? rows / 3 : rows;
    for (let at = 0; at < rows; at += third) { // queries, keys and values one after the other
      transpose(wt.subarray(at * columns), params[name].subarray(at * columns), third, columns);
    }
  }
  embed(net, batch, from, acts);
  for (let i = 0; i < N_LAYERS; i++) {
    const layer = layers[i], last = i === N_LAYERS - 1;
    layer.resid_pre.set(i && !clamps.layer1 ? layers[i - 1].resid_post : acts.token_embed);
    layerNorm(layer.norm, layer.resid_pre, params, `layers.${i}.norm1`, acts.rows);
    let qk = layer.norm.out;
    if (i && clamps.layer1) {
      for (let row = 0; row < acts.rows; row++) {
        const source = (row - row % N_POS + SOURCES[row % N_POS]) * D_MODEL;
        layer.qk_input.set(acts.token_embed.subarray(source, source + D_MODEL), row * D_MODEL);
      }
      layerNorm(layer.qk_norm, layer.qk_input, params, `layers.${i}.norm1`, acts.rows);
      qk = layer.qk_norm.out;
    }
    const [q, k, v] = [0, 1, 2].map((part) => transposed[`layers.${i}.attn.qkv.weight`].subarray(part * D_MODEL * D_MODEL));
    linear(layer.q, qk.subarray(layer.first * D_MODEL), q, layer.queries, D_MODEL, D_MODEL, D_MODEL * N_POS / layer.n);
    linear(layer.k, qk, k, acts.rows, D_MODEL, D_MODEL);
    linear(layer.v, layer.norm.out, v, acts.rows, D_MODEL, D_MODEL);
    rotate(layer.q, size, layer.first, 1);
    rotate(layer.k, size, 0, 1);
    if (unclamped && clamps.kept.includes("values") && !(i && clamps.layer1)) layer.v.set(unclamped.layers[i].v);
    for (let h = 0; h < N_HEADS; h++) if (clamps.off[i][h]) clearHead(layer.v, h);
    const kept = unclamped && clamps.kept.includes("patterns") && !(i && clamps.layer1) ? unclamped.layers[i].pattern : null;
    attend(layer, i, clamps, batch.labels, from, kept);
    linear(layer.resid_post, layer.z, transposed[`layers.${i}.attn.proj.weight`], layer.queries, D_MODEL, D_MODEL);
    for (let row = 0; row < layer.queries; row++) {
      const own = row * D_MODEL, before = ((row - row % layer.n) / layer.n * N_POS + layer.first + row % layer.n) * D_MODEL;
      for (let j = 0; j < D_MODEL; j++) layer.resid_post[own + j] += layer.resid_pre[before + j];
    }
    if (last) answer(net, batch, from, clamps, acts);
  }
  return acts;
}

/** Token embeddings: the whole bank is embedded once, then exemplars and labels are laid out as a sequence. */
function embed({ params, transposed, dim, nLabels }, { bank, ids, labels, n }, from, { table, token_embed, size }) {
  linear(table, bank, transposed["exemplar_embed.weight"], n, dim, D_MODEL);
  const bias = params["exemplar_embed.bias"], label = params["label_embed.weight"];
  for (let i = 0; i < size; i++) {
    for (let pos = 0; pos < N_POS; pos++) {
      const row = (i * N_POS + pos) * D_MODEL, slot = 3 * (from + i) + (pos >> 1);
      if (pos % 2) for (let j = 0; j < D_MODEL; j++) token_embed[row + j] = label[j * nLabels + labels[slot]];
      else for (let j = 0; j < D_MODEL; j++) token_embed[row + j] = table[ids[slot] * D_MODEL + j] + bias[j];
    }
  }
}

function layerNorm({ hat, rstd, out }, x, params, name, rows, every = 1, first = 0) {
  const weight = params[`${name}.weight`], bias = params[`${name}.bias`];
  for (let row = 0; row < rows; row++) {
    const at = row * D_MODEL, from = (row * every + first) * D_MODEL;
    let mean = 0, variance = 0;
    for (let j = 0; j < D_MODEL; j++) mean += x[from + j];
    mean /= D_MODEL;
    for (let j = 0; j < D_MODEL; j++) variance += (x[from + j] - mean) ** 2;
    const scale = 1 / Math.sqrt(variance / D_MODEL + EPSILON);
    rstd[row] = scale;
    for (let j = 0; j < D_MODEL; j++) {
      hat[at + j] = (x[from + j] - mean) * scale;
      out[at + j] = hat[at + j] * weight[j] + bias[j];
    }
  }
}

const TURNS = Array.from({ length: N_POS }, (_, pos) => [0, 1, 2, 3].map((i) => pos * 10000 ** (-2 * i / D_HEAD)));

/** Rotary positions, in place: adjacent pairs of features turn by the angle of their position; backwards with `sign` -1. */
function rotate(x, size, first, sign) {
  for (let pos = first, n = N_POS - first; pos < N_POS; pos++) {
    for (let pair = 0; pair < D_HEAD / 2; pair++) {
      const cos = Math.cos(TURNS[pos][pair]), sin = sign * Math.sin(TURNS[pos][pair]);
      for (let i = 0; i < size; i++) {
        for (let h = 0, at = (i * n + pos - first) * D_MODEL + 2 * pair; h < N_HEADS; h++, at += D_HEAD) {
          const even = x[at], odd = x[at + 1];
          x[at] = even * cos - odd * sin;
          x[at + 1] = even * sin + odd * cos;
        }
      }
    }
  }
}

function clearHead(x, h) {
  for (let at = h * D_HEAD; at < x.length; at += D_MODEL) x.fill(0, at, at + D_HEAD);
}

/** The pattern's row that clamps set, of head `h` at query position `pos`; null if they leave it alone. */
function clampedRow(clamps, i, h, pos, right) {
  const previous = clamps.previous[i][h], match = clamps.match[i][h], row = [0, 0, 0, 0, 0];
  if (previous !== null) {
    if (pos) row[pos - 1] = previous;
    row[pos] = pos ? 1 - previous : 1;
    return row;
  }
  if (match === null || pos < N_POS - 1) return null;
  row[right] = match;
  row[4 - right] = 1 - match; // the label tokens are positions 1 and 3
  return row;
}

/** The position of the right label token of a sequence. */
const rightLabel = (labels, sequence) => (labels[3 * sequence] === labels[3 * sequence + 2] ? 1 : 3);

/** Scores, patterns and z of a layer; rows that no clamp sets are `kept` where that is given. */
function attend({ first, n, queries, q, k, v, attn_scores, pattern, z }, i, clamps, labels, from, kept) {
  z.fill(0);
  for (let row = 0; row < queries; row++) {
    const sequence = (row - row % n) / n, pos = first + row % n, keys = sequence * N_POS * D_MODEL;
    for (let h = 0; h < N_HEADS; h++) {
      const own = row * D_MODEL + h * D_HEAD, theirs = keys + h * D_HEAD, at = (row * N_HEADS + h) * N_POS;
      let most = -Infinity, total = 0;
      for (let key = 0; key <= pos; key++) {
        let score = 0;
        for (let e = 0, there = theirs + key * D_MODEL; e < D_HEAD; e++) score += q[own + e] * k[there + e];
        attn_scores[at + key] = score *= SCALE;
        most = Math.max(most, score);
      }
      for (let key = 0; key <= pos; key++) total += pattern[at + key] = Math.exp(attn_scores[at + key] - most);
      const clamped = clampedRow(clamps, i, h, pos, rightLabel(labels, from + sequence));
      for (let key = 0; key <= pos; key++) {
        const p = pattern[at + key] = clamped ? clamped[key] : kept ? kept[at + key] : pattern[at + key] / total;
        for (let e = 0, there = theirs + key * D_MODEL; e < D_HEAD; e++) z[own + e] += p * v[there + e];
      }
    }
  }
}

/** The logits at the query. */
function answer({ params, nLabels }, { labels }, from, clamps, { layers, logits, final, size }) {
  const layer = layers[N_LAYERS - 1], weight = params["unembed.weight"], bias = params["unembed.bias"];
  layerNorm(final, layer.resid_post, params, "final_norm", size, layer.n, layer.n - 1);
  for (let i = 0; i < size; i++) {
    for (let label = 0; label < nLabels; label++) {
      let logit = bias[label];
      for (let j = 0; j < D_MODEL; j++) logit += final.out[i * D_MODEL + j] * weight[label * D_MODEL + j];
      logits[i * nLabels + label] = clamps.copy === null ? logit : BLOCKED;
    }
    if (clamps.copy === null) continue;
    const scores = (((i + 1) * layer.n - 1) * N_HEADS + clamps.copy) * N_POS;
    for (const pair of [0, 1]) logits[i * nLabels + labels[3 * (from + i) + pair]] = layer.attn_scores[scores + 1 + 2 * pair];
  }
}
