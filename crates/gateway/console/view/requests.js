// All requests, a page at a time, newest first.

import { get, query } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, money, ms, when, whole } from "../lib/format.js";
import { col, empty, head, num, panel, table, tag, wide } from "../lib/part.js";

export const title = "Requests";

const ENDS = ["running", "stop", "length", "tool_calls", "content_filter", "cancelled", "error", "killed"];
const FIELDS = ["q", "model", "backend", "finish", "refusal"];

export function mount(main, { params, go }) {
  const set = Object.fromEntries(FIELDS.filter((f) => params[f]).map((f) => [f, params[f]]));
  const box = { rows: el("div"), pager: el("div", { class: "row pager" }) };
  const input = (name, label, props = {}) => el("label", { class: "field " + name }, el("span", {}, label), el("input", { name, value: set[name] ?? "", autocomplete: "off", spellcheck: "false", ...props }));
  const finish = el("select", { name: "finish" }, el("option", { value: "" }, "any"), ...ENDS.map((e) => el("option", { value: e, selected: e === set.finish }, e)));
  const form = el("form", { class: "filters", role: "search" }, input("q", "Id, answer or error", { type: "search", placeholder: "search" }), input("model", "Model"), input("backend", "Backend"),
    el("label", { class: "field" }, el("span", {}, "End"), finish),
    el("label", { class: "check" }, el("input", { type: "checkbox", name: "refusal", value: "1", checked: set.refusal === "1" }), "refusals only"),
    el("button", { type: "submit" }, "Search"), Object.keys(set).length ? el("a", { href: "#/requests" }, "Clear") : null);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(query("#/requests", Object.fromEntries([...new FormData(form)].map(([k, v]) => [k, v.trim()]))));
  });
  const slash = (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || /input|textarea|select/i.test(event.target.tagName)) return;
    event.preventDefault();
    form.q.focus();
  };
  document.addEventListener("keydown", slash);
  main.append(head("Requests", "Press / to search."), panel("Newest first", form, box.rows, box.pager));

  async function refresh(signal) {
    const data = await get("/ashlar/responses", { ...set, before: params.before, limit: 50 }, signal);
    put(box.rows, data.responses.length ? list(data.responses) : empty("No request is like that.", Object.keys(set).length || params.before ? "Search for less." : "Ask something under “Ask”, or send one to /v1/chat/completions."));
    put(box.pager, params.before && el("a", { class: "button", "data-key": "newest", href: query("#/requests", set) }, "Newest"),
      params.before && el("button", { type: "button", class: "plain", "data-key": "newer", onclick: () => history.back() }, "Back"),
      data.next && el("a", { class: "button", "data-key": "older", href: query("#/requests", { ...set, before: data.next }) }, "Older"));
  }
  // Only the newest page changes.
  return { refresh, every: params.before ? 60000 : 3000, leave: () => document.removeEventListener("keydown", slash) };
}

export function ends(settlement) {
  const bad = settlement && ["error", "killed", "content_filter"].includes(settlement.finish);
  return el("span", { class: "tags" }, tag(settlement?.finish ?? "running", bad ? "bad" : ""), settlement?.refusal && tag("refusal", "mark"));
}

function list(responses) {
  return table("Requests", [col("Time"), wide("Answer"), col("Model"), col("Backend"), num("Prompt"), num("Output"), num("First token"), num("In all"), num("Cost"), col("End")], responses.map((r) => {
    const s = r.settlement;
    return [when(r.at_ms), el("a", { class: "text", "data-key": r.id, title: r.id, href: "#/request/" + encodeURIComponent(r.id) }, (s?.answer ?? s?.error ?? (s ? "(no text)" : "(running)")).slice(0, 240)),
      clip(r.model, 28), clip(r.backend, 20), s ? whole(s.prompt_tokens) : "–", s ? whole(s.completion_tokens) : "–", s && s.ttft_ms > 0 ? ms(s.ttft_ms) : "–", s ? ms(s.total_ms) : "–", s ? money(s.cost) : "–", ends(s)];
  }));
}
