/** PNG files to pixels as Pillow reads them: no gamma, no colour profile, no alpha. */
import { decode } from "fast-png";
import { unzlibSync, zlibSync } from "fflate";

import { checkPixels, FileError } from "./errors.js";
import { exifOrientation, latin1, xmpOrientation } from "./orientation.js";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const GREY = 0;
/** Passes of an interlaced picture: first column and row, and the steps between them. */
const PASSES = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];
const NEEDED = new Set(["IHDR", "PLTE", "IDAT", "IEND"]);

export const isPng = (bytes) => SIGNATURE.every((byte, place) => bytes[place] === byte);

/**
 * Decode a PNG file.
 * @param {Uint8Array} bytes
 * @returns {{width: number, height: number, channels: 1 | 3, data: Uint8Array | Uint16Array, orientation: number | null}}
 *   16-bit data for 16-bit grey
 */
export function decodePng(bytes) {
  const chunks = readChunks(bytes);
  const header = chunks[0];
  if (header?.type !== "IHDR" || header.content.length !== 13) throw new FileError("damaged PNG: no header");
  checkPixels(read32(header.content, 0), read32(header.content, 4));
  const [depth, colour] = header.content.subarray(8, 10);
  if (depth > 8 && colour !== GREY) {
    throw new FileError("16 bits in each of several channels; save it as 16-bit grey or 8-bit colour");
  }
  const animation = chunks.find(({ type }) => type === "acTL");
  if (animation && read32(animation.content, 0) > 1) {
    throw new FileError("an animation; save each picture as a file of its own");
  }
  let image;
  try {
    const needed = chunks.filter(({ type }) => NEEDED.has(type));
    const packed = depth < 8 && header.content[12] === 1;
    image = packed ? decodePasses(needed, depth) : decode(join(needed.map(({ all }) => all)), { checkCrc: true });
  } catch (error) {
    throw new FileError(`damaged PNG (${error.message})`);
  }
  return { ...flatten(image), orientation: orientation(chunks) };
}

/** Chunks up to the end of the picture. */
function readChunks(bytes) {
  const chunks = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = read32(bytes, at);
    const type = latin1(bytes.subarray(at + 4, at + 8));
    const end = at + 12 + length;
    if (end > bytes.length) break;
    chunks.push({ type, content: bytes.subarray(at + 8, end - 4), all: bytes.subarray(at, end) });
    if (type === "IEND") return chunks;
    at = end;
  }
  throw new FileError("damaged or truncated PNG (no end)");
}

/** Decode an interlaced picture of packed bits, which fast-png does not, as the seven pictures that it consists of. */
function decodePasses(chunks, depth) {
  const [header, ...others] = chunks;
  const width = read32(header.content, 0);
  const height = read32(header.content, 4);
  const ends = others.filter(({ type }) => type !== "IDAT").map(({ all }) => all);
  const rows = unzlibSync(join(others.filter(({ type }) => type === "IDAT").map(({ content }) => content), []));
  const values = new Uint8Array(width * height);
  let image;
  let from = 0;
  for (const [left, top, across, down] of PASSES) {
    const [columns, lines] = [Math.ceil((width - left) / across), Math.ceil((height - top) / down)];
    if (columns <= 0 || lines <= 0) continue;
    const length = lines * (1 + Math.ceil((columns * depth) / 8));
    const content = header.content.slice();
    new DataView(content.buffer).setUint32(0, columns);
    new DataView(content.buffer).setUint32(4, lines);
    content[12] = 0;
    const data = chunk("IDAT", zlibSync(rows.subarray(from, (from += length)), { level: 0 }));
    image = decode(join([chunk("IHDR", content), ...ends.slice(0, -1), data, ends.at(-1)]));
    const pass = unpack(image.data, columns, lines, depth);
    for (let i = 0; i < pass.length; i++) {
      values[(top + down * Math.floor(i / columns)) * width + left + across * (i % columns)] = pass[i];
    }
  }
  return { ...image, width, height, depth, data: values, unpacked: true };
}

/** A chunk without its checksum. */
function chunk(type, content) {
  const all = new Uint8Array(12 + content.length);
  new DataView(all.buffer).setUint32(0, content.length);
  for (let i = 0; i < 4; i++) all[4 + i] = type.charCodeAt(i);
  all.set(content, 8);
  return all;
}

function join(pieces, start = SIGNATURE) {
  const parts = [Uint8Array.from(start), ...pieces];
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Whole bytes of one or three channels, from packed bits, palette and alpha. */
function flatten({ width, height, depth, channels, data, palette, unpacked }) {
  const count = width * height;
  if (depth === 16) return { width, height, channels: 1, data };
  if (channels === 1 && (depth < 8 || palette)) {
    const values = depth < 8 && !unpacked ? unpack(data, width, height, depth) : data;
    if (!palette) {
      const scale = 255 / ((1 << depth) - 1);
      return { width, height, channels: 1, data: values.map((value) => value * scale) };
    }
    const rgb = new Uint8Array(3 * count);
    for (let i = 0; i < count; i++) rgb.set(palette[values[i]]?.slice(0, 3) ?? [0, 0, 0], 3 * i);
    return { width, height, channels: 3, data: rgb };
  }
  const kept = channels < 3 ? 1 : 3;
  if (kept === channels) return { width, height, channels: kept, data };
  const opaque = new Uint8Array(kept * count);
  for (let i = 0; i < count; i++) {
    for (let channel = 0; channel < kept; channel++) opaque[kept * i + channel] = data[channels * i + channel];
  }
  return { width, height, channels: kept, data: opaque };
}

/** Values of rows that are packed at `depth` bits each. */
function unpack(data, width, height, depth) {
  const stride = Math.ceil((width * depth) / 8);
  const most = (1 << depth) - 1;
  const values = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const bit = x * depth;
      values[y * width + x] = (data[y * stride + (bit >> 3)] >> (8 - depth - (bit & 7))) & most;
    }
  }
  return values;
}

/** EXIF orientation in an eXIf chunk, or in the text chunks in which ImageMagick and Adobe store it. */
function orientation(chunks) {
  const texts = new Map();
  let exif = null;
  for (const { type, content } of chunks) {
    if (type === "eXIf") exif = content;
    const text = readText(type, content);
    if (text) texts.set(...text);
  }
  const raw = texts.get("Raw profile type exif");
  if (!exif && raw) exif = fromHex(latin1(raw).split("\n").slice(3).join(""));
  const xmp = texts.get("XML:com.adobe.xmp");
  return (exif && exifOrientation(exif)) ?? (xmp ? xmpOrientation(xmp) : null);
}

/** Key and content of a text chunk; null for other chunks and unreadable ones. */
function readText(type, content) {
  const end = content.indexOf(0);
  if (end < 0) return null;
  const key = latin1(content.subarray(0, end));
  try {
    if (type === "tEXt") return [key, content.subarray(end + 1)];
    if (type === "zTXt") return [key, unzlibSync(content.subarray(end + 2))];
    if (type !== "iTXt") return null;
    const language = content.indexOf(0, end + 3);
    const text = content.subarray(content.indexOf(0, language + 1) + 1);
    return [key, content[end + 1] ? unzlibSync(text) : text];
  } catch {
    return null;
  }
}

function fromHex(text) {
  return Uint8Array.from(text.match(/[0-9a-f]{2}/gi) ?? [], (pair) => Number.parseInt(pair, 16));
}

function read32(bytes, at) {
  return new DataView(bytes.buffer, bytes.byteOffset + at, 4).getUint32(0);
}
