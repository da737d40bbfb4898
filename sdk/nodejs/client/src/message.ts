import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { invalid } from "./errors.js";
import { MatchSchema, MessageContentSchema } from "./gen/message_pb.js";
import {
  AckPolicy, BroadcastMessageRequestSchema, BroadcastMessageResponseSchema, OfflinePolicy, Priority, PushOptionsSchema, PushToRoomRequestSchema,
  PushToRoomResponseSchema, PushToRoomsRequestSchema, PushToRoomsResponseSchema, PushToUserRequestSchema, PushToUserResponseSchema, PushToUsersRequestSchema, PushToUsersResponseSchema, ReceiptMode,
  type PushOptions as WireOptions,
} from "./gen/push_manager_pb.js";
import { resultOf, type Result } from "./result.js";

/** What the clients get: a text, or bytes with what else there is. */
export type Message = string | {
  /** text by default. Other numbers than those with names pass through unchanged. */
  type?: "text" | "audio" | "video" | "translation" | "system" | number;
  /** At most 256 KiB by default. */
  data?: Uint8Array | string;
  /** Shown in whole seconds. Left out: Push-Manager stamps its own. */
  time?: Date;
  /** At most 32 entries and 8 KiB by default. */
  metadata?: Record<string, string>;
};

/** Asks something of an attribute of a connection, such as its platform: that it has one of the values or, with not, none of them. An absent attribute has none. */
export interface Match {
  key: string;
  /** 1 to 32. */
  values: readonly string[];
  not?: boolean;
}

/** What a push is worth. All of it may be left out. */
export interface PushOptions {
  /**
   * Names the message: 1 to 64 bytes, the same whenever it is pushed again. No connection gets two pushes with the same id. With an id, a push
   * whose fate is unknown is repeated.
   */
  messageId?: string;
  /** How long the message is worth showing, in milliseconds. */
  ttl?: number;
  /** Delivered means that the client itself has acknowledged, if it can; a number: within so many milliseconds. */
  ackByClient?: boolean | number;
  /** Store the message for whoever is not reached. Not for broadcasts and several rooms, and only where there is a store. */
  storeIfOffline?: boolean;
  /** A newer message to the same user with the same key takes the place of this one while it waits. */
  collapseKey?: string;
  /** Which pushes are refused first when there is too much to do. Default: normal. */
  priority?: "low" | "normal" | "high" | "critical";
  /** Answer without waiting for clients: their word comes with WatchReceipts. Needs ackByClient and messageId. */
  asyncReceipt?: boolean;
  /**
   * Only for connections for which all of these hold, at most 8. A user who is connected and has no such connection is filtered, which is of
   * offline. Not with storeIfOffline.
   */
  filter?: readonly Match[];
  /** Of a push to a room, or to several: who does not get it. */
  except?: readonly string[];
  /** How long the push may take with all its tries, in milliseconds. Default: that of the Client. */
  timeout?: number;
  /**
   * Gives the push up. What was sent until then is unknown. On a Stream it ends the wait for room, and nothing else: a push that was taken goes
   * on to its end.
   */
  signal?: AbortSignal;
}

/** To whom a push goes. */
export type Target = { user: string } | { users: readonly string[] } | { room: string } | { rooms: readonly string[] } | { everybody: true };

export type Kind = "user" | "users" | "room" | "rooms" | "everybody";

/** A push, encoded: what is repeated is the same bytes. */
export interface Encoded {
  readonly kind: Kind;
  /** The user or the room for which order is kept; "" for none. */
  readonly key: string;
  readonly messageId: string;
  readonly bytes: Uint8Array;
}

const types = { text: 0, audio: 1, video: 2, translation: 3, system: 4 };
const priorities = { low: Priority.LOW, normal: Priority.NORMAL, high: Priority.HIGH, critical: Priority.CRITICAL };

/** The path of each method, and how its reply is read. */
export const methods: Record<Kind, { path: string; read: (b: Uint8Array) => Result }> = {
  user: { path: "/pubsub.PushManagerService/PushToUser", read: (b) => resultOf("user", fromBinary(PushToUserResponseSchema, b)) },
  users: { path: "/pubsub.PushManagerService/PushToUsers", read: (b) => resultOf("users", fromBinary(PushToUsersResponseSchema, b)) },
  room: { path: "/pubsub.PushManagerService/PushToRoom", read: (b) => resultOf("room", fromBinary(PushToRoomResponseSchema, b)) },
  rooms: { path: "/pubsub.PushManagerService/PushToRooms", read: (b) => resultOf("rooms", fromBinary(PushToRoomsResponseSchema, b)) },
  everybody: { path: "/pubsub.PushManagerService/BroadcastMessage", read: (b) => resultOf("everybody", fromBinary(BroadcastMessageResponseSchema, b)) },
};

/** Encodes a push. It refuses what cannot be encoded; limits are Push-Manager's to hold. */
export function encode(to: Target, message: Message, o: PushOptions): Encoded {
  const m = typeof message === "string" ? { data: message } : message;
  for (const [k, v] of Object.entries(m.metadata ?? {})) check("content.metadata", k, v);
  const seconds = m.time === undefined ? 0 : Math.floor(m.time.getTime() / 1000);
  if (!Number.isSafeInteger(seconds)) throw invalid("content.timestamp", "is no time");
  const type = typeof m.type === "number" ? m.type : types[m.type ?? "text"];
  if (!Number.isInteger(type) || Math.abs(type) > 0x7fff_ffff) throw invalid("content.type", "is no number of a type");
  const content = create(MessageContentSchema, {
    type, timestamp: BigInt(seconds), metadata: m.metadata ?? {}, data: typeof m.data === "string" ? Buffer.from(m.data) : (m.data ?? new Uint8Array()),
  });
  const options = optionsOf(o);
  const withOptions = options === undefined ? {} : { options };
  const messageId = o.messageId ?? "";
  if (o.except !== undefined && o.except.length > 0 && !("room" in to || "rooms" in to)) throw invalid("exclude_user_ids", "are for rooms only");
  if ("user" in to) {
    check("user_id", to.user);
    return { kind: "user", key: `user:${to.user}`, messageId, bytes: toBinary(PushToUserRequestSchema, create(PushToUserRequestSchema, { userId: to.user, content, ...withOptions })) };
  }
  if ("users" in to) {
    check("user_ids", ...to.users);
    return { kind: "users", key: "", messageId, bytes: toBinary(PushToUsersRequestSchema, create(PushToUsersRequestSchema, { userIds: [...to.users], content, ...withOptions })) };
  }
  if ("room" in to) {
    check("room_id", to.room);
    check("exclude_user_ids", ...(o.except ?? []));
    const request = create(PushToRoomRequestSchema, { roomId: to.room, content, excludeUserIds: [...(o.except ?? [])], ...withOptions });
    return { kind: "room", key: `room:${to.room}`, messageId, bytes: toBinary(PushToRoomRequestSchema, request) };
  }
  if ("rooms" in to) {
    check("room_ids", ...to.rooms);
    check("exclude_user_ids", ...(o.except ?? []));
    const request = create(PushToRoomsRequestSchema, { roomIds: [...to.rooms], content, excludeUserIds: [...(o.except ?? [])], ...withOptions });
    return { kind: "rooms", key: `rooms:${to.rooms.join("\0")}`, messageId, bytes: toBinary(PushToRoomsRequestSchema, request) };
  }
  if (!("everybody" in to) || to.everybody !== true) throw invalid("target", "is missing: user, users, room, rooms or everybody");
  return { kind: "everybody", key: "", messageId, bytes: toBinary(BroadcastMessageRequestSchema, create(BroadcastMessageRequestSchema, { content, ...withOptions })) };
}

/** Undefined: none are asked for, and the push is what it was before there were options. */
function optionsOf(o: PushOptions): WireOptions | undefined {
  const w = create(PushOptionsSchema);
  let some = false;
  if (o.messageId !== undefined) {
    check("options.message_id", o.messageId);
    w.messageId = o.messageId;
    some = true;
  }
  if (o.ttl !== undefined) {
    w.ttlMs = milliseconds("options.ttl_ms", o.ttl);
    some = true;
  }
  if (o.ackByClient !== undefined && o.ackByClient !== false) {
    w.ack = AckPolicy.ACK_CLIENT;
    if (typeof o.ackByClient === "number") w.ackTimeoutMs = milliseconds("options.ack_timeout_ms", o.ackByClient);
    some = true;
  }
  if (o.storeIfOffline === true) {
    w.offline = OfflinePolicy.OFFLINE_STORE;
    some = true;
  }
  if (o.collapseKey !== undefined) {
    check("options.collapse_key", o.collapseKey);
    w.collapseKey = o.collapseKey;
    some = true;
  }
  if (o.priority !== undefined) {
    w.priority = priorities[o.priority];
    some = true;
  }
  if (o.filter !== undefined && o.filter.length > 0) {
    w.filter = o.filter.map(({ key, values, not }, i) => {
      check(`options.filter[${i}].key`, key);
      check(`options.filter[${i}].values`, ...values);
      return create(MatchSchema, { key, values: [...values], not: not ?? false });
    });
    some = true;
  }
  if (o.asyncReceipt === true) {
    w.receipt = ReceiptMode.RECEIPT_ASYNC;
    some = true;
  }
  return some ? w : undefined;
}

function milliseconds(field: string, ms: number): number {
  const whole = Math.round(ms);
  if (!(whole >= 1 && whole <= 0xffff_ffff)) throw invalid(field, `${ms} is not between 1 and ${0xffff_ffff} milliseconds`);
  return whole;
}

/** Refuses what is no text. */
export function check(field: string, ...texts: readonly string[]): void {
  for (const text of texts) {
    if (typeof text !== "string" || !text.isWellFormed()) throw invalid(field, "is no valid text");
  }
}
