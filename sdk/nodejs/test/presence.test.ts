import assert from "node:assert/strict";
import { test } from "node:test";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { Server, ServerCredentials, status, type ServerWritableStream } from "@grpc/grpc-js";
import { Client, PushError, type PresenceEvent } from "@push-manager/client";
import { freePort, until } from "./go.js";

type Call = ServerWritableStream<Buffer, Buffer>;

/** Runs f with a PresenceService whose watches do what a test says. */
async function withWatches(watch: (call: Call) => void, f: (client: Client) => Promise<void>): Promise<void> {
  const raw = (b: Buffer): Buffer => b;
  const server = new Server();
  server.addService({ watchPresence: {
    path: "/pubsub.PresenceService/WatchPresence", requestStream: false, responseStream: true,
    requestSerialize: raw, requestDeserialize: raw, responseSerialize: raw, responseDeserialize: raw,
  } } as never, { watchPresence: watch } as never);
  const port = await new Promise<number>((go, fail) => server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (e, p) => (e === null ? go(p) : fail(e))));
  const client = new Client({ address: `127.0.0.1:${port}` });
  try {
    await f(client);
  } finally {
    client.close();
    server.forceShutdown();
  }
}

/** Changes of one user with a kind. */
const change = (position: string, user: string, kind: number): Buffer => Buffer.from(new BinaryWriter()
  .tag(1, WireType.LengthDelimited).string(position)
  .tag(3, WireType.LengthDelimited).fork().tag(1, WireType.LengthDelimited).fork()
  .tag(1, WireType.Varint).int32(kind).tag(2, WireType.LengthDelimited).fork().tag(1, WireType.LengthDelimited).string(user).join()
  .join().join().finish());

const failure = async (events: AsyncGenerator<PresenceEvent>, seen: PresenceEvent[] = []): Promise<PushError> => {
  try {
    for await (const e of events) seen.push(e);
  } catch (e) {
    assert.ok(e instanceof PushError, String(e));
    return e;
  }
  return assert.fail("it has ended without an error");
};

test("a watch that breaks says so after what has come, and one that ends by itself, too", { timeout: 30_000 }, async () => {
  const seen: PresenceEvent[] = [];
  await withWatches((call) => {
    call.write(change("p.1", "a", 3));
    call.write(change("p.2", "b", 99)); // A kind of later days.
    call.emit("error", { code: status.UNAVAILABLE, details: "this instance stops" });
  }, async (client) => {
    assert.equal((await failure(client.watchRoom("r"), seen)).code, status.UNAVAILABLE);
  });
  assert.deepEqual(seen.map((e) => [e.position, e.changes[0]?.kind, e.changes[0]?.user]), [["p.1", "joined", "a"], ["p.2", "unknown", "b"]]);
  await withWatches((call) => call.end(), async (client) => {
    assert.equal((await failure(client.watchUser("u"))).code, status.INTERNAL);
  });
  await withWatches((call) => call.write(Buffer.from("\xff\xff", "latin1")), async (client) => {
    assert.ok(await failure(client.watchUser("u")));
  });
});

test("whoever leaves a watch leaves nothing behind at the server, whether by a break or by a signal", { timeout: 30_000 }, async () => {
  let open = 0;
  await withWatches((call) => {
    open++;
    call.on("cancelled", () => open--);
    call.write(change("p.1", "a", 4));
  }, async (client) => {
    for await (const e of client.watchRoom("r")) {
      assert.equal(e.changes[0]?.kind, "left");
      break;
    }
    await until(() => open === 0);
    const stop = new AbortController();
    let n = 0;
    for await (const _ of client.watchRoom("r", { signal: stop.signal })) {
      n++;
      stop.abort();
    }
    assert.equal(n, 1);
    await until(() => open === 0);
  });
});

test("a watch waits for an instance no longer than its timeout", { timeout: 30_000 }, async () => {
  const client = new Client({ address: `127.0.0.1:${await freePort()}` });
  const e = await failure(client.watchRoom("r", { timeout: 200 }));
  assert.deepEqual([e.code, e.notSent], [status.DEADLINE_EXCEEDED, true]);
  for await (const _ of client.watchRoom("r", { signal: AbortSignal.abort() })) assert.fail("it was given up before it began");
  client.close();
});

test("what is no disconnect is refused before it is sent", async () => {
  const client = new Client({ address: `127.0.0.1:${await freePort()}` });
  for (const [field, of, o] of [["code", { user: "u" }, { code: 4000.5 }], ["refuse_for", { user: "u" }, { refuseFor: 0 }], ["user_id", { user: "\ud800" }, {}], ["room_id", { room: 7 }, {}]] as const) {
    await assert.rejects(client.disconnect(of as never, o), (e) => e instanceof PushError && e.notSent && e.field === field);
  }
  client.close();
});
