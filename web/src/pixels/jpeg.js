/** JPEG files to pixels by libjpeg-turbo, the library that Pillow decodes with. */
import { decodeTurbo } from "./codecs.js";
import { checkPixels, FileError } from "./errors.js";
import { jpegHeader } from "./jpeg-header.js";
import { exifOrientation, latin1, xmpOrientation } from "./orientation.js";

const EXIF = "Exif\0\0";
const XMP = "http://ns.adobe.com/xap/1.0/\0";
const APP1 = 0xe1;

export const isJpeg = (bytes) => bytes[0] === 0xff && bytes[1] === 0xd8 && bytes[2] === 0xff;

/**
 * Decode a JPEG file.
 * @param {Uint8Array} bytes
 * @returns {Promise<{width: number, height: number, channels: 1 | 3, data: Uint8Array, orientation: number | null}>}
 */
export async function decodeJpeg(bytes) {
  const { segments, frame } = jpegHeader(bytes);
  if (!frame) throw new FileError("damaged JPEG: no header");
  checkPixels(frame.width, frame.height);
  if (frame.bits !== 8 || frame.marker > 0xc2) {
    throw new FileError("a JPEG of more than 8 bits, or of a rare kind; save it as PNG");
  }
  if (frame.channels !== 1 && frame.channels !== 3) throw new FileError("a JPEG in CMYK; save it as grey or RGB");
  let orientation = null;
  for (const { marker, content } of segments) {
    if (marker !== APP1) continue;
    const head = latin1(content.subarray(0, XMP.length));
    if (head.startsWith(EXIF)) orientation = exifOrientation(content) ?? orientation;
    else if (head === XMP) orientation ??= xmpOrientation(content);
  }
  return { ...(await decodeTurbo(bytes, frame)), orientation };
}
