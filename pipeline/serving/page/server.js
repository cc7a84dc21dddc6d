// What every part of the page needs: elements, requests to the server, and streamed answers.

export const find = (selector, root = document) => root.querySelector(selector);

// Text goes in as text nodes alone: nothing that a model or a person writes is ever read as HTML.
export const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

export const hasKey = () => Boolean(sessionStorage.getItem("api-key"));

function headers() {
  const key = sessionStorage.getItem("api-key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export async function ask(path, options = {}) {
  let answer;
  try { answer = await fetch(path, { ...options, headers: headers() }); }
  catch (error) { if (error.name === "AbortError") throw error; throw new Error("The server does not answer."); }
  if (answer.ok) return answer;
  if (answer.status === 401) find("#key").hidden = false;
  const body = await answer.json().catch(() => null);
  throw Object.assign(new Error(body?.error?.message ?? `The server answered ${answer.status}.`), { code: body?.error?.code });
}

// The events of a streamed answer, parsed; throws where it broke off or the server says why it cannot go on.
export async function* stream(path, body, signal, opened) {
  const answer = await ask(path, { method: "POST", body: JSON.stringify(body), signal });
  opened(answer.headers.get("x-model-version"));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke off before the answer was whole.");
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The versions in service, each once, though several names may lead to it.
export async function listModels() {
  const listed = await ask("/v1/models").then((answer) => answer.json());
  const versions = new Map();
  // The plain name is the first of the others under a shorter name.
  for (const entry of listed.data.filter((model) => model.id !== model.name)) {
    if (versions.has(entry.version)) versions.get(entry.version).selectors.push(entry.selector);
    else versions.set(entry.version, { ...entry, selectors: [entry.selector] });
  }
  return [...versions.values()];
}

export const nameOf = (model) => {
  const names = model.selectors.filter((selector) => selector !== model.version);
  return `${model.name} version ${model.version}${names.length ? ` (${names.join(", ")})` : ""}`;
};

// Fill a select with versions; keeps what was chosen.
export function offer(select, models, label = nameOf) {
  const chosen = select.value;
  select.replaceChildren(...models.map((model) => make("option", { value: model.id, textContent: label(model) })));
  if (models.some((model) => model.id === chosen)) select.value = chosen;
}
