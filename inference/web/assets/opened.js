// Which feature of the list the card shows.
function markOpened() {
  const shown = document.querySelector('#card .card')?.dataset;
  for (const hit of document.querySelectorAll('#results .hit')) {
    hit.classList.toggle('current', hit.dataset.open === shown?.latent && hit.dataset.site === shown?.site);
  }
}
