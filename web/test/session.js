/**
 * A person's session with a page in Chromium: `node session.js CHROMIUM PAGE OUTPUT FILE...`
 *
 * Opens the files, saves all, corrects the first image with every tool, saves it and all again. Writes the downloads
 * and screenshots to OUTPUT, and prints one JSON object: the states of the images, what was seen at each step, requests,
 * and errors of the page.
 */
import { join } from "node:path";

import { chromium } from "playwright-core";

const [executablePath, page_, output, ...files] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, acceptDownloads: true });
const page = await context.newPage();
const report = { states: {}, seen: {}, requests: [], errors: [] };
page.on("request", (request) => report.requests.push(request.url().slice(0, 5)));
page.on("pageerror", (error) => report.errors.push(error.message));
page.on("console", (message) => ["error", "warning"].includes(message.type()) && report.errors.push(message.text()));
page.on("dialog", (dialog) => dialog.accept());

const areas = () => page.$$eval(".class .area", (all) => all.map((area) => Number(/([\d,]+) pixels/.exec(area.textContent)?.[1].replaceAll(",", ""))));
const status = () => page.textContent("#status");

async function note(name) {
  report.seen[name] = { areas: await areas(), status: await status() };
}

async function download(press, name) {
  const [file] = await Promise.all([page.waitForEvent("download"), press()]);
  await file.saveAs(join(output, name));
  return file.suggestedFilename();
}

await page.goto(`file://${page_}`);
await page.setInputFiles("#files", files);
const settled = () => [...document.querySelectorAll("#images .state")].every(({ textContent }) => !/^(Waiting|Reading|Computing)$/.test(textContent));
await page.waitForFunction(settled, null, { timeout: 240_000 });
for (const row of await page.$$("#images li")) {
  report.states[await row.$eval(".name", (e) => e.textContent)] = await row.$eval(".state", (e) => e.textContent);
}
await note("opened");
report.seen.all = await download(() => page.click("#save-all"), "all.zip");
await page.screenshot({ path: join(output, "wide.png") });

// Correct the first image, at places given as shares of the stage.
const stage = await (await page.$("#stage")).boundingBox();
const at = (x, y) => [stage.x + x * stage.width, stage.y + y * stage.height];
async function drag(...places) {
  await page.mouse.move(...at(...places[0]));
  await page.mouse.down();
  for (const place of places.slice(1)) await page.mouse.move(...at(...place), { steps: 4 });
  await page.mouse.up();
}
async function click(...places) {
  for (const place of places) await page.mouse.click(...at(...place));
}
await page.focus("#stage");
await page.keyboard.press("e");
await drag([0.45, 0.5], [0.55, 0.5]);
await note("erased");
await page.keyboard.press("Control+z");
await note("undone");
await page.keyboard.press("Control+y");
await note("redone");
await page.keyboard.press("b");
await page.mouse.wheel(0, -300);
report.seen.size = await page.textContent("#size-value");
await drag([0.45, 0.5], [0.55, 0.5]);
await note("brushed");
await page.keyboard.press("c");
await click([0.44, 0.4], [0.56, 0.4], [0.5, 0.7]);
await page.keyboard.press("Enter");
await note("cut");
await page.keyboard.press("p");
await click([0.44, 0.4], [0.56, 0.4], [0.56, 0.44]);
await page.mouse.dblclick(...at(0.44, 0.44));
await note("added");
await page.keyboard.press("f");
await page.waitForFunction(() => /oles filled/.test(document.querySelector("#status").textContent));
await note("filled");
await page.keyboard.press("l");
await page.waitForFunction(() => /Largest part/.test(document.querySelector("#status").textContent));
await note("largest");
await page.fill("#spacing-rows", "0,5");
await page.press("#spacing-rows", "Enter");
report.seen.area = await page.textContent(".class .area");
report.seen.mask = await download(() => page.click("#save-mask"), "mask.png");
report.seen.labelme = await download(() => page.click("#save-labelme"), "labelme.json");
await page.focus("#threshold");
await page.keyboard.press("ArrowRight");
await page.waitForFunction(() => /Undo brings/.test(document.querySelector("#status").textContent));
await note("threshold");
await page.focus("#stage");
await page.keyboard.press("Control+z");
await note("restored");

await page.emulateMedia({ colorScheme: "dark" });
await page.setViewportSize({ width: 390, height: 844 });
await page.waitForTimeout(300);
report.seen.scrolls = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
await page.screenshot({ path: join(output, "narrow.png"), fullPage: true });
report.seen.unlabelled = await page.$$eval("button, input, select", (all) =>
  all.filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML),
);
report.seen.blocked = await page.evaluate(() => fetch("https://example.org/").then(() => false, () => true));
report.errors = report.errors.filter((text) => !text.includes("example.org"));
console.log(JSON.stringify(report));
await browser.close();
