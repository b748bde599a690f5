// The pages of a census: overview, a concept, a neuron, layers, failures.
"use strict";
const select = (rows, values) => rows.filter((row) => Object.entries(values).every(([name, value]) => row[name] === value));
const one = (rows, values) => select(rows, values)[0];

function tile(value, words, main = false) {
  return h(main ? "div.card.tile.main" : "div.card.tile", h("b", value), h("span", words));
}

const change = (fall) => `${Math.abs(fall) < 0.0005 ? "±" : fall < 0 ? "+" : "−"}${Math.abs(fall).toFixed(3)}`;

function findings() {
  const rows = INDEX.properties, tiles = [];
  const read = INDEX.concepts.filter((row) => row.read).length;
  const hit = one(rows, { measure: "lemma_hit_rate", method: "score" });
  const floor = one(rows, { measure: "lemma_hit_rate", method: "uniform" });
  const told = hit || !SOURCE.live;
  if (told) tiles.push(hit
    ? tile(percent(hit.value, 1), `of ${plural(hit.n, "concept")} are written by one of their ten highest neurons${floor ? `; by random ones ${percent(floor.value, 1)}` : ""}`, true)
    : tile(percent(read / INDEX.concepts.length, 1), `of ${plural(INDEX.concepts.length, "concept")} are written by one of their ten highest neurons`, true));
  const zeroed = { measure: "zeroed_own", neurons: 100 };
  const own = one(rows, { ...zeroed, method: "score" }), matched = one(rows, { ...zeroed, method: "layer-matched" });
  if (own) tiles.push(tile(change(own.value), `P(noun) with its 100 highest neurons zeroed, over ${plural(own.n, "image")}${matched ? `; random ones of the same layers ${change(matched.value)}` : ""}`, true));
  const pointing = ["score", "specific"].map((method) => one(rows, { measure: "pointing_game", method })).filter(Boolean).sort((a, b) => b.value - a.value)[0];
  const chance = one(rows, { measure: "pointing_game", method: "chance" });
  if (pointing) tiles.push(tile(percent(pointing.value), `of ${plural(pointing.n, "heat map")} of several objects peak on the right one${chance ? `; chance ${percent(chance.value)}` : ""}`, true));
  return tiles;
}

// One example worked through: an image, the neurons that write its noun, and what happens without them.
function exampleOf(page) {
  const sample = page.samples.find((one) => Object.keys(one.maps).length) || page.samples[0], map = sample.maps.specific || sample.maps.score;
  const zeroed = (method) => one(page.properties, { measure: "zeroed_own", method, neurons: 100 }), own = zeroed("score"), matched = zeroed("layer-matched");
  const most = Math.max(...page.neurons.map((row) => row.score));
  return card(h("div.example",
    h("figure", zoomable(sample, map), h("figcaption", caption(DATA.captions[sample.id], page.name), map && legend(map))),
    h("div",
      h("p", `The model writes `, h("a", { href: toConcept(page.name) }, h("b", page.name)), ` with probability ${figure(page.probability, 3)}, mean over ${plural(page.n, "occurrence")}. These neurons add most to its logit:`),
      sortable(`Highest neurons of ${page.name}`, [
        { title: "neuron", value: (row) => row.neuron, cell: (row) => neuronLink(row.neuron) },
        { title: "score", value: (row) => row.score, number: true, about: `mean ${scoreName}`, cell: (row) => barCell(row.score, most, 2) },
        { title: "writes", kind: "tokens", cell: (row) => [minus(row), tokens(row.tokens, page.name, 5)] },
      ], page.neurons.slice(0, 4), { keep: true, plain: true }),
      map && h("p.note", "The map shows where in the image the ten highest by specific are active."),
      own && h("p", { style: "margin:12px 0 0" }, `Zeroing the 100 highest changes the probability by `, h("b", change(own.value)), ` over ${plural(own.n, "image")}${matched ? `, and 100 random neurons of the same layers by ${change(matched.value)}` : ""}.`))));
}

function example() {
  const row = INDEX.concepts.find((one) => one.sample);
  if (!row) return null;
  const place = h("div"), fill = (page) => page && page.samples.length && place.replaceChildren(h("h2", "One example"), under("The most frequent concept of this run."), exampleOf(page));
  const page = SOURCE.part(`c:${row.name}`);
  if (page instanceof Promise) {
    // Room for it, so that what stands below does not move.
    place.className = "coming";
    page.then(fill, () => {});
  } else fill(page);
  return place;
}

const editsSummary = () => INDEX.editing.length ? [
  h("h2", "What edits did"), under("Each is measured on its own page. ", h("a", { href: "#/edits" }, "Edits")),
  h("div.grid.two", INDEX.editing.slice(0, 4).map((edit) => card(h("h3", edit.facts.purpose || edit.name), edit.verdict ? verdictList(edit.verdict) : h("p.note", "Not evaluated yet: mmray evaluate measures it.")))),
] : null;

function overview() {
  const { run } = INDEX, best = [...INDEX.concepts].filter((row) => row.sample).slice(0, 24);
  const facts = [
    ["model", `${run.model} · ${run.family} · ${whole(run.parameters)} parameters`], ["data", `${run.data} · ${run.captions === "dataset" ? "the data's captions" : "the model's own captions"} · nouns from ${run.nouns}`],
    ["score", scoreName], ["prompt", run.prompt || "Describe the image in few words. (in the caption's language)"],
    ...Object.entries(run.labels).map(([kind, counts]) => [kind, Object.entries(counts).map(([name, count]) => `${kind === "language" ? languageName(name) : name} ${whole(count)}`).join(" · ")]),
    ["run", run.uri], ["work", `${figure(run.worker_seconds, 0)} seconds of workers`], ["fingerprint", run.fingerprint],
    ["versions", Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(" · ")],
  ];
  return [
    heading("Which neurons write which words", `Every one of the ${whole(run.neurons)} neurons in ${plural(run.layers, "layer")} of ${run.model} was scored at every noun ${run.captions === "dataset" ? "in the captions of" : "that it writes about"} ${plural(run.samples, "image")}.`),
    h("div.tiles", findings(), tile(whole(run.concepts), `concepts at ${plural(run.occurrences, "occurrence")}`), tile(whole(run.samples), "images with captions"),
      Object.entries(run.skipped).map(([reason, count]) => tile(whole(count), `captions with ${reason}, which are not ranked`)),
      run.failures ? tile(whole(run.failures), `${run.failures === 1 ? "sample" : "samples"} failed`) : null),
    example(), editsSummary(),
    h("h2", "Most frequent concepts"), under("What the highest neuron of each writes; in green, its own word. ", h("a", { href: "#/concepts" }, `All ${whole(SOURCE.live ? INDEX.all_concepts : INDEX.concepts.length)} concepts`)),
    h("div.grid.gallery", best.map((row) =>
      h("a.card", { href: toConcept(row.name) }, picture({ id: row.sample, caption: row.name }), h("div.name", row.name, h("small", `${whole(row.n)}×`)), h("div.tokens", minus(row), tokens(row.tokens, row.name, 3))))),
    h("h2", "What the numbers are"), card(h("dl", INDEX.definitions.map(({ name, text }) => [h("dt", name), h("dd", text)]))),
    h("h2", "The run"), card(h("dl", facts.map(([name, text]) => [h("dt", name), h("dd", text)]))),
  ];
}

function steps(kind, names, name, to) {
  const at = names.indexOf(name);
  if (at < 0) return null;
  const step = (other, sign, word) => other !== undefined && h("a", { href: to(other), rel: word, "aria-label": `${word} ${kind}: ${other}`, title: other }, sign);
  return h("span.steps", step(names[at - 1], "←", "previous"), step(names[at + 1], "→", "next"));
}

function samplesCard(page) {
  const place = h("div.grid.samples"), controls = h("div");
  const stored = page.samples.some((sample) => Object.keys(sample.maps).length), has = SOURCE.map || stored;
  let ranking = "specific", how = stored ? "heat" : "image";
  // Of a served run with a model: the map of the ten highest neurons, made on demand.
  function make(sample, by) {
    const rows = [...page.neurons].sort((a, b) => (by === "score" ? a.rank - b.rank : a.specific_rank - b.specific_rank)).slice(0, 10);
    SOURCE.map(sample.id, rows.map((row) => row.neuron), rows.map((row) => (row.negative ? -1 : 1))).then((map) => {
      if (!map) return;
      sample.maps[by] = { ...map, box: null, iou: null };
      if (by === ranking && how !== "image") fill();
    }, () => {});
  }
  function fill() {
    controls.replaceChildren(...(has ? [
      h("div.chips", ...chips("Neurons", [["score", "10 highest by score"], ["specific", "10 highest by specific"]], ranking, (value) => { ranking = value; fill(); }).childNodes,
        h("span", { style: "border:0;background:none;padding:2px 4px" }, "·"),
        ...chips("Layer", [["heat", "heat map"], ["signed", "signed"], ["mask", "mask"], ["image", "image"]], how, (value) => { how = value; fill(); }).childNodes)] : []));
    place.replaceChildren(...page.samples.map((sample) => {
      const map = sample.maps[ranking];
      if (!map && SOURCE.map && how !== "image") make(sample, ranking);
      const found = map && map.hit !== null ? ` · peak ${map.hit ? "on" : "off"} the object` : "";
      const tried = SOURCE.map && h("a.range", { href: toPlayground(sample.id, page.neurons.slice(0, 10).map((row) => row.neuron).join(" ")) }, "playground");
      return h("figure", zoomable(sample, map, how), h("figcaption", caption(DATA.captions[sample.id], page.name), tried && [" ", tried], map ? h("div.range", `${figure(map.low, 2)} to ${figure(map.high, 2)}${found}`) : stored && how !== "image" && h("div.range", "no map drawn")));
    }));
  }
  fill();
  return card(h("h3", "Images"), controls, place, h("p.note", { style: "margin:12px 0 0" }, coded(has
    ? "Mean activation of the neurons over the image's patches, bilinear; the mask is what lies above the 95th percentile. The white box is the object's. `mmray properties RUN --maps N` draws maps of N images per concept."
    : "No heat maps in this run: `mmray properties RUN` draws them, if the model keeps the image's patches apart.")));
}

function concept(page) {
  const names = INDEX.concepts.map((row) => row.name), most = Math.max(...page.neurons.map((row) => row.score));
  const zeroed = select(page.properties, { measure: "zeroed_own" });
  const others = select(page.properties, { measure: "zeroed_other" });
  return [
    h("div.crumbs", h("a", { href: "#/concepts" }, "Concepts"), "/", page.name, steps("concept", names, page.name, toConcept)),
    heading(page.name, null),
    h("p.lead", [languageName(page.language), page.images ? `${plural(page.n, "occurrence")} in ${plural(page.images, "image")}` : plural(page.n, "occurrence"), `P(noun) ${figure(page.probability, 3)}`, page.token !== page.name && `scored at its first token “${page.token}”`].filter(Boolean).join(" · ")),
    page.related.length ? h("div.chips", { "aria-label": "Concepts that share neurons" }, h("span", { style: "border:0;background:none;padding-left:0" }, h("small", { style: "margin:0" }, "shares neurons with")), page.related.map((row) => h("a", { href: toConcept(row.name), title: `${row.shared} of the ten highest neurons are the same` }, row.name, h("small", row.shared)))) : null,
    compareField(page.name),
    h("div.grid", samplesCard(page),
      card(h("h3", "Neurons"), sortable(`Neurons of ${page.name}`, [
        { title: "rank by score", value: (row) => -row.rank, number: true, cell: (row) => `${row.rank}${row.certified ? "" : "?"}` },
        { title: "neuron", value: (row) => row.neuron, cell: (row) => neuronLink(row.neuron) },
        { title: "score", value: (row) => row.score, number: true, cell: (row) => [barCell(row.score, most, 2), " ", h("span.range", row.half === null ? "" : `± ${figure(row.half, 2)}`)] },
        { title: "specific", value: (row) => row.specific, number: true, cell: (row) => barCell(row.specific, most, 2, "bar.specific") },
        { title: "share", value: (row) => row.share, number: true, cell: (row) => percent(row.share) },
        { title: "writes", kind: "tokens", cell: (row) => [minus(row), tokens(row.tokens, page.name)] },
      ], page.neurons, { by: 0, to: (row) => toNeuron(row.neuron) })),
      zeroed.length ? h("div.grid.two",
        card(h("h3", "Its neurons zeroed"), dose(zeroed, `Fall of the probability of ${page.name} by neurons zeroed`, "neurons zeroed", (row) => row.neurons, "fall of P(noun)", scaleOf(zeroed, others)), under(`Mean over ${plural(zeroed[0].n, "image")} of ${page.name}, with 95 % bootstrap intervals over images.`)),
        others.length ? card(h("h3", "What that does to other nouns"), dose(others, "Fall of the probability of other nouns by neurons zeroed", "neurons zeroed", (row) => row.neurons, "fall of P(other nouns)", scaleOf(zeroed, others)), under("On the same scale: the nouns of images without it, with the same controls.")) : null) : null),
  ];
}

function compareField(name) {
  const names = INDEX.concepts.map((row) => row.name).filter((other) => other !== name);
  const go = (event) => { if (event.target.value.trim()) location.hash = toCompare(name, event.target.value.trim().toLowerCase()); };
  return h("label.compare", "compare with", h("input", { type: "text", list: "concepts", autocomplete: "off", onchange: go }), h("datalist", { id: "concepts" }, names.map((other) => h("option", { value: other }))));
}

const toCompare = (...names) => `#/compare/${names.map(encodeURIComponent).join("/")}`;

// The highest neurons of two concepts, those of both first.
function comparedNeurons(pages) {
  const rows = new Map();
  pages.forEach((page, side) => page.neurons.forEach((row) => {
    const known = rows.get(row.neuron) || { neuron: row.neuron, tokens: row.tokens, sides: [null, null] };
    known.sides[side] = row;
    rows.set(row.neuron, known);
  }));
  const shared = (row) => row.sides.filter(Boolean).length;
  const most = Math.max(...pages.flatMap((page) => page.neurons.map((row) => row.score)));
  const columns = pages.flatMap((page, side) => [
    { title: `rank, ${page.name}`, value: (row) => -(row.sides[side]?.rank ?? Infinity), number: true, cell: (row) => row.sides[side]?.rank ?? "–" },
    { title: `score, ${page.name}`, value: (row) => row.sides[side]?.score ?? null, number: true, cell: (row) => (row.sides[side] ? barCell(row.sides[side].score, most, 2) : "–") },
  ]);
  return sortable(`Neurons of ${pages[0].name} and ${pages[1].name}`, [
    { title: "neuron", value: (row) => row.neuron, cell: (row) => neuronLink(row.neuron) },
    { title: "listed by", value: shared, number: true, cell: (row) => (shared(row) === 2 ? "both" : "one") },
    ...columns, { title: "writes", kind: "tokens", cell: (row) => tokens(row.tokens, "", 6) },
  ], [...rows.values()], { by: 1, to: (row) => toNeuron(row.neuron) });
}

function comparePage(first, second) {
  const place = h("div.grid", { style: "margin-top:14px" });
  const fill = (pages) => {
    const absent = [first, second].filter((_, side) => !pages[side]);
    if (absent.length) return place.replaceChildren(h("p.note", `This report has no page of ${absent.join(" and ")}.`));
    const names = pages.map((page) => new Set(page.neurons.map((row) => row.neuron))), both = [...names[0]].filter((name) => names[1].has(name)).length;
    place.replaceChildren(
      h("p.lead", `${plural(both, "neuron")} of the ${names[0].size} and ${names[1].size} listed are the same.`),
      h("div.grid.two", pages.map((page) => card(h("h3", conceptLink(page.name)), h("p", `${plural(page.n, "occurrence")} · P(noun) ${figure(page.probability, 3)}`),
        h("div.grid.samples", page.samples.slice(0, 2).map((sample) => h("figure", zoomable(sample, sample.maps.specific || sample.maps.score), h("figcaption", caption(DATA.captions[sample.id], page.name)))))))),
      card(h("h3", "Neurons"), comparedNeurons(pages)));
  };
  Promise.all([first, second].map((name) => SOURCE.part(`c:${name}`))).then(fill, (error) => place.replaceChildren(h("p.bad", error.message)));
  return [h("div.crumbs", h("a", { href: "#/concepts" }, "Concepts"), "/", conceptLink(first)), heading(`${first} and ${second}`), place];
}

function neuron(page) {
  const names = INDEX.neurons.map((row) => row.neuron);
  const examples = (sign, title) => {
    const rows = page.examples.filter((row) => row.sign === sign), place = h("div.grid.samples"), maps = new Map();
    if (!rows.length) return null;
    const fill = () => place.replaceChildren(...rows.map((row) => h("figure", zoomable(row, maps.get(row.id)), h("figcaption", h("b", figure(row.activation, 2)), " ", exampleCaption(row)))));
    const draw = () => rows.forEach((row) => SOURCE.map(row.id, [page.neuron]).then((map) => { maps.set(row.id, map); fill(); }, () => {}));
    fill();
    return card(h("h3", title), SOURCE.map && h("div.chips", h("button", { type: "button", onclick: draw }, "heat maps of this neuron")), place);
  };
  const maps = page.maps.map((row) => h("figure", zoomable(row, row.map), h("figcaption", conceptLink(row.concept), " ", caption(DATA.captions[row.id], row.concept))));
  const activity = page.activity.map(([kind, label, modality, value]) => ({ kind, label, modality, value }));
  const label = (row) => `${row.kind === "all" ? "all" : row.kind === "language" ? languageName(row.label) : row.label} · ${row.modality}`;
  return [
    h("div.crumbs", h("a", { href: "#/neurons" }, "Neurons"), "/", page.neuron, steps("neuron", names, page.neuron, toNeuron)),
    heading(page.neuron, `Layer ${page.layer} · among the highest of ${plural(page.n_concepts, "concept")} · activation ${figure(page.mean, 3)} ± ${figure(page.std, 3)}, ${figure(page.min, 2)} to ${figure(page.max, 2)} · open at ${percent(page.open)} of ${whole(page.n_tokens)} tokens`),
    h("div.grid.two",
      card(h("h3", "Writes by positive activation"), h("div.chips", page.tokens.map((word) => h("span", word))), h("h3", "Writes by negative activation"), h("div.chips", page.suppressed.map((word) => h("span", word))),
        h("p.note", "It adds activation × its row of W_out, which promotes the first words and suppresses the second. Concepts with a minus use it by negative activation.")),
      card(h("h3", "Concepts"), sortable(`Concepts of ${page.neuron}`, [
        { title: "concept", value: (row) => row.name, cell: (row) => [minus(row), conceptLink(row.name)] },
        { title: "rank there", value: (row) => -row.rank, number: true, cell: (row) => row.rank },
        { title: "score", value: (row) => row.score, number: true, cell: (row) => figure(row.score, 2) },
        { title: "specific", value: (row) => row.specific, number: true, cell: (row) => figure(row.specific, 2) },
      ], page.concepts, { by: 1, to: (row) => toConcept(row.name) }))),
    h("div.grid", { style: "margin-top:14px" },
      maps.length ? card(h("h3", "Where it looks"), h("div.grid.samples", maps), under("Its own activation over the image's patches, for concepts that rank it among their three highest. For a concept that uses it by negative activation, bright is where it is most negative.")) : null,
      examples(1, "Highest activations"), examples(-1, "Lowest activations"),
      activity.length ? card(h("h3", "Where it is open"), bars(activity, `Share of tokens at which ${page.neuron} is open, by label`, label, (row) => (row.modality === "image" ? "specific" : "own"), ".1%"), under("Fraction of the tokens at which its gate is open: image tokens in green, caption tokens in violet.")) : null),
  ];
}

function layersPage() {
  const rows = INDEX.layers;
  return [
    heading("Layers", "Where the multi-modal neurons are: the layers of the ten highest neurons of every concept."),
    card(layersPlot(rows, [["score", "by score", "own"], ["specific", "by specific", "specific"]], "Share of the concepts' ten highest neurons by layer", "of the ten highest")),
    h("h2", "How open the neurons are"), card(layersPlot(rows, [["image", "image tokens", "specific"], ["text", "caption tokens", "own"]], "Share of open neurons by layer, at image and caption tokens", "of neurons open", 260)),
    h("h2", "In numbers"), card(sortable("Layers", [
      { title: "layer", value: (row) => row.layer, number: true, cell: (row) => `L${row.layer}` }, { title: "neurons", value: (row) => row.width, number: true, cell: (row) => whole(row.width) },
      { title: "of ten highest, score", value: (row) => row.score, number: true, cell: (row) => percent(row.score, 1) }, { title: "specific", value: (row) => row.specific, number: true, cell: (row) => percent(row.specific, 1) },
      { title: "concepts a neuron, mean", value: (row) => row.mean, number: true, cell: (row) => figure(row.mean, 2) }, { title: "most", value: (row) => row.most, number: true, cell: (row) => whole(row.most) },
    ], rows, { by: 0 })),
  ];
}

function failuresPage() {
  const { count, rows, quarantined } = INDEX.failures;
  if (!count && !quarantined.length) return [heading("Failures", "None: every sample of the data was analysed.")];
  return [
    heading("Failures", `${plural(count, "sample")} failed${quarantined.length ? `, ${plural(quarantined.length, "shard")} quarantined` : ""}; all others are in this report.`),
    quarantined.length ? card(h("h3", "Quarantined shards"), h("dl", quarantined.map((row) => [h("dt", `shard ${row.shard}`), h("dd", row.reason)]))) : null,
    rows.length ? card(sortable("Failed samples", [
      { title: "stage", value: (row) => row.stage, cell: (row) => row.stage }, { title: "why", value: (row) => row.message, kind: "text", cell: (row) => row.message },
      { title: "where", value: (row) => row.source, cell: (row) => row.source }, { title: "sample", value: (row) => row.sample_id || "", cell: (row) => h("code", row.sample_id || "") },
    ], rows)) : null,
  ];
}

addPage("", "Overview", overview);
addPage("concepts", "Concepts", conceptsPage);
addPage("neurons", "Neurons", neuronsPage);
addPage("layers", "Layers", layersPage);
addPage("compare", "Compare", comparePage, false);
