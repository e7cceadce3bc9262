"use strict";

// A column of numbers is sorted by the number that a cell begins with: "0.569 ± 0.033" by 0.569.
// Cells without one stay last.
function sortBy(table, head, column) {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const isNumber = head.classList.contains("number");
  const keyed = [...table.tBodies[0].rows].map((row) => {
    const text = row.cells[column].textContent.trim();
    const key = isNumber ? parseFloat(text) : text;
    return { row, key, last: isNumber ? Number.isNaN(key) : text === "-" };
  });
  const order = new Intl.Collator("en", { numeric: true });
  keyed.sort((a, b) => {
    if (a.last || b.last) return a.last - b.last;
    return sign * (isNumber ? a.key - b.key : order.compare(a.key, b.key));
  });
  table.tBodies[0].append(...keyed.map((one) => one.row));
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function hand(button) {
  const { file, text } = button.dataset;
  let said = `${file} is in your downloads`;
  try {
    if (!file.endsWith(".tex")) throw new Error("a spreadsheet wants a file");
    await navigator.clipboard.writeText(text);
    said = "LaTeX is in the clipboard";
  } catch {
    download(file, text);
  }
  button.parentElement.querySelector("[role=status]").textContent = said;
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sortBy(table, head, column));
  });
}
for (const button of document.querySelectorAll("button[data-file]")) {
  button.addEventListener("click", () => hand(button));
}
