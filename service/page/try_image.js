// A picture goes to a classifier, its labels come back as bars.

import { request, timingOf } from "./api.js";
import { byId, element, setOptions, showProblem } from "./dom.js";
import { percent } from "./format.js";
import { choices, chosen } from "./models.js";

const TOP = 5;

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
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    send(event.dataTransfer.files[0]);
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
