// Values over time as lines, or as areas on top of each other.

import { shape } from "../lib/dom.js";
import { tick, when } from "../lib/format.js";
import { frame } from "./frame.js";
import { every, linear, ticks } from "./scale.js";

const [LEFT, RIGHT, TOP, FOOT] = [54, 10, 8, 22];
const some = (v) => v !== null && v !== undefined;

/** `{label, series: [{name, cls}], format, axis?, stacked?, height?}`; `update({at, step,
 * columns})` with times in ms and a column for each series, null where nothing was
 * measured. A line that is alone or drawn first may have `area: true`. With `by:
 * "step"`, numbers stand in place of times. */
export function lines({ label, series, format, axis = format, stacked = false, height, empty, by = "time" }) {
  let data = { at: [], step: 1000, columns: [] };
  const moment = (at) => (by === "step" ? "step " + at : when(at));
  const n = () => data.at.length;
  const place = (width) => linear(0, Math.max(1, n() - 1), LEFT, width - RIGHT);
  const top = () => (stacked
    ? Math.max(0, ...data.at.map((_, i) => data.columns.reduce((sum, c) => sum + (c[i] ?? 0), 0)))
    : Math.max(0, ...data.columns.flat().filter(some)));

  /** Runs of points that were measured. */
  function runs(column) {
    const list = [];
    let run = null;
    column.forEach((v, i) => {
      if (!some(v)) run = null;
      else if (run) run.push(i);
      else list.push((run = [i]));
    });
    return list;
  }

  function draw(svg, width, h, cursor) {
    const x = place(width);
    const marks = ticks(top(), h < 120 ? 2 : 4);
    const y = linear(0, marks.at(-1), h - FOOT, TOP);
    for (const m of marks) {
      svg.append(shape("line", { class: m ? "grid" : "axis", x1: LEFT, x2: width - RIGHT, y1: y(m), y2: y(m) }),
        shape("text", { x: LEFT - 8, y: y(m) + 4, "text-anchor": "end" }, axis(m)));
    }
    for (const i of every(n(), width - LEFT, data.step < 60000 ? 84 : 62)) {
      const near = x(i) > width - 30;
      svg.append(shape("text", { x: near ? width - RIGHT : x(i), y: h - 5, "text-anchor": near ? "end" : "middle" }, by === "step" ? String(data.at[i]) : tick(data.at[i], data.step)));
    }
    const base = data.at.map(() => 0);
    const path = (points) => points.map(([a, b], k) => (k ? "L" : "M") + a.toFixed(1) + "," + b.toFixed(1)).join("");
    series.forEach((s, k) => {
      const column = data.columns[k] ?? [];
      for (const run of runs(column)) {
        // A single point has an area, too.
        const around = (i, level) => (run.length > 1 ? [[x(i), level]] : [[x(i) - 3, level], [x(i) + 3, level]]);
        const upper = run.map((i) => [x(i), y(column[i])]);
        if (stacked || s.area) {
          const top = run.flatMap((i) => around(i, y((stacked ? base[i] : 0) + column[i])));
          const bottom = run.flatMap((i) => around(i, y(stacked ? base[i] : 0))).reverse();
          svg.append(shape("path", { class: `area ${s.cls}${stacked ? " solid" : ""}`, d: path([...top, ...bottom]) + "Z" }));
        }
        if (!stacked) {
          if (upper.length === 1) svg.append(shape("circle", { class: "dot " + s.cls, cx: upper[0][0], cy: upper[0][1], r: 2.5 }));
          else svg.append(shape("path", { class: "line " + s.cls, d: path(upper) }));
        }
      }
      if (stacked) column.forEach((v, i) => { base[i] += v ?? 0; });
    });
    if (cursor !== null) {
      svg.append(shape("line", { class: "cursor", x1: x(cursor), x2: x(cursor), y1: TOP, y2: h - FOOT }));
      if (!stacked) {
        series.forEach((s, k) => {
          const v = data.columns[k]?.[cursor];
          if (some(v)) svg.append(shape("circle", { class: "dot " + s.cls, cx: x(cursor), cy: y(v), r: 3.5 }));
        });
      }
    }
  }

  const chart = frame({
    label, height, draw, empty,
    legend: series,
    count: () => (data.columns.some((c) => c.some(some)) ? n() : 0),
    at: (px, width) => Math.round(linear(LEFT, width - RIGHT, 0, n() - 1)(px)),
    // The newest point at which anything was measured.
    rest: () => Math.max(0, data.at.findLastIndex((_, i) => data.columns.some((c) => some(c[i])))),
    read: (i) => ({ at: moment(data.at[i]), values: data.columns.map((c) => format(c[i])) }),
    summary: () => `${label}. Latest: ` + series.map((s, k) => `${s.name} ${format(data.columns[k]?.findLast(some))}`).join(", ") + ".",
    table: () => ({
      head: [by === "step" ? "Step" : "Time", ...series.map((s) => s.name)],
      rows: data.at.map((at, i) => [moment(at), ...data.columns.map((c) => format(c[i]))]).reverse(),
    }),
  });
  return { node: chart.node, update(fresh) { data = fresh; chart.draw(); } };
}
