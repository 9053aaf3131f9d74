// What all charts share: a drawing as wide as its place, a legend that reads the
// values under pointer or arrow keys, and the same figures as a table.
//
// The legend is the readout, so that nothing floats over the drawing and nothing
// moves when values change.

import { el, newId, put, shape } from "../lib/dom.js";

/** `kind`: `{label, height, legend: [{name, cls}], draw(svg, width, height, cursor),
 * count(), at(x, width), read(i) -> {at, values}, summary(), table() -> {head, rows}}`. */
export function frame(kind) {
  const height = kind.height ?? 190;
  const values = kind.legend.map(() => el("span", { class: "v" }));
  const at = el("span", { class: "at" });
  const legend = el("div", { class: "legend", "aria-hidden": "true" },
    ...kind.legend.map((s, i) => el("span", { class: "key" }, el("i", { class: "swatch " + s.cls }), s.name, values[i])), at);
  const said = el("p", { class: "hidden", "aria-live": "polite" });
  const hint = newId("hint");
  const plot = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": kind.label, "aria-describedby": hint });
  plot.style.setProperty("height", height + "px");
  const about = el("p", { class: "hidden", id: hint });
  const data = el("div", { class: "scroll" });
  const details = el("details", { class: "data" }, el("summary", {}, "Table"), data);
  const node = el("figure", { class: "chart" }, legend, plot, about, said, details);

  let cursor = null;
  let width = 0;
  let known = false;

  function read(speak) {
    const n = kind.count();
    const now = n ? kind.read(cursor ?? kind.rest?.() ?? n - 1) : null;
    const resting = cursor === null && kind.restLabel;
    values.forEach((v, i) => { v.textContent = (!resting && now?.values[i]) || ""; });
    at.textContent = now ? (resting ? kind.restLabel() : now.at) : "";
    if (speak && now) said.textContent = now.at + ": " + kind.legend.map((s, i) => s.name + " " + (now.values[i] || "none")).join(", ");
  }

  function draw() {
    if (!known || width < 40) return;
    if (cursor !== null && cursor >= kind.count()) cursor = null;
    if (!kind.count()) {
      plot.replaceChildren(el("p", { class: "none" }, kind.empty ?? "Nothing measured in this time."));
      about.textContent = "Nothing measured.";
      return read();
    }
    const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    kind.draw(svg, width, height, cursor);
    plot.replaceChildren(svg);
    about.textContent = kind.summary() + " Left and right arrow keys read the values.";
    read();
    if (details.open) table();
  }

  function table() {
    const { head, rows } = kind.table();
    put(data, el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h, i) => el("th", { scope: "col", class: i ? "n" : null }, h)))),
      el("tbody", {}, ...rows.map((r) => el("tr", {}, ...r.map((c, i) => el("td", { class: i ? "n" : null }, c)))))));
  }

  function move(to, speak) {
    const n = kind.count();
    if (!n) return;
    cursor = to === null ? null : Math.max(0, Math.min(n - 1, to));
    draw();
    read(speak);
  }

  plot.addEventListener("pointermove", (e) => move(kind.at(e.clientX - plot.getBoundingClientRect().left, width)));
  plot.addEventListener("pointerleave", () => move(null));
  plot.addEventListener("blur", () => move(null));
  plot.addEventListener("keydown", (e) => {
    const n = kind.count();
    const from = cursor ?? n;
    const to = { ArrowLeft: from - 1, ArrowRight: cursor === null ? n - 1 : from + 1, Home: 0, End: n - 1 }[e.key];
    if (e.key === "Escape") move(null);
    if (to === undefined) return;
    e.preventDefault();
    move(to, true);
  });
  details.addEventListener("toggle", () => { if (details.open && kind.count()) table(); });
  new ResizeObserver(([entry]) => {
    const wide = Math.floor(entry.contentRect.width);
    if (wide !== width) {
      width = wide;
      draw();
    }
  }).observe(plot);

  return { node, draw() { known = true; draw(); } };
}
