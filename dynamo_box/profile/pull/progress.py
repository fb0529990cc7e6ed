"""How a pull tells what it is doing: `progress(phase, done, total, unit)`; `total` is None while unknown."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None, str], None]
