"""How fast the engine answers, beside transformers and llama.cpp with the same weights in the same run.

    .venv/bin/python tests/benchmarks/serve.py [--rounds 3] [--threads 2]

The model is that of the preset gpt-53m with random weights, in 16 bits for everybody: bfloat16 for the engine and
transformers, the better of bfloat16 and float16 for llama.cpp. All generate greedily. Rounds take turns, so that a
busy moment of the machine falls on all of them; medians are reported.
"""

import argparse
import importlib.util
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch

from model.checkpoint import load_model, save_model
from model.engine import Engine, EngineSettings, GenerationRequest
from model.gpt import GPT
from model.sampling import SamplingSettings
from model.tokenizer import Tokenizer, build_char
from pipeline.config import load_config

USERS = 16
PROMPT_TOKENS = 16  # a line of a playground
NEW_TOKENS = 128  # what llama-bench generates
# Of 16 users: prompts of 16 to 121 tokens, answers of 16 to 76.
MIXED = [(16 + 7 * user, 16 + 4 * (user * 7 % USERS)) for user in range(USERS)]
GGUF_TYPES = ("BF16", "F16")


def build_checkpoint(folder: Path) -> Tokenizer:
    """Write a model folder of the 53M class with random weights, whose greedy text does not simply repeat."""
    config = load_config("jobs/presets/gpt-53m.yaml")
    # Characters beside the 256 bytes and the end of text: any will do.
    size = config.tokenizer.vocabulary_size
    tokenizer = build_char(["".join(chr(0x4E00 + place) for place in range(size))], size)
    torch.manual_seed(0)
    model = GPT(config.model, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_((torch.randn_like(parameter) * 0.05).bfloat16())  # exact in bfloat16
    model.clear_padding()
    save_model(folder, model, tokenizer)
    return tokenizer


def prompt_of(length: int, number: int) -> list[int]:
    return torch.randint(0, 16_000, (length,), generator=torch.Generator().manual_seed(number)).tolist()


class Ours:
    """The engine; weights in bfloat16 or int8."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, weights: str) -> None:
        settings = EngineSettings(max_batch_size=USERS, weights=weights, threads=torch.get_num_threads())
        self.engine = Engine(model, tokenizer, settings)
        # A thread of its own, as in serving: it keeps torch to one core beside the kernel's threads.
        self.thread = ThreadPoolExecutor(1, initializer=self.engine.enter_thread)
        # Nobody stops early, so that everybody generates the same number.
        self.bias = {tokenizer.end_of_text: -100.0}

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return self.thread.submit(self._generate, prompts, lengths).result()

    def _generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in prompts]
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            settings = SamplingSettings(max_tokens=length, temperature=0, logit_bias=self.bias)
            self.engine.add(GenerationRequest(str(number), prompt, settings))
        while self.engine.has_work:
            for chunk in self.engine.step():
                tokens[int(chunk.request_id)] += chunk.tokens
        return tokens

    def first_token_seconds(self) -> float:
        began = time.perf_counter()
        self.generate([prompt_of(PROMPT_TOKENS, 0)], [1])
        return time.perf_counter() - began


class Transformers:
    """`generate`: one batch, padded on the left, that runs until its longest answer is done."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self.model.generate(
            padded,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=max(lengths),
            max_new_tokens=max(lengths),
            pad_token_id=0,
        )
        return [row[longest : longest + length].tolist() for row, length in zip(output, lengths, strict=True)]


class TransformersContinuous(Transformers):
    """`generate_batch`: its continuous batching."""

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        from transformers import GenerationConfig

        # It takes one length for all; so each length is asked for at once, and tokens beyond it are not counted.
        config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0)
        outputs = self.model.generate_batch(prompts, generation_config=config, progress_bar=False, warmup=False)
        rows = [outputs[key].generated_tokens for key in outputs]
        if len(rows) != len(prompts) or not all(rows):
            raise RuntimeError("some requests came back empty")
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]


class LlamaCpp:
    """llama.cpp on a GGUF of the same weights, through its C interface, so that Python costs it next to nothing."""

    def __init__(self, model: GPT, path: Path, kind: str, threads: int) -> None:
        import llama_cpp

        write_gguf(model, path, kind)
        self.library = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = model.vocab_size

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        import numpy as np

        [prompt], [length] = prompts, lengths
        library = self.library
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        tokens: list[int] = []
        pending = prompt
        while len(tokens) < length:
            array = (library.llama_token * len(pending))(*pending)
            if library.llama_decode(self.context, library.llama_batch_get_one(array, len(pending))):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, -1), (self.vocab_size,))
            pending = [int(logits.argmax())]
            tokens += pending
        return [tokens]


class LlamaServer:
    """The same by llama.cpp's own server, in the package xllamacpp, which comes as a wheel; one request a text."""

    def __init__(self, model: GPT, path: Path, kind: str, threads: int) -> None:
        import xllamacpp

        write_gguf(model, path, kind)
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 512, 1
        settings.cpuparams.n_threads, settings.verbosity = threads, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            settings.port = free.getsockname()[1]
        self.server = xllamacpp.Server(settings)
        self.client = httpx.Client(base_url=self.server.listening_address, timeout=60)

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        [prompt], [length] = prompts, lengths
        body = {"prompt": prompt, "n_predict": length, "ignore_eos": True, "cache_prompt": False}
        greedy = {"samplers": ["top_k"], "top_k": 1, "return_tokens": True}
        return [self.client.post("/completion", json=body | greedy).raise_for_status().json()["tokens"]]


def write_gguf(model: GPT, path: Path, kind: str) -> None:
    """Write the weights under the names that llama.cpp has for Qwen3; norms in float32, as it wants them."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_channels)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.channels_per_head)
    writer.add_value_length(config.channels_per_head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_vocab_size(model.vocab_size)
    # Tokens go in and come out as numbers, but llama.cpp's server wants names for them.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{number}" for number in range(model.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * model.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(model.vocab_size - 1)
    matrix_type = gguf.GGMLQuantizationType[kind]

    def add(name: str, weight: torch.Tensor) -> None:
        data = weight.detach().float().contiguous().numpy()
        if weight.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(data, matrix_type), raw_dtype=matrix_type)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", model.embedding.weight[: model.vocab_size])
    add("output.weight", model.head.weight[: model.vocab_size])
    add("output_norm.weight", model.norm.weight)
    for number, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        queries, keys, values = attention.qkv.weight.split(attention.sections)
        gate, up = mlp.gate_up.weight.split(mlp.sections)
        for name, weight in {
            "attn_norm": block.attention_norm.weight,
            "attn_q": queries,
            "attn_k": keys,
            "attn_v": values,
            "attn_q_norm": attention.query_norm.weight,
            "attn_k_norm": attention.key_norm.weight,
            "attn_output": attention.output.weight,
            "ffn_norm": block.mlp_norm.weight,
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": mlp.output.weight,
        }.items():
            add(f"blk.{number}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def memory_bandwidth() -> float:
    """Bytes per second that all threads read together: a sum over memory far larger than the caches."""
    data = torch.ones(2**26, dtype=torch.int64)  # 512 MiB
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return data.numel() * data.element_size() / min(seconds)


def agreement(ours: list[int], theirs: list[int]) -> int:
    """Leading tokens that agree: rounding differs, so texts part where two tokens are about as likely."""
    same = [a == b for a, b in zip(ours, theirs, strict=False)]
    return same.index(False) if False in same else len(same)


def figures_of(script: str, *options: str) -> dict[str, Any] | None:
    """What another benchmark here measures, in a process of its own; None where it cannot run."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine beside transformers and llama.cpp.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vllm", help="a Python that has vLLM: 1 to 64 users over HTTP beside it (serve_users.py)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = build_checkpoint(folder)
        model = load_model(folder)
        engines = {f"engine {weights}": Ours(model, tokenizer, weights) for weights in ("bfloat16", "int8")}
        peers: dict[str, Any] = {"transformers generate": Transformers(folder)}
        continuous: TransformersContinuous | None = TransformersContinuous(folder)
        try:
            continuous.generate([prompt_of(8, 0)] * 2, [2, 3])
        except Exception as error:  # a peer that cannot run here is named, whatever its reason
            missing["transformers generate_batch"] = f"{type(error).__name__}: {str(error)[:200]}"
            continuous = None
        llamas: dict[str, Any] = {}
        for kind in GGUF_TYPES:
            try:
                way = LlamaCpp if importlib.util.find_spec("llama_cpp") else LlamaServer
                llamas[f"llama.cpp {kind}"] = way(model, folder / f"{kind}.gguf", kind, arguments.threads)
            except ImportError as error:
                missing["llama.cpp"] = str(error)

        alone = ([prompt_of(PROMPT_TOKENS, 0)], [NEW_TOKENS])
        together = ([prompt_of(PROMPT_TOKENS, user) for user in range(USERS)], [NEW_TOKENS] * USERS)
        mixed = ([prompt_of(length, user) for user, (length, _) in enumerate(MIXED)], [new for _, new in MIXED])
        ways: dict[str, Callable[[], list[list[int]]]] = {}
        for name, way in (*engines.items(), *peers.items(), *llamas.items()):
            ways[f"{name}, 1 user"] = lambda way=way: way.generate(*alone)
        for name, way in (*engines.items(), *peers.items()):
            ways[f"{name}, {USERS} users mixed"] = lambda way=way: way.generate(*mixed)
        for name, way in engines.items():
            ways[f"{name}, {USERS} users"] = lambda way=way: way.generate(*together)
        if continuous is not None:
            ways[f"transformers generate_batch, {USERS} users mixed"] = lambda: continuous.generate(*mixed)

        rates: dict[str, list[float]] = {name: [] for name in ways}
        answers: dict[str, list[list[int]]] = {}
        bandwidths = []
        for engine in engines.values():
            engine.generate(*together)  # touches the whole cache once, which a server has done after its first minute
        for _ in range(arguments.rounds):
            bandwidths.append(memory_bandwidth())
            for name, run in ways.items():
                began = time.perf_counter()
                answers[name] = run()
                rates[name].append(sum(map(len, answers[name])) / (time.perf_counter() - began))
        first_token = statistics.median(engines["engine bfloat16"].first_token_seconds() for _ in range(9))

    rate = {name: statistics.median(values) for name, values in rates.items()}
    bandwidth = max(bandwidths)
    weight_bytes = engines["engine bfloat16"].engine.stats()["weight_bytes"] - 2 * model.embedding.weight.numel()
    limit = bandwidth / weight_bytes
    print(f"{model.num_parameters():,} parameters, {arguments.threads} threads, medians of {arguments.rounds} rounds")
    print(
        f"memory {bandwidth / 1e9:.1f} GB/s over {weight_bytes / 1e6:.0f} MB of weights: {limit:.0f} tokens/s at most\n"
    )
    print(f"{'':50} {'tokens/s':>10}  {'slowest':>8} {'fastest':>8}  agrees for")
    for name, values in sorted(rates.items(), key=lambda entry: entry[0].split(", ")[1]):
        same = ""
        if not name.startswith("engine bfloat16"):
            reference = answers["engine bfloat16, " + name.split(", ")[1]]
            agreed = [agreement(ours, theirs) for ours, theirs in zip(reference, answers[name], strict=True)]
            same = f"{statistics.median(agreed):.0f} tokens"
        print(f"{name:50} {rate[name]:10.1f}  {min(values):8.1f} {max(values):8.1f}  {same}")
    print(f"\nfirst token of {PROMPT_TOKENS}: {first_token * 1e3:.1f} ms")
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")

    one, many, mix = (rate[f"engine bfloat16, {kind}"] for kind in ("1 user", f"{USERS} users", f"{USERS} users mixed"))
    best_mixed = max(rates_ for name, rates_ in rate.items() if name.startswith("transformers") and "mixed" in name)
    figures: dict[str, Any] = {
        "tokens_per_second_1_user": round(one, 1),
        "tokens_per_second_16_users": round(many, 1),
        "tokens_per_second_1_user_int8": round(rate["engine int8, 1 user"], 1),
        "ratio_16_users_to_1": round(many / one, 2),
        "ratio_to_transformers_batch_1": round(one / rate["transformers generate, 1 user"], 2),
        "ratio_to_transformers_16_users": round(mix / best_mixed, 2),
        "fraction_of_bandwidth_limit": round(one / limit, 2),
        "first_token_milliseconds": round(first_token * 1e3, 1),
        "memory_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "missing": sorted(missing),
    }
    over_http = figures_of("serve_http.py")
    figures["http_overhead_milliseconds"] = over_http and over_http["http_overhead_milliseconds"]
    if arguments.vllm:
        figures["users_over_http"] = figures_of("serve_users.py", "--vllm", arguments.vllm)
    if llamas:
        best = max(rate[f"{name}, 1 user"] for name in llamas)
        figures["ratio_to_llama_cpp"] = round(one / best, 2)
    with suppress(BrokenPipeError):
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
