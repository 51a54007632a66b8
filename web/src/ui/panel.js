/** The panel of classes and areas, threshold, spacing and remarks. */
import { areasOf, classNames, colourOf } from "../save/files.js";

const byId = (id) => document.getElementById(id);

export class Panel {
  /** @param {object} on what to do: `select(index)`, `show(index, visible)`, `threshold(value, final)`, `spacing(pair)` */
  constructor(facts, on) {
    this.facts = facts;
    this.on = on;
    this.index = 1;
    this.names = classNames(facts);
    this.areas = this.names.map((name, place) => this.#addClass(name, place + 1));
    const single = !facts.multilabel && this.names.length > 1;
    byId("threshold-field").hidden = single; // the most probable class is taken
    byId("threshold").addEventListener("input", () => this.#threshold(false));
    byId("threshold").addEventListener("change", () => this.#threshold(true));
    for (const id of ["spacing-rows", "spacing-columns"]) byId(id).addEventListener("change", () => this.#spacing());
  }

  select(index) {
    if (index > this.names.length) return;
    this.index = index;
    byId(`class-${index}`).checked = true;
    this.on.select(index);
  }

  /** Show the values of an image; null for none. */
  update(image) {
    const ready = Boolean(image?.mask);
    for (const id of ["holes", "largest", "save-mask", "save-labelme", "threshold"]) byId(id).disabled = !ready;
    for (const id of ["spacing-rows", "spacing-columns"]) byId(id).disabled = !ready;
    this.#showAreas(image);
    if (ready) this.#showThreshold(image.threshold);
    const remarks = (image?.shown?.remarks ?? []).map((text) => {
      const item = document.createElement("li");
      item.textContent = `Note: ${text}`;
      return item;
    });
    byId("remarks").replaceChildren(...remarks);
  }

  /** Show an image's spacing in the fields. */
  showSpacing(image) {
    ["spacing-rows", "spacing-columns"].forEach((id, axis) => {
      byId(id).value = image?.spacing ? String(image.spacing[axis]) : "";
      byId(id).setAttribute("aria-invalid", "false");
    });
    byId("spacing-source").textContent = image?.shown?.spacing ? "As the file states it." : "";
  }

  #addClass(name, index) {
    const row = document.createElement("div");
    row.className = "class";
    const radio = Object.assign(document.createElement("input"), {
      type: "radio", name: "class", id: `class-${index}`, checked: index === 1,
    });
    radio.addEventListener("change", () => this.select(index));
    const swatch = document.createElement("canvas");
    [swatch.width, swatch.height] = [1, 1];
    const context = swatch.getContext("2d");
    context.fillStyle = `rgb(${colourOf(index).join(" ")})`;
    context.fillRect(0, 0, 1, 1);
    const label = Object.assign(document.createElement("label"), { className: "name", textContent: name });
    label.htmlFor = radio.id;
    const show = Object.assign(document.createElement("label"), { className: "show" });
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    box.setAttribute("aria-label", `Show ${name}`);
    box.addEventListener("change", () => this.on.show(index, box.checked));
    show.append(box, "Show");
    const area = Object.assign(document.createElement("span"), { className: "area", textContent: "–" });
    row.append(radio, swatch, label, show, area);
    byId("classes").append(row);
    return area;
  }

  #showAreas(image) {
    if (!image?.mask) return this.areas.forEach((area) => (area.textContent = "–"));
    const pixels = areasOf(image.mask, this.facts);
    const { spacing } = image;
    pixels.forEach((count, place) => {
      const share = `${((100 * count) / image.mask.length).toFixed(1)} %`;
      const mm2 = spacing ? `${format(count * spacing[0] * spacing[1])} mm², ` : "";
      this.areas[place].textContent = `${mm2}${count.toLocaleString("en")} pixels, ${share}`;
    });
  }

  #showThreshold(threshold) {
    const value = Array.isArray(threshold) ? threshold[this.index - 1] : threshold;
    if (value === null) return;
    byId("threshold").value = String(value);
    byId("threshold-value").textContent = value.toFixed(2);
  }

  #threshold(final) {
    const value = Number(byId("threshold").value);
    byId("threshold-value").textContent = value.toFixed(2);
    this.on.threshold(value, final);
  }

  #spacing() {
    const fields = ["spacing-rows", "spacing-columns"].map(byId);
    const texts = fields.map(({ value }) => value.trim().replace(",", "."));
    if (texts[0] && !texts[1] && document.activeElement !== fields[1]) texts[1] = texts[0];
    const values = texts.map(Number);
    fields.forEach((field, axis) => {
      const wrong = texts[axis] !== "" && !(values[axis] > 0 && Number.isFinite(values[axis]));
      field.setAttribute("aria-invalid", String(wrong));
    });
    const good = texts.every(Boolean) && values.every((mm) => mm > 0 && Number.isFinite(mm));
    this.on.spacing(good ? values : null, texts.some(Boolean) && !good);
  }
}

function format(mm2) {
  return mm2.toLocaleString("en", { maximumFractionDigits: mm2 < 100 ? 2 : 0 });
}
