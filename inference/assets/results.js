// A list that is being replaced looks like it, from the key or the choice until the new one is there.
for (const part of document.querySelectorAll('#query, #scope')) {
  part.addEventListener('input', () => document.querySelector('#results').classList.add('loading'));
}
watch('value', markOpened);
