"""What it costs to log."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_that_logs_does_not_load_rich_and_may_do_so_later() -> None:
    code = (
        "import sys; from dynamo_box import log; log.configure(); log.get_logger().info('hello');"
        "assert not {'rich', 'pygments'} & sys.modules.keys(); import rich; log.get_logger(); assert rich in"
        " sys.modules.values()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert '"event": "hello"' in done.stderr
