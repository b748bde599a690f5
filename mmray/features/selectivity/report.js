// Languages and domains: each label's neurons, the effect of zeroing them, steering, and the logit lens.
"use strict";
const HUES = ["own", "specific", "other", "control", "bad"], PATTERNS = ["", "/", "x", "."], DASHES = ["solid", "dash", "dot", "dashdot"];
// With more labels than colours, colours repeat in other patterns.
const styleOf = (at) => ({ hue: HUES[at % HUES.length], pattern: PATTERNS[Math.floor(at / HUES.length) % PATTERNS.length], dash: DASHES[Math.floor(at / HUES.length) % DASHES.length] });
const CONTROLS = {
  selected: ["Its neurons zeroed", "The neurons chosen for the label."], random: ["Random neurons zeroed", "As many per layer, drawn at random."],
  shuffled: ["Neurons chosen by chance zeroed", "Chosen in the same way from labels shuffled over the samples."],
};
const CHANGES = { perplexity: ["Held-out texts", "change of the perplexity"], nll: ["Held-out texts", "change of the negative log-likelihood, nats per token"], accuracy: ["Held-out questions", "change of the fraction answered correctly"] };
const MODULES = { language: "language model", vision: "vision tower", projector: "projector" };
const METHODS = { lape: "LAPE", contribution: "contribution" };
const KINDS = { language: "languages", domain: "domains" };
const labelName = (analysis, label) => (analysis.label_kind === "language" ? languageName(label) : label);
const analysisName = (row) => `${KINDS[row.label_kind] || row.label_kind} by ${METHODS[row.method] || row.method}, ${MODULES[row.module] || row.module}, ${row.modality === "both" ? "all" : row.modality} tokens`;
const raised = (value) => (value > 0 && /[1-9]/.test(figure(value)) ? "+" : "") + figure(value);

function labelLayers(analysis) {
  const { labels } = analysis;
  return plot(`Neurons of each layer chosen for ${labels.map((row) => labelName(analysis, row.label)).join(", ")}`, () => [
    labels.map((row, at) => ({
      type: "bar", name: plain(labelName(analysis, row.label)), x: row.layers.map((_, layer) => `L${layer}`), y: row.layers,
      marker: { color: colour(styleOf(at).hue), pattern: { shape: styleOf(at).pattern } }, hovertemplate: `%{y}<extra>%{x} · ${plain(labelName(analysis, row.label))}</extra>`,
    })),
    { barmode: "group", yaxis: { title: "neurons chosen", rangemode: "tozero" }, xaxis: { title: "layer", type: "category" }, showlegend: true },
  ]);
}

function labelTable(analysis) {
  const linked = (name) => (analysis.module === "language" ? neuronLink(name) : h("span.mono", name));
  return sortable("Labels with their neurons", [
    { title: analysis.label_kind, value: (row) => row.label, cell: (row) => h("b", labelName(analysis, row.label)) },
    { title: "samples", value: (row) => row.samples, number: true, cell: (row) => whole(row.samples) },
    { title: "tokens", value: (row) => row.tokens, number: true, cell: (row) => whole(row.tokens) },
    { title: "neurons", value: (row) => row.neurons, number: true, cell: (row) => whole(row.neurons) },
    { title: "by chance", value: (row) => row.chance, number: true, about: "neurons that reach the cut with the labels shuffled over the samples, mean", cell: (row) => figure(row.chance, 1) },
    { title: "stability", value: (row) => row.stability, number: true, about: "mean Jaccard index with the choices from redrawn samples", cell: (row) => figure(row.stability, 2) },
    { title: "first", cell: (row) => row.first.map((name) => [linked(name), " "]) },
  ], analysis.labels, { keep: true, limit: 40 });
}

// A cell's colour shows the direction of the change; its strength is relative to the largest change of the measure.
function matrix(analysis, shown, most) {
  const [title, words] = CONTROLS[shown.control] || [shown.control, ""], [, unit] = CHANGES[shown.measure] || ["", shown.measure];
  const names = shown.labels.map((label) => labelName(analysis, label));
  const cell = (row, value, at) => {
    if (!value || value.change === null) return h("td.number", "–");
    const hue = value.change > 0 ? "other" : "specific", part = Math.round((50 * Math.abs(value.change)) / (most || 1));
    const said = `${title}, of ${labelName(analysis, row.masked)}; ${names[at]}: ${figure(value.before)} → ${figure(value.after)}, ${raised(value.change)} (95 %: ${interval(value)}), ${plural(value.n, "sample")}`;
    return h(row.masked === shown.labels[at] ? "td.number.own" : "td.number", { title: said, style: `background:color-mix(in srgb, var(--${hue}) ${part}%, transparent)` }, raised(value.change), h("span.range", interval(value)));
  };
  return card(h("h3", title), under(words), h("div.scroll", h("table.matrix", { "aria-label": `${title}: ${unit}` },
    h("thead", h("tr", h("th", { scope: "col" }, "zeroed"), names.map((name, at) => h("th.number", { scope: "col" }, name, " ", h("small", `n ${whole(shown.masks.find((row) => row.cells[at])?.cells[at].n ?? 0)}`))))),
    h("tbody", shown.masks.map((row) => h("tr", h("th", { scope: "row" }, labelName(analysis, row.masked), " ", h("small", whole(row.neurons))), row.cells.map((value, at) => cell(row, value, at))))))));
}

function matrices(analysis) {
  return [...new Set(analysis.matrices.map((row) => row.measure))].map((measure) => {
    const found = select(analysis.matrices, { measure }), [title, unit] = CHANGES[measure] || [measure, "change"];
    const most = Math.max(...found.flatMap((shown) => shown.masks.flatMap((row) => row.cells.map((value) => Math.abs(value?.change ?? 0)))));
    return [h("h3.part", `${title}: ${unit}`), under(`One row per mask with its number of neurons, one column per label of the measured samples; frames mark a label's own samples. n: held-out samples of the label. 95 % intervals: bootstrap over images or texts. Orange: rise, green: fall, on one scale to ± ${figure(most)}.`),
      h("div.grid.two", found.map((shown) => matrix(analysis, shown, most)))];
  });
}

function steeringPart(analysis, row) {
  const [source, target] = [labelName(analysis, row.source), labelName(analysis, row.target)];
  return [
    h("h3.part", `Steering: ${source} → ${target}`), under(`${whole(row.neurons)} ${row.steering}. A text reads like the label whose captions explain its words best.`),
    h("div.tiles", tile(percent(row.turned / row.n, 1), `of ${plural(row.n, "held-out text")} read like ${target}; untouched ${percent(row.already / row.n, 1)}`, true), tile(percent(row.whole / row.n, 1), "in every word")),
    card(h("h3", "Before and after"), h("p.note", "The first that read like the target, then the first that don't."), h("ul.turns", row.examples.map(({ before, after, label_after }) =>
      h("li", h("p.note", before), h("p", h("span.range", "→ "), before === after ? h("span.range", "unchanged") : after),
        label_after === row.target ? null : h("small.bad", label_after ? `reads like ${labelName(analysis, label_after)}` : "reads like no label"))))),
  ];
}

const POSITIONS = { image: "image positions", text: "text positions" };
function stagesPart(analysis) {
  const named = (key) => select(analysis.stages, { masked: null }).map((row) => ({ ...row, method: POSITIONS[row.position] || row.position, value: row[key] }));
  const layers = [...new Set(analysis.stages.map((row) => row.layer))].sort((a, b) => a - b);
  const rows = layers.map((layer) => ({ layer, image: one(analysis.stages, { masked: null, layer, position: "image" }), text: one(analysis.stages, { masked: null, layer, position: "text" }) }));
  const masked = analysis.stages.filter((row) => row.masked !== null);
  return [
    h("h3.part", "Stages"), under("Every layer read through the final norm and the unembedding (logit lens), at the image's and at the text's positions."),
    h("div.grid.two",
      card(h("h3", "Entropy of the next token"), dose(named("entropy"), "Entropy of the next token by layer, at image and text positions", "layer", (row) => row.layer, "nats")),
      card(h("h3", "Agreement with the last layer"), dose(named("agreement"), "Fraction of positions with the same top token as the last layer, by layer", "layer", (row) => row.layer, "fraction of positions")),
      Object.keys(POSITIONS).map((position) => (masked.some((row) => row.position === position) ? card(h("h3", `Shift of the hidden state, ${POSITIONS[position]}`), shiftPlot(analysis, select(masked, { position }), position)) : null))),
    card(h("h3", "Top tokens by layer"), sortable("Top tokens by layer", [
      { title: "layer", value: (row) => row.layer, cell: (row) => `L${row.layer}` },
      { title: "image positions", kind: "tokens", cell: (row) => tokens(row.image?.tokens || []) }, { title: "text positions", kind: "tokens", cell: (row) => tokens(row.text?.tokens || []) },
    ], rows, { keep: true })),
  ];
}

function shiftPlot(analysis, rows, position) {
  const masks = analysis.labels.map((row) => row.label).filter((label) => rows.some((row) => row.masked === label));
  return plot(`Change of the hidden state by layer at ${POSITIONS[position]}, each label's neurons zeroed`, () => [
    masks.map((label) => {
      const own = select(rows, { masked: label }), { hue, dash } = styleOf(analysis.labels.findIndex((row) => row.label === label));
      return { type: "scatter", mode: "lines+markers", name: plain(labelName(analysis, label)), x: own.map((row) => row.layer), y: own.map((row) => row.shift), line: { color: colour(hue), dash, width: 2 },
        hovertemplate: `%{y:.3f} at %{x}<extra>${plain(labelName(analysis, label))}</extra>` };
    }),
    { xaxis: { title: "layer", dtick: 1 }, yaxis: { title: "fraction of its norm", rangemode: "tozero", exponentformat: "none" }, showlegend: true },
  ]);
}

function selectivityPage() {
  if (!INDEX.selectivity.length) return [heading("Languages and domains", "Not analysed yet. `mmray selectivity RUN --by language` chooses the neurons of each language or domain, with chance levels.")];
  return [
    heading("Languages and domains", "The neurons that are specific to one language or domain, compared with chance. The effect of zeroing them on every label's samples, and of setting them on the words that the model writes: both on held-out samples."),
    INDEX.selectivity.length > 1 ? h("div.chips", { role: "group", "aria-label": "Analyses" }, INDEX.selectivity.map((row, at) => h("button", { type: "button", onclick: () => document.getElementById(`analysis-${at}`).scrollIntoView() }, analysisName(row)))) : null,
    INDEX.selectivity.map((row, at) => [
      h("h2", { id: `analysis-${at}` }, analysisName(row).replace(/^./, (letter) => letter.toUpperCase())), under(`${plural(row.union, "neuron")} chosen in all.`),
      h("div.grid", card(h("h3", "Neurons by layer"), labelLayers(row)), card(labelTable(row))),
      matrices(row), row.steering.map((pair) => steeringPart(row, pair)), row.stages.length ? stagesPart(row) : null,
    ]),
  ];
}

addPage("selectivity", "Languages and domains", selectivityPage, INDEX.selectivity.length);
