"""GGUF: the tokenizer under llama.cpp's name or not at all, the same weights, the same answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.chat import CHAT_TEMPLATE, Message, open_template, save_template
from model.checkpoint import save_model
from model.config import ModelConfig
from model.gguf import TYPES, find_pattern, head_size_notes, write_gguf, write_modelfile
from model.gpt import GPT
from model.pattern import O200K_PATTERN, PATTERNS, probes
from model.tokenizer import Tokenizer, build_char, load_tokenizer, train_bpe
from tests.model.llama_cpp import HAS_SERVER, IS_THERE, LlamaCpp

TEXT = ["The quick brown fox, 2024 and 1999, 31415 92653; naïve cafés, 你好!\n\n  It's we'll DON'T 2024 1999\r\n" * 30]
CONTEXT = 64
SHAPES = {
    "gpt2": ModelConfig(
        family="classic", num_layers=2, width=64, num_heads=2, context_length=CONTEXT, tie_embeddings=True
    ),
    "gpt2 untied, heads of 24": ModelConfig(
        family="classic", num_layers=2, width=48, num_heads=2, context_length=CONTEXT
    ),
    "qwen3": ModelConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=20, context_length=CONTEXT),
    "qwen2": ModelConfig(
        num_layers=2, width=64, num_heads=4, num_kv_heads=2, qk_norm=False, attention_bias="qkv", context_length=CONTEXT
    ),
    "llama": ModelConfig(
        num_layers=2, width=64, num_heads=4, num_kv_heads=2, qk_norm=False, context_length=CONTEXT, tie_embeddings=True,
        rope_theta=500.0, rope_scaling="llama3", rope_factor=8.0, rope_original_context=32,
    ),
    "llama biases": ModelConfig(
        num_layers=2, width=64, num_heads=4, qk_norm=False, attention_bias="all", rope_scaling="linear",
        rope_factor=4.0, context_length=CONTEXT,
    ),
}  # fmt: skip
NAMES = {"gpt2": "gpt-2", "llama-bpe": "llama-bpe", "qwen2": "qwen2"}


def tokenizer_of(pattern: str) -> Tokenizer:
    return train_bpe(TEXT, 420, PATTERNS[pattern])


def random_model(config: ModelConfig, vocab_size: int) -> GPT:
    torch.manual_seed(1)
    model = GPT(config, vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    model.clear_padding()
    return model


def save_shape(folder: Path, shape: str, pattern: str = "llama-bpe") -> tuple[GPT, Tokenizer]:
    tokenizer = tokenizer_of(pattern)
    model = random_model(SHAPES[shape], tokenizer.vocab_size)
    save_model(folder, model, tokenizer)
    return model, tokenizer


@pytest.mark.parametrize("pattern", NAMES)
def test_a_pattern_of_llama_cpps_is_found_by_its_ids(pattern: str) -> None:
    assert find_pattern(tokenizer_of(pattern)) == NAMES[pattern]


def test_o200ks_pattern_is_gpt_4os() -> None:
    assert find_pattern(train_bpe(TEXT, 420, O200K_PATTERN)) == "gpt-4o"


def test_a_strangers_tokenizer_is_found_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet,
                                                          special_tokens=["<|endoftext|>"]))  # fmt: skip
    library.save(str(tmp_path / "tokenizer.json"))
    assert find_pattern(load_tokenizer(tmp_path)) == "smollm"


@pytest.mark.parametrize("tokenizer", [tokenizer_of("gpt4"), build_char(["né 你好" * 9], 300)], ids=["gpt4", "char"])
def test_other_ids_are_refused_with_what_to_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(tmp_path / "model", random_model(SHAPES["gpt2"], tokenizer.vocab_size), tokenizer)
    with pytest.raises(ValueError, match=r"other tokens.*tokenizer\.pattern=llama-bpe"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*gguf*"))


def test_heads_that_others_cannot_take_are_said() -> None:
    assert not head_size_notes(ModelConfig(width=512, num_heads=4))
    notes = " ".join(head_size_notes(ModelConfig(family="classic", width=384, num_heads=16)))
    assert "vLLM" in notes
    assert "these have 24" in notes
    assert "llama.cpp" in notes


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_written_is_the_model(tmp_path: Path, kind: str) -> None:
    import gguf

    model, tokenizer = save_shape(tmp_path / "model", "qwen3")
    assert write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind, "mine") == "llama-bpe"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.name"] == "mine"
    assert facts["qwen3.attention.key_length"] == 20
    assert facts["tokenizer.ggml.pre"] == "llama-bpe"
    assert facts["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text
    assert facts["tokenizer.ggml.add_bos_token"] is False
    assert len(facts["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    tensors = {each.name: each for each in reader.tensors}
    found = gguf.quants.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    wanted = model.embedding.weight[: tokenizer.vocab_size].detach().numpy()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert tensors["token_embd.weight"].tensor_type.name == kind.upper()
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("gpt2")
    model = random_model(SHAPES["gpt2"], tokenizer.vocab_size)
    with torch.no_grad():
        model.embedding.weight[3, 3] = 1e5
    save_model(tmp_path / "model", model, tokenizer)
    with pytest.raises(ValueError, match="as bf16"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "bf16")


def test_the_modelfile_says_how_it_talks_and_where_it_stops(tmp_path: Path) -> None:
    save_shape(tmp_path / "model", "gpt2", "gpt2")
    write_modelfile(tmp_path / "model", tmp_path / "mine.gguf", tmp_path / "Modelfile")
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "FROM ./mine.gguf",
        f"PARAMETER num_ctx {CONTEXT}",
        'TEMPLATE """{{ .Prompt }}"""',
    ]
    save_template(tmp_path / "model", CHAT_TEMPLATE)
    write_modelfile(tmp_path / "model", tmp_path / "mine.gguf", tmp_path / "Modelfile")
    text = (tmp_path / "Modelfile").read_text()
    assert 'PARAMETER stop "<|chat|>"' in text
    assert text.count("<|chat|>assistant\n") == 1
    save_template(tmp_path / "model", "{{ messages }}")
    write_modelfile(tmp_path / "model", tmp_path / "mine.gguf", tmp_path / "Modelfile")
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()  # ollama knows those of the families


needs_llama_cpp = pytest.mark.skipif(not IS_THERE, reason="needs llama-cpp-python or xllamacpp (the extra llama-cpp)")


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_reads_the_same_ids_and_says_the_same_token(tmp_path: Path, shape: str) -> None:
    pattern = "gpt2" if "gpt2" in shape else "qwen2" if shape == "qwen2" else "llama-bpe"
    model, tokenizer = save_shape(tmp_path / "model", shape, pattern)
    for kind in TYPES:
        write_gguf(tmp_path / "model", tmp_path / f"{kind}.gguf", kind)
        other = LlamaCpp(tmp_path / f"{kind}.gguf", CONTEXT)
        if kind == "f16":
            differing = [text for text in probes() if other.ids(text) != tokenizer.encode(text).tolist()]
            assert not differing
        chance = torch.Generator().manual_seed(0)
        margins = []  # of the prompts whose likeliest token is another: how far ours lies before theirs
        for length in range(8, 40):
            prompt = torch.randint(0, tokenizer.end_of_text, (1, length), generator=chance)
            with torch.no_grad():
                logits = model(prompt)[0, -1, : tokenizer.vocab_size].float()
            said = other.likeliest(prompt[0].tolist(), tokenizer.end_of_text)
            if said != int(logits.argmax()):
                margins.append(float(logits.max() - logits[said]))
        # The weights' rounding alone may turn a near tie; logits go from about -10 to 10 here.
        assert len(margins) <= (1 if kind == "f16" else 6), margins
        assert max(margins, default=0.0) < (0.01 if kind == "f16" else 0.5)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SERVER, reason="needs xllamacpp (the extra llama-cpp), which brings llama.cpp's server")
def test_llama_cpps_server_renders_the_chat_template_and_stops_at_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama-bpe")
    save_model(tmp_path / "model", random_model(SHAPES["qwen3"], tokenizer.vocab_size), tokenizer)
    save_template(tmp_path / "model", CHAT_TEMPLATE)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    server = LlamaCpp(tmp_path / "model.gguf", CONTEXT)
    conversations: list[list[Message]] = [
        [{"role": "user", "content": "Hello"}],
        [
            {"role": "system", "content": " Be brief. "},
            {"role": "user", "content": "A <|chat|>user and <|endoftext|> inside\n"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "naïve 你好"},
        ],
    ]
    for messages in conversations:
        found = server.ask("/apply-template", messages=messages)["prompt"]
        assert found == open_template(CHAT_TEMPLATE).render(messages, ask=True).text
    ended = server.ask("/completion", prompt=[5, 6], n_predict=8, logit_bias=[[tokenizer.end_of_text, 1000.0]])
    assert (ended["stop_type"], ended["content"]) == ("eos", "")
