"""What runs the library: notebooks, training processes, sweeps, tables and the command line."""
