// A conversation: turns that stream, that can be stopped, edited and asked again; kept over a reload, in this tab.

import { showCards } from "./card.js";
import { find, make, nameOf, offer, stream } from "./server.js";
import { Settings } from "./settings.js";
import { copy, showSnippet } from "./snippet.js";

const STORE = "conversation";
const PATH = "/v1/chat/completions";
const COARSE = matchMedia("(pointer: coarse)"); // fingers, and a keyboard that covers half of the screen

const select = find("#talk-model");
const system = find("#talk-system");
const question = find("#question");
const turnsBox = find("#turns");
const buttons = { ask: find("#ask"), stop: find("#talk-stop"), new: find("#talk-new"), code: find("#talk-code") };
const settings = new Settings(() => save());

let models = [];
let turns = []; // { role, content, facts }, as shown; an answer's facts are a sentence
let abort = null; // while an answer comes
let outdated = () => {};

const model = () => models.find((each) => each.id === select.value);

// -- what is kept over a reload --

function save() {
  const kept = { turns, system: system.value, draft: question.value, model: select.value, settings: settings.values };
  // A conversation of megabytes does not fit; it goes on all the same.
  try { sessionStorage.setItem(STORE, JSON.stringify(kept)); } catch { /* as if nothing were kept */ }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
    const isTurn = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
    turns = (kept.turns ?? []).filter(isTurn).map(({ role, content, facts }) => ({ role, content, facts: String(facts ?? "") }));
    if (turns.at(-1)?.role === "assistant" && !turns.at(-1).content) turns.pop();
    system.value = kept.system ?? "";
    question.value = kept.draft ?? "";
    settings.values = kept.settings ?? {};
    find("#talk-system-box").open = Boolean(system.value);
    return String(kept.model ?? "");
  } catch { return ""; }
}

// -- what is asked --

function body() {
  const { max_tokens: most, ...rest } = settings.values;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
  return { model: select.value, messages, max_completion_tokens: most, ...rest };
}

// Ask for an answer to the last question, and show it as it comes.
async function answer() {
  const number = turns.push({ role: "assistant", content: "", facts: "" }) - 1;
  const turn = turns[number];
  const asked = body();
  asked.messages.pop();
  abort = new AbortController();
  draw();
  follow(true);
  const shown = turnsBox.lastElementChild;
  shown.classList.add("running");
  turnsBox.setAttribute("aria-busy", "true");
  const said = find(".said", shown);
  const began = performance.now();
  let first = 0, usage = null, ending = "", version = "", failure = null;
  try {
    const options = { ...asked, stream: true, stream_options: { include_usage: true } };
    for await (const event of stream(PATH, options, abort.signal, (found) => version = found)) {
      usage = event.usage ?? usage;
      const atEnd = isAtEnd();
      for (const choice of event.choices) {
        if (choice.delta?.content) {
          first ||= performance.now();
          turn.content += choice.delta.content;
          said.append(choice.delta.content);
        }
        ending = choice.finish_reason ?? ending;
      }
      turn.facts = describe(first - began, first && performance.now() - first, usage, version, ending, asked.max_completion_tokens);
      find(".facts", shown).textContent = turn.facts;
      if (atEnd) follow();
    }
  } catch (error) {
    if (error.name === "AbortError") turn.facts = [turn.facts, "stopped"].filter(Boolean).join(" · ");
    else failure = error;
  }
  abort = null;
  turnsBox.setAttribute("aria-busy", "false");
  if (!turn.content && !ending) turns.splice(number, 1); // the question can be asked again
  const atEnd = isAtEnd();
  draw(failure);
  if (atEnd) follow();
  save();
  if (version && version !== model()?.version) outdated();
}

function describe(firstAfter, seconds, usage, version, ending, most) {
  const parts = [];
  const tokens = usage?.completion_tokens;
  if (tokens !== undefined) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) * 1000 / seconds).toFixed(1)} tokens/s`);
  if (firstAfter > 0) parts.push(`first after ${Math.round(firstAfter)} ms`);
  const again = usage?.prompt_tokens_details?.cached_tokens;
  if (again) parts.push(`${again} of ${usage.prompt_tokens} prompt tokens reused`);
  parts.push(`version ${version}`);
  if (ending === "length" && tokens !== undefined) parts.push(tokens >= most ? "cut at Max tokens" : "the context is full");
  return parts.join(" · ");
}

function submit() {
  const text = question.value.trim();
  if (!text || buttons.ask.disabled) return;
  turns.push({ role: "user", content: text });
  question.value = "";
  save();
  answer();
}

// Drop everything after a turn, and ask again from there.
function askAgain(number) {
  if (abort) return;
  turns.length = number + 1;
  save();
  answer();
  question.focus();
}

// -- what is seen --

const isAtEnd = () => find("#asking").getBoundingClientRect().top >= turnsBox.getBoundingClientRect().bottom - 40;

// Scroll the newest words above the field; not for somebody who has scrolled up to read.
function follow(always = false) {
  const hidden = turnsBox.getBoundingClientRect().bottom - find("#asking").getBoundingClientRect().top;
  if (hidden > 0 || always) scrollBy({ top: Math.max(0, hidden + 12) });
}

function action(name, label, act) {
  const button = make("button", { type: "button", className: "small", textContent: name });
  button.setAttribute("aria-label", label);
  button.addEventListener("click", act);
  return button;
}

function draw(failure = null) {
  turnsBox.replaceChildren(...turns.map((turn, number) => drawTurn(turn, number, failure)));
  if (!turns.length) turnsBox.append(make("p", { className: "empty", textContent: "The conversation appears here." }));
  refresh();
}

function drawTurn(turn, number, failure) {
  const element = find("#turn").content.firstElementChild.cloneNode(true);
  const isUser = turn.role === "user", isLast = number === turns.length - 1;
  element.classList.add(turn.role);
  find("h2", element).textContent = isUser ? "You" : model()?.name ?? "Model";
  find(".said", element).textContent = turn.content;
  if (!isUser && !turn.content && !abort) find(".said", element).append(make("em", { textContent: "It ended without a word." }));
  find(".facts", element).textContent = turn.facts ?? "";
  const actions = find(".actions", element);
  if (!abort) {
    const words = `${isUser ? "question" : "answer"} ${Math.floor(number / 2) + 1}`;
    if (isUser) actions.append(action("Edit", `Edit ${words}`, () => edit(element, number)));
    if (isLast) actions.append(action("Ask again", "Ask the last question again", () => askAgain(isUser ? number : number - 1)));
    actions.append(action("Copy", `Copy ${words}`, async ({ target }) => { if (await copy(turn.content)) target.textContent = "Copied"; }));
  }
  if (isLast && failure) {
    find(".error", element).textContent = failure.message;
    if (failure.code === "context_length_exceeded" && turns.length > 2) {
      actions.prepend(action("Forget the first turns", "Forget the first question and its answer, and ask again", forgetFirst));
    }
  }
  return element;
}

// The oldest question goes, and what was answered to it.
function forgetFirst() {
  const next = turns.findIndex((turn, number) => number > 0 && turn.role === "user");
  turns.splice(0, next);
  askAgain(turns.length - 1);
}

function edit(element, number) {
  const field = make("textarea", { value: turns[number].content, dir: "auto", rows: Math.min(12, turns[number].content.split("\n").length + 1) });
  field.setAttribute("aria-label", "Your question, changed");
  const later = turns.length - number - 1;
  const done = () => { draw(); find(`.turn:nth-child(${number + 1}) .actions button`, turnsBox)?.focus(); };
  const send = () => {
    if (!field.value.trim()) return;
    turns[number] = { role: "user", content: field.value.trim() };
    askAgain(number);
  };
  const bar = make("div", { className: "bar" },
    make("span", { className: "hint", textContent: later ? "What followed is dropped." : "" }),
    action("Cancel", "Cancel the change", done), action("Ask this", "Ask the changed question", send));
  bar.lastElementChild.classList.add("main");
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); done(); }
    if (sends(event)) { event.preventDefault(); send(); }
  });
  find(".said", element).replaceWith(field);
  find(".foot", element).replaceWith(bar);
  field.focus();
}

// Enter asks, but for input methods that use it, and for phones, whose keyboards have nothing else to begin a line.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && !COARSE.matches;

function refresh() {
  const talks = Boolean(model()?.chat);
  find("#talk-none").hidden = talks || !models.length;
  if (!talks && models.length) find("#talk-none").replaceChildren(...explain(model()));
  find("#asking").hidden = !talks;
  turnsBox.hidden = !talks && !turns.length;
  buttons.ask.disabled = !talks || Boolean(abort) || !question.value.trim();
  buttons.stop.disabled = !abort;
  buttons.new.disabled = Boolean(abort) || !turns.length;
  buttons.code.disabled = !talks || !(turns.length || question.value.trim());
}

// Why a version does not talk, and how one comes to that does.
function explain(found) {
  const talker = models.find((each) => each.chat);
  const instead = talker
    ? make("button", { type: "button", textContent: `Talk with ${nameOf(talker)}` })
    : make("a", { href: "?complete", textContent: "Complete a text instead" });
  if (talker) instead.addEventListener("click", () => { select.value = talker.id; chosen(); question.focus(); });
  return [
    make("h2", { textContent: `${nameOf(found)} does not talk` }),
    make("p", { textContent: "It has no chat template, because it was not trained on conversations: it continues texts. To get one that talks, train it further on conversations, for instance a JSONL of messages, and register what comes of it:" }),
    make("pre", { tabIndex: 0, textContent: `python -m jobs.pipeline PRESET name=${found.name}-chat start.model=models:/${found.name}/${found.version} tokenizer.kind=start source.kind=conversations 'source.paths=[talks.jsonl]'` }),
    make("p", {}, instead),
  ];
}

function chosen() {
  settings.limit(model());
  showCards([model()]);
  save();
  draw();
}

export const talk = {
  stop() { abort?.abort(); },
  about() { showCards([model()]); },
  enter() {
    refresh();
    showCards([model()]);
    if (find("#asking").hidden) return;
    if (!COARSE.matches) question.focus();
    follow(true);
  },
  offer(found, wanted) {
    models = found;
    offer(select, models, (each) => nameOf(each) + (each.chat ? "" : ": completes text only"));
    const kept = models.find((each) => each.id === restored);
    const start = wanted ?? kept ?? models.find((each) => each.chat);
    if (start) select.value = start.id;
    restored = select.value;
    settings.limit(model());
    draw();
  },
  onOutdated(reload) { outdated = reload; },
};

find("#talk-settings").append(settings.element);
settings.put("max_tokens", 256);
let restored = restore();
settings.element.addEventListener("change", save);
select.addEventListener("change", () => { restored = select.value; chosen(); });
system.addEventListener("input", save);
question.addEventListener("input", () => { save(); refresh(); });
question.addEventListener("keydown", (event) => { if (sends(event)) { event.preventDefault(); submit(); } });
find("#asking").addEventListener("submit", (event) => { event.preventDefault(); submit(); question.focus(); });
buttons.stop.addEventListener("click", () => { talk.stop(); question.focus(); });
buttons.new.addEventListener("click", () => { turns = []; save(); draw(); question.focus(); });
buttons.code.addEventListener("click", () => {
  const asked = body();
  if (question.value.trim()) asked.messages.push({ role: "user", content: question.value.trim() });
  else while (asked.messages.at(-1)?.role === "assistant") asked.messages.pop();
  showSnippet(PATH, asked);
});
addEventListener("pagehide", save);
