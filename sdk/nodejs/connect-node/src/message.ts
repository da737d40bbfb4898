import type { MessageContent } from "./gen/message_pb.js";
import type { Ask } from "./replay.js";

/** A push as all its users get it. One object stands for the push to all of them, so what is made of it can be kept in a WeakMap. */
export interface Message {
  /** 0 text, 1 audio, 2 video, 3 translation, 4 system. Other numbers pass through unchanged. */
  readonly type: number;
  /** Must not be changed: all users share it. */
  readonly data: Uint8Array;
  /** Unix seconds. */
  readonly timestamp: number;
  readonly metadata: Readonly<Record<string, string>>;
  /** The room that was pushed to, of several the first that the connection is in; "" for a push to users or to everybody. */
  readonly roomId: string;
  /** The push is for everybody. */
  readonly broadcast: boolean;
  /** Chosen by the caller of Push-Manager; "" for none. */
  readonly id: string;
  /** The W3C trace context of the caller, where the push is sampled; "" otherwise. */
  readonly traceparent: string;
}

/** The several rooms of one push. */
export class Rooms {
  private readonly places = new Map<string, number>();

  constructor(readonly list: readonly string[]) {
    for (const [i, room] of list.entries()) if (!this.places.has(room)) this.places.set(room, i);
  }

  /** The first of them that is among some; undefined: none is. */
  firstOf(rooms: Iterable<string>): string | undefined {
    let first: string | undefined;
    let at = this.list.length;
    for (const room of rooms) {
      const place = this.places.get(room);
      if (place !== undefined && place < at) {
        at = place;
        first = room;
      }
    }
    return first;
  }
}

/** A message to several rooms before it is known which of them a connection is in. */
export interface Several extends Message {
  readonly rooms: Rooms;
  /** The message for those who see it in a room: one object for all of them. */
  readonly byRoom: Map<string, Message>;
}

/** The message for a connection in some rooms, for any if there are none; undefined: it is not for it. */
export function inRoom(m: Several, rooms: Iterable<string> | undefined): Message | undefined {
  const room = rooms === undefined ? m.rooms.list[0] : m.rooms.firstOf(rooms);
  if (room === undefined) return undefined;
  let shown = m.byRoom.get(room);
  if (shown === undefined) {
    const { type, data, timestamp, metadata, broadcast, id, traceparent } = m;
    shown = { type, data, timestamp, metadata, roomId: room, broadcast, id, traceparent };
    m.byRoom.set(room, shown);
  }
  return shown;
}

/** A push as one client gets it. */
export interface Push {
  readonly message: Message;
  /** The number with which the client acknowledges this push and all before it; 0: it does not. */
  readonly ack: number;
  /** It comes out of the store, or comes again because the client has not acknowledged it. */
  readonly replayed: boolean;
}

/** What became of a push for one user or connection. */
export type Outcome = "notHere" | "filtered" | "failed" | "reused" | "expired" | "stalled" | "duplicate" | "pending" | "delivered";

/** Of a user's connections, the best outcome is the user's. */
export const worth: Record<Outcome, number> = {
  notHere: 0, filtered: 1, failed: 2, reused: 3, expired: 4, stalled: 4, duplicate: 5, pending: 6, delivered: 7,
};

/** What a push with options asks of the node. Times are those of clock. */
export interface Options {
  /** Sender and message id together; "" without an id. */
  readonly key: string;
  readonly payloadHash: number;
  /** When the message must not be shown any more; 0: never. */
  readonly expires: number;
  readonly wantsAck: boolean;
  readonly ackBy: number;
  /** Sender and collapse key together; "" without one. */
  readonly collapse: string;
  /** For a message out of the store: who has asked, and its place. */
  readonly replay: { readonly ask: Ask; readonly seq: bigint } | undefined;
}

/** Has caught told what a callback's promise rejects with: the types say that there is none, and let an async function pass. */
export function watch(returned: unknown, caught: (error: unknown) => void): void {
  if (returned instanceof Promise) returned.catch(caught);
}

/** Milliseconds of a clock that nobody sets. */
export const clock = (): number => performance.now();

export const hasExpired = (o: Options | undefined, now: number): boolean => o !== undefined && o.expires !== 0 && now >= o.expires;

/** For what a message costs beside its data: the objects around it. */
const messageOverhead = 128;

export const sizeOf = (m: Message): number => m.data.length + messageOverhead;

export function messageOf(content: MessageContent | undefined, roomId: string, broadcast: boolean, id = "", traceparent = "", rooms?: Rooms): Message | Several {
  const m = {
    type: content?.type ?? 0,
    data: content?.data ?? new Uint8Array(),
    timestamp: Number(content?.timestamp ?? 0n),
    metadata: content?.metadata ?? {},
    roomId, broadcast, id, traceparent,
  };
  return rooms === undefined ? m : { ...m, rooms, byRoom: new Map() };
}
