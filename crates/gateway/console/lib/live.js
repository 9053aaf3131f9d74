// Something done again and again while the page is seen.

/** Calls `work(signal)` every `every` ms after it ended, not while the page is
 * hidden, until `stop()`. Errors go to `trouble`, and null once all is well. */
export function live(work, every, trouble) {
  let timer = 0;
  let stopped = false;
  let aborter = null;

  async function turn() {
    clearTimeout(timer);
    if (stopped || aborter) return;
    if (document.hidden) return;
    aborter = new AbortController();
    try {
      await work(aborter.signal);
      if (!stopped) trouble(null);
    } catch (error) {
      if (error.name !== "AbortError" && !stopped) trouble(error);
    }
    aborter = null;
    if (!stopped) timer = setTimeout(turn, every);
  }

  document.addEventListener("visibilitychange", turn);
  const first = turn();
  return {
    first,
    /** Does it now. */
    now() {
      aborter?.abort();
      aborter = null;
      return turn();
    },
    stop() {
      stopped = true;
      clearTimeout(timer);
      aborter?.abort();
      document.removeEventListener("visibilitychange", turn);
    },
  };
}
