// Shows the text of the nearest point of a plot next to it: with the mouse, by touch, or with Tab and the arrow keys.
{
  const REACH = 24; // distance in pixels at which the mouse or a finger reaches a point
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.role = "tooltip";
  tip.hidden = true;
  document.body.append(tip);
  let active = null;

  const hide = () => {
    active?.classList.remove("active");
    active = null;
    tip.hidden = true;
  };

  const show = (point) => {
    if (point !== active) hide();
    active = point;
    point.classList.add("active");
    tip.textContent = point.getAttribute("aria-label");
    tip.hidden = false;
    const box = point.getBoundingClientRect();
    const left = Math.min(box.left + box.width / 2, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left) + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 8) + scrollY}px`;
  };

  const isShown = (point) => !point.hasAttribute("hidden");

  const nearest = (points, x, y) => {
    let [found, least] = [null, REACH];
    for (const point of points.filter(isShown)) {
      const box = point.getBoundingClientRect();
      const dx = Math.max(box.left - x, 0, x - box.right);
      const dy = Math.max(box.top - y, 0, y - box.bottom);
      const centre = Math.hypot((box.left + box.right) / 2 - x, (box.top + box.bottom) / 2 - y);
      const distance = Math.hypot(dx, dy) + Math.min(centre, REACH) / REACH;
      if (box.width && distance < least) [found, least] = [point, distance];
    }
    return found;
  };

  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  for (const plot of document.querySelectorAll(".plot")) {
    const points = [...plot.querySelectorAll(".point")];
    for (const svg of plot.querySelectorAll("svg[role]")) svg.setAttribute("role", "group");
    for (const point of points) {
      const title = point.querySelector("title");
      point.setAttribute("role", "img");
      point.setAttribute("aria-label", title.textContent);
      title.remove(); // the browser would show it as a second tooltip
      point.addEventListener("focus", () => show(point));
      point.addEventListener("blur", hide);
    }
    // Tab reaches one point of a plot; the arrow keys go from there to the other points.
    const setStop = (stop) => points.forEach((point) => point.setAttribute("tabindex", point === stop ? 0 : -1));
    const resetStop = () => setStop(points.find(isShown));
    resetStop();
    document.addEventListener("rowschange", () => (hide(), resetStop()));
    plot.addEventListener("keydown", (event) => {
      const shown = points.filter(isShown);
      const place = shown.indexOf(event.target);
      if (place < 0 || !(event.key in STEPS)) return;
      event.preventDefault();
      const next = shown[Math.min(Math.max(place + STEPS[event.key], 0), shown.length - 1)];
      setStop(next);
      next.focus();
    });
    const showNearest = (event) => {
      const point = nearest(points, event.clientX, event.clientY);
      if (point) show(point);
      else hide();
    };
    plot.addEventListener("pointermove", showNearest);
    plot.addEventListener("pointerdown", showNearest);
    plot.addEventListener("scroll", () => active && show(active));
    plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && event.relatedTarget !== tip && hide());
  }
  tip.addEventListener("pointerleave", hide);
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  addEventListener("pointerdown", (event) => event.target.closest?.(".plot, #tip") || hide());
}
