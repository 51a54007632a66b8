"use strict";
// Turn column headers into sort buttons. Without this script the tables are static.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const numbers = head.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        return [numbers ? parseFloat(cell.dataset.value ?? cell.textContent) : cell.textContent, row];
      });
      keyed.sort(([a], [b]) => {
        if (!numbers) return sign * a.localeCompare(b, undefined, { numeric: true });
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);  // undefined scores last
        return sign * (a - b);
      });
      body.replaceChildren(...keyed.map(([, row]) => row));
    });
  });
}
