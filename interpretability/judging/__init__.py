"""Tests of explanations: scoring tasks, judges, lists of concepts."""
