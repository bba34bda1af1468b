// The Prometheus text format, as far as /metrics has it, and what can be read off it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/** Samples by metric name: a map to lists of { labels, value }. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!match) continue;
    const [, name, inside = "", value] = match;
    const labels = {};
    for (const [, label, quoted] of inside.matchAll(LABEL)) {
      labels[label] = quoted.replace(/\\(.)/g, (_, escaped) => ESCAPES[escaped] ?? escaped);
    }
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels, value: number(value) });
  }
  return found;
}

function number(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}

/** The sum of the samples of a metric that have all these labels. */
export function total(samples, name, labels) {
  const wanted = Object.entries(labels);
  return (samples.get(name) ?? [])
    .filter((sample) => wanted.every(([key, value]) => sample.labels[key] === value))
    .reduce((sum, sample) => sum + sample.value, 0);
}

/** The counts of a histogram as [upper edge, count up to it], by edge. */
export function buckets(samples, name, labels) {
  const wanted = Object.entries(labels);
  return (samples.get(`${name}_bucket`) ?? [])
    .filter((sample) => wanted.every(([key, value]) => sample.labels[key] === value))
    .map((sample) => [number(sample.labels.le), sample.value])
    .sort((a, b) => a[0] - b[0]);
}

/** The quantile of what came between two states of a histogram, linear inside a bucket as Prometheus has it; NaN where
 * nothing came. */
export function quantile(q, now, before) {
  const counts = now.map(([edge, count], i) => [edge, count - (before[i]?.[1] ?? 0)]);
  const all = counts.at(-1)?.[1] ?? 0;
  if (all <= 0) return NaN;
  const rank = q * all;
  const at = counts.findIndex(([, count]) => count >= rank);
  const [edge, count] = counts[at];
  const [from, below] = at > 0 ? counts[at - 1] : [0, 0];
  return edge === Infinity ? from : from + ((edge - from) * (rank - below)) / (count - below);
}
