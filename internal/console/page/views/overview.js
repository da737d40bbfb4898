import { el, state, table, tiles } from "../dom.js";
import { has, metric, pushApis, pushRate, quantile, rate } from "../data.js";
import { chart } from "../chart.js";
import { ago, bytes, count, ms } from "../format.js";

let top, charts, methods, others, reasons, hint;

function make() {
  top = tiles([["ready", "Ready to deliver"], ["pushes", "Pushes"], ["users", "Users reached"], ["p50", "Latency, median"], ["p99", "Latency, 99 %"],
    ["flight", "In flight"], ["refused", "Refused for load"], ["nodes", "Connect-Nodes"], ["controller", "Controller"], ["etcd", "etcd"], ["store", "Store"], ["memory", "Request memory"]]);
  charts ??= [ // once: they listen to the window
    chart("Users by outcome, a second", [
      { key: "delivered", name: "delivered", colour: "delivered" }, { key: "offline", name: "offline", colour: "offline" },
      { key: "failed", name: "failed", colour: "failed" }, { key: "unknown", name: "unknown", colour: "unknown" },
    ], count, true),
    chart("Latency of pushes", [{ key: "p50", name: "median", colour: "p50" }, { key: "p99", name: "99 %", colour: "p99" }], v => v === null || v === undefined ? "–" : ms(v)),
    chart("Load", [{ key: "flight", name: "in flight", colour: "flight" }, { key: "refused", name: "refused a second", colour: "refused" }], count),
  ];
  reasons = el("section", { class: "banner", hidden: true });
  hint = el("p", { class: "note" }, "Nothing is pushed at the moment. ", el("a", { href: "#push" }, "Send a test push"), ".");
  methods = el("section", {});
  others = el("section", {});
  return [reasons, top.list,
    el("section", {}, el("h3", {}, "Users by outcome, a second"), charts[0].element, hint),
    el("div", { class: "two" },
      el("section", {}, el("h3", {}, "Latency of pushes"), charts[1].element),
      el("section", {}, el("h3", {}, "Load"), charts[2].element)),
    methods, others];
}

function update(s) {
  const well = s.nodes.well ?? 0, total = s.nodes.rows.length + (s.nodes.left_out ?? 0);
  const pushes = pushRate(), refused = rate("refused_total"), shed = metric(s, "shed_priorities");
  top.set("ready", s.state.not_ready ? "No" : "Yes", "", s.state.not_ready ? "bad" : "good");
  top.set("pushes", count(pushes), "/s");
  top.set("users", count(rate("push_success_total")), "/s");
  top.set("p50", ms(quantile(0.5)), "");
  top.set("p99", ms(quantile(0.99)), "");
  top.set("flight", count(metric(s, "pushes_in_flight")), "");
  top.set("refused", count(refused), shed ? `/s, ${shed} of 4 priorities shed` : "/s", refused > 0 || shed ? "warn" : "");
  top.set("nodes", `${well} of ${total}`, "up", well < total ? "bad" : total ? "good" : "warn");
  const away = s.state.controller_away_ms > 3000;
  top.set("controller", away ? "away" : s.state.watched ? "watched" : "answers", away ? ago(s.state.controller_away_ms) : "", away ? "bad" : "good");
  top.set("etcd", !s.state.etcd_synced ? "not heard" : s.state.etcd_stale_ms ? "away" : "followed", s.state.etcd_stale_ms ? ago(s.state.etcd_stale_ms) : "", !s.state.etcd_synced || s.state.etcd_stale_ms ? "bad" : "good");
  const off = s.about.store === "off", up = metric(s, "store_up") === 1;
  top.set("store", off ? "off" : up ? "up" : "down", off ? "" : bytes(metric(s, "store_bytes")), off ? "" : up ? "good" : "bad");
  top.set("memory", bytes(metric(s, "api_space_bytes")), "of " + bytes(metric(s, "api_space_limit_bytes")));
  for (const c of charts) c.update();
  hint.hidden = pushes !== 0;

  const why = [...s.state.not_ready ?? []];
  if (metric(s, "insecure")) why.push("insecure: ALLOW_INSECURE lets others in without TLS or credentials");
  if (reasons.dataset.says !== why.join("\n")) {
    reasons.dataset.says = why.join("\n");
    reasons.hidden = !why.length;
    reasons.className = "banner" + (s.state.not_ready ? "" : " warn");
    reasons.replaceChildren(...why.map(w => el("p", { class: "note" }, w)));
  }
  const columns = [{ name: "Method" }, { name: "Pushes/s", number: true }, { name: "Success", number: true }, { name: "Partial", number: true }, { name: "Failed", number: true }, { name: "Errors", number: true }, { name: "Median", number: true }, { name: "99 %", number: true }];
  replace(methods, el("h3", {}, "By method"), table("By method", columns, pushApis.map(api => [
    api, count(rate("api_requests_total", `api="${api}"`)),
    ...["success", "partial", "failed", "error"].map(status => count(metric(s, "api_requests_total", `api="${api}"`, `status="${status}"`))),
    ms(quantile(0.5, api)), ms(quantile(0.99, api)),
  ])));
  const cached = kind => count(metric(s, "route_cached", `what="${kind}"`));
  replace(others, el("h3", {}, "This instance, and others"),
    el("p", { class: "note" }, `${s.about.id}, ${s.about.version}, up for ${ago(s.time - Date.parse(s.about.started))}, gRPC at ${s.about.grpc}, Controller at ${s.state.controller}. `,
      `Cached: ${cached("rooms")} rooms with ${cached("members")} members, ${cached("users")} users. ${count(metric(s, "api_connections"))} connections, ${count(metric(s, "api_streams"))} streams.`,
      has(s, "quota_etcd_up") && metric(s, "quota_etcd_up") === 0 ? " Quotas cannot be checked with etcd." : ""),
    table("Instances", [{ name: "Instance", wrap: true }, { name: "gRPC" }, { name: "Console" }], (s.instances ?? []).map(i => [
      i.id === s.about.id ? state(i.id + " (this one)", "good") : i.id, i.address,
      i.url && /^https?:\/\//.test(i.url) && i.id !== s.about.id ? el("a", { href: i.url + "/console/", target: "_blank", rel: "noopener" }, "open") : "",
    ])));
}

// replace exchanges what an element holds, unless somebody is in it with the keyboard or has selected a part.
export function replace(element, ...children) {
  const selection = getSelection();
  if (element.contains(document.activeElement) || !selection.isCollapsed && element.contains(selection.anchorNode)) return;
  const scrolled = element.querySelector(".scroll")?.scrollLeft ?? 0;
  element.replaceChildren(...children.filter(Boolean));
  const now = element.querySelector(".scroll");
  if (now && scrolled) now.scrollLeft = scrolled;
}

export default { title: "Overview", make, update };
