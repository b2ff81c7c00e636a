"""Load on stock vLLM and on the guard, observing and enforcing, by GuideLLM and by a mix of clients."""
