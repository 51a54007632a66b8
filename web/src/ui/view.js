/** The picture and the mask over it: zoom, pan, and what is drawn. */
import { colourOf, valueColours } from "../save/files.js";

const MOST_ZOOM = 40; // screen pixels a pixel of the image
const OUTLINE = 230; // opacity of outlines, of 255

export class View {
  /**
   * @param {HTMLCanvasElement} picture
   * @param {HTMLCanvasElement} overlay on top of it
   * @param {object} facts of the model
   */
  constructor(picture, overlay, facts) {
    this.picture = picture;
    this.overlay = overlay;
    this.facts = facts;
    this.image = null;
    this.scale = 1;
    this.offset = [0, 0];
    this.opacity = 0.35;
    this.hidden = new Set();
    this.decorate = () => {};
    this.pending = false;
    new ResizeObserver(() => this.#resize()).observe(picture.parentElement);
  }

  /** Show an image, {width, height, channels, data, mask}, as a whole; null for none. */
  show(image) {
    this.image = image;
    this.source = image && toCanvas(image);
    this.fit();
  }

  fit() {
    if (this.image) {
      const { width, height } = this.overlay;
      this.scale = Math.min(width / this.image.width, height / this.image.height);
      this.offset = [(width - this.image.width * this.scale) / 2, (height - this.image.height * this.scale) / 2];
    }
    this.fitted = true;
    this.redraw();
  }

  /** Zoom by a factor around a point of the overlay, in its pixels; by default its centre. */
  zoom(factor, [x, y] = [this.overlay.width / 2, this.overlay.height / 2]) {
    if (!this.image) return;
    const least = Math.min(this.overlay.width / this.image.width, this.overlay.height / this.image.height, 1) / 2;
    const scale = Math.min(Math.max(this.scale * factor, least), MOST_ZOOM * devicePixelRatio);
    const ratio = scale / this.scale;
    this.offset = [x - (x - this.offset[0]) * ratio, y - (y - this.offset[1]) * ratio];
    this.scale = scale;
    this.fitted = false;
    this.redraw();
  }

  pan(dx, dy) {
    this.offset = [this.offset[0] + dx, this.offset[1] + dy];
    this.fitted = false;
    this.redraw();
  }

  /** Overlay pixel of a pointer event. */
  place(event) {
    const { left, top } = this.overlay.getBoundingClientRect();
    return [(event.clientX - left) * devicePixelRatio, (event.clientY - top) * devicePixelRatio];
  }

  /** Image coordinates of an overlay pixel; (0.5, 0.5) is the centre of the first pixel. */
  toImage([x, y]) {
    return [(x - this.offset[0]) / this.scale, (y - this.offset[1]) / this.scale];
  }

  toScreen([x, y]) {
    return [x * this.scale + this.offset[0], y * this.scale + this.offset[1]];
  }

  redraw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.#draw();
    });
  }

  #resize() {
    const { clientWidth, clientHeight } = this.picture.parentElement;
    for (const canvas of [this.picture, this.overlay]) {
      canvas.width = Math.max(1, Math.round(clientWidth * devicePixelRatio));
      canvas.height = Math.max(1, Math.round(clientHeight * devicePixelRatio));
    }
    if (this.fitted) this.fit();
    else this.redraw();
  }

  #draw() {
    const { width, height } = this.overlay;
    const context = this.picture.getContext("2d");
    context.clearRect(0, 0, width, height);
    const above = this.overlay.getContext("2d");
    above.clearRect(0, 0, width, height);
    if (!this.image) return;
    context.imageSmoothingEnabled = this.scale < 4;
    context.imageSmoothingQuality = "high";
    const { width: columns, height: rows } = this.image;
    context.drawImage(this.source, ...this.offset, columns * this.scale, rows * this.scale);
    if (this.image.mask && this.opacity > 0) above.putImageData(this.#maskPixels(), 0, 0);
    this.decorate(above);
  }

  /** The mask as it is seen: classes tinted, and their borders as lines of constant width. */
  #maskPixels() {
    const { width, height } = this.overlay;
    const { mask, width: columns, height: rows } = this.image;
    const pixels = new ImageData(width, height);
    const out = new Uint32Array(pixels.data.buffer);
    const [tints, lines] = this.#colours();
    const column = new Int32Array(width + 1);
    for (let x = 0; x <= width; x++) column[x] = Math.floor((x + 0.5 - this.offset[0]) / this.scale);
    const line = Math.max(2, Math.round(1.5 * devicePixelRatio));
    let above = new Uint8Array(width);
    for (let y = 0; y < height; y++) {
      const row = Math.floor((y + 0.5 - this.offset[1]) / this.scale);
      const values = new Uint8Array(width);
      if (row >= 0 && row < rows) {
        const start = row * columns;
        for (let x = 0; x < width; x++) {
          const at = column[x];
          if (at >= 0 && at < columns) values[x] = mask[start + at];
        }
      }
      for (let x = 0; x < width; x++) {
        const value = values[x];
        const at = y * width + x;
        if (value && !out[at]) out[at] = tints[value];
        // A border is drawn inside a class; between two, in the lower or right one.
        const left = x ? values[x - 1] : value;
        const top = y ? above[x] : value;
        if (left !== value) border(out, at, value, left, 1, line, lines);
        if (top !== value) border(out, at, value, top, width, line, lines);
      }
      above = values;
    }
    return pixels;
  }

  /** Tints and lines of each value, as 32-bit pixels. */
  #colours() {
    const classes = valueColours(this.facts, (index) => (this.hidden.has(index) ? null : colourOf(index)));
    const pixel = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    const tints = new Uint32Array(256);
    const lines = new Uint32Array(256);
    classes.forEach((colour, value) => {
      if (!value || !colour) return;
      tints[value] = pixel(colour, Math.round(255 * this.opacity));
      lines[value] = pixel(colour, OUTLINE);
    });
    return [tints, lines];
  }
}

/** Mark `line` pixels at the border between pixel `at` and the one `step` before it. */
function border(out, at, value, before, step, line, lines) {
  for (let i = 0; i < line; i++) {
    const place = value ? at + i * step : at - (i + 1) * step;
    const colour = lines[value || before];
    if (colour && place >= 0 && place < out.length) out[place] = colour;
  }
}

/** Pixels as a canvas that can be drawn at any scale. */
function toCanvas({ width, height, channels, data }) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  const out = new Uint32Array(pixels.data.buffer);
  const [green, blue] = channels === 1 ? [0, 0] : [1, 2];
  for (let i = 0, at = 0; i < out.length; i++, at += channels) {
    out[i] = 0xff000000 | (data[at + blue] << 16) | (data[at + green] << 8) | data[at];
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}
