"""Frequencies as pure mathematics: the CLEX field and its solver, tables over t, formulas, position sampling."""
