"""Anybody's weights: read from a folder of `transformers`, computed the same, and written back in their family."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import export_weights, load_model, save_model
from model.config import ModelConfig, OptimizerConfig
from model.engine import Engine, EngineSettings, GenerationRequest, SamplingSettings
from model.families import family_of, load_config
from model.gpt import count_parameters
from model.likelihood import Request, score
from model.optimizer import Optimizer
from model.tokenizer import load_tokenizer
from tests.model.tiny_folders import CONTEXT, SHAPES, VOCABULARY, random_theirs, write_folder
from tests.model.tiny_tokenizers import write_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tokens(batch: int = 2, length: int = CONTEXT) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_theirs_and_so_are_those_of_the_folder_written_back(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = write_folder(tmp_path / "theirs", shape)
    ours = load_model(tmp_path / "theirs")
    expected = theirs(random_tokens()).logits
    assert expected.std() > 0.5, "a model that says nothing would pass"
    torch.testing.assert_close(ours(random_tokens()), expected, atol=1e-4, rtol=1e-4)
    assert count_parameters(ours.config, ours.vocab_size) == sum(part.numel() for part in theirs.parameters())

    save_model(tmp_path / "back", ours)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(theirs)
    assert torch.equal(back(random_tokens()).logits, expected)
    written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    for name, (before, after) in merged(*written).items():
        assert before == after, name


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What both files say, side by side."""
    apart = {"dtype", "transformers_version", "bos_token_id", "eos_token_id", "attn_pdrop", "n_inner"}
    return {name: (before[name], after[name]) for name in set(before) & set(after) - apart}


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_theirs(shape: str, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, shape).train(False)
    ours = load_model(tmp_path)
    tokens = random_tokens(1)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    our_loss = ours.loss(tokens, targets) / (targets != -100).sum()
    their_loss = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(our_loss, their_loss, atol=1e-4, rtol=1e-4)
    our_loss.backward()
    their_loss.backward()
    for mine in ours.parameters():
        mine.data = mine.grad
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in export_weights(ours).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_weight_of_a_start_learns(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path, "llama biases")
    model = load_model(tmp_path)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(kind=kind), total_steps=4)
    tokens = random_tokens()
    model.loss(tokens, tokens.roll(-1, dims=1)).backward()
    optimizer.step(1)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_generates_what_transformers_generates(shape: str, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, shape)
    ours = load_model(tmp_path)
    prompt = random_tokens(1, 11)
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    for backend in ("torch", "auto"):  # auto: the kernel, where there is a compiler
        engine = Engine(ours, LettersOnly(), EngineSettings(2, weights="float32", backend=backend))
        engine.add(GenerationRequest("a", prompt[0].tolist(), SamplingSettings(max_tokens=40, temperature=0)))
        tokens: list[int] = []
        while engine.has_work:
            tokens += [token for chunk in engine.step() for token in chunk.tokens]
        assert tokens == expected[11:].tolist(), backend


@pytest.mark.parametrize("shape", ["llama3", "qwen2", "gpt2"])
def test_likelihoods_are_theirs(shape: str, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, shape)
    tokens = random_tokens(4, 30)
    tokens[1, :20] = tokens[0, :20]  # read once
    logprobs = theirs(tokens).logits.log_softmax(-1)[:, 9:-1].gather(-1, tokens[:, 10:, None])
    requests = [Request(row[:10].tolist(), row[10:].tolist()) for row in tokens]
    found = torch.tensor(score(load_model(tmp_path), requests).nats, dtype=torch.float32)
    torch.testing.assert_close(found, logprobs.sum(dim=(1, 2)), atol=1e-3, rtol=1e-5)


def test_weights_in_several_files_and_in_bfloat16_are_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path / "whole", "llama3")
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    halved.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype=torch.float32)
    ours = load_model(tmp_path / "parts")
    torch.testing.assert_close(ours(random_tokens()), theirs(random_tokens()).logits, atol=1e-4, rtol=1e-4)

    lost = sorted((tmp_path / "parts").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=rf"lacks {lost.name}, which its model.safetensors.index.json lists"):
        load_model(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        load_model(tmp_path / "parts")


def test_a_whole_file_comes_before_parts_that_lie_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    expected = load_model(tmp_path)(random_tokens())
    weights = {name: torch.zeros_like(weight) for name, weight in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.fp16.safetensors")
    assert torch.equal(load_model(tmp_path)(random_tokens()), expected)


def test_a_head_of_its_own_under_tied_settings_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    load_model(tmp_path)
    weights["lm_head.weight"][5] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds an lm_head\.weight that is not its embedding; set tie_word_"):
        load_model(tmp_path)


def test_gpt2s_context_is_cropped(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = write_folder(tmp_path, "gpt2")
    ours = load_model(tmp_path, context_length=24)
    assert ours.config.context_length == 24
    tokens = random_tokens(2, 24)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="24"):
        ours(random_tokens(1, 25))
    save_model(tmp_path / "back", ours)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.n_positions == 24
    with pytest.raises(ValueError, match=r"65 tokens.*64 positions, which are learnt.*crop"):
        load_model(tmp_path, context_length=65)


@pytest.mark.parametrize("shape", ["llama", "llama3", "llama linear", "qwen3"])
def test_ropes_context_is_lengthened_and_cropped(shape: str, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, shape)
    tokens = random_tokens(1, 3 * CONTEXT)
    expected = theirs(tokens).logits
    for length in (16, 3 * CONTEXT):
        ours = load_model(tmp_path, context_length=length)
        torch.testing.assert_close(ours(tokens[:, :length]), expected[:, :length], atol=1e-4, rtol=1e-4)
        save_model(tmp_path / "back", ours)
        assert load_model(tmp_path / "back").config == ours.config


# As their makers published them, with the number of parameters that is known of each.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "SmolLM2-135M": (
        134_515_008,
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama",
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "use_mrope": False,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read_and_give_the_published_size(name: str, tmp_path: Path) -> None:
    size, settings = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config, vocab_size = load_config(tmp_path)
    assert count_parameters(config, vocab_size) == size
    scaling = settings.get("rope_scaling")
    assert config.rope_scaling == (scaling["rope_type"] if scaling else "none")
    assert family_of(config) == settings["model_type"]


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', not supported"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True, not supported"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096, not supported"),
    ("llama", {"activation": "swiglu"}, "activation='swiglu', not supported: what it does"),
    ("llama", {"num_local_experts": 8}, "num_local_experts=8, not supported: what it does"),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map={'AutoModel': 'x.Y'}, not supported"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type': 'yarn'.*not supported"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lacks factor, which rope_type=linear needs"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "mscale is not known here"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_factor must be"),
    ("llama", {"rms_norm_eps": 0}, "epsilon is 0; that must be"),
    ("llama", {"rms_norm_eps": "small"}, "epsilon is 'small'; that must be"),
    ("llama", {"num_key_value_heads": 3}, "num_heads must be divisible by model.num_kv_heads"),
    ("llama", {"head_dim": 7}, "head_dim must be even"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True, not supported"),
    ("qwen3", {"model_type": "qwen3_moe"}, "a 'qwen3_moe' model; this project knows gpt2, qwen3, qwen2, llama"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*not supported"),
    ("gpt2", {"activation_function": "relu"}, "activation_function='relu', not supported"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, not supported"),
]


@pytest.mark.parametrize(("shape", "changes", "sentence"), REFUSED, ids=[sentence for _, _, sentence in REFUSED])
def test_what_cannot_be_read_right_is_refused_by_name(
    shape: str, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    random_theirs(shape).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"{sentence}.*\.$") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"family": "classic", "qk_norm": False},
        {"family": "classic", "rope_scaling": "linear"},
        {"mlp_bias": True},
        {"attention_bias": "qkv"},
        {"qk_norm": False, "attention_bias": "qkv", "mlp_bias": True},
        {"qk_norm": False, "attention_bias": "some"},
        {"rope_scaling": "yarn"},
        {"rope_scaling": "llama3"},
        {"rope_scaling": "linear", "rope_factor": 0.0},
        {"norm_epsilon": -1.0},
    ],
)
def test_settings_that_belong_to_no_family_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\..*\.$"):
        ModelConfig(**settings)


class LettersOnly:
    """As much of a tokenizer as an engine needs; its end of text never comes."""

    vocab_size = VOCABULARY
    end_of_text = -1
    stop_tokens = frozenset((-1,))
    token_bytes = [b"a"] * VOCABULARY


def test_rows_beyond_the_tokenizer_are_kept_and_never_chosen(tmp_path: Path) -> None:
    library = write_tokenizer(tmp_path, "smollm2")
    size = library.get_vocab_size()
    theirs = write_folder(tmp_path, "llama", vocab_size=size + 37)
    theirs.generation_config.eos_token_id = None
    ours, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, ours.vocab_size) == (size, size + 37)
    tokens = random_tokens()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)

    with torch.no_grad():
        for row in range(size, size + 37):
            ours.embedding.weight[row] = 3 * ours.embedding.weight[row - 37]  # whichever way, one of both is likelier
    save_model(tmp_path / "back", ours, tokenizer)
    again = load_model(tmp_path / "back")
    assert torch.equal(again(tokens), ours(tokens))
    assert (again(tokens).argmax(-1) >= size).any()
    for backend in ("torch", "auto"):
        engine = Engine(again, tokenizer, EngineSettings(2, weights="float32", backend=backend))
        engine.add(GenerationRequest("a", [5, 6], SamplingSettings(max_tokens=40, temperature=0)))
        engine.add(GenerationRequest("b", [7], SamplingSettings(max_tokens=9, num_beams=2)))
        chunks = [chunk for _ in range(60) for chunk in engine.step()]
        assert all(token < size for chunk in chunks for token in chunk.tokens)
        assert {chunk.finish_reason for chunk in chunks} <= {None, "stop", "length"}


def test_any_of_several_ends_ends_an_answer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    write_folder(tmp_path, "llama", vocab_size=load_tokenizer(tmp_path).vocab_size)
    prompt = SamplingSettings(max_tokens=40, temperature=0)

    def generate() -> list[Any]:
        engine = Engine(load_model(tmp_path), load_tokenizer(tmp_path), EngineSettings(2, weights="float32"))
        engine.add(GenerationRequest("a", [30, 31], prompt))
        return [chunk for _ in range(50) for chunk in engine.step()]

    tokens = [token for chunk in generate() for token in chunk.tokens]
    end = tokens[20]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    assert [token for chunk in generate() for token in chunk.tokens] == tokens[: tokens.index(end)]

    tokenizer = load_tokenizer(tmp_path)
    save_model(tmp_path / "back", load_model(tmp_path), tokenizer)
    assert load_tokenizer(tmp_path / "back").stop_tokens == tokenizer.stop_tokens == {1, 2, end}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [2, 1, end]
