// Shared by all pages: the data, HTML elements, number formats and addresses.
"use strict";
// In a report of many files, data/index.js has set DATA; in one file it is embedded as JSON.
if (typeof DATA === "undefined") var DATA = JSON.parse(document.getElementById("data").textContent);
const INDEX = DATA.index;
const CONCEPTS = new Map(INDEX.concepts.map((row) => [row.name, row]));
const NEURONS = new Map(INDEX.neurons.map((row) => [row.neuron, row]));
// Shown where a column has this title.
const DEFINITIONS = new Map(INDEX.definitions.map(({ name, text }) => [name, text]));
const waiting = new Map();
const PAGES = [];
// Where pages get their data. `mmray serve` replaces these functions by requests to its server.
const SOURCE = {
  live: false,
  part: (key) => DATA.parts[key] || (DATA.files && DATA.files[key] ? loaded(key) : null),
  image: (id) => DATA.images[id],
  search: (text) => found(text),
};

// Registers a page: its address, its title, the function that makes it, and whether the menu shows it.
function addPage(path, title, make, shown = true) {
  PAGES.push({ path, title, make, shown });
}

// The data of one concept or neuron from its file, which is loaded once.
function loaded(key) {
  return new Promise((resolve) => {
    waiting.set(key, resolve);
    const script = document.createElement("script");
    script.src = DATA.files[key];
    script.onerror = () => resolve(null);
    document.head.append(script);
  });
}

// Called by the data files.
function receive(key, value, captions) {
  DATA.parts[key] = value;
  Object.assign(DATA.captions, captions);
  waiting.get(key)?.(value);
}

// Makes an element: h("td.number", {title: "…"}, "text", child, …). Text is never parsed, so captions can't add markup.
function h(selector, ...rest) {
  const [tag, ...classes] = selector.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const item of rest.flat(Infinity)) {
    if (item === null || item === undefined || item === false) continue;
    if (item instanceof Node || typeof item === "string" || typeof item === "number") node.append(item);
    else
      for (const [name, value] of Object.entries(item)) {
        if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
        else if (value === true) node.setAttribute(name, "");
        else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
      }
  }
  return node;
}

const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (value, digits = 0) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}\u00a0%`);
const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;
function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return whole(value);
  const text = value.toFixed(size >= 100 ? Math.min(1, digits) : size >= 10 ? Math.min(2, digits) : digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}
const interval = (row, digits = 3) =>
  row.low === null || row.low === undefined ? "" : `${figure(row.low, digits)} to ${figure(row.high, digits)}`;

const scoreName = INDEX.run.score + (INDEX.run.unit && ` in ${INDEX.run.unit}`);
const toConcept = (name) => `#/concept/${encodeURIComponent(name)}`;
const toNeuron = (name) => `#/neuron/${name}`;
const conceptLink = (name) => (SOURCE.live || CONCEPTS.has(name) ? h("a", { href: toConcept(name) }, name) : h("span", name));
const neuronLink = (name) => (SOURCE.live || NEURONS.has(name) ? h("a.mono", { href: toNeuron(name) }, name) : h("span.mono", name));

// Marks a neuron whose activation is negative for this concept.
const minus = (row) => row.negative && h("span", { title: "Its activation is negative here: it writes what its row of W_out suppresses." }, "− ");
const begins = (concept, token) => token.length > 1 && concept.startsWith(token.toLowerCase());
function tokens(words, concept = "", limit = 10) {
  const own = (word) => concept && (word === concept || begins(concept, word));
  return words.slice(0, limit).map((word) => h(own(word) ? "span.own" : "span", word));
}

// A text in which `commands` stand out.
const coded = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", part) : part));

function heading(title, lead, ...more) {
  return [h("h1", title), lead && h("p.lead", coded(lead)), ...more];
}

const card = (...content) => h("section.card", ...content);
const under = (...text) => h("p.under", ...text);
const LANGUAGES = { en: "English", es: "Spanish", fr: "French", zh: "Chinese", de: "German", ja: "Japanese", it: "Italian", pt: "Portuguese" };
const languageName = (code) => LANGUAGES[code] || code || "";
