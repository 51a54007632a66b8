/** The page: opens images, computes their masks one after the other, lets a person correct and save them. */
import { unpackAsset } from "../assets.js";
import { History } from "../mask/history.js";
import { probabilityAt } from "../network/fit.js";
import { areasCsv, areasOf, classNames, resultNames, zip } from "../save/files.js";
import { Background } from "./background.js";
import { addKeys } from "./keys.js";
import { Panel } from "./panel.js";
import { listen } from "./pointer.js";
import { Tools } from "./tools.js";
import { View } from "./view.js";

const byId = (id) => document.getElementById(id);
const textOf = (id) => byId(id).textContent;

const facts = JSON.parse(textOf("facts"));
const names = classNames(facts);
/** Opened images: file, state, what is shown, small probabilities, mask, history, threshold, spacing. */
const images = [];
let current = null;
let computing = false;

const workers = startWorkers();
const view = new View(byId("picture"), byId("overlay"), facts);
const tools = new Tools(view, facts, changed);
const panel = new Panel(facts, { select: selectClass, show: showClass, threshold: setThreshold, spacing: setSpacing });

/** Two workers: one computes images, the other serves the image that is being corrected. */
async function startWorkers() {
  const program = await unpackAsset(textOf("asset-worker"));
  const url = URL.createObjectURL(new Blob([program], { type: "text/javascript" }));
  const assets = Object.fromEntries(
    ["model", "runtime", "turbo", "openjpeg", "charls"].map((name) => [name, textOf(`asset-${name}`)]),
  );
  const start = { facts, assets };
  return { network: new Background(url, start), helper: new Background(url, start) };
}

// Opening and computing.

function open(files) {
  for (const file of files) {
    const initial = Array.isArray(facts.threshold) ? [...facts.threshold] : facts.threshold;
    const threshold = facts.multilabel && !Array.isArray(initial) ? names.map(() => initial) : initial;
    const image = { file, state: "Waiting", failed: false, threshold, history: null, mask: null, spacing: null, saved: true };
    image.row = addRow(image);
    images.push(image);
  }
  byId("none").hidden = images.length > 0;
  if (!current && images.length) select(images[0]);
  say(files.length > 1 ? `${files.length} images opened` : "");
  compute();
}

/** Compute the images that wait, the shown one first. */
async function compute() {
  if (computing) return;
  computing = true;
  for (;;) {
    const waiting = images.filter(({ state }) => state === "Waiting");
    const image = waiting.includes(current) ? current : waiting[0];
    if (!image) break;
    await computeOne(image);
  }
  computing = false;
}

async function computeOne(image) {
  setState(image, "Reading");
  const started = performance.now();
  try {
    const { network } = await workers;
    const content = { file: image.file, threshold: image.threshold };
    const found = await network.call("segment", content, (text) => setState(image, text));
    Object.assign(image, { shown: found.shown, small: found.small, mask: found.mask, spacing: found.shown.spacing });
    image.history = new History(image.shown);
    setState(image, `${((performance.now() - started) / 1000).toFixed(1)} s`);
  } catch (error) {
    image.failed = true;
    setState(image, error.message);
    if (image === current) say(`${image.file.name}: ${error.message}`, true);
  }
  if (image === current) show(image);
  else if (image.shown) image.shown.data = null; // decoded again when it is selected
}

// The list of images.

function addRow(image) {
  const row = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button" });
  const name = Object.assign(document.createElement("span"), { className: "name", textContent: image.file.name });
  const state = Object.assign(document.createElement("span"), { className: "state", textContent: image.state });
  button.title = image.file.name;
  button.append(name, state);
  button.addEventListener("click", () => select(image));
  row.append(button);
  byId("images").append(row);
  return { button, state };
}

function setState(image, text) {
  image.state = text;
  image.row.state.textContent = text;
  image.row.state.classList.toggle("failed", image.failed);
  if (image === current) showBusy();
}

function showBusy() {
  const busy = current && !current.mask && !current.failed;
  byId("busy").hidden = !busy;
  if (busy) byId("busy-text").textContent = `${current.state} …`;
}

async function select(image) {
  if (image === current) return;
  tools.drop();
  if (current?.shown && current.mask) current.shown.data = null;
  current = image;
  for (const each of images) each.row.button.toggleAttribute("aria-current", false);
  image.row.button.setAttribute("aria-current", "true");
  image.row.button.scrollIntoView({ block: "nearest", inline: "nearest" });
  say(image.failed ? `${image.file.name}: ${image.state}` : "", image.failed);
  if (image.mask && !image.shown.data) {
    try {
      const shown = await (await workers).helper.call("decode", { file: image.file });
      image.shown.data = shown.data;
    } catch (error) {
      say(`${image.file.name}: ${error.message}`, true);
    }
    if (image !== current) return;
  }
  show(image);
}

function step(by) {
  const next = images[images.indexOf(current) + by];
  if (next) select(next);
}

function show(image) {
  const ready = image.mask && image.shown.data;
  byId("welcome").hidden = true;
  view.show(ready ? { ...image.shown, mask: image.mask } : null);
  panel.showSpacing(image);
  showBusy();
  update();
}

function update() {
  panel.update(current);
  byId("undo").disabled = !current?.history?.canUndo;
  byId("redo").disabled = !current?.history?.canRedo;
  byId("save-all").disabled = !images.some(({ mask }) => mask);
  view.redraw();
}

// Correcting.

function changed(before, label) {
  if (current.history.record(before, current.mask, { text: label })) {
    current.saved = false;
    say(label);
  }
  update();
}

function undo() {
  move(current?.history?.undo(current.mask), "before", "Undone");
}

function redo() {
  move(current?.history?.redo(current.mask), "after", "Done again");
}

function move(label, state, what) {
  if (!label) return;
  if (label.threshold) current.threshold = label.threshold[state];
  current.saved = false;
  say(`${what}: ${label.text}`);
  update();
}

async function clean(rule) {
  const image = current;
  if (!image?.mask) return;
  await replaceMask(image, "clean", { rule, index: tools.index }, rule === "largest" ? "Largest part" : "Holes filled");
}

/** Replace an image's mask by what the helper makes of it, as one step of undo. */
async function replaceMask(image, kind, content, text, threshold) {
  const version = image.mask.slice();
  try {
    const mask = await (await workers).helper.call(kind, { mask: image.mask, size: sizeOf(image), ...content });
    if (image.mask.some((value, i) => value !== version[i])) return say("The mask was changed meanwhile; try again", true);
    image.mask.set(mask);
    if (image.history.record(version, mask, { text, threshold })) {
      image.saved = false;
      say(text);
    } else say(`${text}: nothing to change`);
  } catch (error) {
    say(error.message, true);
  }
  update();
}

const sizeOf = ({ shown: { width, height, channels, dicom } }) => ({ width, height, channels, dicom });

let wanted = null;
let sliding = null;

/** Apply a threshold while its slider moves; the move as a whole is one step of undo. */
async function setThreshold(value, final) {
  const image = current;
  if (!image?.mask) return;
  sliding ??= { image, mask: image.mask.slice(), threshold: image.threshold };
  const next = Array.isArray(image.threshold) ? image.threshold.with(tools.index - 1, value) : value;
  image.threshold = next;
  wanted = { image, threshold: next, final };
  if (setThreshold.busy) return;
  setThreshold.busy = true;
  while (wanted) {
    const job = wanted;
    wanted = null;
    const content = { small: job.image.small, size: sizeOf(job.image), threshold: job.threshold };
    const mask = await (await workers).helper.call("threshold", content);
    job.image.mask.set(mask);
    if (job.final && !wanted) endSliding();
    update();
  }
  setThreshold.busy = false;
}

function endSliding() {
  const { image, mask, threshold } = sliding;
  sliding = null;
  const edited = image.history.done.some(({ label }) => !label.threshold);
  const label = { text: "Threshold", threshold: { before: threshold, after: image.threshold } };
  if (!image.history.record(mask, image.mask, label)) return;
  image.saved = false;
  say(edited ? "The threshold replaced your corrections; Undo brings them back" : "");
}

function setSpacing(pair, wrong) {
  if (!current?.mask) return;
  current.spacing = pair;
  say(wrong ? "Pixel spacing: give two numbers of mm above 0" : "", wrong);
  update();
}

function selectClass(index) {
  tools.index = index;
  update();
}

function showClass(index, visible) {
  if (visible) view.hidden.delete(index);
  else view.hidden.add(index);
  view.redraw();
}

// Saving.

async function save(kinds) {
  if (!current?.mask) return;
  const image = current;
  try {
    const files = await filesOf(image, resultNames(images.map(({ file }) => file.name))[images.indexOf(image)], kinds);
    const [[first, bytes]] = files;
    if (files.size === 1) download(first, bytes);
    else download(first.replace(/\.json$/, "_labelme.zip"), zip(files));
    image.saved = true;
  } catch (error) {
    say(`Not saved: ${error.message}`, true);
  }
}

async function filesOf(image, name, kinds) {
  const content = { kinds, name, file: image.file, mask: image.mask, size: sizeOf(image) };
  return (await workers).helper.call("save", content);
}

async function saveAll() {
  const done = images.filter(({ mask }) => mask);
  if (!done.length) return;
  try {
    const files = new Map();
    const rows = [];
    const results = resultNames(done.map(({ file }) => file.name));
    for (const [place, image] of done.entries()) {
      say(`Saving ${place + 1} of ${done.length} …`);
      for (const file of await filesOf(image, results[place], ["mask", "labelme", "image"])) files.set(...file);
      rows.push({ name: image.file.name, names, pixels: areasOf(image.mask, facts), spacing: image.spacing });
    }
    files.set("areas.csv", areasCsv(rows));
    download("segmentations.zip", zip(files));
    for (const image of done) image.saved = true;
    const open = images.length - done.length;
    say(`${done.length} images saved${open ? `; ${open} have no mask` : ""}`);
  } catch (error) {
    say(`Not saved: ${error.message}`, true);
  }
}

function download(name, bytes) {
  const url = URL.createObjectURL(new Blob([bytes]));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  say(`Saved ${name}`);
}

// The rest of the page.

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

function chooseTool(name) {
  tools.choose(name);
  byId("stage").dataset.tool = name;
  for (const button of document.querySelectorAll("[data-tool][aria-pressed]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  }
}

function toggleOverlay() {
  toggleOverlay.last = view.opacity || toggleOverlay.last || 0.35;
  setOpacity(view.opacity ? 0 : toggleOverlay.last);
}

function setOpacity(share) {
  view.opacity = share;
  byId("opacity").value = String(Math.round(100 * share));
  byId("opacity-value").textContent = `${Math.round(100 * share)} %`;
  view.redraw();
}

/** Position, class and probabilities under the pointer. */
function hover(place) {
  tools.hover(place);
  if (!current?.mask || !view.image) return;
  const [x, y] = view.toImage(place).map(Math.floor);
  const inside = x >= 0 && y >= 0 && x < view.image.width && y < view.image.height;
  byId("place").textContent = inside ? `x ${x}, y ${y}: ${probabilities(x, y)}` : "";
}

function probabilities(x, y) {
  const values = probabilityAt(current.small, current.shown, x, y);
  const shown = values.length > names.length ? values.slice(1) : values;
  return names.map((name, place) => `${name} ${(100 * shown[place]).toFixed(0)} %`).join(", ");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", ({ matches }) => setTheme(matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  });
  byId("model").textContent = `${names.join(", ")} · ${facts.size[1]} × ${facts.size[0]} · pdrunet-jax ${facts.version}`;
  byId("files").addEventListener("change", ({ target }) => {
    open([...target.files]);
    target.value = "";
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("stage").classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("stage").classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    byId("stage").classList.remove("dropping");
    open([...event.dataTransfer.files]);
  });
  addEventListener("beforeunload", (event) => {
    if (images.some(({ saved }) => !saved)) event.preventDefault();
  });
  for (const button of document.querySelectorAll("[data-tool][aria-pressed]")) {
    button.addEventListener("click", () => chooseTool(button.dataset.tool));
  }
  tools.onSize = (size) => {
    byId("size").value = String(size);
    byId("size-value").textContent = String(size);
  };
  byId("size").addEventListener("input", ({ target }) => tools.setSize(Number(target.value)));
  byId("opacity").addEventListener("input", ({ target }) => setOpacity(Number(target.value) / 100));
  const actions = {
    undo, redo, "zoom-in": () => view.zoom(1.25), "zoom-out": () => view.zoom(0.8), fit: () => view.fit(),
    holes: () => clean("holes"), largest: () => clean("largest"), "save-mask": () => save(["mask"]),
    "save-labelme": () => save(["labelme"]), "save-all": saveAll, help: () => byId("help-dialog").showModal(),
  };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  listen(view, byId("stage"), {
    drags: tools.drags,
    sizes: tools.sizes,
    size: (factor) => tools.resize(factor),
    down: (point) => tools.down(point),
    move: (point) => tools.move(point),
    up: () => tools.up(),
    cancel: () => tools.cancel(),
    hover,
    leave: () => tools.leave(),
    twice: () => tools.close(),
  });
  addKeys({ view, tools, panel, chooseTool, toggleOverlay, step, actions });
  update();
  const missing = ["DecompressionStream", "WebAssembly", "Worker"].find((name) => !(name in globalThis));
  if (missing) say(`This browser is too old for the page (${missing}); use a current Chrome, Edge, Firefox or Safari`, true);
}

start();
