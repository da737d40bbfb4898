import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { Client as GrpcClient, credentials, status, type ServiceError } from "@grpc/grpc-js";
import { Client, PushError, type ClientConfig } from "@push-manager/client";
import { ConnectNode } from "@push-manager/connect-node";
import { programs, skip, startStack, until, type Stack } from "./go.js";

describe("with Go programs, all connections over TLS", { skip, timeout: 120_000 }, () => {
  let stack: Stack;
  let secure: string;
  let bin: string;
  const clients: { close(): void }[] = [];

  const clientOf = (cfg: Omit<ClientConfig, "address">): Client => {
    const client = new Client({ address: stack.pushManager.replace("127.0.0.1", "localhost"), timeout: 2000, ...cfg });
    clients.push(client);
    return client;
  };

  before(async () => {
    const dir = mkdtempSync(join(tmpdir(), "push-manager-sdk-"));
    secure = join(dir, "secure");
    bin = programs();
    stack = await startStack(bin, 1, ["--secure", "--data-dir", dir]);
  });
  after(async () => {
    for (const c of clients) c.close();
    await stack?.program.stop();
  });

  test("a certificate or an API key lets a client push, and neither does not", async () => {
    const outcome = async (cfg: Omit<ClientConfig, "address">): Promise<string> => {
      try {
        return (await clientOf(cfg).pushToUser("alice", "Hello")).outcome;
      } catch (e) {
        return e instanceof PushError ? e.reason || status[e.code]! : String(e);
      }
    };
    const caFile = join(secure, "ca.crt");
    const tokenFile = join(secure, "api-key");
    assert.equal(await outcome({ tls: { caFile }, tokenFile }), "offline");
    assert.equal(await outcome({ tls: { caFile }, token: readFileSync(tokenFile, "utf8").trim() }), "offline");
    assert.equal(await outcome({ tls: { caFile, certFile: join(secure, "client-app.crt"), keyFile: join(secure, "client-app.key") } }), "offline");
    assert.equal(await outcome({ tls: { caFile } }), "UNAUTHENTICATED");
    assert.equal(await outcome({ tls: {}, tokenFile }), "DEADLINE_EXCEEDED"); // Nobody here knows that authority.
  });

  test("a node takes part, and takes pushes from Push-Managers alone", async () => {
    execFileSync(join(bin, "push-manager"), ["certs", "node", "node-ts", "localhost", "127.0.0.1", "--dir", secure]);
    const files = (dir: string, name: string): { caFile: string; certFile: string; keyFile: string } =>
      ({ caFile: join(dir, "ca.crt"), certFile: join(dir, `${name}.crt`), keyFile: join(dir, `${name}.key`) });
    const mine = files(secure, "node-node-ts");
    const node = new ConnectNode({
      nodeId: "node-ts", listen: "127.0.0.1:0", tls: { ...mine, trustDomain: "dev" },
      etcd: { endpoints: [`https://${stack.etcd}`], tls: files(join(secure, "etcd"), "client-programs") },
      controller: stack.controller, controllerTls: mine,
    });
    const address = await node.start();
    try {
      await until(() => node.isReady);
      const got: string[] = [];
      node.connect({ send: (p) => void got.push(Buffer.from(p.message.data).toString()), buffered: () => 0, close: () => undefined }, { user: "bob" });
      const client = clientOf({ tls: { caFile: join(secure, "ca.crt") }, tokenFile: join(secure, "api-key") });
      await until(async () => (await client.pushToUser("bob", "Hello")).outcome === "delivered");
      assert.ok(got.includes("Hello"));

      const before = got.length;
      const push = (name: string): Promise<status> => new Promise((go) => {
        const f = files(secure, name);
        const c = new GrpcClient(address, credentials.createSsl(readFileSync(f.caFile), readFileSync(f.keyFile), readFileSync(f.certFile)));
        clients.push(c);
        c.makeUnaryRequest("/pubsub.ConnectNodeService/Broadcast", (b: Buffer) => b, (b: Buffer) => b, Buffer.from([0x0a, 0]), (e: ServiceError | null) => go(e?.code ?? status.OK));
      });
      assert.equal(await push("client-app"), status.PERMISSION_DENIED);
      assert.equal(await push("node-connect-node-1"), status.PERMISSION_DENIED);
      assert.equal(got.length, before);
      assert.equal(await push("manager-push-manager-1"), status.OK);
      assert.equal(got.length, before + 1);
    } finally {
      await node.stop(1000);
    }
  });

  test("a node says which file is missing, and which setting", () => {
    const listen = "0.0.0.0:0";
    assert.throws(() => new ConnectNode({ nodeId: "n", listen, etcd: { endpoints: ["localhost:2379"] } }), /advertise/);
    assert.throws(() => new ConnectNode({ nodeId: "n", etcd: { endpoints: ["https://localhost:2379"] } }), /etcd\.tls/);
    return assert.rejects(new ConnectNode({ nodeId: "n", tls: { caFile: "/no/ca", certFile: "x", keyFile: "y", trustDomain: "dev" } }).start(), /tls\.caFile.*no\/ca/);
  });
});
