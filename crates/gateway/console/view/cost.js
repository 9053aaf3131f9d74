// What it cost and whom: from keys down to token classes.

import { columns } from "../chart/bars.js";
import { get, query } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, money, places, plural, roughly, short, whole } from "../lib/format.js";
import { choice, col, days, empty, figures, head, num, panel, quiet, share, table } from "../lib/part.js";

export const title = "Cost";

/** The way down; each step's filter is named as its dimension. */
const BY = [["api_key", "Key"], ["team", "Team"], ["end_user", "End user"], ["model", "Model"], ["backend", "Backend"], ["endpoint", "Endpoint"], ["adapter", "Adapter"]];
const DOWN = ["api_key", "team", "end_user", "model"];
const FILTERS = ["api_key", "team", "end_user", "model", "backend"];
const CLASSES = [["input", "Input, computed"], ["cache_read", "Input, from cache"], ["cache_write", "Input, written to cache"], ["output", "Output"], ["reasoning", "Reasoning"]];

export function mount(main, { params, go, again }) {
  const set = Object.fromEntries(FILTERS.filter((f) => params[f] !== undefined).map((f) => [f, params[f]]));
  const by = params.by ?? DOWN.find((d) => !(d in set)) ?? "model";
  let period = Number(params.days) || 7;
  const link = (more) => query("#/cost", { days: period, ...set, ...more });
  const pick = (d) => { period = d; history.replaceState(null, "", link({ by })); again(); };
  const box = { trail: el("nav", { class: "trail", "aria-label": "Filters" }), figures: el("div"), rows: el("div"), classes: el("div") };
  const bars = columns({ label: "Cost by time", name: "cost", axis: (v) => roughly(v), empty: "No known cost in this time." });
  main.append(head("Cost", null, days(period, pick)), box.trail, box.figures, el("div", { class: "grid" },
    el("div", { class: "span" }, panel("Over time", bars.node)),
    el("div", { class: "span" }, panel("Who and what", choice("Add up by", BY.filter(([d]) => !(d in set)), by, (d) => go(link({ by: d }))), box.rows)),
    el("div", { class: "span" }, panel("Token classes", box.classes))));

  async function refresh(signal) {
    const data = await get("/ashlar/cost", { days: period, by, ...set }, signal);
    const name = (id) => data.names[id] ?? id;
    put(box.trail, ...trail(set, name, period));
    put(box.figures, figures(totals(data)));
    over(data);
    put(box.rows, ...rows(data, name));
    put(box.classes, ...classes(data));
  }

  function over(data) {
    // Bars of two currencies would not add up: the first is drawn.
    const currency = data.total[0]?.currency ?? null;
    const steps = data.steps.filter((s) => s.currency === currency);
    const at = [];
    for (let t = Math.floor(data.from_ms / (data.step_ms || 1)) * data.step_ms; data.step_ms && t <= Date.now(); t += data.step_ms) at.push(t);
    const found = new Map(steps.map((s) => [Number(s.of[0]), s]));
    bars.update({ at, step: data.step_ms, values: at.map((t) => Number(found.get(t)?.cost ?? 0)), texts: at.map((t) => money(found.get(t)?.cost ?? "0", currency)) });
  }

  function rows(data, name) {
    if (!data.rows.length) return [empty("No settled request in this time.", "Choose a longer period.")];
    const knows = data.source === "accounts" || by === "model" || by === "backend";
    const n = places(data.rows.map((r) => r.cost));
    const total = new Map(data.total.map((t) => [t.currency, Number(t.cost)]));
    const filterable = FILTERS.includes(by);
    const list = table("Cost by " + by, [col(BY.find(([d]) => d === by)[1]), num("Cost"), col("Share"), num("Requests"), num("Input"), num("From cache"), num("Output"), num("Unknown cost")],
      data.rows.map((r) => {
        const id = r.of[0];
        const label = id === "" ? (knows ? "(none)" : "(all)") : clip(name(id), 40);
        const next = DOWN.find((d) => d !== by && !(d in set)) ?? "backend";
        return [filterable && id !== "" ? el("a", { href: link({ [by]: id, by: next }), title: id }, label) : label, money(r.cost, r.currency, n), share(total.get(r.currency) ? Number(r.cost) / total.get(r.currency) : 0), whole(r.requests), short(r.tokens.input),
          short(r.tokens.cache_read), short(r.tokens.output + r.tokens.reasoning), r.unpriced ? el("span", { class: "bad" }, whole(r.unpriced)) : "0"];
      }));
    return [list, data.left_off > 0 && quiet(`${plural(data.left_off, "cheaper one")} not listed: filter, or export the ledger.`),
      data.source !== "accounts" && quiet("This server has no accounts: keys, teams and end users are not known, and costs come from the responses themselves.")].filter(Boolean);
  }
  return { refresh, every: 15000 };
}

function trail(set, name, period) {
  const names = Object.keys(set);
  if (!names.length) return [el("span", { class: "quiet" }, "Everyone and everything")];
  const without = (f) => query("#/cost", { days: period, ...Object.fromEntries(Object.entries(set).filter(([k]) => k !== f)), by: f });
  return [el("a", { href: query("#/cost", { days: period }) }, "All"), ...names.map((f) => el("span", { class: "chip" }, el("span", { class: "quiet" }, BY.find(([d]) => d === f)[1] + " "),
    clip(name(set[f]), 40), el("a", { href: without(f), "aria-label": "Without this filter", class: "x" }, "×")))];
}

function totals({ total }) {
  const sum = (f) => total.reduce((n, t) => n + f(t), 0);
  const unknown = sum((t) => t.unpriced);
  return [
    ...(total.length ? total.filter((t) => t.currency || total.length === 1) : [null]).map((t) => ({ name: "Cost" + (t?.currency ? ", " + t.currency : ""), value: roughly(t?.cost ?? "0"), note: t ? "exactly " + money(t.cost) : "nothing settled" })),
    { name: "Requests", value: whole(sum((t) => t.requests)), note: `${whole(sum((t) => t.estimated))} with estimated tokens` },
    { name: "Unknown cost", value: whole(unknown), note: unknown ? "no rate for what they used: not in the sums" : "every request has a price" },
  ];
}

function classes({ total }) {
  if (!total.length) return [quiet("Nothing settled.")];
  return total.map((t) => {
    const n = places(t.parts ?? []);
    const list = CLASSES.map(([key, name], i) => [name, whole(t.tokens[key]), t.parts ? money(t.parts[i], t.currency, n) : "–", t.parts && Number(t.cost) ? share(Number(t.parts[i]) / Number(t.cost)) : "–"]);
    if (t.machine_us) list.push(["Machine's time", (t.machine_us / 1e6).toFixed(2) + " s", money(t.parts[5], t.currency, n), share(Number(t.parts[5]) / Number(t.cost || 1))]);
    return table("Token classes", [col("Class"), num("Tokens"), num("Cost"), col("Share")], list);
  });
}
