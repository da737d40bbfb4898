// @ts-check
// A client of a gateway's WebSocket for browsers, in one module without dependencies. docs/browser.md says how it is used, and
// docs/client-protocol.md what is said on the wire.

/** @typedef {import("./push-client.d.ts").PushClientOptions} PushClientOptions */
/** @typedef {import("./push-client.d.ts").PushClientState} PushClientState */

const FIRST_PAUSE = 250; // ms, twice as long each time, and each drawn from the upper half
const LONGEST_PAUSE = 15_000;
const STEADY = 10_000; // a connection that held so long lets the pauses begin anew
const HANDSHAKE = 15_000;
const PING_EVERY = 20_000; // when nothing has come since the last one, the gateway is dead
const ACK_WITHIN = 50;
const ACK_EVERY = 16;
const REMEMBERED = 4096; // messages with an id: what comes again is all that was not acknowledged, and what rooms said since the last position
const MAX_ROOMS = 100;
const MAX_WAITING = 1024; // messages that wait for a handler that takes its time
const MAX_MESSAGE = 8 << 20; // characters; a push has 256 KiB of data, and more with many escapes
const MAX_UNSENT = 1 << 20; // bytes that the gateway has not read
const MAX_POSITION = 1024;
const REFRESH_BEFORE = 60_000; // the end of a token, or half of its time where that is less
const REFRESH_EVERY = 5_000; // while the page has no other token
const LONGEST_TIMER = 2 ** 31 - 1;

/**
 * What a close code of the gateway means. An end that is not listed is a connection that was lost.
 * @type {Readonly<Record<number, string>>}
 */
export const closeReasons = Object.freeze({
  1001: "node is going", 1002: "protocol error", 1007: "not UTF-8", 1009: "message too long", 1011: "fault in the node", 1012: "node restarts",
  4401: "token missing, wrong or expired", 4403: "the token does not allow this room", 4408: "no token came in time", 4429: "cut off for reading too slowly",
  4000: "disconnected by the service", 4410: "disconnected by the service, which does not want us back for now",
});

// After these ends the next connection would end in the same way. 4401 is tried again with another token.
const isFinal = code => [1002, 1007, 1009].includes(code) || (code >= 4400 && code < 4500 && ![4401, 4408, 4429].includes(code));

// Codes that the gateway does not use itself: the service has chosen them, and the words beside them.
const isOfService = code => code >= 4000 && code < 5000 && ![4401, 4403, 4408, 4429].includes(code);

/** A connection to a gateway that comes back when it is lost: same rooms, nothing twice, and nothing missing that the service has kept. */
export class PushClient {
  #o; #url; #WebSocket; #fetch;
  #wanted = false; // between connect() and close()
  #attempt = 0; // the connection that is heard; others are of the past
  #socket = null;
  #state = "closed";
  #tries = 0;
  #began = 0; // when the connection was opened, 0: it is not
  #heard = false; // something has come on it
  #timers = new Map(); // by name
  #token = ""; #given = null; // the one in use, and the one to use next where it is known
  #mine = new Set(); // rooms to be in
  #joined = new Set();
  #asked = new Set(); // rooms that this connection has asked for and not left
  #position; #frozen = -1; // the connection whose positions count no more
  #had = new Set();
  #queue = []; #busy = false;
  #upTo = 0; #unsaid = 0; #pinged = false;

  /** @param {PushClientOptions} options */
  constructor(options) {
    if (typeof options?.onPush !== "function") throw new TypeError("onPush: must be a function");
    this.#o = options;
    this.#WebSocket = options.WebSocket ?? globalThis.WebSocket;
    this.#fetch = options.fetch ?? globalThis.fetch?.bind(globalThis);
    this.#url = new URL(options.url ?? "ws", globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace(/^http/, "ws");
    this.#url.hash = "";
    if (!/^wss?:$/.test(this.#url.protocol)) throw new TypeError("url: must be ws, wss, http or https");
    this.#position = String(options.position ?? "").slice(0, MAX_POSITION);
    for (const room of options.rooms ?? []) this.#want(room);
  }

  get state() { return this.#state; }
  /** The rooms that the gateway says we are in. */
  get rooms() { return [...this.#joined]; }
  /** Where we are in the logs of our rooms. */
  get position() { return this.#position; }

  /** Connects, and stays connected until close() or an end that would come again. */
  connect() {
    if (this.#wanted) return;
    this.#wanted = true;
    this.#tries = 0;
    this.#given = null;
    void this.#open();
  }

  /** Ends the connection. What has come and waits for onPush is left out, and comes again if the service has kept it. */
  close() {
    if (!this.#wanted) return;
    this.#acknowledge();
    this.#queue = [];
    this.#end(1000, "", "closed");
  }

  /** @param {string} room */
  join(room) {
    this.#want(room);
    this.#ask(room);
  }

  /** @param {string} room */
  leave(room) {
    this.#mine.delete(room);
    // Of a room that it was not asked for, the gateway would say that we are not in it: that must not reach a join that follows.
    if (this.#asked.delete(room)) this.#say({ type: "leave", room_id: room });
  }

  /** Shows another token at once. Without this it is done in time before the old one ends. */
  async refresh() {
    const attempt = this.#attempt;
    const token = await this.#nextToken("refresh");
    if (attempt !== this.#attempt || this.#state !== "open" || !token) return;
    this.#token = token;
    this.#say({ type: "refresh", token });
    this.#planRefresh();
  }

  #want(room) {
    if (typeof room !== "string" || room === "") throw new TypeError("room: must be a text");
    if (!this.#mine.has(room) && this.#mine.size >= MAX_ROOMS) throw new RangeError(`more than ${MAX_ROOMS} rooms`);
    this.#mine.add(room);
  }

  #ask(room) {
    if (this.#socket?.readyState !== 1) return; // a new connection asks for all at its start
    this.#asked.add(room);
    this.#say({ type: "join", room_id: room });
  }

  #timer(name, wait, f) {
    clearTimeout(this.#timers.get(name));
    this.#timers.delete(name);
    if (f) this.#timers.set(name, setTimeout(() => { this.#timers.delete(name); f(); }, Math.min(wait, LONGEST_TIMER)));
  }

  // What a page does wrong in a callback is the page's: it is told where all its mistakes are, and ends nothing here.
  #call(f, ...values) {
    try { f?.(...values); } catch (error) {
      if (globalThis.reportError) globalThis.reportError(error);
      else queueMicrotask(() => { throw error; });
    }
  }

  /** @param {PushClientState["state"]} state */
  #set(state, more = {}) {
    this.#state = state;
    this.#call(this.#o.onState, { state, ...more });
  }

  #error(kind, message, more = {}) { this.#call(this.#o.onError, { kind, message, ...more }); }

  #setRooms(change) {
    change(this.#joined);
    this.#call(this.#o.onRooms, [...this.#joined]);
  }

  async #nextToken(why) {
    const { token } = this.#o;
    const text = typeof token === "function" ? await token(why) : token;
    if (typeof text !== "string") throw new TypeError("token: is no text");
    return text;
  }

  async #open() {
    const attempt = ++this.#attempt;
    this.#set("connecting");
    if (attempt !== this.#attempt) return; // the page has closed it in its callback
    if (this.#o.token !== undefined) {
      let token;
      try {
        token = this.#given ?? await this.#nextToken("connect");
      } catch (error) {
        if (attempt !== this.#attempt) return;
        this.#error("token", String(error?.message ?? error));
        this.#lost(0, "there is no token");
        return;
      }
      if (attempt !== this.#attempt) return;
      this.#given = null;
      this.#token = token;
    }
    const [first, ...others] = this.#mine;
    const url = new URL(this.#url);
    const fields = { ...(this.#o.userId !== undefined && { user_id: this.#o.userId, user_name: this.#o.userName ?? this.#o.userId }),
      ...(first !== undefined && { room_id: first }), ack: "1", resume: this.#position };
    for (const [name, value] of Object.entries(fields)) url.searchParams.set(name, value);
    for (const [key, value] of Object.entries(this.#o.attributes ?? {})) url.searchParams.set("attr." + key, value);
    this.#began = 0; this.#heard = this.#pinged = false; this.#upTo = this.#unsaid = 0;
    this.#timer("ack");
    let socket;
    try {
      socket = new this.#WebSocket(url.href);
    } catch (error) { // the address, or a policy of the page, forbids it: so it will the next time
      this.#end(0, String(error?.message ?? error), "closed");
      return;
    }
    this.#socket = socket;
    this.#timer("handshake", HANDSHAKE, () => this.#drop("the gateway does not answer"));
    socket.onopen = () => {
      if (attempt !== this.#attempt) return;
      this.#began = Date.now();
      this.#timer("handshake");
      if (this.#o.token !== undefined) this.#say({ type: "connect", token: this.#token });
      this.#asked = new Set(this.#mine.has(first) ? [first] : []);
      for (const room of others) if (this.#mine.has(room)) this.#ask(room);
      for (const room of this.#mine) if (room !== first && !others.includes(room)) this.#ask(room); // wanted meanwhile
      if (first !== undefined && !this.#mine.has(first)) this.#say({ type: "leave", room_id: first }); // the address has joined it
      this.#ping();
      // Whether a token is taken is told by what comes.
      if (this.#o.token === undefined) this.#set("open");
    };
    socket.onmessage = event => { if (attempt === this.#attempt) this.#receive(event.data); };
    socket.onerror = () => {}; // onclose says the same
    socket.onclose = event => { if (attempt === this.#attempt) void this.#closed(attempt, event.code, event.reason, url); };
  }

  #ping() {
    this.#timer("ping", PING_EVERY, () => {
      if (this.#pinged) { this.#drop("the gateway is silent"); return; }
      this.#pinged = true;
      this.#say({ type: "ping" });
      this.#ping();
    });
  }

  // Text is sent only where there is a connection: a new one says all that is needed at its start.
  #say(message) {
    if (this.#socket?.readyState !== 1) return;
    if (this.#socket.bufferedAmount > MAX_UNSENT) { this.#drop("the gateway reads nothing"); return; }
    this.#socket.send(typeof message === "string" ? message : JSON.stringify(message));
  }

  #receive(text) {
    const attempt = this.#attempt;
    this.#pinged = false;
    let m = null;
    if (typeof text === "string" && text.length <= MAX_MESSAGE) {
      try { m = JSON.parse(text); } catch { /* below */ }
    }
    if (m === null || typeof m !== "object") { this.#error("protocol", "the gateway sent what is no message"); return; }
    if (!this.#heard) {
      this.#heard = true;
      if (this.#o.token !== undefined) {
        this.#planRefresh();
        this.#set("open");
        if (attempt === this.#attempt) this.#tellToken(expiry(this.#token));
        if (attempt !== this.#attempt) return; // the page has closed it in its callback
      }
    }
    const room = typeof m.room_id === "string" ? m.room_id : undefined;
    if (m.data === undefined) {
      switch (m.type) {
      case "joined": if (room !== undefined && this.#joined.size < 2 * MAX_ROOMS) this.#setRooms(rooms => rooms.add(room)); return;
      case "left": this.#setRooms(rooms => rooms.delete(room)); return;
      case "refreshed": this.#tellToken(m.expires * 1000); return;
      case "error":
        // A text begins with the field that is at fault. A node that only leaves says so of no field: the next one lets us in.
        if (room !== undefined && !this.#joined.has(room) && String(m.message).startsWith("room_id:")) { this.#mine.delete(room); this.#asked.delete(room); } // it would be refused again
        this.#error("gateway", String(m.message), room === undefined ? {} : { room });
        return;
      case "resume": case "gap": break; // in order with the pushes
      default: return; // ready, pong, and those of a later gateway
      }
    } else if (m.data === null || typeof m.data !== "object") {
      return;
    }
    if (this.#queue.length >= MAX_WAITING) { this.#drop("more comes than the page takes"); return; }
    this.#queue.push({ attempt, m });
    this.#drain();
  }

  #tellToken(expires) {
    if (expires > 0) this.#call(this.#o.onToken, new Date(expires));
  }

  // One message at a time, in order: a handler that returns a promise has the others wait.
  #drain() {
    while (!this.#busy && this.#queue.length > 0) {
      const done = this.#handle(this.#queue.shift());
      if (!done) continue;
      this.#busy = true;
      void done.then(() => { this.#busy = false; this.#drain(); });
    }
  }

  #handle({ attempt, m }) {
    if (m.data === undefined) {
      if (m.type === "gap") this.#call(this.#o.onGap, m.room_id);
      else if (typeof m.token === "string" && m.token.length <= MAX_POSITION && attempt !== this.#frozen) {
        this.#position = m.token;
        this.#call(this.#o.onPosition, m.token);
      }
      return null;
    }
    const key = m.id === undefined ? "" : keyOf(m);
    if (key !== "" && this.#had.has(key)) { this.#handled(attempt, m.ack); return null; }
    const done = () => {
      if (key !== "") {
        this.#had.add(key);
        if (this.#had.size > REMEMBERED) for (const oldest of this.#had) { this.#had.delete(oldest); break; }
      }
      this.#handled(attempt, m.ack);
    };
    // It may come again if it is not confirmed. So nothing behind it is confirmed either: the connection begins anew.
    const failed = error => {
      this.#error("handler", String(error?.message ?? error), { error });
      if (m.id === undefined && !m.ack) return;
      this.#frozen = attempt;
      this.#queue = this.#queue.filter(q => q.attempt !== attempt || !q.m.ack); // it comes behind the one that failed. Others do not come again
      if (attempt === this.#attempt) this.#drop("a push was not handled");
    };
    try {
      const result = /** @type {any} */ (this.#o.onPush(pushOf(m)));
      if (typeof result?.then === "function") return Promise.resolve(result).then(done, failed);
    } catch (error) {
      failed(error);
      return null;
    }
    done();
    return null;
  }

  #handled(attempt, ack) {
    if (!Number.isSafeInteger(ack) || ack <= 0 || attempt !== this.#attempt || attempt === this.#frozen) return;
    this.#upTo = Math.max(this.#upTo, ack);
    if (++this.#unsaid >= ACK_EVERY) this.#acknowledge();
    else if (this.#unsaid === 1) this.#timer("ack", ACK_WITHIN, () => this.#acknowledge());
  }

  #acknowledge() {
    this.#timer("ack");
    if (this.#unsaid > 0) this.#say(`{"type":"ack","ack":${this.#upTo}}`);
    this.#unsaid = 0;
  }

  #planRefresh() {
    const end = expiry(this.#token);
    if (!(end > 0) || typeof this.#o.token !== "function") return;
    const left = end - Date.now();
    const again = async () => {
      const attempt = this.#attempt, old = this.#token;
      let token = old;
      try { token = await this.#nextToken("refresh"); } catch (error) { this.#error("token", String(error?.message ?? error)); }
      if (attempt !== this.#attempt || this.#state !== "open" || this.#token !== old) return;
      if (token === old) { this.#timer("refresh", REFRESH_EVERY, again); return; } // the gateway says when it is too late
      this.#token = token;
      this.#say({ type: "refresh", token });
      this.#planRefresh();
    };
    this.#timer("refresh", Math.max(left - Math.min(REFRESH_BEFORE, left / 2), 0), again);
  }

  async #closed(attempt, code, said, url) {
    const opened = this.#began > 0;
    const reason = (isOfService(code) && String(said ?? "")) || closeReasons[code] || "the connection was lost";
    if (!opened && this.#fetch) {
      // A browser does not say why a handshake was refused. The same request as a plain one does.
      this.#timer("handshake");
      const plain = new URL(url);
      plain.protocol = plain.protocol.replace(/^ws/, "http");
      const no = await this.#fetch(plain.href, { credentials: "omit", signal: AbortSignal.timeout(5000) })
        .then(async r => ([400, 403].includes(r.status) ? (await r.text()).slice(0, 256).trim() : null), () => null)
        .catch(() => null);
      if (attempt !== this.#attempt) return;
      if (no?.startsWith("resume:") && this.#position !== "") { // of another deployment: it is of no use any more
        this.#position = "";
        this.#call(this.#o.onPosition, "");
        this.#lost(code, reason);
        return;
      }
      if (no !== null) { this.#end(code, no || "the gateway refuses the connection", "closed"); return; }
    }
    if (code === 4401 && typeof this.#o.token === "function") {
      let next = null;
      try { next = await this.#nextToken("refused"); } catch (error) { this.#error("token", String(error?.message ?? error)); }
      if (attempt !== this.#attempt) return;
      if (next === this.#token) { this.#end(code, reason, "closed"); return; }
      this.#given = next; // null: it is asked for again
    } else if (isFinal(code) || code === 4401 || (code === 4408 && this.#o.token === undefined)) {
      this.#end(code, reason, "closed");
      return;
    }
    this.#lost(code, reason);
  }

  // Gives up a connection that is of no use. Its end is not waited for: on a dead line it may take minutes.
  #drop(reason) {
    if (this.#wanted) this.#lost(0, reason);
  }

  #lost(code, reason) {
    if (this.#began > 0 && this.#heard && Date.now() - this.#began >= STEADY) this.#tries = 0;
    const longest = Math.min(FIRST_PAUSE * 2 ** this.#tries, LONGEST_PAUSE);
    // A node that leaves sends away all its clients at once.
    const wait = [1001, 1012].includes(code) && this.#tries === 0 ? Math.random() * 1000 : longest / 2 + Math.random() * longest / 2;
    this.#tries = Math.min(this.#tries + 1, 16);
    this.#end(code, reason, "waiting", wait);
  }

  // The end of a connection, for good or until the next one.
  #end(code, reason, state, wait = 0) {
    const socket = this.#socket;
    this.#attempt++;
    this.#socket = null;
    for (const name of [...this.#timers.keys()]) this.#timer(name);
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      try { socket.close(1000); } catch { /* it is closed */ }
    }
    if (state === "closed") this.#wanted = false;
    else this.#timer("again", wait, () => void this.#open());
    const attempt = this.#attempt;
    if (this.#joined.size > 0) this.#setRooms(rooms => rooms.clear());
    if (attempt !== this.#attempt) return; // the page has ended it, or begun anew, in its callback
    this.#set(state, { code, reason, ...(state === "waiting" && { retryIn: Math.round(wait) }) });
  }
}

// keyOf tells messages apart: services choose ids without knowing each other's, so the content counts, too. Of it a hash is kept.
function keyOf(m) {
  const text = m.data.content ?? m.data.content_base64 ?? "";
  let a = 0x811c9dc5, b = 0x9e3779b9;
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i);
    a = Math.imul(a ^ c, 0x01000193);
    b = Math.imul(((b << 5) | (b >>> 27)) ^ c, 0x85ebca6b);
  }
  return `${m.id}\n${text.length}:${a >>> 0}:${b >>> 0}`;
}

function pushOf(m) {
  const { content, content_base64: base64 } = m.data;
  return {
    type: String(m.type), room: m.room_id ?? "", user: m.user_id ?? "", broadcast: m.broadcast === true, time: new Date((m.timestamp ?? 0) * 1000),
    text: typeof content === "string" ? content : null,
    bytes: typeof base64 === "string" ? Uint8Array.from(atob(base64), c => c.charCodeAt(0)) : null,
    metadata: m.metadata ?? {}, id: m.id ?? "", replayed: m.replayed === true,
  };
}

/**
 * The claims of a JSON Web Token, {} of what is none. Nothing is verified: that is the gateway's part.
 * @param {string} token
 * @returns {Record<string, any>}
 */
export function claimsOf(token) {
  try {
    const text = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
    return Object(JSON.parse(new TextDecoder().decode(Uint8Array.from(text, c => c.charCodeAt(0)))));
  } catch {
    return {};
  }
}

// expiry is the end of a token in ms, NaN where it is not known.
function expiry(token) { return Number(claimsOf(token).exp) * 1000; }
