import { BrokenStream } from "./audiences.js";
import type { Disconnect } from "./gen/connect_node_pb.js";
import { clock } from "./message.js";

/** What a client is told that a service disconnects or refuses: the close code of its WebSocket, 4000 to 4999, and words. */
export interface Words {
  code: number;
  reason: string;
}

/** Thrown by ConnectNode.connect for a user or a device that a service keeps away for a time. */
export class RefusedError extends Error implements Words {
  constructor(readonly code: number, readonly reason: string) {
    super(reason === "" ? "refused" : `refused: ${reason}`);
  }
}

/** Where Push-Managers write who is refused. */
export const refusedPrefix = "/push-manager/refused/";
/** How many there may be: as many as Push-Managers write at most. */
export const mostRefusals = 100_000;
/** How long it is remembered that a refusal was lifted, in milliseconds: what was written before it may come later. */
const tombstone = 60_000;
const sweepEvery = 10_000;

interface Refusal extends Words {
  revision: bigint;
  until: number;
  lifted: boolean;
}

/** Throws BrokenStream for what no Push-Manager asks. */
export function checkDisconnect(d: Disconnect): void {
  if (d.token === 0n) throw new BrokenStream("disconnect: token: must not be 0");
  if ((d.userId === "") === (d.roomId === "")) throw new BrokenStream("disconnect: one of user_id and room_id must be set");
  if (d.deviceId !== "" && d.userId === "") throw new BrokenStream("disconnect: device_id: needs a user_id");
  if (d.code < 4000 || d.code > 4999) throw new BrokenStream(`disconnect: code: ${d.code} is not from 4000 to 4999`);
  if (Buffer.byteLength(d.reason) > 120) throw new BrokenStream("disconnect: reason: more than 120 bytes");
}

const keyOf = (user: string, device: string, room: string): string => {
  if (room !== "") return `${refusedPrefix}room/${room}`;
  return device === "" ? `${refusedPrefix}user/${user}` : `${refusedPrefix}device/${user}/${device}/${Buffer.byteLength(device)}`;
};

/** What a Push-Manager has written at a key; undefined for anything else. */
const refusalAt = (key: string, value: string): (Words & { seconds: number }) | undefined => {
  let r: unknown;
  try {
    r = JSON.parse(value);
  } catch {
    return undefined;
  }
  if (typeof r !== "object" || r === null) return undefined;
  const { user = "", device = "", room = "", code, reason = "", seconds } = r as Record<string, unknown>;
  if (typeof user !== "string" || typeof device !== "string" || typeof room !== "string" || keyOf(user, device, room) !== key) return undefined;
  if (typeof code !== "number" || !Number.isInteger(code) || code < 4000 || code > 4999) return undefined;
  if (typeof seconds !== "number" || seconds <= 0 || typeof reason !== "string" || Buffer.byteLength(reason) > 120) return undefined;
  return { code, reason, seconds };
};

/** Who is refused, as Push-Managers and etcd have told. Of what is said of one user, device or room the highest revision counts. */
export class Refusals {
  private readonly byKey = new Map<string, Refusal>();
  private swept = clock();
  private revision = 0n; // Of the last list.

  /** Takes what a Push-Manager says. */
  take(d: Disconnect): void {
    const key = keyOf(d.userId, d.deviceId, d.roomId);
    if (d.allowAgain) this.set(key, { code: 0, reason: "", revision: d.revision, until: clock() + tombstone, lifted: true });
    else if (d.refuseMs > 0n) this.put(key, d.code, d.reason, Number(d.refuseMs), d.revision);
  }

  /** Takes what stands in etcd, as of a revision: all of it, or only some. */
  list(stands: Iterable<{ key: string; value: string; revision: bigint }>, revision: bigint, all: boolean): void {
    if (revision < this.revision) this.byKey.clear(); // An etcd that has gone back was restored: what it says is all that counts.
    this.revision = revision;
    const listed = new Map<string, Words & { seconds: number; revision: bigint }>();
    for (const { key, value, revision: at } of stands) {
      const r = refusalAt(key, value);
      if (r !== undefined) listed.set(key, { ...r, revision: at });
    }
    if (all) for (const [key, r] of this.byKey) if (!listed.has(key) && !r.lifted && r.revision <= revision) this.byKey.delete(key);
    for (const [key, r] of listed) this.put(key, r.code, r.reason, r.seconds * 1000, r.revision);
  }

  of(user: string, device: string): Words | undefined {
    return this.look(keyOf(user, "", "")) ?? (device === "" ? undefined : this.look(keyOf(user, device, "")));
  }

  ofRoom(room: string): Words | undefined {
    return this.look(keyOf("", "", room));
  }

  private look(key: string): Words | undefined {
    if (this.byKey.size === 0) return undefined;
    const r = this.byKey.get(key);
    return r === undefined || r.lifted || clock() > r.until ? undefined : { code: r.code, reason: r.reason };
  }

  private put(key: string, code: number, reason: string, ms: number, revision: bigint): void {
    if (this.byKey.get(key)?.revision === revision) return; // The end that was counted from the first news of it holds.
    this.set(key, { code, reason, revision, until: clock() + ms, lifted: false });
  }

  private set(key: string, r: Refusal): void {
    const now = clock();
    if (now - this.swept > sweepEvery) {
      this.swept = now;
      for (const [old, { until }] of this.byKey) if (now > until) this.byKey.delete(old);
    }
    const before = this.byKey.get(key);
    if (before === undefined && this.byKey.size >= mostRefusals && !r.lifted) { // What was lifted keeps nobody from being refused.
      for (const [old, { lifted }] of this.byKey) if (lifted) this.byKey.delete(old);
    }
    if (before === undefined ? this.byKey.size < mostRefusals : before.revision <= r.revision) this.byKey.set(key, r);
  }
}
