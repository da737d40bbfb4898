// How much a TypeScript node takes: `npm run bench`. A node in a process of its own, with clients in memory that check the order, behind a
// Push-Manager of Go; this process pushes over one Stream.
import { fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import { Client, type Target } from "@push-manager/client";
import { ConnectNode } from "@push-manager/connect-node";
import { programs, startStack, until } from "./go.js";

const members = 100;

if (process.env["BENCH_NODE"] !== undefined) {
  const [etcd = "", controller = ""] = process.env["BENCH_NODE"].split(",");
  const node = new ConnectNode({ nodeId: "bench-ts", listen: "127.0.0.1:0", etcd: { endpoints: [etcd] }, controller });
  await node.start();
  const last = new Map<string, number>();
  let deliveries = 0;
  let disorder = 0;
  let joined = 0;
  for (let i = 0; i < members; i++) {
    const user = `u${i}`;
    node.connect({
      send: ({ message }) => {
        const n = Number(Buffer.from(message.data).toString());
        const of = `${user}/${message.roomId}`;
        if (n !== 0 && n !== (last.get(of) ?? 0) + 1) disorder++;
        last.set(of, n);
        deliveries++;
      },
      buffered: () => 0, close: () => undefined, joined: () => void joined++,
    }, { user }).join("bench");
  }
  process.on("message", () => process.send!({ deliveries, disorder, joined, cpu: process.cpuUsage() }));
} else {
  const stack = await startStack(programs());
  const child = fork(fileURLToPath(import.meta.url), { env: { ...process.env, BENCH_NODE: `${stack.etcd},${stack.controller}` } });
  interface State { deliveries: number; disorder: number; joined: number; cpu: NodeJS.CpuUsage }
  const state = (): Promise<State> => new Promise((go) => {
    child.once("message", (m) => go(m as State));
    child.send("state");
  });
  const client = new Client({ address: stack.pushManager });
  await until(async () => (await state()).joined === 2 * members, 30_000);
  await until(async () => (await client.pushToUser("u0", "0")).outcome === "delivered");
  for (const [name, to, pushes, each] of [
    ["pushes to one user", { user: "u0" }, 20_000, 1],
    [`pushes to a room of ${members}`, { room: "bench" }, 5000, members],
  ] satisfies [string, Target, number, number][]) {
    const begun = await state();
    const stream = client.stream();
    const failures = new Map<string, number>();
    const begin = performance.now();
    const settled = [];
    for (let i = 1; i <= pushes; i++) {
      const p = await stream.send(to, String(i), { timeout: 60_000 });
      settled.push(p.wait().then((r) => r.outcome, String).then((o) => failures.set(o, (failures.get(o) ?? 0) + 1)));
    }
    await Promise.all(settled);
    const seconds = (performance.now() - begin) / 1000;
    await stream.close();
    const ended = await state();
    const deliveries = ended.deliveries - begun.deliveries;
    const cpu = (ended.cpu.user + ended.cpu.system - begun.cpu.user - begun.cpu.system) / deliveries;
    console.log(`${pushes} ${name}: ${[...failures].map(([o, n]) => `${n} ${o}`).join(", ")}; ${deliveries} of ${pushes * each} deliveries, ${ended.disorder} out of order; ` +
      `${Math.round(deliveries / seconds)} deliveries/s, ${cpu.toFixed(1)} us of the node's CPU each`);
  }
  client.close();
  child.kill();
  await stack.program.stop();
}
