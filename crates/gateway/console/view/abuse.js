// Who asked for what was refused. People are known by a hash only.

import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, whole } from "../lib/format.js";
import { col, days, empty, figures, head, num, panel, share, table, tag } from "../lib/part.js";

export const title = "Abuse";

export function mount(main, { trouble }) {
  let period = 7;
  const pick = (d) => { period = d; refresh().catch(trouble); };
  const box = { figures: el("div"), users: el("div") };
  main.append(head("Abuse", "End users by what of theirs was filtered or refused. Their names never reach the ledger: it has hashes.", days(period, pick)), box.figures,
    panel("Top offenders", box.users));

  async function refresh(signal) {
    const data = await get("/ashlar/abuse", { days: period }, signal);
    put(box.figures, ...(data.source ? [figures([
      { name: "End users", value: whole(data.known), note: "with a request in this time" },
      { name: "With something refused", value: whole(data.users.length) + (data.users.length >= 100 ? " or more" : "") },
      { name: "Requests without one", value: whole(data.unnamed_requests), note: "send safety_identifier or user along" },
    ])] : []));
    put(box.users, users(data, period));
  }
  return { refresh, every: 15000 };
}

function users({ users, source }, period) {
  if (!source) return empty("End users are not known: this server has no accounts.", "Give it some under [accounts] in the configuration file; clients then name their users with safety_identifier.");
  if (!users.length) return empty("Nobody had anything filtered or refused in this time.");
  const standing = users.some((u) => u.standing);
  return table("Top offenders", [col("End user"), ...(standing ? [col("Standing")] : []), num("Filtered"), num("Refused"), num("Failed"), num("Requests"), col("Refused or filtered")],
    users.map((u) => [el("a", { href: `#/cost?days=${period}&end_user=${encodeURIComponent(u.end_user)}&by=model`, class: "id", title: u.end_user }, clip(u.end_user, 26)),
      ...(standing ? [u.standing ? tag(u.standing, u.standing === "good" ? "good" : "bad") : "–"] : []),
      whole(u.filtered), whole(u.refusals), whole(u.errors), whole(u.requests), share(u.requests ? Math.min(1, (u.filtered + u.refusals) / u.requests) : 0)]));
}
