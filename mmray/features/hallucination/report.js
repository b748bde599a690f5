// A detector's second opinion on the model's claims, with pictures of mistakes; and the neurons that predict them.
"use strict";
const CLAIMS = { caption: "nouns of its captions", question: "yes/no questions", yes: "questions answered yes", no: "questions answered no" };
const JUDGES = { detector: "own", "language model": "other" };

function reliabilityPlot(claims) {
  const rows = select(INDEX.hallucination.measures, { claims, measure: "reliability" });
  return plot(`Reliability of ${CLAIMS[claims]}`, () => [
    [
      { x: [0, 1], y: [0, 1], mode: "lines", line: { color: colour("control"), dash: "dot", width: 1 }, hoverinfo: "skip", showlegend: false },
      ...Object.entries(JUDGES).map(([judge, hue]) => {
        const own = select(rows, { judge });
        return { type: "scatter", mode: "lines+markers", name: judge, x: own.map((row) => row.confidence), y: own.map((row) => row.value), line: { color: colour(hue) }, hovertemplate: `%{x:.2f} sure, %{y:.2f} true<extra>${judge}</extra>` };
      }),
    ],
    { xaxis: { title: "confidence", range: [0, 1.02] }, yaxis: { title: "claims that are true", range: [0, 1.02] }, showlegend: true },
  ]);
}

// Each dose is a point: hallucination against recall, so that what recall pays for is seen.
function doseResponse(doses) {
  const hues = { none: "other", raised: "own", lowered: "specific", probe: "bad", decoding: "ink" };
  // A decoding changes no neuron: its curve has its own name.
  const named = (row) => (row.neurons === "none" && row.change !== null ? row.change : row.neurons);
  const every = select(doses, { measure: "chair_i" }).map((row) => ({ ...row, curve: named(row), recall: doses.find((one) => one.measure === "recall" && one.neurons === row.neurons && one.change === row.change && one.dose === row.dose) }));
  // A condition that breaks the model would push all others together; the table has it.
  const unchanged = every.find((row) => row.change === null)?.recall?.value || 0, points = every.filter((row) => !row.recall || row.recall.value >= unchanged / 2);
  const said = (row) => (row.change === null ? "unchanged" : row.dose === null ? row.change : row.neurons === "none" ? `${row.change} ${row.dose}` : `× ${row.dose}`);
  return plot("Hallucination against recall, by intervention", () => [
    [...new Set(points.map((row) => row.curve))].map((curve) => {
      const own = select(points, { curve }), neurons = own[0].neurons === "none" && curve !== "none" ? "decoding" : curve;
      return { type: "scatter", mode: hues[neurons] ? "lines+markers+text" : "lines+markers", name: curve, x: own.map((row) => row.recall?.value), y: own.map((row) => row.value), text: own.map(said), textposition: "top center",
        error_y: errorBars(own), line: { color: colour(hues[neurons] || "control"), dash: hues[neurons] ? "solid" : "dot", width: 1 }, marker: { size: 7, color: colour(hues[neurons] || "control") },
        hovertemplate: `CHAIR_i %{y:.3f}, recall %{x:.3f}<extra>${curve} %{text}</extra>` };
    }),
    { xaxis: { title: "object recall" }, yaxis: { title: "CHAIR_i", rangemode: "tozero" }, showlegend: true },
  ], 420);
}

function doseTable(doses) {
  const measures = [...new Set(doses.map((row) => row.measure))].filter((name) => !name.endsWith(" relative"));
  const keys = new Map(doses.map((row) => [JSON.stringify([row.neurons, row.change, row.dose]), row]));
  const rows = [...keys.values()].map((row) => ({ ...row, of: Object.fromEntries(select(doses, { neurons: row.neurons, change: row.change, dose: row.dose }).map((one) => [one.measure, one])) }));
  return sortable("Interventions", [
    { title: "neurons", value: (row) => row.neurons, cell: (row) => row.neurons }, { title: "change", value: (row) => row.change || "", cell: (row) => row.change || "" },
    { title: "dose", value: (row) => row.dose, number: true, cell: (row) => (row.dose === null ? "" : figure(row.dose, 2)) }, { title: "count", value: (row) => row.count, number: true, cell: (row) => whole(row.count) },
    ...measures.map((name) => ({ title: name.replace("_", " "), value: (row) => row.of[name]?.value, number: true, cell: (row) => (row.of[name] ? [figure(row.of[name].value), h("span.range", interval(row.of[name]))] : "–") })),
  ], rows, { keep: true, limit: 40 });
}

// The paper's comparison: how sure the detector is of what the model says is there and not there, right and wrong.
function answersTable(measures) {
  const cells = [["yes", "mean_present", "is there", "yes"], ["yes", "mean_absent", "is not there", "yes: positive hallucination"], ["no", "mean_present", "is there", "no: negative hallucination"], ["no", "mean_absent", "is not there", "no"]];
  const rows = cells.map(([claims, measure, truth, answer]) => ({ truth, answer, own: one(measures, { claims, measure, judge: "detector" }) })).filter((row) => row.own && row.own.value !== null);
  if (!rows.length) return null;
  return [h("h2", "Answers and the detector's confidence"), under("Mean of the highest probability of any box for the object that was asked about. A hallucinated yes follows what the vision embedding shows where its confidence is near that of a true yes."),
    card(sortable("Confidence of the detector by answer", [
      { title: "the object", value: (row) => row.truth, cell: (row) => row.truth }, { title: "the model answers", value: (row) => row.answer, cell: (row) => row.answer },
      { title: "confidence", number: true, about: rows[0].own.protocol, value: (row) => row.own.value, cell: (row) => [figure(row.own.value), h("span.range", interval(row.own))] }, { title: "n", number: true, value: (row) => row.own.n, cell: (row) => whole(row.own.n) },
    ], rows, { keep: true }))];
}

function biasPart(bias) {
  if (!bias.length) return null;
  const control = (row) => /unrelated|random/.test(row.condition);
  return [h("h2", "Bias"), under("How answers about portraits shift when the vision embedding moves from one prompt to another. A shift is the prompts' only where the controls of the same size, in grey, shift less. Replies without an answer are counted, and enter no mean."),
    card(sortable("Shift of answers between prompts", [
      { title: "from", value: (row) => row.source, cell: (row) => row.source }, { title: "to", value: (row) => row.target, cell: (row) => row.target }, { title: "question", value: (row) => row.question, cell: (row) => row.question },
      { title: "condition", value: (row) => row.condition, cell: (row) => (control(row) ? h("span.range", row.condition) : h("b", row.condition)) },
      { title: "before", number: true, value: (row) => row.before, cell: (row) => figure(row.before, 2) },
      { title: "shift", number: true, about: "mean of answer after − before, over images where both could be read", value: (row) => row.value, cell: (row) => (row.value === null ? "–" : [figure(row.value, 2), h("span.range", interval(row, 2))]) },
      { title: "n", number: true, value: (row) => row.n, cell: (row) => whole(row.n) },
      { title: "not read", number: true, about: "replies without an answer, before and after the move", value: (row) => row.unread_before + row.unread_after, cell: (row) => `${whole(row.unread_before)} + ${whole(row.unread_after)} of ${whole(row.asked)}` },
      { title: "protocol", cell: (row) => row.protocol },
    ], bias, { keep: true, limit: 60 }))];
}

function neuronsPart({ count, probe, layers, rows, captions, doses }) {
  if (!count) return [h("h2", "Neurons"), under("Not looked for yet. `mmray hallucination RUN --neurons` finds the neurons that predict which mentions are hallucinated.")];
  const found = (judge) => probe.find((row) => row.judge === judge && row.measure === "auroc"), ours = found("neurons"), facts = found("all three");
  return [
    h("h2", "Neurons that predict hallucination"), under("A sparse probe of what neurons write where a caption is about to mention an object; measured on images that neither choice nor fit saw."),
    h("div.tiles", tile(figure(ours.value), `AUROC of ${plural(count, "neuron")} for hallucinated above true mentions (95 %: ${interval(ours)})`, true), tile(figure(facts.value), `of log-probability, length and position (95 %: ${interval(facts)})`)),
    h("div.grid.two",
      card(h("h3", "Who says which mentions are hallucinated"), bars(probe.filter((row) => row.measure === "auroc"), "AUROC by judge", (row) => row.judge, (row) => (row.judge.startsWith("neurons") ? "own" : row.judge === "random neurons" || row.judge === "shuffled classes" ? "control" : "other"))),
      card(h("h3", "Where they are"), plot("Neurons of the probe by layer", () => [
        [["raised", "more at hallucinated mentions", "own"], ["lowered", "more at true mentions", "specific"]].map(([key, name, hue]) => ({ type: "bar", name, x: layers.map((row) => `L${row.layer}`), y: layers.map((row) => row[key]), marker: { color: colour(hue) }, hovertemplate: `%{y}<extra>%{x} · ${name}</extra>` })),
        { barmode: "stack", xaxis: { title: "layer", type: "category" }, yaxis: { title: "neurons" }, showlegend: true },
      ]))),
    card(sortable("Neurons of the probe", [
      { title: "neuron", value: (row) => row.layer, cell: (row) => neuronLink(row.neuron) }, { title: "weight", value: (row) => row.weight, number: true, about: "log-odds of hallucination per standard deviation of its share of the MLP's output", cell: (row) => figure(row.weight) },
      { title: "effect", value: (row) => row.effect, number: true, about: "Cohen's d on the images it was chosen on", cell: (row) => figure(row.effect, 2) },
      { title: "on test images", value: (row) => row.held_out_effect, number: true, cell: (row) => [figure(row.held_out_effect, 2), h("span.range", interval(row))] }, { title: "promotes", cell: (row) => row.tokens.join(" · ") },
    ], rows, { keep: true, limit: 60 })),
    h("h3.part", "Captions of test images"), card(sortable("Mentions with the probe's score", [
      { title: "mention", value: (row) => row.word, cell: (row) => h("b", row.word) }, { title: "in the image", value: (row) => row.hallucinated, cell: (row) => (row.hallucinated ? "no" : "yes") }, { title: "probe", value: (row) => row.score, number: true, cell: (row) => figure(row.score, 2) },
      { title: "log-probability", value: (row) => row.probability, number: true, cell: (row) => figure(row.probability, 2) }, { title: "caption", cell: (row) => `“${row.text}”` },
    ], captions, { keep: true, limit: 20 })),
    doses.length ? [h("h3.part", "Dose and response"), under("Neurons scaled or set while captions are written, and decodings that change no neuron. Down and to the right is better; dotted: as many random neurons of the same layers. What leaves less than half of the recall is in the table alone."), card(doseResponse(doses)), card(doseTable(doses))] : null,
  ];
}

function hallucinationPage() {
  const { measures, mistakes, bias, neurons } = INDEX.hallucination;
  if (!measures.length) return [heading("Second opinion", "Not asked yet. `mmray hallucination RUN` asks a detector whether what the model claims is there."), biasPart(bias), neuronsPart(neurons)];
  const shown = measures.filter((row) => row.measure !== "reliability"), found = (judge) => one(measures, { claims: "caption", measure: "auroc", judge });
  const tiles = Object.keys(JUDGES).filter(found).map((judge) => tile(figure(found(judge).value), `AUROC of the ${judge}'s confidence: nouns of captions that are there, above those that are not (95 %: ${interval(found(judge))})`, judge === "detector"));
  return [
    heading("Second opinion", "The language model claims, in captions and in answers, that things are in the image; a detector that reads the same embedding gives its confidence in each."),
    h("div.tiles", tiles),
    h("div.grid.two", ["caption", "question"].filter((claims) => one(measures, { claims, measure: "reliability" })).map((claims) => card(h("h3", `Calibration: ${CLAIMS[claims]}`), reliabilityPlot(claims)))),
    answersTable(measures),
    biasPart(bias),
    h("h2", "Mistakes"), under("In red the detector's best box for what was claimed, in blue the object that is there; the detector's confidence, and the log-probability of the claim."),
    h("div.grid.samples", mistakes.map((row) => h("figure", h("span.picture", h("img", { src: row.picture, alt: `${row.word} claimed${row.mistaken_for ? `, ${row.mistaken_for} stands there` : ""}` })),
      h("figcaption", h("b", row.word), row.mistaken_for ? ` for ${row.mistaken_for}` : ": nothing stands there", h("div.range", `“${row.text}” · ${figure(row.confidence, 2)} sure · ${figure(row.probability, 2)} nats`))))),
    h("h2", "All measures"), card(sortable("Measures of second opinions", [
      { title: "claims", value: (row) => row.claims, cell: (row) => CLAIMS[row.claims] || row.claims }, { title: "measure", value: (row) => row.measure, cell: (row) => row.measure.replace("_", " ") }, { title: "judge", value: (row) => row.judge || "", cell: (row) => row.judge || "" },
      { title: "value", value: (row) => row.value, number: true, cell: (row) => figure(row.value) }, { title: "95 %", cell: (row) => interval(row) }, { title: "n", value: (row) => row.n, number: true, cell: (row) => whole(row.n) }, { title: "protocol", cell: (row) => row.protocol },
    ], shown, { keep: true, limit: 60 })),
    neuronsPart(neurons),
  ];
}

addPage("hallucination", "Second opinion", hallucinationPage, INDEX.hallucination.measures.length + INDEX.hallucination.bias.length + INDEX.hallucination.neurons.count);
