"""COCO evaluation of detections: box, mask and boundary AP."""
