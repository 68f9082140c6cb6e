// The openai package: chat, streams and the stream helper, tools, structured output, seeds, responses, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { BASE, MODEL, PARAMETERS, QUESTION, checkWeather, refused, step } from "../common.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: "none", maxRetries: 0 });
const asked = { model: MODEL, messages: [{ role: "user", content: QUESTION }], temperature: 0 };
const tools = {
  tools: [{ type: "function", function: { name: "weather", parameters: PARAMETERS } }],
  tool_choice: "required",
  parallel_tool_calls: false,
  max_tokens: 200,
};

let text;
await step("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create({ ...asked, max_tokens: 24 });
  text = whole.choices[0].message.content;
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, max_tokens: 24, stream: true })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(streamed, text);
  let helped = "";
  for await (const event of client.chat.completions.stream({ ...asked, max_tokens: 24 })) {
    helped += event.choices[0]?.delta?.content ?? "";
  }
  assert.equal(helped, text);
});

await step("a seed that comes back gives the same text", async () => {
  const first = await client.completions.create({ model: MODEL, prompt: "x = ", max_tokens: 16, temperature: 1 });
  const { seed } = first.choices[0].orthrus;
  assert.ok(Number.isSafeInteger(seed), `${seed}`);
  const again = await client.completions.create({ model: MODEL, prompt: "x = ", max_tokens: 16, temperature: 1, seed });
  assert.equal(again.choices[0].text, first.choices[0].text);
});

await step("a tool, whole and by the stream helper", async () => {
  const whole = await client.chat.completions.create({ ...asked, ...tools });
  const [call] = whole.choices[0].message.tool_calls;
  checkWeather(call.function.arguments);
  const final = await client.chat.completions.stream({ ...asked, ...tools }).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
});

await step("structured output", async () => {
  const made = await client.chat.completions.parse({
    ...asked,
    max_tokens: 300,
    response_format: { type: "json_schema", json_schema: { name: "report", schema: PARAMETERS, strict: true } },
  });
  checkWeather(made.choices[0].message.content);
});

await step("responses, whole and streamed", async () => {
  const wanted = { model: MODEL, input: QUESTION, max_output_tokens: 24, temperature: 0 };
  const whole = await client.responses.create(wanted);
  const final = await client.responses.stream(wanted).finalResponse();
  assert.equal(final.output_text, whole.output_text);
});

await step("errors", async () => {
  await refused(
    () => client.chat.completions.create({ ...asked, model: "nobody" }),
    (error) => error instanceof OpenAI.NotFoundError,
  );
  await refused(
    () => client.chat.completions.create({ ...asked, temperature: -1 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
});
