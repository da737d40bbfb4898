import { readFile } from "node:fs/promises";
import { readFileSync } from "node:fs";
import { BlockList, isIP } from "node:net";
import { Client, connectivityState, credentials, experimental, Metadata, status, type ChannelCredentials, type ChannelOptions } from "@grpc/grpc-js";
import { PushError } from "./errors.js";

/** How Push-Manager is reached over TLS. All of it may be left out. */
export interface Tls {
  /** A PEM file of the authorities that Push-Manager's certificate is checked with. Default: those of Node.js. */
  caFile?: string;
  /** PEM files of the certificate that the Client shows. */
  certFile?: string;
  keyFile?: string;
  /** The name that Push-Manager's certificate must have. Default: the host of the address. */
  serverName?: string;
}

/** Where Push-Manager is, and as whom it is called. */
export interface Dial {
  /** HOST:PORT of each instance, in a list or with commas between them, or any gRPC target. A name with several addresses stands for all of them. */
  address: string | readonly string[];
  /** Default: plain text. With a caFile the files are read again every ten seconds; what they hold then counts for new connections. */
  tls?: Tls;
  /** Any other credentials of gRPC. */
  credentials?: ChannelCredentials;
  /** An API key or a JSON Web Token, or a function that has one. Without TLS it is refused but for loopback addresses. */
  token?: string | (() => string | Promise<string>);
  /** A file with the token, which is read again once a second at most. */
  tokenFile?: string;
}

/** A message from Push-Manager: the longest has a failure for each node and reason. */
const maxReply = 4 << 20;
const rereadEvery = 10_000;

const loopbacks = new BlockList();
loopbacks.addSubnet("127.0.0.0", 8, "ipv4");
loopbacks.addAddress("::1", "ipv6");

/** Whether what is sent to an address stays on this machine. */
export function isLoopback(address: string): boolean {
  if (address.startsWith("unix:")) return true;
  const m = /^(?:dns:(?:\/\/\/)?|ipv4:|ipv6:)?(?:\[([^\]]+)\]|([^:/]+)):\d+$/.exec(address);
  const host = m?.[1] ?? m?.[2] ?? "";
  const family = isIP(host);
  return host === "localhost" || (family !== 0 && loopbacks.check(host, family === 6 ? "ipv6" : "ipv4"));
}

/** Connections to all instances, which take turns. */
export class Channels {
  private readonly clients: Client[];
  private readonly token: (() => string | Promise<string>) | undefined;
  private turn = 0;
  private isClosed = false;

  constructor(d: Dial) {
    const addresses = (typeof d.address === "string" ? d.address.split(",") : d.address).map((a) => a.trim()).filter((a) => a !== "");
    if (addresses.length === 0) throw new RangeError("address: must not be empty");
    if (d.tls !== undefined && d.credentials !== undefined) throw new RangeError("tls and credentials: choose one");
    if (d.token !== undefined && d.tokenFile !== undefined) throw new RangeError("token and tokenFile: choose one");
    this.token = tokenOf(d);
    if (this.token !== undefined && d.tls === undefined && d.credentials === undefined) {
      for (const a of addresses) if (!isLoopback(a)) throw new RangeError(`token: it would go to ${JSON.stringify(a)} in plain text`);
    }
    const options: ChannelOptions = {
      // Every instance of a name gets its turn. Without a retryPolicy gRPC repeats only what no server has seen: a policy looks at the code alone,
      // and would repeat what is unknown.
      "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
      "grpc.service_config_disable_resolution": 1,
      "grpc.max_receive_message_length": maxReply,
      // Push-Manager takes a ping every 5 s. A connection that is dead is noticed within 15 s.
      "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 5000, "grpc.keepalive_permit_without_calls": 1,
      "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 5000,
      "grpc-node.flow_control_window": 1 << 20,
    };
    const name = d.tls?.serverName;
    if (name !== undefined) {
      options["grpc.ssl_target_name_override"] = name;
      options["grpc.default_authority"] = name;
    }
    this.clients = addresses.map((a) => new Client(a, d.credentials ?? credentialsOf(d.tls), options));
  }

  close(): void {
    this.isClosed = true;
    for (const c of this.clients) c.close();
  }

  /** What each call carries. A token that does not come until deadline, by Date.now, is an error, and so is a wait that was given up. */
  async metadata(deadline: number, signal?: AbortSignal): Promise<Metadata> {
    const m = new Metadata();
    if (this.token === undefined) return m;
    let over = (): void => undefined;
    try {
      const given = this.token();
      const late = new Promise<never>((_, reject) => {
        if (typeof given === "string") return;
        const end = (code: status): void => reject(new PushError("token: it has not come in time", { code, notSent: true }));
        const abort = (): void => end(status.CANCELLED);
        const timer = setTimeout(() => end(status.DEADLINE_EXCEEDED), Math.min(Math.max(deadline - Date.now(), 0), 2 ** 31 - 1));
        signal?.addEventListener("abort", abort, { once: true });
        if (signal?.aborted === true) abort();
        over = () => {
          clearTimeout(timer);
          signal?.removeEventListener("abort", abort);
        };
      });
      m.set("authorization", `Bearer ${await Promise.race([given, late])}`);
    } catch (error) {
      if (error instanceof PushError) throw error;
      throw new PushError(`token: ${error instanceof Error ? error.message : String(error)}`, { code: status.UNAUTHENTICATED, notSent: true });
    } finally {
      over();
    }
    return m;
  }

  /** The next instance with a connection. Waits for one until deadline, by Date.now; undefined: there was none, or the wait was given up. */
  async ready(deadline: number, signal?: AbortSignal): Promise<Client | undefined> {
    while (!this.isClosed && signal?.aborted !== true) {
      let best: Client | undefined;
      for (let i = 0; i < this.clients.length; i++) {
        const c = this.clients[(this.turn + i) % this.clients.length]!;
        if (c.getChannel().getConnectivityState(true) === connectivityState.READY) {
          best = c;
          this.turn = (this.turn + i + 1) % this.clients.length;
          break;
        }
      }
      if (best !== undefined || Date.now() >= deadline) return best;
      await this.changed(Math.min(deadline, Date.now() + 1000), signal);
    }
    return undefined;
  }

  /** Waits until a connection changes its state. */
  private changed(deadline: number, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve) => {
      const go = (): void => {
        signal?.removeEventListener("abort", go);
        resolve();
      };
      signal?.addEventListener("abort", go, { once: true });
      for (const c of this.clients) {
        try {
          const channel = c.getChannel();
          channel.watchConnectivityState(channel.getConnectivityState(true), deadline, () => go());
        } catch {
          go(); // It was closed.
        }
      }
    });
  }
}

function credentialsOf(tls: Tls | undefined): ChannelCredentials {
  if (tls === undefined) return credentials.createInsecure();
  if ((tls.certFile === undefined) !== (tls.keyFile === undefined)) throw new RangeError("tls: certFile and keyFile come together");
  const identity = tls.certFile === undefined || tls.keyFile === undefined ? undefined : { certificateFile: tls.certFile, privateKeyFile: tls.keyFile };
  // What cannot be read now is said now.
  const ca = tls.caFile === undefined ? null : readFileSync(tls.caFile);
  const key = identity === undefined ? null : readFileSync(identity.privateKeyFile);
  const cert = identity === undefined ? null : readFileSync(identity.certificateFile);
  if (tls.caFile === undefined) return credentials.createSsl(ca, key, cert);
  const provider = new experimental.FileWatcherCertificateProvider({ caCertificateFile: tls.caFile, ...identity, refreshIntervalMs: rereadEvery });
  return experimental.createCertificateProviderChannelCredentials(provider, identity === undefined ? null : provider);
}

function tokenOf(d: Dial): (() => string | Promise<string>) | undefined {
  if (d.token !== undefined) {
    const token = d.token;
    if (typeof token === "string") return () => checked(token);
    return async () => checked(await token());
  }
  if (d.tokenFile === undefined) return undefined;
  const file = d.tokenFile;
  let read = -Infinity;
  let last = "";
  return async () => {
    if (performance.now() - read >= 1000) {
      try {
        last = checked((await readFile(file, "utf8")).trim());
        read = performance.now();
      } catch (error) {
        if (last === "") throw error; // What was good a moment ago may still be.
      }
    }
    return last;
  };
}

function checked(token: string): string {
  if (!/^[\x21-\x7e]{1,16384}$/.test(token)) throw new RangeError("must be 1 to 16384 printable characters without spaces");
  return token;
}
