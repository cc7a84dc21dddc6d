"""A driver of its own for tests that kill it or its nodes: starts Ray, trains, prints the manifest's counts.

python -m tests.pipeline.tiny_driver STORAGE [section.key=value ...] [--nodes N] [--lose-node-after STEP]
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tests.conftest import ENVIRONMENT


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("storage")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--nodes", type=int, default=0, help="so many raylets of one CPU beside the head")
    parser.add_argument("--lose-node-after", type=int, default=-1, metavar="STEP")
    parser.add_argument("--gain-node-after", type=int, default=-1, metavar="STEP")
    options = parser.parse_args()
    assert ENVIRONMENT

    import ray
    from ray.cluster_utils import Cluster

    from tests.pipeline.tiny_training import start_training

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if options.nodes:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(options.nodes)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, **quiet)
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=True, **quiet)

    def meddle(step: int) -> None:
        if 0 <= options.lose_node_after <= step:
            options.lose_node_after = -1
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("a node was lost", flush=True)
        if 0 <= options.gain_node_after <= step:
            options.gain_node_after = -1
            nodes.append(cluster.add_node(num_cpus=1))
            print("a node was gained", flush=True)

    sys.stdout = Watched(sys.stdout, meddle)  # not `print`, which Ray replaces too
    try:
        training = start_training(options.storage, *options.settings)
        print(json.dumps(training.manifest.counts), flush=True)
    finally:
        ray.shutdown()


class Watched(io.TextIOBase):
    """A stream that tells of every step that is printed."""

    def __init__(self, stream: TextIO, tell: Callable[[int], None]) -> None:
        self._stream = stream
        self._tell = tell

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        found = re.match(r"step +(\d+)/", text)
        if found:
            self._stream.write("\n")
            self._tell(int(found[1]))
        return written

    def flush(self) -> None:
        self._stream.flush()


if __name__ == "__main__":
    main()
