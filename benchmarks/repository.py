"""Makes the repository's packages importable for the scripts beside this file, wherever they are started from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
