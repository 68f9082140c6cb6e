// Shows finished answers again, in their own rhythm, at any speed.

/** lanes: [{answer, view}]. speed: 1 is true speed. tick: called with the milliseconds of the answers that have passed. */
export function replay(lanes, speed, signal, tick = () => {}) {
  const end = Math.max(...lanes.map(({ answer }) => answer.last ?? 0));
  const began = performance.now();
  for (const { view, prompt } of lanes) view.clear(prompt);
  return new Promise((resolve) => {
    const step = () => {
      const now = signal.aborted ? Infinity : (performance.now() - began) * speed;
      for (const { answer, view } of lanes) {
        let count = view.spans.length;
        while (count < answer.pieces.length && answer.pieces[count].at <= now) count++;
        view.show(answer, count);
      }
      tick(Math.min(now, end));
      if (now >= end) resolve();
      else requestAnimationFrame(step);
    };
    step();
  });
}
