"""Changes of a running deployment under load, one replica after another: docs/operations.md#rolling-changes"""
