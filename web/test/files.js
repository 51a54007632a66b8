/** Codec binaries from the npm packages, for tests in Node. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);

export const CODECS = {
  turbo: "@cornerstonejs/codec-libjpeg-turbo-8bit/decodewasm",
  openjpeg: "@cornerstonejs/codec-openjpeg/decodewasm",
  charls: "@cornerstonejs/codec-charls/decodewasm",
};

export const codecBinary = (name) => readFile(require.resolve(CODECS[name]));
