// From counters to what happens per second.

const WINDOW = 5; // Reports come about once a second, at times of their own: a window evens them out.

/** Remembers the counters of each replica, and tells how they grew lately. */
export class Rates {
  #history = new Map();

  /** The change of a replica's counters and the seconds that it took, null while there is only one report of it. */
  grown(name, at, stats) {
    const history = this.#history.get(name) ?? [];
    this.#history.set(name, history);
    // If a counter fell, it is that of another engine.
    if (history.length && history.at(-1).stats.passes > stats.passes) history.length = 0;
    history.push({ at, stats });
    if (history.length > WINDOW + 1) history.shift();
    if (history.length < 2) return null;
    const [first, last] = [history[0], history.at(-1)];
    const change = Object.fromEntries(Object.keys(stats).map((field) => [field, last.stats[field] - first.stats[field]]));
    return { seconds: last.at - first.at, change };
  }

  forget(name) {
    this.#history.delete(name);
  }
}

/** The value below which a share of a histogram's observations lie, null where there are none. buckets: [bound, cumulative count]. */
export function quantile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let [lower, before] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= share * total) {
      if (bound === null) return lower;
      return lower + ((bound - lower) * (share * total - before)) / Math.max(count - before, 1e-9);
    }
    [lower, before] = [bound, count];
  }
  return lower;
}

/** A histogram's observations since an earlier one. */
export const since = (now, before) => now.map(([bound, count], i) => [bound, count - (before?.[i]?.[1] ?? 0)]);
