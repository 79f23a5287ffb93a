"""Code that is copied into exported folders and runs without vlmds: nothing here imports vlmds.

`vlmds.export.remote_code` copies it, together with the projectors.
"""
