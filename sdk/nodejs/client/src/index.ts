export { Client, type ClientConfig } from "./client.js";
export type { Dial, Tls } from "./dial.js";
export { PushError } from "./errors.js";
export type { Match, Message, PushOptions, Target } from "./message.js";
export type {
  CallOptions, Disconnected, DisconnectOptions, DisconnectTarget, Presence, PresenceChange, PresenceEntry, PresenceEvent, RoomMember, UserConnection, WatchOptions,
} from "./presence.js";
export type { Failure, Outcome, Result } from "./result.js";
export type { Retries, Retry } from "./retry.js";
export { Stream, Pending, type StreamConfig } from "./stream.js";
