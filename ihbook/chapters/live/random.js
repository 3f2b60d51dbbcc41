// Random numbers as PyTorch draws them on a CPU, so that a seed names the same network and the same sequences in the page.

const ROTATIONS = [2, 13, 22, 6, 11, 25, 7, 18, 3, 17, 19, 10]; // of SHA-256; the constants are roots of primes
const PRIMES = [];
for (let n = 2; PRIMES.length < 64; n++) if (PRIMES.every((p) => n % p)) PRIMES.push(n);
const fraction = (root) => ((root % 1) * 2 ** 32) | 0;

/** The first 8 words of the SHA-256 of a text of ASCII characters. */
function sha256(text) {
  const state = PRIMES.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
  const constants = PRIMES.map((p) => fraction(Math.cbrt(p)));
  const words = new Int32Array(((text.length + 72) >> 6) << 4);
  [...text].forEach((letter, i) => { words[i >> 2] |= letter.charCodeAt(0) << (24 - 8 * (i & 3)); });
  words[text.length >> 2] |= 128 << (24 - 8 * (text.length & 3));
  words[words.length - 1] = text.length * 8;
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  const [a0, a1, a2, e0, e1, e2, s0, s1, s2, t0, t1, t2] = ROTATIONS;
  const w = new Int32Array(64);
  for (let block = 0; block < words.length; block += 16) {
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i++) {
      if (i < 16) w[i] = words[block + i];
      else {
        const x = w[i - 15], y = w[i - 2];
        w[i] = w[i - 16] + (turn(x, s0) ^ turn(x, s1) ^ (x >>> s2)) + w[i - 7] + (turn(y, t0) ^ turn(y, t1) ^ (y >>> t2));
      }
      const one = (h + (turn(e, e0) ^ turn(e, e1) ^ turn(e, e2)) + ((e & f) ^ (~e & g)) + constants[i] + w[i]) | 0;
      const two = ((turn(a, a0) ^ turn(a, a1) ^ turn(a, a2)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((x, i) => { state[i] = (state[i] + x) | 0; });
  }
  return state;
}

/** A Mersenne Twister (MT19937): a function that returns the next 32 random bits. */
function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let at = 624;
  return () => {
    if (at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let y = state[at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** The generator that `ihbook.task.seeded` makes of a key, which is given as Python writes it. */
function seeded(key) {
  const [high, low] = sha256(key);
  return twister((((high & 1) << 31) | (low >>> 1)) >>> 0);
}

const uniform = (bits) => (bits() & 0xffffff) / 2 ** 24;

/** Standard normal numbers, 16 at a time: of each 16 uniform ones, the first 8 give the radius and the last 8 the angle. */
function normals(size, bits) {
  const out = Float32Array.from({ length: size }, () => uniform(bits));
  for (let at = 0; at < size; at += 16) {
    for (let i = at; i < at + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - out[i])), angle = 2 * Math.PI * out[i + 8];
      out[i] = radius * Math.cos(angle);
      out[i + 8] = radius * Math.sin(angle);
    }
  }
  return out;
}

/** Normal numbers truncated at ±2: while one is outside, all are drawn again, and those outside are replaced. */
function truncated(size, bits) {
  const out = normals(size, bits);
  while (out.some((x) => Math.abs(x) > 2)) {
    const again = normals(size, bits);
    for (let i = 0; i < size; i++) if (Math.abs(out[i]) > 2) out[i] = again[i];
  }
  return out;
}

/** `ihbook.model.initial_weights`: fills `params`, a Float32Array for each of the names in `shapes`. */
function drawWeights(params, shapes, seed) {
  for (const [name, shape] of Object.entries(shapes)) {
    params[name].fill(name.endsWith("weight") && shape.length === 1 ? 1 : 0);
    if (shape.length === 1) continue;
    const std = name === "label_embed.weight" ? 0.02 : shape[1] ** -0.5 / 0.87962566103423978;
    truncated(shape[0] * shape[1], seeded(`('weights', '${name}', ${seed})`)).forEach((x, i) => { params[name][i] = x * std; });
  }
}

/** `ihbook.task.sample` for two pairs, with the generator of `key`: ids [sequence, 3] and labels [sequence, 3]. */
function drawSequences(key, n, nClasses, labelSets) {
  const bits = seeded(key);
  const below = (end, size) => Uint8Array.from({ length: size }, () => bits() % end);
  const classes = below(nClasses, 2 * n);
  below(nClasses - 1, n).forEach((x, i) => { classes[2 * i + 1] = x + (x >= classes[2 * i]); });
  const sets = below(labelSets.length, n);
  const swapped = Array.from({ length: n }, () => uniform(bits) > uniform(bits));
  const query = below(2, n);
  const ids = new Uint8Array(3 * n), labels = new Uint8Array(3 * n);
  for (let i = 0; i < n; i++) {
    const set = labelSets[sets[i]], pair = swapped[i] ? [set[1], set[0]] : set;
    for (const [slot, which] of [0, 1, query[i]].entries()) {
      ids[3 * i + slot] = classes[2 * i + which];
      labels[3 * i + slot] = pair[which];
    }
  }
  return { ids, labels };
}
