// Evaluated in a page that serves the npm packages: runs models with onnxruntime-web on WebGPU.
// `models` are paths or base64 strings; `feeds` are lists of inputs: {name: [type, data, dims]}.
async (models, feeds, options) => {
  const packages = new URL("/onnxruntime-web/dist/", location).href;
  const ort = await import(`${packages}ort.webgpu.min.mjs`);
  ort.env.wasm.wasmPaths = packages;
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "verbose";
  const lines = [];
  for (const name of ["debug", "error", "info", "log", "warn"]) console[name] = (...parts) => lines.push(parts.join(" "));
  const values = { int64: (data) => BigInt64Array.from(data, BigInt), float32: (data) => Float32Array.from(data) };
  const results = [];
  for (const model of models) {
    lines.length = 0;
    const bytes = model.startsWith("/") ? model : Uint8Array.from(atob(model), (each) => each.charCodeAt(0));
    const session = await ort.InferenceSession.create(bytes, {
      executionProviders: ["webgpu"], logSeverityLevel: 0, logVerbosityLevel: 0, ...options,
    });
    const log = lines.join("\n");
    const outputs = [];
    try {
      for (const feed of feeds) {
        const inputs = Object.entries(feed).map(([name, [type, data, dims]]) => [name, new ort.Tensor(type, values[type](data), dims)]);
        const output = (await session.run(Object.fromEntries(inputs)))[session.outputNames[0]];
        outputs.push(Array.from(await output.getData(), Number));
      }
    } catch (error) {
      outputs.push(error.message);
    }
    await session.release();
    results.push({ log, outputs });
  }
  return results;
}
