// The console: asks the graph it was served by, and nobody else. Everything that is shown is set as text, never as markup.
import { plot, shown } from "./plots.js";

const POLL_MS = 2000, LISTS_MS = 15000, KEY = "metasepia-key";
const at = (id) => document.getElementById(id);

// -- asking -----------------------------------------------------------------------------------------------------------

class Refused extends Error {}

async function ask(path, { body, signal } = {}) {
  const headers = {}, key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the graph does not answer; is it running?");
  }
  if (response.ok) return response;
  const error = (await response.json().catch(() => ({}))).error ?? {};
  if (response.status === 401 || response.status === 403) askForKey(error.message);
  throw new Refused(error.message ?? `status ${response.status}`);
}

const json = async (path, options) => (await ask(path, options)).json();

function askForKey(problem) {
  at("key-form").hidden = false;
  at("key-problem").textContent = problem ?? "";
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  at("key-problem").textContent = "";
  refresh();
  lists();
});
at("key-forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  at("key-problem").textContent = "forgotten";
});

// -- tables -----------------------------------------------------------------------------------------------------------

function cell(kind, content, className) {
  const made = document.createElement(kind);
  if (kind === "th") made.scope = "row";
  if (className) made.className = className;
  made.append(content ?? "");
  return made;
}

function row(head, ...cells) {
  const made = document.createElement("tr");
  made.append(cell("th", head, "name"), ...cells);
  return made;
}

function state(ready, words) {
  const made = document.createElement("span"), mark = document.createElement("span");
  made.className = ready ? "good" : "bad";
  mark.className = "mark";
  mark.setAttribute("aria-hidden", "true");
  made.append(mark, words);
  return made;
}

const body = (id) => at(id).tBodies[0];

// -- health and live plots --------------------------------------------------------------------------------------------

const PLOTS = [
  plot("Requests", [{ name: "requests_per_s", label: "all" }, { name: "failures_per_s", label: "failed" }], "a second"),
  plot("Latency", [{ name: "p50_ms", label: "p50" }, { name: "p99_ms", label: "p99" }], "ms"),
  plot("Waiting and running", [{ name: "queued_tokens", label: "queued tokens" }, { name: "running", label: "requests inside" }], ""),
  plot("Tokens", [{ name: "tokens_per_s", label: "read and written" }], "a second"),
];
at("plots").append(...PLOTS.map((one) => one.figure));

async function refresh() {
  let status;
  try {
    status = await json("v1/status");
  } catch (error) {
    show(false, error.message);
    return;
  }
  const silent = status.parts.filter((one) => !one.ready);
  show(status.ready, status.ready ? "ready" : `not ready: ${silent.map((one) => one.name).join(", ") || "not checked yet"}`);
  at("version").textContent = status.version;
  at("step").textContent = shown(status.history.step_s);
  body("parts").replaceChildren(...status.parts.map((one) => row(
    one.name,
    cell("td", state(one.ready, one.ready ? "ready" : "not ready")),
    cell("td", shown(one.replicas?.running ?? null), "number"),
    cell("td", one.reason ?? ""),
  )));
  body("queues").replaceChildren(...queues(status));
  PLOTS.forEach((one) => one.show(status.history));
  body("latency").replaceChildren(...Object.entries(status.latency).map(([route, one]) => row(
    route, cell("td", shown(one.count), "number"), cell("td", shown(one.p50_ms), "number"), cell("td", shown(one.p99_ms), "number"),
  )));
}

function queues(status) {
  const groups = [];
  for (const [group, told] of Object.entries(status)) {
    if (!told || typeof told !== "object" || Array.isArray(told) || ["rates", "latency", "history"].includes(group)) continue;
    const parts = Object.values(told).some((one) => one && typeof one === "object") ? Object.entries(told) : [["", told]];
    for (const [id, facts] of parts) groups.push([`${group.replaceAll("_", " ")} ${id}`.trim(), facts]);
  }
  return groups.flatMap(([name, facts]) => Object.entries(facts ?? {})
    .filter(([, value]) => typeof value !== "object")
    .map(([what, value], index) => row(index ? "" : name, cell("td", what.replaceAll("_", " ")), cell("td", shown(value), "number"))));
}

function show(good, words) {
  at("state").className = good ? "good" : "bad";
  if (at("state-text").textContent !== words) at("state-text").textContent = words; // a reader hears changes only
}

// -- models and contexts ----------------------------------------------------------------------------------------------

let models = [];

async function lists() {
  const [found, contexts] = await Promise.allSettled([json("v1/models"), json("v1/contexts?limit=100")]);
  if (found.status === "fulfilled") {
    models = found.value.data;
    showModels();
    const kinds = ["backbone", "expert", "mixture", "auto"];
    options("model", models.filter((one) => kinds.includes(one.x_info?.kind ?? "")).map((one) => [one.id, one.id]));
  } else at("models-said").textContent = found.reason.message;
  if (contexts.status === "fulfilled") {
    const { data, has_more } = contexts.value;
    showContexts(data, has_more);
    options("classify-by", [["", "the examples below"], ...data.map((one) => [one.id, `${one.id.slice(0, 16)} (${one.classes.join(", ").slice(0, 40)})`])]);
  } else at("contexts-said").textContent = contexts.reason.message;
}

function options(id, pairs) {
  const select = at(id), chosen = select.value;
  if (JSON.stringify(pairs) === select.dataset.pairs) return;
  select.dataset.pairs = JSON.stringify(pairs);
  select.replaceChildren(...pairs.map(([value, label]) => new Option(label, value)));
  if (pairs.some(([value]) => value === chosen)) select.value = chosen;
  if (id === "classify-by") by();
}

function showModels() {
  const wanted = at("models-filter").value.trim().toLowerCase();
  const of = models.filter((one) => one.x_info?.kind !== "context" && one.id.toLowerCase().includes(wanted));
  body("models-table").replaceChildren(...of.slice(0, 200).map((one) => row(
    one.id, cell("td", one.x_info?.kind), cell("td", one.parent ?? ""), cell("td", (one.x_info?.digest ?? "").slice(0, 12), "digest"),
  )));
  at("models-said").textContent = of.length > 200 ? `the first 200 of ${of.length}` : `${of.length} of ${models.length}`;
}

function showContexts(contexts, hasMore) {
  body("contexts-table").replaceChildren(...contexts.map((one) => {
    const use = document.createElement("button");
    use.type = "button";
    use.textContent = "Classify by it";
    use.setAttribute("aria-label", `Classify by ${one.id.slice(0, 16)}`);
    use.disabled = !one.usable;
    use.addEventListener("click", () => {
      at("classify-by").value = one.id;
      by();
      at("classify").scrollIntoView();
      at("inputs").focus();
    });
    const accuracy = one.self_check?.accuracy;
    return row(
      one.id.slice(0, 16), cell("td", one.classes.join(", ").slice(0, 80)), cell("td", shown(one.num_examples), "number"),
      cell("td", accuracy === undefined ? "–" : shown(accuracy), "number"), cell("td", new Date(one.created * 1000).toLocaleString()), cell("td", use),
    );
  }));
  at("contexts-said").textContent = contexts.length ? (hasMore ? "the first 100 by id" : "") : "none yet: keep examples above as one";
}

at("models-filter").addEventListener("input", showModels);

// -- classify ---------------------------------------------------------------------------------------------------------

const lines = (id) => at(id).value.split("\n").map((one) => one.trim()).filter(Boolean);

function examples() {
  return lines("examples").map((line, index) => {
    const cut = line.indexOf("|");
    if (cut < 1) throw new Refused(`example ${index + 1} has no label: write it as label | text`);
    return { label: line.slice(0, cut).trim(), text: line.slice(cut + 1).trim() };
  });
}

function by() {
  at("examples-part").hidden = at("classify-by").value !== "";
  at("keep").disabled = at("classify-by").value !== "";
}

async function guarded(problem, work) {
  at(problem).textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") at(problem).textContent = error.message;
  }
}

function receipt(id, told) {
  const details = at(id);
  details.hidden = !told;
  details.querySelector("pre").textContent = told ? JSON.stringify(told, null, 2) : "";
}

at("classify-by").addEventListener("change", by);
at("classify-form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded("classify-problem", async () => {
    const inputs = lines("inputs"), model = at("classify-by").value;
    if (!inputs.length) throw new Refused("there is no text to label");
    at("classify-said").textContent = "asking";
    const begin = performance.now();
    let answer;
    try {
      answer = await json("v1/classify", { body: { inputs, ...(model ? { model } : { examples: examples() }) } });
    } finally {
      at("classify-said").textContent = "";
    }
    at("labels").parentElement.hidden = false;
    body("labels").replaceChildren(...answer.results.map((one, index) => row(
      inputs[index], cell("td", one.label ?? "none"), cell("td", shares(one.probabilities, answer.classes)),
    )));
    at("classify-said").textContent = `${inputs.length} labelled in ${Math.round(performance.now() - begin)} ms`;
    receipt("classify-receipt", answer.receipt);
  });
});

function shares(probabilities, classes) {
  const pairs = Array.isArray(probabilities) ? probabilities.map((one, i) => [classes[i], one]) : Object.entries(probabilities);
  const made = document.createElement("div");
  made.append(...pairs.sort((a, b) => b[1] - a[1]).slice(0, 6).map(([label, share]) => {
    const line = document.createElement("div"), name = document.createElement("span"), meter = document.createElement("meter");
    line.className = "share";
    name.textContent = label;
    meter.value = share;
    meter.setAttribute("aria-label", `probability of ${label}`);
    line.append(name, meter, share.toFixed(3));
    return line;
  }));
  return made;
}

at("keep").addEventListener("click", () => guarded("classify-problem", async () => {
  const made = await json("v1/contexts", { body: { examples: examples() } });
  await lists();
  at("classify-by").value = made.id;
  by();
  at("classify-said").textContent = `${made.id.slice(0, 16)} ${made.cached ? "was kept already" : "is kept"}`;
}));

// -- generate ---------------------------------------------------------------------------------------------------------

let running = null;

at("generate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded("generate-problem", async () => {
    running?.abort();
    const mine = (running = new AbortController());
    at("answer").textContent = at("generate-said").textContent = "";
    receipt("generate-receipt", null);
    at("generate-stop").disabled = false;
    const begin = performance.now();
    let first = null, usage = null;
    try {
      const response = await ask("v1/chat/completions", {
        signal: mine.signal,
        body: {
          model: at("model").value,
          messages: [{ role: "user", content: at("prompt").value }],
          temperature: Number(at("temperature").value),
          max_tokens: Number(at("max-tokens").value),
          stream: true,
          stream_options: { include_usage: true },
        },
      });
      for await (const event of events(response)) {
        if (event.error) throw new Refused(event.error.message);
        const text = event.choices[0]?.delta?.content;
        if (text) {
          first ??= performance.now() - begin;
          at("answer").append(text);
        }
        usage = event.usage ?? usage;
        if (event.receipt) receipt("generate-receipt", event.receipt);
      }
    } finally {
      if (running === mine) {
        at("generate-stop").disabled = true;
        running = null;
      }
    }
    const seconds = (performance.now() - begin) / 1000;
    at("generate-said").textContent =
      `${shown(usage?.completion_tokens)} tokens in ${seconds.toFixed(2)} s; the first text after ${Math.round(first ?? 0)} ms`;
  });
});
at("generate-stop").addEventListener("click", () => {
  running?.abort();
  at("generate-said").textContent = "stopped";
});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((one) => one.startsWith("data: ")).map((one) => one.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// -- the map of tasks -------------------------------------------------------------------------------------------------

let mapPage = null;

at("map-draw").addEventListener("click", () => guarded("map-problem", async () => {
  mapPage = await (await ask("v1/tasks/map")).text();
  at("map").hidden = false;
  at("map").src = "console/frame.html"; // it says when it is ready to show the page, in an origin of its own
}));
addEventListener("message", (event) => {
  if (event.source === at("map").contentWindow && event.data === "ready" && mapPage !== null) {
    at("map").contentWindow.postMessage(mapPage, "*");
  }
});

// -- now and again ----------------------------------------------------------------------------------------------------

async function again(work, pause) {
  for (;;) {
    if (document.visibilityState === "visible") await work();
    await new Promise((done) => setTimeout(done, pause));
  }
}
by();
again(refresh, POLL_MS);
again(lists, LISTS_MS);
