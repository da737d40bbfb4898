import { randomBytes } from "node:crypto";
import { create, fromBinary, toBinary, type DescMessage, type MessageShape } from "@bufbuild/protobuf";
import {
  Server, ServerCredentials, status, type sendUnaryData, type ServerUnaryCall, type ServiceDefinition,
} from "@grpc/grpc-js";
import { Handover } from "./acks.js";
import { Registration, type EtcdConfig } from "./etcd.js";
import { attributesOf, checkText, matches, type Attributes } from "./filter.js";
import {
  BroadcastRequestSchema, BroadcastResponseSchema, DeliverResponseSchema, Feature, ListConnectionsRequestSchema, ListConnectionsResponseSchema, ListUsersRequestSchema, ListUsersResponseSchema, PushMessageBatchRequestSchema, PushMessageBatchResponseSchema,
  PushMessageRequestSchema, PushMessageResponseSchema,
  type BroadcastRequest, type BroadcastResponse, type DeliverResponse, type Disconnect, type Hello, type ListConnectionsRequest, type ListUsersRequest, type ListUsersResponse, type PushMessageBatchRequest, type PushMessageBatchResponse,
  type PushMessageRequest, type PushMessageResponse,
} from "./gen/connect_node_pb.js";
import type { Match } from "./gen/message_pb.js";
import { Listing } from "./listing.js";
import { Reporter, reserved } from "./membership.js";
import { clock, inRoom, messageOf, watch, worth, type Message, type Options, type Outcome, type Several } from "./message.js";
import type { Confirmation } from "./receipts.js";
import { RefusedError, Refusals, type Words } from "./refusals.js";
import { Replays } from "./replay.js";
import { Session, type CloseReason, type Connection, type SessionHost, type SessionLimits } from "./session.js";
import { Stream, StreamEnd, type DeliverCall, type StreamHost } from "./stream.js";
import { clientCredentials, isPushManager, serverCredentials, type TlsFiles } from "./tls.js";

/** What a node is. Only nodeId is required. */
export interface Config {
  /** The id under which the node is registered: 1 to 250 bytes. */
  nodeId: string;
  /** HOST:PORT for Push-Managers; port 0: any that is free. Default: 127.0.0.1:50052. */
  listen?: string;
  /** HOST:PORT as Push-Managers reach it. Default: listen, with the port that was taken. */
  advertise?: string;
  /** Where the node registers. Left out: it does not. */
  etcd?: EtcdConfig;
  /** The Controller that is told who is here: HOST:PORT, or any other gRPC target. Left out: nobody is told, and joined is called at once. */
  controller?: string;
  /** Default: the Controller is reached in plain text. */
  controllerTls?: TlsFiles;
  /** Push-Managers come over TLS, with a certificate that names them spiffe://<trustDomain>/push-manager/<id>. Default: plain text, whoever comes. */
  tls?: TlsFiles & { trustDomain: string };

  /** False: the node leaves out all of lasting delivery (message ids, acknowledgements by clients, expiry, collapse keys, replay). Default: true. */
  lasting?: boolean;
  /** Bytes that wait in a connection (Connection.buffered) beyond which nothing more is written to it. Default: 64 KiB. */
  highWater?: number;
  /** What waits for a connection beyond that, in pushes and bytes. A connection with more is closed as slow. Default: 1,024 and 1 MiB. */
  queueFrames?: number;
  queueBytes?: number;
  /** Members of all audiences of one stream, about 100 bytes each. Default: 1,048,576; 0: each delivery names its users. */
  maxAudienceMembers?: number;
  /** Deliveries of one stream without an ack. Default: 65,536. */
  maxUnacked?: number;
  /** Streams of all Push-Managers together. Default: 4,096. */
  maxStreams?: number;
  /**
   * Pushes to a room reach all connections of the users whom the Controller names, and not only those that have joined it here: for Controllers
   * that fill rooms by themselves. Default: false.
   */
  anyRoom?: boolean;
  /** Rooms of one connection. Default: 100. */
  maxRooms?: number;
  /** Connections. Default: 1,048,576. */
  maxSessions?: number;

  /** Told what a callback of the gateway has thrown, and other faults that end nothing. Default: they are written to stderr, one a second at most. */
  onError?: (what: string, error: unknown) => void;
  /** Told when the node is in etcd, or is not any more, and when the Controller is reached, or is not any more. Default: nobody is. */
  onState?: (part: "etcd" | "controller", up: boolean, why: string) => void;
}

/** Of a new connection. */
export interface ConnectOptions {
  /** The user's id: 1 to 256 bytes of UTF-8 without control characters; of a tenant's user 288, with "tenant/" before it. */
  user: string;
  /** A name for people, which the Controller gets. */
  name?: string;
  /** The client acknowledges pushes (Session.ack). */
  acks?: boolean;
  /**
   * What pushes with a filter look at, such as device_id, platform and app_version: at most 16, keys and values of 1 to 64 bytes. What proves who the
   * client is should win over what the client says.
   */
  attributes?: Attributes;
}

/** What a node counts, since its start. */
export interface Stats {
  /** Users and connections now. */
  users: number;
  sessions: number;
  streams: number;
  /** Reports that the Controller has not taken. */
  pendingReports: number;
  deliveries: number;
  /** Streams that broke a rule of the protocol. */
  broken: number;
  /** Errors that onError was told. */
  errors: number;
}

const notManager = "the certificate is not that of a Push-Manager";
const maxId = 288;
/** Throws a RangeError that names the field for what is no id. */
export function checkId(field: string, id: string): void {
  checkText(field, id, maxId);
}

const codec = <T extends DescMessage>(schema: T): { serialize: (m: MessageShape<T>) => Buffer; deserialize: (b: Buffer) => MessageShape<T> } => ({
  serialize: (m) => Buffer.from(toBinary(schema, m)),
  deserialize: (b) => fromBinary(schema, b, { readUnknownFields: false }),
});

function unary<I extends DescMessage, O extends DescMessage>(name: string, input: I, output: O): ServiceDefinition[string] {
  return {
    path: `/pubsub.ConnectNodeService/${name}`, requestStream: false, responseStream: false,
    requestSerialize: codec(input).serialize, requestDeserialize: codec(input).deserialize,
    responseSerialize: codec(output).serialize, responseDeserialize: codec(output).deserialize,
  };
}

const service: ServiceDefinition = {
  pushMessage: unary("PushMessage", PushMessageRequestSchema, PushMessageResponseSchema),
  pushMessageBatch: unary("PushMessageBatch", PushMessageBatchRequestSchema, PushMessageBatchResponseSchema),
  broadcast: unary("Broadcast", BroadcastRequestSchema, BroadcastResponseSchema),
  listUsers: unary("ListUsers", ListUsersRequestSchema, ListUsersResponseSchema),
  listConnections: unary("ListConnections", ListConnectionsRequestSchema, ListConnectionsResponseSchema),
  deliver: {
    path: "/pubsub.ConnectNodeService/Deliver", requestStream: true, responseStream: true,
    // Frames are taken apart by the stream, which says what is wrong with them.
    requestSerialize: (b: Buffer) => b, requestDeserialize: (b: Buffer) => b,
    responseSerialize: (r: DeliverResponse) => Buffer.from(toBinary(DeliverResponseSchema, r)), responseDeserialize: (b: Buffer) => b,
  },
};

/**
 * A Connect-Node: it takes what Push-Managers deliver and hands it to the connections of the gateway, says in etcd that it is here, and tells the
 * Controller who is. The gateway calls connect for each client, and has its Connection called.
 */
export class ConnectNode {
  /** Tells this process from another one of the same node. */
  readonly bootId = randomBytes(16).toString("hex");

  private readonly cfg: Required<Pick<Config, "nodeId" | "listen" | "maxAudienceMembers" | "maxUnacked" | "maxStreams" | "maxSessions">> & Config;
  private readonly users = new Map<string, readonly Session[]>();
  private readonly listing = new Listing(this.users);
  private readonly streams = new Set<Stream>();
  private readonly seats = new Map<string, { newest: Stream; streams: number }>();
  private readonly replays: Replays;
  private readonly refusals = new Refusals();
  private readonly watched = new Set<Session>();
  private readonly host: SessionHost;
  private readonly streamHost: StreamHost;
  private readonly counts = { deliveries: 0, broken: 0, errors: 0 };
  private reporter: Reporter | undefined;
  private server: Server | undefined;
  private registration: Registration | undefined;
  private wasLost = false;
  private sessions = 0;
  private isDraining = false;
  private leaving: Promise<void> | undefined;
  private watcher: NodeJS.Timeout | undefined;
  private complained = -Infinity;

  constructor(cfg: Config) {
    checkId("nodeId", cfg.nodeId);
    if (Buffer.byteLength(cfg.nodeId) > 250) throw new RangeError("nodeId: more than 250 bytes");
    for (const field of ["highWater", "queueFrames", "queueBytes", "maxAudienceMembers", "maxUnacked", "maxStreams", "maxRooms", "maxSessions"] as const) {
      const n = cfg[field];
      if (n !== undefined && (!Number.isSafeInteger(n) || n < (field === "maxAudienceMembers" ? 0 : 1) || n > 0xffff_ffff)) {
        throw new RangeError(`${field}: ${n} is no number that is possible`);
      }
    }
    if (cfg.etcd !== undefined) {
      if (cfg.etcd.endpoints.length === 0) throw new RangeError("etcd.endpoints: must not be empty");
      if (cfg.etcd.tls === undefined && cfg.etcd.endpoints.some((e) => e.startsWith("https://"))) throw new RangeError("etcd.tls: is missing, and an endpoint begins with https");
      if (cfg.advertise === undefined && /^(0\.0\.0\.0|\[::\]):\d+$/.test(cfg.listen ?? "")) {
        throw new RangeError("advertise: is missing, and listen names no address at which others reach the node");
      }
    }
    if (cfg.tls !== undefined && !/^[a-z0-9._-]+$/.test(cfg.tls.trustDomain)) throw new RangeError("tls.trustDomain: must be lower-case letters, digits, dots, - and _");
    this.cfg = {
      ...cfg, listen: cfg.listen ?? "127.0.0.1:50052", maxAudienceMembers: cfg.maxAudienceMembers ?? 1 << 20, maxUnacked: cfg.maxUnacked ?? 64 << 10,
      maxStreams: cfg.maxStreams ?? 4096, maxSessions: cfg.maxSessions ?? 1 << 20,
    };
    const limits: SessionLimits = { highWater: cfg.highWater ?? 64 << 10, queueFrames: cfg.queueFrames ?? 1024, queueBytes: cfg.queueBytes ?? 1 << 20 };
    this.replays = new Replays(this.cfg.maxSessions, (s) => s.opened());
    this.host = {
      limits,
      watch: (s) => {
        this.watched.add(s);
        this.watcher ??= setInterval(() => this.lookAtAll(), 10);
      },
      cut: (s, why) => this.cut(s, why),
      caught: (what, error) => this.caught(what, error),
      onEnd: (s) => this.ended(s),
      join: (s, room) => {
        checkId("room_id", room);
        if (room.startsWith(reserved)) throw new RangeError(`room_id: names that begin with ${reserved} are reserved`);
        if (s.isOver) return;
        const refusal = this.refusals.ofRoom(room);
        if (refusal !== undefined) {
          this.tell(s, () => s.connection.refused?.(room, `refused: ${refusal.reason}`));
          return;
        }
        if (this.reporter !== undefined) return this.reporter.join(s, room);
        s.rooms.add(room);
        this.tell(s, () => s.connection.joined?.(room));
      },
      leave: (s, room) => {
        checkId("room_id", room);
        if (s.isOver) return;
        if (this.reporter !== undefined) return this.reporter.leave(s, room);
        if (!s.rooms.delete(room)) throw new RangeError("room_id: not in this room");
        this.tell(s, () => s.connection.left?.(room));
      },
    };
    const lasting = [Feature.DEDUPE, Feature.CLIENT_ACK, Feature.EXPIRY, Feature.COLLAPSE, Feature.REPLAY];
    const node = this; // eslint-disable-line @typescript-eslint/no-this-alias -- for the getter
    this.streamHost = {
      nodeId: cfg.nodeId, bootId: this.bootId, maxAudienceMembers: this.cfg.maxAudienceMembers, maxUnacked: this.cfg.maxUnacked,
      features: [Feature.SCOPE, Feature.FILTER, Feature.ROOMS, Feature.DISCONNECT, ...(cfg.lasting === false ? [] : lasting)], replays: this.replays, counts: this.counts,
      get isDraining() {
        return node.isDraining;
      },
      online: () => this.users.size,
      enter: (s, hello) => this.enter(s, hello),
      leave: (s) => this.left(s),
      deliverTo: (user, filter, m, o, c) => this.deliverTo(user, filter, m, o, c),
      broadcast: (scope, filter, m, o, h) => this.broadcast(scope, filter, m, o, h),
      disconnect: (d) => this.disconnect(d),
      caught: (what, error) => this.caught(what, error),
    };
  }

  /** Listens, reports and registers. Resolves once Push-Managers can connect: etcd and the Controller need not be there yet. Returns the address that is registered. */
  async start(): Promise<string> {
    if (this.server !== undefined) throw new Error("the node was started before");
    const creds = this.cfg.tls === undefined ? ServerCredentials.createInsecure() : serverCredentials("tls", this.cfg.tls);
    const server = new Server({
      "grpc.max_receive_message_length": 16 << 20, "grpc.max_send_message_length": -1,
      "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 3000, "grpc-node.flow_control_window": 1 << 20,
    });
    this.server = server;
    server.addService(service, {
      pushMessage: this.answer((r: PushMessageRequest) => this.pushMessage(r)),
      pushMessageBatch: this.answer((r: PushMessageBatchRequest) => this.pushMessageBatch(r)),
      broadcast: this.answer((r: BroadcastRequest) => this.pushToAll(r)),
      listUsers: (call: ServerUnaryCall<ListUsersRequest, ListUsersResponse>, callback: sendUnaryData<ListUsersResponse>) => void this.listUsers(call, callback),
      listConnections: this.answer((r: ListConnectionsRequest) => this.listing.connections(r), true),
      deliver: (call: DeliverCall) => this.accept(call),
    });
    const port = await new Promise<number>((resolve, reject) => {
      server.bindAsync(this.cfg.listen, creds, (error, bound) => (error !== null ? reject(error) : resolve(bound)));
    });
    const address = this.cfg.advertise ?? this.cfg.listen.replace(/:\d+$/, `:${port}`);
    if (this.cfg.controller !== undefined) {
      this.reporter = new Reporter({
        nodeId: this.cfg.nodeId, bootId: this.bootId, controller: this.cfg.controller,
        credentials: this.cfg.controllerTls === undefined ? undefined : clientCredentials("controllerTls", this.cfg.controllerTls),
        timeout: 5000, workers: 32, syncInterval: 2000, rejoinPerSecond: 5000, maxRooms: this.cfg.maxRooms ?? 100,
        caught: (what, error) => this.caught(what, error),
        reached: (ready) => this.state("controller", ready, ready ? "" : "not connected"),
      });
    }
    if (this.cfg.etcd !== undefined) {
      this.registration = new Registration(this.cfg.etcd, this.cfg.nodeId, address, this.bootId, {
        changed: (up, why) => {
          if (up && this.wasLost) this.reporter?.reportAgain();
          this.wasLost = !up;
          this.state("etcd", up, why);
        },
        refused: (stands, revision, all) => {
          this.refusals.list(stands, revision, all);
          this.refuseAll();
        },
      });
    }
    return address;
  }

  /** Whether the node stands in etcd and the Controller is reached, as far as either is used. */
  get isReady(): boolean {
    return (this.registration?.isRegistered ?? this.cfg.etcd === undefined) && (this.reporter?.isReached ?? this.cfg.controller === undefined) && !this.isDraining;
  }

  /**
   * Adds a client. Its Connection.joined("") tells when pushes to the user arrive. Throws a RangeError for what is no id, and when the node is full
   * or leaves, and a RefusedError for a user or a device that a service keeps away: close the connection with its code and reason.
   */
  connect(connection: Connection, o: ConnectOptions): Session {
    checkId("user_id", o.user);
    if (o.name !== undefined && o.name !== "") checkId("user_name", o.name);
    const attributes = attributesOf(o.attributes ?? {});
    if (this.server === undefined) throw new RangeError("node is not started");
    const refusal = this.refusals.of(o.user, attributes.get("device_id") ?? "");
    if (refusal !== undefined) throw new RefusedError(refusal.code, refusal.reason);
    if (this.isDraining) throw new RangeError("node is going");
    if (this.sessions >= this.cfg.maxSessions) throw new RangeError(`node is full: ${this.sessions} connections`);
    const s = new Session(o.user, o.name ?? "", connection, o.acks ?? false, attributes, this.host);
    if (this.cfg.lasting !== false) s.gate = this.replays.gate(s, 32);
    this.sessions++;
    this.users.set(o.user, [...(this.users.get(o.user) ?? []), s]);
    if (this.reporter !== undefined) {
      this.reporter.join(s, this.reporter.presence);
    } else {
      this.tell(s, () => {
        s.gate?.ready();
        return connection.joined?.("");
      });
    }
    return s;
  }

  get stats(): Stats {
    return {
      users: this.users.size, sessions: this.sessions, streams: this.streams.size, pendingReports: this.reporter?.pending ?? 0,
      deliveries: this.counts.deliveries, broken: this.counts.broken, errors: this.counts.errors,
    };
  }

  /**
   * Leaves in good order: out of etcd, every Push-Manager told, everybody reported gone, then the connections closed with what was written to
   * them before, then the server ended. Takes about as long as it may at most, in milliseconds.
   */
  stop(ms = 10_000): Promise<void> {
    this.leaving ??= this.leave(ms);
    return this.leaving;
  }

  private async leave(ms: number): Promise<void> {
    const until = clock() + ms;
    const left = (): number => Math.max(until - clock(), 0);
    const within = (p: Promise<unknown>, limit: number): Promise<unknown> =>
      Promise.race([p.catch((error: unknown) => this.caught("stop", error)), new Promise((go) => setTimeout(go, limit).unref())]);
    if (this.registration !== undefined) await within(this.registration.close(), Math.min(left(), 3000));
    this.isDraining = true;
    for (const s of this.streams) s.drain();
    const gone = this.reporter?.drain(left() / 2) ?? Promise.resolve();
    const half = clock() + left() / 2;
    while (this.streams.size > 0 && clock() < half) await new Promise((go) => setTimeout(go, 20));
    await within(gone, left());
    while (clock() < until && [...this.users.values()].some((of) => of.some((s) => !s.isWritten))) await new Promise((go) => setTimeout(go, 20));
    for (const of of [...this.users.values()]) for (const s of of) this.cut(s, "going");
    for (const s of this.streams) s.cut();
    this.replays.stop();
    clearInterval(this.watcher);
    this.reporter?.close();
    const server = this.server;
    if (server !== undefined) {
      await Promise.race([new Promise((go) => server.tryShutdown(go)), new Promise((go) => setTimeout(go, Math.min(left(), 500)))]);
      server.forceShutdown();
    }
  }

  /** Whether the caller may push here. */
  private mayCall(call: Pick<DeliverCall, "getAuthContext">): boolean {
    return this.cfg.tls === undefined || isPushManager(call.getAuthContext().sslPeerCertificate, this.cfg.tls.trustDomain);
  }

  private accept(call: DeliverCall): void {
    if (!this.mayCall(call)) {
      call.emit("error", { code: status.PERMISSION_DENIED, details: notManager });
      return;
    }
    if (this.isDraining) {
      call.emit("error", { code: status.UNAVAILABLE, details: "node is draining" });
      return;
    }
    if (this.streams.size >= this.cfg.maxStreams) {
      call.emit("error", { code: status.RESOURCE_EXHAUSTED, details: `more than ${this.cfg.maxStreams} streams` });
      return;
    }
    this.streams.add(new Stream(this.streamHost, call));
  }

  /** Gives a stream that has said hello its seat. The one before it in the seat is superseded; nothing of it is in anybody's hands now. */
  private enter(s: Stream, hello: Hello): void {
    if (this.isDraining) throw new StreamEnd(status.UNAVAILABLE, "node is draining");
    // Who takes this node for another one hangs up when it hears who we are.
    if (hello.instanceId === "" || (hello.nodeId !== "" && hello.nodeId !== this.cfg.nodeId)) return;
    s.attempt = hello.attempt;
    const key = `${hello.shard}\0${hello.instanceId}`;
    const at = this.seats.get(key);
    if (at !== undefined && s.attempt !== 0n && at.newest.attempt > s.attempt) {
      throw new StreamEnd(status.ABORTED, "a newer stream of the same instance and shard was here before");
    }
    s.seat = key;
    if (at === undefined) {
      this.seats.set(key, { newest: s, streams: 1 });
      return;
    }
    const before = at.newest;
    at.newest = s;
    at.streams++;
    before.supersede();
  }

  private left(s: Stream): void {
    this.streams.delete(s);
    const at = this.seats.get(s.seat);
    if (s.seat !== "" && at !== undefined && --at.streams === 0) this.seats.delete(s.seat);
  }

  private deliverTo(user: string, filter: readonly Match[], m: Message, o: Options | undefined, c: Confirmation | undefined): Outcome {
    return this.offer(this.users.get(user), filter, m, o, c);
  }

  /** The best of what becomes of a message for the connections of one user. */
  private offer(of: readonly Session[] | undefined, filter: readonly Match[], m: Message | Several, o: Options | undefined, c: Confirmation | undefined): Outcome {
    let best: Outcome = "notHere";
    for (const s of of ?? []) {
      if (m.roomId !== "" && this.cfg.anyRoom !== true && !s.isIn(m.roomId)) continue;
      const shown = "rooms" in m ? inRoom(m, this.cfg.anyRoom === true ? undefined : s.rooms) : m;
      if (shown === undefined) continue;
      let out: Outcome = "filtered";
      if (matches(filter, s.attributes)) {
        out = "failed";
        try {
          out = s.offer(shown, o, c);
        } catch (error) {
          this.caught("offer", error);
        }
      }
      if (worth[out] > worth[best]) best = out;
    }
    return best;
  }

  private broadcast(scope: string, filter: readonly Match[], m: Message, o: Options | undefined, h: Handover): void {
    for (const [user, of] of [...this.users]) {
      if (scope !== "" && !user.startsWith(scope)) continue;
      const out = this.offer(of, filter, m, o, undefined);
      if (worth[out] >= worth.duplicate) h.delivered++;
      else if (out === "filtered") h.filtered++;
      else if (out !== "notHere") h.failedUsers++;
    }
  }

  /** It answers while the node drains, too: whom a job does not find it does not come back to. */
  private async listUsers(call: ServerUnaryCall<ListUsersRequest, ListUsersResponse>, callback: sendUnaryData<ListUsersResponse>): Promise<void> {
    try {
      if (!this.mayCall(call)) throw new StreamEnd(status.PERMISSION_DENIED, notManager);
      callback(null, await this.listing.list(call.request));
    } catch (error) {
      this.failed(error, callback);
    }
  }

  private failed<O>(error: unknown, callback: sendUnaryData<O>): void {
    if (!(error instanceof StreamEnd)) this.caught("unary", error);
    callback(error instanceof StreamEnd ? { code: error.code, details: error.message } : { code: status.UNKNOWN, details: "internal error of the node" });
  }

  private answer<I, O>(f: (r: I) => O, whileDraining = false): (call: ServerUnaryCall<I, O>, callback: sendUnaryData<O>) => void {
    return (call, callback) => {
      try {
        if (!this.mayCall(call)) throw new StreamEnd(status.PERMISSION_DENIED, notManager);
        // Not UNAVAILABLE, which also says that a connection broke and leaves the manager in doubt.
        if (this.isDraining && !whileDraining) throw new StreamEnd(status.FAILED_PRECONDITION, "node is draining");
        callback(null, f(call.request));
      } catch (error) {
        this.failed(error, callback);
      }
    };
  }

  private pushMessage(r: PushMessageRequest): PushMessageResponse {
    if (r.userId === "") throw new StreamEnd(status.INVALID_ARGUMENT, "user_id: required");
    if (r.content === undefined) throw new StreamEnd(status.INVALID_ARGUMENT, "content: required");
    const out = this.deliverTo(r.userId, [], messageOf(r.content, r.roomId, false), undefined, undefined);
    if (out === "failed") throw new StreamEnd(status.RESOURCE_EXHAUSTED, "no connection took it");
    const here = out === "delivered";
    return create(PushMessageResponseSchema, { success: here, message: here ? "" : `user ${JSON.stringify(r.userId)} is not here` });
  }

  private pushMessageBatch(r: PushMessageBatchRequest): PushMessageBatchResponse {
    if (r.userIds.length === 0) throw new StreamEnd(status.INVALID_ARGUMENT, "user_ids: required, empty is not everybody");
    if (r.userIds.includes("")) throw new StreamEnd(status.INVALID_ARGUMENT, "user_ids: must not have an empty id");
    if (r.content === undefined) throw new StreamEnd(status.INVALID_ARGUMENT, "content: required");
    const h = new Handover();
    const m = messageOf(r.content, r.roomId, false);
    for (const user of r.userIds) h.note(user, this.deliverTo(user, [], m, undefined, undefined));
    return create(PushMessageBatchResponseSchema, {
      success: h.notHere.length + h.failed.length === 0, deliveredCount: h.delivered, failedUserIds: h.notHere, unreachedUserIds: h.failed,
      message: h.failed.length > 0 ? "no connection took it" : "",
    });
  }

  private pushToAll(r: BroadcastRequest): BroadcastResponse {
    if (r.content === undefined) throw new StreamEnd(status.INVALID_ARGUMENT, "content: required");
    const h = new Handover();
    this.broadcast("", [], messageOf(r.content, "", true), undefined, h);
    return create(BroadcastResponseSchema, {
      success: h.failedUsers === 0, deliveredCount: h.delivered, unreachedCount: h.failedUsers, message: h.failedUsers > 0 ? "no connection took it" : "",
    });
  }

  /** Without a Controller: later, as with one. */
  private tell(s: Session, f: () => unknown): void {
    queueMicrotask(() => {
      if (s.isOver) return;
      try {
        watch(f(), (error) => this.caught("joined", error));
      } catch (error) {
        this.caught("joined", error);
      }
    });
  }

  /** Nothing of it waits: from here to the next connection nobody comes in between. */
  private disconnect(d: Disconnect): number {
    this.refusals.take(d);
    if (d.allowAgain) return 0;
    const said: Words = { code: d.code, reason: d.reason };
    let n = 0;
    const of = d.roomId === "" ? (this.users.get(d.userId) ?? []) : [...this.users.values()].flat();
    for (const s of of) {
      if (s.isOver || (d.deviceId !== "" && s.device !== d.deviceId) || (d.roomId !== "" && !s.isIn(d.roomId))) continue;
      this.cut(s, "disconnected", said);
      n++;
    }
    return n;
  }

  /** Closes connections that etcd says are refused: a Push-Manager could not tell this node. */
  private refuseAll(): void {
    for (const of of [...this.users.values()]) {
      for (const s of of) {
        let said = this.refusals.of(s.user, s.device);
        for (const room of s.rooms) said ??= this.refusals.ofRoom(room);
        if (said !== undefined) this.cut(s, "disconnected", said);
      }
    }
  }

  private cut(s: Session, why: CloseReason, said?: Words): void {
    if (s.isOver) return;
    s.end();
    try {
      watch(s.connection.close(why, said), (error) => this.caught("close", error));
    } catch (error) {
      this.caught("close", error);
    }
  }

  private ended(s: Session): void {
    this.watched.delete(s);
    this.sessions--;
    const rest = (this.users.get(s.user) ?? []).filter((other) => other !== s);
    if (rest.length === 0) this.users.delete(s.user);
    else this.users.set(s.user, rest);
    if (this.reporter !== undefined) this.reporter.end(s);
    else s.rooms.clear();
  }

  private lookAtAll(): void {
    const now = clock();
    for (const s of [...this.watched]) {
      let more = false;
      try {
        more = s.look(now);
      } catch (error) {
        this.caught("look", error);
      }
      if (!more) this.watched.delete(s);
    }
    if (this.watched.size === 0) {
      clearInterval(this.watcher);
      this.watcher = undefined;
    }
  }

  private caught(what: string, error: unknown): void {
    this.counts.errors++;
    if (this.cfg.onError !== undefined) {
      try {
        this.cfg.onError(what, error);
        return;
      } catch {
        // It is told like all others.
      }
    }
    if (clock() - this.complained < 1000) return;
    this.complained = clock();
    process.stderr.write(`connect-node: ${what}: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`);
  }

  private state(part: "etcd" | "controller", up: boolean, why: string): void {
    try {
      watch(this.cfg.onState?.(part, up, why), (error) => this.caught("onState", error));
    } catch (error) {
      this.caught("onState", error);
    }
  }
}
