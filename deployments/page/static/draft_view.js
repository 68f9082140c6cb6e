// A strip for each cycle: what was drafted, what was kept, and where it broke off.
import { el, visible } from "./dom.js";

export class DraftView {
  constructor(list) {
    this.list = list;
    this.clear();
  }

  clear() {
    this.list.replaceChildren();
    this.shown = 0;
  }

  show(answer) {
    while (this.shown < answer.cycles.length) this.list.append(strip(answer, ++this.shown));
  }

  /** Mark the strip of a cycle, from 1. */
  mark(number) {
    this.list.querySelector(".chosen")?.classList.remove("chosen");
    const item = this.list.children[number - 1];
    if (!item) return;
    item.classList.add("chosen");
    this.list.scrollTop = item.offsetTop - this.list.offsetTop - this.list.clientHeight / 2;
  }
}

function strip(answer, number) {
  const cycle = answer.cycles[number - 1];
  const texts = answer.cyclePieces(number).map((piece) => piece.text || piece.token || "");
  const kept = Math.min(cycle.accepted, texts.length);
  // Behind a lead, the cycle's first token is the model's own; then come the drafts that were right, and one more of its own.
  const lead = cycle.drafts.length && texts.length - cycle.accepted > 1 ? 1 : 0;
  const chips = [];
  texts.forEach((text, i) => {
    const isDraft = i >= lead && i < lead + kept;
    chips.push(chip(isDraft ? "kept" : "own", text));
  });
  cycle.drafts.slice(cycle.accepted).forEach((text, i) => chips.push(chip(i ? "dropped" : "missed", text)));
  const plural = cycle.tokens === 1 ? "token" : "tokens";
  return el("li", {},
    el("span", { class: "what" }, `${number}: `, el("b", {}, String(cycle.tokens)), ` ${plural}`),
    el("span", { class: "tokens" }, ...chips));
}

const chip = (kind, text) => el("span", { class: `chip ${kind}`, title: kind }, visible(text) || "(end)");
