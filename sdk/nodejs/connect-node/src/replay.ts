import { createHash } from "node:crypto";
import { clock, type Outcome } from "./message.js";
import { replayAckTimeout, type Session } from "./session.js";

/** How long a gate stays closed without an answer: a live push is not held longer because a store is slow. */
const patience = 2000;
/** After a replay that has failed the node asks again, then after twice as long each. */
const firstRetry = 1000;
const lastRetry = 30_000;
/** How often gates that wait for something are looked at. */
const tickEvery = 200;
/** A manager whose stream is back may have stored for users whom it could not reach: this much later all are asked for again, so many in a tick. */
const resyncDelay = 1000;
const resyncUsers = 200;
/** Bounds the messages of one replay that a client has not taken. */
const mostOut = 1024;

/** A stream of a manager that can replay. */
export interface Offer {
  /** Names the manager. */
  readonly manager: string;
  ask(userId: string, gate: bigint, window: number): void;
  replayTaken(gate: bigint, seq: bigint): void;
}

/**
 * One connection's part in replay. While it is closed, direct messages wait in the session and those out of the store pass, so that what was
 * stored comes before what is new. It never hangs on the store: without an answer for 2 s it opens, and the node asks again later.
 */
export class Gate {
  isClosed = false;
  isReady = false;
  isGone = false;
  /** When it was closed, or the last sign of life of the replay that it is closed for. */
  closedAt = 0;
  /** That replay has ended: it is closed for what was stored meanwhile, and signs of life do not count. */
  repeats = false;
  ask: Ask | undefined;
  /** Nudged since it was asked. */
  again = false;
  failures = 0;
  /** When to ask again; 0: need not. */
  retryAt = 0;

  constructor(private readonly replays: Replays, readonly session: Session, readonly window: number) {}

  get user(): string {
    return this.session.user;
  }

  /** Says that the Controller knows of the connection: what is stored is asked for now. Asked before, a message might be stored behind the reading. */
  ready(): void {
    this.replays.ready(this);
  }

  leave(): void {
    this.replays.leave(this);
  }

  backoff(): number {
    return Math.min(firstRetry * 2 ** Math.min(this.failures, 5), lastRetry);
  }
}

/** One Catchup. */
export class Ask {
  /** Where it was asked; undefined: that stream has ended, or the connection. */
  on: Offer | undefined;
  since = clock();
  last = 0n;
  hole = false;
  out: { seq: bigint; done: boolean }[] = [];

  constructor(private readonly replays: Replays, readonly gate: Gate, readonly number: bigint, on: Offer) {
    this.on = on;
  }

  /** The client has the message, or need not have it any more: the store may forget it. */
  taken(seq: bigint): void {
    this.replays.taken(this, seq);
  }

  /** The client has not acknowledged in time: the replay is over, and what was not taken is asked for again. */
  lost(): void {
    this.replays.lost(this);
  }
}

/** The gates of a node and what is asked for them. */
export class Replays {
  private readonly gates = new Map<string, Set<Gate>>();
  private readonly asks = new Map<bigint, Ask>();
  private readonly offers = new Set<Offer>();
  private readonly waiting = new Set<Gate>();
  private numbers = 0n;
  private total = 0;
  private resyncAt = 0;
  private resync: string[] = [];
  private timer: NodeJS.Timeout | undefined;

  constructor(private readonly maxGates: number, private readonly opened: (s: Session) => void) {}

  /** Makes the gate of a connection that begins, closed if there is a manager that could replay; undefined: there are too many. */
  gate(session: Session, window: number): Gate | undefined {
    if (this.total >= this.maxGates) return undefined;
    const g = new Gate(this, session, window);
    let of = this.gates.get(session.user);
    if (of === undefined) this.gates.set(session.user, (of = new Set()));
    of.add(g);
    this.total++;
    if (this.offers.size > 0) this.close(g);
    return g;
  }

  ready(g: Gate): void {
    if (g.isGone || g.isReady) return;
    g.isReady = true;
    this.askFor(g, this.offers.size > 0);
    g.closedAt = clock(); // The Controller was waited for until now.
  }

  leave(g: Gate): void {
    if (g.isGone) return;
    g.isGone = true;
    g.isClosed = false;
    this.total--;
    const of = this.gates.get(g.user);
    of?.delete(g);
    if (of?.size === 0) this.gates.delete(g.user);
    this.waiting.delete(g);
    this.drop(g);
  }

  /** Makes a stream known as one that replays. */
  join(o: Offer): void {
    this.offers.add(o);
    if (this.total > 0 && this.resyncAt === 0) {
      this.resyncAt = clock() + resyncDelay;
      this.arm();
    }
  }

  /** Forgets a stream, and asks elsewhere for what was asked on it. */
  part(o: Offer): void {
    if (!this.offers.delete(o)) return;
    for (const a of [...this.asks.values()]) {
      if (a.on !== o) continue;
      const { gate, since } = a;
      this.askFor(gate, gate.isClosed);
      if (gate.ask !== undefined) gate.ask.since = since; // It is one wait.
    }
  }

  /** Takes a ReplayEnd that has come on o. */
  end(o: Offer, number: bigint, failure: string): void {
    const a = this.asks.get(number);
    if (a === undefined || a.on !== o) return; // Of a connection that is gone, or asked for again elsewhere.
    const g = a.gate;
    if (failure !== "") {
      this.fail(g);
    } else if (g.again) {
      this.close(g);
      if (!g.repeats) { // All that follow have one patience: what waits may be why more is stored.
        g.repeats = true;
        g.closedAt = clock();
      }
      this.askFor(g, false);
    } else {
      this.drop(g);
      g.failures = 0;
      this.waiting.delete(g);
      this.open(g);
    }
    a.on = o; // What is not acknowledged yet is still reported.
  }

  /** Closes the user's gates and has the store read again. */
  nudge(user: string): void {
    for (const g of this.gates.get(user) ?? []) {
      if (!g.isReady) this.close(g); // It asks later anyway.
      else if (g.ask !== undefined && g.isClosed) g.again = true;
      else this.askFor(g, true);
    }
  }

  /** Finds the connection for a message out of the store, and notes it as handed over. */
  route(number: bigint, seq: bigint, after: bigint, user: string): Ask | "behind" | undefined {
    const a = this.asks.get(number);
    if (a === undefined || a.gate.user !== user) return undefined;
    if ((after !== 0n && after !== a.last) || (after === 0n && a.last !== 0n && a.hole) || a.out.length >= mostOut) {
      a.hole = true;
      return "behind";
    }
    this.lives(a);
    a.out.push({ seq, done: false });
    return a;
  }

  /** Tells what became of the message that was routed last. */
  handed(a: Ask, seq: bigint, out: Outcome): void {
    if (out === "failed" || out === "notHere" || out === "stalled") {
      a.hole = true;
      a.out = a.out.filter((h) => h.seq !== seq || h.done);
      return;
    }
    a.last = seq;
    a.hole = false;
  }

  taken(a: Ask, seq: bigint): void {
    for (const h of a.out) if (h.seq === seq) h.done = true;
    let upTo = 0n;
    while (a.out[0]?.done === true) upTo = a.out.shift()!.seq;
    if (upTo === 0n) return;
    this.lives(a);
    a.on?.replayTaken(a.number, upTo);
  }

  lost(a: Ask): void {
    if (a.gate.ask === a) this.fail(a.gate);
  }

  stop(): void {
    clearInterval(this.timer);
    this.timer = undefined;
  }

  private lives(a: Ask): void {
    a.since = clock();
    if (!a.gate.repeats) a.gate.closedAt = a.since;
  }

  private close(g: Gate): void {
    if (!g.isClosed) {
      g.isClosed = true;
      g.closedAt = clock();
      g.repeats = false;
    }
    this.wait(g);
  }

  private open(g: Gate): void {
    if (!g.isClosed) return;
    g.isClosed = false;
    // Later: the session may be in the middle of something.
    queueMicrotask(() => this.opened(g.session));
  }

  private wait(g: Gate): void {
    this.waiting.add(g);
    this.arm();
  }

  /** Asks for what is stored for the gate's user, if there is whom to ask. closed: direct messages wait for the answer. */
  private askFor(g: Gate, closed: boolean): void {
    this.drop(g);
    g.again = false;
    g.retryAt = 0;
    const o = this.pick(g);
    if (o === undefined) {
      this.open(g); // All are asked for when a manager comes.
      return;
    }
    const a = new Ask(this, g, ++this.numbers, o);
    g.ask = a;
    this.asks.set(a.number, a);
    if (closed) this.close(g);
    this.wait(g);
    o.ask(g.user, a.number, g.window);
  }

  /** The stream on which to ask: of the same manager for a user, as long as the managers are the same and answer. */
  private pick(g: Gate): Offer | undefined {
    const managers = [...new Set([...this.offers].map((o) => o.manager))];
    if (managers.length === 0) return undefined;
    const score = (manager: string): string => createHash("sha1").update(manager).update("\0").update(g.user).digest("hex");
    if (managers.length > 1) managers.sort((a, b) => (score(a) < score(b) ? -1 : 1));
    const manager = managers[g.failures % managers.length]!;
    const streams = [...this.offers].filter((o) => o.manager === manager);
    return streams[parseInt(score("").slice(0, 8), 16) % streams.length];
  }

  private drop(g: Gate): void {
    if (g.ask === undefined) return;
    this.asks.delete(g.ask.number);
    g.ask.on = undefined;
    g.ask = undefined;
  }

  /** Opens the gate, and asks again later. */
  private fail(g: Gate): void {
    this.drop(g);
    g.retryAt = clock() + g.backoff();
    g.failures++;
    this.wait(g);
    this.open(g);
  }

  private arm(): void {
    this.timer ??= setInterval(() => this.look(), tickEvery).unref();
  }

  private look(): void {
    const now = clock();
    for (const g of [...this.waiting]) this.lookAt(g, now);
    if (this.resyncAt !== 0 && now >= this.resyncAt) {
      this.resyncAt = 0;
      this.resync = [...this.gates.keys()];
    }
    for (const user of this.resync.splice(0, resyncUsers)) {
      for (const g of this.gates.get(user) ?? []) {
        if (!g.isReady) continue;
        if (g.ask === undefined) this.askFor(g, false);
        break;
      }
    }
    if (this.waiting.size === 0 && this.resyncAt === 0 && this.resync.length === 0) this.stop();
  }

  private lookAt(g: Gate, now: number): void {
    const a = g.ask;
    if (a !== undefined) {
      // If something is out, it is the client that is waited for, and the session knows for how long.
      const limit = patience + (a.out.length > 0 ? replayAckTimeout : 0);
      if (g.isClosed && now - g.closedAt >= limit) this.open(g);
      if (now - a.since >= limit + g.backoff()) {
        g.failures++;
        this.askFor(g, false);
      }
    } else if (g.retryAt !== 0) {
      if (now >= g.retryAt) this.askFor(g, false);
    } else if (!g.isClosed || now - g.closedAt >= patience) {
      this.open(g);
      this.waiting.delete(g);
    }
  }
}
