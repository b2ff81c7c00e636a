"""The lab guard by the whole protocol: `docs/results/detection.md` by one command."""
