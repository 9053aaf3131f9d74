// One request: its way through time, what it used and cost, and why it went there.

import { parts } from "../chart/bars.js";
import { get } from "../lib/api.js";
import { decision } from "../lib/decision.js";
import { el, put } from "../lib/dom.js";
import { money, ms, places, short, when, whole } from "../lib/format.js";
import { col, empty, facts, figures, head, num, panel, quiet, table } from "../lib/part.js";
import { PHASES } from "./latency.js";
import { action } from "./safety.js";

export const title = "Request";

export function mount(main, { arg }) {
  const box = { top: el("div"), time: el("div"), tokens: el("div"), who: el("div"), why: el("div"), guard: el("div"), answer: el("div") };
  main.append(head("Request", arg), box.top, el("div", { class: "grid" }, el("div", { class: "span" }, panel("Timeline", box.time)), panel("Tokens and cost", box.tokens), panel("Facts", box.who),
    el("div", { class: "span" }, panel("Answer", box.answer)), el("div", { class: "span" }, panel("Decision", box.why)), el("div", { class: "span" }, panel("Guard", box.guard))));
  let over = false;

  async function refresh(signal) {
    // What is over does not change.
    if (over) return;
    const { response, route, usage } = await get("/ashlar/requests/" + encodeURIComponent(arg), {}, signal);
    const s = response?.settlement;
    put(box.top, figures([
      { name: "End", value: s?.finish ?? "running", note: s?.refusal ? "a refusal" : null },
      { name: "First token", value: s?.ttft_ms > 0 ? ms(s.ttft_ms) : "–" }, { name: "In all", value: s ? ms(s.total_ms) : "–" },
      { name: "Speed", value: s && s.completion_tokens > 1 && s.ttft_ms > 0 && s.total_ms > s.ttft_ms ? short(((s.completion_tokens - 1) / (s.total_ms - s.ttft_ms)) * 1000) : "–", note: "tokens a second" },
      { name: "Cost" + (usage?.currency ? ", " + usage.currency : ""), value: usage?.cost || s?.cost ? money(usage?.cost ?? s.cost) : "–", note: s && !(usage?.cost || s.cost) ? usage?.no_cost_reason ?? "not known" : null },
    ]));
    put(box.time, ...timeline(s, route));
    put(box.tokens, ...tokens(s, route, usage));
    put(box.who, facts([["Time", response && when(response.at_ms)], ["Endpoint", response?.endpoint, true], ["Streamed", response ? (response.stream ? "yes" : "no") : null], ["Model", response?.model], ["Backend", response?.backend],
      ["Release", response?.release, true], ["Seed", response?.seed === null ? null : String(response?.seed), true], ["Key", usage?.api_key_name ?? usage?.api_key], ["Team", usage?.team_name ?? usage?.team],
      ["End user", usage?.end_user, true], ["Adapter", usage?.adapter], ["Prices", usage?.price_version], ["Error", s?.error]]),
    response && el("p", {}, el("a", { href: "#/lineage/" + encodeURIComponent(response.id) }, "Where the answer comes from")));
    put(box.answer, s?.answer ? el("blockquote", { tabindex: "0" }, s.answer) : quiet(s ? "Its text was not kept, or there was none." : "It is still running."));
    put(box.why, ...decision(route));
    put(box.guard, ...guard(response));
    over = Boolean(s);
  }
  return { refresh, every: 2000 };
}

function timeline(s, route) {
  if (!s) return [quiet("It has not ended.")];
  if (!(s.ttft_ms > 0)) return [parts("Time", [{ name: "without a token", cls: "s2", value: s.total_ms, text: ms(s.total_ms) }])];
  // Rows of before, and of processes that died, have no phases.
  if (!route?.phases) return [parts("Time", [{ name: "to the first token", cls: "s1", value: s.ttft_ms, text: ms(s.ttft_ms) }, { name: "after it", cls: "s3", value: s.total_ms - s.ttft_ms, text: ms(s.total_ms - s.ttft_ms) }])];
  const value = (p) => route.phases[p.key] * 1000;
  return [parts("Time by phase", PHASES.map((p) => ({ name: p.name, cls: p.cls, value: value(p), text: ms(value(p)) })))];
}

function tokens(s, route, usage) {
  if (!s) return [quiet("Counted when it ends.")];
  const t = usage ?? route?.tokens ?? { input: s.prompt_tokens - s.cached_tokens, cache_read: s.cached_tokens, cache_write: 0, output: s.completion_tokens, reasoning: 0 };
  const costs = ["input", "cache_read", "cache_write", "output", "reasoning"].map((c) => usage?.["cost_" + c]);
  const n = places([...costs, usage?.cost ?? s.cost]);
  const names = ["Input, computed", "Input, from cache", "Input, written to cache", "Output", "Reasoning"];
  const rows = ["input", "cache_read", "cache_write", "output", "reasoning"].map((c, i) => [names[i], whole(t[c]), money(costs[i], "", n)]);
  if (usage?.cost_machine) rows.push(["Machine's time", ms(usage.machine_us / 1000), money(usage.cost_machine, "", n)]);
  rows.push([el("b", {}, "All"), whole(s.prompt_tokens + s.completion_tokens), el("b", {}, money(usage?.cost ?? s.cost, usage?.currency, n))]);
  const guessed = usage?.counts === "estimated" || route?.tokens?.estimated;
  return [table("Tokens and cost", [col("Class"), num("Tokens"), num("Cost")], rows), guessed && quiet("No one counted: the tokens are estimated.")].filter(Boolean);
}

function guard(response) {
  const list = response?.settlement?.guard;
  if (!list?.length) return [empty("No verdict.", "Policies that act on this request's route and key leave theirs here.")];
  return [table("Guard", [col("Policy"), col("Stage"), col("Action"), col("Kind"), num("Score"), num("Released characters")],
    list.map((g) => [g.policy, g.stage, action(g.action), g.kind ?? "–", g.score === null || g.score === undefined ? "–" : short(g.score), g.released_chars === null || g.released_chars === undefined ? "–" : whole(g.released_chars)]))];
}
