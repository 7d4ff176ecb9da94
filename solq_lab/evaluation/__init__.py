"""How good are the detections: box, mask and boundary AP."""
