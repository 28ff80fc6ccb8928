"""What was measured with `resnet_jax`, one command each; README.md shows the results.

Figures, most of them testing a claim of a paper: ablation, activation_order, budgets,
depth_and_version, feature_visualisation, fixup, gradient_flow, layer_responses, lesion,
loss_landscape, optimizers, plain_vs_residual, shattered_gradients, shortcut_kinds,
stochastic_depth, thousand_layers.
Measurements of this code: benchmark (against peers/),
fault_injection, minutes, scaling, startup, streaming_benchmark, whole_runs.
Tools: sweep, reproduce (of the tables in published), gallery, results.
Helpers: study (stored cells), curves and trained (runs), arrangements and blockwise
(networks), parallel_runs (over devices).
"""
