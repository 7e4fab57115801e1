// The demo page: runs one model of the bundle at a time in this browser. It loads nothing from other servers.

import { env, pipeline } from "@huggingface/transformers";
import { check } from "../golden.mjs";

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.useBrowserCache = false; // the page always loads the files of its folder
env.useWasmCache = false;
// A browser lets WebAssembly use threads only in a page that is isolated from other origins; see serve.py.
env.backends.onnx.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
env.backends.onnx.wasm.wasmPaths = new URL("./", import.meta.url).href;

const element = (id) => document.getElementById(id);
const [form, text, variants, answer, checkResult] = ["ask", "text", "variant", "answer", "proof"].map(element);
const buttons = [element("classify"), element("check")];
let bundle, pipe;
const times = new Map(); // the last time of each variant

function paragraphOf(content, className = "") {
  const paragraph = document.createElement("p");
  paragraph.textContent = content;
  paragraph.className = className;
  return paragraph;
}

/** Disables the buttons while `work` runs; if it fails, shows the error in `output`. */
async function runWithoutButtons(output, work) {
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    output.replaceChildren(paragraphOf(`Error: ${error.message}`, "failed"));
  } finally {
    for (const button of buttons) button.disabled = !pipe;
  }
}

const selectedModel = () => bundle.models[variants.selectedIndex];
const formatMilliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

/** Returns why this browser cannot run the model on WebGPU, with a hint; empty if it can, or if the model needs none. */
async function reasonAgainstWebGPU({ device, dtype }) {
  if (device !== "webgpu") return "";
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) {
    return "This browser offers no WebGPU adapter here: turn on hardware acceleration, or open the page at localhost or https in a browser with WebGPU.";
  }
  const lacksHalf = dtype === "fp16" && !adapter.features.has("shader-f16");
  return lacksHalf ? "This graphics processor computes no fp16: choose an fp32 variant for WebGPU." : "";
}

async function load() {
  const previous = pipe;
  pipe = undefined;
  await previous?.dispose();
  checkResult.replaceChildren();
  const { variant, dtype, device } = selectedModel();
  answer.replaceChildren(paragraphOf(`Loading ${variant}…`));
  const start = performance.now();
  const task = bundle.task === "token_classification" ? "token-classification" : "text-classification";
  const reason = await reasonAgainstWebGPU(selectedModel());
  const next = await pipeline(task, "./", { dtype, device: reason ? "wasm" : device, local_files_only: true });
  await next("ready"); // the first run is slower than later runs
  pipe = next;
  const threads = env.backends.onnx.wasm.numThreads;
  const place = device === "webgpu" && !reason ? "WebGPU" : `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`;
  const loading = `Loading took ${formatMilliseconds(performance.now() - start)}.`;
  answer.replaceChildren(paragraphOf(`${variant} is ready. ${loading} It runs on ${place}.`));
  if (reason) answer.append(paragraphOf(`${reason} ${variant} runs on WebAssembly instead.`, "failed"));
}

function labelRow({ label, score }, isBest) {
  const row = document.createElement("div");
  row.className = isBest ? "share best" : "share";
  const [name, meter, percent] = ["span", "meter", "span"].map((kind) => document.createElement(kind));
  name.textContent = label;
  meter.value = score;
  meter.setAttribute("aria-label", `probability of ${label}`);
  percent.textContent = `${(100 * score).toFixed(1)} %`;
  row.append(name, meter, percent);
  return row;
}

/** Returns the score of a text as a paragraph. The pipeline cannot give it: the softmax of one logit is always 1. */
async function scoreText() {
  const tokens = await pipe.tokenizer(text.value, { truncation: true, max_length: bundle.max_length });
  const { logits } = await pipe.model(tokens);
  return [paragraphOf(`${bundle.labels[0]}: ${logits.data[0].toPrecision(4)}`)];
}

async function labelText() {
  const scores = await pipe(text.value, { top_k: null });
  return scores.map((score, index) => labelRow(score, index === 0));
}

/** Returns a row for each token that belongs to an entity. */
async function labelTokens() {
  const tokens = await pipe(text.value);
  const rows = tokens.map(({ word, entity, score }) => labelRow({ label: `${word}: ${entity}`, score }, true));
  return rows.length ? rows : [paragraphOf("The model found no entity.")];
}

async function classify() {
  const start = performance.now();
  const find = { regression: scoreText, token_classification: labelTokens }[bundle.task] ?? labelText;
  const rows = await find();
  const time = formatMilliseconds(performance.now() - start);
  const { variant } = selectedModel();
  times.set(variant, time);
  const others = [...times].filter(([name]) => name !== variant).map(([name, last]) => paragraphOf(`${name} took ${last}.`));
  answer.replaceChildren(...rows, paragraphOf(`${variant} took ${time}, including tokenising.`), ...others);
}

async function checkBundle() {
  checkResult.replaceChildren(paragraphOf("Checking…"));
  const golden = await (await fetch(new URL("../golden.json", import.meta.url))).json();
  const { variant } = selectedModel();
  const { passed, largest, tolerance, reason } = await check(pipe, bundle, golden, variant);
  const counts = `${golden.sentences.length} golden sentences and ${golden.batches.length} batches`;
  const summary = passed ? `${counts} match the recorded logits` : `FAILED: ${reason}`;
  const figure = `largest |Δlogit| ${largest.toPrecision(2)} (limit ${tolerance})`;
  checkResult.replaceChildren(paragraphOf(`${variant}: ${summary}; ${figure}.`, passed ? "" : "failed"));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (pipe) runWithoutButtons(answer, classify);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
variants.addEventListener("change", () => runWithoutButtons(answer, load));
element("check").addEventListener("click", () => runWithoutButtons(checkResult, checkBundle));

await runWithoutButtons(answer, async () => {
  const response = await fetch(new URL("../bundle.json", import.meta.url));
  if (!response.ok) throw new Error(`bundle.json: ${response.status}`);
  bundle = await response.json();
  document.title = element("title").textContent = bundle.model.name;
  const labels = `${bundle.labels.slice(0, -1).join(", ")} or ${bundle.labels.at(-1)}`;
  const purposes = {
    regression: `Gives a text the score ${bundle.labels[0]}`,
    token_classification: "Finds entities in a text",
  };
  const purpose = purposes[bundle.task] ?? `Labels a text ${labels}`;
  element("about").textContent = `${purpose}. The model runs in this browser, which sends your text nowhere.`;
  element("origin").textContent = `Model: ${bundle.model.origin}. Licence: ${bundle.model.license}. Bundle ${bundle.id.slice(0, 12)}.`;
  for (const { variant, bytes, device } of bundle.models) {
    const option = document.createElement("option");
    const place = device === "webgpu" ? "WebGPU" : "WebAssembly";
    option.textContent = `${variant}, ${(bytes / 1e6).toFixed(1)} MB, ${place}`;
    variants.append(option);
  }
  await load();
});
