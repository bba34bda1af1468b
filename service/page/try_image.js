// A picture goes to a classifier, its labels come back as bars.

import { request, timingOf } from "./api.js";
import { byId, element, setOptions, showProblem } from "./dom.js";
import { percent } from "./format.js";
import { choices, chosen } from "./models.js";

const TOP = 5;
const ONE_ONLY = "One picture at a time, please.";
const NO_FILE = "That is no file. Save the picture first, or copy and paste it.";

export function startImage() {
  const select = byId("image-model");
  const drop = byId("image-drop");
  const input = byId("image-file");
  let last = null; // the picture on show
  let turn = 0; // of the newest request: an older answer is not shown

  async function send(file) {
    if (!file) return;
    if (!select.value) {
      showProblem("image-problem", "No model for pictures is ready.");
      return;
    }
    last = file;
    const mine = ++turn;
    preview(file);
    showProblem("image-problem", "");
    byId("image-answer").replaceChildren(element("p", {}, "Looking…"));
    try {
      await checkReadable(file);
      const { path, query } = chosen(select.value);
      const options = {
        method: "POST",
        body: file,
        headers: { "content-type": file.type || "application/octet-stream" },
      };
      const answer = await request(`${path}/images?top_k=${TOP}&${query}`, options);
      const { predictions } = await answer.json();
      if (mine === turn) showLabels(predictions[0].labels, timingOf(answer));
    } catch (error) {
      if (mine !== turn) return;
      byId("image-answer").replaceChildren();
      showProblem("image-problem", error.message);
    }
  }

  input.addEventListener("change", () => send(input.files[0]));
  select.addEventListener("change", () => send(last));
  // A file that misses the place is taken as well: else the browser would leave the page and show the file.
  const carriesFile = (event) => event.dataTransfer.types.includes("Files");
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      if (!carriesFile(event) && !drop.contains(event.target)) return;
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget || !carriesFile(event)) drop.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (!carriesFile(event) && !drop.contains(event.target)) return;
    event.preventDefault();
    const { files } = event.dataTransfer;
    if (files.length === 1) send(files[0]);
    else showProblem("image-problem", files.length ? ONE_ONLY : NO_FILE);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) send(file);
  });

  return {
    show(models) {
      const options = choices(models, "image-classification");
      setOptions(select, options, "no model for pictures is ready");
      input.disabled = !options.length;
    },
  };
}

/** Throws where a file cannot be read, which a request would report as a server that does not answer. */
async function checkReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("The browser cannot read this. Is it a folder, or has the file gone?");
  }
}

function preview(file) {
  const image = byId("image-preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = true;
  image.onload = () => {
    image.hidden = false;
  };
  image.src = URL.createObjectURL(file);
}

function showLabels(labels, timing) {
  const list = element("ol", { class: "labels" });
  for (const { label, probability } of labels) {
    const bar = element("span");
    bar.style.width = `${probability * 100}%`;
    list.append(
      element(
        "li",
        {},
        element("span", { class: "name" }, label),
        element("span", { class: "share" }, percent(probability)),
        element("span", { class: "bar", "aria-hidden": "true" }, bar),
      ),
    );
  }
  byId("image-answer").replaceChildren(list, element("p", { class: "note" }, `In the server: ${timing}`));
}
