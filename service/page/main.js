// Starts the page: the API key's dialog, the server's state, the list of models, and the parts that use it.

import { currentKey, getJson, keys, request, setKey, whileVisible } from "./api.js";
import { byId, showProblem } from "./dom.js";
import { startImage } from "./try_image.js";
import { startSentences } from "./try_sentences.js";
import { startLive } from "./live.js";
import { startKernels } from "./kernels.js";

const MODELS_EVERY_S = 10;

function startKeyDialog() {
  const dialog = byId("key-dialog");
  const open = (why) => {
    if (dialog.open) return;
    byId("key-reason").textContent = why;
    byId("key-value").value = "";
    byId("key-forget").hidden = !currentKey();
    dialog.showModal();
    byId("key-value").focus();
  };
  keys.addEventListener("needed", (event) => open(event.detail));
  byId("key-open").addEventListener("click", () => open("Requests of this page will carry it."));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-forget").addEventListener("click", () => {
    setKey("");
    dialog.close();
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = byId("key-value").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      byId("key-reason").textContent = "A key is letters, digits and signs, without spaces.";
      return;
    }
    dialog.close();
    setKey(key);
  });
}

async function showState() {
  const place = byId("server-state");
  let text = "Ready.";
  try {
    await request("/v2/health/ready");
  } catch (error) {
    text = error.status === 0 ? "No answer." : error.message;
  }
  if (place.textContent !== text) place.textContent = text;
}

startKeyDialog();
const parts = [startImage(), startSentences(), startLive(), startKernels()];

const refresh = whileVisible(MODELS_EVERY_S, async () => {
  await showState();
  try {
    const { data } = await getJson("/v1/models");
    showProblem("models-problem", data.length ? "" : "There is no model in this server's repository.");
    for (const part of parts) part.show(data);
  } catch (error) {
    showProblem("models-problem", error.message);
  }
});
keys.addEventListener("changed", refresh);
