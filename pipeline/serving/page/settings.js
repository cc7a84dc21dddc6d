// The settings of sampling, as sliders and fields with names that screen readers say.

import { make } from "./server.js";

const SLIDERS = {
  temperature: { label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8 },
  top_p: { label: "Top-p", min: 0.05, max: 1, step: 0.05, value: 1 },
  top_k: { label: "Top-k", min: 0, max: 200, step: 1, value: 50, zero: "off" },
  max_tokens: { label: "Max tokens", min: 1, max: 512, step: 1, value: 128 },
};
const MORE = {
  min_p: { label: "Min-p", min: 0, max: 0.5, step: 0.01, value: 0 },
  repetition_penalty: { label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: 1 },
  seed: { label: "Seed", type: "number", step: 1, placeholder: "random" },
  stop: { label: "Stop at", type: "text", placeholder: "a string, or nothing" },
};
let made = 0;

export class Settings {
  constructor(changed = () => {}) {
    this.prefix = `settings-${made += 1}`;
    this.inputs = {};
    const inner = make("div", { className: "inner" }, ...Object.entries(MORE).map((entry) => this.field(...entry)));
    const more = make("details", { className: "more" }, make("summary", { textContent: "More settings" }), inner);
    this.element = make("div", { className: "settings" }, ...Object.entries(SLIDERS).map((entry) => this.field(...entry)), more);
    this.element.addEventListener("input", changed);
  }

  field(name, { label, type = "range", zero, ...attributes }) {
    const id = `${this.prefix}-${name}`;
    const input = make("input", { id, type, ...attributes });
    input.dataset.setting = name;
    this.inputs[name] = input;
    const heading = make("span", {}, make("label", { htmlFor: id, textContent: label }));
    if (type === "range") {
      // For eyes: the slider itself says its value.
      const output = make("output");
      output.setAttribute("aria-hidden", "true");
      const show = () => {
        output.textContent = zero && input.value === "0" ? zero : input.value;
        input.setAttribute("aria-valuetext", output.textContent);
      };
      input.addEventListener("input", show);
      show();
      heading.append(output);
    }
    return make("div", {}, heading, input);
  }

  get values() {
    const values = {};
    for (const [name, input] of Object.entries(this.inputs)) {
      if (input.value !== "") values[name] = input.type === "text" ? input.value : Number(input.value);
    }
    return values;
  }

  set values(values) {
    for (const [name, input] of Object.entries(this.inputs)) {
      if (name in values) this.put(name, values[name]);
    }
  }

  put(name, value) {
    this.inputs[name].value = value;
    this.inputs[name].dispatchEvent(new Event("input"));
  }

  // An answer may take half of the model's context at most, so that a prompt has the other half.
  limit(model) {
    this.inputs.max_tokens.max = Math.max(1, Math.floor((model?.context_length ?? 512) / 2));
    this.inputs.max_tokens.dispatchEvent(new Event("input"));
  }
}
