// Draws the charts, gives each its table and files, and turns the texts into something to leaf through.
const CHUNK = 500; // rows of a table that are shown at a time
const breath = () => new Promise((next) => setTimeout(next));

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

// What few readers open is packed, so that the file stays small.
const unpacked = (script) => {
  const bytes = Uint8Array.from(atob(script.textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

// Tables and texts inside folds come into the page once it is shown, so that they are there to be read and printed.
let opening;
const opened = () => {
  opening ??= (async () => {
    for (const script of [...document.querySelectorAll("script.folded")]) {
      const template = document.createElement("template");
      template.innerHTML = await unpacked(script);
      script.replaceWith(template.content);
    }
  })();
  return opening;
};

// The library of charts is unpacked when the first chart is drawn. The page's policy allows it by its hash.
let library;
const loaded = () => {
  library ??= (async () => {
    const script = element("script", { type: "module" });
    script.textContent = await unpacked(document.getElementById("library"));
    document.head.append(script);
    while (!window.vegaEmbed) await breath();
  })();
  return library;
};

// What a condition is, and how every chart looks, stands in the page once.
const shared = JSON.parse(document.getElementById("config").textContent);
const abouts = JSON.parse(document.getElementById("abouts").textContent);
const explained = (set) => {
  const at = set.columns.indexOf("condition");
  if (at < 0 || set.columns.includes("about")) return set;
  const add = (row, value) => [...row.slice(0, at + 1), value, ...row.slice(at + 1)];
  return { ...set, columns: add(set.columns, "about"), rows: set.rows.map((row) => add(row, abouts[row[at]] ?? "")) };
};

// Data sets come by columns, so that names are not repeated in every row; a name with "_" in front is for drawing only.
const unpack = (spec) => {
  const sets = Object.entries(spec.datasets ?? {}).map(([key, set]) => [key, explained(set)]);
  const tables = sets.map(([, set]) => set).filter((set) => !set.name.startsWith("_"));
  const datasets = {};
  for (const [key, set] of sets) {
    datasets[key] = set.rows.map((row) => Object.fromEntries(row.map((value, i) => [set.columns[i], value])));
  }
  return { spec: { config: shared, ...spec, datasets }, tables };
};

const hidden = new Set(["offset", "order", "row"]);
const shownColumns = (set) => set.columns.map((name, i) => [name, i]).filter(([name]) => !hidden.has(name));

const csv = (set) => {
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+@\-\t\r]/.test(text)) text = `'${text}`; // a spreadsheet must not run it
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const columns = shownColumns(set);
  const lines = [columns.map(([name]) => cell(name))];
  for (const row of set.rows) lines.push(columns.map(([, i]) => cell(row[i])));
  return lines.map((line) => line.join(",")).join("\r\n") + "\r\n";
};

const save = (content, type, name) => {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
};

// On a narrow page the names of rows leave room for the marks.
const fitted = (spec, width) => {
  const limit = Math.max(90, Math.min(spec.config?.axisY?.labelLimit ?? 230, Math.round(width * 0.42)));
  return { ...spec, config: { ...spec.config, axisY: { ...spec.config?.axisY, labelLimit: limit } } };
};

const embed = (box, spec, width = box.clientWidth) =>
  window.vegaEmbed(box, width ? fitted(spec, width) : spec, {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    ast: true, // expressions are interpreted, so the page needs no right to evaluate code
  });

// A picture to keep is drawn anew on white, since on the page the colours of text come from its style sheet.
const picture = async (spec, width, kind) => {
  const { view } = await embed(document.createElement("div"), { ...spec, width, background: "#ffffff" }, width);
  try {
    if (kind === "svg") return new Blob([await view.toSVG()], { type: "image/svg+xml" });
    const canvas = await view.toCanvas(2);
    return await new Promise((done) => canvas.toBlob(done, "image/png"));
  } finally {
    view.finalize();
  }
};

const tableOf = (set) => {
  const columns = shownColumns(set);
  const head = element("tr", {}, ...columns.map(([name]) => element("th", { scope: "col" }, name)));
  const body = element("tbody");
  const place = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Data: ${set.name}` });
  place.append(element("table", { class: "compact" }, element("caption", {}, set.name), element("thead", {}, head), body));
  let next = 0;
  const more = element("button", { type: "button" });
  const grow = () => {
    for (const row of set.rows.slice(next, next + CHUNK)) {
      const cells = columns.map(([, i]) => {
        const value = row[i];
        const cell = element("td", typeof value === "number" ? { class: "n" } : {});
        cell.textContent = value === null || value === undefined ? "–" : String(value);
        return cell;
      });
      body.append(element("tr", {}, ...cells));
    }
    next += CHUNK;
    more.hidden = next >= set.rows.length;
    more.textContent = `Show more of ${set.rows.length} rows`;
  };
  more.addEventListener("click", grow);
  grow();
  return element("div", {}, place, more);
};

const tools = (box, spec, tables) => {
  const width = () => Math.max(480, Math.round(box.clientWidth));
  const button = (label, says, act) => {
    const made = element("button", { type: "button", "aria-label": `${label}: ${says}` }, label);
    made.addEventListener("click", () => act().catch(console.error));
    return made;
  };
  const name = box.getAttribute("aria-label");
  const bar = element("div", { class: "tools" });
  bar.append(
    button("PNG", name, async () => save(await picture(spec, width(), "png"), "", `${box.id}.png`)),
    button("SVG", name, async () => save(await picture(spec, width(), "svg"), "", `${box.id}.svg`)),
  );
  for (const set of tables) {
    const label = tables.length > 1 ? `CSV of ${set.name}` : "CSV";
    bar.append(button(label, name, async () => save(csv(set), "text/csv", `${box.id}-${set.name}.csv`)));
  }
  const table = element("details", { class: "data" }, element("summary", { "aria-label": `Table: ${name}` }, "Table"));
  table.addEventListener("toggle", () => {
    if (!table.open || table.dataset.drawn) return;
    table.append(...tables.map(tableOf));
    table.dataset.drawn = "yes";
  });
  bar.append(table);
  box.after(bar);
};

const failed = (box) => {
  box.textContent = "This chart could not be drawn; its numbers are in the table.";
  box.classList.add("empty");
  box.dataset.drawn = "failed";
};

const draw = async (script) => {
  const box = document.getElementById(script.dataset.for);
  if (box.dataset.drawn) return;
  box.dataset.drawn = "begun";
  try {
    const { spec, tables } = unpack(JSON.parse(await unpacked(script)));
    tools(box, spec, tables);
    await loaded();
    const { view } = await embed(box, spec);
    await headsOver(box, view);
    box.dataset.drawn = "yes";
  } catch (error) {
    console.error(error);
    failed(box);
  }
};

const isFolded = (script) => script.parentElement.closest("details:not([open]), [hidden]") !== null;

// The page says whether it is at rest, so that who prints it, or reads it by a program, can wait for it.
let rounds = 0;
const drawAll = async (scripts) => {
  rounds += 1;
  document.documentElement.dataset.charts = "drawing";
  for (const script of scripts) {
    await draw(script);
    await breath();
  }
  rounds -= 1;
  if (rounds === 0) document.documentElement.dataset.charts = "done";
};

// What is folded is drawn when it is unfolded.
const drawInside = (details) => drawAll([...details.querySelectorAll("script.spec")].filter((s) => !isFolded(s)));
for (const details of document.querySelectorAll("details:has(script.spec)")) {
  details.addEventListener("toggle", () => details.open && drawInside(details));
}

// A gallery shows one of its figures; the others wait until they are chosen.
for (const gallery of document.querySelectorAll(".gallery")) {
  const figures = [...gallery.querySelectorAll(":scope > figure")];
  if (figures.length < 2) continue;
  const names = figures.map((figure) => figure.querySelector(".figure-title").textContent);
  const select = element("select", {}, ...names.map((name, i) => element("option", { value: i }, name)));
  const show = () => figures.forEach((figure, i) => (figure.hidden = i !== select.selectedIndex));
  select.addEventListener("change", () => {
    show();
    drawInside(gallery);
  });
  gallery.before(element("p", { class: "pick" }, element("label", {}, `${gallery.dataset.label} `, select)));
  show();
}

// Everything is unfolded and drawn: for printing all of it, and for programs that look at every chart.
const unfoldAll = async () => {
  await opened();
  for (const figure of document.querySelectorAll(".gallery > figure")) figure.hidden = false;
  for (const details of document.querySelectorAll("details:not(.data)")) details.open = true;
  await drawAll([...document.querySelectorAll("script.spec")]);
};
document.addEventListener("unfold-all", unfoldAll);
const printAll = document.getElementById("print-all");
if (printAll) {
  printAll.hidden = false;
  printAll.addEventListener("click", async () => {
    printAll.disabled = true;
    await unfoldAll();
    print();
    printAll.disabled = false;
  });
}

// A link into something folded opens it, and so does one to a section that is one fold.
const unfold = () => {
  let target;
  try {
    target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  } catch {
    return;
  }
  const own = target?.querySelector(":scope > details.fold");
  if (own) own.open = true;
  for (let at = target?.closest("details"); at; at = at.parentElement.closest("details")) at.open = true;
  target?.scrollIntoView();
};
addEventListener("hashchange", unfold);

// Texts: one pair at a time. Without this script, and on paper, all of them stand below one another.
const leaf = () => {
  const place = document.getElementById("choose");
  const phases = [...document.querySelectorAll(".sample-phase")];
  if (!place || phases.length === 0) return;
  const pick = (label, names) => {
    const select = element("select", {}, ...names.map((name, i) => element("option", { value: i }, name)));
    return [element("label", {}, `${label} `, select), select];
  };
  const search = element("input", { type: "search", id: "text-search" });
  const said = element("span", { role: "status", class: "quiet" });
  const holds = (pair) => pair.textContent.toLowerCase().includes(search.value.trim().toLowerCase());
  const pairsOf = (phase) => [...phase.querySelectorAll(".pair")].filter(holds);
  const [phaseLabel, phase] = pick("Phase", phases.map((p) => p.dataset.phase.replace(/^Phase /, "")));
  const [pairLabel, pair] = pick("Pair", []);
  const show = () => {
    phases.forEach((p, i) => {
      p.hidden = i !== phase.selectedIndex;
      const found = pairsOf(p);
      for (const q of p.querySelectorAll(".pair")) q.hidden = q !== found[pair.selectedIndex];
    });
    said.textContent = search.value.trim() ? `${pair.options.length} with this text` : "";
    before.disabled = pair.selectedIndex <= 0;
    after.disabled = pair.selectedIndex >= pair.options.length - 1;
  };
  const fill = () => {
    const names = pairsOf(phases[phase.selectedIndex]).map((p, i, all) => `${i + 1} of ${all.length}: ${p.dataset.pair}`);
    pair.replaceChildren(...names.map((name, i) => element("option", { value: i }, name)));
    pair.selectedIndex = Math.floor((names.length - 1) / 2);
    show();
  };
  const step = (by) => () => {
    pair.selectedIndex += by;
    show();
  };
  const before = element("button", { type: "button", "aria-label": "Pair before" }, "‹");
  const after = element("button", { type: "button", "aria-label": "Next pair" }, "›");
  before.addEventListener("click", step(-1));
  after.addEventListener("click", step(1));
  phase.addEventListener("change", fill);
  pair.addEventListener("change", show);
  search.addEventListener("input", fill);
  place.append(phaseLabel, pairLabel, before, after, element("label", {}, "in prompts and texts ", search), said);
  place.hidden = false;
  fill();
};
leaf();

// Verdicts: chips show those that say one word, and a search those whose claim holds a text; groups with a match open.
const chips = document.getElementById("chips");
if (chips) {
  const buttons = [...chips.querySelectorAll("button")];
  const search = document.getElementById("claim-search");
  const groups = [...document.querySelectorAll(".group")];
  const sift = () => {
    const word = buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.word;
    const text = search.value.trim().toLowerCase();
    for (const group of groups) {
      let left = 0;
      for (const row of group.querySelectorAll("tbody tr")) {
        row.hidden = text !== "" && !row.textContent.toLowerCase().includes(text);
        left += !row.hidden;
      }
      group.hidden = left === 0 || (word !== "" && group.dataset.word !== word);
      group.open = !group.hidden && (word !== "" || text !== "");
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      sift();
    });
  }
  search.addEventListener("input", sift);
  chips.hidden = false;
}

// On paper everything is unfolded but the data of charts and what was never drawn.
addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details:not([open]):not(.data)")) {
    const charts = [...closed.querySelectorAll(".chart")];
    if (charts.length > 0 && charts.every((box) => !box.dataset.drawn)) continue;
    closed.open = true;
    closed.dataset.print = "";
  }
});
addEventListener("afterprint", () => {
  for (const opened of document.querySelectorAll("details[data-print]")) {
    opened.open = false;
    delete opened.dataset.print;
  }
});

// Served while the run goes on: say when there is more than this page shows.
const live = document.querySelector("[data-events]");
if (live) {
  const news = document.getElementById("live-news");
  let shown;
  new EventSource(live.dataset.events).addEventListener("status", (event) => {
    const { done, state } = JSON.parse(event.data);
    shown ??= done;
    if (done > shown) {
      news.replaceChildren(`${done - shown} newer trials; `, element("a", { href: location.href }, "show them"));
    } else {
      news.textContent = state;
    }
  });
}

