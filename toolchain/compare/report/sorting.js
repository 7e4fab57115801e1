"use strict";
// Gives every sortable table a button in each header: numbers by data-key, text by the alphabet, empty places last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.key;

  const compare = (column, direction) => (a, b) => {
    const [one, other] = [key(a, column), key(b, column)];
    if (one === undefined || other === undefined) return (one === undefined) - (other === undefined);
    const numeric = headers[column].classList.contains("number");
    return direction * (numeric ? one - other : one.localeCompare(other));
  };

  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const order = header.ariaSort === "ascending" ? "descending" : "ascending";
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      body.append(...[...body.rows].sort(compare(column, order === "ascending" ? 1 : -1)));
    });
  });
}
