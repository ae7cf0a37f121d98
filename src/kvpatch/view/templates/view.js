// Follows the server's events: numbers, newest trials, and estimates as their intervals narrow. Every text is set as
// text, never as markup. Numbers to be read come as text from the server, which rounds them as it rounds everywhere.
const { base, page, run: own } = document.body.dataset;
const address = (path) => `${base}/${path}`;
const of = (run, path) => address(`run/${encodeURIComponent(run)}/${path}`);

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const bdi = (text) => element("bdi", {}, text ?? "");
const cell = (kind, ...children) => element("td", kind ? { class: kind } : {}, ...children);


const setTrouble = (status) => {
  const place = document.querySelector(`.trouble[data-run="${CSS.escape(status.run)}"]`);
  const says = status.trouble ? `Not shown: ${status.trouble}` : "";
  if (!place || place.textContent === says) return;
  place.textContent = says;
  place.hidden = !says;
};

const finished = new Map();
const setFacts = (status) => {
  const box = document.querySelector(`.status[data-run="${CSS.escape(status.run)}"]`);
  if (!box) return;
  const fact = (name) => box.querySelector(`[data-fact="${name}"]`);
  const state = fact("state");
  state.textContent = status.state;
  finished.set(status.run, status.state === "finished");
  state.className = `badge state ${status.state.replaceAll(" ", "-")}`;
  fact("count").textContent = `${status.done} of ${status.planned}`;
  const bar = box.querySelector("progress");
  bar.max = status.planned || 1;
  bar.value = status.done;
  fact("failed").textContent = status.failed;
  fact("speed").textContent = status.speed;
  fact("left").textContent = status.left_text;
  fact("newest").textContent = status.newest_text;
};

const setPhases = (status) => {
  const rows = status.by_phase.map((row) => {
    const bar = element("progress", { max: row.planned || 1, value: row.done, "aria-label": `Phase ${row.phase}` });
    const count = cell("n", `${row.done} of ${row.planned}`);
    return element("tr", {}, element("th", { scope: "row" }, bdi(row.phase)), cell("", bar), count, cell("n", `${row.failed}`));
  });
  document.querySelector("#phases tbody")?.replaceChildren(...rows);
};

const setNewest = (status) => {
  const rows = status.newest_trials.map((row) => {
    const link = element("a", { href: of(status.run, `trial/${encodeURIComponent(row.trial_id)}`) }, bdi(row.condition));
    return element(
      "tr",
      { "data-trial": row.trial_id },
      cell("", bdi(row.phase)),
      cell("", link),
      cell("", bdi(row.pair_id)),
      ...status.newest_readouts.map((name) => cell("n", row[name])),
      cell("wide", bdi(row.error || row.text)),
    );
  });
  document.querySelector("#newest tbody")?.replaceChildren(...rows);
};

const unpack = (spec) => {
  const datasets = {};
  for (const [key, set] of Object.entries(spec.datasets ?? {})) {
    datasets[key] = set.rows.map((row) => Object.fromEntries(row.map((value, i) => [set.columns[i], value])));
  }
  return { ...spec, datasets };
};
// The numbers of a chart, for who can't point at it.
const tableOf = (spec) => {
  const [set] = Object.values(spec.datasets).filter(({ name }) => !name.startsWith("_"));
  const head = element("tr", {}, ...set.columns.map((name) => element("th", { scope: "col", class: "n" }, name)));
  const shown = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value ?? "–");
  const rows = set.rows.map((row) => element("tr", {}, ...row.map((value) => cell("n", shown(value)))));
  const table = element("table", { class: "compact" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", {}, table);
};
const range = (found) => `${found.shown.low} to ${found.shown.high}`;

const waitsFor = (item) => item.needs ? `needs ${item.needs.join(", ") || "nothing first"}` : `gate ${item.gate}`;

// One figure a hypothesis, drawn anew only where its numbers changed.
const drawn = new Map();
const setEstimates = async (run) => {
  const place = document.getElementById("estimates");
  place.dataset.drawn = "begun";
  const answer = await fetch(of(run, "estimates"));
  if (!answer.ok) return;
  const found = await answer.json();
  if (found.length > 0) place.querySelector(".empty")?.remove();
  const changed = [];
  for (const item of found) {
    const says = JSON.stringify([finished.get(run), item.n, item.estimate, item.low, item.high]);
    let known = drawn.get(item.id);
    if (!known) {
      const now = element("p", { class: "quiet estimate-now" });
      const chart = element("div", { class: "chart", role: "img", "aria-label": `Estimate of ${item.id} by number of pairs` });
      const title = element("h3", { class: "figure-title" }, bdi(item.claim));
      const test = element("p", { class: "quiet" }, bdi(`${item.id}: ${item.contrast} in ${item.readout}, ${waitsFor(item)}`));
      const table = element("details", { class: "data" }, element("summary", { "aria-label": `Table: ${item.id}` }, "Table"), element("div"));
      table.hidden = true;
      place.append(element("figure", { class: "drawn", "data-hypothesis": item.id }, title, test, now, chart, table));
      known = { now, chart, table, says: "" };
      drawn.set(item.id, known);
    }
    if (known.says === says) continue;
    known.says = says;
    changed.push([known, item]);
    known.now.textContent = item.estimate === null
      ? `no estimate yet from ${item.counted}`
      : `${item.shown.estimate} (${range(item)}) over ${item.counted}${finished.get(run) ? "" : ", not final"}`;
  }
  // Drawn once all figures have their places, since a chart keeps the shape that it is drawn in.
  for (const [known, item] of changed) {
    if (item.chart) {
      await window.vegaEmbed(known.chart, unpack(item.chart), { mode: "vega-lite", renderer: "svg", actions: false, ast: true });
      known.table.hidden = false;
      known.table.lastChild.replaceWith(tableOf(item.chart));
      known.table.dataset.drawn = "yes";
    }
  }
  place.dataset.drawn = "yes"; // every estimate that the server gave stands there
};

// Several runs beside one another: a row a hypothesis, a column a run.
const columns = new Map();
const setBeside = async (run) => {
  const answer = await fetch(of(run, "estimates"));
  if (!answer.ok) return;
  columns.set(run, new Map((await answer.json()).map((item) => [item.id, item])));
  const runs = [...document.querySelectorAll(".status")].map((box) => box.dataset.run);
  const items = new Map([...columns.values()].flatMap((column) => [...column]));
  const rows = [...items.values()].map((item) => {
    const cells = runs.map((name) => {
      const found = columns.get(name)?.get(item.id);
      if (!found || found.estimate === null) return cell("n", "–");
      const under = element("span", { class: "under" }, `${range(found)}, n ${found.n}`);
      return cell("n", found.shown.estimate, under);
    });
    const head = element("th", { scope: "row" }, bdi(item.id), element("span", { class: "under" }, bdi(`${item.contrast} in ${item.readout}`)));
    return element("tr", {}, head, ...cells);
  });
  document.querySelector("#beside tbody").replaceChildren(...rows);
  if (runs.every((name) => columns.has(name))) document.getElementById("beside").dataset.drawn = "yes";
};

// One request at a time; news that comes meanwhile is fetched after it.
const follow = (act) => {
  const going = new Map();
  return async (run) => {
    if (going.has(run)) {
      going.set(run, true);
      return;
    }
    do {
      going.set(run, false);
      await act(run).catch(console.error);
    } while (going.get(run));
    going.delete(run);
  };
};

if (page === "home" || page === "run") {
  const measure = follow(page === "home" ? setBeside : setEstimates);
  const versions = new Map();
  let state;
  const events = new EventSource(address(page === "run" ? `events?run=${encodeURIComponent(own)}` : "events"));
  events.addEventListener("status", (event) => {
    const status = JSON.parse(event.data);
    setTrouble(status);
    setFacts(status);
    if (page === "home") {
      const runs = document.querySelectorAll(".status").length;
      document.querySelector(".not-final").hidden = finished.size === runs && [...finished.values()].every(Boolean);
    }
    if (page === "run") {
      setPhases(status);
      setNewest(status);
      if (state !== undefined && state !== status.state) document.getElementById("said").textContent = `The run is ${status.state}.`;
      state = status.state;
      for (const note of document.querySelectorAll("[data-while]")) {
        note.hidden = (note.dataset.while === "finished") !== (state === "finished");
      }
    }
    if (versions.get(status.run) !== `${status.version} ${status.state}`) {
      versions.set(status.run, `${status.version} ${status.state}`);
      measure(status.run);
    }
    document.body.dataset.live = "yes";
  });
}
