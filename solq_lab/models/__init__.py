"""The network: backbone, deformable transformer, unified query head. Paper: section 3.2."""
