/** Drawing tools: brush, eraser, polygons that add or cut. One stroke or polygon is one step of undo. */
import { polygonRuns, strokeRuns } from "../mask/draw.js";
import { layerOf } from "../mask/regions.js";
import { colourOf } from "../save/files.js";

const SIZES = [1, 400]; // pixels of the image

export class Tools {
  /**
   * @param {import("./view.js").View} view
   * @param {object} facts
   * @param {(before: Uint8Array, label: string) => void} changed called after a change of the mask
   */
  constructor(view, facts, changed) {
    this.view = view;
    this.facts = facts;
    this.changed = changed;
    this.name = "move";
    this.size = 24;
    this.index = 1;
    this.corners = [];
    this.before = null;
    this.last = null;
    this.cursor = null;
    this.onSize = () => {};
    view.decorate = (context) => this.#decorate(context);
  }

  drags = () => this.name === "move";
  sizes = () => this.name === "brush" || this.name === "eraser";

  choose(name) {
    this.drop();
    this.name = name;
    this.view.redraw();
  }

  setSize(size) {
    this.size = Math.min(Math.max(Math.round(size), SIZES[0]), SIZES[1]);
    this.onSize(this.size);
    this.view.redraw();
  }

  /** Larger or smaller by a factor, but at least by one pixel. */
  resize(factor) {
    const wanted = this.size * factor;
    this.setSize(factor > 1 ? Math.max(wanted, this.size + 1) : Math.min(wanted, this.size - 1));
  }

  down(point) {
    const { mask } = this.view.image;
    if (!mask) return;
    if (this.sizes()) {
      this.before = mask.slice();
      this.last = point;
      this.#stroke(point);
    } else {
      this.corners.push(point);
      this.view.redraw();
    }
  }

  move(point) {
    if (this.before) this.#stroke(point);
  }

  up() {
    if (!this.before) return;
    const { before, name } = this;
    this.before = null;
    this.changed(before, name === "brush" ? "Brush" : "Eraser");
  }

  /** Take back a stroke that is being drawn. */
  cancel() {
    if (!this.before) {
      this.corners.pop(); // the first of two fingers has set it
    } else {
      this.view.image.mask.set(this.before);
      this.before = null;
    }
    this.view.redraw();
  }

  /** End the polygon. */
  close() {
    const corners = this.corners.filter((point, i, all) => !i || Math.hypot(point[0] - all[i - 1][0], point[1] - all[i - 1][1]) > 0);
    const { image } = this.view;
    this.drop();
    if (corners.length < 3 || !image?.mask) return;
    const before = image.mask.slice();
    polygonRuns(corners, image, this.#painter(image.mask, this.name === "add"));
    this.changed(before, this.name === "add" ? "Area added" : "Area cut");
  }

  /** Drop the polygon that is being drawn. */
  drop() {
    this.corners = [];
    this.view.redraw();
  }

  removeCorner() {
    this.corners.pop();
    this.view.redraw();
  }

  hover(place) {
    this.cursor = place;
    if (this.sizes() || this.corners.length) this.view.redraw();
  }

  leave() {
    this.cursor = null;
    this.view.redraw();
  }

  #painter(mask, adds) {
    const layer = layerOf(this.index, this.facts.multilabel);
    const change = adds ? layer.add : layer.remove;
    const { width } = this.view.image;
    return (y, first, end) => {
      for (let at = y * width + first; at < y * width + end; at++) mask[at] = change(mask[at]);
    };
  }

  #stroke(point) {
    const { image } = this.view;
    strokeRuns(this.last, point, this.size / 2, image, this.#painter(image.mask, this.name === "brush"));
    this.last = point;
    this.view.redraw();
  }

  /** The brush's outline, or the polygon so far. */
  #decorate(context) {
    const { view, cursor } = this;
    const colour = this.name === "cut" || this.name === "eraser" ? "255, 255, 255" : colourOf(this.index).join(", ");
    const draw = (path) => {
      for (const [width, style] of [[3.5, "rgb(0 0 0 / 70%)"], [1.5, `rgb(${colour})`]]) {
        context.lineWidth = width * devicePixelRatio;
        context.strokeStyle = style;
        context.beginPath();
        path();
        context.stroke();
      }
    };
    if (this.sizes() && cursor) draw(() => context.arc(...cursor, (this.size / 2) * view.scale, 0, 2 * Math.PI));
    if (!this.corners.length) return;
    const points = this.corners.map((point) => view.toScreen(point));
    const ends = cursor ? [...points, cursor] : points;
    draw(() => ends.forEach((point, i) => (i ? context.lineTo(...point) : context.moveTo(...point))));
    draw(() => {
      for (const [x, y] of points) context.rect(x - 2 * devicePixelRatio, y - 2 * devicePixelRatio, 4 * devicePixelRatio, 4 * devicePixelRatio);
    });
  }
}
