"""How long a request that may yet succeed is repeated: the one policy of everything that is read or written elsewhere.

There are two ways out of this machine, and two places that use this: `pipeline.stores` writes runs to buckets by
obstore, which has the conditional put that commits need; `stages.targets.source` reads what strangers published, by
fsspec or plain http, wherever that is. Each says what may pass and what is refused at once.

Source: exponential backoff with full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS blog, 2015).
"""

import random
import time

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0


class Patience:
    """`seconds` without success, spent in pauses that double, each of random length up to its bound."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.renew()

    def renew(self) -> None:
        """There was progress: begin anew."""
        self._end = time.monotonic() + self.seconds
        self._pause = FIRST_PAUSE

    def pause(self, asked: float = 0.0) -> bool:
        """Wait before the next try, `asked` seconds at least; False, at once, where the patience would end.

        What the other side asks for does not count, but the random pause within it does: it cannot ask for ever.
        """
        wait = random.uniform(0, self._pause)
        if time.monotonic() + wait > self._end:
            return False
        more = max(asked - wait, 0.0)
        time.sleep(wait + more)
        self._end += more
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True
