() => { document.querySelector('#results').classList.remove('loading'); }
