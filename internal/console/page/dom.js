// el makes an element. Children are elements or texts, and a text is never read as markup. Properties that begin with "on" are listeners.
export function el(name, properties, ...children) { return fill(document.createElement(name), properties, children); }

// svg is el for a drawing.
export function svg(name, properties, ...children) { return fill(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children); }

function fill(e, properties, children) {
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else e.setAttribute(key, value === true ? "" : value);
  }
  e.append(...children.flat().filter(c => c !== undefined && c !== null && c !== false));
  return e;
}

// text changes what an element says, if it says something else: whoever reads it aloud or selects it is not disturbed.
export function text(e, says) { if (e.textContent !== String(says)) e.textContent = says; }

// classes gives an element these classes.
export function classes(e, names) { if (e.getAttribute("class") !== names) e.setAttribute("class", names); }

// table makes a table in a region of its own that scrolls. Columns are {name, number, wrap}; rows are arrays of texts or elements.
export function table(label, columns, rows) {
  const cell = (kind, c, content) => el(kind, { class: [c.number && "number", c.wrap && "wrap"].filter(Boolean).join(" ") || null, scope: kind === "th" && "col" }, content);
  return scroll(label, el("table", {},
    el("thead", {}, el("tr", {}, columns.map(c => cell("th", c, c.name)))),
    el("tbody", {}, rows.map(row => el("tr", {}, row.map((content, i) => cell("td", columns[i], content)))))));
}

// scroll has the keyboard scroll what is wider than the page.
export function scroll(label, ...children) { return el("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, ...children); }

// state shows a state by a word and by a colour.
export function state(word, kind) { return el("span", { class: "state " + (kind ?? "") }, word); }

// tiles is a list of figures: set changes what they show.
export function tiles(names) {
  const of = {}, list = el("dl", { class: "tiles" }, names.map(([key, name]) => {
    of[key] = el("dd", {}, "–");
    return el("div", {}, el("dt", {}, name), of[key]);
  }));
  const set = (key, value, unit, kind) => {
    if (of[key].dataset.says === `${value} ${unit} ${kind}`) return;
    of[key].dataset.says = `${value} ${unit} ${kind}`;
    of[key].replaceChildren(String(value), ...(unit ? [" ", el("small", {}, unit)] : []));
    classes(of[key], kind ?? "");
  };
  return { list, set };
}

// announce has a screen reader say something, no more often than every five seconds; of what comes meanwhile the latest.
let waiting = null, silentUntil = 0;
export function announce(says) {
  const now = performance.now();
  if (now >= silentUntil) {
    silentUntil = now + 5000;
    document.getElementById("said").textContent = says;
    return;
  }
  if (waiting === null) setTimeout(() => { const late = waiting; waiting = null; announce(late); }, silentUntil - now);
  waiting = says;
}
