"""Converts LVIS and YOLO data sets to COCO format."""
