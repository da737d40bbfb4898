import { el, text } from "../dom.js";
import { ask } from "../data.js";

let list, said, had, asking = false;

function make() {
  had = -1;
  list = el("ol", { class: "warnings" });
  said = el("p", { class: "note" }, "…");
  return [el("p", { class: "note" }, "Lines of the log from WARN on, the latest first: the last 200."), said, el("section", {}, list)];
}

async function update(s) {
  if (asking || had === s.warnings) return;
  asking = true;
  try {
    const { answer } = await ask("warnings");
    had = answer.total;
    text(said, answer.total ? `${answer.total} since the start` : "None since the start.");
    list.parentElement.hidden = !answer.total;
    list.replaceChildren(...answer.entries.map(e => el("li", { class: e.level === "WARN" ? "WARN" : "ERROR" },
      el("div", { class: "meta" }, el("time", { datetime: new Date(e.time).toISOString() }, new Date(e.time).toLocaleString()), el("b", {}, e.level)),
      el("div", {}, e.message),
      e.values ? el("dl", {}, e.values.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))) : null)));
  } catch (problem) { text(said, problem.message); }
  asking = false;
}

export default { title: "Warnings", make, update };
