// A prompt to start from, chosen.
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-prompt]');
  if (chosen) trigger('choose', {prompt: chosen.dataset.prompt});
});
