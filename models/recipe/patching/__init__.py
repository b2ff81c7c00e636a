"""What patching does to the lab twins: `make patch-results`."""
