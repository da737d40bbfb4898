import { status, type ServiceError } from "@grpc/grpc-js";
import { Channels, type Dial } from "./dial.js";
import { errorOf, PushError, unusable } from "./errors.js";
import { encode, methods, type Encoded, type Message, type PushOptions, type Target } from "./message.js";
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
    const deadline = Date.now() + this.timeoutOf(o);
    const tries = new Tries(this.budget, e.messageId);
    for (;;) {
      try {
        return await this.call(e, deadline, o.signal);
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

  private timeoutOf(o: PushOptions): number {
    const timeout = o.timeout ?? this.timeout;
    if (!(timeout > 0)) throw new RangeError(`timeout: ${timeout} must be above zero`);
    return timeout;
  }

  /** Makes one call, once. What could not be given to a connection goes to the next instance while there is time. */
  private async call(e: Encoded, deadline: number, signal: AbortSignal | undefined): Promise<Result> {
    const { path, read } = methods[e.kind];
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
            path, (b: Uint8Array) => Buffer.from(b.buffer, b.byteOffset, b.byteLength), (b: Buffer) => b, e.bytes, metadata, { deadline },
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
