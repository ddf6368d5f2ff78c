"""Clients of language models: one reply per request, kept on disk, paid once."""
