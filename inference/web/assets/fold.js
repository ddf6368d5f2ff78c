// A heading that shows and hides what stands below it (app.css). Gradio's accordion builds its inside when it is first opened, and a
// frame later sets it to what the server sent last, over what was typed meanwhile.
element.addEventListener('click', (event) => {
  const fold = event.target.closest('.fold');
  if (fold) fold.setAttribute('aria-expanded', String(fold.getAttribute('aria-expanded') === 'false'));
});
