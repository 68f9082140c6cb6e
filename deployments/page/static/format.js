// Numbers as people read them.

export const number = (value, digits = 0) =>
  value == null || !Number.isFinite(value) ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** A time in milliseconds. */
export const duration = (ms) => {
  if (ms == null) return "–";
  return ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000, ms < 10000 ? 2 : 1)} s`;
};

export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
