import { clock, hasExpired, sizeOf, watch, type Message, type Options, type Outcome, type Push } from "./message.js";
import type { Confirmation } from "./receipts.js";
import type { Words } from "./refusals.js";
import type { Ask, Gate } from "./replay.js";

/**
 * Why a connection is to be closed: slow, its client does not read; dead, it has not answered a ping; broken, a write to it threw; going, the node
 * leaves; disconnected, a service has asked for it.
 */
export type CloseReason = "slow" | "dead" | "broken" | "going" | "disconnected";

/**
 * One connection of a client, as the gateway has it. The methods are called from the event loop, must not wait, and may throw: what they
 * throw, and what a promise of theirs rejects with, is told to Config.onError, and ends at most this connection.
 */
export interface Connection {
  /** Writes a push to the client. The node calls it only while buffered() is below Config.highWater. */
  send(push: Push): void;
  /** How many bytes wait to be written to the client, such as `ws.bufferedAmount`. */
  buffered(): number;
  /**
   * Closes the connection: soon, with what was written before. Session.end has been called already. said is there for "disconnected": the
   * close code, 4000 to 4999, and the words that the client is to get.
   */
  close(why: CloseReason, said?: Words): void;
  /** Asks whether the client lives. Session.heard is to be called with what it answers. Needed only with acks. */
  ping?(): void;
  /** The Controller knows: pushes to the room arrive from now on. "": pushes to the user do. */
  joined?(room: string): void;
  /** The Controller knows that the connection is not in the room any more. */
  left?(room: string): void;
  /** The Controller does not let the user in, for good. The connection is out of the room; "": it should be closed. */
  refused?(room: string, why: string): void;
}

/** The bounds of one session. */
export interface SessionLimits {
  highWater: number;
  queueFrames: number;
  queueBytes: number;
}

/** What sessions need of their node. */
export interface SessionHost {
  readonly limits: SessionLimits;
  /** look is called about every 10 ms from now on, until it returns false. */
  watch(s: Session): void;
  /** Ends a session that the node itself closes. */
  cut(s: Session, why: CloseReason): void;
  caught(what: string, error: unknown): void;
  onEnd(s: Session): void;
  join(s: Session, room: string): void;
  leave(s: Session, room: string): void;
}

/** How many frames, and bytes of them, a client may leave unacknowledged, and how many may wait behind a gate. */
const mostFrames = 256;
const mostBytes = 256 << 10;
/** For how many ids a connection remembers that it has had them. */
const mostSeen = 64;
/** How long a client may take to answer a ping. */
const pongTimeout = 2000;
/** How long a client may take for a message out of the store. */
export const replayAckTimeout = 10_000;

interface Entry {
  message: Message;
  size: number;
  /** The number with which it is acknowledged; 0: it is not. */
  ack: number;
  replayed: boolean;
  collapse: string;
  key: string;
  expires: number;
  number: number;
}

/** A frame between being taken and being acknowledged or given up. */
interface Unacked {
  entry: Entry;
  waits: Confirmation[];
  ask: Ask | undefined;
  seq: bigint;
  half: number;
  deadline: number;
  written: boolean;
  asked: boolean;
}

/** A direct message behind the gate. */
interface Held {
  entry: Entry;
  waits: Confirmation[];
  wantsAck: boolean;
  deadline: number;
}

let made = 0;

/**
 * A connection as the node knows it: its rooms, its queue, the ids that it has had, and what its client has not acknowledged.
 * ConnectNode.connect makes it.
 */
export class Session {
  /** For the membership reports. */
  readonly rooms = new Set<string>();
  readonly leaving = new Set<string>();
  gate: Gate | undefined;

  /** No other connection of this process has it. */
  readonly id = (++made).toString(36);
  readonly since = Date.now();

  private ended = false;
  private queue: Entry[] = [];
  private queuedBytes = 0;
  private readonly seen = new Map<string, number>();
  private last = 0;
  private unacked: Unacked[] = [];
  private unackedBytes = 0;
  private again: number[] = [];
  private held: Held[] = [];
  private heldBytes = 0;
  private pinged = 0;
  private due = 0;

  constructor(
    readonly user: string,
    readonly name: string,
    readonly connection: Connection,
    /** The client acknowledges. */
    readonly acks: boolean,
    /** What pushes with a filter look at. */
    readonly attributes: ReadonlyMap<string, string>,
    private readonly host: SessionHost,
  ) {}

  /** What the client calls its device, "" if it does not. */
  get device(): string {
    return this.attributes.get("device_id") ?? "";
  }

  /** Puts the connection into a room at once; Connection.joined tells when the Controller knows. Throws a RangeError for what is no room's id. */
  join(room: string): void {
    this.host.join(this, room);
  }

  /** Takes the connection out of a room at once; Connection.left tells when the Controller knows. */
  leave(room: string): void {
    this.host.leave(this, room);
  }

  /** Whether pushes to the room are for this connection. */
  isIn(room: string): boolean {
    return this.rooms.has(room);
  }

  /** Whether it has ended. */
  get isOver(): boolean {
    return this.ended;
  }

  /** Takes the client's word that it has everything up to number n. False: it was not sent that number. */
  ack(n: number): boolean {
    if (!Number.isSafeInteger(n) || n < 0 || n > this.last) return false;
    this.heard();
    const given = this.unacked.filter((r) => r.entry.number <= n && r.written);
    if (given.length > 0) {
      this.unacked = this.unacked.filter((r) => r.entry.number > n || !r.written);
      for (const r of given) this.settle(r, true);
    }
    this.pump(clock());
    return true;
  }

  /** Says that something has come from the client: it lives. */
  heard(): void {
    this.pinged = 0;
  }

  /** Says that the connection has room again. The node notices by itself within about 10 ms. */
  writable(): void {
    this.pump(clock());
  }

  /** Says that the connection has ended. It may be called again. */
  end(): void {
    if (this.ended) return;
    this.ended = true;
    for (const r of this.unacked) this.giveUp(r.waits, "");
    for (const h of this.held) this.giveUp(h.waits, "");
    this.unacked = [];
    this.held = [];
    this.queue = [];
    this.again = [];
    this.unackedBytes = this.heldBytes = this.queuedBytes = 0;
    this.gate?.leave();
    this.host.onEnd(this);
  }

  /** Offers a message. c is where the client's acknowledgement is told, if one is wanted. */
  offer(m: Message, o: Options | undefined, c: Confirmation | undefined): Outcome {
    const now = clock();
    const size = sizeOf(m);
    if (this.ended) return "notHere";
    if (hasExpired(o, now)) {
      this.taken(o);
      return "expired";
    }
    if (o !== undefined && o.key !== "") {
      const payload = this.seen.get(o.key);
      if (payload !== undefined) {
        const out = this.repeated(o, c, payload, now);
        if (out !== undefined) return out;
      }
    }
    const behind = this.isBehind(o);
    const wantsAck = this.acks && o !== undefined && (c !== undefined || o.replay !== undefined);
    if (behind) {
      if (this.held.length >= mostFrames || (this.held.length > 0 && this.heldBytes + size > mostBytes)) return "failed";
    } else {
      if (wantsAck && this.isFullFor(size)) return "stalled";
      this.pump(now);
      if (this.ended) return "failed"; // A write has failed.
      if (this.queue.length > 0 && (this.queue.length >= this.host.limits.queueFrames || this.queuedBytes + size > this.host.limits.queueBytes)) {
        this.host.cut(this, "slow");
        return "failed";
      }
    }
    const h: Held = {
      entry: { message: m, size, ack: 0, replayed: o?.replay !== undefined, collapse: "", key: o?.key ?? "", expires: o?.expires ?? 0, number: 0 },
      waits: [], wantsAck, deadline: wantsAck ? o.ackBy : 0,
    };
    let out: Outcome = "delivered";
    if (o !== undefined) {
      if (o.replay === undefined) h.entry.collapse = o.collapse;
      if (wantsAck && c !== undefined) {
        c.expect();
        h.waits.push(c);
        out = "pending";
      }
      const at = this.heldAt(o.key);
      if (at >= 0) { // Only one out of the store comes so far.
        h.waits = joined(this.held[at]!.waits, h.waits);
        this.unhold(at);
      } else if (o.key !== "") {
        this.remember(o.key, o.payloadHash);
      }
    }
    if (behind) {
      this.hold(h);
      return out;
    }
    this.number(h, o, now);
    if (o?.replay !== undefined && !h.wantsAck) this.taken(o);
    this.enqueue(h.entry);
    this.pump(now);
    // What was the first in the queue has gone or failed with the connection by now.
    return this.ended && out === "delivered" && this.queue.length === 0 ? "failed" : out;
  }

  /** The gate has opened. */
  opened(): void {
    this.pump(clock());
  }

  /** Does what is due. False: nothing is, until the session asks to be watched again. */
  look(now: number): boolean {
    if (this.ended) return false;
    if (this.due !== 0 && now >= this.due) this.tick(now);
    this.pump(now);
    return !this.ended && (this.queue.length > 0 || this.due !== 0);
  }

  /** Whether everything that was taken is written. */
  get isWritten(): boolean {
    return this.queue.length === 0;
  }

  private isBehind(o: Options | undefined): boolean {
    return (this.held.length > 0 || (this.gate?.isClosed ?? false)) && o?.replay === undefined;
  }

  private isFullFor(size: number): boolean {
    return this.unacked.length > 0 && (this.unacked.length >= mostFrames || this.unackedBytes + size > mostBytes);
  }

  /**
   * What becomes of a message whose id the connection has had; undefined: it is taken after all. One that the client has not
   * acknowledged yet answers this one, too, once it has.
   */
  private repeated(o: Options, c: Confirmation | undefined, payload: number, now: number): Outcome | undefined {
    if (payload !== o.payloadHash) {
      this.taken(o); // It can never be handed over.
      return "reused";
    }
    const at = this.heldAt(o.key);
    if (at >= 0) {
      if (o.replay !== undefined) return undefined; // It goes ahead.
      const h = this.held[at]!;
      if (!h.wantsAck || c === undefined) return "duplicate";
      c.expect();
      h.waits = joined(h.waits, [c]);
      return "pending";
    }
    const r = this.unacked.find((u) => u.entry.key === o.key);
    if (r !== undefined && this.acks && (c !== undefined || o.replay !== undefined)) {
      if (o.replay !== undefined) {
        if (r.ask === o.replay.ask) {
          this.taken(o); // It was stored twice. The first place stands for both.
        } else {
          r.ask = o.replay.ask;
          r.seq = o.replay.seq;
          r.deadline = Math.max(r.deadline, now + replayAckTimeout);
        }
      }
      if (c === undefined) return "duplicate";
      c.expect();
      r.waits = joined(r.waits, [c]);
      return "pending";
    }
    this.taken(o);
    return "duplicate";
  }

  /** Gives a message its place, and a record if the client shall acknowledge it. */
  private number(h: Held, o: Options | undefined, now: number): void {
    const e = h.entry;
    if (!h.wantsAck && e.collapse === "") return;
    e.number = ++this.last;
    if (!h.wantsAck) return;
    e.ack = e.number;
    let deadline = h.deadline;
    if (o?.replay !== undefined) deadline = Math.max(deadline, now + replayAckTimeout);
    const r: Unacked = {
      entry: e, waits: h.waits, ask: o?.replay?.ask, seq: o?.replay?.seq ?? 0n,
      half: now + (deadline - now) / 2, deadline, written: false, asked: false,
    };
    this.unacked.push(r);
    this.unackedBytes += e.size;
    this.wakeAt(r.half);
  }

  private hold(h: Held): void {
    if (h.entry.collapse !== "") {
      const old = this.held.find((o) => o.entry.collapse === h.entry.collapse);
      if (old !== undefined) {
        this.heldBytes += h.entry.size - old.entry.size;
        h.waits = joined(old.waits, h.waits);
        h.wantsAck ||= old.wantsAck;
        h.deadline = Math.max(h.deadline, old.deadline);
        Object.assign(old, h);
        if (h.wantsAck) this.wakeAt(h.deadline);
        return;
      }
    }
    this.held.push(h);
    this.heldBytes += h.entry.size;
    if (h.wantsAck) this.wakeAt(h.deadline);
  }

  /** Puts a frame into the queue, in the place of one with the same collapse key if there is one: its waiters then wait for the newer one. */
  private enqueue(e: Entry): void {
    if (e.collapse !== "") {
      const at = this.queue.findIndex((q) => q.collapse === e.collapse);
      if (at >= 0) {
        const old = this.queue[at]!;
        const before = this.unacked.findIndex((r) => r.entry === old);
        const mine = this.unacked.find((r) => r.entry === e);
        if (before >= 0) {
          const [r] = this.unacked.splice(before, 1) as [Unacked];
          this.unackedBytes -= old.size;
          if (mine !== undefined) {
            mine.waits = joined(r.waits, mine.waits);
          } else { // The newer one wants none, and is acknowledged for the older one.
            e.ack = old.ack;
            r.entry = e;
            this.unacked.splice(before, 0, r);
            this.unackedBytes += e.size;
          }
        }
        // It takes the older one's number, so that numbers rise in the queue.
        e.number = old.number;
        if (e.ack !== 0) e.ack = old.number;
        if (mine !== undefined) this.unacked.sort((a, b) => a.entry.number - b.entry.number);
        this.queuedBytes += e.size - old.size;
        this.queue[at] = e;
        return;
      }
    }
    this.queue.push(e);
    this.queuedBytes += e.size;
  }

  /** Writes what may be written. */
  private pump(now: number): void {
    for (let e = this.next(now); e !== undefined; e = this.next(now)) {
      let full: boolean;
      try {
        full = this.connection.buffered() >= this.host.limits.highWater;
      } catch (error) {
        this.host.caught("buffered", error);
        this.host.cut(this, "broken");
        return;
      }
      if (full) {
        this.host.watch(this);
        return;
      }
      this.queue.shift();
      this.queuedBytes -= e.size;
      if (!this.mayWrite(e, now)) continue;
      try {
        watch(this.connection.send({ message: e.message, ack: e.ack, replayed: e.replayed }), (error) => {
          this.host.caught("send", error);
          this.host.cut(this, "broken");
        });
      } catch (error) {
        this.host.caught("send", error);
        this.host.cut(this, "broken");
        return;
      }
    }
    if (this.due !== 0) this.host.watch(this);
  }

  /** The first in the queue. What is to be sent again, and what was held and is not any more, comes into it when it is empty. */
  private next(now: number): Entry | undefined {
    if (this.ended) return undefined;
    while (this.queue.length === 0 && this.again.length > 0) {
      const number = this.again.shift();
      const r = this.unacked.find((u) => u.entry.number === number);
      if (r !== undefined) {
        this.queue.push({ ...r.entry, replayed: true, collapse: "" });
        this.queuedBytes += r.entry.size;
      }
    }
    while (this.queue.length === 0 && this.held.length > 0 && !(this.gate?.isClosed ?? false)) {
      const h = this.held[0]!;
      if ((h.entry.expires !== 0 && now >= h.entry.expires) || (h.wantsAck && now >= h.deadline)) {
        this.unhold(0);
        this.giveUp(h.waits, h.entry.key);
        continue;
      }
      if (h.wantsAck && this.isFullFor(h.entry.size)) return undefined;
      this.unhold(0);
      this.number(h, undefined, now);
      this.enqueue(h.entry);
    }
    return this.queue[0];
  }

  /** Whether a frame shall still be written: not if it has expired, nor if it was given up. */
  private mayWrite(e: Entry, now: number): boolean {
    const expired = e.expires !== 0 && now >= e.expires;
    if (e.ack === 0) return !expired;
    const at = this.unacked.findIndex((r) => r.entry.number === e.ack);
    if (at < 0) return false;
    const r = this.unacked[at]!;
    if (expired) { // What nobody wants any more is not asked for again.
      r.ask?.taken(r.seq);
      r.ask = undefined;
      this.unacked.splice(at, 1);
      this.settle(r, false);
      return false;
    }
    r.written = true;
    return true;
  }

  /** Ends a record that is out of the list: acknowledged, or given up. */
  private settle(r: Unacked, acked: boolean): void {
    this.unackedBytes -= r.entry.size;
    if (!acked) {
      this.giveUp(r.waits, r.entry.key);
      r.ask?.lost();
      return;
    }
    for (const c of r.waits) c.acked();
    r.ask?.taken(r.seq);
  }

  /** Forgets the id, too: what was not confirmed and comes again is to be shown again. */
  private giveUp(waits: Confirmation[], key: string): void {
    for (const c of waits) c.gaveUp();
    if (key !== "") this.seen.delete(key);
  }

  private tick(now: number): void {
    this.due = 0;
    let ping = false;
    for (const r of [...this.unacked]) {
      if (now >= r.deadline) {
        this.unacked.splice(this.unacked.indexOf(r), 1);
        this.settle(r, false);
        continue;
      }
      if (!r.asked && now >= r.half) {
        r.asked = ping = true;
        if (r.written) this.again.push(r.entry.number);
      }
      this.wakeAt(r.asked ? r.deadline : r.half);
    }
    for (let i = 0; i < this.held.length; ) {
      const h = this.held[i]!;
      if (h.wantsAck && now >= h.deadline) {
        this.unhold(i);
        this.giveUp(h.waits, h.entry.key);
        continue;
      }
      if (h.wantsAck) this.wakeAt(h.deadline);
      i++;
    }
    if (this.pinged !== 0 && now - this.pinged >= pongTimeout) {
      this.host.cut(this, "dead");
      return;
    }
    if (ping && this.pinged === 0 && this.connection.ping !== undefined) {
      this.pinged = now;
      try {
        watch(this.connection.ping(), (error) => {
          this.host.caught("ping", error);
          this.host.cut(this, "broken");
        });
      } catch (error) {
        this.host.caught("ping", error);
        this.host.cut(this, "broken");
        return;
      }
    }
    if (this.pinged !== 0) this.wakeAt(this.pinged + pongTimeout);
  }

  private taken(o: Options | undefined): void {
    if (o?.replay !== undefined) o.replay.ask.taken(o.replay.seq);
  }

  private wakeAt(at: number): void {
    if (this.due === 0 || at < this.due) this.due = at;
    this.host.watch(this);
  }

  private remember(key: string, payload: number): void {
    if (this.seen.size >= mostSeen) {
      for (const oldest of this.seen.keys()) {
        this.seen.delete(oldest);
        break;
      }
    }
    this.seen.set(key, payload);
  }

  private heldAt(key: string): number {
    return key === "" ? -1 : this.held.findIndex((h) => h.entry.key === key);
  }

  private unhold(at: number): void {
    const [h] = this.held.splice(at, 1);
    this.heldBytes -= h!.entry.size;
  }
}

/** Older and newer together, without the oldest if they are too many for one record. */
function joined(older: Confirmation[], newer: Confirmation[]): Confirmation[] {
  const all = [...older, ...newer];
  while (all.length > mostFrames) all.shift()!.gaveUp();
  return all;
}
