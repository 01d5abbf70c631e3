// What scrolls must be reachable by the keyboard, and a dialog must have a name.
document$.subscribe(() => {
  const scrolls = [".md-typeset__scrollwrap", "pre > code", ".highlight > pre", ".highlight-ipynb",
    ".jp-OutputArea-output", ".md-typeset p:has(> img:only-child)"];
  document.querySelectorAll(scrolls).forEach(element => { element.tabIndex = 0; });
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => {
    nav.setAttribute("aria-label", `Code ${i + 1}`);
  });
});
