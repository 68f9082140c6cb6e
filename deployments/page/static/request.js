// One request, streamed into an Answer.
import { call, events } from "./api.js";
import { Answer } from "./answer.js";

/** Send `body` to `path`; `grow` is called whenever the answer has grown. Stopping by `signal` is no error. Throws ApiError. */
export async function run(path, body, signal, grow) {
  const answer = new Answer(Boolean(body.return_drafts));
  try {
    const response = await call(path, { body, signal });
    for await (const event of events(response)) {
      answer.take(event);
      grow(answer);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    answer.stopped = true;
  }
  answer.end();
  grow(answer);
  return answer;
}
