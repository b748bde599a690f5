// Where words come from: measures of each method's maps, and the maps side by side.
"use strict";
const LOWER_IS_BETTER = new Set(["deletion"]);

function saliencyPage() {
  const { measures, words } = INDEX.saliency;
  if (!measures.length) return [heading("Saliency", "Not measured yet. `mmray saliency RUN` compares maps of where words come from with the boxes of the data.")];
  const methods = [...new Set(measures.map((row) => row.method))], names = [...new Set(measures.map((row) => row.measure))];
  const table = methods.map((method) => ({ method, ...Object.fromEntries(names.map((measure) => [measure, one(measures, { method, measure })])) }));
  const best = (measure) => (LOWER_IS_BETTER.has(measure) ? Math.min : Math.max)(...measures.filter((row) => row.measure === measure && !row.method.startsWith("random")).map((row) => row.value));
  const drawn = words.length ? Object.keys(words[0].maps) : [];
  return [
    heading("Saliency", `Which part of the image a word of the caption comes from, by ${methods.length - 1} methods: ${whole(measures[0].words)} words of ${plural(measures[0].n, "image")}. Intervals: 95 %, over images; the best of a column is bold.`),
    card(sortable("Measures of saliency maps", [
      { title: "method", value: (row) => row.method, cell: (row) => row.method },
      ...names.map((measure) => ({ title: measure.replaceAll("_", " "), number: true, about: measures.find((row) => row.measure === measure).protocol, value: (row) => row[measure]?.value ?? null,
        cell: (row) => (row[measure] ? [h(row[measure].value === best(measure) ? "b" : "span", figure(row[measure].value)), h("br"), h("span.range", interval(row[measure], 2))] : "–") })),
    ], table, { by: 1 }), h("details", h("summary", "How each was measured"), h("dl", names.map((measure) => [h("dt", measure.replaceAll("_", " ")), h("dd", measures.find((row) => row.measure === measure).protocol)])))),
    words.length ? [h("h2", "Maps"), under("Each between its own lowest and highest value, given below it: cosines of alignment (scaled from 0 to 1 where several outputs count), confidences of the detector, norms of gradients. The white box is the object's.")] : null,
    words.map((row) => card(h("h3", row.word), h("div.grid.samples",
      h("figure", picture(row), h("figcaption", caption(DATA.captions[row.id], row.word))),
      drawn.filter((method) => row.maps[method]).map((method) => {
        const map = row.maps[method];
        return h("figure", picture(row, map), h("figcaption", h("b", method), h("div.range", `${figure(map.low, 3)} to ${figure(map.high, 3)} · peak ${map.hit ? "on" : "off"} the object`)));
      })))),
  ];
}

addPage("saliency", "Saliency", saliencyPage, INDEX.saliency.measures.length);
