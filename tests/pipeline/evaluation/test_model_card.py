"""The card says what is known, in the order in which it is asked, and nothing of what is not."""

import yaml

from pipeline.config import load_config
from pipeline.evaluation.model_card import LONGEST_DESCRIPTION, Facts, summarise_card, write_card

SPLIT = {"documents": 1200, "bytes": 500_000, "tokens": 120_000}
TASK = {
    "headline": "acc",
    "chance": 0.5,
    "metrics": {
        "acc": {"value": 0.61, "standard_error": 0.02, "n": 600},
        "bits_per_byte": {"value": 1.2, "standard_error": None, "n": 600},
    },
}
FACTS = Facts(
    load_config("demo", ["prepare.decontaminate=[blimp]", "optimizer.muon_learning_rate=0.03"]),
    trained={
        "num_parameters": 3_400_000,
        "steps": 170,
        "precision": "float32",
        "device": "cpu",
        "seconds": {"compute": 90.0, "startup": 30.0},
        "bits_per_byte": 1.9,
    },
    prepared={
        "train": SPLIT,
        "val": SPLIT,
        "tokenizer": "bpe",
        "vocabulary_size": 2048,
        "bytes_per_token": 3.91,
        "decontaminated": {"blimp": {"documents": 3, "items": 67_000, "short_items": 60_000}},
    },
    evaluation={
        "bits_per_byte": 1.8765,
        "tokens": 131_072,
        "bytes": 512_000,
        "tasks": {"blimp": TASK},
        "samples": [{"prompt": "Return a new", "text": " list. ```<script>"}],
    },
    data_digest="d" * 20,
    training_digest="t" * 20,
)


def test_the_card_says_data_recipe_score_tasks_and_samples() -> None:
    card = write_card(FACTS)
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == ["## Data", "## Recipe", "## Score", "## Tasks", "## Samples", "## Use"]
    assert "3,400,000 parameters: 4 blocks of width 192, 128 tokens of context. Opens as Qwen3." in card
    assert "| train | 1,200 | 500,000 | 120,000 |" in card
    assert "Without the documents that hold items of blimp (3 documents)." in card
    assert (
        "170 steps of 4,096 tokens; muon, learning rate 0.03, linear; seed 1337; in float32 on a CPU; 2.0 minutes."
        in card
    )
    assert "optimizer.muon_learning_rate: 0.03" in card
    assert "1.8765 bits per byte of held-out text over 131,072 tokens (512,000 bytes)." in card
    assert "| blimp | acc | 0.6100 | 0.0200 | 600 | 0.5000 |" in card
    assert "| blimp | bits_per_byte | 1.2000 |  | 600 |  |" in card
    assert "Return a new list. '''<script>" in card, "a sample cannot end its own quotation"


def test_the_hub_reads_the_cards_head() -> None:
    _, head, _ = write_card(FACTS).split("---\n", 2)
    [model] = yaml.safe_load(head)["model-index"]
    assert model["name"] == "demo"
    [result] = model["results"]
    assert result["dataset"]["name"] == "blimp"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"acc": 0.61, "bits_per_byte": 1.2}


def test_what_is_not_known_has_no_section() -> None:
    card = write_card(Facts(load_config("demo"), trained={"bits_per_byte": 1.9}))
    assert "## Tasks" not in card
    assert "## Samples" not in card
    assert "1.9000 bits per byte of held-out text, as the training measured it." in card
    assert "model-index" not in card


def test_a_description_fits_mlflows_database() -> None:
    described = summarise_card(write_card(FACTS))
    assert described.startswith("# demo")
    long = Facts(FACTS.config, FACTS.trained, FACTS.prepared, {"tasks": {f"task{n}": TASK for n in range(300)}})
    cut = summarise_card(write_card(long))
    assert len(cut) <= LONGEST_DESCRIPTION
    assert cut.endswith("… the rest is in the model's README.md.\n")
