// An answer as it grows: its tokens, which cycle each belongs to, and what it took.

const STEP = { tokens: 1, drafts: [], accepted: 0 };

/** Tokens of a chat come as bytes, which may be parts of characters. */
class ByteText {
  #decoder = new TextDecoder();
  push = (bytes) => this.#decoder.decode(new Uint8Array(bytes), { stream: true });
}

/**
 * pieces: runs of text in order, each {text, count, cycle, at, logprob?, top?}: tokens where log-probabilities came with
 * them, else what one event brought. Cycle 0 is the pass that read the prompt, which gives the first token.
 * cycles: [{tokens, drafts, accepted}] as the server tells them. Times are in milliseconds since the request was sent.
 */
export class Answer {
  /** toldCycles: whether the request asked for its cycles. If not, it decodes plainly: each token is a cycle. */
  constructor(toldCycles) {
    this.toldCycles = toldCycles;
    this.pieces = [];
    this.cycles = [];
    this.text = "";
    this.tokens = 0;
    this.first = null;
    this.last = null;
    this.cost = null;
    this.finish = null;
    this.began = performance.now();
    this.ended = null;
    this.stopped = false;
    this.bytes = new ByteText();
    this.ends = []; // For each cycle that has ended, the number of tokens up to its end. The first token is the prompt's.
    this.settled = 0; // Pieces before it know their cycle for good.
    this.points = []; // The text's code points, which a completion's offsets count.
  }

  /** Take a streamed event of /v1/completions or /v1/chat/completions. */
  take(event) {
    const choice = event.choices?.[0];
    if (!choice) return;
    const at = performance.now() - this.began;
    const text = choice.text ?? (choice.delta?.reasoning_content ?? "") + (choice.delta?.content ?? "");
    this.text += text;
    const before = this.tokens;
    if (choice.logprobs?.tokens) this.#takeCompletion(choice, text, at);
    else if (choice.logprobs?.content) this.#takeChat(choice, at);
    else if (text || choice.token_ids?.length) this.#add({ text, count: choice.token_ids?.length ?? 1, at });
    if (this.tokens > before) {
      this.first ??= at;
      this.last = at;
    }
    const steps = Array.from({ length: Math.max(0, this.tokens - Math.max(before, 1)) }, () => STEP);
    for (const cycle of this.toldCycles ? (choice.cycles ?? []) : steps) {
      this.cycles.push(cycle);
      this.ends.push((this.ends.at(-1) ?? 1) + cycle.tokens);
    }
    this.#settle();
    this.finish = choice.finish_reason ?? this.finish;
    this.cost = choice.orthrus ?? this.cost;
  }

  end() {
    this.ended = performance.now() - this.began;
  }

  #add(piece) {
    this.pieces.push({ ...piece, start: this.tokens, cycle: null });
    this.tokens += piece.count;
  }

  #takeCompletion(choice, text, at) {
    const { tokens, token_logprobs: logprobs, top_logprobs: tops, text_offset: offsets } = choice.logprobs;
    this.points.push(...text);
    tokens.forEach((token, i) => {
      // A token's text is what lies between its place and the next one's; the last one's goes as far as the text has come.
      const start = offsets[i];
      const end = i + 1 < tokens.length ? offsets[i + 1] : this.points.length;
      const top = Object.entries(tops[i] ?? {}).map(([name, logprob]) => ({ token: name, logprob }));
      this.#add({ text: this.points.slice(start, end).join(""), count: 1, at, token, logprob: logprobs[i], top });
    });
  }

  #takeChat(choice, at) {
    for (const item of choice.logprobs.content) {
      const ends = choice.finish_reason === "stop" && item === choice.logprobs.content.at(-1);
      const text = ends ? "" : this.bytes.push(item.bytes);
      this.#add({ text, count: 1, at, token: item.token, logprob: item.logprob, top: item.top_logprobs });
    }
  }

  /** Find the cycles of pieces. A piece after the last ended cycle belongs to the cycle under way, as far as is known. */
  #settle() {
    let cycle = this.pieces[this.settled - 1]?.cycle ?? 0;
    for (let i = this.settled; i < this.pieces.length; i++) {
      const { start } = this.pieces[i];
      while (start >= (cycle ? (this.ends[cycle - 1] ?? Infinity) : 1)) cycle++;
      this.pieces[i].cycle = cycle;
      if (cycle <= this.cycles.length) this.settled = i + 1;
    }
  }

  get tokensPerCycle() {
    if (this.cost) return this.cost.tokens_per_cycle;
    return this.cycles.length ? (this.ends.at(-1) - 1) / this.cycles.length : null;
  }

  /** Forward passes after the prompt's: a draft and a check for each cycle, or one step. */
  get passes() {
    return this.cost?.passes ?? this.cycles.reduce((sum, cycle) => sum + (cycle.drafts.length ? 2 : 1), 0);
  }

  /** Tokens a second, from the first token to the last. */
  get speed() {
    return this.until(Infinity).speed;
  }

  /** The tokens that had come after so many milliseconds, and their speed. */
  until(time) {
    const come = this.pieces.filter((piece) => piece.at <= time);
    const tokens = come.reduce((sum, piece) => sum + piece.count, 0);
    const spent = tokens > 1 ? come.at(-1).at - this.first : 0;
    return { tokens, speed: spent > 0 ? ((tokens - 1) * 1000) / spent : null };
  }

  /** The pieces of a cycle, from 1. */
  cyclePieces(number) {
    return this.pieces.filter((piece) => piece.cycle === number);
  }
}
