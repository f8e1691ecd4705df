"""When a command has to be ended so that all is over at its fence; for the guards of all platforms.

It imports nothing, since guards have to start fast.
"""

_NS = 10**9
# KILL comes this long before the fence, so that all is over when the fence is reached.
_KILL_ROOM_NS = _NS // 10


def plan(now_ns: int, fence_ns: int, grace_ns: int) -> tuple[int, int]:
    """When to send TERM and when KILL, so that all is over at the fence.

    The grace is cut so that TERM never comes before half of the time to the fence has passed:
    a wrapper that renews at every third of its lease is not ended while it is healthy.

    Args:
        now_ns: When the fence was set.
        fence_ns: When everything must have ended.
        grace_ns: The wished time between TERM and KILL.

    Returns:
        The instants of TERM and KILL. All are nanoseconds of ``boottime_ns``.
    """
    span = max(fence_ns - now_ns, 0)
    kill_at = fence_ns - min(_KILL_ROOM_NS, span // 10)
    return max(kill_at - grace_ns, now_ns + span // 2), kill_at
