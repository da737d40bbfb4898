import assert from "node:assert/strict";
import { join } from "node:path";
import { test } from "node:test";
import { programs, skip, start, startGateway } from "./go.js";

test("the example gateway passes the checks that the Go node passes", { skip, timeout: 180_000 }, async () => {
  const bin = programs();
  const gateway = await startGateway("conformance-ts", "", "");
  const pushctl = join(bin, "pushctl");
  // The check of pings takes 20 s, for its pauses.
  const args = process.env["LONG"] === "1" ? [] : ["--skip", "keepalive"];
  const run = start(pushctl, [
    "-o", "json", "conformance", gateway.grpc, "--node-id", "conformance-ts", "--within", "5s", ...args,
    "--drain", `kill -TERM ${gateway.program.process.pid}`,
    "--client", `'${pushctl}' -o json listen --user "$USER_ID" --room "$ROOM_ID" --url ws://${gateway.http}/ws`,
  ], { HOME: "/nonexistent" });
  await run.ended;
  assert.equal(await gateway.program.ended, 0, gateway.program.output);
  const results = run.output.split("\n").flatMap((line) => {
    try {
      return [JSON.parse(line) as { check: string; outcome: string; got?: string }];
    } catch {
      return [];
    }
  });
  assert.ok(results.length > 30, run.output);
  assert.deepEqual(results.filter((r) => r.outcome === "FAIL"), [], gateway.program.output);
  // What the node does not have: it picks no codec.
  assert.deepEqual(results.filter((r) => r.outcome === "skip").map((r) => r.check), ["size/compression"]);
});

