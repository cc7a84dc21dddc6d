// The model's card: where it comes from, how good it is, and how its loss fell.

import { ask, find, make, nameOf } from "./server.js";

const wording = (count) => count >= 1e9 ? `${(count / 1e9).toFixed(2)} billion` : count >= 1e6 ? `${(count / 1e6).toFixed(1)} million` : count.toLocaleString("en");

export async function showCards(models) {
  const shown = [...new Set(models.filter(Boolean))];
  const cards = await Promise.all(shown.map(async (model) => {
    const card = await ask(`/v1/models/${encodeURIComponent(model.id)}/card`).then((answer) => answer.json()).catch(() => ({}));
    return cardOf(model, card);
  }));
  find("#cards").className = cards.length > 1 ? "two" : "";
  find("#cards").replaceChildren(...cards);
  const [model] = shown;
  if (!model) return;
  find("#name").textContent = document.title = model.name;
  find("#summary").textContent = `${wording(model.num_parameters)} parameters${model.bits_per_byte === null ? "" : `, ${model.bits_per_byte.toFixed(3)} bits per byte`}`;
}

function cardOf(model, card) {
  const facts = [
    ["Version", nameOf(model)], ["Registered", new Date(model.created * 1000).toLocaleString()],
    ["Parameters", model.num_parameters.toLocaleString("en")],
    ["Bits per byte", model.bits_per_byte === null ? "not measured" : make("span", {}, model.bits_per_byte.toFixed(4), make("small", { textContent: " for each byte of text it has not seen; fewer is better" }))],
    ["Weights", `stored as ${model.weights}: ${costOf(model.probe_bits_per_byte_change)}`],
    ["Context", `${model.context_length.toLocaleString("en")} tokens`], ["Vocabulary", `${model.vocabulary_size.toLocaleString("en")} tokens`],
    ["Talks", model.chat ? "yes: it was trained on conversations" : "no: it completes text"],
    ["Training run", runOf(model, card)],
    ["Data", make("code", { textContent: model.data_digest.slice(0, 12) || "unknown", title: model.data_digest })],
    ...(model.gate_reason ? [["Why this one", model.gate_reason]] : []),
  ];
  const list = make("dl", {}, ...facts.flatMap(([term, fact]) => [make("dt", { textContent: term }), make("dd", {}, fact)]));
  const article = make("article", { className: "sheet card" }, make("div", {}, make("h2", { textContent: model.id }), list), figureOf(card.loss_curves ?? {}));
  if (model.last_swap_error) article.append(make("p", { className: "error swap", textContent: model.last_swap_error }));
  return article;
}

// The run's page in MLflow; where no server shows the store yet, also the command that does.
function runOf(model, card) {
  const short = model.mlflow_run_id.slice(0, 8) || "unknown";
  if (!/^https?:\/\//.test(card.run_url ?? "")) return make("code", { textContent: short, title: model.mlflow_run_id });
  const link = make("a", { href: card.run_url, target: "_blank", rel: "noopener", textContent: short });
  return card.run_command ? make("span", {}, link, make("small", { textContent: " once this runs: " }), make("code", { textContent: card.run_command })) : link;
}

export function costOf(change) {
  const size = Math.abs(change).toFixed(4);
  return size === "0.0000" ? "no loss of quality measured" : `${size} bits per byte ${change > 0 ? "worse" : "better"} than registered`;
}

// Round numbers from at most `low` to at least `high`, about `count` of them, and the decimals that they all need.
export function ticksOf(low, high, count = 4) {
  const rough = Math.max(high - low, 1e-6) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(decimals)));
  return { ticks, decimals };
}

function figureOf(curves) {
  const classes = { "training loss": "training", "validation loss": "validation" };
  const drawn = Object.entries(curves).filter(([label, points]) => label in classes && points.length > 1);
  const figure = make("figure");
  if (!drawn.length) return figure;
  const [width, height, left, bottom, top] = [440, 190, 40, 34, 10];
  const all = drawn.flatMap(([, points]) => points);
  const across = ticksOf(0, Math.max(...all.map(([step]) => step), 1));
  const up = ticksOf(Math.min(...all.map(([, value]) => value)), Math.max(...all.map(([, value]) => value)));
  const [lastStep, low, high] = [across.ticks.at(-1), up.ticks[0], Math.max(up.ticks.at(-1), up.ticks[0] + 1e-6)];
  const x = (step) => left + (width - left - 8) * step / lastStep;
  const y = (value) => top + (height - bottom - top) * (high - value) / (high - low);
  const svg = (tag, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Loss over the steps of the training" });
  for (const value of up.ticks) {
    plot.append(svg("line", { class: "axis", x1: left, x2: width - 8, y1: y(value), y2: y(value) }), svg("text", { class: "loss", x: left - 7, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(up.decimals)));
  }
  for (const [i, step] of across.ticks.entries()) {
    const anchor = i === across.ticks.length - 1 ? "end" : i ? "middle" : "start";
    plot.append(svg("text", { class: "step", x: x(step), y: height - bottom + 15, "text-anchor": anchor }, step.toLocaleString("en")));
  }
  plot.append(svg("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, "step"));
  for (const [label, points] of drawn) {
    const path = points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("");
    plot.append(svg("path", { class: classes[label], d: path }));
  }
  const caption = make("figcaption", {}, ...drawn.map(([label]) => make("span", {}, make("b", { className: classes[label] }), `${label}, nats per token`)));
  figure.append(plot, caption);
  return figure;
}
