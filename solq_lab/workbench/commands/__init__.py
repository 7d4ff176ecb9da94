"""The commands of `solq-lab`, by theme; each imports what it needs when it is called."""
