"Moved to tools/notebooks.py; this file goes when nobody calls it any more"

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path[0] = str(TOOLS)
runpy.run_path(str(TOOLS / "notebooks.py"), run_name="__main__")
