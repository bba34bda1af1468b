// A plan as a table, a row a step; two plans side by side, matched by the steps' names.

import { element } from "./dom.js";
import { duration, percent, quantity } from "./format.js";

// What a narrow screen shows without scrolling comes first.
const ALONE = [
  { title: "Step", text: true, value: (row) => row.a.step },
  { title: "Time", value: (row) => row.a.seconds, shown: duration },
  { title: "Share", value: (row, [a]) => row.a.seconds / a.seconds, shown: percent },
  { title: "Roofline", value: (row) => row.a.roofline, shown: percent },
  { title: "Op", text: true, value: (row) => row.a.op },
  { title: "Kernel", text: true, value: (row) => row.a.kernel },
  { title: "Writes", text: true, value: (row) => row.a.result },
  { title: "FLOPs", value: (row) => row.a.flops, shown: (value) => quantity(value) },
  { title: "Bytes", value: (row) => row.a.bytes, shown: (value) => quantity(value, "B") },
  { title: "FLOP/s", value: (row) => row.a.flops_per_second, shown: (value) => quantity(value) },
  { title: "B/s", value: (row) => row.a.bytes_per_second, shown: (value) => quantity(value) },
];

const PAIR = [
  { title: "Step", text: true, value: (row) => (row.a ?? row.b).step },
  { title: "A: time", value: (row) => row.a?.seconds, shown: duration },
  { title: "B: time", value: (row) => row.b?.seconds, shown: duration },
  {
    title: "B / A",
    value: (row) => row.b?.seconds / row.a?.seconds,
    shown: (value) => (Number.isFinite(value) ? value.toFixed(2) : "–"),
  },
  { title: "A: roofline", value: (row) => row.a?.roofline, shown: percent },
  { title: "B: roofline", value: (row) => row.b?.roofline, shown: percent },
  { title: "Op", text: true, value: (row) => (row.a ?? row.b).op },
  { title: "A: kernel", text: true, value: (row) => row.a?.kernel ?? "–" },
  { title: "B: kernel", text: true, value: (row) => row.b?.kernel ?? "–" },
];

/** Rows for one series or two: a step, or the steps of one name. */
export function pair([a, b]) {
  const others = new Map((b?.steps ?? []).map((step) => [step.step, step]));
  const rows = a.steps.map((step) => ({ name: step.step, a: step, b: others.get(step.step) }));
  const seen = new Set(a.steps.map((step) => step.step));
  return [
    ...rows,
    ...(b?.steps ?? []).filter((step) => !seen.has(step.step)).map((step) => ({ name: step.step, b: step })),
  ];
}

/** The table; `onChoose` gets the name of a step whose row is clicked. */
export function makePlanTable(table, onChoose) {
  let sort = null; // { title, up }, or the plan's order
  let drawn = [];
  const rowOf = new Map();

  /** Numbers with the largest first, text from A on; then the other way round; then the plan's order. */
  function sortBy({ title, text }) {
    const first = Boolean(text);
    if (sort?.title !== title) sort = { title, up: first };
    else sort = sort.up === first ? { title, up: !first } : null;
    draw(drawn);
  }

  function header(column) {
    const direction = sort?.title === column.title ? (sort.up ? "ascending" : "descending") : null;
    const button = element("button", { type: "button", onclick: () => sortBy(column) }, column.title);
    return element("th", { scope: "col", class: column.text ? "text" : null, "aria-sort": direction }, button);
  }

  function draw(series) {
    const focused = table.tHead.contains(document.activeElement) ? document.activeElement.textContent : null;
    drawn = series;
    const columns = series.length > 1 ? PAIR : ALONE;
    table.tHead.replaceChildren(element("tr", {}, ...columns.map(header)));
    const rows = sorted(pair(series), columns, series);
    rowOf.clear();
    for (const row of rows) {
      const cells = columns.map((column, i) => {
        const value = column.value(row, series);
        const name = i === 0 ? "th" : "td";
        const shown = column.shown ? column.shown(value) : value;
        const attributes = {
          class: column.text ? "text" : null,
          scope: i === 0 ? "row" : null,
          title: i === 0 ? shown : null,
        };
        return element(name, attributes, shown);
      });
      rowOf.set(row.name, element("tr", { onclick: () => onChoose(row.name) }, ...cells));
    }
    table.tBodies[0].replaceChildren(...rowOf.values());
    if (focused) [...table.tHead.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
  }

  function sorted(rows, columns, series) {
    const column = columns.find((each) => each.title === sort?.title);
    if (!column) return rows;
    const key = (row) => {
      const value = column.value(row, series);
      return column.text || Number.isFinite(value) ? value : -Infinity; // a step that the other plan has not
    };
    const compare = (a, b) => (column.text ? key(a).localeCompare(key(b)) : key(a) - key(b) || 0);
    return [...rows].sort((a, b) => (sort.up ? 1 : -1) * compare(a, b));
  }

  return {
    draw,
    /** Mark the row of a step. */
    mark(name) {
      table.querySelector("tr.chosen")?.classList.remove("chosen");
      rowOf.get(name)?.classList.add("chosen");
    },
  };
}
