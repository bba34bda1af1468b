// The roofline plot (Williams, Waterman & Patterson 2009): a dot for each step that ran, under the device's ceilings.
//
// Steps without FLOPs have no place on a logarithmic axis. They stand at its left edge, as high as any kernel of that
// intensity with their byte rate would: their distance from the ceilings of memory and cache reads as for all others.

import { element, svg } from "./dom.js";
import { decade, duration, percent, quantity } from "./format.js";

const LEFT = 62;
const RIGHT = 14;
const TOP = 14;
const BOTTOM = 44;
const GUTTER = 44; // for steps without FLOPs, where there are any
const LEAST_RADIUS = 3.5;
const MOST_RADIUS = 15;
const REACH = 24; // pixels from a finger to the dot that is meant
const LETTER = 8; // pixels, of a ceiling's name
// Where its name may stand, parts of the line, best first: the middle, then ever further from it.
const ALONG = Array.from({ length: 45 }, (_, i) => 0.5 + 0.02 * (i % 2 ? -1 : 1) * Math.ceil(i / 2));
const [ABOVE, BELOW] = [[-6, -20], [14, 28]]; // pixels from the line to the words, where dots leave room or farther

/** A plot in `place`. `onChoose` gets the dot, { series, step }, that is pointed at or has the focus. */
export function makeRoofline(place, onChoose) {
  let dots = []; // { series, step, node }
  let at = 0; // the dot that the keyboard is on
  let ring = svg("path", {}); // around the chosen dot, above those that cover it
  let drawn = null;

  function choose(index, focus) {
    at = Math.min(Math.max(index, 0), dots.length - 1);
    dots.forEach(({ node }, i) => {
      node.setAttribute("tabindex", i === at ? "0" : "-1");
      node.setAttribute("aria-selected", String(i === at));
      node.classList.toggle("chosen", i === at);
    });
    for (const name of ["d", "transform"]) ring.setAttribute(name, dots[at].node.getAttribute(name));
    if (focus) dots[at].node.focus();
    onChoose(dots[at]);
  }

  // Small dots are hard to hit: the nearest one is meant.
  place.addEventListener("click", (event) => {
    if (event.target.closest(".dot")) return;
    const distances = dots.map(({ node }) => {
      const box = node.getBoundingClientRect();
      return Math.hypot(event.clientX - (box.left + box.right) / 2, event.clientY - (box.top + box.bottom) / 2);
    });
    const least = Math.min(...distances);
    if (least <= REACH) choose(distances.indexOf(least), true);
  });

  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  place.addEventListener("keydown", (event) => {
    if (!(event.key in moves) || !dots.length) return;
    event.preventDefault();
    choose(at + moves[event.key], true);
  });

  function draw(series, device) {
    drawn = [series, device];
    const kept = dots[at] && {
      series: dots[at].series.name,
      step: dots[at].step.step,
      chosen: isChosen(),
      focused: hasFocus(),
    };
    const width = Math.max(place.clientWidth, 280);
    const height = Math.min(Math.max(width * 0.5, 280), 520);
    const scale = makeScale(series, device, width, height);
    ring = svg("path", { class: "ring" });
    const list = svg("g", { role: "listbox", "aria-label": "Steps", "aria-orientation": "horizontal" });
    dots = series.flatMap((one) => one.steps.filter((step) => step.seconds > 0).map((step) => ({ series: one, step })));
    dots.forEach((dot, i) => {
      dot.node = makeDot(dot, scale);
      dot.node.addEventListener("pointerenter", () => choose(i, false));
      dot.node.addEventListener("focus", () => choose(i, false));
      dot.node.addEventListener("click", () => choose(i, true));
      dot.node.setAttribute("tabindex", i === 0 ? "0" : "-1");
      dot.node.setAttribute("aria-selected", "false");
    });
    // Large ones first, so that no dot lies hidden under another; the keyboard goes by the plan's order all the same.
    list.append(...[...dots].sort((a, b) => share(b) - share(a)).map((dot) => dot.node));
    const box = {
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      "aria-labelledby": "roofline-caption",
      role: "group",
    };
    place.replaceChildren(svg("svg", box, axes(scale), ceilings(scale, device, dots.map((dot) => spot(dot, scale))), list, ring));
    at = 0;
    const again = kept ? dots.findIndex((dot) => dot.series.name === kept.series && dot.step.step === kept.step) : -1;
    if (again >= 0 && kept.chosen) choose(again, kept.focused);
  }

  const isChosen = () => dots[at].node.classList.contains("chosen");
  const hasFocus = () => dots[at].node === document.activeElement;
  let width = 0;
  new ResizeObserver(() => {
    if (drawn && Math.abs(place.clientWidth - width) > 1) draw(...drawn);
    width = place.clientWidth;
  }).observe(place);

  return {
    draw,
    /** Choose the dot of a step, as the table does. */
    choose(name) {
      const index = dots.findIndex((dot) => dot.step.step === name);
      if (index >= 0) choose(index, false);
    },
  };
}

/** FLOPs a byte. */
export function intensity(step) {
  return step.bytes ? step.flops / step.bytes : 0;
}

function makeScale(series, device, width, height) {
  const steps = series.flatMap((one) => one.steps).filter((step) => step.seconds > 0);
  const counted = steps.filter((step) => step.flops && step.bytes);
  const ridge = device.peak_flops / device.peak_bytes;
  const known = (values, otherwise) => {
    const found = values.filter((value) => value > 0 && Number.isFinite(value)); // ceilings may not be measured
    return found.length ? found : otherwise;
  };
  const xs = known([...counted.map(intensity), ridge / 30, ridge * 8], [1]);
  const [x0, x1] = decadesAround(xs);
  const rates = steps.map((step) => (step.flops ? step.flops_per_second : step.bytes_per_second * x0));
  const ys = known([...rates, device.peak_flops * 1.5, device.peak_bytes * x0], [1e9]);
  const [y0, y1] = decadesAround(ys);
  const gutter = steps.every((step) => step.flops) ? 0 : GUTTER;
  const [left, right, bottom] = [LEFT + gutter, width - RIGHT, height - BOTTOM];
  const along = (value, from, to) => Math.log10(value / from) / Math.log10(to / from);
  return {
    x0,
    x1,
    y0,
    y1,
    left,
    right,
    bottom,
    gutter,
    narrow: right - left < 420, // no room for every word
    zoom: Math.min(1, (right - left) / 700),
    x: (value) => left + along(value, x0, x1) * (right - left),
    y: (value) => bottom - along(value, y0, y1) * (bottom - TOP),
  };
}

/** Powers of ten below and above all values, never the same. */
function decadesAround(values) {
  const low = Math.floor(Math.log10(Math.min(...values)));
  const high = Math.ceil(Math.log10(Math.max(...values)));
  return [10 ** low, 10 ** Math.max(high, low + 1)];
}

function axes(scale) {
  const { narrow } = scale;
  const group = svg("g", { "aria-hidden": "true" });
  const line = (x1, y1, x2, y2) => group.append(svg("line", { class: "grid", x1, y1, x2, y2 }));
  const text = (x, y, anchor, words) =>
    group.append(svg("text", { class: "axis-text", x, y, "text-anchor": anchor }, words));
  for (const [value, i] of decades(scale.x0, scale.x1)) {
    line(scale.x(value), TOP, scale.x(value), scale.bottom);
    if (!narrow || i % 2 === 0) text(scale.x(value), scale.bottom + 16, "middle", decade(value));
  }
  for (const [value] of decades(scale.y0, scale.y1)) {
    line(LEFT, scale.y(value), scale.right, scale.y(value));
    text(LEFT - 6, scale.y(value) + 4, "end", decade(value));
  }
  if (scale.gutter) text(LEFT + scale.gutter / 2, scale.bottom + 16, "middle", "0");
  text((scale.left + scale.right) / 2, scale.bottom + 36, "middle", "FLOPs a byte");
  const [x, y] = [12, (TOP + scale.bottom) / 2];
  group.append(
    svg("text", { class: "axis-text", x, y, "text-anchor": "middle", transform: `rotate(-90 ${x} ${y})` }, "FLOP/s"),
  );
  return group;
}

function* decades(from, to) {
  for (let i = 0, value = from; value <= to * 1.001; i += 1, value *= 10) yield [value, i];
}

/** Lines with their names, which stand where they hide behind the fewest `spots` of dots. */
function ceilings(scale, device, spots) {
  const group = svg("g", { "aria-hidden": "true" });
  const { narrow } = scale;
  const { peak_flops: flops } = device;
  if (!(flops > 0)) return group; // ceilings that were not measured are not drawn
  const flat = scale.y(flops);
  // What comes from the cache meets the ceiling of computing first; what comes from memory at the second ridge.
  const ridges = [device.peak_cache_bytes, device.peak_bytes].map((rate) => (rate > 0 ? flops / rate : scale.x1));
  const [first, second] = ridges.map((ridge) => Math.min(Math.max(ridge, scale.x0), scale.x1));
  const level = (kind, x1, x2) => group.append(svg("line", { class: `ceiling ${kind}`, x1, y1: flat, x2, y2: flat }));
  if (first < second) level("cache", scale.x(first), scale.x(second));
  level("compute", scale.x(second), scale.right);
  /** Words that begin or end, by the anchor, at the best of the places where the fewest dots lie over them. */
  const label = (places, anchor, words) => {
    const width = LETTER * words.length;
    const begin = anchor === "end" ? width : 0;
    const inside = places.map(([x, y]) => [x, Math.max(y, TOP)]);
    const hidden = inside.map(([x, y]) => spots.filter((spot) => covers(spot, [x - begin, y], width)).length);
    const [x, y] = inside[hidden.indexOf(Math.min(...hidden))];
    group.append(svg("text", { class: "ceiling-text", x, y, "text-anchor": anchor }, words));
  };
  const [last, length] = [scale.right - 2, Math.max(scale.right - scale.x(second), 0)];
  const ends = ALONG.map((_, i) => last - (length * i) / ALONG.length);
  const computing = narrow ? "compute" : `compute ${quantity(flops, "FLOP/s")}`;
  label([...ABOVE, ...BELOW].flatMap((down) => ends.map((x) => [x, flat + down])), "end", computing);
  for (const [kind, rate] of [
    ["cache", device.peak_cache_bytes],
    ["memory", device.peak_bytes],
  ]) {
    if (!(rate > 0)) continue;
    const from = Math.max(scale.x0, scale.y0 / rate);
    const end = Math.max(flops / rate, from);
    const points = [
      [LEFT, scale.y(rate * from)],
      [scale.x(from), scale.y(rate * from)],
      [scale.x(end), scale.y(rate * end)],
    ];
    const line = (from === scale.x0 ? points : points.slice(1)).map((point) => point.join(",")).join(" ");
    group.append(svg("polyline", { class: `ceiling ${kind}`, points: line }));
    const words = narrow ? kind : `${kind} ${quantity(rate, "B/s")}`;
    const width = LETTER * words.length;
    const spread = ALONG.map((part) => from * (end / from) ** part).map((at) => [scale.x(at), scale.y(rate * at)]);
    const places = (kind === "memory" ? BELOW : ABOVE).flatMap((down) =>
      spread.map(([x, y]) => [kind === "memory" ? x + 8 : Math.max(x - 8 - width, scale.left + 4), y + down]),
    );
    label(places, "start", words);
  }
  return group;
}

/** Whether a dot lies over words of a width that begin at [x, y], their line. */
function covers(spot, [x, y], width) {
  const beside = spot.x - Math.min(Math.max(spot.x, x), x + width);
  const above = spot.y - Math.min(Math.max(spot.y, y - 12), y + 4);
  return Math.max(Math.abs(beside), Math.abs(above)) < spot.r + 2;
}

function share({ series, step }) {
  return step.seconds / series.seconds;
}

/** The area of a dot is the step's share of the time; all are smaller where the plot is. */
function radius(dot, { zoom }) {
  return Math.max(LEAST_RADIUS, zoom * Math.min(MOST_RADIUS, 44 * Math.sqrt(share(dot))));
}

/** Where a dot is. */
function spot(dot, scale) {
  const { step } = dot;
  const x = step.flops ? scale.x(intensity(step)) : LEFT + scale.gutter / 2;
  const y = scale.y(step.flops ? step.flops_per_second : step.bytes_per_second * scale.x0);
  return { x, y, r: radius(dot, scale) };
}

function makeDot(dot, scale) {
  const { series, step } = dot;
  const { x, y, r } = spot(dot, scale);
  const shape = series.diamond
    ? `M0 ${-r}L${r} 0L0 ${r}L${-r} 0Z`
    : `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
  const allowed = `${percent(step.roofline)} of what the device allows`;
  return svg("path", {
    class: `dot ${series.styleOf(step)}`,
    d: shape,
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    role: "option",
    "aria-label": `${series.prefix}${step.step}, ${step.op}: ${duration(step.seconds)}, ${allowed}`,
  });
}

/** What is known of a dot's step, in words. */
export function describeStep({ series, step }) {
  const rate = `${quantity(step.flops, "FLOP")} at ${quantity(step.flops_per_second, "FLOP/s")}`;
  const work = step.flops ? `${rate}, ${quantity(intensity(step))} FLOPs a byte` : "no FLOPs";
  const share = `${percent(step.seconds / series.seconds)} of a run`;
  return [
    element("strong", {}, `${series.prefix}${step.step}`),
    element("br"),
    `${step.op} by kernel ${step.kernel}, writes ${step.result}`,
    element("br"),
    `${duration(step.seconds)}, ${share}; ${percent(step.roofline)} of what the device allows`,
    element("br"),
    `${work}; ${quantity(step.bytes, "B")} at ${quantity(step.bytes_per_second, "B/s")}`,
  ];
}
