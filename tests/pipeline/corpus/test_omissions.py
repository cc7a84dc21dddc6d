"""What does not reach the shards is said, in one line, and warned of where it is much."""

from collections import Counter

from pipeline.corpus import cleaning
from pipeline.corpus.endings import File
from pipeline.corpus.files import Listing
from pipeline.corpus.omissions import Omissions, warn_of_share

READ = tuple(File(f"/corpus/{number}.txt", 1) for number in range(20))


def test_reasons_come_in_one_line_the_most_frequent_first() -> None:
    omissions = Omissions(kept=90, dropped=Counter({"empty": 2, "not JSON": 8}), replaced=3)
    listing = Listing(READ, {".docx": 2, ".pdf": 7})
    assert omissions.reasons(listing) == (
        "dropped 10: 8 not JSON, 2 empty; 3 kept with characters replaced that are not valid UTF-8;"
        " files not read: 7 .pdf, 2 .docx"
    )
    assert Omissions(kept=5).reasons(Listing(READ)) == ""


def test_a_warning_comes_from_a_twentieth_on() -> None:
    assert Omissions(kept=95, dropped=Counter({"not JSON": 5})).warnings(Listing(READ)) == []
    (warning,) = Omissions(kept=94, dropped=Counter({"not JSON": 3}), replaced=3).warnings(Listing(READ))
    assert warning.startswith("6.2% of the documents were lost or have replaced characters (dropped 3: 3 not JSON;")
    assert Omissions(kept=9).warnings(Listing(READ, {".csv": 1})) == []
    (warning,) = Omissions(kept=9).warnings(Listing(READ, {".csv": 2}))
    assert warning == "2 of 22 files were not read, because of their endings: 2 .csv."
    assert Omissions().warnings(Listing()) == []


def test_what_was_asked_for_is_warned_of_where_it_is_most() -> None:
    for reason in (cleaning.LOW_QUALITY, cleaning.EXACT):
        assert Omissions(kept=50, dropped=Counter({reason: 50})).warnings(Listing(READ)) == []
    (warning,) = Omissions(kept=3, dropped=Counter({cleaning.LOW_QUALITY: 97})).warnings(Listing(READ))
    assert warning == (
        "97.0% of the documents were dropped: not English prose. prepare.quality_filter knows English prose alone."
    )


def test_documents_are_counted_as_they_are_read() -> None:
    omissions = Omissions()
    for document in [("a", ""), (" \n", ""), (None, "not JSON"), ("b\ufffd", "replaced UTF-8")]:
        omissions.count(document)
    assert omissions == Omissions(kept=2, dropped=Counter({"empty": 1, "not JSON": 1}), replaced=1)


def test_a_share_that_chance_does_not_explain_is_warned_of_with_the_fraction_to_set() -> None:
    [warning] = warn_of_share(141, 2572, 0.02)
    assert warning.startswith(
        "141 of 2,572 documents (5.48%) are held out, where prepare.validation_fraction asks for 2.00%"
    )
    assert warning.endswith("For 2.00% set prepare.validation_fraction=0.0073.")


def test_a_share_that_chance_explains_is_not_warned_of() -> None:
    assert warn_of_share(61, 2572, 0.02) == []
    assert warn_of_share(1, 3, 0.1) == []  # so few that the lowest hash was held out
    assert warn_of_share(1, 1000, 0.999999) == []  # one had to stay


def test_no_fraction_is_advised_that_there_is_not() -> None:
    [warning] = warn_of_share(20, 1000, 0.5)
    assert warning.endswith("or repeats documents.")
