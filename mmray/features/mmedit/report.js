// MMEdit: the paper's table by task and protocol, methods by measures.
"use strict";
function mmeditPage() {
  const { tables, columns, methods, left_out } = INDEX.mmedit;
  if (!tables.length) return [heading("MMEdit", "Not measured yet. `mmray mmedit RUN --vqa FILE --captioning FILE` compares edit methods on MMEdit's records.")];
  const cell = (row, best, measure) => {
    const found = row[measure];
    if (!found || found.value === null) return "–";
    return [found.value === best ? h("b", figure(found.value)) : figure(found.value), " ", h("span.range", interval(found))];
  };
  return [
    heading("MMEdit", `Edits of single records, measured by each protocol. Intervals: 95 %, over images; the best of a column is bold. ${left_out}`),
    tables.map(({ task, protocol, definition, rows }) => {
      const shown = columns.filter(({ measure }) => rows.some((row) => row[measure]));
      return card(h("h3", `${task}, ${protocol}`), h("p", `${definition}.`), sortable(`${task}, ${protocol}`, [
        { title: "method", value: (row) => row.method, cell: (row) => h("span", { title: methods[row.method] }, row.edits === 1 ? row.method : `${row.method}, ${row.edits} edits`) },
        ...shown.map(({ measure, title }) => {
          const best = Math.max(...rows.map((row) => row[measure]?.value ?? -Infinity));
          return { title, number: true, value: (row) => row[measure]?.value ?? null, cell: (row) => cell(row, best, measure) };
        }),
        { title: "n", number: true, value: (row) => row.n, cell: (row) => whole(row.n) },
      ], { keep: true }));
    }),
  ];
}

addPage("mmedit", "MMEdit", mmeditPage, INDEX.mmedit.tables.length);
