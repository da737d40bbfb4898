import { el, table, tiles } from "../dom.js";
import { has, labelled, metric, rate } from "../data.js";
import { bytes, count } from "../format.js";
import { replace } from "./overview.js";

let top, ends, off;

function make() {
  off = el("section", { hidden: true }, el("p", { class: "note" }, "There is no store (STORE=off): messages of users who are away are not kept, and pushes that ask for it are refused."));
  top = tiles([["where", "Store"], ["kept", "Kept for users"], ["logs", "Logs of rooms"], ["queue", "Waiting to be stored"], ["stored", "Stored"], ["unsure", "Of them unsure"],
    ["open", "Replays open"], ["line", "Of them in line"], ["replayed", "Replayed messages"], ["acked", "Acknowledged by clients"], ["receipts", "Receipts"], ["lost", "Receipts lost"],
    ["following", "Streams that follow rooms"], ["broken", "Room logs not followed"]]);
  ends = el("div", { class: "two" });
  return [off, top.list, ends];
}

function update(s) {
  const on = s.about.store !== "off", up = metric(s, "store_up") === 1, n = name => metric(s, name), where = s.about.store.startsWith("nats") || s.about.store.startsWith("tls") ? "NATS" : s.about.store;
  off.hidden = on;
  top.set("where", on ? up ? "up" : "down" : "off", on ? where : "", on ? up ? "good" : "bad" : "");
  top.set("kept", on ? bytes(n("store_bytes")) : "–", on ? "of " + bytes(n("store_max_bytes")) : "");
  top.set("logs", on ? bytes(n("store_log_bytes")) : "–", "");
  top.set("queue", on ? count(n("store_queue_entries")) : "–", on ? bytes(n("store_queue_bytes")) : "");
  top.set("stored", count(n("push_stored_total")), `${count(rate("push_stored_total"))} /s`);
  top.set("unsure", count(n("push_unsure_total")), "");
  top.set("open", on ? count(n("replay_open")) : "–", "");
  top.set("line", on ? count(n("replay_line")) : "–", "", n("replay_line") ? "warn" : "");
  top.set("replayed", on ? count(n("replay_messages_total")) : "–", on ? `${count(rate("replay_messages_total"))} /s` : "");
  top.set("acked", count(n("push_acked_total")), `${count(rate("push_acked_total"))} /s`);
  top.set("receipts", count(n("receipts_total")), has(s, "receipts") ? `${count(n("receipts"))} in memory` : "");
  top.set("lost", count(n("receipts_lost_total")), "", n("receipts_lost_total") ? "bad" : "");
  top.set("following", on ? count(n("room_log_following")) : "–", "");
  top.set("broken", on ? count(n("room_log_partitions_broken")) : "–", "", n("room_log_partitions_broken") ? "bad" : "");
  const results = (title, name) => {
    const rows = labelled(s, name, "result");
    return el("section", {}, el("h3", {}, title), rows.length ? table(title, [{ name: "Result" }, { name: "Since the start", number: true }], rows.map(([word, n]) => [word, count(n)])) : el("p", { class: "note" }, "None."));
  };
  replace(ends, results("Messages to be stored", "store_append_total"), results("Replays that ended", "replay_total"));
}

export default { title: "Store and replay", make, update };
