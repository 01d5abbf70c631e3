// What scrolls must be reachable by the keyboard, and a dialog must have a name.
document$.subscribe(() => {
  document.querySelectorAll(".md-typeset__scrollwrap, pre > code").forEach(element => {
    element.tabIndex = 0;
  });
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => {
    nav.setAttribute("aria-label", `Code ${i + 1}`);
  });
});
