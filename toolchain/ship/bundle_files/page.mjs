// The demo page: one model of the bundle at a time, in this browser, with nothing from anywhere else.

import { env, pipeline } from "@huggingface/transformers";
import { check } from "../golden.mjs";

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.useBrowserCache = false; // what lies beside the page is what is shown
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("./", import.meta.url).href;

const element = (id) => document.getElementById(id);
const [form, text, variants, answer, proof] = ["ask", "text", "variant", "answer", "proof"].map(element);
const buttons = [element("classify"), element("check")];
let bundle, pipe;

function line(content, className = "") {
  const paragraph = document.createElement("p");
  paragraph.textContent = content;
  paragraph.className = className;
  return paragraph;
}

/** Runs `work` with the buttons off; a failure is told in `place`. */
async function busy(place, work) {
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    place.replaceChildren(line(`It failed: ${error.message}`, "failed"));
  } finally {
    for (const button of buttons) button.disabled = !pipe;
  }
}

const chosen = () => bundle.models[variants.selectedIndex];
const milliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

async function load() {
  const old = pipe;
  pipe = undefined;
  await old?.dispose();
  proof.replaceChildren();
  answer.replaceChildren(line(`Loading ${chosen().variant}…`));
  const started = performance.now();
  const loaded = await pipeline("text-classification", "./", {
    dtype: chosen().dtype,
    device: "wasm",
    local_files_only: true,
  });
  await loaded("ready"); // the first answer prepares what later ones reuse
  pipe = loaded;
  answer.replaceChildren(line(`${chosen().variant} is ready, ${milliseconds(performance.now() - started)} after the start.`));
}

function share({ label, score }, best) {
  const row = document.createElement("div");
  row.className = best ? "share best" : "share";
  const [name, meter, percent] = ["span", "meter", "span"].map((kind) => document.createElement(kind));
  name.textContent = label;
  meter.value = score;
  meter.setAttribute("aria-label", `probability of ${label}`);
  percent.textContent = `${(100 * score).toFixed(1)} %`;
  row.append(name, meter, percent);
  return row;
}

async function classify() {
  const started = performance.now();
  const found = await pipe(text.value, { top_k: null });
  const spent = performance.now() - started;
  const rows = found.map((each, index) => share(each, index === 0));
  answer.replaceChildren(...rows, line(`${chosen().variant} answered in ${milliseconds(spent)}, tokenising included.`));
}

async function prove() {
  proof.replaceChildren(line("Asking…"));
  const golden = await (await fetch(new URL("../golden.json", import.meta.url))).json();
  const { passed, largest, tolerance, reason } = await check(pipe, bundle, golden, chosen().variant);
  const figure = `largest |Δlogit| ${largest.toPrecision(2)}, ≤ ${tolerance} allowed`;
  const said = passed ? `${chosen().variant} answers ${golden.sentences.length} golden sentences and ${golden.batches.length} batches as recorded` : `FAILED: ${reason}`;
  proof.replaceChildren(line(`${said}; ${figure}.`, passed ? "" : "failed"));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (pipe) busy(answer, classify);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
variants.addEventListener("change", () => busy(answer, load));
element("check").addEventListener("click", () => busy(proof, prove));

await busy(answer, async () => {
  const response = await fetch(new URL("../bundle.json", import.meta.url));
  if (!response.ok) throw new Error(`bundle.json: ${response.status}`);
  bundle = await response.json();
  document.title = element("title").textContent = bundle.model.name;
  element("about").textContent = `Says ${bundle.labels.slice(0, -1).join(", ")} or ${bundle.labels.at(-1)}, in this browser: what you type goes nowhere.`;
  element("origin").textContent = `Model: ${bundle.model.origin}. Licence: ${bundle.model.license}. Bundle ${bundle.id.slice(0, 12)}.`;
  for (const { variant, bytes } of bundle.models) {
    const option = document.createElement("option");
    option.textContent = `${variant}, ${(bytes / 1e6).toFixed(1)} MB`;
    variants.append(option);
  }
  await load();
});
