"""The one process that starts everything else, watches it, restarts it, and leaves nothing behind.

    __main__.py, launch.py   entry: get the plan, take and sweep the run dir, detach
    supervision.py           from the first child to the last: signals, launcher, stop, exit status
    box.py                   the children of one plan as one thing: start, prove, restart, stop
    child.py                 one child through all its restarts
    life.py                  one life of it, from spawn to the end of its last descendant
    states.py                legal transitions, and whether to try again (pure)
    guard.py                 the small process between supervisor and child (standard library only)
    identity.py, lock.py     which box a process belongs to; who holds a run dir
    sweep.py, cgroups.py     ending what a dead box, or a dead guard, left
    acts.py                  restart, drain, settings, cancel: what people ask of a running box
    control_server.py        control.sock
    snapshot_builder.py      the box at one moment
    devices.py               GPUs, host and disks, read in the background (background.py) once a second
    gpus.py, gpu_errors.py   … through NVML
    host.py, disks.py        … through /proc and statvfs
    thresholds.py            when a figure becomes an event (pure)
    events.py, logs.py       what happened; what children write: bounded, structured, rotated
    listener.py              the HTTP port, bound before anything starts
    canary.py                one real completion
    sdnotify.py              systemd
    procfs.py, waiting.py    what /proc says; waiting for futures of others

Importing it costs nothing; each module imports what it needs.
"""
