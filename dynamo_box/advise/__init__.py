"""What would help a model that is served by prefill and decode workers: which flip of a role, or which threshold.

load.py    how busy each role was between two snapshots
rules.py   advice from that and the profile's targets, with reasons: pure
steady.py  whether a box that may act on advice acts now: one change at a time, and only for advice that lasts; pure
"""
