// Counts as bars: a histogram, or amounts by day.

import { el, shape } from "../lib/dom.js";
import { percent, plural, tick, whole } from "../lib/format.js";
import { frame } from "./frame.js";
import { every, linear, ticks } from "./scale.js";

const [LEFT, RIGHT, TOP, FOOT] = [44, 6, 12, 22];

/** A histogram: `update({bounds, counts, sum})`, bounds being the upper ones;
 * `marks`: quantiles to draw, as `[name, q]`. `noun` is what is counted. */
export function histogram({ label, noun, nouns, format, height = 170, empty }) {
  let data = { bounds: [], counts: [], sum: 0 };
  const total = () => data.counts.reduce((a, b) => a + b, 0);
  const step = (width) => (width - LEFT - RIGHT) / Math.max(1, data.counts.length);
  const range = (i) => (i ? `${format(data.bounds[i - 1])} to ${format(data.bounds[i])}` : `up to ${format(data.bounds[i])}`);

  /** The bucket of a quantile. */
  function bucket(q) {
    let below = 0;
    return data.counts.findIndex((c) => (below += c) >= q * total());
  }

  function draw(svg, width, h, cursor) {
    const wide = step(width);
    const marks = ticks(Math.max(...data.counts), 3).filter(Number.isInteger);
    const y = linear(0, marks.at(-1), h - FOOT, TOP);
    for (const m of marks) {
      svg.append(shape("line", { class: m ? "grid" : "axis", x1: LEFT, x2: width - RIGHT, y1: y(m), y2: y(m) }),
        shape("text", { x: LEFT - 8, y: y(m) + 4, "text-anchor": "end" }, whole(m)));
    }
    const gap = wide > 8 ? 2 : wide > 4 ? 1 : 0;
    data.counts.forEach((c, i) => {
      if (!c) return;
      const up = Math.max(1.5, h - FOOT - y(c));
      svg.append(shape("rect", { class: "bar s1" + (i === cursor ? " lit" : ""), x: LEFT + i * wide + gap / 2, y: h - FOOT - up, width: Math.max(1, wide - gap), height: up }));
    });
    for (const [name, q] of [["p50", 0.5], ["p95", 0.95]]) {
      const i = bucket(q);
      if (data.counts.length < 4 || i < 0) continue;
      const at = LEFT + (i + 0.5) * wide;
      const end = at > width - 34;
      svg.append(shape("line", { class: "mark", x1: at, x2: at, y1: TOP, y2: h - FOOT }),
        shape("text", { class: "marked", x: at + (end ? -4 : 4), y: name === "p50" ? TOP + 2 : TOP + 14, "text-anchor": end ? "end" : "start" }, name));
    }
    for (const i of every(data.counts.length, width - LEFT, 58)) {
      const at = LEFT + (i + 0.5) * wide;
      const near = at > width - 26;
      svg.append(shape("text", { x: near ? width - RIGHT : at, y: h - 5, "text-anchor": near ? "end" : "middle" }, format(data.bounds[i])));
    }
  }

  const chart = frame({
    label, height, draw, empty,
    legend: [{ name: nouns ?? noun + "s", cls: "s1" }],
    count: () => (total() ? data.counts.length : 0),
    at: (px, width) => Math.floor((px - LEFT) / step(width)),
    rest: () => data.counts.length - 1,
    restLabel: () => `${plural(total(), noun, nouns)}, mean ${format(data.sum / total())}`,
    read: (i) => ({ at: range(i), values: [`${whole(data.counts[i])} (${percent(data.counts[i] / total())})`] }),
    summary: () => `${label}: ${plural(total(), noun, nouns)}, mean ${format(data.sum / total())}.`,
    table: () => ({
      head: ["Range", "Count", "Share", "Up to here"],
      rows: data.counts.map((c, i) => [range(i), whole(c), percent(c / total()), percent(data.counts.slice(0, i + 1).reduce((a, b) => a + b, 0) / total())]),
    }),
  });
  chart.node.classList.add("histogram");
  return { node: chart.node, update(fresh) { data = fresh; chart.draw(); } };
}

/** Amounts by time: `update({at, step, values, texts})`; texts are what is read. */
export function columns({ label, name, axis, height = 170, empty }) {
  let data = { at: [], step: 1, values: [], texts: [] };
  const wide = (width) => (width - LEFT - 12 - RIGHT) / Math.max(1, data.at.length);
  const left = LEFT + 12;

  function draw(svg, width, h, cursor) {
    const marks = ticks(Math.max(...data.values), 3);
    const y = linear(0, marks.at(-1), h - FOOT, TOP);
    for (const m of marks) {
      svg.append(shape("line", { class: m ? "grid" : "axis", x1: left, x2: width - RIGHT, y1: y(m), y2: y(m) }),
        shape("text", { x: left - 8, y: y(m) + 4, "text-anchor": "end" }, axis(m)));
    }
    const w = wide(width);
    data.values.forEach((v, i) => {
      if (!v) return;
      const up = Math.max(1.5, h - FOOT - y(v));
      svg.append(shape("rect", { class: "bar s1" + (i === cursor ? " lit" : ""), x: left + i * w + w * 0.1, y: h - FOOT - up, width: Math.max(1, w * 0.8), height: up }));
    });
    for (const i of every(data.at.length, width - left, 60)) {
      svg.append(shape("text", { x: left + (i + 0.5) * w, y: h - 5, "text-anchor": "middle" }, tick(data.at[i], data.step)));
    }
  }

  const chart = frame({
    label, height, draw, empty,
    legend: [{ name, cls: "s1" }],
    count: () => (data.values.some((v) => v > 0) ? data.at.length : 0),
    at: (px, width) => Math.floor((px - left) / wide(width)),
    read: (i) => ({ at: tick(data.at[i], data.step), values: [data.texts[i]] }),
    summary: () => `${label}: ${data.at.length} bars, the last ${data.texts.at(-1)}.`,
    table: () => ({ head: ["Time", name], rows: data.at.map((at, i) => [tick(at, data.step), data.texts[i]]).reverse() }),
  });
  return { node: chart.node, update(fresh) { data = fresh; chart.draw(); } };
}

/** Parts of a whole as one bar with its legend: `[{name, cls, value, text}]`. */
export function parts(label, list) {
  const total = list.reduce((sum, p) => sum + (p.value ?? 0), 0);
  const svg = shape("svg", { class: "parts", viewBox: "0 0 1000 14", preserveAspectRatio: "none", role: "img",
    "aria-label": label + ": " + list.map((p) => `${p.name} ${p.text}`).join(", ") });
  let x = 0;
  for (const p of list) {
    const w = total ? ((p.value ?? 0) / total) * 1000 : 0;
    if (w > 0) svg.append(shape("rect", { class: "part " + p.cls, x, y: 0, width: Math.max(w, 1.5), height: 14 }));
    x += w;
  }
  return el("div", { class: "parts-box" }, svg, el("ul", { class: "parts-key" }, ...list.map((p) => el("li", {},
    el("i", { class: "swatch " + p.cls, "aria-hidden": "true" }), el("span", {}, p.name), el("b", {}, p.text),
    el("span", { class: "quiet" }, total && p.value !== null ? percent(p.value / total) : "")))));
}
