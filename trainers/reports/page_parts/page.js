"use strict";
// Draws the charts as they come into sight, in the reader's colours; sorts tables; picks trials.
(() => {
  const drawn = JSON.parse(document.getElementById("drawn").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  let picked = null;

  const column = (packed) => {
    if (Array.isArray(packed)) return packed;
    const values = [];
    for (let i = 0; i < packed.runs.length; i += 2)
      for (let n = packed.runs[i + 1]; n > 0; n--) values.push(packed.runs[i]);
    return values;
  };

  const rows = (table) => {
    const names = Object.keys(table), columns = names.map((name) => column(table[name]));
    return columns[0].map((_, i) => {
      const row = {};
      for (let n = 0; n < names.length; n++) row[names[n]] = columns[n][i];
      return row;
    });
  };

  const coloured = (spec, palette) =>
    JSON.parse(JSON.stringify(spec).replace(/"\$(\w+)"/g, (_, name) => JSON.stringify(palette[name])));

  const draw = async (chart) => {
    const place = document.getElementById(chart.name);
    const palette = drawn.palettes[dark.matches && !matchMedia("print").matches ? "dark" : "light"];
    const datasets = {};
    for (const [name, table] of Object.entries(chart.tables)) datasets[name] = rows(table);
    const size = Math.max(...Object.values(datasets).map((table) => table.length));
    const spec = {
      ...coloured(chart.spec, palette), datasets, width: "container", height: chart.height,
      autosize: { type: "fit-x", contains: "padding" }, description: chart.text,
    };
    const config = coloured(drawn.config, palette);
    const renderer = size > 3000 ? "canvas" : "svg";
    const theme = dark.matches ? "dark" : "light";
    const { view } = await vegaEmbed(place, spec, { actions: false, config, renderer, tooltip: { theme } });
    views.set(chart.name, view);
    performance.mark(chart.name);
    place.classList.add("drawn");
    if (picked !== null) await bringOut(view);
  };

  const bringOut = async (view) => {
    if ("picked" in view.getState().signals) await view.signal("picked", picked).runAsync();
  };

  const pending = new Map();
  const drawOnce = (chart) => {
    if (!pending.has(chart.name)) pending.set(chart.name, draw(chart));
    return pending.get(chart.name);
  };
  const byName = new Map(drawn.charts.map((chart) => [chart.name, chart]));
  const sight = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen)
      if (isIntersecting) { sight.unobserve(target); drawOnce(byName.get(target.id)); }
  }, { rootMargin: "300px" });
  for (const name of byName.keys()) sight.observe(document.getElementById(name));
  const drawAll = () => Promise.all(drawn.charts.map(drawOnce));
  addEventListener("beforeprint", drawAll);
  dark.addEventListener("change", () => {
    const done = [...pending.keys()];
    for (const view of views.values()) view.finalize();
    views.clear(); pending.clear();
    for (const name of done) drawOnce(byName.get(name));
  });

  // Numbers before words, and what is unknown last, whichever way they are sorted.
  const compare = (a, b, sign) => {
    const x = a.dataset.v, y = b.dataset.v;
    if (x !== undefined && y !== undefined) {
      const p = Number(x), q = Number(y);
      if (Number.isNaN(p) || Number.isNaN(q)) return Number.isNaN(p) - Number.isNaN(q);
      return sign * (p - q);
    }
    if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
    return sign * a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, n) => head.firstChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sorted = [...body.rows].sort((a, b) => compare(a.cells[n], b.cells[n], up ? 1 : -1));
      body.append(...sorted);
    }));
    body.addEventListener("click", (event) => {
      if (!event.target.classList.contains("pick")) return;
      const again = event.target.getAttribute("aria-pressed") === "true";
      for (const other of body.querySelectorAll('.pick[aria-pressed="true"]'))
        other.setAttribute("aria-pressed", "false");
      if (!again) event.target.setAttribute("aria-pressed", "true");
      picked = again ? -1 : Number(event.target.parentElement.dataset.v);
      for (const view of views.values()) bringOut(view);
    });
  }
  globalThis.report = { drawAll, views };
})();
