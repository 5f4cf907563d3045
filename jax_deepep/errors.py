"""Exceptions for failures between devices."""


class CommunicatorError(RuntimeError):
    """The communicator cannot be used.

    It is closed or broken, was made with other arguments in another process, or a device of this process has
    failed. The message has the cause: a missing peer raises `PeerTimeoutError`, anything else this error
    itself (ranks run different programs, or one closed its communicator before the last op).
    """


class PeerTimeoutError(CommunicatorError):
    """A peer did not arrive at an op within `timeout_s`; the communicator is broken.

    The message names the op, the waiting rank, the missing peers and the step that was expected
    of and seen from each.
    """


class InvalidRoutingError(CommunicatorError):
    """`topk_idx` held entries outside [−1, num_experts), or one expert twice in a row.

    The entries were ignored and the communicator still works; raised by `Communicator.check()`.
    """
