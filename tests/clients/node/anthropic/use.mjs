// The Anthropic package: messages whole and streamed, a tool, counted tokens, an error.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { MODEL, PARAMETERS, QUESTION, URL, checkWeather, refused, step } from "../common.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const asked = { model: MODEL, max_tokens: 24, temperature: 0, messages: [{ role: "user", content: QUESTION }] };

await step("messages, whole and streamed", async () => {
  const whole = await client.messages.create(asked);
  const final = await client.messages.stream(asked).finalMessage();
  assert.deepEqual(final.content, whole.content);
  assert.equal(final.stop_reason, whole.stop_reason);
});

await step("a tool, whole and streamed", async () => {
  const forced = {
    ...asked,
    max_tokens: 300,
    tools: [{ name: "weather", input_schema: PARAMETERS }],
    tool_choice: { type: "any", disable_parallel_tool_use: true },
  };
  const whole = await client.messages.create(forced);
  const use = whole.content.find((block) => block.type === "tool_use");
  checkWeather(use.input);
  const final = await client.messages.stream(forced).finalMessage();
  assert.deepEqual(final.content.find((block) => block.type === "tool_use").input, use.input);
});

await step("counted tokens", async () => {
  const { input_tokens } = await client.messages.countTokens({ model: MODEL, messages: asked.messages });
  assert.ok(input_tokens > 0);
});

await step("an error", () =>
  refused(
    () => client.messages.create({ ...asked, model: "nobody" }),
    (error) => error instanceof Anthropic.NotFoundError,
  ),
);
