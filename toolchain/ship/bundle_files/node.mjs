// Session options for Node on this processor. A browser needs no options.

import { readFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import ort from "onnxruntime-node";

// An ONNX file with one MatMulInteger: uint8 [1, 4] × int8 [4, 1]; every weight is 127.
const product = Buffer.from(
  "CAg63gEKTQoLYWN0aXZhdGlvbnMKB3dlaWdodHMKCnplcm9fcG9pbnQKEXdlaWdodF96ZXJvX3BvaW50Egdwcm9kdWN0Ig1NYXRNdWxJbnRl" +
    "Z2VyEg9leHRyZW1lX3Byb2R1Y3QqFQgECAEQA0IHd2VpZ2h0c0oEf39/fyoREAJCCnplcm9fcG9pbnRKAQAqGBADQhF3ZWlnaHRfemVyb19w" +
    "b2ludEoBAFodCgthY3RpdmF0aW9ucxIOCgwIAhIICgIIAQoCCARiGQoHcHJvZHVjdBIOCgwIBhIICgIIAQoCCAFCBAoAEA0=",
  "base64",
);

/**
 * Returns the number of threads for a model: the environment variable TOOLCHAIN_THREADS, or the whole CPUs in the quota
 * of this container, or 0, with which ONNX Runtime uses all cores of the machine.
 */
export async function countThreads(cgroup = "/sys/fs/cgroup") {
  if (process.env.TOOLCHAIN_THREADS) return Number(process.env.TOOLCHAIN_THREADS);
  for (const names of [["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]]) {
    const files = await Promise.all(names.map((name) => readFile(`${cgroup}/${name}`, "utf8").catch(() => "")));
    const [quota, period] = files.join(" ").split(/\s+/).map(Number); // "max" means no limit
    if (quota > 0 && period > 0) return Math.max(1, Math.min(Math.floor(quota / period), availableParallelism()));
  }
  return 0;
}

/**
 * Returns session options with which 8-bit products are exact on this processor, and with the number of threads for a
 * container. x86 without VNNI adds two 8-bit products in 16 bits, which saturates; one option makes the products exact.
 * On other processors the option would only make int8 slower.
 * @returns the `session_options` of `pipeline`, and the second argument of `InferenceSession.create`
 */
export async function sessionOptions() {
  const session = await ort.InferenceSession.create(product);
  const activations = new ort.Tensor("uint8", new Uint8Array(4).fill(255), [1, 4]);
  const [output] = Object.values(await session.run({ activations }));
  await session.release();
  const exact = output.data[0] === 4 * 255 * 127 ? {} : { extra: { session: { x64quantprecision: "1" } } };
  const threads = await countThreads();
  return threads ? { ...exact, intraOpNumThreads: threads } : exact;
}
