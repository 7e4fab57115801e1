// Whether a pipeline answers the bundle's golden sentences here as where the bundle was made.

import { Tensor } from "@huggingface/transformers";

const closed = (ids) => ids.slice(0, -1); // without the closing token

/**
 * Asks the model every golden sentence.
 * @param pipe a text-classification pipeline of transformers.js
 * @param bundle the parsed bundle.json
 * @param golden the parsed golden.json
 * @param variant which of the bundle's models the pipeline has loaded
 * @returns {{passed: boolean, largest: number, tolerance: number, reason: string}} the largest |Δlogit|
 */
export async function check(pipe, bundle, golden, variant) {
  const { tolerance } = bundle.models.find((model) => model.variant === variant);
  const recorded = golden.logits[variant];
  const result = { passed: false, largest: 0, tolerance, reason: "" };
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
    for (const [label, want] of recorded[index].entries()) {
      const delta = Math.abs(logits.data[label] - want);
      result.largest = Math.max(result.largest, Number.isFinite(delta) ? delta : Infinity);
    }
  }
  result.passed = result.largest <= tolerance;
  if (!result.passed) result.reason = "the logits are further off than allowed";
  return result;
}
