// Curves. Each is drawn when it comes into view, so that a page of many opens at once.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

const byId = (id) => document.getElementById(id);

// An element with text in it, never markup.
function element(tag, text, className) {
  const found = document.createElement(tag);
  if (text !== undefined) found.textContent = text;
  if (className) found.className = className;
  return found;
}

const charts = (() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let chosenWindow = null; // iterations; null: each chart's own

  // Centred running mean over what is there; null stays a gap.
  function smooth(values, window) {
    const half = Math.floor(window / 2);
    if (half < 1) return values;
    return values.map((value, i) => {
      if (value === null) return null;
      const near = values.slice(Math.max(0, i - half), i + half + 1).filter((v) => v !== null);
      return near.reduce((a, b) => a + b, 0) / near.length;
    });
  }

  function rgba(hex, alpha) {
    const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${parts.join(",")},${alpha})`;
  }

  function tracesOf(curve, window) {
    const known = (curve.sparse ? curve.x.map((_, i) => i).filter((i) => curve.y[i] !== null) : curve.x.map((_, i) => i));
    const column = (values) => smooth(known.map((i) => values[i]), curve.sparse ? 0 : window);
    const x = known.map((i) => curve.x[i]);
    const line = { x, y: column(curve.y), name: curve.name, mode: curve.sparse ? "lines+markers" : "lines",
      line: { color: curve.colour, dash: curve.dash, width: 2 }, legendgroup: curve.name,
      hovertemplate: "%{y:.4~g}<extra>" + curve.name.replaceAll("<", "&lt;") + "</extra>" };
    if (!curve.low) return [line];
    const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: curve.name };
    return [{ ...edge, y: column(curve.low) },
      { ...edge, y: column(curve.high), fill: "tonexty", fillcolor: rgba(curve.colour, 0.15) }, line];
  }

  function barsOf(chart) {
    return chart.bars.map((bar) => ({ type: "bar", orientation: "h", name: bar.name, x: bar.x, y: chart.labels,
      hovertemplate: "%{x:.3~g} s<extra>" + bar.name + "</extra>" }));
  }

  function draw(place, chart) {
    const window = chosenWindow ?? chart.window ?? 0;
    const traces = chart.bars ? barsOf(chart) : chart.curves.flatMap((curve) => tracesOf(curve, window));
    const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), automargin: true };
    const layout = {
      margin: { l: 45, r: 8, t: 8, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: style("--text"), family: "system-ui, sans-serif", size: 11 }, barmode: "stack",
      xaxis: { ...axis, title: { text: chart.x, standoff: 4 }, ...(chart.log ? { type: "log", dtick: Math.log10(2) } : {}) },
      yaxis: { ...axis, title: { text: chart.unit }, rangemode: "nonnegative", ...(chart.bars ? { autorange: "reversed", type: "category" } : {}) },
      legend: { orientation: "h", x: 0, y: chart.bars ? 1.02 : chart.x ? -0.28 : -0.14, yanchor: chart.bars ? "bottom" : "top" },
      hovermode: chart.bars ? "closest" : "x unified", showlegend: chart.bars || chart.curves.length <= 8,
      shapes: (chart.levels ?? []).map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y,
        line: { width: 1, dash: "dot", color: style("--soft") } })),
      annotations: (chart.levels ?? []).map((y) => ({ xref: "paper", x: 1, y, text: `${chart.level} ${Number(y.toPrecision(6))}`,
        showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 10, color: style("--soft") } })),
    };
    Plotly.react(place, traces, layout, { responsive: true, displayModeBar: false });
    place.dataset.drawn = "yes";
  }

  const seen = new Map(); // what has been in view
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !seen.has(target)) {
        seen.set(target, target.chart);
        if (globalThis.Plotly) draw(target, target.chart);
      }
    }
  }, { rootMargin: "300px" });

  function redraw() {
    if (globalThis.Plotly) seen.forEach((chart, place) => draw(place, chart));
  }

  function build() {
    for (const chart of DATA.charts) {
      const box = element("div", undefined, "chart");
      const place = element("div", undefined, "plot");
      place.chart = chart;
      if (chart.bars) place.style.setProperty("--height", `${9 + 2.2 * chart.labels.length}rem`);
      box.append(element("h3", chart.title), element("p", chart.text, "note"), place);
      byId(`charts-${chart.section ?? "curves"}`).append(box);
      observer.observe(place);
    }
    const slider = byId("window");
    const own = DATA.charts.find((chart) => chart.window)?.window ?? 1;
    slider.max = Math.max(51, own);
    slider.value = own;
    const show = () => { byId("window-text").textContent = slider.value < 3 ? "single iterations." : `${slider.value} iterations.`; };
    slider.addEventListener("input", () => { chosenWindow = Number(slider.value); show(); redraw(); });
    show();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    byId("plotly").addEventListener("load", redraw);
    if (globalThis.Plotly) redraw();
  }

  return { build };
})();

charts.build();
