"use strict";
// Language, light or dark, and tables that are wider than the page.
const root = document.documentElement;
const redraw = []; // functions to call after a change of language or colours

function setLanguage(language) {
  root.lang = root.dataset.lang = language;
  for (const name of ["aria-label", "title", "alt", "placeholder"])
    for (const element of document.querySelectorAll(`[data-${name}-${language}]`))
      element.setAttribute(name, element.getAttribute(`data-${name}-${language}`));
  for (const element of document.querySelectorAll(`[data-${language}]`))
    element.textContent = element.getAttribute(`data-${language}`);
  document.getElementById("lang").lang = language === "ko" ? "en" : "ko";
  redraw.forEach(draw => draw());
}

const system = matchMedia("(prefers-color-scheme: dark)");
document.getElementById("lang").onclick = () => setLanguage(root.lang === "ko" ? "en" : "ko");
document.getElementById("theme").onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  root.dataset.theme = dark ? "light" : "dark";
  redraw.forEach(draw => draw());
};
system.addEventListener("change", () => redraw.forEach(draw => draw()));

// On a phone the rows of these tables are cards, whose cells are labelled with the head of their column.
for (const table of document.querySelectorAll(".stack table"))
  for (const row of table.tBodies[0].rows)
    for (const cell of [...row.cells].slice(1)) {
      const label = document.createElement("span");
      label.className = "label";
      label.append(...[...table.tHead.rows[0].cells[cell.cellIndex].childNodes].map(node => node.cloneNode(true)));
      cell.prepend(label);
    }

const widths = new ResizeObserver(entries => {
  for (const { target } of entries) {
    const wide = target.scrollWidth > target.clientWidth + 1;
    target.parentElement.classList.toggle("wide", wide);
    if (wide) target.tabIndex = 0; // for the arrow keys
    else target.removeAttribute("tabindex");
  }
});
document.querySelectorAll(".scroll").forEach(box => widths.observe(box));
setLanguage((navigator.language || "").startsWith("ko") ? "ko" : "en");
