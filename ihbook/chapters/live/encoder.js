// The learnt encoder of characters (ihbook/banks/encoder.py): four convolutions in whole numbers, and so the same features.

const WIDTHS = [32, 64, 128, 512], SIDE = 28, GRID = 2 ** -8;

/** The encoder's layers, from their weights, exponents and biases one after the other, as `operate.py` packs them. */
function encoderOf(buffer) {
  let at = 0, inputs = 1;
  return WIDTHS.map((width) => {
    const weight = new Int8Array(buffer, at, width * inputs * 9), exponent = new Int8Array(buffer, (at += weight.length), width);
    const bias = new Int32Array(buffer.slice((at += width), (at += 4 * width)));
    const scaled = Float64Array.from(weight, (w, i) => w * 2 ** -exponent[Math.floor(i / inputs / 9)]);
    const layer = { inputs, width, bias, weight: scaled };
    inputs = width;
    return layer;
  });
}

/** The 512 features of a character, 28 x 28 bytes with ink 255. */
function encode(layers, image, scale) {
  let side = SIDE, x = Float64Array.from(image, (ink) => ink / 256); // [channel, row, column]
  layers.forEach(({ inputs, width, bias, weight }, i) => {
    if (i) [x, side] = [pooled(x, inputs, side), side >> 1];
    const wide = side + 2, padded = new Float64Array(inputs * wide * wide), out = new Float64Array(width * side * side);
    for (let c = 0; c < inputs; c++) {
      for (let row = 0; row < side; row++) {
        padded.set(x.subarray((c * side + row) * side, (c * side + row + 1) * side), (c * wide + row + 1) * wide + 1);
      }
    }
    for (let o = 0; o < width; o++) {
      const own = out.subarray(o * side * side, (o + 1) * side * side).fill(bias[o] * GRID);
      for (let c = 0; c < inputs; c++) {
        for (let tap = 0; tap < 9; tap++) {
          const w = weight[(o * inputs + c) * 9 + tap], start = c * wide * wide + Math.floor(tap / 3) * wide + tap % 3;
          for (let row = 0; row < side; row++) {
            const to = row * side, from = start + row * wide;
            for (let column = 0; column < side; column++) own[to + column] += w * padded[from + column];
          }
        }
      }
      own.forEach((y, j) => { own[j] = Math.max(0, even(y / GRID) * GRID); });
    }
    x = out;
  });
  const places = side * side, sum = (channel) => x.subarray(channel * places, (channel + 1) * places).reduce((a, b) => a + b);
  return Float32Array.from({ length: WIDTHS[3] }, (_, channel) => scale * sum(channel));
}

/** The nearest whole number; of two as near, the even one. */
function even(y) {
  const low = Math.floor(y), rest = y - low;
  return rest === 0.5 ? low + (low & 1) : low + (rest > 0.5);
}

/** The most of each two by two. */
function pooled(x, channels, side) {
  const half = side >> 1, out = new Float64Array(channels * half * half);
  for (let c = 0, at = 0; c < channels; c++) {
    for (let row = 0; row < half; row++) {
      for (let column = 0, from = (c * side + 2 * row) * side; column < half; column++, from += 2) {
        out[at++] = Math.max(x[from], x[from + 1], x[from + side], x[from + side + 1]);
      }
    }
  }
  return out;
}
