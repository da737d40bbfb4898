// Writes the code of the protocol into the packages, or with --check fails if what is there is not what would be written.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const sdk = fileURLToPath(new URL("..", import.meta.url));
const repository = join(sdk, "../..");
const plugin = join(sdk, "node_modules/.bin/protoc-gen-es");
const buf = (process.env.BUF ?? "go tool -modfile=tools/buf/go.mod buf").split(" ");

/** Which files of the protocol each package has. */
const packages = {
  client: { inputs: ["."], paths: ["proto/message.proto", "proto/push_manager.proto", "proto/presence.proto", "proto/third_party/google/rpc/status.proto", "proto/third_party/google/rpc/error_details.proto"] },
  "connect-node": { inputs: [".", "sdk/nodejs/proto"], paths: ["proto/message.proto", "proto/connect_node.proto", "proto/controller.proto"] },
};

function files(dir, under = dir) {
  return readdirSync(dir).flatMap((name) => {
    const path = join(dir, name);
    return statSync(path).isDirectory() ? files(path, under) : [relative(under, path)];
  }).sort();
}

function generate(name, out) {
  for (const input of packages[name].inputs) {
    const template = JSON.stringify({ version: "v2", plugins: [{ local: [plugin], out, opt: ["target=ts", "import_extension=js"] }] });
    const paths = input === "." ? packages[name].paths.flatMap((p) => ["--path", p]) : [];
    execFileSync(buf[0], [...buf.slice(1), "generate", input, "--template", template, ...paths], { cwd: repository, stdio: "inherit" });
  }
}

const check = process.argv.includes("--check");
for (const name of Object.keys(packages)) {
  const committed = join(sdk, name, "src/gen");
  if (!check) {
    rmSync(committed, { recursive: true, force: true });
    generate(name, committed);
    continue;
  }
  const fresh = mkdtempSync(join(sdk, "build-"));
  try {
    generate(name, fresh);
    const [is, should] = [files(committed), files(fresh)];
    const differs = [...new Set([...is, ...should])].filter((f) => !is.includes(f) || !should.includes(f) || !readFileSync(join(committed, f)).equals(readFileSync(join(fresh, f))));
    if (differs.length > 0) {
      console.error(`${name}/src/gen is not what proto/ says (make sdk-generate): ${differs.join(", ")}`);
      process.exitCode = 1;
    }
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
}
