const W = 360, H = 190, LEFT = 42, RIGHT = 6, TOP = 8, BOTTOM = 26;
function niceTicks(low, high, n) {
  const raw = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(raw)), gap = power * [1, 2, 5, 10].find(m => m * power >= raw * .999), ticks = [];
  for (let j = Math.ceil(low / gap - 1e-9); j * gap <= high + gap * 1e-6; j++) ticks.push(j * gap);
  return ticks;
}
function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) for (const m of Math.log10(high / low) > 2.2 ? [1] : [1, 2, 5]) ticks.push(m * 10 ** power);
  return ticks.filter(tick => tick >= low && tick <= high);
}
const figure = (caption, unit, drawing) => h("figure", null, h("figcaption", null, caption, unit && h("small", null, unit)), drawing);
function lineChart({caption, unit, points, marks = [], share}) {
  const all = [...points, ...marks].map(p => p[1]), high = Math.max(...all), low = Math.min(...all), log = !share && low > 0 && high / low > 8;
  const range = log ? [low * .9, high * 1.1] : [0, high * 1.06 || 1], to = log ? Math.log10 : v => v, last = points[points.length - 1][0];
  const x = v => LEFT + (W - LEFT - RIGHT) * v / last, y = v => H - BOTTOM - (H - TOP - BOTTOM) * (to(v) - to(range[0])) / (to(range[1]) - to(range[0]));
  const text = share ? v => percent(v, 3) : v => digits(v), ticks = log ? logTicks(...range) : niceTicks(...range, 4);
  const cursor = s("circle", {class: "cursor", r: 3.5, visibility: "hidden"});
  const svg = s("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${caption}: ends at ${text(points[points.length - 1][1])}`},
    ticks.map(t => [s("line", {class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t)}), s("text", {x: LEFT - 7, y: y(t) + 4, "text-anchor": "end"}, text(t))]),
    s("line", {class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM}),
    niceTicks(0, last, 4).map(t => s("text", {x: x(t), y: H - 9, "text-anchor": t === 0 ? "start" : x(t) > W - 26 ? "end" : "middle"}, t ? short(t) : "0")),
    s("path", {class: "curve", d: "M" + points.map(p => `${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("L")}),
    marks.map(p => s("circle", {class: "point", cx: x(p[0]), cy: y(p[1]), r: 3.5, "data-tip": `validation ${text(p[1])} · ${short(p[0])} tokens`})), cursor);
  svg.addEventListener("pointermove", event => {
    if (event.target.closest("[data-tip]")) return;
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT) * last;
    const point = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    fill(cursor, {cx: x(point[0]), cy: y(point[1]), visibility: "visible"}, []);
    showTip(`${text(point[1])} · ${short(point[0])} tokens`, box.left + x(point[0]) / W * box.width, box.top + y(point[1]) / H * box.height);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
  return figure(caption, unit, svg);
}
function barChart({bars, edges, edge, caption, unit, every = Math.ceil(edges / 7)}) {
  const high = Math.max(...bars.map(bar => bar.value)), width = (W - LEFT - RIGHT) / bars.length;
  const y = v => H - BOTTOM - (H - TOP - BOTTOM) * v / high;
  return figure(caption, unit, s("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${caption}, ${unit}`},
    niceTicks(0, high, 3).map(t => [s("line", {class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t)}), s("text", {x: LEFT - 7, y: y(t) + 4, "text-anchor": "end"}, t ? short(t) : "0")]),
    bars.map((bar, j) => [s("rect", {class: "slot", x: LEFT + j * width, y: TOP, width, height: H - TOP - BOTTOM, "data-tip": bar.tip}),
      s("rect", {class: bar.other ? "bar other" : "bar", x: LEFT + j * width + .75, y: y(bar.value), width: Math.max(1, width - 1.5), height: Math.max(0, H - BOTTOM - y(bar.value)), "pointer-events": "none"})]),
    s("line", {class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM}),
    Array.from({length: edges}, (_, j) => j % every ? null : s("text", {x: LEFT + j * width, y: H - 9, "text-anchor": "middle"}, edge(j)))));
}
function rowChart({caption, unit, rows}) {
  const high = Math.min(1.25, Math.max(...rows.map(row => row[1]))), step = 42, bottom = rows.length * step;
  return figure(caption, unit, s("svg", {viewBox: `0 0 ${W} ${bottom}`, role: "img", "aria-label": rows.map(row => row.join(" ")).join(", ")},
    rows.map(([name, value], j) => [s("text", {class: "name", x: 0, y: j * step + 13}, name), s("text", {class: "value", x: W, y: j * step + 13, "text-anchor": "end"}, value.toFixed(3)),
      s("rect", {class: j ? "bar other" : "bar", x: 0, y: j * step + 20, height: 9, rx: 2, width: Math.min(W, Math.max(2, W * value / high))})])));
}
function densityChart(caption, own) {
  const {first, per_decade, counts} = data.densities, at = j => percent(10 ** ((first + j) / per_decade)), never = size - about.fired;
  const marked = own > 0 ? Math.floor(Math.log10(own) * per_decade + 1e-9) - first : null;
  const bars = counts.map((count, j) => ({value: count, other: marked !== null && j !== marked, tip: `${at(j)} to ${at(j + 1)} of tokens: ${whole(count)} features`}));
  const unit = own > 0 ? "features by share of tokens; this one's place" : never ? `share of tokens; ${whole(never)} never` : "share of tokens";
  return barChart({bars, edges: counts.length + 1, edge: j => (first + j) % per_decade ? "" : `10${superscript((first + j) / per_decade)}`, caption, every: 1, unit});
}
const superscript = n => String(n).replace(/[-\d]/g, c => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);

