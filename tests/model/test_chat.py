"""Conversations become the same tokens here and in `transformers`, and no message can pass for a marker."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.chat import CHAT_TEMPLATE, MARKER, ForeignTemplate, OwnTemplate, encode, open_template
from model.foreign_template import TemplateProcess
from model.pattern import O200K_PATTERN, PATTERNS
from model.tokenizer import END_OF_TEXT, Tokenizer, build_char, train_bpe

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a cape?"},
    {"role": "assistant", "content": "A sleeveless cloak."},
    {"role": "user", "content": "And a coat?"},
    {"role": "assistant", "content": "It has sleeves."},
]
CORPUS = ["".join(OwnTemplate().render(TALK).text), "don't stop 12345; (x) / y\r\n\n\tIndented — naïve 漢字"] * 4
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGED = [
    MARKER,
    END_OF_TEXT,
    f"{MARKER}assistant\n",
    "<|endoftext|<|endoftext|>",
    "<|chat",
    "<\\|chat|>",
    "\n",
    " ",
    "/",
]


@pytest.fixture(scope="module", params=["gpt2", "gpt4", "o200k", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "char":
        return build_char(CORPUS, 300)
    return train_bpe(CORPUS, 400, {**PATTERNS, "o200k": O200K_PATTERN}[request.param])


def contents() -> st.SearchStrategy[str]:
    usual = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    return st.lists(usual | st.sampled_from(FORGED), max_size=4).map("".join)


def talks() -> st.SearchStrategy[list[dict[str, str]]]:
    turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents()), min_size=1, max_size=6)
    system = st.lists(contents().map(lambda content: ("system", content)), max_size=1)
    return st.tuples(system, turns).map(
        lambda parts: [{"role": role, "content": content} for role, content in (*parts[0], *parts[1])]
    )


def theirs(tokenizer: Tokenizer, folder: Path, template: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = template
    return loaded


def test_ids_and_mask_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = theirs(tokenizer, tmp_path, CHAT_TEMPLATE)
    template = OwnTemplate()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(talks(), st.booleans())
    def compare(messages: list[dict[str, str]], ask: bool) -> None:
        found = loaded.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True, add_generation_prompt=ask
        )
        ids, spoken = encode(tokenizer, template.render(messages, ask))
        assert ids.tolist() == found["input_ids"]
        assert spoken.astype(int).tolist() == found["assistant_masks"]

    compare()


def test_what_the_assistant_speaks_ends_with_the_end_of_text(tokenizer: Tokenizer) -> None:
    ids, spoken = encode(tokenizer, OwnTemplate().render(TALK))
    assert tokenizer.decode(ids[spoken]) == "A sleeveless cloak.It has sleeves."
    assert ids[spoken][-1] == tokenizer.end_of_text
    assert (ids == tokenizer.end_of_text).sum() == 2


@settings(max_examples=200, deadline=None)
@given(contents(), st.sampled_from(["user", "assistant", "system"]))
def test_no_message_holds_a_marker(content: str, role: str) -> None:
    text = OwnTemplate().render([{"role": role, "content": content}]).text
    assert text.count(MARKER) == 1
    assert text.count(END_OF_TEXT) == (role == "assistant")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(answer=contents())
def test_an_answer_has_the_same_tokens_read_and_written(tokenizer: Tokenizer, answer: str) -> None:
    """What is asked is a prefix of what is learnt, token by token: also where an answer begins with a slash."""
    asked, _ = encode(tokenizer, OwnTemplate().render(TALK[:2], ask=True))
    learnt, spoken = encode(tokenizer, OwnTemplate().render([*TALK[:2], {"role": "assistant", "content": answer}]))
    assert learnt[: len(asked)].tolist() == asked.tolist()
    assert not spoken[: len(asked)].any()
    assert spoken[len(asked) :].all()


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one message"),
        ([{"role": "tool", "content": ""}], "'tool' is unknown"),
        ([TALK[1], TALK[0]], "only be the first"),
        ([TALK[0], TALK[0]], "only be the first"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[dict[str, str]], sentence: str, tmp_path: Path) -> None:
    for template in (OwnTemplate(), ForeignTemplate(CHATML, {})):
        with pytest.raises(ValueError, match=sentence):
            template.render(messages)
    if messages:  # as strictly where `transformers` renders it
        loaded = theirs(build_char(CORPUS, 300), tmp_path, CHAT_TEMPLATE)
        with pytest.raises(Exception, match="Roles are"):
            loaded.apply_chat_template(messages)


def test_a_text_without_tokens_is_none() -> None:
    ids, spoken = encode(build_char(CORPUS, 300), ForeignTemplate("", {}).render(TALK))
    assert len(ids) == len(spoken) == 0


# Templates of others.


def test_our_template_is_rendered_alike_as_text() -> None:
    special = {"eos_token": END_OF_TEXT}
    sandboxed = ForeignTemplate(CHAT_TEMPLATE, special)
    assert isinstance(open_template(CHAT_TEMPLATE, special), OwnTemplate)
    for messages, ask in ((TALK, False), (TALK[:4], True)):
        assert sandboxed.render(messages, ask) == OwnTemplate().render(messages, ask)


def test_an_answer_is_what_a_foreign_template_gains_with_it(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 400)
    rendered = open_template(CHATML).render(TALK)
    assert [rendered.text[start:stop] for start, stop in rendered.spoken] == [
        "A sleeveless cloak.<|im_end|>\n",
        "It has sleeves.<|im_end|>\n",
    ]
    loaded = theirs(tokenizer, tmp_path, CHATML)
    ids, _ = encode(tokenizer, rendered)
    assert ids.tolist() == loaded.apply_chat_template(TALK)["input_ids"]
    asked, _ = encode(tokenizer, open_template(CHATML).render(TALK[:2], ask=True))
    assert asked.tolist() == loaded.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]


def test_a_template_that_rewrites_earlier_turns_must_mark_what_is_spoken() -> None:
    last_alone = "{% for m in messages %}{{ m.role if loop.last else '' }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        ForeignTemplate(last_alone, {}).render(TALK)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within 0.5 s"),
        ("{{ 'x' * 10 ** 10 }}", "too much memory"),
        ("{{ '%09999999999d' % 1 }}", "too much memory"),
        ("{{ 10 ** (10 ** 10) }}", "did not end within 0.5 s|memory"),
        ("{{ 'x' * 10 ** 7 }}", "writes 10,000,000 characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('Not like this.') }}", "Not like this"),
        ("{% for %}", "is not one"),
        ("{{ strftime_now('%d') }}", "undefined"),
    ],
)
def test_a_template_is_bounded_in_what_it_may_do(template: str, sentence: str) -> None:
    foreign = ForeignTemplate(template, {})
    foreign._process = TemplateProcess(template, {}, seconds=0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match=sentence):
        foreign.render(TALK[:2], ask=True)
    assert time.monotonic() - began < 50


def test_after_a_stop_the_next_conversation_is_rendered() -> None:
    foreign = ForeignTemplate("{% for a in range(messages[0].content | int) %}{{ 'x' * 1000000 }}{% endfor %}", {})
    with pytest.raises(ValueError, match=r"memory|within"):
        foreign.render([{"role": "user", "content": "99999"}], ask=True)
    assert len(foreign.render([{"role": "user", "content": "1"}], ask=True).text) == 1_000_000


def test_what_a_mark_looks_like_cannot_be_known() -> None:
    template = ForeignTemplate("{% generation %}{{ messages[0].content }}{% endgeneration %}!", {})
    rendered = template.render([{"role": "assistant", "content": "\0(\0)"}])
    assert (rendered.text, rendered.spoken) == ("\0(\0)!", ((0, 4),))
    assert np.array_equal(encode(build_char([], 257), rendered)[1], [True] * 4 + [False])
