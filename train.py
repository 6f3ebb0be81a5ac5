"""Starts Side-Step."""

import sys

from sidestep.main import main

if __name__ == "__main__":
    sys.exit(main())
