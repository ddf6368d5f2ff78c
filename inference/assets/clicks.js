// A click on anything that carries data-open or data-steer reaches the server as an event; the address follows the open feature,
// and on a narrow page the edits come into view.
element.addEventListener('click', (event) => {
  const opened = event.target.closest('[data-open]'), steered = event.target.closest('[data-steer]');
  if (steered) {
    trigger('steer', {latent: Number(steered.dataset.steer)});
    if (window.innerWidth <= 900) document.querySelector('#steer').scrollIntoView({block: 'start'});
  } else if (opened) {
    const address = new URL(window.location), card = document.querySelector('#card');
    address.searchParams.set('latent', opened.dataset.open);
    history.replaceState(null, '', address);
    if (!card.querySelector(`[data-latent="${opened.dataset.open}"]`)) card.classList.add('loading');
    trigger('open', {latent: Number(opened.dataset.open)});
  }
});
