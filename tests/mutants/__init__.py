"""Seeded mutants: small wrongs in the sources, each of which the tests of its technique must notice."""
