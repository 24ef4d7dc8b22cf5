"""A package, so that no library's folder of the same name (torch-fidelity installs one) stands in for it."""
