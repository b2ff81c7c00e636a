"""The gateway: an OpenAI-compatible HTTP service in front of a guarded vLLM. Needs neither torch nor vLLM."""
