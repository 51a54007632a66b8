/** Decoders of compressed pixels: JPEG, lossless JPEG, JPEG-LS, JPEG 2000 and the run lengths of DICOM. */
import charls from "@cornerstonejs/codec-charls/decodewasmjs";
import turbo from "@cornerstonejs/codec-libjpeg-turbo-8bit/decodewasmjs";
import openjpeg from "@cornerstonejs/codec-openjpeg/decodewasmjs";
import { Decoder as LosslessDecoder } from "jpeg-lossless-decoder-js";

import { FileError } from "./errors.js";
import { jpegHeader } from "./jpeg-header.js";

const JPEG_2000 = 0xff4fff51; // begins a codestream

const FACTORIES = {
  turbo: [turbo, "JPEGDecoder"],
  openjpeg: [openjpeg, "J2KDecoder"],
  charls: [charls, "JpegLSDecoder"],
};
const loaded = new Map();
const quiet = () => {}; // what they say may quote the file
let readBinary = () => Promise.reject(new Error("codecs have no source"));

/** Set the function from a codec's name to a promise of its WebAssembly binary; it is called when first needed. */
export function setCodecSource(source) {
  readBinary = source;
}

async function decoder(name) {
  const [factory, kind] = FACTORIES[name];
  if (!loaded.has(name)) loaded.set(name, readBinary(name).then((wasmBinary) => factory({ wasmBinary, print: quiet, printErr: quiet })));
  const module = await loaded.get(name);
  return new module[kind]();
}

/**
 * Run one of the WebAssembly decoders.
 * @returns {Promise<{info: object, data: Uint8Array}>} facts of the picture and a copy of its bytes
 */
async function decodeWith(name, bytes, { width, height }) {
  const one = await decoder(name);
  try {
    one.getEncodedBuffer(bytes.length).set(bytes);
    one.decode();
    const info = one.getFrameInfo();
    checkSize(info, width, height);
    return { info, data: Uint8Array.from(one.getDecodedBuffer()) };
  } catch (error) {
    if (error instanceof FileError) throw error;
    throw new FileError("damaged or truncated compressed pixels");
  } finally {
    one.delete();
  }
}

/** Refuse another size in the headers of a codestream: decoders take memory for what is stated there. */
function checkStated(bytes, { width, height }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const { frame } = jpegHeader(bytes);
  if (frame) checkSize(frame, width, height);
  for (let at = 0; at + 24 <= bytes.length; at++) {
    if (bytes[at] !== 0xff || view.getUint32(at) !== JPEG_2000) continue;
    const [right, bottom, left, top] = [8, 12, 16, 20].map((offset) => view.getUint32(at + offset));
    checkSize({ width: right - left, height: bottom - top }, width, height);
    if (at === 0) return; // in a bare codestream only the first can be one
  }
}

function checkSize(info, width, height) {
  if (info.width !== width || info.height !== height) {
    throw new FileError("its compressed pixels have another size than its header states");
  }
}

/** Decode an 8-bit JPEG of a known size to grey or interleaved RGB. */
export async function decodeTurbo(bytes, size) {
  if (!endsWhole(bytes)) throw new FileError("damaged or truncated JPEG (premature end)");
  checkStated(bytes, size);
  const { info, data } = await decodeWith("turbo", bytes, size);
  return { width: info.width, height: info.height, channels: info.componentCount, data };
}

/** Whether a JPEG has an end marker behind its pixels; without one, decoders fill up with grey. */
function endsWhole(bytes) {
  for (let at = bytes.length - 2; at > 0; at--) if (bytes[at] === 0xff && bytes[at + 1] === 0xd9) return true;
  return false;
}

/** Decode a lossless JPEG to whole numbers. */
export function decodeLossless(bytes, { width, height }) {
  checkStated(bytes, { width, height });
  const one = new LosslessDecoder();
  let data;
  try {
    data = one.decompress(bytes.slice().buffer);
  } catch {
    throw new FileError("damaged or truncated compressed pixels");
  }
  const array = one.frame.precision > 8 ? new Uint16Array(data) : new Uint8Array(data);
  return { channels: one.frame.numComp, data: array };
}

/** Decode JPEG-LS (`charls`) or JPEG 2000 (`openjpeg`). */
export async function decodeStill(name, bytes, size) {
  checkStated(bytes, size);
  const { info, data } = await decodeWith(name, bytes, size);
  const bits = info.bitsPerSample;
  if (bits > 16) throw new FileError("more than 16 bits a pixel; save it with 16 or fewer");
  const values = bits > 8 ? new Uint16Array(data.buffer, 0, data.length >> 1) : data;
  return { bits, channels: info.componentCount, signed: Boolean(info.isSigned), data: values };
}

/**
 * Decode the run lengths of DICOM (PS3.5 annex G).
 * @param {Uint8Array} frame
 * @param {number} count pixels of the picture
 * @param {number} bytesPerPixel 1, 2, or 3 for RGB
 * @returns {Uint8Array[]} one plane of `count` bytes for each segment, most significant first
 */
export function decodeRunLengths(frame, count, bytesPerPixel) {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.length);
  if (frame.length < 64 || view.getUint32(0, true) !== bytesPerPixel) {
    throw new FileError("damaged DICOM pixel data (run lengths)");
  }
  const planes = [];
  for (let segment = 0; segment < bytesPerPixel; segment++) {
    const start = view.getUint32(4 + 4 * segment, true);
    const end = segment + 1 < bytesPerPixel ? view.getUint32(8 + 4 * segment, true) : frame.length;
    planes.push(unpackBits(frame.subarray(start, end), count));
  }
  return planes;
}

function unpackBits(bytes, count) {
  const plane = new Uint8Array(count);
  let to = 0;
  for (let at = 0; at < bytes.length && to < count; ) {
    const control = bytes[at++];
    if (control < 128) {
      const literal = bytes.subarray(at, at + control + 1).subarray(0, count - to);
      plane.set(literal, to);
      to += literal.length;
      at += control + 1;
    } else if (control > 128) {
      const length = 257 - control;
      plane.fill(bytes[at++], to, to + length);
      to += length;
    }
  }
  if (to < count) throw new FileError("damaged or truncated DICOM pixel data (run lengths)");
  return plane;
}
