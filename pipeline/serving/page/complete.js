// Completion: one text, continued by one version, or by two side by side; every token says how likely it was.

import { showCards } from "./card.js";
import { find, make, nameOf, offer, stream } from "./server.js";
import { Settings } from "./settings.js";
import { showSnippet } from "./snippet.js";

const SHOWN_PROMPT = 300, SHOWN_LINES = 5; // of the prompt's end, before an answer
const NARROW = matchMedia("(max-width: 760px)");

const prompt = find("#prompt");
const buttons = Object.fromEntries(["run", "stop", "continue", "compare", "code"].map((id) => [id, find(`#${id}`)]));
const panes = [];
let models = [];
let running = false;
let outdated = () => {};

// -- one pane: a version, its settings, its answer --

class Pane {
  constructor() {
    this.element = find("#pane").content.firstElementChild.cloneNode(true);
    for (const name of ["text", "error", "rate", "facts", "controls"]) this[name] = find(`.${name}`, this.element);
    this.select = find("select", this.element);
    this.select.addEventListener("change", () => { this.settings.limit(this.model); showPaneCards(); });
    this.settings = new Settings();
    this.controls.append(this.settings.element);
    this.controls.open = !NARROW.matches;
    this.select.addEventListener("change", () => this.name());
    this.text.addEventListener("keydown", (event) => this.walk(event));
    this.answer = "";
  }

  offer() {
    offer(this.select, models);
    find(".wide", this.element).hidden = models.length < 2;
    this.settings.limit(this.model);
    this.name();
  }

  choose(model) {
    this.select.value = model.id;
    this.settings.limit(model);
    this.name();
  }

  // Closed, the settings still say which version answers.
  name() { find("summary", this.controls).textContent = models.length > 1 ? `${nameOf(this.model)}: settings` : "Settings"; }

  get model() { return models.find((model) => model.id === this.select.value); }

  get body() { return { model: this.select.value, prompt: prompt.value, ...this.settings.values }; }

  async run() {
    this.abort = new AbortController();
    this.answer = "";
    this.error.textContent = this.rate.textContent = this.facts.textContent = "";
    this.text.replaceChildren(...givenOf(prompt.value));
    this.element.classList.add("running");
    this.text.setAttribute("aria-busy", "true");
    const bytes = new TextDecoder();
    const began = performance.now();
    let first = 0, count = 0, ending = "", version = "";
    try {
      // A text that has grown over the context goes on from its end.
      const body = { ...this.body, truncate_prompt_tokens: -1, logprobs: 5, stream: true, stream_options: { include_usage: true } };
      for await (const { choices } of stream("/v1/completions", body, this.abort.signal, (found) => version = found)) {
        for (const choice of choices) {
          first ||= performance.now();
          this.answer += choice.text;
          const tokens = choice.logprobs?.tokens ?? [];
          count += tokens.length;
          this.text.append(...tokens.map((token, i) => tokenSpan(token, choice.logprobs.token_logprobs[i], choice.logprobs.top_logprobs[i], bytes)));
          ending = choice.finish_reason ?? ending;
        }
        const seconds = (performance.now() - first) / 1000;
        this.rate.textContent = count > 1 && seconds > 0 ? `${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
        this.facts.textContent = `${count} token${count === 1 ? "" : "s"} · first after ${Math.round(first - began)} ms · version ${version}`;
      }
      if (ending === "stop") this.facts.textContent += " · ended by itself";
    } catch (error) {
      if (error.name === "AbortError") this.facts.textContent += " · stopped";
      else this.error.textContent = error.message;
    } finally {
      this.element.classList.remove("running");
      this.text.setAttribute("aria-busy", "false");
    }
    if (version && version !== this.model?.version) outdated();
  }

  // Left and right walk through the tokens, so that the keyboard sees what the mouse sees.
  walk(event) {
    const tokens = [...this.text.querySelectorAll(".token")];
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !tokens.length) return;
    event.preventDefault();
    const at = tokens.indexOf(document.activeElement);
    tokens[Math.min(tokens.length - 1, Math.max(0, at < 0 ? 0 : at + step))].focus();
  }
}

// The prompt before its answer; of a long one only the end, so that the answer stays in sight.
function givenOf(text) {
  const lines = text.split("\n");
  if (text.length <= SHOWN_PROMPT * 1.3 && lines.length <= SHOWN_LINES + 2) return [make("span", { className: "given", textContent: text })];
  const end = lines.slice(-SHOWN_LINES).join("\n").slice(-SHOWN_PROMPT).replace(/^[\udc00-\udfff]/, "");
  const given = make("span", { className: "given", textContent: `…${end}` });
  const whole = make("button", { type: "button", className: "small", textContent: `Show the whole prompt (${text.length.toLocaleString("en")} characters)` });
  whole.addEventListener("click", () => { given.textContent = text; whole.remove(); });
  return [whole, given];
}

function bytesOf(token) {
  if (!token.startsWith("bytes:\\x")) return new TextEncoder().encode(token);
  return Uint8Array.from(token.slice(8).split("\\x"), (hex) => parseInt(hex, 16));
}

function tokenSpan(token, logprob, top, decoder) {
  const probability = Math.exp(logprob);
  const span = make("span", { className: "token", tabIndex: -1, textContent: decoder.decode(bytesOf(token), { stream: true }) });
  // Linear in the surprise: one bit is a hint of colour, eight and more are all of it.
  span.style.setProperty("--doubt", (0.62 * Math.min(1, -logprob / Math.LN2 / 8)).toFixed(3));
  span.about = { token, probability, top };
  return span;
}

// -- what the other choices were --

const percent = (p) => p >= 0.9995 ? "100 %" : p >= 0.1 ? `${(p * 100).toFixed(0)} %` : `${(p * 100).toPrecision(2)} %`;

function showTip(span) {
  const { token, probability, top } = span.about;
  const rows = Object.entries(top ?? {}).map(([text, logprob]) => [text, Math.exp(logprob)]);
  if (!rows.some(([text]) => text === token)) rows.push([token, probability]);
  rows.sort((a, b) => b[1] - a[1]);
  const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^bytes:/, "");
  const table = make("table", {}, ...rows.map(([text, p]) => {
    const bar = make("i");
    bar.style.width = `${Math.max(1, p * 90)}px`;
    return make("tr", { className: text === token ? "chosen" : "" }, make("td", { textContent: visible(text) }), make("td", { textContent: percent(p) }), make("td", {}, bar));
  }));
  const tip = find("#tip");
  tip.replaceChildren(table);
  tip.hidden = false;
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const below = place.bottom + tip.offsetHeight + 14 < innerHeight;
  tip.style.top = `${below ? place.bottom + 7 : Math.max(6, place.top - tip.offsetHeight - 7)}px`;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
}

const hideTip = () => find("#tip").hidden = true;
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, ({ target }) => target.about ? showTip(target) : hideTip());
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", hideTip, { passive: true });

// -- all panes --

function refresh() {
  buttons.run.disabled = running || !models.length;
  buttons.code.disabled = !models.length;
  buttons.stop.disabled = !running;
  buttons.continue.disabled = running || !panes[0].answer;
  buttons.compare.textContent = models.length > 1 ? "Compare" : "Compare settings";
  buttons.compare.title = models.length > 1 ? "Two versions side by side" : "One version is served: compare two settings of it";
}

async function run() {
  if (buttons.run.disabled) return;
  hideTip();
  running = true;
  refresh();
  const done = Promise.all(panes.map((pane) => pane.run()));
  const place = panes[0].text.getBoundingClientRect();
  if (place.top > innerHeight - 120) panes[0].text.scrollIntoView({ block: "center" });
  await done;
  running = false;
  refresh();
}

function compare(two) {
  buttons.compare.setAttribute("aria-pressed", two);
  find("#panes").className = two ? "two" : "";
  if (two && panes.length === 1) {
    const pane = new Pane();
    panes.push(pane);
    pane.offer();
    pane.settings.values = panes[0].settings.values;
    const other = models.find((model) => model.version !== panes[0].model?.version);
    if (other) pane.choose(other);
  }
  if (!two) panes.splice(1).forEach((pane) => pane.abort?.abort());
  find("#panes").replaceChildren(...panes.map((pane) => pane.element));
  showPaneCards();
}

const showPaneCards = () => showCards(panes.map((pane) => pane.model));

export const completion = {
  stop() { hideTip(); panes.forEach((pane) => pane.abort?.abort()); },
  about: showPaneCards,
  enter() { refresh(); showPaneCards(); prompt.focus(); },
  offer(found, wanted) {
    models = found;
    panes.forEach((pane) => pane.offer());
    if (wanted) panes[0].choose(wanted);
    refresh();
  },
  onOutdated(reload) { outdated = reload; },
};

buttons.run.addEventListener("click", run);
buttons.stop.addEventListener("click", completion.stop);
buttons.code.addEventListener("click", () => showSnippet("/v1/completions", panes[0].body));
buttons.compare.addEventListener("click", () => compare(panes.length === 1));
buttons.continue.addEventListener("click", () => { prompt.value += panes[0].answer; run(); });
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
});
panes.push(new Pane());
compare(false);
