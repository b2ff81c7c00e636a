"""The four methods that locate units, run on the lab twins: `make locate`."""
