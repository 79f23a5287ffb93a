"""launch/train.py in a forked process, on the hub that HF_ENDPOINT names: huggingface_hub was imported, and has
read its variables, before the fork."""

import os
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests import hub
from vlmds.cli import main

if __name__ == "__main__":
    home = Path(os.environ["HF_HOME"])
    hub.use(pytest.MonkeyPatch(), os.environ["HF_ENDPOINT"], home)
    constants.HF_HUB_CACHE = str(home / "hub")
    constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
    sys.exit(main(["train", *sys.argv[1:]]))
