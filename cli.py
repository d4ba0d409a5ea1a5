"""`python cli.py …` from a checkout: the installed command `ptql`, without installing."""

import sys
from pathlib import Path

import ptql

ptql.__path__.append(str(Path(__file__).parent))  # callbacks/ and configs/ are ptql.callbacks and ptql.configs

if __name__ == "__main__":
    from ptql.cli import main

    sys.exit(main())
