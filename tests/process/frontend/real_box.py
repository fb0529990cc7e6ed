"""The real frontend with the real router and mock workers: whoever is killed here is a process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from frontend_peers import Child, FrontendUnderTest

from dynamo_box.discovery.instances import withdraw
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import RouterFigures
from dynamo_box.protocol.spec import Disagg, RouterSpec, WorkerSpec


class Box:
    def __init__(self, frontend: FrontendUnderTest, root: Path, disagg: Disagg) -> None:
        self.frontend = frontend
        self._root = root
        self._disagg = disagg
        self.children: dict[str, Child] = {}

    async def add_router(self) -> Child:
        spec = RouterSpec("router", str(self.frontend.run_dir.root), (self.frontend.model,), disagg=self._disagg)
        return await self._add("dynamo_box.router", spec)

    async def add_worker(self, name: str, role: str = "aggregated", **options: Any) -> Child:
        spec = WorkerSpec(
            name=name,
            model=self.frontend.model,
            engine="mock",
            role=role,
            run_dir=str(self.frontend.run_dir.root),
            threads=1,
            device="cpu",
            kv_bytes=0,
            max_batch=64,
            options={"kv_blocks": 256, "speedup": "infinite", **options},
        )
        return await self._add("engines.mock", spec)

    async def _add(self, module: str, spec: RouterSpec | WorkerSpec) -> Child:
        child = self.children[spec.name] = await Child.start(module, spec, self._root / f"{spec.name}.log")
        await child.expect(status.Ready)
        return child

    async def until_router_knows(self, *workers: str) -> None:
        """Return when the router has reported, since it was expected to report last, that it places on just these."""

        def knows(report: status.Report) -> bool:
            assert isinstance(report.figures, RouterFigures)
            return report.figures.workers == tuple(sorted(workers))

        await self.children["router"].expect(status.Report, knows)

    async def kill(self, name: str) -> None:
        """`kill -9`, and what the supervisor does on hearing of it."""
        child = self.children.pop(name)
        child.process.kill()
        await child.exit_status()
        withdraw(self.frontend.run_dir.instances, name)
        child.channel.close()


@asynccontextmanager
async def running(
    root: Path,
    model: Path,
    workers: int = 2,
    *,
    roles: dict[str, str] | None = None,
    disagg: Disagg | None = None,
    frontend: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Box]:
    """So many aggregated workers w0, w1 and so on, or those of `roles` by name. `frontend` goes to its spec."""
    made = {f"w{number}": "aggregated" for number in range(workers)} if roles is None else roles
    async with FrontendUnderTest(root, model, **(frontend or {})) as under_test:
        box = Box(under_test, root, disagg or Disagg())
        try:
            await asyncio.gather(
                box.add_router(), *(box.add_worker(name, role, **options) for name, role in made.items())
            )
            await under_test.expect(status.Ready)
            await under_test.until_healthy()
            yield box
        finally:
            await asyncio.gather(*(child.close() for child in box.children.values()))
