// The page: two ways to use the models, and which of them is shown.
//
//   /?talk             a conversation       /?talk=3, /?talk=champion, /?talk=demo@champion    with that version
//   /?complete         a completion         /?complete=3                                       of that version
//   /                  a conversation where a version that is served talks, else a completion

import { completion } from "./complete.js";
import { find, listModels, nameOf } from "./server.js";
import { talk } from "./talk.js";

const MODES = { talk, complete: completion };
let mode = "";
let models = [];

function modeOfAddress() {
  const asked = new URLSearchParams(location.search);
  return Object.keys(MODES).find((each) => asked.has(each)) ?? (models.some((model) => model.chat) ? "talk" : "complete");
}

function versionOfAddress() {
  const wanted = new URLSearchParams(location.search).get(modeOfAddress());
  if (!wanted) return undefined;
  const isMeant = (model) => [model.version, ...model.selectors, ...model.selectors.map((each) => `${model.name}@${each}`)].includes(wanted);
  const found = models.find(isMeant);
  if (!found && models.length) find("#notice").textContent = `"${wanted}" is not served here; there is ${models.map(nameOf).join(", ")}.`;
  return found;
}

function show(wanted) {
  if (mode && mode !== wanted) MODES[mode].stop();
  mode = wanted;
  for (const each of Object.keys(MODES)) find(`#${each}`).hidden = each !== mode;
  for (const link of document.querySelectorAll("#modes a")) {
    if (link.dataset.mode === mode) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  MODES[mode].enter();
}

async function load() {
  try {
    models = await listModels();
    find("#notice").textContent = "";
  } catch (error) {
    find("#notice").textContent = error.message;
  }
  const wanted = mode ? undefined : versionOfAddress(); // later, what was chosen since counts
  for (const each of Object.values(MODES)) each.offer(models, wanted);
  if (mode) MODES[mode].about();
  else if (models.length) show(modeOfAddress());
}

for (const each of Object.values(MODES)) each.onOutdated(load);
document.addEventListener("click", (event) => {
  const link = event.target.closest?.('a[href="?talk"], a[href="?complete"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", link.getAttribute("href"));
  show(modeOfAddress());
});
addEventListener("popstate", () => show(modeOfAddress()));
find("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("api-key", find("#key-value").value.trim());
  find("#key").hidden = true;
  load();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !find("#snippet").open) MODES[mode]?.stop(); });
load();
