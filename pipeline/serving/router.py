"""Which replica gets a request: the one with the least under way, counting what was dealt out a moment ago.

Serve's own router compares the queues of two replicas as they last answered, so that a burst of eight that arrives
before any answer may all go to one of them. This one counts what it has chosen and sent itself. `pipeline/serve.py`
names it in the deployment; it runs in Serve's proxies.
"""

import asyncio
import itertools
import random
import time
from collections import Counter, deque
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

# A replica's count of its requests arrives later than it was made; what ended here meanwhile is still in it.
SECONDS_FROM_COUNT_TO_REPORT = 1.0
# What other proxies had sent to a replica is forgotten after so long without a new report, as Serve's router does.
SECONDS_OF_A_REPORT = 10.0


class LeastBusyRouter(RequestRouter):
    """Orders the replicas by requests under way; among equals the one comes first that was chosen longest ago."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._chosen: dict[asyncio.Future[Any], ReplicaID] = {}  # for requests that are not sent yet
        self._running: Counter[ReplicaID] = Counter()  # sent from here and not ended
        self._ended: dict[ReplicaID, deque[float]] = {}  # when requests from here ended, of the last second
        self._others: dict[ReplicaID, tuple[float, int]] = {}  # when it was reported, and requests of other proxies
        self._turns: dict[ReplicaID, int] = {}
        self._next_turn = itertools.count(1)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all replicas, each a rank of its own: the next is asked where one has no room."""
        is_first_look = False
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all are tried already; a hot loop finds no more
            # Where it is there, no replica had room for the request the last time.
            is_first_look = self._chosen.pop(pending_request.future, None) is None

        def rank(replica: ReplicaID) -> tuple[int, int, float]:
            # By chance among the never chosen: else the first request of every proxy would go to the same replica.
            return self.count_under_way(replica), self._turns.get(replica, 0), random.random()

        ranked = sorted(candidate_replicas, key=lambda each: rank(each.replica_id))
        if ranked and pending_request is not None:
            first = ranked[0].replica_id
            self._turns[first] = next(self._next_turn)
            self._chosen[pending_request.future] = first
            if is_first_look:
                # The future is done when a replica is found or the client has gone. The task that sends the request
                # waits for it since before this, so it wakes first: no moment counts neither choice nor sending.
                pending_request.future.add_done_callback(lambda done: self._chosen.pop(done, None))
        return [[each] for each in ranked]

    def count_under_way(self, replica: ReplicaID) -> int:
        """Count the replica's requests: what this proxy has sent or is about to, and what others had, as last heard."""
        heard, others = self._others.get(replica, (0.0, 0))
        if heard < time.monotonic() - SECONDS_OF_A_REPORT:
            others = 0
        return self._running[replica] + others + sum(chosen == replica for chosen in self._chosen.values())

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request that leaves for a replica."""
        super().on_send_request(replica_id)
        self._running[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a request that has ended, well or not."""
        super().on_request_completed(replica_id, internal_request_id)
        self._running[replica_id] = max(0, self._running[replica_id] - 1)
        self._ended.setdefault(replica_id, deque()).append(time.monotonic())
        self._forget_ended(replica_id)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Take from a replica's report what cannot be of this proxy: at least so many are of others."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        own = self._running[replica_id] + self._forget_ended(replica_id)
        self._others[replica_id] = (time.monotonic(), max(0, num_ongoing_requests - own))

    def _forget_ended(self, replica: ReplicaID) -> int:
        """Return how many requests have ended so lately that a report may still count them."""
        ended = self._ended.get(replica, deque())
        while ended and ended[0] < time.monotonic() - SECONDS_FROM_COUNT_TO_REPORT:
            ended.popleft()
        return len(ended)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget the replicas that are gone."""
        super().update_replicas(replicas)
        there = {each.replica_id for each in replicas}
        for counts in (self._running, self._ended, self._others, self._turns):
            for gone in [replica for replica in counts if replica not in there]:
                del counts[gone]
