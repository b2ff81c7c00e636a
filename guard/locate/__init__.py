"""Find the units of a model that carry its safety, by four published methods behind one interface."""
