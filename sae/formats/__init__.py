"""Formats of other libraries, a module each: `FILES` that make up a folder, `write` to the bytes of those, `read` from them."""

from sae.formats import dictionary_learning, saelens, sparsify

FORMATS = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}
