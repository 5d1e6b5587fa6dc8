"""Causal depthwise convolutions: with states, packed, in both memory orders, in chunks and by the token."""

from __future__ import annotations

import itertools
import pickle
import sys
import warnings
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sepconv_ext
from harness import DTYPES, assert_as_accurate, dtype_name, only_our_kernels, random, strictness
from sepconv_ext import functional, reference
from sepconv_ext.causal_conv1d import causal_conv1d_fn, causal_conv1d_varlen_states
from sepconv_ext.causal_conv1d import causal_conv1d_update as update_fn

ops = torch.ops.sepconv_ext
ORDERS = ("NCL", "NLC", "slice", "strided")
PACKED = {
    "two": [0] * 4 + [1] * 9,
    "many": [0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4],
    "padded": [-1, 5, 5, 5, 5, 5, -1, -1, 7, 7, 7, 7, -1],
}


class Case(NamedTuple):
    name: str
    C: int
    L: int
    S: int
    dilation: int = 1
    states: bool = False
    packed: str = ""

    @property
    def reach(self) -> int:
        return (self.S - 1) * self.dilation

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("k4_states", 35, 41, 4, states=True),
    Case("k4_packed", 35, 13, 4, packed="two"),
    Case("k4_packed_states", 16, 13, 4, states=True, packed="many"),
    Case("k3_padded_states", 19, 13, 3, states=True, packed="padded"),
    Case("k2_padded", 5, 13, 2, packed="padded"),
    Case("k7_dilation2_states_longer_than_the_sequence", 9, 5, 7, 2, states=True),
    Case("k5_dilation3_packed_states", 33, 26, 5, 3, states=True, packed="many"),
    Case("k1_states", 3, 7, 1, states=True),
    Case("one_channel", 1, 30, 4, states=True),
    Case("one_position", 40, 1, 4, states=True),
    Case("longer_than_a_stretch", 2, 1300, 4, states=True, packed="two"),
    Case("plain", 24, 20, 4),
)
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def in_order(sequence: Tensor, order: str) -> Tensor:
    """The same [N, C, L] values: contiguous, channels dense, a slice of wider channels, or with gaps everywhere."""
    N, C, L = sequence.shape
    if order == "NCL":
        return sequence.contiguous()
    if order == "strided":
        return sequence.new_full((N, 2 * C, 2 * L), float("nan"))[:, ::2, ::2].copy_(sequence)
    wide = sequence.new_full((N, L, C if order == "NLC" else C + 11), float("nan"))
    return wide[..., :C].transpose(1, 2).copy_(sequence)


def numbers(case: Case, dtype: torch.dtype = torch.int32) -> Tensor | None:
    if not case.packed:
        return None
    row = torch.tensor(PACKED[case.packed]).repeat_interleave(-(-case.L // 13))[: case.L]
    return torch.stack((row, torch.arange(case.L) // 6)).to(dtype)


def tensors(case: Case, dtype: torch.dtype, order: str = "NCL", grad: bool = False) -> list[Tensor | None]:
    """Input, weight, bias and states."""
    x, w, b = random((2, case.C, case.L), dtype, "cpu"), random((case.C, case.S), dtype, "cpu", seed=1), None
    b = random((case.C,), dtype, "cpu", seed=2)
    states = random((2, case.C, case.reach), dtype, "cpu", seed=3) if case.states else None
    made = [in_order(x, order), w, b, states if states is None or order == "NCL" else in_order(states, order)]
    return [t if t is None else t.requires_grad_(grad) for t in made]


def by_float(x: Tensor, w: Tensor, b: Tensor, states: Tensor | None, case: Case, activation: str) -> Tensor:
    """torch's own functions in x's dtype: what rounding costs a peer."""
    given = numbers(case)
    results = []
    for n in range(x.shape[0]):
        row = [0] * case.L if given is None else given[n].tolist()
        begin, parts = 0, []
        for q in range(1, case.L + 1):
            if q < case.L and row[q] == row[q - 1]:
                continue
            run = x[n : n + 1, :, begin:q]
            if states is not None and begin == 0:
                run = torch.cat((states[n : n + 1], run), 2)
            else:
                run = F.pad(run, (case.reach, 0))
            y = reference.ACTIVATIONS[activation](F.conv1d(run, w.unsqueeze(1), b, 1, 0, case.dilation, case.C))
            parts.append(torch.zeros_like(y) if row[begin] < 0 else y)
            begin = q
        results.append(torch.cat(parts, 2))
    return torch.cat(results)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@by_case
def test_values_and_gradients(case: Case, dtype: torch.dtype, order: str) -> None:
    inputs = tensors(case, dtype, order, grad=True)
    exact_inputs = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    given = [t for t in inputs if t is not None]
    activation = ("identity", "silu", "sigmoid")[CASES.index(case) % 3]
    peer = by_float(*inputs, case, activation)
    if case.L < 100:
        exact = reference.causal(*exact_inputs, numbers(case), case.dilation, activation)
    else:
        exact = by_float(*exact_inputs, case, activation)
    g = random(exact.shape, dtype, "cpu", seed=5)
    x, w, b, states = inputs
    with only_our_kernels(at_least=2):
        y = functional.causal_conv1d(x, w, b, activation, states, seq_idx=numbers(case), dilation=case.dilation)
        grads = torch.autograd.grad(y, given, in_order(g, order) if case.C % 2 else g)
    peers = torch.autograd.grad(peer, given, g)
    truths = torch.autograd.grad(exact, [t for t in exact_inputs if t is not None], g.double(), materialize_grads=True)
    for name, ours, theirs, truth in zip("yxwbs", (y, *grads), (peer, *peers), (exact, *truths), strict=False):
        assert_as_accurate(ours.detach(), theirs.detach(), truth.detach(), f"{name} of {case}")
    if order in ("NLC", "slice") and case.C > 1 and case.L > 1:
        assert y.stride(1) == 1 and (order == "slice" or grads[0].stride() == x.stride())


@pytest.mark.cuda
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@by_case
def test_values_and_gradients_on_a_gpu(case: Case, dtype: torch.dtype, order: str) -> None:
    """The forward pass by the kernels of its own; the gradients are compositions there."""
    cpu = tensors(case, dtype, "NCL", grad=True)
    x, w, b, states = (
        t if t is None else in_order(t.detach().cuda(), order) if t.dim() == 3 else t.cuda() for t in cpu
    )
    seq_idx = numbers(case)
    with only_our_kernels():
        seen = seq_idx if seq_idx is None else seq_idx.cuda()
        y, final = functional.causal_conv1d(x, w, b, "silu", states, True, seen, case.dilation)
    exact = by_float(*(t if t is None else t.detach().double() for t in cpu), case, "silu")
    assert_as_accurate(y.cpu(), by_float(*cpu, case, "silu").detach(), exact, str(case))
    _, expected = functional.causal_conv1d(*cpu[:3], "silu", cpu[3], True, seq_idx, case.dilation)
    assert torch.equal(final.cpu(), expected)
    given = [t.detach().requires_grad_() for t in (x, w, b, states) if t is not None]
    again = functional.causal_conv1d(*given[:3], "silu", *given[3:], seq_idx=seen, dilation=case.dilation)
    ours = torch.autograd.grad(again.square().sum(), given, materialize_grads=True)
    truth = [t.detach().double().requires_grad_() for t in cpu if t is not None]
    z = by_float(*truth[:3], truth[3] if states is not None else None, case, "silu")
    for got, want in zip(ours, torch.autograd.grad(z.square().sum(), truth, materialize_grads=True), strict=True):
        close = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
        largest = max(want.abs().flatten().tolist(), default=0)
        torch.testing.assert_close(got.cpu().double(), want, rtol=close, atol=close * largest)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("of", ["xw", "xws", "s", "w"])
def test_gradients_without_a_bias(of: str, packed: bool) -> None:
    """autograd counts the tensors that are there: what comes behind a bias moves up where there is none."""
    case = CASES[3 if packed else 0]
    x, w, _, states = tensors(case, torch.float64)
    named = dict(x=x, w=w, s=states)
    wanted = [named[name].requires_grad_() for name in of]
    i = numbers(case) if packed else None
    y = functional.causal_conv1d(x, w, None, "silu", states, seq_idx=i, dilation=case.dilation)
    exact = reference.causal(x, w, None, states, i, case.dilation, "silu")
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, g), torch.autograd.grad(exact, wanted, g))


def test_a_dilation_beyond_the_sequence_costs_no_more() -> None:
    """Only the last tap sees anything; a window as long as the reach would need gigabytes."""
    x, w = torch.randn(2, 5, 12, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    i = torch.tensor([[0] * 12, [1] * 7 + [2] * 5])
    y = functional.causal_conv1d(x, w, seq_idx=i, dilation=10**8)
    torch.testing.assert_close(y, x * w[:, -1:])
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, w), g)
    torch.testing.assert_close(grads[0], g * w[:, -1:])
    torch.testing.assert_close(grads[1][:, -1], (g * x).sum((0, 2)), rtol=1e-5, atol=1e-5)
    assert not grads[1][:, :-1].any()


def test_the_plain_call_is_one_call_that_copies_nothing() -> None:
    x, w, b = random((2, 13, 40), torch.float32, "cpu").transpose(1, 2)[:, 3:35], *tensors(CASES[0], torch.float32)[1:3]
    w, b = w[:32], b[:32]
    functional.causal_conv1d(x, w, b)  # the first call of a process asks torch what oneDNN can do
    with torch.no_grad(), only_our_kernels(), torch.profiler.profile() as profile:
        y = functional.causal_conv1d(x, w, b, "silu")
    names = {event.key for event in profile.key_averages()}
    assert names <= {"sepconv_ext::conv2d", "aten::unsqueeze", "aten::as_strided", "aten::empty_strided"}, names
    torch.testing.assert_close(y, F.silu(F.conv1d(F.pad(x, (3, 0)), w.unsqueeze(1), b, groups=32)))


@pytest.mark.parametrize("order", ["NCL", "NLC"])
@pytest.mark.parametrize("packed", ["", "padded"])
def test_gradgradcheck(packed: str, order: str) -> None:
    case = Case("", 3, 13 if packed else 5, 3, 2, states=True, packed=packed)
    inputs = tensors(case, torch.float64, order, grad=True)

    def call(*tensors: Tensor) -> Tensor:
        return functional.causal_conv1d(*tensors[:3], "tanh", tensors[3], seq_idx=numbers(case), dilation=case.dilation)

    with only_our_kernels():
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
@pytest.mark.parametrize("order", ["NCL", "slice"])
def test_other_instruction_sets(order: str, instructions: str) -> None:
    if instructions not in sepconv_ext._C.build_info()["cpu_isas"]:
        pytest.skip(f"this build has no {instructions} kernels")
    former = sepconv_ext._C.set_cpu_isa(instructions)
    try:
        for dtype in DTYPES:
            test_values_and_gradients(CASES[6], dtype, order)
            test_update_is_the_reference(dtype, order, 2, True, "cpu")
    finally:
        sepconv_ext._C.set_cpu_isa(former)


@pytest.mark.parametrize("packed", ["", "two", "padded"])
@pytest.mark.parametrize("L", [1, 2, 13])
def test_final_states(L: int, packed: str) -> None:
    case = Case("", 6, L, 4, states=True, packed=packed)
    x, w, b, states = tensors(case, torch.float64)
    seq_idx = numbers(case)
    with only_our_kernels():
        y, final = functional.causal_conv1d(x, w, b, None, states, True, seq_idx)
    joined = torch.cat((states, x), 2)[..., -3:]
    if seq_idx is not None:  # zero but for the last sequence of the row
        for n, row in enumerate(seq_idx.tolist()):
            run = next((i for i in range(L) if row[L - 1 - i] != row[-1]), L + 3 if row[-1] >= 0 else 0)
            run = 0 if row[-1] < 0 else run
            joined[n, :, : max(0, 3 - run)] = 0
    assert torch.equal(final, joined) and final.is_contiguous()
    final += 1  # memory of its own
    assert torch.equal(y, functional.causal_conv1d(x, w, b, None, states, False, seq_idx))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("order", ["NCL", "slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_update_is_the_reference(dtype: torch.dtype, order: str, tokens: int, ring: bool, device: str) -> None:
    """Rows of a larger state, one of them skipped; what the state holds afterwards too."""
    C, S, length, dilation = 37, 3, 6, 2
    x, state = random((3, C, tokens), dtype, "cpu"), random((5, C, length), dtype, "cpu", seed=1)
    w, b = random((C, S), dtype, "cpu", seed=2), random((C,), dtype, "cpu", seed=3)
    rows, before = torch.tensor([4, -1, 0], dtype=torch.int32), torch.tensor([7, 0, 20], dtype=torch.int32)
    ours, expected = in_order(state.to(device, copy=True), order), state.clone()
    with only_our_kernels():
        given = [t.to(device) for t in (w, b)], [t.to(device) if ring or t is rows else None for t in (before, rows)]
        y = functional.causal_conv1d_update(in_order(x.to(device), order), ours, *given[0], "silu", *given[1], dilation)
    exact, peer = torch.zeros(3, C, tokens, dtype=torch.float64), torch.zeros(3, C, tokens, dtype=dtype)
    for n, row in ((0, 4), (2, 0)):
        places = [(int(before[n]) - length + i) % length for i in range(length)] if ring else list(range(length))
        seen = torch.cat((state[row][:, places], x[n]), 1)
        if ring:
            for t in range(tokens):
                expected[row, :, (int(before[n]) + t) % length] = x[n, :, t]
        else:
            expected[row] = seen[:, -length:]
        for out, kind in ((exact, torch.float64), (peer, dtype)):
            z = seen[:, -(tokens + 4) :].to(kind).unsqueeze(0)
            out[n] = F.silu(F.conv1d(z, w.to(kind).unsqueeze(1), b.to(kind), dilation=dilation, groups=C))[0]
    assert torch.equal(ours.cpu(), expected)
    assert_as_accurate(y.cpu(), peer, exact)
    if tokens < 9 and device == "cpu":  # the composition, which other devices take
        composed, geometry = state.clone()[None], (w, b, "silu", before if ring else None, rows, dilation)
        with strictness(False):
            other = torch.func.vmap(lambda x, state: functional.causal_conv1d_update(x, state, *geometry))(
                x[None], composed
            )[0]
        assert torch.equal(composed[0], expected)
        assert_as_accurate(other, peer, exact)


def test_update_of_one_token_with_wide_weights() -> None:
    x, state = random((2, 20), torch.bfloat16, "cpu"), random((2, 20, 3), torch.bfloat16, "cpu", seed=1)
    w, b = random((20, 4), torch.float32, "cpu", seed=2), random((20,), torch.float32, "cpu", seed=3)
    seen = torch.cat((state, x.unsqueeze(2)), 2)
    with only_our_kernels():
        y = functional.causal_conv1d_update(x, state, w, b)
    expected = (seen.double() * w.double()).sum(2) + b.double()
    assert y.dtype == torch.bfloat16 and torch.equal(state, seen[..., 1:])
    torch.testing.assert_close(y.double(), expected, rtol=4e-3, atol=1e-2)


@pytest.mark.parametrize("chunks", [(1, 1, 5, 2, 11), (20,)])
def test_chunks_are_the_whole(chunks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = sepconv_ext.nn.CausalConv1d(9, 4, dilation=2, activation="silu")
    x = torch.randn(2, 9, 20)
    whole = layer(x)
    state, outputs = None, []
    for chunk in x.split(chunks, 2):
        y, state = layer.step(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    state = layer.initial_state(2)
    tokens = [layer.update(x[:, :, q], state) for q in range(20)]
    torch.testing.assert_close(torch.stack(tokens, 2), whole)
    torch.testing.assert_close(state, x[..., -6:])


def test_layer_is_a_conv1d() -> None:
    theirs = nn.Conv1d(6, 6, 4, padding=3, groups=6)
    ours = sepconv_ext.nn.CausalConv1d(6, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 17)
    torch.testing.assert_close(ours(x), theirs(x)[..., :17])
    assert repr(ours) == "CausalConv1d(6, kernel_size=4)"
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    with pytest.raises(ValueError, match="activation must be one of"):
        sepconv_ext.nn.CausalConv1d(6, 4, activation="bogus")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["NCL", "slice"])
def test_unbatched_is_a_batch_of_one(order: str, packed: bool) -> None:
    """As F.conv1d takes [C, L]: states and numbers without N, too, and the results have none."""
    case = CASES[2]
    x, w, b, states = tensors(case, torch.float32, order)
    i = numbers(case) if packed else None
    whole = functional.causal_conv1d(x[1:], w, b, "silu", states[1:], True, None if i is None else i[1:])
    one = functional.causal_conv1d(x[1], w, b, "silu", states[1], True, None if i is None else i[1])
    assert one[0].shape == x[1].shape
    for actual, expected in zip(one, whole, strict=True):
        torch.testing.assert_close(actual, expected[0])
    plain = functional.causal_conv1d(x[1], w, b)
    expected = F.conv1d(F.pad(x[1], (w.shape[-1] - 1, 0)), w.unsqueeze(1), b, groups=case.C)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)


def test_results_are_tensors_of_their_own() -> None:
    """Not views: hooks outlive in-place use, and what no_grad made is added to."""
    x, w = torch.randn(4, 9, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    states = torch.zeros(4, 2)
    results = [
        functional.causal_conv1d(x, w),
        *functional.causal_conv1d(x, w, None, "silu", states, True),
        functional.causal_conv1d_update(x.detach()[:, :4], torch.zeros(4, 4, 2), w.detach()),
        sepconv_ext.nn.CausalConv1d(4, 3)(x),
    ]
    for result in results:
        assert not result._is_view()
        result.detach_()
    y, seen = functional.causal_conv1d(x, w, None, None, states), []
    y.register_hook(seen.append)
    y.relu_().sum().backward()
    assert len(seen) == 1
    with torch.no_grad():
        y = functional.causal_conv1d(x, w, None, None, states)
    y += w.sum()
    y.sum().backward()


@pytest.mark.parametrize("wide", [False, True])
def test_the_other_packages_names(wide: bool) -> None:
    x, w, b, states = tensors(CASES[0], torch.bfloat16 if wide else torch.float32)
    w, b = w.float(), b.float()
    out = torch.empty_like(states)
    y, final = causal_conv1d_fn(x, w, b, None, states, True, out, "swish")
    expected = F.silu(F.conv1d(torch.cat((states, x), 2).float(), w.unsqueeze(1), b, groups=35))
    assert y.dtype == x.dtype and final is out and torch.equal(out, x[..., -3:])
    torch.testing.assert_close(y, expected.to(x.dtype))
    token = random((2, 35), x.dtype, "cpu", seed=9)
    y = update_fn(token, out, w, b, "silu")
    expected = F.silu((torch.cat((x[..., -3:], token.unsqueeze(2)), 2).float() * w).sum(2) + b)
    torch.testing.assert_close(y, expected.to(x.dtype))
    for function in (lambda: causal_conv1d_fn(x, w, activation="bogus"), lambda: update_fn(token, out, w, b, "bogus")):
        with pytest.raises(NotImplementedError, match="bogus"):
            function()


@pytest.mark.parametrize("of_weight", [d for d in DTYPES if d != torch.float64], ids=dtype_name)
@pytest.mark.parametrize("of_x", DTYPES, ids=dtype_name)
def test_the_other_packages_functions_take_any_two_dtypes(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    """Results are x's, and as exact as x's type allows where the weight's is narrower."""
    x, _, _, states = tensors(CASES[0], of_x)
    _, w, b, _ = tensors(CASES[0], of_weight)
    seen = torch.cat((states, x), 2).double()
    expected = F.silu(F.conv1d(seen, w.unsqueeze(1).double(), b.double(), groups=35))
    close = dict(rtol=8 * torch.finfo(of_x).eps, atol=16 * torch.finfo(of_x).eps)
    y = causal_conv1d_fn(x, w, b, None, states, activation="silu")
    tokens = update_fn(x, states, w, b, "silu")
    for actual in (y, tokens):
        assert actual.dtype == of_x
        torch.testing.assert_close(actual.double(), expected, **close)
    assert torch.equal(states, x[..., -3:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_states_of_sequences_one_behind_the_other(dtype: torch.dtype) -> None:
    x = random((14, 5), torch.float32, "cpu").requires_grad_()
    begins = torch.tensor([0, 2, 2, 9, 14], dtype=dtype)  # the second is empty
    states = causal_conv1d_varlen_states(x, begins, 3)
    expected = [F.pad(x[i:j].T, (3, 0))[:, -3:] for i, j in itertools.pairwise(begins)]
    assert torch.equal(states, torch.stack(expected)) and states.shape == (4, 5, 3) and states.stride(1) == 1
    (grad,) = torch.autograd.grad(states.sum(), x)
    assert torch.equal(grad[:, 0], torch.tensor([1.0] * 2 + [0] * 4 + [1] * 3 + [0] * 2 + [1] * 3))
    assert causal_conv1d_varlen_states(x[:0], begins[:1].expand(3), 3).equal(torch.zeros(2, 5, 3))
    assert causal_conv1d_varlen_states(x, begins, 0).shape == (4, 5, 0)


def test_bad_input_of_states_of_sequences() -> None:
    x, begins = torch.ones(4, 3), torch.tensor([0, 4])
    for given, said in {
        (x[0], begins, 2): r"x must be \[tokens, C\], but has size \[3\]",
        (x, begins[None], 2): r"cu_seqlens must be \[N \+ 1\], but has size \[1, 2\]",
        (x, begins.float(), 2): "cu_seqlens must be of whole numbers, but is torch.float32",
        (x, begins, -1): "state_len must be at least 0, but is -1",
    }.items():
        with pytest.raises(RuntimeError, match=said):
            causal_conv1d_varlen_states(*given)
    with pytest.raises(TypeError, match="cu_seqlens"):
        causal_conv1d_varlen_states(x, [0, 4], 2)


def test_registered_in_the_place_of_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever that package has the functions; what was imported before keeps its own, and a warning names it."""
    names = ("causal_conv1d", "causal_conv1d.causal_conv1d_interface", "causal_conv1d.causal_conv1d_varlen")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # none, and as it was afterwards
    others = [name for name, module in sys.modules.items() if hasattr(module, "causal_conv1d_fn")]
    for name in {*others, __name__} - {"sepconv_ext.causal_conv1d"}:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "a_client", early := ModuleType("a_client"))
    early.causal_conv1d_fn = print
    with pytest.warns(RuntimeWarning, match="too late for a_client, which"):
        sepconv_ext.causal_conv1d.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sepconv_ext.causal_conv1d.register()
    for name, function in zip(
        names, ("causal_conv1d_update", "causal_conv1d_fn", "causal_conv1d_varlen_states"), strict=True
    ):
        scope: dict = {}
        exec(f"from {name} import {function}", scope)
        assert scope[function] is getattr(sepconv_ext.causal_conv1d, function)


BAD = {
    "input": (lambda x, w, b, s, i: (x[0, 0], w, b, s, i), "input must be"),
    "states_of_a_batch": (lambda x, w, b, s, i: (x[0], w, b, s, i[0]), "initial_states must have size"),
    "weight": (lambda x, w, b, s, i: (x, w[:3], b, s, i), "weight must be"),
    "bias": (lambda x, w, b, s, i: (x, w, b[:3], s, i), "bias"),
    "weight_dtype": (lambda x, w, b, s, i: (x, w.double(), b, s, i), "weight has dtype"),
    "states": (lambda x, w, b, s, i: (x, w, b, s[..., 1:], i), "initial_states must have size"),
    "states_dtype": (lambda x, w, b, s, i: (x, w, b, s.double(), i), "initial_states has dtype"),
    "seq_idx": (lambda x, w, b, s, i: (x, w, b, s, i[:, 1:]), "seq_idx must have size"),
    "seq_idx_dtype": (lambda x, w, b, s, i: (x, w, b, s, i.float()), "seq_idx must be of whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    case = CASES[2]
    change, words = BAD[name]
    x, w, b, s, i = change(*tensors(case, torch.float32), numbers(case))
    with pytest.raises(RuntimeError, match=words):
        functional.causal_conv1d(x, w, b, None, s, seq_idx=i)


def test_bad_input_of_an_update() -> None:
    x, state, w = torch.ones(2, 4, 1), torch.ones(2, 4, 3), torch.ones(4, 4)
    call = functional.causal_conv1d_update
    with pytest.raises(RuntimeError, match=r"state must have at least .* = 3 positions, but has 2"):
        call(x, state[..., :2], w)
    with pytest.raises(RuntimeError, match=r"state must be \[2, 4, length\]"):
        call(x, state[:1], w)
    with pytest.raises(RuntimeError, match="weight has dtype"):
        call(x, state, w.double())
    with pytest.raises(IndexError, match="below the 2 states, but has 2 at 1"):
        call(x, state, w, state_indices=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="activation must be one of"):
        call(x, state, w, activation="bogus")
    with pytest.raises(RuntimeError, match="dilation must be"):
        call(x, state, w, dilation=0)


@pytest.mark.parametrize("order", ["NCL", "slice"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids=str)
def test_opcheck(case: Case, order: str) -> None:
    x, w, b, states = tensors(case, torch.float32, order, grad=True)
    i, g = numbers(case), random((2, case.C, case.L), torch.float32, "cpu").requires_grad_()
    torch.library.opcheck(ops.causal_conv1d.default, (x, w, b, states, i, 1, "relu"))
    torch.library.opcheck(ops.causal_conv1d_grad_input.default, (g, w, i, list(x.stride()), 1, True))
    torch.library.opcheck(ops.causal_conv1d_grad_weight.default, (g, x, states, i, case.S, 1))
    with torch.no_grad():
        arguments = (x.detach(), torch.zeros(2, case.C, 5), w.detach(), None, None, None, 1, "silu")
        torch.library.opcheck(ops.causal_conv1d_update.default, arguments)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[-1]], ids=str)
def test_compile_and_transforms(case: Case) -> None:
    x, w, b, states = tensors(case, torch.float32)
    i = numbers(case)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return functional.causal_conv1d(x, w, b, "silu", states, seq_idx=i)

    y = call(x, w)
    counter = CompileCounterWithBackend("aot_eager")
    torch.testing.assert_close(torch.compile(call, backend=counter, fullgraph=True)(x, w), y)
    assert counter.frame_count == 1
    if case.states:  # the composition, which other devices take
        mapped = torch.func.vmap(call, in_dims=(None, 0))(x, w.expand(2, -1, -1))
        torch.testing.assert_close(mapped, y.expand(2, -1, -1, -1))
        tangent = torch.func.jvp(lambda w: call(x, w), (w,), (w,))[1]
        ours = torch.autograd.functional.jvp(lambda w: call(x, w), (w,), (w,))[1]
        torch.testing.assert_close(tangent, ours)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("ring", [False, True])
def test_compiled_update(ring: bool) -> None:
    def call(x: Tensor, state: Tensor) -> Tensor:
        lengths = torch.tensor([3, 5]) if ring else None
        return functional.causal_conv1d_update(x, state, w, None, "silu", lengths)

    x, state, w = torch.randn(2, 6), torch.randn(2, 6, 4), torch.randn(6, 4)
    other = state.clone()
    y = call(x, state)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(x, other), y)
    assert torch.equal(state, other)
