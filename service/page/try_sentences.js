// Sentences go to an encoder; the cosines of their vectors come back as a matrix.

import { postJson } from "./api.js";
import { byId, element, setOptions, showProblem } from "./dom.js";
import { choices, chosen } from "./models.js";

const MOST = 12; // more columns could not be read

export function startSentences() {
  const select = byId("sentences-model");
  const text = byId("sentences-text");
  const form = byId("sentences-form");
  let turn = 0;

  async function compare() {
    const sentences = text.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
    const wrong = problemWith(sentences, select.value);
    showProblem("sentences-problem", wrong);
    if (wrong) return;
    const mine = ++turn;
    try {
      const { path, query } = chosen(select.value);
      const { body, timing } = await postJson(`${path}/tokens?${query}`, { text: sentences });
      if (mine === turn) showMatrix(sentences, similarities(body.embeddings), timing);
    } catch (error) {
      if (mine === turn) showProblem("sentences-problem", error.message);
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) compare();
  });

  return {
    show(models) {
      const options = choices(models, "sentence-embedding");
      setOptions(select, options, "no model for sentences is ready");
      form.querySelector("button").disabled = !options.length;
    },
  };
}

function problemWith(sentences, model) {
  if (!model) return "No model for sentences is ready.";
  if (sentences.length < 2) return "Write two sentences or more, each on a line of its own.";
  return sentences.length > MOST ? `These are ${sentences.length} sentences; up to ${MOST} fit into the matrix.` : "";
}

/** Cosines of all pairs of vectors. */
export function similarities(vectors) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const lengths = vectors.map((vector) => Math.sqrt(dot(vector, vector)));
  return vectors.map((a, i) => vectors.map((b, j) => dot(a, b) / (lengths[i] * lengths[j])));
}

/** Two digits; a true minus, and none before zero. */
function shown(value) {
  return value.toFixed(2).replace("-0.00", "0.00").replace("-", "−");
}

function showMatrix(sentences, matrix, timing) {
  const numbers = sentences.map((_, i) => element("th", { scope: "col" }, String(i + 1)));
  const head = element("tr", {}, element("th", { scope: "col" }, "Sentence"), ...numbers);
  const rows = matrix.map((row, i) => {
    const cells = row.map((value) => {
      const cell = element("td", {}, shown(value));
      cell.style.setProperty("--alike", Math.max(value, 0).toFixed(3));
      return cell;
    });
    // Long ones are cut after some lines, to the eye only.
    const words = element("span", {}, `${i + 1}. ${sentences[i]}`);
    return element("tr", {}, element("th", { scope: "row" }, words), ...cells);
  });
  const words = element("span", {}, "Cosine of each pair: 1 means the same, 0 nothing in common");
  const caption = element("caption", { id: "matrix-caption" }, words);
  const table = element(
    "table",
    { class: "matrix" },
    caption,
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
  table.style.setProperty("--columns", sentences.length);
  const region = { class: "matrix-scroll", role: "region", "aria-labelledby": "matrix-caption", tabindex: "0" };
  byId("sentences-answer").replaceChildren(
    element("div", region, table),
    element("p", { class: "note" }, `In the server: ${timing}`),
  );
}
