import assert from "node:assert/strict";
import crypto, { createHash } from "node:crypto";
import { syncBuiltinESMExports } from "node:module";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { BinaryReader, BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { credentials, Client as GrpcClient, type ServiceError } from "@grpc/grpc-js";
import { Client, PushError } from "@push-manager/client";
import { ConnectNode, RefusedError, type Connection, type Push, type Session } from "@push-manager/connect-node";
import { freePort, programs, skip, start, startStack, until, type Program, type Stack } from "./go.js";

const text = (p: Push): string => Buffer.from(p.message.data).toString();

/** A client of a gateway, in memory. */
class Receiver implements Connection {
  readonly got: Push[] = [];
  readonly told: string[] = [];
  session: Session | undefined;
  closed = "";
  waits = 0;
  answers = true;

  send(p: Push): void {
    this.got.push(p);
    if (p.ack > 0 && this.answers) setTimeout(() => this.session?.ack(p.ack), 5);
  }
  buffered(): number {
    return this.waits;
  }
  close(why: string): void {
    this.closed = why;
  }
  ping(): void {
    this.session?.heard();
  }
  joined(room: string): void {
    this.told.push(`+${room}`);
  }
  left(room: string): void {
    this.told.push(`-${room}`);
  }
  get texts(): string[] {
    return this.got.map(text);
  }
}

describe("a node with Go programs", { skip, timeout: 120_000 }, () => {
  let stack: Stack;
  let node: ConnectNode;
  let address: string;
  let client: Client;
  const errors: string[] = [];
  const states: string[] = [];

  const makeNode = (nodeId: string): ConnectNode =>
    new ConnectNode({
      nodeId, listen: "127.0.0.1:0", etcd: { endpoints: [stack.etcd] }, controller: stack.controller,
      onError: (what, error) => errors.push(`${what}: ${String(error)}`), onState: (part, up) => states.push(`${part} ${up}`),
    });

  const enter = async (on: ConnectNode, user: string, rooms: string[] = [], acks = false, attributes: Record<string, string> = {}): Promise<Receiver> => {
    const r = new Receiver();
    r.session = on.connect(r, { user, acks, attributes });
    for (const room of rooms) r.session.join(room);
    await until(() => ["", ...rooms].every((room) => r.told.includes(`+${room}`)), 30_000, () => `${user} was told ${r.told.join(" ")}`);
    return r;
  };

  before(async () => {
    stack = await startStack(programs());
    node = makeNode("node-ts");
    address = await node.start();
    await until(() => node.isReady);
    client = new Client({ address: stack.pushManager });
    const probe = await enter(node, "probe");
    // Push-Manager has to find the node first.
    await until(async () => (await client.pushToUser("probe", "x")).outcome === "delivered");
    probe.session!.end();
  });

  after(async () => {
    client?.close();
    await node?.stop(3000);
    await stack?.program.stop();
  });

  test("joined means that pushes arrive, and left that none does", async () => {
    const alice = await enter(node, "alice", ["lobby"]);
    const bob = await enter(node, "bob");
    const r = await client.pushToRoom("lobby", "Hello");
    assert.equal(r.outcome, "delivered");
    assert.deepEqual([r.targets, r.delivered], [1, 1]);
    assert.deepEqual(alice.texts, ["Hello"]);
    assert.equal(alice.got[0]!.message.roomId, "lobby");
    assert.deepEqual(bob.texts, []);
    bob.session!.join("lobby");
    await until(() => bob.told.includes("+lobby"));
    assert.equal((await client.pushToRoom("lobby", "Both")).delivered, 2);
    alice.session!.leave("lobby");
    await until(() => alice.told.includes("-lobby"));
    assert.equal((await client.pushToRoom("lobby", "Bob alone", { except: ["nobody"] })).delivered, 1);
    assert.deepEqual(alice.texts, ["Hello", "Both"]);
    assert.deepEqual(bob.texts, ["Both", "Bob alone"]);
    alice.session!.end();
    bob.session!.end();
    await until(async () => (await client.pushToUser("alice", "gone?")).outcome === "offline");
    assert.equal((await client.pushToRoom("no such room", "x")).outcome, "offline");
  });

  test("a push to several rooms reaches each connection once, in the first of them that it is in", async () => {
    const both = await enter(node, "both", ["news", "sport"]);
    const one = await enter(node, "one", ["sport"]);
    const none = await enter(node, "none", ["weather"]);
    for (const text of ["first", "again", "and again"]) { // by their ids, then by an audience
      const r = await client.pushToRooms(["sport", "no such room", "news"], text);
      assert.deepEqual([r.outcome, r.targets, r.delivered], ["delivered", 2, 2]);
    }
    const stream = client.stream();
    const pending = await stream.send({ rooms: ["news", "sport"] }, "streamed", { except: ["one"] });
    assert.equal((await pending.wait()).delivered, 1);
    await stream.close();
    assert.deepEqual(both.texts, ["first", "again", "and again", "streamed"]);
    assert.deepEqual(both.got.map((p) => p.message.roomId), ["sport", "sport", "sport", "news"]);
    assert.deepEqual(one.texts, ["first", "again", "and again"]);
    assert.deepEqual(none.texts, []);
    assert.equal((await client.pushToRooms(["no such room", "nor this"], "x")).outcome, "offline");
    for (const r of [both, one, none]) r.session!.end();
  });

  test("pushes to one user arrive in the order in which they were sent", async () => {
    const user = await enter(node, "ordered", ["ordered"]);
    const stream = client.stream();
    const pending = [];
    for (let i = 0; i < 3000; i++) pending.push(await stream.send(i % 3 === 0 ? { room: "ordered" } : { user: "ordered" }, String(i)));
    for (const p of pending) assert.equal((await p.wait()).outcome, "delivered");
    await stream.close();
    const numbers = user.texts.map(Number);
    const rising = (all: number[]): boolean => all.every((n, i) => i === 0 || n > all[i - 1]!);
    assert.equal(numbers.length, 3000);
    assert.ok(rising(numbers.filter((n) => n % 3 === 0)) && rising(numbers.filter((n) => n % 3 !== 0)));
    user.session!.end();
  });

  test("a filter chooses among connections by their attributes, and counts whom it leaves out", async () => {
    const phone = await enter(node, "filtered", ["filters"], false, { platform: "ios", app_version: "2" });
    const laptop = await enter(node, "filtered", ["filters"], false, { platform: "web" });
    const other = await enter(node, "unfiltered", ["filters"]);
    const onPhones = { filter: [{ key: "platform", values: ["ios", "android"] }, { key: "app_version", values: ["1"], not: true }] };
    const room = await client.pushToRoom("filters", "phones", onPhones);
    assert.deepEqual([room.delivered, room.offline, room.filtered, room.failed], [1, 1, 1, 0]);
    const user = await client.pushToUser("unfiltered", "nobody", onPhones);
    assert.deepEqual([user.outcome, user.filtered, user.message], ["offline", 1, 'no connection of user "unfiltered" matches the filter']);
    const all = await client.broadcast("not the web", { filter: [{ key: "platform", values: ["web"], not: true }] });
    assert.equal(all.failed, 0);
    await until(() => phone.got.length === 2 && other.got.length === 1);
    assert.deepEqual([phone.texts, laptop.texts, other.texts], [["phones", "not the web"], [], ["not the web"]]);
    await assert.rejects(client.pushToUser("filtered", "x", { filter: [{ key: "platform", values: [] }] }), (e: PushError) => e.field === "options.filter[0].values");
    for (const r of [phone, laptop, other]) r.session!.end();
  });

  test("a message id reaches a connection once", async () => {
    const user = await enter(node, "once");
    const first = await client.pushToUser("once", "one", { messageId: "m-1" });
    const again = await client.pushToUser("once", "one", { messageId: "m-1" });
    assert.deepEqual([first.delivered, first.duplicates, again.delivered, again.duplicates], [1, 0, 1, 1]);
    assert.deepEqual(user.texts, ["one"]);
    assert.equal(user.got[0]!.message.id, "m-1");
    assert.equal((await client.pushToUser("once", "another", { messageId: "m-1" }).catch((e: PushError) => e.reason)), "MESSAGE_ID_REUSED");
    user.session!.end();
  });

  test("delivered means that the client has acknowledged, where that is asked for", async () => {
    const user = await enter(node, "acks", [], true);
    const r = await client.pushToUser("acks", "please", { ackByClient: true });
    assert.deepEqual([r.outcome, r.delivered, r.acked], ["delivered", 1, 1]);
    user.answers = false;
    const silent = await client.pushToUser("acks", "no answer", { ackByClient: 300 });
    assert.equal(silent.outcome, "unknown");
    await until(() => user.got.some((p) => text(p) === "no answer" && p.replayed)); // It was shown once more.
    user.session!.end();
  });

  test("what was stored comes at the next connection, before what is new, and is forgotten once it is acknowledged", async () => {
    for (const t of ["first", "second"]) {
      const r = await client.pushToUser("away", t, { storeIfOffline: true });
      assert.deepEqual([r.outcome, r.stored], ["stored", 1]);
    }
    const user = await enter(node, "away", [], true);
    assert.equal((await client.pushToUser("away", "third")).outcome, "delivered");
    await until(() => user.got.length >= 3, 30_000, () => user.texts.join());
    assert.deepEqual(user.texts, ["first", "second", "third"]);
    assert.deepEqual(user.got.map((p) => p.replayed), [true, true, false]);
    await new Promise((go) => setTimeout(go, 300));
    user.session!.end();
    const next = await enter(node, "away", [], true);
    await client.pushToUser("away", "fourth");
    await until(() => next.texts.includes("fourth"));
    assert.deepEqual(next.texts, ["fourth"]);
    next.session!.end();
  });

  test("a callback that throws fails its own push, and ends nothing", async () => {
    const bad = await enter(node, "bad", ["mixed"]);
    const good = await enter(node, "good", ["mixed"]);
    bad.send = () => {
      throw new Error("a fault of the gateway");
    };
    const r = await client.pushToRoom("mixed", "Hello");
    assert.deepEqual([r.targets, r.delivered, r.failed], [2, 1, 1]);
    assert.deepEqual(good.texts, ["Hello"]);
    assert.equal(bad.closed, "broken");
    assert.ok(errors.some((e) => e.includes("a fault of the gateway")));
    assert.equal((await client.pushToUser("good", "still here")).outcome, "delivered");
    good.session!.end();
  });

  test("a client that does not read is cut off, once its bounded queue is full, and others get theirs", async () => {
    const slow = await enter(node, "slow", ["queue"]);
    const fast = await enter(node, "fast", ["queue"]);
    slow.waits = 1 << 20;
    const stream = client.stream();
    const results = await Promise.all(Array.from({ length: 1200 }, (_, i) => stream.push({ room: "queue" }, String(i))));
    await stream.close();
    assert.equal(slow.closed, "slow");
    assert.deepEqual(slow.texts, []);
    assert.equal(fast.texts.length, 1200);
    assert.ok(results.some((r) => r.failed === 1));
    fast.session!.end();
  });

  test("a broadcast reaches everybody", async () => {
    const [one, two] = [await enter(node, "b1"), await enter(node, "b2")];
    const r = await client.broadcast("All");
    assert.equal(r.delivered, 2);
    assert.ok(one.got[0]!.message.broadcast && two.texts[0] === "All");
    one.session!.end();
    two.session!.end();
  });

  test("callers are told who is connected, and who comes and goes, and can disconnect them", async () => {
    const watched: string[] = [];
    const stop = new AbortController();
    const [phone, laptop] = [await enter(node, "p-a", ["seen"], false, { device_id: "phone", os: "x" }), await enter(node, "p-a", [], false, { device_id: "laptop" })];
    const position = { last: "" };
    const watch = (async () => {
      for await (const e of client.watchRoom("seen", { signal: stop.signal })) {
        if (e.snapshot !== undefined) watched.push(`${e.snapshot.reason}: ${e.snapshot.entries.map((m) => `${m.user} ${m.nodes}`)}`);
        for (const c of e.changes) watched.push(`${c.kind} ${c.user}`);
        if (e.position !== "") position.last = e.position;
      }
    })();
    await until(() => watched.length === 1);
    const other = await enter(node, "p-b", ["seen"]);
    await until(() => watched.length === 2);
    const members: string[][] = [];
    for await (const m of client.roomMembers("seen")) members.push([m.user, m.node]);
    assert.deepEqual(members.sort(), [["p-a", "node-ts"], ["p-b", "node-ts"]]);
    const [a, nobody] = await client.presence(["p-a", "p-nobody"]);
    assert.deepEqual([a?.user, a?.online, a?.nodes, a?.rooms, a?.incomplete], ["p-a", true, ["node-ts"], ["seen"], false]);
    assert.deepEqual(a?.connections.map((c) => [c.node, c.device, c.attributes, c.rooms]), [
      ["node-ts", "phone", { device_id: "phone", os: "x" }, ["seen"]], ["node-ts", "laptop", { device_id: "laptop" }, []],
    ]);
    assert.ok(a?.connections.every((c) => Math.abs(Date.now() - c.since!.getTime()) < 60_000) && a.connections[0]!.id !== a.connections[1]!.id);
    assert.deepEqual([nobody?.online, nobody?.connections], [false, []]);

    const one = await client.disconnect({ user: "p-a", device: "laptop" }, { code: 4123, reason: "bye" });
    assert.deepEqual([one.success, one.connections, one.nodes, one.failures], [true, 1, 2, []]); // The stack has a node of its own.
    assert.deepEqual([phone.closed, laptop.closed], ["", "disconnected"]);
    assert.equal((await client.disconnect({ user: "p-a" }, { refuseFor: 60_000 })).connections, 1);
    assert.throws(() => node.connect(new Receiver(), { user: "p-a" }), (e) => e instanceof RefusedError && e.code === 4410);
    assert.ok((await client.allowAgain({ user: "p-a" })).success);
    (await enter(node, "p-a")).session!.end();
    assert.equal((await client.disconnect({ room: "seen" })).connections, 1);
    assert.equal(other.closed, "disconnected");
    await until(() => watched.length === 4);
    stop.abort();
    await watch;
    assert.deepEqual(watched, ["initial: p-a node-ts", "joined p-b", "left p-a", "left p-b"]);
    const again = await enter(node, "p-c");
    const later = client.watchRoom("seen", { position: position.last });
    const first = later.next();
    again.session!.join("seen");
    assert.deepEqual((await first).value?.changes.map((c) => `${c.kind} ${c.user}`), ["joined p-c"]); // no snapshot before it
    await later.return();
    again.session!.end();
  });

  test("a broadcast job reaches everybody once, in the order of their turns", async () => {
    const users = Array.from({ length: 300 }, (_, i) => `j${i}`);
    const receivers = await Promise.all(users.map((u) => enter(node, u)));
    const [host, port] = stack.pushManager.split(":");
    const job = start(join(programs(), "pushctl"), ["jobs", "create", "ts", "Sale", "--everybody", "--rate", "500", "--watch", "--address", `${host}:${port}`]);
    assert.equal(await job.ended, 0, job.output);
    assert.deepEqual(receivers.map((r) => r.texts), users.map(() => ["Sale"]));
    for (const r of receivers) r.session!.end();
  });

  test("users are listed in pages, each once, whoever asks for how many", async () => {
    const users = Array.from({ length: 500 }, (_, i) => `l${i}`);
    const receivers = await Promise.all(users.map((u) => enter(node, u)));
    const asked = new GrpcClient(address, credentials.createInsecure());
    const page = async (first: bigint, limit: number, scope = ""): Promise<{ users: string[]; last: bigint }> => {
      const request = new BinaryWriter().tag(1, WireType.Bit64).fixed64(first).tag(2, WireType.Varint).uint32(limit).tag(3, WireType.LengthDelimited).string(scope).finish();
      const reply = new BinaryReader(await new Promise<Buffer>((resolve, reject) => {
        const done = (e: ServiceError | null, b?: Buffer): void => (b !== undefined ? resolve(b) : reject(e));
        asked.makeUnaryRequest("/pubsub.ConnectNodeService/ListUsers", (b: Uint8Array) => Buffer.from(b), (b: Buffer) => b, request, done);
      }));
      const found = { users: [] as string[], last: 0n };
      while (reply.pos < reply.len) {
        if (reply.tag()[0] === 1) found.users.push(reply.string());
        else found.last = BigInt(reply.fixed64());
      }
      return found;
    };
    const turnOf = (user: string): bigint => createHash("sha256").update(user).digest().readBigUInt64BE(0);
    const listed: string[] = [];
    for (let first = 0n; ; ) {
      const p = await page(first, 7);
      assert.ok(p.users.length <= 7);
      listed.push(...p.users);
      if (p.last === 0xffff_ffff_ffff_ffffn) break;
      assert.equal(p.last, turnOf(p.users.at(-1)!), "users with a turn up to the last one are all listed, and none is said to be beyond it");
      first = p.last + 1n;
    }
    assert.deepEqual(listed, [...users].sort((a, b) => (turnOf(a) < turnOf(b) ? -1 : 1)));
    assert.equal(turnOf("alice"), 3159282601090220207n);
    assert.deepEqual((await page(0n, 0, "shop/")).users, []);
    await assert.rejects(page(0n, 0, "Not a tenant"), /scope/);
    const acme = await enter(node, "acme/a");
    assert.deepEqual((await page(0n, 0, "acme/")).users, ["acme/a"]);
    acme.session!.end();
    // Nobody finds ids with one turn, so SHA-256 is another function meanwhile.
    const digest = Buffer.alloc(32, 7);
    const sha256 = crypto.createHash;
    crypto.createHash = ((...of: Parameters<typeof sha256>) => (of[0] === "sha256" ? { update: () => ({ digest: () => digest }) } : sha256(...of))) as typeof sha256;
    syncBuiltinESMExports();
    try {
      const tied = await page(0n, 7);
      assert.deepEqual([...tied.users].sort(), [...users].sort(), "whoever has the turn of the last one is listed, too");
    } finally {
      crypto.createHash = sha256;
      syncBuiltinESMExports();
    }
    asked.close();
    for (const r of receivers) r.session!.end();
  });

  test("the node is back in etcd when its lease is lost", async () => {
    const etcd = new GrpcClient(stack.etcd, credentials.createInsecure());
    const call = (path: string, request: Uint8Array): Promise<Buffer> =>
      new Promise((resolve, reject) => {
        etcd.makeUnaryRequest(path, (b: Uint8Array) => Buffer.from(b), (b: Buffer) => b, request, (e: ServiceError | null, b?: Buffer) => (b !== undefined ? resolve(b) : reject(e)));
      });
    /** The lease of the node's key, 0 without one. */
    const lease = async (): Promise<bigint> => {
      const key = Buffer.from("/services/connect-node/node-ts");
      const reply = new BinaryReader(await call("/etcdserverpb.KV/Range", new BinaryWriter().tag(1, WireType.LengthDelimited).bytes(key).finish()));
      while (reply.pos < reply.len) {
        const [field, type] = reply.tag();
        if (field !== 2) {
          reply.skip(type);
          continue;
        }
        const kv = new BinaryReader(reply.bytes());
        while (kv.pos < kv.len) {
          const [of, kind] = kv.tag();
          if (of === 6) return BigInt(kv.int64());
          kv.skip(kind);
        }
      }
      return 0n;
    };
    const before = await lease();
    assert.notEqual(before, 0n);
    await call("/etcdserverpb.Lease/LeaseRevoke", new BinaryWriter().tag(1, WireType.Varint).int64(before).finish());
    assert.equal(await lease(), 0n);
    await until(async () => ![0n, before].includes(await lease()), 30_000);
    etcd.close();
    const user = await enter(node, "after");
    await until(async () => (await client.pushToUser("after", "back")).outcome === "delivered");
    user.session!.end();
  });

  test("a Controller that has forgotten everything is told again who is in which room", async () => {
    const port = String(await freePort());
    const run = (): Program => start(join(programs(), "controller"), [], { GRPC_PORT: port, METRICS_PORT: "0", ETCD_ENDPOINTS: stack.etcd, WARMUP: "1s" });
    let controller = run();
    const reporting = new ConnectNode({ nodeId: "reporting", listen: "127.0.0.1:0", etcd: { endpoints: [stack.etcd] }, controller: `127.0.0.1:${port}` });
    const asked = new GrpcClient(`127.0.0.1:${port}`, credentials.createInsecure());
    /** Whether the Controller has the user in the room. */
    const has = (room: string, user: string): Promise<boolean> => new Promise((go) => {
      const request = new BinaryWriter().tag(1, WireType.LengthDelimited).string(room).finish();
      asked.makeUnaryRequest("/pubsub.ControllerService/GetRoomInfo", (b: Uint8Array) => Buffer.from(b), (b: Buffer) => b, request, { deadline: Date.now() + 2000 },
        (_: ServiceError | null, b?: Buffer) => go(b?.includes(user) ?? false));
    });
    try {
      await reporting.start();
      const [dora, emil] = [await enter(reporting, "dora", ["r1", "r2"]), await enter(reporting, "emil", ["r1"])];
      await until(async () => (await has("r1", "dora")) && (await has("r1", "emil")) && (await has("r2", "dora")));
      await controller.stop("SIGKILL");
      emil.session!.end(); // While nobody can be told.
      controller = run();
      await until(async () => (await has("r1", "dora")) && (await has("r2", "dora")), 30_000);
      assert.equal(await has("r1", "emil"), false);
      dora.session!.leave("r2");
      await until(async () => dora.told.includes("-r2") && !(await has("r2", "dora")));
      dora.session!.end();
      await until(async () => !(await has("r1", "dora")));
    } finally {
      await reporting.stop(1000);
      asked.close();
      await controller.stop("SIGKILL");
    }
  });

  test("a node that leaves is drained: its users are offline, its clients told to go, and pushes to others go on", async () => {
    const leaving = makeNode("node-ts-2");
    await leaving.start();
    await until(() => leaving.isReady);
    const user = await enter(leaving, "leaver");
    const stays = await enter(node, "stays");
    await until(async () => (await client.pushToUser("leaver", "x")).outcome === "delivered");
    const stopped = leaving.stop(5000);
    const results = [];
    while (user.closed === "") results.push(await client.pushToUser("leaver", "y"));
    await stopped;
    assert.equal(user.closed, "going");
    assert.equal(leaving.stats.sessions, 0);
    assert.ok(results.every((r) => r.unknown === 0), JSON.stringify(results.find((r) => r.unknown > 0)));
    assert.equal((await client.pushToUser("leaver", "z")).outcome, "offline");
    assert.equal((await client.pushToUser("stays", "on")).outcome, "delivered");
    assert.throws(() => leaving.connect(new Receiver(), { user: "late" }), RangeError);
    stays.session!.end();
  });

  test("what is no id, and a room too many, is refused with the name of the field", async () => {
    for (const user of ["", "a\nb", "x".repeat(300), "\ud800"]) assert.throws(() => node.connect(new Receiver(), { user }), /user_id/);
    const many = Object.fromEntries(Array.from({ length: 17 }, (_, i) => [`k${i}`, "v"]));
    for (const attributes of [many, { platform: "" }, { platform: "x".repeat(65) }, { "a\nb": "x" }]) {
      assert.throws(() => node.connect(new Receiver(), { user: "alice", attributes }), /^RangeError: attributes/);
    }
    const r = await enter(node, "greedy");
    assert.throws(() => r.session!.join("@node:node-ts"), /reserved/);
    assert.throws(() => r.session!.leave("elsewhere"), /not in this room/);
    assert.throws(() => {
      for (let i = 0; i <= 100; i++) r.session!.join(`room ${i}`);
    }, /too many rooms/);
    r.session!.end();
  });

  test("a wrong push is refused, names its field, and nothing was sent", async () => {
    await assert.rejects(client.pushToUser("", "x"), (e) => e instanceof PushError && e.notSent && e.field === "user_id" && e.reason !== "" && e.tries === 1);
    await assert.rejects(client.pushToUser("alice", "x".repeat(300_000)), (e) => e instanceof PushError && e.notSent && e.field === "content.data");
    await assert.rejects(client.push({ user: "a" }, "x", { except: ["b"] }), (e) => e instanceof PushError && e.field === "exclude_user_ids");
  });
});
