"""Checks of this machine and of what a box needs, for `dynbox doctor`.

    finding.py       one line of the report
    examine.py       run checks side by side, each with a deadline
    checks.py        the checks, in the order in which they are shown
    mend.py          put right what is ours (--fix)
    machine.py       where checks look: files below a root, the run dir and the home
    processes.py     what /proc says of other processes
    interpreter.py   Python and its packages
    driver.py        NVIDIA driver and CUDA, as files and libraries tell of them
    gpus.py          what NVML says of the GPUs
    gpu_findings.py  what to think of that (pure)
    limits.py        locked memory, descriptors, inotify
    memory.py        RAM and cgroup, shared memory, huge pages
    disk.py          space and speed
    box.py           the box that runs here, and its port
    leftovers.py     what dead boxes and pulls left
    models.py        the model store
    service.py       systemd

A check reads, then judges: functions named `judge_…` take what was read and return findings, without I/O. A check that
raises or hangs is a finding too. Nothing here changes the machine but `mend.py`.
"""
