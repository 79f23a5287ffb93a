"""launch/train.py, or faulty.py if VLMDS_TEST_FAULT is set, in which each rank is
the only one of its node.

VLMDS_TEST_NODES is JSON: additional arguments of rank 1.
"""

import json
import os
import sys

from vlmds.cli import main

if "VLMDS_TEST_FAULT" in os.environ:
    from tests.training import faulty  # noqa: F401

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    more = json.loads(os.environ["VLMDS_TEST_NODES"]) if os.environ["RANK"] == "1" else []
    sys.exit(main(["train", *sys.argv[1:], *more]))
