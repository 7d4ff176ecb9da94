"""How much faster than the plain way, measured side by side and checked for equal results."""
