// Who looks at this, and signing in with a key.

import { get, post, remove } from "./api.js";
import { el, put } from "./dom.js";

/** `{required, signed_in, key, team}`; a server without sessions requires none. */
export async function session() {
  try {
    return await get("/ashlar/session");
  } catch (error) {
    if (error.status === 404) return { required: false, signed_in: false };
    throw error;
  }
}

/** The line in the side bar. */
export function showWho(box, who, changed, trouble) {
  if (!who.signed_in) return put(box);
  put(box, el("p", { class: "quiet" }, `Signed in as ${who.key ?? "a key"}${who.team ? ", " + who.team : ""}`),
    el("button", { type: "button", class: "link", "data-key": "out", onclick: () => remove("/ashlar/session").then(changed, trouble) }, "Sign out"));
}

/** The form that stands in place of a view. */
export function signIn(main, done) {
  const key = el("input", { type: "password", id: "key", name: "key", autocomplete: "off", required: true, spellcheck: "false" });
  const said = el("p", { class: "bad", role: "alert" });
  const button = el("button", { type: "submit" }, "Sign in");
  const form = el("form", { class: "panel sign-in" }, el("h1", {}, "Sign in"),
    el("p", { class: "quiet" }, "This server shows its requests to keys that may see the console: ", el("code", {}, "ashlar keys create NAME --console"), " makes one."),
    el("label", { for: "key" }, "Key"), key, said, el("div", { class: "row end" }, button));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    said.textContent = "";
    try {
      await post("/ashlar/session", { key: key.value.trim() });
      done();
    } catch (error) {
      said.textContent = error.message;
      button.disabled = false;
      key.select();
    }
  });
  main.replaceChildren(form);
  key.focus();
}
