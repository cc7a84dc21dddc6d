from pipeline.config import SourceConfig
from pipeline.corpus import python_questions
from pipeline.corpus.conversations import parse_document
from pipeline.corpus.files import fingerprint_source, slices
from pipeline.corpus.formats import read

SOURCE = '''"""A module."""

def first(a: int,
          b: str = ":") -> dict[str, int]:
    """Return the first of two, e.g. an int.  A second sentence.

    More of it.
    """
    def inner():
        """Nobody can call this one from outside."""

def without(): ...

def _private():
    """Only this file may call this one."""

class Shape(Base):
    r"""A shape with an area"""

    async def area(self):
        """Measure the ``area`` of the shape (in square metres)."""

    def cut(self):
        """Cut it (e.g. in two. Or three)."""

    class _Hidden:
        def method(self):
            """Nobody can see this one."""

def last(): """Too far from the colon's line end to be asked about."""
'''


def test_public_names_come_with_the_first_sentence_about_them() -> None:
    assert dict(python_questions._definitions_of("a.b", SOURCE)) == {
        "a.b.first": "Return the first of two, e.g. an int.",
        "a.b.Shape": "A shape with an area.",
        "a.b.Shape.area": "Measure the `area` of the shape (in square metres).",
    }


def test_names_that_would_fill_the_context_are_left_out() -> None:
    module = "m" * python_questions.MOST_NAME_CHARACTERS
    assert list(python_questions._definitions_of(module, SOURCE)) == []


def test_there_are_thousands_on_every_machine_and_each_is_a_conversation() -> None:
    source = SourceConfig(kind="python-questions")
    assert source.holds_conversations
    (only,) = slices(source, 10**6)
    documents = [text for text, _ in read(only, source)]
    assert len(documents) > 3000
    assert len(set(documents)) == len(documents)
    for document in documents[:200]:
        asked, answered = parse_document(str(document))
        name = asked["content"].split("`")[1]
        assert answered["content"].startswith(f"`{name}`: ")
        assert answered["content"].endswith(".")
    assert fingerprint_source(source) != fingerprint_source(SourceConfig())
