// How two texts differ.

/** {equal, at, count}: at is where they part (code points), count how many characters differ from there on. */
export function compare(left, right) {
  const a = [...left];
  const b = [...right];
  let at = 0;
  while (at < a.length && at < b.length && a[at] === b[at]) at++;
  const longest = Math.max(a.length, b.length);
  let count = Math.abs(a.length - b.length);
  for (let i = at; i < Math.min(a.length, b.length); i++) count += a[i] !== b[i];
  return { equal: count === 0, at, count, length: longest };
}
