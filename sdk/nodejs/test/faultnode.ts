// A Connect-Node for internal/faultbench, which drives it in lines: "+user" and "-user" say who is connected, "sync" is answered behind everything
// that has arrived. It answers "got ID USER" for each push, before the push is acknowledged. `make chaos FOREIGN_NODE=...` puts it beside Go nodes.
import { createInterface } from "node:readline";
import { ConnectNode, type Session } from "@push-manager/connect-node";

const [id = "", address = "", , users = ""] = (process.env["FAULTBENCH_NODE"] ?? "").split(",");
const say = (line: string): void => void process.stdout.write(`${line}\n`); // Pipes are written at once.
// The test's Controller says who is in a room, and users do not join any.
const node = new ConnectNode({ nodeId: id, listen: address, anyRoom: true });
const sessions = new Map<string, Session>();

function connect(user: string): void {
  sessions.get(user)?.end();
  const push = (data: Uint8Array): void => say(`got ${Buffer.from(data.subarray(0, 32)).toString("latin1").split(" ")[0]} ${user}`);
  sessions.set(user, node.connect({ send: (p) => push(p.message.data), buffered: () => 0, close: () => undefined }, { user }));
}

const listens = await node.start();
for (const user of users.split(" ")) if (user !== "") connect(user);
createInterface({ input: process.stdin })
  .on("line", (line) => {
    if (line.startsWith("+")) connect(line.slice(1));
    if (line.startsWith("-")) sessions.get(line.slice(1))?.end();
    say(`done ${line}`);
  })
  .on("close", () => process.exit(0));
process.once("SIGTERM", () => void node.stop(30_000).then(() => process.exit(0)));
say(`listens ${listens}`);
