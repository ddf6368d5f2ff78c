// Sentences shaded by a feature's activation; `pool` and `example` are columns and a row of report_features.SentencePool.
const SEPARATOR = "\x7f";
const split = text => text === "" ? [] : text.split(SEPARATOR);
const visible = token => token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "");
function sentence(pool, example, maximum, around) {
  const tokens = split(pool.tokens[example[0]]), fires = new Map();
  let peak = 0, largest = -1;
  for (let j = 1; j < example.length; j += 2) {
    fires.set(example[j], example[j + 1]);
    if (example[j + 1] > largest) [peak, largest] = [example[j], example[j + 1]];
  }
  const first = around && peak > around ? peak - around + 4 : 0, end = around ? Math.min(tokens.length, first + 2 * around) : tokens.length;
  const line = h("p", {class: "sentence"}, first > 0 && h("span", {class: "cut"}, "… "));
  let plain = "";
  for (let j = first; j < end; j++) {
    const token = visible(tokens[j]), share = fires.get(j);
    if (!share || !token) { plain += token; continue; }
    const text = token.trimStart();
    if (plain || text !== token) line.append(plain + token.slice(0, token.length - text.length));
    plain = "";
    const tip = `${digits(share * maximum / 1000)} · ${Math.max(1, Math.round(share / 10))}\u2009% of the maximum`;
    line.append(h("mark", {style: {"--a": (.06 + .56 * share / 1000).toFixed(3)}, "data-tip": tip}, text));
  }
  line.append(plain);
  if (end < tokens.length) line.append(h("span", {class: "cut"}, " …"));
  return line;
}
