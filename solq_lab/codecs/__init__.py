"""Mask codes: DCT first. Paper: section 3.2."""
