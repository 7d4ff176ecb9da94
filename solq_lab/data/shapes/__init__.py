"""Drawn data sets of shapes in COCO format."""
