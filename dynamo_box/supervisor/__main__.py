"""`python -m dynamo_box.supervisor`; started by `dynbox up`, not by people."""

from __future__ import annotations

import sys

from dynamo_box.supervisor.launch import main

sys.exit(main(sys.argv[1:]))
