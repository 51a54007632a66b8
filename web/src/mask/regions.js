/** Connected parts of a class: keep the largest, fill holes. As `pdrunet_jax/predict/postprocess.py` has them. */

/**
 * @typedef {object} Layer where a class is in a mask: pixels of one value, or pixels with one bit set
 * @property {(value: number) => boolean} has
 * @property {(value: number) => number} add
 * @property {(value: number) => number} remove
 */

/**
 * How one class is stored.
 * @param {number} index 1 for the first class
 * @param {boolean} multilabel whether classes overlap: bit i of a mask is then class i + 1
 * @returns {Layer}
 */
export function layerOf(index, multilabel) {
  const bit = 1 << (index - 1);
  if (multilabel) {
    return { has: (value) => (value & bit) !== 0, add: (value) => value | bit, remove: (value) => value & ~bit };
  }
  return {
    has: (value) => value === index,
    add: () => index,
    remove: (value) => (value === index ? 0 : value),
  };
}

/** Label the 8-connected parts of `inside`; returns labels from 1 in reading order, and the pixels of each part. */
export function labelParts(inside, width, height) {
  const labels = new Int32Array(width * height);
  const sizes = [0];
  const stack = [];
  for (let start = 0; start < labels.length; start++) {
    if (!inside[start] || labels[start]) continue;
    const label = sizes.length;
    let size = 0;
    labels[start] = label;
    stack.push(start);
    while (stack.length) {
      const at = stack.pop();
      size++;
      const x = at % width;
      const y = (at - x) / width;
      for (let row = Math.max(y - 1, 0); row <= Math.min(y + 1, height - 1); row++) {
        for (let column = Math.max(x - 1, 0); column <= Math.min(x + 1, width - 1); column++) {
          const next = row * width + column;
          if (inside[next] && !labels[next]) {
            labels[next] = label;
            stack.push(next);
          }
        }
      }
    }
    sizes.push(size);
  }
  return { labels, sizes };
}

/** Where a class is, as bytes of 0 and 1. */
export function insideOf(mask, layer) {
  return mask.map((value) => (layer.has(value) ? 1 : 0));
}

/** A mask with only the largest part of a class; of parts of one size, the upper is kept. */
export function keepLargest(mask, { width, height }, layer) {
  const { labels, sizes } = labelParts(insideOf(mask, layer), width, height);
  const largest = sizes.reduce((best, size, label) => (size > sizes[best] ? label : best), 0);
  return mask.map((value, i) => (labels[i] && labels[i] !== largest ? layer.remove(value) : value));
}

/** A mask in which background enclosed by a class belongs to it; other classes are no holes. */
export function fillHoles(mask, { width, height }, layer, multilabel) {
  const inside = insideOf(mask, layer);
  const outside = new Uint8Array(mask.length);
  const stack = [];
  const visit = (at) => {
    if (!inside[at] && !outside[at]) {
      outside[at] = 1;
      stack.push(at);
    }
  };
  for (let x = 0; x < width; x++) [x, (height - 1) * width + x].forEach(visit);
  for (let y = 0; y < height; y++) [y * width, y * width + width - 1].forEach(visit);
  while (stack.length) {
    const at = stack.pop();
    const x = at % width;
    if (x > 0) visit(at - 1);
    if (x < width - 1) visit(at + 1);
    if (at >= width) visit(at - width);
    if (at + width < mask.length) visit(at + width);
  }
  return mask.map((value, i) => (!inside[i] && !outside[i] && (multilabel || !value) ? layer.add(value) : value));
}
