// A request as a command or a program, to be copied. The key of this tab is never in it.

import { find, hasKey } from "./server.js";

const WITHOUT_EFFECT = { top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 };
const OPENAIS = ["model", "prompt", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop"];

export function asCurl(path, body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", String.raw`'\''`);
  const key = hasKey() ? [`  -H "Authorization: Bearer $API_KEY"`] : [];
  return [`curl ${location.origin}${path}`, ...key, "  -H 'Content-Type: application/json'", `  -d '${json}'`].join(" \\\n") + "\n";
}

export function asPython(path, body) {
  const chat = path.includes("chat");
  // What JSON writes for texts, numbers, lists and dicts of them, Python reads.
  const literal = (value) => Array.isArray(value)
    ? `[\n${value.map((each) => `        ${literal(each)},\n`).join("")}    ]`
    : typeof value === "object" ? `{${Object.entries(value).map(([key, each]) => `"${key}": ${JSON.stringify(each)}`).join(", ")}}` : JSON.stringify(value);
  const named = Object.entries(body).filter(([name]) => OPENAIS.includes(name));
  const others = Object.entries(body).filter(([name]) => !OPENAIS.includes(name));
  const lines = named.map(([name, value]) => `    ${name}=${literal(value)},`);
  if (others.length) lines.push(`    extra_body=${literal(Object.fromEntries(others))},`);
  const imports = hasKey() ? "import os\n\nfrom openai import OpenAI\n" : "from openai import OpenAI\n";
  return `${imports}
client = OpenAI(base_url="${location.origin}/v1", api_key=${hasKey() ? 'os.environ["API_KEY"]' : '"none"'})
answer = client.${chat ? "chat." : ""}completions.create(
${lines.join("\n")}
)
print(answer.choices[0].${chat ? "message.content" : "text"})
`;
}

const dialog = find("#snippet");
const text = find("#snippet-text");
let request = null;

function show(kind) {
  for (const button of dialog.querySelectorAll("[data-kind]")) button.setAttribute("aria-pressed", button.dataset.kind === kind);
  text.value = (kind === "curl" ? asCurl : asPython)(...request);
  text.scrollTop = 0;
  find("#snippet-said").textContent = "";
}

export function showSnippet(path, body) {
  request = [path, Object.fromEntries(Object.entries(body).filter(([name, value]) => WITHOUT_EFFECT[name] !== value))];
  show(find("[data-kind][aria-pressed=true]", dialog).dataset.kind);
  dialog.showModal();
}

export async function copy(content) {
  // Browsers give the clipboard to pages over https and on this machine alone.
  try { await navigator.clipboard.writeText(content); return true; }
  catch { return false; }
}

for (const button of dialog.querySelectorAll("[data-kind]")) button.addEventListener("click", () => show(button.dataset.kind));
find("#snippet-close").addEventListener("click", () => dialog.close());
find("#snippet-copy").addEventListener("click", async () => {
  const copied = await copy(text.value);
  if (!copied) { text.focus(); text.select(); }
  find("#snippet-said").textContent = copied ? "Copied." : "Selected: press Ctrl C.";
});
