import { create, fromBinary, toBinary, type DescMessage, type MessageShape } from "@bufbuild/protobuf";
import { Client, credentials, Metadata, status, type ServiceError } from "@grpc/grpc-js";
import {
  AuthenticateRequestSchema, AuthenticateResponseSchema, CompareSchema, Compare_CompareTarget, LeaseGrantRequestSchema, LeaseGrantResponseSchema,
  LeaseKeepAliveRequestSchema, LeaseKeepAliveResponseSchema, LeaseRevokeRequestSchema, LeaseRevokeResponseSchema, PutRequestSchema, PutResponseSchema,
  RangeRequestSchema, RangeResponseSchema, RequestOpSchema, TxnRequestSchema, TxnResponseSchema,
} from "./gen/etcd_pb.js";
import { clock } from "./message.js";
import { mostRefusals, refusedPrefix } from "./refusals.js";
import { clientCredentials, type TlsFiles } from "./tls.js";

/** Where etcd is. */
export interface EtcdConfig {
  /** HOST:PORT of each member. */
  endpoints: string[];
  username?: string;
  password?: string;
  /** Default: plain text. */
  tls?: TlsFiles;
}

const prefix = "/services/connect-node/";
/** Of the lease, in seconds, as Push-Manager's documents have it. */
const ttl = 10;
/** How often the key is looked at: one that was deleted, or lost with etcd's data, is written again. */
const checkEvery = 3000;
/** How often it is read who is refused. Push-Managers tell it, too: this is for nodes that they do not reach, and that start later. */
const refusedEvery = 10_000;
const requestTimeout = 3000;
const minBackoff = 50;
const maxBackoff = 1000;

class LeaseLost extends Error {}

/** The few calls of etcd that a registration needs, to whichever member answers. */
class Etcd {
  private readonly clients: Client[];
  private at = 0;
  private token = "";

  constructor(private readonly cfg: EtcdConfig) {
    const creds = cfg.tls === undefined ? credentials.createInsecure() : clientCredentials("etcd.tls", cfg.tls);
    this.clients = cfg.endpoints.map((e) => new Client(e.replace(/^https?:\/\//, ""), creds, {
      "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 3000,
      "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 1000,
      "grpc.max_receive_message_length": 128 << 20, // All who are refused.
    }));
  }

  close(): void {
    for (const c of this.clients) c.close();
  }

  /** Makes one call. Where a member cannot be reached the next call goes to the next one. */
  async call<I extends DescMessage, O extends DescMessage>(path: string, input: I, output: O, request: MessageShape<I>, anonymous = false): Promise<MessageShape<O>> {
    if (this.cfg.username !== undefined && this.token === "" && !anonymous) await this.authenticate();
    try {
      return await new Promise((resolve, reject) => {
        this.clients[this.at]!.makeUnaryRequest(
          path, (m: MessageShape<I>) => Buffer.from(toBinary(input, m)), (b: Buffer) => fromBinary(output, b), request, this.metadata(), { deadline: Date.now() + requestTimeout },
          (error: ServiceError | null, reply?: MessageShape<O>) => (error !== null || reply === undefined ? reject(error ?? new Error("no reply")) : resolve(reply)),
        );
      });
    } catch (error) {
      this.failed(error);
      throw error;
    }
  }

  /** Renews a lease once. Returns the seconds that it has left, 0 if it is lost. */
  async keepAlive(id: bigint): Promise<number> {
    try {
      return await new Promise<number>((resolve, reject) => {
        const call = this.clients[this.at]!.makeBidiStreamRequest(
          "/etcdserverpb.Lease/LeaseKeepAlive", (m: MessageShape<typeof LeaseKeepAliveRequestSchema>) => Buffer.from(toBinary(LeaseKeepAliveRequestSchema, m)),
          (b: Buffer) => fromBinary(LeaseKeepAliveResponseSchema, b), this.metadata(), { deadline: Date.now() + requestTimeout },
        );
        call.once("data", (r: MessageShape<typeof LeaseKeepAliveResponseSchema>) => {
          resolve(Number(r.TTL));
          call.cancel();
        });
        call.on("error", reject); // After the answer it is that of cancel.
        call.once("end", () => reject(new Error("etcd ended the keep-alive without an answer")));
        call.write(create(LeaseKeepAliveRequestSchema, { ID: id }));
      });
    } catch (error) {
      this.failed(error);
      throw error;
    }
  }

  private async authenticate(): Promise<void> {
    const r = await this.call(
      "/etcdserverpb.Auth/Authenticate", AuthenticateRequestSchema, AuthenticateResponseSchema,
      create(AuthenticateRequestSchema, { name: this.cfg.username!, password: this.cfg.password ?? "" }), true,
    );
    this.token = r.token;
  }

  private metadata(): Metadata {
    const m = new Metadata();
    if (this.token !== "") m.set("token", this.token);
    return m;
  }

  private failed(error: unknown): void {
    const code = (error as Partial<ServiceError>).code;
    // With a token that an administrator's change of users has made old, etcd speaks of an invalid argument.
    if (code === status.UNAUTHENTICATED || code === status.INVALID_ARGUMENT) this.token = "";
    else if (code !== status.NOT_FOUND) this.at = (this.at + 1) % this.clients.length;
  }
}

/** What a registration says of itself. */
export interface RegistrationEvents {
  /** The key is there, or is not any more, and why. */
  changed(registered: boolean, why: string): void;
  /** What stands below the prefix of those who are refused, as of a revision, all or only some: after each registration, and every few seconds. */
  refused(stands: { key: string; value: string; revision: bigint }[], revision: bigint, all: boolean): void;
}

/**
 * Keeps a node's key in etcd, with a lease, through lost leases and restarts of etcd. The process that registers first under an id takes the key
 * from whoever has it; one that comes back from an outage leaves it to who has taken over since.
 */
export class Registration {
  private readonly etcd: Etcd;
  private readonly key: Uint8Array;
  private readonly value: Uint8Array;
  private readonly running: Promise<void>;
  private lease = 0n;
  private wasOurs = false;
  private isOurs = false;
  private stopped = false;
  private toldRefused = false;
  private wake: (() => void) | undefined;

  constructor(cfg: EtcdConfig, nodeId: string, address: string, bootId: string, private readonly events: RegistrationEvents) {
    this.etcd = new Etcd(cfg);
    this.key = Buffer.from(prefix + nodeId);
    this.value = Buffer.from(JSON.stringify({ Op: 0, Addr: address, Metadata: { node_id: nodeId, boot_id: bootId } }));
    this.running = this.run();
  }

  get isRegistered(): boolean {
    return this.isOurs;
  }

  /** Deletes the key, by revoking its lease, and ends. Where etcd cannot be told the key goes with the lease. */
  async close(): Promise<void> {
    this.stopped = true;
    this.wake?.();
    await this.running;
    try {
      if (this.lease !== 0n) {
        await this.etcd.call("/etcdserverpb.Lease/LeaseRevoke", LeaseRevokeRequestSchema, LeaseRevokeResponseSchema, create(LeaseRevokeRequestSchema, { ID: this.lease }));
      }
    } finally {
      this.isOurs = false;
      this.etcd.close();
    }
  }

  private async run(): Promise<void> {
    for (let failures = 0; !this.stopped; ) {
      const began = clock();
      try {
        await this.hold();
      } catch (error) {
        this.set(false, error instanceof Error ? error.message : String(error));
      }
      if (this.stopped) return;
      failures = clock() - began > 60_000 ? 0 : failures + 1;
      await this.pause(Math.min(minBackoff * 2 ** Math.min(failures, 8), maxBackoff) * (0.5 + Math.random() / 2));
    }
  }

  /** Takes a lease, writes the key and keeps both until the lease is lost. */
  private async hold(): Promise<void> {
    const granted = await this.etcd.call("/etcdserverpb.Lease/LeaseGrant", LeaseGrantRequestSchema, LeaseGrantResponseSchema, create(LeaseGrantRequestSchema, { TTL: BigInt(ttl) }));
    this.lease = granted.ID;
    if (this.stopped) return; // close revokes it.
    let renewed = clock();
    let checked = renewed;
    await this.readRefused();
    let read = renewed;
    await this.check(!this.wasOurs);
    while (!this.stopped) {
      await this.pause(1000);
      if (this.stopped) return;
      if (clock() - renewed >= (ttl * 1000) / 3) {
        try {
          if ((await this.etcd.keepAlive(this.lease)) <= 0) throw new LeaseLost("the lease is lost");
          renewed = clock();
        } catch (error) {
          if (error instanceof LeaseLost) throw error;
          if (clock() - renewed >= ttl * 1000) throw error;
        }
      }
      if (clock() - read >= refusedEvery) {
        read = clock();
        await this.readRefused();
      }
      if (clock() - checked < checkEvery) continue;
      checked = clock();
      try {
        await this.check(false);
      } catch (error) {
        // Any other error: etcd is out of reach, and the lease decides.
        if ((error as Partial<ServiceError>).code === status.NOT_FOUND) throw new LeaseLost("the lease is lost");
      }
    }
  }

  /** Makes sure that the key is ours and writes it where it is not. claim takes it whoever has it. */
  private async check(claim: boolean): Promise<void> {
    const put = create(PutRequestSchema, { key: this.key, value: this.value, lease: this.lease });
    if (claim) {
      await this.etcd.call("/etcdserverpb.KV/Put", PutRequestSchema, PutResponseSchema, put);
      this.set(true, "");
      return;
    }
    const got = await this.etcd.call("/etcdserverpb.KV/Range", RangeRequestSchema, RangeResponseSchema, create(RangeRequestSchema, { key: this.key }));
    const kv = got.kvs[0];
    if (kv !== undefined) {
      const same = Buffer.from(kv.value).equals(this.value);
      if (same && kv.lease === this.lease) {
        this.set(true, "");
        return;
      }
      if (!same && kv.lease !== this.lease) {
        this.set(false, "another process has registered under this id");
        return;
      }
    }
    const done = await this.etcd.call("/etcdserverpb.KV/Txn", TxnRequestSchema, TxnResponseSchema, create(TxnRequestSchema, {
      compare: [create(CompareSchema, { target: Compare_CompareTarget.MOD, key: this.key, targetUnion: { case: "modRevision", value: kv?.modRevision ?? 0n } })],
      success: [create(RequestOpSchema, { request: { case: "requestPut", value: put } })],
    }));
    if (done.succeeded) this.set(true, "");
  }

  /** An etcd that does not answer, or does not allow it, changes nothing: what is known counts. */
  private async readRefused(): Promise<void> {
    try {
      const end = Buffer.from(refusedPrefix);
      end[end.length - 1]!++;
      const got = await this.etcd.call("/etcdserverpb.KV/Range", RangeRequestSchema, RangeResponseSchema, create(RangeRequestSchema, {
        key: Buffer.from(refusedPrefix), rangeEnd: end, limit: BigInt(mostRefusals),
      }));
      const stands = got.kvs.map((kv) => ({ key: Buffer.from(kv.key).toString(), value: Buffer.from(kv.value).toString(), revision: kv.modRevision }));
      if (!this.stopped) this.events.refused(stands, got.header?.revision ?? 0n, !got.more);
      this.toldRefused = false;
    } catch (error) {
      if (!this.toldRefused) process.stderr.write(`connect-node: who is refused cannot be read in etcd: ${error instanceof Error ? error.message : String(error)}\n`);
      this.toldRefused = true;
    }
  }

  private set(ours: boolean, why: string): void {
    const changes = this.isOurs !== ours || (!ours && !this.wasOurs);
    this.isOurs = ours;
    this.wasOurs ||= ours;
    if (changes && !this.stopped) this.events.changed(ours, why);
  }

  private async pause(ms: number): Promise<void> {
    if (this.stopped) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.wake = undefined;
  }
}
