import { createHash } from "node:crypto";
import { create, fromBinary, toBinary, type DescMessage, type MessageShape } from "@bufbuild/protobuf";
import { Client, connectivityState, credentials, status, type ChannelCredentials, type ServiceError } from "@grpc/grpc-js";
import {
  JoinRoomRequestSchema, JoinRoomResponseSchema, LeaveRoomRequestSchema, LeaveRoomResponseSchema, NodeMembershipSchema, NodeSlotSchema,
  SyncNodeRequestSchema, SyncNodeResponseSchema, type NodeSlot,
} from "./gen/controller_pb.js";
import { clock, watch } from "./message.js";
import type { Session } from "./session.js";

/** Begins the names of rooms that clients must not join: each node keeps all its users in one of them, so that the Controller finds those without a room. */
export const reserved = "@node:";

const slotCount = 1024;
/** How many joins may go before a leave that waits. */
const leaveShare = 8;
/** A call that was not answered may be executed yet. To a Controller without SyncNode the report after it is repeated: after 2 s, 8 s and 32 s. */
const repeats = 3;
const firstRepeat = 2000;
/** A request with slots has at least one, and no further one past these bounds. A slot that is larger goes one membership at a time. */
const sendMemberships = 2000;
const sendBytes = 512 << 10;
const sendMost = 3 << 20;
const tick = 100;

export interface MembershipConfig {
  nodeId: string;
  bootId: string;
  controller: string;
  credentials: ChannelCredentials | undefined;
  /** Of one call, in milliseconds: the Controller may hold its answer for 4 s. */
  timeout: number;
  /** Calls at once. */
  workers: number;
  /** How often memberships are compared, in milliseconds. */
  syncInterval: number;
  /** Memberships that are reported again, one by one, to a Controller without SyncNode. */
  rejoinPerSecond: number;
  /** Rooms of one connection. */
  maxRooms: number;
  caught(what: string, error: unknown): void;
  reached(ready: boolean): void;
}

/** One user in one room. */
interface Membership {
  readonly id: string;
  readonly user: string;
  readonly room: string;
  readonly hash: bigint;
  readonly slot: Slot;
  name: string;
  /** Connections that are in the room. */
  readonly holders: Set<Session>;
  /** To be told when the Controller knows, or has forgotten. */
  readonly joiners: Set<Session>;
  readonly leavers: Set<Session>;
  /** The Controller may believe it. */
  told: boolean;
  /** The Controller has said so. */
  confirmed: boolean;
  /** The Controller is to be told again, whatever it has said. */
  again: boolean;
  /** It is in its slot's digest. */
  counted: boolean;
  /** A call is under way. */
  busy: boolean;
  /** Nothing is done for it before it is due. */
  paused: boolean;
  failures: number;
  /** How often the last report is still to be repeated, and whether that is now. */
  repeats: number;
  repeat: boolean;
  due: number;
}

interface Slot {
  readonly members: Set<Membership>;
  digest: bigint;
  busy: number;
}

/** A queue in which users take turns: one with a thousand memberships to report delays another by one of them. */
class Turns {
  private readonly users = new Map<string, Set<Membership>>();
  n = 0;

  push(m: Membership): void {
    let of = this.users.get(m.user);
    if (of === undefined) this.users.set(m.user, (of = new Set()));
    if (of.has(m)) return;
    of.add(m);
    this.n++;
  }

  pop(): Membership | undefined {
    for (const [user, of] of this.users) {
      for (const m of of) {
        this.remove(m);
        if (of.size > 0) { // To the back.
          this.users.delete(user);
          this.users.set(user, of);
        }
        return m;
      }
    }
    return undefined;
  }

  remove(m: Membership): void {
    const of = this.users.get(m.user);
    if (of === undefined || !of.delete(m)) return;
    this.n--;
    if (of.size === 0) this.users.delete(m.user);
  }
}

/** The first 8 bytes of SHA-256 over user, a zero byte and room. */
export function hashOf(user: string, room: string): bigint {
  return createHash("sha256").update(user).update("\0").update(room).digest().readBigUInt64BE(0);
}

const codeOf = (error: unknown): status => (error as Partial<ServiceError>).code ?? status.UNKNOWN;

/**
 * Keeps the Controller's picture of this node's memberships equal to the truth. It does not queue events: for each user and room it knows what
 * is and what the Controller has been told, and works on the difference, one call at a time for each. Its size is bounded by what the
 * connections hold, however long the Controller is away. What both sides have is compared every two seconds, with a Controller that can.
 */
export class Reporter {
  readonly presence: string;

  private readonly client: Client;
  private readonly all = new Map<string, Membership>();
  private readonly slots: Slot[] = Array.from({ length: slotCount }, () => ({ members: new Set<Membership>(), digest: 0n, busy: 0 }));
  private readonly joins = new Turns();
  private readonly leaves = new Turns();
  private readonly retry = new Set<Membership>();
  private rejoin: Membership[] = [];
  private taken = 0;
  private calls = 0;
  private seq = 0n;
  private doubts = 0;
  private doubted = 0;
  private reaches = 0;
  private isReady = false;
  private isLeaving = false;
  private isClosed = false;
  private empty: (() => void) | undefined;
  private readonly clockTimer: NodeJS.Timeout;
  private readonly sync = { can: false, absent: false, store: "", unsent: new Set<number>(), complete: false };
  private wakeSync: (() => void) | undefined;
  private syncAtOnce = false;

  constructor(private readonly cfg: MembershipConfig) {
    this.presence = reserved + cfg.nodeId;
    this.client = new Client(cfg.controller, cfg.credentials ?? credentials.createInsecure(), {
      "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 3000,
      "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 2000, "grpc.client_idle_timeout_ms": 2 ** 31 - 1,
    });
    this.clockTimer = setInterval(() => this.tick(), tick);
    void this.watch();
    void this.syncLoop();
  }

  /** Whether the Controller is reached. */
  get isReached(): boolean {
    return this.isReady;
  }

  /** How many reports the Controller has not taken. */
  get pending(): number {
    return this.joins.n + this.leaves.n + this.retry.size + this.rejoin.length;
  }

  /** Puts a connection into a room at once. It is told when the Controller knows. */
  join(s: Session, room: string): void {
    if (this.isLeaving) throw new RangeError("node is going");
    if (room !== this.presence) {
      if (!s.rooms.has(room) && s.rooms.size >= this.cfg.maxRooms) throw new RangeError("room_id: too many rooms on this connection");
      s.rooms.add(room);
    }
    const id = `${s.user}\0${room}`;
    let m = this.all.get(id);
    if (m === undefined) {
      const hash = hashOf(s.user, room);
      m = {
        id, user: s.user, room, hash, slot: this.slots[Number(hash % BigInt(slotCount))]!, name: s.name, holders: new Set(), joiners: new Set(), leavers: new Set(),
        told: false, confirmed: false, again: false, counted: false, busy: false, paused: false, failures: 0, repeats: 0, repeat: false, due: 0,
      };
      m.slot.members.add(m);
      this.all.set(id, m);
    }
    m.holders.add(s);
    m.name = s.name;
    this.count(m);
    // A leave that waits for its answer gets it first: what a client is told last about a room is what is.
    if (m.leavers.delete(s)) this.tell(s, "left", room);
    if (!m.busy && this.isDone(m)) {
      this.tell(s, "joined", room);
      return;
    }
    m.joiners.add(s);
    this.list(m);
  }

  /** Takes a connection out of a room at once. It is told when the Controller knows. */
  leave(s: Session, room: string): void {
    if (!s.rooms.delete(room)) throw new RangeError("room_id: not in this room");
    const m = this.drop(s, room);
    if (m !== undefined && m.holders.size === 0 && this.all.get(m.id) === m && (m.busy || !this.isDone(m))) {
      m.leavers.add(s);
      s.leaving.add(room);
      return;
    }
    this.tell(s, "left", room); // Another connection of the user stays, or the Controller was never told.
  }

  /** Takes a connection that has ended out of everything. */
  end(s: Session): void {
    for (const room of s.leaving) this.all.get(`${s.user}\0${room}`)?.leavers.delete(s);
    s.leaving.clear();
    const rooms = [this.presence, ...s.rooms];
    s.rooms.clear();
    for (const room of rooms) this.drop(s, room);
  }

  /** Reports everything again: a Controller that watches etcd may have given this node up. */
  reportAgain(): void {
    if (this.sync.can) this.compareNow();
    else this.againAll();
  }

  /** Takes everybody out of everything and waits until the Controller has been told, or the time is over. */
  async drain(ms: number): Promise<void> {
    this.isLeaving = true;
    const until = clock() + ms;
    const atOnce = this.isReady && this.sync.can;
    for (const m of [...this.all.values()]) {
      for (const s of m.holders) s.rooms.delete(m.room);
      m.holders.clear();
      m.joiners.clear();
      m.leavers.clear();
      m.repeats = 0;
      this.count(m);
      if (!m.busy && !m.told) this.delete(m);
      else if (!atOnce) this.list(m);
    }
    // A Controller that knows numbers ends all in one call, and what comes late changes nothing any more.
    if (atOnce && (await this.clear())) return;
    for (const m of this.all.values()) this.list(m);
    if (this.all.size > 0) {
      await new Promise<void>((resolve) => {
        this.empty = resolve;
        setTimeout(resolve, Math.max(until - clock(), 0)).unref();
      });
    }
    if (this.all.size > 0 && this.isReady) await this.clear();
  }

  close(): void {
    this.isClosed = true;
    clearInterval(this.clockTimer);
    this.wakeSync?.();
    this.client.close();
  }

  /** Never within a call of the gateway: it may have no Session yet. */
  private tell(s: Session, what: "joined" | "left", room: string): void {
    queueMicrotask(() => {
      if (s.isOver) return;
      const shown = room === this.presence ? "" : room;
      try {
        if (what === "left") {
          watch(s.connection.left?.(shown), (error) => this.cfg.caught(what, error));
          return;
        }
        if (shown === "") s.gate?.ready();
        watch(s.connection.joined?.(shown), (error) => this.cfg.caught(what, error));
      } catch (error) {
        this.cfg.caught(what, error);
      }
    });
  }

  private drop(s: Session, room: string): Membership | undefined {
    const m = this.all.get(`${s.user}\0${room}`);
    if (m === undefined) return undefined;
    m.holders.delete(s);
    m.joiners.delete(s);
    this.count(m);
    if (m.holders.size > 0) return m;
    if (!m.busy && !m.told && m.repeats === 0) this.delete(m);
    else this.list(m);
    return m;
  }

  private delete(m: Membership): void {
    if (this.all.get(m.id) !== m) return;
    this.all.delete(m.id);
    this.joins.remove(m);
    this.leaves.remove(m);
    this.retry.delete(m);
    m.slot.members.delete(m);
    if (this.all.size === 0) this.empty?.();
  }

  /** Keeps the digest of the slot: what the Controller should have. */
  private count(m: Membership): void {
    const counts = m.confirmed && m.holders.size > 0;
    if (counts !== m.counted) m.slot.digest = BigInt.asUintN(64, m.slot.digest + (counts ? m.hash : -m.hash));
    m.counted = counts;
  }

  /** Whether the Controller's picture of m is the truth. */
  private isDone(m: Membership): boolean {
    return m.holders.size === 0 ? !m.told : m.told && m.confirmed && !m.again;
  }

  private list(m: Membership): void {
    if (m.busy || m.paused) return; // Whoever has it looks again.
    this.joins.remove(m);
    this.leaves.remove(m);
    (m.holders.size > 0 ? this.joins : this.leaves).push(m);
    this.work();
  }

  /** Makes as many calls as may be made. Joins go first: somebody waits for them. */
  private work(): void {
    while (!this.isClosed && this.isReady && this.calls < this.cfg.workers && this.joins.n + this.leaves.n > 0) {
      let m: Membership | undefined;
      if (this.joins.n === 0 || (this.leaves.n > 0 && this.taken >= leaveShare)) {
        this.taken = 0;
        m = this.leaves.pop();
      } else {
        this.taken++;
        m = this.joins.pop();
      }
      if (m === undefined || m.busy || m.paused) continue;
      m.busy = true;
      m.slot.busy++;
      this.calls++;
      void this.report(m).finally(() => {
        this.calls--;
        this.work();
      });
    }
  }

  /** Makes at most one call for m and says to whom it matters what came of it. */
  private async report(m: Membership): Promise<void> {
    const joins = m.holders.size > 0;
    const repeat = m.repeat;
    const calls = repeat || !this.isDone(m);
    m.repeat = false;
    let failed: unknown;
    let refused = "";
    if (calls) {
      m.told ||= joins; // From here on the Controller may believe it.
      m.again = false;
      try {
        refused = await this.tellController(m, joins, ++this.seq);
        if (refused !== "") {
          m.told = m.confirmed = false;
          this.refuse(m, refused);
        } else {
          m.failures = 0;
          m.told = m.confirmed = joins;
          if (repeat && m.repeats > 0) m.repeats--;
        }
      } catch (error) {
        failed = error;
      }
    }
    this.count(m);
    m.busy = false;
    m.slot.busy--;
    if (failed !== undefined) {
      this.fail(m, failed);
      return;
    }
    if (this.isDone(m)) {
      for (const s of m.leavers) {
        s.leaving.delete(m.room);
        this.tell(s, "left", m.room);
      }
      for (const s of m.joiners) this.tell(s, "joined", m.room);
      m.leavers.clear();
      m.joiners.clear();
    }
    this.settle(m);
  }

  /** Returns the Controller's final no; an error may pass. */
  private async tellController(m: Membership, joins: boolean, seq: bigint): Promise<string> {
    const of = { userId: m.user, roomId: m.room, nodeId: this.cfg.nodeId, bootId: this.cfg.bootId, seq };
    try {
      if (joins) {
        const r = await this.call("JoinRoom", JoinRoomRequestSchema, JoinRoomResponseSchema, create(JoinRoomRequestSchema, { ...of, userName: m.name, withoutUsers: true }));
        return r.success ? "" : `refused by the controller ${r.message}`.trim();
      }
      // success=false says that the user was not there: just as well.
      await this.call("LeaveRoom", LeaveRoomRequestSchema, LeaveRoomResponseSchema, create(LeaveRoomRequestSchema, of));
      return "";
    } catch (error) {
      switch (codeOf(error)) {
        case status.UNIMPLEMENTED: // A Controller that learns memberships in another way.
          return "";
        case status.INVALID_ARGUMENT:
        case status.PERMISSION_DENIED:
        case status.FAILED_PRECONDITION:
        case status.OUT_OF_RANGE:
        case status.NOT_FOUND:
          return joins ? (error as ServiceError).details || "refused by the controller" : "";
        default:
          throw error;
      }
    }
  }

  private refuse(m: Membership, why: string): void {
    const holders = [...m.holders];
    m.holders.clear();
    m.joiners.clear();
    const shown = m.room === this.presence ? "" : m.room;
    for (const s of holders) {
      s.rooms.delete(m.room);
      try {
        if (!s.isOver) watch(s.connection.refused?.(shown, why), (error) => this.cfg.caught("refused", error));
      } catch (error) {
        this.cfg.caught("refused", error);
      }
    }
  }

  /** A call did not succeed, and may have been executed. */
  private fail(m: Membership, error: unknown): void {
    m.again = true;
    m.failures++;
    if (codeOf(error) === status.ABORTED) {
      // Not executed. Another number may do at once; if not, another process of this node reports, and a comparison settles which of them does.
      if (m.failures < 3) {
        this.list(m);
        return;
      }
      this.compareNow();
    } else if (!this.sync.can && !this.isLeaving) {
      m.repeats = repeats;
    }
    m.paused = true;
    m.due = clock() + Math.min(50 * 2 ** Math.min(m.failures, 10), 5000);
    this.retry.add(m);
  }

  /** Looks at m after a call: it is done, or there is more to do. */
  private settle(m: Membership): void {
    if (this.all.get(m.id) !== m) return;
    if (!this.isDone(m)) {
      this.list(m);
      return;
    }
    if (this.sync.can || this.isLeaving) m.repeats = 0;
    if (m.repeats > 0) {
      m.due = clock() + firstRepeat * 4 ** (repeats - m.repeats);
      this.retry.add(m);
    } else if (m.holders.size === 0) {
      this.delete(m);
    }
  }

  private tick(): void {
    const now = clock();
    for (const m of this.retry) {
      if (m.due > now) continue;
      this.retry.delete(m);
      m.repeat = m.repeats > 0 && !m.paused;
      m.paused = false;
      this.list(m);
    }
    if (this.sync.can || this.isLeaving) this.doubts = 0;
    if (this.doubts > 0 && now > this.doubted) {
      this.doubts--;
      this.doubted = now + firstRepeat * 4 ** (repeats - this.doubts);
      this.againAll();
    }
    if (!this.isReady) return;
    for (const m of this.rejoin.splice(0, Math.max(Math.floor((this.cfg.rejoinPerSecond * tick) / 1000), 1))) {
      if (this.all.get(m.id) === m) this.list(m);
    }
  }

  private againAll(): void {
    this.rejoin = [];
    for (const m of this.all.values()) {
      if (!m.told || m.holders.size === 0) continue;
      m.again = true;
      this.rejoin.push(m);
    }
  }

  /** Follows the connection to the Controller: each time that it is there it may be a new one that knows nothing. */
  private async watch(): Promise<void> {
    let cleared = false;
    let changed = true;
    const channel = this.client.getChannel();
    while (!this.isClosed) {
      const state = channel.getConnectivityState(true);
      if (state === connectivityState.READY) {
        cleared ||= await this.clear();
        if (!cleared || !(await this.greet())) {
          await new Promise((go) => setTimeout(go, 100));
          changed = true;
          continue;
        }
      }
      if (changed) this.reached(state === connectivityState.READY);
      changed = await new Promise<boolean>((go) => {
        try {
          channel.watchConnectivityState(state, Date.now() + 60_000, (error) => go(error === undefined));
        } catch {
          go(false); // It was closed.
        }
      });
    }
  }

  private reached(ready: boolean): void {
    if (this.isReady !== ready) this.cfg.reached(ready);
    this.isReady = ready;
    if (!ready) return;
    this.reaches++;
    for (const m of this.retry) if (m.again) m.due = 0; // It failed because the Controller was away.
    if (this.sync.can) this.compareNow();
    else if (this.reaches > 1) this.againAll();
    this.work();
  }

  /** Ends all memberships that were reported of this node id before. A Controller that does not understand it has said so, and that is an answer, too. */
  private async clear(): Promise<boolean> {
    try {
      await this.call("LeaveRoom", LeaveRoomRequestSchema, LeaveRoomResponseSchema, create(LeaveRoomRequestSchema, { nodeId: this.cfg.nodeId, bootId: this.cfg.bootId, seq: ++this.seq }));
      return true;
    } catch (error) {
      if (![status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.CANCELLED, status.ABORTED].includes(codeOf(error))) return true;
      // It may be executed yet, and end what is reported meanwhile.
      this.doubts = repeats;
      this.doubted = clock() + firstRepeat;
      return false;
    }
  }

  /** Finds out whether the Controller can compare, and whether it is the one from before. */
  private async greet(): Promise<boolean> {
    let code = status.OK;
    try {
      await this.askSlots();
    } catch (error) {
      code = codeOf(error);
    }
    this.sync.can = code === status.OK;
    this.sync.absent = code === status.UNIMPLEMENTED;
    // One that does not answer may be a Controller that does not know it.
    return ![status.UNAVAILABLE, status.CANCELLED, status.ABORTED].includes(code);
  }

  private compareNow(): void {
    this.syncAtOnce = true;
    this.wakeSync?.();
  }

  private async syncLoop(): Promise<void> {
    while (!this.isClosed) {
      let pause = this.cfg.syncInterval;
      if (this.isReady && !this.sync.absent) {
        try {
          if (await this.compare()) pause = Math.min(pause, 20); // What was left out is under way.
        } catch {
          pause = Math.min(pause, 1000); // The connection tells why.
        }
      }
      if (!this.syncAtOnce) {
        await new Promise<void>((go) => {
          const timer = setTimeout(go, pause);
          this.wakeSync = () => {
            clearTimeout(timer);
            go();
          };
        });
      }
      this.syncAtOnce = false;
    }
  }

  /** Compares once and sends what differs. True: it is to be called again soon. */
  private async compare(): Promise<boolean> {
    const completed = this.sync.complete;
    await this.askSlots();
    this.sync.can = true;
    while (await this.sendSlots());
    if ((completed && this.sync.complete) || this.rejoin.length > 0) return false;
    this.sync.complete = this.sync.unsent.size === 0;
    return true; // To say that it is complete, or because a slot had to wait.
  }

  private async askSlots(): Promise<void> {
    await this.exchange(this.slots.map((s) => s.digest), [], this.sync.complete ? this.sync.store : "");
  }

  /**
   * Sends some of the slots that differ, and tells whether there were any. A slot for which a call is under way has to wait: what is not
   * listed ends. It does not wait while the store has not been told everything, for the Controller may not answer the call before.
   */
  private async sendSlots(): Promise<boolean> {
    const lists: NodeSlot[] = [];
    let members = 0;
    let bytes = 0;
    for (const i of [...this.sync.unsent]) {
      const slot = this.slots[i]!;
      if (slot.busy > 0 && this.sync.complete) continue;
      const counted = [...slot.members].filter((m) => m.counted);
      const size = counted.reduce((n, m) => n + 3 * (m.user.length + m.room.length + m.name.length) + 16, 0);
      if (size > sendMost) {
        this.sync.unsent.delete(i);
        for (const m of counted) {
          if (m.again) continue;
          m.again = true;
          this.rejoin.push(m);
        }
        continue;
      }
      members += counted.length;
      bytes += size;
      if (lists.length > 0 && (members > sendMemberships || bytes > sendBytes)) break;
      for (const m of slot.members) m.again ||= m.busy;
      lists.push(create(NodeSlotSchema, {
        slot: i, seq: ++this.seq,
        memberships: counted.map((m) => create(NodeMembershipSchema, { userId: m.user, roomId: m.room, userName: m.name })),
      }));
      this.sync.unsent.delete(i); // Unless the reply says that it was not taken.
    }
    if (lists.length === 0) return false;
    try {
      await this.exchange([], lists, "");
    } catch (error) {
      for (const list of lists) this.sync.unsent.add(list.slot);
      throw error;
    }
    return true;
  }

  /** Makes one call and notes what differs. */
  private async exchange(digests: bigint[], slots: NodeSlot[], reportedTo: string): Promise<void> {
    const r = await this.call("SyncNode", SyncNodeRequestSchema, SyncNodeResponseSchema, create(SyncNodeRequestSchema, {
      nodeId: this.cfg.nodeId, bootId: this.cfg.bootId, digests, slots, reportedTo,
    }));
    if (r.storeId !== this.sync.store) {
      this.sync.store = r.storeId;
      this.sync.complete = false;
      if (slots.length > 0) {
        this.compareNow();
        throw new Error("the controller has forgotten meanwhile");
      }
    }
    for (const i of r.differing) if (i < slotCount) this.sync.unsent.add(i);
  }

  private call<I extends DescMessage, O extends DescMessage>(method: string, input: I, output: O, request: MessageShape<I>): Promise<MessageShape<O>> {
    return new Promise((resolve, reject) => {
      this.client.makeUnaryRequest(
        `/pubsub.ControllerService/${method}`, (m: MessageShape<I>) => Buffer.from(toBinary(input, m)), (b: Buffer) => fromBinary(output, b), request,
        { deadline: Date.now() + this.cfg.timeout },
        (error: ServiceError | null, reply?: MessageShape<O>) => (error !== null || reply === undefined ? reject(error ?? new Error("no reply")) : resolve(reply)),
      );
    });
  }
}
