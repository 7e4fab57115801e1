// Labels of texts in a bundle's page: a function of a dtype, the texts and the number of WebAssembly threads.
async (dtype, texts, threads = 1) => {
  const { env, pipeline } = await import("@huggingface/transformers");
  env.backends.onnx.wasm.numThreads = threads;
  const started = performance.now();
  const classify = await pipeline("text-classification", "./", { dtype, device: "wasm" });
  const [answers, ms] = [[], []];
  let first_ms = 0;
  for (const text of texts) {
    const before = performance.now();
    answers.push((await classify(text))[0].label);
    ms.push(performance.now() - before);
    first_ms ||= performance.now() - started;
  }
  await classify.dispose();
  return { answers, ms, first_ms, isolated: crossOriginIsolated };
}
