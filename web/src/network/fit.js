/** How an image is brought to the network's size and probabilities back to the image's, as `predict` does it. */
import { rint } from "../pixels/greys.js";
import { resizePlane, resizeWeights } from "./resize.js";

/**
 * The rectangle of the network's input that an image fills.
 * @param {{size: [number, number], fit: "stretch" | "pad"}} facts
 * @param {number} rows
 * @param {number} columns
 */
export function boxOf({ size: [height, width], fit }, rows, columns) {
  if (fit === "stretch") return { top: 0, left: 0, height, width };
  const scaled = (side, numerator, denominator) =>
    Math.max(1, Math.floor((2 * side * numerator + denominator) / (2 * denominator)));
  const tall = height * columns <= width * rows;
  const inner = tall ? [height, scaled(columns, height, rows)] : [scaled(rows, width, columns), width];
  const [top, left] = [(height - inner[0]) >> 1, (width - inner[1]) >> 1];
  return { top, left, height: inner[0], width: inner[1] };
}

/**
 * The network's input, (height, width, channels) of whole grey levels.
 * @param {Uint8Array | Float32Array} data interleaved
 */
export function networkInput(data, { width, height }, facts) {
  const { channels, size, tall_first: tallFirst } = facts;
  const box = boxOf(facts, height, width);
  const input = new Uint8Array(size[0] * size[1] * channels);
  for (let channel = 0; channel < channels; channel++) {
    const plane = channels === 1 ? data : data.filter((_, i) => i % channels === channel);
    const resized = resizePlane(plane, [height, width], [box.height, box.width], tallFirst);
    for (let y = 0; y < box.height; y++) {
      for (let x = 0; x < box.width; x++) {
        const grey = Math.min(Math.max(rint(resized[y * box.width + x]), 0), 255);
        input[((box.top + y) * size[1] + box.left + x) * channels + channel] = grey;
      }
    }
  }
  return input;
}

/**
 * Probabilities of the image's rectangle, one plane for each output of the network.
 * @param {Float32Array} probability (height, width, outputs) at the network's size
 * @returns {{height: number, width: number, planes: Float32Array[]}}
 */
export function cropped(probability, { width, height }, facts) {
  const box = boxOf(facts, height, width);
  const outputs = probability.length / (facts.size[0] * facts.size[1]);
  const planes = Array.from({ length: outputs }, () => new Float32Array(box.height * box.width));
  for (let y = 0; y < box.height; y++) {
    for (let x = 0; x < box.width; x++) {
      const at = ((box.top + y) * facts.size[1] + box.left + x) * outputs;
      for (let output = 0; output < outputs; output++) planes[output][y * box.width + x] = probability[at + output];
    }
  }
  return { height: box.height, width: box.width, planes };
}

/**
 * Mask at the image's size: class indices, 0 for background; if classes overlap, bit i for class i + 1.
 * @param {{height: number, width: number, planes: Float32Array[]}} small from `cropped`
 * @param {number | number[]} threshold for one output or overlapping classes; one for all or one for each
 */
export function maskOf(small, { width, height }, facts, threshold) {
  const mask = new Uint8Array(width * height);
  const large = (plane) => resizePlane(plane, [small.height, small.width], [height, width], facts.tall_first);
  if (facts.multilabel || small.planes.length === 1) {
    small.planes.forEach((plane, output) => {
      const above = Math.fround(Array.isArray(threshold) ? threshold[output] : threshold);
      const probability = large(plane);
      for (let i = 0; i < mask.length; i++) if (probability[i] > above) mask[i] |= 1 << output;
    });
    return mask;
  }
  const best = large(small.planes[0]).slice();
  for (let output = 1; output < small.planes.length; output++) {
    const probability = large(small.planes[output]);
    for (let i = 0; i < mask.length; i++) {
      if (probability[i] > best[i]) {
        best[i] = probability[i];
        mask[i] = output;
      }
    }
  }
  return mask;
}

/** Probabilities of one pixel of the image, one for each output. */
export function probabilityAt(small, { width, height }, x, y) {
  const across = resizeWeights(small.width, width);
  const down = resizeWeights(small.height, height);
  return small.planes.map((plane) => {
    let sum = 0;
    for (let j = 0; j < down.count[y]; j++) {
      for (let i = 0; i < across.count[x]; i++) {
        const value = plane[(down.first[y] + j) * small.width + across.first[x] + i];
        sum += value * down.weights[y * down.width + j] * across.weights[x * across.width + i];
      }
    }
    return sum;
  });
}
