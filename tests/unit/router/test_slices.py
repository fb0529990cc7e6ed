from __future__ import annotations

import asyncio

from dynamo_box.router.slices import Slices


def test_pieces_take_turns_with_each_other_and_with_the_loop() -> None:
    async def scenario() -> None:
        ran: list[str] = []
        done = asyncio.Event()

        class Work:
            def __init__(self, name: str, pieces: int) -> None:
                self.name = name
                self.left = pieces

            def piece(self) -> bool:
                ran.append(self.name)
                self.left -= 1
                if len(ran) == 5:
                    done.set()
                return self.left > 0

        slices = Slices()
        a, b = Work("a", 3), Work("b", 2)
        slices.add(a.piece)
        slices.add(b.piece)
        slices.add(a.piece)
        assert ran == []
        await asyncio.sleep(0)
        assert ran == ["a"], "one piece a turn"
        await asyncio.wait_for(done.wait(), 60)
        assert ran == ["a", "b", "a", "b", "a"]

    asyncio.run(scenario())


def test_a_piece_that_fails_doesnt_stop_the_others() -> None:
    async def scenario() -> None:
        failures: list[str] = []
        done = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: failures.append(str(context["exception"]))
        )

        def fails() -> bool:
            raise RuntimeError("broken")

        def works() -> bool:
            done.set()
            return False

        slices = Slices()
        slices.add(fails)
        slices.add(works)
        await asyncio.wait_for(done.wait(), 60)
        assert failures == ["broken"]

    asyncio.run(scenario())
