"""The errors of the harness that a user can cause and cure."""


class UserError(Exception):
    """Something the user can put right; its message is one line: what, where, what to do."""
