"""The client side of a box, used by `dynamo_box.cli` and `dynamo_box.tui`; knows the protocol and nothing behind it.

client.py    ask a running box: snapshot, watch, down, restart, set
launch.py    start a supervisor and follow its start; sweep what a dead one left
logs.py      read and follow the log files of every process, with or without a box
"""
