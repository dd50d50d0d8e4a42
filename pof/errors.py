"""The errors that a user can cause and cure."""


class PofError(Exception):
    """Something the user can put right; its message is one line: what, where, what to do."""


class DataUnavailable(PofError):
    """A data set could not be had from any of its sources."""


class DataCorrupt(PofError):
    """A data file is not what it should be (truncated, wrong checksum, wrong count)."""


class UnknownBackbone(PofError):
    """No such network, or one whose head is not a linear classifier."""
