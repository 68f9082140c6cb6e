// The playground: one request, its answer coloured by cycle, its numbers, its drafts, and the same as a program.
import { AnswerView } from "./answer_view.js";
import { compare } from "./diff.js";
import { byId, onceAFrame } from "./dom.js";
import { DraftView } from "./draft_view.js";
import { examplesFor, offerExamples } from "./examples.js";
import { duration, number, plural } from "./format.js";
import { inspect } from "./inspector.js";
import { key } from "./key.js";
import { replay } from "./replay.js";
import { run } from "./request.js";
import { snippet } from "./snippets.js";

const STORED = "orthrus-playground"; // In sessionStorage.
const SETTINGS = ["temperature", "max_tokens", "seed", "top_p", "top_k", "min_p", "stop_text"];
const REPLAY_SPEED = 0.1;
const ALTERNATIVES = 5;
const PATHS = { completion: "v1/completions", chat: "v1/chat/completions" };

export function startPlayground(model, tell) {
  let answer = null;
  let sent = null; // What the answer is to: {path, request, prompt}.
  let running = null; // The AbortController of what runs.
  let language = "curl";
  const view = new AnswerView(byId("answer"), (place) => {
    inspect(byId("inspector"), answer, place);
    drafts.mark(answer.pieces[place].cycle);
  });
  const drafts = new DraftView(byId("strips"));
  const form = byId("play-form");
  const mode = () => form.elements.mode.value;
  const numeric = (id) => Number(byId(id).value);

  function body() {
    const request = { model: model.model };
    if (mode() === "chat") request.messages = [{ role: "user", content: byId("prompt").value }];
    else request.prompt = byId("prompt").value;
    request.max_tokens = numeric("max_tokens");
    request.temperature = numeric("temperature");
    for (const [name, neutral] of [["top_p", 1], ["top_k", 0], ["min_p", 0]]) {
      if (numeric(name) !== neutral) request[name] = numeric(name);
    }
    // As text: a seed may be larger than a JavaScript number holds exactly. Such a one is sent as near as it can be.
    if (byId("seed").value.trim()) request.seed = Number(byId("seed").value);
    if (byId("stop_text").value) request.stop = byId("stop_text").value;
    request.stream = true;
    return request;
  }

  function scored({ path, request }) {
    const scores = path === PATHS.chat ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
    return { ...request, ...scores, return_drafts: true };
  }

  function showNumbers() {
    byId("n-tpc").textContent = number(answer?.tokensPerCycle, 2);
    byId("n-speed").textContent = number(answer?.speed);
    byId("n-first").textContent = duration(answer?.first ?? null);
    byId("n-tokens").textContent = answer ? number(answer.tokens) : "–";
    byId("n-passes").textContent = answer ? number(answer.passes) : "–";
    byId("n-plain").textContent = answer?.cost ? `plain decoding: ${number(answer.tokens - 1)}` : "";
  }

  const draw = onceAFrame(() => {
    if (!answer) return;
    view.show(answer);
    drafts.show(answer);
    showNumbers();
  });

  function showSnippet() {
    const root = new URL(".", document.baseURI).href.replace(/\/$/, "");
    const request = body();
    // The seed that was drawn for the answer on show: the program gives the same text.
    if (request.temperature > 0 && sent?.path === PATHS[mode()]) request.seed ??= answer?.cost?.seed;
    byId("snippet").textContent = snippet(language, root, PATHS[mode()], request, Boolean(key()));
  }

  function enable() {
    byId("run").disabled = Boolean(running);
    byId("stop").disabled = !running;
    for (const id of ["again", "replay"]) byId(id).disabled = Boolean(running) || !answer?.pieces.length;
  }

  async function send(asked) {
    running = new AbortController();
    answer = null;
    sent = asked;
    view.clear(sent.prompt);
    drafts.clear();
    byId("inspector").replaceChildren("Point at a token, or press an arrow key in the answer, to see what else could have stood there.");
    byId("play-status").textContent = "Waiting for the first token…";
    tell(null);
    enable();
    showNumbers();
    document.querySelector(".result").scrollIntoView({ block: "nearest" });
    try {
      await run(sent.path, scored(sent), running.signal, (grown) => {
        if (!answer) byId("play-status").textContent = "Writing…";
        answer = grown;
        draw();
      });
      view.show(answer);
      drafts.show(answer);
      showNumbers();
      byId("play-status").textContent = summary(answer);
    } catch (error) {
      tell(error);
      byId("play-status").textContent = `The request failed: ${error.message}`;
    } finally {
      running = null;
      enable();
      showSnippet();
    }
  }

  async function sameAgain() {
    const before = answer;
    const request = { ...sent.request, seed: before.cost?.seed ?? sent.request.seed };
    await send({ ...sent, request });
    if (!answer?.cost || before.stopped) return;
    const { equal, count } = compare(before.text, answer.text);
    byId("play-status").textContent = equal
      ? `The same again: equal, 0 of ${plural(answer.points.length || [...answer.text].length, "character")} differ (seed ${request.seed}).`
      : `Not the same: ${plural(count, "character")} differ.`;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    send({ path: PATHS[mode()], request: body(), prompt: mode() === "chat" ? "" : byId("prompt").value });
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("again").addEventListener("click", sameAgain);
  byId("replay").addEventListener("click", async () => {
    running = new AbortController();
    enable();
    byId("play-status").textContent = "A tenth of the true speed. Each colour is one cycle.";
    await replay([{ answer, view, prompt: sent.prompt }], REPLAY_SPEED, running.signal);
    running = null;
    enable();
    byId("play-status").textContent = summary(answer);
  });
  // Prompts by mode: switching between modes loses none, and a reload loses neither them nor the settings.
  const { mode: last, typed = {}, settings = {} } = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
  for (const [id, value] of Object.entries(settings)) byId(id).value = value;
  byId("prompt").addEventListener("input", () => (typed[mode()] = byId("prompt").value));
  form.addEventListener("input", () => {
    const now = Object.fromEntries(SETTINGS.map((id) => [id, byId(id).value]));
    sessionStorage.setItem(STORED, JSON.stringify({ mode: mode(), typed, settings: now }));
  });
  form.addEventListener("input", showSnippet);
  for (const button of document.querySelectorAll("[data-snippet]")) {
    button.addEventListener("click", () => {
      language = button.dataset.snippet;
      for (const other of document.querySelectorAll("[data-snippet]")) other.setAttribute("aria-pressed", String(other === button));
      showSnippet();
    });
  }
  byId("copy").addEventListener("click", () => copyText(byId("snippet"), byId("copy")));
  for (const radio of form.elements.mode) {
    radio.addEventListener("change", () => {
      const examples = examplesFor(model.is_assistant, mode());
      offerExamples("examples", "prompt", examples);
      byId("prompt").value = typed[mode()] ?? examples[0][1];
      byId("prompt-label").textContent = mode() === "chat" ? "Message" : "Prompt: the model goes on from here";
      showSnippet();
    });
  }
  form.elements.mode.value = last ?? (model.is_assistant ? "chat" : "completion");
  form.elements.mode[0].dispatchEvent(new Event("change", { bubbles: true }));
  byId("inspector").textContent = "Here you will see each token's probability and what else could have stood there.";
  enable();
  return { stop: () => running?.abort() };
}

function summary(answer) {
  if (!answer.pieces.length) return answer.stopped ? "Stopped before the first token." : "The answer is empty: the model ended it at once.";
  const tokens = plural(answer.tokens, "token");
  if (answer.stopped) {
    const told = answer.tokensPerCycle == null ? "" : ` ${number(answer.tokensPerCycle, 2)} tokens per cycle in ${plural(answer.cycles.length, "cycle")}.`;
    return `Stopped after ${tokens}.${told}`;
  }
  if (!answer.cycles.length) return `${tokens}.`;
  const per = number(answer.tokensPerCycle, 2);
  const drafted = answer.cycles.some((cycle) => cycle.drafts.length);
  if (!drafted) return `${tokens}, one per pass: drafting did not pay here, so the server decoded plainly.`;
  const later = `${number(answer.tokens - 1)} in ${plural(answer.cycles.length, "cycle")}, ${per} each`;
  return `${tokens}: 1 from reading the prompt, then ${later}. That took ${plural(answer.passes, "forward pass").replace("passs", "passes")}, where plain decoding takes ${number(answer.tokens - 1)}.`;
}

async function copyText(source, button) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    // Without HTTPS a browser has no clipboard for pages: select it, for the reader's own keys.
    getSelection().selectAllChildren(source);
    button.textContent = "Selected: copy with your keys";
  }
  setTimeout(() => (button.textContent = "Copy"), 2500);
}
