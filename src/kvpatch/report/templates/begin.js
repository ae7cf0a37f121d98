// The page begins: what is not folded is drawn, and what is folded comes into it.
await drawAll([...document.querySelectorAll("script.spec")].filter((script) => !isFolded(script)));
await opened();
document.documentElement.dataset.opened = "yes";
if (location.hash) unfold();
