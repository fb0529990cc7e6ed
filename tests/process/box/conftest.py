"""Gives the tests of this folder a box of mock workers."""

from __future__ import annotations

from mock_box import mock_box

__all__ = ["mock_box"]
