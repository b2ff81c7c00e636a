"""A small red team: how many flagged requests can be got past the lab guard, and what refitting it helps.

``python -m loadtests.redteam`` measures, and with ``timing`` it asks what the time of a refusal tells.
"""
