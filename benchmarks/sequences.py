"""State-space models of transformers: with this package in the place of causal-conv1d, and by their own convolutions.

A model is a random one of two layers, 768 wide. transformers' own path pads and calls F.conv1d, and when decoding rolls
a state and sums. The scan is its Python code in both: mamba_ssm is not there, so that the ratio of whole models is of
models whose scan is slow. So the calls of convolutions that a model makes are also timed by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import sepconv_ext.causal_conv1d

from .timing import threads

SIZES = dict(vocab_size=256, hidden_size=768, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(num_attention_heads=12, num_key_value_heads=4, intermediate_size=1024)
LINEAR = dict(linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=12, linear_num_value_heads=24)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, shared_expert_intermediate_size=256)
HEADS = dict(mamba_n_heads=24, mamba_d_head=64, mamba_d_state=64, mamba_n_groups=1, mamba_chunk_size=128)
MODELS = {
    "mamba": ("Mamba", {}),
    "mamba2": ("Mamba2", dict(state_size=64, num_heads=24, head_dim=64, n_groups=1, chunk_size=128)),
    "falcon_h1": ("FalconH1", {**ATTENTION, **HEADS, "mamba_d_ssm": 1536}),
    "bamba": ("Bamba", {**ATTENTION, **HEADS, "attn_layer_indices": [1]}),
    "lfm2": ("Lfm2", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3Next",
        {**ATTENTION, **LINEAR, **EXPERTS, "head_dim": 64, "layer_types": ["linear_attention", "full_attention"]},
    ),
}
FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
MODES = {"prefill": 512, "training": 64, "decoding": 16}  # positions; decoding makes as many tokens more


def run(advance: Callable[[str], None], thread_counts: Sequence[int], turns: int, scale: int = 1) -> Iterator[dict]:
    """Yields the record's sequence rows, N 1, float32; ``scale`` divides the positions."""
    for name in MODELS:
        module, model = _model(name)
        for mode, positions in MODES.items():
            for count in thread_counts:
                advance(f"{name}, {mode}")
                with threads(count):
                    yield {"model": name, **_row(module, model, mode, positions // scale, turns)}


def shown(rows: Sequence[dict]) -> tuple[Sequence[str], list[Sequence[str]], str]:
    """Columns, rows and note of the report's table."""
    columns = ("model", "mode", "positions", "threads", "own convolutions", "sepconv", "speed-up")
    alone = ("convolutions alone: own", "sepconv", "speed-up")
    lines = [(*(str(row[key]) for key in columns[:4]), *_times(row, ""), *_times(row, "convolution_")) for row in rows]
    note = (
        "Milliseconds, N 1, float32, two layers of random numbers, 768 wide. Decoding makes as many tokens as it was "
        "given. Both run transformers' scan in Python, which is most of the time, of mamba's training above all. "
        "Convolutions alone are the calls that the model makes, one after the other, in training with their gradients."
    )
    return (*columns, *alone), lines, note


def _times(row: dict, prefix: str) -> Sequence[str]:
    if f"{prefix}seconds_of" not in row:  # records before 2026-12-01
        return ("", "", "")
    times = [f"{1e3 * row[f'{prefix}seconds_of'][who]:.4g}" for who in ("transformers", "sepconv")]
    return (*times, f"{row[f'{prefix}speedup']:.2f}x")


def _model(name: str) -> tuple[ModuleType, torch.nn.Module]:
    """The module imports causal_conv1d by its name, which this package answers."""
    import transformers

    sepconv_ext.causal_conv1d.register()
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **arguments)
    return module, getattr(module, f"{kind}ForCausalLM")(config).eval()


@contextlib.contextmanager
def _by(who: str, module: ModuleType) -> Iterator[None]:
    """transformers keeps its own function behind the one that it asked for."""
    own = {name: getattr(module, name).__wrapped__ for name in FUNCTIONS}
    with mock.patch.multiple(module, **own) if who == "transformers" else contextlib.nullcontext():
        yield


def _call(model: torch.nn.Module, mode: str, positions: int) -> Tensor:
    """One call, and what of it is compared."""
    tokens = torch.arange(positions).unsqueeze(0) * 7 % 250 + 3
    if mode == "training":
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        if mode == "prefill":
            return model(tokens, use_cache=False).logits
        made = dict(max_new_tokens=positions, min_new_tokens=positions, do_sample=False, use_cache=True)
        return model.generate(tokens, **made, output_logits=True, return_dict_in_generate=True).logits[-1]


def _convolutions(module: ModuleType, model: torch.nn.Module, mode: str, positions: int) -> list[Callable]:
    """The calls of convolutions that one call of the model makes, each by the functions that the module then has."""
    calls = []

    def spy(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> Tensor:
            calls.append((name, [a.detach() if isinstance(a, Tensor) else a for a in args], kwargs))
            return function(*args, **kwargs)

        return call

    with mock.patch.multiple(module, **{name: spy(name, getattr(module, name)) for name in FUNCTIONS}):
        _call(model, mode, positions)
    return [functools.partial(_again, module, mode == "training", *call) for call in calls]


def _again(module: ModuleType, differentiate: bool, name: str, args: Sequence, kwargs: dict) -> None:
    tensors = [a.requires_grad_(differentiate) for a in args if isinstance(a, Tensor)]
    with torch.set_grad_enabled(differentiate):
        output = getattr(module, name)(*args, **kwargs)
    if differentiate:
        torch.autograd.grad(output, tensors, torch.ones_like(output))


def _row(module: ModuleType, model: torch.nn.Module, mode: str, positions: int, turns: int) -> dict:
    whole = functools.partial(_call, model, mode, positions)
    calls = _convolutions(module, model, mode, positions)
    samples = {part: {"transformers": [], "sepconv": []} for part in ("", "convolution_")}
    results = {}
    for turn in range(turns + 1):  # the first is not counted
        for who in sorted(samples[""], reverse=turn % 2 == 0):
            with _by(who, module):
                start = time.perf_counter()
                results[who] = whole()
                between = time.perf_counter()
                for call in calls:
                    call()
                end = time.perf_counter()
                samples[""][who] += [between - start] if turn else []
                samples["convolution_"][who] += [end - between] if turn else []
    of = {part: {who: statistics.median(times) for who, times in by.items()} for part, by in samples.items()}
    expected = results["transformers"]
    difference = ((results["sepconv"] - expected).abs().max() / expected.abs().max()).item()
    return {
        "mode": mode,
        "positions": positions,
        "dtype": "float32",
        "layout": "NLC",
        "threads": torch.get_num_threads(),
        "seconds": of[""]["sepconv"],
        **{f"{part}seconds_of": seconds for part, seconds in of.items()},
        **{f"{part}speedup": seconds["transformers"] / seconds["sepconv"] for part, seconds in of.items()},
        "convolution_calls": len(calls),
        "difference": difference,
        "agrees": difference < 1e-4,
        "errors": {},
        **{
            f"{part}samples_ms": {who: [round(1e3 * s, 4) for s in times] for who, times in by.items()}
            for part, by in samples.items()
        },
    }
