"""Scripts that load an export in another runtime. They run as files, and import nothing of ptql."""
