import { announce, classes, el, text } from "./dom.js";
import { credential, follow, kinds, latest, nodes, setCredential } from "./data.js";
import { ago } from "./format.js";
import callers from "./views/callers.js";
import explain from "./views/explain.js";
import jobs from "./views/jobs.js";
import nodesView from "./views/nodes.js";
import overview from "./views/overview.js";
import presence from "./views/presence.js";
import push from "./views/push.js";
import settings from "./views/settings.js";
import store from "./views/store.js";
import topology from "./views/topology.js";
import warnings from "./views/warnings.js";

const $ = id => document.getElementById(id);

// A view has a title, make, which returns its elements, and update, which gets each snapshot while they are shown.
const views = { overview, topology, nodes: nodesView, explain, push, presence, jobs, callers, store, settings, warnings };
let shown = null; // the name of one of them, "sign in", or null

const links = {}, badges = {};
for (const [name, view] of Object.entries(views)) {
  badges[name] = el("span", { class: "badge" });
  links[name] = el("a", { href: "#" + name }, view.title, badges[name]);
  $("pages").append(el("li", {}, links[name]));
}

// show shows the page that the address names. What stands behind a ? there is for the page.
function show(focus) {
  const [asked, query] = location.hash.slice(1).split("?");
  const name = Object.hasOwn(views, asked) ? asked : "overview", view = views[name];
  if (shown === "sign in") return;
  for (const [other, a] of Object.entries(links)) other === name ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current");
  if (shown !== name) {
    shown = name;
    links[name].scrollIntoView({ block: "nearest", inline: "center" }); // of a narrow screen not all are seen
    document.title = view.title + " · Push-Manager console";
    $("main").replaceChildren(el("h2", {}, view.title), ...view.make());
    if (focus) $("main").focus({ preventScroll: true });
    scrollTo(0, 0); // with the header
  }
  view.opened?.(new URLSearchParams(query ?? ""));
  if (latest.snapshot) view.update(latest.snapshot);
}
addEventListener("hashchange", () => show(true));
$("skip").addEventListener("click", e => { e.preventDefault(); $("main").focus(); });

// signIn asks for a credential: the server wants one, or another one.
function signIn(problem) {
  live(problem.status === 401 ? "not signed in" : "not allowed", "bad");
  if (shown === "sign in") { text($("refused"), problem.message); return; }
  shown = "sign in";
  const input = el("input", { type: "password", id: "credential", autocomplete: "off", required: true, spellcheck: "false" });
  $("main").replaceChildren(el("h2", {}, "Sign in"), el("section", {},
    el("p", { class: "note" }, "The console needs an API key or a token of a caller with the right Console. It stays in this tab until it is closed."),
    el("p", { class: "error", id: "refused", role: "alert" }, credential() ? problem.message : ""),
    el("form", { onsubmit: e => {
      e.preventDefault();
      setCredential(input.value.trim());
      again();
    } }, el("label", {}, "API key or token", input), el("button", {}, "Sign in"))));
  input.focus();
}
$("signout").addEventListener("click", () => { setCredential(""); location.reload(); });

function live(says, kind) { text($("live"), says); classes($("live"), "state " + kind); }

let was = new Map(); // state by node
function changes(snapshot) {
  const now = new Map(nodes(snapshot).map(n => [n.id, n.state]));
  const down = [...now].filter(([id, state]) => kinds[state] === "bad" && was.has(id) && kinds[was.get(id)] !== "bad").map(([id]) => id);
  const back = [...now].filter(([id, state]) => kinds[state] === "good" && kinds[was.get(id)] === "bad").map(([id]) => id);
  was = now;
  const name = (ids, what) => ids.length === 0 ? "" : ids.length === 1 ? `Node ${ids[0]} is ${what}. ` : `${ids.length} nodes are ${what}. `;
  if (down.length + back.length) announce(name(down, "down") + name(back, "up again"));
  const ill = [...now.values()].filter(s => kinds[s] !== "good").length;
  text(badges.nodes, ill ? ill : "");
  badges.nodes.setAttribute("title", ill ? `${ill} nodes are not well` : "");
}

const again = follow((snapshot, problem) => {
  if (problem) {
    if (problem.status === 401 || problem.status === 403) { signIn(problem); return; }
    const since = latest.snapshot ? ", last seen " + ago(Date.now() - latest.snapshot.time) + " ago" : "";
    live("no answer" + since, "bad");
    return;
  }
  if (shown === "sign in") { shown = null; show(true); }
  $("signout").hidden = !credential();
  text($("instance"), snapshot.about.id);
  live(snapshot.state.not_ready ? "not ready" : "live", snapshot.state.not_ready ? "bad" : "good");
  text(badges.warnings, snapshot.warnings ? snapshot.warnings : "");
  changes(snapshot);
  if (shown === null) show(false);
  else views[shown].update(snapshot);
}, fault => {
  live("this page has a fault: " + fault.message, "bad");
  throw fault; // for whoever looks at the browser's own console
});

// The theme is the system's, or another one for as long as the tab is open.
const themes = ["system", "light", "dark"];
function theme(name) {
  name === "system" ? delete document.documentElement.dataset.theme : document.documentElement.dataset.theme = name;
  text($("theme"), "Theme: " + name);
  sessionStorage.setItem("push-manager.theme", name);
  dispatchEvent(new Event("theme"));
}
theme(sessionStorage.getItem("push-manager.theme") ?? "system");
$("theme").addEventListener("click", () => theme(themes[(themes.indexOf(sessionStorage.getItem("push-manager.theme")) + 1) % 3]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("theme")));

show(false);
