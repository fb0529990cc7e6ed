"""Which columns stand in a narrow terminal, and how wide."""

from __future__ import annotations

from dynamo_box.tui.columns import fit
from dynamo_box.tui.model import Column

NAME = Column("name", "NAME", least=6, widest=20)
NOTE = Column("note", "NOTE", keep=1, least=4)
BYTES = Column("bytes", "BYTES", right=True, keep=2)


def test_with_room_every_column_is_as_wide_as_its_texts() -> None:
    assert fit((NAME, NOTE, BYTES), (10, 8, 7), 40, 1) == (10, 8, 7)


def test_no_column_is_wider_than_it_may_be() -> None:
    assert fit((NAME,), (90,), 120, 1) == (20,)


def test_long_texts_give_way_before_a_column_goes() -> None:
    assert fit((NAME, NOTE, BYTES), (10, 8, 7), 24, 1) == (8, 7, 7)


def test_the_column_that_is_kept_least_goes_first_and_the_others_get_its_room() -> None:
    assert fit((NAME, NOTE, BYTES), (10, 8, 7), 18, 1) == (10, 0, 7)


def test_a_number_is_left_out_rather_than_cut() -> None:
    assert fit((NAME, BYTES), (8, 7), 12, 1) == (8, 0)


def test_a_column_that_always_stays_is_cut_at_the_edge() -> None:
    assert fit((NAME, Column("state", "STATE", least=5)), (10, 5), 9, 1) == (6, 2)
    assert fit((NAME,), (10,), 0, 1) == (0,)
