"""Skipping under ``torch.compile``: the dropout is part of the graph.

The graph that Dynamo captures shows which layers are around a dropout, so no lazy tensors are needed. A dropout site
traces to one operator (:mod:`.operator`), and a pass (:mod:`.rewrite`) turns ``linear -> elementwise* -> dropout ->
elementwise* -> linear`` into products of kept units. There are no graph breaks, and one graph for each pair ``(dp,
keep)``, of which there are few (:mod:`.pairs`). Patterns are data (:mod:`.book`): a tensor written before each batch.

| file | what |
|---|---|
| ``layout.py`` | the static part of a pattern; its mask is the definition |
| ``pairs.py`` | which pairs a compiled run draws |
| ``book.py`` | the patterns of a model's dropouts: drawing them, and the tables that graphs read |
| ``operator.py`` | the dropout as an operator |
| ``rewrite.py`` | the pass: ``find.py``, ``decide.py``, ``emit.py``, in this order |
| ``concatenations.py`` | splits dropouts and layers after ``torch.cat``, for the rest of the pass |
| ``rules/`` | functions that the pass knows, and how to add one |
| ``nodes.py``, ``names.py``, ``mutation.py`` | queries about nodes; names for the report; tensors changed in place |
| ``functional.py``, ``calls.py`` | dropouts that are function calls: of a graph, and of a model |
| ``guards.py`` | when a graph with such dropouts may run again |
| ``reference.py`` | the definition of the pass, for tests |
| ``counts.py`` | how much was rewritten, for tests and logs |
| ``frames.py`` | functions that Dynamo must not capture on their own |
| ``limit.py`` | the warning when Dynamo compiles no more graphs |
| ``packed.py`` | functions of packed values; ``native.py`` and ``kernels.py`` compute them in C and by Triton |
| ``doors.py`` | inductor's hook, and the backend of ``torch.compile`` |
"""
