"""``docs/results/speed.md``: the guard beside its alternatives, and under load."""
