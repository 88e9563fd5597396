"""Backends: the linear op, and a file of bindings per kernel library (amq._cpu, amq._cuda, amq._triton)."""
