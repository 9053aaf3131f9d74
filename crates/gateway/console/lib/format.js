// Figures as text: units, few digits, exact money.

const NONE = "–";
const none = (v) => v === null || v === undefined || Number.isNaN(v);

/** Milliseconds with a unit that suits. */
export function ms(v) {
  if (none(v)) return NONE;
  if (v === 0) return "0 ms";
  if (v < 1) return v.toFixed(2) + " ms";
  if (v < 10) return v.toFixed(1) + " ms";
  if (v < 1000) return Math.round(v) + " ms";
  if (v < 60000) return (v / 1000).toFixed(v < 10000 ? 2 : 1) + " s";
  return Math.floor(v / 60000) + " min " + Math.round((v % 60000) / 1000) + " s";
}

export const seconds = (v) => (none(v) ? NONE : ms(v * 1000));

/** A whole number in groups of three. */
export const whole = (v) => (none(v) ? NONE : Math.round(v).toLocaleString("en-US"));

/** A number of three digits, thousands as k, millions as M. */
export function short(v) {
  if (none(v)) return NONE;
  for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (Math.abs(v) >= size * 0.9995) return +(v / size).toPrecision(3) + unit;
  }
  return String(Math.abs(v) >= 100 ? Math.round(v) : +v.toPrecision(3));
}

export const perSecond = (v) => (none(v) ? NONE : short(v) + "/s");

/** A share as per cent. */
export function percent(v) {
  if (none(v)) return NONE;
  const p = v * 100;
  return (Math.abs(p) >= 99.95 || Math.abs(p) < 0.0005 ? Math.round(p) : Math.abs(p) < 10 ? +p.toFixed(2) : +p.toFixed(1)) + " %";
}

const fraction = (text) => text.split(".")[1] ?? "";

/** Decimal places that hold all amounts exactly, two at least. */
export const places = (amounts) => Math.max(2, ...amounts.filter((a) => !none(a)).map((a) => fraction(String(a)).length));

/** An amount, which is decimal text: every digit of it, padded to `n` places. */
export function money(amount, currency, n = places([amount])) {
  if (none(amount)) return NONE;
  const [front, back = ""] = String(amount).split(".");
  const grouped = front.replace(/\B(?=(\d{3})+$)/g, ",");
  return `${grouped}.${back.padEnd(n, "0")}${currency ? " " + currency : ""}`;
}

/** Rounded for a glance, with three digits at least after leading zeros. */
export function roughly(amount, currency) {
  if (none(amount)) return NONE;
  const v = Number(amount);
  const digits = v === 0 || Math.abs(v) >= 100 ? 2 : Math.min(8, Math.max(2, 2 - Math.floor(Math.log10(Math.abs(v)))));
  return v.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: digits }) + (currency ? " " + currency : "");
}

/** The first digits of a digest. */
export const digest = (text) => String(text ?? "").replace(/^sha256:/, "").slice(0, 12);

/** An id that fits a table: its beginning and end. */
export const clip = (text, n = 22) => {
  const s = String(text ?? "");
  return s.length <= n ? s : s.slice(0, n - 7) + "…" + s.slice(-6);
};

const two = (n) => String(n).padStart(2, "0");
const clock = (d) => `${two(d.getHours())}:${two(d.getMinutes())}`;

/** The time, with the date unless it is today's. */
export function when(at) {
  const d = new Date(at);
  const time = `${clock(d)}:${two(d.getSeconds())}`;
  return d.toDateString() === new Date().toDateString() ? time : `${day(at)} ${time}`;
}

export const day = (at) => new Date(at).toLocaleDateString("en-GB", { day: "2-digit", month: "short" });

/** A day as the ledger counts them. */
const utcDay = (at) => new Date(at).toLocaleDateString("en-GB", { day: "2-digit", month: "short", timeZone: "UTC" });

/** A mark on a time axis. */
export const tick = (at, step) => (step >= 86400000 ? utcDay(at) : step < 60000 ? when(at).slice(-8) : clock(new Date(at)));

export const plural = (n, one, many = one + "s") => `${whole(n)} ${n === 1 ? one : many}`;
