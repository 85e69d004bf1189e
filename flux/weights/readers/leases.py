"""A file that others leave as it is for as long as it is used, where the system can see to that.

Who touches a page of a mapped file that was cut meanwhile is ended by the system (SIGBUS), and no check before can
prevent it. On Linux a lease does: whoever opens the file for writing, or cuts it, waits until the lease is given back,
for up to 45 seconds (``/proc/sys/fs/lease-break-time``). So its holder looks from time to time whether someone waits.
Replacing a file by another of its name needs no waiting, for who has the old one open keeps it.
"""

from __future__ import annotations

import logging
import signal
import sys

__all__ = ["Lease"]

logger = logging.getLogger(__name__)

if sys.platform == "linux":
    import fcntl

    def _take(descriptor: int) -> None:
        # By default the news comes as SIGIO, which ends who does not expect it; SIGURG is passed over.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)

    def _give_back(descriptor: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _is_untouched(descriptor: int) -> bool:
        return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK

else:

    def _take(descriptor: int) -> None:
        raise OSError("this system has no leases")

    def _give_back(descriptor: int) -> None:
        raise OSError("this system has no leases")

    def _is_untouched(descriptor: int) -> bool:
        raise OSError("this system has no leases")


class Lease:
    """A claim on an open file, until it is closed.

    Attributes:
        is_held: Whether the system gave it: not on network disks, and not of a file that is another user's, or that is
            being written to.

    Args:
        descriptor: The file, open for reading only.
        name: Its name, for the log.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self.is_held = descriptor, False
        try:
            _take(descriptor)
            self.is_held = True
        except OSError as error:
            logger.debug("FLUX Foundry: no lease of %s: %s", name, error)

    @property
    def is_wanted(self) -> bool:
        """Whether someone waits for it. Takes less than a microsecond."""
        return self.is_held and not _is_untouched(self._descriptor)

    def close(self) -> None:
        """Give it back."""
        if self.is_held:
            self.is_held = False
            _give_back(self._descriptor)
