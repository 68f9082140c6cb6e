// What every Node client's script shares.
import assert from "node:assert/strict";

export const URL = process.env.ORTHRUS_URL;
export const BASE = `${URL}/v1`;
export const MODEL = process.env.ORTHRUS_MODEL;
export const QUESTION = "What is the weather in Paris?";
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};

/** One thing that the client does. */
export async function step(name, work) {
  console.log(`${name} ...`);
  await work();
}

/** Arguments of a call of the weather tool: an object that its schema allows. */
export function checkWeather(given) {
  const { city, days, ...rest } = typeof given === "string" ? JSON.parse(given) : given;
  assert.equal(typeof city, "string");
  assert.ok(Number.isInteger(days));
  assert.deepEqual(rest, {});
}

/** `work` fails with an error that `check` accepts. */
export async function refused(work, check) {
  try {
    await work();
  } catch (error) {
    assert.ok(check(error), error);
    return;
  }
  assert.fail("it was taken");
}
