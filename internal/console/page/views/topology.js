import { el, svg, text } from "../dom.js";
import { kinds, latest, metric, nodes, pushRate } from "../data.js";
import { count } from "../format.js";

const lines = 40; // nodes that are drawn with a line each; more are dots
let box, caption, drawn = 0;

function make() {
  box = el("div", {});
  caption = el("p", { class: "note" });
  new ResizeObserver(() => { if (box.isConnected && latest.snapshot && box.clientWidth !== drawn) draw(latest.snapshot); }).observe(box);
  return [el("section", {}, box), caption,
    el("p", { class: "note" }, "The colour is the state: green takes deliveries, amber does so in part or not at the moment, red is not reachable. The width is the rate of frames. ",
      el("a", { href: "#nodes" }, "Nodes"), " has the same as a table.")];
}

// frames is the rate of frames by node, which the node has acknowledged.
function frames(s) {
  const before = new Map(latest.before ? nodes(latest.before).map(n => [n.id, n.frames]) : []);
  const seconds = latest.before ? (s.time - latest.before.time) / 1000 : 1;
  return n => before.has(n.id) ? Math.max(0, n.frames - before.get(n.id)) / seconds : 0;
}

function width(perSecond) { return perSecond > 0 ? Math.min(1.5 + Math.log10(1 + perSecond) * 2, 10) : 1.2; }

function draw(s) {
  drawn = box.clientWidth;
  const all = nodes(s), perSecond = frames(s), w = Math.max(box.clientWidth, 240), narrow = w < 620, few = all.length <= lines;
  const parts = [];
  const label = (x, y, texts, anchor) => texts.map((t, i) => svg("text", { x, y: y + 17 * i, class: i ? "dim" : null, "text-anchor": anchor ?? "start" }, t));
  const short = (t, most) => t.length > most ? t.slice(0, most - 1) + "…" : t;
  const manager = [short(s.about.id, 24), `${count(pushRate())} pushes/s`, `${s.about.shards} ${s.about.shards === 1 ? "shard" : "shards"}`];
  const callers = ["Callers", `${count(metric(s, "api_connections"))} connections`, `${count(metric(s, "api_streams"))} streams`];
  const boxes = (x, y, width, texts) => [svg("rect", { x, y, width, height: 70, rx: 10, class: "box" }), ...label(x + 14, y + 23, texts)];
  let height = 0;
  if (few && !narrow) {
    const row = 56, x = w - 260, middle = Math.max(all.length * row / 2, 40);
    height = Math.max(all.length * row, 90);
    parts.push(svg("path", { class: "line " + (pushRate() > 0 ? "good" : ""), "stroke-width": width(pushRate() ?? 0), d: `M150 ${middle} H${w / 2 - 110}` }));
    all.forEach((n, i) => {
      const y = i * row + row / 2, from = w / 2 + 60;
      parts.push(svg("path", { class: "line " + kinds[n.state], "stroke-width": width(perSecond(n)), d: `M${from} ${middle} C${(from + x) / 2} ${middle} ${(from + x) / 2} ${y} ${x} ${y}` }));
    });
    parts.push(...boxes(0, middle - 35, 150, callers), ...boxes(w / 2 - 110, middle - 35, 170, manager));
    all.forEach((n, i) => parts.push(node(n, x, i * row + 5, 258, perSecond(n), label, short, 28)));
  } else if (few) {
    height = 168 + all.length * 54;
    parts.push(svg("path", { class: "line " + (pushRate() > 0 ? "good" : ""), "stroke-width": width(pushRate() ?? 0), d: "M30 72 V86" }));
    all.forEach((n, i) => parts.push(svg("path", { class: "line " + kinds[n.state], "stroke-width": width(perSecond(n)), d: `M14 156 V${188 + i * 54 - 8} Q14 ${188 + i * 54} 22 ${188 + i * 54} H36` })));
    parts.push(...boxes(0, 2, w - 2, callers), ...boxes(0, 86, w - 2, manager));
    all.forEach((n, i) => parts.push(node(n, 36, 165 + i * 54, w - 38, perSecond(n), label, short, Math.floor((w - 60) / 8))));
  } else {
    const side = narrow ? 16 : 18, columns = Math.max(1, Math.floor((w - 4) / side)), top = narrow ? 168 : 92;
    height = top + Math.ceil(all.length / columns) * side + 6;
    parts.push(...boxes(0, 2, narrow ? w - 2 : 220, callers), ...boxes(narrow ? 0 : 260, narrow ? 86 : 2, narrow ? w - 2 : 220, manager));
    all.forEach((n, i) => parts.push(svg("g", { class: "go", onclick: () => open(n) },
      svg("rect", { x: 2 + i % columns * side, y: top + Math.floor(i / columns) * side, width: side - 4, height: side - 4, rx: 3, class: "dot " + kinds[n.state] }),
      svg("title", {}, `${n.id}: ${n.state}`))));
  }
  const by = Object.entries(Object.groupBy(all, n => n.state)).map(([word, of]) => `${of.length} ${word}`).join(", ");
  box.replaceChildren(svg("svg", { class: "map", role: "img", height, viewBox: `0 0 ${w} ${height}`, "aria-label": `Callers push to ${s.about.id}, which has links to ${all.length} nodes: ${by || "none"}` }, parts));
  text(caption, `${all.length + (s.nodes.left_out ?? 0)} Connect-Nodes: ${by || "none is registered"}${s.nodes.left_out ? `; ${s.nodes.left_out} are not drawn` : ""}.`);
}

// open shows the row of a node in the table, where the keyboard finds it, too.
function open(n) { location.hash = "nodes?q=" + encodeURIComponent(n.id); }

// node is a box that leads to the row of the node in the table.
function node(n, x, y, width, rate, label, short, most) {
  return svg("g", { class: "go", onclick: () => open(n) },
    svg("rect", { x, y, width, height: 46, rx: 9, class: "node " + kinds[n.state] }),
    ...label(x + 12, y + 19, [short(n.id, most), `${n.state}, ${count(rate)} frames/s${n.queued ? `, ${count(n.queued)} queued` : ""}`]),
    svg("title", {}, `${n.id} at ${n.address}: ${n.state}, ${n.connections} of ${n.links} links, ${n.queued} queued, ${n.unacked} unacknowledged`));
}

export default { title: "Topology", make, update: draw };
