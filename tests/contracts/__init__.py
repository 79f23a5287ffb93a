"""Tests of what vlmds uses of libraries beyond their documented interface: private names, subclassed or replaced
parts, and details of behaviour. A test here that fails after an upgrade names the library and the module of
vlmds to change."""
