"""The compiled part (csrc/ops/library.cpp and functional.cpp). Importing it registers the ops."""

from collections.abc import Callable, Sequence
from typing import TypedDict

from torch import Tensor

_IntOrSequence = int | Sequence[int]

class _BuildInfo(TypedDict):
    cuda: bool
    cuda_version: str | None
    cuda_archs: list[str]
    debug: bool
    compiler: str
    torch_version: str
    cpu_isas: list[str]
    cpu_isa: str

class Explanation:
    @property
    def kernel(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def aten(self) -> bool: ...
    @property
    def tile(self) -> str: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def adds_residual(self) -> bool: ...

def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrSequence = 1,
    padding: _IntOrSequence | str = 0,
    dilation: _IntOrSequence = 1,
    groups: int = 1,
    *,
    activation: str = "identity",
    padding_mode: str = "zeros",
) -> Tensor: ...
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrSequence = 1,
    padding: _IntOrSequence | str = 0,
    dilation: _IntOrSequence = 1,
    groups: int = 1,
    *,
    activation: str = "identity",
    padding_mode: str = "zeros",
) -> Tensor: ...
def explain(
    map: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    cuda_device: tuple[int, int] | None = None,
    padding_mode: str = "zeros",
    grad_output: Tensor | None = None,
    activation: str = "identity",
    residual: bool = False,
) -> Explanation: ...
def explain_separable(
    input: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    /,
) -> Explanation: ...
def explain_inverted_residual(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    excite_weight: Tensor | None,
    excite_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    residual: bool,
    cuda_device: tuple[int, int] | None = None,
) -> Explanation: ...
def run_plan(kernel: str, cut: dict[str, int], call: Callable[[], Tensor]) -> Tensor: ...
def check_storage(name: str, tensor: Tensor, /) -> None: ...
def cast_by_autocast(tensor: Tensor, /) -> Tensor: ...
def activations() -> list[str]: ...
def derivative_from_output(activation: str, /) -> bool: ...
def retain_program(code: str, /) -> None: ...
def release_program(code: str, /) -> None: ...
def idle_arena_bytes() -> int: ...
def run_program(inputs: Sequence[Tensor], constants: Tensor, code: str, /) -> list[Tensor]: ...
def program_times(
    inputs: Sequence[Tensor], constants: Tensor, code: str, times: int, /
) -> list[tuple[str, list[int], list[int], float]]: ...
def build_info() -> _BuildInfo: ...
def kernel_counts() -> dict[str, int]: ...
def reset_kernel_counts() -> None: ...
def set_cpu_isa(name: str, /) -> str: ...
def set_likes_long_runs(likes: bool, /) -> bool: ...
def set_half_kernels(bfloat16: bool, float16: bool, /) -> tuple[bool, bool]: ...
def set_strict(on: bool, /) -> None: ...
def strict() -> bool: ...
