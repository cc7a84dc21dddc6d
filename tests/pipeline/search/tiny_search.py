"""A search so small that each of its trainings takes seconds; as a program, for tests that kill it.

python -m tests.pipeline.search.tiny_search STORAGE [section.key=value ...] [--nodes N] [--lose-node]
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from pipeline.config import Config, load_config
from tests.conftest import ENVIRONMENT
from tests.pipeline.tiny_training import SETTINGS, WORDS

SPACE = (
    "search.space=[optimizer.muon_learning_rate = 0.00001 | 0.02]",
    "search.trial_tokens=1536",
    "model.width=48",  # three heads, so that there is a ladder below
    "model.num_heads=3",
    "search.seeds=2",
    "train.num_workers=1",
    "train.sample_prompts=[]",
    "evaluate.prompts=[]",
    "train.evaluate_every_steps=6",
)


def search_config(storage: str, *settings: str) -> Config:
    """A corpus of random words in a file of its own, and the smallest search over it."""
    text = Path(storage) / "text.jsonl"
    if not text.exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        drawn = random.Random(3)
        rows = [{"text": " ".join(drawn.choices(WORDS, k=drawn.randint(5, 40))) + "."} for _ in range(400)]
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = ("source.kind=files", f"source.paths=[{text}]", "tokenizer.vocabulary_size=300")
    held_out = ("prepare.validation_fraction=0.1",)
    return load_config(None, [f"storage={storage}", *SETTINGS, *corpus, *held_out, *SPACE, *settings])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("storage")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--nodes", type=int, default=0, help="so many raylets of one CPU beside the head")
    parser.add_argument("--lose-node", action="store_true", help="remove one at the first result")
    options = parser.parse_args()
    assert ENVIRONMENT

    import ray
    from ray.cluster_utils import Cluster

    from pipeline.search import study, tuning

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if options.nodes:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(options.nodes)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, **quiet)
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=True, **quiet)

    tell = tuning.Follow.on_trial_result

    def tell_and_lose(self: Any, *arguments: Any, **more: Any) -> None:
        tell(self, *arguments, **more)
        if options.lose_node:
            options.lose_node = False
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("a node was lost", flush=True)

    tuning.Follow.on_trial_result = tell_and_lose  # type: ignore[method-assign]
    try:
        manifest = study.run(search_config(options.storage, *options.settings))
        print(json.dumps(manifest.counts), flush=True)
    finally:
        ray.shutdown()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
