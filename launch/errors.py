"""The one error a user of quickstart.py sees, printed without a traceback."""


class LaunchError(RuntimeError):
    """Something outside this project stopped the run; the message says what, and what to do."""
