// A card that was opened is read from its top; on a narrow page it also comes into view.
watch('value', () => {
  document.querySelector('#card').classList.remove('loading');
  element.closest('.reading').scrollTop = 0;
  markOpened();
  if (window.innerWidth <= 900) element.closest('.reading').scrollIntoView({block: 'start'});
});
if (new URL(window.location).searchParams.has('latent')) document.querySelector('#card').classList.add('loading');
