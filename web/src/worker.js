/** The page's worker: decodes, computes and writes files, so that the page never waits. */
import * as ort from "onnxruntime-web/wasm";

import { unpackAsset } from "./assets.js";
import { fillHoles, keepLargest, layerOf } from "./mask/regions.js";
import { cropped, maskOf, networkInput } from "./network/fit.js";
import { setCodecSource } from "./pixels/codecs.js";
import { decodeImage, withChannels } from "./pixels/decode.js";
import { FileError } from "./pixels/errors.js";
import { lowContrast, rint } from "./pixels/greys.js";
import { labelMe, maskPng, picturePng } from "./save/files.js";

let facts = null;
let assets = null;
let session = null;

setCodecSource((name) => unpackAsset(assets[name]));

/** The network, loaded with the first image. */
function network() {
  session ??= (async () => {
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1; // threads need headers that a file does not have
    ort.env.wasm.wasmBinary = await unpackAsset(assets.runtime);
    const model = await unpackAsset(assets.model);
    return ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  })();
  return session;
}

async function computeProbability(input) {
  const [height, width] = facts.size;
  const unit = Float32Array.from(input, (grey) => grey / 255);
  const images = new ort.Tensor("float32", unit, [1, height, width, facts.channels]);
  const { probability, logits } = await (await network()).run({ images }, ["probability", "logits"]);
  if (!logits.data.every(Number.isFinite)) {
    throw new FileError("the network computes NaN or infinity from it: the weights are not usable");
  }
  return probability.data;
}

async function decodeToShow(bytes) {
  const picture = await decodeImage(bytes);
  const { width, height, channels, data, spacing, dicom, remarks } = picture;
  const shown = data instanceof Uint8Array ? data : Uint8Array.from(data, rint);
  return { picture, shown: { width, height, channels, data: shown, spacing, dicom, remarks } };
}

const HANDLERS = {
  start(given) {
    ({ facts, assets } = given);
  },

  async decode({ file }) {
    return (await decodeToShow(new Uint8Array(await file.arrayBuffer()))).shown;
  },

  async segment({ file, threshold }, progress) {
    progress("Reading");
    const { picture, shown } = await decodeToShow(new Uint8Array(await file.arrayBuffer()));
    const pixels = withChannels(picture, facts.channels);
    const odd = lowContrast(pixels);
    if (odd) shown.remarks.push(odd);
    progress("Computing");
    const probability = await computeProbability(networkInput(pixels, picture, facts));
    const small = cropped(probability, picture, facts);
    return { shown, small, mask: maskOf(small, picture, facts, threshold) };
  },

  threshold({ small, size, threshold }) {
    return maskOf(small, size, facts, threshold);
  },

  clean({ mask, size, rule, index }) {
    const layer = layerOf(index, facts.multilabel);
    return rule === "largest" ? keepLargest(mask, size, layer) : fillHoles(mask, size, layer, facts.multilabel);
  },

  /** The files of one image, by name. `kinds` lists mask, labelme and image. */
  async save({ kinds, name, file, mask, size }) {
    const files = new Map();
    if (kinds.includes("mask")) files.set(`${name}_mask.png`, maskPng(mask, size, facts));
    if (!kinds.includes("labelme")) return files;
    // LabelMe does not open DICOM.
    const path = size.dicom ? `${name}_labelme.png` : file.name;
    files.set(`${name}.json`, labelMe(mask, size, facts, path));
    const bytes = async () => new Uint8Array(await file.arrayBuffer());
    if (size.dicom) files.set(path, picturePng((await decodeToShow(await bytes())).shown.data, size));
    else if (kinds.includes("image")) files.set(path, await bytes());
    return files;
  },
};

self.onmessage = async ({ data: { id, kind, content } }) => {
  try {
    const result = await HANDLERS[kind](content, (text) => self.postMessage({ id, progress: text }));
    self.postMessage({ id, result });
  } catch (error) {
    const known = error instanceof FileError;
    const memory = error instanceof RangeError;
    const message = known ? error.message : memory ? "too large for this computer's memory" : `failed (${error.message ?? error})`;
    self.postMessage({ id, error: message });
  }
};
