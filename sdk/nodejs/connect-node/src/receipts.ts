import { create } from "@bufbuild/protobuf";
import { ReceiptSchema, type Receipt } from "./gen/connect_node_pb.js";
import { clock, type Outcome } from "./message.js";

/** How long what clients say is gathered. */
const gather = 50;
/** How many bytes of receipts go into a frame. */
const frameBytes = 48 << 10;

/**
 * What the connections of one user say of one message. The user is confirmed with the first acked, and given up with the last gaveUp, or when
 * the time is over. What is said later says nothing.
 */
export class Confirmation {
  open = 1;
  sealed = false;
  isAcked = false;
  done = false;

  constructor(readonly of: Awaited, readonly user: string) {}

  /** One more connection will say acked or gaveUp. */
  expect(): void {
    this.open++;
  }

  acked(): void {
    this.isAcked = true;
    if (this.sealed) this.of.receipts.settle(this, true);
  }

  gaveUp(): void {
    this.open--;
    if (this.open <= 0 && this.sealed) this.of.receipts.settle(this, false);
  }
}

/** One delivery that some users are to acknowledge. */
export class Awaited {
  readonly users: Confirmation[] = [];
  settled = 0;
  ready = false;
  ackedNow = 0;
  unackedNow: string[] = [];
  listed = false;

  constructor(readonly receipts: Receipts, readonly seq: bigint, readonly by: number) {}

  /** What a user's connections are given. */
  confirmation(user: string): Confirmation {
    return new Confirmation(this, user);
  }

  /** Ends the handing over to one user. */
  settle(c: Confirmation, out: Outcome): void {
    if (out !== "pending") {
      c.done = true;
      return;
    }
    c.sealed = true;
    this.users.push(c);
    if (c.isAcked) this.receipts.settle(c, true);
    else c.gaveUp(); // That of the handing over itself.
  }

  giveUp(): void {
    for (const c of this.users) this.receipts.settle(c, false);
  }
}

/** What one stream owes of the deliveries whose users are pending. */
export class Receipts {
  private readonly open = new Map<bigint, Awaited>();
  private due: Awaited[] = [];
  private dueAt = 0;
  private timer: NodeJS.Timeout | undefined;
  private timerAt = 0;
  private hasty = false;
  private leaves = false;
  private dead = false;

  /** most bounds the deliveries that are open; wake has take called soon. */
  constructor(private readonly most: number, private readonly wake: () => void) {}

  /** Begins a delivery; undefined: too many are open. */
  await(seq: bigint, by: number): Awaited | undefined {
    return this.open.size >= this.most ? undefined : new Awaited(this, seq, by);
  }

  /** Says that all users are handed over, and tells how many are pending. */
  handedOver(a: Awaited): number {
    if (a.users.length === 0) return 0;
    a.ready = true;
    if (this.dead) return a.users.length;
    this.open.set(a.seq, a);
    if (this.leaves) a.giveUp();
    if (a.settled > 0) this.list(a);
    this.arm(a.by);
    return a.users.length;
  }

  settle(c: Confirmation, acked: boolean): void {
    if (c.done) return;
    c.done = true;
    if (this.dead) return;
    const a = c.of;
    a.settled++;
    if (acked) a.ackedNow++;
    else a.unackedNow.push(c.user);
    if (a.ready) this.list(a);
  }

  /** Gives up all who have not acknowledged, also those who come yet, and has it said at once. */
  giveUpAll(): void {
    this.leaves = true;
    for (const a of this.open.values()) a.giveUp();
    this.hurry();
  }

  /** Has everything said at once from now on. */
  hurry(): void {
    this.hasty = true;
    if (this.due.length > 0) {
      this.dueAt = clock();
      this.wake();
    }
  }

  /** Ends it: nobody is to be told anything. */
  forget(): void {
    this.dead = true;
    this.open.clear();
    this.due = [];
    clearTimeout(this.timer);
  }

  /** Whether there is nothing to say. */
  get isSaid(): boolean {
    return this.due.length === 0;
  }

  /** Receipts of deliveries below seq, whose acks are written, for up to a frame full. */
  take(below: bigint): Receipt[] {
    const now = clock();
    const out: Receipt[] = [];
    if (this.due.length === 0 || now < this.dueAt) return out;
    let bytes = 0;
    const rest: Awaited[] = [];
    for (const a of this.due) {
      if (a.seq >= below || bytes >= frameBytes) {
        rest.push(a);
        continue;
      }
      const receipt = create(ReceiptSchema, { seq: a.seq, acked: a.ackedNow });
      let n = 0;
      while (n < a.unackedNow.length && (bytes < frameBytes || n === 0)) bytes += 4 * a.unackedNow[n++]!.length + 3;
      receipt.unacked = a.unackedNow.splice(0, n);
      a.ackedNow = 0;
      bytes += 24;
      if (a.unackedNow.length > 0) {
        rest.push(a);
      } else {
        a.listed = false;
        receipt.final = a.settled === a.users.length;
        if (receipt.final) this.open.delete(a.seq);
      }
      out.push(receipt);
    }
    this.due = rest;
    if (rest.length > 0) this.arm(now + 10); // Their acks are not written yet, or the frame was full.
    return out;
  }

  private list(a: Awaited): void {
    if (a.listed) return;
    a.listed = true;
    this.due.push(a);
    if (this.due.length === 1) this.dueAt = clock() + (this.hasty ? 0 : gather);
    if (this.hasty) this.wake();
    else this.arm(this.dueAt);
  }

  /** Has the deliveries looked at no later than at. */
  private arm(at: number): void {
    if (this.dead || (this.timer !== undefined && this.timerAt <= at)) return;
    clearTimeout(this.timer);
    this.timerAt = at;
    this.timer = setTimeout(() => {
      this.timer = undefined;
      this.fire();
    }, Math.max(at - clock(), 1));
    this.timer.unref();
  }

  private fire(): void {
    const now = clock();
    let next = Infinity;
    for (const a of this.open.values()) {
      if (a.settled === a.users.length) continue;
      if (now >= a.by) {
        a.giveUp();
        this.dueAt = now; // A manager waits for it.
      } else {
        next = Math.min(next, a.by);
      }
    }
    if (this.due.length > 0) {
      if (now >= this.dueAt) this.wake();
      else next = Math.min(next, this.dueAt);
    }
    if (next !== Infinity) this.arm(Math.max(next, now + 10));
  }
}
