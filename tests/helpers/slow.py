"""Which files of tests are left out of `make quick`: the marker `slow`, given to whole files in one place.

Together the others take under a minute on two cores, importing included. `slow` is also on single tests of quick files:
those that call a compiler.
"""

from __future__ import annotations

COMPILES = (
    *("test_cuda", "test_cuda_compile", "test_cuda_shim", "test_gpu_suite", "test_package", "test_sanitizer"),
    *(
        "test_cuda_attention",
        "test_cuda_attention_compile",
        "test_cuda_engine",
        "test_cuda_engine_rotated",
        "test_cuda_linear",
        "test_cuda_mixture",
        "test_cuda_rows",
        "test_cuda_rows_compile",
        "test_cuda_sample",
        "test_cuda_sanitizers",
        "test_cuda_states",
        "test_cuda_states_compile",
    ),
    *("test_setup", "test_triton", "test_triton_compile", "test_tune"),
)
"""A compiler runs, or a wheel is built."""

LONG = (
    *("test_bank", "test_bench", "test_benchmarks", "test_bench_peers", "test_crash", "test_damaged_files"),
    *("test_data", "test_decoder_random", "test_divergence", "test_engine_families", "test_engine_families_dense"),
    *("test_agreement", "test_answers", "test_benchmarks_search", "test_equal_bytes", "test_quantize_rotation"),
    *("test_quantize_tune", "test_token_weights"),
    *("test_engine_mixtures", "test_engine_published", "test_engine_specs", "test_engine_states", "test_eval"),
    *("test_evaluator", "test_gguf", "test_gguf_families", "test_gradients", "test_graph_capture", "test_hf"),
    *("test_kept", "test_linear_faults", "test_nested", "test_order", "test_output", "test_prefix", "test_quantize"),
    *("test_quantizers", "test_quiet", "test_report", "test_run", "test_runtime_experts", "test_scales"),
    *("test_serve_faults", "test_serve_page", "test_serve_queue", "test_shape", "test_skips", "test_solvers"),
    *("test_split_faults", "test_split_link", "test_split_report", "test_state_engine", "test_state_pool"),
    *("test_dialects", "test_eval_simulated", "test_strategies"),
    *("test_torch_attention", "test_torch_batch", "test_torch_captured", "test_torch_engine", "test_torch_kept"),
    *("test_torch_sequences", "test_usable"),
)
"""Over three seconds of a processor's time, but for what everything rests on: test_linear, test_native, test_engine."""

SLOW = frozenset((*COMPILES, *LONG))
