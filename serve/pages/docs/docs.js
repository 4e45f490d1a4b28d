// Shows /openapi.json. Everything is made of text nodes: nothing of the document is ever read as HTML.
"use strict";

const METHODS = ["get", "post", "put", "delete"];
const byId = (id) => document.getElementById(id);

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((one) => one !== null && one !== undefined));
  return node;
}

const nameOf = (ref) => ref.split("/").pop();

function resolved(schema, root) {
  return schema.$ref ? schema.$ref.split("/").slice(1).reduce((found, step) => found[step], root) : schema;
}

function kindOf(schema, root) {
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.anyOf) return [...new Set(schema.anyOf.map((one) => kindOf(one, root)))].join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array") {
    if (schema.prefixItems) return `[${schema.prefixItems.map((one) => kindOf(one, root)).join(", ")}]`;
    return `list of ${schema.items ? kindOf(schema.items, root) : "anything"}`;
  }
  if (schema.type === "object" && schema.additionalProperties && !schema.properties) {
    const values = schema.additionalProperties === true ? "anything" : kindOf(schema.additionalProperties, root);
    return `object of ${values}`;
  }
  return schema.type || "anything";
}

function boundsOf(schema) {
  const of = { ...(schema.anyOf || []).find((one) => one.type !== "null"), ...schema };
  const said = [];
  for (const [key, text] of [["minimum", "from"], ["exclusiveMinimum", "above"], ["maximum", "to"], ["maxLength", "at most characters:"],
    ["minItems", "at least items:"], ["maxItems", "at most items:"]]) if (key in of) said.push(`${text} ${of[key]}`);
  if ("default" in schema && schema.default !== null) said.push(`default ${JSON.stringify(schema.default)}`);
  return said.join(", ");
}

/** What has fields of its own inside a schema: itself, the items of a list, one of several. */
function objectsIn(schema, root, found = []) {
  const here = resolved(schema, root);
  if (here.properties) found.push(here);
  else if (here.items) objectsIn(here.items, root, found);
  else for (const one of here.anyOf || []) objectsIn(one, root, found);
  return found;
}

function fields(schema, root, seen) {
  const list = make("ul", { className: "fields" });
  const required = new Set(schema.required || []);
  for (const [name, one] of Object.entries(schema.properties)) {
    if (one.deprecated) continue;
    const bounds = boundsOf(one);
    const item = make("li", {},
      make("code", { className: required.has(name) ? "must" : "", textContent: name }), " ",
      make("span", { className: "kind", textContent: kindOf(one, root) }),
      required.has(name) ? " · required" : null,
      bounds ? make("span", { className: "note", textContent: ` · ${bounds}` }) : null,
      one.description ? make("div", { className: "note", textContent: one.description }) : null);
    for (const inner of objectsIn(one, root)) if (!seen.includes(inner)) item.append(fields(inner, root, [...seen, inner]));
    list.append(item);
  }
  return list;
}

function shape(schema, root) {
  const box = make("div", {}, make("p", { className: "kind", textContent: kindOf(schema, root) }));
  for (const one of objectsIn(schema, root)) box.append(fields(one, root, [one]));
  return box;
}

function parameters(operation, root) {
  const rows = operation.parameters.map((given) => {
    const one = resolved(given, root);
    const bounds = boundsOf(one.schema);
    return make("tr", {}, make("td", {}, make("code", { textContent: one.name })), make("td", { textContent: one.in }),
      make("td", { textContent: kindOf(one.schema, root) + (bounds ? ` (${bounds})` : "") }),
      make("td", { textContent: one.description || (one.required ? "required" : "") }));
  });
  const head = make("tr", {}, ...["Name", "Where", "Kind", "Says"].map((text) => make("th", { scope: "col", textContent: text })));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function inside(path, method, operation, root) {
  const box = make("div", { className: "inside" });
  const scope = (operation.security || []).flatMap((one) => one.key || []);
  box.append(make("p", { className: "note", textContent:
    `${operation.operationId}, also over gRPC` + (scope.length ? `; needs a key with the scope ${scope[0]}` : "") }));
  box.append(make("h3", { textContent: "Parameters" }), parameters(operation, root));
  for (const [type, one] of Object.entries(operation.requestBody?.content || {})) {
    box.append(make("h3", { textContent: `Body: ${type}` }), shape(one.schema, root));
  }
  for (const [status, answer] of Object.entries(operation.responses).filter(([status]) => status < "300")) {
    for (const [type, one] of Object.entries(answer.content)) {
      box.append(make("h3", { textContent: `Answer ${status}: ${type}` }), shape(one["x-event"] || one.schema, root));
    }
  }
  const refused = Object.entries(operation.responses).filter(([status]) => status >= "300");
  box.append(make("h3", { textContent: "Refusals, in the envelope Error" }),
    make("ul", { className: "fields" }, ...refused.map(([status, one]) =>
      make("li", {}, make("code", { textContent: status }), ` ${resolved(one, root).description}`))));
  const line = [`curl -X ${method.toUpperCase()} ${location.origin}${path}`];
  if (scope.length) line.push("-H 'authorization: Bearer <key>'");
  if (operation.requestBody?.content["application/json"]) line.push("-H 'content-type: application/json' -d @body.json");
  box.append(make("h3", { textContent: "With curl" }), make("pre", { tabIndex: 0, textContent: line.join(" \\\n  ") }));
  return box;
}

function call(path, method, operation, root) {
  const summary = make("summary", {},
    make("span", { className: `method ${method}`, textContent: method.toUpperCase() }),
    make("code", { textContent: path }),
    make("span", { className: "says", textContent: operation.summary }));
  const box = make("details", { className: "call", id: operation.operationId }, summary);
  box.dataset.words = `${method} ${path} ${operation.operationId} ${operation.summary} ${operation.tags}`.toLowerCase();
  box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(inside(path, method, operation, root)); });
  return box;
}

function show(root) {
  byId("version").textContent = root.info.version;
  byId("about").textContent = root.info.description;
  byId("wait").remove();
  for (const { name } of root.tags) {
    const id = `tag-${name.replaceAll(" ", "-")}`;
    const part = make("section", { id }, make("h2", { textContent: name }));
    for (const [path, methods] of Object.entries(root.paths)) {
      for (const method of METHODS) if (methods[method]?.tags.includes(name)) part.append(call(path, method, methods[method], root));
    }
    byId("calls").append(part);
    byId("tags").append(make("a", { href: `#${id}`, textContent: name }));
  }
  const calls = [...document.querySelectorAll("details.call")];
  const filter = () => {
    const words = byId("filter").value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const one of calls) {
      one.hidden = !words.every((word) => one.dataset.words.includes(word));
      count += !one.hidden;
    }
    for (const part of document.querySelectorAll("main section")) part.hidden = !part.querySelector("details:not([hidden])");
    byId("count").textContent = `${count} of ${calls.length} calls`;
  };
  byId("filter").addEventListener("input", filter);
  filter();
  openNamed();
  addEventListener("hashchange", openNamed);
}

/** The call that the address names. */
function openNamed() {
  const wanted = location.hash && byId(location.hash.slice(1));
  if (wanted) {
    wanted.open = true;
    wanted.scrollIntoView();
  }
}

fetch("/openapi.json").then((answer) => answer.json()).then(show).catch((error) => {
  byId("calls").replaceChildren(make("p", { role: "alert", textContent: `The document could not be read: ${error}` }));
});
