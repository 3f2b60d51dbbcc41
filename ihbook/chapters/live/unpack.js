// Bytes as text: deflated, in the 85 characters of Python's `base64.b85encode`, with a comma for "<".

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
const VALUE = Uint8Array.from({ length: 128 }, (_, code) => Math.max(0, DIGITS.indexOf(String.fromCharCode(code))));

/** The bytes that `data.packed` made a text of. */
async function unpacked(text) {
  const missing = (5 - text.length % 5) % 5, full = text + "~".repeat(missing);
  const bytes = new DataView(new ArrayBuffer(full.length / 5 * 4));
  for (let i = 0, at = 0; i < full.length; i += 5, at += 4) {
    let word = 0;
    for (let j = i; j < i + 5; j++) word = 85 * word + VALUE[full.charCodeAt(j)];
    bytes.setUint32(at, word);
  }
  const deflated = new Blob([new Uint8Array(bytes.buffer, 0, bytes.byteLength - missing)]);
  return new Response(deflated.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}
