// A line small enough to stand beside a figure; the figure says what it means.

import { shape } from "../lib/dom.js";
import { linear } from "./scale.js";

export function spark(values, cls = "s1") {
  const [w, h] = [120, 28];
  const svg = shape("svg", { class: "spark", viewBox: `0 0 ${w} ${h}`, width: w, height: h, preserveAspectRatio: "none", "aria-hidden": "true" });
  const known = values.map((v, i) => [i, v]).filter(([, v]) => v !== null && v !== undefined);
  if (known.length < 2) return svg;
  const x = linear(0, values.length - 1, 1, w - 1);
  const y = linear(0, Math.max(...known.map(([, v]) => v)) || 1, h - 2, 3);
  const line = known.map(([i, v], k) => (k ? "L" : "M") + x(i).toFixed(1) + "," + y(v).toFixed(1)).join("");
  svg.append(shape("path", { class: "area " + cls, d: `${line}L${x(known.at(-1)[0]).toFixed(1)},${h}L${x(known[0][0]).toFixed(1)},${h}Z` }),
    shape("path", { class: "line " + cls, d: line }));
  return svg;
}
