// Parts of views: panels, figures, tables, choices.

import { el, newId, put } from "./dom.js";
import { percent } from "./format.js";

/** A section with a heading. */
export function panel(title, ...children) {
  // Named by itself, without an id, so that one built anew is equal to the one there.
  return el("section", { class: "panel", "aria-label": title }, el("h2", {}, title), ...children);
}

/** The head of a view: its name, a line on it, controls at the right. */
export function head(title, note, ...controls) {
  return el("div", { class: "head" }, el("div", {}, el("h1", { tabindex: "-1" }, title), note && el("p", { class: "quiet" }, note)),
    controls.length ? el("div", { class: "controls" }, ...controls) : null);
}

export const quiet = (...text) => el("p", { class: "quiet" }, ...text);

/** What stands where nothing is: what would be here, and how it comes. */
export const empty = (what, how) => el("div", { class: "empty" }, el("p", {}, what), how && el("p", { class: "quiet" }, how));

export const tag = (text, kind = "") => el("span", { class: "tag " + kind }, text);

/** A state by sign and word, so that colour alone says nothing. */
export const state = (good, word) => el("span", { class: good ? "state good" : "state bad" }, el("span", { "aria-hidden": "true" }, good ? "●" : "▲"), word);

/** Figures in a row: `[{name, value, note, extra}]`. */
export function figures(list) {
  return el("dl", { class: "figures" }, ...list.filter(Boolean).map((f) => el("div", { class: "figure" },
    el("dt", {}, f.name), el("dd", {}, el("span", { class: "value" }, f.value), f.note && el("span", { class: "note" }, f.note)), f.extra)));
}

/** Names and values; empty ones are left out. */
export function facts(pairs) {
  const list = el("dl", { class: "facts" });
  for (const [name, value, code] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    list.append(el("dt", {}, name), el("dd", {}, code ? el("code", {}, value) : value));
  }
  return list;
}

/** One of several, as buttons: `[[value, name]]`. */
export function choice(label, options, chosen, pick) {
  const group = el("div", { class: "choice", role: "group", "aria-label": label });
  const draw = (value) => put(group, ...options.map(([v, name]) => el("button", {
    type: "button", "data-key": String(v), "aria-pressed": String(v === value),
    onclick: () => { if (v !== value) { draw(v); pick(v); } },
  }, name)));
  draw(chosen);
  return group;
}

/** A bar of a share, 0 to 1, beside its per cent. */
export function share(v) {
  const bar = el("meter", { min: 0, max: 1, value: Math.min(1, Math.max(0, v ?? 0)), "aria-hidden": "true" });
  return el("span", { class: "share" }, bar, el("span", {}, percent(v)));
}

/** A table that scrolls sideways by itself. `columns`: `[{name, number, wide}]`;
 * rows are arrays of cells. On narrow screens each cell says its column. */
export function table(label, columns, rows) {
  const cell = (c, i) => el("td", { class: columns[i].number ? "n" : columns[i].wide ? "wide" : null, "data-name": columns[i].name }, c);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, el("table", {},
    el("thead", {}, el("tr", {}, ...columns.map((c) => el("th", { scope: "col", class: c.number ? "n" : null }, c.name)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map(cell))))));
}

export const col = (name) => ({ name });
export const num = (name) => ({ name, number: true });
export const wide = (name) => ({ name, wide: true });

/** Days back, as many views have it. */
export const days = (chosen, pick) => choice("Period", [[1, "1 day"], [7, "7 days"], [30, "30 days"], [90, "90 days"]], chosen, pick);

/** Minutes back, as the server keeps them. */
export const minutes = (chosen, pick) => choice("Period", [[5, "5 min"], [15, "15 min"], [60, "1 h"], [360, "6 h"], [1440, "24 h"]], chosen, pick);

/** Asks before something is done; resolves to whether it is to be. */
export function confirm(title, text, verb) {
  const id = newId("d");
  const dialog = el("dialog", { "aria-labelledby": id }, el("form", { method: "dialog" }, el("h2", { id }, title), el("p", {}, text),
    el("div", { class: "row end" }, el("button", { class: "plain", value: "no", autofocus: true }, "Cancel"), el("button", { class: "danger", value: "yes" }, verb))));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    dialog.remove();
    resolve(dialog.returnValue === "yes");
  }, { once: true }));
}
