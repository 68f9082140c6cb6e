// Numbers as people read them.

export const number = (value, digits = 0) =>
  value == null || !Number.isFinite(value) ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** A time in milliseconds. */
export const duration = (ms) => {
  if (ms == null) return "–";
  return ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000, ms < 10000 ? 2 : 1)} s`;
};

/** The same, of a quantity that is known to two digits. */
export const roughly = (ms) => {
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(ms)) - 1);
  const rounded = Math.round(ms / unit) * unit;
  return rounded < 1000 ? `${number(rounded)} ms` : `${number(rounded / 1000, rounded < 10000 ? 1 : 0)} s`;
};

export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
