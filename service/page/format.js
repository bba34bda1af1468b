// Numbers for people: three significant digits and an SI prefix. A number and its unit stay on one line.

/** The space between them, at which no line breaks. */
export const SPACE = "\u00a0";

const PREFIXES = [
  [1e15, "P"],
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

function digits(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 || size === 0 ? 0 : size >= 10 ? 1 : 2);
}

/** 2_410_000_000, "FLOP/s" → "2.41 GFLOP/s". */
export function quantity(value, unit = "") {
  const [scale, prefix] = PREFIXES.find(([least]) => Math.abs(value) >= least * 0.9995) ?? [1, ""];
  const small = scale === 1 && Number.isInteger(value);
  return `${small ? value : digits(value / scale)}${SPACE}${prefix}${unit}`.trimEnd();
}

/** A power of ten on an axis: 1e9 → "1 G", 0.01 → "0.01". */
export function decade(value) {
  const [scale, prefix] = PREFIXES.find(([least]) => value >= least * 0.9995) ?? [1, ""];
  return `${Number((value / scale).toPrecision(1))}${SPACE}${prefix}`.trimEnd();
}

/** Seconds → "812 µs", "6.10 ms", "1.25 s". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds >= 1) return `${digits(seconds)}${SPACE}s`;
  return seconds >= 1e-3 ? `${digits(seconds * 1e3)}${SPACE}ms` : `${digits(seconds * 1e6)}${SPACE}µs`;
}

/** 0.0123 → "1.2 %". */
export function percent(fraction) {
  if (!Number.isFinite(fraction)) return "–";
  const value = fraction * 100;
  return `${value >= 10 || value === 0 ? Math.round(value) : value.toFixed(1)}${SPACE}%`;
}
