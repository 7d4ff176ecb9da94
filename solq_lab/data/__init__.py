"""COCO-format folders and generated shapes, as images and targets."""
