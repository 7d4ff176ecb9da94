"""Downloads COCO 2017: resumed transfers, checksums, safe unpacking."""
