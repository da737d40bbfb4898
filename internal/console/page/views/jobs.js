import { announce, classes, el, text, tiles } from "../dom.js";
import { ask, has, labelled, metric, rate } from "../data.js";
import { ago, count } from "../format.js";
import { base64, target } from "../target.js";

const size = 20, every = 2000; // jobs of a page, and ms between two looks at it
const api = "/pubsub.BroadcastJobService/";
const kinds = { RUNNING: "good", PAUSED: "warn", FAILED: "bad" };
const ended = ["SUCCEEDED", "CANCELLED", "FAILED"];
const parts = ["delivered", "offline", "failed", "unknown", "inFlight"];
let top, list, said, all, first, next, form;
let rows = new Map(), pages = [""], following = "", asked = 0, asking = false, off = "";
const denied = new Set(); // methods that the caller may not call

function make() {
  rows = new Map();
  pages = [""];
  asked = 0;
  asking = false; // an answer to a page that is not shown any more is dropped
  off = "";
  top = tiles([["running", "Running"], ["waiting", "Not begun yet"], ["paused", "Paused"], ["ended", "Ended"], ["here", "Running here"], ["users", "Users, here"]]);
  list = el("ul", { class: "jobs" });
  said = el("p", { class: "note", role: "status" }, "…");
  all = el("input", { type: "checkbox", onchange: () => turn([""]) });
  first = el("button", { type: "button", class: "quiet", disabled: true, hidden: true, onclick: () => turn([""]) }, "First page");
  next = el("button", { type: "button", class: "quiet", disabled: true, hidden: true, onclick: () => turn([...pages, following]) }, "Next page");
  return [top.list, creation(), el("div", { class: "bar" }, el("label", { class: "check" }, all, "Also jobs that have ended"), first, next), said, list];
}

// turn shows another page. What the one before says when it comes late is dropped.
function turn(to) {
  pages = to;
  asked = 0;
  load();
}

async function load() {
  const mine = pages;
  asking = true;
  asked = performance.now();
  try {
    const { answer } = await ask(api + "ListJobs", { page_size: size, page_token: pages.at(-1), not_ended: !all.checked });
    if (mine === pages) show(answer.jobs ?? [], answer.nextPageToken ?? "");
  } catch (problem) {
    if (mine === pages) {
      text(said, problem.message);
      if ([400, 403, 404, 501].includes(problem.status)) off = problem.message; // it will be the same again
    }
  }
  if (mine === pages) asking = false;
}

function show(jobs, token) {
  following = token;
  first.disabled = pages.length === 1;
  next.disabled = !token;
  first.hidden = next.hidden = first.disabled && next.disabled;
  const noun = jobs.length === 1 ? "job" : "jobs", what = all.checked ? noun : `${noun} that ${jobs.length === 1 ? "has" : "have"} not ended`;
  text(said, jobs.length || pages.length > 1 ? `${jobs.length} ${what}${pages.length > 1 || token ? `, page ${pages.length}` : ""}, by their names.` : all.checked ? "There are no jobs." : "There is no job that has not ended.");
  const keep = new Set(jobs.map(j => j.jobId));
  for (const [id, row] of rows) if (!keep.has(id)) { row.element.remove(); rows.delete(id); }
  jobs.forEach((job, i) => {
    let row = rows.get(job.jobId);
    if (!row) rows.set(job.jobId, row = make1(job.jobId));
    fill(row, job);
    if (list.children[i] !== row.element) list.insertBefore(row.element, list.children[i] ?? null);
  });
}

// make1 makes the elements of a job.
function make1(id) {
  const row = { id, state: el("span", {}), about: el("span", { class: "dim" }), bar: el("div", { class: "bars", role: "img" }), figures: el("ul", { class: "legend" }), numbers: {}, note: el("p", { class: "note" }), error: el("p", { class: "error", role: "alert", hidden: true }) };
  row.bits = parts.map(part => row.bar.appendChild(el("i", { class: "of-" + part })));
  for (const part of parts) row.figures.append(el("li", {}, el("i", { class: "of-" + part }), (part === "inFlight" ? "in flight" : part) + " ", row.numbers[part] = el("b", {}, "0")));
  row.rate = el("input", { type: "number", min: "1", required: true, "aria-label": `Users a second of ${id}` });
  row.set = el("button", { class: "quiet" }, "Set rate");
  row.speed = el("form", { class: "rate", onsubmit: e => { e.preventDefault(); act(row, "SetJobRate", row.set, { rate_per_second: row.rate.valueAsNumber }); } }, row.rate, row.set);
  row.pause = el("button", { type: "button", class: "quiet", onclick: () => act(row, row.job.state === "PAUSED" ? "ResumeJob" : "PauseJob", row.pause) });
  row.cancel = el("button", { type: "button", class: "quiet", onclick: () => sure(row) }, "Cancel");
  row.actions = el("div", { class: "actions" }, row.speed, row.pause, row.cancel);
  row.element = el("li", { class: "card" }, el("div", { class: "line" }, el("h3", {}, id), row.state, row.about), row.bar, row.figures, row.note, row.error, row.actions);
  return row;
}

function fill(row, job) {
  const p = job.progress ?? {}, n = part => Number(p[part] ?? 0), targets = n("targets"), most = Math.max(n("targetsEstimate"), targets), over = ended.includes(job.state);
  row.job = job;
  text(row.state, job.state.toLowerCase());
  classes(row.state, "state " + (kinds[job.state] ?? ""));
  text(row.about, [job.target && "for " + job.target, job.createdBy && "by " + job.createdBy, job.managerId && "run by " + job.managerId].filter(Boolean).join(", "));
  parts.forEach((part, i) => {
    row.bits[i].style.width = most ? 100 * n(part) / most + "%" : "0";
    text(row.numbers[part], count(n(part)));
  });
  const share = over ? "" : most > targets ? `${count(targets)} of about ${count(most)} users` : targets ? `${count(targets)} users` : "";
  row.bar.setAttribute("aria-label", `${row.id}: ${count(targets)} of ${count(most)} users have had their turn`);
  const eta = job.state === "RUNNING" && p.eta && most > targets ? `done in about ${ago(Date.parse(p.eta) - Date.now())}` : "";
  const speed = job.state === "RUNNING" ? `${count(p.rate ?? 0)} of ${count(job.ratePerSecond)} users a second` : over ? "" : `${count(job.ratePerSecond)} users a second`;
  const when = over ? `ended ${ago(Date.now() - Date.parse(job.endTime))} ago with ${count(targets)} users` : "";
  const why = (p.nodeFailures ?? []).map(f => `${f.nodeId ? f.nodeId + ": " : ""}${f.reason}${f.users ? ` (${count(f.users)} users)` : ""}`);
  text(row.note, [share, speed, eta, when, job.reason, ...why].filter(Boolean).join("; "));
  row.actions.hidden = over;
  if (over) return;
  text(row.pause, job.state === "PAUSED" ? "Resume" : "Pause");
  if (document.activeElement !== row.rate && row.rate.dataset.was !== String(job.ratePerSecond)) { // what is typed and not sent stays
    row.rate.value = row.rate.dataset.was = String(job.ratePerSecond);
  }
  may(row.pause, job.state === "PAUSED" ? "ResumeJob" : "PauseJob");
  may(row.cancel, "CancelJob");
  may(row.set, "SetJobRate");
}

// may switches a button off whose method was refused.
function may(button, method) {
  if (button.dataset.busy) return;
  button.disabled = denied.has(method);
  denied.has(method) ? button.setAttribute("title", `You have no right to ${method}`) : button.removeAttribute("title");
}

// sure asks again before a job is ended: nothing brings it back.
function sure(row) {
  if (row.cancel.dataset.sure) {
    act(row, "CancelJob", row.cancel);
    return;
  }
  row.cancel.dataset.sure = "yes";
  text(row.cancel, "End it for good");
  setTimeout(() => { delete row.cancel.dataset.sure; text(row.cancel, "Cancel"); }, 5000);
}

async function act(row, method, button, more) {
  button.disabled = true;
  button.dataset.busy = "yes";
  row.error.hidden = true;
  try {
    const { answer } = await ask(api + method, { job_id: row.id, ...more });
    delete button.dataset.busy;
    if (more) delete row.rate.dataset.was;
    fill(row, { ...row.job, ...answer.job, reason: answer.job.reason });
    announce(`Job ${row.id} is ${answer.job.state.toLowerCase()}`);
  } catch (problem) {
    delete button.dataset.busy;
    button.disabled = false;
    if (problem.status === 403) denied.add(method);
    text(row.error, problem.message);
    row.error.hidden = false;
    may(button, method);
  }
}

// creation is the form for a new job: what is asked for most often. pushctl has the rest.
function creation() {
  const to = target([["everybody", "Everybody"], ["room", "Room"], ["users", "Users"]]);
  const name = el("input", { required: true, maxlength: "64", pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", autocapitalize: "off", autocomplete: "off", spellcheck: "false" });
  const speed = el("input", { type: "number", min: "1", value: "100", required: true });
  const content = el("textarea", { maxlength: "65536", required: true, rows: "2" });
  const button = el("button", {}, "Create");
  const result = el("p", { role: "status", hidden: true });
  form = el("form", { onsubmit: async e => {
    e.preventDefault();
    button.disabled = true;
    const whom = to.kind() === "everybody" ? { everybody: true } : to.kind() === "room" ? { room_ids: [to.id()] } : { user_ids: to.ids() };
    try {
      const { answer } = await ask(api + "CreateJob", { job_id: name.value.trim(), spec: { ...whom, content: { data: base64(content.value) }, rate_per_second: speed.valueAsNumber } });
      classes(result, "note");
      text(result, `${answer.job.jobId}: ${answer.job.state.toLowerCase()}, for ${answer.job.target}.`);
      name.value = "";
      turn([""]);
    } catch (problem) {
      classes(result, "error");
      text(result, problem.message);
    }
    result.hidden = false;
    button.disabled = false;
  } }, el("label", { class: "small" }, "Name of the job", name), to.elements, el("label", { class: "small" }, "Users a second", speed), el("label", { class: "wide" }, "Text", content), button);
  return el("details", { class: "card" }, el("summary", {}, "New job"),
    el("p", { class: "note" }, "A job pushes one message to many users, at a speed: each gets it once. It begins at once. pushctl jobs create has more: a start, a deadline, a pause by itself."), form, result);
}

function update(s) {
  const on = has(s, "jobs_running"), by = new Map(labelled(s, "jobs", "state")), n = state => by.get(state) ?? 0;
  top.set("running", on ? count(n("RUNNING")) : "off", "");
  top.set("waiting", on ? count(n("PENDING")) : "–", "");
  top.set("paused", on ? count(n("PAUSED")) : "–", "", n("PAUSED") ? "warn" : "");
  top.set("ended", on ? count(ended.reduce((sum, state) => sum + n(state), 0)) : "–", "");
  top.set("here", on ? count(metric(s, "jobs_running")) : "–", "");
  top.set("users", on ? count(rate("job_users_total")) : "–", on ? "/s" : "");
  if (!off && !asking && performance.now() - asked >= every) load();
}

export default { title: "Jobs", make, update };
