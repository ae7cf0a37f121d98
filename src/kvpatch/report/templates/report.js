const failed = (box) => {
  box.textContent = "This chart could not be drawn; its numbers are in the table.";
  box.classList.add("empty");
};

const draw = async (script) => {
  const box = document.getElementById(script.dataset.for);
  try {
    await window.vegaEmbed(box, JSON.parse(script.textContent), {
      mode: "vega-lite",
      renderer: "svg",
      actions: false,
      ast: true, // expressions are interpreted, so the page needs no right to evaluate code
    });
    box.dataset.drawn = "yes";
  } catch (error) {
    console.error(error);
    failed(box);
  }
};

await Promise.all([...document.querySelectorAll("script.spec")].map(draw));
document.documentElement.dataset.charts = "done";

addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details:not([open])")) {
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
