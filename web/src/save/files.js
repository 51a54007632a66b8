/** Files that the page saves: the mask as PNG, polygons for LabelMe, the table of areas, and all of them as one zip. */
import { encode } from "fast-png";
import { zipSync } from "fflate";

import { insideOf, layerOf } from "../mask/regions.js";
import { outlines } from "./outlines.js";

const LABELME_VERSION = "5.5.0";
const TOLERANCE = 1; // pixels

/** Colours of class 1, 2, ...: those of `predict`, the palette of Okabe and Ito ordered for contrast on grey. */
export const COLOURS = [
  [86, 180, 233],
  [230, 159, 0],
  [0, 158, 115],
  [204, 121, 167],
  [240, 228, 66],
  [0, 114, 178],
  [213, 94, 0],
];

export const colourOf = (index) => COLOURS[(index - 1) % COLOURS.length];

/** Names of the foreground classes. */
export const classNames = ({ class_names: names, multilabel }) => (multilabel ? names : names.slice(1));

/**
 * Colour of each value of a mask, background first: the mean of the colours of classes that overlap.
 * @param {(index: number) => number[] | null} [colour] of a class; null for a hidden one
 * @returns {(number[] | null)[]} null where every class is hidden
 */
export function valueColours(facts, colour = colourOf) {
  const count = classNames(facts).length;
  const classes = Array.from({ length: count }, (_, place) => colour(place + 1));
  if (!facts.multilabel) return [[0, 0, 0], ...classes];
  return Array.from({ length: 1 << count }, (_, bits) => {
    if (!bits) return [0, 0, 0];
    const present = classes.filter((one, place) => one && (bits >> place) & 1);
    if (!present.length) return null;
    return [0, 1, 2].map((c) => Math.trunc(present.reduce((sum, one) => sum + one[c], 0) / present.length));
  });
}

/** An indexed PNG: NumPy reads classes, a viewer shows colours. One class is white on black. */
export function maskPng(mask, { width, height }, facts) {
  const white = classNames(facts).length === 1 && [255, 255, 255];
  const palette = valueColours(facts, white ? () => white : colourOf);
  return encode({ width, height, data: mask, channels: 1, depth: 8, palette });
}

/** A grey or RGB picture as PNG. */
export function picturePng(data, { width, height, channels }) {
  return encode({ width, height, data, channels, depth: 8 });
}

/** A LabelMe file of polygons through pixel centres. */
export function labelMe(mask, size, facts, imagePath) {
  const shapes = classNames(facts).flatMap((label, place) => {
    const inside = insideOf(mask, layerOf(place + 1, facts.multilabel));
    return outlines(inside, size, TOLERANCE).map((ring) => shape(label, ring));
  });
  const content = {
    version: LABELME_VERSION,
    flags: {},
    shapes,
    imagePath,
    imageData: null,
    imageHeight: size.height,
    imageWidth: size.width,
  };
  return new TextEncoder().encode(JSON.stringify(content, null, 2));
}

function shape(label, ring) {
  let points = ring.map(([column, row]) => [column + 0.5, row + 0.5]);
  if (points.length < 3) {
    const [column, row] = points[0]; // LabelMe needs three points; these stay inside the first pixel
    points = [...points, [column + 0.25, row], [column, row + 0.25]];
  }
  return { label, points, group_id: null, description: "", shape_type: "polygon", flags: {}, mask: null };
}

/** Pixels of each foreground class. */
export function areasOf(mask, facts) {
  const counts = new Array(256).fill(0);
  for (let i = 0; i < mask.length; i++) counts[mask[i]]++;
  return classNames(facts).map((_, place) => {
    const { has } = layerOf(place + 1, facts.multilabel);
    return counts.reduce((sum, count, value) => (has(value) ? sum + count : sum), 0);
  });
}

/** The table `areas.csv`, as `predict` writes it. */
export function areasCsv(rows) {
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const lines = rows.flatMap(({ name, names, pixels, spacing }) =>
    names.map((label, place) => {
      const area = spacing ? (pixels[place] * spacing[0] * spacing[1]).toFixed(4) : "";
      return [name, label, String(pixels[place]), area].map(cell).join(",");
    }),
  );
  return new TextEncoder().encode(["image,class,pixels,area_mm2", ...lines, ""].join("\n"));
}

/** Names of results, each once: those of images without extension, or with it where two would be the same. */
export function resultNames(files) {
  const stem = (name) => name.replace(/(?<=.)\.(?!\d+$)[^.]*$/, "");
  const uses = new Map();
  for (const name of files) uses.set(stem(name).toLowerCase(), (uses.get(stem(name).toLowerCase()) ?? 0) + 1);
  const taken = new Set();
  return files.map((name) => {
    const base = uses.get(stem(name).toLowerCase()) > 1 ? name.replaceAll(".", "_") : stem(name);
    let result = base;
    for (let number = 2; taken.has(result.toLowerCase()); number++) result = `${base}_${number}`;
    taken.add(result.toLowerCase());
    return result;
  });
}

/** A zip archive; pictures in it are compressed already. */
export function zip(files) {
  return zipSync(Object.fromEntries([...files].map(([name, bytes]) => [name, [bytes, { level: name.endsWith(".json") ? 6 : 0 }]])));
}
