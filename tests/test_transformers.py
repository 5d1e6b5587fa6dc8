"""transformers' state-space models with this package in the place of causal-conv1d, and by their own slow path."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import sepconv_ext
from harness import strictness

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
HEADS = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
MODELS = {
    "mamba": ("Mamba", dict(state_size=4, time_step_rank=4)),
    "mamba2": ("Mamba2", dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)),
    "falcon_h1": ("FalconH1", {**ATTENTION, **HEADS, "mamba_d_ssm": 64}),
    "bamba": ("Bamba", {**ATTENTION, **HEADS, "attn_layer_indices": [1]}),
}


@pytest.fixture(scope="module", params=MODELS)
def modeling(request: pytest.FixtureRequest) -> ModuleType:
    """The module of a model, which imports causal_conv1d and gets this package's."""
    name = request.param
    former = sys.modules.get("causal_conv1d")
    sys.modules["causal_conv1d"] = sepconv_ext.causal_conv1d
    try:
        sys.modules.pop(f"transformers.models.{name}.modeling_{name}", None)
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    finally:
        if former is None:
            del sys.modules["causal_conv1d"]
        else:
            sys.modules["causal_conv1d"] = former


def test_prefill_generation_and_gradients(modeling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = MODELS[modeling.__name__.rsplit(".", 1)[1].removeprefix("modeling_")]
    config = getattr(transformers, f"{name}Config")(**SMALL, **arguments)
    torch.manual_seed(0)
    model: nn.Module = getattr(modeling, f"{name}ForCausalLM")(config).eval()
    tokens = torch.randint(3, 64, (2, 11))

    def run() -> tuple:
        model.zero_grad()
        output = model(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            made = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None)
        return output.logits.detach(), grads, made

    sepconv_ext.reset_kernel_counts()
    with strictness(True):
        logits, grads, made = run()
    counts = sepconv_ext.kernel_counts()
    mixers = sum(isinstance(layer, nn.Conv1d) for layer in model.modules())  # Bamba has a layer of attention, too
    assert counts["cpu_causal_update"] == mixers * 5 and "aten" not in counts, counts
    for function in ("causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(modeling, function, getattr(modeling, function).__wrapped__)
    sepconv_ext.reset_kernel_counts()
    slow_logits, slow_grads, slow_made = run()
    assert not sepconv_ext.kernel_counts()
    torch.testing.assert_close(logits, slow_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, slow_grads, rtol=1e-3, atol=1e-5)
    assert torch.equal(made, slow_made)
