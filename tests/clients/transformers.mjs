// Labels of texts by transformers.js: `node transformers.mjs BUNDLE DTYPE TEXTS.json`.
import { readFile } from "node:fs/promises";
import { env, pipeline } from "@huggingface/transformers";

const [bundle, dtype, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
const started = performance.now();
const { sessionOptions } = await import(`${bundle}/node.mjs`);
const classify = await pipeline("text-classification", bundle, { dtype, session_options: await sessionOptions() });
const answers = [];
const ms = [];
for (const text of JSON.parse(await readFile(texts, "utf8"))) {
  const before = performance.now();
  const [{ label }] = await classify(text);
  ms.push(performance.now() - before);
  answers.push(label);
  if (answers.length === 1) ms.first = performance.now() - started;
}
console.log(JSON.stringify({ answers, ms, first_ms: ms.first }));
