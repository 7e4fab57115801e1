// Labels of texts in a bundle's page: a function of a dtype and the texts.
async (dtype, texts) => {
  const { pipeline } = await import("@huggingface/transformers");
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
  return { answers, ms, first_ms };
}
