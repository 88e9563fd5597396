"""amq's checkpoints inside other libraries."""
