import { el, table } from "../dom.js";
import { ask } from "../data.js";
import { ms } from "../format.js";
import { asPush, base64, target } from "../target.js";

const most = 50; // users of a list, each of whom gets a push of its own
let to, content, store, ack, button, result, links;

function make() {
  to = target([["room", "Room"], ["rooms", "Rooms"], ["user", "User"], ["users", "Users"], ["everybody", "Everybody"]]);
  content = el("textarea", { maxlength: "65536", required: true, rows: "2" }, "Hello from the console");
  store = el("input", { type: "checkbox" });
  ack = el("input", { type: "checkbox" });
  button = el("button", {}, "Send");
  result = el("div", { "aria-live": "polite" });
  links = el("section", { hidden: true });
  const form = el("form", { onsubmit: async e => {
    e.preventDefault();
    button.disabled = true;
    try { result.replaceChildren(...await send()); } catch (problem) {
      result.replaceChildren(el("section", { class: "error", role: "alert" }, problem.message));
    }
    button.disabled = false;
  } }, to.elements, el("label", { class: "wide" }, "Text", content),
  el("label", { class: "check" }, store, "Store for whoever is away"), el("label", { class: "check" }, ack, "Wait for clients"), button);
  return [links, el("section", {}, form), result];
}

function options() {
  const o = {};
  if (store.checked) o.offline = "OFFLINE_STORE";
  if (ack.checked) o.ack = "ACK_CLIENT";
  return Object.keys(o).length ? { options: o } : {};
}

// outcome is what became of one target.
function outcome(s) {
  if (s.stored) return s.unsure ? "stored, may have it" : "stored";
  for (const word of ["failed", "unknown", "offline"]) if (s[word]) return word;
  return s.delivered ? (s.acked ? "delivered, acknowledged" : "delivered") : "nobody";
}
function shown(word) { return el("span", { class: "outcome " + word.split(",")[0] }, word); }

async function send() {
  const kind = to.kind(), body = { text: content.value, ...options() };
  const began = performance.now();
  if (kind === "users") {
    const ids = to.ids();
    if (ids.length > most) throw new Error(`The console pushes to ${most} users of a list at most, each by a push of its own.`);
    const all = await Promise.all(ids.map(id => ask(`/v1/users/${encodeURIComponent(id)}/messages`, body).then(r => r.answer, problem => ({ problem }))));
    return [el("section", {}, el("h3", {}, `${ids.length} pushes in ${ms(performance.now() - began)}`),
      table("Outcomes", [{ name: "User", wrap: true }, { name: "Outcome" }, { name: "What was said", wrap: true }],
        all.map((a, i) => [ids[i], a.problem ? shown("failed") : shown(outcome(a.summary ?? {})), a.problem ? a.problem.message : [a.message, ...failures(a)].filter(Boolean).join("; ")])))];
  }
  // Who is where has to be asked before: a reply has numbers, and names of nodes.
  const before = kind === "room" || kind === "rooms" ? await ask("/pubsub.PushManagerService/Explain", { ...asPush(to, { data: base64(content.value) }), sample: 50 }).then(r => r.answer, () => null) : null;
  const sent = performance.now();
  const path = { room: `/v1/rooms/${encodeURIComponent(to.id())}/messages`, rooms: "/v1/rooms/messages", user: `/v1/users/${encodeURIComponent(to.id())}/messages` }[kind] ?? "/v1/broadcasts";
  if (kind === "rooms") body.room_ids = to.ids();
  const { answer } = await ask(path, body), s = answer.summary ?? {}, took = performance.now() - sent;
  const numbers = ["delivered", "offline", "failed", "unknown", "stored", "unsure", "acked", "duplicates", "filtered"].filter(word => s[word]).map(word => [shown(word), String(s[word])]);
  const parts = [el("section", {}, el("h3", {}, `${answer.success ? "Success" : answer.message || "No success"}: ${s.delivered ?? 0} of ${s.targets ?? 0} delivered in ${ms(took)}`),
    numbers.length ? table("Outcomes", [{ name: "Outcome" }, { name: "Users", number: true }], numbers) : el("p", { class: "note" }, "Nobody was there."),
    failures(answer).map(f => el("p", { class: "error" }, f)))];
  const bad = new Map((s.nodeFailures ?? []).map(f => [f.nodeId, f.reason]));
  const rows = [];
  for (const d of before?.deliveries ?? []) {
    for (const id of d.userIds ?? []) rows.push([id, d.nodeId, bad.has(d.nodeId) ? shown(bad.get(d.nodeId).startsWith("unknown") ? "unknown" : "failed") : shown("delivered"), bad.get(d.nodeId) ?? ""]);
  }
  for (const id of before?.offlineUserIds ?? []) rows.push([id, "", shown(s.stored ? "stored" : "offline"), ""]);
  if (rows.length) {
    const whole = rows.length >= (before.targets ?? 0) && (s.offline ?? 0) === (before.offline ?? 0);
    parts.push(el("section", {}, el("h3", {}, "By user"), table("Users", [{ name: "User", wrap: true }, { name: "Node" }, { name: "Outcome" }, { name: "Why", wrap: true }], rows),
      whole ? null : el("p", { class: "note" }, "Only a part is listed, or somebody has come or gone meanwhile: the numbers above count.")));
  }
  return parts;
}

function failures(answer) { return (answer.summary?.nodeFailures ?? []).map(f => `${f.nodeId || "store"}: ${f.reason}${f.users ? ` (${f.users} users)` : ""}`); }

// Of a stack that is for trying, the server names pages on which a person can be a user.
function update(s) {
  const pages = (s.pages ?? []).filter(p => /^https?:\/\//.test(p.url));
  if (links.dataset.says === JSON.stringify(pages)) return;
  links.dataset.says = JSON.stringify(pages);
  links.hidden = !pages.length;
  links.replaceChildren(el("h3", {}, "Be a user"), el("p", { class: "note" }, "Each link opens a user of the room lobby in a tab of its own. Then send, and see it arrive there."),
    el("div", { class: "links" }, pages.map(p => el("a", { href: p.url, target: "_blank", rel: "noopener" }, `Open ${p.user}`))));
}

export default { title: "Test push", make, update };
