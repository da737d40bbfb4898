import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { afterEach, beforeEach, mock, test } from "node:test";
import { PushClient, claimsOf, closeReasons } from "../push-client.js";

// A gateway as a test plays it: each socket keeps what it was sent, and gets what the test says.
class FakeSocket {
  static all = [];
  static get last() { return FakeSocket.all.at(-1); }
  readyState = 0; bufferedAmount = 0; sent = []; closed = false;
  constructor(url) { this.url = new URL(url); FakeSocket.all.push(this); }
  send(text) {
    assert.equal(this.readyState, 1, "sent on a socket that is not open");
    this.sent.push(text);
  }
  close() { this.closed = true; this.readyState = 3; }
  open() { this.readyState = 1; this.onopen?.({}); return this; }
  says(m) { this.onmessage?.({ data: typeof m === "string" ? m : JSON.stringify(m) }); return this; }
  ends(code, reason) { this.readyState = 3; this.onclose?.({ code, reason }); }
  get messages() { return this.sent.map(text => JSON.parse(text)); }
}

const push = (content, more = {}) => ({ type: "text", room_id: "", user_id: "u", timestamp: 1, data: { content }, metadata: {}, ...more });
const token = (claims, n = 1) => `e30.${btoa(JSON.stringify({ n, ...claims })).replaceAll("=", "")}.c`;
const settle = async () => { for (let i = 0; i < 20; i++) await Promise.resolve(); };

let seen, states, errors, now;
beforeEach(() => {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_700_000_000_000 });
  mock.method(Math, "random", () => 1 - Number.EPSILON);
  FakeSocket.all = []; seen = []; states = []; errors = []; now = () => Date.now();
});
afterEach(() => { mock.timers.reset(); mock.restoreAll(); });

function make(options = {}) {
  return new PushClient({
    url: "ws://gateway:8080/ws", userId: "u", WebSocket: FakeSocket, fetch: async () => { throw new Error("away"); },
    onPush: p => { seen.push(p.text); }, onState: s => states.push(s), onError: e => errors.push(e), ...options,
  });
}

test("brings its attributes at each connection", () => {
  const attributes = { platform: "web", "a&b": "ü" };
  make({ attributes }).connect();
  assert.equal(FakeSocket.last.url.search, "?user_id=u&user_name=u&ack=1&resume=&attr.platform=web&attr.a%26b=%C3%BC");
  FakeSocket.last.open().ends(1006);
  attributes.platform = "app";
  mock.timers.tick(15_000);
  assert.equal(FakeSocket.last.url.searchParams.get("attr.platform"), "app");
});

test("connects as who it is, in its rooms, and tells what comes", () => {
  let rooms = [];
  const client = make({ userName: "U", rooms: ["a", "b"], position: "AQ", onRooms: list => { rooms = list; }, onPush: p => seen.push(p) });
  assert.equal(client.state, "closed");
  client.connect();
  client.connect(); // once is enough
  assert.equal(FakeSocket.all.length, 1);
  const s = FakeSocket.last;
  assert.equal(s.url.search, "?user_id=u&user_name=U&room_id=a&ack=1&resume=AQ");
  s.open().says({ type: "joined", room_id: "a" }).says({ type: "joined", room_id: "b" });
  assert.deepEqual(s.messages, [{ type: "join", room_id: "b" }]);
  assert.deepEqual(rooms, ["a", "b"]);
  assert.equal(client.state, "open");
  s.says({ ...push("Hi", { room_id: "a", metadata: { k: "v" }, id: "m" }), later: 1 });
  s.says({ ...push("", { broadcast: true, replayed: true }), type: "77", data: { content_base64: "/wA=" } });
  assert.deepEqual(seen, [
    { type: "text", room: "a", user: "u", broadcast: false, time: new Date(1000), text: "Hi", bytes: null, metadata: { k: "v" }, id: "m", replayed: false },
    { type: "77", room: "", user: "u", broadcast: true, time: new Date(1000), text: null, bytes: new Uint8Array([255, 0]), metadata: {}, id: "", replayed: true },
  ]);
  client.leave("a");
  s.says({ type: "left", room_id: "a" });
  assert.deepEqual(client.rooms, ["b"]);
  client.close();
  assert.ok(s.closed);
  assert.deepEqual(states.map(s => s.state), ["connecting", "open", "closed"]);
  mock.timers.tick(3_600_000);
  assert.equal(FakeSocket.all.length, 1, "it does not come back after close()");
});

test("acknowledges in the gateway's own bytes: 50 ms after the first, or with the sixteenth", () => {
  make().connect();
  const s = FakeSocket.last.open();
  s.says(push("1", { ack: 3 })).says(push("2", { ack: 4 })).says(push("3"));
  mock.timers.tick(49);
  assert.deepEqual(s.sent, []);
  mock.timers.tick(1);
  assert.deepEqual(s.sent, ['{"type":"ack","ack":4}']);
  for (let n = 5; n < 21; n++) s.says(push(String(n), { ack: n }));
  assert.deepEqual(s.sent.slice(1), ['{"type":"ack","ack":20}']);
  mock.timers.tick(1000);
  assert.equal(s.sent.length, 2);
});

test("confirms after the handler is done, one message at a time, in order", async () => {
  const open = [];
  make({ onPush: p => new Promise(done => { seen.push(p.text); open.push(done); }) }).connect();
  const s = FakeSocket.last.open();
  s.says(push("1", { ack: 1 })).says(push("2", { ack: 2 })).says({ type: "resume", token: "AQ" });
  mock.timers.tick(1000);
  assert.deepEqual([seen, s.sent], [["1"], []]);
  open[0]();
  await settle();
  mock.timers.tick(50);
  assert.deepEqual([seen, s.sent], [["1", "2"], ['{"type":"ack","ack":1}']]);
  open[1]();
  await settle();
  mock.timers.tick(50);
  assert.deepEqual(s.sent.slice(1), ['{"type":"ack","ack":2}']);
});

test("what a handler fails at is confirmed by nothing, and comes again on a new connection", async () => {
  let fails = true, position = "";
  const client = make({ onPosition: p => { position = p; }, onPush: p => { if (p.text === "2" && fails) throw new Error("full"); seen.push(p.text); } });
  client.connect();
  const s = FakeSocket.last.open();
  s.says(push("1", { ack: 1, id: "a" })).says({ type: "resume", token: "P1" }).says(push("2", { ack: 2, id: "b" })).says(push("3", { ack: 3, id: "c" })).says({ type: "resume", token: "P2" });
  assert.ok(s.closed);
  assert.equal(position, "P1");
  assert.deepEqual(errors.map(e => [e.kind, e.message]), [["handler", "full"]]);
  mock.timers.tick(250);
  fails = false;
  const again = FakeSocket.last.open();
  assert.equal(again.url.searchParams.get("resume"), "P1");
  again.says(push("1", { ack: 1, id: "a", replayed: true })).says(push("2", { ack: 2, id: "b", replayed: true }));
  assert.deepEqual(seen, ["1", "2"]);
  mock.timers.tick(50);
  assert.deepEqual(again.sent, ['{"type":"ack","ack":2}']);
  // A push that cannot come again costs no connection.
  fails = true;
  again.says(push("2"));
  await settle();
  assert.ok(!again.closed);
});

test("what waits behind a handler that fails is shown in its order: after it, if it comes again, and at once if it does not", async () => {
  let fail = null;
  make({ onPush: p => { seen.push(p.text); return p.text === "1" && fail === null ? new Promise((_, no) => { fail = no; }) : undefined; } }).connect();
  FakeSocket.last.open().says(push("1", { ack: 1, id: "a" })).says(push("2", { ack: 2, id: "b" })).says(push("once")).says(push("3", { ack: 3 }));
  fail(new Error("full"));
  await settle();
  assert.deepEqual(seen, ["1", "once"]);
  mock.timers.tick(250);
  const again = FakeSocket.last.open();
  for (const n of [1, 2, 3]) again.says(push(String(n), { ack: n, ...(n < 3 && { id: " ab"[n] }), replayed: true }));
  assert.deepEqual(seen, ["1", "once", "1", "2", "3"]);
  mock.timers.tick(50);
  assert.deepEqual(again.sent, ['{"type":"ack","ack":3}']);
});

test("shows no message id twice, over all connections, but the same id with another content", () => {
  make().connect();
  FakeSocket.last.open().says(push("1", { id: "m", ack: 1 })).says(push("1", { id: "m", ack: 1, replayed: true })).says(push("other", { id: "m" })).ends(1006);
  mock.timers.tick(250);
  const s = FakeSocket.last.open().says(push("1", { id: "m", ack: 7 }));
  assert.deepEqual(seen, ["1", "other"]);
  mock.timers.tick(50);
  assert.deepEqual(s.sent, ['{"type":"ack","ack":7}'], "what it had before is confirmed, too");
  for (let i = 0; i < 4096; i++) s.says(push("x", { id: `n-${i}` }));
  s.says(push("1", { id: "m" }));
  assert.equal(seen.length, 2 + 4096 + 1, "4,096 are remembered, and no more");
});

test("comes back in its rooms, after pauses that double to 15 s", () => {
  const client = make({ rooms: ["a"] });
  client.connect();
  FakeSocket.last.open().says({ type: "joined", room_id: "a" });
  client.join("b");
  const pauses = [];
  for (let i = 0; i < 9; i++) {
    FakeSocket.last.ends(1006);
    assert.deepEqual(client.rooms, []);
    pauses.push(states.at(-1).retryIn);
    mock.timers.tick(states.at(-1).retryIn);
    FakeSocket.last.open();
    assert.deepEqual([FakeSocket.last.url.searchParams.get("room_id"), FakeSocket.last.messages], ["a", [{ type: "join", room_id: "b" }]]);
  }
  assert.deepEqual(pauses, [250, 500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]);
  // A connection that held lets them begin anew; one that is silent did not hold.
  FakeSocket.last.says({ type: "pong" });
  mock.timers.tick(10_000);
  FakeSocket.last.ends(1006);
  assert.equal(states.at(-1).retryIn, 250);
});

test("the pauses are random, in their upper half", () => {
  Math.random.mock.mockImplementation(() => 0);
  make().connect();
  FakeSocket.last.open().ends(1006);
  assert.equal(states.at(-1).retryIn, 125);
});

test("a node that leaves sends its clients away for a random part of a second", () => {
  Math.random.mock.mockImplementation(() => 0.3);
  make().connect();
  FakeSocket.last.open().ends(1001);
  assert.deepEqual(states.at(-1), { state: "waiting", code: 1001, reason: closeReasons[1001], retryIn: 300 });
});

test("ends for good where it would end again", () => {
  for (const code of [1002, 1007, 1009, 4403, 4400, 4450]) {
    const client = make();
    client.connect();
    FakeSocket.last.open().ends(code);
    assert.deepEqual([client.state, states.at(-1).code], ["closed", code]);
  }
  for (const code of [1000, 1005, 1006, 1011, 1012, 4429, 4999]) {
    const client = make();
    client.connect();
    FakeSocket.last.open().ends(code);
    assert.equal(client.state, "waiting", String(code));
    client.close();
  }
});

test("shows the words of a service that disconnects, and its own for the gateway's codes", () => {
  for (const [code, said, reason, state] of [[4000, "signed in elsewhere", "signed in elsewhere", "waiting"], [4410, "banned", "banned", "closed"],
    [4410, "", closeReasons[4410], "closed"], [4403, "the token does not", closeReasons[4403], "closed"], [4321, "", "the connection was lost", "waiting"]]) {
    const client = make();
    client.connect();
    FakeSocket.last.open().ends(code, said);
    assert.deepEqual([client.state, states.at(-1).reason], [state, reason]);
    client.close();
  }
});

test("tells why a handshake was refused, and tries again where that may pass", async () => {
  const refused = async (status, text, options = {}) => {
    const client = make({ fetch: async url => { assert.match(url, /^http:/); return { status, text: async () => text }; }, ...options });
    client.connect();
    FakeSocket.last.ends(1006);
    await settle();
    return client;
  };
  assert.equal((await refused(400, "user_id: must not be empty\n")).state, "closed");
  assert.equal(states.at(-1).reason, "user_id: must not be empty");
  assert.equal((await refused(403, "")).state, "closed");
  assert.equal((await refused(503, "going")).state, "waiting");
  assert.equal((await refused(426, "this is a WebSocket address")).state, "waiting");
  const told = [];
  const client = await refused(400, "resume: is not a position", { position: "old", onPosition: p => told.push(p) });
  assert.deepEqual([client.state, client.position, told], ["waiting", "", [""]], "a position of another deployment is given up");
  mock.timers.tick(250);
  assert.equal(FakeSocket.last.url.searchParams.get("resume"), "");
});

test("shows its token first, refreshes in time, and asks for another one when it is refused", async () => {
  const asked = [], expires = [];
  const exp = now() / 1000 + 600;
  let n = 1;
  const client = make({ userId: undefined, onToken: d => expires.push(d.getTime()), token: why => { asked.push(why); return token({ sub: "u", exp }, n); } });
  client.connect();
  await settle();
  const s = FakeSocket.last.open();
  assert.equal(s.url.searchParams.has("user_id"), false);
  assert.equal(client.state, "connecting", "whether the token is taken is not known");
  s.says({ type: "ready" });
  assert.equal(client.state, "open");
  assert.deepEqual(s.messages.map(m => m.type), ["connect"]);
  mock.timers.tick(539_000);
  await settle();
  assert.deepEqual(asked, ["connect"]);
  s.says({ type: "pong" });
  mock.timers.tick(1_000);
  await settle();
  assert.deepEqual(asked, ["connect", "refresh"]);
  n = 2;
  mock.timers.tick(5_000); // and again, until there is another one
  await settle();
  assert.equal(s.messages.at(-1).type, "refresh");
  s.says({ type: "refreshed", expires: 1_800_000_000 });
  assert.deepEqual(expires.at(-1), 1_800_000_000_000);
  s.ends(4401);
  await settle();
  assert.deepEqual([client.state, states.at(-1).code, asked.at(-1)], ["closed", 4401, "refused"], "the same token is not tried twice");
});

test("a refused token is followed by another one, after a pause", async () => {
  let n = 0;
  const client = make({ token: async () => token({}, ++n) });
  client.connect();
  await settle();
  FakeSocket.last.open().ends(4401);
  await settle();
  assert.equal(client.state, "waiting");
  mock.timers.tick(250);
  await settle();
  const s = FakeSocket.last.open();
  assert.equal(claimsOf(s.messages[0].token).n, 2);
  client.close();
});

test("a text as a token is not refreshed, and a refused one is the end", async () => {
  const client = make({ token: token({ exp: now() / 1000 + 10 }) });
  client.connect();
  await settle();
  FakeSocket.last.open().says({ type: "ready" });
  mock.timers.tick(9_000);
  assert.deepEqual(FakeSocket.last.messages.map(m => m.type), ["connect"]);
  FakeSocket.last.ends(4401);
  await settle();
  assert.equal(client.state, "closed");
});

test("without a token to show it tries again", async () => {
  let fails = true;
  const client = make({ token: async () => { if (fails) throw new Error("no session"); return token({}); } });
  client.connect();
  await settle();
  assert.deepEqual([client.state, errors[0].kind, FakeSocket.all.length], ["waiting", "token", 0]);
  fails = false;
  mock.timers.tick(250);
  await settle();
  assert.equal(FakeSocket.all.length, 1);
});

test("close() while a token is awaited opens nothing", async () => {
  let give;
  const client = make({ token: () => new Promise(done => { give = done; }) });
  client.connect();
  client.close();
  give(token({}));
  await settle();
  assert.equal(FakeSocket.all.length, 0);
});

test("finds a gateway that is dead, and one that never answers", () => {
  make().connect();
  const s = FakeSocket.last.open();
  mock.timers.tick(20_000);
  assert.deepEqual(s.messages, [{ type: "ping" }]);
  s.says({ type: "pong" });
  mock.timers.tick(20_000);
  assert.equal(s.sent.length, 2);
  mock.timers.tick(20_000);
  assert.ok(s.closed);
  assert.equal(states.at(-1).reason, "the gateway is silent");
  mock.timers.tick(states.at(-1).retryIn);
  mock.timers.tick(15_000);
  assert.equal(states.at(-1).reason, "the gateway does not answer");
});

test("keeps positions in order with what was handled, and tells gaps", () => {
  const told = [];
  make({ onPosition: p => told.push(p), onGap: room => told.push(`gap ${room}`), onPush: p => { told.push(p.text); } }).connect();
  const s = FakeSocket.last.open();
  s.says(push("1")).says({ type: "resume", token: "P1" }).says({ type: "gap", room_id: "a" }).says(push("2")).says({ type: "resume", token: "x".repeat(1025) });
  assert.deepEqual(told, ["1", "P1", "gap a", "2"]);
  s.ends(1006);
  mock.timers.tick(250);
  assert.equal(FakeSocket.last.url.searchParams.get("resume"), "P1");
});

test("holds its bounds: rooms, what waits for the page, what waits for the gateway", () => {
  const client = make({ onPush: () => new Promise(() => {}) });
  for (let i = 0; i < 100; i++) client.join(`r${i}`);
  client.join("r0");
  assert.throws(() => client.join("one more"), RangeError);
  assert.throws(() => client.join(""), TypeError);
  client.connect();
  const s = FakeSocket.last.open();
  for (let i = 0; i < 1026; i++) s.says(push("x"));
  assert.ok(s.closed);
  assert.equal(states.at(-1).reason, "more comes than the page takes");
  client.close();
  make().connect();
  FakeSocket.last.open().bufferedAmount = 2 ** 21;
  mock.timers.tick(20_000);
  assert.equal(states.at(-1).reason, "the gateway reads nothing");
});

test("what is no message of a gateway ends nothing", () => {
  const client = make();
  client.connect();
  const s = FakeSocket.last.open();
  for (const text of ["", "x", "1", "null", "[]", "{}", '{"type":"later"}', '{"type":"joined"}', '{"type":"text","data":null}', '{"type":"text","data":7}', '{"type":"text","data":{}}', '{"type":"resume"}', '{"type":"text","data":{"content":"ok"},"ack":"7"}']) s.says(text);
  s.onmessage({ data: new ArrayBuffer(8) });
  assert.equal(client.state, "open");
  assert.equal(seen.at(-1), "ok");
  assert.ok(errors.every(e => e.kind === "protocol") && errors.length === 5, JSON.stringify(errors));
});

test("a refused room is not asked for again, and the page is told", () => {
  const client = make({ rooms: ["a", "full"] });
  client.connect();
  FakeSocket.last.open().says({ type: "joined", room_id: "a" }).says({ type: "error", message: "room_id: full", room_id: "full" }).ends(1006);
  assert.deepEqual(errors, [{ kind: "gateway", message: "room_id: full", room: "full" }]);
  mock.timers.tick(250);
  FakeSocket.last.open();
  assert.deepEqual(FakeSocket.last.messages, []);
});

test("a room that is left before it was joined can be joined: the gateway's word on the one does not undo the other", () => {
  const client = make({ rooms: ["a"] });
  client.connect();
  const s = FakeSocket.last.open().says({ type: "joined", room_id: "a" });
  client.leave("r"); // it is not in it
  client.join("r");
  assert.deepEqual(s.messages, [{ type: "join", room_id: "r" }]);
  s.says({ type: "joined", room_id: "r" });
  client.leave("r");
  client.leave("r"); // once is enough
  assert.deepEqual(s.messages.slice(1), [{ type: "leave", room_id: "r" }]);
  client.join("r");
  s.says({ type: "left", room_id: "r" }).says({ type: "joined", room_id: "r" });
  client.leave("r");
  client.join("r");
  assert.deepEqual(s.messages.slice(2).map(m => m.type), ["join", "leave", "join"]);
  s.ends(1006);
  mock.timers.tick(250);
  assert.deepEqual([FakeSocket.last.url.searchParams.get("room_id"), FakeSocket.last.open().messages], ["a", [{ type: "join", room_id: "r" }]]);
});

test("a room of the address that is left and joined before the connection stands can be left later", () => {
  const client = make({ rooms: ["a"] });
  client.connect();
  client.leave("a");
  client.join("a");
  const s = FakeSocket.last.open().says({ type: "joined", room_id: "a" });
  assert.deepEqual(s.messages, []);
  client.leave("a");
  assert.deepEqual(s.messages, [{ type: "leave", room_id: "a" }]);
});

test("what a busy room has said since the last position comes again, and is shown once", () => {
  make({ rooms: ["r"], position: "p0" }).connect();
  const say = s => { for (let i = 0; i < 1000; i++) s.says(push("m" + i, { room_id: "r", id: "m" + i })); };
  say(FakeSocket.last.open());
  FakeSocket.last.ends(1006);
  mock.timers.tick(20_000);
  assert.equal(FakeSocket.last.url.searchParams.get("resume"), "p0");
  say(FakeSocket.last.open());
  assert.equal(FakeSocket.all.length, 2);
  assert.equal(seen.length, 1000);
});

test("a page that closes in a callback has closed: nothing opens, arrives or is asked for after it", async () => {
  const closes = make({ onState: s => { states.push(s); if (s.state === "connecting") closes.close(); } });
  closes.connect();
  mock.timers.tick(3_600_000);
  assert.equal(FakeSocket.all.length, 0, "while it connects");
  assert.deepEqual(states.map(s => s.state), ["connecting", "closed"]);

  const leaves = make({ rooms: ["r"], onRooms: list => { if (!list.length) leaves.close(); } });
  leaves.connect();
  FakeSocket.last.open().says({ type: "joined", room_id: "r" }).ends(1006);
  mock.timers.tick(3_600_000);
  assert.equal(FakeSocket.all.length, 1, "when its rooms are lost");
  assert.equal(leaves.state, "closed");

  let asked = 0;
  const opens = make({ token: () => { asked++; return token({ exp: now() / 1000 + 3600 }); }, onState: s => { if (s.state === "open") opens.close(); } });
  opens.connect();
  await settle();
  FakeSocket.last.open().says(push("late"));
  mock.timers.tick(7_200_000);
  await settle();
  assert.deepEqual([seen, asked, opens.state, FakeSocket.all.length], [[], 1, "closed", 2], "when it is open");
});

test("the room of the address is left if the page has left it before the connection stood", () => {
  const client = make({ rooms: ["a", "b"] });
  client.connect();
  client.leave("a");
  assert.deepEqual(FakeSocket.last.open().messages, [{ type: "join", room_id: "b" }, { type: "leave", room_id: "a" }]);
});

test("a room that is asked for at a node that leaves is joined at the next one", () => {
  const client = make();
  client.connect();
  FakeSocket.last.open();
  client.join("r");
  FakeSocket.last.says({ type: "error", message: "node is going", room_id: "r" }).ends(1001);
  mock.timers.tick(20_000);
  assert.equal(FakeSocket.last.url.searchParams.get("room_id"), "r");
});

test("a mistake of the page in a callback ends nothing, and is not hidden", t => {
  const caught = [];
  globalThis.reportError = e => caught.push(e.message);
  t.after(() => { delete globalThis.reportError; });
  const client = make({ onState: () => { throw new Error("of the page"); } });
  client.connect();
  FakeSocket.last.open();
  assert.equal(client.state, "open");
  client.close();
  assert.deepEqual(caught, ["of the page", "of the page", "of the page"]);
});

test("options that cannot be are refused at once", () => {
  assert.throws(() => new PushClient({ url: "ws://a/ws" }), /onPush/);
  assert.throws(() => make({ url: "ftp://a/ws" }), /url/);
  assert.throws(() => make({ rooms: [7] }), /room/);
  assert.equal(make({ url: "https://a/ws" }).state, "closed");
});

test("the types name what there is, and no more", () => {
  const types = readFileSync(new URL("../push-client.d.ts", import.meta.url), "utf8");
  const declared = [...types.matchAll(/^export declare (?:class|const|function) (\w+)/gm)].map(m => m[1]);
  assert.deepEqual(declared.sort(), ["PushClient", "claimsOf", "closeReasons"].sort());
  const body = types.slice(types.indexOf("declare class PushClient"));
  const members = [...body.slice(0, body.indexOf("\n}")).matchAll(/^ {2}(?:get )?(\w+)\(/gm)].map(m => m[1]);
  assert.deepEqual(members.sort(), Object.getOwnPropertyNames(PushClient.prototype).sort());
});
