// Routing from addresses to pages, search, keyboard and themes.
"use strict";
const main = document.getElementById("main"), search = document.getElementById("search"), options = document.getElementById("found");
addPage("failures", "Failures", failuresPage, INDEX.failures.count || INDEX.failures.quarantined.length);
const menu = PAGES.filter((page) => page.shown);
document.querySelector("nav").append(...menu.map(({ path, title }) => h("a", { href: `#/${path}`, "data-page": path }, title)));
document.querySelector("footer").append(
  h("span", `mmray ${INDEX.run.versions.mmray}`), h("span", INDEX.run.uri), h("span", h("kbd", "/"), " search"), h("span", h("kbd", "←"), " ", h("kbd", "→"), " previous, next"), h("span", h("kbd", "Esc"), " back to the list"), h("span", h("kbd", "t"), " theme"));

const missing = (what) => [heading("Not here", `This report has no page of ${what}.`)];
let turn = 0;

async function route() {
  const mine = ++turn;
  const [page = "", name = "", ...more] = location.hash.replace(/^#\//, "").split("/").map(decodeURIComponent);
  const known = PAGES.find(({ path }) => path === page);
  // What the index of a served run leaves out.
  if (known?.data) {
    await known.data();
    if (mine !== turn) return;
  }
  let content = known ? known.make(name, ...more) : missing(page);
  if (page === "concept" || page === "neuron") {
    const data = await SOURCE.part(`${page[0]}:${name}`);
    // Another address was opened while this page's data loaded.
    if (mine !== turn) return;
    content = data ? (page === "concept" ? concept(data) : neuron(data)) : missing(name);
  }
  forget();
  main.replaceChildren(...[content].flat(Infinity).filter((node) => node));
  const place = { concept: "concepts", neuron: "neurons" }[page] || page;
  document.querySelectorAll("nav a").forEach((link) => link.toggleAttribute("aria-current", link.dataset.page === place));
  document.querySelector("nav a[aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  document.title = `${name || (known && known.title) || "mmray"} · ${INDEX.run.name} · mmray`;
  close();
  window.scrollTo(0, 0);
}

// Results of a search: concepts that begin with the text, then those that contain it, then neurons by name or token.
function found(text) {
  const query = text.trim().toLowerCase();
  if (!query) return [];
  const named = INDEX.concepts.filter((row) => row.name.includes(query));
  named.sort((a, b) => (b.name === query) - (a.name === query) || b.name.startsWith(query) - a.name.startsWith(query) || b.n - a.n);
  const neurons = INDEX.neurons.filter((row) => row.neuron.toLowerCase().startsWith(query) || row.tokens.some((token) => token.toLowerCase() === query));
  return [
    ...named.slice(0, 8).map((row) => ({ to: toConcept(row.name), name: row.name, more: `${languageName(row.language)} ${whole(row.n)}×`, image: row.sample })),
    ...neurons.slice(0, 6).map((row) => ({ to: toNeuron(row.neuron), name: row.neuron, more: row.tokens.slice(0, 4).join(" ") })),
    ...(named.length > 8 ? [{ to: `#/concepts/${encodeURIComponent(query)}`, name: `all ${named.length} concepts with “${query}”`, more: "" }] : []),
  ];
}

let chosen = 0, asked = 0;
async function suggest() {
  const mine = ++asked, words = search.value, answer = SOURCE.search(words);
  const rows = answer instanceof Promise ? await answer : answer;
  // More has been typed meanwhile, or the search was left.
  if (mine !== asked || document.activeElement !== search) return;
  chosen = Math.max(0, Math.min(chosen, rows.length - 1));
  options.hidden = !search.value.trim();
  search.setAttribute("aria-expanded", String(!options.hidden));
  options.replaceChildren(...(rows.length ? rows.map((row, at) =>
    h("li", { role: "option", id: `found-${at}`, "aria-selected": String(at === chosen), "data-to": row.to, onmousedown: (event) => { event.preventDefault(); go(row.to); } },
      row.image && small(row.image, ""), h("span", row.name), h("small", row.more))) : [h("li", { role: "option" }, "nothing found")]));
  search.setAttribute("aria-activedescendant", rows.length ? `found-${chosen}` : "");
  options.children[chosen]?.scrollIntoView({ block: "nearest" });
}
function go(to) { close(); search.blur(); location.hash = to; }
function close() { search.value = ""; chosen = 0; options.hidden = true; search.setAttribute("aria-expanded", "false"); }
search.addEventListener("input", () => { chosen = 0; suggest(); });
search.addEventListener("blur", () => { options.hidden = true; });
search.addEventListener("focus", suggest);
search.addEventListener("keydown", (event) => {
  const moves = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in moves) { event.preventDefault(); chosen += moves[event.key]; suggest(); }
  if (event.key === "Enter" && options.children[chosen]?.dataset.to) go(options.children[chosen].dataset.to);
  if (event.key === "Escape") { close(); search.blur(); }
  event.stopPropagation();
});

const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function changeTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("mmray-theme", theme); } catch { /* a page opened from disk may have no storage */ }
  redraw();
}
document.getElementById("theme").addEventListener("click", changeTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  const follow = (selector) => document.querySelector(selector)?.click();
  if (event.key === "/") { event.preventDefault(); search.focus(); }
  if (event.key === "ArrowLeft") follow(".steps [rel=previous]");
  if (event.key === "ArrowRight") follow(".steps [rel=next]");
  if (event.key === "t") changeTheme();
  if (event.key === "Escape") location.hash = document.querySelector(".crumbs a")?.getAttribute("href") || "#/";
  if (event.key === "ArrowDown" || event.key === "ArrowUp") walk(event);
  if (event.key === "Enter" && event.target === document.activeElement) document.querySelector("tbody tr.at")?.click();
});

// The arrow keys move through the rows of the page's tables.
function walk(event) {
  const rows = [...document.querySelectorAll("tbody tr.link")];
  if (!rows.length) return;
  const at = rows.findIndex((row) => row.classList.contains("at")), next = at + (event.key === "ArrowDown" ? 1 : -1);
  if (next < 0) return;
  event.preventDefault();
  rows[at]?.classList.remove("at");
  const row = rows[Math.min(next, rows.length - 1)];
  row.classList.add("at");
  row.scrollIntoView({ block: "nearest" });
}

window.addEventListener("hashchange", () => { route(); main.focus({ preventScroll: true }); });
route();
