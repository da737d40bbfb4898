import { el } from "./dom.js";

// target is the part of a form that says whom a push is for. ids are the texts between commas, spaces and lines of a list of users or
// rooms; of one room or user the text is the id, but for spaces around it.
export function target(kinds, what = "To") {
  const kind = el("select", { onchange: change }, kinds.map(([value, name]) => el("option", { value }, name)));
  const id = el("input", { value: "lobby", maxlength: "4096", autocapitalize: "off", autocomplete: "off", spellcheck: "false" });
  const name = el("span", {}, "Room"), label = el("label", {}, name, id);
  const names = { room: "Room", user: "User", users: "Users, with commas between them", rooms: "Rooms, with commas between them" };
  const examples = { room: "lobby", user: "alice", users: "alice, bob", rooms: "lobby, garden" };
  function change() {
    label.hidden = kind.value === "everybody";
    id.required = !label.hidden;
    name.textContent = names[kind.value] ?? "";
    if (Object.values(examples).includes(id.value)) id.value = examples[kind.value] ?? id.value;
  }
  change();
  return {
    elements: [el("label", { class: "small" }, what, kind), label],
    kind: () => kind.value,
    id: () => id.value.trim(),
    ids: () => [...new Set(id.value.split(/[,\s]+/).filter(Boolean))],
    set: (k, value) => { kind.value = k; id.value = value; change(); },
  };
}

// asPush is the push of a target as Explain takes it.
export function asPush(t, content) {
  switch (t.kind()) {
  case "room": return { to_room: { room_id: t.id(), content } };
  case "user": return { to_user: { user_id: t.id(), content } };
  case "users": return { to_users: { user_ids: t.ids(), content } };
  case "rooms": return { to_rooms: { room_ids: t.ids(), content } };
  default: return { broadcast: { content } };
  }
}

// base64 is a text as bytes in JSON.
export function base64(text) { return btoa(Array.from(new TextEncoder().encode(text), b => String.fromCharCode(b)).join("")); }
