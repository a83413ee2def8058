"""The toy tasks of these tests are modules beside them, since the processes that they
start import them too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
