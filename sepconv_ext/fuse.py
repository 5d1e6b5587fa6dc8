"""Finds the chains of a model and lets each run as one op.

What follows what is read from the graph that torch.fx traces: a model's forward may use its modules in any order, twice
or not at all. Where a model does not trace, its parts are traced each on its own, down to the nn.Sequentials, whose
order is their structure. What is traced is a copy that shares the parameters, so that a forward that keeps something on
the model keeps it on the copy.

A chain is put in place by one attribute on each of its modules: `forward`. The first module's runs the chain, the
others' hand their input on; as soon as the chain may not run as one op (see `Chain.is_fused`), each does its own work
again. Classes, Parameters, buffers and names stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrize

from .fold import Chain, Place, Stage, has_hooks, is_depthwise, is_pointwise
from .nn import Conv2d, DepthwiseConv2d, PointwiseConv2d, SeparableConv2d

__all__ = ["Findings", "Found", "chain_of", "find_chains", "fuse_", "unfuse_"]

_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_CONVOLUTIONS = (nn.Conv2d, Conv2d, DepthwiseConv2d, PointwiseConv2d)


# --- a chain in place ---


class Member:
    """The `forward` of a module in a fused chain."""

    def __init__(self, chain: Chain, module: nn.Module) -> None:
        self.chain = chain
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        chain = self.chain
        if self.module is chain.members[0]:
            traced = torch.compiler.is_compiling()  # then nothing is kept for the other members
            if chain.is_fused:
                output = chain(input)
                chain.apart, chain.given = 0, None if traced else weakref.ref(output)
                return output
            # Now the others must do their own work too, even if a hook that is the reason takes itself away meanwhile.
            chain.apart, chain.given = 0 if traced else len(chain.members) - 1, None
        elif self._is_done(input):
            return input
        chain.forget()  # batch norm changes its statistics behind autograd's back
        return type(self.module).forward(self.module, input)

    def _is_done(self, input: Tensor) -> bool:
        """Whether the work of this member, one behind the first, was done by the chain."""
        chain = self.chain
        if torch.compiler.is_compiling():
            return chain.is_fused
        if chain.given is not None and chain.given() is input:
            if self.module is chain.members[-1]:
                chain.given = None
            return True
        if chain.apart:
            chain.apart -= 1
            return False
        return chain.is_fused  # a pass that did not begin with the first member: what checkpointing runs again


def fuse_(chain: Chain) -> None:
    for module in chain.members:
        module.__dict__["forward"] = Member(chain, module)
    chain.settle()


def unfuse_(model: nn.Module) -> int:
    """Takes every chain out of a model. Returns how many there were."""
    members = [module for module in model.modules() if chain_of(module) is not None]
    chains = {id(chain_of(module)) for module in members}
    for module in members:
        del module.__dict__["forward"]
    return len(chains)


def chain_of(module: nn.Module) -> Chain | None:
    """The fused chain that a module is a member of."""
    forward = module.__dict__.get("forward")
    return forward.chain if isinstance(forward, Member) else None


def _part_compiled_blocks(parent: nn.Module, name: str, block: nn.Module | None) -> None:
    """Ends the chains that a block holds a part of, when torch.compile wraps it.

    Dynamo sees through the wrapper where it compares modules and eager mode does not: they would disagree on whether
    the wrapped block is in its place.
    """
    if name == "_orig_mod" and block is not None:
        inside = set(block.modules())
        for module in inside:
            chain = chain_of(module)
            if chain is not None and not inside.issuperset(chain.members):
                chain.ended = True


register_module_module_registration_hook(_part_compiled_blocks)


# --- finding chains ---


@dataclass(frozen=True)
class FoundStage:
    """A stage by the names of its modules."""

    conv: str
    norm: str | None
    activation: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A chain by the names of its modules, and why no more belongs to it."""

    stages: tuple[FoundStage, ...]
    end: str = field(compare=False)

    @property
    def is_trivial(self) -> bool:
        """A convolution alone: nothing to fuse."""
        (stage, *more) = self.stages
        return not more and stage.members[-1] == stage.conv

    def only(self, may_use: Callable[[str], bool]) -> list[Found]:
        """The chain, or, where not all of its convolutions may be used, those stages that may."""
        usable = [stage for stage in self.stages if may_use(stage.conv)]
        if len(usable) == len(self.stages):
            return [self]
        return [Found((stage,), "the pointwise convolution behind it was skipped") for stage in usable]

    def bind(self, model: nn.Module) -> Chain:
        module = model.get_submodule
        stages = [Stage(module(s.conv), module(s.norm) if s.norm else None, s.activation) for s in self.stages]
        members = [module(name) for stage in self.stages for name in stage.members]
        return Chain(stages, members, _places(model, set(members)))


def _places(model: nn.Module, members: set[nn.Module]) -> list[Place]:
    """Where the members of a chain are registered, and whatever holds some of them but not all: what a module put in
    one of these places does, comes between them."""
    places = []

    def held(parent: nn.Module) -> set[nn.Module]:
        found = {parent} & members
        for name, child in parent._modules.items():
            if child is None:
                continue
            inside = held(child)
            if inside and parent not in members and inside != members:
                places.append((parent, name, child))
            found |= inside
        return found

    held(model)
    return places


@dataclass
class Findings:
    """The chains of a model in the order of its modules, and why a convolution is in none, by its name."""

    chains: list[Found] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    problem: str = "torch.fx sees no call of it"  # of a convolution that is in neither


def find_chains(model: nn.Module) -> Findings:
    """Looks for chains.

    A depthwise convolution with a pointwise one right behind it begins a chain of two stages, any other convolution a
    chain of one. A chain counts only if the model has it in train() and in eval().
    """
    shared = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())]
    try:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared if isinstance(tensor, Tensor)})
    except Exception as error:
        return Findings(problem=f"the model cannot be copied for tracing: {type(error).__name__}: {error}")
    names = {module: name for name, module in twin.named_modules()}
    modes = []
    for training in (model.training, not model.training):
        for module in names:
            module.training = training
        modes.append(_Finder(twin, names).findings())
    now, otherwise = modes
    differing = [(otherwise.chains, "train() and eval() differ there")]
    flags = _flags(twin)
    for flip in dict.fromkeys([flags, *(frozenset([flag]) for flag in flags)] if flags else []):
        reason = f"{' or '.join(sorted(flip))} of a forward changes what is there"
        differing.append((_Finder(twin, names, flip).findings().chains, reason))
    for chains, reason in differing:
        now.refused |= {chain.stages[0].conv: reason for chain in now.chains if chain not in chains}
        now.chains = [chain for chain in now.chains if chain in chains]
    return now


def _flags(model: nn.Module) -> frozenset[str]:
    """The arguments of the forwards in a model that are True or False by default."""
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    forwards = [inspect.signature(kind.forward) for kind in kinds if inspect.isfunction(kind.forward)]
    arguments = [argument for forward in forwards for argument in forward.parameters.values()]
    return frozenset(a.name for a in arguments if type(a.default) is bool)


class _Tracer(fx.Tracer):
    """Stops at convolutions, norms, activations, and at modules that cannot be looked into."""

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__(param_shapes_constant=True)
        self.opaque = opaque

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.opaque or _is_part(module) or super().is_leaf_module(module, name)


def _is_part(module: nn.Module) -> bool:
    """A module that is taken whole: what chains are made of, and the layer that is a chain already."""
    return (
        isinstance(module, (nn.Conv2d, _BatchNorm, SeparableConv2d))
        or _is_frozen_norm(module)
        or _activation(module) is not None
    )


def _is_frozen_norm(module: nn.Module) -> bool:
    """torchvision.ops.FrozenBatchNorm2d."""
    return type(module).__name__ == "FrozenBatchNorm2d" and type(module).__module__.startswith("torchvision.")


def _activation(module: nn.Module) -> str | None:
    """The kernel's name for what an activation module computes."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if type(module) is nn.ReLU6:
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    return _ACTIVATIONS.get(type(module))


def _norm_activation(module: nn.Module) -> str | None:
    """The activation that a batch norm holds itself ("identity" mostly); None: not a norm that can be folded."""
    if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
        return None
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_frozen_norm(module):
        return "identity"
    timms = type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")
    if not timms or type(module.drop) is not nn.Identity:
        return None
    return "identity" if type(module.act) is nn.Identity else _activation(module.act)


class _Finder:
    """The chains of one model in one mode."""

    def __init__(self, model: nn.Module, names: dict[nn.Module, str], flip: frozenset[str] = frozenset()) -> None:
        self.names = names
        graphs = _graphs(model, flip)
        self.modules: dict[fx.Node, nn.Module] = {
            node: root.get_submodule(node.target)
            for root, graph in graphs
            for node in graph.nodes
            if node.op == "call_module"
        }
        calls = Counter(self.modules.values())
        registered = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        # In a model that was traced in parts, the rest may call a module under its other name.
        in_parts = [root for root, _ in graphs] != [model]
        self.shared = {m for m in names if calls[m] > 1 or (in_parts and registered[m] > 1)}

    def findings(self) -> Findings:
        found: dict[nn.Module, Found] = {}
        refused: dict[str, str] = {}
        taken: set[fx.Node] = set()
        convolutions = [node for node, module in self.modules.items() if isinstance(module, nn.Conv2d)]
        convolutions.sort(key=lambda node: not is_depthwise(self.modules[node]))  # they choose first
        for node in convolutions:
            conv = self.modules[node]
            if refusal := self._refusal(conv):
                refused[self.names[conv]] = f"it {refusal}"
            elif node not in taken:
                stage, passed, follower, end = self._stage(node, [])
                stages = [stage]
                if follower is not None and self._is_second(node, follower):
                    second, _, _, end = self._stage(follower, passed)
                    stages.append(second)
                    taken.add(follower)
                found[conv] = Found(tuple(stages), end)
        return Findings([found[module] for module in self.names if module in found], refused)

    def _is_second(self, node: fx.Node, follower: fx.Node) -> bool:
        conv = self.modules[follower]
        return is_depthwise(self.modules[node]) and isinstance(conv, nn.Conv2d) and is_pointwise(conv)

    def _stage(self, node: fx.Node, before: list[nn.Module]) -> tuple[FoundStage, list[nn.Module], fx.Node | None, str]:
        """The stage that a convolution begins, with the identities before it.

        And the node behind it that may be fused too, the identities on the way there, and what ends the stage.
        """
        conv, norm = self.modules[node], None
        activation = getattr(conv, "activation", "identity")
        members = [*before, conv]
        passed, follower, end = self._next(node)
        if activation == "identity" and follower and (own := _norm_activation(self.modules[follower])):
            norm, activation = self.modules[follower], own
            members += [*passed, norm]
            passed, follower, end = self._next(follower)
        # A dense convolution runs as torch's own, which takes no activation.
        dense = conv.groups == 1 and not is_pointwise(conv) and not is_depthwise(conv)
        if activation == "identity" and follower and not dense and (own := _activation(self.modules[follower])):
            activation = own
            members += [*passed, self.modules[follower]]
            passed, follower, end = self._next(follower)
        if follower is not None:
            end = f"{type(self.modules[follower]).__name__} follows"
        name = self.names
        stage = FoundStage(name[conv], norm and name[norm], activation, tuple(name[member] for member in members))
        return stage, passed, follower, end

    def _next(self, node: fx.Node) -> tuple[list[nn.Module], fx.Node | None, str]:
        """The one module call that the output goes to, the identities on the way, and why there is none such."""
        passed: list[nn.Module] = []
        while True:
            if len(node.users) != 1:
                return passed, None, f"its output is used in {len(node.users)} places"
            (user,) = node.users
            if user.op == "output":
                return passed, None, "its output is returned"
            if user.op != "call_module":
                return passed, None, f"{getattr(user.target, '__name__', user.target)}() follows"
            module = self.modules[user]
            if user.args != (node,) or user.kwargs:
                return passed, None, f"{type(module).__name__} follows, called with more than its input or by keyword"
            if refusal := self._refusal(module):
                return passed, None, f"{type(module).__name__} follows, which {refusal}"
            if type(module) is not nn.Identity:
                return passed, user, ""
            passed.append(module)
            node = user

    def _refusal(self, module: nn.Module) -> str:
        """Why a module cannot be part of a chain."""
        if module in self.shared:
            return "is used in several places"
        if any(has_hooks(inner) for inner in module.modules()):
            return "has hooks"
        if parametrize.is_parametrized(module):
            return "is parametrized"
        if chain_of(module) is not None:
            return "was fused before"
        if "forward" in module.__dict__:
            return "has its forward replaced on the instance"
        if isinstance(module, nn.Conv2d) and type(module) not in _CONVOLUTIONS:
            return f"is a class of its own: {type(module).__name__}"
        return ""


# What goes over modules without their names.
_NAMELESS = re.compile(r"\b(children|modules|_modules|getattr|get_submodule)\b")
# What goes over the parts of such a module.
_NESTED = re.compile(
    r"""
    \b in \s+ (?: \w+\( )*  # a loop, perhaps through enumerate(reversed(
    (?:
        (?! self\b | range\b ) [a-z_]\w*\b (?! \s*[.(] )  # over a local variable
        | [\w.]+ \[  # or over blocks[0]
    )
    | \] \s* [.\[]  # or blocks[0].conv, blocks[0][1]
    """,
    re.VERBOSE,
)


def _source(module: nn.Module) -> str:
    """What a module's class does in its forward, in methods of its own, those that build it aside, and in functions of
    its package that these call."""
    package = type(module).__module__.split(".")[0]
    sources: dict[Callable, str] = {}

    def read(function: Callable) -> None:
        function = inspect.unwrap(function)
        if not inspect.isfunction(function) or function in sources:
            return
        sources[function] = source = _source_of(function)
        for called in map(function.__globals__.get, re.findall(r"(?<![.\w])(\w+)\(", source)):
            if inspect.isfunction(called) and called.__module__.split(".")[0] == package:
                read(called)

    for cls in type(module).__mro__:
        if cls is not object and not cls.__module__.startswith("torch.nn."):
            for name, method in vars(cls).items():
                if "init" not in name:
                    read(method.fget if isinstance(method, property) else getattr(method, "__func__", method))
    return "\n".join(sources.values())


def _source_of(function: FunctionType) -> str:
    """Where it is not to be had: a loop over anything, with the names that the function uses."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return f"for it in modules: {' '.join(f'it.{name} ' for name in function.__code__.co_names)}"


def _may_be_taken_apart(parent: nn.Module, name: str, child: nn.Module, sources: str) -> bool:
    """Whether forwards that do not trace, of the modules around, may call the parts of `child` one by one: their
    sources do more with it than call it, name its parts, or go over modules without their names."""
    if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        if isinstance(child, nn.Sequential) and _NAMELESS.search(sources):
            return True
        if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return bool(_NESTED.search(sources))
        taken = rf"\.{re.escape(name)}\b(?!\()"
        inside = re.search(taken, _source(parent)) or re.search(r"(?<!\bself)" + taken, sources)
        return isinstance(child, nn.Sequential) and bool(inside)
    parts = "|".join(map(re.escape, child._modules))
    return bool(parts and re.search(rf"(?<!\bself)\.({parts})\b", sources))


def _graphs(model: nn.Module, flip: frozenset[str] = frozenset()) -> list[tuple[nn.Module, fx.Graph]]:
    """The graph of the model; or, where something in it does not trace, of all its parts that do.

    A module that does not trace is opaque to the one around it, and so is one with hooks, which would be run. The
    arguments named in `flip`, True or False by default, have the other value.
    """
    hooked = [module for module in model.modules() if has_hooks(module) and not _is_part(module)]
    opaque, untraceable = set(hooked), []

    def trace(root: nn.Module) -> fx.Graph | None:
        try:
            arguments = inspect.signature(root.forward).parameters.values()
            defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
            defaults |= {name: not value for name, value in defaults.items() if name in flip and type(value) is bool}
            return _Tracer(opaque - {root}).trace(root, defaults or None)
        except Exception:  # whatever a forward raises when it is given a Proxy
            return None

    def explore(module: nn.Module, sources: str = "") -> None:
        before = len(opaque)
        if trace(module) is not None:
            return
        sources += _source(module)
        for name, child in module.named_children():
            if not _is_part(child):
                look_into(module, name, child, sources)
        if len(opaque) == before or trace(module) is None:
            opaque.add(module)
            untraceable.append(module)

    def look_into(parent: nn.Module, name: str, child: nn.Module, sources: str) -> None:
        """Into a part of what does not trace."""
        if not _may_be_taken_apart(parent, name, child, sources):
            explore(child, sources)
            return
        opaque.add(child)
        untraceable.append(child)
        for name, part in child.named_children():
            if not _is_part(part):
                look_into(child, name, part, sources)

    for root in (model, *hooked):
        explore(root)
    roots = dict.fromkeys([model, *hooked, *(child for module in untraceable for child in module.children())])
    graphs = [(root, trace(root)) for root in roots if root not in untraceable and not _is_part(root)]
    return [(root, graph) for root, graph in graphs if graph is not None]
