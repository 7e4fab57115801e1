// Labels the review in the form with the bundle in the folder `bundle`.

import { env, pipeline } from "@huggingface/transformers";

env.allowLocalModels = true; // the bundle is a folder beside the page
env.allowRemoteModels = false;
env.useBrowserCache = env.useWasmCache = false; // a new bundle replaces the old one at once
env.backends.onnx.wasm.wasmPaths = new URL("bundle/demo/", import.meta.url).href;

const [form, review, submit, answer] = ["form", "review", "submit", "answer"].map((id) => document.getElementById(id));
let classify;

/** Shows the text that `work` returns, or its error; disables the button meanwhile. */
async function show(work) {
  submit.disabled = true;
  try {
    answer.value = await work();
  } catch (error) {
    answer.value = `Error: ${error.message}`;
  } finally {
    submit.disabled = !classify;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show(async () => {
    const [{ label, score }] = await classify(review.value);
    return `${label} (${(100 * score).toFixed(1)} %)`;
  });
});

show(async () => {
  classify = await pipeline("text-classification", "./bundle/", { dtype: "q8", device: "wasm" });
  return "The model is ready.";
});
