"""DDP: diffusion for dense visual prediction (arXiv 2303.17559). Importing it imports no torch."""
