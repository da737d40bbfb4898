import { announce, el, state, table, text } from "../dom.js";
import { ask } from "../data.js";
import { ago, count } from "../format.js";
import { target } from "../target.js";

const api = "/pubsub.PresenceService/", size = 50; // members of a page
let to, result, device, reason, minutes, kicked, kick, sure = "";

function make() {
  to = target([["room", "Room"], ["user", "User"], ["users", "Users"]], "Of");
  result = el("div", { "aria-live": "polite" });
  const show = el("button", {}, "Show");
  const form = el("form", { onsubmit: e => { e.preventDefault(); shown(show, () => to.kind() === "room" ? members(to.id(), "") : users(to.kind() === "user" ? [to.id()] : to.ids())); } }, to.elements, show);
  return [el("p", { class: "note" }, "Who is in a room, and where users are connected."), el("section", {}, form), disconnecting(), result];
}

async function shown(button, ask) {
  button.disabled = true;
  try { result.replaceChildren(...await ask()); } catch (problem) {
    result.replaceChildren(el("section", { class: "error", role: "alert" }, problem.message));
  }
  button.disabled = false;
}

const since = time => time ? ago(Date.now() - Date.parse(time)) : "";
const failures = answer => (answer.nodeFailures ?? []).map(f => el("p", { class: "error" }, `${f.nodeId}: ${f.reason}`));

async function members(room, page) {
  const { answer } = await ask(api + "GetRoomMembers", { room_id: room, page_token: page, page_size: size });
  const next = answer.nextPageToken ? el("button", { type: "button", class: "quiet", onclick: () => shown(next, () => members(room, answer.nextPageToken)) }, "Next page") : null;
  return [el("section", {}, el("h3", {}, `${count(answer.userCount ?? 0)} users in ${room}`),
    table("Members", [{ name: "User", wrap: true }, { name: "Name", wrap: true }, { name: "Node", wrap: true }, { name: "Joined, ago" }],
      (answer.members ?? []).map(m => [m.userId, m.userName ?? "", m.nodeId ?? "", since(m.joinTime)])), next)];
}

async function users(ids) {
  const { answer } = await ask(api + "GetUsers", { user_ids: ids }), all = answer.users ?? [];
  const connections = all.flatMap(u => (u.connections ?? []).map(c => [
    u.userId, c.nodeId ?? "", c.connectionId ?? "", c.deviceId ?? "", Object.entries(c.attributes ?? {}).map(([key, value]) => `${key}=${value}`).join(", "), (c.roomIds ?? []).join(", "), since(c.connectTime),
  ]));
  return [el("section", {}, el("h3", {}, `${all.filter(u => u.online).length} of ${all.length} online`),
    table("Users", [{ name: "User", wrap: true }, { name: "State" }, { name: "Nodes", wrap: true }, { name: "Rooms", wrap: true }],
      all.map(u => [u.userId, u.online ? state("online", "good") : state("offline"), (u.nodeIds ?? []).join(", "), (u.roomIds ?? []).join(", ")])), failures(answer)),
  connections.length ? el("section", {}, el("h3", {}, `${connections.length} ${connections.length === 1 ? "connection" : "connections"}`),
    table("Connections", [{ name: "User", wrap: true }, { name: "Node", wrap: true }, { name: "Connection" }, { name: "Device", wrap: true }, { name: "Attributes", wrap: true }, { name: "Rooms", wrap: true }, { name: "Since, ago" }], connections),
    all.some(u => u.incomplete) ? el("p", { class: "note" }, "Some connections are missing.") : null) : null].filter(Boolean);
}

// disconnecting is the form that closes connections. It asks again before it does.
function disconnecting() {
  device = el("input", { maxlength: "64", autocapitalize: "off", autocomplete: "off", spellcheck: "false" });
  reason = el("input", { maxlength: "120" });
  minutes = el("input", { type: "number", min: "0", value: "0", required: true });
  kicked = el("p", { role: "status", hidden: true });
  kick = el("button", {}, "Disconnect");
  calm();
  const again = el("button", { type: "button", class: "quiet", onclick: () => disconnect(again, () => ({ ...whom(), allow_again: true })) }, "Let in again");
  const form = el("form", { onsubmit: e => {
    e.preventDefault();
    const request = () => ({ ...whom(), reason: reason.value.trim(), ...(minutes.valueAsNumber > 0 ? { refuse_for: `${60 * minutes.valueAsNumber}s` } : {}) });
    const asked = [to.kind(), to.id(), device.value, minutes.value].join("\n");
    if (sure === asked || to.kind() === "users") { calm(); disconnect(kick, request); return; }
    sure = asked;
    text(kick, `Yes, disconnect ${to.kind() === "room" ? "everybody in " : ""}${to.id()}`);
    setTimeout(() => { if (sure === asked) calm(); }, 5000);
  } }, el("label", { class: "small" }, "Only this device of a user", device), el("label", {}, "Words for the client", reason), el("label", { class: "small" }, "Keep away, minutes", minutes), kick, again);
  return el("details", { class: "card" }, el("summary", {}, "Disconnect"),
    el("p", { class: "note" }, "Closes the connections of the room or the user above, on all nodes. Clients come back at once unless they are kept away."), form, kicked);
}

function calm() {
  sure = "";
  text(kick, "Disconnect");
}

// whom is the room or the user of the form above.
function whom() {
  if (to.kind() === "users") throw new Error("One room or one user is disconnected at a time.");
  if (to.kind() === "room") return { room_id: to.id() };
  return { user_id: to.id(), ...(device.value.trim() ? { device_id: device.value.trim() } : {}) };
}

async function disconnect(button, request) {
  button.disabled = true;
  kicked.hidden = false;
  try {
    const wanted = request(), { answer } = await ask(api + "Disconnect", wanted);
    const n = answer.disconnected ?? 0;
    const said = wanted.allow_again ? answer.message || "May come back" : `${n} ${n === 1 ? "connection" : "connections"} closed on ${answer.nodes ?? 0} nodes${answer.success ? "" : ": " + answer.message}`;
    kicked.setAttribute("class", answer.success ? "note" : "error");
    kicked.replaceChildren(said, ...failures(answer));
    announce(said);
  } catch (problem) {
    kicked.setAttribute("class", "error");
    text(kicked, problem.message);
  }
  button.disabled = false;
}

export default { title: "Presence", make, update: () => {} };
