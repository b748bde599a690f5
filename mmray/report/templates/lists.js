// Sortable tables, and the lists of concepts and neurons.
"use strict";

// Saves rows as a file: what their cells show, as CSV, or the rows themselves, as JSON.
function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type })), link = h("a", { href: url, download: name });
  link.click();
  URL.revokeObjectURL(url);
}
function csvOf(columns, rows) {
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  // A number in full, and everything else as it is shown.
  const cell = (column, row) => { const value = column.value?.(row); return typeof value === "number" && column.number ? String(value) : h("td", column.cell(row)).textContent.trim(); };
  const named = columns.filter((column) => column.title);
  return [named.map((column) => column.title), ...rows.map((row) => named.map((column) => cell(column, row)))].map((line) => line.map(quoted).join(",")).join("\n");
}

// columns: {title, value, cell, number}. A click on a title sorts by it, a second one reverses. `keep`: no sorting.
// `plain`: it can't be saved.
// `rows` is an array, or a function of (column, down, count) that promises {rows, total}: the first rows in that order.
function sortable(label, columns, rows, options = {}) {
  let { by = 0, down = true, limit = 100 } = options, shown = limit;
  const body = h("tbody"), more = h("button.more", { type: "button", hidden: true, onclick: () => { shown += 400; fill(); } });
  const titles = columns.map((column, at) =>
    h(column.number ? "th.number" : "th", { scope: "col", title: column.about || DEFINITIONS.get(column.title) }, column.value && !options.keep
      ? h("button", { type: "button", onclick: () => { [by, down] = [at, by === at ? !down : Boolean(column.number)]; fill(); } }, column.title)
      : column.title));
  const order = (a, b) => {
    const [first, second] = [columns[by].value(a), columns[by].value(b)];
    const sign = typeof first === "string" ? first.localeCompare(second ?? "") : (first ?? -Infinity) - (second ?? -Infinity);
    return down ? -sign : sign;
  };
  function take() {
    if (typeof rows === "function") return rows(columns[by], down, shown);
    return { rows: (options.keep ? rows : [...rows].sort(order)).slice(0, shown), total: rows.length };
  }
  let turn = 0;
  function fill() {
    const mine = ++turn, taken = take();
    if (taken instanceof Promise) taken.then((some) => mine === turn && show(some), (error) => body.replaceChildren(h("tr", h("td.bad", { colspan: columns.length }, error.message))));
    else show(taken);
    titles.forEach((title, at) => {
      if (at === by && !options.keep) title.setAttribute("aria-sort", down ? "descending" : "ascending");
      else title.removeAttribute("aria-sort");
      const button = title.querySelector("button");
      if (button) button.textContent = columns[at].title + (at === by ? (down ? " ↓" : " ↑") : "");
    });
  }
  let listed = [];
  function show(some) {
    listed = some.rows;
    body.replaceChildren(...some.rows.map((row) =>
      h(options.to ? "tr.link" : "tr", options.to && { onclick: (event) => { if (!event.target.closest("a")) location.hash = options.to(row); } },
        columns.map((column) => h(`td${column.number ? ".number" : ""}${column.kind ? `.${column.kind}` : ""}`, column.cell(row))))));
    more.hidden = shown >= some.total;
    more.textContent = `Show more of ${whole(some.total)}`;
    options.told?.(some);
  }
  fill();
  const file = label.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  const every = () => (typeof rows === "function" ? listed : rows);
  const saving = (kind, text, type) => h("button", { type: "button", "aria-label": `Save ${label} as ${kind}`, onclick: () => save(`${file}.${kind.toLowerCase()}`, text(), type) }, kind);
  return h("div", h("div.scroll", { tabindex: 0, role: "region", "aria-label": label }, h("table", { "aria-label": label }, h("thead", h("tr", titles)), body)),
    h("div.under-table", more, options.plain ? null : h("span.saving", saving("CSV", () => csvOf(columns, every()), "text/csv"), saving("JSON", () => JSON.stringify(every(), null, 1), "application/json"))));
}

const barCell = (value, most, digits, kind = "bar") =>
  h("span", h(`span.${kind}`, { style: `width:${Math.max(0, (64 * value) / (most || 1))}px`, "aria-hidden": "true" }), " ", figure(value, digits));

function chips(label, choices, chosen, choose) {
  return h("div.chips", { role: "group", "aria-label": label }, choices.map(([value, name, count]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => choose(value) }, name, count !== undefined && h("small", whole(count)))));
}

const matches = (row, text) => row.name.includes(text.toLowerCase());

function conceptTable(rows) {
  const most = Math.max(...rows.map((row) => row.score));
  return sortable("Concepts", [
    { title: "image", cell: (row) => small(row.sample, "") },
    { title: "concept", value: (row) => row.name, cell: (row) => h("a", { href: toConcept(row.name) }, h("b", row.name)) },
    { title: "language", value: (row) => row.language || "", cell: (row) => languageName(row.language) },
    { title: "occurrences", value: (row) => row.n, number: true, cell: (row) => whole(row.n) },
    { title: "highest neuron", value: (row) => row.neuron, cell: (row) => neuronLink(row.neuron) },
    { title: "score", value: (row) => row.score, number: true, about: `mean ${scoreName} of its highest neuron`, cell: (row) => barCell(row.score, most, 2, "bar") },
    { title: "specific", value: (row) => row.specific, number: true, about: "the highest neuron's score less what it gives other nouns", cell: (row) => barCell(row.specific, most, 2, "bar.specific") },
    { title: "P(noun)", value: (row) => row.probability, number: true, cell: (row) => figure(row.probability, 3) },
    { title: "read", value: (row) => Number(row.read), about: "its own token is among those of its ten highest neurons", cell: (row) => (row.read ? "✓" : h("small", "–")) },
    { title: "its highest neuron writes", kind: "tokens", cell: (row) => [minus(row), tokens(row.tokens, row.name)] },
  ], rows, { by: 3, to: (row) => toConcept(row.name) });
}

function conceptsPage(words = "") {
  const languages = Object.entries(INDEX.run.labels.language || {});
  const place = h("div"), least = h("input", { type: "number", min: 1, value: 1, oninput: () => fill() });
  let language = "", read = "";
  function fill() {
    const named = INDEX.concepts.filter((row) => (!words || matches(row, words)) && row.n >= (Number(least.value) || 1) && (!read || row.read === (read === "read")));
    const rows = named.filter((row) => !language || row.language === language);
    const count = (code) => named.filter((row) => row.language === code).length;
    place.replaceChildren(
      languages.length > 1 ? chips("Language", [["", "all languages"], ...languages.map(([code]) => [code, languageName(code), count(code)])], language, (value) => { language = value; fill(); }) : "",
      chips("Read", [["", "all"], ["read", "read"], ["not", "not read"]], read, (value) => { read = value; fill(); }),
      rows.length ? card(conceptTable(rows)) : h("p.note", "No such concept. A concept is a noun of the captions, in lower case."));
  }
  fill();
  const left = INDEX.all_concepts - INDEX.concepts.length;
  return [
    heading(words ? `Concepts with “${words}”` : "Concepts", "Every noun of the captions with its highest neuron. Choose one to see its neurons, images with heat maps, and what happens when they are taken away."),
    h("div.fields.narrow", h("label", "occurrences, at least", least)), place,
    left > 0 && h("p.note", `${whole(left)} less frequent concepts don't fit into this file: they are in the run's tables, in a report of many files (mmray report RUN --pages DIR), and in mmray serve RUN.`),
  ];
}

function neuronsPage() {
  const layers = [...new Set(INDEX.neurons.map((row) => row.layer))].sort((a, b) => a - b), place = h("div");
  const choose = h("select", { onchange: () => fill() }, h("option", { value: "" }, "all"), layers.map((layer) => h("option", { value: layer }, `L${layer}`)));
  const fill = () => place.replaceChildren(neuronTable(INDEX.neurons.filter((row) => choose.value === "" || row.layer === Number(choose.value))));
  fill();
  return [
    heading("Neurons", `${plural(INDEX.neurons.length, "neuron")} that are among the highest of a concept shown, of ${whole(INDEX.run.neurons)} in the model.`),
    layers.length > 1 && h("div.fields.narrow", h("label", "layer", choose)), card(place),
  ];
}

function neuronTable(rows) {
  return sortable("Neurons", [
    { title: "neuron", value: (row) => row.layer, cell: (row) => neuronLink(row.neuron) },
    { title: "concepts", value: (row) => row.n_concepts, number: true, about: "concepts that have it among their highest", cell: (row) => whole(row.n_concepts) },
    { title: "open", value: (row) => row.open, number: true, about: "fraction of all tokens at which its gate is open", cell: (row) => percent(row.open) },
    { title: "highest activation", value: (row) => row.max, number: true, cell: (row) => figure(row.max, 2) },
    { title: "promotes", kind: "tokens", cell: (row) => tokens(row.tokens) },
  ], rows, { by: 1, to: (row) => toNeuron(row.neuron) });
}
