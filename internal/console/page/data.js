// What the server says, and what can be told from it over time: the server keeps counters, and no history.

const keep = 600; // snapshots, about ten minutes
const credentialKey = "push-manager.credential"; // of this tab, and of no other

export const latest = { snapshot: null, before: null };

// Series by time in seconds, for charts. A gap is null.
export const history = { time: [], delivered: [], offline: [], failed: [], unknown: [], pushes: [], p50: [], p99: [], flight: [], refused: [] };

export function credential() { return sessionStorage.getItem(credentialKey) ?? ""; }
export function setCredential(value) { value ? sessionStorage.setItem(credentialKey, value) : sessionStorage.removeItem(credentialKey); }

// Refusal is an answer that is no success, in the words of the server.
export class Refusal extends Error {
  constructor(status, code, message) { super(message); this.status = status; this.code = code; }
}

// ask sends a request with the credential of this tab. Without a body it is a GET.
export async function ask(path, body) {
  const headers = {};
  if (credential()) headers.Authorization = "Bearer " + credential();
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const r = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", credentials: "same-origin" /* a certificate of the browser may say who this is */, signal: AbortSignal.timeout(10000) });
  const text = await r.text();
  let answer = null;
  try { answer = JSON.parse(text); } catch { /* it is told below */ }
  if (!r.ok) throw new Refusal(r.status, answer?.code ?? "", answer?.message ?? (text.slice(0, 200) || r.statusText));
  return { answer, age: Number(r.headers.get("X-Snapshot-Age") ?? 0) };
}

// metric is a metric of docs/metrics.md without push_manager_. Of one with labels it is the sum of those that have all of these texts.
export function metric(snapshot, name, ...labels) {
  if (snapshot.metrics[name] !== undefined) return snapshot.metrics[name];
  let sum = 0;
  for (const [key, value] of Object.entries(snapshot.metrics)) {
    if (key.startsWith(name + "{") && labels.every(l => key.includes(l))) sum += value;
  }
  return sum;
}

// has tells whether the server has the metric: some are those of parts that are switched off.
export function has(snapshot, name) { return snapshot.metrics[name] !== undefined; }

// labelled lists [value of the label, value of the metric], the highest first.
export function labelled(snapshot, name, label) {
  const all = new Map(), pattern = new RegExp(label + '="((?:[^"\\\\]|\\\\.)*)"');
  for (const [key, value] of Object.entries(snapshot.metrics)) {
    const found = key.startsWith(name + "{") && pattern.exec(key);
    if (found) all.set(found[1], (all.get(found[1]) ?? 0) + value);
  }
  return [...all].sort((a, b) => b[1] - a[1]);
}

// rate is by how much a metric has risen in a second, null while that is not known.
export function rate(name, ...labels) {
  const { snapshot, before } = latest;
  if (!before || snapshot.about.started !== before.about.started) return null;
  return Math.max(0, (metric(snapshot, name, ...labels) - metric(before, name, ...labels)) / ((snapshot.time - before.time) / 1000));
}

// pushApis are the methods that push; others are counted beside them.
export const pushApis = ["PushToRoom", "PushToUser", "PushToUsers", "BroadcastMessage"];

// pushRate is how many pushes were answered in a second.
export function pushRate() {
  const all = pushApis.map(api => rate("api_requests_total", `api="${api}"`));
  return all.includes(null) ? null : all.reduce((a, b) => a + b, 0);
}

// quantile is that of the pushes between two snapshots in ms, null without any.
export function quantile(q, ...apis) {
  const { snapshot, before } = latest, bounds = snapshot.latency_bounds;
  if (!before || snapshot.about.started !== before.about.started) return null;
  const counts = new Array(bounds.length + 1).fill(0);
  for (const api of apis.length ? apis : Object.keys(snapshot.latency_counts)) {
    snapshot.latency_counts[api].forEach((n, i) => counts[i] += n - (before.latency_counts[api]?.[i] ?? 0));
  }
  const total = counts.reduce((a, b) => a + b, 0);
  if (total <= 0) return null;
  let rest = q * total;
  for (let i = 0; i < bounds.length; i++) {
    if (counts[i] > 0 && rest <= counts[i]) return 1000 * ((bounds[i - 1] ?? 0) + (bounds[i] - (bounds[i - 1] ?? 0)) * rest / counts[i]);
    rest -= counts[i];
  }
  return 1000 * bounds.at(-1);
}

// nodes are the rows of the snapshot as objects.
export function nodes(snapshot) { return objects(snapshot.nodes); }
export function objects(table) { return table.rows.map(row => Object.fromEntries(row.map((value, i) => [table.columns[i], value]))); }

// kinds are the colours of states of a node.
export const kinds = { up: "good", unary: "good", partly: "warn", stalled: "warn", draining: "warn", connecting: "warn", down: "bad" };

function remember(snapshot) {
  latest.before = latest.snapshot;
  latest.snapshot = snapshot;
  const h = history, at = snapshot.time / 1000;
  const push = values => {
    for (const key of Object.keys(h)) h[key].push(values[key] ?? null);
    if (h.time.length > keep) for (const key of Object.keys(h)) h[key].shift();
  };
  if (!latest.before) return;
  if (h.time.length && at - h.time.at(-1) > 5) push({ time: h.time.at(-1) + 1 }); // nobody has looked
  push({
    time: at, delivered: rate("push_success_total"), offline: rate("push_offline_total"), failed: rate("push_failed_total"), unknown: rate("push_unknown_total"),
    pushes: pushRate(), p50: quantile(0.5), p99: quantile(0.99), flight: metric(snapshot, "pushes_in_flight"), refused: rate("refused_total"),
  });
}

// follow asks for a snapshot whenever there is a new one, while the page is seen. tell gets each one, or why there is none; fault gets
// what tell throws, which is no fault of the server's.
export function follow(tell, fault) {
  let timer = 0, failures = 0, asking = false;
  const next = async () => {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    let got = null, problem = null, wait = 1000;
    try {
      const { answer, age } = await ask("snapshot");
      failures = 0;
      wait = Math.max(200, 1015 - age + Math.random() * 60); // a moment after the server may make another one
      got = answer;
    } catch (p) {
      wait = Math.min(1000 * 2 ** failures++, 8000);
      problem = p;
    }
    asking = false;
    const refused = problem instanceof Refusal && [401, 403].includes(problem.status); // until there is another credential
    if (!refused) timer = setTimeout(next, wait);
    try {
      if (problem) tell(null, problem);
      else if (got.time !== latest.snapshot?.time) {
        remember(got);
        tell(got, null);
      }
    } catch (thrown) { fault(thrown); }
  };
  document.addEventListener("visibilitychange", next);
  next();
  return next;
}
