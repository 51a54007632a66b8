/** Pillow's bilinear `resize`, bit for bit: fixed point for whole grey levels, floating point for others. */

const FIXED_POINT = 22;

/**
 * Weights of the source pixels in each target pixel.
 * @returns {{first: Int32Array, count: Int32Array, weights: Float64Array, width: number}} `width` weights a target
 *   pixel, of which `count` are used, for the sources from `first` on
 */
export function resizeWeights(source, target) {
  const scale = source / target;
  const support = Math.max(scale, 1);
  const width = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(target);
  const count = new Int32Array(target);
  const weights = new Float64Array(target * width);
  const narrower = 1 / support;
  for (let to = 0; to < target; to++) {
    const centre = (to + 0.5) * scale;
    const start = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), source);
    let sum = 0;
    for (let from = start; from < end; from++) {
      const weight = Math.max(1 - Math.abs((from - centre + 0.5) * narrower), 0);
      weights[to * width + from - start] = weight;
      sum += weight;
    }
    for (let i = 0; i < end - start; i++) weights[to * width + i] /= sum;
    first[to] = start;
    count[to] = end - start;
  }
  return { first, count, weights, width };
}

/**
 * Resize one channel.
 * @template {Uint8Array | Float32Array} T
 * @param {T} plane rows of pixels
 * @param {[number, number]} from height and width
 * @param {[number, number]} to height and width
 * @param {boolean} tallFirst whether the vertical pass comes first if the height shrinks by over twice as much as the
 *   width, as in later versions of Pillow
 * @returns {T}
 */
export function resizePlane(plane, from, to, tallFirst) {
  const vertical = tallFirst && from[0] - to[0] > Math.max(2 * (from[1] - to[1]), 0);
  if (vertical) return alongRows(alongColumns(plane, from, to[0]), [to[0], from[1]], to[1]);
  return alongColumns(alongRows(plane, from, to[1]), [from[0], to[1]], to[0]);
}

function alongRows(plane, [height, width], target) {
  if (width === target) return plane;
  const { first, count, weights, width: stride } = prepared(plane, width, target);
  const result = new plane.constructor(height * target);
  const [start, store] = rounding(plane);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < target; x++) {
      const from = y * width + first[x];
      const at = x * stride;
      let sum = start;
      for (let i = 0; i < count[x]; i++) sum += plane[from + i] * weights[at + i];
      result[y * target + x] = store(sum);
    }
  }
  return result;
}

function alongColumns(plane, [height, width], target) {
  if (height === target) return plane;
  const { first, count, weights, width: stride } = prepared(plane, height, target);
  const result = new plane.constructor(target * width);
  const [start, store] = rounding(plane);
  const sums = new Float64Array(width);
  for (let y = 0; y < target; y++) {
    sums.fill(start);
    for (let i = 0; i < count[y]; i++) {
      const weight = weights[y * stride + i];
      const from = (first[y] + i) * width;
      for (let x = 0; x < width; x++) sums[x] += plane[from + x] * weight;
    }
    for (let x = 0; x < width; x++) result[y * width + x] = store(sums[x]);
  }
  return result;
}

function prepared(plane, source, target) {
  const found = resizeWeights(source, target);
  if (plane instanceof Uint8Array) {
    const { weights } = found;
    for (let i = 0; i < weights.length; i++) weights[i] = Math.trunc(weights[i] * 2 ** FIXED_POINT + 0.5);
  }
  return found;
}

/** What a sum of weighted pixels starts at, and what is stored of it. */
function rounding(plane) {
  if (plane instanceof Uint8Array) {
    return [2 ** (FIXED_POINT - 1), (sum) => Math.min(Math.max(sum >> FIXED_POINT, 0), 255)];
  }
  return [0, (sum) => sum];
}
