"""A source that is written down as it plays."""

from __future__ import annotations

from pathlib import Path

from dynamo_box.tui.log_feed import LiveLog, LogBatch
from dynamo_box.tui.recorder import Recorder
from dynamo_box.tui.source import Deliver, NewSnapshot, Source, SourceEvent
from dynamo_box.wording import size


class Recorded:
    """`source`, whose snapshots go to `recorder` on their way; `log` gives it the lines. Both are closed with it."""

    def __init__(self, source: Source, log: LiveLog, recorder: Recorder) -> None:
        self._source, self._log, self._recorder = source, log, recorder

    @property
    def acts(self) -> bool:
        return self._source.acts

    @property
    def state(self) -> str:
        """For a person: how much there is, or why it ended."""
        return self._recorder.ended or f"REC {size(self._recorder.bytes_written)}"

    def start(self, deliver: Deliver) -> None:
        def both(event: SourceEvent) -> None:
            if isinstance(event, NewSnapshot):
                self._recorder.snapshot(event.snapshot)
                if event.snapshot.box.logs_dir:
                    self._log.look_in(Path(event.snapshot.box.logs_dir))
            deliver(event)

        def write_down(batch: LogBatch) -> None:
            self._recorder.log(batch.entries)

        self._log.start_log(write_down)
        self._source.start(both)

    def close(self) -> None:
        self._source.close()
        self._log.close_log()
