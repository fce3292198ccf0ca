const root = document.documentElement;
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});

// Colours of what the reader switched off (a page with a legend to click fills it).
const switchedOff = new Set();

function placeTip(tip, x, width) {
  tip.style.left = `${Math.max(0, Math.min(width - tip.offsetWidth, x + (x > width / 2 ? -tip.offsetWidth - 10 : 10)))}px`;
}

// Heat maps: the cell under the pointer.
function addCells(area) {
  const { row, spans, names, values } = JSON.parse(area.dataset.cells);
  const tip = area.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * 1000;
    const column = spans.findIndex(([left, right]) => left <= at && at <= right);
    tip.hidden = column < 0;
    if (tip.hidden) return;
    const rows = Math.max(...values.map((found) => found.length));
    const index = Math.max(0, Math.min(rows - 1, Math.floor((1 - (event.clientY - box.top) / box.height) * rows)));
    const head = Object.assign(document.createElement("b"), { textContent: `${names[column]}, ${row} ${index}` });
    tip.replaceChildren(head, values[column][index] ?? "not measured");
    placeTip(tip, event.clientX - box.left, box.width);
  });
  area.addEventListener("pointerleave", () => { tip.hidden = true; });
}

function addHover(area) {
  const series = JSON.parse(area.dataset.hover);
  if (!series.length) return;
  const cursor = area.appendChild(Object.assign(document.createElement("div"), { className: "cursor", hidden: true }));
  const tip = area.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * 1000;
    const shown = series.filter(({ colour }) => !switchedOff.has(colour));
    let nearest = null;
    for (const { points } of shown)
      for (const point of points) if (!nearest || Math.abs(point[0] - at) < Math.abs(nearest[0] - at)) nearest = point;
    if (!nearest) return;
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: nearest[1] }));
    for (const { name, colour, points } of shown) {
      const point = points.find((candidate) => candidate[0] === nearest[0]);
      if (!point) continue;
      const line = tip.appendChild(document.createElement("div"));
      const key = line.appendChild(Object.assign(document.createElement("i"), { className: "key bar" }));
      key.style.setProperty("--key", `var(--${colour})`);
      line.append(name ? `${name}: ${point[2]}` : point[2]);
    }
    cursor.hidden = tip.hidden = false;
    const x = (nearest[0] / 1000) * box.width;
    cursor.style.left = `${x}px`;
    placeTip(tip, x, box.width);
  });
  area.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}

document.querySelectorAll("[data-hover]").forEach(addHover);
document.querySelectorAll("[data-cells]").forEach(addCells);
