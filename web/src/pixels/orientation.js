/** EXIF orientation: where files state it, and turning pixels upright. */

const TAG = 274;
const XMP = /tiff:Orientation(?:="|>)([0-9])/;

/** Orientation, 1 to 8, in an EXIF block (a TIFF header and its first directory); null if it states none. */
export function exifOrientation(bytes) {
  const start = latin1(bytes.subarray(0, 6)) === "Exif\0\0" ? 6 : 0;
  const view = new DataView(bytes.buffer, bytes.byteOffset + start, bytes.length - start);
  try {
    const order = view.getUint16(0);
    if (order !== 0x4949 && order !== 0x4d4d) return null;
    const little = order === 0x4949;
    const directory = view.getUint32(4, little);
    for (let entry = 0; entry < view.getUint16(directory, little); entry++) {
      const at = directory + 2 + 12 * entry;
      if (view.getUint16(at, little) === TAG) return view.getUint16(at + 8, little);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // cut off: states none
  }
  return null;
}

/** Orientation in XMP metadata; null if it states none. */
export function xmpOrientation(bytes) {
  const match = XMP.exec(latin1(bytes));
  return match ? Number(match[1]) : null;
}

/**
 * Turn pixels upright.
 * @template {Uint8Array | Uint16Array} T
 * @param {{width: number, height: number, channels: number, data: T}} image
 * @param {number | null} orientation as EXIF counts; numbers other than 2 to 8 mean upright
 */
export function turnUpright(image, orientation) {
  if (!orientation || orientation < 2 || orientation > 8) return image;
  const { width, height, channels, data } = image;
  const swapped = orientation > 4;
  const [columns, rows] = swapped ? [height, width] : [width, height];
  const turned = new data.constructor(data.length);
  // Where the pixel at (x, y) of the upright picture is stored.
  const source = {
    2: (x, y) => [width - 1 - x, y],
    3: (x, y) => [width - 1 - x, height - 1 - y],
    4: (x, y) => [x, height - 1 - y],
    5: (x, y) => [y, x],
    6: (x, y) => [y, height - 1 - x],
    7: (x, y) => [width - 1 - y, height - 1 - x],
    8: (x, y) => [width - 1 - y, x],
  }[orientation];
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      const [left, top] = source(x, y);
      const from = (top * width + left) * channels;
      const to = (y * columns + x) * channels;
      for (let channel = 0; channel < channels; channel++) turned[to + channel] = data[from + channel];
    }
  }
  return { ...image, width: columns, height: rows, data: turned };
}

export function latin1(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}
