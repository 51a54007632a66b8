/** Polygons around the regions of a mask, as `pdrunet_jax/data/labelme/contours.py` draws them. */
import { labelParts } from "../mask/regions.js";

const VERTEX = 0.5; // cost of a vertex, in squared tolerances
const LONGEST = 1024; // outline pixels that one edge may replace
const STEPS = [[0, 1], [1, 0], [0, -1], [-1, 0]]; // row and column: east, south, west, north

/**
 * One polygon for each 8-connected part, at most `tolerance` pixels from its outline; holes are cut into it.
 * @param {Uint8Array} inside rows of 0 and 1
 * @returns {[number, number][][]} columns and rows of pixels
 */
export function outlines(inside, { width, height }, tolerance) {
  const { labels } = labelParts(inside, width, height);
  const outer = new Map();
  const holes = new Map();
  for (const { ring, hole } of rings(inside, width, height)) {
    const part = labels[ring[0][1] * width + ring[0][0]];
    const simple = simplify(ring, tolerance);
    if (!hole) outer.set(part, simple.length > 2 ? simple : ring);
    else if (simple.length > 2) holes.set(part, [...(holes.get(part) ?? []), simple]);
  }
  return [...outer].sort(([a], [b]) => a - b).map(([part, ring]) => withCuts(ring, holes.get(part) ?? []));
}

/** Trace every border along the cracks between pixels, with the region on the right: its pixels, and whether it is a hole. */
function rings(inside, width, height) {
  const at = (row, column) => row >= 0 && column >= 0 && row < height && column < width && inside[row * width + column];
  // A crack is the corner that it starts at and a direction.
  const key = (row, column, direction) => (row * (width + 1) + column) * 4 + direction;
  const pixels = new Map();
  const sides = [[0, -1, 0, 0, 0], [1, 0, 1, 0, 1], [2, 1, 0, 1, 1], [3, 0, -1, 1, 0]];
  for (const [direction, up, aside, down, right] of sides) {
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        if (!inside[row * width + column] || at(row + up, column + aside)) continue;
        pixels.set(key(row + down, column + right, direction), [column, row]);
      }
    }
  }
  const found = [];
  for (const start of pixels.keys()) {
    const ring = [];
    let area = 0;
    let crack = start;
    do {
      const pixel = pixels.get(crack);
      pixels.delete(crack);
      const last = ring.at(-1);
      if (!last || last[0] !== pixel[0] || last[1] !== pixel[1]) ring.push(pixel);
      const direction = crack % 4;
      let column = ((crack - direction) / 4) % (width + 1);
      let row = ((crack - direction) / 4 - column) / (width + 1);
      area += [0, column, 0, -column][direction];
      row += STEPS[direction][0];
      column += STEPS[direction][1];
      // Left turn first: pixels that touch at a corner stay connected.
      crack = [3, 0, 1]
        .map((turn) => key(row, column, (direction + turn) % 4))
        .find((way) => pixels.has(way) || way === start);
    } while (crack !== start);
    const [first, last] = [ring[0], ring.at(-1)];
    if (ring.length > 1 && first[0] === last[0] && first[1] === last[1]) ring.pop();
    found.push({ ring, hole: area < 0 });
  }
  return found;
}

/** The cheapest polygon within `tolerance` of `ring`, by dynamic programming: vertices cost, and squared distances. */
function simplify(ring, tolerance) {
  const count = ring.length;
  if (count < 4) return ring;
  const path = fromCorner(ring);
  const closed = [...path, path[0]];
  const cost = new Float64Array(count + 1).fill(Infinity);
  const previous = new Int32Array(count + 1);
  cost[0] = 0;
  for (let at = 0; at < count; at++) {
    const base = cost[at] + VERTEX * tolerance ** 2;
    edgeCosts(closed, at, tolerance, (to, squares) => {
      if (base + squares < cost[to]) {
        cost[to] = base + squares;
        previous[to] = at;
      }
    });
  }
  const vertices = [];
  for (let at = previous[count]; at; at = previous[at]) vertices.push(path[at]);
  return [path[0], ...vertices.reverse()];
}

/** The ring from the point farthest from its centre on: a corner, which stays a vertex. */
function fromCorner(ring) {
  const centre = [0, 1].map((axis) => ring.reduce((sum, point) => sum + point[axis], 0) / ring.length);
  const far = ring.map(([x, y]) => (x - centre[0]) ** 2 + (y - centre[1]) ** 2);
  const start = far.indexOf(far.reduce((a, b) => Math.max(a, b)));
  return [...ring.slice(start), ...ring.slice(0, start)];
}

/** Call `use` with each next point that an edge from point `start` may reach, and the edge's squared errors. */
function edgeCosts(path, start, tolerance, use) {
  let [angle, lowest, highest, farthest] = [0, -Infinity, Infinity, 0];
  let [sumX, sumY, sumXX, sumXY, sumYY] = [0, 0, 0, 0, 0];
  const end = Math.min(start + LONGEST, path.length - 1);
  for (let to = start + 1; to <= end; to++) {
    const [x, y] = [path[to][0] - path[start][0], path[to][1] - path[start][1]];
    const distance = Math.max(Math.sqrt(x * x + y * y), 1e-9);
    const turn = Math.atan2(y, x);
    angle = to === start + 1 ? turn : turn + 2 * Math.PI * Math.round((angle - turn) / (2 * Math.PI));
    sumX += x;
    sumY += y;
    sumXX += x * x;
    sumXY += x * y;
    sumYY += y * y;
    const first = to === start + 1;
    const straight = angle >= lowest - 1e-9 && angle <= highest + 1e-9; // within the wedge of the points so far
    if (distance > 0.5 && (first || (straight && farthest <= distance + tolerance))) {
      const [dx, dy] = [x / distance, y / distance];
      // On average, the outermost pixels that Pillow fills are this far inside the line.
      const inset = 0.5 * (Math.max(Math.abs(dx), Math.abs(dy)) - Math.abs(dy));
      const outward = sumX * dy - sumY * dx;
      const squares = sumXX * dy ** 2 - 2 * sumXY * dx * dy + sumYY * dx ** 2;
      use(to, squares + 2 * inset * outward + inset ** 2 * (to - start));
    }
    const half = distance > tolerance ? Math.asin(Math.min(1, tolerance / distance)) : Infinity;
    lowest = Math.max(lowest, angle - half);
    highest = Math.min(highest, angle + half);
    farthest = Math.max(farthest, distance);
    if (highest < lowest) return;
  }
}

/** Join holes to a ring in one path, each at the shortest distance from the path so far. */
function withCuts(ring, holes) {
  const nearest = (hole, path) => {
    let best = [Infinity, 0, null];
    hole.forEach(([x, y], vertex) => {
      for (const point of path) {
        const distance = (point[0] - x) ** 2 + (point[1] - y) ** 2;
        if (distance < best[0]) best = [distance, vertex, point];
      }
    });
    return best;
  };
  const cuts = new Map(holes.map((hole) => [hole, nearest(hole, ring)]));
  let joined = ring;
  while (cuts.size) {
    const [hole, [, vertex, point]] = [...cuts].reduce((best, cut) => (cut[1][0] < best[1][0] ? cut : best));
    cuts.delete(hole);
    const turned = [...hole.slice(vertex), ...hole.slice(0, vertex)];
    const at = joined.findIndex(([x, y]) => x === point[0] && y === point[1]);
    joined = [...joined.slice(0, at + 1), ...turned, turned[0], ...joined.slice(at)];
    for (const [other, cut] of cuts) {
      const near = nearest(other, turned);
      if (near[0] < cut[0]) cuts.set(other, near);
    }
  }
  return joined;
}
