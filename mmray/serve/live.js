// Pages over live data: what the report embeds, the server is asked for.
"use strict";
async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (answer.status === 404) return null;
  const found = await answer.json().catch(() => ({ error: `the server answered ${answer.status}; is it still running?` }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}
const queryOf = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== null)).toString();

async function livePart(key) {
  const found = await ask(`part?${queryOf({ key })}`);
  if (!found) return null;
  Object.assign(DATA.captions, found.captions);
  return found.value;
}

async function liveSearch(text) {
  if (!text.trim()) return [];
  const found = await ask(`search?${queryOf({ words: text })}`), more = found.total > found.concepts.length;
  return [
    ...found.concepts.map((row) => ({ to: toConcept(row.name), name: row.name, more: `${whole(row.n)}×` })),
    ...found.neurons.map((row) => ({ to: toNeuron(row.neuron), name: row.neuron, more: row.tokens.slice(0, 4).join(" ") })),
    ...(more ? [{ to: `#/concepts/${encodeURIComponent(text.trim().toLowerCase())}`, name: `all ${whole(found.total)} concepts with “${text.trim()}”`, more: "" }] : []),
  ];
}

Object.assign(SOURCE, { live: true, part: livePart, image: (id) => `image?${queryOf({ id })}`, search: liveSearch });

// A list in the server's order: `fields` are its filters, by name.
function liveList(path, label, columns, options, fields) {
  const count = h("p.note", { role: "status" }), place = h("div");
  const values = () => Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value.trim()]));
  const rows = (column, down, shown) => ask(`${path}?${queryOf({ ...values(), by: column.key, down: down ? "1" : "0", count: shown })}`);
  const fill = () => place.replaceChildren(sortable(label, columns, rows, { ...options, limit: 50, told: ({ total }) => { count.textContent = `${whole(total)} found`; } }));
  let wait;
  for (const field of Object.values(fields)) field.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(fill, 150); });
  fill();
  return card(h("div.fields", Object.values(fields).map((field) => h("label", field.title, field))), count, place);
}

const textField = (title, value = "", more = {}) => h("input", { type: "search", title, value, placeholder: title, autocomplete: "off", spellcheck: "false", ...more });

function liveConcepts(words = "") {
  const most = Math.max(...INDEX.concepts.map((row) => row.score));
  return [
    heading("Concepts", `Every noun of the captions with its highest neuron: ${whole(INDEX.all_concepts)} in all.`),
    liveList("concepts", "Concepts", [
      { title: "concept", key: "concept", value: (row) => row.name, cell: (row) => h("a", { href: toConcept(row.name) }, h("b", row.name)) },
      { title: "occurrences", key: "n", value: (row) => row.n, number: true, cell: (row) => whole(row.n) },
      { title: "images", key: "n_images", value: (row) => row.images, number: true, cell: (row) => (row.images === null ? "–" : whole(row.images)) },
      { title: "highest neuron", key: "neuron", value: (row) => row.neuron, cell: (row) => neuronLink(row.neuron) },
      { title: "score", key: "score", value: (row) => row.score, number: true, about: `mean ${scoreName} of its highest neuron`, cell: (row) => barCell(row.score, most, 2, "bar") },
      { title: "specific", key: "specific", value: (row) => row.specific, number: true, about: "the highest neuron's score less what it gives other nouns", cell: (row) => barCell(row.specific, most, 2, "bar.specific") },
      { title: "its highest neuron writes", kind: "tokens", cell: (row) => [minus(row), tokens(row.tokens, row.name)] },
    ], { by: 1, to: (row) => toConcept(row.name) }, { words: textField("name contains", words) }),
  ];
}

function liveNeurons(words = "") {
  return [
    heading("Neurons", `All ${whole(INDEX.run.neurons)} neurons of the model. Search by name (L7.u89) or by a token that they write.`),
    liveList("neurons", "Neurons", [
      { title: "neuron", key: "neuron", value: (row) => row.neuron, cell: (row) => neuronLink(row.neuron) },
      { title: "concepts", key: "n_concepts", value: (row) => row.n_concepts, number: true, about: "concepts that have it among their highest", cell: (row) => whole(row.n_concepts) },
      { title: "open", key: "open", value: (row) => row.open, number: true, about: "fraction of all tokens at which its gate is open", cell: (row) => percent(row.open) },
      { title: "highest activation", key: "max", value: (row) => row.max, number: true, cell: (row) => figure(row.max, 2) },
      { title: "promotes", kind: "tokens", cell: (row) => tokens(row.tokens) },
    ], { by: 1, to: (row) => toNeuron(row.neuron) }, { words: textField("name or token", words), layer: textField("layer", "", { type: "number", min: 0, max: INDEX.run.layers - 1 }) }),
  ];
}

const pageAt = (path) => PAGES.find((page) => page.path === path);
pageAt("concepts").make = liveConcepts;
pageAt("neurons").make = liveNeurons;
pageAt("layers").data = async () => { INDEX.layers ||= await livePart("layers"); };
