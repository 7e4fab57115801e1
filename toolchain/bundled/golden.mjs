// Whether a pipeline answers the bundle's golden sentences here as where the bundle was made.

import { Tensor } from "@huggingface/transformers";

const closed = (ids) => ids.slice(0, -1); // without the closing token

/**
 * Asks the model every golden sentence.
 * @param pipe a text-classification pipeline of transformers.js
 * @param bundle the parsed bundle.json
 * @param golden the parsed golden.json
 * @param variant which of the bundle's models the pipeline has loaded
 * @returns {{passed: boolean, largest: number, tolerance: number, reason: string}} the largest |Δlogit| and what is allowed
 */
export async function check(pipe, bundle, golden, variant) {
  const { tolerance } = bundle.models.find((model) => model.variant === variant);
  const recorded = golden.logits[variant];
  const result = { passed: false, largest: 0, tolerance: tolerance.largest, reason: "" };
  const deltas = [];
  for (const [index, { text, input_ids }] of golden.sentences.entries()) {
    const tokens = await pipe.tokenizer(text, { truncation: true, max_length: bundle.max_length });
    const ids = Array.from(tokens.input_ids.data, Number);
    // A text that is too long is cut off with its closing token by transformers.js, and before it everywhere else.
    const [found, wanted] = input_ids.length < bundle.max_length ? [ids, input_ids] : [closed(ids), closed(input_ids)];
    if (found.length !== wanted.length || found.some((id, at) => id !== wanted[at])) {
      result.reason = `the tokenizer splits ${JSON.stringify(text.slice(0, 60))} otherwise`;
      return result;
    }
    const given = new Tensor("int64", BigInt64Array.from(input_ids, BigInt), [1, input_ids.length]);
    const { logits } = await pipe.model({ ...tokens, input_ids: given });
    const delta = Math.max(...recorded[index].map((want, label) => Math.abs(logits.data[label] - want)));
    deltas.push(Number.isFinite(delta) ? delta : Infinity);
  }
  deltas.sort((a, b) => a - b);
  result.largest = deltas.at(-1);
  if (!(result.largest <= tolerance.largest)) {
    result.reason = "the logits are further off than allowed";
  } else if (!(deltas[Math.floor(deltas.length / 2)] <= tolerance.median)) {
    result.reason = `half of them are further off than ${tolerance.median}: this processor may saturate 8-bit products`;
  }
  result.passed = result.reason === "";
  return result;
}
