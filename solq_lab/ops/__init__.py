"""Multi-scale deformable attention: one operator, three implementations."""
