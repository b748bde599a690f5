// The playground: captions of an image before and after neurons are changed; and heat maps of any neurons on demand.
"use strict";
const mapped = new Map();
// The heat map of neurons over a sample, asked for once.
SOURCE.map = (sample, neurons, signs = null) => {
  const key = JSON.stringify([sample, neurons, signs]);
  if (!mapped.has(key)) mapped.set(key, ask("map", { sample, neurons, signs }));
  return mapped.get(key);
};

const toPlayground = (sample = "", neurons = "") => `#/playground/${encodeURIComponent(sample)}/${encodeURIComponent(neurons)}`;

function wordsOf(side, other) {
  const hue = (row) => `color-mix(in srgb, var(--accent-wash) ${Math.round(100 * row[side])}%, transparent)`;
  const list = (rows) => rows.filter(([, chance], at) => !at || chance >= 0.0005).map(([text, chance]) => `${text} ${percent(chance, 1)}`).join(", ");
  return (row) => h("tr", h("td.token", { style: `background:${hue(row)}` }, row.text), h("td.number", percent(row.before, 1)), h("td.number", percent(row.after, 1)),
    h("td.text", { title: `${other}: ${list(row[`likeliest_${other}`])}` }, list(row[`likeliest_${side}`].slice(0, 3))));
}

function answerCard(title, side, other, page) {
  return card(h("h3", title), h("p.said", page.caption || "(nothing)"),
    h("div.scroll", h("table", { "aria-label": `Tokens of the caption ${side}` }, h("thead", h("tr", h("th", "token"), h("th.number", "P before"), h("th.number", "P after"), h("th", `likeliest ${side}`))), h("tbody", page.tokens.map(wordsOf(side, other))))));
}

function playground(sample = "", neurons = "") {
  const state = { sample, image: null }, shown = h("div"), answer = h("div.grid.two", { "aria-live": "polite" }), choices = h("div.grid.samples.small");
  const names = h("input", { type: "text", value: neurons, placeholder: "L7.u89 L7.u102", spellcheck: "false", autocomplete: "off" });
  const factor = h("input", { type: "number", value: "0", step: "0.5" });
  const edit = h("select", h("option", { value: "" }, "scale the neurons"), INDEX.model.edits.map((name) => h("option", { value: name }, `edit ${name}`)));
  const prompt = h("input", { type: "text", value: INDEX.run.prompt || "", placeholder: "the default prompt", autocomplete: "off" });
  const concept = h("input", { type: "search", placeholder: "concept, such as " + (INDEX.concepts[0]?.name ?? ""), autocomplete: "off" });
  const file = h("input", { type: "file", accept: "image/*", "aria-label": "Your image" });
  const button = h("button.act", { type: "button", onclick: run }, "Compare captions"), heat = h("button.act", { type: "button", onclick: draw }, "Heat map");

  function show(map = null) {
    const source = state.image ? h("span.picture", h("img", { src: `data:;base64,${state.image}`, alt: "your image" })) : state.sample ? picture({ id: state.sample }, map) : h("p.note", "Choose an image.");
    choices.querySelectorAll(".pick").forEach((one) => one.setAttribute("aria-pressed", String(!state.image && one.dataset.id === state.sample)));
    shown.replaceChildren(source, ...(map ? [h("p.range", `mean activation ${figure(map.low, 2)} to ${figure(map.high, 2)}`)] : []));
  }
  const given = () => (state.image ? { image: state.image } : { sample: state.sample });
  async function busy(work) {
    if (!state.sample && !state.image) return answer.replaceChildren(h("p.bad", "Choose an image first."));
    button.disabled = heat.disabled = true;
    try { await work(); } catch (error) { answer.replaceChildren(h("p.bad", error.message)); }
    button.disabled = heat.disabled = false;
  }
  function run() {
    return busy(async () => {
      answer.replaceChildren(h("p.note", "the model is writing …"));
      const change = edit.value ? { edit: edit.value } : { neurons: names.value, factor: Number(factor.value) };
      const found = await ask("compare", { ...given(), prompt: prompt.value || null, ...change });
      answer.replaceChildren(answerCard("Unchanged", "before", "after", found.before), answerCard("Changed", "after", "before", found.after));
    });
  }
  function draw() {
    return busy(async () => {
      const map = await ask("map", { ...given(), neurons: names.value });
      show(map);
    });
  }
  async function pick(name) {
    const page = await livePart(`c:${name.trim().toLowerCase()}`);
    choices.replaceChildren(...(page ? page.samples.map(({ id }) => h("button.pick", { type: "button", "data-id": id, "aria-label": DATA.captions[id], onclick: () => { Object.assign(state, { sample: id, image: null }); show(); } }, picture({ id }))) : [h("p.note", "No such concept.")]));
    if (page && !names.value) names.value = page.neurons.slice(0, 10).map((row) => row.neuron).join(" ");
    if (page && !state.sample) state.sample = page.samples[0]?.id ?? "";
    show();
  }
  concept.addEventListener("change", () => concept.value.trim() && pick(concept.value));
  file.addEventListener("change", () => {
    const reader = new FileReader();
    reader.onload = () => { state.image = reader.result.split(",")[1]; show(); };
    if (file.files[0]) reader.readAsDataURL(file.files[0]);
  });
  edit.addEventListener("change", () => { names.disabled = factor.disabled = Boolean(edit.value); });
  show();
  if (!sample && INDEX.concepts.length) pick(INDEX.concepts[0].name);
  const label = (title, node) => h("label", title, node);
  return [
    heading("Playground", `What ${INDEX.model.name} writes about an image, before and after some of its neurons are changed.`),
    INDEX.model.same ? null : h("p.note", "This is not the model that the run analysed: its neurons may have other meanings."),
    h("div.grid.bench", card(h("h3", "Image"), h("div.fields", label("of a concept", concept), label("or your own", file)), choices, shown),
      card(h("h3", "Change"), h("div.fields", label("what", edit), label("neurons", names), label("factor: 0 zeroes them", factor), label("prompt", prompt)), button, " ", heat)),
    answer,
  ];
}
addPage("playground", "Playground", playground);
