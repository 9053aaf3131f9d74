// The server's JSON.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function send(path, options) {
  let reply;
  try {
    reply = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. What is shown may be old.", 0);
  }
  if (reply.status === 204) return null;
  const body = await reply.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    if (reply.ok) throw new ApiError(`The answer of ${path.split("?")[0]} broke off.`, reply.status);
    return null;
  });
  if (!reply.ok) throw new ApiError(body?.error?.message ?? `${path.split("?")[0]} answered with status ${reply.status}.`, reply.status);
  return body;
}

/** `path` with those of `params` that are set. */
export function query(path, params) {
  const set = Object.entries(params).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return set.length ? path + "?" + new URLSearchParams(set) : path;
}

export const get = (path, params = {}, signal) => send(query(path, params), { signal, headers: { accept: "application/json" } });

export const post = (path, body) =>
  send(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

export const remove = (path) => send(path, { method: "DELETE" });
