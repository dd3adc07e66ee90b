"""The face of the program: command line, comparisons and their report."""
