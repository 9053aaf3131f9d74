// Where values are drawn, and which of them get a mark.

/** About `n` round values from 0 to at least `most`. */
export function ticks(most, n = 4) {
  if (!(most > 0)) return [0, 1];
  const rough = most / n;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((s) => s >= rough * 0.999) ?? size * 10;
  const list = [];
  for (let i = 0; i * step < most * 1.0001 || list.length < 2; i++) list.push(+(i * step).toPrecision(6));
  if (list.at(-1) < most) list.push(+(list.length * step).toPrecision(6));
  return list;
}

/** From `[a, b]` to `[c, d]`. */
export const linear = (a, b, c, d) => (v) => c + ((v - a) / (b - a || 1)) * (d - c);

/** Indices of points to mark on an axis `width` wide, each mark `room` wide. */
export function every(n, width, room) {
  const step = Math.max(1, Math.ceil((n * room) / Math.max(width, 1)));
  const list = [];
  for (let i = Math.floor(((n - 1) % step) / 2); i < n; i += step) list.push(i);
  return list;
}
