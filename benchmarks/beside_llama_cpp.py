"""Decodes with compressed layers and with llama.cpp in turn: the same shape, the same bytes, the same machine.

The model is a Llama of 1.1 B parameters, or fewer of its blocks, with random weights. Embeddings and head are in
bfloat16 in all. llama.cpp runs in a Python of its own, built there from its source package for this processor:

    python -m venv LLAMA && LLAMA/bin/pip install cmake
    CMAKE_ARGS="-DGGML_NATIVE=ON" LLAMA/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    pip install "hf_lowrank[gguf]"
    python benchmarks/beside_llama_cpp.py LLAMA/bin/python --threads 2

All models are in memory together, each in a process of its own, and decode one after the other in every round. Each
engine is asked for one token at a time, without a sampler.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from speed_model import CONFIG, LAYOUTS, compressed, dense
from transformers import StaticCache

from hf_lowrank.evaluation.speed import stored_bytes

OURS = ["dense", "SLaB 50 % of the bits", "int8, groups of 32", "int4, groups of 32", "int3, groups of 128"]
TYPES = ["BF16", "Q8_0", "Q4_0", "Q4_K_S"]
MODES = ["eager", "compiled"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""llama.cpp's names of the tensors of a block."""
LLAMA_WORKER = """
import sys, time, llama_cpp
file, threads, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
size = {"n_ctx": prompt + 512, "n_batch": prompt, "n_threads": threads, "n_threads_batch": threads}
model = llama_cpp.Llama(file, **size, verbose=False)
for line in sys.stdin:
    model.reset()
    start = time.perf_counter()
    model.eval(list(range(10, 10 + prompt)))
    middle = time.perf_counter()
    for token in range(int(line)):
        model.eval([10 + token])
    print(middle - start, time.perf_counter() - middle, flush=True)
"""
QUANTIZE = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
parameters.output_tensor_type = parameters.token_embedding_type = int(sys.argv[4])
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


def write_gguf(file: Path, layers: int) -> None:
    """Write the dense model with random weights in bfloat16, and a vocabulary of as many words."""
    writer = GGUFWriter(file, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(CONFIG.hidden_size // CONFIG.num_attention_heads)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"word{number}" for number in range(len(words), CONFIG.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)])
    for name, tensor in dense(layers).state_dict().items():
        if tensor.dim() == 1:
            writer.add_tensor(llama_name(name), torch.ones_like(tensor, dtype=torch.float32).numpy())
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(llama_name(name), quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_name(name: str) -> str:
    """Return llama.cpp's name of a tensor of transformers' Llama."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return f"{outside[stem]}.weight"
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


@torch.inference_mode()
def serve(name: str, layers: int, threads: int, prompt: int) -> None:
    """Decode as many tokens as a line of the input says, eager or compiled, and print the seconds."""
    torch.set_num_threads(threads)
    model = dense(layers) if name == "dense" else compressed(layers, LAYOUTS[name])
    model.eval().requires_grad_(False)
    print(stored_bytes(model), flush=True)
    forwards = {"eager": model.forward, "compiled": torch.compile(model.forward, dynamic=False)}
    caches: dict[str, StaticCache] = {}
    ids = torch.arange(10, 10 + prompt)[None]
    for line in sys.stdin:
        mode, count = line.split()
        cache = caches.setdefault(mode, StaticCache(config=model.config, max_cache_len=prompt + 128))
        cache.reset()
        start = time.perf_counter()
        model(ids, past_key_values=cache, logits_to_keep=1)
        middle = time.perf_counter()
        for token in range(int(count)):
            position = torch.tensor([[prompt + token]])
            forwards[mode](input_ids=ids[:, :1], position_ids=position, past_key_values=cache, logits_to_keep=1)
        print(middle - start, time.perf_counter() - middle, flush=True)


class Engine:
    """A process that decodes when it is asked to."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, question: str) -> tuple[float, float]:
        """Return the seconds of the prompt and of the new tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        prefill, decode = map(float, self.line().split())
        return prefill, decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", help="the Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=CONFIG.num_hidden_layers)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", nargs="*", default=OURS, choices=["dense", *LAYOUTS])
    parser.add_argument("--types", nargs="*", default=TYPES, help="llama.cpp's types of the layers")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--files", type=Path, help="folder in which the GGUF files stay for the next run")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.layers, options.threads, options.prompt)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(options, options.files or Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Write the files, start the engines, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    calls: dict[str, Callable[[], tuple[float, float]]] = {}
    sizes: dict[str, int] = {}
    engines = []
    size = ["--threads", options.threads, "--layers", options.layers, "--prompt", options.prompt]
    for name in options.ours:
        engine = Engine([sys.executable, __file__, "--serve", name, *map(str, size)])
        engines.append(engine)
        stored = int(engine.line())
        for mode in options.modes:
            calls[f"{name}, {mode}"] = lambda engine=engine, mode=mode: engine.ask(f"{mode} {options.new}")
            sizes[f"{name}, {mode}"] = stored
    for name in options.types if options.python else []:
        file = gguf_file(folder, name, options)
        engine = Engine([options.python, "-c", LLAMA_WORKER, str(file), str(options.threads), str(options.prompt)])
        engines.append(engine)
        calls[f"llama.cpp {name}"] = lambda engine=engine: engine.ask(str(options.new))
        sizes[f"llama.cpp {name}"] = file.stat().st_size
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(options.rounds + 1), calls.items()):
        seconds[name].append(call())
    for engine in engines:
        engine.process.kill()
    report(seconds, sizes, options)


def gguf_file(folder: Path, name: str, options: argparse.Namespace) -> Path:
    """Return the file of a type, which is made unless it is there."""
    source, file = (folder / f"{options.layers}-{kind}.gguf" for kind in ("BF16", name))
    if not source.exists():
        write_gguf(source, options.layers)
    if not file.exists():
        arguments = [str(source), str(file), name, str(GGMLQuantizationType.BF16.value)]
        subprocess.run([options.python, "-c", QUANTIZE, *arguments], check=True)
    return file


def report(seconds: dict[str, list[tuple[float, float]]], sizes: dict[str, int], options: argparse.Namespace) -> None:
    """Print the medians, without the first round, which compiles and warms up."""
    first = next(iter(seconds))
    medians = {}
    for name, rounds in seconds.items():
        medians[name] = [statistics.median(part) for part in zip(*rounds[1:], strict=True)]
    print("| | GB | prefill tokens/s | decode tokens/s | × the first row | bytes limit | share |")
    print("|---|---|---|---|---|---|---|")
    for name, (prefill, decode) in medians.items():
        ratio, limit = medians[first][1] / decode, sizes[first] / sizes[name]
        print(
            f"| {name} | {sizes[name] / 1e9:.2f} | {options.prompt / prefill:.0f} | {options.new / decode:.2f} "
            f"| {ratio:.2f} | {limit:.2f} | {ratio / limit:.2f} |"
        )


if __name__ == "__main__":
    main()
