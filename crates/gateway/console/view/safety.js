// What was refused, found and changed.

import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, plural, when, whole } from "../lib/format.js";
import { col, days, empty, figures, head, num, panel, quiet, share, table, tag, wide } from "../lib/part.js";

export const title = "Safety";

/** Answers listed for review. */
const SHOWN = 25;

export function mount(main, { again }) {
  let period = 7;
  const pick = (d) => { period = d; again(); };
  const box = { figures: el("div"), verdicts: el("div"), models: el("div"), review: el("div") };
  main.append(head("Safety", null, days(period, pick)), box.figures, el("div", { class: "grid" },
    el("div", { class: "span" }, panel("Verdicts of the guard", box.verdicts)), el("div", { class: "span" }, panel("Refusals by model", box.models)),
    el("div", { class: "span" }, panel("For review", box.review))));

  async function refresh(signal) {
    const data = await get("/ashlar/safety", { days: period }, signal);
    const sum = (name) => data.models.reduce((n, m) => n + m[name], 0);
    put(box.figures, figures([
      { name: "Requests", value: whole(sum("requests")) },
      { name: "Refusals", value: whole(sum("refusals")), note: "by the model or the guard" },
      { name: "Filtered", value: whole(sum("filtered")), note: "ended by the guard or an upstream's filter" },
      { name: "Verdicts", value: whole(data.verdicts.reduce((n, v) => n + v.count, 0)), note: `among the newest ${whole(data.looked_at)}` },
    ]));
    put(box.verdicts, data.verdicts.length
      ? table("Verdicts", [col("Policy"), col("Stage"), col("Action"), col("Model"), num("Count")], data.verdicts.map((v) => [v.policy, v.stage, action(v.action), clip(v.model, 30), whole(v.count)]))
      : empty("No verdict.", "Policies are named in the configuration file under [guard]; each of their findings is counted here."));
    put(box.models, data.models.length
      ? table("Refusals by model", [col("Model"), num("Requests"), num("Refusals"), num("Filtered"), col("Refused")], data.models.map((m) => [clip(m.model, 40), whole(m.requests), whole(m.refusals), whole(m.filtered), share(m.requests ? m.refusals / m.requests : 0)]))
      : empty("No settled request in this time.", "Choose a longer period."));
    put(box.review, ...review(data));
  }
  return { refresh, every: 10000 };
}

export const action = (name) => tag(name, ["block", "redact"].includes(name) ? "bad" : name === "flag" ? "mark" : "");

function review({ review, looked_at }) {
  if (!review.length) return [empty("Nothing to look at.", "Answers that were refused, filtered, blocked, changed or flagged come here.")];
  return [table("For review", [col("Time"), wide("Answer"), col("Model"), col("Why")], review.slice(0, SHOWN).map((r) => {
    const s = r.settlement ?? {};
    const guard = s.guard ?? [];
    return [when(r.at_ms), el("a", { class: "text", href: "#/request/" + encodeURIComponent(r.id) }, (s.answer ?? s.error ?? "(no text)").slice(0, 240)), clip(r.model, 30),
      el("span", { class: "tags" }, s.refusal && tag("refusal", "mark"), s.finish === "content_filter" && tag("filtered", "bad"), ...guard.slice(0, 4).map((g) => tag(`${g.policy}: ${g.action}`, "mark")))];
  })), quiet(`${review.length > SHOWN ? `The newest ${SHOWN} of ${review.length} or more` : plural(review.length, "answer")}, out of the last ${plural(looked_at, "request")}. `, el("a", { href: "#/requests?refusal=1" }, "All refusals"), ", ", el("a", { href: "#/requests?finish=content_filter" }, "all filtered ones"))];
}
