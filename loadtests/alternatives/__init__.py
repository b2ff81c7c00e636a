"""The guard beside other ways to refuse a prompt: same machine, same prompts, same run."""
