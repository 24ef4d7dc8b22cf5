"""Settings for every test."""

import os

# Must be set before torch is imported: threads that spin while they wait make a busy machine ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
