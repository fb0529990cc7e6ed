"""The one process that starts everything else, watches it, restarts it, and leaves nothing behind.

    __main__.py          entry: `python -m dynamo_box.supervisor --launch-fd N | --plan-fd N`
    launch.py            the life of the supervisor itself: lock, sweep, start, serve, stop, exit status
    box.py               the children of one plan as one thing: start, canary, restart, stop
    child.py, life.py    one child through all its restarts; one life of it, from spawn to the last descendant's end
    states.py            legal transitions, and whether to try again
    guard.py             the small process between supervisor and child (standard library only)
    identity.py          run ids: which box a process belongs to
    sweep.py, lock.py    what a dead box left; who holds a run dir
    cgroups.py           cgroup.kill, where a cgroup v2 is writable
    control_server.py    control.sock
    snapshot_builder.py  the box at one moment
    logs.py              what children write: bounded, structured, rotated
    listener.py          the HTTP port, bound before anything starts
    canary.py            one real completion
    sdnotify.py          systemd

Importing it costs nothing; each module imports what it needs.
"""
