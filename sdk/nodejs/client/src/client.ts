import { status, type ServiceError } from "@grpc/grpc-js";
import { Channels, type Dial } from "./dial.js";
import { errorOf, PushError, unusable } from "./errors.js";
import { encode, methods, type Message, type PushOptions, type Target } from "./message.js";
import {
  disconnectedOf, disconnectMethod, disconnectRequest, eventOf, memberOf, membersMethod, membersRequest, presenceOf, usersMethod, usersRequest, watchMethod, watchRequest,
  type CallOptions, type Disconnected, type DisconnectOptions, type DisconnectTarget, type Presence, type PresenceEvent, type RoomMember, type WatchOptions,
} from "./presence.js";
import type { Result } from "./result.js";
import { Budget, pause, Tries, type Retries, type Retry } from "./retry.js";
import { Stream, type StreamConfig } from "./stream.js";

/** Of a Client. */
export interface ClientConfig extends Dial {
  /** For pushes without a timeout of their own, in milliseconds. Default: 5,000. */
  timeout?: number;
  retries?: Retries;
  /** Called before each push that is repeated, for metrics and logs. */
  onRetry?: (r: Retry) => void;
}

/** Pushes over connections to all instances, in turn. */
export class Client {
  private readonly channels: Channels;
  private readonly budget: Budget;
  private readonly timeout: number;

  /** Nothing is connected yet. A RangeError is about the configuration. */
  constructor(cfg: ClientConfig) {
    this.timeout = cfg.timeout ?? 5000;
    if (!(this.timeout > 0)) throw new RangeError(`timeout: ${this.timeout} must be above zero`);
    this.budget = new Budget(cfg.retries ?? {}, cfg.onRetry);
    this.channels = new Channels(cfg);
  }

  /** Ends the connections. Calls that are open end with an error. Close Streams first. */
  close(): void {
    this.channels.close();
  }

  /** Pushes to all connections of a user. */
  pushToUser(user: string, message: Message, o: PushOptions = {}): Promise<Result> {
    return this.push({ user }, message, o);
  }

  /** Pushes to several users, 10,000 by default at most. Each counts once. */
  pushToUsers(users: readonly string[], message: Message, o: PushOptions = {}): Promise<Result> {
    return this.push({ users }, message, o);
  }

  /** Pushes to the members of a room. */
  pushToRoom(room: string, message: Message, o: PushOptions = {}): Promise<Result> {
    return this.push({ room }, message, o);
  }

  /** Pushes to the members of several rooms, 1,000 by default at most, each user once. A client sees the first of them that it is in. */
  pushToRooms(rooms: readonly string[], message: Message, o: PushOptions = {}): Promise<Result> {
    return this.push({ rooms }, message, o);
  }

  /** Pushes to everybody who is connected. */
  broadcast(message: Message, o: PushOptions = {}): Promise<Result> {
    return this.push({ everybody: true }, message, o);
  }

  /** Pushes to a target. What Push-Manager has answered is a Result, also if the push failed; anything else is a PushError. */
  async push(to: Target, message: Message, o: PushOptions = {}): Promise<Result> {
    const e = encode(to, message, o);
    const { path, read } = methods[e.kind];
    return this.tryCall(path, e.bytes, read, o, e.messageId);
  }

  /** The members of a room, read page by page. Whoever is in it all the time comes once; who comes or goes meanwhile may come or not. */
  async *roomMembers(room: string, o: CallOptions = {}): AsyncGenerator<RoomMember, void, undefined> {
    const given = new Set<string>();
    let token = "";
    do {
      const page = await this.tryCall(membersMethod.path, membersRequest(room, token), membersMethod.read, o);
      for (const m of page.members) {
        const at = `${m.userId}\0${m.nodeId}`;
        if (given.has(at)) continue;
        given.add(at);
        yield memberOf(m);
      }
      token = page.nextPageToken;
    } while (token !== "");
  }

  /** Where users are, 1 to 1,000 of them: each entry is about the user at its place. */
  async presence(users: readonly string[], o: CallOptions = {}): Promise<Presence[]> {
    return presenceOf(await this.tryCall(usersMethod.path, usersRequest(users), usersMethod.read, o));
  }

  /**
   * Who enters and leaves a room: all there is, and then what changes, until o.signal or a break of the loop ends it. It throws a PushError when it
   * breaks, as when an instance stops: begin again with the last position. The timeout is for reaching an instance.
   */
  watchRoom(room: string, o: WatchOptions = {}): AsyncGenerator<PresenceEvent, void, undefined> {
    return this.watch(watchRequest({ room }, o.position ?? ""), o);
  }

  /** Where a user is: connections, nodes and rooms. As watchRoom. */
  watchUser(user: string, o: WatchOptions = {}): AsyncGenerator<PresenceEvent, void, undefined> {
    return this.watch(watchRequest({ user }, o.position ?? ""), o);
  }

  /** Closes connections on all Connect-Nodes. After a PushError with notSent nobody was disconnected; after another one they may have been. */
  async disconnect(of: DisconnectTarget, o: DisconnectOptions = {}): Promise<Disconnected> {
    return disconnectedOf(await this.tryCall(disconnectMethod.path, disconnectRequest(of, o, false), disconnectMethod.read, o));
  }

  /** Ends what disconnect with refuseFor has begun, for the same user, device or room. */
  async allowAgain(of: DisconnectTarget, o: CallOptions = {}): Promise<Disconnected> {
    return disconnectedOf(await this.tryCall(disconnectMethod.path, disconnectRequest(of, {}, true), disconnectMethod.read, o));
  }

  /** Calls until there is an answer, as often as that is safe. */
  private async tryCall<T>(path: string, bytes: Uint8Array, read: (b: Uint8Array) => T, o: CallOptions, messageId = ""): Promise<T> {
    const deadline = Date.now() + this.timeoutOf(o);
    const tries = new Tries(this.budget, messageId);
    for (;;) {
      try {
        return await this.call(path, bytes, read, deadline, o.signal);
      } catch (error) {
        if (!(error instanceof PushError)) throw error;
        const delay = tries.next(error, deadline - Date.now());
        if (delay === undefined) throw tries.last!;
        if (!(await pause(delay, o.signal))) throw new PushError("the push was given up", { code: status.CANCELLED, notSent: !tries.maybe, tries: tries.n });
      }
    }
  }

  /** Starts a Stream, which its close ends. It opens its call with the first push. */
  stream(cfg: StreamConfig = {}): Stream {
    return new Stream(this.channels, this.budget, this.timeout, cfg);
  }

  private async *watch(bytes: Uint8Array, o: WatchOptions): AsyncGenerator<PresenceEvent, void, undefined> {
    const deadline = Date.now() + this.timeoutOf(o);
    const client = await this.channels.ready(deadline, o.signal);
    if (client === undefined) {
      if (o.signal?.aborted === true) return;
      throw new PushError("no instance could be reached in time", { code: status.DEADLINE_EXCEEDED, notSent: true });
    }
    const metadata = await this.channels.metadata(deadline, o.signal);
    const call = client.makeServerStreamRequest(watchMethod.path, (b: Uint8Array) => Buffer.from(b.buffer, b.byteOffset, b.byteLength), (b: Buffer) => b, bytes, metadata);
    call.on("error", () => undefined); // Of a call that nobody reads any more.
    const abort = (): void => call.cancel();
    o.signal?.addEventListener("abort", abort, { once: true });
    if (o.signal?.aborted === true) abort();
    try {
      for await (const b of call) yield eventOf(b as Buffer);
      throw unusable("the watch has ended");
    } catch (error) {
      if (o.signal?.aborted === true) return;
      throw error instanceof PushError ? error : errorOf(error as ServiceError, true);
    } finally {
      o.signal?.removeEventListener("abort", abort);
      call.cancel();
    }
  }

  private timeoutOf(o: CallOptions): number {
    const timeout = o.timeout ?? this.timeout;
    if (!(timeout > 0)) throw new RangeError(`timeout: ${timeout} must be above zero`);
    return timeout;
  }

  /** Makes one call, once. What could not be given to a connection goes to the next instance while there is time. */
  private async call<T>(path: string, bytes: Uint8Array, read: (b: Uint8Array) => T, deadline: number, signal: AbortSignal | undefined): Promise<T> {
    let last: PushError | undefined;
    for (;;) {
      const client = await this.channels.ready(deadline, signal);
      if (client === undefined) {
        if (signal?.aborted === true) throw new PushError("the push was given up", { code: status.CANCELLED, notSent: true });
        throw last ?? new PushError("no instance could be reached in time", { code: status.DEADLINE_EXCEEDED, notSent: true });
      }
      const metadata = await this.channels.metadata(deadline, signal);
      const target = client.getChannel().getTarget();
      let sent = false;
      let reply: Buffer;
      try {
        reply = await new Promise<Buffer>((resolve, reject) => {
          const abort = (): void => call.cancel();
          const call = client.makeUnaryRequest(
            path, (b: Uint8Array) => Buffer.from(b.buffer, b.byteOffset, b.byteLength), (b: Buffer) => b, bytes, metadata, { deadline },
            (error: ServiceError | null, b?: Buffer) => {
              signal?.removeEventListener("abort", abort);
              // gRPC names the peer once a connection has the call, and the target before that, when nothing can have left.
              sent = call.getPeer() !== target;
              if (error !== null || b === undefined) reject(error ?? unusable("the reply is empty"));
              else resolve(b);
            },
          );
          signal?.addEventListener("abort", abort, { once: true });
          if (signal?.aborted === true) abort();
        });
      } catch (error) {
        if (error instanceof PushError) throw error;
        last = errorOf(error as ServiceError, sent);
        if (!sent && last.code === status.UNAVAILABLE && last.reason === "" && Date.now() < deadline) {
          await pause(10, signal);
          continue;
        }
        throw last;
      }
      try {
        return read(reply);
      } catch (error) {
        throw error instanceof PushError ? error : unusable(`the reply cannot be read: ${error instanceof Error ? error.message : String(error)}`);
      }
    }
  }
}
