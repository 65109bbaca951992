"""Who works on what, as the one truth that all workers share: taken once, kept by a beat, passed on when the holder falls silent.

    free --take--> held --done--> done
      ^              |
      +---- died ----+---- died for the second time ----> quarantined

No clock of another machine is asked: a holder counts its beats up, and a watcher that sees a count stand still for long enough by its
own clock takes the work away. Work that cost two workers their lives is poison and is not handed out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeAlias, cast

from . import Database

State: TypeAlias = Literal["free", "held", "done", "quarantined"]
MAX_DEATHS = 2


class Leases:
    """The leases of one database, as one watcher sees them. Every change is a transaction of its own."""

    def __init__(self, database: Database, *, patience_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._patience_s = patience_s
        self._clock = clock
        self._seen: dict[str, tuple[str, int, float]] = {}

    def take(self, work: str, holder: str) -> bool:
        """Whether the work is `holder`'s from now on: nobody has it, it is not done, and it is no poison."""
        with self._database.writing() as connection:
            connection.execute("INSERT OR IGNORE INTO lease VALUES (?, '', 0, 0, 'free')", (work,))
            sql = "UPDATE lease SET state = 'held', holder = ?, beat = beat + 1 WHERE work = ? AND state = 'free'"
            return connection.execute(sql, (holder, work)).rowcount == 1

    def beat(self, work: str, holder: str) -> bool:
        """Shows that `holder` lives; False if the work is not its any more: it then drops the work and its result."""
        sql = "UPDATE lease SET beat = beat + 1 WHERE work = ? AND holder = ? AND state = 'held'"
        with self._database.writing() as connection:
            return connection.execute(sql, (work, holder)).rowcount == 1

    def done(self, work: str, holder: str) -> bool:
        """Ends the lease for good; False if the work was taken from `holder` meanwhile."""
        sql = "UPDATE lease SET state = 'done' WHERE work = ? AND holder = ? AND state = 'held'"
        with self._database.writing() as connection:
            return connection.execute(sql, (work, holder)).rowcount == 1

    def died(self, work: str, holder: str) -> State:
        """`holder` died with this work in hand, which is free again unless that was once too often; the state it has now."""
        sql = (
            "UPDATE lease SET deaths = deaths + 1, holder = '', "
            f"state = CASE WHEN deaths + 1 >= {MAX_DEATHS} THEN 'quarantined' ELSE 'free' END "
            "WHERE work = ? AND holder = ? AND state = 'held'"
        )
        with self._database.writing() as connection:
            connection.execute(sql, (work, holder))
        return self.state(work)

    def state(self, work: str) -> State:
        """What became of the work so far."""
        row = self._database.read("SELECT state FROM lease WHERE work = ?", (work,))
        return cast(State, row[0][0]) if row else "free"

    def quarantined(self) -> tuple[str, ...]:
        """The work that is not handed out any more."""
        return tuple(row[0] for row in self._database.read("SELECT work FROM lease WHERE state = 'quarantined' ORDER BY work"))

    def reap(self) -> tuple[str, ...]:
        """Takes work from holders whose beat stood still for `patience_s` by this watcher's clock; what was taken."""
        now = self._clock()
        rows = self._database.read("SELECT work, holder, beat FROM lease WHERE state = 'held'")
        held = {work: (holder, beat) for work, holder, beat in rows}
        self._seen = {
            work: seen if (seen := self._seen.get(work, ("", -1, now)))[:2] == found else (*found, now) for work, found in held.items()
        }
        silent = [(work, holder) for work, (holder, _, since) in self._seen.items() if now - since >= self._patience_s]
        for work, holder in silent:
            self.died(work, holder)
            del self._seen[work]
        return tuple(work for work, _ in silent)
