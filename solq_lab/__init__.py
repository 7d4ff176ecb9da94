"""A workbench for SOLQ: segmenting objects by learning queries (NeurIPS 2021)."""
