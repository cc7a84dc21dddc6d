"""A training of an adapter: through kills to the same bits, merged and as `peft` reads it, on any number of workers."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.gpt import GPT
from model.lora import ADAPTER_FOLDER, adapt, import_adapter, load_adapter
from pipeline.training import launch
from tests.pipeline.test_train_start import train_from
from tests.pipeline.tiny_training import Training, dying_worker, last_checkpoint

pytestmark = pytest.mark.slow

LORA = ("train.lora_rank=4", "train.lora_alpha=16", "optimizer.kind=adamw", "optimizer.learning_rate=0.02")


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train_from("qwen3", tmp_path_factory.mktemp("lora"), *LORA)


def adapter_digest(training: Training) -> str:
    return last_checkpoint(training.config, training.output).files[f"{ADAPTER_FOLDER}/adapter_model.safetensors"].sha256


@pytest.fixture(scope="module")
def checkpoint(undisturbed: Training) -> Path:
    return Path(undisturbed.output.file("checkpoint"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))


def logits_of(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens)


def test_only_the_adapter_learns_and_the_loss_falls(undisturbed: Training) -> None:
    losses = list(undisturbed.losses().values())
    assert losses[-1] < losses[0] - 0.1


def test_the_checkpoint_is_the_start_with_the_adapter_merged(
    undisturbed: Training, checkpoint: Path, tokens: torch.Tensor
) -> None:
    assert undisturbed.config.train.lora is not None
    model = load_model(undisturbed.config.start.resolved)
    before = logits_of(model, tokens)
    adapt(model, undisturbed.config.train.lora)
    import_adapter(model, load_adapter(checkpoint / ADAPTER_FOLDER), str(checkpoint))
    adapted = logits_of(model, tokens)
    assert not torch.allclose(adapted, before, atol=0.1)
    torch.testing.assert_close(logits_of(load_model(checkpoint), tokens), adapted, rtol=0, atol=1e-5)


def test_peft_puts_the_adapter_on_the_start(undisturbed: Training, checkpoint: Path, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint / ADAPTER_FOLDER).eval()
    with torch.no_grad():
        found = theirs(tokens).logits
    torch.testing.assert_close(found, logits_of(load_model(checkpoint), tokens), rtol=0, atol=1e-5)


def test_after_kills_it_ends_with_the_same_bits(
    undisturbed: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deaths").mkdir()
    deaths = [(0, 2, "step"), (1, 6, "step"), (0, 8, "checkpoint")]
    monkeypatch.setattr(launch, "train_worker", dying_worker(tmp_path / "deaths", *deaths))
    killed = train_from("qwen3", tmp_path / "killed", *LORA)
    assert killed.manifest.counts["restarts"] >= 1
    assert killed.losses() == undisturbed.losses()
    assert killed.weights_digest() == undisturbed.weights_digest()
    assert adapter_digest(killed) == adapter_digest(undisturbed)


def test_sharded_it_learns_the_same(undisturbed: Training, tmp_path: Path) -> None:
    sharded = train_from("qwen3", tmp_path, *LORA, "train.sharding=fsdp")
    assert list(sharded.losses().values()) == pytest.approx(list(undisturbed.losses().values()), rel=1e-3)
