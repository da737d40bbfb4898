import { el, table, tiles } from "../dom.js";
import { has, labelled, metric, objects, rate } from "../data.js";
import { count } from "../format.js";
import { replace } from "./overview.js";

let top, list, refused;

function make() {
  top = tiles([["policy", "Callers in the policy"], ["called", "Have called"], ["denied", "Refused for who they are"], ["refused", "Refused for load"], ["quota", "Quotas in etcd"]]);
  list = el("section", {});
  refused = el("div", { class: "two" });
  return [top.list, list, refused];
}

const part = (left, limit) => limit ? `${count(left)} of ${count(limit)}` : "no limit";

function update(s) {
  const callers = objects(s.callers), all = callers.length + (s.callers.left_out ?? 0);
  top.set("policy", s.about.auth ? count(metric(s, "policy_callers")) : "–", "");
  top.set("called", s.about.auth ? count(all) : "–", "");
  top.set("denied", count(metric(s, "auth_failures_total")), "");
  top.set("refused", count(rate("refused_total")), "/s");
  top.set("quota", !has(s, "quota_etcd_up") ? "none" : metric(s, "quota_etcd_up") ? "answer" : "do not answer", "", has(s, "quota_etcd_up") ? metric(s, "quota_etcd_up") ? "good" : "bad" : "");
  replace(list, el("h3", {}, "Callers, the ones with the least left first"), !s.about.auth
    ? el("p", { class: "note" }, "Callers need not say who they are (AUTH_MODE=none). RATE_LIMIT then holds for each address.")
    : !callers.length ? el("p", { class: "note" }, "Nobody has called since the start.")
      : table("Callers", [{ name: "Caller" }, { name: "Tenant" }, { name: "Left of its rate", number: true }, { name: "Used of its day", number: true },
        { name: "Left of the tenant's rate", number: true }, { name: "Used of the tenant's day", number: true }, { name: "Tenant in flight", number: true }],
      callers.map(c => [c.name, c.tenant || "–", part(c.rate_left, c.rate), part(c.daily_used, c.daily), c.tenant ? part(c.tenant_rate_left, c.tenant_rate) : "–",
        c.tenant ? part(c.tenant_daily_used, c.tenant_daily) : "–", c.tenant ? part(c.tenant_in_flight, c.tenant_in_flight_limit) : "–"])),
  s.callers.left_out ? el("p", { class: "note" }, `${s.callers.left_out} more are left out.`) : null);
  const reasons = (title, name, label) => {
    const rows = labelled(s, name, label);
    return el("section", {}, el("h3", {}, title), rows.length ? table(title, [{ name: "Reason" }, { name: "Since the start", number: true }], rows.map(([reason, n]) => [reason, count(n)])) : el("p", { class: "note" }, "None."));
  };
  replace(refused, reasons("Refused for load", "refused_total", "reason"), reasons("Refused for who calls", "auth_failures_total", "reason"));
}

export default { title: "Callers and quotas", make, update };
