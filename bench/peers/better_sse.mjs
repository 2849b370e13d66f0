// better-sse on Node's own HTTP server, as its guide "Channels" has it.
//   node better_sse.mjs PORT FOLDER-WITH-node_modules

import { createServer } from "node:http";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [port, folder] = process.argv.slice(2);
const found = createRequire(`${folder}/`).resolve("better-sse");
const { createSession, createChannel } = await import(pathToFileURL(found));

const channel = createChannel();

const server = createServer(async (request, response) => {
  if (request.url === "/events") {
    channel.register(await createSession(request, response));
    return;
  }
  let body = "";
  request.setEncoding("utf8");
  request.on("data", (part) => (body += part));
  request.on("end", () => {
    if (request.url === "/publish") channel.broadcast(body, "message");
    response.writeHead(200, { "Content-Type": "text/plain", "Content-Length": "3" });
    response.end("ok\n");
  });
});
server.listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });
