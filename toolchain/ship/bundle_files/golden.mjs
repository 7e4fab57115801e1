// Compares the logits of a pipeline with the recorded logits of the bundle's golden sentences and batches.

import { Tensor } from "@huggingface/transformers";

const dropLast = (ids) => ids.slice(0, -1);

/** Returns the model's inputs for rows of token ids; pads each row on `side` to the longest row. */
function padRows(rows, side, { pad_id }, names) {
  const width = Math.max(...rows.map((ids) => ids.length));
  const fill = (values, filler) => {
    const padding = Array(width - values.length).fill(filler);
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

/** Returns the index of a row's first logit. A token classifier gives logits for each token; padding may come first. */
function firstLogit(dims, row, tokens, side) {
  if (dims.length === 2) return row * dims[1];
  const [, width, labels] = dims;
  return (row * width + (side === "left" ? width - tokens : 0)) * labels;
}

/**
 * Runs the model on every golden sentence and batch, and compares the logits with the recorded logits.
 * @param pipe a pipeline of transformers.js for the model
 * @param bundle the parsed bundle.json
 * @param golden the parsed golden.json
 * @param variant the variant of the model that the pipeline has loaded
 * @returns {{passed: boolean, largest: number, tolerance: number, reason: string}} the result: `largest` is the largest
 * difference of a logit, `tolerance` its limit, and `reason` why the check failed
 */
export async function check(pipe, bundle, golden, variant) {
  const { tolerance, inputs } = bundle.models.find((model) => model.variant === variant);
  const names = inputs.map(({ name }) => name);
  const result = { passed: false, largest: 0, tolerance: tolerance.largest, reason: "" };
  for (const { text, input_ids } of golden.sentences) {
    const tokens = await pipe.tokenizer(text, { truncation: true, max_length: bundle.max_length });
    const ids = Array.from(tokens.input_ids.data, Number);
    // If a text is too long, transformers.js removes its last special token; other libraries keep it.
    const select = input_ids.length < bundle.max_length ? (each) => each : dropLast;
    const [actual, expected] = [select(ids), select(input_ids)];
    if (actual.length !== expected.length || actual.some((id, i) => id !== expected[i])) {
      result.reason = `the tokenizer splits ${JSON.stringify(text.slice(0, 60))} into tokens that differ from the tokens in golden.json`;
      return result;
    }
  }
  const rows = golden.sentences.map(({ input_ids }) => input_ids);
  const runs = rows.map((ids, i) => ({ rows: [ids], side: "right", expected: [golden.logits[variant][i]] }));
  for (const [i, { padding, sentences }] of golden.batches.entries()) {
    runs.push({ rows: sentences.map((j) => rows[j]), side: padding, expected: golden.batch_logits[variant][i] });
  }
  const deltas = [];
  for (const { rows, side, expected } of runs) {
    const { logits } = await pipe.model(padRows(rows, side, bundle, names));
    for (const [i, row] of expected.entries()) {
      const start = firstLogit(logits.dims, i, rows[i].length, side);
      const delta = Math.max(...row.map((logit, j) => Math.abs(logits.data[start + j] - logit)));
      deltas.push(Number.isFinite(delta) ? delta : Infinity);
    }
  }
  deltas.sort((a, b) => a - b);
  result.largest = deltas.at(-1);
  const median = deltas[Math.floor(deltas.length / 2)];
  if (!(result.largest <= tolerance.largest)) {
    result.reason = "the largest difference from the recorded logits exceeds its limit";
  } else if (!(median <= tolerance.median)) {
    result.reason = `the median difference from the recorded logits is ${median.toPrecision(2)} (limit ${tolerance.median})`;
  }
  result.passed = result.reason === "";
  return result;
}
