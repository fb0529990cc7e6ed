"""The command line. A file a verb; `app.py` holds the table of verbs and turns errors into exit codes.

stdout is data and stderr is talk, so that every read verb can feed a pipe. Start time is part of the interface: a verb
imports what it needs when it runs, and `dynbox --help` imports none of them.
"""
