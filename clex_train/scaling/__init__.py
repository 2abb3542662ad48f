"""Frequencies as pure mathematics: the CLEX fields and their solver, learned static RoPE, tables over t, formulas."""
