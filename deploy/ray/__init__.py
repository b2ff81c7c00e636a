"""The guard in Ray Serve LLM: docs/guides/ray-serve.md."""
