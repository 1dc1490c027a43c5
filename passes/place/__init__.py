"""Placement: what of a model lies where on a machine, and which way it gets to what computes it.

    problem = Problem(shape, hw_targets.load("rtx-4090"), formats_of("w4a8-g32"), Session(context=8192))
    placement = solve(problem).placement        # frozen; `to_json` and `from_json`

The chain: `formats` (bytes), `machine` (units, homes and ways between them), `parts` (what a model consists of),
`options` (every way to keep and compute a part, with its costs), `milp` and `greedy` (choose), `placement` (the plan).
"""
