"use strict";
// Choices, legends and colours for the charts that Bokeh has drawn.
(async () => {
  const all = (within, selector) => [...within.querySelectorAll(selector)];
  const drawn = () => Object.values(Bokeh.index).length > 0;
  if (document.querySelector(".chart")) {
    while (!drawn()) await new Promise((done) => setTimeout(done, 20));
  }
  const views = Object.values(Bokeh.index).flatMap((view) => (view.roots ? [...view.roots] : [view]));
  const figures = new Map();
  for (const view of views) {
    const place = document.getElementById(view.el?.parentElement?.id) ?? view.el?.closest(".chart");
    const chart = place?.closest(".chart");
    if (chart) figures.set(chart, view.model);
  }
  const figureIn = (within) => figures.get(within.querySelector(".chart"));

  // A finger scrolls the page, and does not zoom by accident
  if (matchMedia("(pointer: coarse)").matches) {
    for (const figure of figures.values()) figure.toolbar.active_drag = null;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const view of views) view.invalidate_painters?.() ?? view.request_paint?.();
  });

  for (const button of all(document, "[data-toggle]")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      const scope = button.closest("figure") ?? button.closest("[data-task]");
      const off = new Set(all(scope, '[data-toggle][aria-pressed="false"]').map((b) => b.dataset.toggle));
      const ours = new Set(all(scope, "[data-toggle]").map((b) => b.dataset.toggle));
      for (const [chart, figure] of figures) {
        if (!scope.contains(chart)) continue;
        for (const part of [...figure.renderers, ...figure.center]) {
          const tags = part.tags.filter((tag) => ours.has(tag));
          if (tags.length) part.visible = tags.some((tag) => !off.has(tag));
        }
      }
    });
  }

  for (const radio of all(document, "[data-radios] input")) {
    radio.addEventListener("change", () => {
      for (const chart of all(radio.closest("[data-section]"), ".chart")) chart.hidden = chart.dataset.view !== radio.value;
    });
  }

  for (const select of all(document, '[data-choice="map-run"]')) {
    const show = () => {
      for (const panel of all(select.closest("[data-section]"), '[data-kind="map"]')) {
        const figure = figureIn(panel);
        const held = figure.tags[0][select.value];
        panel.hidden = !held;
        if (!held) continue;
        const steps = held.steps;
        const source = figure.renderers[0].data_source;
        source.tags = steps;
        source.data = { ...Object.fromEntries(["x", "y", "dh"].map((k) => [k, source.get(k)])), image: [held.image], dw: [steps.length] };
        figure.x_range.setv({ start: 0, end: steps.length });
        const axis = figure.below.find((part) => part.ticker && part.major_label_overrides);
        axis.major_label_overrides = new Map(held.ticks);
        axis.ticker.ticks = held.ticks.map(([at]) => at);
      }
    };
    select.addEventListener("change", show);
  }

  for (const panel of all(document, '[data-kind="forecast"]')) {
    const figure = figureIn(panel);
    const runs = figure.tags[0];
    const field = (name) => panel.querySelector(`[data-choice="${name}"]`);
    const percent = (share) => `${(100 * share).toFixed(share > 0.1 || !share ? 1 : share > 0.001 ? 2 : 4)} %`;
    const part = (tag, key) => figure.center.filter((one) => one.tags.includes(tag) && key in one);
    const show = () => {
      const run = runs[Number(field("run")?.value ?? 0)];
      const [layers, steps, bins] = [run.layers, run.steps, run.bins];
      const step = Math.min(Number(field("step").value), steps.length - 1);
      const layer = Math.min(Number(field("layer").value), layers.length - 1);
      const at = step * layers.length + layer;
      const cut = (key) => Array.from(run[key]).slice(at * bins, (at + 1) * bins);
      const [left, right, observed, forecast] = ["left", "right", "observed", "forecast"].map(cut);
      const [sparse, key] = Array.from(run.thresholds).slice(2 * at, 2 * at + 2);
      const known = [sparse, key].every((value) => Number.isFinite(value) && value > 0);
      // Only bins that hold something, or are forecast to, are in the picture
      const held = observed.map((share, bin) => (Math.max(share, forecast[bin]) > 2e-6 ? bin : -1)).filter((bin) => bin >= 0);
      const low = left[held[0] ?? 0];
      const high = Math.max(right[held.at(-1) ?? bins - 1], known ? key * 1.3 : 0);
      figure.renderers[0].data_source.data = {
        left, right, observed, forecast,
        center: left.map((edge, bin) => Math.sqrt(edge * right[bin])),
        foot: left.map(() => 1e-6),
      };
      figure.x_range.setv({ start: low, end: high });
      const bounds = { never: [low, sparse], sparse: [sparse, key], key: [key, high] };
      for (const [tag, [start, end]] of Object.entries(bounds)) {
        for (const box of part(tag, "left")) box.setv({ left: known ? start : low, right: known ? end : low });
      }
      for (const [tag, where] of [["sparse", sparse], ["key", key]]) {
        for (const span of part(tag, "location")) span.location = known ? where : low;
      }
      field("step").max = steps.length - 1;
      field("step").disabled = steps.length < 2;
      field("step").parentElement.querySelector("output").textContent = steps[step].toLocaleString("en");
      const sent = run.sent[at];
      panel.querySelector("[data-said]").textContent = Number.isFinite(sent)
        ? `At step ${steps[step].toLocaleString("en")} ${layers[layer]} sent ${percent(sent)} of its entries, and remembered ` +
          `${percent(Math.max(1 - sent, 0))}.`
        : "What was sent is not on record here.";
    };
    for (const name of ["layer", "step"]) field(name).addEventListener("input", show);
    field("run")?.addEventListener("input", () => {
      const names = runs[Number(field("run").value)].layers;
      field("layer").replaceChildren(...names.map((name, at) => new Option(name, at)));
      show();
    });
    show();
  }
  document.documentElement.dataset.ready = figures.size;
})();
