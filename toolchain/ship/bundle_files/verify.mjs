// `node verify.mjs` runs every model of this bundle on the golden sentences and batches; exit code 3 if a model fails.
// It needs @huggingface/transformers, installed by npm where Node finds it. verify.py checks the sha256 of every file.

import { readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { sessionOptions } from "./node.mjs"; // before transformers.js, because it sets a variable of ONNX Runtime
import { env, pipeline } from "@huggingface/transformers";
import { check } from "./golden.mjs";

const folder = dirname(fileURLToPath(import.meta.url));
const read = async (name) => JSON.parse(await readFile(`${folder}/${name}`, "utf8"));
const [bundle, golden] = [await read("bundle.json"), await read("golden.json")];
env.allowRemoteModels = false;
const task = bundle.task === "token_classification" ? "token-classification" : "text-classification";
for (const { variant, dtype } of bundle.models) {
  const pipe = await pipeline(task, folder, { dtype, session_options: await sessionOptions(variant) });
  const { passed, largest, tolerance, reason } = await check(pipe, bundle, golden, variant);
  const figure = `largest |Δlogit| ${largest.toPrecision(2)} (limit ${tolerance})`;
  console.log(passed ? `${variant}: golden sentences passed, ${figure}` : `${variant}: FAILED: ${reason}; ${figure}`);
  if (!passed) process.exitCode = 3;
  await pipe.dispose();
}
