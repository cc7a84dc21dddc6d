"""What runs the model: the ways agree with one another, and each keeps its slots apart."""

import math
import mmap
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from model.cpu.kernel import HugePages, KernelRunner, load_kernel
from model.gpt import GPT, ModelConfig
from model.runner import DEVICE_TURN, TorchRunner, quantize, record_graph, with_weights
from model.sequence import Work

VOCABULARY, CONTEXT = 301, 64
# Sizes that are no multiple of anything, heads in groups, one head, tied embeddings.
SHAPES = {
    "modern": ModelConfig(num_layers=2, width=64, num_heads=4, context_length=CONTEXT),
    "modern odd": ModelConfig(
        num_layers=2, width=72, num_heads=6, num_kv_heads=2, head_dim=20, mlp_width=100, context_length=CONTEXT
    ),
    "llama with biases": ModelConfig(
        num_layers=2,
        width=72,
        num_heads=6,
        num_kv_heads=2,
        mlp_width=100,
        context_length=CONTEXT,
        qk_norm=False,
        attention_bias="all",
        mlp_bias=True,
        norm_epsilon=1e-3,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_context=32,
    ),
    "modern one key head": ModelConfig(num_layers=1, width=64, num_heads=8, num_kv_heads=1, context_length=CONTEXT),
    "classic": ModelConfig(family="classic", num_layers=2, width=48, num_heads=2, context_length=CONTEXT),
    "classic odd": ModelConfig(
        family="classic", num_layers=1, width=50, num_heads=1, tie_embeddings=True, context_length=CONTEXT
    ),
}
# Of logits about 6 in size: what rounding weights, keys and values to 8 or 16 bits may change.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.25, "int8": 0.6}


def random_model(shape: str) -> GPT:
    torch.manual_seed(5)
    model = GPT(SHAPES[shape], VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.clear_padding()
    return model.eval()


def kernel_runner(model: GPT, weights: str, num_slots: int = 3, threads: int = 2) -> KernelRunner:
    kernel = load_kernel()
    if kernel is None:
        pytest.skip("needs a C++ compiler")
    return KernelRunner(kernel, model, num_slots, weights, max_draft_tokens=4, threads=threads)


def random_tokens(length: int = 40) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(6)).tolist()


@torch.no_grad()
def expected_logits(model: GPT, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens]))[0]


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_computes_what_torch_computes(shape: str, weights: str) -> None:
    model, tokens = random_model(shape), random_tokens()
    logits = kernel_runner(model, weights).run([Work(1, 0, tokens, len(tokens))])
    expected = expected_logits(model, tokens)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < TOLERANCE[weights]


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_gives_a_token_the_same_bits_however_it_is_run(shape: str, weights: str, threads: int) -> None:
    tokens, others = random_tokens(), random_tokens()[::-1]
    runner = kernel_runner(random_model(shape), weights, threads=threads)
    whole = runner.run([Work(1, 0, tokens, len(tokens))])
    pieces, at = [], 0
    for length in (1, 2, 7, 13, 6, 5, 3, 2, 1):  # heights of tiles that differ, other slots beside them or not
        piece = Work(2, at, tokens[at : at + length], length)
        beside = [Work(0, at, others[at : at + length], 1)] if length % 2 else []
        pieces.append(runner.run([*beside, piece])[len(beside) :])
        at += length
    assert at == len(tokens)
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
def test_the_kernel_keeps_its_threads_when_their_number_changes() -> None:
    runner, work = kernel_runner(random_model("modern"), "bfloat16"), [Work(0, 0, random_tokens(), 1)]
    expected, counts = runner.run(work), []
    for _ in range(20):
        for runner.threads in (1, 4, 2, 3):
            assert torch.equal(runner.run(work), expected)
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    assert len(set(counts)) == 1


def test_a_thread_that_steps_an_engine_keeps_torch_to_one_core_and_no_other_thread() -> None:
    runner = kernel_runner(random_model("modern"), "bfloat16")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    entered, seen = threading.Event(), threading.Event()

    def step() -> int:
        runner.enter_thread()
        entered.set()
        seen.wait(60)
        return torch.get_num_threads()

    try:
        with ThreadPoolExecutor(2) as pool:
            stepping = pool.submit(step)
            entered.wait(60)
            assert pool.submit(torch.get_num_threads).result() == 3, "a thread that begins meanwhile"
            assert torch.get_num_threads() == 3
            seen.set()
            assert stepping.result() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_units_add_up_what_the_other_units_do(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load_kernel()
    if kernel is None or not kernel.has_tiles():
        pytest.skip("needs a processor with matrix units of bfloat16, and a C++ compiler")
    model, work = random_model(shape), [Work(1, 0, random_tokens(), 40)]
    by_tiles = kernel_runner(model, "bfloat16").run(work)
    monkeypatch.setattr(kernel, "has_tiles", lambda: 0)
    monkeypatch.setattr(kernel, "has_pairs", lambda: 0)
    without = kernel_runner(model, "bfloat16").run(work)
    # The upper parts of the activations alone would be 0.004 to 0.010 off.
    assert (by_tiles - without).abs().mean() < 0.001


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_pairs_are_those_of_rounded_activations(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load_kernel()
    if kernel is None or not kernel.has_pairs():
        pytest.skip("needs a processor that adds up products of bfloat16 pairs, and a C++ compiler")
    monkeypatch.setattr(kernel, "has_tiles", lambda: 0)
    model, work = random_model(shape), [Work(1, 0, random_tokens(), 40)]
    by_pairs = kernel_runner(model, "bfloat16").run(work)
    monkeypatch.setattr(kernel, "has_pairs", lambda: 0)
    without = kernel_runner(model, "bfloat16").run(work)
    assert 0 < (by_pairs - without).abs().mean() < 0.02  # of logits about 6 in size, with 8 bits of each activation


def test_a_copied_slot_goes_on_as_its_source() -> None:
    tokens = random_tokens()
    for runner in (kernel_runner(random_model("modern odd"), "bfloat16"), torch_runner("modern odd")):
        runner.run([Work(0, 0, tokens[:30], 0)])
        runner.copy(0, 2, 30)
        first, second = (runner.run([Work(slot, 30, tokens[30:31], 1)]) for slot in (0, 2))
        assert torch.equal(first, second)


def torch_runner(shape: str, weights: str = "float32") -> TorchRunner:
    return TorchRunner(random_model(shape), 3, weights, max_draft_tokens=4, use_graph=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_runs_slots_of_different_lengths_as_one_batch_as_it_does_on_a_gpu(shape: str) -> None:
    tokens = random_tokens(CONTEXT)
    runner = torch_runner(shape)
    runner.batches_slots, runner.max_draft_tokens, runner.width = True, 4, 5
    runner.run([Work(0, 0, tokens[:20], 0), Work(2, 0, tokens[: CONTEXT - 3], 0)])
    # Slot 2 is near its end, so some places of its batch lie behind it; slot 1 is idle, slot 0 has a draft.
    logits = runner.run([Work(2, CONTEXT - 3, tokens[CONTEXT - 3 : CONTEXT - 1], 2), Work(0, 20, tokens[20:24], 4)])
    expected = expected_logits(runner.model, tokens)
    torch.testing.assert_close(
        logits, torch.cat((expected[CONTEXT - 3 : CONTEXT - 1], expected[20:24])), atol=1e-4, rtol=1e-4
    )
    again = runner.run([Work(0, 24, tokens[24:25], 1)])
    torch.testing.assert_close(again[0], expected[24], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["modern odd", "classic"])
def test_prompts_of_every_length_meet_a_gpu_in_few_shapes(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded, a prompt has the logits that it has alone, and leaves the cache fit for what follows."""
    monkeypatch.setattr("model.runner.SHORTEST_BUCKET", 8)
    monkeypatch.setattr("model.runner.SHORTEST_VISIBLE", 16)
    tokens = random_tokens(CONTEXT)
    runner = torch_runner(shape)
    runner.batches_slots, runner.max_draft_tokens, runner.width = True, 0, 1
    expected, shapes = expected_logits(runner.model, tokens), set()
    forward = runner.model.forward_hidden

    def counted(ids: Tensor, **asked: object) -> Tensor:
        shapes.add((tuple(ids.shape), asked["visible"]))
        return forward(ids, **asked)

    monkeypatch.setattr(runner.model, "forward_hidden", counted)
    for length in range(2, CONTEXT + 1):
        logits = runner.run([Work(1, 0, tokens[:length], 2)])
        torch.testing.assert_close(logits, expected[length - 2 : length], atol=1e-4, rtol=1e-4)
        if length < CONTEXT:
            step = runner.run([Work(1, length, tokens[length : length + 1], 1)])
            torch.testing.assert_close(step[0], expected[length], atol=1e-4, rtol=1e-4)
    chunks = shapes - {((3, 1), CONTEXT)}
    assert chunks == {((1, 8), 16), ((1, 16), 16), ((1, 32), 32), ((1, 64), 64)}
    # A chunk behind another one, and one whose bucket would reach beyond the context.
    runner.run([Work(0, 0, tokens[:32], 0)])
    behind = runner.run([Work(0, 32, tokens[32:40], 8)])
    end = runner.run([Work(0, 40, tokens[40:60], 0), Work(0, 60, tokens[60:], 4)])
    rows = [*range(32, 40), *range(60, 64)]
    torch.testing.assert_close(torch.cat((behind, end)), expected[rows], atol=1e-4, rtol=1e-4)
    # The same chunk has the same bits, whatever ran before it and beside it.
    beside, alone = Work(0, 0, tokens[:9], 0), Work(2, 0, tokens[:30], 30)
    assert torch.equal(runner.run([alone, beside]), runner.run([alone]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cuda_graph_gives_what_its_launches_one_by_one_give(shape: str) -> None:
    tokens, found = random_tokens(), []
    for use_graph in (True, False):
        runner = TorchRunner(random_model(shape).cuda(), 3, "float32", max_draft_tokens=4, use_graph=use_graph)
        prompt = runner.run([Work(0, 0, tokens[:20], 1), Work(2, 0, tokens[:30], 1)])
        step = runner.run([Work(2, 30, tokens[30:35], 5), Work(0, 20, tokens[20:21], 1)])
        found.append(torch.cat((prompt, step)).cpu())
    expected = expected_logits(random_model(shape), tokens)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    rows = [19, 29, *range(30, 35), 20]
    torch.testing.assert_close(found[0], expected[rows], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "torch"])
def test_a_runner_tells_the_first_of_each_rows_largest_logits(weights: str) -> None:
    model = random_model("modern odd")
    with torch.no_grad():
        model.head.weight[250] = model.head.weight[40] = (
            model.head.weight[40] * 3
        )  # often the largest, and always equal
    is_torch = weights == "torch"
    runner = TorchRunner(model, 3, "float32", use_graph=False) if is_torch else kernel_runner(model, weights)
    tokens, places = random_tokens(), set()
    for vocabulary in (VOCABULARY, 256, 33, 7):
        runner.vocab_size = vocabulary
        logits = runner.run([Work(0, 0, tokens, 40), Work(1, 0, tokens[:3], 1)])
        assert logits.shape == (41, vocabulary)
        assert runner.best_tokens() == logits.float().numpy().argmax(-1).tolist()
        places |= set(runner.best_tokens())
    assert 40 in places
    assert 250 not in places


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "torch"])
def test_a_runner_tells_which_rows_are_no_numbers(weights: str) -> None:
    for bad in (math.nan, math.inf):
        model = random_model("modern")
        with torch.no_grad():
            model.head.weight[200] = bad
        is_torch = weights == "torch"
        runner = TorchRunner(model, 3, "float32", use_graph=False) if is_torch else kernel_runner(model, weights)
        work = [Work(0, 0, random_tokens(5), 5)]
        runner.run(work)
        assert runner.best_tokens() == [-1] * 5
        runner.vocab_size = 200
        runner.run(work)
        assert all(0 <= place < 200 for place in runner.best_tokens())


def test_a_graph_is_recorded_for_its_own_thread_between_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    @contextmanager
    def record(graph: object, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert pool is None, "a swap's two engines have memory of their own"
        modes.append(capture_error_mode)
        yield

    names = {"Stream": MagicMock(), "current_stream": MagicMock(), "CUDAGraph": MagicMock(), "stream": nullcontext}
    for name, stand_in in {**names, "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    other = torch_runner("classic")
    other.turn = DEVICE_TURN  # as it has it on a GPU
    tokens, order = random_tokens(), []

    def step() -> None:
        other.run([Work(0, 0, tokens[:5], 1)])
        order.append("step")

    stepping = threading.Thread(target=step)

    def compute() -> Tensor:
        if not stepping.ident:
            stepping.start()
        stepping.join(timeout=0.1)  # gives it every chance to come between
        order.append("recorded")
        return torch.zeros(1)

    _, result = record_graph(compute, torch.device("cpu"))
    stepping.join(timeout=60)
    assert order == ["recorded"] * 4 + ["step"], "three to warm up, one recorded, and only then the other's step"
    assert modes == ["thread_local"]
    assert result.shape == (1,)
    with DEVICE_TURN:
        waiting = [threading.Thread(target=call) for call in (lambda: other.copy(0, 1, 5), lambda: other.clear(2))]
        for thread in waiting:
            thread.start()
            thread.join(timeout=0.1)
            assert thread.is_alive()
    for thread in waiting:
        thread.join(timeout=60)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rotary_tables_stay_float32(weights: str) -> None:
    model = random_model("modern odd")
    lighter = with_weights(model, weights)
    assert lighter.embedding.weight.dtype != torch.float32 or weights == "int8"
    for name in ("cosines", "sines"):
        assert torch.equal(getattr(lighter, name), getattr(model, name))


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_torch_runs_lighter_weights_and_leaves_the_model_as_it_was(weights: str) -> None:
    model, tokens = random_model("modern odd"), random_tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = TorchRunner(model, 1, weights, use_graph=False)
    logits = runner.run([Work(0, 0, tokens, len(tokens))])
    assert (logits - expected_logits(model, tokens)).abs().max() < 2 * TOLERANCE[weights]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert runner.weight_bytes() < TorchRunner(model, 1, "float32", use_graph=False).weight_bytes() * 0.6
    assert with_weights(model, "float32") is model


def test_quantised_weights_are_within_half_a_step() -> None:
    weight = torch.randn(7, 33)
    weight[3] = 0
    integers, scale = quantize(weight)
    assert integers.dtype == torch.int8
    assert ((integers * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()
    assert integers.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]


def test_memory_in_large_pages_is_zeroed_aligned_and_nobody_elses() -> None:
    memory = HugePages()
    shapes = [((3, 5), torch.bfloat16), ((7,), torch.float32), ((HugePages.BLOCK_BYTES + 1,), torch.int8)]
    tensors = [memory.zeros(shape, dtype) for shape, dtype in shapes]
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % HugePages.ALIGNMENT == 0
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1], [2], [3]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_memory_is_there_once_it_is_reserved() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    memory = HugePages().zeros((2 * HugePages.BLOCK_BYTES,), torch.int8)
    before = resident_bytes()
    HugePages.reserve(memory)
    # Little else of this process comes or goes meanwhile.
    assert resident_bytes() - before > 0.9 * memory.nbytes
    assert not memory.any()
