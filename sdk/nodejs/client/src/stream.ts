import { fromBinary } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { status, type ClientDuplexStream, type ServiceError } from "@grpc/grpc-js";
import type { Channels } from "./dial.js";
import { errorOf, errorOfStatus, isOfMessage, PushError, unusable } from "./errors.js";
import { PushStreamResponseSchema, type PushStreamResponse } from "./gen/push_manager_pb.js";
import { encode, type Kind, type Message, type PushOptions, type Target } from "./message.js";
import { resultOf, type Result } from "./result.js";
import { backoff, pause, Tries, type Budget } from "./retry.js";

/** Bounds a Stream. */
export interface StreamConfig {
  /** How many pushes may be without an answer; further ones wait in send. Default: 1,024, which is what Push-Manager takes from one call. */
  maxOpen?: number;
  /** How many bytes they may have. Default: 8 MiB. */
  maxBytes?: number;
}

/** Of one message: what Push-Manager takes, and bytes that one read of its connection has room for. */
const maxBatch = 1024;
const maxBatchBytes = 64 << 10;
const sweepEvery = 25;
/** For how long a call may owe answers and bring none before another one takes its place: three times what Push-Manager takes for a push. */
const silence = 15_000;
/** The longest pause before a call, whatever Push-Manager says. */
const maxReopen = 30_000;

/** The field of each kind in a PushStreamRequest. */
const fields: Record<Kind, number> = { room: 2, user: 3, everybody: 4, users: 5, rooms: 7 };
const cases = { toRoom: "room", toUser: "user", broadcast: "everybody", toUsers: "users", toRooms: "rooms" } as const;

/** A user or a room with pushes that are not settled. */
interface Key {
  left: number;
  /** The highest number that was written. */
  written: number;
  /** Refused; later ones wait behind it. */
  waiting: Pending | undefined;
  held: Pending[];
}

/** A push that a Stream has taken. */
export class Pending {
  /** In the order of send; on the wire modulo 2^32. */
  number = 0;
  message = 0;
  alone = false;
  due = 0;
  key: Key | undefined;
  private done: { result: Result } | { error: PushError } | undefined;
  private waiters: (() => void)[] = [];

  constructor(readonly kind: Kind, readonly keyName: string, public body: Uint8Array, readonly deadline: number, readonly tries: Tries) {}

  /** Waits for the end of the push. */
  async wait(): Promise<Result> {
    if (this.done === undefined) await new Promise<void>((go) => this.waiters.push(go));
    const done = this.done!;
    if ("error" in done) throw done.error;
    return done.result;
  }

  settle(done: { result: Result } | { error: PushError }): void {
    this.done = done;
    this.body = new Uint8Array(); // Whoever keeps it does not keep the message.
    for (const go of this.waiters) go();
    this.waiters = [];
  }
}

/**
 * Pushes many messages over one long call. What is sent while the event loop is busy goes out together.
 *
 * Pushes to one user, or to one room, go out in the order of send, and arrive in it. So a push that was refused is repeated only if no later push
 * to the same target has gone out meanwhile. When the call breaks, or owes answers and brings none for 15 s, the Stream opens another one. Pushes
 * without an answer are repeated if Push-Manager said that it did not take them, or if they have a message id; otherwise they end as unknown.
 */
export class Stream {
  private readonly maxOpen: number;
  private readonly maxBytes: number;
  private openBytes = 0;
  private left = 0;
  private numbers = 0;
  private messages = 0;
  private queue: Pending[] = [];
  private readonly open = new Map<number, Pending>();
  private delayed: Pending[] = [];
  private readonly keys = new Map<string, Key>();
  private readonly waiters: { bytes: number; go: () => void }[] = [];
  private call: ClientDuplexStream<Uint8Array, Buffer> | undefined;
  /** Gives the call up. */
  private hangUp: ((why: PushError) => void) | undefined;
  private isStuck = false;
  private isWriting = false;
  private owing = 0;
  private isClosed = false;
  private isStopped = false;
  private readonly stopped = new AbortController();
  private wake: (() => void) | undefined;
  private idle: (() => void)[] = [];
  private sweeper: NodeJS.Timeout | undefined;
  private readonly running: Promise<void>;

  constructor(private readonly channels: Channels, private readonly budget: Budget, private readonly timeout: number, cfg: StreamConfig) {
    this.maxOpen = cfg.maxOpen ?? 1024;
    this.maxBytes = cfg.maxBytes ?? 8 << 20;
    if (!(this.maxOpen >= 1) || !(this.maxBytes >= 1)) throw new RangeError("maxOpen and maxBytes must be above zero");
    this.running = this.run();
  }

  /** send and Pending.wait. */
  async push(to: Target, message: Message, o: PushOptions = {}): Promise<Result> {
    return (await this.send(to, message, o)).wait();
  }

  /** Takes a push. It waits while maxOpen or maxBytes are reached, and for nothing else; an error means that the push was not taken. */
  async send(to: Target, message: Message, o: PushOptions = {}): Promise<Pending> {
    const e = encode(to, message, o);
    const deadline = Date.now() + (o.timeout ?? this.timeout + 1000);
    const body = new BinaryWriter().tag(fields[e.kind], WireType.LengthDelimited).bytes(e.bytes).finish();
    if (this.isClosed) throw new PushError("the stream is closed", { code: status.CANCELLED, notSent: true });
    const p = new Pending(e.kind, e.key, body, deadline, new Tries(this.budget, e.messageId));
    if (this.waiters.length > 0 || !this.hasRoom(body.length)) await this.roomFor(body.length, deadline, o.signal);
    else this.reserve(body.length);
    if (this.isClosed) {
      this.release(body.length);
      throw new PushError("the stream is closed", { code: status.CANCELLED, notSent: true });
    }
    p.number = ++this.numbers;
    if (e.key !== "") {
      let k = this.keys.get(e.key);
      if (k === undefined) this.keys.set(e.key, (k = { left: 0, written: 0, waiting: undefined, held: [] }));
      k.left++;
      p.key = k;
    }
    this.queue.push(p);
    this.sweeper ??= setInterval(() => this.sweep(), sweepEvery);
    this.wake?.();
    this.writeSoon();
    return p;
  }

  /** Takes no more pushes, waits for the end of those that were taken, and ends the Stream. What has no answer after ms is unknown. */
  async close(ms = 10_000): Promise<void> {
    this.isClosed = true;
    for (const w of this.waiters.splice(0)) {
      this.reserve(w.bytes);
      w.go();
    }
    if (this.left > 0) {
      let timer: NodeJS.Timeout | undefined;
      await Promise.race([new Promise<void>((go) => this.idle.push(go)), new Promise<void>((go) => (timer = setTimeout(go, ms)))]);
      clearTimeout(timer);
    }
    this.call?.end();
    // The call ends by itself now, unless a server does not care.
    const timer = setTimeout(() => this.stop(), this.left > 0 ? 0 : 1000);
    if (this.call === undefined) this.stop();
    this.wake?.();
    await this.running;
    clearTimeout(timer);
    clearInterval(this.sweeper);
    const all = [...this.queue, ...this.delayed, ...[...this.keys.values()].flatMap((k) => k.held)];
    this.queue = [];
    this.delayed = [];
    for (const p of all) p.tries.note(new PushError("the stream is closed", { code: status.CANCELLED, notSent: true }));
    this.end(all.map((p) => ({ p, done: { error: p.tries.last! } })));
  }

  private hasRoom(bytes: number): boolean {
    return this.left === 0 || (this.left < this.maxOpen && this.openBytes + bytes <= this.maxBytes);
  }

  private reserve(bytes: number): void {
    this.left++;
    this.openBytes += bytes;
  }

  private async roomFor(bytes: number, deadline: number, signal: AbortSignal | undefined): Promise<void> {
    let taken = false;
    await new Promise<void>((go) => {
      const w = { bytes, go: () => {
        taken = true;
        over();
      } };
      const over = (): void => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", over);
        const at = this.waiters.indexOf(w);
        if (at >= 0) this.waiters.splice(at, 1);
        go();
      };
      const timer = setTimeout(over, Math.max(deadline - Date.now(), 0));
      this.waiters.push(w);
      signal?.addEventListener("abort", over, { once: true });
      if (signal?.aborted === true) over();
    });
    if (taken) return;
    const aborted = signal?.aborted === true;
    throw new PushError("no room in the stream", { code: aborted ? status.CANCELLED : status.DEADLINE_EXCEEDED, notSent: true });
  }

  private release(bytes: number): void {
    this.left--;
    this.openBytes -= bytes;
    while (this.waiters.length > 0 && this.hasRoom(this.waiters[0]!.bytes)) {
      const w = this.waiters.shift()!;
      this.reserve(w.bytes);
      w.go();
    }
    if (this.left === 0) for (const go of this.idle.splice(0)) go();
  }

  private stop(): void {
    this.isStopped = true;
    this.stopped.abort();
    this.call?.cancel();
    this.wake?.();
  }

  /** Has a call open whenever there is something to push. */
  private async run(): Promise<void> {
    for (let failures = 0; !this.isStopped; ) {
      while (this.queue.length === 0) {
        if (this.isStopped || (this.isClosed && this.left === 0)) return;
        await new Promise<void>((go) => (this.wake = go));
        this.wake = undefined;
      }
      const { answered, delay } = await this.serve();
      failures = answered ? 0 : failures + 1;
      if (this.isStopped || (this.isClosed && this.left === 0)) return;
      await pause(Math.min(delay ?? backoff(failures), maxReopen), this.stopped.signal);
    }
  }

  /** Opens a call and writes to it until it ends. Tells whether anything was answered, and when to come back, if Push-Manager said so. */
  private async serve(): Promise<{ answered: boolean; delay: number | undefined }> {
    const client = await this.channels.ready(Date.now() + 1000, this.stopped.signal);
    if (client === undefined) return { answered: false, delay: 50 }; // Whose time is over is ended by sweep.
    let metadata;
    try {
      metadata = await this.channels.metadata(Date.now() + this.timeout, this.stopped.signal);
    } catch (error) {
      const queue = this.queue.splice(0);
      for (const p of queue) p.tries.note(error as PushError);
      this.end(queue.map((p) => ({ p, done: { error: p.tries.last! } })));
      return { answered: false, delay: undefined };
    }
    const target = client.getChannel().getTarget();
    const call = client.makeBidiStreamRequest<Uint8Array, Buffer>(
      "/pubsub.PushManagerService/PushStream", (b) => Buffer.from(b.buffer, b.byteOffset, b.byteLength), (b) => b, metadata,
    );
    this.call = call;
    this.isStuck = false;
    this.owing = 0;
    let answered = false;
    const ended = await new Promise<PushError>((resolve) => {
      this.hangUp = (why) => {
        resolve(why); // Not what its cancellation says: that is an end that the caller wants.
        call.cancel();
      };
      call.on("data", (b: Buffer) => {
        try {
          const r = fromBinary(PushStreamResponseSchema, b, { readUnknownFields: false });
          answered = true;
          this.answered(r.batch.length > 0 ? r.batch : [r]);
        } catch (error) {
          resolve(unusable(`the answer cannot be read: ${error instanceof Error ? error.message : String(error)}`));
          call.cancel();
        }
      });
      call.on("drain", () => {
        this.isStuck = false;
        this.writeSoon();
      });
      call.on("error", (error: ServiceError) => {
        let e = errorOf(error, call.getPeer() !== target);
        // Who has answered does know the method.
        if (e.notSent && e.reason === "" && answered) e = new PushError(e.text, { code: e.code });
        resolve(e);
      });
      call.on("end", () => setImmediate(() => resolve(new PushError("the stream was ended without an answer", { code: status.UNAVAILABLE }))));
      this.writeSoon();
    });
    this.call = this.hangUp = undefined;
    return { answered, delay: this.broken(ended) };
  }

  private writeSoon(): void {
    if (this.isWriting || this.call === undefined) return;
    this.isWriting = true;
    setImmediate(() => {
      this.isWriting = false;
      while (this.call !== undefined && !this.isStuck) {
        const message = this.take();
        if (message === undefined) break;
        if (!this.call.write(message)) this.isStuck = true;
      }
    });
  }

  /** Moves pushes from the queue to those that are open, as one message. */
  private take(): Uint8Array | undefined {
    const taken: Pending[] = [];
    let at = 0;
    let bytes = 0;
    for (; at < this.queue.length; at++) {
      const p = this.queue[at]!;
      if (p.key?.waiting !== undefined && p.key.waiting.number < p.number) {
        p.key.held.push(p);
        continue;
      }
      bytes += p.body.length + 12;
      if (taken.length > 0 && (taken.length === maxBatch || bytes > maxBatchBytes || p.alone)) break;
      taken.push(p);
      if (p.alone) {
        at++;
        break;
      }
    }
    this.queue.splice(0, at);
    if (taken.length === 0) return undefined;
    this.messages++;
    const w = new BinaryWriter();
    for (const p of taken) {
      w.tag(10, WireType.LengthDelimited).fork().tag(1, WireType.Varint).uint32(p.number >>> 0).raw(p.body).join();
      p.message = this.messages;
      this.open.set(p.number >>> 0, p);
      if (p.key !== undefined) p.key.written = Math.max(p.key.written, p.number);
    }
    this.owing ||= Date.now();
    return w.finish();
  }

  /** Takes over answers. Those for pushes that are not open are ignored: their deadline has passed, or they never were. */
  private answered(answers: readonly PushStreamResponse[]): void {
    const ended: { p: Pending; done: { result: Result } | { error: PushError } }[] = [];
    for (const a of answers) {
      const id = Number(a.id);
      const p = this.open.get(id);
      if (p === undefined) continue;
      this.open.delete(id);
      let failed: PushError;
      if (a.error !== undefined) {
        failed = a.error.code === 0 ? unusable("an error without a code") : errorOfStatus(a.error.code, a.error.message, a.error);
      } else {
        try {
          if (a.result.case === undefined) throw unusable("an answer with neither a result nor an error");
          if (cases[a.result.case] !== p.kind) throw unusable("the answer is that of another kind of push");
          ended.push({ p, done: { result: resultOf(p.kind, a.result.value) } });
          continue;
        } catch (error) {
          failed = error instanceof PushError ? error : unusable(String(error));
        }
      }
      // Whatever is sent to the key from now on waits until this one is repeated.
      const inOrder = p.key === undefined || (p.key.written === p.number && p.key.waiting === undefined);
      const delay = p.tries.next(failed, p.deadline - Date.now(), inOrder);
      if (delay === undefined) {
        ended.push({ p, done: { error: p.tries.last! } });
        continue;
      }
      if (p.key !== undefined) p.key.waiting = p;
      p.due = Date.now() + delay;
      this.delayed.push(p);
    }
    this.owing = this.open.size === 0 ? 0 : Date.now();
    this.end(ended);
  }

  /** Lets go of what waits behind a push. */
  private free(p: Pending): void {
    const k = p.key;
    if (k?.waiting !== p) return;
    k.waiting = undefined;
    this.requeue(k.held.splice(0));
  }

  /** Puts pushes where they were in the queue. */
  private requeue(all: readonly Pending[]): void {
    if (all.length === 0) return;
    this.queue.push(...all);
    this.queue.sort((a, b) => a.number - b.number);
    this.wake?.();
    this.writeSoon();
  }

  /** Closes the accounts of pushes that are in none of the lists any more. */
  private end(all: readonly { p: Pending; done: { result: Result } | { error: PushError } }[]): void {
    for (const { p, done } of all) {
      const bytes = p.body.length;
      if (p.key !== undefined && --p.key.left === 0) this.keys.delete(p.keyName);
      p.settle(done);
      this.release(bytes);
    }
  }

  /** Settles what a call has left without an answer, and returns when Push-Manager wants to see the next one. */
  private broken(ended: PushError): number | undefined {
    const open = [...this.open.values()].sort((a, b) => a.number - b.number);
    this.open.clear();
    this.owing = 0;
    if (open.length === 0) return ended.retryAfter;
    // With a reason, none of them was taken, and those in messages before the first of them were answered.
    const notTaken = ended.notSent && ended.reason !== "";
    const inFirst = open.filter((p) => p.message === open[0]!.message).length;
    const paid = notTaken && ended.retryAfter !== undefined && this.budget.trySpend(); // One refusal, however many pushes it is for.
    const again: Pending[] = [];
    const dead: Pending[] = [];
    open.forEach((p, i) => {
      let ok: boolean;
      if (notTaken && ended.retryAfter !== undefined) {
        ok = p.tries.next(ended, p.deadline - Date.now(), paid, true) !== undefined;
      } else if (notTaken && isOfMessage(ended)) {
        // The fault is in the first message. If it had several pushes, each one goes alone now.
        p.alone ||= i < inFirst;
        ok = i >= inFirst || inFirst > 1;
        p.tries.note(ended);
      } else {
        ok = p.tries.next(ended, p.deadline - Date.now()) !== undefined;
      }
      (ok ? again : dead).push(p);
    });
    this.requeue(again);
    this.end(dead.map((p) => ({ p, done: { error: p.tries.last! } })));
    return ended.retryAfter;
  }

  /** Ends pushes whose deadline has passed, and has those repeated that are due. */
  private sweep(): void {
    const now = Date.now();
    const dead: { p: Pending; done: { error: PushError } }[] = [];
    const late = (p: Pending, sent: boolean): boolean => {
      if (now < p.deadline) return false;
      p.tries.maybe ||= sent;
      const text = sent ? "the deadline passed before the push was answered" : "the deadline passed before the push was sent";
      const error = new PushError(text, { code: status.DEADLINE_EXCEEDED, notSent: !p.tries.maybe, tries: Math.max(p.tries.n, 1) });
      dead.push({ p, done: { error: sent ? error : (p.tries.last ?? error) } });
      return true;
    };
    this.queue = this.queue.filter((p) => !late(p, false));
    for (const [id, p] of this.open) if (late(p, true)) this.open.delete(id);
    const due: Pending[] = [];
    this.delayed = this.delayed.filter((p) => {
      if (p.key !== undefined) p.key.held = p.key.held.filter((h) => !late(h, false));
      if (!late(p, false)) {
        if (now < p.due) return true;
        due.push(p);
      }
      this.free(p);
      return false;
    });
    this.requeue(due);
    if (this.owing !== 0 && now - this.owing > silence) this.hangUp?.(new PushError(`no answer for ${silence / 1000} s`, { code: status.UNAVAILABLE }));
    this.end(dead);
    if (this.left === 0 && this.owing === 0) {
      clearInterval(this.sweeper);
      this.sweeper = undefined;
    }
  }
}
