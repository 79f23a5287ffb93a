"""Vision tower, projectors, language model, and the captioner that joins them."""

import logging

# On a CPU it warns at every start that an optional kernel from the hub is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
