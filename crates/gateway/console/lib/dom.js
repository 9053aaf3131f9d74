// Elements. What comes from the server is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

/** An element with attributes and listeners (`onclick`); children are nodes or text. */
export const el = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);

/** The same of SVG. */
export const shape = (tag, props = {}, ...children) => fill(document.createElementNS(SVG, tag), props, children);

/** Puts children in place of those a node has, unless they say the same; focus and
 * sideways scrolling stay where they were. */
export function put(node, ...children) {
  const fresh = el("div", {}, ...children);
  const same = node.childNodes.length === fresh.childNodes.length
    && [...node.childNodes].every((c, i) => c.isEqualNode(fresh.childNodes[i]));
  // Listeners of equal nodes do the same: they were made by the same lines.
  if (same && node.childNodes.length) return;
  const name = (n) => n.dataset?.key ?? n.getAttribute?.("href") ?? n.getAttribute?.("aria-label");
  const held = node.contains(document.activeElement) ? name(document.activeElement) : null;
  const aside = [...node.querySelectorAll(".scroll")].map((s) => s.scrollLeft);
  node.replaceChildren(...fresh.childNodes);
  if (held) [...node.querySelectorAll("[data-key], a, [tabindex]")].find((n) => name(n) === held)?.focus({ preventScroll: true });
  node.querySelectorAll(".scroll").forEach((s, i) => { if (aside[i]) s.scrollLeft = aside[i]; });
}

let last = 0;
/** An id no other element has. */
export const newId = (word) => `${word}-${++last}`;
