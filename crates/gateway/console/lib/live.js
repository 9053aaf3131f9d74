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
    const mine = aborter = new AbortController();
    let wrong = null;
    try {
      await work(mine.signal);
    } catch (error) {
      wrong = error;
    }
    // Another turn has begun, or none is wanted: what this one found is old.
    if (stopped || aborter !== mine) return;
    aborter = null;
    if (wrong?.name !== "AbortError") trouble(wrong);
    timer = setTimeout(turn, every);
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
