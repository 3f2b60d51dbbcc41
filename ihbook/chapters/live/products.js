// Matrix products as WebAssembly that is assembled here, instruction by instruction: no compiler, no binary file.

const memory = new WebAssembly.Memory({ initial: 256 }); // pages of 64 KiB: some 16 MB
let used = 0;

/** An array of `size` zeros in the memory that products read, with room for three more rows of `width`. */
function floats(size, width = 0) {
  const bytes = 4 * ((size + 3 * width + 3) & ~3);
  if (used + bytes > memory.buffer.byteLength) throw new Error("the arrays do not fit");
  used += bytes;
  return new Float32Array(memory.buffer, used - bytes, size);
}

const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >>> 7)]);
const get = (local) => [0x20, local], set = (local) => [0x21, local], tee = (local) => [0x22, local];
const constant = (n) => [0x41, n], add = [0x6a], times = [0x6c]; // of whole numbers, n < 64
const vector = (code, ...rest) => [0xfd, ...leb(code), ...rest];
const load = (offset) => vector(0, 2, offset), store = (offset) => vector(11, 2, offset); // of four floats
const spread = vector(9, 2, 0);
const spreadInt = vector(17), and = vector(78), vectorAdd = vector(228), vectorTimes = vector(230);
const advance = (local, by) => [...get(local), ...by, ...add, ...set(local)];
/** Repeats `body` while `local`, advanced by `step`, is below `end`; at least once. */
const loop = (local, step, end, body) => [0x03, 0x40, ...body, ...get(local), ...constant(step), ...add, ...tee(local), ...get(end),
  0x49, 0x0d, 0, 0x0b];

/** c = a b, or c + a b where `keep` is -1 rather than 0: four rows and eight columns at a time, their sums held in registers. */
function productCode() {
  const [c, a, b, rows, columns, depth, cRow, aRow, aStep, bRow, keep] = [...Array(11).keys()]; // strides in bytes
  const [i, j, k, at, from, ...rest] = [...Array(22).keys()].map((n) => 11 + n);
  const [a0, a1, a2, a3, left, right, one, ...sums] = rest; // the rows of a; then vectors
  const starts = [a0, a1, a2, a3], both = [left, right];
  const inner = [
    ...both.flatMap((x, half) => [...get(from), ...load(16 * half), ...set(x)]),
    ...starts.flatMap((row, r) => [
      ...get(row), ...spread, ...set(one),
      ...both.flatMap((x, half) => [...get(one), ...get(x), ...vectorTimes, ...get(sums[2 * r + half]), ...vectorAdd,
        ...set(sums[2 * r + half])]),
      ...advance(row, get(aStep))]),
    ...advance(from, get(bRow))];
  const each = (body) => [...get(c), ...get(j), ...add, ...set(at), ...starts.flatMap((_, r) => [
    ...both.flatMap((_, half) => body(2 * r + half, 16 * half)), ...advance(at, get(cRow))])];
  const block = [
    ...each((n, offset) => [...get(at), ...load(offset), ...get(keep), ...spreadInt, ...and, ...set(sums[n])]),
    ...get(a), ...set(a0), ...[a1, a2, a3].flatMap((row, r) => [...get(starts[r]), ...get(aRow), ...add, ...set(row)]),
    ...get(b), ...get(j), ...add, ...set(from), ...constant(0), ...set(k),
    ...loop(k, 1, depth, inner),
    ...each((n, offset) => [...get(at), ...get(sums[n]), ...store(offset)])];
  const four = (local, row) => advance(local, [...get(row), ...constant(4), ...times]);
  const body = loop(i, 4, rows, [...constant(0), ...set(j), ...loop(j, 32, columns, block), ...four(c, cRow), ...four(a, aRow)]);
  return [2, 9, 0x7f, 11, 0x7b, ...body, 0x0b]; // nine more whole numbers, eleven vectors
}

/** The function `product`, in a module that shares `memory`. */
function assembled() {
  const section = (id, ...bytes) => [id, ...leb(bytes.length), ...bytes];
  const name = (text) => [text.length, ...[...text].map((letter) => letter.charCodeAt(0))];
  const code = productCode();
  const module = Uint8Array.from([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, 1, 0x60, 11, ...Array(11).fill(0x7f), 0),
    ...section(2, 1, ...name("page"), ...name("memory"), 2, 0, 1),
    ...section(3, 1, 0), ...section(7, 1, ...name("product"), 0, 0),
    ...section(10, 1, ...leb(code.length), ...code)]);
  return new WebAssembly.Instance(new WebAssembly.Module(module), { page: { memory } }).exports.product;
}

const multiply = assembled();

/** y = x wᵀ, as a layer computes it: `x` [rows, inputs], and `w` [outputs, inputs] given as its transpose. From one row of `x` to
 * the next it is `xRow`, so that every nth row can be meant. */
function linear(y, x, wt, rows, inputs, outputs, xRow = inputs) {
  multiply(y.byteOffset, x.byteOffset, wt.byteOffset, rows, 4 * outputs, inputs, 4 * outputs, 4 * xRow, 4, 4 * outputs, 0);
}

/** dx = dy w, or dx + dy w with `keep`. */
function linearBack(dx, dy, w, rows, inputs, outputs, keep = false, xRow = inputs) {
  multiply(dx.byteOffset, dy.byteOffset, w.byteOffset, rows, 4 * inputs, outputs, 4 * xRow, 4 * outputs, 4, 4 * inputs, -keep);
}

/** dw = dyᵀ x. */
function linearGradient(dw, dy, x, rows, inputs, outputs, xRow = inputs) {
  multiply(dw.byteOffset, dy.byteOffset, x.byteOffset, outputs, 4 * inputs, rows, 4 * inputs, 4, 4 * outputs, 4 * xRow, 0);
}

/** `w` [rows, columns], transposed into `wt`. */
function transpose(wt, w, rows, columns) {
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) wt[j * rows + i] = w[i * columns + j];
}
