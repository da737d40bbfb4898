// Fails if `npm pack` would publish anything but what is meant.
import { execFileSync } from "node:child_process";
import { fileURLToPath } from "node:url";

const meant = [/^package\.json$/, /^README\.md$/, /^LICENSE$/, /^dist\/(gen\/)?[a-z_/]+\.(js|d\.ts)$/];
for (const name of ["client", "connect-node"]) {
  const cwd = fileURLToPath(new URL(`../${name}`, import.meta.url));
  const [packed] = JSON.parse(execFileSync("npm", ["pack", "--dry-run", "--json", "--ignore-scripts"], { cwd, encoding: "utf8" }));
  const files = packed.files.map((f) => f.path);
  const stray = files.filter((f) => !meant.some((m) => m.test(f)));
  const missing = ["package.json", "README.md", "LICENSE", "dist/index.js", "dist/index.d.ts"].filter((f) => !files.includes(f));
  console.log(`${packed.id}: ${files.length} files, ${packed.size} bytes`);
  if (stray.length + missing.length > 0) {
    console.error(`${name}: not meant: ${stray.join(", ") || "none"}; missing: ${missing.join(", ") || "none"}`);
    process.exitCode = 1;
  }
}
