"""What `solq-lab predict` reads and writes."""
