// One optimiser step (ihbook/engine/step.py): the gradient of `forward` by hand, then Adam. A replaced entry passes no gradient.

const BETAS = [0.9, 0.999], ADAM_EPSILON = 1e-8;

/** Take a step on 32 sequences from number `from` on; returns their mean loss before it, in nats. */
function trainStep(net, batch, from, clamps, acts, lr) {
  forward(net, batch, from, clamps, acts);
  const loss = backward(net, batch, from, clamps, acts);
  adam(net, lr);
  return loss;
}

/** The mean loss, its gradient with respect to the logits, and with it that of every weight, in `net.grads`. */
function backward(net, batch, from, clamps, acts) {
  net.flat.grads.fill(0); // a weight that a clamp leaves unused gets 0
  const loss = crossEntropy(acts, batch.labels, from, net.nLabels), { layers } = acts;
  const top = layers[N_LAYERS - 1];
  top.d.out.fill(0);
  if (clamps.copy === null) answerBack(net, acts, top);
  acts.d_token_embed.fill(0);
  for (let i = N_LAYERS - 1; i >= 0; i--) {
    const layer = layers[i], below = i ? layers[i - 1].d.out : acts.d_token_embed;
    layerBack(net, batch, from, clamps, acts, i);
    if (!(i && clamps.layer1)) below.set(layer.d.resid_pre);
    else { // the learnt Layer 1 gets no gradient; the token embeddings get both
      for (let row = 0; row < acts.rows; row++) {
        const at = row * D_MODEL, source = (row - row % N_POS + SOURCES[row % N_POS]) * D_MODEL;
        for (let j = 0; j < D_MODEL; j++) {
          acts.d_token_embed[at + j] += layer.d.resid_pre[at + j];
          acts.d_token_embed[source + j] += layer.d.qk_input[at + j];
        }
      }
      break;
    }
  }
  embedBack(net, batch, from, acts);
  return loss;
}

function crossEntropy({ logits, d_logits, size }, labels, from, nLabels) {
  let loss = 0;
  for (let i = 0; i < size; i++) {
    const own = logits.subarray(i * nLabels, (i + 1) * nLabels), target = labels[3 * (from + i) + 2];
    const most = Math.max(...own), total = own.reduce((sum, x) => sum + Math.exp(x - most), 0);
    loss += Math.log(total) + most - own[target];
    own.forEach((x, label) => { d_logits[i * nLabels + label] = (Math.exp(x - most) / total - (label === target)) / size; });
  }
  return loss / size;
}

/** Through the unembedding and the last LayerNorm. */
function answerBack({ params, grads, nLabels }, { final, d_logits, size }, top) {
  const weight = params["unembed.weight"], d_weight = grads["unembed.weight"], d_bias = grads["unembed.bias"];
  final.d.fill(0);
  for (let i = 0; i < size; i++) {
    for (let label = 0; label < nLabels; label++) {
      const d = d_logits[i * nLabels + label];
      d_bias[label] += d;
      for (let j = 0; j < D_MODEL; j++) {
        d_weight[label * D_MODEL + j] += d * final.out[i * D_MODEL + j];
        final.d[i * D_MODEL + j] += d * weight[label * D_MODEL + j];
      }
    }
  }
  layerNormBack(top.d.out, final.d, final, params, grads, "final_norm", size);
}

/** Adds the gradient of a LayerNorm's input to `dx`, and those of its weights. */
function layerNormBack(dx, dy, { hat, rstd }, params, grads, name, rows) {
  const weight = params[`${name}.weight`], d_weight = grads[`${name}.weight`], d_bias = grads[`${name}.bias`];
  for (let row = 0; row < rows; row++) {
    const at = row * D_MODEL;
    let mean = 0, along = 0;
    for (let j = 0; j < D_MODEL; j++) {
      const d = dy[at + j], x = hat[at + j], scaled = d * weight[j];
      d_weight[j] += d * x;
      d_bias[j] += d;
      mean += scaled;
      along += scaled * x;
    }
    mean /= D_MODEL;
    along /= D_MODEL;
    for (let j = 0; j < D_MODEL; j++) dx[at + j] += rstd[row] * (dy[at + j] * weight[j] - mean - hat[at + j] * along);
  }
}

/** Through a layer: from `d.out`, the gradient of what it adds to, to `d.resid_pre` (and `d.qk_input` where a clamp sets it). */
function layerBack({ params, grads }, batch, from, clamps, acts, i) {
  const layer = acts.layers[i], { d, first, n, queries } = layer, square = D_MODEL * D_MODEL, names = `layers.${i}.attn`;
  const [q, k, v] = [0, 1, 2].map((part) => [params, grads].map((of) => of[`${names}.qkv.weight`].subarray(part * square)));
  linearBack(d.z, d.out, params[`${names}.proj.weight`], queries, D_MODEL, D_MODEL);
  linearGradient(grads[`${names}.proj.weight`], d.out, layer.z, queries, D_MODEL, D_MODEL);
  attendBack(layer, i, clamps, batch.labels, from, acts.d_logits, acts.logits.length / acts.size);
  rotate(d.q, acts.size, first, -1);
  rotate(d.k, acts.size, 0, -1);
  for (let h = 0; h < N_HEADS; h++) if (clamps.off[i][h]) clearHead(d.v, h);

  const apart = i && clamps.layer1, qk = apart ? layer.qk_norm : layer.norm, d_qk = apart ? d.qk_norm : d.norm;
  const some = [first * D_MODEL, D_MODEL * N_POS / n]; // of all rows, those of the queries
  linearGradient(q[1], d.q, qk.out.subarray(some[0]), queries, D_MODEL, D_MODEL, some[1]);
  linearGradient(k[1], d.k, qk.out, acts.rows, D_MODEL, D_MODEL);
  linearGradient(v[1], d.v, layer.norm.out, acts.rows, D_MODEL, D_MODEL);
  linearBack(d_qk, d.k, k[0], acts.rows, D_MODEL, D_MODEL);
  linearBack(d_qk.subarray(some[0]), d.q, q[0], queries, D_MODEL, D_MODEL, true, some[1]);
  linearBack(d.norm, d.v, v[0], acts.rows, D_MODEL, D_MODEL, !apart);

  d.resid_pre.fill(0);
  for (let row = 0; row < queries; row++) { // the stream goes on past the layer
    d.resid_pre.set(d.out.subarray(row * D_MODEL, (row + 1) * D_MODEL),
      ((row - row % n) / n * N_POS + first + row % n) * D_MODEL);
  }
  layerNormBack(d.resid_pre, d.norm, layer.norm, params, grads, `layers.${i}.norm1`, acts.rows);
  if (!apart) return;
  d.qk_input.fill(0);
  layerNormBack(d.qk_input, d.qk_norm, layer.qk_norm, params, grads, `layers.${i}.norm1`, acts.rows);
}

/** From `d.z` to `d.q`, `d.k` and `d.v`; a copied head's scores are logits too. */
function attendBack({ first, n, queries, q, k, v, pattern, d }, i, clamps, labels, from, d_logits, nLabels) {
  for (const part of [d.q, d.k, d.v]) part.fill(0);
  const d_pattern = new Float64Array(N_POS);
  for (let row = 0; row < queries; row++) {
    const sequence = (row - row % n) / n, pos = first + row % n, keys = sequence * N_POS * D_MODEL;
    for (let h = 0; h < N_HEADS; h++) {
      const own = row * D_MODEL + h * D_HEAD, theirs = keys + h * D_HEAD, at = (row * N_HEADS + h) * N_POS;
      const copied = i === N_LAYERS - 1 && h === clamps.copy && pos === N_POS - 1;
      const clamped = clamps.previous[i][h] !== null || (clamps.match[i][h] !== null && pos === N_POS - 1);
      let mean = 0;
      for (let key = 0; key <= pos; key++) {
        const p = pattern[at + key];
        let dp = 0;
        for (let e = 0, there = theirs + key * D_MODEL; e < D_HEAD; e++) {
          dp += d.z[own + e] * v[there + e];
          d.v[there + e] += p * d.z[own + e];
        }
        d_pattern[key] = dp;
        mean += p * dp;
      }
      if (clamped && !copied) continue;
      for (let key = 0; key <= pos; key++) {
        let ds = clamped ? 0 : pattern[at + key] * (d_pattern[key] - mean);
        if (copied && key % 2) ds += d_logits[sequence * nLabels + labels[3 * (from + sequence) + (key >> 1)]];
        ds *= SCALE;
        for (let e = 0, there = theirs + key * D_MODEL; e < D_HEAD; e++) {
          d.q[own + e] += ds * k[there + e];
          d.k[there + e] += ds * q[own + e];
        }
      }
    }
  }
}

/** From token embeddings to those of labels and exemplars. */
function embedBack({ grads, dim, nLabels }, { bank, ids, labels, n }, from, { d_token_embed, d_table, size }) {
  const d_label = grads["label_embed.weight"], d_bias = grads["exemplar_embed.bias"];
  d_table.fill(0);
  for (let i = 0; i < size; i++) {
    for (let pos = 0; pos < N_POS; pos++) {
      const row = (i * N_POS + pos) * D_MODEL, slot = 3 * (from + i) + (pos >> 1);
      for (let j = 0; j < D_MODEL; j++) {
        if (pos % 2) d_label[j * nLabels + labels[slot]] += d_token_embed[row + j];
        else {
          d_table[ids[slot] * D_MODEL + j] += d_token_embed[row + j];
          d_bias[j] += d_token_embed[row + j];
        }
      }
    }
  }
  linearGradient(grads["exemplar_embed.weight"], d_table, bank, n, dim, D_MODEL);
}

function adam(net, lr) {
  const { params, grads, exp_avg, exp_avg_sq } = net.flat;
  net.steps++;
  const rate = lr / (1 - BETAS[0] ** net.steps), scale = (1 - BETAS[1] ** net.steps) ** -0.5;
  for (let i = 0; i < params.length; i++) {
    const g = grads[i];
    let m = BETAS[0] * exp_avg[i] + (1 - BETAS[0]) * g;
    if (m > -1e-30 && m < 1e-30) m = 0; // where a clamp cuts a gradient off, its mean would decay to numbers that are slow to read
    const v = BETAS[1] * exp_avg_sq[i] + (1 - BETAS[1]) * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    params[i] -= rate * m / (Math.sqrt(v) * scale + ADAM_EPSILON);
  }
}

/** Means over the last step's sequences: each Layer 1 head's attention from labels to the token before, and each Layer 2 head's
 * induction strength. */
function strengths({ layers, size }, labels, from) {
  const previous = Array(N_HEADS).fill(0), induction = Array(N_HEADS).fill(0);
  const entry = ({ n, first, pattern }, i, pos, h, key) => pattern[((i * n + pos - first) * N_HEADS + h) * N_POS + key];
  for (let i = 0; i < size; i++) {
    const right = rightLabel(labels, from + i);
    for (let h = 0; h < N_HEADS; h++) {
      for (const pos of [1, 3]) previous[h] += entry(layers[0], i, pos, h, pos - 1) / size / 2;
      for (const key of [1, 3]) induction[h] += (key === right ? 1 : -1) * entry(layers[1], i, 4, h, key) / size;
    }
  }
  return { previous, induction };
}
