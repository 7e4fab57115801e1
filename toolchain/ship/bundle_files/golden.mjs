// Checks that a pipeline answers the bundle's golden sentences and batches as recorded.

import { Tensor } from "@huggingface/transformers";

const withoutClosing = (ids) => ids.slice(0, -1);

/** The model's inputs for rows of token ids, padded on one side to the longest row. */
function padded(rows, side, { pad_id }, names) {
  const width = Math.max(...rows.map((ids) => ids.length));
  const fill = (values, by) => {
    const padding = Array(width - values.length).fill(by);
    return side === "left" ? [...padding, ...values] : [...values, ...padding];
  };
  const inputs = {
    input_ids: rows.map((ids) => fill(ids, pad_id)),
    attention_mask: rows.map((ids) => fill(ids.map(() => 1), 0)),
    token_type_ids: rows.map(() => Array(width).fill(0)),
  };
  const tensor = (name) => new Tensor("int64", BigInt64Array.from(inputs[name].flat(), BigInt), [rows.length, width]);
  return Object.fromEntries(names.map((name) => [name, tensor(name)]));
}

/**
 * Asks the model every golden sentence and batch.
 * @param pipe a text-classification pipeline of transformers.js
 * @param bundle the parsed bundle.json
 * @param golden the parsed golden.json
 * @param variant which of the bundle's models the pipeline has loaded
 * @returns {{passed: boolean, largest: number, tolerance: number, reason: string}} the largest |Δlogit| and its limit
 */
export async function check(pipe, bundle, golden, variant) {
  const { tolerance, inputs } = bundle.models.find((model) => model.variant === variant);
  const names = inputs.map(({ name }) => name);
  const result = { passed: false, largest: 0, tolerance: tolerance.largest, reason: "" };
  for (const { text, input_ids } of golden.sentences) {
    const tokens = await pipe.tokenizer(text, { truncation: true, max_length: bundle.max_length });
    const ids = Array.from(tokens.input_ids.data, Number);
    // transformers.js cuts the closing token off a text that is too long; other libraries keep it.
    const cut = input_ids.length < bundle.max_length ? (each) => each : withoutClosing;
    const [found, wanted] = [cut(ids), cut(input_ids)];
    if (found.length !== wanted.length || found.some((id, at) => id !== wanted[at])) {
      result.reason = `the tokenizer splits ${JSON.stringify(text.slice(0, 60))} otherwise`;
      return result;
    }
  }
  const rows = golden.sentences.map(({ input_ids }) => input_ids);
  const questions = rows.map((ids, at) => ({ rows: [ids], side: "right", wanted: [golden.logits[variant][at]] }));
  for (const [at, { padding, sentences }] of golden.batches.entries()) {
    questions.push({ rows: sentences.map((i) => rows[i]), side: padding, wanted: golden.batch_logits[variant][at] });
  }
  const deltas = [];
  for (const { rows, side, wanted } of questions) {
    const { logits } = await pipe.model(padded(rows, side, bundle, names));
    for (const [at, row] of wanted.entries()) {
      const delta = Math.max(...row.map((want, label) => Math.abs(logits.data[at * row.length + label] - want)));
      deltas.push(Number.isFinite(delta) ? delta : Infinity);
    }
  }
  deltas.sort((a, b) => a - b);
  result.largest = deltas.at(-1);
  const median = deltas[Math.floor(deltas.length / 2)];
  if (!(result.largest <= tolerance.largest)) {
    result.reason = "the largest difference from the recorded logits is over its limit";
  } else if (!(median <= tolerance.median)) {
    result.reason = `the median difference from the recorded logits is ${median.toPrecision(2)} (limit ${tolerance.median})`;
  }
  result.passed = result.reason === "";
  return result;
}
