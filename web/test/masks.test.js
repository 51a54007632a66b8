/** Tools, history, cleaning and files: modules without a browser. */
import assert from "node:assert/strict";
import { test } from "node:test";

import { decode } from "fast-png";
import { strFromU8, unzipSync } from "fflate";

import { polygonRuns, strokeRuns } from "../src/mask/draw.js";
import { History } from "../src/mask/history.js";
import { fillHoles, keepLargest, layerOf } from "../src/mask/regions.js";
import { probabilityAt, maskOf } from "../src/network/fit.js";
import { areasCsv, areasOf, labelMe, maskPng, resultNames, zip } from "../src/save/files.js";

const ONE = { class_names: ["background", "bone"], multilabel: false };
const OVERLAP = { class_names: ["limb", "bone"], multilabel: true };

/** A mask from rows of digits. */
function drawn(...rows) {
  return { mask: Uint8Array.from(rows.join(""), Number), width: rows[0].length, height: rows.length };
}

const text = ({ mask, width }) => mask.reduce((all, value, i) => all + (i && i % width === 0 ? "/" : "") + value, "");

test("a brush paints the pixels whose centre it covers, also beyond the border", () => {
  const picture = drawn("00000", "00000", "00000");
  const paint = (y, first, end) => picture.mask.fill(1, y * 5 + first, y * 5 + end);
  strokeRuns([1.5, 1.5], [3.5, 1.5], 1, picture, paint);
  assert.equal(text(picture), "01110/11111/01110");
  strokeRuns([0, -3], [9, -3], 1, picture, () => assert.fail("painted outside"));
});

test("a polygon paints the pixels whose centre is inside, a bow tie both of its wings", () => {
  const square = drawn("0000", "0000", "0000", "0000");
  polygonRuns([[1, 1], [3, 1], [3, 3], [1, 3]], square, (y, first, end) => square.mask.fill(1, y * 4 + first, y * 4 + end));
  assert.equal(text(square), "0000/0110/0110/0000");
  let count = 0;
  polygonRuns([[0, 0], [40, 40], [40, 0], [0, 40]], { width: 40, height: 40 }, (_, first, end) => (count += end - first));
  assert.ok(Math.abs(count - 800) < 45, `${count}`);
});

test("undo and redo restore every byte, and old steps go when they take too much", () => {
  const history = new History({ width: 10, height: 10 }, 120);
  const mask = new Uint8Array(100);
  const states = [mask.slice()];
  for (let stroke = 0; stroke < 5; stroke++) {
    const before = mask.slice();
    mask.fill(1, 11 * stroke, 11 * stroke + 9);
    assert.equal(history.record(before, mask, stroke), true);
    states.push(mask.slice());
  }
  assert.equal(history.record(mask.slice(), mask, "none"), false);
  assert.equal(history.done.length, 3);
  for (const expected of [4, 3, 2]) {
    assert.equal(history.undo(mask), expected);
    assert.deepEqual(mask, states[expected]);
  }
  assert.equal(history.undo(mask), null);
  while (history.canRedo) history.redo(mask);
  assert.deepEqual(mask, states[5]);
});

test("holes are enclosed background, not another class; the largest part is 8-connected", () => {
  const ring = drawn("11111", "10201", "11111", "00000");
  assert.equal(text({ ...ring, mask: fillHoles(ring.mask, ring, layerOf(1, false), false) }), "11111/11211/11111/00000");
  const parts = drawn("10011", "01011", "00000", "22222");
  assert.equal(text({ ...parts, mask: keepLargest(parts.mask, parts, layerOf(1, false)) }), "00011/00011/00000/22222");
  const both = drawn("33311", "32311", "33300");
  assert.equal(text({ ...both, mask: fillHoles(both.mask, both, layerOf(1, true), true) }), "33311/33311/33300");
});

test("masks come from probabilities as predict makes them", () => {
  const facts = { ...ONE, tall_first: true };
  const small = { height: 1, width: 2, planes: [Float32Array.of(0, 1)] };
  assert.equal(text({ mask: maskOf(small, { width: 8, height: 1 }, facts, 0.5), width: 8 }), "00001111");
  assert.deepEqual(probabilityAt(small, { width: 2, height: 1 }, 1, 0), [1]);
  const three = { height: 1, width: 2, planes: [[0.4, 0.2], [0.4, 0.3], [0.2, 0.5]].map((plane) => Float32Array.from(plane)) };
  const exclusive = { class_names: ["background", "a", "b"], multilabel: false, tall_first: true };
  assert.equal(text({ mask: maskOf(three, { width: 2, height: 1 }, exclusive, null), width: 2 }), "02");
});

test("files hold the mask: indices and colours, names with quotes, results with one name each", () => {
  const size = { width: 3, height: 2 };
  const mask = Uint8Array.of(0, 1, 2, 3, 0, 1);
  const png = decode(maskPng(mask, size, OVERLAP));
  assert.deepEqual([...png.data], [...mask]);
  assert.deepEqual(png.palette, [[0, 0, 0], [86, 180, 233], [230, 159, 0], [158, 169, 116]]);
  assert.deepEqual(decode(maskPng(Uint8Array.of(0, 1), { width: 2, height: 1 }, ONE)).palette, [[0, 0, 0], [255, 255, 255]]);
  assert.deepEqual(areasOf(mask, OVERLAP), [3, 2]);
  const table = areasCsv([{ name: 'a,"b".png', names: ["limb", "bone"], pixels: [3, 2], spacing: [0.5, 0.1] }]);
  assert.equal(strFromU8(table), 'image,class,pixels,area_mm2\n"a,""b"".png",limb,3,0.1500\n"a,""b"".png",bone,2,0.1000\n');
  assert.deepEqual(resultNames(["a.png", "A.dcm", "1.2.840", "b.c.jpg", "a_png"]), ["a_png", "A_dcm", "1.2.840", "b.c", "a_png_2"]);
  const files = unzipSync(zip(new Map([["ä.json", Uint8Array.of(1)], ["b.png", Uint8Array.of(2)]])));
  assert.deepEqual(Object.keys(files), ["ä.json", "b.png"]);
});

test("outlines of LabelMe have a part each, with holes cut in", () => {
  const picture = drawn("0000000", "0111110", "0100010", "0111110", "0000001");
  const content = JSON.parse(strFromU8(labelMe(picture.mask, picture, ONE, "a.png")));
  assert.equal(content.shapes.length, 1);
  assert.equal(content.shapes[0].label, "bone");
  assert.deepEqual([content.imageWidth, content.imageHeight, content.imagePath], [7, 5, "a.png"]);
});
