import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { BinaryReader, BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { Client, credentials, Server, ServerCredentials, status, type ClientDuplexStream, type sendUnaryData, type ServerUnaryCall, type ServiceError } from "@grpc/grpc-js";
import { ConnectNode } from "@push-manager/connect-node";
import { until } from "./go.js";

const bytesOf = (f: (w: BinaryWriter) => BinaryWriter): Buffer => Buffer.from(f(new BinaryWriter()).finish());
const hello = bytesOf((w) => w.tag(1, WireType.LengthDelimited).fork().tag(1, WireType.Varint).uint32(1).tag(2, WireType.LengthDelimited).string("m").join());
/** A delivery of the text to alice, and to somebody who is not here. */
const delivery = (seq: number, text: string): Buffer => bytesOf((w) => w
  .tag(2, WireType.Varint).uint32(seq)
  .tag(3, WireType.LengthDelimited).fork()
  .tag(1, WireType.LengthDelimited).fork().tag(2, WireType.LengthDelimited).string(text).join()
  .tag(3, WireType.LengthDelimited).string("alice")
  .tag(3, WireType.LengthDelimited).string("nobody")
  .tag(16, WireType.LengthDelimited).string(`id-${text}`)
  .join()
  .tag(5, WireType.Varint).uint32(seq));

test("a node registers although etcd takes its token for an old one", async () => {
  const etcd = new Server();
  let tokens = 0;
  const string = (field: number, text: string): Buffer => bytesOf((w) => w.tag(field, WireType.LengthDelimited).string(text));
  const put = (call: ServerUnaryCall<Buffer, Buffer>, callback: sendUnaryData<Buffer>): void => {
    if (call.metadata.get("token")[0] === "token-1") callback({ code: status.INVALID_ARGUMENT, details: "etcdserver: revision of auth store is old" });
    else callback(null, Buffer.alloc(0));
  };
  const methods = {
    "Auth/Authenticate": (_: unknown, callback: sendUnaryData<Buffer>): void => callback(null, string(2, `token-${++tokens}`)),
    "Lease/LeaseGrant": (_: unknown, callback: sendUnaryData<Buffer>): void => callback(null, bytesOf((w) => w.tag(2, WireType.Varint).int64(7).tag(3, WireType.Varint).int64(10))),
    "Lease/LeaseRevoke": put, "KV/Put": put, "KV/Range": put,
  };
  const raw = (b: Buffer): Buffer => b;
  etcd.addService(Object.fromEntries(Object.keys(methods).map((name) => [name, {
    path: `/etcdserverpb.${name}`, requestStream: false, responseStream: false,
    requestSerialize: raw, requestDeserialize: raw, responseSerialize: raw, responseDeserialize: raw,
  }])) as never, methods as never);
  const port = await new Promise<number>((go, fail) => etcd.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (e, p) => (e === null ? go(p) : fail(e))));
  const node = new ConnectNode({ nodeId: "token", listen: "127.0.0.1:0", etcd: { endpoints: [`127.0.0.1:${port}`], username: "u", password: "p" } });
  try {
    await node.start();
    await until(() => node.isReady);
    assert.equal(tokens, 2);
  } finally {
    await node.stop(500);
    etcd.forceShutdown();
  }
});

describe("a node and what may come from outside", { timeout: 120_000 }, () => {
  let node: ConnectNode;
  let client: Client;
  const got: string[] = [];

  const open = (): ClientDuplexStream<Buffer, Buffer> => client.makeBidiStreamRequest("/pubsub.ConnectNodeService/Deliver", (b: Buffer) => b, (b: Buffer) => b);
  /** How a stream ends that the frames are written to. */
  const ends = (...frames: Buffer[]): Promise<status> => new Promise((go) => {
    const call = open();
    call.on("data", () => undefined);
    call.on("error", (e: ServiceError) => go(e.code));
    call.on("end", () => go(status.OK));
    for (const f of frames) call.write(f);
    call.end();
  });

  before(async () => {
    node = new ConnectNode({ nodeId: "hostile", listen: "127.0.0.1:0", onError: (what, e) => assert.fail(`${what}: ${String(e)}`) });
    client = new Client(await node.start(), credentials.createInsecure());
    node.connect({ send: (p) => void got.push(Buffer.from(p.message.data).toString()), buffered: () => 0, close: () => undefined }, { user: "alice" });
  });
  after(async () => {
    client.close();
    await node.stop(500);
  });

  test("frames that are mutated at random end at most their own stream, and never the node", async () => {
    const beside = open();
    const acks: Buffer[] = [];
    beside.on("data", (b: Buffer) => acks.push(b));
    beside.on("error", () => undefined);
    beside.write(hello);
    let seed = 12345;
    const random = (n: number): number => {
      seed = (Math.imul(seed, 1_103_515_245) + 12_345) >>> 0;
      return Math.floor((seed / 2 ** 32) * n);
    };
    const codes = new Map<status, number>();
    for (let i = 0; i < 200; i++) {
      const frames = [hello, delivery(1, "x"), delivery(2, "y")].map((f) => Buffer.from(f));
      for (let n = 1 + random(4); n > 0; n--) {
        const f = frames[random(10) === 0 ? 0 : 1 + random(2)]!;
        f[random(f.length)] = random(256);
      }
      if (random(5) === 0) frames[1] = frames[1]!.subarray(0, random(frames[1]!.length));
      const code = await ends(...frames);
      codes.set(code, (codes.get(code) ?? 0) + 1);
    }
    assert.deepEqual([...codes.keys()].filter((c) => c !== status.OK && c !== status.FAILED_PRECONDITION), []);
    assert.ok((codes.get(status.FAILED_PRECONDITION) ?? 0) > 25);
    beside.write(delivery(1, "sound"));
    await until(() => got.includes("sound") && acks.length >= 2);
    beside.end();
    await until(() => node.stats.streams === 0);
  });

  test("an ack of a broken stream counts what was handed over before", async () => {
    const call = open();
    const frames: Buffer[] = [];
    call.on("data", (b: Buffer) => frames.push(b));
    const ended = new Promise<status>((go) => call.on("error", (e: ServiceError) => go(e.code)));
    call.write(hello);
    call.write(delivery(1, "before"));
    call.write(delivery(7, "gap"));
    assert.equal(await ended, status.FAILED_PRECONDITION);
    const r = new BinaryReader(Buffer.concat(frames.slice(1)));
    const fields: number[] = [];
    while (r.pos < r.len) {
      const [field, type] = r.tag();
      fields.push(field);
      r.skip(type);
    }
    assert.ok(fields.includes(2) && fields.includes(3), fields.join()); // The ack, and who was missed.
    assert.ok(got.includes("before") && !got.includes("gap"));
  });

  test("a connection knows the last 64 message ids that it has had, whatever stream they come on", async () => {
    const texts = Array.from({ length: 64 }, (_, i) => `t${i}`);
    const count = (text: string): number => got.filter((t) => t === text).length;
    await ends(hello, ...texts.map((t, i) => delivery(i + 1, t)));
    await ends(hello, delivery(1, "t0"), delivery(2, "t63"));
    assert.deepEqual([count("t0"), count("t63")], [1, 1]);
    await ends(hello, delivery(1, "t64"), delivery(2, "t1"), delivery(3, "t0")); // t64 has taken the place of t0.
    assert.deepEqual([count("t64"), count("t1"), count("t0")], [1, 1, 2]);
  });

  test("what was asked of a manager whose stream ends is asked of another one", async () => {
    const manager = (name: string): { asked: number; call: ClientDuplexStream<Buffer, Buffer> } => {
      const m = { asked: 0, call: open() };
      m.call.on("error", () => undefined);
      m.call.on("data", (b: Buffer) => {
        const r = new BinaryReader(b);
        while (r.pos < r.len) {
          const [field, type] = r.tag();
          if (field === 8) m.asked++; // A catchup.
          r.skip(type);
        }
      });
      m.call.write(bytesOf((w) => w.tag(1, WireType.LengthDelimited).fork()
        .tag(1, WireType.Varint).uint32(1).tag(6, WireType.LengthDelimited).bytes(Uint8Array.of(5)).tag(7, WireType.LengthDelimited).string(name).join()));
      return m;
    };
    const managers = [manager("one"), manager("two")];
    await until(() => managers.some((m) => m.asked > 0));
    const [asked, other] = managers[0]!.asked > 0 ? [managers[0]!, managers[1]!] : [managers[1]!, managers[0]!];
    assert.equal(other.asked, 0);
    asked.call.cancel();
    await until(() => other.asked > 0, 2500); // Sooner than it would be asked again anyway.
    other.call.cancel();
  });

  test("a callback that is an async function and fails ends its own connection, and not the process", async () => {
    const told: string[] = [];
    const own = new ConnectNode({ nodeId: "async", listen: "127.0.0.1:0", onError: (what) => told.push(what) });
    const to = new Client(await own.start(), credentials.createInsecure());
    const closed: string[] = [];
    const fails = async (): Promise<void> => {
      await Promise.resolve();
      throw new Error("write");
    };
    own.connect({ send: fails, buffered: () => 0, joined: fails, close: (why) => void closed.push(why) }, { user: "alice" });
    const request = bytesOf((w) => w.tag(1, WireType.LengthDelimited).string("alice").tag(3, WireType.LengthDelimited).fork().tag(2, WireType.LengthDelimited).string("x").join());
    await new Promise((go) => to.makeUnaryRequest("/pubsub.ConnectNodeService/PushMessage", (b: Buffer) => b, (b: Buffer) => b, request, go));
    await until(() => closed.length > 0 && told.length >= 2);
    assert.deepEqual([closed, told.sort()], [["broken"], ["joined", "send"]]);
    to.close();
    await own.stop(500);
  });

  test("unary calls that make no sense are refused, and nothing is done", async () => {
    const call = (method: string, request: Buffer): Promise<status> => new Promise((go) => {
      client.makeUnaryRequest(`/pubsub.ConnectNodeService/${method}`, (b: Buffer) => b, (b: Buffer) => b, request, (e: ServiceError | null) => go(e?.code ?? status.OK));
    });
    const before = got.length;
    for (const method of ["PushMessage", "PushMessageBatch", "Broadcast"]) {
      assert.equal(await call(method, Buffer.alloc(0)), status.INVALID_ARGUMENT);
      assert.notEqual(await call(method, Buffer.from([0xff, 0xff])), status.OK);
    }
    assert.equal(got.length, before);
  });
});
