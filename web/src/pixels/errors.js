/** A file that cannot be read exactly; the message is shown to the user beside the file's name. */
export class FileError extends Error {}

const MOST_PIXELS = 89_478_485; // Pillow's limit

/** Refuse a picture that would take too much memory, before it is decoded. */
export function checkPixels(width, height) {
  if (!width || !height) throw new FileError("a picture of no size");
  if (width * height > MOST_PIXELS) throw new FileError(`more than ${MOST_PIXELS.toLocaleString("en")} pixels`);
}
