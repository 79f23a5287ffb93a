"""Code that travels with an exported model and runs where vlmds is not installed: nothing in this
folder imports vlmds. `vlmds.export.remote` copies it, with the projectors beside it."""
