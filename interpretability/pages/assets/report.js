const data = JSON.parse($("data").textContent);
const L = data.latents, about = data.about, size = L.title.length, ROWS = 25;
const failed = new Set(data.failed), hidden = new Set(data.hidden);
const dead = i => L.density[i] === 0;
const plain = name => name.replaceAll("_", " ");
const address = i => `#latent=${i}`;

// Files beside the page: scripts, since a page from a disk may not fetch. In a page that holds everything they lie in it as JSON.
const files = new Map(), waiting = new Map();
function load(name) {
  if (!files.has(name)) files.set(name, new Promise((resolve, reject) => {
    const inside = document.querySelector(`script[data-file="${name}"]`);
    if (inside) return resolve(JSON.parse(inside.textContent));
    waiting.set(name, resolve);
    const script = h("script", {onerror: () => { files.delete(name); script.remove(); reject(new Error(name)); }});
    script.src = `${name}.js`;
    document.head.append(script);
  }));
  return files.get(name);
}
function loaded(name, value) { waiting.get(name)(value); }
const number = (folder, index) => `${folder}/${String(index).padStart(5, "0")}`;
async function detailOf(i) {
  const block = await load(number("features", Math.floor(i / data.block)));
  return {...block.features[i % data.block], pool: block.pool};
}

// Features ---------------------------------------------------------------------------------------------------------------------
function label(i) {
  if (L.title[i]) return L.title[i];
  return h("span", {class: "none"}, dead(i) ? "never fired" : hidden.has(i) ? "no sentence shown" : failed.has(i) ? "explanation failed" : "not explained");
}
function score(i) {
  if (L.score[i] === null) return h("span", {class: "soft"}, "–");
  return [h("span", {class: "meter", style: {"--v": Math.max(0, 2 * L.score[i] - 1)}}), h("span", {class: "num"}, L.score[i].toFixed(2))];
}
function bestCard(i, examples) {
  return h("article", {class: "card", onclick: () => { location.hash = address(i); }},
    h("header", null, h("h3", null, h("a", {href: address(i)}, label(i))), h("span", {class: "num soft"}, String(i))),
    examples.map(example => sentence(data.best.pool, example, L.max[i], 14)),
    h("footer", null, h("span", null, L.score[i] === null ? "no score" : `score ${L.score[i].toFixed(2)}`), h("span", null, `${percent(L.density[i])} of tokens`)));
}

// The list ---------------------------------------------------------------------------------------------------------------------
const rank = new Int32Array(size);
data.order.forEach((latent, place) => { rank[latent] = place; });
const collator = new Intl.Collator("en");
const columns = [
  {name: "No.", class: "n", value: i => i, ascending: true},
  {name: "Label", class: "", value: i => rank[i], ascending: true, text: true},
  {name: "Score", class: "r", value: i => L.score[i] ?? -1},
  {name: "Density", class: "r d", value: i => L.density[i]},
  {name: "Maximum", class: "r d", value: i => L.max[i]},
];
const view = {column: null, ascending: true, page: 0, found: data.order, reading: false};
const titles = L.title.map(title => title.toLowerCase()), words = titles.slice();
// Explanations and promoted tokens come after the labels, once somebody searches: for 65,536 features they are 16 MB.
async function readWords() {
  if (view.reading) return;
  view.reading = true;
  for (let first = 0; first < size; first += data.words_block) {
    const texts = await load(number("words", first / data.words_block)).catch(() => []);
    texts.forEach((text, j) => { words[first + j] += ` ${text}`; });
    if ($("query").value.trim()) search(view.page);
  }
}
function search(page = 0) {
  const query = $("query").value.trim().toLowerCase(), wanted = query.split(/\s+/).filter(Boolean), kind = $("filter").value;
  const digits = /^#?\d+$/.test(query) ? query.replace("#", "") : null;
  const kept = {all: () => true, valid: i => L.title[i] !== "", unexplained: i => L.title[i] === "" && !dead(i), dead}[kind];
  view.found = data.order.filter(i => kept(i) && ((digits !== null && String(i).startsWith(digits)) || wanted.every(word => words[i].includes(word))));
  if (view.column) {
    const {value, text} = view.column, sign = view.ascending ? 1 : -1;
    const order = text ? (a, b) => (L.title[a] === "") - (L.title[b] === "") || sign * collator.compare(L.title[a], L.title[b]) : (a, b) => sign * (value(a) - value(b));
    view.found.sort((a, b) => order(a, b) || rank[a] - rank[b]);
  }
  else if (wanted.length) {
    // The latent of that number, then labels that hold all words, then the rest.
    const group = i => String(i) === digits ? 0 : wanted.every(word => titles[i].includes(word)) ? 1 : 2, groups = new Map(view.found.map(i => [i, group(i)]));
    view.found.sort((a, b) => groups.get(a) - groups.get(b));
  }
  view.page = Math.min(page, Math.max(0, Math.ceil(view.found.length / ROWS) - 1));
  showRows();
}
function showRows() {
  const first = view.page * ROWS, shown = view.found.slice(first, first + ROWS);
  $("rows").replaceChildren(...shown.map(i => h("tr", {onclick: event => { if (!event.target.closest("a")) location.hash = address(i); }},
    h("td", {class: "n num"}, String(i)), h("td", {class: "label"}, h("a", {href: address(i)}, label(i))), h("td", {class: "r"}, score(i)),
    h("td", {class: "r d num"}, dead(i) ? "–" : percent(L.density[i])), h("td", {class: "r d num"}, dead(i) ? "–" : digits(L.max[i])))));
  if (!shown.length) $("rows").replaceChildren(h("tr", {style: {cursor: "default"}}, h("td", {class: "empty", colspan: "5"}, "No feature matches.")));
  $("count").textContent = shown.length ? `${whole(first + 1)}–${whole(first + shown.length)} of ${whole(view.found.length)}` : "";
  $("back").disabled = view.page === 0;
  $("on").disabled = first + ROWS >= view.found.length;
}
function showColumns() {
  $("columns").replaceChildren(...columns.map(column => h("th", {class: column.class, scope: "col", "aria-sort": view.column === column && (view.ascending ? "ascending" : "descending")},
    h("button", {type: "button", onclick: () => {
      view.ascending = view.column === column ? !view.ascending : Boolean(column.ascending);
      view.column = column;
      showColumns();
      search();
      $("columns").children[columns.indexOf(column)].firstChild.focus();
    }}, column.name))));
}
// The row with the focus is the chosen one, so that Enter opens it without a line of code. `place` counts through all pages.
function choose(place) {
  if (place < 0 || place >= view.found.length) return;
  if (Math.floor(place / ROWS) !== view.page) { view.page = Math.floor(place / ROWS); showRows(); }
  const link = $("rows").children[place % ROWS].querySelector("a");
  link.focus({preventScroll: true});
  link.closest("tr").scrollIntoView({block: "nearest", behavior: "instant"});
}
function chosen() {
  const row = document.activeElement.closest("#rows tr");
  return row ? view.page * ROWS + [...$("rows").children].indexOf(row) : -1;
}

// One feature ------------------------------------------------------------------------------------------------------------------
const tokenList = (title, text) => text === "" ? null : h("div", null, h("p", {class: "kind"}, title), h("ul", {class: "tokens"}, split(text).map(token => h("li", null, visible(token).replace(/^ /, "·")))));
const edge = bin => digits(2 ** (bin + about.first_exponent), 2);
function histogram(feature) {
  const [first, ...counts] = feature.histogram;
  const bars = counts.map((count, j) => ({value: count, tip: `${edge(first + j)} to ${edge(first + j + 1)}: ${whole(count)} tokens`}));
  return barChart({bars, edges: counts.length + 1, edge: j => edge(first + j), caption: "Activations", unit: "tokens, by activation"});
}
function facts(i, feature) {
  const rows = [["Score", L.score[i] === null ? null : L.score[i].toFixed(2)], ["Certainty", feature.certainty === null ? null : feature.certainty.toFixed(2)],
    ["Fires on", `${percent(L.density[i])} of tokens`], ["Tokens", whole(feature.firing)], ["Sentences", whole(feature.sentences)],
    ["Maximum", digits(L.max[i])], ["Mean", digits(feature.mean)], ["Explained by", plain(feature.method) || null],
    ...(feature.steers ? [["Output score", digits(feature.steers.output_score)], ["Change of confidence", `${digits(feature.steers.confidence_change)} nats`]] : [])];
  return h("dl", {class: "facts"}, rows.filter(row => row[1] !== null).map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
}
function examples(feature, i, rows) {
  return h("ul", {class: "examples"}, rows.map(example => {
    const place = [feature.pool.label[example[0]], feature.pool.document[example[0]]].filter(Boolean).join(" · ");
    return h("li", null, sentence(feature.pool, example, L.max[i], 0), place && h("small", null, place));
  }));
}
const AGGREGATIONS = {max: "one token", mean: "on average", last: "last token"};
function largest(feature, i) {
  const names = Object.keys(feature.top).filter(name => feature.top[name].length), shown = h("div", null);
  if (!names.length) return null;
  const buttons = names.map(name => h("button", {type: "button", onclick: () => show(name)}, AGGREGATIONS[name] || name));
  function show(name) {
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(names[j] === name)));
    shown.replaceChildren(examples(feature, i, feature.top[name]));
  }
  show(names[0]);
  return h("div", null, h("h3", null, "Where it is largest", h("small", null, "by sentence")), names.length > 1 && h("div", {class: "switch", role: "group", "aria-label": "Ranked by"}, buttons), shown);
}
function levels(feature, i) {
  if (!feature.levels.length) return null;
  const [first, ...counts] = feature.histogram;
  return h("div", null, h("h3", null, "At each level", h("small", null, "drawn at random from each range of its activation")),
    h("div", {class: "levels"}, feature.levels.map(([bin, rows]) => h("section", {class: "level", style: {padding: "12px 0 0"}},
      h("header", null, `${edge(bin)} – ${edge(bin + 1)}`, h("small", null, `${whole(counts[bin - first] || 0)} tokens`)), examples(feature, i, rows)))));
}
function linked(title, note, rows, text) {
  if (!rows || !rows.length) return null;
  return h("div", null, h("h3", null, title, h("small", null, note)), h("ul", {class: "near"}, rows.map(([latent, value]) =>
    h("li", null, h("span", {class: "num"}, String(latent)), h("a", {href: address(latent)}, label(latent)), h("span", {class: "num"}, text(value))))));
}
function drawFeature(i, feature) {
  const effects = [tokenList("Promotes", feature.promoted), tokenList("Suppresses", feature.suppressed)].filter(Boolean);
  const parts = [h("h2", {id: "dialog-title"}, label(i)), feature.explanation && h("p", {class: "said"}, feature.explanation),
    feature.more.length > 0 && h("dl", {class: "more"}, feature.more.map(([name, text]) => [h("dt", null, plain(name)), h("dd", null, text)])), facts(i, feature),
    dead(i) ? h("p", {class: "soft"}, "It fires on no token of this corpus.") :
      hidden.has(i) ? h("p", {class: "soft"}, "It fires in none of the sentences that are shown here; its numbers come from other text.") : null,
    h("div", {class: "halves"}, !dead(i) && h("div", null, largest(feature, i), levels(feature, i)),
      h("div", null, !dead(i) && histogram(feature), !dead(i) && densityChart("Density", L.density[i]),
        effects.length > 0 && h("div", null, h("h3", null, "What it does to the next token"), effects),
        feature.ngrams.length > 0 && h("div", null, h("h3", null, "Its top sentences stand out by"), h("ul", {class: "tokens words"}, feature.ngrams.map(([text, count]) => h("li", null, text, " ", h("small", null, `×${count}`))))),
        linked("Nearest directions", "cosine of decoder rows", feature.near, value => (value / 1000).toFixed(2)),
        linked("Fires on the same tokens", "Jaccard index, sampled", feature.cofiring, value => (value / 1000).toFixed(2))))];
  $("dialog-body").replaceChildren(...parts.filter(Boolean));
  $("dialog-body").scrollTop = 0;
}
let current = -1;
async function showFeature(i) {
  current = i;
  $("dialog-number").textContent = `Feature ${i}`;
  const place = view.found.indexOf(i);
  step($("earlier"), view.found[place - 1]);
  step($("later"), place < 0 ? undefined : view.found[place + 1]);
  if (!$("dialog").open) { $("dialog-body").replaceChildren(h("h2", {id: "dialog-title"}, label(i))); $("dialog").showModal(); }
  const feature = await detailOf(i).catch(error => error.message);
  if (current !== i) return; // another was asked for meanwhile
  if (typeof feature !== "string") return drawFeature(i, feature);
  $("dialog-body").replaceChildren(h("h2", {id: "dialog-title"}, label(i)), h("p", {class: "said soft"},
    `${feature}.js is missing beside this page: keep the whole folder together, or write the report with --one-file.`));
}
function step(button, latent) {
  button.disabled = latent === undefined;
  button.onclick = () => location.replace(address(latent));
}
function follow() {
  const found = /^#latent=(\d+)$/.exec(location.hash), i = found ? Number(found[1]) : -1;
  hideTip();
  if (i >= 0 && i < size) showFeature(i);
  else if ($("dialog").open) $("dialog").close();
}

// The page ---------------------------------------------------------------------------------------------------------------------
function build() {
  const explained = L.title.filter(Boolean).length, E = data.evaluation, curves = data.curves;
  $("site").textContent = [about.model, about.site].filter(Boolean).join(" · ");
  $("headline").textContent = `${whole(about.fired)} features and where they fire`;
  $("lead").textContent = `A sparse autoencoder of ${whole(size)} latents${about.k ? `, ${about.k} active a token` : ""}, run over ${whole(about.tokens)} tokens in ${whole(about.sentences)} sentences.`
    + (about.methods.length ? ` Explained by ${about.methods.map(plain).join(", ")}.` : "");
  const scores = L.score.filter((value, i) => value !== null && L.title[i]).sort((a, b) => a - b), validated = curves && curves.val_fvu[curves.val_fvu.length - 1];
  const fvu = E ? E.values.fvu : validated ? validated[1] : null;
  const figures = [["latents that fire", percent(about.fired / size, 3)], ["latents explained", percent(explained / size, 3)], ["median score", scores.length ? scores[scores.length >> 1].toFixed(2) : null],
    ["variance unexplained", fvu == null ? null : percent(fvu, 3)], ["latents a token", E && E.values.l0 != null ? digits(E.values.l0) : null],
    ["cross-entropy recovered", E && E.values.ce_recovered != null ? percent(E.values.ce_recovered, 3) : null]];
  $("figures").append(...figures.filter(row => row[1] !== null).map(([name, value]) => h("div", null, h("dd", null, value), h("dt", null, name))));
  $("cards").append(...data.best.latents.map((i, j) => bestCard(i, data.best.examples[j])));
  const measures = [E && E.fvu.length > 0 && rowChart({caption: "Variance unexplained", unit: "less is better", rows: E.fvu}),
    data.densities.counts.length > 0 && densityChart("How often features fire", 0),
    E && E.figures.length > 0 && fill(figure("Evaluation", E.conditions, h("table", {class: "numbers"}, h("tbody", null, E.figures.map(([name, value, share, definition]) =>
      h("tr", null, h("td", null, name, h("small", null, definition)), h("td", {class: "num"}, share ? percent(value, 3) : digits(value))))))), {class: "tall"}, [])];
  $("measures").append(...measures.filter(Boolean));
  const lines = curves ? [["Loss", "mean squared error", curves.loss, []], ["FVU", "share of variance unexplained", curves.fvu, curves.val_fvu], ["Dead latents", "share of all", curves.dead_fraction, [], true]] : [];
  $("curves").append(...lines.filter(line => line[2].length > 1).map(([caption, unit, points, marks, share]) => lineChart({caption, unit, points, marks, share})));
  $("validated").textContent = curves && curves.val_fvu.length ? "Over tokens seen. Circles: measured on rows held out from training." : "Over tokens seen.";
  const sections = [["best", "Best", data.best.latents.length], ["all", "All features", size], ["quality", "Quality", $("measures").children.length], ["training", "Training", $("curves").children.length]];
  for (const [id, name, there] of sections) if (there) $("nav").append(h("a", {href: `#${id}`}, name)); else $(id).remove();
  if (about.map) $("nav").append(h("a", {href: "map.html"}, "Map"));
  const theme = h("button", {type: "button", "aria-label": "Light or dark"});
  $("nav").append(theme);
  setUpTheme(theme);
  $("hashes").append(h("p", null, "Made by interpretability.report. Activations are in the SAE's own units; scores are balanced accuracy on sentences that the explainer did not see, 0.5 at chance."),
    h("p", {class: "num"}, Object.entries(about.hashes).map(([name, value]) => `${name.replace("_hash", "")} ${String(value).slice(0, 16)}`).join("  ·  ")));
  showColumns();
  showRows();
}
build();
$("query").addEventListener("input", () => { readWords(); search(); });
$("query").addEventListener("focus", readWords);
$("filter").addEventListener("change", () => search());
$("back").addEventListener("click", () => { view.page--; showRows(); });
$("on").addEventListener("click", () => { view.page++; showRows(); });
$("close").addEventListener("click", () => $("dialog").close());
$("dialog").addEventListener("click", event => { if (event.target === $("dialog")) $("dialog").close(); });
$("dialog").addEventListener("close", () => {
  hideTip();
  if (/^#latent=/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search);
  const place = view.found.indexOf(current);
  current = -1;
  if (chosen() >= 0) choose(place);
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key, open = $("dialog").open;
  if (open) {
    const button = ["ArrowLeft", "k"].includes(key) ? $("earlier") : ["ArrowRight", "j"].includes(key) ? $("later") : null;
    if (button && !button.disabled) button.click();
    return;
  }
  if (event.target === $("query") && (key === "Enter" || key === "ArrowDown")) choose(view.page * ROWS);
  else if (event.target === $("query") && key === "Escape") $("query").blur();
  else if (event.target.closest("input, select")) return;
  else if (key === "/") { $("query").focus({preventScroll: true}); $("all").scrollIntoView({behavior: "instant"}); }
  else if (key === "j" || (key === "ArrowDown" && chosen() >= 0)) choose(chosen() < 0 ? view.page * ROWS : chosen() + 1);
  else if (key === "k" || (key === "ArrowUp" && chosen() >= 0)) choose(chosen() < 0 ? view.page * ROWS : chosen() - 1);
  else return;
  event.preventDefault();
});
setUpTips();
addEventListener("hashchange", follow);
follow();
