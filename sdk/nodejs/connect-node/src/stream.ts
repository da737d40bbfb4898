import { create, fromBinary } from "@bufbuild/protobuf";
import { status, type ServerDuplexStream } from "@grpc/grpc-js";
import { Acks, Handover } from "./acks.js";
import { Audiences, BrokenStream } from "./audiences.js";
import { checkFilter } from "./filter.js";
import {
  DeliverRequestSchema, DeliverResponseSchema, Feature, HelloReplySchema,
  type Delivery, type DeliverRequest, type DeliverResponse, type Disconnect, type Hello,
} from "./gen/connect_node_pb.js";
import type { Match } from "./gen/message_pb.js";
import { clock, hasExpired, messageOf, Rooms, type Message, type Options, type Outcome } from "./message.js";
import type { Awaited, Confirmation } from "./receipts.js";
import { checkDisconnect } from "./refusals.js";
import type { Offer, Replays } from "./replay.js";
import type { Session } from "./session.js";

/** The protocol that this node speaks. */
const version = 1;
/** Bounds what is kept of a manager for as long as its stream lives. */
const maxHelloBytes = 4 << 10;
const maxInstanceBytes = 64;
/** A stream without a hello ends. A manager sends it at once. */
const helloTimeout = 5000;
/** How long a stream that ends waits for its last acks to be written. */
const flushTimeout = 1000;
/** How many frames may wait to be handed over before the stream is not read any more. */
const maxFrames = 4;
/** For how long deliveries are handed over without a pause, in milliseconds: other streams, clients and timers have their turn then. */
const slice = 10;
const defaultAckTimeout = 2000;
/** Of the texts of a delivery that connections remember: more than any manager sends. */
const maxKeyBytes = 512;
export const tenantScope = /^[a-z0-9][a-z0-9-]{0,30}\/$/;

export type DeliverCall = ServerDuplexStream<Buffer, DeliverResponse>;

/** What streams need of their node. */
export interface StreamHost {
  readonly nodeId: string;
  readonly bootId: string;
  readonly maxAudienceMembers: number;
  readonly maxUnacked: number;
  readonly features: readonly Feature[];
  readonly replays: Replays;
  readonly isDraining: boolean;
  online(): number;
  /** Takes the place of the stream before it of the same process and shard. Throws StreamEnd for a stream that comes too late or is one too many. */
  enter(s: Stream, hello: Hello): void;
  leave(s: Stream): void;
  deliverTo(user: string, filter: readonly Match[], m: Message, o: Options | undefined, c: Confirmation | undefined): Outcome;
  broadcast(scope: string, filter: readonly Match[], m: Message, o: Options | undefined, h: Handover): void;
  /** Refuses those that it names if that is asked for, then closes their connections; or lifts a refusal. Returns how many were closed. */
  disconnect(d: Disconnect): number;
  caught(what: string, error: unknown): void;
  readonly counts: { deliveries: number; broken: number };
}

/** Ends a stream with a status. */
export class StreamEnd extends Error {
  constructor(readonly code: status, message: string) {
    super(message);
  }
}

/** One Deliver stream. Deliveries are handed over in their order, one after the other; streams know nothing of each other, but for superseding. */
export class Stream implements Offer {
  manager = "";
  /** Of the seat; "": the manager has none. */
  seat = "";
  attempt = 0n;

  private readonly acks: Acks;
  private readonly audiences: Audiences;
  private frames: Buffer[] = [];
  private next = 1n;
  private isGreeted = false;
  private isWorking = false;
  /** Nothing is handed over any more. */
  private isOver = false;
  private isGone = false;
  private isStuck = false;
  private isDrained = false;
  private flushing = false;
  private peerEnded = false;
  private resume: (() => void) | undefined;
  private readonly helloTimer: NodeJS.Timeout;
  private onWritten: (() => void) | undefined;

  constructor(private readonly host: StreamHost, private readonly call: DeliverCall) {
    this.acks = new Acks(host.maxUnacked, () => host.online(), () => this.flushSoon());
    this.audiences = new Audiences(host.maxAudienceMembers);
    this.helloTimer = setTimeout(() => this.broken(new BrokenStream(`no hello within ${helloTimeout} ms`)), helloTimeout);
    call.on("data", (frame: Buffer) => {
      if (this.isOver) return;
      this.frames.push(frame);
      if (this.frames.length >= maxFrames) call.pause();
      void this.work();
    });
    call.on("end", () => {
      this.peerEnded = true;
      void this.work();
    });
    call.on("drain", () => {
      this.isStuck = false;
      this.flush();
    });
    call.on("cancelled", () => this.gone());
    call.on("close", () => this.gone());
    call.on("error", () => undefined); // Its status is on its way, or its connection is gone.
  }

  /** Has the manager told that the node goes. */
  drain(): void {
    if (this.isGreeted && !this.isOver) this.acks.drain();
    else this.end(status.UNAVAILABLE, "node is draining");
  }

  /** Ends it, because a newer stream has taken its seat. */
  supersede(): void {
    this.end(status.ABORTED, "superseded by a newer stream of the same instance and shard");
  }

  /** Cuts it off. */
  cut(): void {
    this.end(status.UNAVAILABLE, "node has gone");
  }

  ask(userId: string, gate: bigint, window: number): void {
    this.acks.ask(userId, gate, window);
  }

  replayTaken(gate: bigint, seq: bigint): void {
    this.acks.replayTaken(gate, seq);
  }

  /** Takes frames until there are none, or the stream is over. */
  private async work(): Promise<void> {
    if (this.isWorking) return;
    this.isWorking = true;
    try {
      while (!this.isOver && this.frames.length > 0) {
        const frame = this.frames.shift()!;
        if (this.frames.length === 0 && !this.peerEnded) this.call.resume();
        await this.take(frame);
      }
      if (this.peerEnded && !this.isOver) this.end(status.OK, "");
    } catch (error) {
      if (error instanceof StreamEnd) this.end(error.code, error.message);
      else this.broken(error);
    } finally {
      this.isWorking = false;
    }
  }

  private broken(error: unknown): void {
    if (this.isOver) return;
    if (!(error instanceof BrokenStream)) this.host.caught("Deliver", error);
    this.host.counts.broken++;
    this.end(status.FAILED_PRECONDITION, `broken stream: ${error instanceof Error ? error.message : String(error)}`);
  }

  private async take(bytes: Buffer): Promise<void> {
    let f: DeliverRequest;
    try {
      f = fromBinary(DeliverRequestSchema, bytes, { readUnknownFields: false });
    } catch (error) {
      throw new BrokenStream(`frame: ${error instanceof Error ? error.message : String(error)}`);
    }
    if (!this.isGreeted) {
      this.greet(f, bytes.length);
      return;
    }
    if (f.hello !== undefined) throw new BrokenStream("a second hello");
    if (f.compressed.length > 0 || f.rawBytes > 0) throw new BrokenStream("compressed frame: no codec was agreed on");
    if (f.deliveries.length > 0 && f.firstSeq !== this.next) throw new BrokenStream(`first_seq ${f.firstSeq} instead of ${this.next}`);
    const came = clock();
    let until = came + slice;
    for (const d of f.deliveries) {
      if (clock() >= until) {
        this.flush();
        await new Promise(setImmediate);
        until = clock() + slice;
      }
      while (this.acks.isFull && !this.isOver) await new Promise<void>((go) => (this.resume = go));
      if (this.isOver) return; // Nobody waits for the rest.
      try {
        this.acks.add(this.deliver(d, came));
      } catch (error) {
        if (error instanceof BrokenStream) throw new BrokenStream(`delivery ${this.next}: ${error.message}`);
        throw error;
      }
      this.next++;
      this.host.counts.deliveries++;
    }
    for (const id of f.forgetAudiences) this.audiences.forget(id);
    if (this.host.features.includes(Feature.REPLAY)) {
      for (const e of f.replayEnds) this.host.replays.end(this, e.gate, e.error);
      if (f.nudges.length > 0) {
        for (const n of f.nudges) this.host.replays.nudge(n.userId);
        this.acks.nudgesTaken(f.nudges.map((n) => n.token)); // Now that the gates are closed.
      }
    }
    for (const d of f.disconnects) {
      checkDisconnect(d);
      this.acks.disconnected(d.token, this.host.disconnect(d));
    }
    if (f.heartbeat !== 0n) this.acks.beat(f.heartbeat);
    if (f.drain) {
      this.isDrained = true;
      this.end(status.OK, "");
    }
  }

  private greet(f: DeliverRequest, bytes: number): void {
    const hello = f.hello;
    const more = f.firstSeq !== 0n || f.heartbeat !== 0n || f.drain || f.compressed.length > 0 || f.rawBytes > 0 ||
      f.deliveries.length + f.forgetAudiences.length + f.nudges.length + f.replayEnds.length + f.logMarks.length + f.logPages.length + f.disconnects.length > 0;
    if (hello === undefined || more) throw new BrokenStream("the first frame must be hello and nothing else");
    if (bytes > maxHelloBytes) throw new BrokenStream(`hello has ${bytes} bytes, the limit is ${maxHelloBytes}`);
    if (Buffer.byteLength(hello.instanceId) > maxInstanceBytes) throw new BrokenStream("instance_id is too long");
    // A manager speaks the version it offers and the one before it.
    if (hello.protocolVersion !== version && hello.protocolVersion !== version + 1) {
      throw new BrokenStream(`protocol version ${hello.protocolVersion}, this node speaks ${version}`);
    }
    this.host.enter(this, hello);
    clearTimeout(this.helloTimer);
    this.isGreeted = true;
    this.manager = hello.instanceId || hello.managerId;
    this.write(create(DeliverResponseSchema, {
      hello: create(HelloReplySchema, {
        protocolVersion: version, nodeId: this.host.nodeId, bootId: this.host.bootId,
        maxAudienceMembers: this.host.maxAudienceMembers, maxUnacked: this.host.maxUnacked,
        onlineUsers: this.host.online(), features: [...this.host.features],
      }),
    }));
    if (this.host.features.includes(Feature.REPLAY) && hello.features.includes(Feature.REPLAY)) this.host.replays.join(this);
  }

  /** Hands one delivery over. Whatever breaks the stream is thrown before anybody gets anything. */
  private deliver(d: Delivery, came: number): Handover {
    const targets = [d.userIds.length > 0, d.audience !== undefined, d.everybody, d.scope !== ""].filter((is) => is).length;
    if (targets !== 1) throw new BrokenStream("exactly one of user_ids, audience, everybody and scope must be set");
    if (d.scope !== "" && !tenantScope.test(d.scope)) throw new BrokenStream("scope: must be the name of a tenant and a slash");
    checkFilter(d);
    if (d.audience === undefined && d.exceptUserIds.length > 0) throw new BrokenStream("except_user_ids without an audience");
    let users: Iterable<string> = d.userIds;
    let count = d.userIds.length;
    let room = d.roomId;
    if (d.roomIds.length > 0 && (d.userIds.length === 0 || room !== "")) throw new BrokenStream("room_ids: with user_ids only, and without room_id");
    let rooms = d.roomIds.length > 0 ? new Rooms(d.roomIds) : undefined;
    if (d.audience !== undefined) {
      const a = this.audiences.apply(d.audience);
      room = a.room;
      rooms = a.rooms;
      const except = new Set(d.exceptUserIds);
      for (const user of except) {
        if (!a.members.has(user)) throw new BrokenStream(`audience: ${JSON.stringify(user)} is excepted and is no member`);
      }
      count = a.members.size - except.size;
      users = except.size === 0 ? a.members : [...a.members].filter((user) => !except.has(user));
    }
    const h = new Handover();
    h.isBroadcast = d.everybody || d.scope !== "";
    h.namesLeft = d.nameFiltered;
    if (this.host.isDraining) {
      h.refused = true;
      return h;
    }
    const o = this.options(d, came);
    const m = messageOf(d.content, room, h.isBroadcast, d.messageId, d.traceparent, rooms);
    if (o?.replay !== undefined || (d.replay !== undefined && this.host.features.includes(Feature.REPLAY))) {
      this.deliverReplay(d, m, o, h);
    } else if (h.isBroadcast) {
      if (hasExpired(o, clock())) {
        h.reason = "expired";
        h.failedUsers = this.host.online();
      } else {
        this.host.broadcast(d.scope, d.filter, m, o === undefined ? undefined : { ...o, wantsAck: false }, h); // Nobody could be named who does not.
      }
    } else if (hasExpired(o, clock())) {
      for (const user of users) h.note(user, "expired");
    } else {
      let waits: Awaited | undefined;
      if (o?.wantsAck === true) {
        waits = this.acks.receipts.await(this.next, o.ackBy);
        if (waits === undefined) {
          h.reason = "too many deliveries wait for acknowledgements";
          for (const user of users) h.failed.push(user); // Too many for a call with an argument for each.
          return h;
        }
      }
      for (const user of users) h.note(user, this.deliverTo(user, d.filter, m, o, waits));
      if (waits !== undefined) h.pending = this.acks.receipts.handedOver(waits);
    }
    if (h.delivered + h.filtered + h.notHere.length + h.failed.length + h.reused.length !== count && !h.isBroadcast && !h.refused) {
      this.host.caught("Deliver", new Error("the sum of a delivery is wrong"));
    }
    return h;
  }

  private deliverTo(user: string, filter: readonly Match[], m: Message, o: Options | undefined, waits: Awaited | undefined): Outcome {
    const c = waits?.confirmation(user);
    const out = this.host.deliverTo(user, filter, m, o, c);
    if (c !== undefined) waits!.settle(c, out);
    return out;
  }

  /** Hands a message out of the store to the connection that has asked for it. */
  private deliverReplay(d: Delivery, m: Message, o: Options | undefined, h: Handover): void {
    const place = d.replay!;
    const user = d.userIds[0];
    if (d.userIds.length !== 1 || user === undefined) {
      h.refused = true;
      h.reason = "a message out of the store is for one user";
      return;
    }
    const a = this.host.replays.route(place.gate, place.seq, place.after, user);
    if (a === "behind") {
      h.refused = true;
      h.reason = "behind a message that did not come";
      return;
    }
    if (a === undefined) {
      h.notHere.push(user);
      return;
    }
    const options: Options = {
      key: "", payloadHash: 0, expires: 0, wantsAck: false, ackBy: 0, collapse: "", ...o, replay: { ask: a, seq: place.seq },
    };
    const waits = options.wantsAck ? this.acks.receipts.await(this.next, options.ackBy) : undefined;
    const c = waits?.confirmation(user);
    let out: Outcome = "failed";
    try {
      const session: Session = a.gate.session;
      out = session.offer(m, options, c);
    } catch (error) {
      this.host.caught("offer", error);
    }
    if (c !== undefined) waits!.settle(c, out);
    h.note(user, out);
    this.host.replays.handed(a, place.seq, out);
    if (waits !== undefined) h.pending = this.acks.receipts.handedOver(waits);
  }

  /** The options of a delivery as far as the node takes part, undefined if that is nothing. */
  private options(d: Delivery, came: number): Options | undefined {
    const does = (f: Feature): boolean => this.host.features.includes(f);
    const id = does(Feature.DEDUPE) ? d.messageId : "";
    const ttl = does(Feature.EXPIRY) ? d.ttlMs : 0;
    const wantsAck = does(Feature.CLIENT_ACK) && d.wantAck;
    const collapse = does(Feature.COLLAPSE) ? d.collapseKey : "";
    if (id === "" && ttl === 0 && !wantsAck && collapse === "") return undefined;
    if (Math.max(id.length, collapse.length, d.sender.length) > maxKeyBytes) throw new BrokenStream("message_id, collapse_key or sender is too long");
    return {
      key: id === "" ? "" : `${d.sender.length}:${d.sender}${id}`, payloadHash: d.payloadHash,
      expires: ttl === 0 ? 0 : came + ttl,
      wantsAck, ackBy: wantsAck ? came + (d.ackTimeoutMs || defaultAckTimeout) : 0,
      collapse: collapse === "" ? "" : `${d.sender.length}:${d.sender}${collapse}`,
      replay: undefined,
    };
  }

  private write(r: DeliverResponse): void {
    if (!this.call.write(r)) this.isStuck = true;
  }

  private flushSoon(): void {
    if (this.flushing || this.isGone) return;
    this.flushing = true;
    setImmediate(() => {
      this.flushing = false;
      this.flush();
    });
  }

  /** Writes what is owed, as long as the manager reads. */
  private flush(): void {
    while (!this.isStuck && !this.isGone && this.isGreeted) {
      const r = this.acks.take();
      if (r === undefined) {
        if (this.acks.receipts.isSaid) this.onWritten?.();
        break;
      }
      this.write(r);
    }
    if (!this.acks.isFull) {
      this.resume?.();
      this.resume = undefined;
    }
  }

  /** Ends the stream with a status, once what is owed has been written. A manager that does not read must not keep it. */
  private end(code: status, details: string): void {
    if (this.isOver) return;
    this.isOver = true;
    this.frames = [];
    clearTimeout(this.helloTimer);
    this.resume?.();
    this.host.replays.part(this);
    if (this.isDrained) this.acks.receipts.hurry();
    else this.acks.receipts.forget(); // The manager knows no more of them.
    let timer: NodeJS.Timeout | undefined;
    const finish = (): void => {
      clearTimeout(timer);
      this.onWritten = undefined;
      if (this.isGone) return;
      if (code === status.OK) this.call.end();
      else this.call.emit("error", { code, details });
      this.call.resume(); // Whatever else comes is not looked at.
      this.gone();
    };
    if (!this.isGreeted) { // Nothing is owed.
      finish();
      return;
    }
    timer = setTimeout(finish, flushTimeout);
    this.onWritten = finish;
    this.flush();
  }

  private gone(): void {
    if (this.isGone) return;
    this.isGone = true;
    this.isOver = true;
    this.frames = [];
    clearTimeout(this.helloTimer);
    this.resume?.();
    this.acks.receipts.forget();
    this.host.replays.part(this);
    this.host.leave(this);
  }
}
