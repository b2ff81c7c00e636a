"""A soak: mixed traffic for a long time, and a look at what has grown."""
