/** Shapes that tools paint: a brush's stroke and a polygon, as runs of pixels. */

/**
 * Pixels whose centre is within `radius` of the line between two points.
 * @param {[number, number]} from x and y; (0.5, 0.5) is the centre of the first pixel
 * @param {[number, number]} to
 * @param {(y: number, first: number, end: number) => void} paint called with each row's run of pixels
 */
export function strokeRuns([x0, y0], [x1, y1], radius, { width, height }, paint) {
  const [dx, dy] = [x1 - x0, y1 - y0];
  const length = dx * dx + dy * dy;
  const near = (x, y) => {
    const share = length ? Math.min(Math.max(((x - x0) * dx + (y - y0) * dy) / length, 0), 1) : 0;
    return (x - x0 - share * dx) ** 2 + (y - y0 - share * dy) ** 2 <= radius * radius;
  };
  const [left, right] = bounds(x0, x1, radius, width);
  const [top, bottom] = bounds(y0, y1, radius, height);
  for (let y = top; y < bottom; y++) {
    let first = left;
    while (first < right && !near(first + 0.5, y + 0.5)) first++;
    let end = right;
    while (end > first && !near(end - 0.5, y + 0.5)) end--;
    if (end > first) paint(y, first, end);
  }
}

function bounds(a, b, radius, most) {
  return [Math.max(Math.floor(Math.min(a, b) - radius), 0), Math.min(Math.ceil(Math.max(a, b) + radius), most)];
}

/**
 * Pixels whose centre is inside a polygon, by the even-odd rule.
 * @param {[number, number][]} points
 * @param {(y: number, first: number, end: number) => void} paint
 */
export function polygonRuns(points, { width, height }, paint) {
  const ys = points.map(([, y]) => y);
  const top = Math.max(Math.floor(Math.min(...ys)), 0);
  const bottom = Math.min(Math.ceil(Math.max(...ys)), height);
  for (let row = top; row < bottom; row++) {
    const y = row + 0.5;
    const crossings = [];
    points.forEach(([x0, y0], i) => {
      const [x1, y1] = points[(i + 1) % points.length];
      if (y0 <= y !== y1 <= y) crossings.push(x0 + ((y - y0) / (y1 - y0)) * (x1 - x0));
    });
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const first = Math.max(Math.ceil(crossings[i] - 0.5), 0);
      const end = Math.min(Math.ceil(crossings[i + 1] - 0.5), width);
      if (end > first) paint(row, first, end);
    }
  }
}
