// Requests to this server: the API key, answers, and in words what went wrong.

import { SPACE } from "./format.js";

const KEY = "tilewave-api-key";

/** Dispatches "needed" (detail: why) when the server asks for a key, and "changed" when there is another. */
export const keys = new EventTarget();

let refused = false; // the last answer was that there must be a key, or another one

export function currentKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  refused = false;
  keys.dispatchEvent(new Event("changed"));
}

/** What a person is told. `status` is 0 where there was no answer. */
export class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** What a part of the page says beside what it shows, after an error: that there is no server, the page's head says. */
export function partly(error) {
  return error.status === 0 ? "What is seen here is the last that was heard." : error.message;
}

/** The answer to a request, if it is a good one. Throws RequestError. */
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = currentKey();
  if (key) headers.set("authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch {
    throw new RequestError("The server does not answer. Is it running, and can this machine reach it?", 0);
  }
  if (answer.ok) return answer;
  const said = await explanation(answer);
  if (answer.status === 401) {
    const why = key ? "The server does not know this API key." : "This server asks for an API key.";
    if (key === currentKey()) {
      // Else the user has given another one meanwhile.
      refused = true;
      keys.dispatchEvent(new CustomEvent("needed", { detail: why }));
    }
    throw new RequestError(why, 401);
  }
  const wait = answer.headers.get("retry-after");
  throw new RequestError(wait ? `${said} Try again in ${wait} s.` : said, answer.status);
}

async function explanation(answer) {
  let said;
  try {
    const { error } = await answer.json();
    said = typeof error === "string" ? error : error?.message;
  } catch {
    said = undefined; // not ours: a proxy's page, say
  }
  return said ? sentence(said) : `The server answered with status ${answer.status}.`;
}

function sentence(text) {
  const whole = text[0].toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

export async function getJson(path) {
  return (await request(path)).json();
}

export async function postJson(path, body) {
  const headers = { "content-type": "application/json" };
  const answer = await request(path, { method: "POST", headers, body: JSON.stringify(body) });
  return { body: await answer.json(), timing: timingOf(answer) };
}

/** The Server-Timing of an answer, for people: "queue 0.1 ms, compute 6.1 ms". */
export function timingOf(answer) {
  const parts = (answer.headers.get("server-timing") ?? "").split(",").map((part) => part.trim().split(";dur="));
  return parts
    .filter(([, milliseconds]) => milliseconds !== undefined)
    .map(([name, milliseconds]) => `${name} ${Number(milliseconds).toFixed(1)}${SPACE}ms`)
    .join(", ");
}

/** Call `work` now and every `seconds` while the page is looked at and has the key it needs, one call at a time.
 * Returns what calls it at once, or as soon as the call under way has ended. */
export function whileVisible(seconds, work) {
  let running = false;
  let again = false;
  const once = async () => {
    if (running) {
      again = true;
      return;
    }
    running = true;
    try {
      do {
        again = false;
        if (!document.hidden && !refused) await work();
      } while (again);
    } finally {
      running = false;
    }
  };
  setInterval(() => running || once(), seconds * 1000);
  document.addEventListener("visibilitychange", once);
  once();
  return once;
}
