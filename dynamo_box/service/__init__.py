"""A box as a systemd service: the unit for a profile, and what it takes to bring one in and out.

unit.py        the text of a unit (pure), and where units of a scope lie
environment.py what the service's environment will be, which is not the one of the shell that installs it
systemctl.py   the calls to systemd
install.py     install, remove and look: files and systemd together
"""
