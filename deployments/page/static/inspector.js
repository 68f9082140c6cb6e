// What is known of one token: its log-probability, what else could have stood there, and its cycle.
import { el, visible } from "./dom.js";

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};

export function inspect(box, answer, place) {
  const piece = answer.pieces[place];
  const parts = [el("strong", {}, visible(piece.token ?? piece.text) || "(end)")];
  if (piece.logprob != null) parts.push(`probability ${percent(piece.logprob)}, log-probability ${piece.logprob.toFixed(3)}`);
  parts.push(tellCycle(answer, piece.cycle));
  if (piece.top?.length) {
    const best = [...piece.top].sort((a, b) => b.logprob - a.logprob);
    parts.push(el("ul", { "aria-label": "Likeliest tokens here" },
      ...best.map((other) => el("li", {}, el("span", {}, visible(other.token) || "(end)"), ` ${percent(other.logprob)}`))));
  }
  box.replaceChildren(...parts.map((part) => (typeof part === "string" ? el("span", {}, part) : part)));
}

function tellCycle(answer, number) {
  if (number === 0) return "first token: it comes with the pass that reads the prompt";
  const cycle = answer.cycles[number - 1];
  if (!cycle) return `cycle ${number}`;
  if (!cycle.drafts.length) return `cycle ${number}: a plain step, 1 token`;
  return `cycle ${number}: ${cycle.tokens} tokens, ${cycle.accepted} of ${cycle.drafts.length} drafts kept`;
}
