// Calls of the server: with the key, with errors that say what happened, and streams as events.
import { askForKey, key } from "./key.js";

/** An error that the server sent, or that it does not answer. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Send a request; `body` is sent as JSON. Asks for a key where one is missing or refused. Throws ApiError. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const options = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store" };
    let answer;
    try {
      answer = await fetch(path, body === undefined ? options : { ...options, body: JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it running, and is this machine online?");
    }
    if (answer.ok) return answer;
    const message = await answer.json().then((told) => told.error?.message ?? told.message, () => null);
    if (answer.status === 401 && (await askForKey(message ?? "It takes calls only with a key."))) continue;
    throw new ApiError(message ?? `The server answered with status ${answer.status}.`, answer.status);
  }
}

/** The JSON of each server-sent event of an answer, until its end. Throws ApiError for an event that is an error. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection to the server broke off.");
      }
      if (part.done) return;
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice("data: ".length);
        if (data === "[DONE]") continue; // The end of the connection follows.
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, event.error.code ?? 0);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
