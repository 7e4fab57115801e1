// `node verify.mjs` asks every model of this bundle the golden sentences and batches; exit code 3 where one fails.
// Needs `npm install @huggingface/transformers` where Node finds it. The files' digests are checked by verify.py.

import { readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { env, pipeline } from "@huggingface/transformers";
import { check } from "./golden.mjs";
import { sessionOptions } from "./node.mjs";

const folder = dirname(fileURLToPath(import.meta.url));
const read = async (name) => JSON.parse(await readFile(`${folder}/${name}`, "utf8"));
const [bundle, golden] = [await read("bundle.json"), await read("golden.json")];
env.allowRemoteModels = false;
const session_options = await sessionOptions();
for (const { variant, dtype } of bundle.models) {
  const pipe = await pipeline("text-classification", folder, { dtype, session_options });
  const { passed, largest, tolerance, reason } = await check(pipe, bundle, golden, variant);
  const figure = `largest |Δlogit| ${largest.toPrecision(2)}, ≤ ${tolerance} allowed`;
  console.log(passed ? `${variant}: golden sentences answered, ${figure}` : `${variant}: FAILED: ${reason}; ${figure}`);
  if (!passed) process.exitCode = 3;
  await pipe.dispose();
}
