// The page of SQL over the run's tables.
"use strict";
const QUERIES = [
  ["most used neurons", "select neuron, n_concepts, tokens\nfrom neurons\norder by n_concepts desc\nlimit 20"],
  ["certified and specific", "select concept, neuron, score, specific, tokens\nfrom rankings\nwhere certified and specific_rank = 1\norder by specific desc\nlimit 20"],
  ["layers of the ten highest", "select layer, count(*) as neurons\nfrom rankings\nwhere rank <= 10\ngroup by layer\norder by layer"],
];

function cellOf(value) {
  if (value === null) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : figure(value, 4);
  if (Array.isArray(value) && value.every((one) => typeof one !== "object")) return value.join(" ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function queryPage(words = "") {
  const text = h("textarea", { rows: 6, spellcheck: "false", "aria-label": "SQL" }), place = h("div", { "aria-live": "polite" });
  text.value = words || QUERIES[0][1];
  let turn = 0;
  async function run() {
    const mine = ++turn, began = performance.now();
    history.replaceState(null, "", `#/sql/${encodeURIComponent(text.value)}`);
    place.replaceChildren(h("p.note", "running …"));
    const found = await ask("sql", { query: text.value }).catch((error) => ({ error: error.message }));
    if (mine !== turn) return;
    if (found.error) return place.replaceChildren(h("p.bad", found.error));
    const columns = found.columns.map((title, at) => ({ title, value: (row) => row[at], number: found.rows.some((row) => typeof row[at] === "number"), kind: found.rows.some((row) => cellOf(row[at]).length > 60) ? "text" : "", cell: (row) => cellOf(row[at]) }));
    const took = `${plural(found.rows.length, "row")}${found.more ? ", the first ones" : ""} in ${figure((performance.now() - began) / 1000, 2)} s`;
    place.replaceChildren(h("p.note", took), card(sortable("Answer", columns, found.rows, { keep: true, limit: 200 })));
  }
  text.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); } });
  return [
    heading("SQL", "One SELECT over the run's tables, by DuckDB. It reads the tables and nothing else."),
    card(h("div.chips", { role: "group", "aria-label": "Examples" }, QUERIES.map(([name, query]) => h("button", { type: "button", onclick: () => { text.value = query; run(); } }, name))), text,
      h("button.act", { type: "button", onclick: run }, "Run"), h("span.note", " Ctrl-Enter")),
    place,
    h("h2", "Tables"), card(h("dl", Object.entries(INDEX.tables).map(([name, columns]) => [h("dt", name), h("dd", columns.join(", "))]))),
  ];
}
addPage("sql", "SQL", queryPage);
