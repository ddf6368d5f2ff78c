(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'recipe.json';
  link.click();
  URL.revokeObjectURL(link.href);
}
