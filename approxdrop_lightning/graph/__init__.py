"""Skipping under ``torch.compile``: the dropout is part of the graph.

In the graph that Dynamo captures a dropout and its neighbours stand by data flow, so no lazy tensors are needed. A
dropout site traces to one operator (:mod:`.operator`), and a pass (:mod:`.rewrite`) makes of ``linear -> elementwise*
-> dropout -> elementwise* -> linear`` products of kept units. There is no graph break, and one graph for each pair
``(dp, keep)``, of which there are few (:mod:`.pairs`). Patterns are data (:mod:`.book`): a tensor written before
each batch.

| file | what |
|---|---|
| ``layout.py`` | what is static of a pattern; its mask is the definition |
| ``pairs.py`` | which pairs a compiled run draws |
| ``book.py`` | the tables of a model's dropouts, and their draw |
| ``operator.py`` | the dropout as an operator |
| ``rewrite.py`` | the pass; ``mutation.py`` tells it what is changed in place |
| ``concatenations.py`` | splits dropouts and layers of ``torch.cat`` before the rest of the pass |
| ``rules/`` | functions that the pass knows, one rule each; how to add one is said there |
| ``functional.py`` | dropouts of a graph that are no layers, for the report |
| ``reference.py`` | what the pass must equal |
| ``frames.py`` | functions of layers that are captured within others only |
| ``limit.py`` | the warning when no more graphs may be compiled |
| ``packed.py`` | the maths of packed values; ``native.py`` and ``kernels.py`` by compiled C and by Triton |
| ``doors.py`` | inductor's hook, and the backend of ``torch.compile`` |
"""
