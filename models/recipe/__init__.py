"""How the lab models are made: `python -m models.recipe --data DIR` runs every step that is not done yet."""
