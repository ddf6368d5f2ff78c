// A click on anything that carries data-open or data-steer reaches the server as an event; the address follows the open feature,
// and on a narrow page the edits come into view. data-site names the SAE of a feature that is not the first one's.
element.addEventListener('click', (event) => {
  const opened = event.target.closest('[data-open]'), steered = event.target.closest('[data-steer]');
  if (steered) {
    trigger('steer', {latent: Number(steered.dataset.steer), site: steered.dataset.site ?? ''});
    const edits = document.querySelector('#steer');
    edits.classList.add('loading');
    if (window.innerWidth <= 900) edits.scrollIntoView({block: 'start'});
  } else if (opened) {
    const {open: latent, site = ''} = opened.dataset, address = new URL(window.location);
    address.searchParams.set('latent', latent);
    if (site) address.searchParams.set('site', site);
    else address.searchParams.delete('site');
    history.replaceState(null, '', address);
    const shown = document.querySelector('#card .card')?.dataset ?? {};
    if (shown.latent !== latent || (shown.site ?? '') !== site) document.querySelector('#card').classList.add('loading');
    trigger('open', {latent: Number(latent), site});
  }
});
