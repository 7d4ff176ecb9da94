"""Downloads COCO 2017 and released weights: resumed transfers, checksums, safe unpacking."""
