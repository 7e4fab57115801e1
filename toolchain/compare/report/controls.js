// Lets a reader choose the baseline and hide rows. Every text comes from the page's data, which Python computed.
if (document.getElementById("controls")) {
  const controls = document.getElementById("controls");
  const data = JSON.parse(document.getElementById("data").textContent);
  const baseline = document.getElementById("baseline");
  const places = data.choices[0].places.map((_, place) => document.querySelector(`[data-place="${place}"]`));
  controls.hidden = false;

  const setText = (element, [text, key]) => {
    element.textContent = text;
    if (key === null) delete element.dataset.key;
    else element.dataset.key = key;
  };

  const markBaseline = (row, isBaseline) => {
    const head = document.querySelector(`[data-table="comparison"] tr[data-rows="${row}"] th`);
    head.querySelector(".mark.baseline")?.remove();
    if (!isBaseline) return;
    const mark = document.createElement("span");
    mark.className = "mark baseline";
    mark.title = data.meaning;
    mark.textContent = "baseline";
    const first = head.querySelector(".mark");
    if (first) first.before(mark, " ");
    else head.append(" ", mark);
  };

  const hideBlankColumns = (table) => {
    const lines = [...table.rows];
    [...lines[0].cells].forEach((_, column) => {
      const isBlank = lines.slice(1).every((line) => !("key" in line.cells[column].dataset));
      lines.forEach((line) => (line.cells[column].hidden = isBlank));
    });
  };

  const choose = (choice) => {
    choice.places.forEach((index, place) => setText(places[place], data.contents[index]));
    for (const [row, text] of choice.rows) {
      const isBaseline = choice.baselines.includes(row);
      markBaseline(row, isBaseline);
      for (const point of document.querySelectorAll(`.point[data-text][data-rows="${row}"]`)) {
        point.classList.toggle("baseline", isBaseline);
        point.setAttribute("aria-label", text ? `${point.dataset.text}\n${text}` : point.dataset.text);
      }
    }
    document.querySelectorAll("[data-compact]").forEach(hideBlankColumns);
    document.getElementById("flips-baseline")?.toggleAttribute("hidden", choice === data.choices[0]);
  };
  baseline?.addEventListener("change", () => choose(data.choices[baseline.value]));

  const count = data.choices[0].rows.length;
  const boxes = [...controls.querySelectorAll("fieldset")].map((set) => [...set.querySelectorAll("input")]);
  const filter = () => {
    const isHidden = (row) => data.filters.some((values, index) => !boxes[index][values[row]].checked);
    const hidden = new Set([...Array(count).keys()].filter(isHidden));
    for (const element of document.querySelectorAll("[data-rows]")) {
      element.toggleAttribute("hidden", element.dataset.rows.split(" ").some((row) => hidden.has(Number(row))));
    }
    for (const group of document.querySelectorAll(".group")) {
      group.toggleAttribute("hidden", !group.querySelector("[data-rows]:not([hidden])"));
    }
    const shown = document.getElementById("shown");
    shown.textContent = `${count - hidden.size} of ${count} rows are shown. Marks and Pareto fronts refer to all rows.`;
    controls.classList.toggle("filtered", hidden.size > 0);
    document.dispatchEvent(new Event("rowschange"));
  };
  controls.addEventListener("change", (event) => event.target.type === "checkbox" && filter());
  document.getElementById("show-all")?.addEventListener("click", () => {
    boxes.flat().forEach((box) => (box.checked = true));
    filter();
  });
  if (boxes.length) filter();
}
