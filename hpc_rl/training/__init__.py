"""The training job: what a recipe asks of it (`task`), one training of a round (`run`), what trainers share (`base`).

The algorithms, their data, the ranks, checkpoints, final weights and reports have a package each. For job bodies; only
`task` and `memory` are without torch, for recipes.
"""
