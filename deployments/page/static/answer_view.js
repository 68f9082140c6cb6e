// Shows an answer's text, one colour a cycle, and follows it as it grows.
import { el } from "./dom.js";

export class AnswerView {
  /** box: the element. choose: called with a piece when it is pointed at or gone to by arrow keys. */
  constructor(box, choose = null) {
    this.box = box;
    this.choose = choose;
    this.clear("");
    if (!choose) return;
    const piece = (event) => this.places.get(event.target.closest?.(".token"));
    // Not pointerover, which also comes when text scrolls under a resting pointer.
    box.addEventListener("pointermove", (event) => {
      if (piece(event) !== this.chosen) this.#go(piece(event));
    });
    box.addEventListener("click", (event) => this.#go(piece(event)));
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step || !this.spans.length) return;
      event.preventDefault();
      this.#go(Math.min(this.spans.length - 1, Math.max(0, (this.chosen ?? -step) + step)), true);
    });
  }

  clear(prompt) {
    this.box.replaceChildren(el("span", { class: "prompt" }, prompt));
    this.spans = [];
    this.places = new Map();
    this.chosen = null;
    this.group = null;
    this.groupCycle = null;
  }

  /** Show the pieces of `answer` up to `count`. Those that are shown already stay, in the colour of their cycle. */
  show(answer, count = answer.pieces.length) {
    const follows = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 40;
    for (let i = Math.max(0, this.spans.length - 64); i < this.spans.length; i++) {
      if (this.spans[i].parentNode.dataset.cycle !== String(answer.pieces[i].cycle)) {
        this.#cut(i); // The server has told where a cycle ended.
        break;
      }
    }
    while (this.spans.length < count) this.#append(answer, answer.pieces[this.spans.length]);
    if (this.group) this.#colour(this.group, answer);
    if (follows) this.box.scrollTop = this.box.scrollHeight;
  }

  #append(answer, piece) {
    if (this.groupCycle !== piece.cycle) {
      if (this.group) this.#colour(this.group, answer);
      this.group = el("span", {});
      this.group.dataset.cycle = piece.cycle;
      this.groupCycle = piece.cycle;
      this.#colour(this.group, answer);
      this.box.append(this.group);
    }
    const span = el("span", { class: "token" }, piece.text);
    this.places.set(span, this.spans.length);
    this.spans.push(span);
    this.group.append(span);
  }

  #colour(group, answer) {
    const number = Number(group.dataset.cycle);
    const cycle = answer.cycles[number - 1];
    let kind = number % 2 ? "odd" : "even";
    if (number === 0) kind = "first";
    else if (cycle && cycle.tokens === 1) kind = "step";
    group.className = `cycle ${kind}`;
  }

  #cut(place) {
    for (const span of this.spans.splice(place)) {
      const group = span.parentNode;
      span.remove();
      if (!group.childNodes.length) group.remove();
    }
    this.group = this.spans.at(-1)?.parentNode ?? null;
    this.groupCycle = this.group ? Number(this.group.dataset.cycle) : null;
  }

  #go(place, scroll = false) {
    if (place === undefined) return;
    this.spans[this.chosen]?.classList.remove("chosen");
    this.chosen = place;
    this.spans[place].classList.add("chosen");
    if (scroll) this.spans[place].scrollIntoView({ block: "nearest" });
    this.choose(place);
  }
}
