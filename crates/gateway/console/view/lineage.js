// Where an answer comes from: the graph and the documents at its end.

import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, plural, when } from "../lib/format.js";
import { empty, head, panel, quiet } from "../lib/part.js";

export const title = "Lineage";

const LISTED = 40;

export function mount(main, { arg, go }) {
  const id = el("input", { name: "id", id: "lineage-id", value: arg, autocomplete: "off", spellcheck: "false", placeholder: "a response, release, model or document" });
  const form = el("form", { class: "filters" }, el("label", { class: "field q" }, el("span", {}, "Id"), id), el("button", { type: "submit" }, "Show"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go("#/lineage/" + encodeURIComponent(id.value.trim()));
  });
  const box = { graph: el("div", { class: "scroll", id: "graph", tabindex: "0", role: "region", "aria-label": "Lineage graph" }), documents: el("div"), answer: el("div") };
  main.append(head("Lineage", "From an answer back to the documents it stands on, and the other way."), el("section", { class: "panel" }, form, box.answer),
    el("div", { class: "beside" }, panel("Graph", box.graph), panel("Documents", box.documents)));
  let done = false;

  async function refresh(signal) {
    // Lineage does not change.
    if (done) return;
    if (!arg) {
      const { responses } = await get("/ashlar/responses", { limit: 1 }, signal);
      const newest = responses[0];
      put(box.answer, newest ? el("p", {}, "Nothing is chosen. ", el("a", { href: "#/lineage/" + encodeURIComponent(newest.id) }, `The newest answer, ${clip(newest.id)} at ${when(newest.at_ms)}`)) : quiet("No answer yet: ask something under “Ask”."));
      put(box.graph, empty("No graph.", "Enter an id above, or come here from a request."));
      return put(box.documents, empty("No documents."));
    }
    const path = encodeURIComponent(arg);
    const [{ trace, response }, picture] = await Promise.all([get("/ashlar/trace/" + path, {}, signal), draw(path, signal)]);
    put(box.answer, ...(response?.settlement?.answer ? [el("blockquote", { tabindex: "0" }, response.settlement.answer)] : []),
      response && el("p", {}, el("a", { href: "#/request/" + encodeURIComponent(response.id) }, "All about this request")));
    box.graph.replaceChildren(picture);
    put(box.documents, ...documents(trace, arg));
    done = true;
  }
  return { refresh, every: 60000 };
}

/** The picture, parsed as XML; the page's own styles apply, its policy would refuse
 * those it brings. */
async function draw(path, signal) {
  const reply = await fetch(`/ashlar/graph/${path}.svg?layout=tall`, { signal });
  if (!reply.ok) throw new Error("no picture: status " + reply.status);
  // Taken out before it is parsed: even a parser that shows nothing tells of a style
  // that the policy refuses.
  const text = (await reply.text()).replace(/<style>[^<]*<\/style>/, "");
  const svg = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  return document.importNode(svg, true);
}

function documents(trace, arg) {
  const list = trace.nodes.filter((n) => n.kind === "document");
  const sharing = list.filter((n) => n.detail?.span).length;
  if (!list.length) return [empty("No documents stand behind this.", "A model served without a release has no known ones.")];
  return [el("p", { class: "name" }, `Exposed to ${plural(list.length, "document")}` + (sharing ? `, ${sharing} shar${sharing > 1 ? "e" : "es"} text with the answer` : "")),
    quiet("These were among what the model was made from. That does not say that they caused the answer."),
    el("ol", { id: "documents" }, ...list.slice(0, LISTED).map((n) => el("li", {}, n.label, n.detail?.span && el("span", { class: "shares" }, "shares “" + n.detail.span + "”")))),
    list.length > LISTED && quiet(`${list.length - LISTED} more: see /ashlar/trace/${arg}`)].filter(Boolean);
}
