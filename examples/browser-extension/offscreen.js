// Runs the model of the bundle in the folder `bundle` for background.js.

import { env, pipeline } from "./vendor/transformers.js";

env.allowLocalModels = true; // the bundle is a folder of the extension
env.allowRemoteModels = false;
env.useBrowserCache = env.useWasmCache = false; // a browser caches no files of extensions
env.backends.onnx.wasm.wasmPaths = new URL("bundle/demo/", import.meta.url).href;

const loading = pipeline("text-classification", "./bundle/", { dtype: "q8", device: "wasm" });

chrome.runtime.onMessage.addListener(({ text }, _sender, respond) => {
  loading
    .then((classify) => classify(text))
    .then(
      ([answer]) => respond({ answer }),
      (error) => respond({ error: error.message }),
    );
  return true; // keeps the channel open for the answer
});
