// An HTTP service that labels texts with the bundle in the folder `bundle`.

import { sessionOptions } from "./bundle/node.mjs"; // first: it switches off reports of ONNX Runtime
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";
import { env, pipeline } from "@huggingface/transformers";

const { HOST = "127.0.0.1", PORT = "8000" } = process.env;
const MAX_BYTES = 100_000; // largest body of a request

class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Returns the text in the body of a request. Reads too large bodies to their end, so that the client gets an answer. */
async function readText(request) {
  const parts = [];
  let size = 0;
  for await (const part of request) {
    size += part.length;
    if (size <= MAX_BYTES) parts.push(part);
  }
  if (size > MAX_BYTES) throw new RequestError(413, `The body has more than ${MAX_BYTES} bytes.`);
  let body;
  try {
    body = JSON.parse(Buffer.concat(parts).toString("utf8"));
  } catch {
    throw new RequestError(400, "The body is not JSON.");
  }
  if (typeof body?.text !== "string" || !body.text) throw new RequestError(400, 'The body must be {"text": "…"}.');
  return body.text;
}

async function answer(request) {
  const route = `${request.method} ${request.url}`;
  if (route === "GET /health") return { status: "ok" };
  if (route !== "POST /classify") throw new RequestError(404, "This service has POST /classify and GET /health.");
  const [{ label, score }] = await classify(await readText(request));
  return { label, score };
}

env.allowRemoteModels = false;
const classify = await pipeline("text-classification", fileURLToPath(new URL("bundle", import.meta.url)), {
  dtype: "q8",
  session_options: await sessionOptions(), // exact 8-bit products on x86 without VNNI
});

const server = createServer(async (request, response) => {
  let [status, body] = [200, {}];
  try {
    body = await answer(request);
  } catch (error) {
    status = error.status ?? 500;
    if (status === 500) console.error(error);
    body = { error: status === 500 ? "The service failed." : error.message };
  }
  response.writeHead(status, { "Content-Type": "application/json" }).end(JSON.stringify(body));
});
server.listen(Number(PORT), HOST, () => console.log(`http://${HOST}:${server.address().port}/classify`));
process.once("SIGTERM", () => server.close());
