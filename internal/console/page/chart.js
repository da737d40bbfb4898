/* global uPlot */
import { el, text } from "./dom.js";
import { history } from "./data.js";
import { count } from "./format.js";

// Colours are those of the style sheet, as they are when they are drawn. A canvas does not know variables.
const probe = el("span", { class: "unseen" });
function colour(variable) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(--${variable})`;
  return getComputedStyle(probe).color;
}

// chart draws series of the history: [{key, name, colour}]. Stacked ones lie on each other, the first one at the bottom.
export function chart(label, series, show, stacked) {
  const box = el("div", { class: "chart", role: "img" });
  const values = series.map(() => el("b", {}, "–"));
  const legend = el("ul", { class: "legend" }, series.map((s, i) => el("li", {}, el("i", { class: "of-" + s.colour }), s.name + " ", values[i])));
  const order = stacked ? [...series].reverse() : series;
  let plot = null;

  const data = () => {
    if (!stacked) return [history.time, ...series.map(s => history[s.key])];
    let sum = history.time.map(() => 0);
    const sums = series.map(s => sum = sum.map((v, i) => history[s.key][i] === null ? null : v + history[s.key][i]));
    return [history.time, ...sums.reverse()];
  };
  const says = at => {
    const i = at ?? history.time.length - 1;
    series.forEach((s, n) => text(values[n], show(history[s.key][i])));
    if (at === null) box.setAttribute("aria-label", `${label}: ${series.map((s, n) => s.name + " " + values[n].textContent).join(", ")}`);
  };
  const variable = s => s.colour === "flight" ? "accent" : s.colour === "refused" ? "failed" : s.colour;
  const least = show === count ? 4 : 1; // so that a scale of counts has no parts of one
  const axis = { stroke: () => colour("dim"), grid: { stroke: () => colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const make = () => {
    plot = new uPlot({
      width: Math.max(box.clientWidth, 120), height: 200, legend: { show: false }, padding: [8, 26, 0, 0],
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
      hooks: { setCursor: [u => says(u.cursor.left >= 0 ? u.cursor.idx : null)] },
      scales: { x: { time: true, range: () => { const end = history.time.at(-1) ?? 0; return [Math.max(end - 600, Math.min(history.time[0] ?? end, end - 60)), end]; } }, y: { range: (_, __, most) => [0, Math.max(most * 1.1, least)] } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map(t => new Date(t * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" })), space: 80, size: 28 },
        { ...axis, values: (_, ticks) => ticks.map(t => show(t)), size: 62 }],
      series: [{}, ...order.map(s => ({
        label: s.name, stroke: () => colour(variable(s)), fill: stacked ? () => colour(variable(s)) : undefined, width: stacked ? 0 : 1.6, points: { show: false },
      }))],
    }, data(), box);
  };
  new ResizeObserver(() => {
    if (!box.isConnected || !box.clientWidth) return;
    plot ? plot.setSize({ width: box.clientWidth, height: 200 }) : make();
  }).observe(box);
  addEventListener("theme", () => { if (box.isConnected) plot?.redraw(); });
  const update = () => {
    plot?.setData(data());
    if (!plot || plot.cursor.left < 0) says(null);
  };
  return { element: el("div", {}, box, legend), update };
}
