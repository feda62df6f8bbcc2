"""The report that each part of a campaign returns: the one of benchmarks/measure.py.

The programs here and in benchmarks/ import one another as top-level modules. This is the one place that adds
benchmarks/ to the path.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))

from measure import Report, run_plainly  # noqa: E402

__all__ = ["REPOSITORY", "Report", "run_plainly"]
