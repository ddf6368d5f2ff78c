const $ = id => document.getElementById(id);
const namespace = $("svg").namespaceURI;

// Everything on the page is made here, and text only ever as a text node.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(namespace, tag), attributes, children);

const whole = value => value.toLocaleString("en");
const digits = (value, n = 3) => value.toLocaleString("en", {maximumSignificantDigits: n});
const percent = (value, n = 2) => digits(100 * value, n) + "\u2009%";
const short = value => value.toLocaleString("en", {notation: "compact", maximumSignificantDigits: 3});

// Tooltips: one for all, in the top layer so that it lies above an open dialog.
function showTip(text, x, y) {
  const tip = $("tip");
  tip.textContent = text;
  if (!tip.matches(":popover-open")) tip.showPopover();
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(Math.max(6, x - box.width / 2), innerWidth - box.width - 6)}px`;
  tip.style.top = `${y - box.height - 9 < 4 ? y + 20 : y - box.height - 9}px`;
}
function hideTip() { if ($("tip").matches(":popover-open")) $("tip").hidePopover(); }
// Whatever has a data-tip shows it.
function setUpTips() {
  document.addEventListener("pointerover", event => {
    const target = event.target.closest("[data-tip]");
    if (!target) { if (!event.target.closest("svg")) hideTip(); return; }
    const box = target.getClientRects()[0];
    showTip(target.dataset.tip, box.left + box.width / 2, box.top);
  });
  document.addEventListener("scroll", hideTip, {capture: true, passive: true});
}

// Light or dark: what the system says, until the button says otherwise; remembered where the browser allows it.
function setUpTheme(button) {
  const media = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement.style;
  const isDark = () => root.colorScheme ? root.colorScheme === "dark" : media.matches;
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  try { root.colorScheme = localStorage.getItem("theme") || ""; } catch { /* no storage for files here */ }
  button.addEventListener("click", () => {
    root.colorScheme = isDark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.colorScheme); } catch { /* the same */ }
    name();
    dispatchEvent(new Event("theme"));
  });
  media.addEventListener("change", () => { name(); dispatchEvent(new Event("theme")); });
  name();
}
