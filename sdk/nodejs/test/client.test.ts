import assert from "node:assert/strict";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { getEventListeners } from "node:events";
import { test } from "node:test";
import { status } from "@grpc/grpc-js";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { Client, PushError, type ClientConfig, type Retry } from "@push-manager/client";
import { delivered, FakePushManager, type Answer, type Came } from "./fake.js";
import { freePort } from "./go.js";

const overloaded: Answer = { code: status.RESOURCE_EXHAUSTED, reason: "OVERLOADED", retryAfter: 20 };

/** Runs f with a Push-Manager that answers so, and a client for it. */
async function withFake(answer: (came: Came, n: number) => Answer, cfg: Partial<ClientConfig>, f: (client: Client, fake: FakePushManager) => Promise<void>): Promise<void> {
  const fake = await new FakePushManager(answer).start();
  const client = new Client({ address: fake.address, ...cfg });
  try {
    await f(client, fake);
  } finally {
    client.close();
    fake.stop();
  }
}

const error = async (p: Promise<unknown>): Promise<PushError> => {
  try {
    await p;
  } catch (e) {
    assert.ok(e instanceof PushError, String(e));
    return e;
  }
  return assert.fail("it has succeeded");
};

test("a push that Push-Manager has refused is repeated after the delay that it asks for, as the same bytes", async () => {
  const told: Retry[] = [];
  await withFake((_, n) => (n < 3 ? overloaded : delivered), { onRetry: (r) => told.push(r) }, async (client, fake) => {
    const begin = Date.now();
    assert.equal((await client.pushToUser("alice", "Hello")).outcome, "delivered");
    assert.ok(Date.now() - begin >= 39);
    assert.equal(fake.came.length, 3);
    assert.equal(new Set(fake.came.map((c) => c.bytes)).size, 1);
    assert.deepEqual(told.map((r) => [r.error.reason, r.delay]), [["OVERLOADED", 20], ["OVERLOADED", 20]]);
  });
});

test("a refusal without a delay is final, and says that nothing was sent", async () => {
  await withFake(() => ({ code: status.PERMISSION_DENIED, reason: "PERMISSION_DENIED" }), {}, async (client, fake) => {
    const e = await error(client.pushToUser("alice", "Hello", { messageId: "m" }));
    assert.deepEqual([e.code, e.reason, e.notSent, e.tries, fake.came.length], [status.PERMISSION_DENIED, "PERMISSION_DENIED", true, 1, 1]);
  });
});

test("a push whose fate is unknown is repeated only if it has a message id", async () => {
  await withFake((_, n) => (n === 1 ? "break" : delivered), {}, async (client, fake) => {
    const e = await error(client.pushToUser("alice", "Hello"));
    assert.deepEqual([e.isUnknown, e.tries, fake.came.length], [true, 1, 1]);
  });
  await withFake((_, n) => (n === 1 ? "break" : delivered), {}, async (client, fake) => {
    assert.equal((await client.pushToUser("alice", "Hello", { messageId: "m" })).outcome, "delivered");
    assert.equal(fake.came.length, 2);
  });
  // One try may have been delivered: a refusal after it does not change that.
  await withFake((_, n) => (n === 1 ? "break" : { code: status.PERMISSION_DENIED, reason: "PERMISSION_DENIED" }), {}, async (client) => {
    const e = await error(client.pushToUser("alice", "Hello", { messageId: "m" }));
    assert.deepEqual([e.notSent, e.tries], [false, 2]);
  });
});

test("repeats end with the tries, with the deadline and with the budget", async () => {
  await withFake(() => overloaded, { retries: { tries: 3 } }, async (client, fake) => {
    assert.equal((await error(client.pushToUser("alice", "x"))).tries, 3);
    assert.equal(fake.came.length, 3);
  });
  await withFake(() => ({ code: status.UNAVAILABLE, reason: "DRAINING", retryAfter: 10_000 }), { timeout: 1000 }, async (client, fake) => {
    const begin = Date.now();
    assert.ok((await error(client.pushToUser("alice", "x"))).notSent);
    assert.ok(Date.now() - begin < 900); // It does not wait for nothing.
    assert.equal(fake.came.length, 1);
  });
  await withFake(() => overloaded, { retries: { burst: 5, ratio: 0 } }, async (client, fake) => {
    for (let i = 0; i < 10; i++) await error(client.pushToUser("alice", "x"));
    assert.equal(fake.came.length, 10 + 5);
  });
});

test("a token that never comes ends pushes with their time, and keeps no Stream from its end", async () => {
  await withFake(() => delivered, { token: () => new Promise<string>(() => undefined), timeout: 200 }, async (client, fake) => {
    const e = await error(client.pushToUser("alice", "x"));
    assert.deepEqual([e.code, e.notSent], [status.DEADLINE_EXCEEDED, true]);
    const stream = client.stream();
    const p = await stream.send({ user: "alice" }, "x", { timeout: 60_000 });
    await stream.close(10);
    assert.ok((await error(p.wait())).notSent);
    assert.equal(fake.came.length, 0);
  });
});

test("while no instance is there, waiting leaves nothing behind", async () => {
  const client = new Client({ address: `127.0.0.1:${await freePort()}`, timeout: 1500 });
  const stop = new AbortController();
  const stream = client.stream();
  const p = await stream.send({ user: "alice" }, "x");
  assert.equal((await error(client.pushToUser("alice", "x", { signal: stop.signal }))).code, status.DEADLINE_EXCEEDED);
  const listeners = (signal: AbortSignal): number => getEventListeners(signal, "abort").length;
  assert.equal(listeners(stop.signal), 0);
  assert.ok(listeners((stream as unknown as { stopped: AbortController }).stopped.signal) <= 1);
  assert.ok((await error(p.wait())).notSent);
  await stream.close();
  client.close();
});

test("an answer that is no account leaves the push unknown", async () => {
  const wrong = new BinaryWriter().tag(10, WireType.LengthDelimited).fork().tag(1, WireType.Varint).int32(2).join().finish();
  for (const reply of [new Uint8Array(), wrong, Buffer.from("\xff\xff", "latin1")]) {
    await withFake(() => reply, {}, async (client, fake) => {
      const e = await error(client.pushToUser("alice", "x"));
      assert.deepEqual([e.isUnknown, fake.came.length], [true, 1]);
    });
  }
});

test("a push waits for an instance until its deadline, and was not sent; of several instances those that are there are used", async () => {
  const nobody = `127.0.0.1:${await freePort()}`;
  const alone = new Client({ address: nobody, timeout: 300 });
  const e = await error(alone.pushToUser("alice", "x"));
  assert.deepEqual([e.code, e.notSent], [status.DEADLINE_EXCEEDED, true]);
  alone.close();
  const [one, two] = [await new FakePushManager(() => delivered).start(), await new FakePushManager(() => delivered).start()];
  const client = new Client({ address: `${nobody}, ${one.address},${two.address}` });
  for (let i = 0; i < 20; i++) assert.equal((await client.pushToUser("alice", "x")).outcome, "delivered");
  assert.ok(one.came.length > 0 && two.came.length > 0, `${one.came.length} and ${two.came.length}`);
  one.stop();
  for (let i = 0; i < 20; i++) await client.pushToUser("alice", "x", { messageId: String(i) });
  assert.ok(two.came.length >= 20);
  two.stop();
  client.close();
});

test("a target that is none is refused, and never everybody", async () => {
  await withFake(() => delivered, {}, async (client, fake) => {
    for (const target of [{}, { usr: "alice" }, { everybody: false }, { user: undefined }]) {
      assert.ok((await error(client.push(target as never, "x"))).notSent);
    }
    assert.equal(fake.came.length, 0);
  });
});

test("a push can be given up", async () => {
  await withFake(() => "hang", {}, async (client, fake) => {
    const giveUp = new AbortController();
    const push = error(client.pushToUser("alice", "x", { signal: giveUp.signal }));
    while (fake.came.length === 0) await new Promise((go) => setTimeout(go, 5));
    giveUp.abort();
    const e = await push;
    assert.deepEqual([e.code, e.isUnknown], [status.CANCELLED, true]);
  });
});

test("a token is shown, read again from its file, and never goes to another machine in plain text", async () => {
  assert.throws(() => new Client({ address: "push-manager.example:50053", token: "t" }), /plain text/);
  const file = join(mkdtempSync(join(tmpdir(), "push-manager-sdk-")), "token");
  writeFileSync(file, "first\n");
  await withFake(() => delivered, { tokenFile: file }, async (client, fake) => {
    await client.pushToUser("alice", "x");
    writeFileSync(file, "second\n");
    await new Promise((go) => setTimeout(go, 1050));
    await client.pushToUser("alice", "x");
    assert.deepEqual(fake.came.map((c) => c.metadata.get("authorization")), [["Bearer first"], ["Bearer second"]]);
  });
  await withFake(() => delivered, { token: () => Promise.reject(new Error("no token today")) }, async (client, fake) => {
    const e = await error(client.pushToUser("alice", "x"));
    assert.ok(e.notSent && e.message.includes("no token today") && fake.came.length === 0);
  });
});

test("on a stream a refused push is repeated, and later ones to the same user wait behind it", async () => {
  await withFake((_, n) => (n === 1 ? overloaded : delivered), {}, async (client, fake) => {
    const stream = client.stream();
    const first = await stream.send({ user: "alice" }, "a1");
    while (fake.came.length === 0) await new Promise((go) => setTimeout(go, 1));
    await new Promise((go) => setTimeout(go, 5)); // The refusal is here.
    const rest = await Promise.all([stream.send({ user: "alice" }, "a2"), stream.send({ user: "bob" }, "b1"), stream.send({ user: "alice" }, "a3")]);
    for (const p of [first, ...rest]) assert.equal((await p.wait()).outcome, "delivered");
    await stream.close();
    assert.deepEqual(fake.came.filter((c) => c.target === "alice").map((c) => c.text), ["a1", "a1", "a2", "a3"]);
    assert.deepEqual(fake.came.map((c) => c.text).slice(0, 2), ["a1", "b1"]);
  });
});

test("on a stream a refused push is not repeated if a later one to the same user has gone out", async () => {
  await withFake((came) => (came.text === "a1" ? overloaded : delivered), {}, async (client, fake) => {
    const stream = client.stream();
    const [one, two] = await Promise.all([stream.send({ user: "alice" }, "a1"), stream.send({ user: "alice" }, "a2")]);
    assert.equal((await error(one.wait())).reason, "OVERLOADED");
    assert.equal((await two.wait()).outcome, "delivered");
    await stream.close();
    assert.deepEqual(fake.came.map((c) => c.text), ["a1", "a2"]);
  });
});

test("when a stream breaks, what has no answer is repeated with a message id, and unknown without", async () => {
  let broken = false;
  const answer = (came: Came): Answer => {
    if (came.text === "break" && !broken) {
      broken = true;
      return "break";
    }
    return broken ? delivered : "hang";
  };
  await withFake(answer, {}, async (client, fake) => {
    const stream = client.stream();
    const plain = await stream.send({ user: "alice" }, "plain");
    const named = await stream.send({ user: "bob" }, "named", { messageId: "m" });
    const last = await stream.send({ user: "carol" }, "break", { messageId: "b" });
    assert.ok((await error(plain.wait())).isUnknown);
    assert.equal((await named.wait()).outcome, "delivered");
    assert.equal((await last.wait()).outcome, "delivered");
    await stream.close();
    assert.deepEqual(fake.came.map((c) => c.text).sort(), ["break", "break", "named", "named", "plain"]);
  });
});

test("a stream whose call brings no answers opens another one, and repeats what has a message id", async () => {
  await withFake((_, n) => (n <= 2 ? "hang" : delivered), {}, async (client, fake) => {
    const stream = client.stream();
    const pushes = [await stream.send({ user: "alice" }, "x", { messageId: "m", timeout: 60_000 }), await stream.send({ user: "bob" }, "y", { timeout: 60_000 })];
    while (fake.came.length < 2) await new Promise((go) => setTimeout(go, 5));
    (stream as unknown as { owing: number }).owing = Date.now() - 20_000; // As if the time had passed.
    assert.equal((await pushes[0]!.wait()).outcome, "delivered");
    assert.ok((await error(pushes[1]!.wait())).isUnknown);
    assert.deepEqual(fake.came.map((c) => c.text), ["x", "y", "x"]);
    await stream.close();
  });
});

test("a stream takes no more than it may, and each push ends by its deadline", async () => {
  await withFake(() => "hang", {}, async (client) => {
    const stream = client.stream({ maxOpen: 2 });
    const open = [await stream.send({ user: "a" }, "1", { timeout: 600 }), await stream.send({ user: "b" }, "2", { timeout: 600 })];
    const refused = await error(stream.send({ user: "c" }, "3", { timeout: 100 }));
    assert.deepEqual([refused.code, refused.notSent], [status.DEADLINE_EXCEEDED, true]);
    const waits = stream.send({ user: "d" }, "4", { timeout: 2000 }); // Taken once the others have ended.
    for (const p of open) assert.ok((await error(p.wait())).isUnknown);
    const last = await waits;
    await stream.close(100);
    assert.ok((await error(last.wait())).isUnknown);
    assert.ok((await error(stream.send({ user: "e" }, "5"))).notSent);
  });
});
