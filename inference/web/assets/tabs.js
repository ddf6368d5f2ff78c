// The button that is chosen shows its panel (app.css). Gradio's own tabs build a panel when it is first shown, and a frame later set
// it to what the server sent last, over what was typed meanwhile.
const tabs = [...element.querySelectorAll('[role=tab]')];

function choose(tab) {
  for (const one of tabs) {
    one.setAttribute('aria-selected', String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
  }
}

element.addEventListener('click', (event) => {
  const tab = event.target.closest('[role=tab]');
  if (tab) choose(tab);
});
element.addEventListener('keydown', (event) => {
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key], at = tabs.indexOf(event.target);
  if (!by || at < 0) return;
  const next = tabs[(at + by + tabs.length) % tabs.length];
  choose(next);
  next.focus();
});
