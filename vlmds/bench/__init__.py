"""`vlmds bench …`: claims of speed and memory, as ratios against a named baseline in one run."""
