"""`python -m dynamo_box`: the same as `dynbox`."""

import sys

from dynamo_box.cli.app import main

sys.exit(main())
