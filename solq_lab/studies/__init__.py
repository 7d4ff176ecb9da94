"""Measurements that no training needs: ceilings of codecs, error types, bootstrap intervals, attention, efficiency."""
