// The demo page: runs one model of the bundle at a time in this browser. It loads nothing from other servers.

import { env, pipeline } from "@huggingface/transformers";
import { check } from "../golden.mjs";

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.useBrowserCache = false; // the page always loads the files of its folder
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("./", import.meta.url).href;

const element = (id) => document.getElementById(id);
const [form, text, variants, answer, checkResult] = ["ask", "text", "variant", "answer", "proof"].map(element);
const buttons = [element("classify"), element("check")];
let bundle, pipe;

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

async function load() {
  const previous = pipe;
  pipe = undefined;
  await previous?.dispose();
  checkResult.replaceChildren();
  const { variant, dtype } = selectedModel();
  answer.replaceChildren(paragraphOf(`Loading ${variant}…`));
  const start = performance.now();
  const task = bundle.task === "token_classification" ? "token-classification" : "text-classification";
  const next = await pipeline(task, "./", { dtype, device: "wasm", local_files_only: true });
  await next("ready"); // the first run is slower than later runs
  pipe = next;
  answer.replaceChildren(paragraphOf(`${variant} is ready. Loading took ${formatMilliseconds(performance.now() - start)}.`));
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
  answer.replaceChildren(...rows, paragraphOf(`${selectedModel().variant} took ${time}, including tokenising.`));
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
  for (const { variant, bytes } of bundle.models) {
    const option = document.createElement("option");
    option.textContent = `${variant}, ${(bytes / 1e6).toFixed(1)} MB`;
    variants.append(option);
  }
  await load();
});
