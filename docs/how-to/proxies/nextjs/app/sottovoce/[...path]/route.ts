// Passes /api/chat/... on to two Sottovoce servers; next.config.mjs sends those requests here.
// A rewrite to the servers alone hides that one of them has died: the browser would hear nothing
// and wait.

export const runtime = "nodejs";
export const dynamic = "force-dynamic";

const SERVERS = (
  process.env.SOTTOVOCE_SERVERS ?? "http://127.0.0.1:8001,http://127.0.0.1:8002"
).split(",");
const ANSWER_MS = 15_000; // to the head of an answer; Sottovoce itself gives up well before
const SILENCE_MS = 60_000; // in a stream: four heartbeats
const MAX_BODY_BYTES = 128 * 1024; // SOTTOVOCE_MAX_BODY_BYTES
const PASSED = [
  "accept", "authorization", "content-type", "cookie", "idempotency-key",
  "last-event-id", "origin", "sec-fetch-site", "x-forwarded-for",
];
const HOP_BY_HOP = [
  "connection", "content-encoding", "content-length", "keep-alive", "transfer-encoding",
];
// fetch() failed before anything was sent, so that also a POST may be sent to the other server.
const NOT_SENT = [
  "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ENOTFOUND", "UND_ERR_CONNECT_TIMEOUT",
];

async function pass(
  request: Request,
  context: { params: Promise<{ path: string[] }> },
): Promise<Response> {
  const { path } = await context.params;
  const target =
    `/api/chat/${path.map(encodeURIComponent).join("/")}${new URL(request.url).search}`;
  const wantsEvents = request.headers.get("accept")?.includes("text/event-stream") ?? false;
  const headers = new Headers();
  for (const name of PASSED) {
    const value = request.headers.get(name);
    if (value !== null) headers.set(name, value);
  }
  let body: Uint8Array<ArrayBuffer> | undefined;
  if (request.method !== "GET") {
    body = await read(request);
    if (body === undefined) return failure(413, "The message is too long.");
  }

  const first = Math.floor(Math.random() * SERVERS.length);
  for (let tried = 0; tried < SERVERS.length; tried++) {
    const server = SERVERS[(first + tried) % SERVERS.length];
    const abort = new AbortController();
    const leave = () => abort.abort();
    request.signal.addEventListener("abort", leave);
    if (request.signal.aborted) leave();
    const late = setTimeout(leave, ANSWER_MS);
    try {
      const answer = await fetch(server + target, {
        method: request.method, headers, body, signal: abort.signal,
        cache: "no-store", redirect: "manual",
      });
      const down = [502, 503, 504].includes(answer.status);
      if (down && (wantsEvents || (!body && tried + 1 < SERVERS.length))) {
        await answer.body?.cancel();
        continue;
      }
      const passedOn = new Headers(answer.headers);
      for (const name of HOP_BY_HOP) passedOn.delete(name);
      return new Response(answer.body && relay(answer.body, abort), {
        status: answer.status, headers: passedOn,
      });
    } catch (error) {
      if (request.signal.aborted) break;
      const code = (error as { cause?: { code?: string } }).cause?.code ?? "";
      if (body && !NOT_SENT.includes(code)) break;
    } finally {
      clearTimeout(late);
    }
  }
  return wantsEvents ? noStream() : failure(502, "The chat cannot be reached.");
}

export { pass as GET, pass as POST };

/** The answer's bytes, until the server ends it, dies, or is silent for too long. A stream then
 * ends, and the browser reconnects; when the browser leaves, the server is told. */
function relay(body: ReadableStream<Uint8Array>, abort: AbortController) {
  const reader = body.getReader();
  return new ReadableStream<Uint8Array>({
    async pull(out) {
      const silent = setTimeout(() => abort.abort(), SILENCE_MS);
      try {
        const { done, value } = await reader.read();
        if (done) out.close();
        else out.enqueue(value);
      } catch (error) {
        out.error(error);
      } finally {
        clearTimeout(silent);
      }
    },
    cancel() {
      abort.abort();
    },
  });
}

/** The request's body, or undefined if it is too long. */
async function read(request: Request): Promise<Uint8Array<ArrayBuffer> | undefined> {
  const parts: Uint8Array[] = [];
  let length = 0;
  const reader = request.body?.getReader();
  for (;;) {
    const { done, value } = (await reader?.read()) ?? { done: true, value: undefined };
    if (done) break;
    length += value.length;
    if (length > MAX_BODY_BYTES) {
      await reader?.cancel();
      return undefined;
    }
    parts.push(value);
  }
  const body = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    body.set(part, at);
    at += part.length;
  }
  return body;
}

/** An EventSource gives up for good at any status but 200, so a stream that neither server can
 * give is an event stream that ends. The pause is random, for all of them end in one moment. */
function noStream(): Response {
  const retry = 3000 + Math.floor(Math.random() * 3000);
  return new Response(
    `retry: ${retry}\nevent: closing\ndata: {"reason":"unavailable","reconnect":true}\n\n`,
    {
      headers: {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-store, no-transform",
      },
    },
  );
}

function failure(status: number, error: string): Response {
  return Response.json({ error }, { status, headers: { "Cache-Control": "no-store" } });
}
