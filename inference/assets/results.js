// A list that is being replaced looks like it: what is typed marks it as old, what arrives as new.
const box = document.querySelector('#query');
box?.addEventListener('input', () => document.querySelector('#results').classList.add('loading'));
watch('value', () => {
  document.querySelector('#results').classList.remove('loading');
  const opened = document.querySelector('#card .card')?.dataset.latent;
  for (const hit of element.querySelectorAll('.hit')) hit.classList.toggle('current', hit.dataset.open === opened);
});
