import { el, state, table } from "../dom.js";
import { ask } from "../data.js";
import { bytes, count, ms } from "../format.js";
import { asPush, base64, target } from "../target.js";

let form, result, to;

function make() {
  to = target([["room", "Room"], ["rooms", "Rooms"], ["user", "User"], ["users", "Users"], ["everybody", "Everybody"]]);
  const refresh = el("input", { type: "checkbox" });
  result = el("div", { "aria-live": "polite" });
  const button = el("button", {}, "Explain");
  form = el("form", { onsubmit: async e => {
    e.preventDefault();
    button.disabled = true;
    try {
      const { answer } = await ask("/pubsub.PushManagerService/Explain", { ...asPush(to, { data: base64("Hello") }), refresh: refresh.checked, sample: 20 });
      result.replaceChildren(...explained(answer));
    } catch (problem) {
      result.replaceChildren(el("section", { class: "error" }, problem.message));
    }
    button.disabled = false;
  } }, to.elements, el("label", { class: "check" }, refresh, "Ask the Controller anew"), button);
  return [el("p", { class: "note" }, "What would become of a push. Nothing is sent."), el("section", {}, form), result];
}

function list(title, total, ids) {
  if (!total) return null;
  const shown = ids ?? [];
  return el("p", {}, el("b", {}, `${title}: ${total}. `), shown.join(", "), total > shown.length && shown.length ? ", …" : "");
}

function explained(x) {
  const r = x.route ?? {}, caller = x.caller ?? {}, deliveries = x.deliveries ?? [];
  const facts = [
    r.error ? `The Controller could not be asked: ${r.error}.` : `${r.cached ?? 0} of the answers came from the cache, ${r.lookedUp ?? 0} from the Controller just now; the oldest was true ${ms(Number(r.ageMs ?? 0))} ago.`,
    r.watched ? "The Controller tells of every change." : "",
    r.stale ? "The Controller could not confirm it." : "", r.changed ? "It is known to have changed." : "",
    `Priority ${(caller.priority ?? "PRIORITY_UNSPECIFIED").replace("PRIORITY_", "").toLowerCase()}.`,
    caller.name ? `Caller ${caller.name}${caller.tenant ? ` of tenant ${caller.tenant}` : ""}, allowed by ${caller.rule || "no rule"}.` : "",
    caller.rateLeft !== undefined ? `${caller.rateLeft} pushes are left of the rate.` : "", caller.quotaLeft !== undefined ? `${caller.quotaLeft} are left of the day here.` : "",
  ];
  return [
    el("section", {}, el("h3", {}, !x.found ? "Nobody would get it" : `${deliveries.length} ${deliveries.length === 1 ? "delivery" : "deliveries"}, ${x.targets ?? 0} users`),
      list("Offline", x.offline, x.offlineUserIds), list("Not located", x.unlocated, x.unlocatedUserIds), list("Excluded", x.excluded, x.excludedUserIds),
      el("p", { class: "note" }, facts.filter(Boolean).join(" "))),
    deliveries.length ? el("section", {}, table("Deliveries", [
      { name: "Node", wrap: true }, { name: "Shard", number: true }, { name: "Users", number: true }, { name: "Would be" }, { name: "Link" },
      { name: "Queued", number: true }, { name: "Unacknowledged", number: true }, { name: "Size", number: true }, { name: "Who", wrap: true },
    ], deliveries.map(d => [
      d.nodeId, String(d.shard ?? 0), d.users ? count(d.users) : "all", state(d.verdict, d.verdict === "queued" ? "good" : "bad"), d.linkState || "not registered",
      count(d.queued ?? 0), `${count(d.unacked ?? 0)} of ${count(d.window ?? 0)}`, bytes(Number(d.bytes ?? 0)), (d.userIds ?? []).join(", ") + ((d.users ?? 0) > (d.userIds ?? []).length && d.userIds ? ", …" : ""),
    ]))) : null,
  ].filter(Boolean);
}

export default { title: "Explain", make, update: () => {} };
