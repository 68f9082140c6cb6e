// The race: one request decoded plainly and with drafts, and whether the texts are equal.
import { AnswerView } from "./answer_view.js";
import { compare } from "./diff.js";
import { byId, el, onceAFrame } from "./dom.js";
import { examplesFor, offerExamples } from "./examples.js";
import { duration, number, plural } from "./format.js";
import { replay } from "./replay.js";
import { run } from "./request.js";

const LANES = ["ar", "orthrus"];

/** stopOthers: called before a race, so that nothing of this page takes part of the machine. */
export function startRace(model, tell, stopOthers) {
  const views = Object.fromEntries(LANES.map((lane) => [lane, new AnswerView(byId(`text-${lane}`))]));
  let answers = {};
  let prompt = "";
  let running = null;
  const chat = model.is_assistant;

  function request(lane, seed) {
    const shared = {
      model: model.model,
      max_tokens: Number(byId("race-tokens").value),
      temperature: Number(byId("race-temperature").value),
      seed,
      stream: true,
      return_token_ids: true,
      schedule: lane,
    };
    const drafts = lane === "ar" ? {} : { return_drafts: true };
    const input = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    return { ...shared, ...drafts, ...input };
  }

  function showNumbers(times = {}) {
    const spent = (lane) => times[lane] ?? answers[lane]?.ended ?? answers[lane]?.last ?? 0;
    const longest = Math.max(...LANES.map((lane) => answers[lane]?.ended ?? answers[lane]?.last ?? 0), 1);
    for (const lane of LANES) {
      const answer = answers[lane];
      byId(`bar-${lane}`).style.width = `${(100 * spent(lane)) / longest}%`;
      if (!answer) {
        byId(`numbers-${lane}`).textContent = "–";
        continue;
      }
      const per = lane === "ar" ? "1 token per pass" : `${number(answer.tokensPerCycle, 2)} tokens per cycle`;
      const { tokens, speed } = answer.until(spent(lane));
      byId(`numbers-${lane}`).textContent =
        `${duration(spent(lane))}, ${plural(tokens, "token")}, ${number(speed)} per second, ${per}`;
    }
  }

  const draw = onceAFrame(() => {
    for (const lane of LANES) if (answers[lane]) views[lane].show(answers[lane]);
    showNumbers();
  });

  async function lane(name, seed) {
    answers[name] = await run(chat ? "v1/chat/completions" : "v1/completions", request(name, seed), running.signal, (answer) => {
      answers[name] = answer;
      draw();
    });
  }

  function enable() {
    byId("race-run").disabled = Boolean(running);
    byId("race-stop").disabled = !running;
    byId("race-replay").disabled = Boolean(running) || LANES.some((name) => !answers[name]?.cost);
  }

  async function race() {
    stopOthers();
    running = new AbortController();
    answers = {};
    prompt = byId("race-prompt").value;
    const seed = Math.floor(Math.random() * 2 ** 52);
    byId("verdict").hidden = true;
    tell(null);
    for (const name of LANES) views[name].clear(chat ? "" : prompt);
    showNumbers();
    enable();
    document.querySelector(".lanes").scrollIntoView({ block: "nearest" });
    const together = byId("race-form").elements.start.value === "together";
    try {
      if (together) {
        byId("race-status").textContent = "Both run at the same time, on the same server.";
        await Promise.all(LANES.map((name) => lane(name, seed)));
      } else {
        byId("race-status").textContent = "First plain decoding…";
        await lane("ar", seed);
        if (!running.signal.aborted) {
          byId("race-status").textContent = "Now Orthrus…";
          await lane("orthrus", seed);
        }
      }
      for (const name of LANES) if (answers[name]) views[name].show(answers[name]);
      showNumbers();
      judge(together);
    } catch (error) {
      running.abort();
      tell(error);
      byId("race-status").textContent = `The race broke off: ${error.message}`;
    } finally {
      running = null;
      enable();
    }
  }

  function judge(together) {
    const [ar, orthrus] = LANES.map((name) => answers[name]);
    if (!ar?.cost || !orthrus?.cost) {
      byId("race-status").textContent = "Stopped.";
      return;
    }
    byId("race-status").textContent = together
      ? "Measured together: each lane slowed the other down, unless each had a replica of its own."
      : "Measured one after the other. Replay side by side shows both from a common start.";
    const { equal, at, count, length } = compare(ar.text, orthrus.text);
    const verdict = byId("verdict");
    verdict.hidden = false;
    verdict.classList.toggle("bad", !equal);
    const ratio = ar.ended / orthrus.ended;
    const faster = ratio >= 1 ? `${number(ratio, 2)} times as fast` : `slower this time: ${number(ratio, 2)} times the speed`;
    verdict.replaceChildren(
      el("strong", {}, equal ? "Equal" : "Not equal"),
      equal ? `: 0 of ${plural(length, "character")} differ. ` : `: ${plural(count, "character")} differ, from character ${at + 1} on. `,
      `Plain decoding took ${duration(ar.ended)} and ${number(ar.passes)} passes, Orthrus ${duration(orthrus.ended)} and ${number(orthrus.passes)}: ${faster}, with ${number(orthrus.tokensPerCycle, 2)} tokens per cycle.`,
    );
  }

  byId("race-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) race();
  });
  byId("race-stop").addEventListener("click", () => running?.abort());
  byId("race-replay").addEventListener("click", async () => {
    running = new AbortController();
    enable();
    const lanes = LANES.map((name) => ({ answer: answers[name], view: views[name], prompt: chat ? "" : prompt }));
    await replay(lanes, Number(byId("race-speed").value), running.signal, (now) => {
      showNumbers(Object.fromEntries(LANES.map((name) => [name, Math.min(now, answers[name].last)])));
    });
    running = null;
    showNumbers();
    enable();
  });
  const examples = examplesFor(model.is_assistant, chat ? "chat" : "completion");
  offerExamples("race-examples", "race-prompt", examples);
  byId("race-prompt").value = examples[0][1];
  enable();
}
