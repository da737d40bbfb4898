import { classes, el, scroll, text } from "../dom.js";
import { kinds, nodes } from "../data.js";
import { bytes, count, ms } from "../format.js";

const rank = ["down", "stalled", "partly", "connecting", "draining", "unary", "up"];
const columns = [
  { key: "id", name: "Node", wrap: true }, { key: "state", name: "State", order: n => rank.indexOf(n.state) },
  { key: "connections", name: "Links", number: true, show: n => `${n.connections} of ${n.links}` },
  { key: "ack_p50_ms", name: "Ack, median", number: true, show: n => n.frames ? ms(n.ack_p50_ms) : "–" },
  { key: "ack_p99_ms", name: "Ack, 99 %", number: true, show: n => n.frames ? ms(n.ack_p99_ms) : "–" },
  { key: "queued", name: "Queued", number: true, show: n => n.queued ? `${count(n.queued)} (${bytes(n.queued_bytes)}, ${ms(n.queued_ms)})` : "0" },
  { key: "unacked", name: "Unacknowledged", number: true, show: n => `${count(n.unacked)} of ${count(n.window)}` + (n.unacked ? `, ${ms(n.unacked_ms)}` : "") },
  { key: "breaks", name: "Lost links", number: true }, { key: "stalls", name: "Stalls", number: true },
  { key: "address", name: "Address", mono: true }, { key: "boot", name: "Boot id", mono: true },
  { key: "features", name: "Features", wrap: true },
];
let heads, body, filter, said, rows, by = "state", up = true;

function make() {
  rows = new Map();
  filter = el("input", { type: "search", oninput: () => last && update(last) });
  said = el("p", { class: "note", role: "status" });
  heads = Object.fromEntries(columns.map(c => [c.key, el("th", { scope: "col", class: c.number ? "number" : null },
    el("button", { type: "button", onclick: () => { up = by === c.key ? !up : !c.number; by = c.key; if (last) update(last); } }, c.name))]));
  body = el("tbody", {});
  return [el("div", { class: "bar" }, el("label", {}, "Show nodes whose id, address or state has", filter)),
    el("section", {}, scroll("Connect-Nodes", el("table", {}, el("thead", {}, el("tr", {}, Object.values(heads))), body))), said];
}

// features are those of a node by their names, or those that it lacks, whichever is shorter.
function features(s, n) {
  const all = Object.entries(s.features), has = all.filter(([bit]) => n.features >>> bit & 1), lacks = all.filter(([bit]) => !(n.features >>> bit & 1));
  if (!has.length) return kinds[n.state] === "good" ? "none" : "–";
  if (!lacks.length) return "all";
  return lacks.length < has.length ? "all but " + lacks.map(([, name]) => name).join(", ") : has.map(([, name]) => name).join(", ");
}

let last = null;
function update(s) {
  last = s;
  for (const [key, th] of Object.entries(heads)) key === by ? th.setAttribute("aria-sort", up ? "ascending" : "descending") : th.removeAttribute("aria-sort");
  const column = columns.find(c => c.key === by), order = column.order ?? (n => n[by]);
  const q = filter.value.trim().toLowerCase();
  const all = nodes(s).filter(n => !q || [n.id, n.address, n.state].some(t => t.toLowerCase().includes(q)));
  all.sort((a, b) => {
    const x = order(a), y = order(b), by = x < y ? -1 : x > y ? 1 : 0;
    return (up ? by : -by) || (a.id < b.id ? -1 : 1);
  });
  const keep = new Set(all.map(n => n.id));
  for (const [id, row] of rows) if (!keep.has(id)) { row.tr.remove(); rows.delete(id); }
  let at = body.firstElementChild;
  for (const n of all) {
    let row = rows.get(n.id);
    if (!row) {
      const cells = columns.map((c, i) => el(i ? "td" : "th", { class: [c.number && "number", c.wrap && "wrap", c.mono && "mono"].filter(Boolean).join(" ") || null, scope: i ? null : "row" }));
      rows.set(n.id, row = { cells, tr: el("tr", {}, cells) });
    }
    columns.forEach((c, i) => {
      if (c.key === "state") {
        const word = row.cells[i].firstElementChild ?? row.cells[i].appendChild(el("span", {}));
        text(word, n.state);
        classes(word, "state " + (kinds[n.state] ?? ""));
        n.trouble ? row.cells[i].setAttribute("title", n.trouble) : row.cells[i].removeAttribute("title");
        return;
      }
      if (c.key === "features") { text(row.cells[i], features(s, n)); return; }
      if (c.key === "id") { text(row.cells[i], n.trouble && kinds[n.state] !== "good" ? `${n.id}: ${n.trouble}` : n.id); return; }
      text(row.cells[i], c.show ? c.show(n) : n[c.key]);
    });
    if (row.tr === at) at = at.nextElementSibling;
    else body.insertBefore(row.tr, at);
  }
  text(said, `${all.length} of ${s.nodes.rows.length + (s.nodes.left_out ?? 0)} nodes` + (s.nodes.left_out ? `; ${s.nodes.left_out} are left out, because there are too many` : ""));
}

export default { title: "Nodes", make, update, opened: query => { if (query.has("q")) { filter.value = query.get("q"); if (last) update(last); } } };
