// Edits: what each changed, its measures, and captions before and after.
"use strict";
const ROLES = { edited: "the edit was made on this image", source: "it should change", unrelated: "it should stay", other: "it may change" };

// The words of a text, its punctuation and its spaces; Chinese, for one, has words without spaces.
const segments = (text) => Array.from(new Intl.Segmenter(undefined, { granularity: "word" }).segment(text), (part) => part.segment);

// Mark the words in which two captions differ, by their longest common subsequence.
function differing(before, after) {
  const [one, two] = [segments(before), segments(after)];
  const table = Array.from({ length: one.length + 1 }, () => new Uint16Array(two.length + 1));
  for (let i = one.length - 1; i >= 0; i--)
    for (let j = two.length - 1; j >= 0; j--) table[i][j] = one[i] === two[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const [old, now] = [[], []];
  let i = 0, j = 0;
  while (i < one.length || j < two.length) {
    if (i < one.length && j < two.length && one[i] === two[j]) { old.push(one[i++]); now.push(two[j++]); }
    else if (j >= two.length || (i < one.length && table[i + 1][j] >= table[i][j + 1])) old.push(h("del", one[i++]));
    else now.push(h("ins", two[j++]));
  }
  return [old, now];
}

// What an edit does, a line per statement.
const verdictList = ({ statements }) => h("ul.verdict", statements.map(({ words, passed }) => h(passed === null ? "li.open" : passed ? "li" : "li.broken", words)));

function editCard(edit) {
  const { facts, changed } = edit;
  const words = { purpose: "purpose", method: "method", seconds: "seconds", rows_changed: "neurons changed", parameters_changed: "parameters changed", bytes: "bytes", norm: "size (L2 norm)", neurons: "neurons" };
  const values = Object.entries(facts).filter(([name]) => words[name]);
  const measures = edit.measures.map((row) => ({ ...row, property: "edit" }));
  const limits = ({ at_least, at_most }) => [at_least, at_most].map((limit, at) => (limit === null ? "" : `${at ? "≤" : "≥"} ${String(limit).replace("-", "−")}`)).filter(Boolean).join(", ");
  return [
    h("h2", { id: edit.name }, facts.purpose || edit.name), under(edit.name),
    h("div.grid",
      edit.verdict ? card(h("h3", "Verdict"), verdictList(edit.verdict), sortable("Bounds of the edit", [
        { title: "measure", value: (row) => row.label, cell: (row) => row.label },
        { title: "after", value: (row) => row.value, number: true, cell: (row) => figure(row.value) },
        { title: "n", value: (row) => row.n, number: true, cell: (row) => (row.n ? whole(row.n) : "–") },
        { title: "bound", value: limits, cell: limits },
        { title: "verdict", value: (row) => row.passed, cell: (row) => (row.passed === null ? "not measured" : row.passed ? "within" : "broken") },
      ], edit.verdict.bounds, { keep: true })) : null,
      h("div.grid.two",
        card(h("h3", "The edit"), h("dl", values.map(([name, value]) => [h("dt", words[name]), h("dd", typeof value === "number" ? figure(value, Number.isInteger(value) ? 0 : 2) : value)])),
          changed.layers ? [h("h3", { style: "margin-top:14px" }, "What changed where"), h("div.chips", Object.entries(changed.layers).map(([layer, count]) => h("span", `L${layer}`, h("small", plural(count, "neuron"))))),
            h("div.chips", changed.strongest.map((row) => h("span", neuronLink(row.neuron), h("small", figure(row.norm, 2)))))] : null),
        measures.length ? card(h("h3", "Before and after"), sortable("Measures of the edit", [
          { title: "measure", value: (row) => row.label, cell: (row) => h("span", { title: row.protocol }, row.label) },
          { title: "before", value: (row) => row.before, number: true, cell: (row) => figure(row.before) },
          { title: "after, 95 % interval", value: (row) => row.after, number: true, cell: (row) => [figure(row.after), " ", h("span.range", interval(row))] },
          { title: "n", value: (row) => row.n, number: true, cell: (row) => whole(row.n) },
        ], measures, { keep: true, limit: 12 })) : null),
      edit.captions.length ? card(h("h3", "Captions before and after"), edit.captions.map((row) => {
        const [before, after] = differing(row.before || "", row.after || "");
        return h("div.pair", zoomable({ id: row.id, caption: row.before }), h("div", h("p", before), h("p", row.before === row.after ? h("span.range", "unchanged") : after), h("small.range", ROLES[row.role] || "")));
      })) : null),
  ];
}

function editsCompared(edits) {
  const measured = edits.filter((edit) => edit.measures.length), row = (edit, measure) => edit.measures.find((one) => one.measure === measure);
  if (measured.length < 2) return null;
  const columns = new Map(measured.flatMap((edit) => edit.measures.filter((one) => one.column !== null).map((one) => [one.measure, one.column])));
  const measures = [...columns.keys()].sort((one, two) => columns.get(one) - columns.get(two));
  return [h("h2", "Edits compared"), under("After each edit, on the data of its evaluation. Protocols are with each edit below."), card(sortable("Edits compared", [
    { title: "edit", kind: "wrap", value: (edit) => edit.name, cell: (edit) => h("b", edit.name) },
    { title: "method", value: (edit) => edit.facts.method || "", cell: (edit) => edit.facts.method || "" },
    { title: "neurons", value: (edit) => edit.facts.rows_changed, number: true, cell: (edit) => whole(edit.facts.rows_changed) },
    ...measures.map((measure) => [measure, measured.map((edit) => row(edit, measure)).find(Boolean)]).map(([measure, { label, protocol }]) => ({ title: label, number: true, about: protocol, value: (edit) => row(edit, measure)?.after ?? null,
      cell: (edit) => (row(edit, measure) ? [figure(row(edit, measure).after), h("br"), h("span.range", interval(row(edit, measure), 2), ` n ${whole(row(edit, measure).n)}`)] : "–") })),
  ], measured))];
}

const editsPage = () => (INDEX.editing.length
  ? [heading("Edits", "Changes of located neurons' rows of W_out that make the model say another word, each measured before and after."), editsCompared(INDEX.editing), INDEX.editing.map(editCard)]
  : [heading("Edits", "None in this run's folder. `mmray edit RUN --source dog --target cat --out RUN/edits/dog-cat` makes one, and `mmray evaluate` measures it.")]);

addPage("edits", "Edits", editsPage);
