"""transformers' state-space models with this package in the place of causal-conv1d, and by their own slow path."""

from __future__ import annotations

import sys
import warnings
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
SCAN = dict(state_size=4, time_step_rank=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)
LATENT = dict(
    kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, linear_head_dim=8, linear_num_heads=4
)
NEMOTRON = dict(ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=1, chunk_size=8, head_dim=8)
MODELS = {
    "mamba": ("Mamba", SCAN),
    "mamba2": ("Mamba2", dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)),
    "falcon_h1": ("FalconH1", {**ATTENTION, **HEADS, "mamba_d_ssm": 64}),
    "bamba": ("Bamba", {**ATTENTION, **HEADS, "attn_layer_indices": [1]}),
    "falcon_mamba": ("FalconMamba", SCAN),
    "granitemoehybrid": ("GraniteMoeHybrid", {**ATTENTION, **HEADS, "layer_types": ["mamba", "attention"]}),
    "jamba": (
        "Jamba",
        {**ATTENTION, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "kimi_linear": (
        "KimiLinear",
        {
            **ATTENTION,
            **LATENT,
            "num_key_value_heads": 4,
            "layer_types": LINEAR["layer_types"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "lfm2": ("Lfm2", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "nemotron_h": ("NemotronH", {**ATTENTION, **NEMOTRON, "layers_block_type": ["mamba", "attention"]}),
    "olmo_hybrid": ("OlmoHybrid", {**ATTENTION, **LINEAR}),
    "qwen3_next": ("Qwen3Next", {**ATTENTION, **LINEAR, **EXPERTS, "head_dim": 8}),
    "zamba2": (
        "Zamba2",
        {
            **ATTENTION,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def modeling(request: pytest.FixtureRequest) -> ModuleType:
    return _imported(request.param)


def _imported(model: str) -> ModuleType:
    """The module of a model, which imports causal_conv1d and gets this package's."""
    name = f"transformers.models.{model}.modeling_{model}"
    sys.modules.pop(name, None)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the models of other tests, which keep their own
        for other in sepconv_ext.causal_conv1d._MODULES:
            patch.setitem(sys.modules, other, None)  # as it was, afterwards
        sepconv_ext.causal_conv1d.register()
        return pytest.importorskip(name, reason="a model of newer releases of transformers")


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


def test_packed_rows_by_seq_idx() -> None:
    """A model whose layers all are convolutions: each sequence of a row gives what it gives alone."""
    modeling = _imported("lfm2")
    config = transformers.Lfm2Config(**SMALL, **ATTENTION, layer_types=["conv", "conv"])
    model = modeling.Lfm2ForCausalLM(config).eval()
    tokens, seq_idx = torch.randint(3, 64, (1, 20)), torch.tensor([[0] * 8 + [1] * 12])
    parts = [model(part, use_cache=False).logits for part in tokens.split((8, 12), 1)]
    packed = model(tokens, seq_idx=seq_idx, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(parts, 1))
    assert not torch.equal(model(tokens, use_cache=False).logits, packed)
