// Session options for Node on this processor. A browser needs no options.

import ort from "onnxruntime-node";

// An ONNX file with one MatMulInteger: uint8 [1, 4] × int8 [4, 1]; every weight is 127.
const product = Buffer.from(
  "CAg63gEKTQoLYWN0aXZhdGlvbnMKB3dlaWdodHMKCnplcm9fcG9pbnQKEXdlaWdodF96ZXJvX3BvaW50Egdwcm9kdWN0Ig1NYXRNdWxJbnRl" +
    "Z2VyEg9leHRyZW1lX3Byb2R1Y3QqFQgECAEQA0IHd2VpZ2h0c0oEf39/fyoREAJCCnplcm9fcG9pbnRKAQAqGBADQhF3ZWlnaHRfemVyb19w" +
    "b2ludEoBAFodCgthY3RpdmF0aW9ucxIOCgwIAhIICgIIAQoCCARiGQoHcHJvZHVjdBIOCgwIBhIICgIIAQoCCAFCBAoAEA0=",
  "base64",
);

/**
 * Returns session options with which 8-bit products are exact on this processor. x86 without VNNI adds two 8-bit
 * products in 16 bits, which saturates; one option makes the products exact. On other processors the option would only
 * make int8 slower, so the result is empty.
 * @returns the `session_options` of `pipeline`, and the second argument of `InferenceSession.create`
 */
export async function sessionOptions() {
  const session = await ort.InferenceSession.create(product);
  const activations = new ort.Tensor("uint8", new Uint8Array(4).fill(255), [1, 4]);
  const [output] = Object.values(await session.run({ activations }));
  await session.release();
  return output.data[0] === 4 * 255 * 127 ? {} : { extra: { session: { x64quantprecision: "1" } } };
}
