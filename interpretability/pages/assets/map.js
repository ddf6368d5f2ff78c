const data = JSON.parse($("data").textContent), about = data.about, n = data.latents.length;
const canvas = $("map"), context = canvas.getContext("2d");
const X = Float64Array.from(data.x), Y = Float64Array.from(data.y); // 0 to 1, the longer side of the map being 1
const titles = data.titles.map(title => title.toLowerCase());
const PALETTE = ["#c2410c", "#2563a8", "#4d7c0f", "#a21caf", "#0e7490", "#b45309", "#be123c", "#5b50b5", "#15803d", "#7c4a21", "#d1518a", "#64748b"];
const view = {scale: 1, x: 0, y: 0, width: 0, height: 0, found: null, hover: -1};
let colours = [], paper = "", ink = "", soft = "";

// Colours: categories from the palette, numbers along a ramp.
const css = name => getComputedStyle(document.body).getPropertyValue(name);
function resolved(name) { // light-dark() is only resolved where it is used
  const probe = h("i", {style: {color: `var(${name})`}});
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
function ramp(share) { return `hsl(${250 - 225 * share} ${45 + 40 * share}% ${(isLight() ? 62 : 40) - (isLight() ? 14 : -22) * share}%)`; }
const isLight = () => resolved("--paper").match(/\d+/g)[0] > 128;
function recolour() {
  const by = data.colours[$("colour").selectedIndex];
  [paper, ink, soft] = ["--paper", "--ink", "--soft"].map(resolved);
  if (by.names) {
    const last = by.names.length;
    colours = by.values.map(value => value < 0 ? soft : PALETTE[value % PALETTE.length]);
    $("legend").replaceChildren(...by.names.map((name, i) => h("li", null, h("i", {style: {background: PALETTE[i % PALETTE.length]}}), name)),
      by.values.some(value => value < 0) ? h("li", {class: "soft"}, h("i", {style: {background: "var(--soft)", opacity: ".5"}}), last ? "other" : "none") : "");
  } else {
    colours = by.values.map(value => value === null ? soft : ramp(Math.min(1, Math.max(0, (value - by.low) / (by.high - by.low || 1)))));
    const stops = [0, .25, .5, .75, 1].map(ramp).join(", ");
    $("legend").replaceChildren(h("li", null, by.low_text, h("i", {class: "ramp", style: {background: `linear-gradient(90deg, ${stops})`}}), by.high_text));
  }
  draw();
}

// Drawing: points, then as many labels as fit, the best explained first, like the names on a street map.
const px = i => (X[i] - view.x) * view.scale + view.width / 2, py = i => (Y[i] - view.y) * view.scale + view.height / 2;
let pending = 0;
function draw() { pending ||= requestAnimationFrame(() => { pending = 0; paint(); }); }
function paint() {
  const ratio = devicePixelRatio || 1, {width, height} = view, zoom = view.scale / fitted();
  const radius = Math.min(7, Math.min(4, Math.max(1.2, 150 / Math.sqrt(n))) * zoom ** .35);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = paper;
  context.fillRect(0, 0, width, height);
  for (let i = 0; i < n; i++) {
    const x = px(i), y = py(i);
    if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
    const lit = !view.found || view.found.has(i);
    context.globalAlpha = lit ? (colours[i] === soft ? .4 : .8) : .08;
    context.fillStyle = colours[i];
    context.beginPath();
    context.arc(x, y, view.found && lit ? radius + 1.5 : radius, 0, 7);
    context.fill();
  }
  context.globalAlpha = 1;
  context.textAlign = "center";
  context.lineJoin = "round";
  context.strokeStyle = paper;
  const taken = [], free = box => taken.every(other => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]);
  const most = view.found ? 80 : Math.round(18 + 14 * Math.log2(Math.max(1, zoom)));
  const label = (i, bold) => {
    const title = data.titles[i], x = px(i), y = py(i);
    if (!title || x < 0 || y < 0 || x > width || y > height) return;
    context.font = `${bold ? 600 : 500} ${bold ? 13 : 11.5}px ${css("--sans")}`;
    const text = title.length > 34 && !bold ? title.slice(0, 32) + "…" : title, half = context.measureText(text).width / 2 + 4;
    const box = [x - half, y - radius - 19, x + half, y - radius - 1];
    if (!bold && (!free(box) || box[0] < 0 || box[2] > width)) return;
    taken.push(box);
    context.lineWidth = 3.5;
    context.strokeText(text, x, y - radius - 5);
    context.fillStyle = bold ? resolved("--accent") : ink;
    context.fillText(text, x, y - radius - 5);
  };
  for (const area of corners()) taken.push(area);
  for (const i of data.order) {
    if (taken.length >= most + 3) break;
    if (i !== view.hover && (!view.found || view.found.has(i))) label(i, false);
  }
  if (view.hover >= 0) {
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.beginPath();
    context.arc(px(view.hover), py(view.hover), radius + 2.5, 0, 7);
    context.stroke();
  }
}
function corners() { return ["headline", "tools", "legend"].map(id => { const box = $(id).getBoundingClientRect(); return [box.left - 8, box.top - 8, box.right + 8, box.bottom + (id === "headline" ? 60 : 8)]; }); }

// Moving about.
const fitted = () => Math.min(view.width * .92, (view.height - 110) * .98);
function resize() {
  const keep = view.width ? view.scale / fitted() : 1, ratio = devicePixelRatio || 1;
  [view.width, view.height] = [innerWidth, innerHeight];
  [canvas.width, canvas.height] = [view.width * ratio, view.height * ratio];
  if (!view.x) [view.x, view.y] = [data.width / 2, data.height / 2 - 20 / fitted()];
  view.scale = keep * fitted();
  draw();
}
function zoom(factor, x = view.width / 2, y = view.height / 2) {
  const scale = Math.min(200 * fitted(), Math.max(.7 * fitted(), view.scale * factor));
  view.x += (x - view.width / 2) * (1 / view.scale - 1 / scale);
  view.y += (y - view.height / 2) * (1 / view.scale - 1 / scale);
  view.scale = scale;
  draw();
}
function nearest(x, y, reach) {
  let best = -1, least = reach * reach;
  for (let i = 0; i < n; i++) {
    const distance = (px(i) - x) ** 2 + (py(i) - y) ** 2;
    if (distance < least && (!view.found || view.found.has(i))) [best, least] = [i, distance];
  }
  return best;
}
function point(i) {
  if (i === view.hover) return;
  view.hover = i;
  canvas.classList.toggle("over", i >= 0);
  if (i < 0) hideTip();
  else showTip(`${data.latents[i]}  ${data.titles[i] || "not explained"}`, px(i), py(i) - 4);
  draw();
}
function open(i) { location.href = `${about.report}#latent=${data.latents[i]}`; }
const pointers = new Map();
let moved = 0;
canvas.addEventListener("pointerdown", event => { pointers.set(event.pointerId, event); moved = 0; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointermove", event => {
  const before = pointers.get(event.pointerId);
  if (!before) return point(nearest(event.clientX, event.clientY, 14));
  const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY], others = [...pointers.values()].filter(p => p.pointerId !== event.pointerId);
  pointers.set(event.pointerId, event);
  moved += Math.abs(dx) + Math.abs(dy);
  if (others.length) {
    const far = p => Math.hypot(p.clientX - others[0].clientX, p.clientY - others[0].clientY);
    zoom(far(event) / Math.max(1, far(before)), (event.clientX + others[0].clientX) / 2, (event.clientY + others[0].clientY) / 2);
  } else { view.x -= dx / view.scale; view.y -= dy / view.scale; }
  if (moved > 4) point(-1);
  draw();
});
canvas.addEventListener("pointerup", event => {
  pointers.delete(event.pointerId);
  if (moved > 4 || pointers.size) return;
  const i = nearest(event.clientX, event.clientY, event.pointerType === "touch" ? 26 : 14);
  // A finger cannot hover: its first touch names a point, the second opens it.
  if (i >= 0 && (event.pointerType !== "touch" || i === view.hover)) open(i); else point(i);
});
canvas.addEventListener("pointercancel", event => pointers.delete(event.pointerId));
canvas.addEventListener("wheel", event => { event.preventDefault(); point(-1); zoom(2 ** (-event.deltaY / (event.deltaMode ? 8 : 240)), event.clientX, event.clientY); }, {passive: false});
$("in").addEventListener("click", () => zoom(1.6));
$("out").addEventListener("click", () => zoom(1 / 1.6));
$("tools").addEventListener("submit", event => { event.preventDefault(); if (view.found && view.found.size === 1) open([...view.found][0]); });
$("query").addEventListener("input", () => {
  const words = $("query").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  view.found = words.length ? new Set([...titles.keys()].filter(i => words.every(word => titles[i].includes(word)) || words[0] === String(data.latents[i]))) : null;
  $("hint").textContent = view.found ? `${whole(view.found.size)} found` : about.hint;
  draw();
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { $("query").value = ""; $("query").dispatchEvent(new Event("input")); canvas.focus(); }
  if (event.target.closest("input, select")) return;
  const step = 60 / view.scale, moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]}[event.key];
  if (moves) { view.x += moves[0]; view.y += moves[1]; point(-1); draw(); }
  else if (event.key === "+" || event.key === "=") zoom(1.4);
  else if (event.key === "-") zoom(1 / 1.4);
  else if (event.key === "Enter" && view.hover >= 0) open(view.hover);
  else if (event.key === "/") $("query").focus();
  else return;
  event.preventDefault();
});
$("headline").textContent = `${whole(n)} features by direction`;
$("lead").textContent = `${[about.model, about.site].filter(Boolean).join(" · ")}. UMAP of decoder rows: what lies close together writes in similar directions. Distances between groups mean little.`;
about.hint = "drag, scroll, click; / finds";
$("hint").textContent = about.hint;
$("colour").append(...data.colours.map(by => h("option", null, by.name)));
$("colour").addEventListener("change", recolour);
setUpTheme($("theme"));
addEventListener("theme", recolour);
addEventListener("resize", resize);
resize();
recolour();
