"""A driver of its own for tests that kill it or its nodes: starts Ray, trains, prints the manifest's counts.

python -m tests.pipeline.tiny_driver STORAGE [section.key=value ...] [--nodes N] [--lose-node-after STEP]
"""

import argparse
import builtins
import json
import re
from typing import Any

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

    print_for_real = builtins.print

    def print_and_meddle(*words: Any, **rest: Any) -> None:
        print_for_real(*words, **rest)
        found = re.match(r"step +(\d+)/", str(words[0]) if words else "")
        step = int(found[1]) if found else -1
        if 0 <= options.lose_node_after <= step:
            options.lose_node_after = -1
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print_for_real("a node was lost", flush=True)
        if 0 <= options.gain_node_after <= step:
            options.gain_node_after = -1
            nodes.append(cluster.add_node(num_cpus=1))
            print_for_real("a node was gained", flush=True)

    builtins.print = print_and_meddle
    try:
        training = start_training(options.storage, *options.settings)
        print_for_real(json.dumps(training.manifest.counts), flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
