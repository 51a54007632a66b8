/** Undo and redo of changes to a mask. Only the changed rectangle is kept, and old steps go when they take too much. */

const MOST_BYTES = 256 << 20;

export class History {
  /** @param {{width: number, height: number}} size */
  constructor(size, most = MOST_BYTES) {
    this.size = size;
    this.most = most;
    this.done = [];
    this.undone = [];
  }

  get canUndo() {
    return this.done.length > 0;
  }

  get canRedo() {
    return this.undone.length > 0;
  }

  /** Record a change that was made; returns whether anything differs. */
  record(before, after, label) {
    const box = changedBox(before, after, this.size);
    if (!box) return false;
    this.done.push({ label, box, before: cutOut(before, box, this.size), after: cutOut(after, box, this.size) });
    this.undone = [];
    const bytes = (step) => 2 * step.before.length;
    for (let total = this.done.reduce((sum, step) => sum + bytes(step), 0); total > this.most && this.done.length > 1; ) {
      total -= bytes(this.done.shift());
    }
    return true;
  }

  /** Take back the last change of `mask`, in place; returns its label, or null if there is none. */
  undo(mask) {
    return this.#move(this.done, this.undone, mask, "before");
  }

  redo(mask) {
    return this.#move(this.undone, this.done, mask, "after");
  }

  #move(from, to, mask, state) {
    const step = from.pop();
    if (!step) return null;
    to.push(step);
    const { left, top, width } = step.box;
    for (let y = 0; y * width < step[state].length; y++) {
      mask.set(step[state].subarray(y * width, (y + 1) * width), (top + y) * this.size.width + left);
    }
    return step.label;
  }
}

function changedBox(before, after, { width, height }) {
  let [left, right, top, bottom] = [width, -1, height, -1];
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (before[at] === after[at]) continue;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      bottom = y;
    }
  }
  return bottom < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

function cutOut(mask, { left, top, width, height }, size) {
  const part = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const from = (top + y) * size.width + left;
    part.set(mask.subarray(from, from + width), y * width);
  }
  return part;
}
