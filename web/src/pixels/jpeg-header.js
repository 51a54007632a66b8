/** Headers of JPEG and JPEG-LS files. */

const START_OF_SCAN = 0xda;
const NO_FRAME = new Set([0xc4, 0xc8, 0xcc]);

/** Segments before the first scan, and the frame header among them: marker, bits, width, height, channels. */
export function jpegHeader(bytes) {
  const segments = [];
  let frame = null;
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff; ) {
    const marker = bytes[at + 1];
    if (marker === 0xff) {
      at++;
      continue;
    }
    const length = (bytes[at + 2] << 8) | bytes[at + 3];
    const content = bytes.subarray(at + 4, at + 2 + length);
    segments.push({ marker, content });
    if ((marker >= 0xc0 && marker <= 0xcf && !NO_FRAME.has(marker)) || marker === 0xf7) {
      const [bits, high, low, left, right, channels] = content;
      frame ??= { marker, bits, height: (high << 8) | low, width: (left << 8) | right, channels };
    }
    if (marker === START_OF_SCAN) break;
    at += 2 + length;
  }
  return { segments, frame };
}
