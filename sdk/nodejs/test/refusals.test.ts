import assert from "node:assert/strict";
import { test } from "node:test";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { Server, ServerCredentials, type sendUnaryData, type ServerUnaryCall } from "@grpc/grpc-js";
import { ConnectNode, RefusedError, type Words } from "@push-manager/connect-node";
import { until } from "./go.js";

interface Refusals {
  take(d: { userId: string; deviceId: string; roomId: string; code: number; reason: string; refuseMs: bigint; allowAgain: boolean; revision: bigint }): void;
  list(stands: { key: string; value: string; revision: bigint }[], revision: bigint, all: boolean): void;
  of(user: string, device: string): { code: number; reason: string } | undefined;
  ofRoom(room: string): { code: number; reason: string } | undefined;
}

// It is no part of what the package shows.
const { Refusals, mostRefusals } = await import(new URL("../../connect-node/dist/refusals.js", import.meta.url).href) as { Refusals: new () => Refusals; mostRefusals: number };

const key = (user: string): string => `/push-manager/refused/user/${user}`;
const stand = (user: string, revision: number, more: object = {}): { key: string; value: string; revision: bigint } =>
  ({ key: key(user), value: JSON.stringify({ user, code: 4410, reason: "away", seconds: 3600, ...more }), revision: BigInt(revision) });
const disconnect = (userId: string, revision: number, more: object = {}): Parameters<Refusals["take"]>[0] =>
  ({ userId, deviceId: "", roomId: "", code: 4410, reason: "told", refuseMs: 60_000n, allowAgain: false, revision: BigInt(revision), ...more });

test("what no Push-Manager has written in etcd refuses nobody, and hides nobody who is refused", () => {
  const r = new Refusals();
  const others = ["null", "1", "[]", "\"x\"", "{", "{}", "{\"user\":{}}"].map((value) => ({ key: key("b"), value, revision: 1n }));
  r.list([
    ...others, stand("c", 1, { code: 1000 }), stand("c", 1, { code: "4410" }), stand("c", 1, { seconds: 0 }), stand("c", 1, { reason: "x".repeat(121) }),
    { ...stand("d", 1), key: key("e") }, stand("a", 1),
  ], 1n, true);
  assert.deepEqual(r.of("a", ""), { code: 4410, reason: "away" });
  for (const user of ["b", "c", "d", "e"]) assert.equal(r.of(user, ""), undefined);
});

test("whoever etcd does not list any more may come, unless a Push-Manager has said so since, or the list is not whole", () => {
  const r = new Refusals();
  r.list([stand("a", 5), stand("b", 6)], 6n, true);
  r.take(disconnect("new", 9));
  r.list([stand("b", 6)], 8n, false);
  assert.notEqual(r.of("a", ""), undefined);
  r.list([stand("b", 6)], 8n, true);
  assert.equal(r.of("a", ""), undefined);
  assert.notEqual(r.of("b", ""), undefined);
  assert.notEqual(r.of("new", ""), undefined);
});

test("an etcd that has gone back is believed", () => {
  const r = new Refusals();
  r.list([stand("a", 90), stand("b", 91)], 100n, true);
  r.list([stand("b", 3, { reason: "again" })], 5n, true);
  assert.equal(r.of("a", ""), undefined);
  assert.equal(r.of("b", "")?.reason, "again");
  r.take(disconnect("b", 6, { allowAgain: true }));
  assert.equal(r.of("b", ""), undefined);
});

test("what was lifted keeps nobody from being refused, however much of it a node remembers", () => {
  const r = new Refusals();
  for (let i = 0; i < mostRefusals + 10; i++) r.take(disconnect(`u${i}`, i + 1, { allowAgain: true }));
  r.take(disconnect("v", mostRefusals + 20));
  assert.equal(r.of("v", "")?.reason, "told");
});

test("a node refuses whom etcd names, and closes the connections of those who are here, and of those in a refused room", { timeout: 60_000 }, async () => {
  const bytesOf = (f: (w: BinaryWriter) => BinaryWriter): Buffer => Buffer.from(f(new BinaryWriter()).finish());
  const stands = [
    { key: key("x"), value: "null", revision: 1n }, stand("banned", 2),
    { key: "/push-manager/refused/room/shut", value: JSON.stringify({ room: "shut", code: 4411, reason: "closed", seconds: 3600 }), revision: 3n },
  ];
  const refused = bytesOf((w) => {
    w.tag(1, WireType.LengthDelimited).fork().tag(3, WireType.Varint).int64(3n).join();
    for (const kv of stands) {
      w.tag(2, WireType.LengthDelimited).fork().tag(1, WireType.LengthDelimited).string(kv.key).tag(3, WireType.Varint).int64(kv.revision)
        .tag(5, WireType.LengthDelimited).string(kv.value).join();
    }
    return w;
  });
  let letGo = (): void => undefined;
  const asked = new Promise<void>((go) => { letGo = go; });
  const nothing = (_: unknown, callback: sendUnaryData<Buffer>): void => callback(null, Buffer.alloc(0));
  const methods = {
    "Lease/LeaseGrant": (_: unknown, callback: sendUnaryData<Buffer>): void =>
      void asked.then(() => callback(null, bytesOf((w) => w.tag(2, WireType.Varint).int64(7n).tag(3, WireType.Varint).int64(10n)))),
    "Lease/LeaseRevoke": nothing, "KV/Put": nothing,
    "KV/Range": (call: ServerUnaryCall<Buffer, Buffer>, callback: sendUnaryData<Buffer>): void =>
      callback(null, call.request.includes("/push-manager/refused/") ? refused : Buffer.alloc(0)),
  };
  const raw = (b: Buffer): Buffer => b;
  const etcd = new Server();
  etcd.addService(Object.fromEntries(Object.keys(methods).map((name) => [name, {
    path: `/etcdserverpb.${name}`, requestStream: false, responseStream: false,
    requestSerialize: raw, requestDeserialize: raw, responseSerialize: raw, responseDeserialize: raw,
  }])) as never, methods as never);
  const port = await new Promise<number>((go, fail) => etcd.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (e, p) => (e === null ? go(p) : fail(e))));
  const node = new ConnectNode({ nodeId: "n", listen: "127.0.0.1:0", etcd: { endpoints: [`127.0.0.1:${port}`] } });
  try {
    await node.start();
    const closed = new Map<string, Words | undefined>();
    const notJoined: string[] = [];
    const enter = (user: string) => node.connect({
      send: () => undefined, buffered: () => 0, close: (_, said) => void closed.set(user, said), refused: (room, why) => void notJoined.push(`${room}: ${why}`),
    }, { user });
    enter("banned");
    enter("inside").join("shut");
    const stays = enter("stays");
    letGo();
    await until(() => node.isReady);
    assert.deepEqual(Object.fromEntries(closed), { banned: { code: 4410, reason: "away" }, inside: { code: 4411, reason: "closed" } });
    assert.throws(() => enter("banned"), (e) => e instanceof RefusedError && e.code === 4410 && e.reason === "away");
    stays.join("shut");
    await until(() => notJoined.length > 0);
    assert.deepEqual(notJoined, ["shut: refused: closed"]);
  } finally {
    await node.stop(500);
    etcd.forceShutdown();
  }
});
