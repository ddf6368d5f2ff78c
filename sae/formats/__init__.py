"""Layouts of other libraries, a module each with `read`; those that we write have `write` as well, the bytes of their `FILES`.

`finding.py` sees which reader a folder or a file is for.
"""

from sae.formats import dictionary_learning, saelens, sparsify

FORMATS = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}
