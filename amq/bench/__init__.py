"""Measures how fast a model runs here: prompt and decode tokens/s.

`python -m amq.bench` is the command; `--peers` measures other engines in turn with ours (amq/bench/peers). Each engine
lives in a process of its own (worker.py) and is idle while another is measured; repetitions alternate between them.
Importing this package loads nothing, so that the process of a peer carries only that peer.
"""
