// How every step of a plan runs: a summary, the roofline plot and the table, of one version of a model or of two.

import { getJson, keys, partly, whileVisible } from "./api.js";
import { byId, element, setOptions, showProblem, svg } from "./dom.js";
import { duration, percent, quantity } from "./format.js";
import { makePlanTable } from "./plan_table.js";
import { describeStep, makeRoofline } from "./roofline.js";

const EVERY_S = 5;
const FAMILIES = 8; // colours

export function startKernels() {
  const [model, version, plan] = ["kernels-model", "kernels-version", "kernels-plan"].map(byId);
  const [otherVersion, otherPlan] = [byId("other-version"), byId("other-plan")];
  const otherField = otherPlan.closest(".field");
  let models = [];
  let chosenStep = null;
  let shown = ""; // what is drawn: a server that runs nothing does not take a selection or a focus away

  const plot = makeRoofline(byId("roofline"), (dot) => {
    chosenStep = dot.step.step;
    byId("step-detail").replaceChildren(...describeStep(dot));
    table.mark(chosenStep);
  });
  const table = makePlanTable(byId("plan-table"), (name) => plot.choose(name));

  const refresh = whileVisible(EVERY_S, async () => {
    if (!model.value) return;
    const asked = choiceNow();
    try {
      const first = await profile(model.value, version.value, plan.value);
      const second = otherVersion.value ? await beside(first) : null;
      if (choiceNow() !== asked) return; // chosen anew meanwhile; that is asked for next
      showProblem("kernels-problem", whyNot(first) || (second ? whyNot(second) : ""));
      offerPlans(plan, first);
      if (second) offerPlans(otherPlan, second);
      else setOptions(otherPlan, []);
      otherField.hidden = !second;
      byId("kernels-view").hidden = Boolean(whyNot(first));
      if (!whyNot(first)) show(first, second && !whyNot(second) ? second : null);
    } catch (error) {
      if (error.status === 404 && (plan.value || otherPlan.value)) {
        // The plan had to make room for others: the busiest one stands for it from now on.
        plan.replaceChildren();
        otherPlan.replaceChildren();
        refresh();
        return;
      }
      showProblem("kernels-problem", partly(error));
    }
  });

  /** The profile of the other version: at the sizes chosen for it, else at those of the first if it has run there. */
  async function beside(first) {
    const other = await profile(model.value, otherVersion.value, otherPlan.value);
    const has = other.plans.some((each) => each.name === first.plan);
    if (otherPlan.value || !has || other.plan === first.plan) return other;
    return profile(model.value, otherVersion.value, first.plan);
  }

  function choiceNow() {
    return JSON.stringify([model, version, plan, otherVersion, otherPlan].map((select) => select.value));
  }

  function show(first, second) {
    const drawn = JSON.stringify([first, second]);
    if (drawn === shown) return;
    shown = drawn;
    const series = [makeSeries(first, second ? "a" : null)];
    if (second) series.push(makeSeries(second, "b"));
    byId("kernels-summary").textContent = summary(series, first.device);
    byId("plan-caption").textContent =
      `The plan of ${first.name}, ${series.map((one) => one.title).join(", beside it ")}`;
    byId("roofline-legend").replaceChildren(...legend(series));
    plot.draw(series, first.device);
    table.draw(series);
    if (chosenStep) table.mark(chosenStep);
  }

  function offerVersions() {
    const ready = models.filter((each) => each.state === "READY" && each.id === model.value);
    setOptions(
      version,
      [...ready].reverse().map((each) => [each.version, each.version]),
    );
    const others = ready.length ? [["", "nothing"], ...ready.map((each) => [each.version, each.version])] : [];
    setOptions(otherVersion, others);
  }

  model.addEventListener("change", () => {
    for (const select of [version, plan, otherVersion, otherPlan]) select.replaceChildren();
    chosenStep = null;
    offerVersions();
    refresh();
  });
  version.addEventListener("change", () => {
    plan.replaceChildren();
    refresh();
  });
  otherVersion.addEventListener("change", () => {
    otherPlan.replaceChildren();
    refresh();
  });
  plan.addEventListener("change", () => {
    otherPlan.replaceChildren(); // the other version follows
    refresh();
  });
  otherPlan.addEventListener("change", refresh);
  keys.addEventListener("changed", refresh);

  return {
    show(data) {
      models = data;
      const before = model.value + version.value;
      const names = [...new Set(data.filter((each) => each.state === "READY").map((each) => each.id))];
      setOptions(
        model,
        names.map((name) => [name, name]),
        "no model is ready",
      );
      offerVersions();
      if (model.value + version.value !== before) refresh();
    },
  };
}

/** Why a profile cannot be shown; empty where it can. */
function whyNot({ steps, version, plan }) {
  if (!steps.length) return `Version ${version} has not run yet: send it a request.`;
  if (steps.some((step) => step.seconds > 0)) return "";
  return `No run of version ${version} at ${plan} has been timed yet: on a GPU that is one run of many.`;
}

async function profile(model, version, plan) {
  const query = plan ? `?plan=${encodeURIComponent(plan)}` : "";
  return getJson(`/v2/models/${encodeURIComponent(model)}/versions/${encodeURIComponent(version)}/profile${query}`);
}

function offerPlans(select, { plans, plan }) {
  const names = plans.map((each) => each.name).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  setOptions(
    select,
    names.map((name) => [name, name.replaceAll("=", " ").replaceAll(",", ", ")]),
  );
  select.value = plan ?? "";
}

function makeSeries(answer, letter) {
  const families = [...new Set(answer.steps.map((step) => step.kernel))];
  const seconds = answer.steps.reduce((sum, step) => sum + step.seconds, 0);
  const runs = answer.plans.find((each) => each.name === answer.plan)?.runs ?? 0;
  return {
    name: letter ?? "",
    prefix: letter ? `${letter.toUpperCase()}: ` : "",
    plan: answer.plan,
    title: `version ${answer.version} at ${answer.plan.replaceAll("=", " ").replaceAll(",", ", ")}`,
    diamond: letter === "b",
    steps: answer.steps,
    seconds,
    runs,
    families,
    styleOf: letter ? () => `series-${letter}` : (step) => `family-${families.indexOf(step.kernel) % FAMILIES}`,
  };
}

function summary(series, device) {
  const sentences = series.map((one) => {
    const flops = one.steps.reduce((sum, step) => sum + step.flops, 0);
    const least = one.steps.reduce((sum, step) => sum + step.seconds * step.roofline, 0);
    const rate = quantity(flops / one.seconds, "FLOP/s");
    const reached = `${rate}, ${percent(least / one.seconds)} of what the device allows`;
    const runs = `${quantity(one.runs)} ${one.runs === 1 ? "run" : "runs"}`;
    return `${one.prefix}${duration(one.seconds)} a run in ${one.steps.length} steps, ${reached}, over ${runs}.`;
  });
  if (series.length > 1) {
    const [a, b] = series;
    const times = `B takes ${(b.seconds / a.seconds).toFixed(2)} times as long as A`;
    sentences.push(a.plan === b.plan ? `${times}.` : `${times}, but their sizes differ.`);
  }
  const moved = `${quantity(device.peak_bytes, "B/s")} of memory, ${quantity(device.peak_cache_bytes, "B/s")} of cache`;
  const ceilings = `measured ceilings ${quantity(device.peak_flops, "FLOP/s")}, ${moved}`;
  const threads = device.threads ? `, ${device.threads} threads` : ""; // a GPU has none to count
  return `${sentences.join(" ")} ${device.name} (${device.arch}${threads}): ${ceilings}.`;
}

function legend(series) {
  const entry = (style, diamond, words) => {
    const shape = diamond
      ? svg("path", { d: "M8 1L15 8L8 15L1 8Z", class: style })
      : svg("circle", { cx: 8, cy: 8, r: 6, class: style });
    return element("li", {}, svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, shape), words);
  };
  if (series.length > 1) return series.map((one) => entry(`series-${one.name}`, one.diamond, one.prefix + one.title));
  return series[0].families.map((kernel, i) => entry(`family-${i % FAMILIES}`, false, kernel));
}
