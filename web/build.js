/** Build the page's template: one HTML file without a model. `node build.js OUTPUT` */
import { createHash } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

import { build } from "esbuild";

const require = createRequire(import.meta.url);
const source = (name) => fileURLToPath(new URL(`src/${name}`, import.meta.url));

const BINARIES = {
  runtime: "onnxruntime-web/ort-wasm-simd-threaded.wasm",
  turbo: "@cornerstonejs/codec-libjpeg-turbo-8bit/decodewasm",
  openjpeg: "@cornerstonejs/codec-openjpeg/decodewasm",
  charls: "@cornerstonejs/codec-charls/decodewasm",
};

async function bundle(entry) {
  const result = await build({
    entryPoints: [source(entry)],
    bundle: true,
    minify: true,
    write: false,
    format: "iife",
    target: "es2022",
    platform: "browser",
    charset: "utf8",
    legalComments: "none",
    external: ["fs", "path", "module", "url", "worker_threads", "node:*"],
    define: { "import.meta.url": '"blob:"' },
    logOverride: { "empty-import-meta": "silent" },
  });
  return result.outputFiles[0].text;
}

const packed = (bytes) => gzipSync(bytes, { level: 9 }).toString("base64");
const hash = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;

const [script, worker, style, page, notices] = await Promise.all([
  bundle("ui/app.js"),
  bundle("worker.js"),
  readFile(source("style.css"), "utf8"),
  readFile(source("page.html"), "utf8"),
  readFile(fileURLToPath(new URL("NOTICES.txt", import.meta.url)), "utf8"),
]);

const assets = { worker: packed(worker) };
for (const [name, path] of Object.entries(BINARIES)) assets[name] = packed(await readFile(require.resolve(path)));
const blocks = Object.entries(assets).map(([name, text]) => `<script type="text/plain" id="asset-${name}">${text}</script>`);

// Nothing may be loaded and no connection opened; the worker comes from this file.
const policy = [
  "default-src 'none'",
  `script-src ${hash(script)} 'wasm-unsafe-eval'`,
  "worker-src blob:",
  `style-src ${hash(style)}`,
  "connect-src 'none'",
  "form-action 'none'",
  "base-uri 'none'",
].join("; ");

const parts = { POLICY: policy, STYLE: style, NOTICES: notices, ASSETS: blocks.join("\n"), SCRIPT: script };
const html = Object.entries(parts).reduce((text, [name, part]) => text.replace(`__${name}__`, () => part), page);
await writeFile(process.argv[2], html);
console.log(`${process.argv[2]}: ${Buffer.byteLength(html).toLocaleString("en")} bytes without a model`);
