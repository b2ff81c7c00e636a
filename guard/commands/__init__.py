"""The sub-commands of ``neuronguard``, one a module. Work is imported when it runs, so importing is cheap."""
