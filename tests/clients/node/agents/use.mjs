// The OpenAI Agents SDK for Node: a tool that has to be called, its result, the answer; over both of OpenAI's APIs.
import assert from "node:assert/strict";
import { Agent, OpenAIProvider, Runner, setTracingDisabled, tool } from "@openai/agents";
import { z } from "zod";
import { BASE, MODEL, QUESTION, step } from "../common.mjs";

setTracingDisabled(true);
for (const useResponses of [false, true]) {
  await step(useResponses ? "responses" : "chat", async () => {
    const called = [];
    const weather = tool({
      name: "weather",
      description: "The weather of a city.",
      parameters: z.object({ city: z.string().max(20), days: z.int() }),
      execute: async ({ city, days }) => {
        called.push([city, days]);
        return "Sunny.";
      },
    });
    const agent = new Agent({
      name: "Weather",
      instructions: "Answer with the tool.",
      tools: [weather],
      model: MODEL,
      // After the call the choice is the model's own again: else the loop would have no end.
      modelSettings: { toolChoice: "required", temperature: 0, maxTokens: 200, parallelToolCalls: false },
    });
    const modelProvider = new OpenAIProvider({ baseURL: BASE, apiKey: "none", useResponses });
    const result = await new Runner({ modelProvider }).run(agent, QUESTION, { maxTurns: 8 });
    assert.equal(called.length >= 1, true);
    assert.equal(typeof result.finalOutput, "string");
  });
}
