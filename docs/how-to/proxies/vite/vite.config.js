import { defineConfig } from "vite";

const isStream = (request) =>
  /^\/api\/chat\/\d+\/?(\?|$)/.test(request.url) &&
  request.headers.accept?.includes("text/event-stream");

export default defineConfig({
  server: {
    proxy: {
      // An object and not a bare address: that one would change the Host header.
      "/api/chat": {
        target: "http://127.0.0.1:8001",
        changeOrigin: false,
        xfwd: true, // appends to X-Forwarded-For
        proxyTimeout: 60_000, // of silence: four heartbeats
        configure(proxy) {
          proxy.on("proxyRes", (answer, request, response) => {
            if (isStream(request) && answer.statusCode >= 500) {
              answer.resume();
              noStream(response);
            }
            // Left to itself the proxy hides that the server has died, and the page waits.
            answer.on("close", () => {
              if (!answer.complete) response.destroy();
            });
          });
          proxy.on("error", (_error, request, response) => {
            if (!isStream(request)) return; // Vite answers them
            if (response.headersSent) response.destroy();
            else noStream(response);
          });
        },
      },
    },
  },
});

/** An EventSource gives up for good at any status but 200, so a stream that the server cannot
 * give is an event stream that ends. */
function noStream(response) {
  response.writeHead(200, {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store, no-transform",
  });
  response.end(
    'retry: 2000\nevent: closing\ndata: {"reason":"unavailable","reconnect":true}\n\n',
  );
}
