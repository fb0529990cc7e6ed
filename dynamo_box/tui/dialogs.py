"""What opens over a screen: a page of text (a row's detail, the help), and a question with its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

from rich.cells import chop_cells
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.model import Lines, Span, Tone
from dynamo_box.tui.text import Line, Mark, clip_spans, spans_width, width_of
from dynamo_box.tui.themes import Theme

WIDEST = 110

Result = TypeVar("Result")


def text_width(terminal: int) -> int:
    """How many columns the text of a `TextDialog` has in a terminal of so many."""
    return max(min(terminal, WIDEST) - len("│  │"), 1)


class Answer(NamedTuple):
    """`key` chooses it at once."""

    key: str
    value: str
    title: str


class Dialog(ModalScreen[Result], Generic[Result]):
    """A frame of lines in the middle of the screen; who inherits draws what is in it."""

    DEFAULT_CSS = """
    Dialog { align: center middle; background: transparent; overflow: hidden; }
    """

    def __init__(self, theme: Theme) -> None:
        super().__init__()
        self._box = LineWidget()
        self._box.set_theme(theme)

    @property
    def text(self) -> str:
        return self._box.text

    def compose(self) -> ComposeResult:
        yield self._box

    def set_theme(self, theme: Theme) -> None:
        self._box.set_theme(theme)

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        """Fill the frame, for the size that the terminal has now."""
        raise NotImplementedError


class TextDialog(Dialog[None]):
    """Text that scrolls. `update` it as often as there is news; Escape, Enter and q close it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q,question_mark,ctrl+c", "dismiss", "close", id="dialog.close", tooltip="close this"),
        Binding("up,k", "scroll(-1)", id="dialog.up", tooltip="a line up"),
        Binding("down,j", "scroll(1)", id="dialog.down", tooltip="a line down"),
        Binding("pageup", "scroll(-10)", id="dialog.page-up", tooltip="ten lines up"),
        Binding("pagedown,space", "scroll(10)", id="dialog.page-down", tooltip="ten lines down"),
        Binding("home,g", "scroll(-1000000)", id="dialog.first", tooltip="to the start"),
        Binding("end,G", "scroll(1000000)", id="dialog.last", tooltip="to the end"),
    ]

    def __init__(self, page: Lines, theme: Theme) -> None:
        super().__init__(theme)
        self._page = page
        self._gone = False
        self._top = 0

    def update(self, page: Lines | None) -> None:
        """Show a newer page; None: what it was about is gone, and the last page stays, dimmed."""
        self._gone = page is None
        self._page = page or self._page
        self._draw()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.action_scroll(-3)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.action_scroll(3)

    def action_scroll(self, by: int) -> None:
        self._top += by
        self._draw()

    def _draw(self) -> None:
        whole = self.app.size
        width = min(whole.width, WIDEST)
        wrapped = [piece for line in self._page.lines for piece in wrap(line, text_width(whole.width))]
        height = min(len(wrapped) + 2, whole.height)
        room = max(height - 2, 0)
        self._top = max(0, min(self._top, len(wrapped) - room))
        seen = wrapped[self._top : self._top + room]
        place = f"{self._top + 1}–{self._top + len(seen)} of {len(wrapped)}" if len(seen) < len(wrapped) else ""
        title = f"{self._page.title} (gone)" if self._gone else self._page.title
        self._box.styles.width, self._box.styles.height = width, height
        self._box.show(boxed(title, seen, place or "esc closes", width), dimmed=self._gone)


class QuestionDialog(Dialog[str]):
    """A question and its answers; Escape gives none. The first answer is the one that Enter would take."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,ctrl+c", "leave", "close", id="question.leave", tooltip="do nothing"),
        Binding("up,k,left", "choose(-1)", id="question.up", tooltip="the answer before"),
        Binding("down,j,right,tab", "choose(1)", id="question.down", tooltip="the next answer"),
        Binding("enter", "take", id="question.take", tooltip="take this answer"),
    ]

    def __init__(self, title: str, question: str, answers: Sequence[Answer], theme: Theme) -> None:
        super().__init__(theme)
        self._title = title
        self._question = question
        self._answers = tuple(answers)
        self._at = 0
        self._first_answer = 0

    def on_key(self, event: events.Key) -> None:
        chosen = next((each for each in self._answers if event.character == each.key), None)
        if chosen is not None:
            event.stop()
            event.prevent_default()
            self.dismiss(chosen.value)

    def on_click(self, event: events.Click) -> None:
        event.stop()
        at = event.screen_y - self._box.region.y - self._first_answer
        if self._box.region.contains(event.screen_x, event.screen_y) and 0 <= at < len(self._answers):
            self.dismiss(self._answers[at].value)

    def action_choose(self, by: int) -> None:
        self._at = (self._at + by) % len(self._answers)
        self._draw()

    def action_take(self) -> None:
        self.dismiss(self._answers[self._at].value)

    def action_leave(self) -> None:
        self.dismiss(None)

    def _draw(self) -> None:
        whole = self.app.size
        width = min(whole.width, max(40, min(width_of(self._question) + 6, 72)))
        lines = wrap((Span(self._question),), max(width - 4, 1))
        lines = lines[: max(whole.height - 2 - len(self._answers), 0)]
        self._first_answer = len(lines) + 1
        body = [Line(line) for line in lines]
        for at, answer in enumerate(self._answers):
            spans = (Span(f" {answer.key} ", Tone.ACCENT), Span(answer.title))
            body.append(Line(spans, Mark.CURSOR if at == self._at else Mark.NONE))
        self._box.styles.width, self._box.styles.height = width, len(body) + 2
        self._box.show(boxed(self._title, body, "esc leaves", width))


def boxed(title: str, lines: Sequence[Line | tuple[Span, ...]], foot: str, width: int) -> list[Line]:
    """`lines` within a frame of `width` cells."""
    inner = max(width - 4, 0)
    left, right = Span("│ ", Tone.DIM), Span(" │", Tone.DIM)
    framed = [Line(_edge("╭", title, "╮", width, Tone.TITLE))]
    for line in (each if isinstance(each, Line) else Line(each) for each in lines):
        spans = clip_spans(line.spans, inner)
        blanks = Span(" " * (inner - spans_width(spans)))
        framed.append(Line(clip_spans((left, *spans, blanks, right), width), line.mark))
    return [*framed, Line(_edge("╰", foot, "╯", width, Tone.DIM))]


def wrap(line: tuple[Span, ...], width: int) -> list[tuple[Span, ...]]:
    """`line` on as many lines as it takes, cut where the cells end: keys and paths have no words to break at."""
    done: list[tuple[Span, ...]] = []
    current: list[Span] = []
    left = width
    for span in line:
        text = span.text
        while spans_width((Span(text),)) > left:
            head = chop_cells(text, left)[0] if left > 1 else ""
            current.append(Span(head, span.tone))
            done.append(tuple(current))
            current, left, text = [], width, text[len(head) :]
            if width < 2:
                return done
        if text:
            current.append(Span(text, span.tone))
            left -= spans_width((current[-1],))
    return [*done, tuple(current)]


def _edge(left: str, text: str, right: str, width: int, tone: Tone) -> tuple[Span, ...]:
    label = clip_spans((Span(f" {text} ", tone),), max(width - 4, 0))
    dashes = "─" * max(width - 3 - spans_width(label), 0)
    return clip_spans((Span(f"{left}─", Tone.DIM), *label, Span(dashes + right, Tone.DIM)), width)
