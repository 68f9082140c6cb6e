// The cluster view: it shows one stream of events, which is read only while the view is open.
import { call, events } from "./api.js";
import { byId, el } from "./dom.js";
import { number, plural, roughly } from "./format.js";
import { Plot } from "./plot.js";
import { quantile, Rates, since } from "./rates.js";

const RETRY_MS = 3000;
const REMEMBER_GONE_S = 20;
const NEW_S = 20;
const LATENCIES = [["first_token", "First token"], ["inter_token", "Between tokens"], ["whole", "Whole answer"]];
const SHARES = [0.5, 0.95, 0.99];
const WINDOW_METRICS = 6; // Of the metrics, which come every ten seconds: a minute.

export class ClusterView {
  #stream = null;
  #rates = new Rates();
  #rows = new Map(); // By replica: {row, seen, since, gone}.
  #starting = null; // {row, since} while replicas start.
  #metrics = [];
  #latest = {};
  #plots = {
    speed: new Plot("Tokens per second", (v) => number(v)),
    perCycle: new Plot("Tokens per cycle", (v) => number(v, 2)),
    started: new Plot("Requests started per second", (v) => number(v, 1)),
    rows: new Plot("Rows used", (v) => `${number(100 * v)} %`, 1),
    waiting: new Plot("Waiting requests", (v) => number(v)),
    replicas: new Plot("Replicas", (v) => number(v)),
  };

  constructor(tell) {
    this.tell = tell;
    byId("plots").replaceChildren(...Object.values(this.#plots).map((plot) => plot.figure));
  }

  open() {
    if (this.#stream) return;
    this.#stream = new AbortController();
    this.#follow(this.#stream.signal);
  }

  close() {
    this.#stream?.abort();
    this.#stream = null;
  }

  async #follow(signal) {
    while (!signal.aborted) {
      try {
        for await (const event of events(await call("page/cluster", { signal }))) {
          this.tell(null);
          this.#take(event);
        }
      } catch (error) {
        if (error.name === "AbortError" || signal.aborted) return;
        this.tell(error);
        byId("cluster-state").textContent = "No connection to the server. Trying again every few seconds.";
        if (error.status === 401) return this.close();
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
  }

  #take(event) {
    Object.assign(this.#latest, event);
    if (event.replicas !== undefined) this.#showReplicas(event.replicas, event.at);
    if (event.decisions) this.#showDecisions(event.decisions);
    if (event.requests) {
      this.#metrics.push(event.requests);
      if (this.#metrics.length > WINDOW_METRICS + 1) this.#metrics.shift();
      this.#showLatencies();
    }
    this.#showState();
  }

  #showState() {
    const { deployment, replicas } = this.#latest;
    if (!deployment) return;
    const { RUNNING: running = 0, ...others } = deployment.replicas;
    const states = [`${plural(running, "replica")} run${running === 1 ? "s" : ""}`,
      ...Object.entries(others).map(([state, count]) => `${count} ${state.toLowerCase()}`)];
    const told = running || states.length > 1 ? states.join(", ") : "no replica runs; the next request starts one";
    const status = deployment.status[0] + deployment.status.slice(1).toLowerCase();
    this.#showStarting(others.STARTING ?? 0);
    const ours = replicas === null ? " The configured request router does not share the replicas' reports." : "";
    byId("cluster-state").textContent =
      `${status}: ${told}. ${deployment.message}${ours}`.trim();
  }

  /** A row that says how many replicas are starting, and since when. */
  #showStarting(count) {
    this.#starting?.row.remove();
    if (!count) {
      this.#starting = null;
      return;
    }
    const since = this.#starting?.since ?? new Date().toLocaleTimeString();
    const row = el("tr", {}, el("th", { scope: "row" }, count === 1 ? "1 more" : `${count} more`), el("td", { colSpan: 7 }, `starting, seen since ${since}`));
    this.#starting = { row, since };
    byId("replicas").tBodies[0].append(row);
  }

  #showReplicas(replicas, at) {
    const sum = { speed: null, committed: 0, cycles: 0, started: null, waiting: 0, rows: [] };
    for (const { name, capacity, stats } of replicas ?? []) {
      if (stats.passes === undefined) continue;
      const grown = this.#rates.grown(name, at, stats);
      const told = figures(capacity, stats, grown);
      this.#showRow(name, at, told);
      sum.waiting += stats.waiting;
      if (!grown) continue;
      sum.speed = (sum.speed ?? 0) + told.speed;
      sum.started = (sum.started ?? 0) + grown.change.admitted / grown.seconds;
      sum.committed += grown.change.committed;
      sum.cycles += grown.change.cycles;
      sum.rows.push(told.rows);
    }
    this.#dropGone(new Set((replicas ?? []).map(({ name }) => name)), at);
    this.#plots.speed.push(sum.speed);
    this.#plots.perCycle.push(sum.cycles ? sum.committed / sum.cycles : null);
    this.#plots.started.push(sum.started);
    this.#plots.rows.push(sum.rows.length ? sum.rows.reduce((a, b) => a + b) / sum.rows.length : null);
    this.#plots.waiting.push(sum.waiting);
    this.#plots.replicas.push(replicas?.length ?? null);
  }

  #showRow(name, at, told) {
    let entry = this.#rows.get(name);
    if (!entry) {
      entry = { row: el("tr", {}), since: this.#rows.size ? at : null };
      this.#rows.set(name, entry);
      byId("replicas").tBodies[0].append(entry.row);
    }
    entry.gone = null;
    entry.row.className = entry.since && at - entry.since < NEW_S ? "new" : "";
    entry.row.replaceChildren(
      el("th", { scope: "row" }, name),
      share(told.rows, "Rows used"),
      share(told.kv, "KV cache used"),
      ...[number(told.running), number(told.waiting), number(told.speed), number(told.perCycle, 2),
        told.hits == null ? "–" : `${number(100 * told.hits)} %`].map((text) => el("td", {}, text)),
    );
  }

  #dropGone(live, at) {
    for (const [name, entry] of this.#rows) {
      if (live.has(name)) continue;
      if (!entry.gone) {
        entry.gone = at;
        entry.row.className = "gone";
        this.#rates.forget(name);
        entry.row.replaceChildren(el("th", { scope: "row" }, name), el("td", { colSpan: 7 }, "has left"));
      } else if (at - entry.gone > REMEMBER_GONE_S) {
        entry.row.remove();
        this.#rows.delete(name);
      }
    }
  }

  #showDecisions(decisions) {
    const list = byId("decisions");
    if (!decisions.length) {
      list.replaceChildren(el("li", {}, "No decision yet. A number of replicas that is fixed in the config never changes."));
      return;
    }
    list.replaceChildren(...runs(decisions).reverse().map((run) => {
      const decision = run.at(-1);
      const at = new Date(run[0].at * 1000);
      const counts = [...new Set(run.map(({ replicas }) => replicas))].sort((a, b) => a - b);
      let what = `Wants ${plural(decision.replicas, "replica")}, ${decision.before} run${decision.before === 1 ? "s" : ""}`;
      if (decision.kind === "scaled") what = `Scaled from ${decision.before} to ${decision.replicas}`;
      else if (run.length > 2) what = `Wavered between ${counts[0]} and ${counts.at(-1)} for ${number(decision.at - run[0].at)} s; now wants ${decision.replicas}`;
      return el("li", {}, el("time", { dateTime: at.toISOString() }, at.toLocaleTimeString()),
        el("span", { class: decision.kind }, what), `: ${decision.reason}`);
    }));
  }

  #showLatencies() {
    const now = this.#metrics.at(-1);
    const before = this.#metrics.length > 1 ? this.#metrics[0] : null;
    const body = el("tbody", {});
    for (const [field, title] of LATENCIES) {
      const buckets = now ? since(now[field], before?.[field]) : [];
      const count = buckets.at(-1)?.[1] ?? 0;
      // A percentile needs observations on both of its sides.
      const cells = SHARES.map((share) => (count * (1 - share) < 1 ? null : quantile(buckets, share)));
      body.append(el("tr", {}, el("th", { scope: "row" }, title), ...cells.map((s) => el("td", {}, s == null ? "–" : roughly(1000 * s)))));
    }
    const head = el("thead", {}, el("tr", {}, ...["", "half within", "95 % within", "99 % within"].map((text) => (text ? el("th", { scope: "col" }, text) : el("td", {})))));
    const { ok = 0, cancelled = 0, ...failures } = now?.outcomes ?? {};
    const failed = Object.values(failures).reduce((a, b) => a + b, 0);
    const ended = `${number(ok)} answered, ${number(cancelled)} cancelled by their clients, ${number(failed)} refused or failed`;
    const span = before ? `the last ${10 * (this.#metrics.length - 1)} seconds` : "the time since the server's start";
    byId("latencies").replaceChildren(
      el("div", { class: "scroll", role: "region", tabIndex: 0, "aria-labelledby": "latency-title" }, el("table", {}, head, body)),
      el("p", { class: "hint" }, `Of ${span}; updated every 10 seconds. About, from histograms. Requests since the start: ${ended}.`));
  }
}

/** What a replica's row shows. */
function figures(capacity, stats, grown) {
  const change = grown?.change;
  return {
    rows: change ? Math.min(1, change.row_use_seconds / grown.seconds) : 0,
    kv: stats.kv_pages_total ? stats.kv_pages_used / stats.kv_pages_total : 0,
    running: stats.running,
    waiting: stats.waiting,
    speed: change ? change.committed / grown.seconds : null,
    perCycle: change?.cycles ? change.committed / change.cycles : null,
    hits: stats.prompt_tokens ? stats.prefix_hit_tokens / stats.prompt_tokens : null,
  };
}

/** Decisions in groups. Each scaling is a group. All decisions between two scalings are one group: the policy only wavered. */
function runs(decisions) {
  const groups = [];
  for (const decision of decisions) {
    if (decision.kind === "wanted" && groups.at(-1)?.[0].kind === "wanted") groups.at(-1).push(decision);
    else groups.push([decision]);
  }
  return groups;
}

const share = (value, label) =>
  el("td", {}, el("meter", { min: 0, max: 1, value, "aria-label": label }), `${number(100 * value)} %`);
