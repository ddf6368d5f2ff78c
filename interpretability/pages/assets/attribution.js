const data = JSON.parse($("data").textContent), {tokens, saes, features, grid, objective} = data;
const quoted = text => `“${visible(text)}”`, three = {minimumSignificantDigits: 3, maximumSignificantDigits: 3};
const signed = value => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toLocaleString("en", three);
const sum = values => values.reduce((a, b) => a + b, 0), peak = values => Math.max(...values.map(Math.abs), 1e-12);
const colour = value => value < 0 ? "var(--cool)" : "var(--heat)";
const where = data.ablated === "position" ? "at its position" : "at every position of the prompt";
const name = row => row.title || h("span", {class: "none"}, "not explained");
const placeIn = row => grid.findIndex(line => line.sae === row.sae && line.latent === row.latent);

// The prompt -------------------------------------------------------------------------------------------------------------------
const view = {token: -1, shading: 0, open: -1, sort: null};
const shadings = [["All features", j => sum(saes.map(sae => sae.features[j]))],
  ...(saes.length > 1 ? saes.map(sae => [sae.site, j => sae.features[j]]) : []), ["What the SAE does not explain", j => sum(saes.map(sae => sae.error[j]))]];
function showTokens() {
  const values = tokens.map((_, j) => shadings[view.shading][1](j)), most = peak(values);
  $("tokens").replaceChildren(...tokens.map((token, j) => {
    const used = saes.some(sae => sae.used[j]), tip = used ? `${signed(values[j])} ${objective.unit} · token ${j}` : `token ${j} is not attributed: the SAE was not trained on it`;
    return h("button", {type: "button", class: used ? null : "unused", "data-tip": tip, "aria-pressed": String(view.token === j), onclick: () => filter(view.token === j ? -1 : j),
      style: {"--c": colour(values[j]), "--a": (.66 * Math.abs(values[j]) / most).toFixed(3)}}, token.replace(/\n/g, "↵\n"));
  }));
  [...$("shading").children].forEach((button, j) => button.setAttribute("aria-pressed", String(j === view.shading)));
}
function filter(j) {
  view.token = j;
  showTokens();
  showRows();
  $("filtered").replaceChildren(...(j < 0 ? [] : [h("span", null, `Features at token ${j}, ${quoted(tokens[j])}`), h("button", {type: "button", onclick: () => filter(-1)}, "Show all")]));
}
function showNext() {
  const most = data.next[0].probability, is = token => token === objective.answer || token === objective.baseline;
  $("next").append(h("h3", null, "Next token"), h("table", {class: "next"}, h("tbody", null, data.next.map(({token, probability, rank}) => h("tr", {class: is(token) ? "asked" : null, "data-tip": `rank ${whole(rank)}`},
    h("td", null, visible(token).replace(/^ /, "·")), h("td", null, h("span", {class: "line", style: {width: `${100 * probability / most}%`}})), h("td", {class: "num"}, percent(probability, 2)))))));
}

// The features -----------------------------------------------------------------------------------------------------------------
const most = Math.max(peak(features.map(row => row.attribution)), peak(features.map(row => row.effect)));
function bar(value) {
  const width = 50 * Math.abs(value) / most;
  return h("div", {class: "signed"}, h("i", {style: {"--c": colour(value), "--w": `${width}%`, "--l": `${value < 0 ? 50 - width : 50}%`}}), h("span", {class: "num"}, signed(value)));
}
const strongestAt = row => row.activations.indexOf(Math.max(...row.activations));
const columns = [{name: "Feature", class: "what"}, {name: "Token", class: "token", value: row => row.positions[strongestAt(row)], ascending: true},
  {name: "Activation", class: "r activation", value: row => Math.max(...row.activations)}, {name: "Attribution", class: "bars", value: row => Math.abs(row.attribution)},
  {name: "Ablation", class: "bars", value: row => Math.abs(row.effect)}];
function showColumns() {
  $("columns").replaceChildren(...columns.map(column => h("th", {class: column.class, scope: "col", "aria-sort": view.sort === column && (column.ascending ? "ascending" : "descending")},
    h("button", {type: "button", onclick: () => { view.sort = view.sort === column || !column.value ? null : column; showColumns(); showRows(); }}, column.name))));
}
function showRows() {
  const span = [...$("columns").children].filter(column => column.offsetWidth).length; // a phone has fewer columns
  const shown = features.map((row, i) => [row, i]).filter(([row]) => view.token < 0 || row.positions.includes(view.token));
  if (view.sort) shown.sort(([a], [b]) => (view.sort.ascending ? 1 : -1) * (view.sort.value(a) - view.sort.value(b)));
  const lines = shown.flatMap(([row, i]) => {
    const at = strongestAt(row), toggle = () => { view.open = view.open === i ? -1 : i; showRows(); };
    const line = h("tr", {class: view.open === i ? "open" : null, onclick: event => { if (!event.target.closest("button")) toggle(); }},
      h("td", {class: "what"}, h("b", null, name(row)), h("small", null, `${saes.length > 1 ? row.site + " · " : ""}#${row.latent}`, h("span", {class: "narrow"}, ` · ${quoted(row.tokens[at].trim())}`))),
      h("td", {class: "token"}, h("span", null, visible(row.tokens[at])), h("small", {class: "soft"}, row.positions.length > 1 ? ` and ${row.positions.length - 1} more` : ` ${row.positions[at]}`)),
      h("td", {class: "r num activation"}, digits(row.activations[at])), h("td", {class: "bars"}, bar(row.attribution)), h("td", {class: "bars"}, bar(row.effect)));
    line.setAttribute("tabindex", "0");
    line.setAttribute("aria-expanded", String(view.open === i));
    line.addEventListener("keydown", event => { if (event.key === "Enter" && event.target === line) { toggle(); $("rows").querySelector("tr.open")?.focus(); } });
    return view.open === i ? [line, h("tr", {class: "card-row"}, h("td", {colspan: span}, evidence(placeIn(row))))] : [line];
  });
  $("rows").replaceChildren(...(lines.length ? lines : [h("tr", null, h("td", {class: "empty", colspan: span}, "None of the strongest features is at this token."))]));
}
const tokenList = (title, text) => text ? [h("p", {class: "kind"}, title), h("ul", {class: "tokens"}, split(text).map(token => h("li", null, visible(token).replace(/^ /, "·"))))] : [];
function evidence(i) {
  const card = data.cards[i];
  if (!card.explanation && !card.examples) return h("p", {class: "soft"}, "Nothing more is known of it here: give --top and --explanations.");
  return h("div", {class: "evidence"}, h("div", null, card.explanation && h("p", {class: "said"}, card.explanation),
    card.examples && h("ul", {class: "examples"}, card.examples.map(example => h("li", null, sentence(data.pool, example, card.max, 24))))),
    h("div", null, card.density !== undefined && h("p", {class: "kind"}, `fires on ${percent(card.density)} of tokens, up to ${digits(card.max)}`), tokenList("Promotes", card.promoted), tokenList("Suppresses", card.suppressed)));
}

// Where they act ---------------------------------------------------------------------------------------------------------------
function showHeat() {
  const strongest = peak(grid.flatMap(row => row.attributions)), used = tokens.map((_, j) => j).filter(j => saes.some(sae => sae.used[j]));
  const head = h("tr", null, h("th", {scope: "col"}), used.map(j => h("th", {scope: "col"}, h("span", null, visible(tokens[j])))));
  const rows = grid.map(row => h("tr", null, h("th", {scope: "row", title: row.title}, row.title || `latent ${row.latent}`, " ", h("span", {class: "num soft"}, `#${row.latent}`)), used.map(j => {
    const at = row.positions.indexOf(j), value = at < 0 ? 0 : row.attributions[at];
    return h("td", at < 0 ? null : {style: {"--c": colour(value), "--a": (.08 + .8 * Math.abs(value) / strongest).toFixed(3)},
      "data-tip": `${quoted(tokens[j])} · attribution ${signed(value)} · activation ${digits(row.activations[at])}`});
  })));
  $("heat").append(h("table", null, h("thead", null, head), h("tbody", null, rows)));
}

// Attribution against ablation -------------------------------------------------------------------------------------------------
function scatter() {
  const all = features.flatMap(row => [row.attribution, row.effect]), low = Math.min(0, ...all), high = Math.max(0, ...all), pad = (high - low || 1) * .06, S = 320, M = 44;
  const range = [low - pad, high + pad], to = v => (v - range[0]) / (range[1] - range[0]), x = v => M + (S - M - 8) * to(v), y = v => S - M + 8 - (S - M) * to(v), ticks = niceTicks(...range, 4);
  return figure("Each feature that was set to 0", `ablation above attribution, ${objective.unit}`, s("svg", {viewBox: `0 0 ${S} ${S}`, role: "img", "aria-label": "Attribution and ablation of each feature"},
    ticks.map(t => [s("line", {class: "grid", x1: x(t), x2: x(t), y1: y(range[0]), y2: y(range[1])}), s("line", {class: "grid", x1: x(range[0]), x2: x(range[1]), y1: y(t), y2: y(t)}),
      s("text", {x: M - 6, y: y(t) + 4, "text-anchor": "end"}, digits(t + 0, 2)), s("text", {x: x(t), y: y(range[0]) + 16, "text-anchor": "middle"}, digits(t + 0, 2))]),
    s("line", {class: "diagonal", x1: x(range[0]), y1: y(range[0]), x2: x(range[1]), y2: y(range[1])}),
    features.map(row => s("circle", {class: row.attribution < 0 ? "dot against" : "dot", cx: x(row.attribution), cy: y(row.effect), r: 4,
      "data-tip": `${row.title || "latent"} #${row.latent} at ${quoted(row.tokens[strongestAt(row)])}: ${signed(row.attribution)} predicted, ${signed(row.effect)} measured`}))));
}

// The page ---------------------------------------------------------------------------------------------------------------------
function build() {
  const chance = token => data.next.find(row => row.token === token)?.probability, answer = objective.answer;
  $("site").textContent = [data.model, ...new Set(saes.map(sae => sae.site))].filter(Boolean).join(" · ");
  $("headline").textContent = answer ? `Why ${quoted(answer.trim() || answer)}${objective.baseline ? ` and not ${quoted(objective.baseline.trim() || objective.baseline)}` : ""}?` : "What moves the next token?";
  $("lead").textContent = `Attributed: ${data.asked}. Gradient × decoder row × activation of every active feature; what the SAE does not explain stays in place.`;
  const owed = sum(saes.flatMap(sae => sae.features.map(Math.abs))), error = sum(saes.flatMap(sae => sae.error.map(Math.abs)));
  const figures = [[answer && `probability of ${quoted(answer)}`, answer && percent(chance(answer), 2)], [objective.baseline && `probability of ${quoted(objective.baseline)}`, objective.baseline && percent(chance(objective.baseline), 2)],
    ["logits apart", answer ? signed(objective.value) : null], ["active features, at all positions", whole(data.active)], ["rank agreement with ablation", data.spearman === null ? null : data.spearman.toFixed(2)],
    ["of absolute attribution is in features", percent(owed / (owed + error || 1), 2)]];
  $("figures").append(...figures.filter(row => row[1]).map(([label, value]) => h("div", null, h("dd", null, value), h("dt", null, label))));
  $("shading").append(...shadings.map(([label], j) => h("button", {type: "button", onclick: () => { view.shading = j; showTokens(); }}, label)));
  $("how").textContent = `The ${features.length} of the largest attribution. Ablation: the feature is set to 0 ${where} and the model is run again; the bar is what is lost. Click a row for its evidence.`;
  $("agreement").textContent = data.spearman === null ? "Too few features to compare." : `Spearman's rank correlation of both is ${data.spearman.toFixed(3)}. On the dashed line the prediction holds exactly; below it, other features take over or the effect saturates.`;
  $("charts").append(scatter());
  $("hashes").append(h("p", null, "Made by interpretability.attribute."), h("p", {class: "num"}, saes.map(sae => `${sae.site} ${sae.sae_hash.slice(0, 16)}`).join("  ·  ")));
  setUpTheme($("theme"));
  setUpTips();
  showTokens();
  showNext();
  showColumns();
  showRows();
  showHeat();
}
build();
addEventListener("resize", showRows);
