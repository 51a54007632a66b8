/**
 * DICOM radiographs to grey levels, as `pdrunet_jax/data/dicom.py` has them: rescaled, windowed, padding black, bones
 * bright. Only pixels and their spacing leave this module, and messages quote no value of the file.
 */
import dicomParser from "dicom-parser";

import { decodeLossless, decodeRunLengths, decodeStill, decodeTurbo } from "./codecs.js";
import { checkPixels, FileError } from "./errors.js";
import { clip, CODES, contrast, histogram, levelCounts, LOW_CONTRAST, rint, scaleByRange } from "./greys.js";
import { jpegHeader } from "./jpeg-header.js";
import { latin1 } from "./orientation.js";

const IMPLICIT = "1.2.840.10008.1.2";
const EXPLICIT = "1.2.840.10008.1.2.1";
const BIG_ENDIAN = "1.2.840.10008.1.2.2";
const DEFLATED = "1.2.840.10008.1.2.1.99";
const RUN_LENGTHS = "1.2.840.10008.1.2.5";
const JPEG = new Set(["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"]);
const JPEG_LOSSLESS = new Set(["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"]);
const JPEG_LS = new Set(["1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"]);
const JPEG_2000 = new Set(["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"]);

/** Classes of DICOM files that have pixels and are no image. */
const OTHER_CONTENTS = new Map([
  ["1.2.840.10008.5.1.4.1.1.66.4", "Segmentation"],
  ["1.2.840.10008.5.1.4.1.1.66.7", "Label Map Segmentation"],
  ["1.2.840.10008.5.1.4.1.1.66.8", "Height Map Segmentation"],
  ["1.2.840.10008.5.1.4.1.1.30", "Parametric Map"],
  ["1.2.840.10008.5.1.4.1.1.481.2", "RT Dose"],
]);

/** First element of a file without the preamble: group 2 or 8, with a type or else a length below 65,536. */
const BARE = /^[\x02\x08]\0[\0-\x1a]\0(?:[A-Z]{2}|[^]{2}\0\0)/;

export function isDicom(bytes) {
  return latin1(bytes.subarray(128, 132)) === "DICM" || BARE.test(latin1(bytes.subarray(0, 8)));
}

/**
 * Decode a DICOM file.
 * @param {Uint8Array} bytes
 * @returns {Promise<{width: number, height: number, channels: 1 | 3, data: Float32Array | Uint8Array,
 *   spacing: [number, number] | null, remarks: string[]}>} grey levels in [0, 255], or RGB; spacing of rows and columns in mm
 */
export async function decodeDicom(bytes) {
  const file = openDicom(bytes);
  const content = OTHER_CONTENTS.get(text(file, "x00080016") ?? text(file, "x00020002"));
  if (content) throw new FileError(`not an image, but a DICOM file of another kind: ${content}`);
  const header = readHeader(file);
  const spacing = readSpacing(file);
  const stored = await storedPixels(file, header);
  const { width, height } = header;
  if (header.channels === 3) return { width, height, channels: 3, data: stored, spacing, remarks: [] };
  const remarks = [];
  const greys = greyLevels(file, header, stored, remarks);
  const data = new Float32Array(stored.length);
  for (let i = 0; i < stored.length; i++) data[i] = greys[stored[i]];
  return { width, height, channels: 1, data, spacing, remarks };
}

function openDicom(bytes) {
  const part10 = latin1(bytes.subarray(128, 132)) === "DICM";
  const options = part10 ? {} : { TransferSyntaxUID: /^[A-Z]{2}$/.test(latin1(bytes.subarray(4, 6))) ? EXPLICIT : IMPLICIT };
  let file;
  try {
    if (part10 && latin1(bytes.subarray(132, 8192)).includes(DEFLATED)) throw new FileError("deflated");
    file = dicomParser.parseDicom(bytes, options);
  } catch (error) {
    if (error instanceof FileError) throw new FileError("a deflated DICOM file; save it uncompressed");
    throw new FileError("damaged DICOM file");
  }
  return file;
}

function readHeader(file) {
  const whole = (tag, otherwise) => file.uint16(tag) ?? otherwise;
  const header = {
    syntax: text(file, "x00020010") ?? IMPLICIT,
    height: whole("x00280010", 0),
    width: whole("x00280011", 0),
    channels: whole("x00280002", 1),
    allocated: whole("x00280100", 0),
    signed: whole("x00280103", 0) === 1,
    planar: whole("x00280006", 0) === 1,
    kind: text(file, "x00280004") ?? "",
  };
  header.stored = Math.min(whole("x00280101", header.allocated), header.allocated);
  const frames = number(file, "x00280008", 1);
  if (!file.elements.x7fe00010) throw new FileError("a DICOM file without an image");
  if (frames > 1) throw new FileError(`${frames} frames; save each as a file of its own`);
  checkPixels(header.width, header.height);
  const { channels, kind } = header;
  if (kind === "PALETTE COLOR" || (channels !== 1 && channels !== 3) || (channels === 3 && header.allocated !== 8)) {
    throw new FileError(`${kind || "colour"}; save it as one grey or 8-bit RGB image`);
  }
  if (header.allocated !== 8 && header.allocated !== 16) {
    throw new FileError(`${header.allocated} bits a pixel; save it with 8 or 16`);
  }
  return header;
}

/** Spacing between rows and between columns in mm, calibrated before the detector's; null if unknown. */
function readSpacing(file) {
  for (const tag of ["x00280030", "x00181164"]) {
    const pair = (text(file, tag) ?? "").split("\\").map(Number);
    if (pair.length === 2 && pair.every((mm) => Number.isFinite(mm) && mm > 0)) return pair;
  }
  return null;
}

/**
 * Pixels as they are stored: a 16-bit code each, in two's complement if signed; interleaved bytes for RGB.
 * @returns {Promise<Uint16Array | Uint8Array>}
 */
async function storedPixels(file, header) {
  const { syntax, width, height, channels } = header;
  const element = file.elements.x7fe00010;
  const count = width * height;
  if (!element.encapsulatedPixelData) {
    if (![IMPLICIT, EXPLICIT, BIG_ENDIAN].includes(syntax)) throw new FileError(`no decoder for ${syntax}`);
    const bytes = file.byteArray.subarray(element.dataOffset, element.dataOffset + element.length);
    if (bytes.length < (count * channels * header.allocated) / 8) {
      throw new FileError("damaged or truncated DICOM pixel data");
    }
    return fromBytes(bytes, header);
  }
  const frame = joinFragments(file, element);
  if (syntax === RUN_LENGTHS) {
    const planes = decodeRunLengths(frame, count, channels === 3 ? 3 : header.allocated / 8);
    if (channels === 3) return toRgb(planes, header);
    const codes = new Uint16Array(count);
    for (const plane of planes) for (let i = 0; i < count; i++) codes[i] = (codes[i] << 8) | plane[i];
    return cut(codes, header, header.stored);
  }
  const { bits, channels: found, data } = await decodeFrame(frame, header);
  if (found !== channels) throw new FileError("its compressed pixels have other channels than its header states");
  if (channels === 3) return data;
  return cut(Uint16Array.from(data), header, bits);
}

/** Decoded pixels of the only frame, and how many of their bits count, by pydicom's rules. */
async function decodeFrame(frame, header) {
  const { syntax } = header;
  if (JPEG_2000.has(syntax)) {
    const still = await decodeStill("openjpeg", frame, header);
    return { ...still, bits: still.signed === header.signed ? header.allocated : still.bits };
  }
  if (JPEG_LS.has(syntax)) {
    const still = await decodeStill("charls", frame, header);
    return { ...still, bits: header.signed ? still.bits : header.stored };
  }
  const coded = jpegHeader(frame).frame;
  if (coded && JPEG_LOSSLESS.has(syntax)) return { ...decodeLossless(frame, header), bits: header.stored };
  if (coded && JPEG.has(syntax)) {
    if (coded.channels !== 1) throw new FileError("a colour JPEG; save it as grey");
    if (coded.bits !== 8) throw new FileError("a JPEG of 12 bits, which this page does not decode; save it uncompressed");
    return { ...(await decodeTurbo(frame, header)), bits: header.stored };
  }
  throw new FileError("no decoder for its compression; save it uncompressed");
}

function joinFragments(file, element) {
  const parts = element.fragments.map(({ position, length }) => file.byteArray.subarray(position, position + length));
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function fromBytes(bytes, header) {
  const { width, height, channels, allocated, syntax } = header;
  const count = width * height;
  if (channels === 3) {
    if (!header.planar) return toRgb([0, 1, 2].map((c) => bytes.subarray(c)), header, 3);
    return toRgb([0, 1, 2].map((c) => bytes.subarray(c * count)), header);
  }
  const codes = new Uint16Array(count);
  if (allocated === 8) codes.set(bytes.subarray(0, count));
  else {
    const view = new DataView(bytes.buffer, bytes.byteOffset, 2 * count);
    for (let i = 0; i < count; i++) codes[i] = view.getUint16(2 * i, syntax !== BIG_ENDIAN);
  }
  return cut(codes, header, header.stored);
}

/** Interleaved RGB from planes that have one value of a pixel every `step` bytes. */
function toRgb(planes, { width, height, kind }, step = 1) {
  if (kind !== "RGB") throw new FileError(`${kind} without JPEG compression; save it as one grey or 8-bit RGB image`);
  const rgb = new Uint8Array(3 * width * height);
  for (let i = 0; i < width * height; i++) {
    for (let channel = 0; channel < 3; channel++) rgb[3 * i + channel] = planes[channel][i * step];
  }
  return rgb;
}

/** Keep the lower `bits` bits of codes, extended by their sign if pixels are signed; overwrites them. */
function cut(codes, { signed }, bits) {
  const unused = 32 - bits;
  for (let i = 0; i < codes.length; i++) codes[i] = signed ? (codes[i] << unused) >> unused : (codes[i] << unused) >>> unused;
  return codes;
}

/** Grey level in [0, 255] of every code. */
function greyLevels(file, header, stored, remarks) {
  const valid = notPadding(file, header);
  const found = histogram(stored, valid);
  const values = modalityValues(file, header);
  const greys = brightness(file, values, found, remarks);
  for (let code = 0; code < CODES; code++) {
    if (header.kind === "MONOCHROME1") greys[code] = 255 - greys[code];
    if (!valid(code)) greys[code] = 0;
  }
  return greys;
}

/** The number that a code stands for. */
function storedValue(code, { signed }) {
  return signed ? (code << 16) >> 16 : code;
}

/** Whether a code is no padding. */
function notPadding(file, header) {
  const bits = header.allocated;
  const end = (tag) => {
    const raw = file.elements[tag]?.length === 2 ? file.uint16(tag) : undefined;
    // It may have been written as signed where pixels are unsigned, or the other way round.
    return raw === undefined ? undefined : header.signed ? (raw << (32 - bits)) >> (32 - bits) : raw & ((1 << bits) - 1);
  };
  const first = end("x00280120");
  if (first === undefined) return () => true;
  const last = end("x00280121") ?? first;
  const [low, high] = [Math.min(first, last), Math.max(first, last)];
  return (code) => {
    const value = storedValue(code, header);
    return value < low || value > high;
  };
}

/** Values of all codes after the modality table, or the rescale slope and intercept. */
function modalityValues(file, header) {
  const values = new Float64Array(CODES);
  const table = readTable(file, "x00283000", header);
  const slope = number(file, "x00281053", 1);
  const intercept = number(file, "x00281052", 0);
  for (let code = 0; code < CODES; code++) {
    const value = storedValue(code, header);
    values[code] = table ? table.look(value) : value * slope + intercept;
    if (!Number.isFinite(values[code])) {
      throw new FileError("its rescale slope and intercept exceed the range of numbers");
    }
  }
  return values;
}

/** Grey levels by the VOI table, else the window, else the range of values. */
function brightness(file, values, found, remarks) {
  const table = readTable(file, "x00283010", { signed: true });
  let greys, what;
  if (table) {
    const scale = Math.fround(255 / (2 ** table.bits - 1));
    greys = Float32Array.from(values, (value) => clip(Math.fround(table.look(rint(value)) * scale)));
    what = "VOI LUT";
  } else if (number(file, "x00281051", 0) > 0) {
    greys = windowed(file, values);
    what = "window";
  } else {
    return scaleByRange(values, found);
  }
  if (contrast(levelCounts(greys, found)) <= LOW_CONTRAST) {
    const ranged = scaleByRange(values, found);
    if (contrast(levelCounts(ranged, found)) > LOW_CONTRAST) {
      remarks.push(`its ${what} leaves next to no contrast: scaled from darkest to brightest pixel instead`);
      return ranged;
    }
  }
  return greys;
}

/** The linear, exact linear or sigmoid window of DICOM PS3.3 C.11.2.1.2. */
function windowed(file, values) {
  const width = number(file, "x00281051", 0);
  const centre = number(file, "x00281050", 0);
  const shape = text(file, "x00281056") || "LINEAR";
  const exact = shape === "LINEAR_EXACT";
  return Float32Array.from(values, (value) => {
    let share;
    if (shape === "SIGMOID") {
      const power = ((value - centre) * -4) / width;
      share = 1 / (1 + Math.exp(Math.min(Math.max(power, -700), 700)));
    } else {
      share = (value - (exact ? centre : centre - 0.5)) / (exact ? width : Math.max(width - 1, 1e-6)) + 0.5;
    }
    return Math.min(Math.max(share, 0), 1) * 255;
  });
}

/** The first table of a sequence, as a function of numbers; null if there is none. */
function readTable(file, sequence, { signed }) {
  const item = file.elements[sequence]?.items?.[0]?.dataSet;
  if (!item) return null;
  const descriptor = item.elements.x00283002;
  const data = item.elements.x00283006;
  if (!descriptor || !data || descriptor.length !== 6) throw new FileError("damaged DICOM file (lookup table)");
  const count = item.uint16("x00283002", 0) || CODES;
  const first = descriptor.vr !== "US" && signed ? item.int16("x00283002", 1) : item.uint16("x00283002", 1);
  const bits = item.uint16("x00283002", 2);
  if (data.length < 2 * count) throw new FileError("damaged DICOM file (lookup table)");
  return { bits, look: (value) => item.uint16("x00283006", Math.min(Math.max(value - first, 0), count - 1)) };
}

/** An element's text; undefined if absent. */
function text(file, tag) {
  return file.string(tag)?.trim();
}

/** An element's first number; `otherwise` if it is absent or no finite number. */
function number(file, tag, otherwise) {
  const first = text(file, tag)?.split("\\")[0].trim();
  const value = first ? Number(first) : Number.NaN;
  return Number.isFinite(value) ? value : otherwise;
}
