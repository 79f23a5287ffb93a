import sys

from vlmds.cli import main

sys.exit(main())
