// A card that was opened is read from its top; on a narrow page it also comes into view.
watch('value', () => {
  document.querySelector('#card').classList.remove('loading');
  element.closest('.reading').scrollTop = 0;
  const opened = element.querySelector('.card')?.dataset.latent;
  for (const hit of document.querySelectorAll('#results .hit')) hit.classList.toggle('current', hit.dataset.open === opened);
  if (window.innerWidth <= 900) element.closest('.reading').scrollIntoView({block: 'start'});
});
