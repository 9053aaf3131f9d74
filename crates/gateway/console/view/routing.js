// Who can be asked, how quick they were, and why a request went where it went.

import { get } from "../lib/api.js";
import { decision } from "../lib/decision.js";
import { el, put } from "../lib/dom.js";
import { clip, ms, short, when, whole } from "../lib/format.js";
import { col, empty, head, num, panel, quiet, state, table, tag, wide } from "../lib/part.js";

export const title = "Routing";

export function mount(main, { arg, go }) {
  const box = { file: el("div", { class: "span" }), backends: el("div"), targets: el("div"), why: el("div") };
  const recent = el("select", { id: "explain", onchange: () => go("#/routing/" + encodeURIComponent(recent.value)) });
  let explained = null;
  main.append(head("Routing"), el("div", { class: "grid" }, box.file,
    el("div", { class: "span" }, panel("Backends", box.backends)), el("div", { class: "span" }, panel("Targets", box.targets)),
    el("div", { class: "span" }, panel("Why a request went where it went", el("p", { class: "row" }, el("label", { for: "explain" }, "Request"), recent), box.why))));

  async function refresh(signal) {
    const [data, { responses }] = await Promise.all([get("/ashlar/backends", {}, signal), get("/ashlar/responses", { limit: 30 }, signal)]);
    put(box.file, ...(data.config.error ? [el("p", { class: "notice bad", role: "status" }, "The configuration file as it is now is refused, and the one before is in force: " + data.config.error)] : []));
    put(box.backends, ...backends(data.backends));
    put(box.targets, ...targets(data.targets));
    if (document.activeElement !== recent) {
      const ids = responses.map((r) => r.id);
      const options = responses.map((r) => el("option", { value: r.id }, `${when(r.at_ms)}  ${r.model} → ${r.backend}  ${clip(r.id)}`));
      if (arg && !ids.includes(arg)) options.unshift(el("option", { value: arg }, clip(arg)));
      put(recent, ...options);
      recent.value = arg || ids[0] || "";
    }
    recent.disabled = !recent.value;
    if (!recent.value) return put(box.why, empty("No request yet.", "Once one has come, its candidates, their scores and the reason stand here."));
    if (explained === recent.value) return;
    const id = recent.value;
    const { route } = await get("/ashlar/requests/" + encodeURIComponent(id), {}, signal);
    put(box.why, ...decision(route), el("p", {}, el("a", { href: "#/request/" + encodeURIComponent(id) }, "All about this request")));
    explained = id;
  }
  return { refresh, every: 3000 };
}

function backends(list) {
  if (!list.length) return [empty("No backend.", "Name servers in the configuration file.")];
  return [table("Backends", [col("Backend"), col("Kind"), col("Circuit"), wide("State"), num("Requests"), num("Failed"), num("Opened")],
    list.map((b) => [b.name, b.kind, state(b.circuit === "closed", b.circuit), stateOf(b), whole(b.requests), whole(b.errors), whole(b.opened)]))];
}

function stateOf(b) {
  if (b.why) return b.why;
  const error = b.last_error ?? b.probe_error;
  return error ? ["may be asked; the last error: ", el("span", { class: "quiet" }, error)] : "may be asked";
}

function targets(list) {
  if (!list.length) return [quiet("No model is routed by the configuration file: each backend serves its own.")];
  return [table("Targets", [col("Model"), col("Policy"), col("Backend"), col("Model there"), num("Weight"), num("In flight"), num("First token"), num("Between tokens"), num("Usual answer")],
    list.map((t) => [t.model, tag(t.policy), t.backend, clip(t.upstream_model, 30), short(t.weight), whole(t.in_flight), ms(t.ttft_ms), ms(t.itl_ms), t.usual_answer_tokens === null ? "–" : whole(t.usual_answer_tokens) + " tokens"])),
  quiet("Times are peak averages: a slow one counts at once and fades over some ten seconds.")];
}
