// Light and dark, and the keys. Runs once, when the masthead is on the page.
const kept = localStorage.getItem('workbench-theme');
if (kept) document.body.classList.toggle('dark', kept === 'dark');
element.addEventListener('click', (event) => {
  if (!event.target.closest('.theme')) return;
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('workbench-theme', dark ? 'dark' : 'light');
});

const seen = (selector) => [...document.querySelectorAll(selector)].find((one) => one.offsetParent && !one.disabled);
const press = (selector) => { const one = seen(selector); if (one) one.click(); return Boolean(one); };

function step(from, by) {
  const hits = [...document.querySelectorAll('#results .hit')];
  const to = from.closest('#query') ? (by > 0 ? 0 : -1) : hits.indexOf(from) + by;
  if (to < 0) document.querySelector('#query textarea').focus();
  else if (hits[to]) {
    for (const hit of hits) hit.tabIndex = hit === hits[to] ? 0 : -1; // the list is one stop of the Tab key
    hits[to].focus();
  }
}

document.addEventListener('keydown', (event) => {
  const on = event.target, writing = on.matches('input:not([type=radio]):not([type=range]), textarea, [contenteditable]');
  const inList = on.matches('#results .hit'), inSearch = on.matches('#query textarea');
  let done = true;
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) press('#generate, #send');
  else if (event.key === 'Escape' && element.querySelector('.keys[open]')) element.querySelector('.keys').open = false;
  else if (event.key === 'Escape') done = press('#stop, #chat-stop');
  else if (event.key === '/' && !writing) { const query = document.querySelector('#query textarea'); query.focus(); query.select(); }
  else if (event.key === '?' && !writing) element.querySelector('.keys').open = !element.querySelector('.keys').open;
  else if (event.key === 'ArrowDown' && (inList || inSearch)) step(on, 1);
  else if (event.key === 'ArrowUp' && inList) step(on, -1);
  else if (event.key === '+' && inList) on.parentElement.querySelector('.plus')?.click();
  else done = false;
  if (done) event.preventDefault();
});
