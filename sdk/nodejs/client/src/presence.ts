import { create, fromBinary, toBinary, type DescMessage, type MessageShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampDate, type Timestamp } from "@bufbuild/protobuf/wkt";
import { invalid } from "./errors.js";
import {
  DisconnectRequestSchema, DisconnectResponseSchema, GetRoomMembersRequestSchema, GetRoomMembersResponseSchema, GetUsersRequestSchema, GetUsersResponseSchema, PresenceChangeKind,
  SnapshotReason, WatchPresenceRequestSchema, WatchPresenceResponseSchema, type DisconnectResponse, type GetUsersResponse, type PresenceEntry as WireEntry,
} from "./gen/presence_pb.js";
import { check } from "./message.js";
import { failuresOf, type Failure } from "./result.js";

/** How long a call may take with all its tries, in milliseconds, and what gives it up. Default: the timeout of the Client. */
export interface CallOptions {
  timeout?: number;
  signal?: AbortSignal;
}

/** A user in a room on one node. A user on two nodes is in a room twice. */
export interface RoomMember {
  user: string;
  name: string;
  node: string;
  /** Undefined: not known. */
  joined: Date | undefined;
}

/** Where a user is. */
export interface Presence {
  user: string;
  online: boolean;
  nodes: string[];
  /** Those that the caller may list the members of. */
  rooms: string[];
  connections: UserConnection[];
  /** There are more connections, or a node did not say. */
  incomplete: boolean;
}

/** One connection of a user, as far as its node knows it. */
export interface UserConnection {
  node: string;
  id: string;
  device: string;
  attributes: Record<string, string>;
  rooms: string[];
  /** Undefined: not known. */
  since: Date | undefined;
}

/** A user in a room, or a user: then room is "", or one of the user's. */
export interface PresenceEntry {
  user: string;
  room: string;
  nodes: string[];
}

/** The kinds: joined and left a room; the first connection came, the last one ended; the same on other nodes. */
export interface PresenceChange extends PresenceEntry {
  kind: "connected" | "disconnected" | "joined" | "left" | "moved" | "unknown";
}

/** One message of a watch. */
export interface PresenceEvent {
  /** Where a watch goes on behind this event, "" within a snapshot. */
  position: string;
  /** A part of all there is, undefined for changes. The first part takes the place of all that was known. */
  snapshot: { reason: "initial" | "position_gone" | "fell_behind" | "unknown"; first: boolean; last: boolean; entries: PresenceEntry[] } | undefined;
  changes: PresenceChange[];
}

export interface WatchOptions extends CallOptions {
  /** That of the last event of an earlier watch of the same room or user. */
  position?: string;
}

/** All connections of a user, those of one device of a user, or those that are in a room. */
export type DisconnectTarget = { user: string; device?: string } | { room: string };

export interface DisconnectOptions extends CallOptions {
  /** The close code, 4000 to 4999: after 4400 to 4499 clients do not come back. Default: 4000, or with refuseFor 4410. */
  code?: number;
  /** For people, 120 bytes at most. */
  reason?: string;
  /** For how many milliseconds the user, or the device, may not connect, and the room not be joined. Default: they may come back at once. */
  refuseFor?: number;
}

/** What became of a disconnect. */
export interface Disconnected {
  /** Every Connect-Node has done it. */
  success: boolean;
  /** The same for people and logs. */
  message: string;
  /** How many were closed, on so many nodes that have answered. */
  connections: number;
  nodes: number;
  /** The other nodes. A refusal holds there, too, as soon as the node reads it in etcd. */
  failures: Failure[];
}

/** A method of PresenceService: its path, and how its messages are written and read. */
const method = <I extends DescMessage, O extends DescMessage>(name: string, input: I, output: O) => ({
  path: `/pubsub.PresenceService/${name}`,
  write: (m: MessageShape<I>): Uint8Array => toBinary(input, m),
  read: (b: Uint8Array): MessageShape<O> => fromBinary(output, b),
});

export const membersMethod = method("GetRoomMembers", GetRoomMembersRequestSchema, GetRoomMembersResponseSchema);
export const usersMethod = method("GetUsers", GetUsersRequestSchema, GetUsersResponseSchema);
export const watchMethod = method("WatchPresence", WatchPresenceRequestSchema, WatchPresenceResponseSchema);
export const disconnectMethod = method("Disconnect", DisconnectRequestSchema, DisconnectResponseSchema);

const dateOf = (t: Timestamp | undefined): Date | undefined => (t === undefined ? undefined : timestampDate(t));

export function membersRequest(room: string, token: string): Uint8Array {
  check("room_id", room);
  return membersMethod.write(create(GetRoomMembersRequestSchema, { roomId: room, pageToken: token }));
}

export const memberOf = (m: { userId: string; userName: string; nodeId: string; joinTime?: Timestamp | undefined }): RoomMember =>
  ({ user: m.userId, name: m.userName, node: m.nodeId, joined: dateOf(m.joinTime) });

export function usersRequest(users: readonly string[]): Uint8Array {
  check("user_ids", ...users);
  return usersMethod.write(create(GetUsersRequestSchema, { userIds: [...users] }));
}

export const presenceOf = (r: GetUsersResponse): Presence[] => r.users.map((u) => ({
  user: u.userId, online: u.online, nodes: u.nodeIds, rooms: u.roomIds, incomplete: u.incomplete,
  connections: u.connections.map((c) => ({ node: c.nodeId, id: c.connectionId, device: c.deviceId, attributes: c.attributes, rooms: c.roomIds, since: dateOf(c.connectTime) })),
}));

export function watchRequest(of: { room: string } | { user: string }, position: string): Uint8Array {
  const [roomId, userId] = "room" in of ? [of.room, ""] : ["", of.user];
  check("room_id", roomId);
  check("user_id", userId);
  check("position", position);
  return watchMethod.write(create(WatchPresenceRequestSchema, { roomId, userId, position }));
}

const kinds = {
  [PresenceChangeKind.CONNECTED]: "connected", [PresenceChangeKind.DISCONNECTED]: "disconnected", [PresenceChangeKind.JOINED]: "joined",
  [PresenceChangeKind.LEFT]: "left", [PresenceChangeKind.MOVED]: "moved", [PresenceChangeKind.PRESENCE_CHANGE_KIND_UNSPECIFIED]: "unknown",
} as const;
const reasons = {
  [SnapshotReason.SNAPSHOT_INITIAL]: "initial", [SnapshotReason.SNAPSHOT_POSITION_GONE]: "position_gone", [SnapshotReason.SNAPSHOT_FELL_BEHIND]: "fell_behind",
  [SnapshotReason.SNAPSHOT_REASON_UNSPECIFIED]: "unknown",
} as const;

export function eventOf(b: Uint8Array): PresenceEvent {
  const { position, what } = watchMethod.read(b);
  const entry = (e: WireEntry | undefined): PresenceEntry => ({ user: e?.userId ?? "", room: e?.roomId ?? "", nodes: e?.nodeIds ?? [] });
  if (what.case === "snapshot") {
    const { reason, first, last, entries } = what.value;
    return { position, snapshot: { reason: reasons[reason] ?? "unknown", first, last, entries: entries.map(entry) }, changes: [] };
  }
  const changes = what.case === "changes" ? what.value.changes : [];
  return { position, snapshot: undefined, changes: changes.map((c) => ({ kind: kinds[c.kind] ?? "unknown", ...entry(c.entry) })) };
}

/** allowAgain: of the options nothing counts. */
export function disconnectRequest(of: DisconnectTarget, o: DisconnectOptions, allowAgain: boolean): Uint8Array {
  const r = create(DisconnectRequestSchema, { allowAgain });
  if ("room" in of) r.roomId = of.room;
  else {
    r.userId = of.user;
    r.deviceId = of.device ?? "";
  }
  if (!allowAgain) {
    r.reason = o.reason ?? "";
    const code = o.code ?? 0;
    if (!Number.isInteger(code) || code < 0 || code > 0xffff) throw invalid("code", `${code} is no close code`);
    r.code = code;
    if (o.refuseFor !== undefined) {
      if (!(o.refuseFor > 0) || !Number.isSafeInteger(Math.ceil(o.refuseFor))) throw invalid("refuse_for", `${o.refuseFor} must be above zero`);
      r.refuseFor = durationFromMs(Math.ceil(o.refuseFor));
    }
  }
  check("user_id", r.userId);
  check("device_id", r.deviceId);
  check("room_id", r.roomId);
  check("reason", r.reason);
  return disconnectMethod.write(r);
}

export const disconnectedOf = (r: DisconnectResponse): Disconnected => ({
  success: r.success, message: r.message, connections: r.disconnected, nodes: r.nodes, failures: failuresOf(r.nodeFailures),
});
