// The page: finds out which model answers, and shows one view at a time.
import { call } from "./api.js";
import { ClusterView } from "./cluster.js";
import { byId } from "./dom.js";
import { watchKey } from "./key.js";
import { startPlayground } from "./playground.js";
import { startRace } from "./race.js";

const VIEWS = ["playground", "race", "cluster"];
const TITLES = { playground: "Orthrus: several tokens at a time", race: "Orthrus: race", cluster: "Orthrus: cluster" };

/** Show what went wrong, or with null that nothing is wrong any more. */
function tell(error) {
  byId("trouble").hidden = !error;
  byId("trouble").textContent = error?.message ?? "";
}

function show(cluster) {
  const asked = location.hash.slice(1);
  const name = VIEWS.includes(asked) ? asked : VIEWS[0];
  for (const view of VIEWS) byId(`view-${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = TITLES[name];
  if (name === "cluster" && !document.hidden) cluster.open();
  else cluster.close();
}

async function start() {
  watchKey();
  const cluster = new ClusterView(tell);
  addEventListener("hashchange", () => show(cluster));
  document.addEventListener("visibilitychange", () => show(cluster));
  show(cluster);
  try {
    const model = await (await call("page/model")).json();
    byId("model").textContent = model.model;
    const playground = startPlayground(model, tell);
    startRace(model, tell, playground.stop);
  } catch (error) {
    tell(error);
  }
}

start();
