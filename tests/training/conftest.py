"""The toy task of these tests is a module beside them, since the processes that they start import it too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
