// Codex' command line, which speaks the Responses API: one turn runs to its end.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { BASE, MODEL, step } from "../common.mjs";

await step("a turn", () => {
  const home = mkdtempSync(join(tmpdir(), "codex-"));
  const settings = [
    `model="${MODEL}"`,
    'model_provider="orthrus"',
    `model_providers.orthrus={name="orthrus", base_url="${BASE}", wire_api="responses", request_max_retries=0, stream_max_retries=0}`,
  ].flatMap((setting) => ["-c", setting]);
  const run = spawnSync(
    join(process.cwd(), "node_modules", ".bin", "codex"),
    ["exec", "--json", "--skip-git-repo-check", "--sandbox", "read-only", ...settings, "Say hello."],
    { cwd: home, env: { ...process.env, CODEX_HOME: home }, encoding: "utf8", timeout: 240_000, input: "" },
  );
  const events = run.stdout.split("\n").filter(Boolean).map((line) => JSON.parse(line));
  const kinds = events.map((event) => event.type);
  assert.equal(run.status, 0, `${run.stdout}\n${run.stderr}`);
  assert.ok(kinds.includes("turn.completed"), `${run.stdout}\n${run.stderr}`);
});
