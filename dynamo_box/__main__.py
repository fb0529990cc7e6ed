"""`python -m dynamo_box`, and what the `dynbox` script calls.

Imports nothing ahead of time: Ctrl-C while the command line is still being imported must end as quietly as later on.
"""

import sys

INTERRUPTED = 130  # ExitCode.INTERRUPTED, which would have to be imported


def main() -> int:
    """Run the command line on `sys.argv`; returns the exit code."""
    try:
        from dynamo_box.cli.app import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
