// Languages and domains: each label's neurons, the effect of zeroing them, steering, and the logit lens.
"use strict";
const HUES = ["own", "specific", "other", "control", "bad"], PATTERNS = ["", "/", "x", "."], DASHES = ["solid", "dash", "dot", "dashdot"];
// With more labels than colours, colours repeat in other patterns.
const styleOf = (at) => ({ hue: HUES[at % HUES.length], pattern: PATTERNS[Math.floor(at / HUES.length) % PATTERNS.length], dash: DASHES[Math.floor(at / HUES.length) % DASHES.length] });
const CONTROLS = {
  selected: ["Its neurons zeroed", "The neurons chosen for the label."], random: ["Random neurons zeroed", "As many per layer, drawn at random."],
  shuffled: ["Neurons chosen by chance zeroed", "Chosen in the same way from labels shuffled over the samples."],
};
const CHANGES = { perplexity: ["Held-out texts", "change of the perplexity"], nll: ["Held-out texts", "change of the negative log-likelihood, nats per token"], accuracy: ["Held-out questions", "change of the mean score of the answers"] };
const MODULES = { language: "language model", vision: "vision tower", projector: "projector", "qformer-text": "Q-Former’s text branch", all: "all modules together" };
const METHODS = { lape: "LAPE", contribution: "contribution" };
const KINDS = { language: "languages", domain: "domains" };
const labelName = (analysis, label) => (analysis.label_kind === "language" ? languageName(label) : label);
const LEVELS = { accuracy: "Answers to held-out questions: mean score", nll: "Held-out answers: negative log-likelihood, nats per token" };
const analysisName = (row) => `${KINDS[row.label_kind] || row.label_kind} by ${row.label_kind === "domain" && row.method === "lape" ? "DAPE" : METHODS[row.method] || row.method}, ${MODULES[row.module] || row.module}, ${row.modality === "both" ? "all" : row.modality} tokens`;
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

// How a measure is taken: one sentence, or one for each group of labels.
function protocols(analysis, measure) {
  const found = Object.entries(one(analysis.matrices, { measure })?.protocols || {});
  return found.map(([protocol, labels]) => under(`${found.length > 1 ? `${labels.map((label) => labelName(analysis, label)).join(", ")}: ${protocol}` : protocol.replace(/^./, (letter) => letter.toUpperCase())}.`));
}

// Fewest samples of which an interval means something.
const FEWEST = 10;

// The paper's table: a label's own samples, with its neurons of each module zeroed.
function effectTable(analysis, measure) {
  const { modules, effects } = analysis.together, own = select(effects, { measure });
  const rows = analysis.together.labels.flatMap((label) => Object.keys(CONTROLS).map((control) => ({ label, control, cells: select(own, { label, control }) }))).filter((row) => row.cells.length);
  const cell = (found) => {
    if (!found) return h("span.range", "no neuron");
    const clear = found.n >= FEWEST && (found.low > 0 || found.high < 0);
    return [h(clear ? "b" : "span", { title: `${plural(found.neurons, "neuron")} zeroed` }, figure(found.after)), h("br"), h("span.range", `${raised(found.change)} (${interval(found)})`)];
  };
  return card(h("h3", LEVELS[measure]),
    under(`Each label’s own samples, with its neurons of one module or of all modules zeroed. Small: the change, and its 95 % interval by bootstrap over images. Bold: the interval leaves out 0, with n of at least ${FEWEST}. 0 to 0: no sample changes.`),
    protocols(analysis, measure),
    sortable(LEVELS[measure], [
      { title: analysis.label_kind, value: (row) => row.label, cell: (row) => h("b", labelName(analysis, row.label)) },
      { title: "zeroed", value: (row) => row.control, cell: (row) => h("span", { title: CONTROLS[row.control][1] }, { selected: "its neurons", random: "random neurons", shuffled: "chosen by chance" }[row.control]) },
      { title: "n", number: true, value: (row) => row.cells[0].n, cell: (row) => whole(row.cells[0].n) },
      { title: "none zeroed", number: true, value: (row) => row.cells[0].before, cell: (row) => figure(row.cells[0].before) },
      ...[...modules, "all"].map((module) => ({ title: MODULES[module], number: true, value: (row) => one(row.cells, { module })?.after ?? null, cell: (row) => cell(one(row.cells, { module })) })),
    ], rows, { keep: true }));
}

function togetherPart(analysis) {
  const { modules, counts, effects, labels, replies } = analysis.together;
  const found = (label, module) => one(counts, { label, module });
  return [
    card(h("h3", "Neurons by module"), under("Neurons chosen for each label, and in brackets the mean number that shuffled labels choose. Their layers are below, module by module."), sortable("Neurons by module", [
      { title: analysis.label_kind, value: (row) => row, cell: (row) => h("b", labelName(analysis, row)) },
      ...modules.map((module) => ({ title: MODULES[module], number: true, value: (row) => found(row, module)?.neurons ?? null,
        cell: (row) => [whole(found(row, module)?.neurons ?? 0), " ", h("span.range", `(${figure(found(row, module)?.chance, 1)})`)] })),
    ], labels, { keep: true })),
    ["accuracy", "nll"].filter((measure) => select(effects, { measure }).length).map((measure) => effectTable(analysis, measure)),
    replies.length ? card(h("h3", "Replies that change"), under("The first of each label, with its neurons of all modules zeroed."), sortable("Replies that change", [
      { title: analysis.label_kind, value: (row) => row.label, cell: (row) => labelName(analysis, row.label) },
      { title: "question", value: (row) => row.question, cell: (row) => row.question },
      { title: "before", value: (row) => row.before, cell: (row) => [row.before, " ", h("span.range", figure(row.before_score, 2))] },
      { title: "after", value: (row) => row.after, cell: (row) => [row.after, " ", h("span.range", figure(row.after_score, 2))] },
    ], replies, { keep: true })) : null,
  ];
}

function matrices(analysis) {
  return [...new Set(analysis.matrices.map((row) => row.measure))].map((measure) => {
    const found = select(analysis.matrices, { measure }), [title, unit] = CHANGES[measure] || [measure, "change"];
    const most = Math.max(...found.flatMap((shown) => shown.masks.flatMap((row) => row.cells.map((value) => Math.abs(value?.change ?? 0)))));
    return [h("h3.part", `${title}: ${unit}`), under(`One row per mask with its number of neurons, one column per label of the measured samples; frames mark a label's own samples. n: held-out samples of the label. 95 % intervals: bootstrap over images or texts. Orange: rise, green: fall, on one scale to ± ${figure(most)}.`), protocols(analysis, measure),
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
function stagesPart(analysis, brief) {
  const named = (key) => select(analysis.stages, { masked: null }).map((row) => ({ ...row, method: POSITIONS[row.position] || row.position, value: row[key] }));
  const layers = [...new Set(analysis.stages.map((row) => row.layer))].sort((a, b) => a - b);
  const rows = layers.map((layer) => ({ layer, image: one(analysis.stages, { masked: null, layer, position: "image" }), text: one(analysis.stages, { masked: null, layer, position: "text" }) }));
  const masked = analysis.stages.filter((row) => row.masked !== null);
  return [
    h("h3.part", "Stages"), under(`Every layer read through the final norm and the unembedding (logit lens), at the image's and at the text's positions.${masked.length ? " Shift: how far zeroing a label’s neurons moves a layer’s output, as a fraction of its norm." : ""}${masked.some((row) => row.control === "random") ? " Dotted: as many random neurons of the same layers." : ""}`),
    h("div.grid.two", brief ? null : [
      card(h("h3", "Entropy of the next token"), dose(named("entropy"), "Entropy of the next token by layer, at image and text positions", "layer", (row) => row.layer, "nats")),
      card(h("h3", "Agreement with the last layer"), dose(named("agreement"), "Fraction of positions with the same top token as the last layer, by layer", "layer", (row) => row.layer, "fraction of positions"))],
      Object.keys(POSITIONS).map((position) => (masked.some((row) => row.position === position) ? card(h("h3", `Shift of the hidden state, ${POSITIONS[position]}`), shiftPlot(analysis, select(masked, { position }), position)) : null))),
    brief ? null : card(h("h3", "Top tokens by layer"), sortable("Top tokens by layer", [
      { title: "layer", value: (row) => row.layer, cell: (row) => `L${row.layer}` },
      { title: "image positions", kind: "tokens", cell: (row) => tokens(row.image?.tokens || []) }, { title: "text positions", kind: "tokens", cell: (row) => tokens(row.text?.tokens || []) },
    ], rows, { keep: true })),
  ];
}

function shiftPlot(analysis, rows, position) {
  const labels = analysis.together?.labels || analysis.labels.map((row) => row.label), masks = labels.filter((label) => rows.some((row) => row.masked === label));
  const lines = masks.flatMap((label) => [false, true].map((random) => ({ label, random, own: select(rows, { masked: label }).filter((row) => (row.control === "random") === random) }))).filter((line) => line.own.length);
  return plot(`Change of the hidden state by layer at ${POSITIONS[position]}, each label's neurons zeroed, or as many random ones`, () => [
    lines.map(({ label, random, own }) => {
      const { hue, dash } = styleOf(labels.indexOf(label)), name = plain(labelName(analysis, label)) + (random ? ", random" : "");
      return { type: "scatter", mode: random ? "lines" : "lines+markers", name, x: own.map((row) => row.layer), y: own.map((row) => row.shift), line: { color: colour(hue), dash: random ? "dot" : dash, width: random ? 1.5 : 2 },
        hovertemplate: `%{y:.3f} at %{x}<extra>${name}</extra>` };
    }),
    { xaxis: { title: "layer", dtick: 1 }, yaxis: { title: "fraction of its norm", rangemode: "tozero", exponentformat: "none" }, showlegend: true },
  ]);
}

// Whether a module's analysis is part of one of all modules together, which shows the same without a mask.
const inPart = (row) => row.matrices.length > 0 && INDEX.selectivity.some((joint) => joint.together && joint !== row && joint.label_kind === row.label_kind && joint.method === row.method);

function selectivityPage() {
  if (!INDEX.selectivity.length) return [heading("Languages and domains", "Not analysed yet. `mmray selectivity RUN --by language` chooses the neurons of each language or domain, with chance levels.")];
  return [
    heading("Languages and domains", "The neurons that are specific to one language or domain, compared with chance. The effect of zeroing them on every label's samples, and of setting them on the words that the model writes: both on held-out samples."),
    INDEX.selectivity.length > 1 ? h("div.chips", { role: "group", "aria-label": "Analyses" }, INDEX.selectivity.map((row, at) => h("button", { type: "button", onclick: () => document.getElementById(`analysis-${at}`).scrollIntoView() }, analysisName(row)))) : null,
    INDEX.selectivity.map((row, at) => [
      h("h2", { id: `analysis-${at}` }, analysisName(row).replace(/^./, (letter) => letter.toUpperCase())),
      row.together ? togetherPart(row) : [under(`${plural(row.union, "neuron")} chosen in all.`), h("div.grid", card(h("h3", "Neurons by layer"), labelLayers(row)), card(labelTable(row)))],
      inPart(row) ? h("details", h("summary", "Every label’s samples under every mask"), matrices(row)) : matrices(row),
      row.steering.map((pair) => steeringPart(row, pair)), row.stages.length ? stagesPart(row, inPart(row)) : null,
    ]),
  ];
}

addPage("selectivity", "Languages and domains", selectivityPage, INDEX.selectivity.length);
