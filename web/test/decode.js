/**
 * Decode images as the page does: `node decode.js OUTPUT FILE...`
 *
 * Writes the grey levels of each file to OUTPUT/NUMBER.raw, as float32, and prints one JSON line for each: width,
 * height, channels, spacing and remarks, or the error.
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";

import { setCodecSource } from "../src/pixels/codecs.js";
import { decodeImage } from "../src/pixels/decode.js";
import { FileError } from "../src/pixels/errors.js";
import { codecBinary } from "./files.js";

setCodecSource(codecBinary);
const [output, ...files] = process.argv.slice(2);
for (const [number, file] of files.entries()) {
  try {
    const { data, ...facts } = await decodeImage(new Uint8Array(await readFile(file)));
    await writeFile(join(output, `${number}.raw`), Float32Array.from(data));
    console.log(JSON.stringify(facts));
  } catch (error) {
    if (!(error instanceof FileError)) throw error;
    console.log(JSON.stringify({ error: error.message }));
  }
}
