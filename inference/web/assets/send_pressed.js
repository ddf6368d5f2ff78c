() => [
  {__type__: 'update', interactive: false},
  {__type__: 'update', interactive: false},
  '<p class="status busy" role="status">Reading the message…</p>',
]
