"""Which replica gets a request: the one with the least under way, counting what was dealt out a moment ago.

Serve's own router compares the queues of two replicas as they last answered, so that a burst of eight that arrives
before any answer may all go to one of them. This one counts what it has chosen and sent itself. `pipeline/serve.py`
names it in the deployment; it runs in Serve's proxies.
"""

import itertools
import time
from collections import Counter, deque
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

# A choice that was not sent by then was cancelled before it could be.
SECONDS_FROM_CHOICE_TO_SENDING = 2.0


class LeastBusyRouter(RequestRouter):
    """Orders the replicas by requests under way; among equals the one comes first that was chosen longest ago."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._chosen: dict[ReplicaID, deque[float]] = {}  # when, of those not sent yet
        self._running: Counter[ReplicaID] = Counter()  # sent from here and not ended
        self._turns: dict[ReplicaID, int] = {}
        self._next_turn = itertools.count(1)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all replicas, each a rank of its own: the next is asked where one has no room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all are tried already; a hot loop finds no more
        ranked = sorted(
            candidate_replicas,
            key=lambda each: (self.count_under_way(each.replica_id), self._turns.get(each.replica_id, 0)),
        )
        if ranked:
            first = ranked[0].replica_id
            self._chosen.setdefault(first, deque()).append(time.monotonic())
            self._turns[first] = next(self._next_turn)
        return [[each] for each in ranked]

    def count_under_way(self, replica: ReplicaID) -> int:
        """Count what this router has given the replica; or what the replica itself said, where other proxies add."""
        chosen = self._chosen.get(replica, deque())
        while chosen and chosen[0] < time.monotonic() - SECONDS_FROM_CHOICE_TO_SENDING:
            chosen.popleft()
        said = self.replica_queue_len_cache.get(replica) or 0
        return max(self._running[replica], said) + len(chosen)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request that leaves for a replica."""
        super().on_send_request(replica_id)
        self._running[replica_id] += 1
        if self._chosen.get(replica_id):
            self._chosen[replica_id].popleft()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a request that has ended, well or not."""
        super().on_request_completed(replica_id, internal_request_id)
        self._running[replica_id] = max(0, self._running[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget the replicas that are gone."""
        super().update_replicas(replicas)
        there = {each.replica_id for each in replicas}
        for counts in (self._chosen, self._running, self._turns):
            for gone in [replica for replica in counts if replica not in there]:
                del counts[gone]
