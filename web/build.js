/** Build the page's template: one HTML file without a model. `node build.js OUTPUT` */
import { createHash } from "node:crypto";
import { readFile, readdir, writeFile } from "node:fs/promises";
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

/** Folders of the npm packages in the page: those of the binaries, and those that a bundle adds. */
const packages = new Set(Object.values(BINARIES).map((path) => path.split("/", path.startsWith("@") ? 2 : 1).join("/")));

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
    metafile: true,
    absWorkingDir: fileURLToPath(new URL(".", import.meta.url)),
    external: ["fs", "path", "module", "url", "worker_threads", "node:*"],
    define: { "import.meta.url": '"blob:"' },
    logOverride: { "empty-import-meta": "silent" },
  });
  for (const [path, { bytesInOutput }] of Object.entries(Object.values(result.metafile.outputs)[0].inputs)) {
    const name = /^node_modules\/((@[^/]+\/)?[^/]+)/.exec(path)?.[1];
    if (name && bytesInOutput) packages.add(name);
  }
  return result.outputFiles[0].text;
}

/** NOTICES.txt, with the license file of every package that it has no section for. */
async function notices() {
  const own = await readFile(fileURLToPath(new URL("NOTICES.txt", import.meta.url)), "utf8");
  const titles = own.split("\n").filter((line) => line.startsWith("== ")).flatMap((line) => line.split(/[ ,]+/));
  const sections = [own];
  for (const name of [...packages].sort()) {
    const folder = fileURLToPath(new URL(`node_modules/${name}/`, import.meta.url));
    const file = (await readdir(folder)).find((entry) => /^licen[cs]e/i.test(entry));
    if (file) sections.push(`== ${name} ==\n\n${(await readFile(folder + file, "utf8")).trim()}\n`);
    else if (!titles.includes(name)) throw new Error(`${name} has no license file: add its license to NOTICES.txt`);
  }
  return sections.join("\n").replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

const packed = (bytes) => gzipSync(bytes, { level: 9 }).toString("base64");
const hash = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;

const [script, worker, style, page] = await Promise.all([
  bundle("ui/app.js"),
  bundle("worker.js"),
  readFile(source("style.css"), "utf8"),
  readFile(source("page.html"), "utf8"),
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

const parts = { POLICY: policy, STYLE: style, NOTICES: await notices(), ASSETS: blocks.join("\n"), SCRIPT: script };
const html = Object.entries(parts).reduce((text, [name, part]) => text.replace(`__${name}__`, () => part), page);
await writeFile(process.argv[2], html);
console.log(`${process.argv[2]}: ${Buffer.byteLength(html).toLocaleString("en")} bytes without a model`);
