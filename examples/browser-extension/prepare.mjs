// Writes vendor/transformers.js: transformers.js of the bundle with paths instead of package names. A page could name the
// paths in an import map, but a page of an extension may not contain one.

import { mkdir, readFile, writeFile } from "node:fs/promises";

const PACKAGE = /\bfrom\s*"onnxruntime-(?:common|web\/webgpu)"/g;
const here = (path) => new URL(path, import.meta.url);

const code = await readFile(here("bundle/demo/transformers.min.js"), "utf8");
const count = code.match(PACKAGE)?.length ?? 0;
if (count !== 2) throw new Error(`transformers.js imports ONNX Runtime in ${count} places instead of 2.`);
await mkdir(here("vendor/"), { recursive: true });
await writeFile(here("vendor/transformers.js"), code.replace(PACKAGE, 'from"../bundle/demo/ort.min.mjs"'));
