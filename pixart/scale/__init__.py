"""Many pictures or prompts: maps over independent items, on one core, on all cards of a machine, or on a cluster."""
