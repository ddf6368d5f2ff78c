() => [
  {__type__: 'update', interactive: false},
  '<p class="status busy" role="status">Reading the prompt…</p>',
]
