// An EventSource that writes down what it sees, one JSON a line. Arguments: URL, session token;
// without a token it sends no header of ours, as a browser's.
import { EventSource } from "eventsource";

const [url, token] = process.argv.slice(2);
const say = (what) => console.log(JSON.stringify(what));
const more = token ? { Authorization: `Bearer ${token}` } : {};
const source = new EventSource(url, {
  fetch: (input, init) => fetch(input, { ...init, headers: { ...init.headers, ...more } }),
});
source.onopen = () => say({ kind: "open" });
source.onmessage = (event) =>
  say({ kind: "message", id: event.lastEventId, data: JSON.parse(event.data) });
source.onerror = (event) =>
  say({ kind: "error", status: event.code ?? null, closed: source.readyState === source.CLOSED });
for (const name of ["closing", "reset"]) {
  source.addEventListener(name, (event) => say({ kind: name, data: JSON.parse(event.data) }));
}
