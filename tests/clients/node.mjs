// Logits of tokens by onnxruntime-node alone: `node node.mjs BUNDLE MODEL.onnx TOKENS.json`.
import { readFile } from "node:fs/promises";
import ort from "onnxruntime-node";

const [bundle, model, tokens] = process.argv.slice(2);
const { sessionOptions } = await import(`${bundle}/node.mjs`);
const session = await ort.InferenceSession.create(`${bundle}/${model}`, await sessionOptions());
const answers = [];
for (const ids of JSON.parse(await readFile(tokens, "utf8"))) {
  const shape = [1, ids.length];
  const logits = await session.run({
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
  });
  answers.push(Array.from(logits.logits.data));
}
console.log(JSON.stringify({ answers }));
