"""launch/train.py, or faulty.py if VLMDS_TEST_FAULT is set, each rank of which takes itself for the
first one of a node of its own.

VLMDS_TEST_NODES is JSON: arguments that rank 1 alone gets, too.
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
