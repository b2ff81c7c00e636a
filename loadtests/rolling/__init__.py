"""Changes of a running deployment, one replica after another: docs/operations.md#rolling-changes."""
