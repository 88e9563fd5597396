"""The names that users choose backends and activations by, for help texts: what they name needs torch."""

from __future__ import annotations

ACTIVATIONS = ("fp32", "int8")
"""fp32: exact products. int8: x is rounded to 8 bits per row and group at run time; see `amq.kernels.ops.linear`."""

BACKENDS = ("cpu", "cuda", "triton", "reference")
"""Of those for one device, the fastest first; `amq.kernels.backends` holds their records."""
