"""Training runs: configuration, checks, memory plan, engine and loop."""
