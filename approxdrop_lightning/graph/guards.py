"""When a graph with functional dropouts may run again: guards, which Dynamo checks before each call.

The pair and the table of an ``nn.Dropout`` are attributes of the module, so Dynamo guards on them by itself. A
function call has no attributes. The pass therefore adds guards while a frame is compiled: on the identity of the
modules from which the frame starts, because blocks that run the same code otherwise share a graph, and hence a
pattern; and on the state of the conversion, because no patterns are drawn during evaluation or after a restore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import UnspecializedNNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, Source, TracingContext
from torch.fx import GraphModule


class Frame:
    """The frame that Dynamo is compiling.

    Attributes:
        roots: Modules of converted models from which the frame reaches all others, by source.
    """

    def __init__(self, roots: dict[Source, nn.Module]) -> None:
        self.roots = roots

    @classmethod
    def current(cls, knows: Callable[[nn.Module], bool]) -> Frame | None:
        """The frame that is being compiled; None if there is none, or if it takes no guards.

        Args:
            knows: Whether a module belongs to a converted model.
        """
        context, translator = TracingContext.try_get(), _translator()
        if context is None or translator is None or getattr(context.guards_context, "skip_install", False):
            return None
        scope = {"L": translator.output.local_scope, "G": translator.output.global_scope}
        sources = {guard.name: guard.originating_source for guard in context.guards_context.dynamo_guards}
        roots: dict[Source, nn.Module] = {}
        for name in sorted(sources, key=len):
            source = sources[name]
            within = any(name.startswith((f"{root.name}.", f"{root.name}[")) for root in roots)
            if isinstance(source, UnspecializedNNModuleSource) and not within:
                module = _evaluated(name, scope)
                if isinstance(module, nn.Module) and knows(module):
                    roots[source.base] = module
        return cls(roots)

    def guard_identity(self) -> None:
        """Let the graph run for these very modules only."""
        for source in self.roots:
            # Dynamo then also limits the number of graphs for each module, not for all that run the code.
            install_guard(Guard(source, GuardBuilder.ID_MATCH))

    def guard(self, holds: Callable[[], bool], text: str) -> None:
        """Let the graph run only while a condition holds.

        Args:
            holds: The condition.
            text: The condition in words, for Dynamo's logs.
        """

        def create(builder: Any, guard: Guard) -> None:
            # At the root: Dynamo skips the guards of modules whose attributes have not changed.
            builder.guard_manager.root.add_lambda_guard(lambda _: holds(), [text], guard.user_stack)

        install_guard(Guard(next(iter(self.roots)), create))


def is_subgraph(gm: GraphModule) -> bool:
    """Whether a graph is part of the one that Dynamo has captured."""
    return _translator() is not None and not hasattr(gm, "_param_name_to_source")


def _translator() -> Any:
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # Dynamo has not compiled anything in this thread
        return None


def _evaluated(name: str, scope: dict[str, Any]) -> Any:
    """The value of a source, as Dynamo itself evaluates it; None if the variables of the frame do not suffice."""
    try:
        return eval(name, scope)
    except Exception:
        return None
