"""What a training is scored on: answers first, the base's text beside them, and whether answers end by themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.chat import OwnTemplate, encode
from model.config import ModelConfig
from model.gpt import GPT
from model.scoring import score_batches
from model.training import LossModule
from pipeline.artifacts import Artifact
from pipeline.config import StreamConfig, TrainConfig
from pipeline.corpus.members import Member, note_members
from pipeline.training.samples import ask, share_that_ends, write_samples
from pipeline.training.validation import HeldOut, find_questions, open_base_text, open_validation, score_held_out
from tests.pipeline.corpus.test_mixing import CONTEXT, make_members
from tests.pipeline.corpus.test_packing import TOKENIZER

MODEL = ModelConfig(num_layers=1, width=16, num_heads=2, context_length=CONTEXT)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    made = GPT(MODEL, TOKENIZER.vocab_size)
    torch.nn.init.normal_(made.head.weight, std=0.5)
    return made.eval()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    return make_members(tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def mix(members: list[Member]) -> Artifact:
    folder = Path(members[0].shards.url).parent
    named = [
        Member(each.name, each.share, Artifact(each.shards.url, "prepare", Path(each.shards.url).name[8:]))
        for each in members
    ]
    for each in named:  # their fingerprints are those of their folders
        manifest = each.shards.any_manifest()
        assert manifest is not None
        each.shards.commit(manifest.counts, manifest.files)
    made = Artifact(str(folder / "prepare-all"), "prepare", "a" * 20)
    made.commit({"mix": note_members(named)}, {})
    return made


def held_out_of(shards: Artifact, tmp_path: Path, base_text: str = "") -> list[HeldOut]:
    train = TrainConfig(base_text=base_text)
    stream = StreamConfig(cache_folder=str(tmp_path / "cache"))
    return open_validation(shards, MODEL, train, stream, batch_sequences=4, max_tokens=0)


def test_answers_decide_and_the_texts_of_the_mix_say_what_is_forgotten(
    model: GPT, mix: Artifact, tmp_path: Path
) -> None:
    held_out = held_out_of(mix, tmp_path)
    found = score_held_out(LossModule(model), held_out, TOKENIZER.byte_lengths, precision=torch.float32)
    alone = {
        each.name: score_batches(LossModule(model), each.stream.batches(), TOKENIZER.byte_lengths) for each in held_out
    }
    assert found.sources == alone
    assert found.score == alone["chat"]
    assert found.base is not None
    assert found.base.nats == alone["base"].nats + alone["notes"].nats
    assert found.base.num_bytes == alone["base"].num_bytes + alone["notes"].num_bytes == 2 * 3 * 99


def test_a_named_text_is_scored_beside_the_answers(
    model: GPT,
    mix: Artifact,
    members: list[Member],
    tmp_path: Path,
) -> None:
    chat, _, notes = (Artifact(each.shards.url, "prepare", Path(each.shards.url).name[8:]) for each in members)
    found = score_held_out(
        LossModule(model), held_out_of(chat, tmp_path, notes.url), TOKENIZER.byte_lengths, precision=torch.float32
    )
    assert found.sources == {}
    assert found.base is not None
    assert found.base.num_bytes == 3 * 99
    text_alone = score_held_out(
        LossModule(model), held_out_of(notes, tmp_path), TOKENIZER.byte_lengths, precision=torch.float32
    )
    assert (text_alone.base, text_alone.score) == (None, found.base)


def test_a_base_text_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train.base_text=.* holds no token shards"):
        open_base_text(str(tmp_path))
    made = Artifact(str(tmp_path / "prepare-x"), "prepare", "x")
    made.commit({"val": {"tokens": 5}, "tokenizer_digest": "other"}, {})
    assert open_base_text(made.url, "other") == made
    with pytest.raises(ValueError, match="another tokenizer"):
        open_base_text(made.url, "this")


def test_questions_are_what_stands_before_the_first_answer(mix: Artifact, tmp_path: Path) -> None:
    held_out = held_out_of(mix, tmp_path)
    questions = find_questions(held_out, 5, 20)
    assert len(questions) == 5
    for question in questions:
        text = TOKENIZER.decode(np.array(question, TOKENIZER.dtype))
        assert text.startswith("<|chat|>user\n")
        assert text.endswith("<|chat|>assistant\n")
        assert text.count("<|chat|>") == 2
        assert len(question) <= CONTEXT - 20
    assert find_questions(held_out, 5, 20) == questions
    assert len(find_questions(held_out, 1000, 20)) == 12
    assert (
        find_questions(held_out, 0, 20)
        == find_questions([each for each in held_out if each.name != "chat"], 5, 9)
        == []
    )


def that_says(token: int) -> GPT:
    """A model that says one token, whatever it is told."""
    model = GPT(MODEL, TOKENIZER.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        model.embedding.weight[:, 0] = 1.0
        model.head.weight[token, 0] = 9.0
    return model


def test_answers_that_end_by_themselves_are_counted() -> None:
    questions = [[65, 66], [67], [65] * (CONTEXT - 2)]
    told = {"num_tokens": 5, "seed": 1, "precision": torch.float32}
    assert share_that_ends(that_says(TOKENIZER.end_of_text), TOKENIZER, questions, **told) == 1.0
    model = that_says(70).train()
    assert share_that_ends(model, TOKENIZER, questions, **told) == 0.0
    assert model.training


def test_prompts_are_asked_as_questions_where_conversations_were_learnt(model: GPT) -> None:
    template, told = OwnTemplate(), (6, 3, torch.float32)
    asked = ask(TOKENIZER, template, "Why?")
    assert asked == encode(TOKENIZER, template.render([{"role": "user", "content": "Why?"}], ask=True))[0].tolist()
    answers = write_samples(model, TOKENIZER, ["Why?", "Who?"], *told, template)
    rendered = TOKENIZER.decode(np.array(asked, TOKENIZER.dtype))
    assert list(answers) == ["Why?", "Who?"]
    assert answers["Why?"] == write_samples(model, TOKENIZER, [rendered], *told)[rendered]
