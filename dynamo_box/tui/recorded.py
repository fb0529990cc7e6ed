"""A source that is written down as it plays."""

from __future__ import annotations

from pathlib import Path

from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.log_feed import LiveLog
from dynamo_box.tui.recorder import Recorder
from dynamo_box.tui.source import Deliver, NewSnapshot, Source, SourceEvent
from dynamo_box.wording import size


class Recorded:
    """`source`, whose snapshots go to `recorder` on their way; `log` gives it the lines. Both are closed with it."""

    def __init__(self, source: Source, log: LiveLog, recorder: Recorder) -> None:
        self._source, self._log, self._recorder = source, log, recorder
        self._has_begun = False

    @property
    def acts(self) -> bool:
        return self._source.acts

    @property
    def state(self) -> str:
        """For a person: how much there is, or why it ended."""
        return self._recorder.ended or f"REC {size(self._recorder.bytes_written)}"

    @property
    def ended(self) -> bool:
        """Whether the recording has ended by itself."""
        return bool(self._recorder.ended)

    @property
    def failed(self) -> bool:
        """Whether it has ended because it can't be written."""
        return self._recorder.failed

    def start(self, deliver: Deliver) -> None:
        """Lines follow the first snapshot: a recording without one can't be played."""

        def both(event: SourceEvent) -> None:
            if isinstance(event, NewSnapshot):
                self._write_down(event.snapshot)
            deliver(event)

        self._source.start(both)

    def close(self) -> None:
        self._source.close()
        self._log.close_log()

    def _write_down(self, snapshot: BoxSnapshot) -> None:
        self._recorder.snapshot(snapshot)
        if snapshot.box.logs_dir:
            self._log.look_in(Path(snapshot.box.logs_dir))
        if not self._has_begun:
            self._has_begun = True
            self._log.start_log(lambda batch: self._recorder.log(batch.entries))
