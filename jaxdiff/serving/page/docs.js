// The server's OpenAPI description as people read it.

import { $, ask, say } from "./common.js";

function element(tag, text = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function resolved(schema, all) {
  return schema && schema.$ref ? all.components.schemas[schema.$ref.split("/").pop()] : schema;
}

// What a value may be, in few words.
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.type === "array") return `list of ${kind(schema.items || {})}`;
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const high = schema.maximum ?? schema.exclusiveMaximum;
  const range = [low === undefined ? "" : `from ${low}`, high === undefined ? "" : `to ${high}`].filter(Boolean);
  return [schema.type || "anything", ...range].join(" ");
}

function table(schema) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const name of ["field", "kind", "default", "meaning"]) head.append(element("th", name));
  const body = made.createTBody();
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const row = body.insertRow();
    const needed = (schema.required || []).includes(name);
    const value = needed ? "needed" : field.default === undefined ? "" : JSON.stringify(field.default);
    for (const text of [name, kind(field), value, field.description || ""]) row.append(element("td", text));
  }
  const frame = element("div");
  frame.className = "wide";
  frame.append(made);
  return frame;
}

function described(path, method, operation, all) {
  const made = element("details");
  const summary = element("summary");
  summary.append(element("code", `${method.toUpperCase()} ${path}`));
  made.append(summary);
  if (operation.description) made.append(element("p", operation.description));
  const asked = (operation.parameters || []).map((each) => [each.name, { ...each.schema, description: each.description }]);
  if (asked.length) made.append(table({ properties: Object.fromEntries(asked) }));
  const content = operation.requestBody ? Object.entries(operation.requestBody.content) : [];
  for (const [type, { schema }] of content) made.append(element("p", type), table(resolved(schema, all)));
  return made;
}

async function start() {
  const all = await (await ask("openapi.json")).json();
  const groups = new Map();
  for (const [path, methods] of Object.entries(all.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const group = (operation.tags || ["server"])[0];
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(described(path, method, operation, all));
    }
  }
  for (const [group, parts] of groups) $("operations").append(element("h2", group), ...parts);
}

start().catch((error) => say(error.message, true));
