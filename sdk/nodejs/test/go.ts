// The Go programs of this repository, for tests that hold the packages against them.
import { execFileSync, spawn, spawnSync, type ChildProcess } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { createServer, type AddressInfo, type Server } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const repository = fileURLToPath(new URL("../../../../", import.meta.url));

/** Why the tests with Go programs are skipped; false: they are not. With CI=true they fail instead. */
export const skip: string | false =
  spawnSync("go", ["version"]).status === 0 || process.env["CI"] === "true" ? false : "go is missing: the Go programs cannot be built";

/** Where the programs are, built once for a test file. */
export function programs(): string {
  const dir = join(repository, "sdk/nodejs/build/bin");
  execFileSync("go", ["build", "-o", `${dir}/`, "./cmd/push-manager", "./cmd/pushctl", "./cmd/controller"], { cwd: repository, stdio: ["ignore", "inherit", "inherit"] });
  return dir;
}

const listen = (port: number): Promise<Server> =>
  new Promise((resolve, reject) => {
    const s = createServer();
    s.once("error", reject);
    s.listen(port, "127.0.0.1", () => resolve(s));
  });
const unlisten = (s: Server): Promise<void> => new Promise((go) => s.close(() => go()));

export async function freePort(): Promise<number> {
  const s = await listen(0);
  const { port } = s.address() as AddressInfo;
  await unlisten(s);
  return port;
}

/** The first of n ports that are free and follow each other. */
async function freePorts(n: number): Promise<number> {
  for (;;) {
    const first = 20_000 + Math.floor(Math.random() * 10_000);
    const taken: Server[] = [];
    try {
      for (let i = 0; i < n; i++) taken.push(await listen(first + i));
      return first;
    } catch {
      // Somebody has one of them.
    } finally {
      await Promise.all(taken.map(unlisten));
    }
  }
}

/** A program under test. */
export class Program {
  output = "";
  readonly ended: Promise<number | null>;

  constructor(readonly process: ChildProcess) {
    for (const out of [process.stdout, process.stderr]) out?.on("data", (b: Buffer) => (this.output = (this.output + b.toString()).slice(-100_000)));
    this.ended = new Promise((go) => process.once("exit", (code) => go(code)));
  }

  /** Waits until it has printed something. */
  async prints(text: string, ms = 60_000): Promise<void> {
    await until(() => {
      if (this.process.exitCode !== null) throw new Error(`it has ended with ${this.process.exitCode}:\n${this.output}`);
      return this.output.includes(text);
    }, ms, () => `it did not print ${JSON.stringify(text)}:\n${this.output}`);
  }

  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<number | null> {
    this.process.kill(signal);
    const timer = setTimeout(() => this.process.kill("SIGKILL"), 15_000);
    const code = await this.ended;
    clearTimeout(timer);
    return code;
  }
}

export function start(command: string, args: string[], env: Record<string, string> = {}): Program {
  const dir = mkdtempSync(join(tmpdir(), "push-manager-sdk-"));
  return new Program(spawn(command, args, { cwd: dir, env: { PATH: process.env["PATH"] ?? "", HOME: dir, ...env }, stdio: ["ignore", "pipe", "pipe"] }));
}

/** Waits until something holds. */
export async function until(holds: () => boolean | Promise<boolean>, ms = 30_000, or: () => string = () => `it did not come within ${ms} ms`): Promise<void> {
  const end = Date.now() + ms;
  while (!(await holds())) {
    if (Date.now() > end) throw new Error(or());
    await new Promise((go) => setTimeout(go, 10));
  }
}

/** push-manager dev: etcd, a Controller, Go nodes and a Push-Manager. */
export interface Stack {
  program: Program;
  etcd: string;
  controller: string;
  pushManager: string;
  /** The WebSocket of the first Go node. */
  webSocket: string;
}

export async function startStack(bin: string, nodes = 1, more: string[] = []): Promise<Stack> {
  const base = await freePorts(6 + 2 * nodes);
  const program = start(join(bin, "push-manager"), ["dev", "--base-port", String(base), "--nodes", String(nodes), ...more]);
  const at = (i: number): string => `127.0.0.1:${base + i}`;
  const s: Stack = { program, etcd: at(0), controller: at(2), pushManager: at(3), webSocket: `ws://${at(6)}/ws` };
  await program.prints("Ready");
  return s;
}

/** The gateway of connect-node/example, in a process of its own. */
export async function startGateway(id: string, etcd: string, controller: string): Promise<{ program: Program; grpc: string; http: string }> {
  const [grpc, http] = [await freePort(), await freePort()];
  const path = fileURLToPath(new URL("../example/gateway.js", import.meta.url));
  const program = start(process.execPath, [path], {
    NODE_ID: id, GRPC_PORT: String(grpc), HTTP_PORT: String(http), ETCD_ENDPOINTS: etcd, CONTROLLER_ADDRESS: controller,
  });
  await program.prints("clients at");
  return { program, grpc: `127.0.0.1:${grpc}`, http: `127.0.0.1:${http}` };
}
