"""The lab models that ship with the project: recipe, weights, cards."""
