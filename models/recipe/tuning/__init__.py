"""What tuning by units does to the lab models: `make tune-results`."""
