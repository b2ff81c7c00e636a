"""The embedded default: vLLM's CPU build and the gateway as child processes of one supervisor."""
