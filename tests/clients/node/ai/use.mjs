// Vercel's AI SDK with its OpenAI-compatible, OpenAI (chat and responses) and Anthropic providers.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { BASE, MODEL, QUESTION, checkWeather, refused, step } from "../common.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const openai = createOpenAI({ baseURL: BASE, apiKey: "none" });
const models = {
  compatible: createOpenAICompatible({
    name: "orthrus",
    baseURL: BASE,
    includeUsage: true,
    supportsStructuredOutputs: true,
  })(MODEL),
  chat: openai.chat(MODEL),
  responses: openai.responses(MODEL),
  messages: createAnthropic({ baseURL: BASE, apiKey: "none" })(MODEL),
};
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string().max(20), days: z.int() }),
});
const report = z.object({ city: z.string().max(20), sunny: z.boolean() });

for (const [name, model] of Object.entries(models)) {
  const asked = { model, prompt: QUESTION, temperature: 0, maxRetries: 0 };
  await step(`${name}: text, whole and streamed`, async () => {
    const whole = await generateText({ ...asked, maxOutputTokens: 24 });
    const stream = streamText({ ...asked, maxOutputTokens: 24 });
    let streamed = "";
    for await (const piece of stream.textStream) streamed += piece;
    assert.equal(streamed, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  });
  await step(`${name}: a tool, whole and streamed`, async () => {
    const forced = { ...asked, tools: { weather }, toolChoice: "required", maxOutputTokens: 300 };
    const whole = await generateText(forced);
    checkWeather(whole.toolCalls[0].input);
    const streamed = await streamText(forced).toolCalls;
    assert.deepEqual(streamed[0].input, whole.toolCalls[0].input);
  });
  if (name !== "messages") {
    await step(`${name}: structured output`, async () => {
      const made = await generateText({ ...asked, maxOutputTokens: 300, output: Output.object({ schema: report }) });
      assert.equal(typeof made.output.sunny, "boolean");
    });
  }
  await step(`${name}: an error`, () =>
    refused(
      () => generateText({ ...asked, topP: 7 }),
      (error) => error.statusCode === 400 && /top_p/.test(error.message),
    ),
  );
}
