"""The outputs of named layers of a network: a forward pass that stops after the last layer asked for.

Two ways, equal up to rounding. `trace_layers` records the pass with `torch.fx`, drops the rest of the network and folds
batch norms into the convolutions before them; it is for networks known to trace well, because `torch.fx` can misread
one that looks at the type of its input or draws random numbers. `HookedLayers` runs any network as it is under forward
hooks. Neither keeps anything between two calls, so several threads may share one network.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from patchcore_rs._limits import ProcessLock
from patchcore_rs._text import shortened

if TYPE_CHECKING:
    from collections.abc import Callable


class _AllLayersSeen(BaseException):
    """Ends a forward pass after the last layer; a BaseException, so that no network's own handler catches it."""


# The outputs of the call in progress: one dict per call, and each thread has a context of its own.
_outputs: ContextVar[dict[str, Any]] = ContextVar("outputs")

# torch.fx patches nn.Module for the time of a trace; two traces at once would undo each other's patches.
_tracing = ProcessLock()


class HookedLayers(nn.Module):
    """The first outputs of `layers` of `module`, whose forward hooks it adds to."""

    def __init__(self, module: nn.Module, layers: tuple[str, ...]) -> None:
        """Hook `layers`, names out of `module.named_modules()`."""
        super().__init__()
        self.module, self.layers = module, layers
        for layer in layers:
            module.get_submodule(layer).register_forward_hook(_Record(layer, len(layers)))
        self.train(module.training)

    def forward(self, images: Tensor) -> list[Any]:
        """The outputs in the order of `layers` for `images` (n, 3, H, W).

        Raises:
            ValueError: a layer does not run.
        """
        outputs: dict[str, Any] = {}
        token = _outputs.set(outputs)
        try:
            self.module(images)
        except _AllLayersSeen:
            pass
        finally:
            _outputs.reset(token)
        for layer in self.layers:
            if layer not in outputs:
                raise ValueError(f"layer {layer!r} does not run in the network's forward pass; choose another")
        return [outputs[layer] for layer in self.layers]


class _Record:
    """The forward hook of one layer out of `count`."""

    def __init__(self, layer: str, count: int) -> None:
        self.layer, self.count = layer, count

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs = _outputs.get(None)
        if outputs is None or self.layer in outputs:
            return
        # A copy, because a later operation may work in place on the output.
        outputs[self.layer] = output.clone() if isinstance(output, Tensor) else output
        if len(outputs) == self.count:
            raise _AllLayersSeen


def trace_layers(module: nn.Module, layers: tuple[str, ...]) -> fx.GraphModule | None:
    """Record the way from images to the first outputs of `layers`, and nothing beyond them.

    Args:
        module: a network in evaluation mode; it is unchanged.
        layers: names out of `module.named_modules()`.

    Returns:
        A network that shares the weights of `module`, except where a batch norm is folded; None where tracing fails.
    """
    tracer = _LayerTracer(layers)
    try:
        tracer.trace(module)
    except _AllLayersSeen:
        pass
    except Exception:  # noqa: BLE001  anything the network's own code makes of a proxy
        return None
    graph, outputs = tracer.graph, [tracer.outputs.get(layer) for layer in layers]
    nodes = [output.node for output in outputs if isinstance(output, fx.Proxy)]
    if len(nodes) != len(layers):
        return None
    last = next(iter(reversed(graph.nodes)))
    for i, node in enumerate(nodes):
        # A copy, because a later operation may work in place on the output; nothing follows the last one.
        if node is not last:
            with graph.inserting_after(node):
                nodes[i] = graph.call_method("clone", (node,))
    graph.output(tuple(nodes))
    for node in graph.nodes:
        node.type = None  # annotations that are text keep old versions of torch from pickling the network
    traced = fx.GraphModule(module, graph)
    _fold_batch_norms(traced)
    return traced.eval()


class _LayerTracer(fx.Tracer):
    """Traces a forward pass until every layer has given its output.

    torch makes one without arguments to trace the code of a `GraphModule` that is unpickled.
    """

    def __init__(self, layers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.layers = layers
        self.outputs: dict[str, Any] = {}
        self.thread = threading.get_ident()

    def trace(self, *arguments: Any, **keywords: Any) -> fx.Graph:
        with _tracing.held():
            return super().trace(*arguments, **keywords)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # The patches of nn.Module reach the forward passes of other threads: let them through.
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        layer = self.path_of_module(m)
        if layer in self.layers and layer not in self.outputs:
            self.outputs[layer] = output
            if len(self.outputs) == len(self.layers):
                raise _AllLayersSeen
        return output


def _fold_batch_norms(traced: fx.GraphModule) -> None:
    """Fold each batch norm whose input is a convolution that nothing else reads into that convolution."""
    modules = dict(traced.named_modules())
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")

    def module_of(node: Any, kind: type[nn.Module]) -> Any:
        """The module that `node` calls, where it is of exactly this kind and is called once."""
        if isinstance(node, fx.Node) and node.op == "call_module" and calls[str(node.target)] == 1:
            module = modules[str(node.target)]
            return module if type(module) is kind else None
        return None

    for node in list(traced.graph.nodes):
        source: Any = node.args[0] if node.args else None
        norm, convolution = module_of(node, nn.BatchNorm2d), module_of(source, nn.Conv2d)
        if norm is not None and convolution is not None and len(source.users) == 1:
            parent, _, child = source.target.rpartition(".")
            setattr(traced.get_submodule(parent), child, fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


def freeze(module: nn.Module) -> None:
    """Evaluation mode, and no gradients."""
    module.eval().requires_grad_(requires_grad=False)


def check_layers(module: nn.Module, layers: tuple[str, ...], backbone: str) -> None:
    """Refuse a layer that is no module of `module`, the network called `backbone`.

    Raises:
        ValueError: with the nearest names.
    """
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for layer in layers:
        if layer not in names:
            wrapped = [name for name in names if name.endswith(f".{layer}")]  # as DataParallel and compile do
            near = wrapped[:3] or difflib.get_close_matches(layer, names)
            hint = f"did you mean {', '.join(map(repr, near))}" if near else f"it has {layer_examples(module)}"
            raise ValueError(f"layer {layer!r} is not a module of backbone {backbone!r}; {hint}?")


def layer_examples(module: nn.Module) -> str:
    """Names of the network's blocks: its children, and for a container the last of its own children."""
    names = []
    for name, child in module.named_children():
        inner = [inner for inner, _ in child.named_children()]
        names.append(f"{name}.{inner[-1]}" if inner and isinstance(child, nn.Sequential) else name)
    return shortened([repr(name) for name in names], 6)
