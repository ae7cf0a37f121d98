// Any two conditions of a pair token by token: chosen in two lists, coloured as far as their texts are the same.
const NATS = [0.1, 0.25, 0.5, 1, 2, 4]; // at which the colour of a difference changes; as in token_pairs.py
const told = (value) => (value === null || value === undefined ? "unknown" : value.toFixed(2).replace("-", "−"));

const twoTold = ({ texts }, [one, other], names, shared) => {
  if (one.ids.length === shared && other.ids.length === shared) return `${names[0]} and ${names[1]} wrote the same ${shared} tokens.`;
  const goes = [one, other].map(({ ids, logprobs }, side) =>
    shared < ids.length ? `${names[side]} ${shared ? "goes on" : "begins"} with “${texts[ids[shared]]}” (log-probability ${told(logprobs[shared])})` : `${names[side]} ends`,
  );
  const same = shared ? `The first ${shared} tokens are the same; then` : "Not even the first token is the same:";
  return `${same} ${goes[0]}, and ${goes[1]}.`;
};

const twoStrip = ({ texts, isText }, own, other, shared) =>
  own.ids.map((id, place) => {
    const [mine, theirs] = [own.logprobs[place], other.logprobs[place]];
    const difference = place < shared && mine !== null && theirs !== null ? mine - theirs : null;
    const size = difference === null ? 0 : NATS.filter((limit) => Math.abs(difference) >= limit).length;
    const kind = size ? ` ${difference > 0 ? "up" : "down"}${size}` : "";
    const title = `log-probability ${told(mine)}` + (difference === null ? "" : `, ${told(difference)} against the other`);
    const text = element("bdi", {}, `${texts[id]}${isText ? "" : " "}`);
    return element("span", { class: `token${kind}${place === shared ? " parts" : ""}`, title }, text);
  });

const anyTwo = async (details) => {
  if (details.dataset.drawn) return;
  details.dataset.drawn = "yes";
  const data = JSON.parse(await unpacked(details.querySelector("script")));
  const names = Object.keys(data.outputs);
  const place = element("div", { class: "outputs" });
  const lists = data.first.map((name) => {
    const list = element("select", {}, ...names.map((other) => element("option", {}, other)));
    list.value = name;
    return list;
  });
  const show = () => {
    const chosen = lists.map((list) => list.value);
    const [one, other] = chosen.map((name) => data.outputs[name]);
    let shared = 0;
    while (shared < Math.min(one.ids.length, other.ids.length) && one.ids[shared] === other.ids[shared]) shared += 1;
    const strips = [twoStrip(data, one, other, shared), twoStrip(data, other, one, shared)];
    const sides = chosen.map((name, side) =>
      element("div", { class: "output" }, element("p", { class: "label" }, element("b", {}, element("bdi", {}, name)), ` ${abouts[name] ?? ""}`), element("p", { class: "tokens", dir: "auto" }, ...strips[side])),
    );
    place.replaceChildren(...sides);
    said.replaceChildren(element("bdi", {}, twoTold(data, [one, other], chosen, shared)));
  };
  const said = element("p", { class: "told", role: "status" });
  for (const list of lists) list.addEventListener("change", show);
  const labels = ["Condition ", "beside "].map((label, side) => element("label", {}, label, lists[side]));
  details.append(element("p", { class: "pick two" }, ...labels), said, place);
  show();
};
for (const details of document.querySelectorAll("details.any-two")) details.addEventListener("toggle", () => details.open && anyTwo(details));

