"""Checks a COCO data set before anything trains on it."""
