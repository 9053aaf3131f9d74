// The console's beginning: which view is shown, and the life it has.
//
// A view is a module with `title` and `mount(main, {arg, params, trouble, go, again})`,
// which builds it and returns `{refresh(signal), every}`. It is refreshed while it
// is shown and the page is seen, at once when it asks for it by `again()`, and left
// with everything it holds.

import { el, put } from "./lib/dom.js";
import { live } from "./lib/live.js";
import { session, showWho, signIn } from "./lib/session.js";
import * as abuse from "./view/abuse.js";
import * as ask from "./view/ask.js";
import * as cache from "./view/cache.js";
import * as cost from "./view/cost.js";
import * as latency from "./view/latency.js";
import * as lineage from "./view/lineage.js";
import * as overview from "./view/overview.js";
import * as releases from "./view/releases.js";
import * as request from "./view/request.js";
import * as requests from "./view/requests.js";
import * as routing from "./view/routing.js";
import * as safety from "./view/safety.js";

const GROUPS = [
  ["Live", { overview, latency, routing }],
  ["Use", { cost, cache, requests }],
  ["Guard", { safety, abuse }],
  ["Model", { releases, lineage, ask }],
];
const VIEWS = Object.assign({ request }, ...GROUPS.map(([, views]) => views));
/** The entry of the side bar that a view without one stands under. */
const UNDER = { request: "requests" };

const $ = (id) => document.getElementById(id);
let shown = null;
let generation = 0;
let required = false;

/** `#/view/arg?params`. */
function place() {
  // Links of earlier versions, and of other programs, name a response.
  const linked = new URLSearchParams(location.search).get("response");
  if (linked && !location.hash) history.replaceState(null, "", "/#/lineage/" + encodeURIComponent(linked));
  const [path, search] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  let arg = rest.join("/");
  try {
    arg = decodeURIComponent(arg);
  } catch {
    // Not encoded: taken as it is.
  }
  return { name: Object.hasOwn(VIEWS, name) ? name : "overview", arg, params: Object.fromEntries(new URLSearchParams(search)) };
}

function trouble(error) {
  // The session has ended.
  if (error?.status === 401 && required) return start();
  const text = error ? String(error.message ?? error) : "";
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
  $("trouble").hidden = !error;
}

function showNav(name) {
  const current = UNDER[name] ?? name;
  put($("nav"), ...GROUPS.map(([group, views]) => el("div", { class: "group" }, el("p", { "aria-hidden": "true" }, group),
    el("ul", { "aria-label": group }, ...Object.entries(views).map(([key, view]) =>
      el("li", {}, el("a", { href: "#/" + key, "data-key": key, "aria-current": key === current ? "page" : null }, view.title)))))));
  $("nav").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
}

async function show(event) {
  const mine = ++generation;
  const { name, arg, params } = place();
  shown?.stop();
  shown?.leave?.();
  trouble(null);
  showNav(name);
  const view = VIEWS[name];
  document.title = view.title + " – Ashlar";
  const main = el("div", { class: "view", id: "view-" + name });
  const go = (hash) => { if (location.hash === hash) show(); else location.hash = hash; };
  const { refresh, every, leave } = view.mount(main, { arg, params, trouble, go, again: () => shown?.now?.() });
  $("main").replaceChildren(main);
  if (event) {
    scrollTo(0, 0);
    main.querySelector("h1")?.focus({ preventScroll: true });
  }
  shown = { stop() {}, leave };
  if (!refresh) return;
  shown = { ...live(refresh, every ?? 5000, trouble), leave };
  await shown.first;
  if (mine === generation) main.dataset.ready = "1";
}

let starting = false;
async function start() {
  if (starting) return;
  starting = true;
  shown?.stop();
  try {
    const who = await session();
    showWho($("who"), who, start, trouble);
    starting = false;
    required = who.required;
    if (who.required && !who.signed_in) {
      showNav(place().name);
      trouble(null);
      return signIn($("main"), start);
    }
    await show();
  } catch (error) {
    starting = false;
    $("trouble").textContent = String(error.message ?? error);
    $("trouble").hidden = false;
    setTimeout(start, 5000);
  }
}

addEventListener("hashchange", show);
$("skip").addEventListener("click", () => $("main").focus());
start();
