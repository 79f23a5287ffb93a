"""Vision tower, projectors, language model, and the captioner that joins them."""

import logging

# Said at every start on a CPU: an optional kernel, which would come from the hub, is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
