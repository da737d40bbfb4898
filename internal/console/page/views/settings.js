import { el, scroll, text } from "../dom.js";
import { ask } from "../data.js";

let filter, given, body, said, all = null;

function make() {
  filter = el("input", { type: "search", oninput: show });
  given = el("input", { type: "checkbox", onchange: show });
  body = el("tbody", {});
  said = el("p", { class: "note", role: "status" }, "…");
  if (!all) load(); else show();
  return [el("p", { class: "note" }, "The settings in force, as --print-config shows them: secrets are masked."),
    el("div", { class: "bar" }, el("label", {}, "Show settings whose name, value or source has", filter), el("label", { class: "check" }, given, "Only those that were set")),
    el("section", {}, scroll("Settings", el("table", {}, el("thead", {}, el("tr", {}, ["Setting", "Value", "From"].map(h => el("th", { scope: "col" }, h)))), body))), said];
}

async function load() {
  try {
    all = (await ask("settings")).answer;
    show();
  } catch (problem) { text(said, problem.message); }
}

function show() {
  if (!all) return;
  const q = filter.value.trim().toLowerCase();
  const rows = all.filter(v => (!given.checked || v[2] !== "default") && (!q || v.some(t => t.toLowerCase().includes(q))));
  body.replaceChildren(...rows.map(([name, value, source]) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)), el("td", { class: "wrap" }, el("code", {}, value || "–")), el("td", {}, source))));
  text(said, `${rows.length} of ${all.length} settings`);
}

export default { title: "Configuration", make, update: () => { if (!all) load(); } };
