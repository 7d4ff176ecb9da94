"""Mask codecs. Paper: section 3.2."""
