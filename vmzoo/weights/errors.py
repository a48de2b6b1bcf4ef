class CheckpointError(RuntimeError):
    """A checkpoint cannot be downloaded, read or fitted to a model; the message names it and the cause."""


class CheckpointMismatch(CheckpointError):
    """The weights are those of another architecture; the file itself is sound."""
