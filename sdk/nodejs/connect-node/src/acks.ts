import { create } from "@bufbuild/protobuf";
import {
  AckRangeSchema, CatchupSchema, DeliverResponseSchema, DisconnectedSchema, MissSchema, ReplayTakenSchema,
  type Catchup, type DeliverResponse, type Disconnected, type Miss,
} from "./gen/connect_node_pb.js";
import { BrokenStream } from "./audiences.js";
import type { Outcome } from "./message.js";
import { Receipts } from "./receipts.js";

/** Managers take 64 KiB without a thought. */
const frameBytes = 48 << 10;
const frameCounts = 8 << 10;
/** Of one Miss, which cannot be split: a manager takes frames of 1 MiB. */
const maxMissBytes = 960 << 10;
/** Beyond it the reader waits until misses were written. */
const pendingMissBytes = 1 << 20;
/** Answers to disconnects that wait to be written. A manager awaits 256 of a stream. */
const maxDisconnected = 1024;

/** What became of one delivery. */
export class Handover {
  delivered = 0;
  duplicates = 0;
  pending = 0;
  readonly notHere: string[] = [];
  readonly failed: string[] = [];
  readonly reused: string[] = [];
  filtered = 0;
  /** Of filtered, where the manager wants to know. */
  readonly leftOut: string[] = [];
  namesLeft = false;
  /** Of a broadcast. */
  failedUsers = 0;
  isBroadcast = false;
  refused = false;
  reason = "";

  note(user: string, out: Outcome): void {
    switch (out) {
      case "delivered":
      case "pending":
        this.delivered++;
        return;
      case "duplicate":
        this.delivered++;
        this.duplicates++;
        return;
      case "notHere":
        this.notHere.push(user);
        return;
      case "reused":
        this.reused.push(user);
        return;
      case "filtered":
        this.filtered++;
        if (this.namesLeft) this.leftOut.push(user);
        return;
      case "expired":
        this.reason = "expired";
        break;
      case "stalled":
        this.reason = "client does not acknowledge";
        break;
      case "failed":
    }
    this.failed.push(user);
  }

  /** Explains what was not reached; undefined when all was. */
  miss(seq: bigint): Miss | undefined {
    if (this.refused) return create(MissSchema, { seq, refused: true, reason: this.reason || "node is draining" });
    const named = this.notHere.length + this.failed.length + this.reused.length + this.leftOut.length;
    if (named + this.failedUsers === 0) return undefined;
    const failed = this.failed.length + this.failedUsers > 0;
    const m = create(MissSchema, {
      seq, notHere: this.notHere, failed: this.failed, reused: this.reused, filtered: this.leftOut, failedUsers: this.failedUsers,
      reason: this.reason || (failed ? "no connection took it" : ""),
    });
    let bytes = missBytes(m);
    if (bytes <= maxMissBytes) return m;
    // Nothing was done for anybody: that can be said without naming them, and has them looked up again just the same.
    if (this.delivered + this.filtered + this.failed.length + this.reused.length === 0) {
      return create(MissSchema, { seq, refused: true, reason: "none of the users is here" });
    }
    for (const list of [m.filtered, m.notHere, m.failed, m.reused]) { // What is left out becomes unknown, but for filtered, which is counted.
      while (bytes > maxMissBytes && list.length > 0) bytes -= idBytes(list.pop()!);
    }
    return m;
  }
}

const idBytes = (id: string): number => Buffer.byteLength(id) + 3;

function missBytes(m: Miss): number {
  let n = 32 + Buffer.byteLength(m.reason);
  for (const list of [m.notHere, m.failed, m.reused, m.filtered]) for (const id of list) n += idBytes(id);
  return n;
}

/** What a stream owes to its manager. */
export class Acks {
  readonly receipts: Receipts;

  private first = 1n;
  private counts: number[] = [];
  private duplicates: number[] = [];
  private pending: number[] = [];
  private filtered: number[] = [];
  private misses: { miss: Miss; bytes: number }[] = [];
  private missBytes = 0;
  private reached = 0;
  private heartbeat = 0n;
  private notice = false;
  private catchups: Catchup[] = [];
  private taken = new Map<bigint, bigint>();
  private nudges: bigint[] = [];
  private closed: Disconnected[] = [];

  /** wake has take called soon. */
  constructor(private readonly maxUnacked: number, private readonly online: () => number, private readonly wake: () => void) {
    this.receipts = new Receipts(maxUnacked, wake);
  }

  /** Notes what became of the next delivery. */
  add(h: Handover): void {
    if (this.counts.length >= this.maxUnacked) throw new BrokenStream("more deliveries without an ack than max_unacked");
    const miss = h.miss(this.first + BigInt(this.counts.length));
    this.counts.push(h.delivered);
    this.duplicates.push(h.duplicates);
    this.pending.push(h.pending);
    this.filtered.push(h.filtered);
    if (h.isBroadcast) this.reached = Math.max(this.reached, h.delivered + h.failedUsers + h.filtered);
    if (miss !== undefined) {
      const bytes = missBytes(miss);
      this.misses.push({ miss, bytes });
      this.missBytes += bytes;
    }
    this.wake();
  }

  /** Whether so much is not written that the manager's own stream should stand. */
  get isFull(): boolean {
    return this.missBytes > pendingMissBytes;
  }

  /** Owes the answer to a heartbeat. Of several unanswered ones the last is answered. */
  beat(n: bigint): void {
    this.heartbeat = n;
    this.wake();
  }

  /** Owes the notice that the node goes. */
  drain(): void {
    this.receipts.giveUpAll();
    this.notice = true;
    this.wake();
  }

  ask(userId: string, gate: bigint, window: number): void {
    this.catchups.push(create(CatchupSchema, { userId, gate, window }));
    this.wake();
  }

  replayTaken(gate: bigint, seq: bigint): void {
    this.taken.set(gate, seq);
    this.wake();
  }

  nudgesTaken(tokens: bigint[]): void {
    for (const token of tokens) this.nudges.push(token); // Too many for a call with an argument for each.
    if (Math.max(this.catchups.length, this.taken.size, this.nudges.length) > this.maxUnacked) {
      throw new BrokenStream("more answers to be read than max_unacked");
    }
    this.wake();
  }

  /** Answers a disconnect. */
  disconnected(token: bigint, connections: number): void {
    this.closed.push(create(DisconnectedSchema, { token, connections }));
    if (this.closed.length > maxDisconnected) throw new BrokenStream("more answers to disconnects to be read than there may be");
    this.wake();
  }

  /** Moves what is owed into a frame, up to a frame full; undefined: nothing is. */
  take(): DeliverResponse | undefined {
    const r = create(DeliverResponseSchema);
    const written = this.first;
    let something = false;
    if (this.counts.length > 0) {
      // A miss stands in the frame of its ack. One that is larger than a frame goes alone with it.
      let n = Math.min(this.counts.length, frameCounts);
      let k = 0;
      let bytes = 0;
      for (; k < this.misses.length; k++) {
        const { miss, bytes: more } = this.misses[k]!;
        const at = Number(miss.seq - this.first);
        if (at >= n) break;
        if (k > 0 && bytes + more > frameBytes) {
          n = at;
          break;
        }
        bytes += more;
      }
      const range = create(AckRangeSchema, { first: this.first, delivered: this.counts.splice(0, n) });
      const duplicates = this.duplicates.splice(0, n);
      const pending = this.pending.splice(0, n);
      const filtered = this.filtered.splice(0, n);
      if (duplicates.some((d) => d > 0)) range.duplicates = duplicates;
      if (pending.some((p) => p > 0)) range.pending = pending;
      if (filtered.some((f) => f > 0)) range.filtered = filtered;
      r.acks = [range];
      r.misses = this.misses.splice(0, k).map((m) => m.miss);
      this.missBytes -= bytes;
      this.first += BigInt(n);
      if (this.reached > 0) r.onlineUsers = Math.max(this.online(), this.reached);
      if (this.counts.length === 0) this.reached = 0;
      something = true;
    }
    // Acks that are owed go first.
    if (this.heartbeat !== 0n && this.counts.length === 0) {
      r.heartbeat = this.heartbeat;
      this.heartbeat = 0n;
      r.onlineUsers = Math.max(this.online(), r.onlineUsers);
      something = true;
    }
    if (this.notice && this.counts.length === 0) {
      r.drain = true;
      this.notice = false;
      something = true;
    }
    let bytes = 0;
    let n = 0;
    while (n < this.catchups.length && bytes < frameBytes) bytes += 4 * this.catchups[n++]!.userId.length + 24;
    r.catchups = this.catchups.splice(0, n);
    for (const [gate, seq] of this.taken) {
      if (r.replayTaken.length >= frameBytes / 24) break;
      r.replayTaken.push(create(ReplayTakenSchema, { gate, seq }));
      this.taken.delete(gate);
    }
    r.nudgesTaken = this.nudges.splice(0, frameBytes / 16);
    r.disconnected = this.closed.splice(0, frameBytes / 16);
    r.receipts = this.receipts.take(written);
    something ||= r.catchups.length + r.replayTaken.length + r.nudgesTaken.length + r.receipts.length + r.disconnected.length > 0;
    return something ? r : undefined;
  }
}
