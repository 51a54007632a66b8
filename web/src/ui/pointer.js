/** Mouse, touch and pen on the image: one finger draws or drags, two fingers zoom and pan, the wheel sizes or zooms. */

const WHEEL = 0.0015; // of a zoom, per unit of the wheel

/**
 * @param {import("./view.js").View} view
 * @param {HTMLElement} stage
 * @param {object} tool what to do: `drags()` whether a drag pans, `sizes()` whether the wheel sizes a brush,
 *   `size(factor)`, `down(point)`, `move(point)`, `up()`, `cancel()`, `hover(place)`, `leave()`, `twice()`
 */
export function listen(view, stage, tool) {
  const fingers = new Map();
  let mode = null;
  let space = false;

  const middle = () => {
    const points = [...fingers.values()];
    const centre = [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
    const spread = points.length > 1 ? Math.hypot(points[0][0] - points[1][0], points[0][1] - points[1][1]) : 0;
    return { centre, spread };
  };

  stage.addEventListener("pointerdown", (event) => {
    if (!view.image || event.target.closest("label, button")) return;
    stage.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, view.place(event));
    if (fingers.size > 1) {
      if (mode === "draw") tool.cancel();
      mode = "pinch";
    } else if (tool.drags() || space || event.button === 1) {
      mode = "drag";
    } else if (event.button === 0) {
      mode = "draw";
      tool.down(view.toImage(view.place(event)));
    }
    event.preventDefault();
  });

  stage.addEventListener("pointermove", (event) => {
    const place = view.place(event);
    if (!fingers.has(event.pointerId)) return tool.hover(place);
    const before = middle();
    fingers.set(event.pointerId, place);
    const after = middle();
    if (mode === "drag" || mode === "pinch") {
      view.pan(after.centre[0] - before.centre[0], after.centre[1] - before.centre[1]);
      if (mode === "pinch" && before.spread) view.zoom(after.spread / before.spread, after.centre);
    } else if (mode === "draw") {
      for (const each of event.getCoalescedEvents?.() ?? []) tool.move(view.toImage(view.place(each)));
      tool.move(view.toImage(place));
    }
    tool.hover(place);
  });

  const end = (event) => {
    if (!fingers.delete(event.pointerId)) return;
    if (mode === "draw") (event.type === "pointercancel" ? tool.cancel : tool.up)();
    if (!fingers.size || mode === "draw") mode = null;
  };
  stage.addEventListener("pointerup", end);
  stage.addEventListener("pointercancel", end);
  stage.addEventListener("pointerleave", () => tool.leave());
  stage.addEventListener("dblclick", ({ target }) => target.closest("button") ?? tool.twice());

  stage.addEventListener(
    "wheel",
    (event) => {
      if (!view.image) return;
      event.preventDefault();
      const factor = Math.exp(-event.deltaY * WHEEL * (event.deltaMode ? 20 : 1));
      if (tool.sizes() && !event.ctrlKey && !event.metaKey) tool.size(factor);
      else view.zoom(event.ctrlKey && Math.abs(event.deltaY) < 50 ? factor ** 5 : factor, view.place(event));
    },
    { passive: false },
  );

  stage.addEventListener("keydown", (event) => {
    if (event.key !== " ") return;
    space = true;
    event.preventDefault();
  });
  addEventListener("keyup", (event) => {
    if (event.key === " ") space = false;
  });
}
