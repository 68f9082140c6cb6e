// A small plot of the last minutes: a line that grows on the right.
import { el } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 56;
const KEPT = 180; // Values, one a second.

export class Plot {
  /** title: what it shows. show: a value as text. most: the top of the scale, where it is fixed. */
  constructor(title, show, most = null) {
    this.show = show;
    this.most = most;
    this.values = [];
    this.output = el("output", {}, "–");
    this.scale = el("span", {}, "");
    this.line = path("line");
    this.area = path("area");
    const svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" })) svg.setAttribute(name, value);
    const axis = path("axis");
    axis.setAttribute("d", `M0 ${HEIGHT}H${WIDTH}`);
    svg.append(this.area, axis, this.line);
    this.figure = el("figure", { class: "plot" },
      el("figcaption", {}, el("span", {}, title), this.output), svg,
      el("small", {}, el("span", {}, "3 minutes ago"), this.scale, el("span", {}, "now")));
  }

  /** Add a value; null leaves a gap. */
  push(value) {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
    this.output.textContent = value == null ? "–" : this.show(value);
    const top = this.most ?? Math.max(1e-9, ...this.values.map((v) => v ?? 0)) * 1.1;
    this.scale.textContent = this.most ? "" : `up to ${this.show(top / 1.1)}`;
    const x = (i) => WIDTH - ((this.values.length - 1 - i) * WIDTH) / (KEPT - 1);
    const y = (v) => HEIGHT - (Math.min(v, top) / top) * (HEIGHT - 3);
    let line = "";
    let area = "";
    let start = null;
    this.values.forEach((value, i) => {
      if (value == null) {
        if (start !== null) area += `V${HEIGHT}H${start}Z`;
        start = null;
        return;
      }
      const point = `${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
      line += `${start === null ? "M" : "L"}${point}`;
      area += start === null ? `M${x(i).toFixed(1)} ${HEIGHT}L${point}` : `L${point}`;
      start ??= x(i).toFixed(1);
    });
    if (start !== null) area += `V${HEIGHT}H${start}Z`;
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
  }
}

function path(name) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", name);
  return made;
}
