// A detector's second opinion on the model's claims: ranking, calibration, and pictures of mistakes.
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

function hallucinationPage() {
  const { measures, mistakes } = INDEX.hallucination;
  if (!measures.length) return [heading("Second opinion", "Not asked yet. `mmray hallucination RUN` asks a detector whether what the model claims is there.")];
  const shown = measures.filter((row) => row.measure !== "reliability"), found = (judge) => one(measures, { claims: "caption", measure: "auroc", judge });
  const tiles = Object.keys(JUDGES).filter(found).map((judge) => tile(figure(found(judge).value), `AUROC of the ${judge}'s confidence: nouns of captions that are there, above those that are not (95 %: ${interval(found(judge))})`, judge === "detector"));
  return [
    heading("Second opinion", "The language model claims, in captions and in answers, that things are in the image; a detector that reads the same embedding gives its confidence in each."),
    h("div.tiles", tiles),
    h("div.grid.two", ["caption", "question"].filter((claims) => one(measures, { claims, measure: "reliability" })).map((claims) => card(h("h3", `Calibration: ${CLAIMS[claims]}`), reliabilityPlot(claims)))),
    h("h2", "Mistakes"), under("In red the detector's best box for what was claimed, in blue the object that is there; the detector's confidence, and the log-probability of the claim."),
    h("div.grid.samples", mistakes.map((row) => h("figure", h("span.picture", h("img", { src: row.picture, alt: `${row.word} claimed${row.mistaken_for ? `, ${row.mistaken_for} stands there` : ""}` })),
      h("figcaption", h("b", row.word), row.mistaken_for ? ` for ${row.mistaken_for}` : ": nothing stands there", h("div.range", `“${row.text}” · ${figure(row.confidence, 2)} sure · ${figure(row.probability, 2)} nats`))))),
    h("h2", "All measures"), card(sortable("Measures of second opinions", [
      { title: "claims", value: (row) => row.claims, cell: (row) => CLAIMS[row.claims] || row.claims }, { title: "measure", value: (row) => row.measure, cell: (row) => row.measure.replace("_", " ") }, { title: "judge", value: (row) => row.judge || "", cell: (row) => row.judge || "" },
      { title: "value", value: (row) => row.value, number: true, cell: (row) => figure(row.value) }, { title: "95 %", cell: (row) => interval(row) }, { title: "n", value: (row) => row.n, number: true, cell: (row) => whole(row.n) }, { title: "protocol", cell: (row) => row.protocol },
    ], shown, { keep: true, limit: 60 })),
  ];
}

addPage("hallucination", "Second opinion", hallucinationPage, INDEX.hallucination.measures.length);
