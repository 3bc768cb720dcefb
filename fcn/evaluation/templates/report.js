"use strict";
const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));

// The table of classes. A click on a heading sorts by it, another click reverses the order. Rows
// without a value stay last. Headings with data-up begin with ascending order and compare text.
for (const head of all("table.sort thead th")) head.querySelector("button").addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.hasAttribute("aria-sort") ? head.getAttribute("aria-sort") !== "ascending" : "up" in head.dataset;
  const value = row => row.cells[column].dataset.v;
  const order = (x, y) => {
    const a = value(x), b = value(y);
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = !isNaN(a) && !isNaN(b);
    return (up ? 1 : -1) * (numbers && !("up" in head.dataset) ? a - b : a.localeCompare(b));
  };
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...Array.from(body.rows).sort(order));
});

// The confusion matrix. The cell under the pointer is described below the table.
for (const heat of all("table.heat")) {
  const counts = JSON.parse(document.getElementById(heat.dataset.counts).textContent);
  const output = heat.closest(".card").querySelector(".cell-text");
  const columns = all("thead th", heat).map(th => th.textContent);
  const describe = event => {
    const cell = event.target.closest("td");
    if (!cell) return;
    const row = counts[cell.parentNode.rowIndex - 1], n = row[cell.cellIndex - 1];
    const total = row.reduce((a, b) => a + b, 0);
    const part = total ? (100 * n / total).toFixed(2) + " %" : "none";
    output.textContent = cell.parentNode.cells[0].textContent + " predicted as " + columns[cell.cellIndex - 1] +
      ": " + part + " of the class's labelled pixels (" + n.toLocaleString("en") + " of " + total.toLocaleString("en") + ")";
  };
  heat.addEventListener("pointerover", describe);
  heat.addEventListener("click", describe);
}

// A picture that is shown twice is in the file once; its other places copy it.
for (const copy of all("img[data-copy]")) copy.src = document.getElementById(copy.dataset.copy).src;

// A slider moves the edge of the prediction that lies over the image; #every moves all of them.
const lay = slider => slider.closest(".panel").querySelector(".stage").style.setProperty("--at", slider.value + "%");
document.addEventListener("input", event => {
  const sliders = all(".panel input[type=range]");
  if (event.target.id === "every") for (const slider of sliders) { slider.value = event.target.value; lay(slider); }
  else if (sliders.includes(event.target)) lay(event.target);
});
