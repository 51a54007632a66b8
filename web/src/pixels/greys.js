/**
 * Grey levels of images with more than 8 bits, as `pdrunet_jax/data/greys.py` has them.
 *
 * Everything that happens to a stored value on its way to a grey level depends on this value alone. So all arithmetic
 * is done once for each of the 65,536 values that 16 bits can hold, and pixels are looked up.
 */

/** Grey levels; an image with no more contrast shows next to nothing. */
export const LOW_CONTRAST = 16;

export const CODES = 1 << 16;

/**
 * Count stored values.
 * @param {Uint16Array} codes
 * @param {(code: number) => boolean} [counts] which values count
 * @returns {Uint32Array} pixels of each value
 */
export function histogram(codes, counts = () => true) {
  const found = new Uint32Array(CODES);
  for (let i = 0; i < codes.length; i++) found[codes[i]]++;
  for (let code = 0; code < CODES; code++) if (found[code] && !counts(code)) found[code] = 0;
  return found;
}

/**
 * Grey levels in [0, 255] from the darkest to the brightest value; a constant image becomes 0.
 *
 * Pixels that are farther than 3 times the span of the 0.1 and 99.9 percentiles beyond them are dead or burnt out: on
 * that side, the range ends at the percentile.
 * @param {Float64Array} values number that each code stands for
 * @param {Uint32Array} found pixels of each code that count
 * @returns {Float32Array} grey level of each code
 */
export function scaleByRange(values, found) {
  const codes = [...found.keys()].filter((code) => found[code]).sort((a, b) => values[a] - values[b]);
  const greys = new Float32Array(CODES);
  if (!codes.length) return greys;
  let [low, high] = percentiles(codes, values, found, [0.1, 99.9]);
  const darkest = values[codes[0]];
  const brightest = values[codes.at(-1)];
  const reach = 3 * (high - low) || Infinity; // nearly all pixels have one value: the others must still show
  if (low - darkest <= reach) low = darkest;
  if (brightest - high <= reach) high = brightest;
  if (low === high) return greys;
  const scale = 255 / (high - low);
  for (let code = 0; code < CODES; code++) greys[code] = clip((values[code] - low) * scale);
  return greys;
}

/** Percentiles with linear interpolation, in NumPy's order of operations. */
function percentiles(codes, values, found, percents) {
  const ends = [];
  let total = 0;
  for (const code of codes) ends.push((total += found[code]));
  const at = (rank) => values[codes[ends.findIndex((end) => end > rank)]];
  return percents.map((percent) => {
    const place = (total - 1) * (percent / 100);
    const before = Math.floor(place);
    const share = place - before;
    const [a, b] = [at(before), at(Math.min(before + 1, total - 1))];
    return share >= 0.5 ? b - (b - a) * (1 - share) : a + (b - a) * share;
  });
}

/** Grey levels between the darkest and the brightest 0.5 % of pixels; `counts` holds pixels of each level, 0 to 255. */
export function contrast(counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const reaches = (share) => {
    let sum = 0;
    return counts.findIndex((count) => (sum += count) >= share * total);
  };
  return total ? reaches(0.995) - reaches(0.005) : 0;
}

/** Pixels of each whole grey level, from those of each code. */
export function levelCounts(greys, found) {
  const counts = new Array(256).fill(0);
  for (let code = 0; code < CODES; code++) if (found[code]) counts[rint(greys[code])] += found[code];
  return counts;
}

/**
 * What is odd about an image that shows next to nothing; null for others.
 * @param {Uint8Array | Float32Array} data grey levels
 */
export function lowContrast(data) {
  const counts = new Array(256).fill(0);
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < data.length; i++) {
    const grey = data[i];
    if (grey < low) low = grey;
    if (grey > high) high = grey;
    counts[rint(grey)]++;
  }
  if (low === high) return "every pixel has the same grey level";
  if (contrast(counts) <= LOW_CONTRAST) return `99 % of the pixels lie within ${LOW_CONTRAST} of 256 grey levels`;
  return null;
}

/** Whole number nearest to a value, halves to the even one, as NumPy rounds. */
export function rint(value) {
  const down = Math.floor(value);
  const rest = value - down;
  if (rest !== 0.5) return rest < 0.5 ? down : down + 1;
  return down % 2 ? down + 1 : down;
}

/** A grey level within [0, 255]. */
export function clip(value) {
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** Interleaved RGB to grey, with Pillow's weights. */
export function rgbToGrey(rgb) {
  const grey = new Uint8Array(rgb.length / 3);
  for (let i = 0, at = 0; i < grey.length; i++, at += 3) {
    grey[i] = (rgb[at] * 19595 + rgb[at + 1] * 38470 + rgb[at + 2] * 7471 + 0x8000) >> 16;
  }
  return grey;
}
