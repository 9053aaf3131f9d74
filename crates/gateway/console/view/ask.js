// A question to a model, as any client would send it.

import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { ms } from "../lib/format.js";
import { head, panel } from "../lib/part.js";

export const title = "Ask";

export function mount(main) {
  let asking = null;
  const question = el("textarea", { id: "question", rows: 3, maxlength: 4000, placeholder: "Ask the model a question", required: true });
  const model = el("select", { id: "model" });
  // Kept in this field only.
  const key = el("input", { id: "ask-key", type: "password", autocomplete: "off", spellcheck: "false" });
  const keyed = el("label", { class: "field", hidden: true }, el("span", {}, "Key to ask with"), key);
  const send = el("button", { type: "submit" }, "Ask");
  const stop = el("button", { type: "button", class: "plain", hidden: true, onclick: () => asking?.abort() }, "Stop");
  const answer = el("p", { id: "answer", "aria-live": "polite", hidden: true });
  const note = el("p", { class: "quiet", role: "status" });
  const form = el("form", {}, el("label", { class: "hidden", for: "question" }, "Question"), question,
    el("div", { class: "filters" }, el("label", { class: "field" }, el("span", {}, "Model"), model), keyed, send, stop));
  main.append(head("Ask"), panel("Question", form), panel("Answer", answer, note));
  note.textContent = "Nothing was asked yet.";

  async function ask(event) {
    event.preventDefault();
    if (asking || !question.value.trim()) return;
    asking = new AbortController();
    answer.textContent = "";
    answer.hidden = send.disabled = false;
    send.disabled = true;
    stop.hidden = false;
    put(note, "…");
    const began = performance.now();
    let id = null;
    try {
      const headers = { "content-type": "application/json" };
      if (key.value) headers.authorization = "Bearer " + key.value.trim();
      const reply = await fetch("/v1/chat/completions", {
        method: "POST", signal: asking.signal, headers,
        body: JSON.stringify({ model: model.value, stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: 256, messages: [{ role: "user", content: question.value }] }),
      });
      id = reply.headers.get("x-ashlar-response-id");
      if (!reply.ok) throw new Error((await reply.json()).error.message);
      const usage = await read(reply, answer);
      put(note, `${usage?.completion_tokens ?? "?"} tokens in ${ms(performance.now() - began)}. `,
        el("a", { href: "#/lineage/" + encodeURIComponent(id) }, "Where does it come from?"), " ", el("a", { href: "#/request/" + encodeURIComponent(id) }, "All about this request"));
    } catch (error) {
      put(note, error.name === "AbortError" ? "Stopped." : el("span", { class: "bad" }, String(error.message ?? error)));
    }
    asking = null;
    send.disabled = false;
    stop.hidden = true;
  }
  form.addEventListener("submit", ask);
  question.addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) ask(e);
  });

  async function refresh(signal) {
    const [{ current, models }, who] = await Promise.all([get("/ashlar/releases", {}, signal), get("/ashlar/session", {}, signal).catch(() => ({ required: false }))]);
    keyed.hidden = !who.required;
    const chosen = model.value || current?.serving;
    put(model, ...models.map((m) => el("option", { value: m.id }, m.id)));
    if (models.some((m) => m.id === chosen)) model.value = chosen;
  }
  return { refresh, every: 30000, leave: () => asking?.abort() };
}

/** Puts the text of a stream into `answer`; its usage. */
async function read(reply, answer) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let usage = null;
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return usage;
    const found = (rest + value).split("\n");
    rest = found.pop();
    for (const line of found) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      answer.append(chunk.choices?.[0]?.delta?.content ?? "");
    }
  }
}
