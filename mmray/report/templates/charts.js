// Plotly figures in the page's colours, drawn again when the theme changes.
"use strict";
let drawn = [];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function layout(more) {
  const look = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true, fixedrange: true };
  // Since version 3, Plotly ignores a title that is a plain string.
  const axis = ({ title, ...own } = {}) => ({ ...look, ...own, ...(title ? { title: { text: title, standoff: 6 } } : {}) });
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12.5, color: colour("soft") },
    margin: { l: 10, r: 10, t: 12, b: 10 }, hovermode: "closest", bargap: 0.28,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    legend: { traceorder: "normal", orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    ...rest, xaxis: axis(xaxis), yaxis: axis(yaxis),
  };
}

// `make` returns traces and layout. It is called again for each theme, because colours are resolved in it.
function plot(label, make, tall = 300) {
  const node = h("div.plot", { role: "img", "aria-label": label, style: `height:${tall}px` });
  const draw = () => {
    const [traces, more] = make();
    Plotly.react(node, traces, layout(more), { displayModeBar: false, responsive: true });
  };
  drawn.push({ node, draw });
  // Plotly needs the node's width, so it draws once the page is in the document.
  queueMicrotask(() => node.isConnected && draw());
  return node;
}

// Plotly renders some tags and templates in its texts; text of the data must not have any.
const plain = (text) => text.replaceAll("<", "‹").replaceAll(">", "›").replaceAll("%{", "% {");

const redraw = () => drawn.forEach(({ draw }) => draw());
function forget() {
  drawn.forEach(({ node }) => Plotly.purge(node));
  drawn = [];
}

const errorBars = (rows) => ({
  type: "data", symmetric: false, thickness: 1.2, width: 3,
  array: rows.map((row) => (row.high ?? row.value) - row.value),
  arrayminus: rows.map((row) => row.value - (row.low ?? row.value)),
});

const LOOK = {
  score: ["own", "solid"], specific: ["specific", "solid"], "layer-matched": ["control", "solid"],
  "activation-matched": ["control", "dash"], uniform: ["control", "dot"], contribution: ["own", "solid"],
  "other images": ["control", "solid"], "image positions": ["specific", "solid"], "text positions": ["own", "solid"], "other nouns": ["control", "solid"],
};
const NAMES = {
  score: "highest by score", specific: "highest by specific", uniform: "random", "layer-matched": "random, same layers",
  "activation-matched": "random, like activations",
};
const scaleOf = (...groups) => Math.max(0.05, ...groups.flat().map((row) => row.high ?? row.value));
const LOCATED = new Set(["score", "specific", "image", "contribution", "unsigned", "gate"]);
const methodName = (name) => NAMES[name] || name;

// Neurons drawn at random, in several ways: one band from the lowest interval to the highest.
const RANDOM = new Set(["layer-matched", "activation-matched", "uniform"]);
function band(rows, x, value) {
  const places = [...new Set(rows.map(x))].sort((a, b) => a - b), at = (place) => rows.filter((row) => x(row) === place);
  const low = places.map((place) => Math.min(...at(place).map((row) => row.low ?? value(row)))), high = places.map((place) => Math.max(...at(place).map((row) => row.high ?? value(row))));
  const edge = { type: "scatter", mode: "lines", x: places, line: { color: colour("control"), width: 1 }, hoverinfo: "skip" };
  return [
    { ...edge, y: low, showlegend: false },
    { ...edge, y: high, fill: "tonexty", name: "random neurons (controls)", hoverinfo: "text",
      text: places.map((place) => at(place).map((row) => `${methodName(row.method)} ${figure(value(row))}`).join("<br>")) },
  ];
}

function lines(rows, x, value = (row) => row.value) {
  const random = rows.filter((row) => RANDOM.has(row.method));
  const methods = [...new Set(rows.filter((row) => !RANDOM.has(row.method)).map((row) => row.method))].sort((a, b) => Object.keys(LOOK).indexOf(a) - Object.keys(LOOK).indexOf(b));
  return [...(random.length ? band(random, x, value) : []), ...methods.map((method) => {
    const own = rows.filter((row) => row.method === method).sort((a, b) => x(a) - x(b));
    const [name, dash] = LOOK[method] || ["other", "solid"];
    return {
      type: "scatter", mode: "lines+markers", name: methodName(method), x: own.map(x), y: own.map(value), error_y: errorBars(own),
      line: { color: colour(name), dash, width: 2 }, marker: { size: 6, color: colour(name) },
      hovertemplate: `%{y:.3f} at %{x}<extra>${methodName(method)}</extra>`,
    };
  })];
}

// `most`: the top of the scale, for figures that are compared with each other.
function dose(rows, label, axis, x, title, most = null) {
  const places = [...new Set(rows.map(x))].sort((a, b) => a - b);
  return plot(label, () => [
    lines(rows, x),
    { xaxis: { title: axis, type: places[0] > 0 && places.length > 3 ? "log" : "linear", tickvals: places, ticktext: places.map(String) },
      yaxis: { title, exponentformat: "none", ...(most === null ? { rangemode: "tozero" } : { range: [-0.04 * most, 1.04 * most] }) } },
  ]);
}

function layersPlot(rows, keys, label, axis, tall = 320) {
  return plot(label, () => [
    keys.map(([key, name, hue]) => ({
      type: "bar", name, x: rows.map((row) => `L${row.layer}`), y: rows.map((row) => row[key]), marker: { color: colour(hue) },
      hovertemplate: `%{y:.1%}<extra>%{x} · ${name}</extra>`,
    })),
    { barmode: "group", yaxis: { tickformat: ".0%", title: axis }, xaxis: { title: "layer", type: "category" } },
  ], tall);
}

function bars(rows, label, name, hue, format = ".3f") {
  const shown = [...rows].reverse();
  return plot(label, () => [
    [{ type: "bar", orientation: "h", x: shown.map((row) => row.value), y: shown.map(name), error_x: { ...errorBars(shown), color: colour("faint") },
       marker: { color: shown.map((row) => colour(hue(row))) }, hovertemplate: `%{x:${format}}<extra>%{y}</extra>` }],
    { yaxis: { type: "category" }, xaxis: { tickformat: format === ".1%" ? ".0%" : "" } },
  ], 70 + 30 * rows.length);
}

// Values with their intervals, one line per row.
function dots(rows, label, name, hue) {
  const shown = [...rows].reverse();
  return plot(label, () => [
    [{ type: "scatter", mode: "markers", x: shown.map((row) => row.value), y: shown.map(name), error_x: { ...errorBars(shown), color: colour("faint") },
       marker: { size: 10, color: shown.map((row) => colour(hue(row))) }, hovertemplate: "%{x:.3f}<extra>%{y}</extra>" }],
    { yaxis: { type: "category" }, xaxis: { rangemode: "tozero", exponentformat: "none" } },
  ], 60 + 30 * rows.length);
}
