// Throughput, latency and queue of every model now, from /metrics.

import { keys, partly, request, whileVisible } from "./api.js";
import { byId, element, showProblem, svg } from "./dom.js";
import { duration, quantity } from "./format.js";
import { buckets, parse, quantile, total } from "./metrics.js";

const EVERY_S = 2;
const WINDOW_S = 10; // rates and latencies are over so long
const KEPT = 90; // points of a spark line: three minutes
const FEWEST = 30; // that it has room for, from the first one on

export function startLive() {
  const cards = new Map();
  const counted = []; // the newest states of the counters, oldest first

  const poll = whileVisible(EVERY_S, async () => {
    try {
      const samples = parse(await (await request("/metrics", { headers: { accept: "text/plain" } })).text());
      showProblem("live-problem", "");
      counted.push({ at: performance.now() / 1000, samples });
      while (counted.length > 2 && counted.at(-1).at - counted[1].at >= WINDOW_S) counted.shift();
      for (const card of cards.values()) card.update(counted);
    } catch (error) {
      showProblem("live-problem", partly(error));
    }
  });
  keys.addEventListener("changed", poll);

  return {
    show(models) {
      const place = byId("live-models");
      const wanted = new Set(models.map(nameOf));
      for (const [name, card] of cards) {
        if (wanted.has(name)) continue;
        card.place.remove();
        cards.delete(name);
      }
      for (const model of models) {
        const name = nameOf(model);
        if (!cards.has(name)) {
          cards.set(name, makeCard(model));
          place.append(cards.get(name).place);
        }
        cards.get(name).describe(model);
      }
    },
  };
}

function nameOf(model) {
  return `${model.id}/${model.version}`;
}

function makeCard(model) {
  const labels = { model: model.id, version: model.version };
  const state = element("p", { class: "note" });
  const figures = {
    rate: figure("Throughput"),
    latency: figure("Latency"),
    queue: figure("Queue"),
  };
  const list = element("dl", {}, ...Object.values(figures).map((each) => each.place));
  const title = element("h3", {}, model.id, element("span", {}, `, version ${model.version}`));
  const place = element("div", { class: "card" }, title, state, list);

  return {
    place,
    describe({ state: word, reason, task, batching }) {
      place.classList.toggle("down", word === "UNAVAILABLE");
      const text =
        word === "READY" ? `${task}; batching: ${batching}` : `${word.toLowerCase()}${reason ? `: ${reason}` : ""}`;
      if (state.textContent !== text) state.textContent = text;
    },
    update(counted) {
      const [before, now] = [counted[0], counted.at(-1)];
      const queued = total(now.samples, "inference_queue_depth", labels);
      const inflight = total(now.samples, "inference_inflight", labels);
      figures.queue.set(quantity(queued), `waiting; ${quantity(inflight)} under way`, queued);
      if (before === now) return;
      const name = "inference_request_duration_seconds";
      const [newer, older] = [buckets(now.samples, name, labels), buckets(before.samples, name, labels)];
      const done = newer.length ? newer.at(-1)[1] - (older.at(-1)?.[1] ?? 0) : 0;
      const rate = Math.max(done, 0) / (now.at - before.at);
      const good = { ...labels, outcome: "success" };
      const failed =
        done -
        total(now.samples, "inference_requests_total", good) +
        total(before.samples, "inference_requests_total", good);
      figures.rate.set(
        `${quantity(rate)}/s`,
        failed > 0.5 ? `${quantity(Math.round(failed))} refused or failed` : "requests",
        rate,
      );
      const [median, late] = [quantile(0.5, newer, older), quantile(0.99, newer, older)];
      const words = Number.isNaN(late) ? "no requests" : `99 of 100 in ${duration(late)}`;
      figures.latency.set(duration(median), words, Number.isNaN(late) ? 0 : late);
    },
  };
}

/** A name, a figure with a remark, and a line of its past. */
function figure(name) {
  const [value, remark] = [element("strong", {}, "–"), element("small", {})];
  const line = svg("polyline", {});
  const spark = svg(
    "svg",
    { class: "spark", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" },
    line,
  );
  const past = [];
  return {
    place: element("div", {}, element("dt", {}, name), element("dd", {}, value, remark, spark)),
    set(text, words, point) {
      value.textContent = text;
      remark.textContent = words;
      past.push(point);
      if (past.length > KEPT) past.shift();
      const most = Math.max(...past, 1e-9);
      const x = (i) => 100 - (past.length - 1 - i) * (100 / (Math.max(past.length, FEWEST) - 1));
      if (past.length < 2) return;
      line.setAttribute(
        "points",
        past.map((each, i) => `${x(i).toFixed(2)},${(19 - (each / most) * 18).toFixed(2)}`).join(" "),
      );
    },
  };
}
