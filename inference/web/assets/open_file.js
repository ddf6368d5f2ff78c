() => new Promise((resolve) => {
  const input = document.createElement('input');
  input.type = 'file';
  input.accept = '.json,application/json';
  input.onchange = async () => {
    const file = input.files[0];
    resolve(file.size > 65536 ? 'the file is larger than 64 KB' : await file.text());
  };
  input.click();
})
