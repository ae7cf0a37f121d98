// A head over the tokens of one pair: chosen by a button, or by a click on its mark in the chart above.
const STAGE_NAMES = ["writing", "reading"]; // the order of a side's numbers: its own text, the fixed continuation
const share = (value) => (value === undefined || value === null ? "–" : value.toFixed(3));
const readable = (text) => text.replaceAll("\n", "⏎\n");

const stripOf = (side, shares, limits) => {
  const tokens = side.tokens.map((text, i) => {
    const step = limits.filter((limit) => shares?.[i] >= limit).length;
    return element("span", { class: step ? `token look${step}` : "token", title: share(shares?.[i]) }, element("bdi", {}, readable(text)));
  });
  return [
    element("p", { class: "label" }, "Under ", element("b", {}, element("bdi", {}, side.condition)), element("bdi", {}, abouts[side.condition] ? `: ${abouts[side.condition]}` : "")),
    element("p", { class: "tokens", dir: "auto" }, ...tokens),
  ];
};

const headTable = (sides, head) => {
  const row = (cell, values) => element("tr", {}, ...values.map((value) => (value instanceof Node ? value : element(cell, cell === "th" ? { scope: "col" } : {}, value))));
  const heading = sides.flatMap((side) => [`${side.condition}: token`, ...STAGE_NAMES.map((stage) => `${side.condition}: ${stage}`)]);
  const count = Math.max(...sides.map((side) => side.tokens.length));
  const rows = Array.from({ length: count }, (_, i) =>
    row("td", [
      element("th", { scope: "row", class: "n" }, String(i)),
      ...sides.flatMap((side, s) => [
        element("td", {}, element("bdi", {}, readable(side.tokens[i] ?? "–"))),
        ...head.sides[s].map((shares) => element("td", { class: "n" }, share(shares?.[i]))),
      ]),
    ]),
  );
  const caption = element("caption", {}, `${head.name}: share of its attention`);
  const table = element("table", { class: "compact" }, caption, element("thead", {}, row("th", ["slot", ...heading])), element("tbody", {}, ...rows));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Data: ${head.name} over the tokens` }, table);
};

const headsOver = async (box, view) => {
  const place = box.closest("figure").querySelector(".heads");
  if (!place) return;
  const { pair, limits, sides, heads } = JSON.parse(await unpacked(place.querySelector("script")));
  const shown = element("div", { class: "head-shown" });
  const buttons = heads.map((head) => element("button", { type: "button", "aria-pressed": "false" }, head.name));
  const choose = (at) => {
    const isOn = at >= 0 && buttons[at].getAttribute("aria-pressed") === "false";
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(isOn && i === at)));
    const parts = isOn ? [...sides.flatMap((side, s) => stripOf(side, heads[at].sides[s][1], limits)), headTable(sides, heads[at])] : [];
    shown.replaceChildren(...parts);
  };
  buttons.forEach((button, i) => button.addEventListener("click", () => choose(i)));
  view.addEventListener("click", (_, item) => {
    const at = heads.findIndex((head) => head.name === item?.datum?.name);
    if (at >= 0) choose(at);
  });
  const told = element("p", { class: "quiet" }, "Choose a head, here or in the chart, to see where it looked in one pair, ");
  told.append(element("bdi", {}, pair), ", the first of the phase. The stronger a token’s colour, the more of the head’s attention it had while the fixed continuation was read; what is missing to 1 went to words that were read or written. The table has the numbers, and those of the time in which the trial wrote its own text.");
  place.append(told, element("p", { class: "pick" }, ...buttons), shown);
};

