// Who asked for what was refused. People are known by a hash only.

import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, when, whole } from "../lib/format.js";
import { col, days, empty, figures, head, num, panel, share, table, tag } from "../lib/part.js";

export const title = "Abuse";

export function mount(main, { again }) {
  let period = 7;
  const pick = (d) => { period = d; again(); };
  const box = { figures: el("div"), users: el("div"), standings: el("div") };
  main.append(head("Abuse", "End users by what of theirs was filtered or refused. Their names never reach the ledger: it has hashes.", days(period, pick)), box.figures,
    panel("Top offenders", box.users), panel("Standing with the guard", box.standings));

  async function refresh(signal) {
    const data = await get("/ashlar/abuse", { days: period }, signal);
    put(box.figures, ...(data.source ? [figures([
      { name: "End users", value: whole(data.known), note: "with a request in this time" },
      { name: "With something refused", value: whole(data.users.length) + (data.users.length >= 100 ? " or more" : "") },
      { name: "Requests without one", value: whole(data.unnamed_requests), note: "send safety_identifier or user along" },
    ])] : []));
    put(box.users, users(data, period));
    put(box.standings, standings(data.standings));
  }
  return { refresh, every: 15000 };
}

function users({ users, source }, period) {
  if (!source) return empty("End users are not known: this server has no accounts.", "Give it some under [accounts] in the configuration file; clients then name their users with safety_identifier.");
  if (!users.length) return empty("Nobody had anything filtered or refused in this time.");
  return table("Top offenders", [col("End user"), num("Filtered"), num("Refused"), num("Failed"), num("Requests"), col("Refused or filtered")],
    users.map((u) => [el("a", { href: `#/cost?days=${period}&end_user=${encodeURIComponent(u.end_user)}&by=model`, class: "id", title: u.end_user }, clip(u.end_user, 26)),
      whole(u.filtered), whole(u.refusals), whole(u.errors), whole(u.requests), share(u.requests ? Math.min(1, (u.filtered + u.refusals) / u.requests) : 0)]));
}

function standings(all) {
  if (!all) return empty("Nobody is counted.", "[guard.abuse] in the configuration file sets from how many violations on an end user is slowed down, looked at and refused.");
  if (!all.length) return empty("Nobody violated a policy.");
  return table("Standing with the guard", [col("End user"), col("State"), num("Strikes"), num("Ever"), col("Since"), col("Note"), col("Appeal")],
    all.map((u) => [el("span", { class: "id", title: u.user }, clip(u.user, 26)), tag(u.state, u.state === "clear" ? "good" : "bad"),
      u.strikes.toFixed(1), whole(u.events), when(u.changed_ms), clip(u.note ?? "–", 60), clip(u.appeal ?? "–", 60)]));
}
