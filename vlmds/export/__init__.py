"""A trained model as a folder that others can load: `vlmds export`."""

FORMATS = ("vlmds", "projector", "peft", "hf-llava")
"""What ``--format`` takes; here, because this module imports nothing heavy."""
