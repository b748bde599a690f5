// Properties of neurons with their controls, and the comparison of methods.
"use strict";
const MEASURES = {
  exact_hit_rate: "own token promoted", lemma_hit_rate: "own word promoted, in any form", bertscore: "BERTScore of the tokens", moverscore: "MoverScore of the tokens", clipscore: "CLIPScore of the tokens",
  overlap: "same neurons with the image's patches permuted", overlap_regenerated: "same neurons in a new caption of the permuted patches", regenerated_named: "new captions of the permuted patches that name the noun", common_share: "neurons common to all images of the concept", jaccard: "same neurons in two images of the concept",
  auroc: "own noun separated from others (AUROC)", own_score: "score at its noun", other_score: "score at other nouns", p_untouched: "P(noun), untouched",
  zeroed_own: "fall of P(noun), zeroed", zeroed_other: "fall of P(other nouns), zeroed", zeroed_removed: "captions that lose the noun, zeroed", zeroed_kept: "other captions unchanged, zeroed", zeroed_perplexity: "perplexity of other captions ×, zeroed",
  noise_own: "fall of P(noun), noise", noise_other: "fall of P(other nouns), noise", noise_removed: "captions that lose the noun, noise", noise_kept: "other captions unchanged, noise",
  amplified_own: "rise of P(noun) in place of other nouns, amplified", amplified_other: "fall of P(other nouns), amplified",
  pointing_game: "peak on the object", iou: "IoU of mask and object",
};
const measureName = (name) => MEASURES[name] || name.replaceAll("_", " ");
const SECTIONS = [
  ["sensitivity", "Sensitivity", "Do a concept's neurons write its word?"],
  ["localisation", "Localisation", "Do they look where the object is?"],
  ["region_invariance", "Region invariance", "Are they the same with the image's patches in another order?"],
  ["image_invariance", "Cross-image invariance", "Are they the same in other images of the concept?"],
  ["specificity", "Specificity", "Do they stay silent for other nouns?"],
  ["causal", "Causal effect", "Does the word go when they are taken away, and nothing else?"],
];

const range = (row) => [figure(row.value), " ", h("span.range", interval(row))];

function measuresTable(rows) {
  // A measure is named in the first of its rows only.
  const named = rows.map((row, at) => ({ ...row, first: !at || rows[at - 1].measure !== row.measure }));
  const size = (row) => [row.neurons ? String(row.neurons) : "", row.strength ? ` · ${figure(row.strength, 1)}` : ""];
  return sortable("Measures", [
    { title: "measure", kind: "wrap", value: (row) => measureName(row.measure), cell: (row) => row.first && h("span", { title: row.protocol }, measureName(row.measure)) },
    { title: "neurons", kind: "wrap", value: (row) => methodName(row.method), cell: (row) => (LOCATED.has(row.method) ? h("b", methodName(row.method)) : methodName(row.method)) },
    { title: "how many", value: (row) => row.neurons, number: true, cell: size },
    { title: "value, 95 % interval", value: (row) => row.value, number: true, cell: range },
    { title: "n", about: "images; of hit rates and common neurons: concepts", value: (row) => row.n, number: true, cell: (row) => whole(row.n) },
  ], named, { keep: true, limit: 16 });
}

function sectionCharts(name, rows) {
  if (name === "causal") {
    const noise = select(rows, { measure: "noise_own" }), own = select(rows, { measure: "zeroed_own" }), others = select(rows, { measure: "zeroed_other" });
    return [
      h("div.grid.two",
        card(h("h3", "Zeroed: its own noun"), dose(own, "Fall of the probability of the own noun", "neurons zeroed", (row) => row.neurons, "fall of P(noun)", scaleOf(own, others))),
        card(h("h3", "Zeroed: other nouns"), dose(others, "Fall of the probability of other nouns", "neurons zeroed", (row) => row.neurons, "fall of P(other nouns)", scaleOf(own, others))),
        noise.length ? card(h("h3", "Noise on the rows"), dose(noise, "Fall of the probability of the own noun by noise", "σ, as a fraction of the rows' RMS", (row) => row.strength, "fall of P(noun)")) : null,
        select(rows, { measure: "amplified_own" }).length ? card(h("h3", "Amplified: named where it is absent"), dose(select(rows, { measure: "amplified_own" }), "Rise of the probability of the concept's word in place of other nouns", "× activation", (row) => row.strength, "rise of P(noun)")) : null),
    ];
  }
  if (name === "region_invariance" || name === "image_invariance")
    return [h("div.grid.two", [...new Set(rows.filter((row) => row.neurons).map((row) => row.measure))].map((measure) =>
      card(h("h3", measureName(measure)), dose(select(rows, { measure }), measureName(measure), "highest neurons", (row) => row.neurons, "share"))))];
  // One chart per measure, of as many neurons as the section's tables begin with.
  return [h("div.grid.two", [...new Set(rows.map((row) => row.measure))].map((measure) => {
    const all = select(rows, { measure }), shown = all.filter((row) => row.neurons === all[0].neurons);
    return card(h("h3", measureName(measure)), dots(shown, measureName(measure), (row) => methodName(row.method), (row) => (LOCATED.has(row.method) ? "own" : "control")));
  }))];
}

const RARE = 0.05;
// Where the model hardly writes a noun, there is little that zeroing neurons could take away.
function rareBanner(rows) {
  const untouched = one(rows, { measure: "p_untouched" });
  return untouched && untouched.value < RARE ? h("p.card.banner", `The model gives these nouns a probability of ${figure(untouched.value)} at the places where the captions have them, so causal figures mean little here. A census of the model's own captions (--captions generate) measures words that it does write.`) : null;
}

function propertiesPage() {
  const rows = INDEX.properties;
  if (!rows.length) return [heading("Properties", "Not measured yet. `mmray properties RUN` measures what a concept's neurons mean, with controls, and draws the heat maps.")];
  const compared = select(rows, { property: "comparison" });
  const shown = SECTIONS.map(([name, title, question]) => {
    const own = select(rows, { property: name });
    if (!own.length) return null;
    const protocols = [...new Map(own.map((row) => [measureName(row.measure), row.protocol])).entries()];
    return [h("h2", title), under(question), h("div.grid", sectionCharts(name, own), card(
      h("details", h("summary", `All ${plural(own.length, "figure")}, with intervals and controls`), measuresTable(own)),
      h("details", h("summary", "How each was measured"), h("dl", protocols.map(([measure, text]) => [h("dt", measure), h("dd", text)])))))];
  });
  return [
    heading("Properties", "What the located neurons mean. Each figure comes with the same figure for control neurons. Intervals: 95 %, over images."),
    rareBanner(rows), shown, compared.length ? comparison(compared, rows) : null,
  ];
}

// The columns of Pan et al. 2024: sensitivity, invariance, specificity, and causal effect.
const COLUMNS = [
  ["inference_score", "inference score"], ["clipscore", "CLIPScore"], ["bertscore", "BERTScore"], ["moverscore", "MoverScore"], ["lemma_hit_rate", "noun written"],
  ["overlap", "region invariance"], ["overlap_regenerated", "with a new caption"], ["jaccard", "cross-image invariance"], ["common_share", "in all N images"], ["auroc", "specificity"],
  ["zeroed_own", "zeroed: P(noun) falls"], ["zeroed_other", "P(other nouns)"], ["noise_own", "noise: P(noun) falls"], ["noise_other", "P(other nouns)"],
];
const SOURCES = {
  contribution: "contribution (Pan et al.)", folded: "contribution after the final norm", gate: "gate (their released code)", activation: "activation (Base)", gradient: "gradient (Mmns)", random: "random (control)",
  "other images": "other images' nouns (control)",
};

function comparison(rows, all) {
  // Controls of an image's own neurons have no ranking, so they are measured with the properties.
  const control = (property, measure, method) => all.filter((row) => row.property === property && row.measure === measure && row.method === method && row.neurons === 10).map((row) => ({ ...row, method: "other images" }));
  const cells = [...rows, ...control("region_invariance", "overlap", "other images"), ...control("region_invariance", "overlap_regenerated", "other images"), ...control("image_invariance", "jaccard", "other nouns")];
  const methods = [...new Set(cells.map((row) => row.method))], measures = COLUMNS.filter(([measure]) => one(cells, { measure }));
  const table = methods.map((method) => ({ method, ...Object.fromEntries(measures.map(([measure]) => [measure, one(cells, { method, measure })])) }));
  const protocol = (measure) => cells.find((row) => row.measure === measure).protocol;
  const by = 1 + Math.max(0, measures.findIndex(([measure]) => measure === "zeroed_own"));
  return [
    h("h2", "Methods compared"), under("The table of Pan et al. 2024: neurons ranked by each method on half of a concept's images, and measured on the other half. Sensitivity, invariance, specificity, and what zeroing and noise take from the noun."),
    card(sortable("Methods", [
      { title: "method", kind: "wrap", value: (row) => row.method, cell: (row) => h("b", SOURCES[row.method] || row.method) },
      ...measures.map(([measure, title]) => ({ title, number: true, about: protocol(measure), value: (row) => row[measure]?.value ?? null,
        cell: (row) => (row[measure] ? [figure(row[measure].value), h("br"), h("span.range", interval(row[measure], 2), ` n ${whole(row[measure].n)}`)] : "–") })),
    ], table, { by }), h("details", h("summary", "How each was measured"), h("dl", measures.map(([measure, title]) => [h("dt", title), h("dd", protocol(measure))])))),
  ];
}

addPage("properties", "Properties", propertiesPage);
