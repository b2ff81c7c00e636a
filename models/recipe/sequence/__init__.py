"""Sequence probes beside the shipped probe of the last token: `docs/results/sequence.md` by one command."""
