"""Lets the tests of this folder import `worker_process`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
sys.path.insert(0, str(Path(__file__).parents[2] / "process" / "kv_store"))
