// An EventSource for each channel, which writes down what it sees, one JSON a line.
// Arguments: the base URL, and a JSON list of [channel, session token].
import { EventSource } from "eventsource";

const [base, channels] = process.argv.slice(2);
const say = (what) => console.log(JSON.stringify(what));
for (const [channel, token] of JSON.parse(channels)) {
  const source = new EventSource(`${base}/api/chat/${channel}`, {
    fetch: (input, init) =>
      fetch(input, { ...init, headers: { ...init.headers, Authorization: `Bearer ${token}` } }),
  });
  source.onopen = () => say({ channel, kind: "open" });
  source.onmessage = ({ lastEventId, data }) =>
    say({ channel, kind: "message", seq: Number(lastEventId), id: JSON.parse(data).id });
  source.onerror = ({ code }) =>
    say({ channel, kind: "error", status: code ?? null, dead: source.readyState === 2 });
}
