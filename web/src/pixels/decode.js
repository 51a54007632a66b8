/** Image files to pixels: PNG, JPEG and DICOM, upright. */
import { decodeDicom, isDicom } from "./dicom.js";
import { FileError } from "./errors.js";
import { CODES, histogram, rgbToGrey, scaleByRange } from "./greys.js";
import { decodeJpeg, isJpeg } from "./jpeg.js";
import { turnUpright } from "./orientation.js";
import { decodePng, isPng } from "./png.js";

/**
 * @typedef {object} Picture
 * @property {number} width
 * @property {number} height
 * @property {1 | 3} channels
 * @property {Uint8Array | Float32Array} data interleaved, in [0, 255]; whole numbers for files of 8 bits
 * @property {[number, number] | null} spacing between rows and columns in mm, if the file states it
 * @property {boolean} dicom
 * @property {string[]} remarks what a user should know about the brightness
 */

/**
 * Decode an image file.
 * @param {Uint8Array} bytes
 * @returns {Promise<Picture>}
 */
export async function decodeImage(bytes) {
  if (!bytes.length) throw new FileError("the file is empty");
  if (isDicom(bytes)) return { ...(await decodeDicom(bytes)), dicom: true };
  const decoded = isPng(bytes) ? decodePng(bytes) : isJpeg(bytes) ? await decodeJpeg(bytes) : null;
  if (!decoded) throw new FileError("no PNG, JPEG or DICOM image; save it as one of these");
  const { width, height, channels, data } = turnUpright(decoded, decoded.orientation);
  return { width, height, channels, data: eightBit(data), spacing: null, dicom: false, remarks: [] };
}

/** Pixels with as many channels as the network takes. */
export function withChannels(picture, channels) {
  if (picture.channels === channels) return picture.data;
  if (channels === 1) return rgbToGrey(picture.data);
  const data = new picture.data.constructor(3 * picture.data.length);
  for (let i = 0; i < data.length; i++) data[i] = picture.data[Math.floor(i / 3)];
  return data;
}

function eightBit(data) {
  if (!(data instanceof Uint16Array)) return data;
  const greys = scaleByRange(Float64Array.from({ length: CODES }, (_, code) => code), histogram(data));
  return Float32Array.from(data, (code) => greys[code]);
}
