"""`python -m dynamo_box.frontend`, started by the supervisor."""

import uvloop

from dynamo_box import log
from dynamo_box.frontend.service import Frontend


async def _main() -> None:
    await Frontend().run()


log.configure()
uvloop.run(_main())
