// Session options for Node on this processor. A browser needs no options.

import { readFile } from "node:fs/promises";
import { availableParallelism } from "node:os";

// ONNX Runtime reports its use to Microsoft by default. It reads this variable once, when it is imported.
process.env.ORT_DISABLE_TELEMETRY ??= "1";
const { default: ort } = await import("onnxruntime-node");

// An ONNX file with one MatMulInteger: uint8 [1, 4] × int8 [4, 1]; every weight is 127.
const product = Buffer.from(
  "CAg63gEKTQoLYWN0aXZhdGlvbnMKB3dlaWdodHMKCnplcm9fcG9pbnQKEXdlaWdodF96ZXJvX3BvaW50Egdwcm9kdWN0Ig1NYXRNdWxJbnRl" +
    "Z2VyEg9leHRyZW1lX3Byb2R1Y3QqFQgECAEQA0IHd2VpZ2h0c0oEf39/fyoREAJCCnplcm9fcG9pbnRKAQAqGBADQhF3ZWlnaHRfemVyb19w" +
    "b2ludEoBAFodCgthY3RpdmF0aW9ucxIOCgwIAhIICgIIAQoCCARiGQoHcHJvZHVjdBIOCgwIBhIICgIIAQoCCAFCBAoAEA0=",
  "base64",
);

/** Returns the number of whole CPUs in the quota of this container, at least 1; 0 without a quota. */
async function cpuQuota(cgroup) {
  for (const names of [["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]]) {
    const files = await Promise.all(names.map((name) => readFile(`${cgroup}/${name}`, "utf8").catch(() => "")));
    const [quota, period] = files.join(" ").split(/\s+/).map(Number); // "max" means no limit
    if (quota > 0 && period > 0) return Math.max(1, Math.min(Math.floor(quota / period), availableParallelism()));
  }
  return 0;
}

const boundThreads = async (count, cgroup) => Math.min(count, (await cpuQuota(cgroup)) || availableParallelism());

/**
 * Returns the number of threads for a model: the environment variable TOOLCHAIN_THREADS, or `best` but at most the CPUs
 * that this process may use. If `best` is 0: the whole CPUs in the quota of this container, or 0 without a quota, with
 * which ONNX Runtime uses all cores of the machine.
 */
export async function countThreads(cgroup = "/sys/fs/cgroup", best = 0) {
  if (process.env.TOOLCHAIN_THREADS) return Number(process.env.TOOLCHAIN_THREADS);
  return best ? boundThreads(best, cgroup) : cpuQuota(cgroup);
}

/** Returns `app_settings` of a model in the bundle.json beside this file; undefined without such settings or file. */
async function readSettings(variant) {
  const text = await readFile(new URL("bundle.json", import.meta.url), "utf8").catch(() => '{"models": []}');
  return JSON.parse(text).models.find((model) => [undefined, model.variant].includes(variant))?.app_settings;
}

/**
 * Returns session options with which 8-bit products are exact on this processor, with the settings of bundle.json, and
 * with the number of threads for a container. x86 without VNNI adds two 8-bit products in 16 bits, which saturates; one
 * option makes the products exact. On other processors the option would only make int8 slower.
 * @param variant the variant of the model in bundle.json; undefined for the first model
 * @returns the `session_options` of `pipeline`, and the second argument of `InferenceSession.create`
 */
export async function sessionOptions(variant, cgroup = "/sys/fs/cgroup") {
  const session = await ort.InferenceSession.create(product);
  const activations = new ort.Tensor("uint8", new Uint8Array(4).fill(255), [1, 4]);
  const [output] = Object.values(await session.run({ activations }));
  await session.release();
  const extra = output.data[0] === 4 * 255 * 127 ? {} : { x64quantprecision: "1" };
  const settings = await readSettings(variant);
  const options = {};
  if (settings) {
    const chosen = settings.session;
    options.interOpNumThreads = await boundThreads(chosen.inter_op_threads, cgroup);
    options.executionMode = chosen.execution_mode;
    options.graphOptimizationLevel = chosen.graph_optimization;
    options.enableCpuMemArena = chosen.memory_arena;
    options.enableMemPattern = chosen.memory_pattern;
    const spinning = { allow_spinning: chosen.spinning ? "1" : "0" };
    Object.assign(extra, { intra_op: spinning, inter_op: spinning });
  }
  if (Object.keys(extra).length) options.extra = { session: extra };
  const threads = await countThreads(cgroup, settings?.threads);
  return threads ? { ...options, intraOpNumThreads: threads } : options;
}
