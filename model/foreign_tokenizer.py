"""Tokenizers of strangers: any byte-level BPE in a `tokenizer.json`, which the `tokenizers` library encodes.

Of such a vocabulary every token is known by its bytes, as of ours. It may lack bytes: what of a text has no token is
left out, as `transformers` does, and counted (`count_lost`). The names of special tokens are text in a text: only who
puts one there on purpose, as a chat template does, gets the token (`Tokenizer.split_special`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.vocabulary import STOP_FILES, TOKENIZER_FILE, SpecialToken, Tokenizer, written_bytes

MOST_TOKENS = 2**24
# What may stand before byte-level BPE without taking anything from a text.
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts")
# Of Metaspace and what else stands for SentencePiece in a `tokenizer.json`.
SENTENCE_PIECE = ("Metaspace", "Prepend", "Replace")
NO_SENTENCE_PIECE = "only byte-level BPE is read here, as GPT-2, Llama 3, Qwen and SmolLM2 have it"
# Of a folder that names no `eos_token`: what others call the end of a text.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>")
NAMED = ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def why_unreadable(folder: Path) -> str:
    """Say what a folder without a `tokenizer.json` has instead."""
    found = [name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()]
    if found:
        return f"{folder} has {found[0]}, a SentencePiece tokenizer; {NO_SENTENCE_PIECE}."
    if (folder / "vocab.json").is_file():
        return (
            f"There is no tokenizer.json in {folder}, which has vocab.json; write it with transformers:"
            f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )
    return f"There is no tokenizer.json in {folder}."


class ForeignTokenizer(Tokenizer):
    """A byte-level BPE that somebody else made."""

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        """`files` holds `tokenizer.json`, what stands beside it, and for `stop_tokens` the model's settings.

        Raises `ValueError` with one sentence where texts would not come back as they were, or would get other tokens
        than `transformers` gives them.
        """
        self._files = dict(files)
        self._where = where
        facts = json.loads(files[TOKENIZER_FILE])
        config = self._read("tokenizer_config.json")
        check_kind(facts, where)
        facts["truncation"] = facts["padding"] = facts["model"]["dropout"] = None
        self.name = str(config.get("tokenizer_class") or "bpe")
        added = {token["content"]: token for token in facts.get("added_tokens") or ()}
        named = {**self._named("special_tokens_map.json"), **self._named("tokenizer_config.json")}
        self._template_names = {name: text for name, text in named.items() if name in NAMED}
        known = facts["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
        self._check_added(config, known)
        for name in set(named.values()) & set(known):
            added.setdefault(name, {"id": known[name], "content": name})["special"] = True
        self.special_tokens = {
            name: SpecialToken(token["id"], *(bool(token.get(each)) for each in ("lstrip", "rstrip", "single_word")))
            for name, token in added.items()
            if token["special"]
        }
        self.token_bytes = _spell(known, added)
        # Bytes that its makers' sample had not, such as control characters; the library leaves them out of texts.
        self.missing_bytes = bytes(byte for byte, spelled in enumerate(written_bytes()) if spelled not in known)
        self.end_of_text = self._find_end(named, known)
        self.begin_of_text = known.get(named.get("bos_token", ""), self.end_of_text)
        self.stop_tokens = frozenset({self.end_of_text, *self._stop_ids()})
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(json.dumps([self.end_of_text, sorted(self.special_names)]).encode())
        self.digest = digest.hexdigest()
        # Without these the library would take a special token that only tokenizer_config.json calls so for text.
        present = {token["content"] for token in facts.get("added_tokens") or ()}
        facts["added_tokens"] = sorted(
            (_whole(added[name]) for name in added if name in present or added[name]["special"]),
            key=lambda token: token["id"],
        )
        self._content = json.dumps(facts, ensure_ascii=False)
        self._library  # noqa: B018  # what the library cannot read is said now

    def __reduce__(self) -> tuple[Any, ...]:
        return ForeignTokenizer, (self._files, self._where)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = []
        for text in texts:
            try:
                expected = len(self.spell(text))
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The text is not valid Unicode: character {error.start} is the lone surrogate"
                    f" U+{ord(error.object[error.start]):04X}."
                ) from None
            ids = np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=self.dtype)
            spelled = int(self.byte_lengths[ids].sum(dtype=np.int64))
            if spelled != expected:
                raise ValueError(
                    f"The tokenizer's tokens spell {spelled} of the {expected} bytes of a text that begins"
                    f" {text[:40]!r}; what is lost cannot be told."
                )
            encoded.append(ids)
        return encoded

    def spell(self, text: str) -> bytes:
        return self._normalise(text).encode().translate(None, self.missing_bytes)

    def count_lost(self, text: str) -> int:
        return len(self._normalise(text).encode()) - len(self.spell(text)) if self.missing_bytes else 0

    def _normalise(self, text: str) -> str:
        if self._library.normalizer is None or text.isascii():
            return text
        return str(self._library.normalizer.normalize_str(text))

    def files(self, max_length: int | None = None) -> dict[str, str]:
        """Return what was read, unchanged: a folder's special tokens and template are no affair of ours."""
        return {name: content.decode() for name, content in self._files.items() if name not in STOP_FILES}

    @cached_property
    def _library(self) -> Any:
        import tokenizers

        try:
            library = tokenizers.Tokenizer.from_str(self._content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"The tokenizer.json of {self._where} cannot be read: {error}.") from None
        library.encode_special_tokens = True  # their names in a text are text
        return library

    @property
    def template_names(self) -> dict[str, str]:
        return super().template_names | self._template_names

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._files.get(name, b"{}"))
        except ValueError as error:
            raise ValueError(f"The {name} of {self._where} is not JSON ({error}).") from None
        return found if isinstance(found, dict) else {}

    def _named(self, file: str) -> dict[str, str]:
        """Which names a file gives to which special tokens; those that have no role are numbered."""
        found = self._read(file)
        listed = {name: found.get(name) for name in NAMED}
        more = found.get("additional_special_tokens") or found.get("extra_special_tokens") or []
        more = more.values() if isinstance(more, dict) else more
        listed |= {f"additional {number}": token for number, token in enumerate(more)}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in listed.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def _check_added(self, config: Mapping[str, Any], known: Mapping[str, int]) -> None:
        """Refuse tokens that `transformers` would add from the settings beside `tokenizer.json`."""
        for token, about in (config.get("added_tokens_decoder") or {}).items():
            content = about.get("content") if isinstance(about, dict) else None
            if str(known.get(str(content))) != token:
                raise ValueError(
                    f"The tokenizer_config.json of {self._where} has the token {content!r} with id {token}, which its"
                    f" tokenizer.json has not; save it again with transformers, which puts it there."
                )

    def _find_end(self, named: Mapping[str, str], known: Mapping[str, int]) -> int:
        asked = named.get("eos_token")
        if asked is not None and asked not in known:
            raise ValueError(f"The tokenizer of {self._where} names {asked!r} as eos_token, which it has not.")
        found = [name for name in ([asked] if asked else USUAL_ENDS) if name in known]
        if not found:
            raise ValueError(
                f"The tokenizer of {self._where} has no token that ends a text; name it in tokenizer_config.json as"
                f" eos_token."
            )
        return known[found[0]]

    def _stop_ids(self) -> Iterator[int]:
        """What the model's settings say of the end of an answer."""
        for name in STOP_FILES:
            ends = self._read(name).get("eos_token_id")
            for end in ends if isinstance(ends, list) else [ends]:
                if isinstance(end, int) and 0 <= end < len(self.token_bytes):
                    yield end


def check_kind(facts: Any, where: str) -> None:
    """Raise `ValueError` unless a `tokenizer.json` holds a byte-level BPE that loses nothing of a text."""
    try:
        model = facts["model"]
        kind = model.get("type") or "BPE"
        vocabulary = model["vocab"]
        normalizers = list(_parts(facts.get("normalizer"), "normalizers"))
        pre_tokenizers = list(_parts(facts.get("pre_tokenizer"), "pretokenizers", whole=True))
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"The tokenizer.json of {where} is no tokenizer of the `tokenizers` library.") from None
    kinds = [part["type"] for part in pre_tokenizers]
    if model.get("byte_fallback") or set(SENTENCE_PIECE) & {*kinds, *normalizers}:
        raise ValueError(f"The tokenizer.json of {where} is a SentencePiece tokenizer; {NO_SENTENCE_PIECE}.")
    if kind != "BPE" or not isinstance(vocabulary, dict) or "ByteLevel" not in kinds:
        what = f"a {kind} tokenizer" if kind != "BPE" else "a BPE of characters"
        raise ValueError(f"The tokenizer.json of {where} is {what}; {NO_SENTENCE_PIECE}.")
    for name in (*normalizers, *kinds):
        if name not in (*NORMALIZERS, *PRE_TOKENIZERS):
            raise ValueError(f"The tokenizer.json of {where} has a {name}, not supported: texts would not come back.")
    for part in pre_tokenizers:
        if part.get("behavior") == "Removed" or part.get("add_prefix_space", part["type"] == "ByteLevel"):
            what = "add_prefix_space" if part["type"] == "ByteLevel" else "behavior=Removed"
            raise ValueError(
                f"The tokenizer.json of {where} has a {part['type']} with {what}, not supported: texts would not come"
                f" back as they were."
            )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"The tokenizer.json of {where} has {name}={model[name]!r}, not supported.")
    check_tokens(vocabulary, facts.get("added_tokens") or [], where)


def check_tokens(vocabulary: Mapping[str, Any], added: Any, where: str) -> None:
    """Raise `ValueError` for tokens that are none, or that would take a part of the text around them."""
    are_named = all(isinstance(token, dict) and token.get("content") for token in added)
    ids = [*vocabulary.values(), *(token.get("id") for token in added)] if are_named else []
    if not ids or not all(type(token) is int and 0 <= token < MOST_TOKENS for token in ids):
        raise ValueError(
            f"The tokenizer.json of {where} has tokens without a name, or ids that are not between 0 and"
            f" {MOST_TOKENS - 1:,}."
        )
    for token in added:
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            raise ValueError(
                f"The tokenizer.json of {where} has the token {token.get('content')!r}, which takes the white space"
                f" beside it (lstrip, rstrip), not supported: texts would not come back as they were."
            )


def _parts(facts: Any, inside: str, whole: bool = False) -> Iterator[Any]:
    """The steps of a normalizer or a pre-tokenizer, by their types or whole."""
    if facts is None:
        return
    if facts["type"] == "Sequence":
        for part in facts[inside]:
            yield from _parts(part, inside, whole)
    else:
        yield facts if whole else facts["type"]


def _spell(known: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]) -> list[bytes]:
    """Return the bytes of each id: of special tokens none, of others that were added their text."""
    byte_of = {character: byte for byte, character in enumerate(written_bytes())}
    token_bytes = [b""] * (max(known.values()) + 1)
    for spelled, token in known.items():
        if spelled in added:
            token_bytes[token] = b"" if added[spelled]["special"] else spelled.encode()
        elif all(character in byte_of for character in spelled):
            token_bytes[token] = bytes(byte_of[character] for character in spelled)
        else:
            token_bytes[token] = spelled.encode()  # as the library decodes what was not written in bytes
    return token_bytes


def _whole(token: Mapping[str, Any]) -> dict[str, Any]:
    """An added token with all that the library wants to know of it."""
    return {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), **token}
