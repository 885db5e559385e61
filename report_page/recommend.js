"use strict";
// The rule of recommendation.py, and the non-dominated set. Pure functions: null stands for what was not measured.

const TOLERANCE = 1e-9;
const PREFERENCES = {
  // the value preferred -> [column, whether more is better]
  size: ["size_mb", false],
  latency: ["latency_ms_b1", false],
  worst_group: ["worst_group_accuracy", true],
  accuracy: ["accuracy", true],
  gap: ["accuracy_gap", false],
};
const BOUNDS = {
  // whether a candidate holds a bound, given the reference (or null)
  largest_loss: (row, bound, reference) => atMost(difference(reference, row, "accuracy"), bound),
  largest_worst_group_loss: (row, bound, reference) =>
    atMost(difference(reference, row, "worst_group_accuracy"), bound),
  smallest_accuracy: (row, bound) => row.accuracy !== null && row.accuracy >= bound - TOLERANCE,
  largest_gap: (row, bound) => atMost(row.accuracy_gap, bound),
  largest_size_mb: (row, bound) => atMost(row.size_mb, bound),
  largest_latency_ms: (row, bound) => atMost(row.latency_ms_b1, bound),
};

function atMost(value, bound) {
  return value !== null && value <= bound + TOLERANCE;
}

function difference(reference, row, column) {
  if (reference === null || reference[column] === null || row[column] === null) return null;
  return reference[column] - row[column];
}

// bounds: {largest_loss: 1, …, prefer: "size"}; a bound that is null or absent is none. Positions are those in
// `candidates`, the configurations of one data set.
function recommend(candidates, bounds) {
  let reference = null;
  candidates.forEach((row, position) => {
    if (!row.is_fp32 || row.accuracy === null) return;
    if (reference === null || row.accuracy > candidates[reference].accuracy) reference = position;
  });
  const referenceRow = reference === null ? null : candidates[reference];
  const set = Object.keys(BOUNDS).filter((name) => bounds[name] !== null && bounds[name] !== undefined);
  const held = Object.fromEntries(set.map((name) => [name, 0]));
  const [column, moreIsBetter] = PREFERENCES[bounds.prefer];
  const order = [];
  candidates.forEach((row, position) => {
    let all = true;
    for (const name of set) {
      if (BOUNDS[name](row, bounds[name], referenceRow)) held[name] += 1;
      else all = false;
    }
    if (all && row[column] !== null) order.push(position);
  });
  const falling = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : b - a);
  order.sort((i, j) => {
    const a = candidates[i];
    const b = candidates[j];
    return (
      (moreIsBetter ? b[column] - a[column] : a[column] - b[column]) ||
      falling(a.worst_group_accuracy, b.worst_group_accuracy) ||
      falling(a.accuracy, b.accuracy) ||
      i - j
    );
  });
  return { order, reference, candidates: candidates.length, held };
}

// Positions of the points [x, y] that no other one beats: none has a smaller or equal x and a better or equal y, one of
// the two being strictly so. Equal points are both in it. Ordered by x.
function paretoFront(points, moreIsBetter) {
  const better = (a, b) => (moreIsBetter ? a > b : a < b);
  const order = points.map((_, i) => i);
  order.sort((i, j) => points[i][0] - points[j][0] || (better(points[i][1], points[j][1]) ? -1 : better(points[j][1], points[i][1]) ? 1 : i - j));
  const front = [];
  let best = null; // the last point that entered the front
  for (const i of order) {
    const point = points[i];
    const same = best !== null && point[0] === best[0] && point[1] === best[1];
    if (best === null || same || better(point[1], best[1])) {
      front.push(i);
      best = point;
    }
  }
  return front;
}
